package daemon

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/unum-os/unum/internal/errs"
)

// How often it is looked whether what is waited for has come; and how often the
// person who waits is told what is still missing, if that has not changed.
const (
	lookEvery = 50 * time.Millisecond // between two looks whether what is waited for has come
	tellEvery = 5 * time.Second       // until the person who waits is told again what is missing
)

// tailLines and tailBytes bound what is shown of a log.
const (
	tailLines = 10
	tailBytes = 8 << 10
)

// Spec says what to start, and when it has started.
type Spec struct {
	Argv []string
	Env  []string
	Log  string // file to which its output is appended
	Wait time.Duration
	// Healthy returns nil when the process does its work, or why it does not. It
	// must return soon after its context ends.
	Healthy func(ctx context.Context) error
	Tell    io.Writer // progress, one line each
}

// Start starts a process in a session of its own and returns its pid when it is
// healthy. If it ends before, the error has the last lines of its log. If it is
// not healthy in time, or ctx ends, it goes on in the background: the pid comes
// with an error of class Timeout, or the context's.
func Start(ctx context.Context, s Spec) (pid int, err error) {
	log, from, err := openLog(s.Log)
	if err != nil {
		return 0, err
	}
	defer log.Close()
	cmd := exec.Command(s.Argv[0], s.Argv[1:]...)
	cmd.Env = s.Env
	cmd.Dir = "/" // so that it holds no file system but its own
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		return 0, errs.Wrap(err, "start", s.Argv[0])
	}
	ended := make(chan error, 1) // nobody may be left to hear it
	go func() { ended <- cmd.Wait() }()
	pid = cmd.Process.Pid
	ctx, cancel := context.WithTimeoutCause(ctx, s.Wait, errs.Timeout.Err())
	defer cancel()
	w := waiting{out: s.Tell}
	look := time.NewTicker(lookEvery)
	defer look.Stop()
	for {
		why := ask(ctx, s.Healthy)
		select {
		case err := <-ended:
			if err == nil {
				err = errors.New("it stopped by itself")
			}
			return 0, errs.E(errs.Unavailable, "start the node", "", "it ended before it was healthy (%v)%s", err, tail(s.Log, from))
		default:
		}
		if why == nil {
			return pid, nil
		}
		// What a look says that was cut short is no news.
		if ctx.Err() == nil {
			w.tell("waiting: " + firstLine(why))
		}
		select {
		case <-look.C:
		case <-ctx.Done():
			if !errors.Is(context.Cause(ctx), errs.Timeout.Err()) {
				return pid, context.Cause(ctx)
			}
			return pid, errs.E(errs.Timeout, "start the node", "", "process %d runs but is not healthy after %v: %s%s", pid, s.Wait, w.last, tail(s.Log, from)).
				WithRemedy("unum status; the log is %s", s.Log)
		}
	}
}

// askLimit is how long one look waits for the daemon's answer.
const askLimit = 2 * time.Second

// ask bounds one look, so that a daemon that hangs does not hide that its time
// is up.
func ask(ctx context.Context, healthy func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, askLimit)
	defer cancel()
	return healthy(ctx)
}

// openLog opens a log to append to and returns its size.
func openLog(path string) (*os.File, int64, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return nil, 0, errs.Wrap(err, "make the log's directory", filepath.Dir(path))
	}
	// Not for everybody: it names files and people.
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o640)
	if err != nil {
		return nil, 0, errs.Wrap(err, "open the log", path)
	}
	fi, err := f.Stat()
	if err != nil {
		return nil, 0, errors.Join(err, f.Close())
	}
	return f, fi.Size(), nil
}

// tail returns the last lines that were added to a log since it had a size, each
// on a line of its own; nothing if there are none.
func tail(path string, from int64) string {
	f, err := os.Open(path)
	if err != nil {
		return ""
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil {
		return ""
	}
	at := max(from, fi.Size()-tailBytes)
	b, err := io.ReadAll(io.NewSectionReader(f, at, tailBytes))
	if err != nil {
		return ""
	}
	lines := strings.Split(string(bytes.TrimRight(b, "\n")), "\n")
	if at > from && len(lines) > 1 {
		lines = lines[1:] // begun in the middle
	}
	lines = lines[max(0, len(lines)-tailLines):]
	if len(lines) == 1 && lines[0] == "" {
		return ""
	}
	return "\nits last words, in " + path + ":\n  " + strings.Join(lines, "\n  ")
}

func firstLine(err error) string {
	s, _, _ := strings.Cut(err.Error(), "\n")
	return s
}

// waiting tells a person what is waited for: when it changes, and now and then.
type waiting struct {
	out  io.Writer
	last string
	at   time.Time
}

func (w *waiting) tell(what string) {
	now := time.Now()
	if w.at.IsZero() {
		w.at = now // the first second says nothing: mostly it is all there is
		w.last = what
		return
	}
	if w.last = what; now.Sub(w.at) < tellEvery {
		return
	}
	w.at = now
	if w.out != nil {
		fmt.Fprintln(w.out, what)
	}
}
