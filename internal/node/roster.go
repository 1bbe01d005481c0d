package node

import (
	"context"
	"slices"
	"sync"
	"time"

	"github.com/unum-os/unum/internal/errs"
	"github.com/unum-os/unum/internal/ids"
	"github.com/unum-os/unum/internal/record"
	"github.com/unum-os/unum/internal/wire"
)

// refreshMembers reads the members anew, from this node's replica of the record.
func (n *Node) refreshMembers() error {
	if n.disk.Role != record.RoleStore {
		return nil
	}
	l, err := n.memberList()
	if err != nil {
		n.cfg.Log.Error("cannot read the members", "err", err)
		return err
	}
	n.setMembers(l)
	return nil
}

// memberList returns the members as this replica has them.
func (n *Node) memberList() (l memberList, err error) {
	v := n.record.view()
	if l.Revision, err = v.Revision(); err == nil { // before the members, which may then be newer
		l.Members, err = v.Members()
	}
	return l, err
}

// setMembers makes a list what is known, unless it is older than what is; it
// reports whether it has.
func (n *Node) setMembers(l memberList) bool {
	m := make(map[ids.Node]record.Member, len(l.Members))
	for _, x := range l.Members {
		m[x.ID] = x
	}
	n.roster.Lock()
	defer n.roster.Unlock()
	if l.Revision < n.revision {
		return false
	}
	n.revision = l.Revision
	n.known.Store(&m)
	n.nudge()
	return true
}

// methodMoved tells a node that the caller is at another address than the record
// says: movedRequest -> nothing.
const methodMoved = "node.moved"

type movedRequest struct {
	Addr string `cbor:"1,keyasint"`
}

// movedFor is how long a node is looked for where it says that it is, and not where
// the record says. It says so again until the record says the same (noteMove).
const movedFor = 30 * time.Second

// moved is where a node says that it is.
type moved struct {
	addr string
	at   time.Time
}

// serveMoved believes a node where it is itself: it has shown who it is.
func (n *Node) serveMoved(_ context.Context, from ids.Node, req, _ []byte) (any, []byte, error) {
	var q movedRequest
	if err := wire.Unmarshal(req, &q); err != nil {
		return nil, nil, err
	}
	if q.Addr == "" || len(q.Addr) > record.MaxText {
		return nil, nil, errs.E(errs.Invalid, "note address", from.String(), "%d bytes, want 1 to %d", len(q.Addr), record.MaxText)
	}
	addr, err := address(q.Addr, "")
	if err != nil {
		return nil, nil, err
	}
	if was, _ := n.moves.Swap(from, moved{addr, time.Now()}); was == nil || was.(moved).addr != addr {
		n.cfg.Log.Info("member has moved", "member", from.String(), "addr", addr)
	}
	return nil, nil, nil
}

// tellMove tells all others where this node is. The record alone could not: its
// majority may need this node, and then nothing can be written before they reach it.
func (n *Node) tellMove(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, selfLimit)
	defer cancel()
	var wg sync.WaitGroup
	for _, m := range n.current() {
		if m.ID == n.id {
			continue
		}
		wg.Go(func() {
			if _, err := n.ep.Call(ctx, m.ID, methodMoved, movedRequest{n.disk.Addr}, nil, nil); err != nil {
				n.cfg.Log.Debug("a member does not know yet where this node is", "member", m.ID.String(), "err", err)
			}
		})
	}
	wg.Wait()
}

// resolve returns a node's address.
func (n *Node) resolve(p ids.Node) (string, bool) {
	if v, ok := n.moves.Load(p); ok && time.Since(v.(moved).at) < movedFor {
		return v.(moved).addr, true
	}
	if m, ok := (*n.known.Load())[p]; ok {
		return m.Addr, m.Addr != ""
	}
	a, ok := n.disk.snapshot().Peers[p.String()]
	return a, ok
}

// alive reports whether a node is believed to be. Client nodes take no part in
// the gossip: they are alive while they are connected, and believe of the others
// what a node that stores told them last. Nobody is alive at whose address another
// answers: gossip needs two seconds to find out, and a machine that came back as
// another node is heard of sooner.
func (n *Node) alive(p ids.Node) bool {
	switch {
	case p == n.id:
		return true
	case n.displacer(p) != 0:
		return false
	case n.members == nil:
		heard := n.heard.Load()
		return heard != nil && slices.Contains(*heard, p) || n.ep.Connected(p)
	case (*n.known.Load())[p].Role == record.RoleClient:
		return n.ep.Connected(p)
	}
	return n.members.IsAlive(p)
}

