package volume

import (
	"strings"

	"golang.org/x/sys/unix"

	"github.com/unum-os/unum/internal/errs"
	"github.com/unum-os/unum/internal/ids"
)

// Bits of Attr.Mode that decide something here.
const (
	sIFMT  = unix.S_IFMT
	sIFDIR = unix.S_IFDIR
	sIFREG = unix.S_IFREG
	sIFLNK = unix.S_IFLNK
	sISUID = unix.S_ISUID
	sISGID = unix.S_ISGID
	sIXGRP = unix.S_IXGRP
)

func isDir(mode uint32) bool { return mode&sIFMT == sIFDIR }

// checkName judges a name's form.
func checkName(name string) refusal {
	switch {
	case len(name) > MaxName:
		return no(errs.TooLong, "name of %d bytes, limit %d", len(name), MaxName)
	case name == "" || name == "." || name == ".." || strings.ContainsAny(name, "/\x00"):
		return no(errs.Invalid, "%q cannot be a name", name)
	}
	return done
}

// tooManyLinks refuses what would exceed MaxLink. Its errno should be EMLINK.
func tooManyLinks(n *node) refusal {
	return no(errs.TooLarge, "inode %d has %d links already", n.Attr.Ino, n.Attr.Nlink)
}

func (t *txn) create(op *Op) (ids.Inode, refusal) {
	p, r := t.dir(op.Parent)
	if r.refused() {
		return 0, r
	}
	typ := op.Mode & sIFMT
	tmp := op.Flags&CreateTmpfile != 0
	switch {
	case op.Flags&^CreateTmpfile != 0:
		return 0, no(errs.Invalid, "flags %#x", op.Flags)
	case op.Ino != 0:
		return 0, no(errs.Invalid, "the volume chooses the number of a new inode")
	case tmp && (op.Name != "" || typ != sIFREG):
		return 0, no(errs.Invalid, "a temporary file is a regular file without a name")
	case op.Target != "" && typ != sIFLNK:
		return 0, no(errs.Invalid, "only a symbolic link has a target")
	}
	if !tmp {
		if r := checkName(op.Name); r.refused() {
			return 0, r
		}
		if ino, _ := t.entry(op.Parent, op.Name); ino != 0 {
			return 0, no(errs.Exists, "%q exists in directory %d", op.Name, op.Parent)
		}
	}
	a := Attr{
		Mode: op.Mode & (sIFMT | 0o7777), Nlink: 1, Uid: op.Uid, Gid: op.Gid,
		Atime: t.time, Mtime: t.time, Ctime: t.time, Btime: t.time, Version: 1,
	}
	switch typ {
	case sIFREG, unix.S_IFIFO, unix.S_IFSOCK:
	case unix.S_IFCHR, unix.S_IFBLK:
		a.Rdev = op.Rdev
	case sIFLNK:
		switch {
		case op.Target == "":
			return 0, no(errs.NotFound, "a symbolic link's target cannot be empty")
		case len(op.Target) > MaxTarget:
			return 0, no(errs.TooLong, "target of %d bytes, limit %d", len(op.Target), MaxTarget)
		case strings.Contains(op.Target, "\x00"):
			return 0, no(errs.Invalid, "target with a zero byte")
		}
		a.Mode, a.Size = sIFLNK|0o777, uint64(len(op.Target))
	case sIFDIR:
		if p.Attr.Nlink >= MaxLink {
			return 0, tooManyLinks(p)
		}
		a.Nlink, a.Parent = 2, op.Parent
	default:
		return 0, no(errs.Invalid, "file type %#o", typ)
	}
	if p.Attr.Mode&sISGID != 0 {
		a.Gid = p.Attr.Gid
		if typ == sIFDIR {
			a.Mode |= sISGID
		}
	}

	c := t.counts()
	a.Ino = c.Next
	c.Next++
	c.Inodes++
	n := &node{inode: inode{Attr: a, Target: op.Target}}
	t.nodes[a.Ino] = n
	t.show(n)
	t.soil(n)
	if tmp {
		n.Attr.Nlink, n.Linkable = 0, true
		t.orphan(n, []ids.Session{t.session})
		return a.Ino, done
	}
	t.setEntry(op.Parent, op.Name, a.Ino, a.Mode)
	t.changeData(p)
	p.Attr.Size++
	if typ == sIFDIR {
		p.Attr.Nlink++
	}
	return a.Ino, done
}

