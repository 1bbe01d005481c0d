package group

import (
	"encoding/binary"
	"fmt"
	"slices"

	"go.etcd.io/raft/v3"
	pb "go.etcd.io/raft/v3/raftpb"

	"github.com/unum-os/unum/internal/ids"
)

// A hand-over that has not shown within so many ticks is tried again, with
// another voter if there is one: far less than an election timeout.
const handOverTicks = 2 * heartbeatTicks

// handOver gives a leadership to a full voter that has everything: a witness's,
// for it has no state, and that of who has no vote any more. That one does not
// just step down, as raft would have it: the voters may not know yet that the
// change is committed, and those whose logs are longer may have no vote. It is
// called whenever something has happened to the group.
func (w *worker) handOver(g *Group) {
	b := g.rn.BasicStatus()
	if b.RaftState != raft.StateLeader || !w.h.cfg.Witness && !g.out() {
		return
	}
	if b.LeadTransferee != 0 && w.ticks-g.handed < handOverTicks {
		return
	}
	var able []ids.Node
	g.rn.WithProgress(func(id uint64, _ raft.ProgressType, p raftProgress) {
		if slices.Contains(g.conf.Voters, id) && !w.h.witness(ids.Node(id)) && p.Match >= g.log.last {
			able = append(able, ids.Node(id))
		}
	})
	if len(able) == 0 {
		return
	}
	slices.Sort(able)
	heir := able[0]
	for _, n := range able { // another one than last time
		if n > g.heir {
			heir = n
			break
		}
	}
	if b.LeadTransferee != 0 {
		// Ends the attempt that came to nothing. Raft does not take it from who has no
		// vote: if there is no other heir it gives up itself, after an election timeout.
		g.rn.TransferLeader(uint64(w.h.cfg.Self))
	}
	g.rn.TransferLeader(uint64(heir))
	g.heir, g.handed = heir, w.ticks
}

// In a transport message what hosts tell each other has the place of a raft
// message, under the group number 0, which no group has: a floor, [group
// uvarint][index uvarint], or an entry that is committed, [group][index][term]. A
// host that does not know the second kind refuses all that came with it: the nodes
// of a cluster are all of one version.
func appendOwn(b []byte, g ids.Group, index, term uint64) []byte {
	if len(b) == 0 {
		b = append(b, messageVersion)
	}
	v := binary.AppendUvarint(binary.AppendUvarint(nil, uint64(g)), index)
	if term > 0 {
		v = binary.AppendUvarint(v, term)
	}
	return append(append(b, 0, byte(len(v))), v...)
}

func decodeOwn(b []byte) (groupMessage, error) {
	var v [3]uint64
	n := 0
	for rest := b; len(rest) > 0; n++ {
		x, k := binary.Uvarint(rest)
		if k <= 0 || n == len(v) {
			n = 0
			break
		}
		v[n], rest = x, rest[k:]
	}
	if n < 2 || v[0] == 0 || n == 3 && v[2] == 0 {
		return groupMessage{}, fmt.Errorf("floor or committed entry %x", b)
	}
	return groupMessage{g: ids.Group(v[0]), index: v[1], term: v[2], size: 64}, nil
}

// tellKnown says, with each vote that is asked for, given or refused, what is
// known here to be committed. Raft uses a configuration when its commit is known,
// and only a leader tells of commits: without this, one that lacks the last
// change might ask for the votes of nodes that have no vote any more, whose logs
// may be longer, and never be elected.
func (w *worker) tellKnown(g *Group, o *outgoing) {
	commit := g.rn.BasicStatus().GetCommit()
	if t, err := g.log.Term(commit); err == nil && t > 0 {
		o.buf = appendOwn(o.buf, g.id, commit, t)
	}
}

// learn takes what another knows to be committed, while there is no leader to
// say it. An entry of the same index and term is the same one, and what comes
// before it is, too. Raft learns it as from a beat, whose sender it must not take
// for a leader. That ends a candidacy, so it is done only for the sake of a change
// of the replicas: in most elections the others know of some later commit.
func (w *worker) learn(g *Group, from ids.Node, index, term uint64) {
	b := g.rn.BasicStatus()
	if g.parked != nil || b.RaftState == raft.StateLeader || b.Lead != 0 || index <= b.GetCommit() || g.log.changed <= b.GetCommit() {
		return
	}
	if t, err := g.log.Term(index); err != nil || t != term {
		return
	}
	_ = g.rn.Step(&pb.Message{Type: pb.MsgHeartbeat.Enum(), From: new(uint64(from)), To: new(uint64(w.h.cfg.Self)), Term: new(b.GetTerm()), Commit: new(index)})
	_ = g.rn.ForgetLeader()
}
