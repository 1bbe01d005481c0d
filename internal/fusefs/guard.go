package fusefs

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/unum-os/unum/internal/clock"
)

// A thread that waits for the answer to a request cannot be killed once the
// request has been read. If it is a thread of the serving process, in a call on
// its own mount or in an invalidation that waits for pages, and the process is
// killed, then nobody will answer, and the kernel does not end the connection
// either, for the thread keeps the device open: the process, and everyone who
// uses the mount, would hang for ever. The guard is another process that sees
// the first one dying and aborts the connection.

// guardEnv makes a program a guard. Its value is the process guarded and after
// how long the connection is aborted in any case (0s: never).
const guardEnv = "UNUM_FUSE_GUARD"

const (
	// guardLook is how often the guard looks. The kernel tells of a process's
	// end only when its last thread has gone, which is too late.
	guardLook = 500 * time.Millisecond
	// What the guard finds open, besides standard input: a pipe that the
	// guarded process closes when it is done.
	guardAbort = 3 // the connection's abort file
	// guardExpired is the exit status after an abort because of time.
	guardExpired = 3
)

// GuardMain does nothing in most processes. In one that a Mount with
// Config.Guard started, it does the guard's work and exits. It must be the
// first call of main.
func GuardMain() {
	v, ok := os.LookupEnv(guardEnv)
	if !ok {
		return
	}
	var pid int
	var limit string
	if _, err := fmt.Sscan(v, &pid, &limit); err != nil {
		os.Exit(2)
	}
	d, err := time.ParseDuration(limit)
	if err != nil {
		os.Exit(2)
	}
	os.Exit(keepWatch(pid, d))
}

// keepWatch returns the guard's exit status when its work is done.
func keepWatch(pid int, limit time.Duration) int {
	// They are meant for the process that is guarded, and end this one with it.
	signal.Ignore(syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP, syscall.SIGQUIT)
	start, status := clock.Now(), 0
	for {
		n, err := unix.Poll([]unix.PollFd{{Fd: 0, Events: unix.POLLIN}}, int(guardLook.Milliseconds()))
		if err == unix.EINTR {
			continue
		}
		if limit > 0 && clock.Now().Sub(start) > limit {
			status = guardExpired
			break
		}
		if err != nil || n > 0 || os.Getppid() != pid || ending(pid) {
			break
		}
	}
	// Nothing happens if the connection is over: the file is its own for ever.
	if _, err := unix.Write(guardAbort, []byte("1")); err != nil {
		return 1
	}
	return status
}

// ending reports whether a process is on its way out, though threads may be
// left. It looks at the first thread, which in a Go program does not end alone.
func ending(pid int) bool {
	const exiting = 0x4 // PF_EXITING
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return true
	}
	f := strings.Fields(string(b[bytes.LastIndexByte(b, ')')+1:]))
	if len(f) < 7 || f[0] == "Z" || f[0] == "X" {
		return true
	}
	flags, err := strconv.ParseUint(f[6], 10, 64)
	return err != nil || flags&exiting != 0 || dying(uint32(pid))
}

// guard is the guard as the guarded process sees it.
type guard struct {
	cmd  *exec.Cmd
	hold *os.File // the pipe's end
}

// startGuard starts one for m's connection.
func (m *Mount) startGuard() (_ *guard, err error) {
	abort, err := openAbort(m.minor)
	if err != nil {
		return nil, err
	}
	file := os.NewFile(uintptr(abort), "abort")
	defer func() { err = errors.Join(err, file.Close()) }()
	r, w, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, r.Close()) }()
	cmd := exec.Command("/proc/self/exe")
	cmd.Args = []string{"unum-fuse-guard"}
	cmd.Env = []string{fmt.Sprintf("%s=%d %v", guardEnv, os.Getpid(), m.limit)}
	cmd.Dir = "/"
	cmd.Stdin = r
	cmd.ExtraFiles = []*os.File{file}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		return nil, errors.Join(err, w.Close())
	}
	return &guard{cmd, w}, nil
}

// end ends the guard; the connection must be over. It returns what is amiss
// with a guard that has not lived until now.
func (g *guard) end() error {
	err := g.hold.Close()
	if werr := g.cmd.Wait(); werr != nil && !errors.Is(werr, unix.ECHILD) { // ECHILD: someone else reaps children
		err = errors.Join(err, werr)
	}
	return err
}
