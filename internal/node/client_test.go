package node

import (
	"context"
	"fmt"
	"os"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/unum-os/unum/internal/clock"
	"github.com/unum-os/unum/internal/errs"
	"github.com/unum-os/unum/internal/identity"
	"github.com/unum-os/unum/internal/ids"
	"github.com/unum-os/unum/internal/principal"
	"github.com/unum-os/unum/internal/record"
	"github.com/unum-os/unum/internal/wire"
)

// TestClientRoot is root of a client node with a client of its own making: it has
// the node's key and every credential that its users have there, and may no more
// than those users. What it tries stands in the audit.
func TestClientRoot(t *testing.T) {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	cfg := config(t)
	wall := &clock.Shifted{}
	cfg.Clock = wall
	if err := Found(cfg); err != nil {
		t.Fatal(err)
	}
	n1, _ := start(t, cfg)
	settled(t, n1, 1)
	c, _, _ := join(t, ctx, n1, record.RoleClient)
	other, _, _ := join(t, ctx, n1, record.RoleClient)
	settled(t, n1, 3)

	root := principal.Principal{Node: n1.id}
	must := func(cmd record.Command) {
		t.Helper()
		cmd.Who = root
		if _, err := n1.record.do(ctx, cmd); err != nil {
			t.Fatal(err)
		}
	}
	must(record.Command{PutUser: &record.User{Name: "ana", UID: 1001, GID: 1001}})
	must(record.Command{PutUser: &record.User{Name: "ben", UID: 1002, GID: 1002}})
	must(record.Command{Put: &record.Put{Key: "user/1002/secret", Value: []byte("ben's")}})
	invite := func(user string) string {
		v := principal.NewInvite()
		must(record.Command{AddLogin: &record.LoginToken{ID: v.ID(), User: user, Expires: n1.cfg.Clock.Wall().Add(time.Hour).UnixNano()}})
		return v.Text()
	}
	line := invite("ana")
	if _, err := c.login(ctx, 5000, line); err != nil {
		t.Fatal(err)
	}
	// Said again, for its answer may be lost, it counts; on another node it does not,
	// and who guesses writes nothing but what is told to the audit.
	if _, err := c.login(ctx, 5000, line); err != nil {
		t.Fatal(err)
	}
	if _, err := other.login(ctx, 5000, line); !errs.Has(err, errs.Unauthorized) {
		t.Fatalf("an invitation counts on two nodes: %v", err)
	}
	ana := c.logins.of(5000)
	who, proof := ana.cred.Principal(), ana.proof
	must(record.Command{PutUser: &record.User{Name: "ops", UID: 900, GID: 900, Admin: true}})
	if _, err := c.login(ctx, 5001, invite("ops")); err != nil {
		t.Fatal(err)
	}
	ops := c.logins.of(5001).cred.Principal()
	admin := func(cmd record.Command) func() error {
		return func() error {
			cmd.Who = ops
			_, err := c.record.doAs(ctx, cmd, c.logins.of(5001).proof)
			return err
		}
	}
	itself := func(cmd record.Command) func() error {
		return func() error {
			_, err := c.record.do(ctx, cmd)
			return err
		}
	}
	spare := principal.NewInvite()
	must(record.Command{AddLogin: &record.LoginToken{ID: spare.ID(), User: "ben", Expires: n1.cfg.Clock.Wall().Add(time.Hour).UnixNano()}})

	// What ana may.
	put := func(n *Node, who principal.Principal, proof principal.Proof, key string) error {
		_, err := n.record.doAs(ctx, record.Command{Who: who, Put: &record.Put{Key: key, Value: []byte("x")}}, proof)
		return err
	}
	get := func(n *Node, who principal.Principal, proof principal.Proof, key string) error {
		_, err := n.read(ctx, readRequest{Who: who, Get: key}, proof)
		return err
	}
	if err := put(c, who, proof, "user/1001/mine"); err != nil {
		t.Fatal(err)
	}
	if err := get(c, who, proof, "user/1001/mine"); err != nil {
		t.Fatal(err)
	}

	// Whoever is on this node knows himself, an administrator all.
	for n, w := range map[int]principal.Principal{1: who, 3: ops} {
		r, err := c.read(ctx, readRequest{Who: w, Users: true}, map[int]principal.Proof{1: proof, 3: c.logins.of(5001).proof}[n])
		if err != nil || len(r.Users) != n || n == 1 && r.Users[0].Name != "ana" {
			t.Errorf("%v knows the users %+v, %v", w, r, err)
		}
	}
	if err := admin(record.Command{Put: &record.Put{Key: "settings/motd", Value: []byte("x")}})(); err != nil {
		t.Error(err)
	}
	// Another node's client number is nothing here.
	stolen := record.Command{Client: n1.record.client, Seq: 1, Acked: 1, Who: principal.Of(c.id), UpdateMember: &record.UpdateMember{Node: c.id, Hostname: "c"}}
	for range 3 {
		var res record.Result
		if _, err := c.ep.Call(ctx, n1.id, methodForward, rawItem(wire.MustMarshal(stolen)), nil, &res); err != nil || res.Refusal.Err != 0 || res.Node != 0 {
			t.Errorf("%+v, %v", res, err)
		}
		stolen.Seq++
	}

	// What she and the node's root may not. Each is refused, and in the audit.
	ben := principal.Principal{Node: c.id, UID: 1002, User: "ben"}
	raw := func(method string, req any, data []byte) error {
		_, err := c.ep.Call(ctx, n1.id, method, req, data, nil)
		return err
	}
	forged := append(principal.Proof(nil), proof...)
	forged[len(forged)/2] ^= 1
	tries := []struct {
		name  string
		about principal.Principal // whom the audit names; zero: not checked
		do    func() error
	}{
		{"read another's key", who, func() error { return get(c, who, proof, "user/1002/secret") }},
		{"write another's key", who, func() error { return put(c, who, proof, "user/1002/secret") }},
		{"list another's keys", who, func() error {
			_, err := c.read(ctx, readRequest{Who: who, List: &listQuery{Prefix: "user/1002/"}}, proof)
			return err
		}},
		{"list all keys", who, func() error {
			_, err := c.read(ctx, readRequest{Who: who, List: &listQuery{Prefix: "user/"}}, proof)
			return err
		}},
		{"read the audit", who, func() error {
			_, err := c.read(ctx, readRequest{Who: who, Audit: &pageQuery{}}, proof)
			return err
		}},
		{"write a setting", who, func() error { return put(c, who, proof, "settings/x") }},
		{"speak as ben", ben, func() error { return put(c, ben, proof, "user/1002/secret") }},
		{"read as ben", ben, func() error { return get(c, ben, proof, "user/1002/secret") }},
		{"speak as ben without a proof", ben, func() error { return put(c, ben, nil, "user/1002/secret") }},
		{"speak as root here", principal.Principal{Node: c.id}, func() error { return put(c, principal.Principal{Node: c.id}, proof, "settings/x") }},
		{"speak as root of n1", root, func() error { return put(c, root, nil, "settings/x") }},
		{"speak as n1", principal.Of(n1.id), func() error { return get(c, principal.Of(n1.id), nil, "user/1002/secret") }},
		{"a changed proof", who, func() error { return put(c, who, forged, "user/1001/mine") }},
		{"ana's proof from another node", who, func() error { return put(other, who, proof, "user/1001/mine") }},
		{"an administrator's command", who, func() error {
			_, err := c.record.doAs(ctx, record.Command{Who: who, PutUser: &record.User{Name: "ana", UID: 1001, GID: 1001, Admin: true}}, proof)
			return err
		}},
		{"a token for a storing node", principal.Of(c.id), func() error {
			_, err := c.record.do(ctx, record.Command{AddToken: &record.Token{ID: record.TokenID{9}, Uses: 1, Role: record.RoleStore}})
			return err
		}},
		{"propose past the door", principal.Of(c.id), func() error {
			return raw(methodPropose, rawItem(wire.MustMarshal(record.Command{Client: 1, Seq: 1, Who: root, DropUser: "ben"})), nil)
		}},
		{"list the users", principal.Of(c.id), func() error {
			_, err := c.read(ctx, readRequest{Who: principal.Of(c.id), Users: true}, nil)
			return err
		}},
		{"spend ben's invitation past its door", principal.Of(c.id), itself(record.Command{Login: &record.Login{ID: spare.ID(), Node: c.id, Now: 1}})},
		{"take job ids", principal.Of(c.id), itself(record.Command{GrantJobs: 1})},
		{"write a job's record", principal.Of(c.id), itself(record.Command{PutJobs: []record.Job{{ID: 1, Home: c.id, State: record.JobRunning}}})},
		{"found another cluster in this one", principal.Of(c.id), itself(record.Command{Init: &record.Init{Name: "mine"}})},
		{"an administrator's token for a storing node", ops, admin(record.Command{AddToken: &record.Token{ID: record.TokenID{9}, Uses: 1, Role: record.RoleStore}})},
		{"an administrator's invitation for ben", ops, admin(record.Command{AddLogin: &record.LoginToken{ID: record.LoginID{9}, User: "ben", Expires: 1 << 62}})},
		{"an administrator's new user", ops, admin(record.Command{PutUser: &record.User{Name: "eve", UID: 9, Admin: true}})},
		{"an administrator puts n1 out", ops, admin(record.Command{UpdateMember: &record.UpdateMember{Node: n1.id, State: record.Removed}})},
		{"the authority's key", principal.Of(c.id), func() error { return raw(methodAuthority, nil, nil) }},
		{"a session with the files", principal.Of(c.id), func() error { return raw("vice.open", nil, nil) }},
		{"blocks", principal.Of(c.id), func() error { return raw("block.get", nil, nil) }},
	}
	refused := func(name string, about principal.Principal, do func() error) {
		t.Helper()
		before, err := n1.record.view().Audit(0, 1<<20)
		if err != nil {
			t.Fatal(err)
		}
		seen := map[uint64]uint64{}
		for _, e := range before {
			seen[e.Seq] = e.Count
		}
		if err := do(); !errs.Has(err, errs.Unauthorized) && !errs.Has(err, errs.Permission) {
			t.Errorf("%s: %v", name, err)
			return
		}
		await(t, name+" is in the audit", func() bool {
			after, err := n1.record.view().Audit(0, 1<<20)
			return err == nil && slices.ContainsFunc(after, func(e record.Audit) bool {
				return e.Err != 0 && e.Who == about && e.Count > seen[e.Seq]
			})
		})
	}
	for _, x := range tries {
		refused(x.name, x.about, x.do)
	}
	// To join as a storing node with a client's token.
	tok, err := n1.token(asRoot(ctx, n1), 1, 0, record.RoleClient)
	if err != nil {
		t.Fatal(err)
	}
	mine := config(t)
	mine.Role = record.RoleStore
	refused("join as a storing node", principal.Of(n1.id), func() error { return Join(ctx, mine, cfg.Addr, tok) })

	// The credential is renewed while it counts; after its end it is worth nothing.
	if err := wall.Set(principal.Validity-time.Minute, 0); err != nil {
		t.Fatal(err)
	}
	refused("an invitation spent long ago", principal.Of(n1.id), func() error {
		_, err := c.login(ctx, 5000, line)
		return err
	})
	if err := put(c, who, proof, "user/1001/mine"); err != nil {
		t.Fatalf("a minute before its end: %v", err)
	}
	if err := wall.Set(principal.Validity+time.Minute, 0); err != nil {
		t.Fatal(err)
	}
	refused("replay after its end", who, func() error { return put(c, who, proof, "user/1001/mine") })
	newer, err := c.askSigner(ctx, methodRelogin, nil, proof)
	if err != nil {
		t.Fatal(err)
	}
	if err := put(c, who, newer, "user/1001/mine"); err != nil {
		t.Fatal(err)
	}
	// Who is disabled is refused at once, and gets no newer one.
	must(record.Command{PutUser: &record.User{Name: "ana", UID: 1001, GID: 1001, Disabled: true}})
	refused("a disabled user", who, func() error { return put(c, who, newer, "user/1001/mine") })
	refused("a disabled user renews", who, func() error {
		_, err := c.askSigner(ctx, methodRelogin, nil, newer)
		return err
	})
	k, err := n1.record.view().Get("user/1002/secret")
	if err != nil || string(k.Value) != "ben's" || k.Version != 1 {
		t.Fatalf("ben's key: %+v %v", k, err)
	}
}

