package fusefs

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"github.com/unum-os/unum/internal/errs"
)

const (
	// maxWrite is the largest READ or WRITE, a whole block; it is also the most
	// the kernel allows by default (256 pages).
	maxWrite = 1 << 20
	// maxBackground is how many read-aheads and asynchronous writes the kernel
	// has out at once: enough 1 MiB pieces to hide a disk or a network.
	maxBackground = 64
	// readAhead is what the kernel reads ahead, in KiB: a block. Its own default
	// of 128 would cut each block in eight requests.
	readAhead       = 1024
	defaultRequests = 512              // Config.MaxRequests: requests carried out at once
	defaultPatience = 15 * time.Second // Config.Patience: how long a call goes on after a signal that its program survives
	defaultGrace    = 2 * time.Second  // Config.Grace: how long a clean unmount is tried while programs use the mount
)

// Config says what to mount and where.
type Config struct {
	Dir  string // an existing directory, absolute
	Tree Tree
	Log  *slog.Logger // nil: none
	// MaxRequests is how many requests the Tree carries out at once, apart from
	// those that must get through. Zero: 512, more than any program needs and
	// few enough that their 1 MiB buffers fit.
	MaxRequests int
	// Patience is how long a call may go on after its program got a signal that
	// it survives. Zero: 15 s, longer than a call takes while a leader dies: few
	// programs are prepared for stat or open to fail because a child ended.
	Patience time.Duration
	// Grace is how long Run tries to unmount cleanly while programs still use
	// the mount; then it cuts them off. Zero: 2 s.
	Grace time.Duration
	// Guard starts a second process that ends the connection if this one is
	// killed in a moment when the kernel would not (see guard.go). The
	// program's main must begin with GuardMain.
	Guard bool
}

// Mount is a mounted Tree. Make one with New.
type Mount struct {
	cfg  Config
	log  *slog.Logger
	opts fuse.MountOptions

	ready chan struct{} // closed when programs can use the mount
	dead  chan struct{} // closed when the kernel has ended the connection

	limit   time.Duration // the guard's; 0: none
	fd      int           // /dev/fuse; written before ready is closed
	minor   uint32        // the mount's device, which names the connection; likewise
	initReq []byte        // the kernel's INIT: each worker's decoder is taught with it

	ctx     context.Context // ends when the connection does
	slots   chan struct{}   // one token per request being carried out
	idle    atomic.Int32    // workers in read, or about to be
	workers sync.WaitGroup
	pool    sync.Pool // *worker
	spare   atomic.Pointer[buffer]
	buffers chan *buffer // what does not fit in spare
	closing sync.Once    // closes dead
	probing atomic.Bool  // silencePoll is at work

	mu       sync.Mutex
	requests map[uint64]*request // by the kernel's unique number
	open     bool                // fd may be written to
	using    int                 // notifications being written
	unused   *sync.Cond          // using became 0
}

// New returns a Mount that Run will bring up.
func New(cfg Config) *Mount {
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if cfg.MaxRequests == 0 {
		cfg.MaxRequests = defaultRequests
	}
	if cfg.Patience == 0 {
		cfg.Patience = defaultPatience
	}
	if cfg.Grace == 0 {
		cfg.Grace = defaultGrace
	}
	m := &Mount{
		cfg:      cfg,
		log:      cfg.Log,
		ready:    make(chan struct{}),
		dead:     make(chan struct{}),
		slots:    make(chan struct{}, cfg.MaxRequests),
		buffers:  make(chan *buffer, 16),
		requests: make(map[uint64]*request),
	}
	m.unused = sync.NewCond(&m.mu)
	m.opts = fuse.MountOptions{
		MaxWrite:           maxWrite,
		MaxBackground:      maxBackground,
		EnableLocks:        true,
		DisableReadDirPlus: true, // a name is looked up again anyway: see doc.go
		ExtraCapabilities:  fuse.CAP_ATOMIC_O_TRUNC | fuse.CAP_HANDLE_KILLPRIV_V2 | fuse.CAP_DIRECT_IO_ALLOW_MMAP,
		// NO_OPEN would hide opens. PASSTHROUGH would forbid overlays on the
		// mount. ALLOW_IDMAP would hide the caller's ids.
		DisabledCapabilities: fuse.CAP_NO_OPEN_SUPPORT | fuse.CAP_PASSTHROUGH | fuse.CAP_ALLOW_IDMAP,
		Logger:               decoderLog(cfg.Log),
		// A panic is a broken invariant: it must end the process.
		PanicHandler: func(v any) fuse.Status { panic(v) },
	}
	m.pool.New = func() any { return newWorker(m) }
	return m
}

