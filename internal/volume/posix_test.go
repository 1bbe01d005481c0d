package volume

import (
	"fmt"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/unum-os/unum/internal/errs"
	"github.com/unum-os/unum/internal/ids"
)

func TestRefusals(t *testing.T) {
	r := newReplica(t)
	defer r.close()
	file := r.create(1, "file", sIFREG|0o644)
	dir := r.create(1, "dir", sIFDIR|0o755)
	sub := r.create(dir, "sub", sIFDIR|0o755)
	r.create(sub, "deep", sIFREG)
	link := r.must(Op{Kind: OpCreate, Parent: 1, Name: "sym", Mode: sIFLNK, Target: "x"}).Ino
	doomed := r.create(1, "doomed", sIFDIR)
	r.must(Op{Kind: OpRmdir, Parent: 1, Name: "doomed", Keep: []ids.Session{r.session}})
	r.must(Op{Kind: OpSetXattr, Ino: file, Name: "user.a", Value: []byte("1")})
	long := strings.Repeat("n", MaxName+1)

	for _, c := range []struct {
		what string
		op   Op
		want errs.Class
	}{
		{"create over a file", Op{Kind: OpCreate, Parent: 1, Name: "file", Mode: sIFREG}, errs.Exists},
		{"mkdir over a directory", Op{Kind: OpCreate, Parent: 1, Name: "dir", Mode: sIFDIR}, errs.Exists},
		{"create in a file", Op{Kind: OpCreate, Parent: file, Name: "x", Mode: sIFREG}, errs.NotDir},
		{"create nowhere", Op{Kind: OpCreate, Parent: 99, Name: "x", Mode: sIFREG}, errs.NotFound},
		{"create in a removed directory", Op{Kind: OpCreate, Parent: doomed, Name: "x", Mode: sIFREG}, errs.NotFound},
		{"long name", Op{Kind: OpCreate, Parent: 1, Name: long, Mode: sIFREG}, errs.TooLong},
		{"no name", Op{Kind: OpCreate, Parent: 1, Mode: sIFREG}, errs.Invalid},
		{"dot", Op{Kind: OpCreate, Parent: 1, Name: ".", Mode: sIFREG}, errs.Invalid},
		{"slash", Op{Kind: OpCreate, Parent: 1, Name: "a/b", Mode: sIFREG}, errs.Invalid},
		{"zero byte", Op{Kind: OpCreate, Parent: 1, Name: "a\x00", Mode: sIFREG}, errs.Invalid},
		{"no type", Op{Kind: OpCreate, Parent: 1, Name: "x", Mode: 0o644}, errs.Invalid},
		{"chosen number", Op{Kind: OpCreate, Parent: 1, Name: "x", Mode: sIFREG, Ino: 77}, errs.Invalid},
		{"long target", Op{Kind: OpCreate, Parent: 1, Name: "x", Mode: sIFLNK, Target: strings.Repeat("t", MaxTarget+1)}, errs.TooLong},
		{"empty target", Op{Kind: OpCreate, Parent: 1, Name: "x", Mode: sIFLNK}, errs.NotFound},
		{"target of a file", Op{Kind: OpCreate, Parent: 1, Name: "x", Mode: sIFREG, Target: "t"}, errs.Invalid},
		{"tmpfile directory", Op{Kind: OpCreate, Parent: 1, Mode: sIFDIR, Flags: CreateTmpfile}, errs.Invalid},
		{"time out of range", Op{Kind: OpCreate, Parent: 1, Name: "x", Mode: sIFREG, Time: maxTime + 1}, errs.Invalid},
		{"unlink nothing", Op{Kind: OpUnlink, Parent: 1, Name: "x"}, errs.NotFound},
		{"unlink a directory", Op{Kind: OpUnlink, Parent: 1, Name: "dir"}, errs.IsDir},
		{"rmdir a file", Op{Kind: OpRmdir, Parent: 1, Name: "file"}, errs.NotDir},
		{"rmdir with entries", Op{Kind: OpRmdir, Parent: 1, Name: "dir"}, errs.NotEmpty},
		{"unlink another inode", Op{Kind: OpUnlink, Parent: 1, Name: "file", Ino: 55}, errs.NameTooOld},
		{"rmdir another inode", Op{Kind: OpRmdir, Parent: dir, Name: "sub", Ino: 55}, errs.NameTooOld},
		{"link a directory", Op{Kind: OpLink, Ino: dir, Parent: 1, Name: "x"}, errs.Permission},
		{"link over a name", Op{Kind: OpLink, Ino: file, Parent: 1, Name: "dir"}, errs.Exists},
		{"link nothing", Op{Kind: OpLink, Ino: 99, Parent: 1, Name: "x"}, errs.NotFound},
		{"rename nothing", Op{Kind: OpRename, Parent: 1, Name: "x", ToParent: 1, ToName: "y"}, errs.NotFound},
		{"rename below itself", Op{Kind: OpRename, Parent: 1, Name: "dir", ToParent: sub, ToName: "y"}, errs.Loop},
		{"rename into itself", Op{Kind: OpRename, Parent: 1, Name: "dir", ToParent: dir, ToName: "y"}, errs.Loop},
		{"exchange with an ancestor", Op{Kind: OpRename, Parent: sub, Name: "deep", ToParent: 1, ToName: "dir", Flags: RenameExchange}, errs.Loop},
		{"exchange with nothing", Op{Kind: OpRename, Parent: 1, Name: "file", ToParent: 1, ToName: "x", Flags: RenameExchange}, errs.NotFound},
		{"file over directory", Op{Kind: OpRename, Parent: 1, Name: "file", ToParent: dir, ToName: "sub"}, errs.IsDir},
		{"directory over file", Op{Kind: OpRename, Parent: 1, Name: "dir", ToParent: 1, ToName: "file"}, errs.NotDir},
		{"directory over its parent", Op{Kind: OpRename, Parent: dir, Name: "sub", ToParent: 1, ToName: "dir"}, errs.NotEmpty},
		{"no replace", Op{Kind: OpRename, Parent: 1, Name: "file", ToParent: 1, ToName: "sym", Flags: RenameNoReplace}, errs.Exists},
		{"no replace onto itself", Op{Kind: OpRename, Parent: 1, Name: "file", ToParent: 1, ToName: "file", Flags: RenameNoReplace}, errs.Exists},
		{"both flags", Op{Kind: OpRename, Parent: 1, Name: "file", ToParent: 1, ToName: "sym", Flags: 3}, errs.Invalid},
		{"rename another inode", Op{Kind: OpRename, Parent: 1, Name: "file", Ino: 9, ToParent: 1, ToName: "y"}, errs.NameTooOld},
		{"rename over another inode", Op{Kind: OpRename, Parent: 1, Name: "file", Ino: file, ToParent: 1, ToName: "sym", ToIno: 9}, errs.NameTooOld},
		{"rename over an unexpected inode", Op{Kind: OpRename, Parent: 1, Name: "file", Ino: file, ToParent: 1, ToName: "sym"}, errs.NameTooOld},
		{"truncate a directory", Op{Kind: OpSetAttr, Ino: dir, Mask: SetSize}, errs.IsDir},
		{"truncate a link", Op{Kind: OpSetAttr, Ino: link, Mask: SetSize}, errs.Invalid},
		{"truncate too far", Op{Kind: OpSetAttr, Ino: file, Mask: SetSize, Size: MaxFile + 1}, errs.TooLarge},
		{"setattr of nothing", Op{Kind: OpSetAttr, Ino: 99, Mask: SetMode}, errs.NotFound},
		{"unknown mask", Op{Kind: OpSetAttr, Ino: file, Mask: 1 << 20}, errs.Invalid},
		{"write to a directory", Op{Kind: OpWrite, Ino: dir}, errs.IsDir},
		{"write too far", Op{Kind: OpWrite, Ino: file, Extents: []Extent{{Off: MaxFile, Len: 1, Data: []byte("x")}}}, errs.TooLarge},
		{"second extent bad", Op{Kind: OpWrite, Ino: file, Extents: []Extent{{Len: 1, Data: []byte("x")}, {Off: 5, Len: 2, Data: []byte("x")}}}, errs.Invalid},
		{"empty extent", Op{Kind: OpWrite, Ino: file, Extents: []Extent{{Off: 5}}}, errs.Invalid},
		{"both data and block", Op{Kind: OpWrite, Ino: file, Extents: []Extent{{Len: 1, Data: []byte("x"), Block: blockName(1)}}}, errs.Invalid},
		{"beyond a block", Op{Kind: OpWrite, Ino: file, Extents: []Extent{{Len: 2, From: MaxBlock - 1, Block: blockName(1)}}}, errs.Invalid},
		{"overflowing extent", Op{Kind: OpWrite, Ino: file, Extents: []Extent{{Off: 1<<64 - 1, Len: 2}}}, errs.TooLarge},
		{"overflowing punch", Op{Kind: OpPunch, Ino: file, Off: 5, Len: 1<<64 - 5}, errs.Invalid},
		{"empty punch", Op{Kind: OpPunch, Ino: file}, errs.Invalid},
		{"xattr exists", Op{Kind: OpSetXattr, Ino: file, Name: "user.a", Flags: 1}, errs.Exists},
		{"xattr missing", Op{Kind: OpSetXattr, Ino: file, Name: "user.b", Flags: 2}, errs.NoData},
		{"xattr without name", Op{Kind: OpSetXattr, Ino: file}, errs.Invalid},
		{"xattr too large", Op{Kind: OpSetXattr, Ino: file, Name: "user.b", Value: make([]byte, MaxXattr+1)}, errs.TooLarge},
		{"remove no xattr", Op{Kind: OpRemoveXattr, Ino: file, Name: "user.b"}, errs.NoData},
		{"lock of nothing", Op{Kind: OpSetLock, Ino: 99, Lock: &Lock{Kind: LockFlock, Type: unix.F_RDLCK}}, errs.NotFound},
		{"lock backwards", Op{Kind: OpSetLock, Ino: file, Lock: &Lock{Kind: LockPosix, Start: 2, End: 1}}, errs.Invalid},
		{"no lock", Op{Kind: OpSetLock, Ino: file}, errs.Invalid},
		{"unknown operation", Op{Kind: 99}, errs.Invalid},
	} {
		t.Run(c.what, func(t *testing.T) {
			r.t = t
			if res := r.refuse(c.op, c.want); res.Why == "" || len(res.Attrs) > 0 {
				t.Errorf("refused with %+v", res)
			}
		})
	}
	r.t = t
	r.check()
}

