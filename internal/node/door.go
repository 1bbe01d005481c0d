package node

import (
	"context"
	"slices"

	"github.com/unum-os/unum/internal/control"
	"github.com/unum-os/unum/internal/errs"
	"github.com/unum-os/unum/internal/identity"
	"github.com/unum-os/unum/internal/ids"
	"github.com/unum-os/unum/internal/member"
	"github.com/unum-os/unum/internal/principal"
	"github.com/unum-os/unum/internal/record"
)

// open lists what nodes that do not store may ask for, by role. Nodes that store
// may ask for everything: they are trusted with all there is.
var open = map[identity.Role][]string{
	identity.RoleWitness: {methodSelf, methodMembers, methodMoved, methodRenew, methodClock, methodForward, methodPropose, castRaft, streamSnap, member.Service},
	identity.RoleClient:  {methodSelf, methodMembers, methodMoved, methodRenew, methodForward, methodRead, methodLogin, methodRelogin},
}

// toStrangers lists what a node may ask for of which nothing is known here yet: see
// strangers.go.
var toStrangers = []string{methodSelf, methodRenew}

func permit(role identity.Role, what string) bool {
	return role == identity.RoleStore || slices.Contains(open[role], what)
}

// permitted is the endpoint's question; what is refused goes into the audit.
func (n *Node) permitted(p identity.Peer, what string) error {
	if !n.isKnown(p.Node) {
		if slices.Contains(toStrangers, what) {
			return nil
		}
		n.strangers.meet(p.Node)
		return errs.E(errs.Unavailable, "", "", "%v is not known here yet", p.Node)
	}
	if permit(p.Role, what) {
		return nil
	}
	no := errs.E(errs.Unauthorized, "", "", "%v is a %s node, which may not ask for it", p.Node, p.Role)
	if n.disk.Role == record.RoleStore && n.record != nil {
		go n.refused(context.Background(), principal.Of(p.Node), "ask for "+what, p.Node, no)
	}
	return no
}

// believe checks who asks, as the node from says it, and proves it if it has to.
// It reports whether that node stores.
func (n *Node) believe(ctx context.Context, from ids.Node, who principal.Principal, proof []byte, what string) (stores bool, err error) {
	m, err := n.record.view().Member(from)
	if errs.Has(err, errs.NotFound) { // this replica may be behind
		return false, errs.E(errs.Unavailable, what, from.String(), "it is not known here yet")
	}
	if err != nil {
		return false, err
	}
	if !m.State.Belongs() {
		return false, n.refused(ctx, who, what, from, errs.E(errs.Unauthorized, what, from.String(), "it is no member any more"))
	}
	stores = m.Role == record.RoleStore
	if err := principal.Believe(from, stores, who, proof, n.holder.Trust(), n.cfg.Clock.Wall()); err != nil {
		return stores, n.refused(ctx, who, what, from, err)
	}
	return stores, nil
}

// caller is the principal for which this node vouches when a local process asks.
// Whoever runs the daemon is its root.
func (n *Node) caller(c control.Cred) principal.Principal {
	return principal.Principal{Node: n.id, UID: n.localUID(c)}
}

// speaker returns as whom a local process speaks to the cluster, and what proves
// it: on a node that stores the node's word, on a client node a credential.
func (n *Node) speaker(c control.Cred) (principal.Principal, principal.Proof, error) {
	switch n.disk.Role {
	case record.RoleStore:
		return n.caller(c), nil, nil
	case record.RoleClient:
		if l := n.logins.of(n.localUID(c)); l != nil {
			return l.cred.Principal(), l.proof, nil
		}
		return principal.Principal{}, nil, errs.E(errs.Unauthorized, "speak to the cluster", "", "nobody has logged in as uid %d on this client node", c.UID).
			WithRemedy("unum login")
	}
	return principal.Principal{}, nil, errs.E(errs.Unauthorized, "speak to the cluster", "", "this node is a witness and has no users").
		WithRemedy("ask on a node that stores")
}
