package doctor

import (
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/unum-os/unum/internal/health"
)

func (m *Machine) settings(context.Context) Finding {
	f := Finding{Code: "settings", Severity: Needed, OK: m.Settings == nil, Text: "the settings can be read", Effect: "the node does not start"}
	if m.Settings != nil {
		f.Text, f.Remedy, _ = strings.Cut(m.Settings.Error(), "\ntry: ")
		if f.Remedy == "" {
			f.Remedy = "mend the file; unum config --example shows one"
		}
	}
	return f
}

func (m *Machine) root(context.Context) Finding {
	return Finding{Code: "root", Severity: Wanted, OK: os.Geteuid() == 0, Text: fmt.Sprintf("you are user %d", os.Geteuid()),
		Effect: "you can use a node here but not start one, and some checks below see less", Remedy: "sudo unum doctor"}
}

func release() string {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return ""
	}
	return unix.ByteSliceToString(u.Release[:])
}

func (m *Machine) kernel(context.Context) Finding {
	return Finding{Code: "kernel", Severity: Info, OK: release() != "", Text: "Linux " + release()}
}

func (m *Machine) fuse(context.Context) Finding {
	f := Finding{Code: "fuse", Severity: Needed, Text: "/dev/fuse can be opened", Effect: "the tree cannot be mounted: no node here"}
	d, err := os.OpenFile("/dev/fuse", os.O_RDWR|unix.O_CLOEXEC, 0)
	if err == nil {
		d.Close()
		f.OK = true
		return f
	}
	f.Text = err.Error()
	switch {
	case errors.Is(err, os.ErrPermission):
		f.Remedy = "sudo unum doctor; in a container, run it with --device /dev/fuse"
	case errors.Is(err, os.ErrNotExist), errors.Is(err, syscall.ENXIO), errors.Is(err, syscall.ENODEV):
		f.Fix = [][]string{{"modprobe", "fuse"}}
	default:
		f.Remedy = "modprobe fuse, or a kernel with FUSE"
	}
	return f
}

// passthrough is since Linux 6.9, where it was built in.
func (m *Machine) passthrough(context.Context) Finding {
	f := Finding{Code: "fuse-passthrough", Severity: Info, Effect: "nothing in this version; a later one can serve open files without the daemon where it is there",
		Remedy: "a kernel of 6.9 or newer with CONFIG_FUSE_PASSTHROUGH=y"}
	rel := release()
	if !atLeast(rel, 6, 9) {
		f.Text = "Linux " + rel + " has no FUSE passthrough, which came with 6.9"
		return f
	}
	switch v := kernelOption("CONFIG_FUSE_PASSTHROUGH", rel); v {
	case "y":
		f.OK, f.Text = true, "the kernel has FUSE passthrough"
	case "":
		f.Text = "whether this kernel was built with FUSE passthrough is not known: it shows no configuration"
	default:
		f.Text = "this kernel was built without FUSE passthrough"
	}
	return f
}

var number = regexp.MustCompile(`\d+`)

// atLeast compares the first two numbers of a version.
func atLeast(version string, major, minor int) bool {
	n := number.FindAllString(version, 2)
	if len(n) < 2 {
		return false
	}
	a, aerr := strconv.Atoi(n[0])
	b, berr := strconv.Atoi(n[1])
	return aerr == nil && berr == nil && (a > major || a == major && b >= minor)
}

// kernelOption returns y, m, or n from the kernel's configuration; "" if none can
// be read.
func kernelOption(name, rel string) string {
	for _, path := range []string{"/proc/config.gz", "/boot/config-" + rel, "/lib/modules/" + rel + "/config"} {
		b, err := os.ReadFile(path)
		if err != nil {
			continue
		}
		if strings.HasSuffix(path, ".gz") {
			z, err := gzip.NewReader(bytes.NewReader(b))
			if err != nil {
				continue
			}
			if b, err = io.ReadAll(io.LimitReader(z, 4<<20)); err != nil {
				continue
			}
		}
		return option(string(b), name)
	}
	return ""
}

