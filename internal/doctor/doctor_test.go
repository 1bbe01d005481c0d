package doctor

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/unum-os/unum/internal/errs"
)

// machine is this one, with a data directory and a port of the test's own.
func machine(t *testing.T) *Machine {
	t.Helper()
	dir := t.TempDir()
	l, err := net.Listen("tcp", ":0")
	if err != nil {
		t.Fatal(err)
	}
	port := l.Addr().(*net.TCPAddr).Port
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	return &Machine{Dir: filepath.Join(dir, "data", "node"), LogDir: filepath.Join(dir, "log"), Port: port,
		TryJob: func(context.Context) error { return nil }}
}

func find(t *testing.T, fs []Finding, code string) Finding {
	t.Helper()
	i := slices.IndexFunc(fs, func(f Finding) bool { return f.Code == code })
	if i < 0 {
		t.Fatalf("no finding %s in %v", code, fs)
	}
	return fs[i]
}

// TestExamine: on a real machine every finding has words, and a bad one what to
// do; nothing is left behind.
func TestExamine(t *testing.T) {
	m := machine(t)
	fs := m.Examine(t.Context())
	seen := map[string]bool{}
	for _, f := range fs {
		if seen[f.Code] {
			t.Errorf("%s is there twice", f.Code)
		}
		seen[f.Code] = true
		if f.Text == "" || f.Severity == "" {
			t.Errorf("it says nothing: %+v", f)
		}
		if f.OK && (f.Effect != "" || f.Remedy != "" || f.Fix != nil) {
			t.Errorf("a good one has a remedy: %+v", f)
		}
		if !f.OK && f.Remedy == "" {
			t.Errorf("a bad one has none: %+v", f)
		}
	}
	if len(fs) < 15 || m.Dir == "" {
		t.Errorf("%d findings", len(fs))
	}
	if f := find(t, fs, "disk-sync"); !strings.Contains(f.Text, "(median and maximum of ") {
		t.Errorf("%+v", f)
	}
	if f := find(t, fs, "port"); !f.OK {
		t.Errorf("%+v", f)
	}
	if f := find(t, fs, "daemon"); f.OK || f.Severity != Info {
		t.Errorf("%+v", f)
	}
	if left, err := os.ReadDir(filepath.Dir(filepath.Dir(m.Dir))); err != nil || len(left) > 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
}

// TestFix: what can be mended is, is told before, and is good afterwards.
func TestFix(t *testing.T) {
	m := machine(t)
	before := m.Examine(t.Context())
	if f := find(t, before, "directory"); f.OK {
		t.Fatalf("%+v", f)
	}
	only := slices.DeleteFunc(slices.Clone(before), func(f Finding) bool { return f.Code != "directory" })
	var told []string
	err := Fix(t.Context(), only, func(s string) {
		if len(told) == 0 {
			if _, err := os.Stat(m.Dir); err == nil {
				t.Error("it was done before it was told")
			}
		}
		told = append(told, s)
	})
	if os.Geteuid() != 0 {
		if !errs.Has(err, errs.Permission) || len(told) > 0 {
			t.Errorf("not root: %v, %v", err, told)
		}
		return
	}
	if want := []string{"running: mkdir -p -m 711 " + m.Dir, "running: mkdir -p " + m.LogDir}; err != nil || !slices.Equal(told, want) {
		t.Errorf("%v, told %q", err, told)
	}
	if f := find(t, m.Examine(t.Context()), "directory"); !f.OK {
		t.Errorf("%+v", f)
	}
	if fi, err := os.Stat(m.Dir); err != nil || fi.Mode().Perm() != 0o711 {
		t.Errorf("%v, %v", fi.Mode(), err)
	}

	// One that fails says why and what follows it is not tried; the same is not
	// done twice; other findings go on.
	mark := filepath.Join(t.TempDir(), "mark")
	told = nil
	err = Fix(t.Context(), []Finding{
		{Code: "a", Fix: [][]string{{"sh", "-c", "echo first; echo it is broken >&2; exit 3"}, {"touch", mark}}},
		{Code: "b", Fix: [][]string{{"mkdir", mark + "2"}}}, {Code: "c", Fix: [][]string{{"mkdir", mark + "2"}}},
		{Code: "d", OK: true, Fix: [][]string{{"touch", mark}}}, {Code: "e"},
	}, func(s string) { told = append(told, s) })
	if all := strings.Join(told, "\n"); err != nil || !strings.Contains(all, "failed: sh: exit status 3: it is broken") || strings.Count(all, "failed") != 1 || len(told) != 3 {
		t.Errorf("%v, %q", err, told)
	}
	if _, err := os.Stat(mark); err == nil {
		t.Error("what stands on a fix that failed was done, or a good finding was mended")
	}
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(errs.Interrupted.Err())
	if err := Fix(ctx, []Finding{{Code: "x", Fix: [][]string{{"sleep", "1000"}}}}, func(string) {}); !errs.Has(err, errs.Interrupted) {
		t.Errorf("%v", err)
	}
}

