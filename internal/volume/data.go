package volume

import (
	"errors"
	"math"
	"strings"

	"github.com/cockroachdb/pebble/v2"

	"github.com/unum-os/unum/internal/errs"
	"github.com/unum-os/unum/internal/ids"
)

// Flags of SetXattr.
const (
	xattrCreate  = 1
	xattrReplace = 2
)

// maxXattrs bounds the extended attributes of one inode: names of 255 bytes in
// this number just fill the 64 KiB that listxattr(2) can return.
const maxXattrs = 256

const setMask = SetMode | SetUid | SetGid | SetSize | SetAtime | SetMtime | SetCtime | KillPriv

func (t *txn) setAttr(op *Op) refusal {
	n := t.node(op.Ino)
	switch {
	case n == nil:
		return no(errs.NotFound, "inode %d is gone", op.Ino)
	case op.Mask&^setMask != 0:
		return no(errs.Invalid, "mask %#x", op.Mask)
	}
	if op.Mask&SetSize != 0 {
		if _, r := t.file(op.Ino); r.refused() {
			return r
		}
		if op.Size > MaxFile {
			return no(errs.TooLarge, "size %d, limit %d", op.Size, uint64(MaxFile))
		}
	}
	if op.Mask == 0 {
		t.show(n)
		return done
	}

	t.change(n)
	if op.Mask&SetMode != 0 {
		n.Attr.Mode = n.Attr.Mode&sIFMT | op.Mode&0o7777
	}
	if op.Mask&SetUid != 0 {
		n.Attr.Uid = op.Uid
	}
	if op.Mask&SetGid != 0 {
		n.Attr.Gid = op.Gid
	}
	t.killPriv(n, op)
	if op.Mask&SetSize != 0 {
		if op.Size < n.Attr.Size {
			t.cut(n, op.Size, n.Attr.Size)
		}
		n.Attr.Size = op.Size
		t.changeData(n)
	}
	if op.Mask&SetAtime != 0 {
		n.Attr.Atime = op.Atime
	}
	if op.Mask&SetMtime != 0 {
		n.Attr.Mtime = op.Mtime
	}
	return done
}

// killPriv takes set-user-id, and set-group-id where it means more than
// mandatory locking, from a regular file.
func (t *txn) killPriv(n *node, op *Op) {
	if op.Mask&KillPriv == 0 || !n.isReg() {
		return
	}
	n.Attr.Mode &^= sISUID
	if n.Attr.Mode&sIXGRP != 0 {
		n.Attr.Mode &^= sISGID
	}
}

// End returns the offset after e's last byte.
func (e *Extent) End() uint64 { return e.Off + uint64(e.Len) }

// sub returns the part of e in [off, end), which must lie inside it.
func (e *Extent) sub(off, end uint64) Extent {
	skip, out := uint32(off-e.Off), *e
	out.Off, out.Len = off, uint32(end-off)
	switch {
	case e.Data != nil:
		out.Data = append([]byte(nil), e.Data[skip:skip+out.Len]...)
	case e.Block != nil:
		out.From += skip
	}
	return out
}

// check judges an extent's form.
func (e *Extent) check() refusal {
	switch {
	case e.Len == 0:
		return no(errs.Invalid, "empty extent at %d", e.Off)
	case e.Off > MaxFile || e.End() > MaxFile:
		return no(errs.TooLarge, "extent ends at %d, limit %d", e.End(), uint64(MaxFile))
	case e.Data != nil && e.Block != nil:
		return no(errs.Invalid, "extent at %d has both data and a block", e.Off)
	case e.Data != nil && (len(e.Data) > MaxInline || len(e.Data) != int(e.Len)):
		return no(errs.Invalid, "extent at %d of %d bytes carries %d, limit %d", e.Off, e.Len, len(e.Data), MaxInline)
	case e.Block != nil && uint64(e.From)+uint64(e.Len) > MaxBlock:
		return no(errs.Invalid, "extent at %d names bytes %d to %d of a block, limit %d", e.Off, e.From, uint64(e.From)+uint64(e.Len), MaxBlock)
	case e.Block == nil && e.From != 0:
		return no(errs.Invalid, "extent at %d begins inside no block", e.Off)
	}
	return done
}

func (t *txn) write(op *Op) refusal {
	n, r := t.file(op.Ino)
	if r.refused() {
		return r
	}
	if op.Mask&^KillPriv != 0 {
		return no(errs.Invalid, "mask %#x", op.Mask)
	}
	if op.Size > MaxFile {
		return no(errs.TooLarge, "size %d, limit %d", op.Size, uint64(MaxFile))
	}
	for i := range op.Extents {
		if r := op.Extents[i].check(); r.refused() {
			return r
		}
	}

	t.changeData(n)
	t.killPriv(n, op)
	for i := range op.Extents {
		e := &op.Extents[i]
		t.cut(n, e.Off, e.End())
		n.Attr.Size = max(n.Attr.Size, e.End())
		if e.Hole() {
			continue
		}
		t.putExtent(n, e)
		if e.Block != nil {
			t.blocks = append(t.blocks, *e.Block)
		}
	}
	n.Attr.Size = max(n.Attr.Size, op.Size)
	return done
}

func (t *txn) punch(op *Op) refusal {
	n, r := t.file(op.Ino)
	switch {
	case r.refused():
		return r
	case op.Mask&^KillPriv != 0:
		return no(errs.Invalid, "mask %#x", op.Mask)
	case op.Len == 0 || op.Len > math.MaxUint64-op.Off:
		return no(errs.Invalid, "range of %d bytes from %d", op.Len, op.Off)
	}
	t.changeData(n)
	t.killPriv(n, op)
	t.cut(n, op.Off, op.Off+op.Len)
	return done
}

