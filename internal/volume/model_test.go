package volume

import (
	"fmt"
	"slices"
	"testing"

	"golang.org/x/sys/unix"
	"pgregory.net/rapid"

	"github.com/unum-os/unum/internal/errs"
	"github.com/unum-os/unum/internal/ids"
)

// mnode and model say what a name space is, in the plainest way.
type mnode struct {
	dir     bool
	names   int
	entries map[string]ids.Inode
	keep    map[ids.Session]bool
	tmp     bool
}

type model struct {
	nodes map[ids.Inode]*mnode
	next  ids.Inode
	open  map[ids.Session]ids.Node
}

// dirAt returns a live directory or a class.
func (m *model) dirAt(ino ids.Inode) (*mnode, errs.Class) {
	n := m.nodes[ino]
	if n == nil || n.dir && n.names == 0 {
		return nil, errs.NotFound
	}
	if !n.dir {
		return nil, errs.NotDir
	}
	return n, 0
}

func (m *model) unname(ino ids.Inode, keep []ids.Session) {
	n := m.nodes[ino]
	if n.names--; n.names > 0 {
		return
	}
	for _, s := range keep {
		if m.open[s] != 0 {
			n.keep[s] = true
		}
	}
	m.reap(ino)
}

func (m *model) reap(ino ids.Inode) {
	if n := m.nodes[ino]; n != nil && n.names == 0 && len(n.keep) == 0 {
		delete(m.nodes, ino)
	}
}

func (m *model) inside(dir, top ids.Inode) bool {
	if dir == top {
		return true
	}
	for _, c := range m.nodes[top].entries {
		if m.nodes[c].dir && m.inside(dir, c) {
			return true
		}
	}
	return false
}

func (m *model) add(n *mnode) ids.Inode {
	n.keep = map[ids.Session]bool{}
	if n.dir {
		n.entries = map[string]ids.Inode{}
	}
	m.nodes[m.next] = n
	m.next++
	return m.next - 1
}

func (m *model) do(s ids.Session, op *Op) errs.Class {
	switch op.Kind {
	case OpDrop:
		if n := m.nodes[op.Ino]; n != nil {
			delete(n.keep, s)
			m.reap(op.Ino)
		}
		return 0
	case OpSetXattr:
		if m.nodes[op.Ino] == nil {
			return errs.NotFound
		}
		return 0
	}
	p, c := m.dirAt(op.Parent)
	if c != 0 {
		return c
	}
	at := p.entries[op.Name]
	switch op.Kind {
	case OpCreate:
		if op.Flags == CreateTmpfile {
			ino := m.add(&mnode{tmp: true})
			m.nodes[ino].keep[s] = true
			return 0
		}
		if at != 0 {
			return errs.Exists
		}
		p.entries[op.Name] = m.add(&mnode{dir: op.Mode&sIFMT == sIFDIR, names: 1})
	case OpLink:
		n := m.nodes[op.Ino]
		switch {
		case n == nil || n.names == 0 && !n.tmp:
			return errs.NotFound
		case at != 0:
			return errs.Exists
		case n.dir:
			return errs.Permission
		}
		if n.tmp {
			n.tmp, n.keep = false, map[ids.Session]bool{}
		}
		n.names++
		p.entries[op.Name] = op.Ino
	case OpUnlink, OpRmdir:
		n := m.nodes[at]
		switch {
		case at == 0:
			return errs.NotFound
		case op.Ino != 0 && op.Ino != at:
			return errs.NameTooOld
		case op.Kind == OpUnlink && n.dir:
			return errs.IsDir
		case op.Kind == OpRmdir && !n.dir:
			return errs.NotDir
		case len(n.entries) > 0:
			return errs.NotEmpty
		}
		delete(p.entries, op.Name)
		m.unname(at, op.Keep)
	case OpRename:
		q, c := m.dirAt(op.ToParent)
		if c != 0 {
			return c
		}
		n, to := m.nodes[at], q.entries[op.ToName]
		old := m.nodes[to]
		exchange := op.Flags == RenameExchange
		switch {
		case at == 0:
			return errs.NotFound
		case op.Ino != 0 && op.Ino != at:
			return errs.NameTooOld
		case op.Flags == RenameNoReplace && to != 0:
			return errs.Exists
		case exchange && to == 0:
			return errs.NotFound
		case (op.Ino != 0 || op.ToIno != 0) && op.ToIno != to:
			return errs.NameTooOld
		case at == to:
			return 0
		case n.dir && m.inside(op.ToParent, at):
			return errs.Loop
		case exchange && old.dir && m.inside(op.Parent, to):
			return errs.Loop
		case exchange:
			p.entries[op.Name], q.entries[op.ToName] = to, at
			return 0
		case old != nil && n.dir && !old.dir:
			return errs.NotDir
		case old != nil && !n.dir && old.dir:
			return errs.IsDir
		case old != nil && len(old.entries) > 0:
			return errs.NotEmpty
		}
		delete(p.entries, op.Name)
		q.entries[op.ToName] = at
		if old != nil {
			m.unname(to, op.Keep)
		}
	}
	return 0
}