// TestWhatIsWrong: each thing that can be taken away from a test is found.
func TestWhatIsWrong(t *testing.T) {
	m := machine(t)
	l, err := net.Listen("tcp", ":"+strconv.Itoa(m.Port))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if f := find(t, m.Examine(t.Context()), "port"); f.OK || f.Severity != Needed || !strings.Contains(f.Text, "address already in use") || !strings.Contains(f.Remedy, "ss -ltnp") {
		t.Errorf("%+v", f)
	}
	m.Pid, m.DaemonAddr = 77, "10.0.0.1:"+strconv.Itoa(m.Port)
	m.Clocks = map[string]time.Duration{"n2": 300 * time.Millisecond, "n3": -time.Hour}
	fs := m.Examine(t.Context())
	if f := find(t, fs, "port"); !f.OK || !strings.Contains(f.Text, "daemon, process 77") {
		t.Errorf("%+v", f)
	}
	if f := find(t, fs, "clock-offset"); f.OK || !strings.Contains(f.Text, "n3 by -1h0m0s") || strings.Contains(f.Text, "n2") {
		t.Errorf("%+v", f)
	}
	if f := find(t, fs, "daemon"); !f.OK {
		t.Errorf("%+v", f)
	}
	m.Health = errs.E(errs.NoQuorum, "health", "n1", "no leader").WithRemedy("start the others")
	m.Settings = errs.E(errs.Invalid, "", "f:3", "no setting x")
	m.TryJob = func(context.Context) error { return errors.New("not permitted") }
	fs = m.Examine(t.Context())
	if f := find(t, fs, "daemon"); f.OK || f.Severity != Needed || f.Text != "health n1: no leader" || f.Remedy != "start the others" {
		t.Errorf("%+v", f)
	}
	if f := find(t, fs, "settings"); f.OK || f.Severity != Needed || f.Remedy == "" {
		t.Errorf("%+v", f)
	}
	if f := find(t, fs, "namespaces"); f.OK || os.Geteuid() == 0 && f.Severity != Needed {
		t.Errorf("%+v", f)
	}
	if Good(fs) {
		t.Error("all is well?")
	}
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	m.Dir = file
	if f := find(t, m.Examine(t.Context()), "directory"); f.OK || f.Severity != Needed {
		t.Errorf("%+v", f)
	}
	m.Dir = "/dev/shm/none/none"
	if f := find(t, m.Examine(t.Context()), "disk-type"); existing(m.Dir) == "/dev/shm" && (f.OK || !strings.Contains(f.Text, "tmpfs")) {
		t.Errorf("%+v", f)
	}
	// Without a PATH no tool is found.
	t.Setenv("PATH", t.TempDir())
	fs = m.Examine(t.Context())
	for _, code := range []string{"lab-ip", "lab-tc", "lab-mkfs.ext4", "lab-nsenter", "criu"} {
		if f := find(t, fs, code); f.OK || !strings.Contains(f.Text, "not installed") {
			t.Errorf("%+v", f)
		}
	}
}

func TestVersions(t *testing.T) {
	for v, want := range map[string]bool{"6.9.0": true, "6.18.44-x": true, "7.0": true, "6.8.12": false, "5.10.0-9": false, "6": false, "": false, "99999999999999999999.1": false} {
		if atLeast(v, 6, 9) != want {
			t.Errorf("%s: %v", v, !want)
		}
	}
	conf := "# CONFIG_A is not set\nCONFIG_FUSE_FS=m\nCONFIG_FUSE_PASSTHROUGH=y\n"
	if option(conf, "CONFIG_FUSE_PASSTHROUGH") != "y" || option(conf, "CONFIG_FUSE_FS") != "m" || option(conf, "CONFIG_A") != "n" || option(conf, "CONFIG_FUSE") != "n" {
		t.Error("options")
	}
	if v := criuVersion.FindStringSubmatch("Version: 4.2\nGitID: v4.2\n"); v == nil || v[1] != "4.2" || !atLeast(v[1], 4, 2) {
		t.Errorf("%v", v)
	}
}

func TestCgroups(t *testing.T) {
	v1 := ""
	for _, c := range []string{"cpu,cpuacct", "memory", "pids", "freezer"} {
		v1 += fmt.Sprintf("cgroup /sys/fs/cgroup/%s cgroup rw,relatime,%s 0 0\n", c, c)
	}
	for _, v := range []struct {
		mounts, controllers string
		ok                  bool
		text                string
	}{
		{"", "", false, "no control groups are mounted"},
		{v1, "", true, "version 1"},
		{"cgroup2 /sys/fs/cgroup cgroup2 rw 0 0\n", "cpu memory pids", true, "version 2"},
		{"cgroup2 /sys/fs/cgroup cgroup2 rw 0 0\n", "cpu", false, "lack memory, pids"},
		{v1 + "cgroup2 /sys/fs/cgroup/unified cgroup2 rw 0 0\n", "", true, "version 1"},
		{"cgroup /c cgroup rw,pids 0 0\ncgroup2 /u cgroup2 rw 0 0\n", "", false, "version 1 lack cpuacct, memory, freezer"},
		{"cgroup /c cgroup rw,name=systemd 0 0\n", "", false, "no control groups"},
	} {
		a, b := hierarchies(v.mounts)
		if ok, text := judge(a, b, strings.Fields(v.controllers)); ok != v.ok || !strings.Contains(text, v.text) {
			t.Errorf("%q, %q: %v, %s", v.mounts, v.controllers, ok, text)
		}
	}
}