func (t *txn) putExtent(n *node, e *Extent) {
	t.save(t.key(tagExtent, uint64(n.Attr.Ino), e.Off), *e)
	t.alloc(n, int64(e.Len))
}

// cut makes [off, end) of n a hole. No extent reaches beyond n's size, so what
// is appended costs no search.
func (t *txn) cut(n *node, off, end uint64) {
	if off >= n.Attr.Size || n.Attr.Alloc == 0 {
		return
	}
	ino := uint64(n.Attr.Ino)
	it := t.extentsFrom(n.Attr.Ino, off, end)
	defer it.close()
	whole := 0             // extents whose key goes
	var first, last uint64 // the first and last of them
	for e, ok := it.next(); ok; e, ok = it.next() {
		lo, hi := max(e.Off, off), min(e.End(), end)
		t.alloc(n, -int64(hi-lo))
		if e.Off < off { // its key stays, its head too
			t.save(t.key(tagExtent, ino, e.Off), e.sub(e.Off, off))
		} else {
			if whole++; whole == 1 {
				first = e.Off
			}
			last = e.Off
			if whole <= clearOneByOne {
				t.delete(t.key(tagExtent, ino, e.Off))
			}
		}
		if e.End() > end { // its tail gets a key beyond all that go
			t.save(t.key(tagExtent, ino, end), e.sub(end, e.End()))
		}
	}
	if whole > clearOneByOne {
		t.rangeDelete(ino, first, last)
	}
}

// rangeDelete deletes the extents that begin in [first, last].
func (t *txn) rangeDelete(ino, first, last uint64) {
	lo, hi := t.key(tagExtent, ino, first), t.key(tagExtent, ino, last+1)
	if err := t.w.DeleteRange(lo, hi, nil); err != nil {
		fail(errs.IO, lo, err)
	}
}

// extents walks the extents of a file that reach into a range.
type extents struct {
	s     *store
	it    *pebble.Iterator
	off   uint64
	valid bool
}

// extentsFrom returns the extents of ino that have a byte in [off, end), in
// order. It must be closed.
func (s *store) extentsFrom(ino ids.Inode, off, end uint64) *extents {
	lo := s.key(tagExtent, uint64(ino))
	it, err := s.r.NewIter(&pebble.IterOptions{LowerBound: lo, UpperBound: s.key(tagExtent, uint64(ino), end)})
	if err != nil {
		fail(readClass(err), lo, err)
	}
	at := s.key(tagExtent, uint64(ino), off)
	x := &extents{s: s, it: it, off: off}
	// The one before may reach in; next skips it when it does not.
	if x.valid = it.SeekLT(at); !x.valid {
		x.valid = it.SeekGE(at)
	}
	return x
}

func (x *extents) next() (Extent, bool) {
	for x.valid {
		v, err := x.it.ValueAndErr()
		if err != nil {
			fail(readClass(err), x.it.Key(), err)
		}
		var e Extent
		x.s.decode(x.it.Key(), v, &e)
		if r := e.check(); r.refused() {
			fail(errs.Corrupt, x.it.Key(), errors.New(r.why))
		}
		x.valid = x.it.Next()
		if e.End() > x.off {
			return e, true
		}
	}
	if err := x.it.Error(); err != nil {
		fail(readClass(err), nil, err)
	}
	return Extent{}, false
}

// close frees the iterator; an error of the walk was seen by next.
func (x *extents) close() { x.it.Close() }

func checkXattrName(name string) refusal {
	switch {
	case len(name) > MaxName:
		return no(errs.Range, "attribute name of %d bytes, limit %d", len(name), MaxName)
	case name == "" || strings.Contains(name, "\x00"):
		return no(errs.Invalid, "%q cannot be an attribute's name", name)
	}
	return done
}

func (t *txn) setXattr(op *Op) refusal {
	n := t.node(op.Ino)
	if n == nil {
		return no(errs.NotFound, "inode %d is gone", op.Ino)
	}
	if r := checkXattrName(op.Name); r.refused() {
		return r
	}
	key := t.store.named(tagXattr, op.Ino, op.Name)
	_, exists := t.get(key)
	switch {
	case op.Flags&^(xattrCreate|xattrReplace) != 0:
		return no(errs.Invalid, "flags %#x", op.Flags)
	case len(op.Value) > MaxXattr:
		return no(errs.TooLarge, "value of %d bytes, limit %d", len(op.Value), MaxXattr)
	case exists && op.Flags&xattrCreate != 0:
		return no(errs.Exists, "attribute %q exists", op.Name)
	case !exists && op.Flags&xattrReplace != 0:
		return no(errs.NoData, "no attribute %q", op.Name)
	case !exists && n.Xattrs >= maxXattrs:
		return no(errs.NoSpace, "inode %d has %d attributes already", op.Ino, n.Xattrs)
	}
	t.change(n)
	t.set(key, op.Value)
	if !exists {
		n.Xattrs++
	}
	return done
}

func (t *txn) removeXattr(op *Op) refusal {
	n := t.node(op.Ino)
	if n == nil {
		return no(errs.NotFound, "inode %d is gone", op.Ino)
	}
	if r := checkXattrName(op.Name); r.refused() {
		return r
	}
	key := t.store.named(tagXattr, op.Ino, op.Name)
	if _, exists := t.get(key); !exists {
		return no(errs.NoData, "no attribute %q", op.Name)
	}
	t.change(n)
	t.delete(key)
	n.Xattrs--
	return done
}
