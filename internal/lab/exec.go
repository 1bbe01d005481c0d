package lab

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"net"
	"os"
	"os/signal"
	"sync"
	"syscall"
	"time"

	"github.com/creack/pty"
	"golang.org/x/sys/unix"
	"golang.org/x/term"

	"github.com/unum-os/unum/internal/errs"
)

// ExecOptions say what to run and where its input and output go. Files are
// handed to the command as they are; other readers and writers are copied. Nil
// is /dev/null.
type ExecOptions struct {
	Argv   []string
	Env    []string // nil: the caller's
	Dir    string   // working directory in the node; if it cannot be entered, /
	Stdin  io.Reader
	Stdout io.Writer
	Stderr io.Writer
	TTY    bool // give it a terminal of its own, relayed to Stdin and Stdout, which must be a terminal
}

// After the command ended something it left behind may keep its output open. What
// comes within drainTime is still taken, and then what the pipe or terminal holds,
// however slowly it can be passed on: no more than heldMost bytes, for that
// something may be writing without end.
const (
	drainTime = 300 * time.Millisecond
	heldMost  = 64 << 10 // bytes of a pipe's and a terminal's buffer
)

// Process is a command that runs in a node.
type Process struct {
	pid     int
	node    string
	conn    *net.UnixConn
	dec     *json.Decoder
	close   []io.Closer
	copies  []output
	restore func()

	sigMu sync.Mutex // one signal message at a time
	once  sync.Once
	exit  int
	err   error
}

// output is what a command writes, on its way to where it goes.
type output struct {
	from *os.File
	done chan struct{} // closed when all is copied
}

// relay copies from r to w until its end, or until r's read deadline and then
// what r holds. Without a reader the writer is not held up.
func (p *Process) relay(w io.Writer, r *os.File) {
	o := output{r, make(chan struct{})}
	p.copies = append(p.copies, o)
	go func() {
		defer close(o.done)
		_, err := io.Copy(w, r) // EIO when the last user of a terminal is gone
		if errors.Is(err, os.ErrDeadlineExceeded) {
			_, _ = w.Write(held(r)) // a failing writer is its owner's to notice
		}
		_, _ = io.Copy(io.Discard, r)
	}()
}

// held returns what r holds, without waiting for more.
func held(r *os.File) []byte {
	rc, err := r.SyscallConn()
	if err != nil {
		return nil
	}
	var out []byte
	for len(out) < heldMost {
		b := make([]byte, heldMost-len(out))
		var n int
		var rerr error
		if err := rc.Control(func(fd uintptr) { n, rerr = unix.Read(int(fd), b) }); err != nil {
			break
		}
		if rerr == unix.EINTR {
			continue
		}
		if rerr != nil || n <= 0 {
			break
		}
		out = append(out, b[:n]...)
	}
	return out
}

// Exec runs a command in node and returns its exit code: its own, 128+n for
// signal n, 126 not executable, 127 not found. err tells of a failure of the
// lab. When ctx ends first, the command is killed and err is of class Interrupted.
func (l *Lab) Exec(ctx context.Context, node string, o ExecOptions) (int, error) {
	p, err := l.ExecStart(node, o)
	if err != nil {
		return 0, err
	}
	stop := context.AfterFunc(ctx, func() { _ = p.Signal(unix.SIGKILL) })
	defer stop()
	code, err := p.Wait()
	if err == nil && ctx.Err() != nil {
		err = errs.E(errs.Interrupted, "lab exec", node, "%w", context.Cause(ctx))
	}
	return code, err
}

