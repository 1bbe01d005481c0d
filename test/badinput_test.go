package test

import (
	"bytes"
	"fmt"
	"os/exec"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// until asks until ok says yes; the deadline is generous, because the machine
// may be busy with other things.
func until(t *testing.T, what string, limit time.Duration, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(limit); !ok(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("not within %v: %s", limit, what)
		}
	}
}

// result is how a command ended.
type result struct {
	out, err string
	code     int
}

func (r result) String() string { return fmt.Sprintf("code %d, %q, %q", r.code, r.out, r.err) }

// run runs a command in a node and keeps its two outputs apart.
func (c *cluster) run(node, script string) result {
	out, errOut, code := c.unum(60*time.Second, "lab", "exec", "--name", c.name, node, "--", "sh", "-c", strings.ReplaceAll(script, "UNUM", c.bin))
	return result{out, errOut, code}
}

// each runs scripts in a node, one after the other in one shell, which is sooner
// done than one by one.
func (c *cluster) each(node string, scripts []string) []result {
	c.t.Helper()
	const mark = "----end "
	all := ""
	for _, s := range scripts {
		all += s + "\necho '" + mark + "'$?; echo '" + mark + "' >&2\n"
	}
	r := c.run(node, all)
	outs, errOuts := strings.Split(r.out, mark), strings.Split(r.err, mark+"\n")
	if len(outs) != len(scripts)+1 || len(errOuts) != len(outs) {
		c.t.Fatalf("%d scripts gave %d results: %v", len(scripts), len(outs)-1, r)
	}
	var rs []result
	for i := range scripts {
		// A result's code stands before the next one's output.
		code, rest, _ := strings.Cut(outs[i+1], "\n")
		outs[i+1] = rest
		n, err := strconv.Atoi(code)
		if err != nil {
			c.t.Fatalf("%s: %v", scripts[i], err)
		}
		rs = append(rs, result{outs[i], errOuts[i], n})
	}
	return rs
}

// second is a daemon beside the lab's own in one of its nodes, with data, tree
// and socket of its own: what is started, refused and stopped there leaves the
// lab as it was.
type second struct {
	c       *cluster
	node    string
	name    string
	address string
}

func (c *cluster) second(node, name string, port int) *second {
	ip := strings.Fields(c.must(node, "hostname -I"))[0]
	return &second{c, node, name, fmt.Sprintf("%s:%d", ip, port)}
}

func (s *second) dir() string { return "/var/lib/unum/" + s.name }
func (s *second) run() string { return "/run/" + s.name }

// line is the shell's words for unum as this daemon's user says it. The quotes
// keep the variable's name from being taken for the program's place.
func (s *second) line(args string) string {
	return `env U""NUM_SOCKET=` + s.run() + "/sock UNUM " + args
}

// start is the line that starts it: up, or join with where and what.
func (s *second) start(verb string) string {
	return "exec " + s.line(verb) + " --dir " + s.dir() + " --mount " + s.run() + "/tree --addr " + s.address
}

// daemon is a started second.
type daemon struct {
	*second
	cmd *exec.Cmd
	out *lines
}

// launch starts it in the background.
func (s *second) launch(verb string) *daemon {
	s.c.t.Helper()
	d := &daemon{second: s, out: &lines{}}
	d.cmd = exec.Command(s.c.bin, "lab", "exec", "--name", s.c.name, s.node, "--", "sh", "-c", strings.ReplaceAll(s.start(verb), "UNUM", s.c.bin))
	d.cmd.Stdout, d.cmd.Stderr = d.out, d.out
	if err := d.cmd.Start(); err != nil {
		s.c.t.Fatal(err)
	}
	return d
}

// healthy waits until it says so.
func (d *daemon) healthy() {
	d.c.t.Helper()
	var last result
	until(d.c.t, d.name+" is healthy", 30*time.Second, func() bool {
		last = d.c.run(d.node, d.line("status --healthy"))
		if last.code != 0 && d.out.ended() {
			d.c.t.Fatalf("%s ended: %s", d.name, d.out)
		}
		return last.code == 0
	})
}