func option(text, name string) string {
	for line := range strings.Lines(text) {
		if v, ok := strings.CutPrefix(strings.TrimSpace(line), name+"="); ok {
			return v
		}
	}
	return "n"
}

// tryLimit bounds a program that a check starts, which else might hang.
const tryLimit = 10 * time.Second

func (m *Machine) namespaces(ctx context.Context) Finding {
	f := Finding{Code: "namespaces", Severity: Needed, OK: true, Text: "namespaces can be made", Effect: "commands cannot be started, nor the tree mounted: no node here",
		Remedy: "in a container, run it with --privileged"}
	ctx, cancel := context.WithTimeout(ctx, tryLimit)
	defer cancel()
	if err := m.TryJob(ctx); err != nil {
		f.OK, f.Text = false, fmt.Sprintf("this user may not make namespaces: %v", err)
		if os.Geteuid() != 0 { // said already, and no lack of the machine
			f.Severity, f.Remedy = Info, "sudo unum doctor"
			f.Effect = "whether root may is not known"
		}
	}
	return f
}

// jobControllers are those by which jobs are counted and found; either of the
// sets does.
var (
	wantV1 = []string{"cpuacct", "memory", "pids", "freezer"}
	wantV2 = []string{"memory", "pids"}
)

func (m *Machine) cgroups(context.Context) Finding {
	f := Finding{Code: "cgroups", Severity: Wanted, Effect: "jobs are not accounted for, and processes that leave their session are not found"}
	b, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		f.Text = err.Error()
		return f
	}
	v1, v2 := hierarchies(string(b))
	var ctl []byte
	if v2 != "" {
		if ctl, err = os.ReadFile(filepath.Join(v2, "cgroup.controllers")); err != nil {
			f.Text = err.Error()
			return f
		}
	}
	f.OK, f.Text = judge(v1, v2, strings.Fields(string(ctl)))
	switch {
	case f.OK:
	case v2 == "" && len(v1) == 0:
		f.Fix = [][]string{{"mount", "-t", "cgroup2", "none", "/sys/fs/cgroup"}}
	default:
		f.Remedy = "mount -t cgroup -o NAME none /sys/fs/cgroup/NAME for each one that is missing, or boot with systemd.unified_cgroup_hierarchy=1"
	}
	return f
}

// hierarchies lists the controllers of version 1 that are mounted, and where
// version 2 is.
func hierarchies(mounts string) (v1 []string, v2 string) {
	for line := range strings.Lines(mounts) {
		w := strings.Fields(line)
		if len(w) < 4 {
			continue
		}
		switch w[2] {
		case "cgroup":
			for _, c := range wantV1 {
				if slices.Contains(strings.Split(w[3], ","), c) && !slices.Contains(v1, c) {
					v1 = append(v1, c)
				}
			}
		case "cgroup2":
			if v2 == "" {
				v2 = w[1]
			}
		}
	}
	return v1, v2
}

func judge(v1 []string, v2 string, controllers []string) (bool, string) {
	if len(v1) == 0 && v2 == "" {
		return false, "no control groups are mounted"
	}
	lack := func(want, have []string) []string {
		return slices.DeleteFunc(slices.Clone(want), func(c string) bool { return slices.Contains(have, c) })
	}
	l1, l2 := lack(wantV1, v1), lack(wantV2, controllers)
	switch {
	case len(l1) == 0:
		return true, "control groups version 1 with " + strings.Join(wantV1, ", ")
	case len(l2) == 0 && v2 != "":
		return true, "control groups version 2 with " + strings.Join(wantV2, ", ")
	case len(v1) > 0:
		return false, "control groups version 1 lack " + strings.Join(l1, ", ")
	}
	return false, "control groups version 2 at " + v2 + " lack " + strings.Join(l2, ", ")
}

var criuVersion = regexp.MustCompile(`Version:\s*(\S+)`)

