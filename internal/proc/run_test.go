package proc

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/unum-os/unum/internal/control"
	"github.com/unum-os/unum/internal/errs"
)

func TestExitCodes(t *testing.T) {
	r := newRig(t)
	for _, c := range []struct {
		args []string
		code int
		err  string
	}{
		{[]string{"true"}, 0, ""},
		{[]string{"sh", "-c", "exit 7"}, 7, ""},
		{[]string{"sh", "-c", "exit 125"}, 125, ""},
		{[]string{"sh", "-c", "exit 255"}, 255, ""},
		{[]string{"sh", "-c", "kill -TERM $$"}, 143, ""},
		{[]string{"sh", "-c", "kill -KILL $$"}, 137, ""},
		{[]string{"sh", "-c", "kill -SEGV $$"}, 139, ""},
		{[]string{"nosuchprogram"}, 127, "unum: nosuchprogram: command not found\n"},
		{[]string{""}, 127, "unum: : command not found\n"},
		{[]string{"/no/such/program"}, 127, "unum: /no/such/program: No such file or directory\n"},
		{[]string{"/etc"}, 126, "unum: /etc: Is a directory\n"},
		{[]string{"/etc/passwd"}, 126, "unum: /etc/passwd: Permission denied\n"},
		{[]string{"/etc/passwd/x"}, 126, "unum: /etc/passwd/x: Not a directory\n"},
		{[]string{"--timeout", "100ms", "sleep", "60"}, 124, "unum: run: the time limit of 100ms is over\n"},
	} {
		got := r.run(nil, append([]string{"run"}, c.args...)...)
		if got.code != c.code || got.err != c.err {
			t.Errorf("%v: %+v, want code %d, stderr %q", c.args, got, c.code, c.err)
		}
	}
	for _, args := range [][]string{{"run"}, {"run", "--nosuch", "true"}, {"run", "--on", "n9", "true"}, {"run", "--timeout", "x", "true"}} {
		if got := r.run(nil, args...); got.code != 125 || !strings.HasPrefix(got.err, "unum: run: ") {
			t.Errorf("%v: %+v, want code 125 and a sentence", args, got)
		}
	}
	c := r.cmd("run", "true")
	c.Env = append(os.Environ(), "UNUM_SOCKET=/nonexistent/sock")
	if got := r.finish(c, nil); got.code != 125 || !strings.Contains(got.err, "try: "+control.RemedyStart) {
		t.Errorf("without a daemon: %+v", got)
	}
}

// TestSurroundings compares what a command sees here and there.
func TestSurroundings(t *testing.T) {
	r := newRig(t)
	dir := t.TempDir()
	var all []byte
	for b := 1; b < 256; b++ {
		all = append(all, byte(b))
	}
	show := `printf '%s\0' "$@" "$ODD"; pwd; umask; ulimit -n; ulimit -Hn; ulimit -c; nice; id -u; id -g; id -G; grep SigBlk /proc/self/status; echo $((0x$(sed -n 's/^SigIgn:[^0-9a-f]*//p' /proc/self/status) & ~0x180000000))` // 32 and 33 are the C library's: make leaves them ignored
	args := []string{"sh", "-c", show, "sh", "", "a b", "$HOME", "*", "-n", "new\nline", string(all)}
	wrap := func(run ...string) *exec.Cmd {
		// A caller with settings of its own, whatever this test was started with.
		c := exec.Command("/bin/sh", append([]string{"-c", `umask 027; ulimit -c 0; ulimit -Sn 777; exec env --default-signal nice -n 3 setpriv --reuid 1234 --regid 2345 --groups 2345,3456 "$@"`, "sh"}, append(run, args...)...)...)
		c.Env = append(os.Environ(), "ODD="+string(all), "UNUM_SOCKET="+r.sock)
		c.Dir = dir
		return c
	}
	os.Chmod(dir, 0o755)
	for p := filepath.Dir(dir); strings.HasPrefix(p, os.TempDir()+"/"); p = filepath.Dir(p) {
		os.Chmod(p, 0o755)
	}
	here, there := r.finish(wrap(), nil), r.finish(wrap(unumBin, "run"), nil)
	if here.code != 0 || here != there {
		t.Errorf("here  %+v\nthere %+v", here, there)
	}
	got := r.run(nil, "run", "--env", "A=1", "-e", "A=2", "-e", "PATH=/bin:/usr/bin", "sh", "-c", "echo $A $PATH $UNUM_NODE $UNUM_SOCKET; test $$ -ne 1 && echo $PPID; ls /proc/self/fd | wc -l")
	if want := "2 /bin:/usr/bin n2 " + r.sock + "\n1\n4\n"; got.out != want {
		t.Errorf("environment: %+v, want %q", got, want)
	}
}