func (m *model) end(s ids.Session) {
	delete(m.open, s)
	for ino, n := range m.nodes {
		if n.keep[s] {
			delete(n.keep, s)
			m.reap(ino)
		}
	}
}

// equal compares the state with the model.
func (m *model) equal(t fataler, v View) {
	t.Helper()
	if u, err := v.Stat(); err != nil || u.Inodes != uint64(len(m.nodes)) {
		t.Fatalf("%+v %v, want %d inodes", u, err, len(m.nodes))
	}
	for ino, n := range m.nodes {
		a, err := v.GetAttr(ino)
		if err != nil || isDir(a.Mode) != n.dir || !n.dir && int(a.Nlink) != n.names {
			t.Fatalf("inode %d: %+v %v, want %+v", ino, a, err, n)
		}
		if !n.dir {
			continue
		}
		ents, err := v.ReadDir(ino, "", MaxListing)
		if err != nil || len(ents) != len(n.entries) {
			t.Fatalf("directory %d: %+v %v, want %+v", ino, ents, err, n)
		}
		for _, e := range ents {
			if a, err := v.Lookup(ino, e.Name); err != nil || a.Ino != e.Ino || n.entries[e.Name] != e.Ino {
				t.Fatalf("directory %d: %+v %+v %v, want %+v", ino, e, a, err, n)
			}
		}
	}
}

