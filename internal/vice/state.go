package vice

import (
	"github.com/cockroachdb/pebble/v2"

	"github.com/unum-os/unum/internal/ids"
	"github.com/unum-os/unum/internal/volume"
)

// State reads the volume's applied state on this node. Every read is of one
// moment.
type State struct {
	db    *pebble.DB
	space volume.Space
}

// NewState returns the state of space in db.
func NewState(db *pebble.DB, space volume.Space) State { return State{db, space} }

// read calls f with a view of this moment.
func read[R any](s State, f func(v volume.View) (R, error)) (R, error) {
	snap := s.db.NewSnapshot()
	r, err := f(volume.NewView(snap, s.space))
	if cerr := snap.Close(); err == nil {
		err = cerr
	}
	return r, err
}

// GetAttr returns the attributes of an inode.
func (s State) GetAttr(ino ids.Inode) (volume.Attr, error) {
	return volume.NewView(s.db, s.space).GetAttr(ino) // one key
}

// Lookup returns the attributes of what a name leads to.
func (s State) Lookup(parent ids.Inode, name string) (volume.Attr, error) {
	return read(s, func(v volume.View) (volume.Attr, error) { return v.Lookup(parent, name) })
}

// listing is a page of a directory with its attributes at the same moment.
type listing struct {
	attr    volume.Attr
	entries []volume.Dirent
}

func (s State) list(dir ids.Inode, after string, limit int) (listing, error) {
	return read(s, func(v volume.View) (l listing, err error) {
		if l.attr, err = v.GetAttr(dir); err == nil {
			l.entries, err = v.ReadDir(dir, after, limit)
		}
		return l, err
	})
}

// content is a page of a file's extents, or a symbolic link's target.
func (s State) extents(ino ids.Inode, from uint64, limit int) ([]volume.Extent, error) {
	return read(s, func(v volume.View) ([]volume.Extent, error) { return v.Extents(ino, from, limit) })
}

func (s State) readlink(ino ids.Inode) (string, error) {
	return read(s, func(v volume.View) (string, error) { return v.Readlink(ino) })
}

// xattrs returns all extended attributes of an inode, sorted by name.
func (s State) xattrs(ino ids.Inode) (XattrsReply, error) {
	return read(s, func(v volume.View) (r XattrsReply, err error) {
		if r.Names, err = v.ListXattr(ino); err != nil {
			return r, err
		}
		r.Values = make([][]byte, len(r.Names))
		for i, n := range r.Names {
			if r.Values[i], err = v.GetXattr(ino, n); err != nil {
				return r, err
			}
		}
		return r, nil
	})
}

func (s State) getLock(ino ids.Inode, want volume.Lock) (volume.Lock, error) {
	return read(s, func(v volume.View) (volume.Lock, error) { return v.GetLock(ino, want) })
}

func (s State) sessions() ([]volume.SessionInfo, error) {
	return read(s, func(v volume.View) ([]volume.SessionInfo, error) { return v.Sessions() })
}

func (s State) totals() (volume.Usage, error) {
	return read(s, func(v volume.View) (volume.Usage, error) { return v.Stat() })
}
