package volume

import (
	"bytes"
	"encoding/hex"
	"fmt"
	"strings"
	"testing"

	"github.com/cockroachdb/pebble/v2"
	"github.com/cockroachdb/pebble/v2/vfs"

	"github.com/unum-os/unum/internal/errs"
	"github.com/unum-os/unum/internal/ids"
	"github.com/unum-os/unum/internal/wire"
)

type testSpace string

func (s testSpace) Key(parts ...[]byte) []byte {
	k := []byte(s)
	for _, p := range parts {
		k = append(k, p...)
	}
	return k
}

const space = testSpace("G")

type fataler interface {
	Helper()
	Fatalf(string, ...any)
}

// replica is a machine with its state and the log it was fed.
type replica struct {
	t       fataler
	db      *pebble.DB
	m       Machine
	index   uint64
	seq     map[ids.Session]uint64
	log     [][]byte
	session ids.Session
}

func openDB(t fataler) *pebble.DB {
	t.Helper()
	db, err := pebble.Open("", &pebble.Options{FS: vfs.NewMem(), Logger: quiet{}, FormatMajorVersion: pebble.FormatNewest})
	if err != nil {
		t.Fatalf("%v", err)
	}
	// Neighbours, which nothing may touch.
	for _, k := range []string{"F", "Fzzzz", "H", "H\x00"} {
		if err := db.Set([]byte(k), []byte("neighbour"), nil); err != nil {
			t.Fatalf("%v", err)
		}
	}
	return db
}

type quiet struct{}

func (quiet) Infof(string, ...any)      {}
func (quiet) Errorf(string, ...any)     {}
func (quiet) Fatalf(f string, a ...any) { panic(fmt.Sprintf(f, a...)) }

// newReplica has one open session, number 1, of node 1.
func newReplica(t fataler) *replica {
	r := &replica{t: t, db: openDB(t), seq: map[ids.Session]uint64{}}
	r.session = r.open(1, 11)
	return r
}

func (r *replica) close() { r.db.Close() }

func (r *replica) view() View { return NewView(r.db, space) }

// raw applies the bytes of a command.
func (r *replica) raw(cmd []byte) *Results {
	r.t.Helper()
	r.index++
	r.log = append(r.log, cmd)
	b := r.db.NewIndexedBatch()
	res := r.m.ApplyTo(b, space, r.index, cmd)
	if err := b.Commit(pebble.NoSync); err != nil {
		r.t.Fatalf("%v", err)
	}
	r.m.Applied(r.index)
	if res.Err == 0 && res.Index > r.index {
		r.t.Fatalf("index %d, want at most %d", res.Index, r.index)
	}
	return res
}

func (r *replica) apply(c Command) *Results {
	r.t.Helper()
	return r.raw(wire.MustMarshal(c))
}

func (r *replica) open(n ids.Node, nonce uint64) ids.Session {
	r.t.Helper()
	return r.apply(Command{Open: &OpenSession{Node: n, Nonce: nonce}}).Session
}

// ops does operations for session s, all sequence numbers acknowledged.
func (r *replica) ops(s ids.Session, ops ...Op) *Results {
	r.t.Helper()
	r.seq[s]++
	return r.apply(Command{Session: s, Seq: r.seq[s], Acked: r.seq[s], Ops: ops})
}

// do does one operation for the first session.
func (r *replica) do(op Op) Result {
	r.t.Helper()
	res := r.ops(r.session, op)
	if res.Err != 0 || len(res.Ops) != 1 {
		r.t.Fatalf("%+v refused as a whole: %+v", op, res)
	}
	return res.Ops[0]
}

// must does an operation that must be done.
func (r *replica) must(op Op) Result {
	r.t.Helper()
	res := r.do(op)
	if res.Err != 0 {
		r.t.Fatalf("%+v: %v: %s", op, errs.Class(res.Err), res.Why)
	}
	return res
}

// refuse does an operation that must be refused with a class.
func (r *replica) refuse(op Op, want errs.Class) Result {
	r.t.Helper()
	before := r.dumpBut(tagDone, tagSession)
	res := r.do(op)
	if errs.Class(res.Err) != want {
		r.t.Fatalf("%+v: got %v (%s), want %v", op, errs.Class(res.Err), res.Why, want)
	}
	if after := r.dumpBut(tagDone, tagSession); after != before {
		r.t.Fatalf("%+v was refused and changed the state\nbefore:\n%s\nafter:\n%s", op, before, after)
	}
	return res
}