// Ready is closed when the mount is up.
func (m *Mount) Ready() <-chan struct{} { return m.ready }

// Run mounts, serves until ctx ends, and unmounts. It returns nil only after
// ctx ended; class Unavailable if someone else ended the connection.
func (m *Mount) Run(ctx context.Context) error {
	if err := m.mount(); err != nil {
		return err
	}
	var stop context.CancelFunc
	m.ctx, stop = context.WithCancel(context.WithoutCancel(ctx))
	defer stop()
	if err := m.handshake(); err != nil {
		return errors.Join(err, unix.Unmount(m.cfg.Dir, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW), unix.Close(m.fd))
	}
	m.mu.Lock()
	m.open = true
	m.mu.Unlock()
	m.settings()
	var g *guard
	if m.cfg.Guard { // before the first call on the mount
		var err error
		if g, err = m.startGuard(); err != nil {
			m.log.Warn("no guard: the mount may hang if this process is killed", "dir", m.cfg.Dir, "err", err)
		}
	}
	m.probing.Store(true)
	m.spawn()
	m.silencePoll()
	m.probing.Store(false)
	close(m.ready)
	m.log.Info("mounted", "dir", m.cfg.Dir)

	var err error
	select {
	case <-ctx.Done():
		m.unmount()
	case <-m.dead:
		err = errs.E(errs.Unavailable, "serve", m.cfg.Dir, "the mount was taken away (umount, or an abort of its connection)")
		m.detach()
	}
	stop()
	m.workers.Wait()
	m.mu.Lock()
	m.open = false
	for m.using > 0 {
		m.unused.Wait()
	}
	m.mu.Unlock()
	m.log.Info("unmounted", "dir", m.cfg.Dir)
	if cerr := unix.Close(m.fd); cerr != nil {
		err = errors.Join(err, errs.Wrap(cerr, "close", "/dev/fuse"))
	}
	if g != nil {
		if gerr := g.end(); gerr != nil {
			m.log.Warn("the guard has failed", "dir", m.cfg.Dir, "err", gerr)
		}
	}
	return err
}

// mount opens the device and mounts it.
func (m *Mount) mount() error {
	if !filepath.IsAbs(m.cfg.Dir) {
		return errs.E(errs.Invalid, "mount", m.cfg.Dir, "the directory must be an absolute path")
	}
	fd, err := unix.Open("/dev/fuse", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return errs.E(errs.FromErrno(err.(unix.Errno)), "open", "/dev/fuse", "%w", err).
			WithRemedy("as root, modprobe fuse (a container needs --device /dev/fuse)")
	}
	opt := fmt.Sprintf("fd=%d,rootmode=40000,user_id=0,group_id=0,allow_other,default_permissions,max_read=%d", fd, maxWrite)
	// No nosuid, nodev or noexec: it is a full tree.
	if err := unix.Mount("unum", m.cfg.Dir, "fuse.unum", 0, opt); err != nil {
		return errors.Join(errs.E(errs.FromErrno(err.(unix.Errno)), "mount", m.cfg.Dir, "%w", err).
			WithRemedy("check that the directory exists and that you are root"), unix.Close(fd))
	}
	m.fd = fd
	return nil
}

