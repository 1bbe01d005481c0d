package node

import (
	"runtime"
	"runtime/debug"
	"slices"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"

	"github.com/unum-os/unum/internal/health"
	"github.com/unum-os/unum/internal/metric"
	"github.com/unum-os/unum/internal/record"
)

var descCondition = prometheus.NewDesc("unum_health_condition", "1 if there is a condition of the code, as in unum status.", []string{"code", "severity"}, nil)

// conditionCollector shows for each code whether there is a condition of it.
type conditionCollector struct {
	list func() []health.Condition
}

func (c conditionCollector) Describe(ch chan<- *prometheus.Desc) { ch <- descCondition }

func (c conditionCollector) Collect(ch chan<- prometheus.Metric) {
	holds := map[health.Code]float64{}
	for _, x := range c.list() {
		holds[x.Code] = 1
	}
	for _, k := range health.Kinds() {
		ch <- prometheus.MustNewConstMetric(descCondition, prometheus.GaugeValue, holds[k.Code], string(k.Code), string(k.Severity))
	}
}

// collectors returns what the node itself shows.
func (n *Node) collectors() []prometheus.Collector {
	return []prometheus.Collector{
		collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}),
		conditionCollector{n.conditions},
		metric.Gauges("unum_build_info", "1, with the program's revision and the Go release it was built with.", "revision", func(yield func(string, float64)) { yield(revision(), 1) }),
		metric.Gauge("unum_node_start_timestamp_seconds", "When this node started, Unix time.", func() float64 { return float64(n.began.Unix()) }),
		metric.Gauge("unum_node_certificate_end_timestamp_seconds", "When this node's certificate ends, Unix time.", func() float64 { return float64(n.holder.NotAfter().Unix()) }),
		// Here, and not in package control: the light face imports that.
		metric.Gauge("unum_control_connections", "Connections on the daemon's socket; each command that runs is one.", func() float64 { return float64(n.ctl.Connections()) }),
		metric.Gauge("unum_node_reserve_bytes", "Bytes kept on the disk for the groups' logs.", func() float64 { have, _ := n.ballast.left(); return float64(have) }),
		metric.Counters("unum_node_knocks_dropped_total", "What other nodes asked for at this one's door beyond what is borne, by what was dropped: refusals not told to the audit one by one, proposals turned away.", "what", func(yield func(string, float64)) {
			yield("refusal", float64(n.knocks.refusals.Load()))
			yield("proposal", float64(n.knocks.proposals.Load()))
		}),
		metric.Gauge("unum_node_clock_apart_seconds", "The largest difference between this node's clock and another's, of late.", func() float64 {
			most := 0.0
			for _, by := range n.clocks.ahead() {
				most = max(most, by.Abs().Seconds())
			}
			return most
		}),
	}
}

// revision names the program: what it was built from, and by which Go.
func revision() string {
	rev := "unknown"
	if b, ok := debug.ReadBuildInfo(); ok {
		for _, s := range b.Settings {
			if s.Key == "vcs.revision" && s.Value != "" {
				rev = s.Value
			}
		}
	}
	return rev + " " + runtime.Version()
}

// newMetrics registers what all parts count and makes the endpoint.
func (n *Node) newMetrics() (*metric.Server, error) {
	reg := prometheus.NewRegistry()
	cs := slices.Concat(n.collectors(), n.ep.Collectors())
	if n.host != nil {
		cs = slices.Concat(cs, n.host.Collectors(), n.members.Collectors())
	}
	if n.disk.Role == record.RoleStore {
		cs = slices.Concat(cs, n.segs.Collectors(), n.blocks.Collectors(), n.vice.Collectors(), n.venus.Collectors(), n.manager.Collectors())
	}
	for _, c := range cs {
		if err := reg.Register(c); err != nil {
			return nil, err
		}
	}
	return metric.NewServer(n.cfg.Metrics, reg, n.cfg.Log.With("part", "metrics")), nil
}