// displacer returns the member that answers at p's address in p's place, 0 if none
// is known to.
func (n *Node) displacer(p ids.Node) ids.Node {
	known := *n.known.Load()
	m, ok := known[p]
	if !ok || m.Addr == "" || p == n.id {
		return 0
	}
	at, when := n.ep.Reached(p)
	for q, x := range known {
		switch {
		case q == p || x.Addr != m.Addr || !x.State.Belongs():
		case q == n.id && at != m.Addr:
			return q
		case q != n.id:
			if qat, qwhen := n.ep.Reached(q); qat == m.Addr && (at != m.Addr || qwhen.After(when)) {
				return q
			}
		}
	}
	return 0
}

// successor returns the last member that came after m at its address and was
// admitted, whether or not it is one still; 0: none.
func (n *Node) successor(m record.Member) (last ids.Node) {
	for q, x := range *n.known.Load() {
		if q > max(m.ID, last) && x.Addr == m.Addr && x.State > record.Joining {
			last = q
		}
	}
	return last
}

// current lists the members that belong to the cluster, in order.
func (n *Node) current() []record.Member {
	var out []record.Member
	for _, m := range *n.known.Load() {
		if m.State.Belongs() {
			out = append(out, m)
		}
	}
	slices.SortFunc(out, func(a, b record.Member) int { return int(a.ID) - int(b.ID) })
	return out
}

func (n *Node) hostname(p ids.Node) string { return (*n.known.Load())[p].Hostname }

// byName finds a node by what people call it.
func (n *Node) byName(name string) (ids.Node, error) {
	if name == "." || name == "local" {
		return n.id, nil
	}
	var found []ids.Node
	for _, m := range n.current() {
		if m.ID.String() == name {
			return m.ID, nil
		}
		if m.Hostname == name {
			found = append(found, m.ID)
		}
	}
	switch len(found) {
	case 1:
		return found[0], nil
	case 0:
		return 0, errs.E(errs.NotFound, "find node", name, "there is no such node").WithRemedy("unum nodes")
	}
	return 0, errs.E(errs.Invalid, "find node", name, "%d nodes have this host name", len(found)).WithRemedy("unum nodes, and name it by its id")
}

// askFirst lists nodes that may know the groups' leaders: those that store, this
// one first.
func (n *Node) askFirst() []ids.Node {
	var out []ids.Node
	if n.disk.Role == record.RoleStore {
		out = append(out, n.id)
	}
	for _, m := range n.current() {
		if m.ID != n.id && m.Role == record.RoleStore {
			out = append(out, m.ID)
		}
	}
	if len(out) == 0 { // nobody is known yet but whom the joining named
		for name := range n.disk.snapshot().Peers {
			if p, err := ids.ParseNode(name); err == nil {
				out = append(out, p)
			}
		}
		slices.Sort(out)
	}
	return out
}

// witness reports whether a node keeps logs only.
func (n *Node) witness(p ids.Node) bool {
	return (*n.known.Load())[p].Role == record.RoleWitness || p == n.id && n.disk.Role == record.RoleWitness
}

// storing lists the nodes that keep the root volume's blocks: its voters but
// for a witness.
func (n *Node) storing() []ids.Node {
	voters := n.root.Status().Voters
	if v := n.unseated.Load(); v != nil {
		voters = *v
	}
	return slices.DeleteFunc(slices.Clone(voters), n.witness)
}

// holders lists the nodes that may have blocks: all that store.
func (n *Node) holders() []ids.Node {
	var out []ids.Node
	for _, m := range n.current() {
		if m.Role == record.RoleStore {
			out = append(out, m.ID)
		}
	}
	return out
}

// onMember reacts to a node that comes or goes; its jobs are the steward's.
func (n *Node) onMember(p ids.Node, alive bool) {
	n.cfg.Log.Info("member changed", "member", p.String(), "alive", alive)
	n.nudge()
	if !alive {
		n.loads.Remove(p)
	}
}
