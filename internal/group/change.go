package group

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"go.etcd.io/raft/v3"
	pb "go.etcd.io/raft/v3/raftpb"
	"go.etcd.io/raft/v3/tracker"
	"google.golang.org/protobuf/proto"

	"github.com/unum-os/unum/internal/errs"
	"github.com/unum-os/unum/internal/ids"
)

// A learner may be promoted when it lacks at most so many entries: it then
// catches up within a few rounds.
const caughtUp = 256

type raftProgress = tracker.Progress

func stateWord(p raftProgress) string {
	switch p.State {
	case tracker.StateProbe:
		return "probe"
	case tracker.StateReplicate:
		return "replicate"
	}
	return "snapshot"
}

func nodes(list []uint64) []ids.Node {
	out := make([]ids.Node, 0, len(list))
	for _, n := range list {
		out = append(out, ids.Node(n))
	}
	slices.Sort(out)
	return slices.Compact(out)
}

// conf asks questions of a configuration.
type conf struct{ *pb.ConfState }

// voters lists those of both sides of a joint configuration.
func (c conf) voters() []ids.Node {
	return nodes(slices.Concat(c.Voters, c.VotersOutgoing))
}

func (c conf) voter(n ids.Node) bool {
	return slices.Contains(c.Voters, uint64(n)) || slices.Contains(c.VotersOutgoing, uint64(n))
}

func (c conf) learner(n ids.Node) bool { return slices.Contains(c.Learners, uint64(n)) }

// pendingError says that another change of the configuration is under way.
type pendingError struct{ err *errs.Error }

func (e pendingError) Error() string { return e.err.Error() }
func (e pendingError) Unwrap() error { return e.err }

func errPending(g ids.Group) error {
	return pendingError{errs.E(errs.Busy, "change group", fmt.Sprint(g), "another change of its replicas is under way")}
}

// proposeChange hands a change of the configuration to raft, on the worker. A
// change that is already so is answered at once.
func (w *worker) proposeChange(g *Group, p *proposal) error {
	if g.change != nil || len(g.conf.VotersOutgoing) > 0 {
		return errPending(g.id)
	}
	cc, err := p.change(conf{g.conf})
	if err != nil {
		return err
	}
	if cc == nil {
		g.resolve(p.id, outcome{})
		return nil
	}
	cc.Context = p.id[:]
	if err := g.rn.ProposeConfChange(cc); err != nil {
		return err
	}
	g.change = p
	return nil
}

// applyChange makes raft use a committed configuration.
func (w *worker) applyChange(g *Group, e *pb.Entry) (*pb.ConfState, error) {
	cc := &pb.ConfChangeV2{}
	if err := proto.Unmarshal(e.Data, cc); err != nil {
		return nil, errs.E(errs.Corrupt, "apply", fmt.Sprintf("entry %d of group %d", e.GetIndex(), g.id), "%v", err)
	}
	g.conf, g.confAt = g.rn.ApplyConfChange(cc), e.GetIndex()
	g.proof = g.log.last + 1
	g.publish() // before the answer: who asked looks at the status
	g.resolve(entryID(e), outcome{index: e.GetIndex()})
	w.h.log.Info("group's replicas changed", "group", uint64(g.id), "voters", g.conf.Voters,
		"outgoing", g.conf.VotersOutgoing, "learners", g.conf.Learners)
	return g.conf, nil
}

// out reports whether this node leads without a vote: a change that took its seat
// was committed. It then leads only to hand over.
func (g *Group) out() bool {
	return g.leading && !(conf{g.conf}).voter(g.h.cfg.Self)
}

// proven reports whether, as far as this node can tell, a majority of the voters
// know the configuration in force as committed, on their disks: then whoever lost
// its seat may go for good, for any majority of the voters can elect one of them
// without it. What a leader appends after it knows of the commit tells of the
// commit, so who has such an entry knows; when one is committed a majority does.
func (g *Group) proven() bool {
	if !g.leading || g.h.cfg.Hooks.plants(Unproven) {
		return len(g.conf.VotersOutgoing) == 0
	}
	return len(g.conf.VotersOutgoing) == 0 && g.ready && !g.out() && g.rn.BasicStatus().GetCommit() >= g.proof
}

