package vice

import (
	"sync/atomic"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/unum-os/unum/internal/metric"
	"github.com/unum-os/unum/internal/volume"
)

// opWords name the kinds of operations.
var opWords = [...]string{volume.OpCreate: "create", volume.OpUnlink: "unlink", volume.OpRmdir: "rmdir", volume.OpRename: "rename", volume.OpLink: "link",
	volume.OpSetAttr: "setattr", volume.OpWrite: "write", volume.OpSetXattr: "setxattr", volume.OpRemoveXattr: "removexattr", volume.OpPunch: "punch",
	volume.OpSetLock: "setlock", volume.OpDrop: "drop"}

// counts is what a server counts, over all times it led.
type counts struct {
	ops     [len(opWords)]atomic.Uint64
	ended   atomic.Uint64 // sessions
	recalls prometheus.Histogram
}

// done counts operations that were decided.
func (c *counts) done(ops []volume.Op) {
	for i := range ops {
		if k := int(ops[i].Kind); k < len(c.ops) {
			c.ops[k].Add(1)
		}
	}
}

// Collectors returns what the server counts.
func (s *Server) Collectors() []prometheus.Collector {
	led := func(f func(l *leadership) int) func() float64 {
		return func() float64 {
			s.mu.Lock()
			l := s.lead
			s.mu.Unlock()
			if l == nil {
				return 0
			}
			l.mu.Lock()
			defer l.mu.Unlock()
			return float64(f(l))
		}
	}
	return []prometheus.Collector{
		metric.Gauge("unum_vice_leading", "1 if this node leads the root volume's group and serves its clients.", led(func(*leadership) int { return 1 })),
		metric.Gauge("unum_vice_sessions", "Sessions open, where this node leads.", led(func(l *leadership) int { return len(l.sessions) })),
		metric.Gauges("unum_vice_leases", "Leases given, where this node leads, by mode.", "mode", func(yield func(string, float64)) {
			yield("read", led(func(l *leadership) int { return l.table.Counts().Read })())
			yield("write", led(func(l *leadership) int { return l.table.Counts().Write })())
		}),
		metric.Gauge("unum_vice_lease_waiters", "Requests that wait for a lease, where this node leads.", led(func(l *leadership) int { return l.table.Counts().Waiting })),
		s.count.recalls,
		metric.Counter("unum_vice_sessions_ended_total", "Sessions that this node ended as leader: not renewed, or replaced.", &s.count.ended),
		metric.Counters("unum_vice_operations_total", "Operations on the tree decided here, by kind; refused ones included.", "kind", func(yield func(string, float64)) {
			for k, word := range opWords {
				if word != "" {
					yield(word, float64(s.count.ops[k].Load()))
				}
			}
		}),
	}
}
