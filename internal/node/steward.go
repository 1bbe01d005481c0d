package node

import (
	"context"
	"fmt"
	"time"

	"github.com/unum-os/unum/internal/errs"
	"github.com/unum-os/unum/internal/group"
	"github.com/unum-os/unum/internal/ids"
	"github.com/unum-os/unum/internal/principal"
	"github.com/unum-os/unum/internal/quorum"
	"github.com/unum-os/unum/internal/record"
)

const (
	// settling is how long after its start a node does not judge whom it has not
	// heard of dead: gossip takes a second or two to reach all.
	settling = 10 * time.Second
	// buryAgain is how often the jobs of a dead node are looked for: its end may
	// have been noticed before the record knew of all of them, or by a leader
	// that died before it had told.
	buryAgain = 5 * time.Second
	// grace is how long a voter may be silent before another takes its seat: a
	// machine that is started anew is back before, and its blocks need not be
	// copied.
	grace = time.Minute
	// stewardTick is how often the steward looks; what it is told of (members,
	// liveness) makes it look at once.
	stewardTick = time.Second
	// stewardAgain is how soon it looks again while something is under way.
	stewardAgain = 50 * time.Millisecond
	// stepLimit bounds one step of a group towards its voters.
	stepLimit = 10 * time.Second
	// moveLimit bounds the telling of the record that this node's address or host
	// name has changed.
	moveLimit = 5 * time.Second
	// doorLimit bounds the question at the others' doors whether this node is a
	// member still, which one that hears of nobody asks once in a grace.
	doorLimit = 10 * time.Second
)

// steward brings the voters of the groups that this node leads into line with
// the members, one step of package quorum at a time. Leading the record, it
// makes those members that joined and have their place, and tells it which jobs
// died with their nodes. It keeps this node's certificate good, and the
// authority's key where it belongs.
func (n *Node) steward(ctx context.Context) error {
	s := steward{n: n, buried: map[ids.Node]time.Time{}, silent: map[ids.Node]time.Time{}, keys: guardian{given: map[ids.Node]uint64{}, since: n.began}}
	tick := time.NewTicker(stewardTick)
	defer tick.Stop()
	for ctx.Err() == nil {
		if s.look(ctx) {
			pause(ctx, stewardAgain)
			continue
		}
		select {
		case <-ctx.Done():
		case <-tick.C:
		case <-n.stir:
		}
	}
	return nil
}

// nudge makes the steward look.
func (n *Node) nudge() {
	select {
	case n.stir <- struct{}{}:
	default:
	}
}

// steward is what the loop remembers.
type steward struct {
	n       *Node
	buried  map[ids.Node]time.Time // when last
	silent  map[ids.Node]time.Time // since when
	renewed time.Time              // when last tried, by the clock that does not jump
	keys    guardian
	asked   time.Time // at the others' doors, when last
	seated  time.Time // when last asked whether it has its place
}

// look does what is due and reports whether there may soon be more.
func (s *steward) look(ctx context.Context) bool {
	n := s.n
	s.renew(ctx)
	n.noteMove(ctx)
	n.guard(ctx, &s.keys)
	if time.Since(s.seated) >= stewardTick {
		n.settleSeat(ctx)
		s.seated = time.Now()
	}
	members := n.current()
	for _, m := range members {
		if m.ID == n.id || n.alive(m.ID) {
			delete(s.silent, m.ID)
		} else if s.silent[m.ID].IsZero() {
			s.silent[m.ID] = time.Now()
		}
	}
	s.wonder(ctx, members)
	busy := false
	for _, g := range n.groups() {
		if !g.IsLeader() {
			continue
		}
		done, err := s.tend(ctx, g, members)
		if err != nil && ctx.Err() == nil {
			n.cfg.Log.Debug("voters not changed yet", "group", uint64(g.ID()), "err", err)
		}
		busy = busy || !done
	}
	if n.rec != nil && n.rec.IsLeader() && n.disk.Role == record.RoleStore {
		busy = n.admit(ctx, members) || busy
		busy = s.putOut(ctx, n.cfg.Without) || busy
		if time.Since(n.began) > settling {
			s.bury(ctx, members)
		}
	}
	return busy
}

// wonder has a node that has not heard of anybody for a grace ask why, as a
// machine without a certificate: if it was removed, the others end its connections
// without a word.
func (s *steward) wonder(ctx context.Context, members []record.Member) {
	n, others := s.n, 0
	for _, m := range members {
		if m.ID == n.id {
			continue
		}
		if others++; s.silent[m.ID].IsZero() {
			n.outcast.Store(nil)
			return
		}
		if time.Since(s.silent[m.ID]) < n.grace {
			return
		}
	}
	if others == 0 || time.Since(s.asked) < n.grace {
		return
	}
	s.asked = time.Now()
	ctx, cancel := context.WithTimeout(ctx, doorLimit)
	defer cancel()
	if err := n.askAtTheDoor(ctx); errs.Has(err, errs.Unauthorized) && n.outcast.Swap(&err) == nil {
		n.cfg.Log.Error("this node is no member any more", "err", err)
	}
}