func (m *Machine) criu(ctx context.Context) Finding {
	f := Finding{Code: "criu", Severity: Info, Effect: "nothing in this version; a later one moves running jobs with it",
		Remedy: "install criu 4.2 or newer, from source where the distribution has an older one"}
	path, err := exec.LookPath("criu")
	if err != nil {
		f.Text = "criu is not installed"
		return f
	}
	ctx, cancel := context.WithTimeout(ctx, tryLimit)
	defer cancel()
	out, err := exec.CommandContext(ctx, path, "--version").CombinedOutput()
	v := criuVersion.FindSubmatch(out)
	if err != nil || v == nil {
		f.Text = fmt.Sprintf("%s does not say its version: %v", path, err)
		return f
	}
	f.OK, f.Text = atLeast(string(v[1]), 4, 2), "criu "+string(v[1])
	return f
}

// maxOffset is how far clocks may be apart. Nothing decides by the time of day
// but certificates, which have a day of grace, and what people read: times of
// files and make.
const maxOffset = health.ClockApart

func (m *Machine) clock(context.Context) []Finding {
	f := Finding{Code: "clock", Severity: Wanted, Effect: "times of files differ between nodes, so make may do too much or too little; more than a day off, certificates are refused",
		Remedy: "timedatectl set-ntp true, or apt-get install chrony"}
	var tx unix.Timex
	state, err := unix.Adjtimex(&tx)
	switch {
	case err != nil:
		f.Text = fmt.Sprintf("whether the clock is synchronised is not known: %v", err)
	case state == unix.TIME_ERROR || tx.Status&unix.STA_UNSYNC != 0:
		f.Text = "nothing synchronises this machine's clock"
	default:
		f.OK, f.Text = true, fmt.Sprintf("the clock is synchronised, at most %v off", time.Duration(tx.Maxerror)*time.Microsecond)
	}
	out := []Finding{f}
	if m.Clocks != nil {
		out = append(out, m.offsets())
	}
	return out
}

func (m *Machine) offsets() Finding {
	f := Finding{Code: "clock-offset", Severity: Wanted, OK: true, Text: fmt.Sprintf("the clocks of %d other nodes agree with this one's", len(m.Clocks)),
		Effect: "times of files differ between nodes, so make may do too much or too little", Remedy: "synchronise the clocks of these nodes: timedatectl set-ntp true"}
	var off []string
	for n, d := range m.Clocks {
		if d.Abs() > maxOffset {
			off = append(off, fmt.Sprintf("%s by %v", n, d.Round(time.Millisecond)))
		}
	}
	if len(off) > 0 {
		slices.Sort(off)
		f.OK, f.Text = false, "clocks differ from this one's: "+strings.Join(off, ", ")
	}
	return f
}

func (m *Machine) directory(context.Context) Finding {
	f := Finding{Code: "directory", Severity: Info, Text: m.Dir + " is there", Effect: "nothing: the first start makes it", OK: true}
	fi, err := os.Stat(m.Dir)
	switch {
	case errors.Is(err, os.ErrNotExist):
		f.OK, f.Text = false, m.Dir+" does not exist yet"
		// What the first start makes, with its rights.
		f.Fix = [][]string{{"mkdir", "-p", "-m", "711", m.Dir}, {"mkdir", "-p", m.LogDir}}
	case err != nil:
		f.OK, f.Severity, f.Text, f.Effect = false, Needed, err.Error(), "the node does not start"
		f.Remedy = "sudo unum doctor, or name another directory: --dir"
	case !fi.IsDir():
		f.OK, f.Severity, f.Text, f.Effect = false, Needed, m.Dir+" is no directory", "the node does not start"
		f.Remedy = "name another directory: --dir, or dir in the settings"
	}
	return f
}

// existing is the directory, or the nearest one above it that exists.
func existing(dir string) string {
	for {
		if fi, err := os.Stat(dir); err == nil && fi.IsDir() || dir == "/" {
			return dir
		}
		dir = filepath.Dir(dir)
	}
}

