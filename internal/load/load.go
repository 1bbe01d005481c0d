package load

import (
	"context"
	"log/slog"
	"math"
	"runtime"
	"time"

	"golang.org/x/sys/unix"

	"github.com/unum-os/unum/internal/clock"
	"github.com/unum-os/unum/internal/ids"
	"github.com/unum-os/unum/internal/sched"
)

// Every is the time between samples: short enough that a home's picture is less
// than a second old, long enough to cost nothing.
const Every = 500 * time.Millisecond

// TellEvery is how often a load is told that has not changed: thrice before it
// is too old to place by (sched.StaleAfter).
const TellEvery = time.Second

// What must have changed of a load for others to be told before TellEvery.
const (
	tellRunnable = 0.5      // a change of the running threads by so much is told at once
	tellUsed     = 0.05     // a change of the CPUs in use is told at once
	tellStall    = 0.05     // a change of the part of the time in which something waits for memory is told at once
	tellMemory   = 64 << 20 // a change of the memory in use, in bytes is told at once
	tellDisk     = 16 << 20 // a change of the disk in use, in bytes is told at once
	tellNet      = 1 << 20  // a change of the network's use, in bytes a second is told at once
)

// Changed reports whether now says something that others should know before
// TellEvery has passed since they were told old: what changes a price visibly,
// and disk space, by which writers are stopped.
func Changed(old, now sched.Load) bool {
	apart := func(a, b, by float64) bool { return math.Abs(a-b) >= by }
	bytes := func(a, b, by uint64) bool { return max(a, b)-min(a, b) >= by }
	return old.Node != now.Node || old.CPUs != now.CPUs || old.Speed != now.Speed || old.MemTotal != now.MemTotal ||
		old.DiskTotal != now.DiskTotal || old.NetMax != now.NetMax ||
		apart(old.Runnable, now.Runnable, tellRunnable) || apart(old.Used, now.Used, tellUsed) || apart(old.MemStall, now.MemStall, tellStall) ||
		bytes(old.MemUsed, now.MemUsed, tellMemory) || bytes(old.DiskUsed, now.DiskUsed, tellDisk) || bytes(old.NetUsed, now.NetUsed, tellNet)
}

// slowEvery is the number of samples between looks at what seldom changes:
// limits of control groups and speeds of interfaces.
const slowEvery = 20

// saturated is the use of the CPUs from which a single count of running threads
// is believed.
const saturated = 0.8

// Usage is what the jobs of this node use.
type Usage struct {
	Jobs   int           // running now
	CPU    time.Duration // used so far, that of ended jobs included
	Memory uint64        // bytes held now
}

// Config sets up a Meter.
type Config struct {
	Node ids.Node
	Dir  string // whose disk is reported: the node's data directory
	// Share, between 0 and 1, is this node's part of a machine that several nodes
	// share; 0: it has the machine for itself.
	Share float64
	// Own returns the use of the node's own jobs: never less than that is
	// reported. May be nil. Called by the goroutine that samples.
	Own func() Usage
	Log *slog.Logger

	proc string // "/proc" but in tests
}

// Meter measures this node. One goroutine may use it.
type Meter struct {
	cfg   Config
	cpus  float64 // of the machine
	speed float64
	group *cgroup

	samples  int
	last     counters
	lastRun  float64
	netMax   uint64
	cpuLimit limit
	memLimit limit
	warned   map[string]bool
	buf      []byte
}

// counters are the running totals that a sample takes differences of.
type counters struct {
	at   clock.Instant
	cpu  cpuTimes      // of the machine
	used time.Duration // of CPU: of the control group, or of the processes in sight
	own  time.Duration
	net  uint64
}