// TestTimerSlack: the daemon's coarse timers are not for its commands.
func TestTimerSlack(t *testing.T) {
	slack := func(v string) {
		tasks, err := os.ReadDir("/proc/self/task")
		if err != nil {
			t.Fatal(err)
		}
		for _, task := range tasks {
			if err := os.WriteFile("/proc/"+task.Name()+"/timerslack_ns", []byte(v), 0); err != nil && !os.IsNotExist(err) {
				t.Fatal(err)
			}
		}
	}
	if os.Geteuid() == 0 { // else newRig skips
		slack("1000000")
		defer slack("50000")
	}
	r := newRig(t)
	got := r.run(nil, "run", "cat", "/proc/1/timerslack_ns", "/proc/self/timerslack_ns") // the shim's, the program's
	if want := "1000000\n50000\n"; got.out != want {
		t.Errorf("%+v, want %q", got, want)
	}
}

func TestIgnoredSignals(t *testing.T) {
	r := newRig(t)
	c := exec.Command("/bin/sh", "-c", `trap "" HUP INT; exec "$@"`, "sh", unumBin, "run", "grep", "SigIgn", "/proc/self/status")
	c.Env = append(os.Environ(), "UNUM_SOCKET="+r.sock)
	if got := r.finish(c, nil); got.out != "SigIgn:\t0000000000000003\n" {
		t.Errorf("%+v, want HUP and INT ignored and nothing else", got)
	}
}

func TestWorkingDirectory(t *testing.T) {
	r := newRig(t)
	gone := filepath.Join(t.TempDir(), "gone")
	os.Mkdir(gone, 0o755)
	c := exec.Command("/bin/sh", "-c", `rmdir "$PWD"; exec "$@"`, "sh", unumBin, "run", "sh", "-c", "ls -a; touch x 2>/dev/null || echo refused; exit 3")
	c.Dir, c.Env = gone, append(os.Environ(), "UNUM_SOCKET="+r.sock)
	if got := r.finish(c, nil); got.code != 3 || !strings.HasSuffix(got.out, "refused\n") {
		t.Errorf("removed directory: %+v", got)
	}
	closed := filepath.Join(t.TempDir(), "closed")
	os.MkdirAll(filepath.Join(closed, "in"), 0o755)
	os.Chmod(closed, 0o700)
	c = exec.Command("setpriv", "--reuid", "1234", "--clear-groups", unumBin, "run", "true")
	c.Dir, c.Env = filepath.Join(closed, "in"), append(os.Environ(), "UNUM_SOCKET="+r.sock)
	if got := r.finish(c, nil); got.code != 125 || !strings.Contains(got.err, "cannot enter the working directory "+closed) {
		t.Errorf("closed directory: %+v", got)
	}
}

