package load

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/unum-os/unum/internal/clock"
	"github.com/unum-os/unum/internal/ids"
	"github.com/unum-os/unum/internal/sched"
)

// fakeProc is a /proc whose figures the test sets.
type fakeProc struct {
	t   *testing.T
	dir string
}

func (f fakeProc) put(name, format string, args ...any) {
	f.t.Helper()
	p := filepath.Join(f.dir, name)
	if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
		f.t.Fatal(err)
	}
	if err := os.WriteFile(p, fmt.Appendf(nil, format, args...), 0o644); err != nil {
		f.t.Fatal(err)
	}
}

func machine(t *testing.T) fakeProc {
	f := fakeProc{t, t.TempDir()}
	f.put("stat", "cpu  100 0 100 800 0 0 0 0 0 0\ncpu0 1 1 1 1\n")
	f.put("loadavg", "0.49 0.18 0.14 1/93 14178\n")
	f.put("meminfo", "MemTotal:  1000 kB\nMemFree: 1 kB\nMemAvailable:  600 kB\n")
	f.put("net/dev", "Inter-|\n face |bytes\n    lo: 9 9 0 0 0 0 0 0 9 9\n  eth0:1000 1 0 0 0 0 0 0 2000 2\n")
	return f
}

func meter(f fakeProc, cfg Config, cpus float64) *Meter {
	cfg.Node, cfg.proc = 3, f.dir
	m := New(cfg)
	m.cpus, m.netMax = cpus, 0
	m.last.at = 1 // as if New had sampled then
	return m
}

func at(ms int) clock.Instant { return clock.Instant(1).Add(time.Duration(ms) * time.Millisecond) }

func TestSampleOfAMachine(t *testing.T) {
	f := machine(t)
	f.put("pressure/memory", "some avg10=25.00 avg60=1 avg300=1 total=1\nfull avg10=0\n")
	m := meter(f, Config{Dir: f.dir}, 4)
	f.put("stat", "cpu  130 0 110 850 10 0 0 0 0 0\n") // 40 of 100 ticks busy
	f.put("loadavg", "0 0 0 4/93 1\n")
	f.put("net/dev", "  eth0:1500 1 0 0 0 0 0 0 2500 2\n")
	l := m.Sample(at(500))
	if l.Node != 3 || l.CPUs != 4 || l.Used != 0.4 || l.Runnable != 0 || l.MemTotal != 1000<<10 || l.MemUsed != 400<<10 ||
		l.MemStall != 0.25 || l.NetUsed != 2000 || l.DiskTotal == 0 || l.DiskUsed > l.DiskTotal || l.Speed <= 0 {
		t.Fatalf("%+v", l)
	}
	f.put("stat", "cpu  130 0 110 950 10 0 0 0 0 0\n")
	if l = m.Sample(at(1000)); l.Runnable != 3 || l.Used != 0 {
		t.Fatalf("seen twice: %+v", l)
	}
	f.put("loadavg", "0 0 0 9/93 1\n")
	f.put("stat", "cpu  230 0 110 950 10 0 0 0 0 0\n")
	if l = m.Sample(at(1500)); l.Runnable != 8 || l.Used != 1 {
		t.Fatalf("saturated: %+v", l)
	}
	f.put("stat", "cpu  1 0 1 1 0 0 0 0 0 0\n") // counters that went back
	f.put("net/dev", "  eth0:0 1 0 0 0 0 0 0 0 2\n")
	if l = m.Sample(at(2000)); l.Used != 0 || l.NetUsed != 0 {
		t.Fatalf("counters went back: %+v", l)
	}
}

const pidStat = "%d (a (b) c) %s 1 1 1 0 -1 4194560 500 0 0 0 %d 0 0 0 20 0 1 0 100 1000 %d 18446744073709551615\n"