// New returns a Meter; it takes the first readings and a millisecond or two to
// measure the speed of a CPU.
func New(cfg Config) *Meter {
	if cfg.proc == "" {
		cfg.proc = "/proc"
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	m := &Meter{cfg: cfg, cpus: float64(runtime.NumCPU()), speed: cpuSpeed(), warned: map[string]bool{}, buf: make([]byte, 64<<10)}
	if cfg.Share == 0 {
		m.group = findCgroup(cfg.proc)
	}
	m.Sample(clock.Now())
	return m
}

// Run takes a sample at once and then one every Every, and gives each to
// publish, until ctx ends.
func (m *Meter) Run(ctx context.Context, publish func(sched.Load)) error {
	t := time.NewTicker(Every)
	defer t.Stop()
	for {
		publish(m.Sample(clock.Now()))
		select {
		case <-ctx.Done():
			return nil
		case <-t.C:
		}
	}
}

// Sample measures. Rates are over the time since the sample before.
func (m *Meter) Sample(now clock.Instant) sched.Load {
	if m.samples%slowEvery == 0 {
		m.slow()
	}
	m.samples++
	var own Usage
	if m.cfg.Own != nil {
		own = m.cfg.Own()
	}
	c := counters{at: now, own: own.CPU}
	l := sched.Load{Node: m.cfg.Node, CPUs: m.cpus, Speed: m.speed}
	dt := now.Sub(m.last.at)
	first := m.samples == 1 || dt <= 0
	rate := func(used, before time.Duration) float64 { // part of l.CPUs
		if first || used < before {
			return 0
		}
		return min(float64(used-before)/(float64(dt)*l.CPUs), 1)
	}

	// CPU, and memory where the sight is the same.
	running := 0.0
	mem := m.memory()
	switch {
	case m.cfg.Share > 0:
		l.CPUs *= m.cfg.Share
		seen := m.processes()
		c.used, running = seen.cpu, seen.running
		l.Used = rate(c.used, m.last.used)
		l.MemTotal = uint64(float64(mem.total) * m.cfg.Share)
		l.MemUsed = seen.memory
	case m.cpuLimit.ok:
		l.CPUs = min(m.cpuLimit.cpus, m.cpus)
		c.used = m.cpuUsed()
		l.Used, running = rate(c.used, m.last.used), float64(own.Jobs)
		l.MemTotal, l.MemUsed = mem.total, mem.total-mem.available
	default:
		c.cpu = m.cpuTimes()
		if d := c.cpu.total - m.last.cpu.total; !first && c.cpu.total > m.last.cpu.total && c.cpu.busy >= m.last.cpu.busy {
			l.Used = min(float64(c.cpu.busy-m.last.cpu.busy)/float64(d), 1)
		}
		running = m.running()
		l.MemTotal, l.MemUsed = mem.total, mem.total-mem.available
	}
	if m.memLimit.ok && m.memLimit.bytes < l.MemTotal {
		l.MemTotal, l.MemUsed = m.memLimit.bytes, m.memUsed()
	}
	l.Used = max(l.Used, rate(own.CPU, m.last.own))
	l.MemUsed = min(max(l.MemUsed, own.Memory), l.MemTotal)
	l.MemStall = m.memStall()
	l.Runnable = running
	if l.Used < saturated {
		l.Runnable = min(running, m.lastRun)
	}

	l.DiskTotal, l.DiskUsed = m.disk()
	c.net = m.network()
	l.NetMax = m.netMax
	if !first && c.net >= m.last.net {
		l.NetUsed = uint64(float64(c.net-m.last.net) / dt.Seconds())
	}
	if !first || m.samples == 1 {
		m.last = c
	}
	m.lastRun = running
	return l
}

// slow looks at what seldom changes.
func (m *Meter) slow() {
	m.netMax = netSpeed("/sys/class/net")
	if m.group != nil {
		m.cpuLimit, m.memLimit = m.group.limits()
	}
}

// disk returns the size of the file system of Dir and what of it cannot be had.
func (m *Meter) disk() (total, used uint64) {
	if m.cfg.Dir == "" {
		return 0, 0
	}
	var st unix.Statfs_t
	if err := unix.Statfs(m.cfg.Dir, &st); err != nil {
		m.warn(m.cfg.Dir, err)
		return 0, 0
	}
	total = st.Blocks * uint64(st.Bsize)
	return total, total - min(total, st.Bavail*uint64(st.Bsize))
}

// warn logs that a source cannot be read, once.
func (m *Meter) warn(path string, err error) {
	if !m.warned[path] {
		m.warned[path] = true
		m.cfg.Log.Warn("load source unreadable", "path", path, "err", err)
	}
}

// cpuSpeed measures one CPU with a loop of dependent integer operations: the best
// of some short runs, since the others met an interruption. 1 is one round a
// nanosecond. Rounded to steps of a fifth, so that equal machines say the same.
func cpuSpeed() float64 {
	const rounds, step = 100_000, 0.25
	best := time.Duration(math.MaxInt64)
	x := uint64(88172645463325252)
	for range 8 {
		t := time.Now()
		for range rounds {
			x ^= x << 13
			x ^= x >> 7
			x ^= x << 17
		}
		best = min(best, time.Since(t))
	}
	if x == 0 || best <= 0 { // x is never 0: the loop must not be optimized away
		return 0
	}
	s := rounds / float64(best)
	return math.Exp2(math.Round(math.Log2(s)/step) * step)
}
