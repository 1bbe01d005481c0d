package lab

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"math/rand"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/creack/pty"
	"golang.org/x/sys/unix"

	"github.com/unum-os/unum/internal/errs"
)

func TestCommandLine(t *testing.T) {
	needRoot(t)
	name := fmt.Sprintf("cli-%d", os.Getpid())
	dir := filepath.Join(t.TempDir(), "lab")
	t.Cleanup(func() {
		_ = Down(context.Background(), name)
		nothingLeft(t, name, dir)
	})
	do := func(code int, args ...string) string {
		t.Helper()
		args = append([]string{args[0], "--name", name}, args[1:]...)
		var out bytes.Buffer
		c := cli(t, args...)
		c.Stdout, c.Stderr = &out, &out
		if got := exitCode(c.Run()); got != code {
			t.Fatalf("%v: code %d, want %d\n%s", args, got, code, out.String())
		}
		return out.String()
	}
	if out := do(0, "down"); !strings.Contains(out, "there is no lab") {
		t.Errorf("down of no lab says %q", out)
	}
	do(125, "exec", "n1", "--", "true")
	do(125, "bogus")
	do(125, "up", "--nodes", "0", "--disk-size", "1K")
	do(0, "up", "--nodes", "2", "--dir", dir, "--disk-size", "64M")
	do(7, "exec", "n2", "--", "sh", "-c", "exit 7")
	do(143, "exec", "n2", "--", "sh", "-c", "kill $$")
	do(127, "exec", "n2", "--", "nosuch")
	do(126, "exec", "n2", "--", "/etc/hosts")
	do(125, "exec", "n9", "--", "true")
	if out := do(0, "exec", "n2", "hostname", "-s"); out != "n2\n" {
		t.Errorf("hostname -s without --: %q", out)
	}
	do(0, "kill", "n2")
	do(125, "exec", "n2", "--", "true")
	var st Status
	if err := json.Unmarshal([]byte(do(0, "status", "--json")), &st); err != nil || st.Nodes[1].Power != "off" || !st.Nodes[0].Healthy {
		t.Errorf("status: %v %+v", err, st)
	}
	do(0, "start", "n2")
	do(0, "cut", "n1", "n2")
	if out := do(0, "status"); !strings.Contains(out, "cut: n1 | n2") {
		t.Errorf("status says\n%s", out)
	}
	do(0, "heal")
	do(0, "delay", "n1", "1ms")
	do(125, "delay", "n1", "soon")
	do(0, "heal")

	faultVerbs(t, name, do)

	// Standard input, and a signal to the client, reach the command.
	c := cli(t, "exec", "--name", name, "n1", "--", "sh", "-c", "read x; trap 'echo got INT; exit 9' INT; echo $x; while :; do sleep 0.1; done")
	c.Stdin = strings.NewReader("line\n")
	r, err := c.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	br := bufio.NewReader(r)
	if s, err := br.ReadString('\n'); s != "line\n" {
		t.Errorf("%q, %v", s, err)
	}
	if err := c.Process.Signal(unix.SIGINT); err != nil {
		t.Fatal(err)
	}
	rest, _ := io.ReadAll(br)
	if code := exitCode(c.Wait()); code != 9 || string(rest) != "got INT\n" {
		t.Errorf("after SIGINT: code %d, %q", code, rest)
	}

	// On a terminal the command has one, with our window size, and ^C works.
	c = cli(t, "exec", "--name", name, "n1", "--", "sh", "-c", "tty >/dev/null && stty size; trap 'exit 4' INT; echo on; while :; do sleep 0.1; done")
	master, err := pty.StartWithSize(c, &pty.Winsize{Rows: 33, Cols: 77})
	if err != nil {
		t.Fatal(err)
	}
	defer master.Close()
	br = bufio.NewReader(master)
	for _, w := range []string{"33 77\r\n", "on\r\n"} {
		if s, err := br.ReadString('\n'); s != w {
			t.Errorf("terminal: %q, %v; want %q", s, err, w)
		}
	}
	if _, err := master.Write([]byte{3}); err != nil {
		t.Fatal(err)
	}
	if code := exitCode(c.Wait()); code != 4 {
		t.Errorf("after ^C: code %d", code)
	}
	// A client that is killed takes its command with it.
	c = cli(t, "exec", "--name", name, "n1", "--", "sh", "-c", "echo $$; exec sleep 1000")
	if r, err = c.StdoutPipe(); err != nil {
		t.Fatal(err)
	}
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	pid, err := bufio.NewReader(r).ReadString('\n')
	if err != nil {
		t.Fatal(err)
	}
	_ = c.Process.Kill()
	_ = c.Wait()
	do(0, "exec", "n1", "--", "timeout", "20", "sh", "-c", "while kill -0 "+strings.TrimSpace(pid)+" 2>/dev/null; do sleep 0.01; done")
	do(0, "down")
	do(0, "down")
}

