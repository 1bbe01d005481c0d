package group

import (
	"encoding/binary"

	"google.golang.org/protobuf/proto"

	"github.com/unum-os/unum/internal/errs"
	"github.com/unum-os/unum/internal/ids"
	pb "go.etcd.io/raft/v3/raftpb"
)

// A key of the state database is the group (8 bytes, big endian), a kind, and
// the rest: so a group's keys lie together and its record comes first.
const (
	kindApplied byte = 0 // the one record of what has been applied
	kindData    byte = 1 // the machine's keys
)

// Space is the part of the state database that belongs to one group's machine.
type Space struct{ group ids.Group }

// NewSpace returns g's space.
func NewSpace(g ids.Group) Space { return Space{g} }

// Group returns the group whose space it is.
func (s Space) Group() ids.Group { return s.group }

// Key returns the database key for the parts, joined without separators: the
// caller's encoding must keep them apart. The result is the caller's.
func (s Space) Key(parts ...[]byte) []byte {
	n := 9
	for _, p := range parts {
		n += len(p)
	}
	k := make([]byte, 9, n)
	binary.BigEndian.PutUint64(k, uint64(s.group))
	k[8] = kindData
	for _, p := range parts {
		k = append(k, p...)
	}
	return k
}

// Bounds returns the first key of the space and the first key after it.
func (s Space) Bounds() (lo, hi []byte) {
	lo, hi = s.Key(), s.Key()
	hi[8]++
	return lo, hi
}

// Suffix returns what Key was given, from a key of the space. It shares memory
// with key.
func (s Space) Suffix(key []byte) []byte { return key[9:] }

// groupBounds covers all keys of g in the state database, its record too.
func groupBounds(g ids.Group) (lo, hi []byte) {
	lo = binary.BigEndian.AppendUint64(nil, uint64(g))
	return lo, binary.BigEndian.AppendUint64(nil, uint64(g)+1)
}

func appliedKey(g ids.Group) []byte {
	return append(binary.BigEndian.AppendUint64(nil, uint64(g)), kindApplied)
}

// point is a place in a group's log and the configuration in force there.
type point struct {
	index, term uint64
	conf        *pb.ConfState
}

// encode gives [index u64][term u64][ConfState].
func (p point) encode() ([]byte, error) {
	b := binary.BigEndian.AppendUint64(make([]byte, 0, 48), p.index)
	b = binary.BigEndian.AppendUint64(b, p.term)
	return proto.MarshalOptions{Deterministic: true}.MarshalAppend(b, p.conf)
}

func decodePoint(b []byte, place string) (point, error) {
	if len(b) < 16 {
		return point{}, errs.E(errs.Corrupt, "read", place, "%d bytes, want at least 16", len(b))
	}
	p := point{index: binary.BigEndian.Uint64(b), term: binary.BigEndian.Uint64(b[8:]), conf: &pb.ConfState{}}
	if err := proto.Unmarshal(b[16:], p.conf); err != nil {
		return point{}, errs.E(errs.Corrupt, "read", place, "configuration: %v", err)
	}
	return p, nil
}
