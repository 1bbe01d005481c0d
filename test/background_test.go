package test

import (
	"encoding/json"
	"regexp"
	"strconv"
	"strings"
	"testing"
)

// background says up or join with -d, and returns the daemon's pid as it said it.
func (s *second) background(t *testing.T, more string) int {
	t.Helper()
	r := s.c.run(s.node, s.start("up")+" -d --log-file "+s.dir()+".log "+more)
	m := regexp.MustCompile(`process (\d+), log `).FindStringSubmatch(r.out)
	if r.code != 0 || m == nil {
		t.Fatalf("up -d: %v", r)
	}
	pid, err := strconv.Atoi(m[1])
	if err != nil {
		t.Fatal(err)
	}
	return pid
}

// TestBackground starts a daemon in the background, asks what it runs with, and
// stops it: also said twice, after a kill, and where it cannot start.
func TestBackground(t *testing.T) {
	t.Parallel()
	c := up(t, 1)
	s := c.second("n1", "bg", 8300)
	file := s.dir() + ".toml"
	c.must("n1", `printf 'log-format = "json"\nmetrics = ""\n' > `+file)
	said := "--config " + file + " --labels place=attic"

	pid := s.background(t, said)
	c.must("n1", s.line("status --healthy")+" && touch "+s.run()+"/tree/file && rm "+s.run()+"/tree/file")
	if cmdline := c.must("n1", "ps -o sid= -p "+strconv.Itoa(pid)); strings.TrimSpace(cmdline) != strconv.Itoa(pid) {
		t.Errorf("process %d is in session %s", pid, cmdline)
	}
	if log := c.must("n1", "head -1 "+s.dir()+".log"); !strings.HasPrefix(log, "{") {
		t.Errorf("the file says that the log is JSON: %s", log)
	}

	// What it runs with, while the file says something else already.
	c.must("n1", `printf 'log-format = "text"\nlog-level = "warn"\n' > `+file)
	var got struct {
		Running, Next []shownSetting
	}
	out := strings.Replace(c.must("n1", s.line("config --json --config "+file)), `"next_start"`, `"next"`, 1)
	if err := json.Unmarshal([]byte(out), &got); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	for _, v := range []struct {
		where string
		of    []shownSetting
		want  shownSetting
	}{
		{"running", got.Running, shownSetting{"log-format", "json", file + ":1"}},
		{"running", got.Running, shownSetting{"metrics", "", file + ":2"}},
		{"running", got.Running, shownSetting{"labels", "place=attic", "flag"}},
		{"running", got.Running, shownSetting{"dir", s.dir(), "flag"}},
		{"running", got.Running, shownSetting{"log-level", "info", "default"}},
		{"next", got.Next, shownSetting{"log-format", "text", file + ":1"}},
		{"next", got.Next, shownSetting{"log-level", "warn", file + ":2"}},
		{"next", got.Next, shownSetting{"labels", "", "default"}},
	} {
		if f := setting(v.of, v.want.Name); f != v.want {
			t.Errorf("%s: %+v, want %+v", v.where, f, v.want)
		}
	}
	if r := c.run("n1", s.line("config --config "+file)); r.code != 0 || !strings.Contains(r.out, "RUNS WITH") || !strings.Contains(r.out, "place=attic") {
		t.Errorf("config: %v", r)
	}
	// doctor knows whose port it is.
	c.must("n1", `printf 'addr = "`+s.address+`"\ndir = "`+s.dir()+`"\n' > `+file)
	if r := c.run("n1", s.line("doctor --config "+file)); r.code != 0 || !strings.Contains(r.out, "TCP port 8300 is held by this machine's daemon, process "+strconv.Itoa(pid)) ||
		!strings.Contains(r.out, "is healthy") {
		t.Errorf("doctor: %v", r)
	}

	for _, verb := range []string{"up", "up -d", "join 127.0.0.1:1 TOKEN"} {
		r := c.run("n1", s.start(verb))
		sentence(t, "twice: "+verb, r, 125, "it runs already: process "+strconv.Itoa(pid), "try: unum status")
	}

	// A kill leaves a pid file that counts for nothing.
	c.must("n1", "kill -KILL "+strconv.Itoa(pid)+"; while kill -0 "+strconv.Itoa(pid)+" 2>/dev/null; do sleep 0.02; done")
	if r := c.run("n1", s.line("down")); r.code != 1 || !strings.Contains(r.err, "no daemon is running") {
		t.Errorf("down after a kill: %v", r)
	}
	pid = s.background(t, said)
	if r := c.run("n1", s.line("down")); r.code != 0 || r.out != "unum: process "+strconv.Itoa(pid)+" has ended\n" {
		t.Errorf("down: %v", r)
	}
	s.gone(t)
	if out := c.must("n1", "ls "+s.run()); strings.Contains(out, "pid") {
		t.Errorf("left behind: %s", out)
	}
	if r := c.run("n1", s.line("down")); r.code != 1 {
		t.Errorf("down twice: %v", r)
	}

	// It cannot start: another has its port. The log's last words say so.
	taken := *s
	taken.address = strings.Replace(s.address, ":8300", ":7400", 1)
	if r := c.run("n1", taken.start("up")+" -d --log-file "+s.dir()+".log"); r.code != 125 || !strings.Contains(r.err, "it ended before it was healthy (exit status 125)") ||
		!strings.Contains(r.err, "its last words, in "+s.dir()+".log:") || !strings.Contains(r.err, "address already in use") {
		t.Errorf("a port that is taken: %v", r)
	}
	// It is not healthy in time: it goes on.
	if r := c.run("n1", s.start("up")+" -d --wait 1ms --log-file "+s.dir()+".log"); r.code != 1 || !strings.Contains(r.err, "runs but is not healthy after 1ms") {
		t.Errorf("not in time: %v", r)
	}
	until(t, "it is healthy later", 30e9, func() bool { return c.run("n1", s.line("status --healthy")).code == 0 })
	if r := c.run("n1", s.line("down")); r.code != 0 {
		t.Errorf("down: %v", r)
	}
	s.gone(t)

	// What is wrong in the file is said before anything is started.
	c.must("n1", `printf 'muont = "/x"\n' > `+file)
	sentence(t, "a file with an error", c.run("n1", s.start("up")+" -d --config "+file), 125, file+":1", "did you mean mount?")
	s.erase()
}

