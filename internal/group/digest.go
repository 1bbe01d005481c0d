package group

import (
	"encoding/binary"

	"github.com/cockroachdb/pebble/v2"
	"github.com/zeebo/blake3"
)

// Digest returns a hash over all keys and values of the group's applied state,
// and the index it stands at: replicas at the same index agree, or one of them is
// wrong. It reads the whole state.
func (g *Group) Digest() (index uint64, sum [32]byte, err error) {
	v, err := g.View()
	if err != nil {
		return 0, sum, err
	}
	defer v.Close()
	lo, hi := v.Space.Bounds()
	it, err := v.NewIter(&pebble.IterOptions{LowerBound: lo, UpperBound: hi})
	if err != nil {
		return 0, sum, dbErr(err, "read", "state")
	}
	defer it.Close()
	h := blake3.New()
	var n [8]byte
	for it.First(); it.Valid(); it.Next() {
		for _, b := range [][]byte{it.Key(), it.Value()} {
			binary.BigEndian.PutUint64(n[:], uint64(len(b)))
			h.Write(n[:])
			h.Write(b)
		}
	}
	if err := it.Error(); err != nil {
		return 0, sum, dbErr(err, "read", "state")
	}
	h.Sum(sum[:0])
	return v.Index, sum, nil
}