// ExecStart starts a command in node. Wait must be called.
func (l *Lab) ExecStart(node string, o ExecOptions) (*Process, error) {
	if len(o.Argv) == 0 {
		return nil, errs.E(errs.Invalid, "lab exec", node, "no command given")
	}
	if o.Env == nil {
		o.Env = os.Environ()
	}
	if o.Dir == "" {
		o.Dir = "/"
	}
	p := &Process{node: node, restore: func() {}}
	var files []*os.File // the command's; closed when it has them
	own := func(f *os.File) *os.File { files = append(files, f); return f }
	defer func() {
		for _, f := range files {
			f.Close()
		}
	}()
	var std [3]*os.File
	var err error
	if o.TTY {
		err = p.terminal(o, &std, own)
	} else {
		err = p.pipes(o, &std, own)
	}
	if err != nil {
		p.abandon()
		return nil, errs.Wrap(err, "lab exec", node)
	}
	p.conn, err = l.dial(node)
	if err != nil {
		p.abandon()
		return nil, err
	}
	p.dec = json.NewDecoder(p.conn)
	fds := []int{int(std[0].Fd()), int(std[1].Fd()), int(std[2].Fd())}
	var a answer
	err = writeRequest(p.conn, request{Op: "exec", Argv: o.Argv, Env: o.Env, Dir: o.Dir, TTY: o.TTY}, fds)
	if err == nil {
		err = p.dec.Decode(&a)
	}
	if err == nil && a.Err != "" {
		err = errors.New(a.Err)
	}
	if err != nil {
		p.abandon()
		return nil, l.lost("lab exec", node, err)
	}
	p.pid = a.Pid
	return p, nil
}

// Pid returns the command's process id inside the node.
func (p *Process) Pid() int { return p.pid }

// Signal sends sig to the command's process group.
func (p *Process) Signal(sig syscall.Signal) error {
	p.sigMu.Lock()
	defer p.sigMu.Unlock()
	return errs.Wrap(json.NewEncoder(p.conn).Encode(request{Sig: int(sig)}), "lab exec: signal", p.node)
}

// Wait waits until the command has ended and its output is copied.
func (p *Process) Wait() (int, error) {
	p.once.Do(func() {
		var a answer
		err := p.dec.Decode(&a)
		for _, o := range p.copies {
			o.from.SetReadDeadline(time.Now().Add(drainTime))
		}
		for _, o := range p.copies {
			<-o.done
		}
		p.abandon()
		if err != nil || a.Exit == nil {
			p.err = errs.E(errs.Unavailable, "lab exec", p.node, "the node lost power while the command ran")
			return
		}
		p.exit = *a.Exit
	})
	return p.exit, p.err
}

func (p *Process) abandon() {
	p.restore()
	for _, c := range p.close {
		c.Close()
	}
	if p.conn != nil {
		p.conn.Close()
	}
}

func (p *Process) pipes(o ExecOptions, std *[3]*os.File, own func(*os.File) *os.File) error {
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	own(null)
	std[0], std[1], std[2] = null, null, null
	switch r := o.Stdin.(type) {
	case nil:
	case *os.File:
		std[0] = r
	default:
		pr, pw, err := os.Pipe()
		if err != nil {
			return err
		}
		std[0] = own(pr)
		go func() {
			_, _ = io.Copy(pw, r) // the command may not read it all
			pw.Close()
		}()
	}
	out := func(w io.Writer) (*os.File, error) {
		if f, ok := w.(*os.File); ok {
			return f, nil
		}
		if w == nil {
			return null, nil
		}
		pr, pw, err := os.Pipe()
		if err != nil {
			return nil, err
		}
		own(pw)
		p.close = append(p.close, pr)
		p.relay(w, pr)
		return pw, nil
	}
	if std[1], err = out(o.Stdout); err != nil {
		return err
	}
	if o.Stderr != nil && o.Stderr == o.Stdout {
		std[2] = std[1]
		return nil
	}
	std[2], err = out(o.Stderr)
	return err
}

