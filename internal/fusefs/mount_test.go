package fusefs

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/hanwen/go-fuse/v2/posixtest"
	"golang.org/x/sys/unix"

	"github.com/unum-os/unum/internal/errs"
	"github.com/unum-os/unum/internal/ids"
	"github.com/unum-os/unum/internal/need"
)

const soon = 30 * time.Second // for what takes no time, on a busy machine

// longest is how long a mount of a test may live. Then its guard, which is
// another process, aborts the connection: no test hangs for ever, not even in
// the kernel and not even if this process is killed.
const longest = 3 * time.Minute

// up mounts tree until the test ends.
func up(t testing.TB, tree Tree, change func(*Config)) (*Mount, string) {
	t.Helper()
	m, dir, _ := start(t, tree, change)
	return m, dir
}

// start also returns what ends the mount and gives Run's error.
func start(t testing.TB, tree Tree, change func(*Config)) (*Mount, string, func() error) {
	t.Helper()
	need.Root(t, "to mount")
	if _, err := os.Stat("/dev/fuse"); err != nil {
		need.Missing(t, "there is no /dev/fuse")
	}
	dir := t.TempDir()
	cfg := Config{Dir: dir, Tree: tree, Guard: true, Log: slog.New(slog.NewTextHandler(t.Output(), nil))}
	if change != nil {
		change(&cfg)
	}
	m := New(cfg)
	m.limit = longest
	ctx, cancel := context.WithCancel(context.Background())
	ran := make(chan error, 1)
	go func() { ran <- m.Run(ctx) }()
	end := sync.OnceValue(func() error {
		cancel()
		select {
		case err := <-ran:
			return err
		case <-time.After(soon):
			_ = m.Abort()
			_ = unix.Unmount(dir, unix.MNT_DETACH)
			return errors.New("Run does not return")
		}
	})
	t.Cleanup(func() {
		if err := end(); err != nil {
			t.Error(err)
		}
	})
	select {
	case <-m.Ready():
	case err := <-ran:
		ran <- nil
		if errs.Has(err, errs.Permission) {
			need.Missing(t, "mounting is not allowed here: %v", err)
		}
		t.Fatal(err)
	}
	return m, dir, end
}

// settled waits until every call has had its Replied.
func settled(t testing.TB, tree *memTree) {
	t.Helper()
	for end := time.Now().Add(soon); ; time.Sleep(time.Millisecond) {
		n, twice := tree.owed()
		if twice {
			t.Fatal("Replied was called too often")
		}
		if n == 0 {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("Replied is owed to %d calls", n)
		}
	}
}

// posixChecks are those of posixtest that Linux can pass: one wants POSIX locks of
// one process to exclude each other, which fails on ext4 alike.
func posixChecks() map[string]func(*testing.T, string) {
	checks := maps.Clone(posixtest.All)
	delete(checks, "FcntlFlockLocksFile")
	return checks
}

func TestPosix(t *testing.T) {
	for name, f := range posixChecks() {
		t.Run(name, func(t *testing.T) {
			tree := newMemTree()
			_, dir := up(t, tree, nil)
			f(t, dir)
			settled(t, tree)
		})
	}
}

func TestPosixWithPromisesAndDirect(t *testing.T) {
	for name, f := range posixChecks() {
		t.Run(name, func(t *testing.T) {
			tree := newMemTree()
			tree.valid, tree.direct = time.Minute, true
			_, dir := up(t, tree, nil)
			f(t, dir)
			settled(t, tree)
		})
	}
}

// blocker blocks the operations on names or inodes until released.
type blocker struct {
	op      string
	entered chan struct{}
	release chan struct{}
}

func newBlocker(op string) *blocker {
	return &blocker{op: op, entered: make(chan struct{}, 10000), release: make(chan struct{})}
}

func (b *blocker) hook(ctx context.Context, op, name string, _ ids.Inode) error {
	if op != b.op || name != "" && name != "blocked" {
		return nil
	}
	b.entered <- struct{}{}
	select {
	case <-b.release:
		return nil
	case <-ctx.Done():
		return no(errs.Interrupted)
	}
}

func wait(t testing.TB, what string, c <-chan struct{}) {
	t.Helper()
	select {
	case <-c:
	case <-time.After(soon):
		t.Fatalf("waited too long for: %s", what)
	}
}

