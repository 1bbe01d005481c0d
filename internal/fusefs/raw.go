package fusefs

import (
	"context"
	"errors"
	"strings"
	"syscall"
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"

	"github.com/unum-os/unum/internal/errs"
	"github.com/unum-os/unum/internal/ids"
	"github.com/unum-os/unum/internal/volume"
)

// The methods below are fuse.RawFileSystem: the decoder calls them with the
// parts of one request, and they call the Tree. Their cancel channels are not
// used; the request's context is.

var _ fuse.RawFileSystem = (*worker)(nil)

func inode(node uint64) ids.Inode {
	if node == rootAlias {
		return ids.RootInode
	}
	return ids.Inode(node)
}

func caller(h *fuse.InHeader) Caller { return Caller{Uid: h.Uid, Gid: h.Gid, Pid: h.Pid} }

// status is the errno for err.
func (w *worker) status(err error) fuse.Status {
	if err == nil {
		return fuse.OK
	}
	en := errs.Errno(err)
	if en == syscall.EIO && errors.Is(err, context.Canceled) && w.req.ctx.Err() != nil {
		en = syscall.EINTR
	}
	if en >= 512 {
		en = syscall.EIO // the kernel refuses a reply with such a number
	}
	return fuse.Status(en)
}

func (w *worker) String() string { return "unum" }

// SetDebug is of no use here.
func (w *worker) SetDebug(bool) {}

// Init is never called: the decoder has no server.
func (w *worker) Init(*fuse.Server) {}

// OnUnmount is never called.
func (w *worker) OnUnmount() {}

// Names and attributes.

func (w *worker) Lookup(_ <-chan struct{}, h *fuse.InHeader, name string, out *fuse.EntryOut) fuse.Status {
	e, err := w.m.cfg.Tree.Lookup(w.req.ctx, caller(h), inode(h.NodeId), name)
	return w.entry(out, &e, err)
}

func (w *worker) Forget(node, n uint64) { w.m.cfg.Tree.Forget(inode(node), n) }

func (w *worker) GetAttr(_ <-chan struct{}, in *fuse.GetAttrIn, out *fuse.AttrOut) fuse.Status {
	ino := inode(in.NodeId)
	if ino == ids.RootInode && w.m.probing.Load() {
		// Good for one look, by silencePoll: nobody is waiting for the Tree yet.
		fillAttr(&out.Attr, &volume.Attr{Ino: ino, Mode: syscall.S_IFDIR | 0o755, Nlink: 2})
		return fuse.OK
	}
	e, err := w.m.cfg.Tree.GetAttr(w.req.ctx, ino)
	return w.attr(ino, out, &e, err)
}

func (w *worker) Statx(_ <-chan struct{}, in *fuse.StatxIn, out *fuse.StatxOut) fuse.Status {
	n := note{op: OpOther, ino: inode(in.NodeId)}
	e, err := w.m.cfg.Tree.GetAttr(w.req.ctx, n.ino)
	if err == nil {
		out.AttrValid, out.AttrValidNsec = w.promise(&n, &e)
		fillStatx(&out.Statx, &e.Attr)
	}
	w.note(n)
	return w.status(err)
}

func (w *worker) SetAttr(_ <-chan struct{}, in *fuse.SetAttrIn, out *fuse.AttrOut) fuse.Status {
	ino := inode(in.NodeId)
	s := setAttr(in, time.Now().UnixNano())
	var handle uint64
	if in.Valid&fuse.FATTR_FH != 0 {
		handle = in.Fh
	}
	e, err := w.m.cfg.Tree.SetAttr(w.req.ctx, caller(&in.InHeader), ino, handle, s)
	return w.attr(ino, out, &e, err)
}