func TestStreams(t *testing.T) {
	r := newRig(t)
	got := r.run(strings.NewReader("abc"), "run", "sh", "-c", "echo out; echo err >&2; cat")
	if got != (result{0, "out\nabc", "err\n"}) {
		t.Errorf("%+v", got)
	}
	got = r.run(nil, "sh", "-c", "echo $UNUM_NODE $((6*7))")
	if got != (result{0, "n2 42\n", ""}) {
		t.Errorf("%+v", got)
	}
	// One open file for both keeps their order.
	c := r.cmd("run", "sh", "-c", "for i in 1 2 3 4 5 6 7 8 9; do echo o$i; echo e$i >&2; done")
	var b bytes.Buffer
	c.Stdout = &b
	c.Stderr = c.Stdout
	if err := c.Run(); err != nil || b.String() != "o1\ne1\no2\ne2\no3\ne3\no4\ne4\no5\ne5\no6\ne6\no7\ne7\no8\ne8\no9\ne9\n" {
		t.Errorf("%v, %q", err, b.String())
	}
	// A descriptor the caller does not have.
	for _, redirect := range []string{"<&-", ">&-", "2>&-", "<&- >&- 2>&-"} {
		c := exec.Command("/bin/sh", "-c", `"$@" `+redirect, "sh", unumBin, "run", "sh", "-c", "cat; exit 5")
		c.Env = append(os.Environ(), "UNUM_SOCKET="+r.sock)
		if got := r.finish(c, nil); got.code != 5 {
			t.Errorf("%s: %+v", redirect, got)
		}
	}
	// Output that cannot be written is the caller's to know.
	c = exec.Command("/bin/sh", "-c", `"$@" >/dev/full`, "sh", unumBin, "run", "echo", "x")
	c.Env = append(os.Environ(), "UNUM_SOCKET="+r.sock)
	if got := r.finish(c, nil); got.code != 125 || !strings.Contains(got.err, "no space left") {
		t.Errorf("/dev/full: %+v", got)
	}
}

// pattern is a reader of n bytes that repeat with no power of two.
type pattern struct{ at, n int }

func (p *pattern) Read(b []byte) (int, error) {
	if p.at == p.n {
		return 0, io.EOF
	}
	n := min(len(b), p.n-p.at)
	for i := range b[:n] {
		b[i] = byte((p.at + i) % 251)
	}
	p.at += n
	return n, nil
}

func TestBulk(t *testing.T) {
	r := newRig(t)
	const n = 64 << 20
	c := r.cmd("run", "cat")
	c.Stdin = &pattern{n: n}
	h := sha256.New()
	c.Stdout = h
	if err := c.Run(); err != nil {
		t.Fatal(err)
	}
	w := sha256.New()
	io.Copy(w, &pattern{n: n})
	if !bytes.Equal(h.Sum(nil), w.Sum(nil)) {
		t.Error("64 MiB through cat differ")
	}
	// Pipes at both ends take another way through the command line.
	c = exec.Command("/bin/sh", "-c", `head -c 20000000 /dev/urandom | tee "$0.in" | "$@" | cat >"$0.out"`, filepath.Join(t.TempDir(), "f"), unumBin, "run", "cat")
	c.Env = append(os.Environ(), "UNUM_SOCKET="+r.sock)
	if err := c.Run(); err != nil {
		t.Fatal(err)
	}
	in, _ := os.ReadFile(c.Args[3] + ".in")
	out, _ := os.ReadFile(c.Args[3] + ".out")
	if len(in) != 20000000 || !bytes.Equal(in, out) {
		t.Errorf("%d bytes in, %d out", len(in), len(out))
	}
}

// TestHalfClose: the end of input reaches the program while its output goes on,
// and the end of output reaches the reader while the program goes on.
func TestHalfClose(t *testing.T) {
	r := newRig(t)
	c := r.cmd("run", "sh", "-c", "cat >/dev/null; echo got; exec >&-; read x <&3; exit 4")
	c.Args[4] = "cat >/dev/null; echo got; exec >&-; sleep 30"
	in, _ := c.StdinPipe()
	out, _ := c.StdoutPipe()
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	io.WriteString(in, "x")
	in.Close()
	b, err := io.ReadAll(out) // ends although the command runs on
	if err != nil || string(b) != "got\n" {
		t.Errorf("%q, %v", b, err)
	}
	c.Process.Signal(syscall.SIGTERM)
	c.Wait()
	if c.ProcessState.ExitCode() != 143 {
		t.Errorf("%v", c.ProcessState)
	}
}

// TestIndependentStreams: an output nobody reads does not hold up the other.
func TestIndependentStreams(t *testing.T) {
	r := newRig(t)
	c := r.cmd("run", "sh", "-c", "(head -c 10000000 /dev/zero >&2) & echo hello; wait")
	out, _ := c.StdoutPipe()
	stderr, _ := c.StderrPipe()
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 6)
	if _, err := io.ReadFull(out, b); err != nil || string(b) != "hello\n" {
		t.Errorf("%q, %v", b, err)
	}
	n, _ := io.Copy(io.Discard, stderr)
	if err := c.Wait(); err != nil || n != 10000000 {
		t.Errorf("%v, %d bytes", err, n)
	}
}

