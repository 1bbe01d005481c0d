package volume

import (
	"encoding/binary"
	"errors"

	"github.com/cockroachdb/pebble/v2"

	"github.com/unum-os/unum/internal/errs"
	"github.com/unum-os/unum/internal/ids"
	"github.com/unum-os/unum/internal/wire"
)

// Tags of the key families: see the package comment. They are on disk.
const (
	tagCounters = 'c'
	tagInode    = 'i'
	tagEntry    = 'e'
	tagExtent   = 'x'
	tagXattr    = 'a'
	tagSession  = 's'
	tagDone     = 'd'
	tagKeeper   = 'o'
	tagKept     = 'p'
	tagLocks    = 'l'
	tagLocked   = 'm'
)

// clearOneByOne is how many keys are deleted singly before a range tombstone is
// used: one tombstone costs every later read of its neighbourhood, many single
// ones cost space in the batch.
const clearOneByOne = 64

// fault is what a store panics with when the state cannot be read, decoded or
// written. Views turn it into an error; Apply lets it stop the replica.
type fault struct{ err *errs.Error }

func (f fault) Error() string { return f.err.Error() }
func (f fault) Unwrap() error { return f.err }

func fail(class errs.Class, key []byte, err error) {
	panic(fault{&errs.Error{Op: "volume state", Subject: errsKey(key), Class: class, Err: err}})
}

func errsKey(key []byte) string {
	const hex = "0123456789abcdef"
	out := make([]byte, 0, 2*len(key)+4)
	out = append(out, "key "...)
	for _, c := range key {
		out = append(out, hex[c>>4], hex[c&15])
	}
	return string(out)
}

func readClass(err error) errs.Class {
	if pebble.IsCorruptionError(err) {
		return errs.Corrupt
	}
	return errs.IO
}

// caught turns a fault into an error of the function that defers it.
func caught(err *error) {
	switch r := recover().(type) {
	case nil:
	case fault:
		*err = r.err
	default:
		panic(r)
	}
}

// store reads and writes the keys of one space. w is nil in a View.
type store struct {
	r      pebble.Reader
	w      pebble.Writer
	prefix []byte
}

// key builds a key of numbers.
func (s *store) key(tag byte, nums ...uint64) []byte {
	k := make([]byte, 0, len(s.prefix)+1+8*len(nums)+32) // room for a name
	k = append(append(k, s.prefix...), tag)
	for _, n := range nums {
		k = binary.BigEndian.AppendUint64(k, n)
	}
	return k
}

// named builds a key of an inode and a name.
func (s *store) named(tag byte, ino ids.Inode, name string) []byte {
	return append(s.key(tag, uint64(ino)), name...)
}

// after returns the least key greater than every key that begins with prefix.
func after(prefix []byte) []byte {
	k := append([]byte(nil), prefix...)
	for i := len(k) - 1; i >= 0; i-- {
		if k[i]++; k[i] != 0 {
			return k[:i+1]
		}
	}
	return nil
}

// get returns a copy of the value of key.
func (s *store) get(key []byte) ([]byte, bool) {
	v, c, err := s.r.Get(key)
	if errors.Is(err, pebble.ErrNotFound) {
		return nil, false
	}
	if err != nil {
		fail(readClass(err), key, err)
	}
	out := append([]byte{}, v...)
	if err := c.Close(); err != nil {
		fail(readClass(err), key, err)
	}
	return out, true
}

// load decodes the CBOR value of key into v and reports whether there is one.
func (s *store) load(key []byte, v any) bool {
	b, ok := s.get(key)
	if ok {
		s.decode(key, b, v)
	}
	return ok
}

func (s *store) decode(key, b []byte, v any) {
	if err := wire.Unmarshal(b, v); err != nil {
		fail(errs.Corrupt, key, err)
	}
}

func (s *store) set(key, value []byte) {
	if err := s.w.Set(key, value, nil); err != nil {
		fail(errs.IO, key, err)
	}
}

func (s *store) save(key []byte, v any) { s.set(key, wire.MustMarshal(v)) }

func (s *store) delete(key []byte) {
	if err := s.w.Delete(key, nil); err != nil {
		fail(errs.IO, key, err)
	}
}