func TestNameSpaceAgainstModel(t *testing.T) {
	names := rapid.SampledFrom([]string{"a", "b", "c", "d"})
	rapid.Check(t, func(rt *rapid.T) {
		r := newReplica(rt)
		defer r.close()
		m := &model{nodes: map[ids.Inode]*mnode{}, next: 2, open: map[ids.Session]ids.Node{r.session: 1}}
		m.nodes[1] = &mnode{dir: true, names: 1, entries: map[string]ids.Inode{}}
		sessions := func() []ids.Session {
			var out []ids.Session
			for s := range m.open {
				out = append(out, s)
			}
			slices.Sort(out)
			return out
		}
		versions := map[ids.Inode]Attr{}
		rt.Repeat(map[string]func(*rapid.T){
			"open": func(rt *rapid.T) {
				n := ids.Node(rapid.IntRange(1, 3).Draw(rt, "node"))
				s := r.open(n, 1000+r.index) // a nonce of its own
				for old, on := range m.open {
					if on == n {
						m.end(old)
					}
				}
				m.open[s] = n
			},
			"end": func(rt *rapid.T) {
				if len(m.open) > 1 {
					s := rapid.SampledFrom(sessions()).Draw(rt, "session")
					r.apply(Command{End: s})
					m.end(s)
				}
			},
			"ops": func(rt *rapid.T) {
				s := rapid.SampledFrom(sessions()).Draw(rt, "session")
				inos := make([]ids.Inode, 0, m.next)
				for i := ids.Inode(1); i <= m.next; i++ {
					if m.nodes[i] != nil || i%5 == 0 {
						inos = append(inos, i)
					}
				}
				ino := rapid.SampledFrom(inos)
				var dirs []ids.Inode
				for _, i := range inos {
					if n := m.nodes[i]; n != nil && n.dir {
						dirs = append(dirs, i, i, i)
					}
				}
				dir := rapid.SampledFrom(append(dirs, inos[len(inos)-1])) // mostly
				var ops []Op
				for range rapid.IntRange(1, 4).Draw(rt, "ops") {
					op := Op{
						Kind:   OpKind(rapid.SampledFrom([]OpKind{OpCreate, OpCreate, OpUnlink, OpRmdir, OpRename, OpRename, OpLink, OpDrop, OpSetXattr}).Draw(rt, "kind")),
						Parent: dir.Draw(rt, "parent"), Name: names.Draw(rt, "name"),
						Time: int64(rapid.IntRange(0, 1000).Draw(rt, "time")),
						Keep: rapid.SliceOfN(rapid.SampledFrom(sessions()), 0, 2).Draw(rt, "keep"),
					}
					switch op.Kind {
					case OpCreate:
						op.Keep = nil
						op.Mode = rapid.SampledFrom([]uint32{sIFREG | 0o644, sIFDIR | 0o755, sIFDIR | 0o2755, unix.S_IFIFO}).Draw(rt, "mode")
						if op.Mode&sIFMT == sIFREG && rapid.IntRange(0, 3).Draw(rt, "tmp") == 0 {
							op.Flags, op.Name = CreateTmpfile, ""
						}
					case OpRename:
						op.ToParent, op.ToName = dir.Draw(rt, "to"), names.Draw(rt, "toname")
						op.Flags = rapid.SampledFrom([]uint32{0, 0, RenameNoReplace, RenameExchange}).Draw(rt, "flags")
						if rapid.Bool().Draw(rt, "presume") {
							op.Ino = ino.Draw(rt, "ino")
							if d := m.nodes[op.ToParent]; d != nil && rapid.Bool().Draw(rt, "right") {
								op.ToIno = d.entries[op.ToName]
							}
						}
					case OpUnlink, OpRmdir:
						if rapid.Bool().Draw(rt, "presume") {
							op.Ino = ino.Draw(rt, "ino")
						}
					default:
						op.Ino = ino.Draw(rt, "ino")
					}
					ops = append(ops, op)
				}
				res := r.ops(s, ops...)
				if res.Err != 0 {
					rt.Fatalf("%+v", res)
				}
				for i := range ops {
					if want, got := m.do(s, &ops[i]), errs.Class(res.Ops[i].Err); want != got {
						rt.Fatalf("%+v: got %v (%s), want %v", ops[i], got, res.Ops[i].Why, want)
					}
					for _, a := range res.Ops[i].Attrs {
						was, known := versions[a.Ino]
						if known && a.Version < was.Version || known && a.Version > was.Version && a.Ctime <= was.Ctime ||
							known && a.Version == was.Version && a != was {
							rt.Fatalf("attributes went from %+v to %+v", was, a)
						}
						versions[a.Ino] = a
					}
				}
				for ino, a := range versions { // what results did not tell did not change
					if now, err := r.view().GetAttr(ino); err == nil && now != a {
						rt.Fatalf("%+v became %+v untold by %+v", a, now, res)
					}
				}
			},
			"": func(rt *rapid.T) {
				m.equal(rt, r.view())
				r.check()
			},
		})
		r.replay()
	})
}

// content is a file as bytes.
type content []byte

func (c *content) resize(n int) {
	for len(*c) < n {
		*c = append(*c, 0)
	}
	*c = (*c)[:n]
}

// blockByte is byte i of the block that tests call n.
func blockByte(n byte, i uint32) byte { return byte(uint32(n)*31 + i*7 + i>>8) }

func blockName(n byte) *BlockName { return &BlockName{n, 0xb1} }

func (e *Extent) byteAt(off uint64) byte {
	i := uint32(off - e.Off)
	switch {
	case e.Data != nil:
		return e.Data[i]
	case e.Block != nil:
		return blockByte(e.Block[0], e.From+i)
	}
	return 0
}

// readFile reads a file through its extents, a few at a time.
func readFile(t fataler, v View, ino ids.Inode, page int) []byte {
	a, err := v.GetAttr(ino)
	if err != nil {
		t.Fatalf("%v", err)
	}
	out := make([]byte, a.Size)
	for off := uint64(0); ; {
		exts, err := v.Extents(ino, off, page)
		if err != nil {
			t.Fatalf("%v", err)
		}
		for _, e := range exts {
			for o := max(e.Off, off); o < e.End(); o++ {
				out[o] = e.byteAt(o)
			}
			off = e.End()
		}
		if len(exts) < page {
			return out
		}
	}
}

