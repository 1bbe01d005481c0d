package rpc

import (
	"sync"
	"sync/atomic"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/unum-os/unum/internal/errs"
	"github.com/unum-os/unum/internal/metric"
)

// maxClass bounds the classes counted; there are fewer.
const maxClass = 64

// outcomes counts the calls of one method: answered well, and failed by class.
type outcomes struct {
	good  atomic.Uint64
	class [maxClass]atomic.Uint64
}

func (o *outcomes) note(err error) {
	if err == nil {
		o.good.Add(1)
		return
	}
	o.class[min(errs.ClassOf(err), maxClass-1)].Add(1)
}

// counts is what an endpoint counts.
type counts struct {
	made, served, cast sync.Map // of outcomes, by method: those named in this program only
	sent, heard        atomic.Uint64
	refused            atomic.Uint64 // connections
}

// tally counts the outcome of a call of a method.
func tally(m *sync.Map, method string, err error) {
	o, ok := m.Load(method)
	if !ok {
		o, _ = m.LoadOrStore(method, &outcomes{})
	}
	o.(*outcomes).note(err)
}

var (
	descMade   = prometheus.NewDesc("unum_rpc_calls_total", "Calls made to other nodes and to this one, by method and class of the outcome.", []string{"method", "class"}, nil)
	descServed = prometheus.NewDesc("unum_rpc_served_total", "Calls answered here, by method and class of the outcome.", []string{"method", "class"}, nil)
	descCast   = prometheus.NewDesc("unum_rpc_casts_total", "Casts to other nodes, by method and class of the outcome; ok may be lost yet, what is not was not begun.", []string{"method", "class"}, nil)
)

// calls shows calls by method and class.
type calls struct {
	desc *prometheus.Desc
	of   *sync.Map
}

func (c calls) Describe(ch chan<- *prometheus.Desc) { ch <- c.desc }

func (c calls) Collect(ch chan<- prometheus.Metric) {
	c.of.Range(func(method, o any) bool {
		show := func(v *atomic.Uint64, class string) {
			if n := v.Load(); n > 0 {
				ch <- prometheus.MustNewConstMetric(c.desc, prometheus.CounterValue, float64(n), method.(string), class)
			}
		}
		all := o.(*outcomes)
		show(&all.good, "ok")
		for k := range all.class {
			show(&all.class[k], errs.Class(k).String())
		}
		return true
	})
}

// Collectors returns what the endpoint counts.
func (e *Endpoint) Collectors() []prometheus.Collector {
	return []prometheus.Collector{
		calls{descMade, &e.count.made}, calls{descServed, &e.count.served}, calls{descCast, &e.count.cast},
		metric.Gauges("unum_rpc_connections", "Live connections with other nodes, made by either side, by lane.", "lane", func(yield func(string, float64)) {
			var n [numLanes]int
			e.mu.Lock()
			for l := range e.links {
				n[l.lane]++
			}
			e.mu.Unlock()
			for k := range numLanes {
				yield(laneWords[k], float64(n[k]))
			}
		}),
		metric.Counter("unum_rpc_sent_bytes_total", "Bytes sent to other nodes, as encrypted.", &e.count.sent),
		metric.Counter("unum_rpc_received_bytes_total", "Bytes received from other nodes, as encrypted.", &e.count.heard),
		metric.Counter("unum_rpc_connections_refused_total", "Connections refused here: no or a wrong certificate, no member, too many.", &e.count.refused),
	}
}

// laneWords name the lanes.
var laneWords = [numLanes]string{laneCall: "call", laneBulk: "bulk", laneCast: "cast", laneMux: "stream"}
