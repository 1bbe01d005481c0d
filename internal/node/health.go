package node

import (
	"context"
	"maps"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/unum-os/unum/internal/clock"
	"github.com/unum-os/unum/internal/errs"
	"github.com/unum-os/unum/internal/group"
	"github.com/unum-os/unum/internal/health"
	"github.com/unum-os/unum/internal/ids"
	"github.com/unum-os/unum/internal/quorum"
	"github.com/unum-os/unum/internal/record"
)

// conditions returns what is wrong, as this node sees it: the one list behind
// status, its JSON, health and the metrics. It asks nobody.
func (n *Node) conditions() []health.Condition {
	in := health.Input{Self: n.id, Mount: n.cfg.Mount, Certificate: n.holder.NotAfter().Sub(n.cfg.Clock.Wall()), Renewed: renewBefore / 2, Clocks: n.clocks.ahead(), Metrics: n.metrics.Err()}
	var seats []quorum.Member
	loads := n.loads.Snapshot(clock.Now())
	for _, m := range n.current() {
		x := health.Member{ID: m.ID, Host: m.Hostname, Admitted: m.State != record.Joining, Leaving: m.State == record.Leaving,
			Stores: m.Role == record.RoleStore, Witness: m.Role == record.RoleWitness, Alive: n.members == nil || n.alive(m.ID)} // a client has no opinion
		x.Displaced, x.Successor = n.displacer(m.ID), n.successor(m)
		x.Silent, x.Never = n.silence(m.ID)
		for _, l := range loads {
			if l.Node == m.ID {
				x.Disk, x.Free = l.DiskTotal, l.DiskTotal-min(l.DiskUsed, l.DiskTotal)
			}
		}
		in.Members = append(in.Members, x)
		if x.Stores || x.Witness {
			up := x.Alive || m.ID == n.id
			seats = append(seats, quorum.Member{ID: m.ID, Witness: x.Witness, Leaving: x.Leaving, Alive: up, Missed: !up && x.Silent > n.grace})
		}
	}
	for _, g := range n.groups() {
		h := n.groupHealth(g)
		h.Unreplaced = quorum.Unreplaced(quorum.Group{Leader: h.Leader, Voters: h.Voters}, seats)
		in.Groups = append(in.Groups, h)
	}
	if n.host != nil {
		in.Wanted, in.Leader = n.seats(), n.root.Status().Leader
	}
	if n.disk.Role == record.RoleStore {
		in.Stores, in.Session, in.Mounted = true, n.venus.Ready(), n.mounted.Load()
		in.Missing, in.MissingFor = n.blocks.MissingFor()
	}
	if err := n.outcast.Load(); err != nil {
		in.Removed = *err
	}
	if err := n.keyless.Load(); err != nil {
		in.Keyless = *err
	}
	in.Reserve, in.ReserveWhole = n.ballast.left()
	in.Files, in.MaxFiles = openFiles()
	return health.Decide(in)
}

// silence returns for how long a node that is not alive has been silent; never
// says that it has not been heard of since this node started.
func (n *Node) silence(p ids.Node) (ago time.Duration, never bool) {
	if n.members != nil && (*n.known.Load())[p].Role != record.RoleClient {
		ago = n.members.Dead()[p]
	} else {
		ago = n.parted.since(p)
	}
	if ago == 0 {
		return time.Since(n.began), true
	}
	return ago, false
}

// parted is when the last connection with a node was lost, of those with which
// there is none: gossip has no opinion of client nodes. It has a place for each
// member at most, for others are let in only to be refused.
type parted struct {
	mu sync.Mutex
	at map[ids.Node]clock.Instant
}

func (p *parted) note(n ids.Node, up bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.at, n)
	if !up {
		if p.at == nil {
			p.at = map[ids.Node]clock.Instant{}
		}
		p.at[n] = clock.Now()
	}
}

func (p *parted) since(n ids.Node) time.Duration {
	p.mu.Lock()
	defer p.mu.Unlock()
	at, ok := p.at[n]
	if !ok {
		return 0
	}
	return max(clock.Now().Sub(at), 1)
}

func (n *Node) groupHealth(g *group.Group) health.Group {
	st, name := g.Status(), "the cluster's record"
	if g == n.root {
		name = "the root volume"
	}
	h := health.Group{ID: g.ID(), Name: name, Leader: st.Leader, Voters: st.Voters, Commit: st.Commit, Applied: st.Applied, LogAim: n.host.LogAim(), Contradicts: st.Contradicts, Leaderless: n.leaderless[g.ID()].since()}
	h.LogBytes, _ = g.LogSize()
	if len(st.Progress) > 0 {
		h.Match = make(map[ids.Node]uint64, len(st.Progress))
		for p, x := range st.Progress {
			h.Match[p] = x.Match
		}
	}
	return h
}

