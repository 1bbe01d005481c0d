package volume

import (
	"strings"

	"github.com/cockroachdb/pebble/v2"
	"golang.org/x/sys/unix"

	"github.com/unum-os/unum/internal/errs"
	"github.com/unum-os/unum/internal/ids"
)

// View reads the metadata of a volume. It is as current, as consistent and as
// safe for concurrent use as its reader; a snapshot gives one moment. Errors are
// of class NotFound and the like, or Corrupt and IO when the state cannot be
// read.
type View struct{ s store }

// NewView returns a view of space through r, which the caller closes.
func NewView(r pebble.Reader, space Space) View {
	return View{store{r: r, prefix: space.Key()}}
}

func (r refusal) err(op string) error { return errs.E(r.class, op, "", "%s", r.why) }

func gone(op string, ino ids.Inode) error {
	return errs.E(errs.NotFound, op, "", "inode %d is gone", ino)
}

// GetAttr returns the attributes of ino.
func (v View) GetAttr(ino ids.Inode) (a Attr, err error) {
	defer caught(&err)
	n, ok := v.s.inode(ino)
	if !ok {
		return Attr{}, gone("getattr", ino)
	}
	return n.Attr, nil
}

// Lookup returns the attributes of what name leads to in parent. "." and ".."
// are names here.
func (v View) Lookup(parent ids.Inode, name string) (a Attr, err error) {
	defer caught(&err)
	p, ok := v.s.inode(parent)
	switch {
	case !ok:
		return Attr{}, gone("lookup", parent)
	case !isDir(p.Attr.Mode):
		return Attr{}, errs.E(errs.NotDir, "lookup", name, "inode %d is not a directory", parent)
	case name == ".":
		return p.Attr, nil
	case name == "..":
		return v.GetAttr(p.Attr.Parent)
	}
	if r := checkName(name); r.refused() {
		return Attr{}, r.err("lookup")
	}
	ino, _ := v.s.entry(parent, name)
	if ino == 0 {
		return Attr{}, errs.E(errs.NotFound, "lookup", name, "no such name in directory %d", parent)
	}
	n, ok := v.s.inode(ino)
	if !ok {
		fail(errs.Corrupt, v.s.key(tagInode, uint64(ino)), errNamed)
	}
	return n.Attr, nil
}

// ReadDir returns up to limit entries of dir (at most MaxListing) whose names
// come after the name after, sorted by name. Fewer than limit means the end.
func (v View) ReadDir(dir ids.Inode, after string, limit int) (ents []Dirent, err error) {
	defer caught(&err)
	n, ok := v.s.inode(dir)
	switch {
	case !ok:
		return nil, gone("readdir", dir)
	case !isDir(n.Attr.Mode):
		return nil, errs.E(errs.NotDir, "readdir", "", "inode %d is not a directory", dir)
	}
	limit = min(limit, MaxListing)
	if limit <= 0 {
		return nil, nil
	}
	lo := v.s.named(tagEntry, dir, after)
	if after != "" {
		lo = append(lo, 0)
	}
	v.s.scan(lo, v.s.key(tagEntry, uint64(dir)+1), func(k, val []byte) bool {
		ino, mode := decodeEntry(k, val)
		ents = append(ents, Dirent{Name: string(k[8:]), Ino: ino, Mode: mode})
		return len(ents) < limit
	})
	return ents, nil
}

// Extents returns up to limit extents of ino that reach beyond off, in order;
// holes are what lies between them. Fewer than limit means the end. The next
// page begins at the last one's End.
func (v View) Extents(ino ids.Inode, off uint64, limit int) (out []Extent, err error) {
	defer caught(&err)
	if off >= MaxFile || limit <= 0 {
		return nil, nil
	}
	it := v.s.extentsFrom(ino, off, MaxFile)
	defer it.close()
	for len(out) < limit {
		e, ok := it.next()
		if !ok {
			break
		}
		out = append(out, e)
	}
	return out, nil
}