// terminal gives the command a new terminal and relays it to ours.
func (p *Process) terminal(o ExecOptions, std *[3]*os.File, own func(*os.File) *os.File) error {
	in, ok1 := o.Stdin.(*os.File)
	outF, ok2 := o.Stdout.(*os.File)
	if !ok1 || !ok2 || !term.IsTerminal(int(in.Fd())) {
		return errs.E(errs.Invalid, "", "", "a terminal was asked for, but input and output are none")
	}
	master, slave, err := pty.Open()
	if err != nil {
		return err
	}
	own(slave)
	// For the poller, which the library has left: reading has a deadline.
	fd, err := unix.FcntlInt(master.Fd(), unix.F_DUPFD_CLOEXEC, 3)
	if err == nil {
		err = unix.SetNonblock(fd, true)
	}
	master.Close()
	if err != nil {
		return err
	}
	master = os.NewFile(uintptr(fd), "/dev/ptmx")
	p.close = append(p.close, master)
	std[0], std[1], std[2] = slave, slave, slave
	inheritSize(in, master)
	raw, err := term.MakeRaw(int(in.Fd()))
	if err != nil {
		return err
	}
	winch := make(chan os.Signal, 1)
	signal.Notify(winch, unix.SIGWINCH)
	quit := make(chan struct{})
	go func() {
		for {
			select {
			case <-winch:
				inheritSize(in, master)
			case <-quit:
				return
			}
		}
	}()
	var once sync.Once
	p.restore = func() {
		once.Do(func() {
			signal.Stop(winch)
			close(quit)
			_ = term.Restore(int(in.Fd()), raw)
		})
	}
	go func() { _, _ = io.Copy(master, in) }() // ends with the process that owns the terminal
	p.relay(outF, master)
	return nil
}

// inheritSize gives master the size of our terminal, if that has one: a terminal
// without is one still.
func inheritSize(in, master *os.File) {
	ws, err := unix.IoctlGetWinsize(int(in.Fd()), unix.TIOCGWINSZ)
	if err != nil {
		return
	}
	if rc, err := master.SyscallConn(); err == nil { // Fd would make reads block
		_ = rc.Control(func(fd uintptr) { _ = unix.IoctlSetWinsize(int(fd), unix.TIOCSWINSZ, ws) })
	}
}

// dial connects to node's init.
func (l *Lab) dial(node string) (*net.UnixConn, error) {
	c, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: sockPath(l.name, node), Net: "unix"})
	if err != nil {
		return nil, l.lost("lab", node, err)
	}
	return c, nil
}

// lost explains why node did not answer.
func (l *Lab) lost(op, node string, err error) error {
	if _, perr := readPointer(l.name); perr != nil {
		return perr
	}
	s, serr := readState(l.dir)
	if serr != nil {
		return serr
	}
	n, nerr := s.node(node)
	if nerr != nil {
		return nerr
	}
	if !n.On || !n.Proc.alive() {
		return errs.E(errs.Unavailable, op, node, "the node has no power").WithRemedy("unum lab start --name %s %s", l.name, node)
	}
	return errs.E(errs.Unavailable, op, node, "its init does not do it: %w", err)
}

// askTime bounds a question to a node's init, which answers from memory (only a
// stopped one takes long), and one health check.
const askTime = 5 * time.Second

// ask sends one request to node's init and returns its first answer.
func (l *Lab) ask(ctx context.Context, node string, req request, fds []int) (answer, error) {
	c, err := l.dial(node)
	if err != nil {
		return answer{}, err
	}
	defer c.Close()
	stop := context.AfterFunc(ctx, func() { _ = c.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	if err := c.SetDeadline(time.Now().Add(askTime)); err != nil {
		return answer{}, errs.Wrap(err, "lab", node)
	}
	var a answer
	err = writeRequest(c, req, fds)
	if err == nil {
		err = json.NewDecoder(c).Decode(&a)
	}
	if err == nil && a.Err != "" {
		return a, errs.E(errs.Unavailable, "lab: "+req.Op, node, "%s", a.Err)
	}
	if err != nil {
		return a, l.lost("lab: "+req.Op, node, err)
	}
	return a, nil
}