func TestDirectoriesOnRenameAndExchange(t *testing.T) {
	r := newReplica(t)
	defer r.close()
	a, b := r.create(1, "a", sIFDIR), r.create(1, "b", sIFDIR)
	d := r.create(a, "d", sIFDIR)
	f := r.create(b, "f", sIFREG)
	nlinks := func(want ...uint32) {
		t.Helper()
		got := []uint32{r.attr(1).Nlink, r.attr(a).Nlink, r.attr(b).Nlink}
		if fmt.Sprint(got) != fmt.Sprint(want) {
			t.Fatalf("links of root, a, b: %v, want %v", got, want)
		}
		r.check()
	}
	nlinks(4, 3, 2)
	res := r.must(Op{Kind: OpRename, Parent: a, Name: "d", Ino: d, ToParent: b, ToName: "f", ToIno: f, Flags: RenameExchange, Time: 50})
	nlinks(4, 2, 3)
	if r.attr(d).Parent != b || len(res.Attrs) != 4 || res.Attrs[0].Ino != d || r.attr(f).Ctime != 50 || r.attr(a).Mtime != 50 {
		t.Fatalf("%+v", res)
	}
	e := r.create(a, "e", sIFDIR)
	res = r.must(Op{Kind: OpRename, Parent: b, Name: "f", ToParent: a, ToName: "e"})
	nlinks(4, 3, 2)
	if len(res.Gone) != 1 || res.Gone[0] != e || r.attr(d).Parent != a {
		t.Fatalf("%+v", res)
	}
	if up, err := r.view().Lookup(d, ".."); err != nil || up.Ino != a {
		t.Fatalf("%+v %v", up, err)
	}
	before := r.dumpBut(tagDone, tagSession)
	r.must(Op{Kind: OpLink, Ino: f, Parent: 1, Name: "g"})
	mid := r.dumpBut(tagDone, tagSession)
	res = r.must(Op{Kind: OpRename, Parent: 1, Name: "g", ToParent: a, ToName: "d"})
	if res.Ino != f || len(res.Attrs) != 1 || r.dumpBut(tagDone, tagSession) != mid || before == mid {
		t.Fatalf("renaming a name onto another of the same inode: %+v", res)
	}
	r.replay()
}

