package node

import (
	"context"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/unum-os/unum/internal/control/api"
	"github.com/unum-os/unum/internal/errs"
	"github.com/unum-os/unum/internal/ids"
	"github.com/unum-os/unum/internal/principal"
	"github.com/unum-os/unum/internal/record"
)

// recordAPI is the service Record of the control API.
type recordAPI struct {
	api.UnimplementedRecordServer
	n *Node
}

// ask reads the record for a local process.
func (n *Node) ask(ctx context.Context, q readRequest) (*readReply, error) {
	who, proof, err := n.speaker(api.Peer(ctx))
	if err != nil {
		return nil, err
	}
	q.Who = who
	return n.read(ctx, q, proof)
}

// tell has a command done for a local process.
func (n *Node) tell(ctx context.Context, c record.Command) (*record.Result, error) {
	who, proof, err := n.speaker(api.Peer(ctx))
	if err != nil {
		return nil, err
	}
	c.Who = who
	return n.record.doAs(ctx, c, proof)
}

func keyAPI(k *readKey) *api.Key {
	return &api.Key{Key: api.Text(k.Name), Value: k.Key.Value, Create: k.Key.Create, Mod: k.Key.Mod, Version: k.Key.Version, Owner: k.Key.Owner}
}

func (a *recordAPI) Get(ctx context.Context, req *api.GetRequest) (*api.GetResponse, error) {
	if req.Key == "" {
		return nil, errs.E(errs.Invalid, "get", "", "which key?")
	}
	r, err := a.n.ask(ctx, readRequest{Get: req.Key, Stale: req.Stale})
	if err != nil {
		return nil, err
	}
	return &api.GetResponse{Key: keyAPI(&r.Keys[0]), Revision: r.Revision}, nil
}

func (a *recordAPI) Put(ctx context.Context, req *api.PutRequest) (*api.PutResponse, error) {
	res, err := a.n.tell(ctx, record.Command{Put: &record.Put{Key: req.Key, Value: req.Value, Expect: req.Expect}})
	if err != nil {
		return nil, err
	}
	return &api.PutResponse{Mod: res.Mod}, nil
}

func (a *recordAPI) Delete(ctx context.Context, req *api.DeleteRequest) (*api.DeleteResponse, error) {
	res, err := a.n.tell(ctx, record.Command{Delete: &record.Delete{Key: req.Key, Expect: req.Expect}})
	if err != nil {
		return nil, err
	}
	return &api.DeleteResponse{Revision: res.Revision}, nil
}

func (a *recordAPI) List(ctx context.Context, req *api.ListRequest) (*api.ListResponse, error) {
	r, err := a.n.ask(ctx, readRequest{List: &listQuery{Prefix: req.Prefix, After: req.After, Limit: int(min(req.Limit, maxListed))}, Stale: req.Stale})
	if err != nil {
		return nil, err
	}
	out := &api.ListResponse{More: r.More, Revision: r.Revision}
	for i := range r.Keys {
		out.Keys = append(out.Keys, keyAPI(&r.Keys[i]))
	}
	return out, nil
}

func (a *recordAPI) Watch(req *api.WatchRequest, s grpc.ServerStreamingServer[api.WatchResponse]) error {
	for _, k := range req.Kinds {
		switch k {
		case "member", "token", "key", "user", "job":
		default:
			return errs.E(errs.Invalid, "watch", k, "the kinds are member, token, key, user, job")
		}
	}
	ctx, at := s.Context(), req.After
	for ctx.Err() == nil {
		cctx, cancel := context.WithTimeout(ctx, 2*maxWait)
		r, err := a.n.ask(cctx, readRequest{Changes: &pageQuery{After: at}})
		cancel()
		if c := errs.ClassOf(err); err != nil && (c == errs.Unavailable || c == errs.Timeout) {
			pause(ctx, followAgain) // the stream goes on where it was
			continue
		}
		if err != nil {
			return err
		}
		for i := 0; i < len(r.Events); { // a message for each revision
			m := &api.WatchResponse{Revision: r.Events[i].Revision}
			for ; i < len(r.Events) && r.Events[i].Revision == m.Revision; i++ {
				if e := r.Events[i]; wanted(req, e) {
					m.Events = append(m.Events, &api.Event{Kind: e.Kind.String(), Subject: api.Text(e.Key), Removed: e.Gone})
				}
			}
			if len(m.Events) == 0 {
				continue
			}
			if err := s.Send(m); err != nil {
				return err
			}
		}
		if err := s.Send(&api.WatchResponse{Revision: r.Revision}); err != nil { // so that it can be resumed from there
			return err
		}
		at = r.Revision
	}
	return ctx.Err()
}

// wanted reports whether a watcher asked for an event.
func wanted(req *api.WatchRequest, e record.Event) bool {
	kind := len(req.Kinds) == 0
	for _, k := range req.Kinds {
		kind = kind || k == e.Kind.String()
	}
	if req.Prefix == "" {
		return kind
	}
	return kind && e.Kind == record.KindKey && len(e.Key) >= len(req.Prefix) && e.Key[:len(req.Prefix)] == req.Prefix
}

func (a *recordAPI) Audit(ctx context.Context, req *api.AuditRequest) (*api.AuditResponse, error) {
	r, err := a.n.ask(ctx, readRequest{Audit: &pageQuery{After: req.After, Limit: int(min(req.Limit, maxEvents)), Newest: req.Newest}})
	if err != nil {
		return nil, err
	}
	out := &api.AuditResponse{}
	for _, e := range r.Audit {
		x := &api.AuditEntry{Seq: e.Seq, Time: timestamppb.New(time.Unix(0, e.Time)), Who: api.Text(e.Who.String()), What: api.Text(e.What),
			Subject: api.Text(e.On), Times: e.Count, Door: uint64(e.Door)}
		if e.Err != 0 {
			x.Outcome = api.Text(errs.Class(e.Err).String() + ": " + e.Why)
		}
		out.Entries = append(out.Entries, x)
	}
	return out, nil
}

