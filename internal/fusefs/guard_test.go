package fusefs

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/unum-os/unum/internal/errs"
	"github.com/unum-os/unum/internal/ids"
	"github.com/unum-os/unum/internal/need"
)

// stuckServer serves dir and, in the same process, makes a call on it that is
// never answered. It prints the connection's number when the call is under way.
func stuckServer(dir string) error {
	tree := newMemTree()
	cfg := Config{Dir: dir, Tree: tree, Guard: os.Getenv("FUSEFS_TEST_GUARD") != "", Patience: time.Hour}
	m := New(cfg)
	tree.hook = func(_ context.Context, op, name string, _ ids.Inode) error {
		if op == "lookup" && name == "blocked" {
			fmt.Println(m.minor)
			select {} // as a tree that waits for another machine
		}
		return nil
	}
	ran := make(chan error, 1)
	go func() { ran <- m.Run(context.Background()) }()
	select {
	case <-m.Ready():
	case err := <-ran:
		return err
	}
	_, err := unix.Open(filepath.Join(dir, "blocked"), unix.O_RDONLY, 0)
	return err
}

// newStuck starts a stuckServer and returns a Mount that can abort its
// connection, which happens at the end of the test in any case.
func newStuck(t *testing.T, env ...string) (*exec.Cmd, *Mount, <-chan struct{}) {
	t.Helper()
	need.Root(t, "to mount")
	dir := t.TempDir()
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), append(env, "FUSEFS_TEST_SERVE="+dir)...)
	cmd.Stderr = os.Stderr // a pipe would keep Wait waiting for the guard
	out, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	cmd.Stdout = w
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	said, err := bufio.NewReader(out).ReadString('\n')
	minor, perr := strconv.ParseUint(strings.TrimSpace(said), 10, 32)
	ended := make(chan struct{})
	go func() { _ = cmd.Wait(); close(ended) }()
	if err != nil || perr != nil {
		<-ended
		need.Missing(t, "not mounted: %q", said)
	}
	m := &Mount{minor: uint32(minor)}
	abort, err := openAbort(m.minor)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		// Of this connection, or of none.
		if _, err := unix.Write(abort, []byte("1")); err != nil {
			t.Error(err)
		}
		_ = unix.Close(abort)
		wait(t, "end of the server", ended)
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	return cmd, m, ended
}

func TestGuardFreesAKilledServer(t *testing.T) {
	cmd, _, ended := newStuck(t, "FUSEFS_TEST_GUARD=1")
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	wait(t, "end of the killed server", ended)
}

// Without a guard only an abort frees the server: what the guard is for.
func TestKilledServerHangsUntilAbort(t *testing.T) {
	cmd, m, ended := newStuck(t)
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	for end := time.Now().Add(soon); !ending(cmd.Process.Pid); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("a killed process does not look like one")
		}
	}
	select {
	case <-ended:
		t.Skip("this kernel needs no guard")
	default:
	}
	if err := m.abortByControl(); err != nil {
		t.Fatal(err)
	}
	wait(t, "end of the server after the abort", ended)
}

func TestGuardKeepsTheTime(t *testing.T) {
	need.Root(t, "to mount")
	dir := t.TempDir()
	m := New(Config{Dir: dir, Tree: newMemTree(), Guard: true})
	m.limit = time.Millisecond
	ran := make(chan error, 1)
	go func() { ran <- m.Run(t.Context()) }()
	select {
	case err := <-ran:
		if errs.Has(err, errs.Permission) {
			need.Missing(t, "mounting is not allowed here")
		}
		if !errs.Has(err, errs.Unavailable) {
			t.Fatal(err)
		}
	case <-time.After(soon):
		_ = m.Abort()
		t.Fatal("the connection lives longer than its guard allows")
	}
}

func TestEnding(t *testing.T) {
	if ending(os.Getpid()) {
		t.Error("this test is not ending")
	}
	if !ending(1 << 30) {
		t.Error("a process that is not there has ended")
	}
	cmd := exec.Command("true")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	for end := time.Now().Add(soon); !ending(cmd.Process.Pid); time.Sleep(time.Millisecond) { // a zombie
		if time.Now().After(end) {
			t.Fatal("a zombie has not ended")
		}
	}
	if err := cmd.Wait(); err != nil {
		t.Fatal(err)
	}
}

// A mount namespace made while the mount was up has a copy of it, which outlives umount.
func TestUnmountWithACopyInAnotherNamespace(t *testing.T) {
	m, dir, end := start(t, newMemTree(), func(c *Config) { c.Grace = 100 * time.Millisecond })
	cmd := exec.Command("cat")
	cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: unix.CLONE_NEWNS}
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		need.Missing(t, "no mount namespaces: %v", err)
	}
	defer func() {
		if err := in.Close(); err != nil {
			t.Error(err)
		}
		if err := cmd.Wait(); err != nil {
			t.Error(err)
		}
	}()
	if _, err := in.Write([]byte("x")); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(out, make([]byte, 1)); err != nil { // it is there
		t.Fatal(err)
	}
	if err := end(); err != nil {
		t.Fatal(err)
	}
	select {
	case <-m.dead:
	default:
		t.Error("the connection lives on")
	}
	if l, err := os.ReadDir(dir); err != nil || len(l) != 0 {
		t.Fatalf("still mounted: %v %v", l, err)
	}
}

// A worker that has to release what the kernel did not take may be held up by
// the Tree: it must not count as idle meanwhile.
func TestBlockedReleaseIsNotIdle(t *testing.T) {
	tree := newMemTree()
	m := New(Config{Tree: tree})
	m.ctx, m.fd = t.Context(), -1
	m.idle.Store(2)
	tree.mu.Lock()
	n := tree.make(Caller{}, syscall.S_IFREG|0o644)
	o := tree.handle(n.attr.Ino)
	tree.mu.Unlock()
	at := int32(-1)
	tree.hook = func(_ context.Context, op, _ string, _ ids.Inode) error {
		if op == "release" {
			at = m.idle.Load()
		}
		return nil
	}
	w := &worker{m: m, notes: []note{{ino: n.attr.Ino, opened: true, handle: o.Handle}}}
	w.finish(false)
	if at != 1 || m.idle.Load() != 2 {
		t.Fatalf("idle: %d in Release and %d after, want 1 and 2", at, m.idle.Load())
	}
}