func TestModesOnCreateAndSetAttr(t *testing.T) {
	r := newReplica(t)
	defer r.close()
	dir := r.must(Op{Kind: OpCreate, Parent: 1, Name: "d", Mode: sIFDIR | 0o3775, Uid: 5, Gid: 50}).Ino
	sub := r.must(Op{Kind: OpCreate, Parent: dir, Name: "s", Mode: sIFDIR | 0o755, Uid: 6, Gid: 60, Time: 9}).Attrs[0]
	if sub.Mode != sIFDIR|0o2755 || sub.Gid != 50 || sub.Uid != 6 || sub.Parent != dir || sub.Btime != 9 || sub.Nlink != 2 {
		t.Fatalf("%+v", sub)
	}
	dev := r.must(Op{Kind: OpCreate, Parent: dir, Name: "c", Mode: unix.S_IFCHR | 0o600, Rdev: 0x103, Gid: 60}).Attrs[0]
	if dev.Rdev != 0x103 || dev.Gid != 50 {
		t.Fatalf("%+v", dev)
	}
	sym := r.must(Op{Kind: OpCreate, Parent: 1, Name: "l", Mode: sIFLNK, Target: "over\xff/there"}).Attrs[0]
	if to, err := r.view().Readlink(sym.Ino); err != nil || to != "over\xff/there" || sym.Size != 11 || sym.Mode != sIFLNK|0o777 {
		t.Fatalf("%+v %q %v", sym, to, err)
	}
	for _, c := range []struct{ mode, want uint32 }{
		{sIFREG | 0o6755, sIFREG | 0o755}, {sIFREG | 0o6745, sIFREG | 0o2745}, {sIFDIR | 0o6755, sIFDIR | 0o6755},
	} {
		n := r.create(1, fmt.Sprintf("%o", c.mode), c.mode)
		a := r.must(Op{Kind: OpSetAttr, Ino: n, Mask: SetUid | SetGid | KillPriv, Uid: 7, Gid: 8, Time: 1000}).Attrs[0]
		if a.Mode != c.want || a.Uid != 7 || a.Gid != 8 || a.Ctime != 1000 || a.Mtime == 1000 {
			t.Errorf("chown of %o: %+v", c.mode, a)
		}
	}
	f := r.create(1, "f", sIFREG|0o4755)
	a := r.must(Op{Kind: OpWrite, Ino: f, Mask: KillPriv, Size: 10, Time: 2000}).Attrs[0]
	if a.Mode != sIFREG|0o755 || a.Size != 10 || a.Alloc != 0 || a.Mtime != 2000 {
		t.Fatalf("%+v", a)
	}
	a = r.must(Op{Kind: OpSetAttr, Ino: f, Mask: SetMtime | SetAtime | SetMode, Mtime: -5, Atime: 1 << 62, Mode: 0o100, Time: 1}).Attrs[0]
	if a.Mtime != -5 || a.Atime != 1<<62 || a.Ctime != 2001 || a.Mode != sIFREG|0o100 {
		t.Fatalf("%+v", a)
	}
	a = r.must(Op{Kind: OpWrite, Ino: f, Time: 3}).Attrs[0]
	if a.Mtime != 2002 || a.Ctime != 2002 {
		t.Fatalf("%+v", a)
	}
}