func (m *Machine) port(ctx context.Context) Finding {
	port := m.Port
	if _, p, err := net.SplitHostPort(m.Addr); err == nil {
		port, _ = strconv.Atoi(p) // checked when the settings were read
	}
	f := Finding{Code: "port", Severity: Needed, OK: true, Effect: "the node does not start"}
	if _, p, err := net.SplitHostPort(m.DaemonAddr); err == nil && p == strconv.Itoa(port) {
		f.Text = fmt.Sprintf("TCP port %d is held by this machine's daemon, process %d", port, m.Pid)
		return f
	}
	var lc net.ListenConfig
	l, err := lc.Listen(ctx, "tcp", ":"+strconv.Itoa(port))
	if err != nil {
		f.OK, f.Text = false, fmt.Sprintf("TCP port %d cannot be listened on: %v", port, cause(err))
		f.Remedy = fmt.Sprintf("ss -ltnp 'sport = :%d' says who holds it; or take another: --addr HOST:PORT", port)
		if m.Pid > 0 && m.DaemonAddr == "" { // most probably it
			f.Severity, f.Text = Info, fmt.Sprintf("TCP port %d is in use; the daemon, process %d, does not say whether by itself", port, m.Pid)
		}
		return f
	}
	l.Close()
	f.Text = fmt.Sprintf("TCP port %d is free; it must be open between all nodes", port)
	return f
}

func cause(err error) error {
	var se *os.SyscallError
	if errors.As(err, &se) {
		return se.Err
	}
	return err
}

// wantFiles is room for a few thousand connections, open files and segments.
const wantFiles = 65536

func (m *Machine) files(context.Context) Finding {
	f := Finding{Code: "open-files", Severity: Wanted, Effect: "a node with many open files and connections runs out of descriptors",
		Remedy: fmt.Sprintf("ulimit -Hn %d before unum up, as root; the systemd unit sets its own", wantFiles)}
	var r unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &r); err != nil {
		f.Text = err.Error()
		return f
	}
	f.OK, f.Text = r.Max >= wantFiles, fmt.Sprintf("a process may have %d files open", r.Max)
	return f
}

// tools are needed by the lab only, with their packages in Debian.
func (m *Machine) tools(context.Context) []Finding {
	var out []Finding
	for _, t := range []struct{ name, pkg string }{{"ip", "iproute2"}, {"tc", "iproute2"}, {"mkfs.ext4", "e2fsprogs"}, {"nsenter", "util-linux"}} {
		f := Finding{Code: "lab-" + t.name, Severity: Wanted, Effect: "unum lab does not work; nodes do"}
		path, err := exec.LookPath(t.name)
		if f.OK = err == nil; f.OK {
			f.Text = path
		} else {
			f.Text = t.name + " is not installed"
			f.Remedy = "install " + t.pkg
			if _, err := exec.LookPath("apt-get"); err == nil {
				f.Remedy, f.Fix = "", [][]string{{"apt-get", "update", "-q"}, {"apt-get", "install", "-q", "-y", t.pkg}}
			}
		}
		out = append(out, f)
	}
	return out
}

func (m *Machine) daemon(context.Context) Finding {
	f := Finding{Code: "daemon", Severity: Needed, OK: m.Health == nil, Text: fmt.Sprintf("process %d is healthy", m.Pid)}
	switch {
	case m.Pid == 0 && m.Health == nil:
		f.Severity, f.OK = Info, false
		f.Text, f.Effect, f.Remedy = "no daemon is running on this machine", "there is no tree here", "unum up -d, if this machine is a node; if not, unum up -d makes a new cluster of it, unum join -d ADDR TOKEN a node of another's"
	case m.Health != nil:
		f.Text, f.Remedy, _ = strings.Cut(m.Health.Error(), "\ntry: ")
		f.Effect = "the tree may not answer"
		if f.Remedy == "" {
			f.Remedy = "unum status"
		}
	}
	return f
}