// usersAPI is the service Users of the control API.
type usersAPI struct {
	api.UnimplementedUsersServer
	n *Node
}

func userAPI(u *record.User) *api.User {
	return &api.User{Name: api.Text(u.Name), Uid: u.UID, Gid: u.GID, Groups: u.Groups, Admin: u.Admin, Disabled: u.Disabled}
}

func (a *usersAPI) List(ctx context.Context, _ *api.ListUsersRequest) (*api.ListUsersResponse, error) {
	r, err := a.n.ask(ctx, readRequest{Users: true})
	if err != nil {
		return nil, err
	}
	out := &api.ListUsersResponse{}
	for i := range r.Users {
		out.Users = append(out.Users, userAPI(&r.Users[i]))
	}
	return out, nil
}

func (a *usersAPI) Put(ctx context.Context, req *api.PutUserRequest) (*api.PutUserResponse, error) {
	u := req.User
	if u == nil {
		return nil, errs.E(errs.Invalid, "put user", "", "which user?")
	}
	_, err := a.n.tell(ctx, record.Command{PutUser: &record.User{Name: u.Name, UID: u.Uid, GID: u.Gid, Groups: u.Groups, Admin: u.Admin, Disabled: u.Disabled}})
	return &api.PutUserResponse{}, err
}

func (a *usersAPI) Drop(ctx context.Context, req *api.DropUserRequest) (*api.DropUserResponse, error) {
	if req.Name == "" {
		return nil, errs.E(errs.Invalid, "drop user", "", "which user?")
	}
	_, err := a.n.tell(ctx, record.Command{DropUser: req.Name})
	return &api.DropUserResponse{}, err
}

const (
	// InviteLife is how long a login token is good if nobody says, maxInviteLife
	// how long it may be: who has it speaks for its user.
	InviteLife    = time.Hour
	maxInviteLife = 30 * 24 * time.Hour
)

func (a *usersAPI) Invite(ctx context.Context, req *api.InviteRequest) (*api.InviteResponse, error) {
	life := req.Lifetime.AsDuration()
	if life <= 0 {
		life = InviteLife
	}
	if life > maxInviteLife {
		return nil, errs.E(errs.Invalid, "invite", req.User, "for %v, limit %v", life, maxInviteLife)
	}
	v := principal.NewInvite()
	_, err := a.n.tell(ctx, record.Command{AddLogin: &record.LoginToken{ID: v.ID(), User: req.User, Expires: a.n.cfg.Clock.Wall().Add(life).UnixNano()}})
	if err != nil {
		return nil, err
	}
	return &api.InviteResponse{Token: v.Text()}, nil
}

func (a *usersAPI) Login(ctx context.Context, req *api.LoginRequest) (*api.LoginResponse, error) {
	l, err := a.n.login(ctx, a.n.localUID(api.Peer(ctx)), req.Token)
	if err != nil {
		return nil, err
	}
	c := l.cred
	return &api.LoginResponse{User: &api.User{Name: api.Text(c.User), Uid: c.UID, Gid: c.GID, Groups: c.Groups}, Renewable: timestamppb.New(time.Unix(0, c.Renewable))}, nil
}

func (a *usersAPI) Logout(ctx context.Context, _ *api.LogoutRequest) (*api.LogoutResponse, error) {
	return &api.LogoutResponse{}, a.n.logout(a.n.localUID(api.Peer(ctx)))
}

func (a *usersAPI) Whoami(ctx context.Context, _ *api.WhoamiRequest) (*api.WhoamiResponse, error) {
	who, proof, err := a.n.speaker(api.Peer(ctx))
	if err != nil {
		return nil, err
	}
	out := &api.WhoamiResponse{Principal: api.Text(who.String()), Vouched: proof == nil}
	if l := a.n.logins.of(a.n.localUID(api.Peer(ctx))); l != nil {
		out.User = &api.User{Name: api.Text(l.cred.User), Uid: l.cred.UID, Gid: l.cred.GID, Groups: l.cred.Groups}
		out.Expires = timestamppb.New(time.Unix(0, l.cred.Expires))
		return out, nil
	}
	r, err := a.n.read(ctx, readRequest{Who: who, Users: true, Stale: true}, proof)
	if err != nil {
		return nil, err
	}
	for i := range r.Users {
		if r.Users[i].UID == who.UID {
			out.User = userAPI(&r.Users[i])
		}
	}
	return out, nil
}

func (a *nodeAPI) Leave(_ *api.LeaveRequest, s grpc.ServerStreamingServer[api.LeaveResponse]) error {
	var failed error
	err := a.n.Leave(s.Context(), func(text string) {
		if err := s.Send(&api.LeaveResponse{Text: api.Text(text)}); err != nil && failed == nil {
			failed = err
		}
	})
	if err != nil {
		return err
	}
	return failed
}

func (a *nodeAPI) Remove(ctx context.Context, req *api.RemoveRequest) (*api.RemoveResponse, error) {
	return &api.RemoveResponse{}, a.n.Remove(ctx, ids.Node(req.Node), req.Force)
}

func (a *nodeAPI) Digest(_ context.Context, req *api.DigestRequest) (*api.DigestResponse, error) {
	for _, g := range a.n.groups() {
		if uint64(g.ID()) == req.Group {
			i, sum, err := g.Digest()
			return &api.DigestResponse{Index: i, Sum: sum[:]}, err
		}
	}
	return nil, errs.E(errs.NotFound, "digest", "", "this node has no replica of group %d", req.Group)
}
