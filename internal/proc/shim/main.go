package shim

import (
	"errors"
	"io"
	"os"
	"os/signal"
	"runtime"
	"sync"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/unum-os/unum/internal/clock"
	"github.com/unum-os/unum/internal/proc/jobapi"
	"github.com/unum-os/unum/internal/wire"
)

// Main is the shim's whole life. It does not return.
func Main() {
	runtime.LockOSThread()
	// A program of root's that signals process 1 must not take the shim with it.
	signal.Ignore(unix.SIGHUP, unix.SIGINT, unix.SIGQUIT, unix.SIGTERM, unix.SIGUSR1, unix.SIGUSR2,
		unix.SIGPIPE, unix.SIGALRM, unix.SIGTSTP, unix.SIGTTIN, unix.SIGTTOU)
	if name, err := unix.BytePtrFromString("unum-shim"); err == nil { // it was executed by a number
		unix.Prctl(unix.PR_SET_NAME, uintptr(unsafe.Pointer(name)), 0, 0, 0)
	}
	unix.CloseRange(linkFD, ^uint(0), unix.CLOSE_RANGE_CLOEXEC)
	s := &shim{link: os.NewFile(linkFD, "link")}
	if os.Getpid() != 1 {
		os.Stderr.WriteString("unum: this is started by the daemon, not by hand\n")
		os.Exit(125)
	}
	s.main()
}

type shim struct {
	link *os.File
	spec Spec
	dir  int // the job's directory, for a detached job

	timer *timer // of the lease

	mu   sync.Mutex // guards what follows, and writes on link
	pgid int        // of the program; 0 before its start and after its end
}

func (s *shim) main() {
	// It may have been started ahead of the job, and waits here for it, with all
	// done that can be done before.
	s.warm()
	r := &receiver{fd: linkFD}
	var m ToShim
	if err := Read(r, &m); err != nil || m.Spec == nil || len(r.fds) < 3 {
		os.Exit(125) // the manager has gone, or gave the job up before it began
	}
	for fd := range 3 {
		unix.Dup3(r.fds[fd], fd, 0)
		unix.Close(r.fds[fd])
	}
	s.dir = -1
	if len(r.fds) > 3 {
		s.dir = r.fds[3]
	}
	if err := setup(); err != nil {
		s.fail(&Failed{Step: StepSetup, Errno: int(errno(err)), Text: err.Error()})
	}
	s.spec = *m.Spec
	s.mu.Lock() // until the program exists
	if s.spec.Deadline != 0 {
		renew, err := s.timer.watch(s.spec.Deadline)
		if err != nil {
			s.fail(&Failed{Step: StepSetup, Errno: int(errno(err)), Text: "lease timer: " + err.Error()})
		}
		go s.listen(renew)
	} else {
		go s.listen(func(int64) {})
	}
	s.run()
}

// warm goes through what the job will need once: code is paged in, the codec
// knows its types, the poller runs. It halves the time from spec to program.
func (s *shim) warm() {
	sample := ToShim{Spec: &Spec{Groups: []uint32{0}, Program: jobapi.Program{Argv: [][]byte{{'x'}}, Env: [][]byte{{'x'}}, Rlimits: []jobapi.Rlimit{{}}}}}
	var back ToShim
	if wire.Unmarshal(wire.MustMarshal(sample), &back) != nil {
		os.Exit(125)
	}
	wire.MustMarshal(FromShim{Started: 1})
	if t, err := newTimer(); err == nil {
		s.timer = t
	}
}

// receiver reads the link and keeps the descriptors that come with it.
type receiver struct {
	fd  int
	fds []int
}

func (r *receiver) Read(p []byte) (int, error) {
	oob := make([]byte, unix.CmsgSpace(4*maxFiles))
	for {
		n, oobn, _, _, err := unix.Recvmsg(r.fd, p, oob, unix.MSG_CMSG_CLOEXEC)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return 0, err
		}
		if oobn > 0 {
			ms, err := unix.ParseSocketControlMessage(oob[:oobn])
			if err != nil {
				return 0, err
			}
			for i := range ms {
				fds, err := unix.ParseUnixRights(&ms[i])
				if err != nil {
					return 0, err
				}
				r.fds = append(r.fds, fds...)
			}
		}
		if n == 0 {
			return 0, io.EOF
		}
		return n, nil
	}
}

// setup makes this thread's own view of the mounts, and the program's, which is
// forked from it: mounts made later on the node still appear here, none made
// here appear there, and /proc shows the job alone. It is done now and not at the
// shim's own start so that what was mounted in between is there.
func setup() error {
	if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
		return &os.SyscallError{Syscall: "unshare", Err: err}
	}
	if err := unix.Chdir("/"); err != nil {
		return err
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_SLAVE, ""); err != nil {
		return &os.PathError{Op: "make mounts private", Path: "/", Err: err}
	}
	if err := unix.Mount("proc", "/proc", "proc", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, ""); err != nil {
		return &os.PathError{Op: "mount", Path: "/proc", Err: err}
	}
	return nil
}

