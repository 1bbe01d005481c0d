package fusefs

import (
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"github.com/unum-os/unum/internal/clock"
	"github.com/unum-os/unum/internal/ids"
	"github.com/unum-os/unum/internal/volume"
)

// blockSize is st_blksize, what programs that care use as their buffer: each
// write(2) is a round trip, so the usual 4096 would make them slow, and a whole
// block would cost more to allocate than most files are long.
const blockSize = 128 << 10

// seconds splits nanoseconds since 1970 as the kernel wants them.
func seconds(ns int64) (uint64, uint32) {
	s, n := ns/1e9, ns%1e9
	if n < 0 {
		s, n = s-1, n+1e9
	}
	return uint64(s), uint32(n)
}

func nanoseconds(s uint64, n uint32) int64 { return int64(s)*1e9 + int64(n) }

func fillAttr(out *fuse.Attr, a *volume.Attr) {
	out.Ino = uint64(a.Ino)
	out.Size = a.Size
	out.Blocks = (a.Alloc + 511) / 512
	out.Atime, out.Atimensec = seconds(a.Atime)
	out.Mtime, out.Mtimensec = seconds(a.Mtime)
	out.Ctime, out.Ctimensec = seconds(a.Ctime)
	out.Mode = a.Mode
	out.Nlink = a.Nlink
	out.Uid, out.Gid = a.Uid, a.Gid
	out.Rdev = a.Rdev
	out.Blksize = blockSize
}

func fillStatx(out *fuse.Statx, a *volume.Attr) {
	out.Mask = unix.STATX_BASIC_STATS | unix.STATX_BTIME
	out.Blksize = blockSize
	out.Nlink = a.Nlink
	out.Uid, out.Gid = a.Uid, a.Gid
	out.Mode = uint16(a.Mode)
	out.Ino = uint64(a.Ino)
	out.Size = a.Size
	out.Blocks = (a.Alloc + 511) / 512
	out.Atime.Sec, out.Atime.Nsec = seconds(a.Atime)
	out.Btime.Sec, out.Btime.Nsec = seconds(a.Btime)
	out.Ctime.Sec, out.Ctime.Nsec = seconds(a.Ctime)
	out.Mtime.Sec, out.Mtime.Nsec = seconds(a.Mtime)
	// The protocol carries devices in the kernel's 32-bit form, but here in
	// two parts.
	out.RdevMajor = a.Rdev >> 8 & 0xfff
	out.RdevMinor = a.Rdev&0xff | a.Rdev>>12&0xfff00
}

// promise works out how long the kernel may use e's attributes, from the time
// the reply is written, and notes what keeps that true.
func (w *worker) promise(n *note, e *Entry) (uint64, uint32) {
	if e.Until == 0 {
		return 0, 0
	}
	now := clock.Now()
	d := e.Until.Sub(now) - Slack
	if d <= 0 {
		return 0, 0
	}
	n.until = e.Until
	if w.promised == 0 {
		w.promised = now
	}
	return uint64(d / time.Second), uint32(d % time.Second)
}

// note adds n to what is to be done after the reply.
func (w *worker) note(n note) { w.notes = append(w.notes, n) }

// entry ends a call that returned e for a name: fills out and takes notes.
func (w *worker) entry(out *fuse.EntryOut, e *Entry, err error) fuse.Status {
	if err != nil {
		w.note(note{op: OpOther})
		return w.status(err)
	}
	n := note{op: OpOther, ino: e.Attr.Ino, lookup: true}
	out.NodeId = uint64(e.Attr.Ino)
	out.AttrValid, out.AttrValidNsec = w.promise(&n, e)
	fillAttr(&out.Attr, &e.Attr)
	w.note(n)
	return fuse.OK
}

// attr ends a call that returned e for ino.
func (w *worker) attr(ino ids.Inode, out *fuse.AttrOut, e *Entry, err error) fuse.Status {
	n := note{op: OpOther, ino: ino}
	if err == nil {
		out.AttrValid, out.AttrValidNsec = w.promise(&n, e)
		fillAttr(&out.Attr, &e.Attr)
	}
	w.note(n)
	return w.status(err)
}