// stop sends sig and returns the exit code.
func (d *daemon) stop(sig syscall.Signal) int {
	d.c.t.Helper()
	if err := d.cmd.Process.Signal(sig); err != nil {
		d.c.t.Errorf("signal %s: %v", d.name, err)
	}
	return d.wait()
}

func (d *daemon) wait() int {
	d.c.t.Helper()
	code := waitFor(d.c.t, d.cmd, d.out)
	d.out.end()
	return code
}

// waitFor waits for the end of a command that was told to end, and returns its
// exit code, 130 too for one that the signal ended before it had a handler, as a
// shell says it.
func waitFor(t *testing.T, cmd *exec.Cmd, out *lines) int {
	t.Helper()
	late := time.AfterFunc(30*time.Second, func() { cmd.Process.Kill() })
	_ = cmd.Wait() // the state says it better
	if !late.Stop() {
		t.Errorf("%v does not end: %s", cmd.Args, out)
	}
	ws := cmd.ProcessState.Sys().(syscall.WaitStatus)
	if ws.Signaled() {
		return 128 + int(ws.Signal())
	}
	return ws.ExitStatus()
}

// gone checks that a daemon that was stopped or refused left nothing running,
// mounted, bound or grouped. What may be on the disk is the caller's to check.
func (s *second) gone(t *testing.T) {
	t.Helper()
	var last string
	for end := time.Now().Add(10 * time.Second); ; time.Sleep(50 * time.Millisecond) {
		last = s.c.run(s.node, strings.NewReplacer("RUN", s.run(), "DIR", s.dir()).Replace(`
			grep ' RUN' /proc/mounts
			for p in /proc/[0-9]*; do
				case "$(tr '\0' ' ' < $p/cmdline 2>/dev/null)" in *"--dir ""DIR "*) echo process $p;; esac
			done
			ls -d RUN/sock 2>/dev/null
			own=$(sed -n 's/.*"cluster": "\(........\).*/\1/p' DIR/node.json 2>/dev/null)-n$(sed -n 's/.*"node": "*n*\([0-9]*\).*/\1/p' DIR/node.json 2>/dev/null)
			ls -d /sys/fs/cgroup/*/unum/$own /sys/fs/cgroup/unum/$own 2>/dev/null # not while a shim is in it
			true`)).out
		if last == "" {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("%s left behind:\n%s", s.name, last)
		}
	}
}

// erase removes what it had on the disk.
func (s *second) erase() {
	s.c.t.Helper()
	s.c.must(s.node, "rm -rf "+s.dir()+" "+s.run())
}

// sentence checks what a person is told: at least one line "unum: ..." that
// contains want, without a stack or a Go value.
func sentence(t *testing.T, what string, r result, code int, want ...string) {
	t.Helper()
	if r.code != code {
		t.Errorf("%s: %v, want code %d", what, r, code)
	}
	if !strings.HasPrefix(r.err, "unum: ") || strings.Contains(r.err, "goroutine ") || strings.Contains(r.err, "0x") || strings.Count(r.err, "\n") > 3 {
		t.Errorf("%s: this is no sentence for a person: %q", what, r.err)
	}
	for _, w := range want {
		if !strings.Contains(r.err, w) {
			t.Errorf("%s: %q does not say %q", what, r.err, w)
		}
	}
}

func TestBadInput(t *testing.T) {
	t.Parallel()
	c := up(t, 3)
	t.Run("command", func(t *testing.T) { badCommand(t, c.in(t)) })
	t.Run("directory", func(t *testing.T) { badDirectory(t, c.in(t)) })
	t.Run("streams", func(t *testing.T) { badStreams(t, c.in(t)) })
	t.Run("interrupt", func(t *testing.T) { interruptRun(t, c.in(t)) })
	t.Run("noise", func(t *testing.T) { noise(t, c.in(t)) })
	t.Run("stranger", func(t *testing.T) { stranger(t, c.in(t)) })
	t.Run("token", func(t *testing.T) { badToken(t, c.in(t)) })
	t.Run("killed", func(t *testing.T) { deadMount(t, c.in(t)) })
	// After all of it the three are one computer.
	if got := c.must("n1", "echo fine > /unum/fine && UNUM run --on n3 cat /unum/fine"); got != "fine\n" {
		t.Errorf("afterwards: %q", got)
	}
}

