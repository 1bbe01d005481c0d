package load

import (
	"cmp"
	"slices"
	"sync"
	"time"

	"github.com/unum-os/unum/internal/clock"
	"github.com/unum-os/unum/internal/ids"
	"github.com/unum-os/unum/internal/sched"
)

// Forget is the age at which a node's sample is dropped.
const Forget = 10 * time.Second

// settle is the time after which a sample that arrives must have been taken
// after a placement: the interval of samples and the spreading of one. Until
// then a job may be counted twice, which errs towards spreading.
const settle = Every + 300*time.Millisecond

// Table keeps the latest load of every node. It is safe for concurrent use.
type Table struct {
	mu     sync.Mutex
	nodes  map[ids.Node]*entry
	limit  sched.Limit
	lastAt clock.Instant // of limit
}

type entry struct {
	load    sched.Load
	at      clock.Instant // of arrival
	known   bool          // a sample has come
	pending []*placement
}

type placement struct {
	at     clock.Instant
	demand sched.Demand
}

// NewTable returns an empty table.
func NewTable() *Table { return &Table{nodes: map[ids.Node]*entry{}} }

// Put takes the sample of a node, which arrived now. It must be newer than the
// one before.
func (t *Table) Put(now clock.Instant, l sched.Load) {
	if l.Node == 0 {
		return
	}
	l.Age, l.PendingJobs, l.PendingMemory = 0, 0, 0
	t.mu.Lock()
	defer t.mu.Unlock()
	var dt time.Duration
	if t.lastAt != 0 {
		dt = max(now.Sub(t.lastAt), 0)
	}
	t.lastAt = now
	t.limit.Observe(l.PerCPU(), dt)
	e := t.entry(l.Node)
	e.load, e.at, e.known = l, now, true
	e.pending = slices.DeleteFunc(e.pending, func(p *placement) bool { return now.Sub(p.at) >= settle })
}

// Placed notes that this home has just sent a job to n. It counts there until a
// sample must have seen it, or until done is called: the job was refused, or has
// ended. done may be called more than once.
func (t *Table) Placed(now clock.Instant, n ids.Node, d sched.Demand) (done func()) {
	p := &placement{now, d}
	t.mu.Lock()
	defer t.mu.Unlock()
	e := t.entry(n)
	e.pending = append(e.pending, p)
	return func() {
		t.mu.Lock()
		defer t.mu.Unlock()
		if e := t.nodes[n]; e != nil {
			e.pending = slices.DeleteFunc(e.pending, func(q *placement) bool { return q == p })
			if !e.known && len(e.pending) == 0 {
				delete(t.nodes, n)
			}
		}
	}
}

// Remove forgets a node that has left or died.
func (t *Table) Remove(n ids.Node) {
	t.mu.Lock()
	defer t.mu.Unlock()
	delete(t.nodes, n)
}

// Snapshot returns the loads in order of node, with ages and pending placements:
// what sched.Inputs wants. Stale ones are among them (sched.Load.Stale tells);
// those older than Forget are dropped for good.
func (t *Table) Snapshot(now clock.Instant) []sched.Load {
	t.mu.Lock()
	defer t.mu.Unlock()
	ls := make([]sched.Load, 0, len(t.nodes))
	for n, e := range t.nodes {
		if !e.known {
			continue // placed there by name before any sample came
		}
		if now.Sub(e.at) > Forget {
			delete(t.nodes, n)
			continue
		}
		l := e.load
		l.Age = max(now.Sub(e.at), 0)
		for _, p := range e.pending {
			l.PendingJobs += cmp.Or(p.demand.CPUs, 1)
			l.PendingMemory += p.demand.Memory
		}
		ls = append(ls, l)
	}
	slices.SortFunc(ls, func(a, b sched.Load) int { return cmp.Compare(a.Node, b.Node) })
	return ls
}

// Limit returns the limit of the CPU's load for sched.Inputs.
func (t *Table) Limit() float64 {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.limit.Value()
}

func (t *Table) entry(n ids.Node) *entry {
	e := t.nodes[n]
	if e == nil {
		e = &entry{}
		t.nodes[n] = e
	}
	return e
}
