package proc

import (
	"sync/atomic"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/unum-os/unum/internal/metric"
)

// counts is what a node manager counts.
type counts struct {
	failed, exited, killed atomic.Uint64 // jobs ended here
	starts                 prometheus.Histogram
}

func newCounts() *counts {
	return &counts{starts: metric.Durations("unum_proc_start_seconds", "Time to start a command on this node, from the manager's decision to the program's exec.")}
}

// ended counts the end of a job that had started.
func (c *counts) ended(s State) {
	if s == Killed {
		c.killed.Add(1)
	} else {
		c.exited.Add(1)
	}
}

// Collectors returns what the manager counts.
func (m *Manager) Collectors() []prometheus.Collector {
	c := m.count
	return []prometheus.Collector{
		metric.Gauge("unum_proc_jobs", "Jobs running here, those being started included.", func() float64 {
			m.mu.Lock()
			defer m.mu.Unlock()
			return float64(len(m.jobs))
		}),
		c.starts, // its count is the number of jobs started
		metric.Counters("unum_proc_ended_total", "Jobs ended here, by state: exited, killed (by Unum), failed (not started).", "state", func(yield func(string, float64)) {
			yield("exited", float64(c.exited.Load()))
			yield("killed", float64(c.killed.Load()))
			yield("failed", float64(c.failed.Load()))
		}),
	}
}