// faultVerbs tries the verbs that do something to nodes, on a lab of two.
func faultVerbs(t *testing.T, name string, do func(code int, args ...string) string) {
	t.Helper()
	do(0, "cut", "--one-way", "n1", "n2")
	do(0, "delay", "n1,n2", "1ms")
	do(0, "loss", "--seed", "7", "n1", "0.5%")
	do(0, "rate", "n1", "10mbit")
	do(0, "clock", "n1", "-1h")
	do(0, "clock", "--boot", "n1", "30s")
	do(0, "pause", "--daemon", "n2")
	var st Status
	if err := json.Unmarshal([]byte(do(0, "status", "--json")), &st); err != nil {
		t.Fatal(err)
	}
	if k := st.Links["n1"]; k != (Link{time.Millisecond, 0.005, 7, 10_000_000}) || st.Links["n2"].Delay != time.Millisecond ||
		len(st.OneWayCuts) != 1 || st.Clocks["n1"] != (Clock{-time.Hour, 30 * time.Second}) || st.Paused["n2"] != "daemon" {
		t.Errorf("status: %+v", st)
	}
	out := do(0, "status")
	for _, line := range []string{"cut: n1 -> n2", "link: n1, each way: delay 1ms, loss 0.5% (seed 7), rate 10mbit", "link: n2, each way: delay 1ms",
		"clock: n1, wall=-1h0m0s boot=+30s", "paused: n2, its daemon"} {
		if !strings.Contains(out, line+"\n") {
			t.Errorf("status does not say %q:\n%s", line, out)
		}
	}
	do(0, "resume", "n2")
	do(0, "heal", "n2")
	if out := do(0, "status"); strings.Contains(out, "cut:") || strings.Contains(out, "link: n2") || !strings.Contains(out, "link: n1") {
		t.Errorf("n2 healed:\n%s", out)
	}
	do(0, "heal")
	do(0, "clock", "n1", "0")
	if out := do(0, "add", "--client"); !strings.HasSuffix(out, "n3\n") {
		t.Errorf("add says %q", out)
	}
	do(0, "wipe", "n3")
	do(0, "start", "--no-wait", "n3")
	do(0, "logs", "n1")
	c := cli(t, "logs", "--name", name, "-f", "n1")
	var said bytes.Buffer
	r, err := c.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	c.Stderr = &said
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	do(0, "exec", "n1", "--", "sh", "-c", "echo followed >> "+(&Lab{dir: st.Dir}).LogPath("n1"))
	sc := bufio.NewScanner(r)
	for sc.Scan() && sc.Text() != "followed" {
	}
	if err := c.Process.Signal(unix.SIGINT); err != nil {
		t.Fatal(err)
	}
	if code := exitCode(c.Wait()); code != 130 || said.Len() > 0 {
		t.Errorf("logs -f after SIGINT: code %d, %q", code, said.String())
	}
	for _, bad := range []string{
		"loss n1 130%", "loss n1 100%", "loss n1 30", "loss n1 -1%", "loss n1", "loss n9 1%", "loss --seed -1 n1 1%",
		"rate n1 fast", "rate n1 1bit", "rate n1 1e9gbit", "rate n9 1mbit", "delay n1 2h", "delay n1 -1s", "delay n9 1ms", "delay , 1ms",
		"cut", "cut n1 n1", "cut --one-way n1 n1", "cut n9", "cut n1,n2,n3", "cut n1 ,", "cut n1 n2 n3", "heal n9", "heal ,",
		"pause", "pause n9", "pause n1,n9", "resume n9", "resume", "clock n1", "clock n1 later", "clock n1 99999999h", "clock n1 1e30h", "clock --boot n1 -1s",
		"clock n9 0", "logs", "logs n9", "logs n1 n2", "add n4", "add --count 0", "add --count -1", "add --count 1000", "add --count x", "add --witness --client",
		"add --timeout 0", "add --timeout -1s", "wipe", "wipe n9", "wipe n1,n9", "start", "start n9", "kill", "kill n01", "kill n0", "kill n1 n9", "exec n1", "exec n9 true",
		"status n1", "up", "up --nodes 0", "up --nodes 1000", "up --clients -1", "up --timeout 0", "up --disk-size 1e9", "down n1", "bogus n1",
	} {
		if out := do(125, strings.Fields(bad)...); !strings.Contains(out, "Error: ") {
			t.Errorf("%s says %q", bad, out)
		}
	}
	if err := json.Unmarshal([]byte(do(0, "status", "--json")), &st); err != nil || len(st.Nodes) != 3 {
		t.Errorf("status: %v %+v", err, st)
	}
	for _, n := range st.Nodes {
		if n.Power != "on" || n.Daemon != "running" {
			t.Errorf("after what was refused: %+v", n)
		}
	}
}