func TestSampleOfAShare(t *testing.T) {
	f := machine(t)
	f.put("loadavg", "9 9 9 50/93 1\n") // other nodes' doing
	f.put("1/stat", pidStat, 1, "S", 100, 10)
	own := Usage{}
	m := meter(f, Config{Share: 0.5, Own: func() Usage { return own }}, 4)
	page := uint64(os.Getpagesize())
	if l := m.Sample(at(1000)); l.CPUs != 2 || l.Used != 0 || l.Runnable != 0 || l.MemTotal != 500<<10 || l.MemUsed != 10*page {
		t.Fatalf("idle: %+v", l)
	}
	f.put("7/stat", pidStat, 7, "R", 50, 1)
	m.Sample(at(2000))
	f.put("7/stat", pidStat, 7, "R", 150, 1) // one second of CPU in one second
	if l := m.Sample(at(3000)); l.Used != 0.5 || l.Runnable != 1 || l.Jobs() != 1 {
		t.Fatalf("one job: %+v", l)
	}
	own = Usage{Jobs: 2, CPU: 2 * time.Second, Memory: 400 << 10}
	if l := m.Sample(at(4000)); l.Used != 1 || l.MemUsed != 400<<10 {
		t.Fatalf("own jobs use more than is in sight: %+v", l)
	}
}

func TestSampleUnderALimit(t *testing.T) {
	for _, v2 := range []bool{false, true} {
		f := machine(t)
		cg := fakeProc{t, t.TempDir()}
		if v2 {
			f.put("self/mountinfo", "30 25 0:26 / %s rw shared:4 - cgroup2 cgroup2 rw\n", cg.dir)
			f.put("self/cgroup", "0::/a/b\n")
			cg.put("a/cpu.max", "50000 100000\n")
			cg.put("a/b/cpu.max", "max 100000\n")
			cg.put("a/b/memory.max", "102400\n")
			cg.put("a/b/memory.current", "61440\n")
			cg.put("a/b/memory.stat", "anon 1\ninactive_file 10240\n")
			cg.put("a/cpu.stat", "usage_usec 1000000\n")
		} else {
			f.put("self/mountinfo", "30 25 0:26 / %s/cpu rw - cgroup cgroup rw,cpu,cpuacct\n31 25 0:27 / %s/memory rw - cgroup cgroup rw,memory\n", cg.dir, cg.dir)
			f.put("self/cgroup", "5:memory:/a/b\n4:cpu,cpuacct:/a/b\n0::/\n")
			cg.put("cpu/a/cpu.cfs_quota_us", "50000\n")
			cg.put("cpu/a/cpu.cfs_period_us", "100000\n")
			cg.put("cpu/a/b/cpu.cfs_quota_us", "-1\n")
			cg.put("cpu/a/b/cpu.cfs_period_us", "100000\n")
			cg.put("cpu/a/cpuacct.usage", "1000000000\n")
			cg.put("memory/memory.limit_in_bytes", "9223372036854771712\n")
			cg.put("memory/a/b/memory.limit_in_bytes", "102400\n")
			cg.put("memory/a/b/memory.usage_in_bytes", "61440\n")
			cg.put("memory/a/b/memory.stat", "total_cache 3\ntotal_inactive_file 10240\n")
		}
		m := meter(f, Config{}, 4)
		cg.put("a/cpu.stat", "usage_usec 1250000\n")
		cg.put("cpu/a/cpuacct.usage", "1250000000\n")
		l := m.Sample(at(1000))
		if l.CPUs != 0.5 || l.Used != 0.5 || l.MemTotal != 102400 || l.MemUsed != 51200 {
			t.Fatalf("v2 %v: %+v", v2, l)
		}
	}
}

func TestAMountOfASubtree(t *testing.T) {
	g := parseCgroup("1 1 0:1 /docker/x /sys/fs/cgroup ro - cgroup2 cgroup2 rw\n", "0::/docker/x/y\n")
	if g == nil || !g.v2 || g.cpu != (place{"/sys/fs/cgroup", "/y"}) {
		t.Fatalf("%+v", g)
	}
	g = parseCgroup("1 1 0:1 /docker/x /sys/fs/cgroup ro - cgroup2 cgroup2 rw\n", "0::/elsewhere\n")
	if g == nil || g.cpu.rel != "/" {
		t.Fatalf("%+v", g)
	}
	if g = parseCgroup("", "0::/\n"); g != nil {
		t.Fatalf("%+v", g)
	}
}