// prove appends the entry that proves the configuration, if there is none yet.
func (w *worker) prove(g *Group) {
	if g.leading && g.log.last < g.proof && !g.out() && len(g.conf.VotersOutgoing) == 0 {
		_ = g.rn.Propose(nil) // refused while the leadership moves: the next tick asks again
	}
}

// reconfigure proposes what want makes of the configuration in force, again
// while another change is under way, and returns when it is applied here and a
// majority of the voters know it, or this node leads no more.
func (g *Group) reconfigure(ctx context.Context, op string, want plan) error {
	for {
		p := &proposal{id: g.h.newID(), ctx: ctx, change: want, done: make(chan outcome, 1)}
		o := g.submit(ctx, p)
		var pending pendingError
		if errors.As(o.err, &pending) {
			t := time.NewTimer(g.h.cfg.Tick / 2)
			select {
			case <-t.C:
				continue
			case <-ctx.Done():
				t.Stop()
				return o.err
			}
		}
		if o.err != nil {
			return errs.Wrap(o.err, op, "")
		}
		return g.wait(ctx, op, func(st Status) bool { return !st.Joint })
	}
}

func change(typ pb.ConfChangeType, list ...ids.Node) *pb.ConfChangeV2 {
	cc := &pb.ConfChangeV2{Transition: pb.ConfChangeTransitionAuto.Enum()}
	for _, n := range list {
		id := uint64(n)
		cc.Changes = append(cc.Changes, &pb.ConfChangeSingle{Type: typ.Enum(), NodeId: &id})
	}
	return cc
}

// AddLearner makes n, which should have joined the group, a learner. Nothing
// happens if n has a replica. Errors as of Propose, except that a change under
// way is waited for.
func (g *Group) AddLearner(ctx context.Context, n ids.Node) error {
	return g.reconfigure(ctx, "add learner "+n.String(), addLearner(n))
}

// plan makes a change of the configuration in force, on the worker; nil if it
// is already so.
type plan func(conf) (*pb.ConfChangeV2, error)

func addLearner(n ids.Node) plan {
	return func(c conf) (*pb.ConfChangeV2, error) {
		if c.voter(n) || c.learner(n) {
			return nil, nil
		}
		return change(pb.ConfChangeAddLearnerNode, n), nil
	}
}

// caughtUp reports whether n's replica lacks so little that it may be promoted: a
// full one nothing that a witness may lack too, or if this leader died then
// nobody could bring it up. On the worker.
func (g *Group) caughtUp(n ids.Node, p raftProgress) bool {
	return p.RecentActive && p.State == tracker.StateReplicate && p.Match+caughtUp >= g.log.last && (p.Match >= g.told || g.h.witness(n))
}

// Promote makes learners voters, all at once. Errors: Invalid if one is no
// learner, Busy if one has not caught up; else as AddLearner.
func (g *Group) Promote(ctx context.Context, list ...ids.Node) error {
	return g.Reseat(ctx, list, nil, nil)
}

// Reseat changes who votes, all at once (joint consensus): learners become
// voters, voters become learners, and voters or learners lose their replicas.
// Errors: Invalid if one to be promoted is no learner, or no voter that is no
// witness would be left, Busy if one has not caught up; else as AddLearner.
func (g *Group) Reseat(ctx context.Context, add, demote, drop []ids.Node) error {
	op := fmt.Sprint("promote ", add, ", demote ", demote, ", remove ", drop)
	return g.reconfigure(ctx, op, g.reseat(add, demote, drop))
}

