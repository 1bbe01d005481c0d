package venus

import (
	"bytes"
	"math/rand/v2"
	"testing"

	"github.com/unum-os/unum/internal/volume"
	"github.com/unum-os/unum/internal/wire"
)

// Random writes, cuts and merges against a plain copy; the counts kept on the
// way are those that counting anew gives.
func TestPendingAgainstBytes(t *testing.T) {
	const size = 3 * volume.MaxBlock
	rng := rand.New(rand.NewPCG(1, 2))
	for round := range 200 {
		parts := [2]*pending{newPending(), newPending()} // older, newer
		var want, set [size]byte
		for i := range 60 {
			p := parts[min(i/30, 1)]
			lo := rng.IntN(size)
			if rng.IntN(10) == 0 {
				p.truncate(uint64(lo))
				p.grown = true
				clear(want[lo:])
				clear(set[lo:])
				continue
			}
			n := min(1+rng.IntN(5000), size-lo)
			b := bytes.Repeat([]byte{byte(1 + rng.IntN(255))}, n)
			p.write(uint64(lo), b)
			copy(want[lo:], b)
			copy(set[lo:], bytes.Repeat([]byte{1}, n))
		}
		p := parts[0]
		p.merge(parts[1])
		var got, gotSet [size]byte
		pieces, total := 0, 0
		for _, s := range p.spans() {
			pieces++
			total += int(s.hi - s.lo)
			for i := s.lo; i < s.hi; i++ {
				gotSet[i] = 1
			}
		}
		for _, x := range p.patches(nil, 0, size) {
			copy(got[x.off:], x.data)
		}
		if got != want || gotSet != set {
			t.Fatalf("round %d: content differs", round)
		}
		if pieces != p.pieces || total != p.bytes {
			t.Fatalf("round %d: %d pieces of %d bytes, counted %d of %d", round, pieces, total, p.pieces, p.bytes)
		}
	}
}

// However much is pending, each record of it can be proposed, and all of it is
// in the records, in order.
func TestRecordsFit(t *testing.T) {
	rng := rand.New(rand.NewPCG(3, 4))
	name := volume.BlockName{1, 2, 3}
	for range 30 {
		var ops []volume.Op
		inline := 0
		for range 1 + rng.IntN(9000) {
			op := volume.Op{Kind: volume.OpWrite, Ino: 1 << 60, Size: 1 << 60, Time: 1 << 60}
			for range rng.IntN(40) * rng.IntN(2) {
				e := volume.Extent{Off: 1 << 60, Len: 1 << 30, From: 1 << 30, Block: &name}
				if n := rng.IntN(volume.MaxInline); inline+n < inlineBudget {
					e = volume.Extent{Off: 1 << 60, Len: uint32(n), Data: make([]byte, n)}
					inline += n
				}
				op.Extents = append(op.Extents, e)
			}
			ops = append(ops, op)
		}
		n := 0
		for _, part := range records(ops) {
			b, err := wire.Marshal(&volume.Command{Session: 1 << 60, Seq: 1 << 60, Acked: 1 << 60, Ops: part})
			if err != nil {
				t.Fatal(err)
			}
			if len(b) > volume.MaxBatch || len(part) > volume.MaxOps || len(part) == 0 {
				t.Fatalf("a record of %d operations, %d bytes", len(part), len(b))
			}
			for i := range part {
				if &part[i] != &ops[n] {
					t.Fatal("out of order")
				}
				n++
			}
		}
		if n != len(ops) {
			t.Fatalf("%d of %d operations", n, len(ops))
		}
	}
}
