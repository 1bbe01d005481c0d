package control

import (
	"github.com/prometheus/client_golang/prometheus"

	"github.com/unum-os/unum/internal/metric"
)

// Collectors returns what the server counts.
func (s *Server) Collectors() []prometheus.Collector {
	return []prometheus.Collector{
		metric.Gauge("unum_control_connections", "Connections on the daemon's socket; each command that runs is one.", func() float64 {
			s.mu.Lock()
			defer s.mu.Unlock()
			return float64(s.total)
		}),
	}
}
