package test

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// in is the cluster for a subtest, whose failures are its own.
func (c *cluster) in(t *testing.T) *cluster {
	s := *c
	s.t = t
	return &s
}

// point is a moment to interrupt a command: after so many lines of its output,
// or so long after its start.
type point struct {
	lines int
	delay time.Duration
}

func (p point) String() string {
	if p.lines > 0 {
		return fmt.Sprintf("line %d", p.lines)
	}
	return p.delay.Round(time.Millisecond).String()
}

// points are the first lines of output, and moments spread at random over the
// time that the command takes to its end.
func points(lines, moments int, over time.Duration) []point {
	if testing.Short() {
		moments = min(moments, 2)
	}
	var ps []point
	for i := range lines {
		ps = append(ps, point{lines: i + 1})
	}
	for i := range moments {
		part := over / time.Duration(moments)
		ps = append(ps, point{delay: time.Duration(i)*part + rand.N(part)})
	}
	return ps
}

// wait waits for the point, or until the command has ended.
func (p point) wait(out *lines, ended func() bool) {
	if p.lines == 0 {
		time.Sleep(p.delay) // this is what is tested
		return
	}
	for end := time.Now().Add(20 * time.Second); out.count() < p.lines && !ended() && time.Now().Before(end); {
		time.Sleep(time.Millisecond)
	}
}

// interrupted checks the exit code of what was interrupted.
func interrupted(t *testing.T, what string, code int, out fmt.Stringer) {
	t.Helper()
	if code != 130 {
		t.Errorf("%s, interrupted: code %d, want 130: %v", what, code, out)
	}
}

// interruptRun interrupts commands on their way to another node and there.
func interruptRun(t *testing.T, c *cluster) {
	const forever = "7654321"
	start := func(command ...string) (*exec.Cmd, *lines) {
		cmd := exec.Command(c.bin, append([]string{"lab", "exec", "--name", c.name, "n1", "--", c.bin, "run", "--on", "n3"}, command...)...)
		out := &lines{}
		cmd.Stdout, cmd.Stderr = out, out
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		return cmd, out
	}
	for _, p := range points(1, 12, 80*time.Millisecond) {
		// It prints a line and waits. No shell: dash misses an interrupt of its group
		// while it starts a command, run or not run by Unum.
		cmd, out := start("tail", "-n", "1", "-f", "-s", forever, "/etc/passwd")
		p.wait(out, func() bool { return false })
		if err := cmd.Process.Signal(syscall.SIGINT); err != nil {
			t.Fatal(err)
		}
		interrupted(t, "run at "+p.String(), waitFor(t, cmd, out), out)
	}
	// It is the command's to decide what an interrupt is.
	cmd, out := start("sh", "-c", "trap 'exit 7' INT; echo started; while :; do sleep 0.01; done")
	point{lines: 1}.wait(out, func() bool { return false })
	if err := cmd.Process.Signal(syscall.SIGINT); err != nil {
		t.Fatal(err)
	}
	if code := waitFor(t, cmd, out); code != 7 {
		t.Errorf("a command that catches it ends with code %d: %v", code, out)
	}
	until(t, "nothing is left of the interrupted commands", 15*time.Second, func() bool {
		ps := c.must("n3", "UNUM ps; grep -l -a '[7]"+forever[1:]+"' /proc/[0-9]*/cmdline 2>/dev/null; true")
		return !strings.Contains(ps, forever) && !strings.Contains(ps, "/proc/")
	})
	if got := c.must("n1", "UNUM run --on n3 echo again"); got != "again\n" {
		t.Errorf("the next command says %q", got)
	}
}

// whole checks that a data directory is none, or a node's, or what a join keeps
// for the next attempt: the key for which the cluster may have given a node.
func (s *second) whole(t *testing.T, join bool) {
	t.Helper()
	left := strings.Fields(s.c.run(s.node, "cd "+s.dir()+" && find . -type f ! -name lock | sort").out) // whose lock it was has ended
	for _, f := range left {
		if f == "./node.json" {
			return
		}
	}
	if len(left) > 0 && !(join && strings.Join(left, " ") == "./identity/node.csr ./identity/node.key") {
		t.Errorf("half a node was left: %v", left)
	}
}