// handshake answers INIT.
func (m *Mount) handshake() error {
	in := make([]byte, bufferSize)
	for {
		n, err := unix.Read(m.fd, in)
		if err == unix.EINTR || err == unix.EAGAIN {
			continue
		}
		if err != nil {
			return errs.Wrap(err, "read INIT", m.cfg.Dir)
		}
		if h, ok := header(in[:n]); !ok || h.op != opInit {
			return errs.E(errs.Corrupt, "mount", m.cfg.Dir, "the kernel's first request is not INIT")
		}
		m.initReq = append([]byte(nil), in[:n]...)
		break
	}
	out := make([]byte, smallBuffer)
	w := newWorker(m)
	n, st := w.decoder.HandleRequest([][]byte{m.initReq}, [][]byte{out})
	if !st.Ok() || n == 0 {
		return errs.E(errs.NotSupported, "mount", m.cfg.Dir, "the kernel's FUSE protocol is too old")
	}
	if _, err := unix.Write(m.fd, out[:n]); err != nil {
		return errs.Wrap(err, "answer INIT", m.cfg.Dir)
	}
	return nil
}

// silencePoll has the kernel learn that files here are always ready, so that it
// never sends POLL. Otherwise the first file of the mount that this process
// itself put in its epoll set would send one from inside epoll_ctl, and the Go
// scheduler, which needs the same epoll set to find the goroutine that answers
// it, would stop for good: no time-out and no signal gets out of that. The
// decoder has a file for the purpose, under a name that means something only
// while probing is set. The Tree has no part in it.
func (m *Mount) silencePoll() {
	fd, err := unix.Open(filepath.Join(m.cfg.Dir, ".go-fuse-epoll-hack"), unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		m.log.Warn("this process must not use its own mount", "dir", m.cfg.Dir, "err", err)
		return
	}
	// Not through the runtime: a plain system call lets others be scheduled.
	_, perr := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 0)
	if err := errors.Join(perr, unix.Close(fd)); err != nil {
		m.log.Warn("this process must not use its own mount", "dir", m.cfg.Dir, "err", err)
	}
}

// settings learns the connection's name and sets what only sysfs can set.
func (m *Mount) settings() {
	var st unix.Statx_t
	if err := unix.Statx(unix.AT_FDCWD, m.cfg.Dir, unix.AT_STATX_DONT_SYNC|unix.AT_NO_AUTOMOUNT, 0, &st); err != nil {
		m.log.Warn("device number unknown", "dir", m.cfg.Dir, "err", err)
		return
	}
	m.minor = st.Dev_minor
	p := fmt.Sprintf("/sys/class/bdi/%d:%d/read_ahead_kb", st.Dev_major, st.Dev_minor)
	if err := os.WriteFile(p, []byte(strconv.Itoa(readAhead)), 0); err != nil {
		m.log.Debug("read-ahead stays at the kernel's default", "err", err)
	}
}

// unmount ends the connection: cleanly if nobody uses the mount within Grace,
// else by cutting off those who do. Users are also the copies of the mount that
// other mount namespaces got when they were made: they keep the connection up
// after this one's is gone. When it returns, dead is closed or soon is.
func (m *Mount) unmount() {
	clean := make(chan bool, 1)
	giveUp := make(chan struct{})
	go func() { clean <- m.unmountIdle(giveUp) }()
	t := time.NewTimer(m.cfg.Grace)
	defer t.Stop()
	select {
	case ok := <-clean:
		clean <- ok
		if ok {
			select {
			case <-m.dead:
				return
			case <-t.C:
			}
		}
	case <-m.dead:
	case <-t.C:
	}
	close(giveUp)
	select {
	case <-m.dead:
	default:
		m.log.Warn("still in use: cutting off the programs that use it", "dir", m.cfg.Dir)
	}
	if err := m.Abort(); err != nil {
		m.log.Error("connection not aborted", "dir", m.cfg.Dir, "err", err)
	}
	<-clean
	m.detach()
}

// unmountIdle tries until it succeeds or giveUp is closed. Before each new try
// it has dirty mapped pages written back, which the end would lose.
func (m *Mount) unmountIdle(giveUp <-chan struct{}) bool {
	pause := time.NewTicker(50 * time.Millisecond)
	defer pause.Stop()
	for {
		err := unix.Unmount(m.cfg.Dir, unix.UMOUNT_NOFOLLOW)
		if err == nil {
			return true
		}
		if err != unix.EBUSY {
			m.log.Warn("unmount refused", "dir", m.cfg.Dir, "err", err)
			return false
		}
		m.sync()
		select {
		case <-giveUp:
			return false
		case <-pause.C:
		}
	}
}