func TestExtentsAgainstBytes(t *testing.T) {
	const size = 300
	rapid.Check(t, func(rt *rapid.T) {
		r := newReplica(rt)
		defer r.close()
		ino := r.create(1, "f", sIFREG|0o6755)
		var want content
		offset := rapid.IntRange(0, size)
		last := r.attr(ino)
		rt.Repeat(map[string]func(*rapid.T){
			"write": func(rt *rapid.T) {
				op := Op{Kind: OpWrite, Ino: ino, Time: int64(rapid.IntRange(0, 50).Draw(rt, "time"))}
				for range rapid.IntRange(0, 3).Draw(rt, "extents") {
					e := Extent{Off: uint64(offset.Draw(rt, "off")), Len: uint32(rapid.IntRange(1, 60).Draw(rt, "len"))}
					switch rapid.IntRange(0, 2).Draw(rt, "what") {
					case 0:
						e.Data = rapid.SliceOfN(rapid.Byte(), int(e.Len), int(e.Len)).Draw(rt, "data")
					case 1:
						e.Block = blockName(rapid.Byte().Draw(rt, "block"))
						e.From = uint32(rapid.IntRange(0, 5000).Draw(rt, "from"))
					}
					op.Extents = append(op.Extents, e)
					if int(e.End()) > len(want) {
						want.resize(int(e.End()))
					}
					for o := e.Off; o < e.End(); o++ {
						want[o] = e.byteAt(o)
					}
				}
				if rapid.Bool().Draw(rt, "size") {
					op.Size = uint64(offset.Draw(rt, "size"))
					want.resize(max(len(want), int(op.Size)))
				}
				r.must(op)
			},
			"truncate": func(rt *rapid.T) {
				n := offset.Draw(rt, "size")
				r.must(Op{Kind: OpSetAttr, Ino: ino, Mask: SetSize, Size: uint64(n)})
				want.resize(n)
			},
			"punch": func(rt *rapid.T) {
				off, n := offset.Draw(rt, "off"), rapid.IntRange(1, 200).Draw(rt, "len")
				r.must(Op{Kind: OpPunch, Ino: ino, Off: uint64(off), Len: uint64(n)})
				for i := off; i < min(off+n, len(want)); i++ {
					want[i] = 0
				}
			},
			"": func(rt *rapid.T) {
				r.check()
				now := r.attr(ino)
				if now.Size != uint64(len(want)) {
					rt.Fatalf("size %d, want %d", now.Size, len(want))
				}
				if now.Version > last.Version && (now.Mtime <= last.Mtime || now.Ctime <= last.Ctime) {
					rt.Fatalf("times of %+v after %+v", now, last)
				}
				last = now
				page := rapid.IntRange(1, 4).Draw(rt, "page")
				if got := readFile(rt, r.view(), ino, page); string(got) != string(want) {
					rt.Fatalf("got\n%x want\n%x", got, []byte(want))
				}
			},
		})
		r.must(Op{Kind: OpUnlink, Parent: 1, Name: "f"})
		r.check()
		r.replay()
	})
}

func TestManyExtentsGoAtOnce(t *testing.T) {
	r := newReplica(t)
	defer r.close()
	ino := r.create(1, "f", sIFREG)
	const n = 1000
	for at := 0; at < n; {
		op := Op{Kind: OpWrite, Ino: ino}
		for ; at < n && len(op.Extents) < 200; at++ {
			op.Extents = append(op.Extents, Extent{Off: uint64(at) * 10, Len: 8, Data: fmt.Appendf(nil, "%08d", at)})
		}
		r.must(op)
	}
	before := readFile(t, r.view(), ino, 100)
	r.must(Op{Kind: OpPunch, Ino: ino, Off: 1003, Len: 5000})
	clear(before[1003:6003])
	if got := readFile(t, r.view(), ino, 7); string(got) != string(before) {
		t.Fatal("punching many extents")
	}
	r.check()
	// In one command: the range tombstone must not hide what follows it.
	res := r.ops(r.session,
		Op{Kind: OpSetAttr, Ino: ino, Mask: SetSize, Size: 5},
		Op{Kind: OpWrite, Ino: ino, Extents: []Extent{{Off: 6010, Len: 3, Data: []byte("new")}}},
		Op{Kind: OpWrite, Ino: ino, Extents: []Extent{{Off: 6011, Len: 1, Data: []byte("O")}}},
	)
	if res.Ops[2].Err != 0 {
		t.Fatalf("%+v", res)
	}
	if got := readFile(t, r.view(), ino, 7); string(got[:5]) != "00000" || string(got[6010:]) != "nOw" {
		t.Fatalf("%q", got)
	}
	r.check()
	r.replay()
}

