package group

import (
	"net"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/unum-os/unum/internal/errs"
	"github.com/unum-os/unum/internal/ids"
	"github.com/unum-os/unum/internal/metric"
)

// counts is what a host counts, over all groups.
type counts struct {
	applied, refused, unknown   atomic.Uint64 // proposals, by outcome
	leaders                     atomic.Uint64 // changes of leader seen
	dropped                     atomic.Uint64 // messages
	snapshotsOut, snapshotsIn   atomic.Uint64
	snapshotSent, snapshotTaken atomic.Uint64 // bytes
	commits, syncs              prometheus.Histogram
}

func newCounts() *counts {
	return &counts{
		commits: metric.Durations("unum_group_commit_seconds", "Time from a proposal to its being applied on the leader."),
		syncs:   metric.Durations("unum_group_sync_seconds", "Time to write and sync the groups' log, all groups of a round together."),
	}
}

// proposed counts the outcome of a proposal made at start.
func (c *counts) proposed(start time.Time, o outcome) {
	switch {
	case o.err == nil:
		c.applied.Add(1)
		c.commits.Observe(time.Since(start).Seconds())
	case errs.Has(o.err, errs.NotLeader) || errs.Has(o.err, errs.Busy) || errs.Has(o.err, errs.Unavailable):
		c.refused.Add(1)
	default:
		c.unknown.Add(1)
	}
}

// follow counts a change of leader, losing one not included.
func (c *counts) follow(old, now ids.Node) {
	if now != 0 && now != old {
		c.leaders.Add(1)
	}
}

// measured is the size of a log, for those who are not the worker.
type measured struct{ bytes, entries atomic.Int64 }

// measure notes the log's size. The worker calls it.
func (g *Group) measure() {
	g.size.bytes.Store(g.log.bytes)
	g.size.entries.Store(int64(g.log.last - g.log.trunc))
}

// LogSize returns about how many bytes and how many entries the group's log has
// on this node.
func (g *Group) LogSize() (bytes, entries int64) { return g.size.bytes.Load(), g.size.entries.Load() }

// LogAim returns the bytes that a group's log is cut to, roughly.
func (h *Host) LogAim() int64 { return h.cfg.LogBytes }

// metered counts what goes over a snapshot's connection.
type metered struct {
	net.Conn
	sent, taken *atomic.Uint64
}

func (m metered) Read(p []byte) (int, error) {
	n, err := m.Conn.Read(p)
	m.taken.Add(uint64(n))
	return n, err
}

func (m metered) Write(p []byte) (int, error) {
	n, err := m.Conn.Write(p)
	m.sent.Add(uint64(n))
	return n, err
}

func (h *Host) metered(c net.Conn) net.Conn {
	return metered{c, &h.count.snapshotSent, &h.count.snapshotTaken}
}

// open returns the groups that are open.
func (h *Host) open() []*Group {
	h.mu.Lock()
	defer h.mu.Unlock()
	out := make([]*Group, 0, len(h.groups))
	for _, g := range h.groups {
		out = append(out, g)
	}
	return out
}

// Collectors returns what the host counts.
func (h *Host) Collectors() []prometheus.Collector {
	c := h.count
	sum := func(f func(*Group) int64) func() float64 {
		return func() float64 {
			var n int64
			for _, g := range h.open() {
				n += f(g)
			}
			return float64(n)
		}
	}
	return []prometheus.Collector{
		c.commits, c.syncs,
		metric.Counters("unum_group_proposals_total", "Proposals made on this node, by outcome: applied, refused (surely not applied), unknown.", "outcome",
			func(yield func(string, float64)) {
				yield("applied", float64(c.applied.Load()))
				yield("refused", float64(c.refused.Load()))
				yield("unknown", float64(c.unknown.Load()))
			}),
		metric.Gauges("unum_group_replicas", "Groups with a replica here, by its role.", "role", func(yield func(string, float64)) {
			roles := map[Role]int{}
			for _, g := range h.open() {
				roles[g.Status().Role]++
			}
			for r := Follower; r <= Leader; r++ {
				yield(r.String(), float64(roles[r]))
			}
		}),
		metric.Gauge("unum_group_leaderless", "Groups with a replica here that know no leader.", sum(func(g *Group) int64 {
			if leader, _ := g.Leader(); leader == 0 {
				return 1
			}
			return 0
		})),
		metric.Gauge("unum_group_log_bytes", "Size of the logs of all groups on this node.", sum(func(g *Group) int64 { b, _ := g.LogSize(); return b })),
		metric.Gauge("unum_group_log_entries", "Entries in the logs of all groups on this node.", sum(func(g *Group) int64 { _, n := g.LogSize(); return n })),
		metric.Gauge("unum_group_applied_lag_entries", "Entries committed and not yet applied here, all groups.", sum(func(g *Group) int64 {
			st := g.Status()
			return int64(st.Commit - min(st.Applied, st.Commit))
		})),
		metric.Counter("unum_group_leader_changes_total", "Times a replica here found a new leader.", &c.leaders),
		metric.Counter("unum_group_messages_dropped_total", "Raft messages not sent, or not taken, for want of room or connection.", &c.dropped),
		metric.Counter("unum_group_snapshots_sent_total", "Snapshots that another node has installed from here.", &c.snapshotsOut),
		metric.Counter("unum_group_snapshots_installed_total", "Snapshots installed here.", &c.snapshotsIn),
		metric.Counter("unum_group_snapshot_sent_bytes_total", "Bytes of snapshots sent, broken off ones included.", &c.snapshotSent),
		metric.Counter("unum_group_snapshot_received_bytes_total", "Bytes of snapshots received, broken off ones included.", &c.snapshotTaken),
	}
}
