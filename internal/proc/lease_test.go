package proc

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/unum-os/unum/internal/ids"
	"github.com/unum-os/unum/internal/need"
)

// TestCut: the home's node and the job's are cut off from each other. The job
// must be dead in four seconds and its caller told in five.
func TestCut(t *testing.T) {
	r := newRig(t)
	defer r.f.cut.Store(false)
	c := r.cmd("run", "sh", "-c", "echo up; sleep 1000")
	out, _ := c.StdoutPipe()
	var stderr strings.Builder
	c.Stderr = &stderr
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	io.ReadFull(out, make([]byte, 3))
	start := time.Now()
	r.f.cut.Store(true)
	dead := make(chan time.Duration, 1)
	j := r.only()
	go func() {
		<-j.over
		dead <- time.Since(start)
	}()
	c.Wait()
	told := time.Since(start)
	if told > 5*time.Second || c.ProcessState.ExitCode() != 125 {
		t.Errorf("told after %v: %v", told, c.ProcessState)
	}
	if !strings.Contains(stderr.String(), "node n2 (host2) went silent: whether the command ended there is unknown; if it still runs, it is killed within 3 s") {
		t.Errorf("stderr %q", stderr.String())
	}
	select {
	case d := <-dead:
		if d > 4*time.Second {
			t.Errorf("killed after %v", d)
		}
	case <-time.After(time.Second):
		t.Error("not killed")
	}
	if got := j.record(); got.State != Killed {
		t.Errorf("%+v", got)
	}
}

// TestManagerStopped: the manager of the job's node does nothing any more; the
// shim alone ends the job when its lease is over.
func TestManagerStopped(t *testing.T) {
	r := newRig(t)
	c := r.cmd("run", "sh", "-c", "echo up; sleep 1000")
	out, _ := c.StdoutPipe()
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	io.ReadFull(out, make([]byte, 3))
	j := r.only()
	start := time.Now()
	j.mu.Lock() // nothing passes: no renewal, no kill
	fd, err := unix.PidfdOpen(j.proc.Pid, 0)
	if err == nil {
		defer unix.Close(fd)
		_, err = unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 10000)
	}
	d := time.Since(start)
	j.mu.Unlock()
	if err != nil || d > 4*time.Second {
		t.Errorf("killed after %v, %v", d, err)
	}
	c.Wait()
	if c.ProcessState.ExitCode() != 125 {
		t.Errorf("%v", c.ProcessState)
	}
}

// TestExitBeatsLoss: silence after the exit status changes nothing.
func TestExitBeatsLoss(t *testing.T) {
	r := newRig(t)
	c := r.cmd("run", "sh", "-c", "head -c 1000000 /dev/zero; exit 6")
	out, _ := c.StdoutPipe()
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	io.ReadFull(out, make([]byte, 100))
	// The caller reads nothing for longer than any lease: the job has ended, or
	// waits for its reader, and neither is silence.
	time.Sleep(silence + time.Second)
	n, _ := io.Copy(io.Discard, out)
	c.Wait()
	if n != 1000000-100 || c.ProcessState.ExitCode() != 6 {
		t.Errorf("%d bytes, %v", n, c.ProcessState)
	}
}

// only returns the one job of n2.
func (r *rig) only() *job {
	r.t.Helper()
	js := r.mgrs[2].Jobs()
	if len(js) != 1 {
		r.t.Fatalf("%d jobs on n2", len(js))
	}
	j, _, _ := r.mgrs[2].find(js[0].Record.Job)
	return j
}

func TestHomeStops(t *testing.T) {
	r := newRig(t)
	c := r.cmd("run", "sh", "-c", "echo up; sleep 1000")
	out, _ := c.StdoutPipe()
	var stderr strings.Builder
	c.Stderr = &stderr
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	io.ReadFull(out, make([]byte, 3))
	pid := r.only().proc.Pid
	r.stop()
	c.Wait()
	if c.ProcessState.ExitCode() != 125 || !strings.HasPrefix(stderr.String(), "unum: run: ") {
		t.Errorf("%v, %q", c.ProcessState, stderr.String())
	}
	if born(pid) != 0 {
		t.Error("the job outlived the daemon")
	}
	r.up()
}

func TestMake(t *testing.T) {
	need.Program(t, "make")
	r := newRig(t)
	dir := t.TempDir()
	os.WriteFile(dir+"/Makefile", []byte("all: a b c d\n%:\n\t@echo $@ on $$UNUM_NODE; test $@ != d\n"), 0o644)
	c := exec.Command("make", "-j4", "-k", "SHELL="+unumBin+" sh")
	c.Dir, c.Env = dir, append(os.Environ(), "UNUM_SOCKET="+r.sock)
	got := r.finish(c, nil)
	for _, x := range []string{"a", "b", "c", "d"} {
		if !strings.Contains(got.out, x+" on n2\n") {
			t.Errorf("no line of %s in %q", x, got.out)
		}
	}
	if got.code != 2 {
		t.Errorf("%+v", got)
	}
}

