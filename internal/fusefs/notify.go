package fusefs

import (
	"encoding/binary"
	"time"

	"golang.org/x/sys/unix"

	"github.com/unum-os/unum/internal/clock"
	"github.com/unum-os/unum/internal/errs"
	"github.com/unum-os/unum/internal/ids"
)

// Notification codes.
const (
	notifyInvalInode = 2
	notifyIncEpoch   = 8 // Linux 6.16
)

const (
	// Slack is what a promise to the kernel ends earlier than the Tree's.
	Slack = 100 * time.Millisecond
	// pauseLimit is how long a reply may take from the working out of a promise
	// to the kernel before the promise is withdrawn. The rest of Slack is for
	// the kernel's rounding to its ticks (at most 10 ms each way).
	pauseLimit = Slack - 20*time.Millisecond
)

// InvalidateInode makes the kernel forget the attributes of ino and, unless off
// is negative, its cached data in [off, off+length); length 0 means to the end.
// Dirty mapped pages there are written back first (Write with FromCache). An
// inode the kernel does not know is a success. Any goroutine may call it, but
// no handler of the same inode: it waits for pages that are being read or
// written.
func (m *Mount) InvalidateInode(ino ids.Inode, off, length int64) error {
	_, err := m.invalidate(ino, off, length)
	return err
}

// invalidate also reports whether the kernel knew the inode.
func (m *Mount) invalidate(ino ids.Inode, off, length int64) (known bool, err error) {
	var b [outHeaderSize + 24]byte
	binary.NativeEndian.PutUint64(b[16:], uint64(ino))
	binary.NativeEndian.PutUint64(b[24:], uint64(off))
	binary.NativeEndian.PutUint64(b[32:], uint64(length))
	switch err := m.notify(notifyInvalInode, b[:]); err {
	case nil:
		return true, nil
	case unix.ENOENT:
		return false, nil
	default:
		return false, errs.Wrap(err, "invalidate", m.cfg.Dir)
	}
}

// IncEpoch makes the kernel look up every name again before it uses it. Names
// are not cached anyway (entry time-out 0), so it only matters to those in use
// at the moment. Class NotSupported before Linux 6.16.
func (m *Mount) IncEpoch() error {
	var b [outHeaderSize]byte
	switch err := m.notify(notifyIncEpoch, b[:]); err {
	case nil:
		return nil
	case unix.EINVAL, unix.ENOSYS:
		return errs.E(errs.NotSupported, "invalidate names", m.cfg.Dir, "the kernel is older than Linux 6.16")
	default:
		return errs.Wrap(err, "invalidate names", m.cfg.Dir)
	}
}

// notify fills in b's header and writes it. Before the mount is up and after it
// ended the kernel has nothing to forget: success.
func (m *Mount) notify(code int32, b []byte) error {
	m.mu.Lock()
	if !m.open {
		m.mu.Unlock()
		return nil
	}
	m.using++
	m.mu.Unlock()
	binary.NativeEndian.PutUint32(b, uint32(len(b)))
	binary.NativeEndian.PutUint32(b[4:], uint32(code))
	_, err := unix.Write(m.fd, b)
	m.mu.Lock()
	if m.using--; m.using == 0 {
		m.unused.Broadcast()
	}
	m.mu.Unlock()
	return err
}

// withdraw takes back a promise that may have reached the kernel late. If the
// kernel does not know the inode, the program that asked has not run since the
// reply was written: it is tried again until the promise is over.
func (m *Mount) withdraw(ino ids.Inode, until clock.Instant) {
	known, err := m.invalidate(ino, -1, 0)
	if err != nil {
		m.log.Error("promise not withdrawn", "inode", ino, "err", err)
		return
	}
	if known {
		return
	}
	m.workers.Add(1) // the caller is a worker: the count is not 0
	go func() {
		defer m.workers.Done()
		t := time.NewTicker(5 * time.Millisecond)
		defer t.Stop()
		for clock.Now().Before(until) {
			select {
			case <-m.dead:
				return
			case <-m.ctx.Done():
				return
			case <-t.C:
			}
			if known, err := m.invalidate(ino, -1, 0); known || err != nil {
				return
			}
		}
	}()
}
