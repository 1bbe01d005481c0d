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

// drainTime is for output still in a pipe or terminal after the command ended,
// when something it left behind keeps the other end open.
const drainTime = 300 * time.Millisecond

// Process is a command that runs in a node.
type Process struct {
	pid     int
	node    string
	conn    *net.UnixConn
	dec     *json.Decoder
	close   []io.Closer
	copies  []chan struct{} // closed when all output is copied
	restore func()

	sigMu sync.Mutex // one signal message at a time
	once  sync.Once
	exit  int
	err   error
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
		for _, done := range p.copies {
			select {
			case <-done:
			case <-time.After(drainTime):
			}
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
		done := make(chan struct{})
		p.copies = append(p.copies, done)
		go func() {
			defer close(done)
			_, _ = io.Copy(w, pr) // a failing writer is its owner's to notice
			_, _ = io.Copy(io.Discard, pr)
		}()
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
	p.close = append(p.close, master)
	std[0], std[1], std[2] = slave, slave, slave
	_ = pty.InheritSize(in, master) // a terminal without a size is one still
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
				_ = pty.InheritSize(in, master)
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
	done := make(chan struct{})
	p.copies = append(p.copies, done)
	go func() {
		defer close(done)
		_, _ = io.Copy(outF, master) // EIO when the last user of the terminal is gone
	}()
	return nil
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

// ask sends one request to node's init and returns its first answer.
func (l *Lab) ask(ctx context.Context, node string, req request, fds []int) (answer, error) {
	c, err := l.dial(node)
	if err != nil {
		return answer{}, err
	}
	defer c.Close()
	stop := context.AfterFunc(ctx, func() { _ = c.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	// Init answers from memory; only a stopped one takes long.
	if err := c.SetDeadline(time.Now().Add(5 * time.Second)); err != nil {
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
