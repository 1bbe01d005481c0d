package lab

import (
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"os"
	"os/signal"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// The control socket of a node: one request per connection, a length and JSON,
// with the command's descriptors attached; then answers one way and signals the
// other, as JSON lines.

// request asks a node's init for something.
type request struct {
	Op   string   // exec, daemon, signal (the daemon), status
	Argv []string `json:",omitempty"`
	Env  []string `json:",omitempty"`
	Dir  string   `json:",omitempty"`
	TTY  bool     `json:",omitempty"` // the descriptors are a terminal, to be the controlling one
	Sig  int      `json:",omitempty"`
}

// answer is what init says: Pid when started, Exit when ended.
type answer struct {
	Err    string        `json:",omitempty"`
	Pid    int           `json:",omitempty"`
	Exit   *int          `json:",omitempty"`
	Daemon *DaemonStatus `json:",omitempty"`
}

// DaemonStatus says how a node's daemon is.
type DaemonStatus struct {
	Started bool
	Running bool
	Exit    int // when started and not running; 128+n for signal n
}

const (
	maxRequest = 16 << 20        // bytes of a request: arguments and environment together may be 6 MiB in Linux
	hangupTime = 5 * time.Second // from SIGHUP to SIGKILL for a command whose caller died
)

// server is the working part of a node's init.
type server struct {
	mu     sync.Mutex // guards below; held over fork, so that no child ends before it is known
	procs  map[int]chan int
	daemon struct {
		pid int
		DaemonStatus
	}
}

func newServer() *server { return &server{procs: map[int]chan int{}} }

// reap collects every child that ends: ours, and orphans of the node.
func (v *server) reap() {
	c := make(chan os.Signal, 1)
	signal.Notify(c, unix.SIGCHLD)
	for {
		v.mu.Lock()
		for {
			var ws syscall.WaitStatus
			pid, err := syscall.Wait4(-1, &ws, syscall.WNOHANG, nil)
			if err == syscall.EINTR {
				continue
			}
			if pid <= 0 || err != nil {
				break
			}
			code := ws.ExitStatus()
			if ws.Signaled() {
				code = 128 + int(ws.Signal())
			}
			if pid == v.daemon.pid {
				v.daemon.Running, v.daemon.Exit = false, code
			}
			if ch := v.procs[pid]; ch != nil {
				delete(v.procs, pid)
				ch <- code
			}
		}
		v.mu.Unlock()
		<-c
	}
}

func (v *server) accept(l *net.UnixListener) error {
	for {
		c, err := l.AcceptUnix()
		if err != nil {
			return err
		}
		go func() {
			defer c.Close()
			if err := v.serve(c); err != nil {
				// If the caller is gone there is nobody to tell.
				_ = json.NewEncoder(c).Encode(answer{Err: err.Error()})
			}
		}()
	}
}

// trampoline makes the shell do what shells do: enter the directory, search
// PATH, and say 126 or 127. It also keeps our fork from waiting for a directory
// or program on a file system that does not answer.
const trampoline = `cd -- "$1" 2>/dev/null || cd /
shift
exec "$@"`

// start forks a command; its exit code comes on the channel.
func (v *server) start(req request, fds []int, daemon bool) (int, chan int, error) {
	argv := append([]string{"sh", "-c", trampoline, "sh", req.Dir}, req.Argv...)
	attr := &syscall.ProcAttr{Dir: "/", Env: req.Env, Files: make([]uintptr, len(fds)), Sys: &syscall.SysProcAttr{Setpgid: true}}
	for i, fd := range fds {
		attr.Files[i] = uintptr(fd)
	}
	if req.TTY {
		attr.Sys = &syscall.SysProcAttr{Setsid: true, Setctty: true, Ctty: 0}
	} else if daemon {
		attr.Sys = &syscall.SysProcAttr{Setsid: true}
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	if daemon && v.daemon.Running {
		return 0, nil, fmt.Errorf("the node's daemon runs already")
	}
	pid, err := syscall.ForkExec("/bin/sh", argv, attr)
	if err != nil {
		return 0, nil, err
	}
	ch := make(chan int, 1)
	v.procs[pid] = ch
	if daemon {
		v.daemon.pid, v.daemon.DaemonStatus = pid, DaemonStatus{Started: true, Running: true}
	}
	return pid, ch, nil
}

func (v *server) serve(c *net.UnixConn) error {
	req, fds, err := readRequest(c)
	defer func() {
		for _, fd := range fds {
			unix.Close(fd)
		}
	}()
	if err != nil {
		return err
	}
	out := json.NewEncoder(c)
	switch req.Op {
	case "status":
		v.mu.Lock()
		st := v.daemon.DaemonStatus
		v.mu.Unlock()
		return out.Encode(answer{Daemon: &st})
	case "signal":
		v.mu.Lock()
		defer v.mu.Unlock()
		if !v.daemon.Running {
			return fmt.Errorf("the node's daemon does not run")
		}
		if err := unix.Kill(v.daemon.pid, unix.Signal(req.Sig)); err != nil {
			return err
		}
		return out.Encode(answer{Pid: v.daemon.pid})
	case "exec", "daemon":
		if len(fds) != 3 || len(req.Argv) == 0 {
			return fmt.Errorf("want a command and 3 descriptors, got %d arguments and %d", len(req.Argv), len(fds))
		}
	default:
		return fmt.Errorf("unknown request %q", req.Op)
	}
	pid, done, err := v.start(req, fds, req.Op == "daemon")
	for _, fd := range fds { // or a pipe's other end never sees its end
		unix.Close(fd)
	}
	fds = nil
	if err != nil {
		return err
	}
	if err := out.Encode(answer{Pid: pid}); err != nil && req.Op == "daemon" {
		return nil
	}
	if req.Op == "daemon" {
		return nil
	}
	return v.attend(c, pid, done, out)
}

// attend passes signals to a command until it ends or its caller does.
func (v *server) attend(c net.Conn, pid int, done chan int, out *json.Encoder) error {
	gone := make(chan struct{})
	go func() {
		defer close(gone)
		in := json.NewDecoder(c)
		for {
			var r request
			if in.Decode(&r) != nil {
				return
			}
			v.signalGroup(pid, unix.Signal(r.Sig))
		}
	}()
	select {
	case code := <-done:
		return out.Encode(answer{Exit: &code})
	case <-gone:
	}
	v.signalGroup(pid, unix.SIGHUP)
	v.signalGroup(pid, unix.SIGCONT)
	select {
	case <-done:
	case <-time.After(hangupTime):
		v.signalGroup(pid, unix.SIGKILL)
		<-done
	}
	return nil
}

// signalGroup signals the command's process group, if the command still is.
func (v *server) signalGroup(pid int, sig unix.Signal) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.procs[pid] != nil {
		_ = unix.Kill(-pid, sig) // gone a moment ago: nothing to signal
	}
}

// readRequest reads a request and the descriptors attached to its first bytes.
// The descriptors are the caller's to close, also on error.
func readRequest(c *net.UnixConn) (request, []int, error) {
	var req request
	var head [4]byte
	oob := make([]byte, unix.CmsgSpace(8*4))
	n, oobn, _, _, err := c.ReadMsgUnix(head[:], oob)
	if err != nil {
		return req, nil, err
	}
	var fds []int
	msgs, err := unix.ParseSocketControlMessage(oob[:oobn])
	if err != nil {
		return req, nil, err
	}
	for _, m := range msgs {
		if got, err := unix.ParseUnixRights(&m); err == nil {
			fds = append(fds, got...)
		}
	}
	if _, err := io.ReadFull(c, head[n:]); err != nil {
		return req, fds, err
	}
	size := binary.BigEndian.Uint32(head[:])
	if size > maxRequest {
		return req, fds, fmt.Errorf("request of %d bytes", size)
	}
	b := make([]byte, size)
	if _, err := io.ReadFull(c, b); err != nil {
		return req, fds, err
	}
	req, err = decodeRequest(b)
	return req, fds, err
}

func decodeRequest(b []byte) (request, error) {
	var req request
	err := json.Unmarshal(b, &req)
	return req, err
}

func writeRequest(c *net.UnixConn, req request, fds []int) error {
	b, err := json.Marshal(req)
	if err != nil {
		return err
	}
	if len(b) > maxRequest {
		return fmt.Errorf("arguments and environment of %d bytes are too long", len(b))
	}
	msg := append(binary.BigEndian.AppendUint32(nil, uint32(len(b))), b...)
	var oob []byte
	if len(fds) > 0 {
		oob = unix.UnixRights(fds...)
	}
	n, _, err := c.WriteMsgUnix(msg, oob, nil)
	if err != nil {
		return err
	}
	if n == len(msg) {
		return nil // it may have answered and hung up by now
	}
	_, err = c.Write(msg[n:])
	return err
}