func (t *txn) link(op *Op) (ids.Inode, refusal) {
	p, r := t.dir(op.Parent)
	if r.refused() {
		return 0, r
	}
	if r := checkName(op.Name); r.refused() {
		return 0, r
	}
	n := t.node(op.Ino)
	if n == nil || n.Attr.Nlink == 0 && !n.Linkable {
		return 0, no(errs.NotFound, "inode %d is gone", op.Ino)
	}
	if ino, _ := t.entry(op.Parent, op.Name); ino != 0 {
		return 0, no(errs.Exists, "%q exists in directory %d", op.Name, op.Parent)
	}
	if n.isDir() {
		return 0, no(errs.Permission, "a directory has one name only")
	}
	if n.Attr.Nlink >= MaxLink {
		return 0, tooManyLinks(n)
	}

	if n.Linkable {
		for _, id := range t.keepers(op.Ino) {
			t.delete(t.key(tagKeeper, uint64(op.Ino), uint64(id)))
			t.delete(t.key(tagKept, uint64(id), uint64(op.Ino)))
		}
		n.Linkable = false
	}
	t.change(n)
	n.Attr.Nlink++
	t.setEntry(op.Parent, op.Name, op.Ino, n.Attr.Mode)
	t.changeData(p)
	p.Attr.Size++
	return op.Ino, done
}

// child looks up a name that must lead to an inode, and to the presumed one.
func (t *txn) child(p *node, name string, presumed ids.Inode) (*node, refusal) {
	if r := checkName(name); r.refused() {
		return nil, r
	}
	ino, _ := t.entry(p.Attr.Ino, name)
	if ino == 0 {
		return nil, no(errs.NotFound, "no %q in directory %d", name, p.Attr.Ino)
	}
	if presumed != 0 && presumed != ino {
		return nil, no(errs.NameTooOld, "%q in directory %d is inode %d, not %d", name, p.Attr.Ino, ino, presumed)
	}
	return t.named(ino), done
}

// named returns the inode that an entry names.
func (t *txn) named(ino ids.Inode) *node {
	n := t.node(ino)
	if n == nil {
		fail(errs.Corrupt, t.key(tagInode, uint64(ino)), errNamed)
	}
	return n
}

var errNamed = errs.E(errs.Corrupt, "", "", "a directory names an inode that does not exist")

func (t *txn) unlink(op *Op, dir bool) (ids.Inode, refusal) {
	p, r := t.dir(op.Parent)
	if r.refused() {
		return 0, r
	}
	n, r := t.child(p, op.Name, op.Ino)
	switch {
	case r.refused():
		return 0, r
	case dir && !n.isDir():
		return 0, no(errs.NotDir, "%q is not a directory", op.Name)
	case !dir && n.isDir():
		return 0, no(errs.IsDir, "%q is a directory", op.Name)
	case dir && n.Attr.Size > 0:
		return 0, no(errs.NotEmpty, "%q has %d entries", op.Name, n.Attr.Size)
	}

	t.delete(t.store.named(tagEntry, op.Parent, op.Name))
	t.unname(n, op.Keep)
	t.changeData(p)
	p.Attr.Size--
	if dir {
		p.Attr.Nlink--
	}
	return n.Attr.Ino, done
}

// unname takes one name from n; the entry is the caller's business.
func (t *txn) unname(n *node, keep []ids.Session) {
	t.change(n)
	if n.isDir() {
		n.Attr.Nlink = 0
	} else {
		n.Attr.Nlink--
	}
	if n.Attr.Nlink == 0 {
		t.orphan(n, keep)
	}
}

// below reports whether directory dir is top or lies in it.
func (t *txn) below(dir, top ids.Inode) bool {
	for {
		if dir == top {
			return true
		}
		n := t.node(dir)
		if dir == ids.RootInode || n == nil || n.Attr.Parent == dir {
			return false
		}
		dir = n.Attr.Parent
	}
}