// Every verb explains itself.
func TestHelp(t *testing.T) {
	for _, c := range Command(Hooks{}).Commands() {
		if c.Short == "" || !strings.Contains(c.Example, "unum lab "+c.Name()) {
			t.Errorf("%s: %q, example %q", c.Name(), c.Short, c.Example)
		}
		if code := exitCode(cli(t, c.Name(), "-h").Run()); code != 0 {
			t.Errorf("%s -h: code %d", c.Name(), code)
		}
	}
}

// More disks than the machine has loop devices.
func TestManyNodes(t *testing.T) {
	sameLoops(t)
	l := upLab(t, "many", 9)
	began := time.Now()
	if _, err := l.Add(t.Context(), AddOptions{Count: 3, Parallel: true}); err != nil {
		t.Fatal(err)
	}
	t.Logf("3 more in %v", time.Since(began))
	if err := l.Kill(t.Context(), "n9", "n10", "n12"); err != nil {
		t.Fatal(err)
	}
	if !reaches(t, l, "n11", "n2") {
		t.Error("n11 does not reach n2")
	}
	if err := l.Start(t.Context(), "n10", "n9"); err != nil {
		t.Fatal(err)
	}
	if !reaches(t, l, "n10", "n1") {
		t.Error("n10 does not reach n1")
	}
}

// The maker of a lab is killed, or interrupted, at random moments.
func TestMakerDies(t *testing.T) {
	needRoot(t)
	seed := time.Now().UnixNano()
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewSource(seed))
	rounds := 24
	if testing.Short() {
		rounds = 4
	}
	killed := 0
	for i := range rounds {
		name := fmt.Sprintf("die%d-%d", i, os.Getpid())
		dir := filepath.Join(t.TempDir(), "lab")
		args := []string{"up", "--name", name, "--nodes", "3", "--disk-size", "64M", "--dir", dir}
		c := cli(t, args...)
		var out bytes.Buffer
		c.Stderr = &out
		if err := c.Start(); err != nil {
			t.Fatal(err)
		}
		after := time.Duration(rng.Intn(220)) * time.Millisecond
		sig, wantCode := unix.SIGKILL, -1
		if i%3 == 0 {
			sig, wantCode = unix.SIGINT, 130
		}
		ended := make(chan error, 1)
		go func() { ended <- c.Wait() }()
		var err error
		select {
		case err = <-ended:
		case <-time.After(after):
			if c.Process.Signal(sig) == nil {
				killed++
			}
			err = <-ended
		}
		code := exitCode(err)
		if code != 0 && code != wantCode && code != -1 { // -1: SIGINT came before it was caught
			t.Errorf("after %v %v: code %d\n%s", after, sig, code, out.String())
		}
		if sig == unix.SIGINT && code == 130 {
			nothingLeft(t, name, dir) // cleaned up by itself
		}
		if err := Down(t.Context(), name); err != nil && !errs.Has(err, errs.NotFound) {
			t.Errorf("down after %v at %v: %v", sig, after, err)
		}
		nothingLeft(t, name, dir)
	}
	if killed == 0 {
		t.Error("every lab was up before its maker could be killed")
	}
}

