package proc

import (
	"io"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
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
	if !strings.Contains(stderr.String(), "node n2 (host2) went silent: the command's fate is unknown there, it is killed within 3 s") {
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
	if _, err := exec.LookPath("make"); err != nil {
		t.Skip("needs make")
	}
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
