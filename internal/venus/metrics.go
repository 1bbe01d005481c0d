package venus

import (
	"sync/atomic"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/unum-os/unum/internal/metric"
)

// counts is what a client counts.
type counts struct {
	hits, misses, lost atomic.Uint64
	ships              prometheus.Histogram
}

// Collectors returns what the client counts.
func (c *Client) Collectors() []prometheus.Collector {
	return []prometheus.Collector{
		metric.Gauge("unum_venus_dirty_bytes", "Bytes that programs here have written and that are not shipped yet.", func() float64 { return float64(c.dirty.Load()) }),
		metric.Gauge("unum_venus_inodes", "Inodes in the cache.", func() float64 { return float64(c.Inodes()) }),
		metric.Gauge("unum_venus_session", "1 if the client has a session with the volume's leader.", func() float64 {
			if c.Ready() {
				return 1
			}
			return 0
		}),
		c.count.ships,
		metric.Counter("unum_venus_cache_hits_total", "Uses of an inode or a name under a lease that was here.", &c.count.hits),
		metric.Counter("unum_venus_cache_misses_total", "Uses of an inode or a name for which the leader was asked.", &c.count.misses),
		metric.Counter("unum_venus_sessions_lost_total", "Sessions lost: what was pending under them is gone.", &c.count.lost),
	}
}