// TestInterruptUp presses Ctrl-C at every moment of `unum up`, and says it again.
func TestInterruptUp(t *testing.T) {
	t.Parallel()
	c := up(t, 1)
	for i, p := range points(4, 5, 400*time.Millisecond) {
		t.Run(p.String(), func(t *testing.T) {
			t.Parallel()
			s := c.in(t).second("n1", fmt.Sprintf("up%d", i), 8000+i)
			d := s.launch("up")
			p.wait(d.out, d.out.ended)
			interrupted(t, "up", d.stop(syscall.SIGINT), d.out)
			s.gone(t)
			s.whole(t, false)
			d = s.launch("up")
			d.healthy()
			interrupted(t, "up when healthy", d.stop(syscall.SIGINT), d.out)
			s.gone(t)
			s.erase()
		})
	}
}

// TestInterruptJoin does the same with `unum join`: said again with the same
// token, it makes one node.
func TestInterruptJoin(t *testing.T) {
	for i, p := range points(3, 5, 300*time.Millisecond) {
		t.Run(p.String(), func(t *testing.T) {
			t.Parallel()
			c := up(t, 1)
			s := c.second("n1", "joiner", 8100+i)
			first := strings.TrimSpace(c.must("n1", "hostname -I"))
			verb := "join " + first + ":7400 " + strings.TrimSpace(c.must("n1", "UNUM token --quiet"))
			d := s.launch(verb)
			p.wait(d.out, d.out.ended)
			interrupted(t, "join", d.stop(syscall.SIGINT), d.out)
			s.gone(t)
			s.whole(t, true)
			d = s.launch(verb)
			d.healthy()
			if got := c.must("n1", "echo joined > /unum/f && cat "+s.run()+"/tree/f; UNUM nodes | tail -n +2 | wc -l"); got != "joined\n2\n" {
				t.Errorf("after it was said again: %q", got)
			}
			interrupted(t, "join when healthy", d.stop(syscall.SIGINT), d.out)
			s.gone(t)
		})
	}
}

// TestInterruptLeave presses Ctrl-C while a command keeps a node from leaving: it
// is said that the node stays, and it does.
func TestInterruptLeave(t *testing.T) {
	t.Parallel()
	c := up(t, 2)
	job := strings.TrimSpace(c.must("n1", "UNUM run -d --on n2 sleep 7654322"))
	cmd := exec.Command(c.bin, "lab", "exec", "--name", c.name, "n2", "--", c.bin, "leave")
	out := &lines{}
	cmd.Stdout, cmd.Stderr = out, out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	until(t, "it waits for the command", 30*time.Second, func() bool { return strings.Contains(out.String(), "for 1 commands") })
	if got := c.must("n1", "UNUM nodes --json"); !strings.Contains(got, `"leaving"`) {
		t.Errorf("while it leaves: %s", got)
	}
	if err := cmd.Process.Signal(syscall.SIGINT); err != nil {
		t.Fatal(err)
	}
	interrupted(t, "leave", waitFor(t, cmd, out), out)
	if !strings.Contains(out.String(), "unum: interrupted: this node stays") {
		t.Errorf("it said %s", out)
	}
	if got := c.must("n2", "UNUM nodes --json"); strings.Contains(got, `"leaving"`) {
		t.Errorf("after that: %s", got)
	}
	c.must("n1", "UNUM kill "+job)
}

// labRemains lists what there is of a lab on this machine.
func labRemains(name string) []string {
	out, _ := exec.Command("sh", "-c", strings.ReplaceAll(`
		ls -d /run/unum-lab/LAB* /var/lib/unum-lab/LAB 2>/dev/null
		ls -d /sys/fs/cgroup/*/unum-lab/LAB /sys/fs/cgroup/unum-lab/LAB 2>/dev/null
		grep -l /LAB/ /sys/block/loop*/loop/backing_file 2>/dev/null
		grep LAB /proc/self/mounts
		for p in /proc/[0-9]*; do case "$(tr '\0' ' ' < $p/cmdline 2>/dev/null)" in
			"unum-lab lab __init LAB "*) echo process $p;; esac; done`, "LAB", name)).Output()
	return strings.Fields(string(out))
}