func (g *Group) reseat(add, demote, drop []ids.Node) plan {
	return func(c conf) (*pb.ConfChangeV2, error) {
		var todo []ids.Node
		for _, n := range add {
			if c.voter(n) {
				continue
			}
			if !c.learner(n) {
				return nil, errs.E(errs.Invalid, "", n.String(), "it is no learner of group %d", g.id)
			}
			var pr raftProgress
			g.rn.WithProgress(func(id uint64, _ raft.ProgressType, p raftProgress) {
				if id == uint64(n) {
					pr = p
				}
			})
			if !g.caughtUp(n, pr) {
				return nil, errs.E(errs.Busy, "", n.String(), "it has %d of %d entries of group %d", pr.Match, g.log.last, g.id)
			}
			todo = append(todo, n)
		}
		cc := change(pb.ConfChangeAddNode, todo...)
		left := len(g.full(c.voters())) + len(g.full(todo)) // a vote without a state is nothing
		for _, n := range demote {
			if c.voter(n) {
				cc.Changes = append(cc.Changes, change(pb.ConfChangeAddLearnerNode, n).Changes...)
				left -= len(g.full([]ids.Node{n}))
			}
		}
		for _, n := range drop {
			if c.voter(n) || c.learner(n) {
				cc.Changes = append(cc.Changes, change(pb.ConfChangeRemoveNode, n).Changes...)
			}
			if c.voter(n) {
				left -= len(g.full([]ids.Node{n}))
			}
		}
		switch {
		case len(cc.Changes) == 0:
			return nil, nil
		case left <= 0:
			return nil, errs.E(errs.Invalid, "", fmt.Sprint("group ", g.id), "no voter with the state would be left")
		}
		return cc, nil
	}
}

// Remove takes n out of the group, voter or learner. The leader may remove
// itself: it then hands over. n may go for good when a leader's Status shows it
// no more and is not Joint. Errors: Invalid for the last voter that is no
// witness; else as AddLearner.
func (g *Group) Remove(ctx context.Context, n ids.Node) error {
	return g.reconfigure(ctx, "remove "+n.String(), g.remove(n))
}

func (g *Group) remove(n ids.Node) plan {
	return func(c conf) (*pb.ConfChangeV2, error) {
		full := g.full(c.voters())
		switch {
		case len(full) == 1 && full[0] == n:
			return nil, errs.E(errs.Invalid, "", n.String(), "it is the last voter of group %d that has the state", g.id)
		case !c.voter(n) && !c.learner(n):
			return nil, nil
		}
		return change(pb.ConfChangeRemoveNode, n), nil
	}
}

// transfer asks raft to, on the worker.
func (g *Group) transfer(op string, to ids.Node) error {
	b := g.rn.BasicStatus()
	switch {
	case b.RaftState != raft.StateLeader:
		return &NotLeaderError{g.id, ids.Node(b.Lead)}
	case !slices.Contains(g.conf.Voters, uint64(to)):
		return errs.E(errs.Invalid, op, "", "it is no voter of group %d", g.id)
	case g.h.witness(to):
		return errs.E(errs.Invalid, op, "", "it is a witness: it has no state")
	}
	g.rn.TransferLeader(uint64(to))
	return nil
}

// TransferLeadership makes the voter to the leader and returns when it is.
// Errors: NotLeader, Invalid if to is no voter or a witness, Unavailable if it did not take
// over within two election timeouts.
func (g *Group) TransferLeadership(ctx context.Context, to ids.Node) error {
	op := "transfer leadership to " + to.String()
	ctx, cancel := context.WithTimeout(ctx, 2*electionTicks*g.h.cfg.Tick)
	defer cancel()
	done := make(chan error, 1)
	g.h.in.push(event{kind: evCall, g: g, fn: func() { done <- g.transfer(op, to) }})
	select {
	case err := <-done:
		if err != nil {
			return err
		}
	case <-ctx.Done():
		return waitErr(ctx, op, g.id, "")
	case <-g.h.stopped:
		return errStopped()
	}
	err := g.wait(ctx, op, func(st Status) bool { return st.Leader == to })
	if errs.Has(err, errs.Timeout) {
		return errs.E(errs.Unavailable, op, "", "it did not take over group %d", g.id)
	}
	return err
}