func (r *replica) create(dir ids.Inode, name string, mode uint32) ids.Inode {
	r.t.Helper()
	return r.must(Op{Kind: OpCreate, Parent: dir, Name: name, Mode: mode, Time: int64(r.index)}).Ino
}

func (r *replica) attr(ino ids.Inode) Attr {
	r.t.Helper()
	a, err := r.view().GetAttr(ino)
	if err != nil {
		r.t.Fatalf("%v", err)
	}
	return a
}

// dump prints all keys and values of a database.
func dump(t fataler, db *pebble.DB, but ...byte) string {
	it, err := db.NewIter(nil)
	if err != nil {
		t.Fatalf("%v", err)
	}
	defer it.Close()
	var out strings.Builder
	for it.First(); it.Valid(); it.Next() {
		k := it.Key()
		if k[0] == 'G' && bytes.IndexByte(but, k[1]) >= 0 {
			continue
		}
		fmt.Fprintf(&out, "%c%c %s = %s\n", k[0], append(k, ' ')[1], hex.EncodeToString(k[1:]), hex.EncodeToString(it.Value()))
	}
	return out.String()
}

func (r *replica) dumpBut(tags ...byte) string { return dump(r.t, r.db, tags...) }

// replay feeds the log to a fresh machine, several commands to a batch, and
// wants the same bytes.
func (r *replica) replay() {
	r.t.Helper()
	db := openDB(r.t)
	defer db.Close()
	var m Machine
	b := db.NewIndexedBatch()
	for i, cmd := range r.log {
		m.ApplyTo(b, space, uint64(i+1), cmd)
		if i%7 == 6 || i == len(r.log)-1 {
			if err := b.Commit(pebble.NoSync); err != nil {
				r.t.Fatalf("%v", err)
			}
			b = db.NewIndexedBatch()
		}
	}
	if a, b := dump(r.t, r.db), dump(r.t, db); a != b {
		r.t.Fatalf("replicas differ\n%s\n---\n%s", a, b)
	}
}