func TestBlockedHandlersBlockNobody(t *testing.T) {
	const many = 100
	tree := newMemTree()
	b := newBlocker("open")
	tree.hook = b.hook
	_, dir := up(t, tree, nil)
	p := filepath.Join(dir, "blocked")
	if err := os.WriteFile(p, []byte("x"), 0o644); err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	for range many {
		wg.Go(func() {
			f, err := os.Open(p)
			if err != nil {
				t.Error(err)
				return
			}
			f.Close()
		})
	}
	for range many {
		wait(t, "handler", b.entered)
	}
	for i := range 100 {
		q := filepath.Join(dir, fmt.Sprint("free", i))
		if err := os.Mkdir(q, 0o755); err != nil {
			t.Fatal(err)
		}
		if _, err := os.Stat(q); err != nil {
			t.Fatal(err)
		}
	}
	close(b.release)
	wg.Wait()
	settled(t, tree)
}

func TestRequestsBeyondTheMaximumWait(t *testing.T) {
	tree := newMemTree()
	b := newBlocker("open")
	tree.hook = b.hook
	_, dir := up(t, tree, func(c *Config) { c.MaxRequests, c.Patience = 2, time.Hour })
	p := filepath.Join(dir, "blocked")
	if err := os.WriteFile(p, []byte("x"), 0o644); err != nil {
		t.Fatal(err)
	}
	// A handle and a lock whose end must get through. flock keeps other opens away.
	f, err := os.Create(filepath.Join(dir, "held"))
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX); err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	for range 3 {
		wg.Go(func() {
			if g, err := os.Open(p); err == nil {
				g.Close()
			}
		})
	}
	wait(t, "first handler", b.entered)
	wait(t, "second handler", b.entered)
	if err := unix.Flock(int(f.Fd()), unix.LOCK_UN); err != nil {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil { // FLUSH
		t.Fatal(err)
	}
	// A process that is killed while it waits for a place must end.
	cmd := exec.Command("cat", p)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() { _ = cmd.Wait(); close(done) }()
	wait(t, "death", done)
	close(b.release)
	wg.Wait()
}

// signalled runs a program that blocks on a file, sends it sig when the
// handler is reached, and returns how long it took to end.
func signalled(t *testing.T, b *blocker, sig syscall.Signal, script string, args ...string) (time.Duration, *exec.Cmd, string) {
	t.Helper()
	cmd := exec.Command("python3", append([]string{"-c", script}, args...)...)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Start(); err != nil {
		need.Missing(t, "needs python3: %v", err)
	}
	wait(t, "handler", b.entered)
	at := time.Now()
	if err := cmd.Process.Signal(sig); err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() { _ = cmd.Wait(); close(done) }()
	wait(t, "end of the program", done)
	return time.Since(at), cmd, out.String()
}

// A handler that raises makes Python give up instead of trying again.
const pyOpen = `
import signal, sys, os, ctypes
libc = ctypes.CDLL(None, use_errno=True)
signal.signal(signal.SIGUSR1, lambda *a: None)
fd = libc.open(sys.argv[1].encode(), 0)
print(os.strerror(ctypes.get_errno()) if fd < 0 else 'opened')
`

func TestInterrupt(t *testing.T) {
	for _, c := range []struct {
		name     string
		sig      syscall.Signal
		patience time.Duration
	}{
		{"caught", syscall.SIGUSR1, 50 * time.Millisecond},
		{"killed", syscall.SIGTERM, time.Hour}, // patience does not matter
	} {
		t.Run(c.name, func(t *testing.T) {
			tree := newMemTree()
			b := newBlocker("open")
			tree.hook = b.hook
			_, dir := up(t, tree, func(cfg *Config) { cfg.Patience = c.patience })
			p := filepath.Join(dir, "blocked")
			if err := os.WriteFile(p, []byte("x"), 0o644); err != nil {
				t.Fatal(err)
			}
			took, cmd, out := signalled(t, b, c.sig, pyOpen, p)
			ws := cmd.ProcessState.Sys().(syscall.WaitStatus)
			if c.sig == syscall.SIGTERM && (!ws.Signaled() || ws.Signal() != syscall.SIGTERM) {
				t.Fatalf("ended with %v", cmd.ProcessState)
			}
			if c.sig == syscall.SIGUSR1 && out != "Interrupted system call\n" {
				t.Fatalf("got %q, want EINTR", out)
			}
			t.Logf("after %v", took)
			settled(t, tree)
		})
	}
}