// scan calls fn with the keys in [lo, hi), without prefix and tag, and their
// values, in order, until it returns false. fn may write; the scan does not see
// it. The slices are valid during the call.
func (s *store) scan(lo, hi []byte, fn func(k, v []byte) bool) {
	it, err := s.r.NewIter(&pebble.IterOptions{LowerBound: lo, UpperBound: hi})
	if err != nil {
		fail(readClass(err), lo, err)
	}
	defer it.Close() // an error of the scan is seen below
	for ok := it.First(); ok; ok = it.Next() {
		v, err := it.ValueAndErr()
		if err != nil {
			fail(readClass(err), it.Key(), err)
		}
		if !fn(it.Key()[len(s.prefix)+1:], v) {
			return
		}
	}
	if err := it.Error(); err != nil {
		fail(readClass(err), lo, err)
	}
}

// clear deletes the keys in [lo, hi).
func (s *store) clear(lo, hi []byte) {
	n := 0
	s.scan(lo, hi, func(k, _ []byte) bool {
		if n++; n > clearOneByOne {
			return false
		}
		s.delete(append(lo[:len(s.prefix)+1:len(s.prefix)+1], k...))
		return true
	})
	if n > clearOneByOne {
		if err := s.w.DeleteRange(lo, hi, nil); err != nil {
			fail(errs.IO, lo, err)
		}
	}
}

// number reads the i-th number of a key as scan gives it.
func number(k []byte, i int) uint64 {
	if len(k) < 8*i+8 {
		fail(errs.Corrupt, k, errors.New("short key"))
	}
	return binary.BigEndian.Uint64(k[8*i:])
}

// inode is the record of an inode.
type inode struct {
	Attr     Attr   `cbor:"1,keyasint"`
	Target   string `cbor:"2,keyasint,omitempty"` // of a symlink
	Linkable bool   `cbor:"3,keyasint,omitempty"` // made by O_TMPFILE and never named
	Xattrs   uint32 `cbor:"4,keyasint,omitempty"` // number of extended attributes
}

// counters is the record of what is counted.
type counters struct {
	Next   ids.Inode `cbor:"1,keyasint"` // next inode number; never reused
	Inodes uint64    `cbor:"2,keyasint"` // root and orphans included
	Bytes  uint64    `cbor:"3,keyasint"` // sum of Attr.Alloc
}

// session is the record of an open session.
type session struct {
	Node  ids.Node `cbor:"1,keyasint"`
	Nonce uint64   `cbor:"2,keyasint"`
	Acked uint64   `cbor:"3,keyasint,omitempty"` // results below are forgotten
}

func rootInode() inode {
	return inode{Attr: Attr{Ino: ids.RootInode, Mode: sIFDIR | 0o755, Nlink: 2, Version: 1, Parent: ids.RootInode}}
}

func (s *store) inode(ino ids.Inode) (inode, bool) {
	var n inode
	if s.load(s.key(tagInode, uint64(ino)), &n) {
		return n, true
	}
	if ino == ids.RootInode {
		return rootInode(), true
	}
	return inode{}, false
}

func (s *store) counters() counters {
	c := counters{Next: ids.RootInode + 1, Inodes: 1}
	s.load(s.key(tagCounters), &c)
	return c
}

// entry looks a name up; no entry has inode 0.
func (s *store) entry(dir ids.Inode, name string) (ids.Inode, uint32) {
	key := s.named(tagEntry, dir, name)
	v, ok := s.get(key)
	if !ok {
		return 0, 0
	}
	return decodeEntry(key, v)
}

func decodeEntry(key, v []byte) (ids.Inode, uint32) {
	if len(v) != 12 {
		fail(errs.Corrupt, key, errors.New("directory entry is not 12 bytes"))
	}
	return ids.Inode(binary.BigEndian.Uint64(v)), binary.BigEndian.Uint32(v[8:])
}

func (s *store) setEntry(dir ids.Inode, name string, ino ids.Inode, mode uint32) {
	var v [12]byte
	binary.BigEndian.PutUint64(v[:], uint64(ino))
	binary.BigEndian.PutUint32(v[8:], mode&sIFMT)
	s.set(s.named(tagEntry, dir, name), v[:])
}

func (s *store) session(id ids.Session) (session, bool) {
	var v session
	ok := s.load(s.key(tagSession, uint64(id)), &v)
	return v, ok
}
