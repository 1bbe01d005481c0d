package lab

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/unum-os/unum/internal/errs"
)

// Kill takes the power from nodes, all at the same moment as nearly as can be:
// everything on them stands still, their disks keep only what was synced, and all
// dies. A node without power stays so.
func (l *Lab) Kill(ctx context.Context, nodes ...string) error {
	return l.change(ctx, func(s *state) error {
		hit, err := s.pick("lab kill", nodes)
		if err != nil {
			return err
		}
		return s.powerLoss(hit)
	})
}

// PowerLossAll takes the power from every node at once.
func (l *Lab) PowerLossAll(ctx context.Context) error {
	return l.change(ctx, func(s *state) error { return s.powerLoss(s.Nodes) })
}

func (s *state) powerLoss(nodes []*nodeState) error {
	var on []*nodeState
	for _, n := range nodes {
		if n.On && n.Proc.alive() {
			on = append(on, n)
		}
		n.On = false
		delete(s.Paused, n.Name)
	}
	if err := s.save(); err != nil {
		return err
	}
	each := func(f func(n *nodeState) error) error {
		var wg sync.WaitGroup
		failed := make([]error, len(on))
		for i, n := range on {
			wg.Go(func() { failed[i] = f(n) })
		}
		wg.Wait()
		return errors.Join(failed...)
	}
	// Nobody may see the disk die. Of a sync that is under way as ext4 is shut down the
	// caller can hear success though it was given up (ext4_fsync_journal finds the
	// transaction gone and does not ask whether it was aborted): who still runs would
	// acknowledge what is lost, as no machine without power does. A failure on the way
	// is told in the end: what was stopped is killed all the same.
	failed := each(s.freeze)
	failed = errors.Join(failed, each(s.cutDiskPower))
	return errors.Join(failed, each(func(n *nodeState) error {
		dirs, err := cgroupDirs(s.Name, n.Name)
		if err != nil {
			return err
		}
		_ = unix.Kill(n.Proc.Pid, unix.SIGKILL) // pid 1: the kernel kills all the others with it
		if err := killCgroups(dirs); err != nil {
			return err
		}
		if err := waitGone(n.Proc); err != nil {
			return err
		}
		if err := waitLoops(filepath.Join(s.Dir, n.Name)); err != nil {
			return err
		}
		dropLoops(s.Loops)
		return nil
	}))
}

// freeze makes all processes of n stand still: its init first, so that it starts
// nothing more. Class Timeout: one goes on, and may see the disk die.
func (s *state) freeze(n *nodeState) error {
	deadline := time.Now().Add(goneTimeout)
	stop(n.Proc.Pid, deadline)
	dirs, err := cgroupDirs(s.Name, n.Name)
	if err != nil {
		return err
	}
	for {
		if err := s.signalAll(n, unix.SIGSTOP); err != nil {
			return err
		}
		going := slices.IndexFunc(append(cgroupPids(dirs), n.Proc.Pid), func(pid int) bool { return len(threads(pid)) > 0 })
		if going < 0 {
			return nil
		}
		if time.Now().After(deadline) {
			return errs.E(errs.Timeout, "lab kill: stop", n.Name, "a process does not stand still: what it acknowledged at the last moment may be lost")
		}
	}
}

func waitGone(p procID) error {
	deadline := time.Now().Add(goneTimeout)
	for p.alive() {
		if time.Now().After(deadline) {
			return errs.E(errs.Timeout, "lab: kill", strconv.Itoa(p.Pid), "the process does not die")
		}
		time.Sleep(time.Millisecond)
	}
	return nil
}

// Down removes the lab called name and everything it made, also when it is half
// made or its maker was killed. If there is no such lab the error is of class
// NotFound and nothing was done.
func Down(ctx context.Context, name string) error {
	l, err := Open(name, Hooks{})
	if err != nil {
		return err
	}
	return l.Down(ctx)
}

// Down removes the lab and everything it made.
func (l *Lab) Down(ctx context.Context) error {
	unlock, err := lockDir(ctx, runDir(l.name))
	if err != nil {
		return err
	}
	defer unlock()
	s, err := readState(l.dir)
	if err != nil && !errs.Has(err, errs.NotFound) && !errs.Has(err, errs.Corrupt) {
		return err
	}
	return l.remove(s)
}

