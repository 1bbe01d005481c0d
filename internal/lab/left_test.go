package lab

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"sort"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/unum-os/unum/internal/errs"
)

// dieAt kills this process at the n-th time ("stage:n") a stage of making is reached.
func dieAt(spec string) {
	if spec == "" {
		return
	}
	stage, n := spec, 1
	if i := strings.LastIndexByte(spec, ':'); i > 0 {
		stage = spec[:i]
		fmt.Sscan(spec[i+1:], &n)
	}
	reached = func(s string) {
		if s == stage {
			if n--; n == 0 {
				_ = unix.Kill(os.Getpid(), unix.SIGKILL)
				select {}
			}
		}
	}
}

// alone runs the test that calls it again on what is nearly a machine of its own
// (processes, mounts, network, /run and /var/lib), so that before and after can be
// compared whatever else goes on. It reports whether this is that run.
func alone(t *testing.T) bool {
	needRoot(t)
	if os.Getenv("LAB_TEST_ALONE") != "" {
		return true
	}
	// Mount points that labs share must not be made and removed from there: others use them.
	hold := upLab(t, "hold", 1)
	exe, err := os.Executable()
	must(t, err)
	c := exec.Command(exe, "__alone", "-test.run=^"+t.Name()+"$", "-test.v", "-test.timeout=5m", fmt.Sprint("-test.short=", testing.Short()))
	c.Env = append(os.Environ(), "LAB_TEST_ALONE="+hold.dir, fmt.Sprintf("LAB_TEST_PID=%d", os.Getpid()))
	c.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: unix.CLONE_NEWPID | unix.CLONE_NEWNS | unix.CLONE_NEWNET | unix.CLONE_NEWIPC | unix.CLONE_NEWUTS, Pdeathsig: unix.SIGKILL,
	}
	out, err := c.CombinedOutput()
	t.Logf("alone:\n%s", out)
	if err != nil || !bytes.Contains(out, []byte("--- PASS: "+t.Name())) {
		t.Fatal("alone: ", err)
	}
	return false
}

// aloneMain is pid 1 of such a machine: it runs the tests and buries orphans.
func aloneMain(args []string) int {
	must := func(err error) {
		if err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
	}
	must(unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""))
	must(unix.Mount("proc", "/proc", "proc", 0, ""))
	for _, d := range []string{"/run", "/var/lib"} {
		must(unix.Mount("tmpfs", d, "tmpfs", 0, "mode=755"))
	}
	exe, err := os.Executable()
	must(err)
	pid, err := syscall.ForkExec(exe, append([]string{exe}, args...), &syscall.ProcAttr{Env: os.Environ(), Files: []uintptr{0, 1, 2}})
	must(err)
	for {
		var ws syscall.WaitStatus
		got, err := syscall.Wait4(-1, &ws, 0, nil)
		if err == nil && got == pid {
			return ws.ExitStatus()
		}
	}
}

// withStrangers is the line that says that others have labs on this machine, whose
// loop devices come and go.
const withStrangers = "loop devices of strangers"

// snapshot is everything of this machine that a lab adds to, one line a thing.
func snapshot(t *testing.T, labs []string) []string {
	t.Helper()
	var all []string
	add := func(format string, args ...any) { all = append(all, fmt.Sprintf(format, args...)) }
	procs, err := filepath.Glob("/proc/[0-9]*")
	must(t, err)
	for _, p := range procs {
		b, err := os.ReadFile(p + "/stat")
		if err != nil {
			continue // it ended
		}
		if i := bytes.LastIndexByte(b, ')'); i > 0 {
			add("process %s", b[:i+1])
		}
		spaces, _ := filepath.Glob(p + "/ns/*")
		for _, s := range spaces {
			if to, err := os.Readlink(s); err == nil {
				add("namespace %s", to)
			}
		}
	}
	b, err := os.ReadFile("/proc/self/mountinfo")
	must(t, err)
	for _, line := range strings.Split(strings.TrimSpace(string(b)), "\n") {
		add("mount %s", line)
	}
	ifs, err := net.Interfaces()
	must(t, err)
	for _, i := range ifs {
		add("interface %s", i.Name)
	}
	var free []string
	strangers := false
	for _, d := range loopDevices() {
		b, err := os.ReadFile("/sys/block/" + filepath.Base(d) + "/loop/backing_file")
		switch file := string(b); {
		case err != nil:
			free = append(free, d)
		case slices.ContainsFunc(labs, func(l string) bool { return strings.HasPrefix(file, defaultBase+"/"+l+"/") }):
			add("loop device %s %s", d, file)
		default:
			strangers = strangers || !strings.HasPrefix(file, os.Getenv("LAB_TEST_ALONE"))
		}
	}
	for _, d := range free {
		add("free loop device %s", d)
	}
	if strangers {
		add("%s", withStrangers)
	}
	hs, err := hierarchies()
	must(t, err)
	for _, h := range hs {
		for _, l := range labs {
			must(t, filepath.WalkDir(filepath.Join(h.Mount, "unum-lab", l), func(p string, e fs.DirEntry, err error) error {
				if err == nil && e.IsDir() {
					add("cgroup %s", p)
				}
				return nil
			}))
		}
	}
	for _, d := range []string{"/run", "/var/lib"} {
		must(t, filepath.WalkDir(d, func(p string, _ fs.DirEntry, err error) error {
			add("file %s", p)
			return err
		}))
	}
	sort.Strings(all)
	return slices.Compact(all)
}

