package record

import (
	"fmt"
	"testing"

	"github.com/cockroachdb/pebble/v2"

	"github.com/unum-os/unum/internal/principal"
	"github.com/unum-os/unum/internal/wire"
)

// benchApply applies commands made beforehand, 64 to a commit as the host does
// under load, on a database in memory; the commands' making is not measured.
func benchApply(b *testing.B, ops int, command func(i int) Command) {
	r := founded(b)
	defer r.close()
	b.ReportAllocs()
	batch := r.db.NewIndexedBatch()
	const chunk = 64
	var cmds [chunk][]byte
	for n := 0; n < b.N; n += chunk {
		b.StopTimer()
		for i := range cmds {
			c := command(n + i)
			c.Client, c.Seq = 2, uint64(n+i+1)
			c.Acked = c.Seq - min(c.Seq-1, 256) // of so many in flight
			cmds[i] = wire.MustMarshal(c)
		}
		b.StartTimer()
		for i := range min(chunk, b.N-n) {
			r.index++
			res := r.m.ApplyTo(batch, space, r.index, cmds[i])
			if res.Refusal.refused() || len(res.Keys) > 0 && res.Keys[0].Refusal.refused() {
				b.Fatalf("%+v", res)
			}
		}
		if err := batch.Commit(pebble.NoSync); err != nil {
			b.Fatal(err)
		}
		batch = r.db.NewIndexedBatch()
	}
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N*ops), "ns/put")
}

func BenchmarkApplyPut(b *testing.B) {
	value := make([]byte, 64)
	benchApply(b, 1, func(i int) Command {
		return Command{Who: principal.Principal{Node: 1, UID: 1000}, Now: 1e18, Put: &Put{Key: fmt.Sprintf("user/1000/k%d", i%MaxKeys), Value: value}}
	})
}

func BenchmarkApplyBatch(b *testing.B) {
	value := make([]byte, 64)
	ps := make([]Put, MaxBatch)
	for i := range ps {
		ps[i] = Put{Key: fmt.Sprintf("user/1000/k%d", i), Value: value}
	}
	benchApply(b, MaxBatch, func(int) Command {
		return Command{Who: principal.Principal{Node: 1, UID: 1000}, Now: 1e18, Batch: ps}
	})
}

func BenchmarkApplyGrant(b *testing.B) {
	benchApply(b, 1, func(int) Command { return Command{Who: principal.Of(1), GrantJobs: 1000} })
}