// TestInterruptLabUp presses Ctrl-C at every moment of `unum lab up`.
func TestInterruptLabUp(t *testing.T) {
	needRoot(t)
	t.Parallel()
	bin := builtBinary(t)
	name := fmt.Sprintf("ti%d", os.Getpid())
	lab := func(args ...string) (*exec.Cmd, *lines) {
		cmd := exec.Command(bin, append([]string{"lab"}, args...)...)
		cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} // what a terminal would interrupt
		out := &lines{}
		cmd.Stdout, cmd.Stderr = out, out
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		return cmd, out
	}
	defer func() {
		cmd, out := lab("down", "--name", name)
		if err := cmd.Wait(); err != nil {
			t.Errorf("lab down: %v: %s", err, out)
		}
	}()
	if left := labRemains(name); len(left) > 0 {
		t.Fatalf("there is a %s already: %v", name, left)
	}
	early := 0
	for _, p := range points(3, 7, 900*time.Millisecond) {
		cmd, out := lab("up", "--name", name, "--nodes", "2", "--disk-size", "1G")
		p.wait(out, func() bool { return false })
		if err := syscall.Kill(-cmd.Process.Pid, syscall.SIGINT); err != nil && err != syscall.ESRCH {
			t.Fatal(err)
		}
		code := waitFor(t, cmd, out)
		if code == 0 { // it was ready
			down, said := lab("down", "--name", name)
			if err := down.Wait(); err != nil {
				t.Fatalf("at %v it was ready; lab down: %v: %s", p, err, said)
			}
		} else {
			early++
			interrupted(t, "lab up at "+p.String(), code, out)
		}
		if left := labRemains(name); len(left) > 0 {
			t.Fatalf("interrupted at %v, lab up left %v; it said %s", p, left, out)
		}
	}
	if early < 4 {
		t.Errorf("only %d attempts were interrupted before their end", early)
	}
	cmd, out := lab("up", "--name", name, "--nodes", "2", "--disk-size", "1G")
	if err := cmd.Wait(); err != nil {
		t.Fatalf("the same command without an interrupt: %v: %s", err, out)
	}
}

// TestMissingPrivileges starts a node where something that it needs is missing:
// one sentence says what and what to do, and nothing is made.
func TestMissingPrivileges(t *testing.T) {
	needRoot(t)
	bin := builtBinary(t)
	const noDev = "mount -t tmpfs -o mode=755 none /dev && mknod -m 666 /dev/null c 1 3 && mknod -m 666 /dev/loop-control c 10 237 && "
	for _, v := range []struct {
		name, before string // words before the command, run by sh in mounts of its own
		nobody       bool
		want         []string
	}{
		{"not root", "", true, []string{"root", "try: sudo unum"}},
		{"no /dev/fuse", noDev, false, []string{"/dev/fuse", "no such file", "try: modprobe fuse"}},
		{"/dev/fuse without its driver", noDev + "mknod -m 666 /dev/fuse c 10 254 && ", false, []string{"/dev/fuse", "try: modprobe fuse"}},
		{"root of a container", "exec setpriv --bounding-set=-sys_admin ", false, []string{"this root may", "--privileged"}},
	} {
		for _, verb := range []string{"up", "join 127.0.0.1:1 TOKEN", "lab up --name nolab"} {
			t.Run(v.name+": "+verb, func(t *testing.T) {
				base, err := os.MkdirTemp("", "unum-bad-") // not t.TempDir: anybody may write here, so that what is not made was not tried
				if err != nil {
					t.Fatal(err)
				}
				defer os.RemoveAll(base)
				if err := os.Chmod(base, 0o777); err != nil {
					t.Fatal(err)
				}
				args := " --dir " + base + "/data"
				if !strings.HasPrefix(verb, "lab") {
					args += " --mount " + base + "/tree --addr 127.0.0.1:8200"
				}
				ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
				defer cancel()
				f, err := os.Open(bin)
				if err != nil {
					t.Fatal(err)
				}
				defer f.Close()
				// By a descriptor: to nobody the way to the file may be closed.
				cmd := exec.CommandContext(ctx, "/bin/sh", "-c", v.before+"/proc/self/fd/3 "+verb+args)
				cmd.ExtraFiles = []*os.File{f}
				cmd.Env = append(os.Environ(), "UNUM_SOCKET="+base+"/run/sock", "HOME="+base)
				cmd.Dir = "/"
				var out, errOut lines
				cmd.Stdout, cmd.Stderr = &out, &errOut
				cmd.SysProcAttr = &syscall.SysProcAttr{}
				if v.nobody {
					cmd.SysProcAttr.Credential = &syscall.Credential{Uid: 65534, Gid: 65534}
				} else {
					cmd.SysProcAttr.Unshareflags = syscall.CLONE_NEWNS
				}
				_ = cmd.Run() // the state says it better
				sentence(t, verb, result{out.String(), errOut.String(), cmd.ProcessState.ExitCode()}, 125, v.want...)
				if made, _ := filepath.Glob(base + "/*"); len(made) > 0 {
					t.Errorf("it made %v", made)
				}
				if left := labRemains("nolab"); len(left) > 0 {
					t.Errorf("it made %v", left)
				}
				if b, err := os.ReadFile("/proc/self/mounts"); err != nil || strings.Contains(string(b), base) {
					t.Errorf("it is mounted, or %v", err)
				}
			})
		}
	}
}