// supervisor is a program that does what systemd does with a service of type
// notify: it prints what it is told, and stops the service when it is ready.
const supervisor = `
import os, signal, socket, subprocess, sys
s = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
path, argv = sys.argv[1], sys.argv[2:]
s.bind(path)
s.settimeout(50)
p = subprocess.Popen(argv, env=dict(os.environ, NOTIFY_SOCKET=path), stdout=subprocess.DEVNULL)
stopping = False
while not stopping:
    for line in s.recv(4096).decode().split("\n"):
        print(line)
        if line == "READY=1":
            p.send_signal(signal.SIGTERM)
        stopping = stopping or line == "STOPPING=1"
print("code", p.wait(50))
os.unlink(path)
`

// TestSupervised starts a node under something that acts as systemd: it is told
// when the node is healthy, why not before, and that it stops.
func TestSupervised(t *testing.T) {
	t.Parallel()
	c := up(t, 1)
	s := c.second("n1", "sup", 8400)
	r := c.run("n1", "mkdir "+s.run()+" && env U\"\"NUM_SOCKET="+s.run()+"/sock python3 -c '"+supervisor+"' "+s.run()+"/notify UNUM up --dir "+s.dir()+
		" --mount "+s.run()+"/tree --addr "+s.address)
	want := regexp.MustCompile(`(?s)^(STATUS=[^\n]+\n)+READY=1\nSTATUS=healthy\nSTOPPING=1\ncode 0\n$`)
	if r.code != 0 || !want.MatchString(r.out) {
		t.Errorf("%v", r)
	}
	s.gone(t)
	s.erase()
}

type shownSetting struct{ Name, Value, Source string }

// setting finds one by name.
func setting(vs []shownSetting, name string) shownSetting {
	for _, v := range vs {
		if v.Name == name {
			return v
		}
	}
	return shownSetting{}
}
