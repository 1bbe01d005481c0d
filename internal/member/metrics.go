package member

import (
	"maps"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/unum-os/unum/internal/clock"
	"github.com/unum-os/unum/internal/ids"
	"github.com/unum-os/unum/internal/metric"
)

// Dead returns the nodes that were alive since this one started and are not now,
// and for how long.
func (m *Members) Dead() map[ids.Node]time.Duration {
	m.mu.Lock()
	gone := maps.Clone(m.gone)
	m.mu.Unlock()
	now, out := clock.Now(), make(map[ids.Node]time.Duration, len(gone))
	for n, at := range gone {
		out[n] = now.Sub(at)
	}
	return out
}

// Collectors returns what membership counts.
func (m *Members) Collectors() []prometheus.Collector {
	locked := func(f func() int) func() float64 {
		return func() float64 {
			m.mu.Lock()
			defer m.mu.Unlock()
			return float64(f())
		}
	}
	return []prometheus.Collector{
		metric.Gauge("unum_member_alive", "Nodes believed alive, this one included.", locked(func() int { return len(m.alive) })),
		metric.Gauge("unum_member_dead", "Nodes that were alive since this one started and are not now.", locked(func() int { return len(m.gone) })),
		metric.Counter("unum_member_deaths_total", "Times that another node was found dead.", &m.deaths),
		metric.Counter("unum_member_returns_total", "Times that another node came alive, the first included.", &m.returns),
		metric.Counter("unum_member_suspicions_total", "Times that another node did not answer this one's ping, neither directly nor through others.", &m.suspicions),
	}
}