// timer wakes on the boot-time clock.
type timer struct {
	fd int
	f  *os.File
}

func newTimer() (*timer, error) {
	fd, err := unix.TimerfdCreate(unix.CLOCK_BOOTTIME, unix.TFD_NONBLOCK|unix.TFD_CLOEXEC)
	if err != nil {
		return nil, err
	}
	return &timer{fd, os.NewFile(uintptr(fd), "lease")}, nil
}

// watch ends the shim, and with it the job, when the time is over; the function
// it returns moves that time.
func (t *timer) watch(deadline int64) (func(int64), error) {
	if t == nil {
		return nil, unix.EMFILE
	}
	fd, f := t.fd, t.f
	set := func(at int64) error {
		if at < 1 {
			at = 1 // zero would disarm it
		}
		it := unix.ItimerSpec{Value: unix.NsecToTimespec(at)}
		return unix.TimerfdSettime(fd, unix.TFD_TIMER_ABSTIME, &it, nil)
	}
	if err := set(deadline); err != nil {
		return nil, err
	}
	var mu sync.Mutex
	last := deadline
	go func() {
		var b [8]byte
		for {
			_, err := f.Read(b[:])
			mu.Lock()
			over := clock.Now() >= clock.Instant(last)
			mu.Unlock()
			if over || err != nil {
				os.Exit(125)
			}
		}
	}()
	return func(t int64) {
		mu.Lock()
		defer mu.Unlock()
		if t > last {
			last = t
			set(t)
		}
	}, nil
}

// listen obeys the manager until it goes away. Signals that come before the
// program exists wait for it in signal.
func (s *shim) listen(renew func(int64)) {
	for {
		var m ToShim
		if err := Read(s.link, &m); err != nil {
			if s.spec.Deadline != 0 {
				os.Exit(125)
			}
			return
		}
		if m.Deadline != 0 {
			renew(m.Deadline)
		}
		if m.Signal != 0 {
			s.signal(syscall.Signal(m.Signal))
		}
	}
}

// signal passes one on to the program's process group. A stop typed at a
// terminal would be ignored there, because nobody in the session could continue
// it (POSIX calls the group orphaned); SIGSTOP has no such exception.
func (s *shim) signal(sig syscall.Signal) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.pgid == 0 {
		return
	}
	if sig == unix.SIGTSTP {
		sig = unix.SIGSTOP
	}
	unix.Kill(-s.pgid, sig)
}

func (s *shim) run() {
	pid, failed := start(&s.spec)
	if failed != nil {
		s.mu.Unlock()
		s.fail(failed)
	}
	s.pgid = pid
	Write(s.link, FromShim{Started: pid})
	s.mu.Unlock()

	// From here on the program alone holds its descriptors, so that their ends
	// are seen as ends.
	if null, err := unix.Open("/dev/null", unix.O_RDWR|unix.O_CLOEXEC, 0); err == nil {
		for fd := range 3 {
			unix.Dup3(null, fd, 0)
		}
	}
	for {
		var ws syscall.WaitStatus
		var ru syscall.Rusage
		p, err := syscall.Wait4(-1, &ws, 0, &ru)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			os.Exit(125) // no child left, and the program not seen: cannot be
		}
		if p == pid && !ws.Stopped() && !ws.Continued() {
			s.exited(ws, &ru)
		}
	}
}

func (s *shim) exited(ws syscall.WaitStatus, ru *syscall.Rusage) {
	e := Exited{CPU: ru.Utime.Nano() + ru.Stime.Nano(), End: time.Now().UnixNano()}
	if ws.Signaled() {
		e.Signal = int(ws.Signal())
	} else {
		e.Code = ws.ExitStatus()
	}
	if s.dir >= 0 {
		leave(s.dir, e)
	}
	s.mu.Lock()
	s.pgid = 0
	Write(s.link, FromShim{Exited: &e})
	os.Exit(0)
}

// leave writes the exit file, whole or not at all.
func leave(dir int, e Exited) {
	const tmp = ExitFile + ".new"
	fd, err := unix.Openat(dir, tmp, unix.O_WRONLY|unix.O_CREAT|unix.O_TRUNC|unix.O_CLOEXEC, 0o644)
	if err != nil {
		return // the manager has it by the link, if it lives
	}
	f := os.NewFile(uintptr(fd), tmp)
	defer f.Close()
	if _, err := f.Write(wire.MustMarshal(e)); err != nil || f.Sync() != nil {
		return
	}
	unix.Renameat(dir, tmp, dir, ExitFile)
}

func (s *shim) fail(f *Failed) {
	Write(s.link, FromShim{Failed: f})
	os.Exit(0)
}

func errno(err error) syscall.Errno {
	var en syscall.Errno
	errors.As(err, &en)
	return en
}