// badCommand: what cannot be run, here, elsewhere, and wherever it costs least.
func badCommand(t *testing.T, c *cluster) {
	c.must("n1", `mkdir -p /unum/cmd/dir && cd /unum/cmd && echo text > plain && chmod 644 plain &&
		printf '#!/no/such/interpreter\n' > script && chmod 755 script && ln -s loop loop`)
	bad := []struct {
		cmd  string
		code int
		want string
	}{
		{"nosuch", 127, "nosuch: command not found"},
		{"./nosuch", 127, "./nosuch: No such file or directory"},
		{"/no/such", 127, "/no/such: No such file or directory"},
		{"./script", 127, "./script: No such file or directory"},
		{"''", 127, "command not found"},
		{"./plain", 126, "./plain: Permission denied"},
		{"/etc/passwd", 126, "/etc/passwd: Permission denied"},
		{"/etc/passwd/x", 126, "/etc/passwd/x: Not a directory"},
		{"./loop", 126, "./loop: Too many levels of symbolic links"},
		{"./$(head -c 300 /dev/zero | tr '\\0' a)", 126, "File name too long"},
		{"./dir", 126, "./dir: Is a directory"},
		{"/etc", 126, "/etc: Is a directory"},
		{".", 126, ".: Is a directory"},
	}
	for _, on := range []string{"--on n1 ", "--on n3 ", ""} {
		var script []string
		for _, v := range bad {
			script = append(script, "(cd /unum/cmd && UNUM run "+on+v.cmd+")")
		}
		for i, r := range c.each("n1", script) {
			sentence(t, on+bad[i].cmd, r, bad[i].code, bad[i].want)
			if r.out != "" {
				t.Errorf("%s%s: it printed %q", on, bad[i].cmd, r.out)
			}
		}
	}
	sentence(t, "detached", c.run("n1", "UNUM run --detach --on n2 nosuch"), 127, "nosuch: command not found")
	sentence(t, "no such node", c.run("n1", "UNUM run --on n9 true"), 125, "n9", "no such node", "unum nodes")
	sentence(t, "no command", c.run("n1", "UNUM run"), 125, "no command", "unum run --help")
}

// badDirectory: the working directory is removed before a command starts, while
// it runs, or is not there where it runs.
func badDirectory(t *testing.T, c *cluster) {
	for _, on := range []string{"n1", "n3"} {
		// A program on Linux may start in a removed directory, and finds nothing in it.
		r := c.run("n1", `mkdir -p /unum/gone && cd /unum/gone && rmdir /unum/gone && UNUM run --on `+on+` sh -c '
			/bin/pwd -P; echo pwd $?; ls; echo ls $?; (echo x > file); echo create $?; cd / && ls -d etc'`)
		if r.code != 0 || r.out != "pwd 1\nls 0\ncreate 2\netc\n" {
			t.Errorf("started in a removed directory on %s: %v", on, r)
		}
		// It goes on when the directory goes while it runs, and is told when it asks.
		r = c.run("n1", `rm -f /unum/on /run/pipe; mkfifo /run/pipe; mkdir -p /unum/under && cd /unum/under && {
			UNUM run --on `+on+` sh -c 'echo > /unum/on; read go; (echo x > file); echo create $?; cd / && ls -d etc; exit 3' < /run/pipe & } &&
			exec 9> /run/pipe; while [ ! -e /unum/on ]; do :; done; rmdir /unum/under; echo go >&9; wait $!; echo code $?`)
		if r.out != "create 2\netc\ncode 3\n" {
			t.Errorf("removed while it ran on %s: %v", on, r)
		}
	}
	// Each node has its own /run: there is no such directory there.
	r := c.run("n1", "mkdir -p /run/only-here && cd /run/only-here && UNUM run --on n3 touch /unum/started")
	sentence(t, "a directory of one node", r, 125, "cannot enter the working directory /run/only-here on node n3", "No such file or directory")
	if r := c.run("n2", "ls /unum/started"); r.code == 0 {
		t.Error("the command was run in another directory")
	}
	if left, _ := exec.Command("sh", "-c", "ls -d /tmp/unum-gone*").Output(); len(left) > 0 {
		t.Errorf("left: %s", left)
	}
}

