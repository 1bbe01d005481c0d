package block

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/unum-os/unum/internal/clock"
	"github.com/unum-os/unum/internal/metric"
)

// MissingFor returns how many blocks are known to be missing here, as Missing,
// and for how long there have been any.
func (c *Client) MissingFor() (n int, since time.Duration) {
	r := &c.repair
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.missing == 0 {
		return 0, 0
	}
	return r.missing, clock.Now().Sub(r.since)
}

// Collectors returns what the client counts.
func (c *Client) Collectors() []prometheus.Collector {
	n := &c.count
	return []prometheus.Collector{
		metric.Gauge("unum_block_missing", "Copies known to be missing on this node.", func() float64 { return float64(c.Missing()) }),
		metric.Counters("unum_block_reads_total", "Blocks read, by where they were: memory, the own store, a peer.", "source", func(yield func(string, float64)) {
			yield("memory", float64(n.cacheHits.Load()))
			yield("store", float64(n.localReads.Load()))
			yield("peer", float64(n.peerReads.Load()))
		}),
		metric.Counter("unum_block_written_total", "Blocks made durable on enough replicas.", &n.puts),
		metric.Counter("unum_block_written_bytes_total", "Bytes of blocks made durable on enough replicas.", &n.putBytes),
		metric.Counter("unum_block_degraded_total", "Blocks that reached enough replicas, but not all of them at once.", &n.degraded),
		metric.Counter("unum_block_repaired_total", "Copies fetched to this node because they were missing or bad.", &n.repaired),
		metric.Counters("unum_block_bad_total", "Copies that were not what their name says, by where they were: the own store, a peer.", "source", func(yield func(string, float64)) {
			yield("store", float64(n.badLocal.Load()))
			yield("peer", float64(n.badPeer.Load()))
		}),
		metric.Counter("unum_block_walks_total", "Times that all block names in the metadata were compared with the store.", &n.walks),
		metric.Gauge("unum_block_cache_bytes", "Memory for blocks read.", func() float64 {
			c.cache.mu.Lock()
			defer c.cache.mu.Unlock()
			return float64(c.cache.size)
		}),
	}
}