// renewing is a client node with a user logged in, in a cluster whose clock can be
// set, and whose only signer answers renewals when it is let.
func renewing(t *testing.T, ctx context.Context) (n1, c *Node, wall *clock.Shifted, asked chan context.Context, answer chan struct{}, invite func() string) {
	t.Helper()
	cfg := config(t)
	wall = &clock.Shifted{}
	cfg.Clock = wall
	if err := Found(cfg); err != nil {
		t.Fatal(err)
	}
	n1, _ = start(t, cfg)
	settled(t, n1, 1)
	asked, answer = make(chan context.Context, 100), make(chan struct{})
	t.Cleanup(func() { close(answer) })
	n1.ep.Handle(methodRelogin, func(ctx context.Context, from ids.Node, req, proof []byte) (any, []byte, error) {
		asked <- ctx
		select {
		case <-answer:
		case <-ctx.Done():
			return nil, nil, ctx.Err()
		}
		return n1.serveRelogin(ctx, from, req, proof)
	})
	tok, err := n1.token(asRoot(ctx, n1), 0, 0, record.RoleClient)
	if err != nil {
		t.Fatal(err)
	}
	ccfg := config(t)
	ccfg.Clock = wall
	if err := Join(ctx, ccfg, cfg.Addr, tok); err != nil {
		t.Fatal(err)
	}
	c, _ = start(t, ccfg)
	settled(t, c, 2)
	root := principal.Principal{Node: n1.id}
	if _, err := n1.record.do(ctx, record.Command{Who: root, PutUser: &record.User{Name: "ana", UID: 1001, GID: 1001}}); err != nil {
		t.Fatal(err)
	}
	return n1, c, wall, asked, answer, func() string {
		v := principal.NewInvite()
		if _, err := n1.record.do(ctx, record.Command{Who: root, AddLogin: &record.LoginToken{ID: v.ID(), User: "ana", Expires: wall.Wall().Add(time.Hour).UnixNano()}}); err != nil {
			t.Fatal(err)
		}
		return v.Text()
	}
}