// slowDir mounts a file system that answers nothing but its greeting until the
// function it returns is called, and from then on that nothing is there. asked is
// closed at the first question.
func slowDir(t *testing.T) (dir string, asked <-chan struct{}, answer func()) {
	t.Helper()
	fd, err := unix.Open("/dev/fuse", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		need.Missing(t, "needs /dev/fuse: %v", err)
	}
	dir = t.TempDir()
	if err := unix.Mount("slow", dir, "fuse", unix.MS_NOSUID|unix.MS_NODEV, fmt.Sprintf("fd=%d,rootmode=40000,user_id=0,group_id=0,allow_other", fd)); err != nil {
		unix.Close(fd)
		need.Missing(t, "needs FUSE: %v", err)
	}
	f := os.NewFile(uintptr(fd), "/dev/fuse")
	first, open := make(chan struct{}), make(chan struct{})
	done := make(chan struct{})
	go func() {
		defer close(done)
		b := make([]byte, 256<<10)
		for asking := false; ; {
			n, err := f.Read(b)
			if errors.Is(err, unix.ENOENT) {
				continue // a question taken back
			}
			if err != nil || n < 40 {
				return // closed
			}
			// fuse_in_header: length, opcode, unique; fuse_out_header: length, error, unique.
			op := binary.NativeEndian.Uint32(b[4:])
			out := make([]byte, 16, 80)
			copy(out[8:], b[8:16])
			switch op {
			case 26: // FUSE_INIT: version 7.31, all else its default
				out = out[:80]
				binary.NativeEndian.PutUint32(out[16:], 7)
				binary.NativeEndian.PutUint32(out[20:], 31)
				binary.NativeEndian.PutUint32(out[36:], 4096) // max_write
			case 2, 36, 42: // forget, interrupt, batch forget: no answer
				continue
			default:
				if !asking {
					asking = true
					close(first)
				}
				<-open
				binary.NativeEndian.PutUint32(out[4:], ^uint32(unix.ENOENT)+1) // -ENOENT
			}
			binary.NativeEndian.PutUint32(out, uint32(len(out)))
			f.Write(out)
		}
	}()
	answer = sync.OnceFunc(func() { close(open) })
	t.Cleanup(func() {
		answer()
		unix.Unmount(dir, unix.MNT_DETACH)
		f.Close()
		<-done
	})
	return dir, first, answer
}

// TestSlowStart: a start that takes longer than any lease is no silence.
func TestSlowStart(t *testing.T) {
	r := newRig(t)
	dir, asked, answer := slowDir(t)
	c := r.cmd("run", "--env", "PATH="+dir+":/bin:/usr/bin", "sh", "-c", "exit 7")
	var stderr strings.Builder
	c.Stderr = &stderr
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	select {
	case <-asked:
	case <-time.After(20 * time.Second):
		t.Error("the program is not looked for")
	}
	time.Sleep(silence + 2*watchTick + time.Second)
	answer()
	c.Wait()
	if c.ProcessState.ExitCode() != 7 || stderr.Len() > 0 {
		t.Errorf("%v, %q", c.ProcessState, stderr.String())
	}
}

// breakable is a stream that breaks when told: its reader gets an error, not an
// end.
type breakable struct {
	net.Conn
	broken *atomic.Bool
	seen   chan struct{}
	once   sync.Once
}

func (b *breakable) Read(p []byte) (int, error) {
	n, err := b.Conn.Read(p)
	if err == io.EOF && b.broken.Load() {
		b.once.Do(func() { close(b.seen) })
		return n, io.ErrUnexpectedEOF
	}
	return n, err
}

func (b *breakable) CloseWrite() error { return b.Conn.(*cuttable).CloseWrite() }

// TestBrokenInput: the end of the way to the home is not the end of input.
func TestBrokenInput(t *testing.T) {
	r := newRig(t)
	var broken atomic.Bool
	seen := make(chan struct{})
	e := r.f.get(2)
	plain := e.streams[streamIO]
	e.streams[streamIO] = func(ctx context.Context, from ids.Node, c net.Conn) {
		plain(ctx, from, &breakable{Conn: c, broken: &broken, seen: seen})
	}
	dir := t.TempDir()
	c := r.cmd("run", "sh", "-c", "cat > "+dir+"/x; mv "+dir+"/x "+dir+"/done")
	in, err := c.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	io.WriteString(in, "half of it")
	until(t, "input arrives", func() bool { b, _ := os.ReadFile(dir + "/x"); return len(b) > 0 })
	broken.Store(true)
	in.Close()
	<-seen
	for end := time.Now().Add(time.Second); time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
		if _, err := os.Stat(dir + "/done"); err == nil {
			t.Fatal("the command took half of its input for all")
		}
	}
	c.Process.Kill()
	c.Wait()
	until(t, "the job is gone", func() bool { return len(r.mgrs[2].Jobs()) == 0 })
	if _, err := os.Stat(dir + "/done"); err == nil {
		t.Error("the command took half of its input for all")
	}
}

// TestBrokenOutput: output that was lost on the way is not passed over in
// silence.
func TestBrokenOutput(t *testing.T) {
	r := newRig(t)
	r.home.cfg.RPC = &torn{r.f.get(1)}
	if got := r.run(nil, "run", "echo", "x"); got.code != 125 || !strings.Contains(got.err, "a part of the output was lost on the way from node n2 (host2)") {
		t.Errorf("%+v", got)
	}
}

// torn is an endpoint whose output streams break at their end.
type torn struct{ *endpoint }

func (x *torn) Dial(ctx context.Context, to ids.Node, service string) (net.Conn, error) {
	c, err := x.endpoint.Dial(ctx, to, service)
	if err != nil || service != streamIO {
		return c, err
	}
	b := &breakable{Conn: c, broken: new(atomic.Bool), seen: make(chan struct{})}
	b.broken.Store(true)
	return b, nil
}

// TestUnreadableInput: a caller's input that cannot be read fails the command
// line, not only the command.
func TestUnreadableInput(t *testing.T) {
	r := newRig(t)
	dir, err := os.Open("/")
	if err != nil {
		t.Fatal(err)
	}
	defer dir.Close()
	c := r.cmd("run", "cat")
	var stderr strings.Builder
	c.Stdin, c.Stderr = dir, &stderr
	c.Run()
	if c.ProcessState.ExitCode() != 125 || !strings.Contains(stderr.String(), "cannot read stdin: is a directory") {
		t.Errorf("%v, %q", c.ProcessState, stderr.String())
	}
}