func TestSignalDoesNotBreakCallsThatFinishSoon(t *testing.T) {
	tree := newMemTree()
	b := newBlocker("open")
	tree.hook = b.hook
	m, dir := up(t, tree, func(c *Config) { c.Patience = time.Hour })
	p := filepath.Join(dir, "blocked")
	if err := os.WriteFile(p, []byte("x"), 0o644); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("python3", "-c", pyOpen, p)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Start(); err != nil {
		need.Missing(t, "needs python3: %v", err)
	}
	wait(t, "handler", b.entered)
	if err := cmd.Process.Signal(syscall.SIGUSR1); err != nil {
		t.Fatal(err)
	}
	for end := time.Now().Add(soon); ; time.Sleep(time.Millisecond) { // until INTERRUPT has come
		m.mu.Lock()
		n := 0
		for _, r := range m.requests {
			if r.timer != nil {
				n++
			}
		}
		m.mu.Unlock()
		if n > 0 {
			break
		}
		if time.Now().After(end) {
			t.Fatal("no INTERRUPT")
		}
	}
	close(b.release)
	if err := cmd.Wait(); err != nil || out.String() != "opened\n" {
		t.Fatalf("%v, %q", err, out.String())
	}
}

func TestWaitForLockIsInterruptedAtOnce(t *testing.T) {
	tree := newMemTree()
	b := newBlocker("setlk")
	tree.hook = b.hook
	_, dir := up(t, tree, func(c *Config) { c.Patience = time.Hour })
	p := filepath.Join(dir, "blocked")
	if err := os.WriteFile(p, []byte("x"), 0o644); err != nil {
		t.Fatal(err)
	}
	_, _, out := signalled(t, b, syscall.SIGUSR1, `
import signal, sys, os, ctypes
libc = ctypes.CDLL(None, use_errno=True)
signal.signal(signal.SIGUSR1, lambda *a: None)
signal.siginterrupt(signal.SIGUSR1, True)
fd = os.open(sys.argv[1], os.O_RDWR)
r = libc.flock(fd, 2)
print(os.strerror(ctypes.get_errno()) if r < 0 else 'locked')
os._exit(0)
`, p)
	if out != "Interrupted system call\n" {
		t.Fatalf("got %q", out)
	}
}

func TestInvalidateInode(t *testing.T) {
	tree := newMemTree()
	tree.valid = time.Hour
	m, dir := up(t, tree, nil)
	p := filepath.Join(dir, "f")
	if err := os.WriteFile(p, []byte("old"), 0o644); err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(p)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	seen := func() string {
		t.Helper()
		fi, err := f.Stat()
		if err != nil {
			t.Fatal(err)
		}
		b := make([]byte, fi.Size())
		if _, err := f.ReadAt(b, 0); err != nil {
			t.Fatal(err)
		}
		return string(b)
	}
	if s := seen(); s != "old" {
		t.Fatalf("read %q", s)
	}
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		t.Fatal(err)
	}
	ino := ids.Inode(st.Ino)
	tree.mu.Lock()
	n := tree.nodes[ino]
	n.data = []byte("newer")
	n.touch(true)
	tree.mu.Unlock()
	if s := seen(); s != "old" {
		t.Fatalf("the kernel asked within the promise: %q", s)
	}
	if err := m.InvalidateInode(ino, -1, 0); err != nil {
		t.Fatal(err)
	}
	if fi, err := f.Stat(); err != nil || fi.Size() != 5 {
		t.Fatalf("attributes survive: %v %v", fi, err)
	}
	if err := m.InvalidateInode(ino, 0, 0); err != nil {
		t.Fatal(err)
	}
	if s := seen(); s != "newer" {
		t.Fatalf("pages survive: %q", s)
	}
	if err := m.InvalidateInode(1<<40, 0, 0); err != nil {
		t.Fatalf("unknown inode: %v", err)
	}
	if err := m.IncEpoch(); err != nil && !errs.Has(err, errs.NotSupported) {
		t.Fatal(err)
	}
	settled(t, tree)
}

func TestPromiseIsWithdrawnAfterAPause(t *testing.T) {
	tree := newMemTree()
	tree.valid = time.Hour
	m, dir := up(t, tree, nil)
	p := filepath.Join(dir, "f")
	if err := os.WriteFile(p, []byte("old"), 0o644); err != nil {
		t.Fatal(err)
	}
	var st unix.Stat_t
	if err := unix.Stat(p, &st); err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(p)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	asked := make(chan struct{}, 100)
	tree.mu.Lock()
	tree.hook = func(_ context.Context, op, _ string, ino ids.Inode) error {
		if op == "getattr" && ino == ids.Inode(st.Ino) {
			asked <- struct{}{}
		}
		return nil
	}
	tree.mu.Unlock()
	for range 2 { // the reply of the lookup counts: no question
		if _, err := f.Stat(); err != nil {
			t.Fatal(err)
		}
	}
	if len(asked) != 0 {
		t.Fatal("the promise is not believed")
	}
	// As finish does after a reply that took too long.
	w := &worker{m: m, promised: 1, notes: []note{{ino: ids.Inode(st.Ino), until: 1 << 62}}}
	w.finish(true)
	if _, err := f.Stat(); err != nil {
		t.Fatal(err)
	}
	if len(asked) != 1 {
		t.Fatal("the promise was not withdrawn")
	}
}