// Who logs out, or in anew, while his credential is being renewed stays so: the
// answer that comes later is nobody's.
func TestLogoutDuringRenewal(t *testing.T) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	_, c, wall, asked, answer, invite := renewing(t, ctx)
	logIn := func(uid uint32) *login {
		t.Helper()
		l, err := c.login(ctx, uid, invite())
		if err != nil {
			t.Fatal(err)
		}
		return l
	}
	now := time.Duration(0)
	renews := func() (in context.Context) { // more than half of all credentials is over
		t.Helper()
		now += principal.Validity/2 + time.Minute
		if err := wall.Set(now, 0); err != nil {
			t.Fatal(err)
		}
		select {
		case in = <-asked:
		case <-ctx.Done():
			t.Fatal("no renewal")
		}
		return in
	}
	answered := func(in context.Context) {
		select {
		case answer <- struct{}{}:
		case <-in.Done(): // it was given up
		}
	}
	for what, change := range map[string]func() *login{
		"out": func() *login {
			if err := c.logout(5000); err != nil {
				t.Fatal(err)
			}
			return nil
		},
		"in": func() *login { return logIn(5000) },
	} {
		logIn(5000)
		in := renews()
		want := change()
		answered(in)
		logIn(6000) // when that is renewed, the other is done with
		in = renews()
		if got := c.logins.of(5000); (got == nil) != (want == nil) || got != nil && got.cred.Serial != want.cred.Serial {
			t.Errorf("%s: uid 5000 speaks by %v, not %v", what, got, want)
		}
		if _, err := os.Stat(c.loginPath(5000)); (err == nil) != (want != nil) {
			t.Errorf("%s: its file: %v", what, err)
		}
		for _, uid := range []uint32{5000, 6000} {
			if err := c.logout(uid); err != nil && !errs.Has(err, errs.NotFound) {
				t.Fatal(err)
			}
		}
		answered(in)
	}
}

