package record

import (
	"encoding/binary"
	"errors"

	"github.com/cockroachdb/pebble/v2"

	"github.com/unum-os/unum/internal/errs"
	"github.com/unum-os/unum/internal/wire"
)

// Tags of the key families: see the package comment. They are on disk.
const (
	tagInfo     = 'i'
	tagCounters = 'c'
	tagMember   = 'n'
	tagToken    = 't'
	tagJob      = 'j'
	tagFinished = 'f'
	tagClient   = 'o'
	tagResult   = 'r'
	tagKey      = 'k'
	tagUsage    = 'q'
	tagUser     = 'p'
	tagUserName = 'w'
	tagLogin    = 'l'
	tagHistory  = 'e'
	tagAudit    = 'a'

	// Of before clients belonged to nodes, and of before a command's events stood
	// under one key; read by nobody, and cleared.
	tagOldClient   = 'u'
	tagOldClientAt = 'v'
	tagOldResult   = 'd'
	tagOldHistory  = 'h'
)

// fault is what a store panics with when the state cannot be read, decoded or
// written. Views turn it into an error; Apply lets it stop the replica.
type fault struct{ err *errs.Error }

func (f fault) Error() string { return f.err.Error() }
func (f fault) Unwrap() error { return f.err }

func fail(class errs.Class, key []byte, err error) {
	panic(fault{&errs.Error{Op: "cluster record", Subject: errsKey(key), Class: class, Err: err}})
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
	k := make([]byte, 0, len(s.prefix)+1+8*len(nums))
	k = append(append(k, s.prefix...), tag)
	for _, n := range nums {
		k = binary.BigEndian.AppendUint64(k, n)
	}
	return k
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

// clear deletes the keys in [lo, hi); they are few.
func (s *store) clear(lo, hi []byte) {
	s.scan(lo, hi, func(k, _ []byte) bool {
		s.delete(append(lo[:len(s.prefix)+1:len(s.prefix)+1], k...))
		return true
	})
}

// number reads the i-th number of a key as scan gives it.
func number(k []byte, i int) uint64 {
	if len(k) < 8*i+8 {
		fail(errs.Corrupt, k, errors.New("short key"))
	}
	return binary.BigEndian.Uint64(k[8*i:])
}