func (t *txn) rename(op *Op) (ids.Inode, refusal) {
	from, r := t.dir(op.Parent)
	if r.refused() {
		return 0, r
	}
	to, r := t.dir(op.ToParent)
	if r.refused() {
		return 0, r
	}
	exchange := op.Flags&RenameExchange != 0
	if op.Flags&^(RenameNoReplace|RenameExchange) != 0 || exchange && op.Flags&RenameNoReplace != 0 {
		return 0, no(errs.Invalid, "flags %#x", op.Flags)
	}
	if r := checkName(op.ToName); r.refused() {
		return 0, r
	}
	n, r := t.child(from, op.Name, op.Ino)
	if r.refused() {
		return 0, r
	}
	var old *node // what stands at the destination
	oldIno, _ := t.entry(op.ToParent, op.ToName)
	if oldIno != 0 {
		old = t.named(oldIno)
	}
	switch {
	case old != nil && op.Flags&RenameNoReplace != 0:
		return 0, no(errs.Exists, "%q exists in directory %d", op.ToName, op.ToParent)
	case exchange && old == nil:
		return 0, no(errs.NotFound, "no %q in directory %d", op.ToName, op.ToParent)
	case (op.Ino != 0 || op.ToIno != 0) && oldIno != op.ToIno:
		return 0, no(errs.NameTooOld, "%q in directory %d is inode %d, not %d", op.ToName, op.ToParent, oldIno, op.ToIno)
	case old == n:
		t.show(n)
		return n.Attr.Ino, done // two names of one inode: nothing happens
	case n.isDir() && from != to && t.below(op.ToParent, n.Attr.Ino):
		return 0, no(errs.Loop, "directory %d cannot move below itself", n.Attr.Ino)
	}
	if exchange {
		return t.exchange(op, n, old, from, to)
	}
	if old != nil {
		switch {
		case n.isDir() && !old.isDir():
			return 0, no(errs.NotDir, "%q is not a directory", op.ToName)
		case !n.isDir() && old.isDir():
			return 0, no(errs.IsDir, "%q is a directory", op.ToName)
		case old.isDir() && old.Attr.Size > 0:
			return 0, no(errs.NotEmpty, "%q has %d entries", op.ToName, old.Attr.Size)
		}
	} else if n.isDir() && from != to && to.Attr.Nlink >= MaxLink {
		return 0, tooManyLinks(to)
	}

	t.change(n)
	t.changeData(from)
	t.changeData(to)
	t.delete(t.store.named(tagEntry, op.Parent, op.Name))
	t.setEntry(op.ToParent, op.ToName, n.Attr.Ino, n.Attr.Mode)
	from.Attr.Size--
	to.Attr.Size++
	if n.isDir() {
		from.Attr.Nlink--
		to.Attr.Nlink++
		n.Attr.Parent = op.ToParent
	}
	if old != nil {
		to.Attr.Size--
		if old.isDir() {
			to.Attr.Nlink--
		}
		t.unname(old, op.Keep)
	}
	return n.Attr.Ino, done
}

// exchange swaps two names; rename has checked everything but old's side.
func (t *txn) exchange(op *Op, n, old, from, to *node) (ids.Inode, refusal) {
	if from != to {
		switch {
		case old.isDir() && t.below(op.Parent, old.Attr.Ino):
			return 0, no(errs.Loop, "directory %d cannot move below itself", old.Attr.Ino)
		case n.isDir() && !old.isDir() && to.Attr.Nlink >= MaxLink:
			return 0, tooManyLinks(to)
		case old.isDir() && !n.isDir() && from.Attr.Nlink >= MaxLink:
			return 0, tooManyLinks(from)
		}
	}

	t.change(n)
	t.changeData(from)
	t.changeData(to)
	t.change(old)
	t.setEntry(op.Parent, op.Name, old.Attr.Ino, old.Attr.Mode)
	t.setEntry(op.ToParent, op.ToName, n.Attr.Ino, n.Attr.Mode)
	if n.isDir() {
		from.Attr.Nlink--
		to.Attr.Nlink++
		n.Attr.Parent = op.ToParent
	}
	if old.isDir() {
		to.Attr.Nlink--
		from.Attr.Nlink++
		old.Attr.Parent = op.Parent
	}
	return n.Attr.Ino, done
}