// A renewal that is not answered holds up nothing else on its node.
func TestSlowRenewal(t *testing.T) {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	_, c, wall, asked, _, invite := renewing(t, ctx)
	if _, err := c.login(ctx, 5000, invite()); err != nil {
		t.Fatal(err)
	}
	if err := wall.Set(principal.Validity/2+time.Minute, 0); err != nil {
		t.Fatal(err)
	}
	for try := 0; try < 5; try++ { // this machine may be slow, too
		var in context.Context
		select {
		case in = <-asked:
		case <-ctx.Done():
			t.Fatal("no renewal")
		}
		for range 3 {
			c.nudge()
			await(t, "the steward looks", func() bool { return len(c.stir) == 0 })
		}
		if in.Err() == nil {
			return
		}
	}
	t.Error("the steward waits for the renewal")
}

// A credential whose renewal is refused for good is not asked for again.
func TestRefusedRenewal(t *testing.T) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	n1, c, wall, asked, answer, invite := renewing(t, ctx)
	if _, err := c.login(ctx, 5000, invite()); err != nil {
		t.Fatal(err)
	}
	if _, err := n1.record.do(ctx, record.Command{Who: principal.Principal{Node: n1.id}, PutUser: &record.User{Name: "ana", UID: 1001, GID: 1001, Disabled: true}}); err != nil {
		t.Fatal(err)
	}
	if err := wall.Set(principal.Validity/2+time.Minute, 0); err != nil {
		t.Fatal(err)
	}
	select {
	case answer <- struct{}{}:
	case <-ctx.Done():
		t.Fatal("no renewal")
	}
	await(t, "the login has ended", func() bool { return c.logins.of(5000) == nil })
	if _, err := os.Stat(c.loginPath(5000)); !os.IsNotExist(err) {
		t.Errorf("its file: %v", err)
	}
	for len(asked) > 0 { // one, and those before that were given up
		<-asked
	}
	c.renewLogins(ctx)
	if len(asked) != 0 {
		t.Error("it is asked for again")
	}
}