// remove takes everything away. s is nil when the maker did not come as far as a
// state. The lab's lock is held; it vanishes with its directory. It is not
// bound to a context: a half removed lab helps nobody, and every wait is bounded.
func (l *Lab) remove(s *state) error {
	dirs, err := cgroupDirs(l.name, "")
	if err != nil {
		return err
	}
	// 1. Processes: with them go mounts, loop devices, interfaces and the bridge.
	if err := killStrays(l.name); err != nil {
		return err
	}
	if err := killCgroups(dirs); err != nil {
		return err
	}
	if s != nil {
		for _, p := range append([]procID{s.Switch}, procsOf(s)...) {
			if err := waitGone(p); err != nil {
				return err
			}
		}
	}
	if err := waitLoops(l.dir); err != nil {
		return err
	}
	if s != nil {
		dropLoops(s.Loops)
	}
	// 2. Cgroups.
	if err := removeCgroups(dirs); err != nil {
		return err
	}
	// 3. Files. The pointer goes last: until then a down can be said again.
	if err := removeFiles(l.dir); err != nil {
		return err
	}
	p, err := readPointer(l.name)
	if err != nil {
		return err
	}
	if err := removeEmpty(append([]string{defaultBase}, p.MadeDir...)); err != nil {
		return err
	}
	if err := dropShared(context.Background(), l.name); err != nil {
		return err
	}
	for _, f := range []string{pointerPath(l.name), pointerPath(l.name) + ".new"} {
		if err := os.Remove(f); err != nil && !os.IsNotExist(err) {
			return errs.Wrap(err, "lab down", f)
		}
	}
	if err := os.RemoveAll(runDir(l.name)); err != nil {
		return errs.Wrap(err, "lab down", l.name)
	}
	_ = os.Remove(runBase) // other labs may be in it
	return nil
}

func procsOf(s *state) []procID {
	var ps []procID
	for _, n := range s.Nodes {
		ps = append(ps, n.Proc)
	}
	return ps
}

// removeEmpty removes directories, the last first, but for those that are
// somebody's by now: not empty, or mounted on.
func removeEmpty(dirs []string) error {
	for _, d := range slices.Backward(dirs) {
		err := unix.Rmdir(d)
		if err != nil && !errors.Is(err, unix.ENOENT) && !errors.Is(err, unix.ENOTEMPTY) && !errors.Is(err, unix.EBUSY) {
			return errs.Wrap(err, "lab down", d)
		}
	}
	return nil
}

// killStrays kills inits of the lab that are in none of its cgroups: there may
// be machines without any.
func killStrays(name string) error {
	ents, err := os.ReadDir("/proc")
	if err != nil {
		return errs.Wrap(err, "lab down", name)
	}
	for _, e := range ents {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		b, err := os.ReadFile(filepath.Join("/proc", e.Name(), "cmdline"))
		if err != nil {
			continue
		}
		if a := strings.Split(string(b), "\x00"); len(a) > 4 && a[0] == "unum-lab" && a[1] == "lab" && a[2] == "__init" && a[3] == name {
			id, err := identify(pid)
			if err != nil {
				continue
			}
			_ = unix.Kill(pid, unix.SIGKILL)
			if err := waitGone(id); err != nil {
				return err
			}
		}
	}
	return nil
}

var nodeDirRE = regexp.MustCompile(`^n[0-9]+$`)

// removeFiles removes from the lab's directory what labs put there, and nothing else.
func removeFiles(dir string) error {
	ents, err := os.ReadDir(dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return errs.Wrap(err, "lab down", dir)
	}
	for _, e := range ents {
		switch n := e.Name(); {
		case n == "state.json" || n == "state.json.new":
			continue // last: it says what else there is
		case n == "hosts" || n == "logs" || e.IsDir() && nodeDirRE.MatchString(n):
			if err := os.RemoveAll(filepath.Join(dir, n)); err != nil {
				return errs.Wrap(err, "lab down", dir)
			}
		}
	}
	for _, n := range []string{"state.json.new", "state.json"} {
		if err := os.Remove(filepath.Join(dir, n)); err != nil && !os.IsNotExist(err) {
			return errs.Wrap(err, "lab down", dir)
		}
	}
	return nil
}