// TestReaderGone: a program whose reader has gone is told by its pipe.
func TestReaderGone(t *testing.T) {
	r := newRig(t)
	c := exec.Command("/bin/bash", "-c", `"$@" | head -n 1; echo ${PIPESTATUS[0]}`, "bash", unumBin, "run", "yes")
	c.Env = append(os.Environ(), "UNUM_SOCKET="+r.sock)
	if got := r.finish(c, nil); got.out != "y\n141\n" {
		t.Errorf("%+v", got)
	}
	c = exec.Command("/bin/bash", "-c", `yes | "$@"; echo ${PIPESTATUS[*]}`, "bash", unumBin, "run", "sh", "-c", "read x; exec <&-; sleep 0.3")
	c.Env = append(os.Environ(), "UNUM_SOCKET="+r.sock)
	if got := r.finish(c, nil); got.out != "141 0\n" {
		t.Errorf("%+v", got)
	}
}

// TestSlowReader: every byte arrives before the exit code, however long after
// the program's end.
func TestSlowReader(t *testing.T) {
	r := newRig(t)
	c := r.cmd("run", "sh", "-c", "head -c 3000000 /dev/zero; exit 9")
	out, _ := c.StdoutPipe()
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	var total int
	b := make([]byte, 100000)
	for i := 0; ; i++ {
		if i < 10 {
			time.Sleep(30 * time.Millisecond) // the reader is slow: that is the test
		}
		n, err := out.Read(b)
		total += n
		if err != nil {
			break
		}
	}
	c.Wait()
	if total != 3000000 || c.ProcessState.ExitCode() != 9 {
		t.Errorf("%d bytes, %v", total, c.ProcessState)
	}
}

func TestSignals(t *testing.T) {
	r := newRig(t)
	for _, s := range []syscall.Signal{unix.SIGTERM, unix.SIGINT, unix.SIGHUP, unix.SIGQUIT, unix.SIGUSR1, unix.SIGUSR2, unix.SIGWINCH} {
		c := r.cmd("run", "sh", "-c", fmt.Sprintf("trap 'echo got; exit 40' %d; echo up; while :; do sleep 0.02; done", int(s)))
		out, _ := c.StdoutPipe()
		if err := c.Start(); err != nil {
			t.Fatal(err)
		}
		b := make([]byte, 3)
		io.ReadFull(out, b)
		c.Process.Signal(s)
		rest, _ := io.ReadAll(out)
		c.Wait()
		if string(rest) != "got\n" || c.ProcessState.ExitCode() != 40 {
			t.Errorf("%v: %q, %v", s, rest, c.ProcessState)
		}
	}
}

// TestStop: a stop stops the command there and the command line here, a continue
// both.
func TestStop(t *testing.T) {
	r := newRig(t)
	c := r.cmd("run", "sh", "-c", "echo up; while :; do echo x; sleep 0.01; done")
	out, _ := c.StdoutPipe()
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 3)
	io.ReadFull(out, b)
	state := func(pid int) byte {
		s, _ := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		i := bytes.LastIndexByte(s, ')')
		if i < 0 {
			return 0
		}
		return s[i+2]
	}
	program := func() int {
		for _, i := range r.mgrs[2].Jobs() {
			j, _, _ := r.mgrs[2].find(i.Record.Job)
			for _, pid := range j.cg.pids() {
				if innerPid(pid) == j.program {
					return pid
				}
			}
		}
		return 0
	}
	p := 0 // its first words may come before the manager knows its number
	until(t, "the program is known", func() bool { p = program(); return p != 0 })
	c.Process.Signal(unix.SIGTSTP)
	until(t, "both stopped", func() bool { return state(c.Process.Pid) == 'T' && state(p) == 'T' })
	c.Process.Signal(unix.SIGCONT)
	until(t, "both continued", func() bool { return state(c.Process.Pid) != 'T' && state(p) != 'T' })
	go io.Copy(io.Discard, out)
	c.Process.Signal(unix.SIGTERM)
	c.Wait()
	if c.ProcessState.ExitCode() != 143 {
		t.Error(c.ProcessState)
	}
}