// asBefore waits until the machine is as it was: what was killed may take a moment to be buried.
func asBefore(t *testing.T, what string, labs []string, before []string) {
	t.Helper()
	var diff []string
	for deadline := time.Now().Add(10 * time.Second); time.Now().Before(deadline); time.Sleep(5 * time.Millisecond) {
		diff = nil
		after := snapshot(t, labs)
		strangers := slices.Contains(before, withStrangers) || slices.Contains(after, withStrangers)
		differ := func(sign string, these, those []string) {
			for _, l := range these {
				if _, ok := slices.BinarySearch(those, l); !ok && l != withStrangers && !(strangers && strings.HasPrefix(l, "free")) {
					diff = append(diff, sign+l)
				}
			}
		}
		differ("+ ", after, before)
		differ("- ", before, after)
		if len(diff) == 0 {
			return
		}
	}
	t.Errorf("%s: not as before:\n%s", what, strings.Join(diff, "\n"))
}

// Two labs side by side; the maker of one, or one of its verbs, is killed at each
// stage. After `lab down` all is as before, and the other lab has noticed nothing.
func TestKilledLeavesNothing(t *testing.T) {
	if !alone(t) {
		return
	}
	// Control groups are not this machine's own.
	victim, standing := "victim-"+os.Getenv("LAB_TEST_PID"), "other-"+os.Getenv("LAB_TEST_PID")
	labs := []string{victim, standing}
	other, err := Up(t.Context(), Config{Hooks: testHooks(), Name: standing, Nodes: 7, DiskSize: 64 << 20})
	must(t, err)
	defer func() {
		if err := other.Down(context.Background()); err != nil {
			t.Error(err)
		}
	}()
	do := func(die string, args ...string) (string, error) {
		c := cli(t, append(args[:1:1], append([]string{"--name", victim}, args[1:]...)...)...)
		c.Env = append(os.Environ(), "LAB_TEST_DIE_AT="+die)
		out, err := c.CombinedOutput()
		return string(out), err
	}
	killed := func(err error) bool {
		var e *exec.ExitError
		return errors.As(err, &e) && e.Sys().(syscall.WaitStatus).Signal() == syscall.SIGKILL
	}
	must(t, func() error { _, err := do("", "down"); return err }())
	before := snapshot(t, labs)
	check := func(what string) {
		t.Helper()
		if out, err := do("", "down"); err != nil {
			t.Errorf("down after %s: %v\n%s", what, err, out)
		}
		asBefore(t, what, labs, before)
		if !reaches(t, other, "n1", "n7") {
			t.Errorf("after %s the other lab does not work", what)
		}
	}
	up := []string{"up", "--nodes", "2", "--witness", "--disk-size", "64M"}
	for _, stage := range []string{
		"lock", "pointer", "state", "directories", "recorded", "switch spawned", "switch", "node spawned", "node spawned:2",
		"nodes recorded", "plugged", "power", "daemon", "daemon:2", "healthy",
	} {
		if out, err := do(stage, up...); !killed(err) {
			t.Fatalf("up was not killed at %s: %v\n%s", stage, err, out)
		}
		if stage == "power" { // a half made lab says so and does nothing else
			for _, v := range []string{"start n1", "add", "wipe n1"} {
				if out, err := do("", strings.Fields(v)...); exitCode(err) != 125 || !strings.Contains(out, "unum lab down --name "+victim) {
					t.Errorf("%s on a half made lab: %v\n%s", v, err, out)
				}
			}
		}
		check("up killed at " + stage)
	}
	// The other verbs.
	for _, v := range []struct{ die, verb string }{
		{"recorded", "add --count 2"}, {"node spawned:2", "add --count 2"}, {"plugged", "add"}, {"daemon", "add"}, {"plugged", "start n2"},
		{"wiping", "wipe n2"}, {"relay", "loss n2 5%"},
	} {
		if out, err := do("", up...); err != nil {
			t.Fatalf("up: %v\n%s", err, out)
		}
		if strings.HasPrefix(v.verb, "start") {
			if out, err := do("", "kill", "n2"); err != nil {
				t.Errorf("kill: %v\n%s", err, out)
			}
		}
		if out, err := do(v.die, strings.Fields(v.verb)...); !killed(err) {
			t.Errorf("%s was not killed at %s: %v\n%s", v.verb, v.die, err, out)
		}
		if strings.HasPrefix(v.verb, "wipe") || strings.HasPrefix(v.verb, "add") { // said again, it is whole
			n := map[string]string{"wipe n2": "n2", "add": "n4", "add --count 2": "n4,n5"}[v.verb]
			for _, again := range [][]string{{"wipe", n}, {"start", n}} {
				if out, err := do("", again...); err != nil {
					t.Errorf("%v after a killed %s: %v\n%s", again, v.verb, err, out)
				}
			}
		}
		check(v.verb + " killed at " + v.die)
	}
	// Where the name is forgotten, the one there is is named.
	c := cli(t, "kill", "n1")
	if out, err := c.CombinedOutput(); exitCode(err) != 125 || !strings.Contains(string(out), "--name "+standing) {
		t.Errorf("name forgotten: %v\n%s", err, out)
	}
	c = cli(t, "down")
	if out, err := c.CombinedOutput(); err != nil || !strings.Contains(string(out), "unum lab down --name "+standing) {
		t.Errorf("name forgotten: %v\n%s", err, out)
	}
	if !reaches(t, other, "n2", "n3") {
		t.Error("and nothing was done to it")
	}
}

