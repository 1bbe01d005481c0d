package lab

import (
	"bufio"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/unum-os/unum/internal/errs"
)

// hierarchy is one mounted cgroup tree of the machine.
type hierarchy struct {
	Mount   string
	Type    string // cgroup or cgroup2
	Options string // for mounting it again: controllers or name=
}

// hierarchies lists the cgroup trees this process sees, each once.
func hierarchies() ([]hierarchy, error) {
	f, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return nil, errs.Wrap(err, "lab", "cgroups")
	}
	defer f.Close()
	var hs []hierarchy
	seen := map[string]bool{}
	sc := bufio.NewScanner(f)
	for sc.Scan() {
		left, right, ok := strings.Cut(sc.Text(), " - ")
		l, r := strings.Fields(left), strings.Fields(right)
		if !ok || len(l) < 5 || len(r) < 3 || (r[0] != "cgroup" && r[0] != "cgroup2") || seen[l[2]] {
			continue
		}
		seen[l[2]] = true
		h := hierarchy{Mount: l[4], Type: r[0]}
		if h.Type == "cgroup" {
			var opts []string
			for _, o := range strings.Split(r[2], ",") {
				if o == "rw" || o == "ro" || strings.HasPrefix(o, "release_agent=") {
					continue
				}
				if strings.HasPrefix(o, "name=") {
					opts = append([]string{"none"}, opts...)
				}
				opts = append(opts, o)
			}
			h.Options = strings.Join(opts, ",")
		}
		hs = append(hs, h)
	}
	return hs, errs.Wrap(sc.Err(), "lab", "cgroups")
}

// cgroupDirs returns the directories of the lab's member (n1, switch, or "" for
// the lab as a whole) in every hierarchy.
func cgroupDirs(name, member string) ([]string, error) {
	hs, err := hierarchies()
	if err != nil {
		return nil, err
	}
	var dirs []string
	for _, h := range hs {
		dirs = append(dirs, filepath.Join(h.Mount, "unum-lab", name, member))
	}
	return dirs, nil
}

// makeCgroups makes the member's cgroup in every hierarchy that lets us, and
// returns those made. A hierarchy that refuses (read-only, delegated) is left
// out; without any the lab still works, but finds processes by name only.
func makeCgroups(name, member string) ([]string, error) {
	dirs, err := cgroupDirs(name, member)
	if err != nil {
		return nil, err
	}
	var made []string
	for _, d := range dirs {
		if makeAll(d, 0o755) != nil {
			continue
		}
		// A cpuset takes no process before it has CPUs and memory.
		for _, f := range []string{"cpuset.cpus", "cpuset.mems"} {
			inheritCpuset(d, f)
		}
		made = append(made, d)
	}
	return made, nil
}

// inheritCpuset fills file f of cgroup dir from its parents where it is empty.
func inheritCpuset(dir, f string) string {
	b, err := os.ReadFile(filepath.Join(dir, f))
	if err != nil {
		return ""
	}
	if v := strings.TrimSpace(string(b)); v != "" {
		return v
	}
	v := inheritCpuset(filepath.Dir(dir), f)
	if v != "" {
		// In the unified hierarchy an empty cpuset means "as the parent": a refusal harms nothing.
		_ = os.WriteFile(filepath.Join(dir, f), []byte(v), 0o644)
	}
	return v
}

// cgroupPids returns every process in the cgroups dirs and those below them.
func cgroupPids(dirs []string) []int {
	seen := map[int]bool{}
	var pids []int
	for _, d := range dirs {
		_ = filepath.WalkDir(d, func(p string, e fs.DirEntry, err error) error {
			if err != nil || !e.IsDir() {
				return nil // it went away meanwhile
			}
			b, err := os.ReadFile(filepath.Join(p, "cgroup.procs"))
			if err != nil {
				return nil
			}
			for _, s := range strings.Fields(string(b)) {
				if pid, err := strconv.Atoi(s); err == nil && pid > 0 && !seen[pid] {
					seen[pid] = true
					pids = append(pids, pid)
				}
			}
			return nil
		})
	}
	return pids
}

// stuckAfter is how long a killed process may take to die before its mounts are
// suspected.
const stuckAfter = 300 * time.Millisecond

// killCgroups kills every process in dirs, at once where the kernel can
// (cgroup.kill), and waits until none is left.
func killCgroups(dirs []string) error {
	start := time.Now()
	deadline, stuck := start.Add(goneTimeout), start.Add(stuckAfter)
	for {
		for _, d := range dirs {
			_ = os.WriteFile(filepath.Join(d, "cgroup.kill"), []byte("1"), 0)
		}
		pids := cgroupPids(dirs)
		if len(pids) == 0 {
			return nil
		}
		for _, pid := range pids {
			_ = unix.Kill(pid, unix.SIGKILL)
		}
		if time.Now().After(stuck) {
			abortMounts(pids)
			stuck = time.Now().Add(stuckAfter)
		}
		if time.Now().After(deadline) {
			return errs.E(errs.Timeout, "lab: kill", "", "%d processes (the first: %d) do not die", len(pids), pids[0])
		}
		time.Sleep(2 * time.Millisecond)
	}
}

// removeCgroups removes dirs and all below them. They must have no process.
func removeCgroups(dirs []string) error {
	deadline := time.Now().Add(goneTimeout)
	for _, d := range dirs {
		for {
			err := removeCgroup(d)
			if err == nil {
				break
			}
			// Busy for a moment after its last process went.
			if !errors.Is(err, unix.EBUSY) || time.Now().After(deadline) {
				return errs.Wrap(err, "lab: remove cgroup", d)
			}
			time.Sleep(2 * time.Millisecond)
		}
		// The parents go when no other lab needs them.
		for p := filepath.Dir(d); filepath.Base(p) == "unum-lab" || filepath.Base(filepath.Dir(p)) == "unum-lab"; p = filepath.Dir(p) {
			if unix.Rmdir(p) != nil {
				break
			}
		}
	}
	return nil
}

func removeCgroup(dir string) error {
	ents, err := os.ReadDir(dir)
	if err != nil {
		if os.IsNotExist(err) {
			return nil
		}
		return err
	}
	for _, e := range ents {
		if e.IsDir() {
			if err := removeCgroup(filepath.Join(dir, e.Name())); err != nil {
				return err
			}
		}
	}
	if err := unix.Rmdir(dir); err != nil && err != unix.ENOENT {
		return err
	}
	return nil
}