// Readlink returns the target of a symbolic link.
func (v View) Readlink(ino ids.Inode) (target string, err error) {
	defer caught(&err)
	n, ok := v.s.inode(ino)
	switch {
	case !ok:
		return "", gone("readlink", ino)
	case n.Attr.Mode&sIFMT != sIFLNK:
		return "", errs.E(errs.Invalid, "readlink", "", "inode %d is not a symbolic link", ino)
	}
	return n.Target, nil
}

// GetXattr returns the value of an extended attribute; without it class NoData.
func (v View) GetXattr(ino ids.Inode, name string) (value []byte, err error) {
	defer caught(&err)
	if _, ok := v.s.inode(ino); !ok {
		return nil, gone("getxattr", ino)
	}
	if r := checkXattrName(name); r.refused() {
		return nil, r.err("getxattr")
	}
	value, ok := v.s.get(v.s.named(tagXattr, ino, name))
	if !ok {
		return nil, errs.E(errs.NoData, "getxattr", name, "inode %d has no such attribute", ino)
	}
	return value, nil
}

// ListXattr returns the names of ino's extended attributes, sorted.
func (v View) ListXattr(ino ids.Inode) (names []string, err error) {
	defer caught(&err)
	n, ok := v.s.inode(ino)
	if !ok {
		return nil, gone("listxattr", ino)
	}
	if n.Xattrs == 0 {
		return nil, nil
	}
	lo := v.s.key(tagXattr, uint64(ino))
	v.s.scan(lo, after(lo), func(k, _ []byte) bool {
		names = append(names, string(k[8:]))
		return true
	})
	return names, nil
}

// GetLock returns a lock that is in the way of l, whose Session must be set; l
// with type F_UNLCK when none is.
func (v View) GetLock(ino ids.Inode, l Lock) (held Lock, err error) {
	defer caught(&err)
	if r := checkLock(&l); r.refused() {
		return Lock{}, r.err("getlock")
	}
	if l.Type != unix.F_UNLCK {
		if c := conflict(v.s.locks(ino), &l); c != nil {
			return *c, nil
		}
	}
	l.Type = unix.F_UNLCK
	return l, nil
}

// Locks returns all locks of ino, sorted by kind, session, owner and start.
func (v View) Locks(ino ids.Inode) (locks []Lock, err error) {
	defer caught(&err)
	return v.s.locks(ino), nil
}

// Sessions returns the open sessions, the oldest first.
func (v View) Sessions() (out []SessionInfo, err error) {
	defer caught(&err)
	return v.s.sessions(), nil
}

// Orphans returns the inodes without a name that session id keeps, sorted.
func (v View) Orphans(id ids.Session) (inos []ids.Inode, err error) {
	defer caught(&err)
	t := txn{store: v.s}
	return t.inodesOf(tagKept, id), nil
}

// Usage counts what a volume holds.
type Usage struct {
	Inodes uint64 `cbor:"1,keyasint"` // the root and orphans included
	Bytes  uint64 `cbor:"2,keyasint"` // covered by extents
}

// Stat returns the exact usage at the reader's moment.
func (v View) Stat() (u Usage, err error) {
	defer caught(&err)
	c := v.s.counters()
	return Usage{Inodes: c.Inodes, Bytes: c.Bytes}, nil
}

// WalkBlocks calls fn for the block of every extent of the volume, until it
// returns false. A block comes once for each extent that names it; need is how
// many of its bytes that extent relies on: it is at least so long.
func (v View) WalkBlocks(fn func(name BlockName, need uint32) bool) (err error) {
	defer caught(&err)
	lo := v.s.key(tagExtent)
	v.s.scan(lo, after(lo), func(k, val []byte) bool {
		var e Extent
		v.s.decode(k, val, &e)
		return e.Block == nil || fn(*e.Block, e.From+e.Len)
	})
	return nil
}

// CheckName reports whether name can name a file: class Invalid or TooLong.
func CheckName(name string) error {
	if r := checkName(name); r.refused() {
		return errs.E(r.class, "name", "", "%s", strings.ToLower(r.why))
	}
	return nil
}