// putOut has the node without which this one was told to go on removed, and
// reports whether that is still to be done.
func (s *steward) putOut(ctx context.Context, lost ids.Node) bool {
	n := s.n
	if m := (*n.known.Load())[lost]; !m.State.Belongs() {
		return false
	}
	root := principal.Principal{Node: n.id} // who started this node so
	_, err := n.record.do(ctx, record.Command{Who: root, UpdateMember: &record.UpdateMember{Node: lost, State: record.Removed}})
	if err != nil && ctx.Err() == nil {
		n.cfg.Log.Warn("the lost node is not put out yet", "member", lost.String(), "err", err)
	}
	return err != nil
}

// renew asks for the next certificate when it is time.
func (s *steward) renew(ctx context.Context) {
	n := s.n
	if time.Since(s.renewed) > renewAgain && n.renewDue() {
		s.renewed = time.Now()
		if err := n.renew(ctx); err != nil && ctx.Err() == nil {
			n.cfg.Log.Warn("the certificate is not renewed yet", "ends", n.holder.NotAfter(), "err", err)
		}
	}
}

// bury has the jobs of dead members marked lost: at once, and again for as long
// as they are dead. What became of this node's own is the manager's to know.
func (s *steward) bury(ctx context.Context, members []record.Member) {
	n := s.n
	for _, m := range *n.known.Load() { // those that were put out may have died with jobs
		if m.State == record.Left || m.State == record.Removed {
			members = append(members, m)
		}
	}
	for _, m := range members {
		if m.Role != record.RoleStore || m.State.Belongs() && s.silent[m.ID].IsZero() || !m.State.Belongs() && !s.buried[m.ID].IsZero() {
			if m.State.Belongs() {
				delete(s.buried, m.ID)
			}
			continue
		}
		if time.Since(s.buried[m.ID]) < buryAgain {
			continue
		}
		s.buried[m.ID] = time.Now()
		if err := n.manager.NodeDead(ctx, m.ID); err != nil && ctx.Err() == nil {
			if !m.State.Belongs() { // else this would have been its one time
				delete(s.buried, m.ID)
			}
			n.cfg.Log.Warn("its jobs are not marked lost yet", "member", m.ID.String(), "err", err)
		}
	}
}

// seats says of the members what the rules of quorum ask.
func (s *steward) seats(st group.Status, members []record.Member) []quorum.Member {
	var out []quorum.Member
	for _, m := range members {
		if m.Role == record.RoleClient {
			continue
		}
		since := s.silent[m.ID]
		out = append(out, quorum.Member{ID: m.ID, Witness: m.Role == record.RoleWitness, Leaving: m.State == record.Leaving,
			Alive: since.IsZero(), Missed: !since.IsZero() && time.Since(since) > s.n.grace, CaughtUp: st.Progress[m.ID].CaughtUp})
	}
	return out
}

// tend makes one step for one group, and reports whether there is nothing to do.
func (s *steward) tend(ctx context.Context, g *group.Group, members []record.Member) (bool, error) {
	ctx, cancel := context.WithTimeout(ctx, stepLimit)
	defer cancel()
	n, st := s.n, g.Status()
	step := quorum.Next(quorum.Group{Leader: n.id, Voters: st.Voters, Learners: st.Learners, Joint: st.Joint}, s.seats(st, members))
	switch step.Kind {
	case quorum.AddLearner:
		return false, g.AddLearner(ctx, step.Add[0])
	case quorum.Reseat:
		for _, a := range step.Add { // before they vote, whoever dies then
			if (*n.known.Load())[a].Role == record.RoleWitness {
				continue
			}
			if err := n.entrust(ctx, a); err != nil {
				return false, err
			}
		}
		return false, g.Reseat(ctx, step.Add, step.Demote, step.Drop)
	case quorum.Drop:
		return false, g.Reseat(ctx, nil, nil, step.Drop)
	case quorum.Transfer:
		return false, g.TransferLeadership(ctx, step.Add[0])
	}
	if step.Why != "" {
		return false, errs.E(errs.Busy, "change voters", fmt.Sprint("group ", g.ID()), "%s", step.Why)
	}
	return true, nil
}

// admit makes members of those that joined and have their place in the groups.
func (n *Node) admit(ctx context.Context, members []record.Member) bool {
	did := false
	for _, m := range members {
		if m.State != record.Joining || m.Role != record.RoleClient && !n.placed(m.ID) {
			continue
		}
		if _, err := n.record.do(ctx, record.Command{UpdateMember: &record.UpdateMember{Node: m.ID, State: record.Active}}); err != nil {
			n.cfg.Log.Debug("member not admitted yet", "member", m.ID.String(), "err", err)
			continue
		}
		did = true
	}
	return did
}

// noteMove tells the others and the record when this node's address or host name
// has changed.
func (n *Node) noteMove(ctx context.Context) {
	m, ok := (*n.known.Load())[n.id]
	if !ok || m.Addr == n.disk.Addr && m.Hostname == n.cfg.Hostname {
		return
	}
	if m.Addr != n.disk.Addr {
		n.tellMove(ctx)
	}
	ctx, cancel := context.WithTimeout(ctx, moveLimit)
	defer cancel()
	if _, err := n.record.do(ctx, record.Command{UpdateMember: &record.UpdateMember{Node: n.id, Addr: n.disk.Addr, Hostname: n.cfg.Hostname}}); err != nil {
		n.cfg.Log.Debug("address not told yet", "err", err)
	}
}