// user adds a user to the record and logs him in on a client node, as uid 5000.
func user(t *testing.T, ctx context.Context, n1, c *Node) *login {
	t.Helper()
	root := principal.Principal{Node: n1.id}
	v := principal.NewInvite()
	for _, cmd := range []record.Command{
		{Who: root, PutUser: &record.User{Name: "ana", UID: 1001, GID: 1001}},
		{Who: root, AddLogin: &record.LoginToken{ID: v.ID(), User: "ana", Expires: n1.cfg.Clock.Wall().Add(time.Hour).UnixNano()}},
	} {
		if _, err := n1.record.do(ctx, cmd); err != nil {
			t.Fatal(err)
		}
	}
	l, err := c.login(ctx, 5000, v.Text())
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// A client node that was off until its certificate had ended keeps its users'
// logins, which last longer.
func TestLoginsOutliveTheCertificate(t *testing.T) {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	wall := &clock.Shifted{}
	cfg := config(t)
	cfg.Clock = wall
	if err := Found(cfg); err != nil {
		t.Fatal(err)
	}
	n1, _ := start(t, cfg)
	settled(t, n1, 1)
	tok, err := n1.token(asRoot(ctx, n1), 0, 0, record.RoleClient)
	if err != nil {
		t.Fatal(err)
	}
	ccfg := config(t)
	ccfg.Clock = wall
	if err := Join(ctx, ccfg, cfg.Addr, tok); err != nil {
		t.Fatal(err)
	}
	c, stop := start(t, ccfg)
	settled(t, c, 2)
	old := user(t, ctx, n1, c)
	stop()
	if err := wall.Set(identity.NodeValidity+24*time.Hour, 0); err != nil {
		t.Fatal(err)
	}
	await(t, "the storing node has another certificate", n1.certHolds)
	c, _ = start(t, ccfg)
	await(t, "the login is renewed", func() bool {
		l := c.logins.of(5000)
		if l == nil {
			t.Fatal("the login was thrown away")
		}
		return l.cred.Expires > old.cred.Expires
	})
}

// More commands at once than a client node's window wait for each other.
func TestManyAtOnce(t *testing.T) {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	n1, _ := founded(t)
	c, _, _ := join(t, ctx, n1, record.RoleClient)
	settled(t, c, 2)
	l := user(t, ctx, n1, c)
	var wg sync.WaitGroup
	for i := range record.OtherWindow + 100 {
		wg.Go(func() {
			_, err := c.record.doAs(ctx, record.Command{Who: l.cred.Principal(), Put: &record.Put{Key: fmt.Sprintf("user/1001/%d", i), Value: []byte("x")}}, l.proof)
			if err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
}
