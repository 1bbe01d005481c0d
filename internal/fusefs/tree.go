package fusefs

import (
	"context"

	"github.com/unum-os/unum/internal/clock"
	"github.com/unum-os/unum/internal/ids"
	"github.com/unum-os/unum/internal/volume"
)

// Caller is who asks. The kernel has checked modes and ownership against the
// attributes it last got (default_permissions) before it asks.
type Caller struct{ Uid, Gid, Pid uint32 }

// Op says which kind of call Replied ends.
type Op uint8

// The kinds.
const (
	OpRead  Op = 1 // Read
	OpWrite Op = 2 // Write
	OpOther Op = 3 // every other call that ends with Replied
)

// Entry is an inode's attributes as they go to the kernel.
type Entry struct {
	Attr volume.Attr
	// Until is the end of the promise: until then nobody changes Attr without
	// InvalidateInode being called here first. In the past or zero: there is no
	// promise, and the kernel asks each time. What the kernel is given ends
	// earlier than Until by the pause guard (Slack), so a promise shorter than
	// that is none.
	Until clock.Instant
}

// Opened is an open file's handle, chosen by the tree.
type Opened struct {
	Handle uint64
	// Direct makes every read and write of this handle come here instead of
	// the kernel's page cache. Mappings of it are still cached.
	Direct bool
	// KeepCache keeps the pages the kernel has of the inode; else they are
	// dropped at this open.
	KeepCache bool
}

// SetAttr is a change of attributes. Mask holds volume.Set* bits and
// volume.KillPriv; a Mask of volume.SetCtime alone asks for nothing but a new
// ctime. Atime and Mtime are nanoseconds since 1970; "now" has been resolved.
// KillPriv comes with every change of owner or group and with truncation by a
// caller without CAP_FSETID; it means nothing on a directory.
type SetAttr struct {
	Mask         uint32
	Mode         uint32 // permission bits, 07777
	Uid, Gid     uint32
	Size         uint64
	Atime, Mtime int64
}

// WriteInfo says how a write came about.
type WriteInfo struct {
	// FromCache: written back from a shared mapping; handle is any handle that
	// is open for writing, Append is never set, and no caller is known.
	FromCache bool
	// KillPriv: clear set-user-id, and set-group-id where group may execute.
	KillPriv bool
	// Append: the file was opened with O_APPEND. off is where the kernel thinks
	// the end is; the tree writes at the real end. If the real end is elsewhere
	// the kernel's pages there are wrong unless the handle is Direct.
	Append bool
}

// StatFS is what statfs(2) shows. Blocks are of BlockSize bytes.
type StatFS struct {
	Blocks, Free, Avail uint64
	Files, FilesFree    uint64
	BlockSize           uint32
	NameLen             uint32
}

// Xattr's flags, as in setxattr(2).
const (
	XattrCreate  = 1
	XattrReplace = 2
)