func TestInterruptedUpCleansUp(t *testing.T) {
	needRoot(t)
	for sig, code := range map[unix.Signal]int{unix.SIGINT: 130, unix.SIGTERM: 143} {
		name := fmt.Sprintf("int-%d", os.Getpid())
		dir := filepath.Join(t.TempDir(), "lab")
		c := cli(t, "up", "--name", name, "--nodes", "2", "--disk-size", "64M", "--dir", dir)
		c.Env = append(os.Environ(), "LAB_TEST_NEVER_HEALTHY=1")
		r, err := c.StderrPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := c.Start(); err != nil {
			t.Fatal(err)
		}
		br := bufio.NewReader(r)
		if line, err := br.ReadString('\n'); !strings.Contains(line, "have power") {
			t.Errorf("%q, %v", line, err)
		}
		if err := c.Process.Signal(sig); err != nil {
			t.Fatal(err)
		}
		rest, _ := io.ReadAll(br)
		if got := exitCode(c.Wait()); got != code {
			t.Errorf("%v: code %d, want %d\n%s", sig, got, code, rest)
		}
		nothingLeft(t, name, dir)
	}
}

// A daemon that fails ends up with its last words in the error, and nothing left.
func TestDaemonFails(t *testing.T) {
	needRoot(t)
	name := fmt.Sprintf("bad-%d", os.Getpid())
	dir := filepath.Join(t.TempDir(), "lab")
	h := Hooks{Daemon: func(Node) []string { return []string{"sh", "-c", "echo out of luck; exit 5"} }}
	h.Healthy = func(context.Context, *Lab, Node) error { return errs.E(errs.Unavailable, "", "", "never") }
	_, err := Up(t.Context(), Config{Hooks: h, Name: name, Nodes: 1, Dir: dir, DiskSize: 64 << 20})
	if err == nil || !strings.Contains(err.Error(), "out of luck") || !strings.Contains(err.Error(), "code 5") {
		t.Errorf("error: %v", err)
	}
	nothingLeft(t, name, dir)
	h.Daemon = func(Node) []string { return []string{"sleep", "1000"} }
	_, err = Up(t.Context(), Config{Hooks: h, Name: name, Nodes: 1, Dir: dir, DiskSize: 64 << 20, Timeout: time.Second})
	if !errs.Has(err, errs.Timeout) {
		t.Errorf("never healthy: %v", err)
	}
	nothingLeft(t, name, dir)
}

func TestParseSize(t *testing.T) {
	for s, want := range map[string]int64{"4G": 4 << 30, "512M": 512 << 20, "64MiB": 64 << 20, "4096": 4096, "1k": 1024} {
		if n, err := parseSize(s); n != want || err != nil {
			t.Errorf("%s: %d, %v", s, n, err)
		}
	}
	for _, s := range []string{"", "G", "-1G", "4X", "99999999T", "4GG"} {
		if n, err := parseSize(s); err == nil {
			t.Errorf("%q is %d", s, n)
		}
	}
}

func FuzzDecodeRequest(f *testing.F) {
	f.Add([]byte(`{"Op":"exec","Argv":["a"],"TTY":true}`))
	f.Add([]byte(`{"Sig":9}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		_, _ = decodeRequest(b)
	})
}
