package face

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/unum-os/unum/internal/control"
	"github.com/unum-os/unum/internal/errs"
	"github.com/unum-os/unum/internal/proc/early"
	"github.com/unum-os/unum/internal/proc/jobapi"
	"github.com/unum-os/unum/internal/wire"
)

// Run is `unum run`; args are what follows it. It returns the exit code.
func Run(args []string) int {
	o, help, err := parse(args)
	switch {
	case help:
		fmt.Print(runUsage)
		return 0
	case err != nil:
		fmt.Fprintf(os.Stderr, "unum: run: %v\ntry: unum run --help\n", err)
		return jobapi.CodeFailed
	}
	return execute(&o)
}

// Sh is `unum sh`.
func Sh(args []string) int {
	if len(args) == 1 && (args[0] == "--help" || args[0] == "-h") {
		fmt.Print(shUsage)
		return 0
	}
	return execute(&options{command: append([]string{"/bin/sh"}, args...), shell: true})
}

// forwarded are the signals passed on to the command. WINCH, TSTP and CONT get
// more than that.
var forwarded = []os.Signal{unix.SIGINT, unix.SIGTERM, unix.SIGHUP, unix.SIGQUIT, unix.SIGUSR1, unix.SIGUSR2,
	unix.SIGCONT, unix.SIGWINCH, unix.SIGTSTP}

type session struct {
	o    *options
	term *terminal // nil if the command has none
	c    *control.Client
	l    *plumbing

	readTTY sync.Once
	outs    sync.WaitGroup

	mu      sync.Mutex
	problem string // input that could not be read, or output not written for another reason than a missing reader
}

func fail(err error) int {
	var e *errs.Error
	text := err.Error()
	if errors.As(err, &e) && e.Remedy != "" && !strings.Contains(text, "\ntry: ") {
		text += "\ntry: " + e.Remedy
	}
	fmt.Fprintf(os.Stderr, "unum: run: %s\n", text)
	return jobapi.CodeFailed
}

func execute(o *options) int {
	a := &o.ask
	p := &a.Program
	for _, s := range o.command {
		p.Argv = append(p.Argv, []byte(s))
	}
	signals := make(chan os.Signal, 64)
	for _, s := range forwarded {
		// What the caller had us ignore (nohup, a shell's background job) is
		// ignored by the command too.
		if n := s.(syscall.Signal); (n == unix.SIGHUP || n == unix.SIGINT) && signal.Ignored(n) {
			p.Ignored = append(p.Ignored, int(n))
			continue
		}
		signal.Notify(signals, s)
	}
	if err := surroundings(p); err != nil {
		return fail(err)
	}
	p.Env = environment(o.env)
	s := &session{o: o}
	if a.Detach {
		p.Stdio = [3]uint8{jobapi.Null, jobapi.Null, jobapi.Null}
	} else {
		p.Stdio = kinds(o.tty)
		if p.NeedsTTY() {
			if t, err := openTerminal(0, o.shell); err == nil {
				s.term = t
				p.Window, p.Termios = t.window(), t.settings()
			}
		}
	}
	var err error
	if s.l, err = lay(p); err != nil {
		return fail(err)
	}
	req, err := wire.Marshal(a)
	if err != nil {
		return fail(err)
	}
	if s.c, err = control.Dial(context.Background(), control.Path()); err != nil {
		return fail(err)
	}
	if err := s.c.Start(jobapi.Verb, req, s.l.theirs...); err != nil {
		return fail(err)
	}
	s.l.handOver()
	if s.term != nil {
		// The background may change the settings, or it could not put them back.
		signal.Ignore(unix.SIGTTOU)
		defer s.term.leave()
	}
	s.flow()
	go s.pass(signals)
	return s.conclude()
}

// surroundings fills in what the command inherits.
func surroundings(p *jobapi.Program) error {
	buf := make([]byte, unix.PathMax)
	n, err := unix.Getcwd(buf)
	switch {
	case err == unix.ENOENT:
		p.CwdGone = true
		p.Cwd = []byte("/")
	case err != nil:
		return errs.Wrap(err, "working directory", "")
	case n > 1 && buf[0] == '/':
		p.Cwd = buf[:n-1] // without its NUL
	default:
		return errs.E(errs.NotFound, "working directory", "", "it cannot be reached from the root")
	}
	p.Umask = unix.Umask(0)
	unix.Umask(p.Umask)
	if pr, err := unix.Getpriority(unix.PRIO_PROCESS, 0); err == nil {
		p.Nice = 20 - pr // the system call's way of saying it
	}
	for res := range 16 {
		var l unix.Rlimit
		if unix.Getrlimit(res, &l) != nil {
			continue
		}
		if res == unix.RLIMIT_NOFILE && early.Nofile.Max != 0 {
			l.Cur, l.Max = early.Nofile.Cur, early.Nofile.Max
		}
		p.Rlimits = append(p.Rlimits, jobapi.Rlimit{Resource: res, Cur: l.Cur, Max: l.Max})
	}
	return nil
}

