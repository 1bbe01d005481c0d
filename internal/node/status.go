package node

import (
	"context"
	"os"
	"sync"
	"time"

	"github.com/unum-os/unum/internal/clock"
	"github.com/unum-os/unum/internal/control"
	"github.com/unum-os/unum/internal/errs"
	"github.com/unum-os/unum/internal/health"
	"github.com/unum-os/unum/internal/identity"
	"github.com/unum-os/unum/internal/ids"
	"github.com/unum-os/unum/internal/principal"
	"github.com/unum-os/unum/internal/quorum"
	"github.com/unum-os/unum/internal/record"
	"github.com/unum-os/unum/internal/wire"
)

// Verbs of the control socket.
const (
	VerbStatus  = "status"  // -> Status
	VerbToken   = "token"   // TokenRequest -> TokenReply; root only
	VerbHealthy = "healthy" // -> nothing, or an error that says what is not

	VerbSettings = "settings" // -> []config.Value of package config, what the daemon was started with
)

// GroupStatus is one replicated group as one node sees it.
type GroupStatus struct {
	Group   ids.Group  `cbor:"1,keyasint" json:"group"`
	Role    string     `cbor:"2,keyasint" json:"role"`
	Leader  ids.Node   `cbor:"3,keyasint" json:"leader"`
	Term    uint64     `cbor:"4,keyasint" json:"term"`
	Applied uint64     `cbor:"5,keyasint" json:"applied"`
	Voters  []ids.Node `cbor:"6,keyasint" json:"voters"`

	Learners []ids.Node `cbor:"7,keyasint,omitempty" json:"learners,omitempty"`
	Joint    bool       `cbor:"8,keyasint,omitempty" json:"joint,omitempty"` // a change of the voters is under way
}

// Self is what a node says of itself.
type Self struct {
	Node     ids.Node      `cbor:"1,keyasint" json:"node"`
	Mounted  bool          `cbor:"2,keyasint" json:"mounted"`
	Session  bool          `cbor:"3,keyasint" json:"session"`
	Groups   []GroupStatus `cbor:"4,keyasint" json:"groups"`
	Missing  int           `cbor:"5,keyasint" json:"missing_blocks"`
	Free     int64         `cbor:"6,keyasint" json:"free_bytes"`
	Jobs     int           `cbor:"7,keyasint" json:"jobs"`
	UptimeNs int64         `cbor:"8,keyasint" json:"uptime_ns"`
	Whole    bool          `cbor:"9,keyasint,omitempty" json:"whole"` // it has every block that is due
	WallNs   int64         `cbor:"10,keyasint" json:"wall_ns"`        // its clock when it answered, since 1970
}

// Peer is a member as the asked node sees it. Self is nil if it does not answer.
type Peer struct {
	Member record.Member `cbor:"1,keyasint"`
	Alive  bool          `cbor:"2,keyasint"`
	Self   *Self         `cbor:"3,keyasint,omitempty"`
	Load   float64       `cbor:"4,keyasint"` // runnable jobs for each CPU
	CPUs   float64       `cbor:"5,keyasint"`
}

// Status is the cluster as this node sees it.
type Status struct {
	Node    ids.Node `cbor:"1,keyasint"`
	Cluster string   `cbor:"2,keyasint"`
	Mount   string   `cbor:"3,keyasint"`
	Addr    string   `cbor:"4,keyasint"`
	Peers   []Peer   `cbor:"5,keyasint"`
	Problem string   `cbor:"6,keyasint,omitempty"` // what is missing, and what to do

	Conditions []health.Condition `cbor:"7,keyasint,omitempty"` // all, the most severe first
}

// TokenRequest asks for a join token.
type TokenRequest struct {
	Uses     uint32 `cbor:"1,keyasint"`
	Lifetime int64  `cbor:"2,keyasint"` // nanoseconds

	Role record.Role `cbor:"3,keyasint,omitempty"` // what they may become; 0: anything
}

// TokenReply gives it, and the address to join at.
type TokenReply struct {
	Token string `cbor:"1,keyasint"`
	Addr  string `cbor:"2,keyasint"`
}

// caller is the principal for which this node vouches when a local process asks.
// Whoever runs the daemon is its root.
func (n *Node) caller(c control.Cred) principal.Principal {
	if int(c.UID) == os.Geteuid() {
		c.UID = 0
	}
	return principal.Principal{Node: n.id, UID: c.UID}
}

// asker returns who asks for an administrator's verb; nobody is not taken for the
// node itself.
func asker(ctx context.Context) (principal.Principal, error) {
	who := principal.FromContext(ctx)
	if !who.Valid() {
		return who, errs.E(errs.Unauthorized, "", "", "the request does not say who asks")
	}
	return who, nil
}