// setAttr reads what SETATTR asks for; now stands for the times "now".
func setAttr(in *fuse.SetAttrIn, now int64) SetAttr {
	var s SetAttr
	if in.Valid&fuse.FATTR_MODE != 0 {
		s.Mask |= volume.SetMode
		s.Mode = in.Mode & 07777
	}
	if in.Valid&fuse.FATTR_UID != 0 {
		s.Mask |= volume.SetUid | volume.KillPriv
		s.Uid = in.Uid
	}
	if in.Valid&fuse.FATTR_GID != 0 {
		s.Mask |= volume.SetGid | volume.KillPriv
		s.Gid = in.Gid
	}
	if in.Valid&fuse.FATTR_SIZE != 0 {
		s.Mask |= volume.SetSize
		s.Size = in.Size
		if in.Valid&fuse.FATTR_KILL_SUIDGID != 0 {
			s.Mask |= volume.KillPriv
		}
	}
	if in.Valid&fuse.FATTR_MODE != 0 {
		s.Mask &^= volume.KillPriv // the new mode says it
	}
	if in.Valid&(fuse.FATTR_ATIME|fuse.FATTR_ATIME_NOW) != 0 {
		s.Mask |= volume.SetAtime
		s.Atime = nanoseconds(in.Atime, in.Atimensec)
		if in.Valid&fuse.FATTR_ATIME_NOW != 0 {
			s.Atime = now
		}
	}
	if in.Valid&(fuse.FATTR_MTIME|fuse.FATTR_MTIME_NOW) != 0 {
		s.Mask |= volume.SetMtime
		s.Mtime = nanoseconds(in.Mtime, in.Mtimensec)
		if in.Valid&fuse.FATTR_MTIME_NOW != 0 {
			s.Mtime = now
		}
	}
	if s.Mask == 0 {
		s.Mask = volume.SetCtime // chown(-1, -1)
	}
	return s
}

func (w *worker) Mknod(_ <-chan struct{}, in *fuse.MknodIn, name string, out *fuse.EntryOut) fuse.Status {
	e, err := w.m.cfg.Tree.Mknod(w.req.ctx, caller(&in.InHeader), inode(in.NodeId), name, in.Mode, in.Rdev)
	return w.entry(out, &e, err)
}

func (w *worker) Mkdir(_ <-chan struct{}, in *fuse.MkdirIn, name string, out *fuse.EntryOut) fuse.Status {
	e, err := w.m.cfg.Tree.Mkdir(w.req.ctx, caller(&in.InHeader), inode(in.NodeId), name, in.Mode&07777)
	return w.entry(out, &e, err)
}

func (w *worker) Symlink(_ <-chan struct{}, h *fuse.InHeader, target, name string, out *fuse.EntryOut) fuse.Status {
	e, err := w.m.cfg.Tree.Symlink(w.req.ctx, caller(h), inode(h.NodeId), name, target)
	return w.entry(out, &e, err)
}

func (w *worker) Link(_ <-chan struct{}, in *fuse.LinkIn, name string, out *fuse.EntryOut) fuse.Status {
	ino := inode(in.Oldnodeid)
	e, err := w.m.cfg.Tree.Link(w.req.ctx, caller(&in.InHeader), ino, inode(in.NodeId), name)
	st := w.entry(out, &e, err)
	w.notes[len(w.notes)-1].ino = ino // also after an error
	return st
}

func (w *worker) Unlink(_ <-chan struct{}, h *fuse.InHeader, name string) fuse.Status {
	return w.status(w.m.cfg.Tree.Unlink(w.req.ctx, caller(h), inode(h.NodeId), name))
}

func (w *worker) Rmdir(_ <-chan struct{}, h *fuse.InHeader, name string) fuse.Status {
	return w.status(w.m.cfg.Tree.Rmdir(w.req.ctx, caller(h), inode(h.NodeId), name))
}

func (w *worker) Rename(_ <-chan struct{}, in *fuse.RenameIn, oldName, newName string) fuse.Status {
	if in.Flags&^(volume.RenameNoReplace|volume.RenameExchange) != 0 {
		return fuse.EINVAL // whiteouts are overlays' affair
	}
	return w.status(w.m.cfg.Tree.Rename(w.req.ctx, caller(&in.InHeader), inode(in.NodeId), oldName, inode(in.Newdir), newName, in.Flags))
}

func (w *worker) Readlink(_ <-chan struct{}, h *fuse.InHeader) ([]byte, fuse.Status) {
	s, err := w.m.cfg.Tree.Readlink(w.req.ctx, inode(h.NodeId))
	return []byte(s), w.status(err)
}

// Access is never asked: the mount has default_permissions.
func (w *worker) Access(<-chan struct{}, *fuse.AccessIn) fuse.Status { return fuse.ENOSYS }

// Files.

// opened fills in the reply to an open and notes the handle.
func (w *worker) opened(ino ids.Inode, out *fuse.OpenOut, o Opened, n note) {
	out.Fh = o.Handle
	if o.Direct {
		out.OpenFlags |= fuse.FOPEN_DIRECT_IO
	}
	if o.KeepCache {
		out.OpenFlags |= fuse.FOPEN_KEEP_CACHE
	}
	n.ino, n.opened, n.handle = ino, true, o.Handle
	w.note(n)
}

