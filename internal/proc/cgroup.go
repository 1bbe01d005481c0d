package proc

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

// cgroups is where the control groups of a node's jobs are made: below base in
// each hierarchy that is mounted. It is empty on a machine that has none.
type cgroups struct {
	v1 []string // base directories of the hierarchies used, freezer, pids, ...
	v2 string   // base directory in the unified hierarchy, if it has controllers

	depth int // how many directories base is below the hierarchy's root
}

// v1Controllers are the hierarchies a job is put in: to count its time, to find
// its processes, and for limits to come.
var v1Controllers = []string{"cpuacct", "memory", "pids", "freezer"}

// openCgroups makes the base directories. The error says which hierarchies could
// not be used; the rest can.
func openCgroups(base string) (*cgroups, error) {
	c := &cgroups{depth: 1 + strings.Count(base, "/")}
	b, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		return c, err
	}
	var problems error
	seen := map[string]bool{}
	for line := range strings.SplitSeq(string(b), "\n") {
		f := strings.Fields(line)
		if len(f) < 4 {
			continue
		}
		switch f[2] {
		case "cgroup":
			opts := strings.Split(f[3], ",")
			for _, want := range v1Controllers {
				for _, o := range opts {
					if o == want && !seen[f[1]] {
						seen[f[1]] = true
						d := filepath.Join(f[1], base)
						if err := os.MkdirAll(d, 0o755); err != nil {
							problems = errors.Join(problems, err)
							continue
						}
						c.v1 = append(c.v1, d)
					}
				}
			}
		case "cgroup2":
			ctl, err := os.ReadFile(filepath.Join(f[1], "cgroup.controllers"))
			if err != nil || (!bytes.Contains(ctl, []byte("memory")) && !bytes.Contains(ctl, []byte("pids"))) || c.v2 != "" {
				continue
			}
			d := f[1]
			for _, part := range strings.Split(base, "/") {
				// Without the controllers the group still finds and counts.
				for _, k := range []string{"+cpu", "+memory", "+pids"} {
					os.WriteFile(filepath.Join(d, "cgroup.subtree_control"), []byte(k), 0)
				}
				d = filepath.Join(d, part)
				if err := os.Mkdir(d, 0o755); err != nil && !errors.Is(err, os.ErrExist) {
					problems = errors.Join(problems, err)
					d = ""
					break
				}
			}
			c.v2 = d
		}
	}
	return c, problems
}

// close removes the base directories where nothing is left in them, and those
// made on the way to them, which other nodes of this machine may use.
func (c *cgroups) close() {
	for _, d := range append(c.v1[:len(c.v1):len(c.v1)], c.v2) {
		for range c.depth {
			if d == "" || os.Remove(d) != nil {
				break
			}
			d = filepath.Dir(d)
		}
	}
}

// sweep removes groups that an earlier life of the daemon left and nothing is in.
func (c *cgroups) sweep() {
	for _, base := range append(c.v1[:len(c.v1):len(c.v1)], c.v2) {
		if base == "" {
			continue
		}
		es, err := os.ReadDir(base)
		if err != nil {
			continue
		}
		for _, e := range es {
			if e.IsDir() {
				os.Remove(filepath.Join(base, e.Name())) // busy where something lives
			}
		}
	}
}

// cgroup is one job's.
type cgroup struct{ dirs []string }

// make makes the groups of a job and puts pid into them.
func (c *cgroups) make(name string, pid int) (*cgroup, error) {
	g := &cgroup{}
	var problems error
	bases := c.v1
	if c.v2 != "" {
		bases = append(bases[:len(bases):len(bases)], c.v2)
	}
	for _, base := range bases {
		d := filepath.Join(base, name)
		if err := os.Mkdir(d, 0o755); err != nil && !errors.Is(err, os.ErrExist) {
			problems = errors.Join(problems, err)
			continue
		}
		g.dirs = append(g.dirs, d)
		if err := os.WriteFile(filepath.Join(d, "cgroup.procs"), []byte(strconv.Itoa(pid)), 0); err != nil {
			problems = errors.Join(problems, err)
		}
	}
	return g, problems
}

// find returns the groups a job was put in by an earlier life of the daemon.
func (c *cgroups) find(name string) *cgroup {
	g := &cgroup{}
	bases := c.v1
	if c.v2 != "" {
		bases = append(bases[:len(bases):len(bases)], c.v2)
	}
	for _, base := range bases {
		d := filepath.Join(base, name)
		if _, err := os.Stat(d); err == nil {
			g.dirs = append(g.dirs, d)
		}
	}
	return g
}

// pids returns the processes in the group.
func (g *cgroup) pids() []int {
	var out []int
	if len(g.dirs) == 0 {
		return nil
	}
	b, err := os.ReadFile(filepath.Join(g.dirs[0], "cgroup.procs"))
	if err != nil {
		return nil
	}
	for _, f := range strings.Fields(string(b)) {
		if n, err := strconv.Atoi(f); err == nil {
			out = append(out, n)
		}
	}
	return out
}

// cpu returns the processor time used so far.
func (g *cgroup) cpu() time.Duration {
	for _, d := range g.dirs {
		if b, err := os.ReadFile(filepath.Join(d, "cpuacct.usage")); err == nil {
			n, _ := strconv.ParseInt(strings.TrimSpace(string(b)), 10, 64)
			return time.Duration(n)
		}
		if b, err := os.ReadFile(filepath.Join(d, "cpu.stat")); err == nil {
			for line := range strings.SplitSeq(string(b), "\n") {
				if v, ok := strings.CutPrefix(line, "usage_usec "); ok {
					n, _ := strconv.ParseInt(v, 10, 64)
					return time.Duration(n) * time.Microsecond
				}
			}
		}
	}
	return 0
}

// rss returns the resident memory of the group's processes but one, the shim.
func (g *cgroup) rss(shim int) int64 {
	var sum int64
	for _, pid := range g.pids() {
		if pid == shim {
			continue
		}
		b, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/statm")
		if err != nil {
			continue
		}
		if f := strings.Fields(string(b)); len(f) > 1 {
			n, _ := strconv.ParseInt(f[1], 10, 64)
			sum += n * int64(os.Getpagesize())
		}
	}
	return sum
}

// removeLimit is how long a group is tried to be removed, in pauses that double.
const removeLimit = time.Second

// remove removes the groups. Processes of a namespace that has just ended may
// still be leaving; the kernel says EBUSY until they have.
func (g *cgroup) remove() error {
	var problems error
	for _, d := range g.dirs {
		var err error
		for wait := time.Millisecond; wait < removeLimit; wait *= 2 {
			if err = os.Remove(d); err == nil || errors.Is(err, os.ErrNotExist) {
				err = nil
				break
			}
			time.Sleep(wait)
		}
		problems = errors.Join(problems, err)
	}
	return problems
}