func TestNothingToRead(t *testing.T) {
	var log strings.Builder
	m := New(Config{proc: t.TempDir(), Dir: "/nowhere", Log: slog.New(slog.NewTextHandler(&log, nil))})
	l := m.Sample(clock.Now())
	if l.CPUs < 1 || l.MemTotal != 0 || l.DiskTotal != 0 {
		t.Fatalf("%+v", l)
	}
	if n := strings.Count(log.String(), "/nowhere"); n != 1 {
		t.Fatalf("logged %d times:\n%s", n, log.String())
	}
}

func TestRunOnThisMachine(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	n := 0
	err := New(Config{Node: 1, Dir: t.TempDir()}).Run(ctx, func(l sched.Load) {
		if l.CPUs <= 0 || l.MemTotal == 0 || l.MemUsed > l.MemTotal || l.DiskTotal == 0 || l.Used < 0 || l.Used > 1 {
			t.Errorf("%+v", l)
		}
		if n++; n == 2 {
			cancel()
		}
	})
	if err != nil || n < 2 {
		t.Fatalf("%d samples, %v", n, err)
	}
}

func nodesOf(ls []sched.Load) (ns []ids.Node) {
	for _, l := range ls {
		ns = append(ns, l.Node)
	}
	return ns
}

func TestTableAges(t *testing.T) {
	tab := NewTable()
	tab.Put(at(0), sched.Load{Node: 2, CPUs: 1, Age: time.Hour, PendingJobs: 9})
	tab.Put(at(4000), sched.Load{Node: 1, CPUs: 1})
	ls := tab.Snapshot(at(4500))
	if !slices.Equal(nodesOf(ls), []ids.Node{1, 2}) || ls[0].Stale() || !ls[1].Stale() || ls[1].Age != 4500*time.Millisecond || ls[1].PendingJobs != 0 {
		t.Fatalf("%+v", ls)
	}
	if ls = tab.Snapshot(at(10001)); !slices.Equal(nodesOf(ls), []ids.Node{1}) {
		t.Fatalf("%+v", ls)
	}
	tab.Remove(1)
	if ls = tab.Snapshot(at(10001)); len(ls) != 0 {
		t.Fatalf("%+v", ls)
	}
}

func TestTablePending(t *testing.T) {
	tab := NewTable()
	tab.Put(at(0), sched.Load{Node: 1, CPUs: 1})
	pending := func(ms int) (float64, uint64) {
		l := tab.Snapshot(at(ms))[0]
		return l.PendingJobs, l.PendingMemory
	}
	tab.Placed(at(100), 1, sched.Demand{Memory: 5})
	done := tab.Placed(at(100), 1, sched.Demand{CPUs: 2, Memory: 6})
	if j, m := pending(200); j != 3 || m != 11 {
		t.Fatal(j, m)
	}
	done()
	done()
	if j, m := pending(200); j != 1 || m != 5 {
		t.Fatal(j, m)
	}
	tab.Put(at(500), sched.Load{Node: 1, CPUs: 1}) // may have been taken before 100
	if j, _ := pending(500); j != 1 {
		t.Fatal(j)
	}
	tab.Put(at(1000), sched.Load{Node: 1, CPUs: 1})
	if j, _ := pending(1000); j != 0 {
		t.Fatal(j)
	}
	tab.Placed(at(1000), 7, sched.Demand{})() // a node never heard of
	if len(tab.nodes) != 1 {
		t.Fatal("left over")
	}
}

func TestTableLimit(t *testing.T) {
	tab := NewTable()
	tab.Put(at(0), sched.Load{Node: 1, CPUs: 2, Runnable: 10})
	if l := tab.Limit(); l != 8 {
		t.Fatal(l)
	}
	for ms := 500; ms < 5*60_000; ms += 500 {
		tab.Put(at(ms), sched.Load{Node: 1, CPUs: 2})
	}
	if l := tab.Limit(); l != 1 {
		t.Fatal(l)
	}
}