// answer registers a verb whose whole answer is one message. Its context says
// who asks.
func answer[Q any](n *Node, verb string, admin bool, f func(ctx context.Context, q *Q) (any, error)) {
	reg := n.ctl.Handle
	if admin {
		reg = n.ctl.HandleAdmin
	}
	reg(verb, func(ctx context.Context, c *control.Conn, req []byte) error {
		var q Q
		if len(req) > 0 {
			if err := wire.Unmarshal(req, &q); err != nil {
				return err
			}
		}
		r, err := f(principal.NewContext(ctx, n.caller(c.Peer)), &q)
		if err != nil {
			return err
		}
		b, err := wire.Marshal(r)
		if err != nil {
			return err
		}
		return c.Send(b)
	})
}

func (n *Node) serveControl() {
	n.ctl.HandleImage()
	answer(n, VerbStatus, false, func(ctx context.Context, _ *struct{}) (any, error) { return n.status(ctx), nil })
	answer(n, VerbHealthy, false, func(ctx context.Context, _ *struct{}) (any, error) { return struct{}{}, n.healthy() })
	answer(n, VerbSettings, false, func(context.Context, *struct{}) (any, error) { return n.cfg.Settings, nil })
	answer(n, VerbToken, true, func(ctx context.Context, q *TokenRequest) (any, error) { return n.token(ctx, q) })
}

// self describes this node.
func (n *Node) self() Self {
	s := Self{Node: n.id, Mounted: n.mounted.Load(), UptimeNs: int64(time.Since(n.began)), WallNs: n.cfg.Clock.Wall().UnixNano()}
	if n.disk.Role == record.RoleStore {
		s.Session, s.Missing, s.Whole, s.Jobs = n.venus.Ready(), n.blocks.Missing(), n.blocks.Whole(), len(n.manager.Jobs())
		s.Free, _ = n.segs.Free()
	}
	for _, g := range n.groups() {
		st := g.Status()
		s.Groups = append(s.Groups, GroupStatus{Group: g.ID(), Role: st.Role.String(), Leader: st.Leader, Term: st.Term, Applied: st.Applied,
			Voters: st.Voters, Learners: st.Learners, Joint: st.Joint})
	}
	return s
}

// status asks all members for a moment.
func (n *Node) status(ctx context.Context) Status {
	st := Status{Node: n.id, Cluster: n.disk.Cluster, Mount: n.cfg.Mount, Addr: n.disk.Addr}
	ms := n.current()
	st.Peers = make([]Peer, len(ms))
	loads := n.loads.Snapshot(clock.Now())
	ctx, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	var wg sync.WaitGroup
	for i, m := range ms {
		p := &st.Peers[i]
		p.Member, p.Alive = m, n.alive(m.ID)
		for _, l := range loads {
			if l.Node == m.ID {
				p.Load, p.CPUs = l.PerCPU(), l.CPUs
			}
		}
		if !p.Alive {
			continue
		}
		wg.Go(func() {
			var s Self
			if _, err := n.ep.Call(ctx, m.ID, methodSelf, struct{}{}, nil, &s); err == nil {
				p.Self = &s
			}
		})
	}
	wg.Wait()
	st.Conditions = n.conditions()
	if err := problem(n.id, st.Conditions); err != nil {
		st.Problem = err.Error()
	}
	return st
}

// seats returns how many votes the groups should have.
func (n *Node) seats() int {
	storing, witness := 0, false
	for _, m := range n.current() {
		storing += map[bool]int{true: 1}[m.Role == record.RoleStore && m.State != record.Leaving]
		witness = witness || m.Role == record.RoleWitness
	}
	return quorum.Seats(storing, witness)
}

// token makes a join token and puts its hash into the record.
func (n *Node) token(ctx context.Context, q *TokenRequest) (TokenReply, error) {
	if q.Uses == 0 {
		q.Uses = 1
	}
	if q.Lifetime <= 0 {
		q.Lifetime = int64(24 * time.Hour)
	}
	if q.Role == 0 {
		q.Role = record.RoleStore
	}
	who, err := asker(ctx)
	if err != nil {
		return TokenReply{}, err
	}
	t, err := identity.NewToken(n.holder.Trust().Fingerprint())
	if err != nil {
		return TokenReply{}, err
	}
	_, err = n.record.do(ctx, record.Command{Who: who, AddToken: &record.Token{ID: t.ID(), Uses: q.Uses, Expires: n.cfg.Clock.Wall().UnixNano() + q.Lifetime, Role: q.Role}})
	return TokenReply{Token: t.String(), Addr: n.disk.Addr}, err
}