func (w *worker) Create(_ <-chan struct{}, in *fuse.CreateIn, name string, out *fuse.CreateOut) fuse.Status {
	e, o, err := w.m.cfg.Tree.Create(w.req.ctx, caller(&in.InHeader), inode(in.NodeId), name, in.Mode&07777, in.Flags)
	st := w.entry(&out.EntryOut, &e, err)
	if err == nil {
		w.opened(e.Attr.Ino, &out.OpenOut, o, note{})
	}
	return st
}

func (w *worker) Tmpfile(_ <-chan struct{}, in *fuse.CreateIn, out *fuse.CreateOut) fuse.Status {
	e, o, err := w.m.cfg.Tree.Tmpfile(w.req.ctx, caller(&in.InHeader), inode(in.NodeId), in.Mode&07777, in.Flags)
	st := w.entry(&out.EntryOut, &e, err)
	if err == nil {
		w.opened(e.Attr.Ino, &out.OpenOut, o, note{})
	}
	return st
}

func (w *worker) Open(_ <-chan struct{}, in *fuse.OpenIn, out *fuse.OpenOut) fuse.Status {
	ino := inode(in.NodeId)
	kill := in.Mode&fuse.OPEN_KILL_SUIDGID != 0 // the decoder's name for the second word
	o, err := w.m.cfg.Tree.Open(w.req.ctx, caller(&in.InHeader), ino, in.Flags, kill)
	if err != nil {
		w.note(note{op: OpOther, ino: ino})
		return w.status(err)
	}
	w.opened(ino, out, o, note{op: OpOther})
	return fuse.OK
}

// filled says that a reply's data is in place already.
type filled int

func (n filled) Bytes(buf []byte) ([]byte, fuse.Status) { return buf[:n], fuse.OK }
func (n filled) Readv([][]byte) (int, fuse.Status)      { return int(n), fuse.OK }
func (n filled) Size() int                              { return int(n) }
func (n filled) Done()                                  {}

func (w *worker) Read(_ <-chan struct{}, in *fuse.ReadIn, buf []byte) (fuse.ReadResult, fuse.Status) {
	ino := inode(in.NodeId)
	n, err := w.m.cfg.Tree.Read(w.req.ctx, ino, in.Fh, in.Offset, buf)
	w.note(note{op: OpRead, ino: ino})
	if err != nil {
		return nil, w.status(err)
	}
	return filled(n), fuse.OK
}

func (w *worker) Write(_ <-chan struct{}, in *fuse.WriteIn, data []byte) (uint32, fuse.Status) {
	ino := inode(in.NodeId)
	info := WriteInfo{
		FromCache: in.WriteFlags&fuse.WRITE_CACHE != 0,
		KillPriv:  in.WriteFlags&fuse.WRITE_KILL_SUIDGID != 0,
	}
	info.Append = !info.FromCache && in.Flags&syscall.O_APPEND != 0
	n, err := w.m.cfg.Tree.Write(w.req.ctx, ino, in.Fh, in.Offset, data, info)
	w.note(note{op: OpWrite, ino: ino})
	if err != nil {
		return 0, w.status(err)
	}
	return uint32(n), fuse.OK
}

// Writev sends the decoder to Write.
func (w *worker) Writev(<-chan struct{}, *fuse.WriteIn, [][]byte) (uint32, fuse.Status) {
	return 0, fuse.ENOSYS
}

func (w *worker) Flush(_ <-chan struct{}, in *fuse.FlushIn) fuse.Status {
	st := w.status(w.m.cfg.Tree.Flush(w.req.ctx, inode(in.NodeId), in.Fh, in.LockOwner))
	if st == fuse.ENOSYS {
		return fuse.EIO // the kernel would never ask again
	}
	return st
}

func (w *worker) Fsync(_ <-chan struct{}, in *fuse.FsyncIn) fuse.Status {
	st := w.status(w.m.cfg.Tree.Fsync(w.req.ctx, inode(in.NodeId), in.Fh, in.FsyncFlags&1 != 0))
	if st == fuse.ENOSYS {
		return fuse.EIO // the kernel would take it for done, for ever
	}
	return st
}

func (w *worker) Release(_ <-chan struct{}, in *fuse.ReleaseIn) {
	const flockUnlock = 1 << 1
	w.m.cfg.Tree.Release(inode(in.NodeId), in.Fh, in.LockOwner, in.ReleaseFlags&flockUnlock != 0)
}