// badStreams: each stream closed, full, or at its end.
func badStreams(t *testing.T, c *cluster) {
	bad := []struct {
		script, out string
		code        int
		err         string
	}{
		{"cat <&-", "", 0, ""}, // see docs: it reads as empty
		{"cat </dev/null", "", 0, ""},
		{": | RUN cat", "", 0, ""},
		{"sh -c 'cat; echo end' </dev/null", "end\n", 0, ""},
		{"sh -c 'exit 3' <&-", "", 3, ""},
		{"sh -c 'echo lost; echo said >&2; exit 4' >&-", "", 4, "said\n"},
		{"sh -c 'echo said; echo lost >&2; exit 5' 2>&-", "said\n", 5, ""},
		{"sh -c 'exit 6' <&- >&- 2>&-", "", 6, ""},
		{"sh -c 'echo x; exit 0' >/dev/full", "", 125, "unum: run: cannot write to stdout: no space left on device\n"},
		{"yes | head -n 2", "y\ny\n", 0, ""},
		{"sh -c 'exec <&- >&- 2>&-; exit 8'", "", 8, ""},
	}
	for _, on := range []string{"n1", "n3"} {
		run := "UNUM run --on " + on + " "
		var script []string
		for _, v := range bad {
			line := strings.ReplaceAll(v.script, "RUN ", run)
			if line == v.script {
				line = run + line
			}
			script = append(script, line)
		}
		for i, r := range c.each("n1", script) {
			if v := bad[i]; r.out != v.out || r.code != v.code || r.err != v.err {
				t.Errorf("%s on %s: %v, want code %d, %q, %q", v.script, on, r, v.code, v.out, v.err)
			}
		}
	}
	for _, verb := range []string{"status", "nodes", "ps"} {
		if r := c.run("n1", "UNUM "+verb+" <&- >/dev/full"); r.code != 125 || !strings.Contains(r.err, "no space left") {
			t.Errorf("unum %s into a full device: %v", verb, r)
		}
	}
}

// badToken: tokens that are no tokens, and those that no longer or never were
// this cluster's.
func badToken(t *testing.T, c *cluster) {
	s := c.second("n2", "joiner", 7411)
	good := strings.TrimSpace(c.must("n1", "UNUM token --quiet"))
	first := strings.TrimSpace(c.must("n1", "hostname -I"))
	join := func(token string) string { return "join " + first + ":7400 '" + token + "'" }
	short := strings.TrimSpace(c.must("n1", "UNUM token --quiet --expires 1ms"))
	typo := []byte(good)
	for i, b := range typo[20:] {
		if b >= '2' && b <= '8' {
			typo[20+i]++
			break
		}
	}
	other := c.second("n3", "elsewhere", 7501)
	d := other.launch("up")
	d.healthy()
	foreign := strings.TrimSpace(c.must("n3", other.line("token --quiet")))
	for _, v := range []struct{ name, token, want string }{
		{"empty", "", "a token begins with unum1-"},
		{"no token at all", "swordfish", "a token begins with unum1-"},
		{"cut off", good[:40], "copy the whole line"},
		{"a later version's", "unum7-abc", "version 7"},
		{"mistyped", string(typo), "mistyped"},
		{"expired", short, "the token has expired"},
		{"another cluster's", foreign, "unum token"},
	} {
		r := c.run(s.node, s.start(join(v.token)))
		sentence(t, v.name, r, 125, v.want, "\ntry: ")
		s.gone(t)
		if r := c.run(s.node, "ls -d "+s.dir()); r.code == 0 {
			t.Errorf("%s: left on the disk: %v", v.name, c.run(s.node, "find "+s.dir()))
		}
	}
	// A token of this cluster in another one's ear is refused there, too.
	if code := d.stop(syscall.SIGTERM); code != 0 {
		t.Errorf("stopped by SIGTERM: code %d: %s", code, d.out)
	}
	other.gone(t)
	j := s.launch(join(good))
	j.healthy()
	if got := c.must("n2", s.line("run --on n3 hostname")); got != "n3\n" {
		t.Errorf("the joined node's command says %q", got)
	}
	// It was for one machine.
	sentence(t, "used up", c.run("n3", other.start("join "+first+":7400 "+good)), 125, "there is a node of another cluster already")
	other.erase()
	sentence(t, "used up", c.run("n3", other.start(join(good))), 125, "the token is used up", "\ntry: ")
	other.gone(t)
	if code := j.stop(syscall.SIGTERM); code != 0 {
		t.Errorf("stopped by SIGTERM: code %d: %s", code, j.out)
	}
	s.gone(t)
}