// healthy returns nil when this node does all it is there for: when no condition
// is an error.
func (n *Node) healthy() error { return problem(n.id, n.conditions()) }

// problem makes an error of the worst condition, if that is one.
func problem(self ids.Node, cs []health.Condition) error {
	if len(cs) == 0 || cs[0].Severity != health.Error {
		return nil
	}
	class := errs.Unavailable
	if cs[0].Code == health.NoQuorum {
		class = errs.NoQuorum
	}
	return errs.E(class, "health", self.String(), "%s", cs[0].Text).WithRemedy("%s", cs[0].Remedy)
}

// leaderless knows since when a group has no leader.
type leaderless struct{ at atomic.Int64 } // clock.Instant; 0: it has one

// watch is told of every change of the group's status.
func (l *leaderless) watch(st group.Status) {
	if st.Leader != 0 {
		l.at.Store(0)
	} else {
		l.at.CompareAndSwap(0, int64(clock.Now()))
	}
}

func (l *leaderless) since() time.Duration {
	at := clock.Instant(l.at.Load())
	if at == 0 {
		return 0
	}
	return clock.Now().Sub(at)
}

// openFiles returns how many descriptors this process has, and how many it may.
// What cannot be found out is 0.
func openFiles() (n, most uint64) {
	var lim unix.Rlimit
	d, err := os.Open("/proc/self/fd")
	if err != nil || unix.Getrlimit(unix.RLIMIT_NOFILE, &lim) != nil {
		return 0, 0
	}
	defer d.Close()
	names, err := d.Readdirnames(-1)
	if err != nil {
		return 0, 0
	}
	return uint64(len(names)), lim.Cur
}

// left returns the bytes that the ballast keeps now, and those it should.
func (b *ballast) left() (have, whole int64) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.have, b.size
}

// methodClock tells the asked node's time of day: -> clockReply.
const methodClock = "node.clock"

type clockReply struct {
	Wall int64 `cbor:"1,keyasint"` // Unix nanoseconds
}

const (
	// clockEvery is how often some of the others are asked for their time: all of
	// them in clockRounds times.
	clockEvery  = 10 * time.Second
	clockRounds = 6
	// clockTrip is the longest that question and answer may take to count: the
	// answer is then right to half of it.
	clockTrip = 500 * time.Millisecond
)

// clocks is how far the others' clocks are ahead of this node's. Nothing depends
// on it; people are told.
type clocks struct {
	mu    sync.Mutex
	apart map[ids.Node]time.Duration
}

func (c *clocks) ahead() map[ids.Node]time.Duration {
	c.mu.Lock()
	defer c.mu.Unlock()
	return maps.Clone(c.apart)
}

func (c *clocks) put(n ids.Node, by time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.apart == nil {
		c.apart = map[ids.Node]time.Duration{}
	}
	c.apart[n] = by
}

// keep forgets all but the nodes that are alive.
func (c *clocks) keep(alive func(ids.Node) bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	maps.DeleteFunc(c.apart, func(n ids.Node, _ time.Duration) bool { return !alive(n) })
}

// watchClocks compares this node's clock with the others', a few at a time.
func (n *Node) watchClocks(ctx context.Context) error {
	for turn := 0; ctx.Err() == nil; pause(ctx, n.clockEvery) {
		n.clocks.keep(n.members.IsAlive)
		others := slices.DeleteFunc(n.members.Alive(), func(p ids.Node) bool { return p == n.id })
		for range (len(others) + clockRounds - 1) / clockRounds {
			turn++
			n.compareClock(ctx, others[turn%len(others)])
		}
	}
	return nil
}

// compareClock asks one node. That it does not answer is others' to notice.
func (n *Node) compareClock(ctx context.Context, p ids.Node) {
	ctx, cancel := context.WithTimeout(ctx, clockTrip)
	defer cancel()
	before, sent := clock.Now(), n.cfg.Clock.Wall()
	var r clockReply
	if _, err := n.ep.Call(ctx, p, methodClock, nil, nil, &r); err != nil {
		return
	}
	trip := clock.Now().Sub(before)
	if trip > clockTrip {
		return
	}
	n.clocks.put(p, time.Duration(r.Wall-sent.UnixNano())-trip/2)
}