// flow starts the streams.
func (s *session) flow() {
	l := s.l
	if l.in >= 0 {
		go func() {
			rerr, werr := pump(l.in, 0)
			if rerr != nil {
				s.mu.Lock()
				s.problem = fmt.Sprintf("cannot read stdin: %v", rerr)
				s.mu.Unlock()
			}
			unix.Close(l.in)
			if werr != nil {
				unix.Close(0) // whoever writes to it shall know
			}
		}()
	}
	for fd, r := range l.out {
		if r >= 0 {
			s.output(fd, r)
		}
	}
	if l.ttyOut >= 0 {
		s.output(1, l.ttyOut)
		s.foreground()
	}
}

func (s *session) output(fd, r int) {
	s.outs.Add(1)
	go func() {
		defer s.outs.Done()
		_, werr := pump(fd, r)
		if werr != nil && werr != unix.EPIPE && !(werr == unix.EIO && s.term != nil) {
			s.mu.Lock()
			s.problem = fmt.Sprintf("cannot write to %s: %v", [3]string{"", "stdout", "stderr"}[fd], werr)
			s.mu.Unlock()
		}
		unix.Close(r)
		if fd == 1 && s.l.ttyOut < 0 && s.o.ask.Program.Stdio[2] != jobapi.Same {
			// The reader of our output may be waiting for its end.
			unix.Close(1)
		}
	}()
}

// foreground gives the terminal to the command, if it is ours to give; else a
// later continue tries again. Its input is read only from then on.
func (s *session) foreground() {
	if s.term != nil && !s.term.enter() {
		return
	}
	s.readTTY.Do(func() {
		go func() {
			pump(s.l.ttyIn, 0)
			unix.Close(s.l.ttyIn)
		}()
	})
}

// pass forwards signals until the process ends.
func (s *session) pass(signals <-chan os.Signal) {
	tell := func(t jobapi.Tell) { s.c.Send(wire.MustMarshal(t)) } // a broken link shows in conclude
	for sig := range signals {
		n := int(sig.(syscall.Signal))
		switch sig {
		case unix.SIGWINCH:
			if s.term != nil {
				tell(jobapi.Tell{Window: s.term.window()})
			} else {
				tell(jobapi.Tell{Signal: n})
			}
		case unix.SIGTSTP:
			tell(jobapi.Tell{Signal: n})
			if s.term != nil {
				s.term.leave()
			}
			unix.Kill(unix.Getpid(), unix.SIGSTOP)
		case unix.SIGCONT:
			if s.l.ttyOut >= 0 {
				s.foreground()
			}
			tell(jobapi.Tell{Signal: n})
			if s.term != nil {
				tell(jobapi.Tell{Window: s.term.window()})
			}
		default:
			tell(jobapi.Tell{Signal: n})
		}
	}
}

// conclude waits for the command's end and returns the exit code.
func (s *session) conclude() int {
	b, _, err := s.c.Recv()
	if err == io.EOF {
		err = errs.E(errs.Corrupt, "", "", "the daemon's answer is malformed")
	}
	var ev jobapi.Event
	if err == nil {
		err = wire.Unmarshal(b, &ev)
	}
	s.outs.Wait() // the daemon has closed its ends
	if s.term != nil {
		s.term.leave()
	}
	if err != nil {
		return fail(err)
	}
	if !ev.Ended {
		fmt.Println(ev.Job)
		return 0
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case ev.Code == jobapi.CodeNotFound && ev.Text != "", ev.Code == jobapi.CodeNotExecutable && ev.Text != "":
		fmt.Fprintf(os.Stderr, "unum: %s\n", ev.Text)
	case ev.Text != "":
		fmt.Fprintf(os.Stderr, "unum: run: %s\n", ev.Text)
	case s.problem != "":
		fmt.Fprintf(os.Stderr, "unum: run: %s\n", s.problem)
		return jobapi.CodeFailed
	}
	return ev.Code
}
