package proc

import (
	"context"
	"fmt"
	"net"
	"os"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/unum-os/unum/internal/proc/shim"
)

// startAhead is how many shims wait for their jobs. To make a process with
// namespaces and control groups and to start a Go runtime takes two
// milliseconds, half of what a short command costs in all; an idle shim takes
// about two megabytes. Two cover the rhythm of a shell loop.
const startAhead = 2

// makeWay is how long the next one waits after one was taken: the job that took it
// shall have the processor first.
const makeWay = 5 * time.Millisecond

// spawnAgain is the pause after a shim could not be started ahead.
const spawnAgain = 5 * time.Second

// vessel is a shim in its namespaces and control group, without a program yet.
type vessel struct {
	proc *os.Process
	link *net.UnixConn
	cg   *cgroup
}

// groupName is the name of a job's control group, by its shim.
func groupName(pid int) string { return fmt.Sprintf("shim-%d", pid) }

// vessel returns one that was started ahead, or a new one.
func (m *Manager) vessel() (*vessel, error) {
	for {
		select {
		case v := <-m.ready:
			if v.alive() {
				return v, nil
			}
			v.discard()
		default:
			return m.spawn()
		}
	}
}

// startAhead keeps one vessel waiting until ctx ends.
func (m *Manager) startAhead(ctx context.Context) {
	for ctx.Err() == nil {
		v, err := m.spawn()
		if err != nil {
			m.cfg.Log.Warn("shim cannot be started", "err", err)
			select { // jobs try for themselves meanwhile, and say why they fail
			case <-time.After(spawnAgain):
			case <-ctx.Done():
			}
			continue
		}
		select {
		case m.ready <- v:
			select {
			case <-time.After(makeWay):
			case <-ctx.Done():
			}
		case <-ctx.Done():
			v.discard()
		}
	}
}

// spawn starts a shim in new PID and IPC namespaces. Its mount namespace is its
// own affair (see shim).
func (m *Manager) spawn() (*vessel, error) {
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	unix.SetNonblock(pair[0], true)
	mine, theirs := os.NewFile(uintptr(pair[0]), "link"), os.NewFile(uintptr(pair[1]), "link")
	defer theirs.Close()
	conn, err := net.FileConn(mine)
	mine.Close()
	if err != nil {
		return nil, err
	}
	link := conn.(*net.UnixConn)
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		link.Close()
		return nil, err
	}
	defer null.Close()
	p, err := os.StartProcess(fmt.Sprintf("/proc/self/fd/%d", m.exe), []string{"unum-shim", shim.Arg}, &os.ProcAttr{
		// One thread is enough for its few words, and starts sooner.
		Dir: "/", Env: []string{"GOMAXPROCS=1"}, Files: []*os.File{null, null, null, theirs},
		Sys: &syscall.SysProcAttr{Setsid: true, Cloneflags: unix.CLONE_NEWPID | unix.CLONE_NEWIPC},
	})
	if err != nil {
		link.Close()
		return nil, err
	}
	cg, err := m.cg.make(groupName(p.Pid), p.Pid)
	if err != nil {
		m.cfg.Log.Warn("control group cannot be used", "err", err)
	}
	return &vessel{p, link, cg}, nil
}

// alive reports whether the shim is still waiting.
func (v *vessel) alive() bool {
	rc, err := v.link.SyscallConn()
	if err != nil {
		return false
	}
	ok := false
	rc.Control(func(fd uintptr) {
		var b [1]byte
		_, _, err := unix.Recvfrom(int(fd), b[:], unix.MSG_PEEK|unix.MSG_DONTWAIT)
		ok = err == unix.EAGAIN
	})
	return ok
}

func (v *vessel) discard() {
	v.link.Close()
	v.proc.Kill()
	v.proc.Wait()
	v.cg.remove()
}