func (w *worker) Fallocate(_ <-chan struct{}, in *fuse.FallocateIn) fuse.Status {
	return w.status(w.m.cfg.Tree.Fallocate(w.req.ctx, inode(in.NodeId), in.Fh, in.Offset, in.Length, in.Mode))
}

func (w *worker) Lseek(_ <-chan struct{}, in *fuse.LseekIn, out *fuse.LseekOut) fuse.Status {
	off, err := w.m.cfg.Tree.Seek(w.req.ctx, inode(in.NodeId), in.Fh, in.Offset, in.Whence)
	out.Offset = off
	return w.status(err)
}

// CopyFileRange is left to the kernel, which reads and writes instead.
func (w *worker) CopyFileRange(<-chan struct{}, *fuse.CopyFileRangeIn) (uint32, fuse.Status) {
	return 0, fuse.ENOSYS
}

// Ioctl knows no ioctl.
func (w *worker) Ioctl(<-chan struct{}, *fuse.IoctlIn, []byte, *fuse.IoctlOut, []byte) fuse.Status {
	return fuse.Status(syscall.ENOTTY)
}

// Locks.

func lock(in *fuse.LkIn) volume.Lock {
	l := volume.Lock{Kind: volume.LockPosix, Owner: in.Owner, Start: in.Lk.Start, End: in.Lk.End, Type: in.Lk.Typ, Pid: in.Lk.Pid}
	if in.LkFlags&fuse.LK_FLOCK != 0 {
		l.Kind = volume.LockFlock
	}
	return l
}

func (w *worker) GetLk(_ <-chan struct{}, in *fuse.LkIn, out *fuse.LkOut) fuse.Status {
	l, err := w.m.cfg.Tree.GetLock(w.req.ctx, inode(in.NodeId), lock(in))
	out.Lk = fuse.FileLock{Start: l.Start, End: l.End, Typ: l.Type, Pid: l.Pid}
	return w.status(err)
}

func (w *worker) SetLk(_ <-chan struct{}, in *fuse.LkIn) fuse.Status {
	return w.status(w.m.cfg.Tree.SetLock(w.req.ctx, inode(in.NodeId), lock(in), false))
}

func (w *worker) SetLkw(_ <-chan struct{}, in *fuse.LkIn) fuse.Status {
	return w.status(w.m.cfg.Tree.SetLock(w.req.ctx, inode(in.NodeId), lock(in), true))
}

// Directories.

func (w *worker) OpenDir(_ <-chan struct{}, in *fuse.OpenIn, out *fuse.OpenOut) fuse.Status {
	ino := inode(in.NodeId)
	o, err := w.m.cfg.Tree.OpenDir(w.req.ctx, caller(&in.InHeader), ino)
	if err != nil {
		return w.status(err)
	}
	o.Direct = false
	w.opened(ino, out, o, note{dir: true})
	if o.KeepCache {
		out.OpenFlags |= fuse.FOPEN_CACHE_DIR
	}
	return fuse.OK
}

func (w *worker) ReadDir(_ <-chan struct{}, in *fuse.ReadIn, out *fuse.DirEntryList) fuse.Status {
	return w.readDir(in, out, false)
}

func (w *worker) ReadDirPlus(_ <-chan struct{}, in *fuse.ReadIn, out *fuse.DirEntryList) fuse.Status {
	return w.readDir(in, out, true)
}

