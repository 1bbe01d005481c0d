package lab

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"golang.org/x/sys/unix"

	"github.com/unum-os/unum/internal/errs"
)

// What of a node is paused.
const (
	pausedNode   = "node"
	pausedDaemon = "daemon"
)

// stopTime bounds the wait for a stopped process to stand still. One that waits
// in the kernel for another stopped one never says so, and does nothing either.
const stopTime = 2 * time.Second

// Pause stops node as SIGSTOP does: only its daemon's process, or everything on
// it. Its network stays plugged in and its kernel answers pings. What is started
// in it later, as by Exec, runs.
func (l *Lab) Pause(ctx context.Context, node string, daemonOnly bool) error {
	return l.change(ctx, func(s *state) error {
		n, err := s.node(node)
		if err != nil {
			return err
		}
		if !n.On || !n.Proc.alive() {
			return l.lost("lab pause", node, nil)
		}
		what := pausedNode
		if daemonOnly {
			what = pausedDaemon
			err = l.SignalDaemon(ctx, node, unix.SIGSTOP)
		} else {
			err = s.signalAll(n, unix.SIGSTOP)
		}
		if err != nil || s.Paused[node] == pausedNode {
			return err
		}
		if s.Paused == nil {
			s.Paused = map[string]string{}
		}
		s.Paused[node] = what
		return nil
	})
}

// Resume lets what Pause stopped go on.
func (l *Lab) Resume(ctx context.Context, node string) error {
	return l.change(ctx, func(s *state) error {
		n, err := s.node(node)
		if err != nil {
			return err
		}
		if !n.On || !n.Proc.alive() {
			return l.lost("lab resume", node, nil)
		}
		what := s.Paused[node]
		delete(s.Paused, node)
		if what == pausedDaemon {
			return l.SignalDaemon(ctx, node, unix.SIGCONT)
		}
		return s.signalAll(n, unix.SIGCONT)
	})
}

// signalAll signals every process of n but its init, which can be asked nothing
// when stopped, and does nothing by itself. After SIGSTOP they stand still.
func (s *state) signalAll(n *nodeState, sig unix.Signal) error {
	dirs, err := cgroupDirs(s.Name, n.Name)
	if err != nil {
		return err
	}
	// Until a round finds nobody new: who forks is faster than who lists.
	done := map[int]bool{n.Proc.Pid: true}
	deadline := time.Now().Add(stopTime)
	for again := true; again; {
		again = false
		for _, pid := range cgroupPids(dirs) {
			if !done[pid] {
				done[pid], again = true, true
				if err := unix.Kill(pid, sig); err != nil && err != unix.ESRCH {
					return errs.Wrap(err, "lab: signal", n.Name)
				}
			}
			if sig == unix.SIGSTOP && pid != n.Proc.Pid {
				stop(pid, deadline)
			}
		}
	}
	return nil
}

// stop stops process pid, and returns when it stands still or at the deadline. The
// signal is sent to each thread that goes on: one sent to the process is given to a
// thread of the kernel's choice, and if that waits for a stopped daemon (D) nobody
// stops.
func stop(pid int, deadline time.Time) {
	for going := threads(pid); len(going) > 0 && time.Now().Before(deadline); going = threads(pid) {
		for _, tid := range going {
			_ = unix.Tgkill(pid, tid, unix.SIGSTOP) // it may have ended
		}
		time.Sleep(time.Millisecond)
	}
}

// threads lists those of process pid that may go on as if they had not been told to
// stop. One that waits in the kernel (D) stops before it is back in its program.
func threads(pid int) (going []int) {
	list, err := os.ReadDir(fmt.Sprintf("/proc/%d/task", pid))
	if err != nil {
		return nil
	}
	for _, t := range list {
		tid, err := strconv.Atoi(t.Name())
		if err != nil {
			continue
		}
		if f, err := statFields(tid); err == nil && (f[0] == "R" || f[0] == "S") {
			going = append(going, tid)
		}
	}
	return going
}

// SignalDaemon sends sig to the process of node's daemon.
func (l *Lab) SignalDaemon(ctx context.Context, node string, sig unix.Signal) error {
	_, err := l.ask(ctx, node, request{Op: "signal", Sig: int(sig)}, nil)
	return err
}

// ClockEnv names, in a daemon's environment, the file that says how wrong its
// clocks are, as in "wall=+1h0m0s boot=+0s". The file is replaced when that changes.
const ClockEnv = "UNUM_CLOCK_FILE"

// maxSkew bounds a clock's error: certificates and tokens have ended long before.
const maxSkew = 10 * 365 * 24 * time.Hour

// Clock is how far a node's clocks are from the machine's, in the eyes of its
// daemon: the time of day, and the time since boot, which has counted more after a
// suspend.
type Clock struct {
	Wall time.Duration `json:"wall_ns"`
	Boot time.Duration `json:"boot_ns"`
}

// String returns the clock as its file has it.
func (c Clock) String() string { return "wall=" + signed(c.Wall) + " boot=" + signed(c.Boot) }

func signed(d time.Duration) string {
	if d < 0 {
		return d.String()
	}
	return "+" + d.String()
}

// Clock sets how wrong node's clocks are; the zero Clock ends it. The time since
// boot never goes back, until the node boots again.
func (l *Lab) Clock(ctx context.Context, node string, c Clock) error {
	return l.setClock(ctx, node, func(was *Clock) { *was = c })
}

func (l *Lab) setClock(ctx context.Context, node string, f func(*Clock)) error {
	return l.change(ctx, func(s *state) error {
		n, err := s.node(node)
		if err != nil {
			return err
		}
		c := s.Clocks[node]
		f(&c)
		if c.Wall.Abs() > maxSkew || c.Boot < 0 || c.Boot > maxSkew {
			return errs.E(errs.Invalid, "lab clock", c.String(), "want the wall clock at most %v off, and the boot clock not behind", maxSkew)
		}
		if c.Boot < s.Clocks[node].Boot && n.On && n.Proc.alive() {
			return errs.E(errs.Invalid, "lab clock", node, "the time since boot does not go back while a node has power").
				WithRemedy("unum lab kill --name %s %s, then start", s.Name, node)
		}
		if s.Clocks == nil {
			s.Clocks = map[string]Clock{}
		}
		s.Clocks[node] = c
		if c == (Clock{}) {
			delete(s.Clocks, node)
		}
		return s.writeClock(n)
	})
}

// clockPath is node's clock file. Nodes see the machine's files where they are.
func clockPath(dir, node string) string { return filepath.Join(dir, node, "clock") }

func (s *state) writeClock(n *nodeState) error {
	p := clockPath(s.Dir, n.Name)
	if err := os.WriteFile(p+".new", []byte(s.Clocks[n.Name].String()+"\n"), 0o644); err != nil {
		return errs.Wrap(err, "lab: clock of", n.Name)
	}
	return errs.Wrap(os.Rename(p+".new", p), "lab: clock of", n.Name)
}

// bootClock sets n's clock file as it is after a boot.
func (s *state) bootClock(n *nodeState) error {
	if c, ok := s.Clocks[n.Name]; ok {
		c.Boot = 0
		s.Clocks[n.Name] = c
		if c == (Clock{}) {
			delete(s.Clocks, n.Name)
		}
	}
	return s.writeClock(n)
}
