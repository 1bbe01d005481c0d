package node

import (
	"context"
	"slices"
	"time"

	"github.com/unum-os/unum/internal/errs"
	"github.com/unum-os/unum/internal/group"
	"github.com/unum-os/unum/internal/ids"
	"github.com/unum-os/unum/internal/record"
)

// votersFor is how many of n members vote: 2f+1 with f by P2, all of two.
func votersFor(n int) int {
	switch {
	case n <= 2:
		return n
	case n < 5:
		return 3
	}
	return 5
}

const (
	// settling is how long after its start a node does not judge whom it has not
	// heard of dead: gossip takes a second or two to reach all.
	settling = 10 * time.Second
	// buryAgain is how often the jobs of a dead node are looked for: its end may
	// have been noticed before the record knew of all of them, or by a leader
	// that died before it had told.
	buryAgain = 5 * time.Second
)

// steward brings the voters of the groups that this node leads into line with
// the members, one step at a time: new members become learners, the first of
// them voters once they have caught up; then they are members in full. Leading
// the record, it tells it which jobs died with their nodes. It keeps this node's
// certificate good.
func (n *Node) steward(ctx context.Context) error {
	buried := map[ids.Node]time.Time{} // when last
	var renewed time.Time              // when last tried
	for {
		pause(ctx, 200*time.Millisecond)
		if ctx.Err() != nil {
			return nil
		}
		n.noteMove(ctx)
		if now := time.Now(); n.holder.NotAfter().Sub(now) < renewBefore && now.Sub(renewed) > renewAgain {
			renewed = now
			if err := n.renew(ctx); err != nil && ctx.Err() == nil {
				n.cfg.Log.Warn("the certificate is not renewed yet", "ends", n.holder.NotAfter(), "err", err)
			}
		}
		members := n.current()
		for _, g := range []*group.Group{n.rec, n.root} {
			if g.IsLeader() {
				if err := n.tend(ctx, g, members); err != nil && ctx.Err() == nil {
					n.cfg.Log.Debug("voters not changed yet", "group", uint64(g.ID()), "err", err)
				}
			}
		}
		if n.rec.IsLeader() {
			n.admit(ctx, members)
			if time.Since(n.began) > settling {
				n.bury(ctx, members, buried)
			}
		}
	}
}

// bury has the jobs of dead members marked lost: at once, and again for as long
// as they are dead. What became of this node's own is the manager's to know.
func (n *Node) bury(ctx context.Context, members []record.Member, buried map[ids.Node]time.Time) {
	for _, m := range members {
		if m.ID == n.id || n.members.IsAlive(m.ID) {
			delete(buried, m.ID)
			continue
		}
		if time.Since(buried[m.ID]) < buryAgain {
			continue
		}
		buried[m.ID] = time.Now()
		if err := n.manager.NodeDead(ctx, m.ID); err != nil && ctx.Err() == nil {
			n.cfg.Log.Warn("its jobs are not marked lost yet", "member", m.ID.String(), "err", err)
		}
	}
}

// tend makes one step for one group.
func (n *Node) tend(ctx context.Context, g *group.Group, members []record.Member) error {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	st := g.Status()
	want := votersFor(len(members))
	for _, m := range members {
		if m.Role != record.RoleStore || slices.Contains(st.Voters, m.ID) {
			continue
		}
		if !n.members.IsAlive(m.ID) {
			continue
		}
		if !slices.Contains(st.Learners, m.ID) {
			return g.AddLearner(ctx, m.ID)
		}
	}
	var ready []ids.Node
	for _, m := range members {
		if len(st.Voters)+len(ready) < want && slices.Contains(st.Learners, m.ID) && n.members.IsAlive(m.ID) {
			ready = append(ready, m.ID)
		}
	}
	ready = notFour(len(st.Voters), ready)
	if len(ready) == 0 {
		return nil
	}
	err := g.Promote(ctx, ready...)
	if few := notFour(len(st.Voters), ready[:1]); errs.Has(err, errs.Busy) && len(ready) > 1 && len(few) > 0 {
		err = g.Promote(ctx, few...) // those that have not caught up come later
	}
	return err
}

// notFour leaves the last of ready out if with it there were four voters, who
// bear no more than three do.
func notFour(voters int, ready []ids.Node) []ids.Node {
	if len(ready) > 0 && voters+len(ready) == 4 {
		return ready[:len(ready)-1]
	}
	return ready
}

// admit makes members of those that joined and have their place in the groups.
func (n *Node) admit(ctx context.Context, members []record.Member) {
	st := n.rec.Status()
	for _, m := range members {
		if m.State != record.Joining || m.ID != n.id && !n.members.IsAlive(m.ID) {
			continue
		}
		if !slices.Contains(st.Voters, m.ID) && !slices.Contains(st.Learners, m.ID) {
			continue
		}
		if _, err := n.record.do(ctx, record.Command{UpdateMember: &record.UpdateMember{Node: m.ID, State: record.Active}}); err != nil {
			n.cfg.Log.Debug("member not admitted yet", "member", m.ID.String(), "err", err)
		}
	}
}

// noteMove tells the record when this node's address or host name has changed.
func (n *Node) noteMove(ctx context.Context) {
	m, ok := (*n.known.Load())[n.id]
	if !ok || m.Addr == n.disk.Addr && m.Hostname == n.cfg.Hostname {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	if _, err := n.record.do(ctx, record.Command{UpdateMember: &record.UpdateMember{Node: n.id, Addr: n.disk.Addr, Hostname: n.cfg.Hostname}}); err != nil {
		n.cfg.Log.Debug("address not told yet", "err", err)
	}
}