func FuzzParsers(f *testing.F) {
	f.Add([]byte("cpu  100 0 100 800 0 0 0 0 0 0\n"))
	f.Add([]byte("0.49 0.18 0.14 1/93 14178\n"))
	f.Add([]byte("MemTotal:  1000 kB\nMemAvailable:  600 kB\n"))
	f.Add([]byte("some avg10=25.00 avg60=1\n"))
	f.Add([]byte(" eth0:1000 1 0 0 0 0 0 0 2000 2\n"))
	f.Add(fmt.Appendf(nil, pidStat, 1, "R", 5, 5))
	f.Fuzz(func(t *testing.T, b []byte) {
		parseStat(b)
		parseNetDev(b)
		field(b, "x")
		if s := parsePidStat(b); s.cpu < 0 {
			t.Fatal(s)
		}
		if r := parseLoadavg(b); r < 0 {
			t.Fatal(r)
		}
		if p := parsePressure(b); !(p >= 0 && p <= 1) {
			t.Fatal(p)
		}
		if m := parseMeminfo(b); m.available > m.total {
			t.Fatal(m)
		}
		if g := parseCgroup(string(b), string(b)); g != nil && !strings.HasPrefix(g.cpu.rel+"/", "/") && g.cpu.ok() {
			t.Fatal(g)
		}
	})
}

func BenchmarkSample(b *testing.B) {
	m := New(Config{Node: 1, Dir: b.TempDir()})
	for b.Loop() {
		m.Sample(clock.Now())
	}
}

func BenchmarkSampleShare(b *testing.B) {
	m := New(Config{Node: 1, Dir: b.TempDir(), Share: 0.5})
	for b.Loop() {
		m.Sample(clock.Now())
	}
}

// What others would place or write by is told at once, noise is not.
func TestChanged(t *testing.T) {
	was := sched.Load{Node: 2, CPUs: 2, Speed: 1, Runnable: 1, Used: 0.2, MemTotal: 8 << 30, MemUsed: 1 << 30, DiskTotal: 100 << 30, DiskUsed: 10 << 30, NetMax: 1e9, NetUsed: 5e5}
	for _, c := range []struct {
		name   string
		change func(*sched.Load)
		want   bool
	}{
		{"nothing", func(*sched.Load) {}, false},
		{"age", func(l *sched.Load) { l.Age = time.Hour }, false},
		{"noise", func(l *sched.Load) {
			l.Used += 0.04
			l.MemUsed += 60 << 20
			l.DiskUsed -= 15 << 20
			l.NetUsed += 1e6
			l.MemStall = 0.04
			l.Runnable += 0.4
		}, false},
		{"a job more", func(l *sched.Load) { l.Runnable++ }, true},
		{"a job less", func(l *sched.Load) { l.Runnable-- }, true},
		{"busier", func(l *sched.Load) { l.Used += 0.06 }, true},
		{"idler", func(l *sched.Load) { l.Used -= 0.06 }, true},
		{"memory taken", func(l *sched.Load) { l.MemUsed += 64 << 20 }, true},
		{"memory freed", func(l *sched.Load) { l.MemUsed -= 64 << 20 }, true},
		{"memory stalls", func(l *sched.Load) { l.MemStall = 0.05 }, true},
		{"the disk fills", func(l *sched.Load) { l.DiskUsed += 16 << 20 }, true},
		{"network", func(l *sched.Load) { l.NetUsed += 1 << 20 }, true},
		{"another disk", func(l *sched.Load) { l.DiskTotal++ }, true},
		{"fewer CPUs", func(l *sched.Load) { l.CPUs = 1 }, true},
		{"the first", func(l *sched.Load) { *l = sched.Load{} }, true},
	} {
		now := was
		c.change(&now)
		if got := Changed(was, now); got != c.want {
			t.Errorf("%s: %v", c.name, got)
		}
		if got := Changed(now, was); got != c.want {
			t.Errorf("%s, the other way: %v", c.name, got)
		}
	}
}
