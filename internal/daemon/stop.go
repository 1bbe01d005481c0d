package daemon

import (
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"time"

	"github.com/unum-os/unum/internal/errs"
)

// Stop ends the process that holds the pid file and returns its pid when it has
// ended. None running is an error of class NotFound; one that does not end in
// time is left alone, with an error of class Timeout.
//
// A process that systemd supervises is stopped through systemd, which would
// start it again otherwise.
func Stop(ctx context.Context, path string, wait time.Duration, tell io.Writer) (int, error) {
	pid, runs, err := Running(path)
	if err != nil {
		return 0, err
	}
	if !runs {
		return 0, errs.E(errs.NotFound, "stop the node", "", "no daemon is running on this machine")
	}
	if pid <= 0 {
		return 0, errs.E(errs.NotSupported, "stop the node", "", "the daemon runs where its processes cannot be seen from here").WithRemedy("unum down there")
	}
	ctx, cancel := context.WithTimeoutCause(ctx, wait, errs.Timeout.Err())
	defer cancel()
	if unit := unitOf(pid); unit != "" {
		if b, err := exec.CommandContext(ctx, "systemctl", "stop", "--no-block", unit).CombinedOutput(); err != nil {
			return pid, errs.E(errs.Unavailable, "stop the node", unit, "systemctl: %v: %s", err, strings.TrimSpace(string(b)))
		}
	} else if err := terminate(path, pid); err != nil {
		return pid, err
	}
	w := waiting{out: tell}
	look := time.NewTicker(lookEvery)
	defer look.Stop()
	for {
		now, runs, err := Running(path)
		if err != nil {
			return pid, err
		}
		if !runs || now != pid {
			return pid, nil
		}
		w.tell(fmt.Sprintf("waiting: process %d is stopping", pid))
		select {
		case <-look.C:
		case <-ctx.Done():
			if context.Cause(ctx) != errs.Timeout.Err() {
				return pid, context.Cause(ctx)
			}
			return pid, errs.E(errs.Timeout, "stop the node", "", "process %d has not ended after %v", pid, wait).
				WithRemedy("wait and say it again, or kill -KILL %d, which costs what is not shipped yet", pid)
		}
	}
}

// terminate sends SIGTERM to the holder of the pid file. The process is held by
// a descriptor before it is looked at again, so that its number cannot have
// passed to another.
func terminate(path string, pid int) error {
	p, err := os.FindProcess(pid)
	if err != nil {
		return errs.Wrap(err, "stop the node", fmt.Sprintf("process %d", pid))
	}
	defer p.Release()
	now, runs, err := Running(path)
	if err != nil || !runs || now != pid {
		return err // it has ended
	}
	if err := p.Signal(syscall.SIGTERM); err != nil && err != os.ErrProcessDone {
		return (&errs.Error{Op: "stop the node", Subject: fmt.Sprintf("process %d", pid), Class: errs.ClassOf(err), Err: err}).WithRemedy("sudo unum down")
	}
	return nil
}

// unitOf returns the systemd service to which a process belongs, "" if systemd
// does not run here or the process is in no service of that kind.
func unitOf(pid int) string {
	if _, err := os.Stat("/run/systemd/system"); err != nil {
		return ""
	}
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", pid))
	if err != nil {
		return ""
	}
	return unit(string(b))
}

// unit finds unum's own service in the text of /proc/PID/cgroup. A daemon that
// somebody started by hand within another service (sshd's, a terminal's) is not
// that service.
func unit(cgroups string) string {
	for line := range strings.Lines(cgroups) {
		f := strings.SplitN(strings.TrimSuffix(line, "\n"), ":", 3)
		if len(f) != 3 || f[1] != "" && f[1] != "name=systemd" {
			continue
		}
		for part := range strings.SplitSeq(f[2], "/") {
			if strings.HasPrefix(part, "unum") && strings.HasSuffix(part, ".service") {
				return part
			}
		}
	}
	return ""
}
