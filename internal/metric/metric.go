package metric

import (
	"sync/atomic"

	"github.com/prometheus/client_golang/prometheus"
)

// Counter shows a number that only grows.
func Counter(name, help string, v *atomic.Uint64) prometheus.Collector {
	return CounterFunc(name, help, func() float64 { return float64(v.Load()) })
}

// CounterFunc shows what f returns, which only grows.
func CounterFunc(name, help string, f func() float64) prometheus.Collector {
	return prometheus.NewCounterFunc(prometheus.CounterOpts{Name: name, Help: help}, f)
}

// Gauge shows what f returns at the moment.
func Gauge(name, help string, f func() float64) prometheus.Collector {
	return prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: name, Help: help}, f)
}

// Durations returns a histogram of durations, in seconds: from a tenth of a
// millisecond, by two and a half at a time, to half a minute.
func Durations(name, help string) prometheus.Histogram {
	return prometheus.NewHistogram(prometheus.HistogramOpts{Name: name, Help: help, Buckets: prometheus.ExponentialBuckets(0.0001, 2.5, 15)})
}

// Values is a metric with one label, whose values are read when asked for.
type Values struct {
	desc *prometheus.Desc
	kind prometheus.ValueType
	each func(yield func(label string, v float64))
}

// Counters shows numbers that only grow, one for each value of a label.
func Counters(name, help, label string, each func(yield func(label string, v float64))) *Values {
	return &Values{prometheus.NewDesc(name, help, []string{label}, nil), prometheus.CounterValue, each}
}

// Gauges shows numbers of the moment, one for each value of a label.
func Gauges(name, help, label string, each func(yield func(label string, v float64))) *Values {
	return &Values{prometheus.NewDesc(name, help, []string{label}, nil), prometheus.GaugeValue, each}
}

// Describe is part of prometheus.Collector.
func (v *Values) Describe(ch chan<- *prometheus.Desc) { ch <- v.desc }

// Collect is part of prometheus.Collector.
func (v *Values) Collect(ch chan<- prometheus.Metric) {
	v.each(func(label string, x float64) { ch <- prometheus.MustNewConstMetric(v.desc, v.kind, x, label) })
}