func TestXattrs(t *testing.T) {
	r := newReplica(t)
	defer r.close()
	f := r.create(1, "f", sIFREG)
	v := r.attr(f).Version
	r.must(Op{Kind: OpSetXattr, Ino: f, Name: "user.b", Value: make([]byte, MaxXattr)})
	r.must(Op{Kind: OpSetXattr, Ino: f, Name: "user.a", Flags: 1})
	r.must(Op{Kind: OpSetXattr, Ino: f, Name: "user.a", Flags: 2, Value: []byte("x")})
	r.must(Op{Kind: OpSetXattr, Ino: f, Name: "user.a"})
	if names, err := r.view().ListXattr(f); err != nil || fmt.Sprint(names) != "[user.a user.b]" {
		t.Fatalf("%v %v", names, err)
	}
	if val, err := r.view().GetXattr(f, "user.a"); err != nil || len(val) != 0 {
		t.Fatalf("%v %v", val, err)
	}
	if _, err := r.view().GetXattr(f, "user.c"); !errs.Has(err, errs.NoData) {
		t.Fatal(err)
	}
	r.must(Op{Kind: OpRemoveXattr, Ino: f, Name: "user.a"})
	if got := r.attr(f).Version; got != v+5 {
		t.Fatalf("version %d after %d", got, v)
	}
	for i := 1; i < maxXattrs; i++ {
		r.must(Op{Kind: OpSetXattr, Ino: f, Name: fmt.Sprint(i)})
	}
	r.refuse(Op{Kind: OpSetXattr, Ino: f, Name: "more"}, errs.NoSpace)
	r.check()
	r.must(Op{Kind: OpUnlink, Parent: 1, Name: "f"})
	r.check()
}