// deadMount: a daemon that is killed leaves its mount dead; the next one takes
// it away.
func deadMount(t *testing.T, c *cluster) {
	s := c.second("n3", "killed", 7601)
	d := s.launch("up")
	d.healthy()
	c.must("n3", "echo kept > "+s.run()+"/tree/file && sync "+s.run()+"/tree/file")
	c.must("n3", `for p in /proc/[0-9]*; do
		case "$(tr '\0' ' ' < $p/cmdline 2>/dev/null)" in *"--dir ""`+s.dir()+` "*) kill -9 ${p#/proc/};; esac; done`)
	if code := d.wait(); code != 137 {
		t.Errorf("killed: code %d: %s", code, d.out)
	}
	until(t, "the mount is dead", 10*time.Second, func() bool {
		return strings.Contains(c.run("n3", "ls "+s.run()+"/tree").err, "not connected")
	})
	d = s.launch("up")
	d.healthy()
	if got := c.must("n3", "cat "+s.run()+"/tree/file; grep -c "+s.run()+"/tree /proc/mounts"); got != "kept\n1\n" {
		t.Errorf("after it was started again: %q", got)
	}
	if code := d.stop(syscall.SIGTERM); code != 0 {
		t.Errorf("stopped by SIGTERM: code %d: %s", code, d.out)
	}
	s.gone(t)
}

// memory and descriptors of the lab's own daemon in a node.
type usage struct{ rss, fds int } // KiB, number

func (c *cluster) usage(node string) usage {
	c.t.Helper()
	out := c.must(node, `for p in /proc/[0-9]*; do
		case "$(tr '\0' ' ' < $p/cmdline 2>/dev/null)" in "unum "*" --dir /var/lib/unum "*) grep VmRSS $p/status; ls $p/fd | wc -l;; esac; done`)
	m := regexp.MustCompile(`VmRSS:\s+(\d+) kB\n(\d+)\n`).FindStringSubmatch(out)
	if m == nil {
		c.t.Fatalf("%s: no daemon: %q", node, out)
	}
	rss, _ := strconv.Atoi(m[1])
	fds, _ := strconv.Atoi(m[2])
	return usage{rss, fds}
}

// lines collects what a command prints.
type lines struct {
	mu   sync.Mutex
	buf  bytes.Buffer
	over bool
}

// Write implements io.Writer.
func (l *lines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.Write(p)
}

// String returns all of it so far.
func (l *lines) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.String()
}

// count returns how many lines are whole.
func (l *lines) count() int { return strings.Count(l.String(), "\n") }

// end notes that the command has ended.
func (l *lines) end() {
	l.mu.Lock()
	l.over = true
	l.mu.Unlock()
}

// ended reports whether it has.
func (l *lines) ended() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.over
}