// Tree is the file system behind the mount. All methods are called from many
// goroutines at once and may block; ctx ends when the caller got a signal (the
// method then returns class Interrupted, or finishes) and when the mount ends.
// Buffers and strings passed in as []byte are lent until the method returns.
//
// Errors become errnos by errs.Errno. ENXIO (Seek) and other errnos without a
// class are returned as syscall.Errno values.
//
// Lookup counts: each Entry that was returned with a nil error by Lookup,
// Create, Mknod, Mkdir, Symlink, Link or Tmpfile, and each one that emit of
// ReadDir took, counts one; Forget takes counts back. Forget is also called
// when the kernel did not take a reply any more, so the counts balance.
//
// Entries (dentries) are never cached by the kernel, negative ones neither:
// each path component is a Lookup.
type Tree interface {
	// Lookup never sees "." or "..".
	Lookup(ctx context.Context, c Caller, parent ids.Inode, name string) (Entry, error)
	// Forget: the kernel forgot n lookups of ino. It must not block on anything
	// remote.
	Forget(ino ids.Inode, n uint64)

	GetAttr(ctx context.Context, ino ids.Inode) (Entry, error)
	// SetAttr acts through handle if it is not 0 (ftruncate of a file that has
	// lost its permission or its names).
	SetAttr(ctx context.Context, c Caller, ino ids.Inode, handle uint64, s SetAttr) (Entry, error)

	// Create makes and opens a regular file. Modes have had the umask applied
	// and carry no type bits, except Mknod's. flags are open(2)'s; if the name
	// exists: Exists with O_EXCL, else the existing file is opened. A
	// set-group-id parent hands on its group (and, to directories, the bit):
	// the tree's affair.
	Create(ctx context.Context, c Caller, parent ids.Inode, name string, mode, flags uint32) (Entry, Opened, error)
	Mknod(ctx context.Context, c Caller, parent ids.Inode, name string, mode, rdev uint32) (Entry, error)
	Mkdir(ctx context.Context, c Caller, parent ids.Inode, name string, mode uint32) (Entry, error)
	Symlink(ctx context.Context, c Caller, parent ids.Inode, name, target string) (Entry, error)
	Link(ctx context.Context, c Caller, ino, newParent ids.Inode, newName string) (Entry, error)
	Tmpfile(ctx context.Context, c Caller, parent ids.Inode, mode, flags uint32) (Entry, Opened, error)

	Unlink(ctx context.Context, c Caller, parent ids.Inode, name string) error
	Rmdir(ctx context.Context, c Caller, parent ids.Inode, name string) error
	// Rename's flags are volume.Rename*; any other flag was refused already.
	Rename(ctx context.Context, c Caller, parent ids.Inode, name string, newParent ids.Inode, newName string, flags uint32) error
	Readlink(ctx context.Context, ino ids.Inode) (string, error)

	// Open's flags are open(2)'s; O_TRUNC is the tree's to do (killPriv: with
	// set-id bits cleared), O_CREAT and O_EXCL do not come.
	Open(ctx context.Context, c Caller, ino ids.Inode, flags uint32, killPriv bool) (Opened, error)
	// Read fills buf from off; fewer bytes only at the end of the file.
	Read(ctx context.Context, ino ids.Inode, handle, off uint64, buf []byte) (int, error)
	Write(ctx context.Context, ino ids.Inode, handle, off uint64, data []byte, w WriteInfo) (int, error)
	// Flush is called at each close(2) of a descriptor of the handle, before
	// close returns, also of a duplicate or a forked copy. POSIX locks of
	// lockOwner on the file end here.
	Flush(ctx context.Context, ino ids.Inode, handle, lockOwner uint64) error
	Fsync(ctx context.Context, ino ids.Inode, handle uint64, dataOnly bool) error
	// Release ends the handle: last descriptor and last mapping are gone. Nobody
	// waits for it. unlock: flock locks of lockOwner end.
	Release(ino ids.Inode, handle, lockOwner uint64, unlock bool)
	Fallocate(ctx context.Context, ino ids.Inode, handle, off, length uint64, mode uint32) error
	// Seek is SEEK_DATA (3) or SEEK_HOLE (4).
	Seek(ctx context.Context, ino ids.Inode, handle, off uint64, whence uint32) (uint64, error)

	OpenDir(ctx context.Context, c Caller, ino ids.Inode) (Opened, error)
	// ReadDir emits the entries that follow cookie (0: from the start) until
	// emit returns false (that entry was not taken) or there are no more.
	// "." and ".." are made by fusefs, the tree emits neither. Cookies are the
	// tree's, at most 1<<62, and stay good for the handle's life while the
	// directory changes: no entry that is there all the time is skipped or
	// shown twice. e is nil if the attributes are not at hand; it is only
	// looked at, and counts as a lookup, if plus is set.
	ReadDir(ctx context.Context, dir ids.Inode, handle, cookie uint64, plus bool, emit func(ent volume.Dirent, next uint64, e *Entry) bool) error
	FsyncDir(ctx context.Context, ino ids.Inode, handle uint64, dataOnly bool) error
	ReleaseDir(ino ids.Inode, handle uint64)

	StatFS(ctx context.Context) (StatFS, error)

	// GetXattr's and ListXattr's results are whole; sizes are fusefs's affair.
	// A missing attribute is NoData.
	GetXattr(ctx context.Context, c Caller, ino ids.Inode, name string) ([]byte, error)
	SetXattr(ctx context.Context, c Caller, ino ids.Inode, name string, value []byte, flags uint32) error
	ListXattr(ctx context.Context, c Caller, ino ids.Inode) ([]string, error)
	RemoveXattr(ctx context.Context, c Caller, ino ids.Inode, name string) error

	// GetLock returns the first lock in the way of l, or l with F_UNLCK.
	GetLock(ctx context.Context, ino ids.Inode, l volume.Lock) (volume.Lock, error)
	// SetLock takes, changes or releases (F_UNLCK) a lock. Without wait a
	// refusal is LockHeld; with wait it blocks until granted or interrupted.
	SetLock(ctx context.Context, ino ids.Inode, l volume.Lock, wait bool) error

	// Replied is called once for each call of Lookup, GetAttr, SetAttr, Create,
	// Mknod, Mkdir, Symlink, Link, Tmpfile, Open, Read, Write and ReadDir,
	// also after errors, when its reply has been written to the kernel: a
	// revocation of ino waits for it. ino is the inode argument (SetAttr, Open,
	// Read, Write, GetAttr, Link, and the directory of ReadDir) or the inode of
	// the Entry returned (Lookup and those that create; 0 if they failed).
	// After a ReadDir with plus it is called, besides for the directory, once
	// for each Entry that emit took. It must not block.
	Replied(op Op, ino ids.Inode)
}