func TestLocksAgainstBytes(t *testing.T) {
	const size = 12
	type owner struct {
		s ids.Session
		o uint64
	}
	rapid.Check(t, func(rt *rapid.T) {
		r := newReplica(rt)
		defer r.close()
		two := r.open(2, 1)
		ino := r.create(1, "f", sIFREG)
		held := map[owner]*[size]uint32{} // 0 none, else type+1
		rt.Repeat(map[string]func(*rapid.T){
			"lock": func(rt *rapid.T) {
				own := owner{rapid.SampledFrom([]ids.Session{r.session, two}).Draw(rt, "session"), uint64(rapid.IntRange(1, 2).Draw(rt, "owner"))}
				start := rapid.IntRange(0, size-1).Draw(rt, "start")
				end := rapid.IntRange(start, size-1).Draw(rt, "end")
				l := Lock{Kind: LockPosix, Owner: own.o, Start: uint64(start), End: uint64(end),
					Type: rapid.SampledFrom([]uint32{unix.F_RDLCK, unix.F_WRLCK, unix.F_UNLCK}).Draw(rt, "type")}
				blocked := false
				for o, bytes := range held {
					for i := start; i <= end && o != own; i++ {
						if bytes[i] != 0 && l.Type != unix.F_UNLCK && (l.Type == unix.F_WRLCK || bytes[i] == unix.F_WRLCK+1) {
							blocked = true
						}
					}
				}
				test := l
				test.Session = own.s
				got, err := r.view().GetLock(ino, test)
				if err != nil || (got.Type != unix.F_UNLCK) != blocked {
					rt.Fatalf("test of %+v: %+v %v, want blocked %v", l, got, err, blocked)
				}
				res := r.ops(own.s, Op{Kind: OpSetLock, Ino: ino, Lock: &l}).Ops[0]
				if blocked != (errs.Class(res.Err) == errs.LockHeld) || blocked && *res.Lock != got {
					rt.Fatalf("%+v: %+v, want blocked %v", l, res, blocked)
				}
				if !blocked {
					if held[own] == nil {
						held[own] = new([size]uint32)
					}
					for i := start; i <= end; i++ {
						held[own][i] = (l.Type + 1) % (unix.F_UNLCK + 1)
					}
				}
			},
			"end": func(rt *rapid.T) {
				if rapid.IntRange(0, 9).Draw(rt, "rarely") == 0 {
					two = r.open(2, r.index)
					for o := range held {
						if o.s != r.session {
							delete(held, o)
						}
					}
				}
			},
			"": func(rt *rapid.T) {
				r.check()
				locks, err := r.view().Locks(ino)
				if err != nil {
					rt.Fatalf("%v", err)
				}
				got := map[owner]*[size]uint32{}
				for i, l := range locks {
					o := owner{l.Session, l.Owner}
					if got[o] == nil {
						got[o] = new([size]uint32)
					}
					for b := l.Start; b <= l.End; b++ {
						got[o][b] = l.Type + 1
					}
					if i > 0 && sameOwner(&l, &locks[i-1]) && l.Type == locks[i-1].Type && l.Start <= locks[i-1].End+1 {
						rt.Fatalf("not merged: %+v", locks)
					}
				}
				for o, bytes := range held {
					if g := got[o]; g == nil && *bytes != [size]uint32{} || g != nil && *g != *bytes {
						rt.Fatalf("owner %+v: %+v, want %v", o, locks, bytes)
					}
				}
			},
		})
		r.replay()
	})
}
