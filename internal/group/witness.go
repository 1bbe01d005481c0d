package group

import (
	"fmt"
	"slices"

	"github.com/cockroachdb/pebble/v2"
	"go.etcd.io/raft/v3"
	pb "go.etcd.io/raft/v3/raftpb"
	"go.etcd.io/raft/v3/tracker"

	"github.com/unum-os/unum/internal/errs"
	"github.com/unum-os/unum/internal/ids"
)

// DefaultWitnessLogBytes is what a witness keeps of one group for a full replica
// that is away. It is disk only, and what a group writes in hours.
const DefaultWitnessLogBytes = 1 << 30

// A candidate that yielded to another does not take votes for so many ticks: the
// other needs one round trip.
const yieldTicks = 2 * heartbeatTicks

// nothing is a witness's machine.
type nothing struct{}

func (nothing) Apply(*pebble.Batch, Space, uint64, []byte) any { return nil }
func (nothing) Applied(uint64)                                 {}

// witness reports whether n keeps logs only.
func (h *Host) witness(n ids.Node) bool {
	if n == h.cfg.Self {
		return h.cfg.Witness
	}
	return h.cfg.IsWitness != nil && h.cfg.IsWitness(n)
}

// full leaves the witnesses out.
func (g *Group) full(list []ids.Node) (out []ids.Node) {
	for _, n := range list {
		if !g.h.witness(n) {
			out = append(out, n)
		}
	}
	return out
}

func (h *Host) witnesses(list []uint64) bool {
	return slices.ContainsFunc(list, func(n uint64) bool { return h.witness(ids.Node(n)) })
}

// notHere refuses what only a replica with the state can do.
func (g *Group) notHere(op string) error {
	leader, _ := g.Leader()
	if leader != g.h.cfg.Self {
		return &NotLeaderError{g.id, leader}
	}
	return errs.E(errs.Busy, op, fmt.Sprint(g.id), "%v is a witness: it leads only until a node with the state can", leader)
}

// replicaRecord is what marks a replica on this node's disk: a version, and for
// a witness one byte more. A directory never changes sides: a witness's has no
// state.
func (h *Host) replicaRecord() []byte {
	if h.cfg.Witness {
		return []byte{replicaVersion, 'w'}
	}
	return []byte{replicaVersion}
}

func (h *Host) checkReplica(g ids.Group, v []byte) error {
	place := fmt.Sprintf("replica of group %d", g)
	switch {
	case string(v) == string(h.replicaRecord()):
		return nil
	case string(v) == string([]byte{replicaVersion, 'w'}):
		return errs.E(errs.Invalid, "open", place, "this directory is a witness's and has no state")
	case string(v) == string([]byte{replicaVersion}):
		return errs.E(errs.Invalid, "open", place, "this directory is not a witness's: it has state")
	}
	return errs.E(errs.Corrupt, "read", place, "record %x, want version %d", v, replicaVersion)
}

// floor returns, on a leader, the last entry that a witness need not keep: all
// full voters have it, and all full learners that are being sent entries, for
// they may soon be voters. 0: not known yet, since a change of the replicas may
// be under way, and then it is open who is to be counted.
func (w *worker) floor(g *Group) uint64 {
	b := g.rn.BasicStatus()
	if !g.ready || b.Applied < g.settled {
		return 0
	}
	to := b.GetCommit()
	g.rn.WithProgress(func(id uint64, t raft.ProgressType, p raftProgress) {
		if !w.h.witness(ids.Node(id)) && (t != raft.ProgressTypeLearner || p.State == tracker.StateReplicate) {
			to = min(to, p.Match)
		}
	})
	return to
}

// tellFloor tells the group's witnesses how far they may truncate. What is lost
// is made good by the next one: a log that does not grow need not be cut.
func (w *worker) tellFloor(g *Group) {
	list := slices.Concat(g.conf.Voters, g.conf.VotersOutgoing, g.conf.Learners)
	if !w.h.witnesses(list) {
		return
	}
	f := w.floor(g)
	if f <= g.sent {
		return
	}
	g.sent, g.told = f, max(g.told, f)
	for _, n := range nodes(list) {
		if n != w.h.cfg.Self && w.h.witness(n) {
			o := w.outgoing(n, g)
			o.buf = appendOwn(o.buf, g.id, f, 0)
		}
	}
}

// hear takes a floor. Any leader's is good for ever; others have none to tell.
func (w *worker) hear(g *Group, from ids.Node, index uint64) {
	if w.h.cfg.Witness && uint64(from) == g.lead {
		g.floor = max(g.floor, index)
		w.trim(g)
	}
}

// spare says how far a witness may truncate, to being what it would like to.
// Beyond its limit the oldest quarter goes whoever needs it.
func (w *worker) spare(g *Group, applied, to uint64) uint64 {
	l, f := g.log, g.floor
	if g.leading {
		f = max(f, w.floor(g))
	}
	to = min(to, f)
	if oldest := l.trunc + (applied-l.trunc)/4; l.bytes >= w.h.cfg.WitnessLogBytes && oldest > to {
		w.h.log.Warn("witness drops entries that a full replica may lack: it will need another full one",
			"group", uint64(g.id), "from", l.trunc+1, "to", oldest, "bytes", l.bytes)
		return oldest
	}
	return to
}

// showNeeds brings into the status of a witness that leads which nodes it waits
// for: full voters that are silent, when none that is there can be brought up.
func (w *worker) showNeeds(g *Group) {
	var needs []ids.Node
	helped := w.ticks-g.since < electionTicks // they have not had their time
	g.rn.WithProgress(func(id uint64, t raft.ProgressType, p raftProgress) {
		n := ids.Node(id)
		if t == raft.ProgressTypeLearner || w.h.witness(n) {
			return
		}
		at, ok := g.heard[n]
		switch {
		case !ok || w.ticks-at >= electionTicks:
			needs = append(needs, n)
		case p.Next > g.log.trunc: // the log has what it lacks
			helped = true
		}
	})
	if helped {
		needs = nil
	}
	slices.Sort(needs)
	g.mu.Lock()
	defer g.mu.Unlock()
	if slices.Equal(needs, g.st.Needs) {
		return
	}
	if len(needs) > 0 {
		w.h.log.Warn("witness leads and cannot hand over: one of these nodes is needed", "group", uint64(g.id), "nodes", needs)
	}
	g.st.Needs = needs
	close(g.changed)
	g.changed = make(chan struct{})
}

// yields settles a tie between two that seek the same election, which would cost
// both another timeout: each would vote for itself. The one that comes later in
// the order (full replicas, then witnesses, then by number) lets the other win,
// if that one's log is good enough: it takes no votes for a moment. It reports
// whether m, such a vote, is to be dropped.
func (w *worker) yields(g *Group, m *pb.Message) bool {
	switch m.GetType() {
	case pb.MsgPreVote:
		b := g.rn.BasicStatus()
		term, _ := g.log.Term(g.log.last) // it is there
		newer := m.GetLogTerm() > term || m.GetLogTerm() == term && m.GetIndex() >= g.log.last
		if b.RaftState == raft.StatePreCandidate && m.GetTerm() > b.GetTerm() && newer && w.h.before(ids.Node(m.GetFrom())) {
			g.yielded = w.ticks + yieldTicks
		}
	case pb.MsgPreVoteResp:
		return !m.GetReject() && w.ticks < g.yielded
	}
	return false
}

// before reports whether n comes before this node in a tie.
func (h *Host) before(n ids.Node) bool {
	if a, b := h.witness(n), h.cfg.Witness; a != b {
		return b
	}
	return n < h.cfg.Self
}