func TestUnmountWithBusyMount(t *testing.T) {
	tree := newMemTree()
	_, dir, end := start(t, tree, func(c *Config) { c.Grace = 100 * time.Millisecond })
	p := filepath.Join(dir, "f")
	if err := os.WriteFile(p, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(p, 8192); err != nil {
		t.Fatal(err)
	}
	mem := newMapping(t, p)
	mem.do("store mapped")
	if err := end(); err != nil {
		t.Fatal(err)
	}
	if s := mem.do("write"); s == "done" {
		t.Fatal("written after the end")
	}
	if l, err := os.ReadDir(dir); err != nil || len(l) != 0 {
		t.Fatalf("still mounted: %v %v", l, err)
	}
	if !bytes.HasPrefix(tree.nodes[2].data[4096:], []byte("mapped")) {
		t.Fatal("dirty mapped pages were lost")
	}
}

func TestUnmountWithBlockedHandler(t *testing.T) {
	tree := newMemTree()
	b := newBlocker("open")
	tree.hook = b.hook
	_, dir, end := start(t, tree, func(c *Config) { c.Grace = 100 * time.Millisecond })
	p := filepath.Join(dir, "blocked")
	if err := os.WriteFile(p, []byte("x"), 0o644); err != nil {
		t.Fatal(err)
	}
	opened := make(chan error, 1)
	go func() {
		_, err := os.Open(p)
		opened <- err
	}()
	wait(t, "handler", b.entered)
	if err := end(); err != nil {
		t.Fatal(err)
	}
	if err := <-opened; err == nil {
		t.Fatal("opened after the end")
	}
}

func TestForeignUnmountAndAbortEndRun(t *testing.T) {
	for name, f := range map[string]func(m *Mount, dir string) error{
		"umount": func(_ *Mount, dir string) error { return unix.Unmount(dir, 0) },
		"abort":  func(m *Mount, _ string) error { return m.Abort() },
		"control": func(m *Mount, _ string) error {
			if err := m.abortByControl(); err != nil {
				need.Missing(t, "no control file system: %v", err)
			}
			return nil
		},
	} {
		t.Run(name, func(t *testing.T) {
			need.Root(t, "to mount")
			dir := t.TempDir()
			m := New(Config{Dir: dir, Tree: newMemTree(), Guard: true})
			m.limit = longest
			ran := make(chan error, 1)
			go func() { ran <- m.Run(context.Background()) }()
			select {
			case <-m.Ready():
			case err := <-ran:
				need.Missing(t, "not mounted: %v", err)
			}
			if err := f(m, dir); err != nil {
				t.Fatal(err)
			}
			select {
			case err := <-ran:
				if !errs.Has(err, errs.Unavailable) {
					t.Fatal(err)
				}
			case <-time.After(soon):
				t.Fatal("Run goes on")
			}
			if err := m.InvalidateInode(1, 0, 0); err != nil {
				t.Fatal(err)
			}
			if l, err := os.ReadDir(dir); err != nil || len(l) != 0 {
				t.Fatalf("still mounted: %v %v", l, err)
			}
		})
	}
}

// Files in the runtime's own epoll set, from the first moment on and many at
// once: the test's process is the server.
func TestOwnFilesMayBePolled(t *testing.T) {
	_, dir := up(t, newMemTree(), nil)
	var wg sync.WaitGroup
	for i := range 20 {
		wg.Go(func() {
			f, err := os.Create(filepath.Join(dir, fmt.Sprint(i)))
			if err != nil {
				t.Error(err)
				return
			}
			defer f.Close()
			if err := f.SetDeadline(time.Now().Add(soon)); err != nil && !errors.Is(err, os.ErrNoDeadline) {
				t.Error(err)
			}
			if _, err := f.WriteString("x"); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
}

func TestMountErrors(t *testing.T) {
	if err := New(Config{Dir: "relative", Tree: newMemTree()}).Run(t.Context()); !errs.Has(err, errs.Invalid) {
		t.Fatal(err)
	}
	need.Root(t, "to mount")
	if err := New(Config{Dir: filepath.Join(t.TempDir(), "absent"), Tree: newMemTree()}).Run(t.Context()); !errs.Has(err, errs.NotFound) {
		t.Fatal(err)
	}
}