// sync has the kernel write back the dirty pages of the mount.
func (m *Mount) sync() {
	fd, err := unix.Open(m.cfg.Dir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		m.log.Warn("mapped pages may be lost", "dir", m.cfg.Dir, "err", err)
		return
	}
	if err := errors.Join(unix.Syncfs(fd), unix.Close(fd)); err != nil {
		m.log.Warn("mapped pages may be lost", "dir", m.cfg.Dir, "err", err)
	}
}

// detach takes the mount out of the tree of names if it is still there.
func (m *Mount) detach() {
	var st unix.Statx_t
	err := unix.Statx(unix.AT_FDCWD, m.cfg.Dir, unix.AT_STATX_DONT_SYNC|unix.AT_NO_AUTOMOUNT, 0, &st)
	if err == nil && (st.Dev_major != 0 || st.Dev_minor != m.minor) {
		return // not ours, or ours no more
	}
	if err := unix.Unmount(m.cfg.Dir, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW); err != nil && err != unix.EINVAL && err != unix.ENOENT {
		m.log.Warn("not detached", "dir", m.cfg.Dir, "err", err)
	}
}

// Abort ends the connection at once: every call of every program on the mount
// fails with ENOTCONN or ECONNABORTED, dirty mapped pages are lost, and Run
// comes to its end. It needs no answer of the Tree.
func (m *Mount) Abort() error {
	select {
	case <-m.ready:
	default:
		return nil // nothing to end
	}
	select {
	case <-m.dead:
		return nil
	default:
	}
	err := m.abortByControl()
	if err == nil {
		return nil
	}
	// Without the control file system: umount -f aborts too, if the directory
	// still leads to the mount. EBUSY says that the mount as such is in use.
	if ferr := unix.Unmount(m.cfg.Dir, unix.MNT_FORCE|unix.UMOUNT_NOFOLLOW); ferr != nil && ferr != unix.EBUSY {
		return errors.Join(errs.Wrap(err, "abort", m.cfg.Dir), errs.Wrap(ferr, "umount -f", m.cfg.Dir))
	}
	return nil
}

// abortByControl writes to the connection's abort file.
func (m *Mount) abortByControl() error {
	return AbortConnection(m.minor)
}

// AbortConnection ends the FUSE connection of the mount with the given minor
// device number, whoever serves it: all that waits for an answer gets an error.
func AbortConnection(minor uint32) error {
	fd, err := openAbort(minor)
	if err != nil {
		return err
	}
	_, err = unix.Write(fd, []byte("1"))
	return errors.Join(err, unix.Close(fd))
}

// openAbort opens a connection's abort file, through a mount of the control file
// system that no name leads to.
func openAbort(minor uint32) (fd int, err error) {
	fs, err := unix.Fsopen("fusectl", unix.FSOPEN_CLOEXEC)
	if err != nil {
		return -1, err
	}
	defer func() { err = errors.Join(err, unix.Close(fs)) }()
	if err := unix.FsconfigCreate(fs); err != nil {
		return -1, err
	}
	dir, err := unix.Fsmount(fs, unix.FSMOUNT_CLOEXEC, 0)
	if err != nil {
		return -1, err
	}
	defer func() { err = errors.Join(err, unix.Close(dir)) }()
	return unix.Openat(dir, strconv.FormatUint(uint64(minor), 10)+"/abort", unix.O_WRONLY|unix.O_CLOEXEC, 0)
}

// directEmpties is the minor version of the kernel's protocol from which a write
// through a direct handle empties the pages it covers (Linux 6.6).
const directEmpties = 39

// StalePages reports whether the kernel leaves an inode's cached pages as they
// were when a handle opened Direct writes; the Tree must then empty them.
func (m *Mount) StalePages() bool {
	return binary.NativeEndian.Uint32(m.initReq[inHeaderSize+4:]) < directEmpties
}
