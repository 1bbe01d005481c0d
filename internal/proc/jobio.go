package proc

import (
	"errors"
	"io"
	"net"
	"os"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/unum-os/unum/internal/proc/jobapi"
)

// pipeSize is asked for a job's pipes: fewer switches for bulk output. The
// kernel's default remains where it is not granted.
const pipeSize = 256 << 10

// stray is how long output may still come, after the job's namespace is gone,
// from a process elsewhere that was given the descriptor.
const stray = 50 * time.Millisecond

// reopen is how often a terminal that nobody has open is looked at again.
const reopen = 20 * time.Millisecond

// jobIO is the node's side of a job's descriptors.
type jobIO struct {
	child  [3]*os.File          // what the program gets; closed here once it has them
	in     *os.File             // to descriptor 0
	out    [numStreams]*os.File // from descriptors 1, 2
	master *os.File             // of its terminal

	gone chan struct{} // closed when the home has gone

	mu    sync.Mutex // guards what follows
	conns []net.Conn
	ended bool
}

// makeIO makes the pipes and the terminal an attached job needs.
func (j *job) makeIO() (*jobIO, error) {
	p := &j.l.Program
	o := &jobIO{gone: make(chan struct{})}
	fail := func(err error) (*jobIO, error) {
		o.close()
		return nil, err
	}
	if p.NeedsTTY() {
		slave, err := o.openTerminal(p, j.l.UID)
		if err != nil {
			return fail(err)
		}
		defer slave.Close()
		for i, k := range p.Stdio {
			if k == jobapi.TTY {
				if o.child[i], err = dup(slave); err != nil {
					return fail(err)
				}
			}
		}
	}
	for i, k := range p.Stdio {
		var err error
		switch {
		case k == jobapi.TTY:
		case k == jobapi.Same && i == 2 && o.child[1] != nil:
			o.child[2], err = dup(o.child[1])
		case k == jobapi.Pipe && i == 0:
			o.child[0], o.in, err = pipe(true)
		case k == jobapi.Pipe:
			o.child[i], o.out[i], err = pipe(false)
		default: // also Closed: the shim needs something there until it closes it
			o.child[i], err = os.OpenFile(os.DevNull, os.O_RDWR, 0)
		}
		if err != nil {
			return fail(err)
		}
	}
	return o, nil
}

// pipe makes a pipe: theirs is for the program and blocks, mine is for the
// poller and does not. Each end has a state of its own.
func pipe(theyRead bool) (theirs, mine *os.File, err error) {
	var p [2]int
	if err := unix.Pipe2(p[:], unix.O_CLOEXEC); err != nil {
		return nil, nil, err
	}
	unix.FcntlInt(uintptr(p[0]), unix.F_SETPIPE_SZ, pipeSize)
	if !theyRead {
		p[0], p[1] = p[1], p[0]
	}
	unix.SetNonblock(p[1], true)
	return os.NewFile(uintptr(p[0]), "pipe"), os.NewFile(uintptr(p[1]), "pipe"), nil
}

func dup(f *os.File) (*os.File, error) {
	fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 3)
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(fd), f.Name()), nil
}

// ttyGroup is the group that may write to terminals, by convention on Linux.
const ttyGroup = 5

// openTerminal opens a pseudo-terminal that belongs to uid, as the caller's is
// set.
func (o *jobIO) openTerminal(p *jobapi.Program, uid uint32) (slave *os.File, err error) {
	m, err := unix.Open("/dev/ptmx", unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: "/dev/ptmx", Err: err}
	}
	o.master = os.NewFile(uintptr(m), "/dev/ptmx")
	if err := unix.IoctlSetPointerInt(m, unix.TIOCSPTLCK, 0); err != nil {
		return nil, err
	}
	// By the master, not by name: /dev may show another instance.
	fd, _, en := unix.Syscall(unix.SYS_IOCTL, uintptr(m), unix.TIOCGPTPEER, unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC)
	if en != 0 {
		return nil, en
	}
	slave = os.NewFile(fd, "terminal")
	if err := errors.Join(unix.Fchown(int(fd), int(uid), ttyGroup), unix.Fchmod(int(fd), 0o620)); err != nil {
		slave.Close()
		return nil, err
	}
	if t := p.Termios; t != nil {
		if now, err := unix.IoctlGetTermios(int(fd), unix.TCGETS); err == nil {
			now.Iflag, now.Oflag, now.Lflag = t.Iflag, t.Oflag, t.Lflag
			// Speed and character size are the device's own matter.
			copy(now.Cc[:], t.Cc)
			unix.IoctlSetTermios(int(fd), unix.TCSETS, now)
		}
	}
	if p.Window != nil {
		o.resize(p.Window)
	}
	return slave, nil
}

// resize gives the terminal a new size; the kernel tells the foreground group.
func (o *jobIO) resize(w *jobapi.Window) {
	if o.master == nil {
		return
	}
	rc, err := o.master.SyscallConn()
	if err != nil {
		return
	}
	rc.Control(func(fd uintptr) {
		unix.IoctlSetWinsize(int(fd), unix.TIOCSWINSZ, &unix.Winsize{Row: w.Rows, Col: w.Cols, Xpixel: w.X, Ypixel: w.Y})
	})
}