func until(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(10 * time.Second); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("not within 10 s: %s", what)
		}
	}
}

func TestCallerKilled(t *testing.T) {
	r := newRig(t)
	c := r.cmd("run", "sh", "-c", "sleep 1000 & echo up; wait")
	out, _ := c.StdoutPipe()
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	io.ReadFull(out, make([]byte, 3))
	c.Process.Kill()
	c.Wait()
	until(t, "job gone", func() bool { return len(r.mgrs[2].Jobs()) == 0 })
	until(t, "record", func() bool { j, err := r.reg.Get(t.Context(), 1); return err == nil && j.State == Killed })
}

// TestBackground: what a command leaves behind ends with it, and its output up to
// then is not lost.
func TestBackground(t *testing.T) {
	r := newRig(t)
	start := time.Now()
	got := r.run(nil, "run", "sh", "-c", "(setsid sleep 1000 &) ; echo done")
	if got != (result{0, "done\n", ""}) || time.Since(start) > 20*time.Second {
		t.Errorf("%+v", got)
	}
}

func TestRefusal(t *testing.T) {
	r := newRig(t)
	busy := func(Demand) error {
		r.accept.Store(nil) // only the first asked
		return errs.E(errs.Busy, "", "", "full")
	}
	r.accept.Store(&busy)
	// The input must reach the one who takes the command, whole.
	if got := r.run(strings.NewReader("input"), "run", "sh", "-c", "cat; echo $UNUM_NODE"); got != (result{0, "inputn1\n", ""}) {
		t.Errorf("%+v", got)
	}
	r.f.down.Store(true)
	if got := r.run(strings.NewReader("input"), "run", "sh", "-c", "cat; echo $UNUM_NODE"); got != (result{0, "inputn1\n", ""}) {
		t.Errorf("%+v", got)
	}
	if got := r.run(nil, "run", "--on", "n2", "true"); got.code != 125 || !strings.Contains(got.err, "n2 (host2)") {
		t.Errorf("%+v", got)
	}
	r.f.down.Store(false)
	if got := r.run(nil, "run", "--not-on", "n2", "sh", "-c", "echo $UNUM_NODE"); got.out != "n1\n" {
		t.Errorf("%+v", got)
	}
}

// TestMany runs 64 at once, twice, and looks for anything left over.
func TestMany(t *testing.T) {
	r := newRig(t)
	r.run(nil, "run", "true")
	count := func() (fds, jobs, groups int) {
		es, _ := os.ReadDir("/proc/self/fd")
		d, _ := os.ReadDir("/sys/fs/cgroup/pids/" + r.cgroup + "/n2")
		for _, e := range d {
			if e.IsDir() {
				groups++
			}
		}
		return len(es), len(r.mgrs[2].Jobs()), groups
	}
	settled := func() (int, int, int) {
		until(t, "shims ahead", func() bool { _, j, g := count(); return j == 0 && g <= startAhead })
		return count()
	}
	zombies := func() (n int) {
		es, _ := os.ReadDir("/proc")
		for _, e := range es {
			b, _ := os.ReadFile("/proc/" + e.Name() + "/stat")
			if f := strings.Fields(string(b)); len(f) > 3 && f[2] == "Z" && f[3] == fmt.Sprint(os.Getpid()) {
				n++
			}
		}
		return n
	}
	f0, _, _ := settled()
	z0 := zombies()
	for range 2 {
		var wg sync.WaitGroup
		for i := range 64 {
			wg.Add(1)
			go func() {
				defer wg.Done()
				if got := r.run(strings.NewReader(fmt.Sprint(i)), "run", "sh", "-c", "cat; exit 3"); got != (result{3, fmt.Sprint(i), ""}) {
					t.Errorf("%d: %+v", i, got)
				}
			}()
		}
		wg.Wait()
	}
	until(t, "descriptors closed", func() bool { f, _, _ := count(); return f <= f0+4 })
	settled()
	if n := zombies(); n > z0 {
		t.Errorf("%d processes left unreaped", n-z0)
	}
}
