package segment

import (
	"github.com/prometheus/client_golang/prometheus"

	"github.com/unum-os/unum/internal/metric"
)

// Collectors returns what the store counts.
func (s *Store) Collectors() []prometheus.Collector {
	of := func(f func(Stats) float64) func() float64 { return func() float64 { return f(s.Stats()) } }
	return []prometheus.Collector{
		metric.Gauge("unum_segment_blocks", "Blocks in the store.", of(func(t Stats) float64 { return float64(t.Blocks) })),
		metric.Gauge("unum_segment_used_bytes", "Bytes of all blocks in the store.", of(func(t Stats) float64 { return float64(t.Bytes) })),
		metric.Gauge("unum_segment_free_bytes", "Bytes that may still be stored before the reserve is touched.", func() float64 {
			n, err := s.Free()
			if err != nil {
				return 0 // what cannot be asked cannot be written to
			}
			return float64(n)
		}),
		metric.Gauge("unum_segment_files", "Number of the newest segment.", of(func(t Stats) float64 { return float64(t.Segments) })),
		metric.CounterFunc("unum_segment_puts_total", "Blocks written.", of(func(t Stats) float64 { return float64(t.Puts) })),
		metric.CounterFunc("unum_segment_syncs_total", "Syncs of a segment, each for all blocks that waited.", of(func(t Stats) float64 { return float64(t.Syncs) })),
		metric.CounterFunc("unum_segment_damaged_total", "Places found damaged.", of(func(t Stats) float64 { return float64(t.Damaged) })),
	}
}
