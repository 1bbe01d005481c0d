package proc

import (
	"os"
	"os/exec"
	"strings"
	"sync"
	"testing"

	"github.com/creack/pty"
	"golang.org/x/sys/unix"
)

// screen collects what a terminal shows.
type screen struct {
	mu sync.Mutex
	b  strings.Builder
}

func (s *screen) Write(b []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.Write(b)
}

func (s *screen) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.String()
}

func (s *screen) has(x string) func() bool {
	return func() bool { return strings.Contains(s.String(), x) }
}

func (r *rig) terminal(args ...string) (*exec.Cmd, *os.File, *screen) {
	r.t.Helper()
	c := r.cmd(args...)
	f, err := pty.StartWithSize(c, &pty.Winsize{Rows: 37, Cols: 101})
	if err != nil {
		r.t.Fatal(err)
	}
	r.t.Cleanup(func() { f.Close() })
	s := &screen{}
	go func() {
		b := make([]byte, 4096)
		for {
			n, err := f.Read(b)
			s.Write(b[:n])
			if err != nil {
				return
			}
		}
	}()
	return c, f, s
}

func TestTerminal(t *testing.T) {
	r := newRig(t)
	c, f, s := r.terminal("run", "sh", "-c", `for i in 0 1 2; do test -t $i && echo tty$i; done; stty size; tty; trap 'stty size' WINCH; trap 'echo int; exit 33' INT; ps -o pid= -o tty= -p $$; echo up; while :; do sleep 0.02; done`)
	until(t, "up", s.has("up\r\n"))
	for _, want := range []string{"tty0\r\n", "tty1\r\n", "tty2\r\n", "37 101\r\n", "/dev/pts/"} {
		if !s.has(want)() {
			t.Errorf("no %q in %q", want, s.String())
		}
	}
	before, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
	if err != nil || before.Lflag&unix.ICANON != 0 {
		t.Errorf("the caller's terminal is not raw: %v", err)
	}
	pty.Setsize(f, &pty.Winsize{Rows: 50, Cols: 120})
	until(t, "new size", s.has("50 120\r\n"))
	f.WriteString("\x03")
	until(t, "interrupt", s.has("int\r\n"))
	c.Wait()
	if c.ProcessState.ExitCode() != 33 {
		t.Errorf("%v", c.ProcessState)
	}
	after, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
	if err != nil || after.Lflag&(unix.ICANON|unix.ECHO|unix.ISIG) != unix.ICANON|unix.ECHO|unix.ISIG {
		t.Errorf("the caller's terminal was not put back: %v", err)
	}
}

// TestTerminalPutBack: also when the command line is ended by a signal, or the
// daemon goes away.
func TestTerminalPutBack(t *testing.T) {
	r := newRig(t)
	for _, end := range []string{"signal", "daemon"} {
		c, f, s := r.terminal("run", "sh", "-c", "echo up; sleep 1000")
		until(t, "up", s.has("up\r\n"))
		code := 143
		if end == "signal" {
			c.Process.Signal(unix.SIGTERM)
		} else {
			code = 125
			r.stop()
			defer r.up()
		}
		c.Wait()
		if c.ProcessState.ExitCode() != code {
			t.Errorf("%s: %v", end, c.ProcessState)
		}
		if after, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS); err != nil || after.Lflag&unix.ICANON == 0 {
			t.Errorf("%s: the caller's terminal was not put back", end)
		}
	}
}

func TestTerminalInput(t *testing.T) {
	r := newRig(t)
	c, f, s := r.terminal("run", "cat")
	f.WriteString("hello\n")
	until(t, "echo and line", s.has("hello\r\nhello\r\n"))
	f.WriteString("\x04") // end of file, made by the line discipline over there
	c.Wait()
	if c.ProcessState.ExitCode() != 0 {
		t.Errorf("%v", c.ProcessState)
	}
	// Nobody has the terminal open for a while.
	c, f, s = r.terminal("run", "sh", "-c", "exec <&- >&- 2>&-; sleep 0.2; exec </dev/tty >/dev/tty; read x; echo $x; exit 5")
	f.WriteString("again\n")
	c.Wait()
	if c.ProcessState.ExitCode() != 5 || !s.has("again\r\nagain\r\n")() {
		t.Errorf("%v: %q", c.ProcessState, s.String())
	}
	// A shell with job control.
	c, f, s = r.terminal("run", "bash", "--norc", "-i")
	f.WriteString("PS1='#'' '\n")
	until(t, "prompt", s.has("# "))
	f.WriteString("sh -c 'echo ready; exec sleep 1000'\n")
	until(t, "sleep has the terminal", s.has("\rready\r\n"))
	f.WriteString("\x1a")
	until(t, "stopped", s.has("Stopped"))
	f.WriteString("kill %1; exit 21\n")
	f.WriteString("exit 21\n")
	c.Wait()
	if c.ProcessState.ExitCode() != 21 {
		t.Errorf("%v: %q", c.ProcessState, s.String())
	}
}
