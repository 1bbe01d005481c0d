package node

import (
	"context"
	"runtime"
	"sync"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/unum-os/unum/internal/clock"
	"github.com/unum-os/unum/internal/control/api"
	"github.com/unum-os/unum/internal/errs"
	"github.com/unum-os/unum/internal/identity"
	"github.com/unum-os/unum/internal/ids"
	"github.com/unum-os/unum/internal/quorum"
	"github.com/unum-os/unum/internal/record"
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
	Whole    bool          `cbor:"9,keyasint,omitempty" json:"whole"`  // it has every block that is due
	WallNs   int64         `cbor:"10,keyasint" json:"wall_ns"`         // its clock when it answered, since 1970
	Signs    bool          `cbor:"11,keyasint,omitempty" json:"signs"` // it holds the authority's key, whole
}

// nodeAPI is the service Node of the control API.
type nodeAPI struct {
	api.UnimplementedNodeServer
	n *Node
}

func (a *nodeAPI) Status(ctx context.Context, _ *api.StatusRequest) (*api.StatusResponse, error) {
	return a.n.status(ctx), nil
}

func (a *nodeAPI) Healthy(context.Context, *api.HealthyRequest) (*api.HealthyResponse, error) {
	return &api.HealthyResponse{}, a.n.healthy()
}

func (a *nodeAPI) Token(ctx context.Context, req *api.TokenRequest) (*api.TokenResponse, error) {
	if _, ok := api.Role_name[int32(req.Role)]; !ok {
		return nil, errs.E(errs.Invalid, "", "", "role %d: there is no such role", req.Role)
	}
	t, err := a.n.token(ctx, req.Uses, req.Lifetime.AsDuration(), record.Role(req.Role))
	return &api.TokenResponse{Token: t, Addr: a.n.disk.Addr}, err
}

func (a *nodeAPI) Version(context.Context, *api.VersionRequest) (*api.VersionResponse, error) {
	return &api.VersionResponse{Major: api.Major, Minor: api.Minor, Build: api.Text(a.n.cfg.Build), Go: runtime.Version()}, nil
}

func (a *nodeAPI) Config(context.Context, *api.ConfigRequest) (*api.ConfigResponse, error) {
	r := &api.ConfigResponse{}
	for _, v := range a.n.cfg.Settings {
		r.Settings = append(r.Settings, &api.Setting{Name: v.Name, Value: api.Text(v.Value), Source: api.Text(v.Source)})
	}
	return r, nil
}

// self describes this node.
func (n *Node) self() Self {
	s := Self{Node: n.id, Mounted: n.mounted.Load(), UptimeNs: int64(time.Since(n.began)), WallNs: n.cfg.Clock.Wall().UnixNano()}
	for _, g := range n.groups() { // before Whole, which is then true of what is applied
		st := g.Status()
		s.Groups = append(s.Groups, GroupStatus{Group: g.ID(), Role: st.Role.String(), Leader: st.Leader, Term: st.Term, Applied: st.Applied,
			Voters: st.Voters, Learners: st.Learners, Joint: st.Joint})
	}
	if n.disk.Role == record.RoleStore {
		s.Session, s.Missing, s.Whole, s.Jobs = n.venus.Ready(), n.blocks.Missing(), n.blocks.Whole(), len(n.manager.Jobs())
		s.Free, _ = n.segs.Free()
		_, err := n.loadAuthority()
		s.Signs = err == nil
	}
	return s
}

// statusLimit bounds the asking of all members for one status, which a person
// waits for; of those that have not answered less is shown.
const statusLimit = time.Second

// status asks all members for a moment.
func (n *Node) status(ctx context.Context) *api.StatusResponse {
	st := &api.StatusResponse{Node: uint64(n.id), Cluster: api.Text(n.disk.Cluster), Mount: api.Text(n.cfg.Mount), Addr: api.Text(n.disk.Addr),
		Departing: n.departing.underway()}
	loads := n.loads.Snapshot(clock.Now())
	ctx, cancel := context.WithTimeout(ctx, statusLimit)
	defer cancel()
	var wg sync.WaitGroup
	for _, m := range n.current() {
		p := &api.Member{Id: uint64(m.ID), Hostname: api.Text(m.Hostname), Addr: api.Text(m.Addr), State: m.State.String(), Role: m.Role.String(),
			Alive: n.alive(m.ID)}
		st.Members = append(st.Members, p)
		for _, l := range loads {
			if l.Node == m.ID {
				p.LoadPerCpu, p.Cpus = l.PerCPU(), l.CPUs
			}
		}
		if !p.Alive {
			continue // says below for how long
		}
		wg.Go(func() {
			var s Self
			if _, err := n.ep.Call(ctx, m.ID, methodSelf, struct{}{}, nil, &s); err == nil {
				p.Self = s.api()
			}
		})
	}
	wg.Wait()
	for _, p := range st.Members { // asking may have shown that another answers in its place
		if p.Alive = p.Alive && n.alive(ids.Node(p.Id)); !p.Alive {
			ago, never := n.silence(ids.Node(p.Id))
			p.Silent, p.Unheard = durationpb.New(ago), never
		}
	}
	for _, c := range n.conditions() {
		st.Conditions = append(st.Conditions, &api.Condition{Code: string(c.Code), Severity: string(c.Severity), Subject: api.Text(c.Subject), Text: api.Text(c.Text), Remedy: api.Text(c.Remedy)})
	}
	if err := n.healthy(); err != nil {
		st.Problem = api.Text(err.Error())
	}
	return st
}

// api is what a node says of itself as the control API shows it.
func (s *Self) api() *api.Self {
	p := &api.Self{Mounted: s.Mounted, Session: s.Session, MissingBlocks: int64(s.Missing), FreeBytes: s.Free, Jobs: int64(s.Jobs),
		Whole: s.Whole, Uptime: durationpb.New(time.Duration(s.UptimeNs)), Clock: timestamppb.New(time.Unix(0, s.WallNs))}
	for _, g := range s.Groups {
		q := &api.Group{Id: uint64(g.Group), Role: api.Text(g.Role), Leader: uint64(g.Leader), Term: g.Term, Applied: g.Applied, Joint: g.Joint}
		for _, v := range g.Voters {
			q.Voters = append(q.Voters, uint64(v))
		}
		for _, l := range g.Learners {
			q.Learners = append(q.Learners, uint64(l))
		}
		p.Groups = append(p.Groups, q)
	}
	return p
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

const (
	// TokenLife is how long a join token is good if nobody says, maxTokenLife how
	// long it may be: who has it may become a node. Its uses have no bound.
	TokenLife    = 24 * time.Hour
	maxTokenLife = 366 * 24 * time.Hour
)

// token makes a join token and puts its hash into the record. No uses are one, no
// life is a day, no role is store.
func (n *Node) token(ctx context.Context, uses uint32, life time.Duration, role record.Role) (string, error) {
	if uses == 0 {
		uses = 1
	}
	if life <= 0 {
		life = TokenLife
	}
	if life > maxTokenLife {
		return "", errs.E(errs.Invalid, "make token", "", "for %v, limit %v", life, maxTokenLife).WithRemedy("unum token --expires 720h, or any time up to that")
	}
	if role == 0 {
		role = record.RoleStore
	}
	t, err := identity.NewToken(n.holder.Trust().Fingerprint())
	if err != nil {
		return "", err
	}
	_, err = n.tell(ctx, record.Command{AddToken: &record.Token{ID: t.ID(), Uses: uses, Expires: n.cfg.Clock.Wall().UnixNano() + int64(life), Role: role}})
	return t.String(), err
}