// release closes the program's ends here: from now on their closing is its.
func (o *jobIO) release() {
	for i, f := range o.child {
		if f != nil {
			f.Close()
			o.child[i] = nil
		}
	}
}

// close closes everything of this side.
func (o *jobIO) close() {
	o.release()
	for _, f := range append(o.out[:], o.in, o.master) {
		if f != nil {
			f.Close()
		}
	}
}

// abort gives up what is in flight: the home is gone.
func (o *jobIO) abort() {
	o.mu.Lock()
	if !o.ended {
		close(o.gone)
	}
	o.ended = true
	cs := o.conns
	o.conns = nil
	o.mu.Unlock()
	for _, c := range cs {
		c.Close()
	}
}

// readerGone closes this side of an output, so that the program meets a pipe
// without a reader, as it would have where it was typed.
func (o *jobIO) readerGone(fd int) {
	if fd == 1 || fd == 2 {
		if o.out[fd] != nil {
			o.out[fd].Close()
		}
	}
}

// take waits for a stream of the home; nil if dead comes first, or the home has
// gone.
func (o *jobIO) take(c <-chan net.Conn, dead <-chan struct{}) net.Conn {
	var conn net.Conn
	select {
	case conn = <-c:
	case <-dead:
		return nil
	}
	o.mu.Lock()
	ended := o.ended
	if !ended {
		o.conns = append(o.conns, conn)
	}
	o.mu.Unlock()
	if ended {
		conn.Close()
		return nil
	}
	return conn
}

// serve carries the streams until the program's namespace is dead. The channel
// it returns is closed when every output has been delivered or given up.
func (o *jobIO) serve(t *talk, s *slot, dead <-chan struct{}, wg *sync.WaitGroup) <-chan struct{} {
	var outs sync.WaitGroup
	if o.in != nil {
		wg.Add(1)
		go func() {
			defer wg.Done()
			o.input(t, s.conns[0], dead)
		}()
	}
	output := func(r *os.File, c <-chan net.Conn, both bool) {
		outs.Add(1)
		go func() {
			defer outs.Done()
			o.output(r, c, dead, both)
		}()
	}
	for i := 1; i <= 2; i++ {
		if o.out[i] != nil {
			output(o.out[i], s.conns[i], false)
		}
	}
	if o.master != nil {
		output(o.master, s.conns[streamTTY], true)
	}
	done := make(chan struct{})
	go func() {
		outs.Wait()
		close(done)
	}()
	return done
}

func (o *jobIO) input(t *talk, c <-chan net.Conn, dead <-chan struct{}) {
	conn := o.take(c, dead)
	if conn == nil {
		return
	}
	defer conn.Close()
	stop := make(chan struct{})
	defer close(stop)
	go func() {
		select {
		case <-dead:
			conn.Close()
		case <-stop:
		}
	}()
	rerr, werr := pump(o.in, conn)
	if rerr != nil {
		// No end of input, but that of the home or of the way to it: the job dies of
		// it, and must not take it for the end of what it reads.
		<-dead
	}
	o.in.Close()
	if werr != nil {
		t.send(toHome{NoInput: true}) // the program reads no more
	}
}

func (o *jobIO) output(r *os.File, c <-chan net.Conn, dead <-chan struct{}, both bool) {
	conn := o.take(c, o.gone)
	if conn == nil {
		return
	}
	defer conn.Close()
	stop := make(chan struct{})
	defer close(stop)
	go func() {
		select {
		case <-dead:
			r.SetReadDeadline(time.Now().Add(stray))
		case <-stop:
		}
	}()
	if both {
		go pump(r, conn) // what is typed; ends with conn, or with the terminal
	}
	rerr, werr := pump(conn, r)
	for both && werr == nil && errors.Is(rerr, unix.EIO) && !closed(dead) {
		// Nobody has the terminal open just now, but someone of its session may
		// open it again; to close it would hang up on them.
		t := time.NewTimer(reopen)
		select {
		case <-dead:
		case <-t.C:
		}
		t.Stop()
		rerr, werr = pump(conn, r)
	}
	if werr == nil && errors.Is(rerr, os.ErrDeadlineExceeded) {
		werr = drain(conn, r)
	}
	if werr == nil {
		closeWrite(conn)
	}
	if !both {
		r.Close()
	}
}

func closed(c <-chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}

// drain writes what a pipe or terminal still holds, without waiting for more.
func drain(w io.Writer, r *os.File) error {
	rc, err := r.SyscallConn()
	if err != nil {
		return nil
	}
	b := make([]byte, copyBuf)
	for {
		var n int
		var rerr error
		if err := rc.Control(func(fd uintptr) { n, rerr = unix.Read(int(fd), b) }); err != nil {
			return nil
		}
		if rerr == syscall.EINTR {
			continue
		}
		if rerr != nil || n <= 0 {
			return nil
		}
		if _, err := w.Write(b[:n]); err != nil {
			return err
		}
	}
}