func TestLinkCountsHaveALimit(t *testing.T) {
	r := newReplica(t)
	defer r.close()
	f := r.create(1, "f", sIFREG)
	d := r.create(1, "d", sIFDIR)
	ops := []Op{}
	for i := range MaxLink - 1 {
		ops = append(ops, Op{Kind: OpLink, Ino: f, Parent: d, Name: fmt.Sprint(i)})
		if len(ops) == MaxOps || i == MaxLink-2 {
			for _, res := range r.ops(r.session, ops...).Ops {
				if res.Err != 0 {
					t.Fatalf("%+v", res)
				}
			}
			ops = ops[:0]
		}
	}
	if a := r.attr(f); a.Nlink != MaxLink {
		t.Fatalf("%+v", a)
	}
	if res := r.do(Op{Kind: OpLink, Ino: f, Parent: d, Name: "more"}); errs.Class(res.Err) != errs.TooLarge {
		t.Fatalf("%+v", res)
	}
	// A directory so large is listed in pages, in order, each name once.
	n, last := 0, ""
	for {
		ents, err := r.view().ReadDir(d, last, 700)
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range ents {
			if e.Name <= last {
				t.Fatalf("%q after %q", e.Name, last)
			}
			last = e.Name
			n++
		}
		if len(ents) < 700 {
			break
		}
	}
	if n != MaxLink-1 || r.attr(d).Size != uint64(n) {
		t.Fatalf("%d entries", n)
	}
}
