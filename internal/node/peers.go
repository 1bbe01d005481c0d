package node

import (
	"context"
	"errors"
	"slices"
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
	Members []record.Member `cbor:"1,keyasint"`
	Alive   []ids.Node      `cbor:"2,keyasint"` // as the node that answers believes
}

// servePeers registers what every node answers.
func (n *Node) servePeers() {
	n.ep.Handle(methodSelf, func(context.Context, ids.Node, []byte, []byte) (any, []byte, error) { return n.self(), nil, nil })
	n.ep.Handle(methodEntrust, n.serveEntrust)
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
		ms, err := n.record.view().Members()
		var alive []ids.Node
		for _, m := range ms {
			if m.State.Belongs() && n.alive(m.ID) {
				alive = append(alive, m.ID)
			}
		}
		return memberList{ms, alive}, nil, err
	})
}

const (
	// followEvery is how often a node without the record asks for the members, and
	// followAgain how soon it asks again when nobody has answered.
	followEvery = 5 * time.Second
	followAgain = 500 * time.Millisecond
)

// follow keeps the members known on a node that has no replica of the record.
func (n *Node) follow(ctx context.Context) error {
	for ctx.Err() == nil {
		wait := followEvery
		if err := n.askMembers(ctx); err != nil {
			n.cfg.Log.Debug("members not known anew", "err", err)
			wait = followAgain
		} else if (*n.known.Load())[n.id].State != record.Active { // soon it is
			wait = followAgain
		}
		pause(ctx, wait)
	}
	return nil
}

func (n *Node) askMembers(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	err := error(errs.E(errs.Unavailable, "ask for the members", "", "no storing node is known"))
	for _, p := range n.askFirst() {
		var r memberList
		if _, err = n.ep.Call(ctx, p, methodMembers, nil, nil, &r); err != nil {
			continue
		}
		n.heard.Store(&r.Alive)
		n.setMembers(r.Members)
		return n.notePeers(r.Members)
	}
	return err
}

// notePeers keeps the addresses of the storing nodes for the next start.
func (n *Node) notePeers(ms []record.Member) error {
	peers := map[string]string{}
	for _, m := range ms {
		if m.State.Belongs() && m.Role == record.RoleStore {
			peers[m.ID.String()] = m.Addr
		}
	}
	same := len(peers) == len(n.disk.Peers)
	for k, v := range peers {
		same = same && n.disk.Peers[k] == v
	}
	if same || len(peers) == 0 {
		return nil
	}
	n.disk.Peers = peers
	return n.cfg.saveFile(n.disk)
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
	var failed error
	for _, m := range n.current() {
		if m.Role == record.RoleClient {
			continue
		}
		cctx, cancel := context.WithTimeout(ctx, 2*time.Second)
		var s Self
		_, err := n.ep.Call(cctx, m.ID, methodSelf, nil, nil, &s)
		cancel()
		if err != nil {
			failed = errors.Join(failed, err)
			continue
		}
		selves[m.ID] = s
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
