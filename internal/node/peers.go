package node

import (
	"context"
	"errors"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/unum-os/unum/internal/errs"
	"github.com/unum-os/unum/internal/group"
	"github.com/unum-os/unum/internal/ids"
	"github.com/unum-os/unum/internal/record"
	"github.com/unum-os/unum/internal/wire"
)

// What nodes ask of each other, beside what the parts have registered.
const (
	methodSelf    = "node.self"    // nothing -> Self
	methodMembers = "node.members" // nothing -> memberList; a node that stores answers
	methodJoin    = "node.join"    // a join request on its way to a voter -> joinReply
)

type memberList struct {
	Members  []record.Member `cbor:"1,keyasint"`
	Alive    []ids.Node      `cbor:"2,keyasint"` // as the node that answers believes
	Revision uint64          `cbor:"3,keyasint"` // of the record of which this is true
}

// servePeers registers what every node answers.
func (n *Node) servePeers() {
	n.ep.Handle(methodSelf, func(context.Context, ids.Node, []byte, []byte) (any, []byte, error) { return n.self(), nil, nil })
	n.ep.Handle(methodEntrust, n.serveEntrust)
	n.ep.Handle(methodMoved, n.serveMoved)
	n.ep.Handle(methodClock, func(context.Context, ids.Node, []byte, []byte) (any, []byte, error) {
		return clockReply{n.cfg.Clock.Wall().UnixNano()}, nil, nil
	})
	if n.disk.Role != record.RoleStore {
		return
	}
	n.ep.HandleJoin(n.serveDoor)
	n.ep.Handle(methodRenew, n.serveRenew)
	n.ep.Handle(methodRead, n.serveRead)
	n.ep.Handle(methodLogin, n.serveLogin)
	n.ep.Handle(methodRelogin, n.serveRelogin)
	n.ep.Handle(methodAuthority, n.serveAuthority)
	n.ep.Handle(methodJoin, func(ctx context.Context, _ ids.Node, req, _ []byte) (any, []byte, error) {
		var q joinRequest
		if err := wire.Unmarshal(req, &q); err != nil {
			return nil, nil, err
		}
		r, err := n.join(ctx, &q)
		return r, nil, err
	})
	n.ep.Handle(methodMembers, func(context.Context, ids.Node, []byte, []byte) (any, []byte, error) {
		l, err := n.memberList()
		for _, m := range l.Members {
			if m.State.Belongs() && n.alive(m.ID) {
				l.Alive = append(l.Alive, m.ID)
			}
		}
		return l, nil, err
	})
}

const (
	// followEvery is how often a node without the record asks for the members, and
	// followAgain how soon it asks again when nobody has answered.
	followEvery = 5 * time.Second
	followAgain = 500 * time.Millisecond
	// followLimit bounds one such question to all that are asked.
	followLimit = 5 * time.Second
	// selfLimit bounds the question to one node how it is.
	selfLimit = 2 * time.Second
	// membersAsked is how many nodes are asked at a time, in turn: one may be cut
	// off, and what it says be old.
	membersAsked = 3
)

// follow keeps the members known on a node that has no replica of the record.
func (n *Node) follow(ctx context.Context) error {
	for ctx.Err() == nil {
		wait := followEvery
		if err := n.askMembers(ctx); errs.Has(err, errs.Stale) {
			n.cfg.Log.Warn("the members are not known anew", "err", err)
		} else if err != nil {
			n.cfg.Log.Debug("the members are not known anew", "err", err)
			wait = followAgain
		} else if (*n.known.Load())[n.id].State != record.Active { // soon it is
			wait = followAgain
		}
		pause(ctx, wait)
	}
	return nil
}