// without runs the lab's command line without a right or a device.
func without(what string, args []string) int {
	runtime.LockOSThread()
	check := func(err error) {
		if err != nil {
			fmt.Println(err)
			os.Exit(99)
		}
	}
	switch kind, arg, _ := strings.Cut(what, ":"); kind {
	case "root":
		if os.Geteuid() == 0 {
			check(syscall.Setgroups(nil))
			check(syscall.Setgid(65534))
			check(syscall.Setuid(65534))
		}
	case "capability":
		check(unix.Prctl(unix.PR_CAPBSET_DROP, unix.CAP_SYS_ADMIN, 0, 0, 0))
		os.Args = append([]string{os.Args[0], "lab"}, args[1:]...)
		check(unix.Exec("/proc/self/exe", os.Args, os.Environ()))
	case "device":
		check(unix.Unshare(unix.CLONE_NEWNS))
		check(unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""))
		check(unix.Mount("tmpfs", "/dev", "tmpfs", 0, "mode=755"))
		check(os.MkdirAll("/dev/net", 0o755))
		for dev, n := range map[string][2]uint32{"null": {1, 3}, "loop-control": {10, 237}, "fuse": {10, 229}, "net/tun": {10, 200}} {
			if dev != arg {
				check(unix.Mknod("/dev/"+dev, unix.S_IFCHR|0o666, int(unix.Mkdev(n[0], n[1]))))
			}
		}
		os.Args = append([]string{os.Args[0], "lab"}, args[1:]...)
		check(unix.Exec("/proc/self/exe", os.Args, os.Environ())) // for all of its threads
	case "programs":
		os.Setenv("PATH", "/nonexistent")
	}
	return runCLI(args[1:])
}

// What is missing is said in clear words, with what to type.
func TestWithoutRights(t *testing.T) {
	exe, err := os.Executable()
	must(t, err)
	name := fmt.Sprintf("wo-%d", os.Getpid())
	do := func(what string, args ...string) (string, int) {
		t.Helper()
		args = append([]string{args[0], "--name", name}, args[1:]...)
		out, err := exec.Command(exe, append([]string{"__without", what, "lab"}, args...)...).CombinedOutput()
		return string(out), exitCode(err)
	}
	says := func(what string, args []string, words ...string) {
		t.Helper()
		out, code := do(what, args...)
		if code != 125 {
			t.Errorf("%v without %s: code %d\n%s", args, what, code, out)
		}
		for _, w := range words {
			if !strings.Contains(out, w) {
				t.Errorf("%v without %s does not say %q:\n%s", args, what, w, out)
			}
		}
	}
	up := []string{"up"}
	says("root", up, "need root", "you are user", "sudo unum")
	if os.Geteuid() != 0 {
		return
	}
	says("capability", up, "may not make namespaces", "--privileged")
	says("device:fuse", up, "/dev/fuse", "modprobe fuse")
	says("device:loop-control", up, "/dev/loop-control", "modprobe loop")
	says("programs", up, "ip, tc, nsenter, mkfs.ext4, sh not found", "apt-get install iproute2 util-linux e2fsprogs dash")
	if _, err := Open(name, Hooks{}); !errs.Has(err, errs.NotFound) {
		t.Errorf("something was made: %v", err)
	}

	needRoot(t)
	l := upLab(t, "wo", 1)
	for _, args := range [][]string{{"kill", "n1"}, {"status"}, {"exec", "n1", "--", "true"}, {"down"}, {"add"}, {"logs", "n1"}, {"clock", "n1", "0"}} {
		says("root", args, "need root")
	}
	says("device:net/tun", []string{"rate", "n1", "1mbit"}, "/dev/net/tun", "modprobe tun")
	if st, err := l.Status(t.Context()); err != nil || len(st.Links) > 0 || !st.Nodes[0].Healthy {
		t.Errorf("a fault that could not be made is in force: %+v, %v", st, err)
	}
	must(t, l.Rate(t.Context(), "n1", 1_000_000))
}