// check verifies the invariants of the package comment on the whole state.
func (r *replica) check() {
	r.t.Helper()
	v := r.view()
	s := &v.s
	inodes := map[ids.Inode]inode{ids.RootInode: rootInode()}
	lo := s.key(tagInode)
	s.scan(lo, after(lo), func(k, val []byte) bool {
		var n inode
		s.decode(k, val, &n)
		if n.Attr.Ino != ids.Inode(number(k, 0)) {
			r.t.Fatalf("inode %d under key %x", n.Attr.Ino, k)
		}
		inodes[n.Attr.Ino] = n
		return true
	})
	count := s.counters()
	names, subdirs, entries := map[ids.Inode]uint32{}, map[ids.Inode]uint32{}, map[ids.Inode]uint64{}
	lo = s.key(tagEntry)
	s.scan(lo, after(lo), func(k, val []byte) bool {
		dir := ids.Inode(number(k, 0))
		ino, mode := decodeEntry(k, val)
		n, ok := inodes[ino]
		if !ok || n.Attr.Mode&sIFMT != mode {
			r.t.Fatalf("entry %q of %d: inode %d, mode %o: %+v", k[8:], dir, ino, mode, n)
		}
		names[ino]++
		entries[dir]++
		if isDir(mode) {
			subdirs[dir]++
			if n.Attr.Parent != dir {
				r.t.Fatalf("directory %d is in %d, its Parent is %d", ino, dir, n.Attr.Parent)
			}
		}
		return true
	})
	keepers := map[ids.Inode]int{}
	lo = s.key(tagKeeper)
	s.scan(lo, after(lo), func(k, _ []byte) bool {
		ino, id := ids.Inode(number(k, 0)), ids.Session(number(k, 1))
		keepers[ino]++
		if _, open := s.session(id); !open {
			r.t.Fatalf("session %d keeps %d and is over", id, ino)
		}
		if _, ok := s.get(s.key(tagKept, uint64(id), uint64(ino))); !ok {
			r.t.Fatalf("keeper %d of %d cannot be found from its session", id, ino)
		}
		return true
	})
	alloc := map[ids.Inode]uint64{}
	end := map[ids.Inode]uint64{}
	lo = s.key(tagExtent)
	s.scan(lo, after(lo), func(k, val []byte) bool {
		ino := ids.Inode(number(k, 0))
		var e Extent
		s.decode(k, val, &e)
		if e.Off != number(k, 1) || e.Hole() || e.check().refused() || e.Off < end[ino] || e.End() > inodes[ino].Attr.Size {
			r.t.Fatalf("extent %+v of %+v after %d", e, inodes[ino].Attr, end[ino])
		}
		end[ino], alloc[ino] = e.End(), alloc[ino]+uint64(e.Len)
		return true
	})
	xattrs := map[ids.Inode]uint32{}
	lo = s.key(tagXattr)
	s.scan(lo, after(lo), func(k, _ []byte) bool { xattrs[ids.Inode(number(k, 0))]++; return true })
	bytes := uint64(0)
	for ino, n := range inodes {
		a := n.Attr
		bytes += a.Alloc
		switch {
		case a.Alloc != alloc[ino] || n.Xattrs != xattrs[ino]:
			r.t.Fatalf("counts of %+v: %d bytes, %d attributes", n, alloc[ino], xattrs[ino])
		case ino >= count.Next:
			r.t.Fatalf("inode %d, next is %d", ino, count.Next)
		case isDir(a.Mode):
			want := 2 + subdirs[ino]
			if ino != ids.RootInode && names[ino] == 0 {
				want = 0
			}
			if a.Size != entries[ino] || a.Nlink != want || names[ino] > 1 {
				r.t.Fatalf("directory %+v: %d entries, %d links wanted, %d names", a, entries[ino], want, names[ino])
			}
		case a.Nlink != names[ino]:
			r.t.Fatalf("inode %+v has %d names", a, names[ino])
		}
		if ino != ids.RootInode && (names[ino] == 0) != (keepers[ino] > 0) {
			r.t.Fatalf("inode %+v: %d names, %d keepers", a, names[ino], keepers[ino])
		}
	}
	for _, m := range []map[ids.Inode]uint64{alloc, entries} {
		for ino := range m {
			if _, ok := inodes[ino]; !ok {
				r.t.Fatalf("inode %d is gone and left something", ino)
			}
		}
	}
	held := map[[2]uint64]bool{}
	lo = s.key(tagLocks)
	s.scan(lo, after(lo), func(k, val []byte) bool {
		ino := number(k, 0)
		var locks []Lock
		s.decode(k, val, &locks)
		if _, ok := inodes[ids.Inode(ino)]; !ok || len(locks) == 0 {
			r.t.Fatalf("locks of inode %d: %+v", ino, locks)
		}
		for _, l := range locks {
			held[[2]uint64{uint64(l.Session), ino}] = true
			if conflict(locks, &l) != nil {
				r.t.Fatalf("locks conflict: %+v", locks)
			}
		}
		return true
	})
	lo = s.key(tagLocked)
	n := 0
	s.scan(lo, after(lo), func(k, _ []byte) bool {
		if n++; !held[[2]uint64{number(k, 0), number(k, 1)}] {
			r.t.Fatalf("session %d holds no lock on %d", number(k, 0), number(k, 1))
		}
		return true
	})
	if n != len(held) || count.Inodes != uint64(len(inodes)) || count.Bytes != bytes {
		r.t.Fatalf("%d of %d lock ways; counters %+v, %d inodes, %d bytes", n, len(held), count, len(inodes), bytes)
	}
	for _, k := range []string{"F", "Fzzzz", "H", "H\x00"} {
		if _, c, err := r.db.Get([]byte(k)); err != nil {
			r.t.Fatalf("neighbour %q: %v", k, err)
		} else {
			c.Close()
		}
	}
}

func TestEmptySpaceHasARoot(t *testing.T) {
	db := openDB(t)
	defer db.Close()
	v := NewView(db, space)
	a, err := v.GetAttr(ids.RootInode)
	if err != nil || a.Mode != 0o40755 || a.Nlink != 2 || a.Parent != ids.RootInode {
		t.Fatalf("%+v %v", a, err)
	}
	if u, err := v.Stat(); err != nil || u != (Usage{Inodes: 1}) {
		t.Fatalf("%+v %v", u, err)
	}
	if ents, err := v.ReadDir(1, "", 10); err != nil || len(ents) != 0 {
		t.Fatalf("%+v %v", ents, err)
	}
}