// readDir fills out. The kernel's offset 0 is before ".", 1 before "..", and
// the Tree's cookies follow from 2 on.
func (w *worker) readDir(in *fuse.ReadIn, out *fuse.DirEntryList, plus bool) fuse.Status {
	const shift = 2
	dir := inode(in.NodeId)
	add := func(d fuse.DirEntry, e *Entry) bool {
		if !plus {
			return out.AddDirEntry(d)
		}
		eo := out.AddDirLookupEntry(d)
		if eo == nil {
			return false
		}
		if e != nil { // else node id 0: no attributes, no lookup
			n := note{op: OpOther, ino: e.Attr.Ino, lookup: true}
			eo.NodeId = uint64(e.Attr.Ino)
			eo.AttrValid, eo.AttrValidNsec = w.promise(&n, e)
			fillAttr(&eo.Attr, &e.Attr)
			w.note(n)
		}
		return true
	}
	if in.Offset == 0 && !add(fuse.DirEntry{Name: ".", Ino: uint64(dir), Mode: syscall.S_IFDIR, Off: 1}, nil) {
		return fuse.EINVAL
	}
	if in.Offset <= 1 {
		parent := dir
		a, err := w.m.cfg.Tree.GetAttr(w.req.ctx, dir)
		w.note(note{op: OpOther, ino: dir})
		if err != nil {
			return w.status(err)
		}
		if a.Attr.Parent != 0 {
			parent = a.Attr.Parent
		}
		if !add(fuse.DirEntry{Name: "..", Ino: uint64(parent), Mode: syscall.S_IFDIR, Off: 2}, nil) {
			return fuse.EINVAL
		}
	}
	empty := in.Offset > 1
	err := w.m.cfg.Tree.ReadDir(w.req.ctx, dir, in.Fh, max(in.Offset, shift)-shift, plus, func(ent volume.Dirent, next uint64, e *Entry) bool {
		if !add(fuse.DirEntry{Name: ent.Name, Ino: uint64(ent.Ino), Mode: ent.Mode, Off: next + shift}, e) {
			return false
		}
		empty = false
		return true
	})
	w.note(note{op: OpOther, ino: dir})
	if err != nil && empty {
		return w.status(err)
	}
	return fuse.OK // an error after some entries comes back with the next call
}

func (w *worker) FsyncDir(_ <-chan struct{}, in *fuse.FsyncIn) fuse.Status {
	st := w.status(w.m.cfg.Tree.FsyncDir(w.req.ctx, inode(in.NodeId), in.Fh, in.FsyncFlags&1 != 0))
	if st == fuse.ENOSYS {
		return fuse.EIO
	}
	return st
}

func (w *worker) ReleaseDir(in *fuse.ReleaseIn) {
	w.m.cfg.Tree.ReleaseDir(inode(in.NodeId), in.Fh)
}

func (w *worker) StatFs(_ <-chan struct{}, _ *fuse.InHeader, out *fuse.StatfsOut) fuse.Status {
	s, err := w.m.cfg.Tree.StatFS(w.req.ctx)
	*out = fuse.StatfsOut{
		Blocks: s.Blocks, Bfree: s.Free, Bavail: s.Avail,
		Files: s.Files, Ffree: s.FilesFree,
		Bsize: s.BlockSize, Frsize: s.BlockSize, NameLen: s.NameLen,
	}
	return w.status(err)
}

// Extended attributes.

// system reports whether the kernel gives the attribute a meaning that is not
// honoured here (access lists): storing it would only pretend.
func system(name string) bool { return strings.HasPrefix(name, "system.") }

func (w *worker) GetXAttr(_ <-chan struct{}, h *fuse.InHeader, name string, dest []byte) (uint32, fuse.Status) {
	if system(name) {
		return 0, fuse.Status(syscall.EOPNOTSUPP)
	}
	v, err := w.m.cfg.Tree.GetXattr(w.req.ctx, caller(h), inode(h.NodeId), name)
	if err != nil {
		return 0, w.status(err)
	}
	if len(v) > len(dest) {
		return uint32(len(v)), fuse.ERANGE // a probe for the size is not told so
	}
	return uint32(copy(dest, v)), fuse.OK
}

func (w *worker) ListXAttr(_ <-chan struct{}, h *fuse.InHeader, dest []byte) (uint32, fuse.Status) {
	names, err := w.m.cfg.Tree.ListXattr(w.req.ctx, caller(h), inode(h.NodeId))
	if err != nil {
		return 0, w.status(err)
	}
	size := 0
	for _, n := range names {
		size += len(n) + 1
	}
	if size > len(dest) {
		return uint32(size), fuse.ERANGE
	}
	at := 0
	for _, n := range names {
		at += copy(dest[at:], n)
		dest[at] = 0
		at++
	}
	return uint32(size), fuse.OK
}

func (w *worker) SetXAttr(_ <-chan struct{}, in *fuse.SetXAttrIn, name string, data []byte) fuse.Status {
	if system(name) {
		return fuse.Status(syscall.EOPNOTSUPP)
	}
	return w.status(w.m.cfg.Tree.SetXattr(w.req.ctx, caller(&in.InHeader), inode(in.NodeId), name, data, in.Flags))
}

func (w *worker) RemoveXAttr(_ <-chan struct{}, h *fuse.InHeader, name string) fuse.Status {
	if system(name) {
		return fuse.Status(syscall.EOPNOTSUPP)
	}
	return w.status(w.m.cfg.Tree.RemoveXattr(w.req.ctx, caller(h), inode(h.NodeId), name))
}