// askMembers asks some of the nodes that store for the members: all of them after
// the start, when one that was put out meanwhile may be among them. Of what they
// say the newest counts, and of two equally new, who believes more to be alive.
// Class Stale: all of it is older than what is known.
func (n *Node) askMembers(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, followLimit)
	defer cancel()
	ask := slices.DeleteFunc(n.askFirst(), func(p ids.Node) bool { return p == n.id })
	if many := len(ask); many > membersAsked && len(*n.known.Load()) > 0 {
		first := int(n.asked.Add(1)) % many
		ask = append(ask[first:], ask[:first]...)[:membersAsked]
	}
	type answer struct {
		from ids.Node
		list memberList
		err  error
	}
	answers := make(chan answer, len(ask))
	for _, p := range ask {
		go func() {
			a := answer{from: p}
			_, a.err = n.ep.Call(ctx, p, methodMembers, nil, nil, &a.list)
			answers <- a
		}()
	}
	failed := error(errs.E(errs.Unavailable, "ask for the members", "", "no storing node is known"))
	var best memberList
	taken := false
	for range ask {
		a := <-answers
		if a.err == nil && taken && (a.list.Revision < best.Revision || a.list.Revision == best.Revision && len(a.list.Alive) <= len(best.Alive)) {
			continue
		}
		if a.err == nil {
			a.err = n.takeList(a.from, &a.list)
		}
		switch {
		case a.err == nil:
			best, taken = a.list, true
		case !errs.Has(failed, errs.Stale):
			failed = a.err
		}
	}
	if taken {
		return nil
	}
	return failed
}

// takeList makes what a node said of the members what is known here.
func (n *Node) takeList(from ids.Node, l *memberList) error {
	if m, ok := n.believed(from); !ok || !m.State.Belongs() || m.Role != record.RoleStore { // as the list in hand has it by now
		return errs.E(errs.Unauthorized, "take the list of members", from.String(), "it is no storing member")
	}
	if !n.setMembers(*l) {
		return errs.E(errs.Stale, "take the list of members", from.String(), "it is as of revision %d of the record, this node knows a later one", l.Revision).
			WithRemedy("if the cluster was brought back from a copy: remove this node, and join again")
	}
	n.heard.Store(&l.Alive)
	return n.notePeers(l)
}

// notePeers keeps the addresses of the storing nodes for the next start of a node
// that has no record.
func (n *Node) notePeers(l *memberList) error {
	peers := map[string]string{}
	for _, m := range l.Members {
		if m.State.Belongs() && m.Role == record.RoleStore {
			peers[m.ID.String()] = m.Addr
		}
	}
	was := n.disk.snapshot()
	if n.disk.Role == record.RoleStore || len(peers) == 0 || was.Revision != 0 && maps.Equal(peers, was.Peers) {
		return nil
	}
	return n.disk.change(&n.cfg, func(d *nodeFile) { d.Peers, d.Revision = peers, l.Revision })
}

// placed reports whether a member has its place in the record's group.
func (n *Node) placed(p ids.Node) bool {
	st := n.rec.Status()
	return slices.Contains(st.Voters, p) || slices.Contains(st.Learners, p)
}

// configs asks the nodes that store how the groups stand, and returns what the
// leader of each says; class Unavailable if one has none that answers.
func (n *Node) configs(ctx context.Context) (map[ids.Group]GroupStatus, map[ids.Node]Self, error) {
	selves := map[ids.Node]Self{}
	leaders := map[ids.Group]GroupStatus{}
	ctx, cancel := context.WithTimeout(ctx, selfLimit)
	defer cancel()
	var failed error
	var mu sync.Mutex // over failed and selves
	var asked sync.WaitGroup
	for _, m := range n.current() {
		if m.Role == record.RoleClient {
			continue
		}
		asked.Go(func() {
			var s Self
			_, err := n.ep.Call(ctx, m.ID, methodSelf, nil, nil, &s)
			mu.Lock()
			defer mu.Unlock()
			if failed = errors.Join(failed, err); err == nil {
				selves[m.ID] = s
			}
		})
	}
	asked.Wait()
	for _, s := range selves {
		for _, g := range s.Groups {
			if g.Role == group.Leader.String() && g.Term >= leaders[g.Group].Term {
				leaders[g.Group] = g
			}
		}
	}
	for _, g := range []ids.Group{ids.RecordGroup, ids.RootGroup} {
		if _, ok := leaders[g]; !ok {
			return nil, nil, errors.Join(errs.E(errs.Unavailable, "ask how the groups stand", "", "no leader of group %d answers", g), failed)
		}
	}
	return leaders, selves, nil
}
