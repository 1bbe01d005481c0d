package load

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// cgroup says where the control groups of this process are; either version.
type cgroup struct {
	v2      bool
	cpu     place
	cpuacct place // version 1
	memory  place
}

// place is a group's directory under the mount of its hierarchy.
type place struct{ mount, rel string }

func (p place) ok() bool { return p.mount != "" }

// limit is the tightest limit from a group up to the root of its hierarchy, and
// where it was found, so that use is read there too.
type limit struct {
	ok    bool
	cpus  float64
	bytes uint64
	rel   string
}

// findCgroup reads where this process's groups are, nil if nowhere.
func findCgroup(proc string) *cgroup {
	mounts, err := os.ReadFile(proc + "/self/mountinfo")
	if err != nil {
		return nil
	}
	groups, err := os.ReadFile(proc + "/self/cgroup")
	if err != nil {
		return nil
	}
	return parseCgroup(string(mounts), string(groups))
}

// parseCgroup joins the lines of mountinfo ("id parent dev root mountpoint opts
// [tags] - type source superopts") with those of cgroup ("id:controllers:path").
func parseCgroup(mounts, groups string) *cgroup {
	type mount struct{ root, point, super string }
	v1, v2 := []mount{}, mount{}
	for line := range strings.Lines(mounts) {
		left, right, ok := strings.Cut(line, " - ")
		l, r := strings.Fields(left), strings.Fields(right)
		if !ok || len(l) < 5 || len(r) < 3 {
			continue
		}
		switch r[0] {
		case "cgroup":
			v1 = append(v1, mount{l[3], l[4], r[2]})
		case "cgroup2":
			if v2.point == "" {
				v2 = mount{l[3], l[4], ""}
			}
		}
	}
	rel := func(m mount, path string) place {
		// What is mounted may be a subtree, and in a container the path may lie
		// outside of it: then the mount's own root is the group.
		if m.root != "/" {
			if s, ok := strings.CutPrefix(path, m.root); ok {
				path = s
			} else {
				path = "/"
			}
		}
		return place{m.point, filepath.Clean("/" + path)}
	}
	find := func(controller string) place {
		for line := range strings.Lines(groups) {
			f := strings.SplitN(strings.TrimSuffix(line, "\n"), ":", 3)
			if len(f) != 3 || !contains(f[1], controller) {
				continue
			}
			for _, m := range v1 {
				if contains(m.super, controller) {
					return rel(m, f[2])
				}
			}
		}
		return place{}
	}
	g := &cgroup{cpu: find("cpu"), cpuacct: find("cpuacct"), memory: find("memory")}
	if g.cpu.ok() || g.memory.ok() {
		return g
	}
	if v2.point == "" {
		return nil
	}
	for line := range strings.Lines(groups) {
		if path, ok := strings.CutPrefix(strings.TrimSuffix(line, "\n"), "0::"); ok {
			p := rel(v2, path)
			return &cgroup{v2: true, cpu: p, cpuacct: p, memory: p}
		}
	}
	return nil
}

func contains(list, word string) bool {
	for w := range strings.SplitSeq(list, ",") {
		if w == word {
			return true
		}
	}
	return false
}

// up calls f for p's directory and each above it, to the mount's root.
func (p place) up(f func(rel string)) {
	if !p.ok() {
		return
	}
	for rel := p.rel; ; rel = filepath.Dir(rel) {
		f(rel)
		if rel == "/" || rel == "." {
			return
		}
	}
}

func (p place) read(rel, file string) []byte {
	b, err := os.ReadFile(filepath.Join(p.mount, rel, file))
	if err != nil {
		return nil // no such controller here, or the root, which has no limits
	}
	return bytes.TrimSpace(b)
}

// limits returns the tightest limits in force.
func (g *cgroup) limits() (cpu, mem limit) {
	g.cpu.up(func(rel string) {
		var quota, period uint64
		if g.v2 {
			f := bytes.Fields(g.cpu.read(rel, "cpu.max")) // "max 100000" or "50000 100000"
			if len(f) == 2 {
				quota, period = number(f[0]), number(f[1])
			}
		} else {
			quota, period = number(g.cpu.read(rel, "cpu.cfs_quota_us")), number(g.cpu.read(rel, "cpu.cfs_period_us")) // -1: none
		}
		if quota == 0 || period == 0 {
			return
		}
		if c := float64(quota) / float64(period); !cpu.ok || c < cpu.cpus {
			cpu = limit{ok: true, cpus: c, rel: rel}
		}
	})
	file := "memory.limit_in_bytes"
	if g.v2 {
		file = "memory.max"
	}
	g.memory.up(func(rel string) {
		// Version 1 says a huge number for none; the caller takes the machine's if
		// that is less.
		if b := number(g.memory.read(rel, file)); b != 0 && (!mem.ok || b < mem.bytes) {
			mem = limit{ok: true, bytes: b, rel: rel}
		}
	})
	return cpu, mem
}

// cpuUsed returns the CPU time used by the group that has the limit.
func (m *Meter) cpuUsed() time.Duration {
	g := m.group
	if !g.v2 {
		return time.Duration(min(number(g.cpuacct.read(m.cpuLimit.rel, "cpuacct.usage")), 1<<62))
	}
	return time.Duration(min(field(g.cpu.read(m.cpuLimit.rel, "cpu.stat"), "usage_usec"), 1<<50)) * time.Microsecond
}

// memUsed returns the memory used by the group that has the limit, but for file
// pages that can be dropped.
func (m *Meter) memUsed() uint64 {
	g, used, drop := m.group, "memory.usage_in_bytes", "total_inactive_file"
	if g.v2 {
		used, drop = "memory.current", "inactive_file"
	}
	u := number(g.memory.read(m.memLimit.rel, used))
	return u - min(u, field(g.memory.read(m.memLimit.rel, "memory.stat"), drop))
}

// field finds a line "key value".
func field(b []byte, key string) uint64 {
	for line := range bytes.Lines(b) {
		if f := bytes.Fields(line); len(f) == 2 && string(f[0]) == key {
			return number(f[1])
		}
	}
	return 0
}
