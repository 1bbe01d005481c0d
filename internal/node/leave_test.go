package node

import (
	"context"
	"errors"
	"os"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/unum-os/unum/internal/block"
	"github.com/unum-os/unum/internal/control"
	"github.com/unum-os/unum/internal/control/api"
	"github.com/unum-os/unum/internal/disk"
	"github.com/unum-os/unum/internal/errs"
	"github.com/unum-os/unum/internal/health"
	"github.com/unum-os/unum/internal/identity"
	"github.com/unum-os/unum/internal/ids"
	"github.com/unum-os/unum/internal/principal"
	"github.com/unum-os/unum/internal/proc"
	"github.com/unum-os/unum/internal/record"
	"github.com/unum-os/unum/internal/segment"
)

// hurt damages the authority's key of the node in cfg.Dir.
func hurt(t *testing.T, cfg Config, how string) {
	t.Helper()
	b, err := identity.Load(disk.Real, cfg.path(fileCAKey))
	if err != nil {
		t.Fatal(err)
	}
	switch how {
	case "cut":
		b = b[:len(b)/2]
	case "another's": // a whole key, of another cluster
		ca, err := identity.NewCA("elsewhere")
		if err != nil {
			t.Fatal(err)
		}
		b = ca.KeyPEM()
	}
	if err := identity.Save(disk.Real, cfg.path(fileCAKey), b); err != nil {
		t.Fatal(err)
	}
}

// A voter whose copy of the authority's key is damaged does not say that it can
// sign, says what is wrong, and has it from another voter.
func TestDamagedAuthority(t *testing.T) {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	n1, cfg1 := founded(t)
	whole, err := identity.Load(disk.Real, cfg1.path(fileCAKey))
	if err != nil {
		t.Fatal(err)
	}
	if !n1.self().Signs {
		t.Fatal("it cannot sign")
	}
	for _, how := range []string{"cut", "another's"} {
		hurt(t, cfg1, how)
		if n1.self().Signs {
			t.Errorf("%s: it says that it can sign", how)
		}
		if _, err := n1.authority(); !errs.Has(err, errs.Unavailable) || !strings.Contains(err.Error(), "damaged") {
			t.Errorf("%s: %v", how, err)
		}
		await(t, how+": health says so", func() bool {
			c := find(n1.conditions(), health.NoAuthority, "n1")
			return c != nil && strings.Contains(c.Text, "no other storing node")
		})
		if err := identity.Save(disk.Real, cfg1.path(fileCAKey), whole); err != nil {
			t.Fatal(err)
		}
		await(t, how+": health says no more", func() bool { return find(n1.conditions(), health.NoAuthority, "n1") == nil })
	}

	_, cfg2, _ := join(t, ctx, n1, record.RoleStore)
	voters(t, n1, 1, 2)
	same := func(cfg Config) bool {
		b, err := identity.Load(disk.Real, cfg.path(fileCAKey))
		return err == nil && string(b) == string(whole)
	}
	await(t, "n2 holds the key", func() bool { return same(cfg2) })
	for _, how := range []string{"cut", "another's"} {
		for _, cfg := range []Config{cfg1, cfg2} {
			hurt(t, cfg, how)
			await(t, how+": it is fetched again", func() bool { return same(cfg) })
		}
	}
}

// The last who can sign does not leave; when another can, it does.
func TestSignerStays(t *testing.T) {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	n1, _ := founded(t)
	n2, cfg2, _ := join(t, ctx, n1, record.RoleStore)
	voters(t, n1, 1, 2)
	settled(t, n2, 2)
	await(t, "n2 holds the key", func() bool { return holdsAuthority(cfg2) })
	if err := os.Remove(cfg2.path(fileCAKey)); err != nil { // and it can put no other there
		t.Fatal(err)
	}
	if err := os.MkdirAll(cfg2.path(fileCAKey, "x"), 0o700); err != nil {
		t.Fatal(err)
	}
	left, said := make(chan error, 1), make(chan string, 1000)
	go func() { left <- n1.Leave(ctx, func(s string) { said <- s }) }()
	for s := ""; !strings.Contains(s, "authority's key"); {
		select {
		case s = <-said:
		case err := <-left:
			t.Fatalf("it has left with the only key: %v", err)
		case <-ctx.Done():
			t.Fatal("it does not say what it waits for")
		}
	}
	if err := os.RemoveAll(cfg2.path(fileCAKey)); err != nil {
		t.Fatal(err)
	}
	if err := <-left; err != nil {
		t.Fatal(err)
	}
	await(t, "n1 has left", func() bool { return (*n2.known.Load())[1].State == record.Left })
	voters(t, n2, 2)
	if _, err := n2.authority(); err != nil { // it asked one that voted no more
		t.Error(err)
	}
}

// What the others lack keeps a node from leaving: entries, blocks, the key.
func TestMissing(t *testing.T) {
	n, _ := founded(t)
	const due = 100
	leaders := map[ids.Group]GroupStatus{ids.RecordGroup: {Voters: []ids.Node{2, 3}}, ids.RootGroup: {Voters: []ids.Node{2, 3}}}
	for _, c := range []struct {
		what   string
		change func(s map[ids.Node]Self)
		want   string
	}{
		{"nothing", func(map[ids.Node]Self) {}, ""},
		{"one is silent", func(s map[ids.Node]Self) { delete(s, 3) }, "n3, which does not answer"},
		{"one is behind, and has the blocks of what it knows", func(s map[ids.Node]Self) { s[3].Groups[0].Applied = due - 1 }, "n3 to have every file (it lacks 1 entries)"},
		{"blocks", func(s map[ids.Node]Self) { x := s[2]; x.Whole, x.Missing = false, 7; s[2] = x }, "n2 to have every block (7 are missing)"},
		{"one can sign", func(s map[ids.Node]Self) { x := s[2]; x.Signs = false; s[2] = x }, ""},
		{"nobody can sign", func(s map[ids.Node]Self) {
			for v, x := range s {
				x.Signs = false
				s[v] = x
			}
		}, "until a voter that stays holds the authority's key"},
	} {
		selves := map[ids.Node]Self{}
		for _, v := range []ids.Node{2, 3} {
			selves[v] = Self{Node: v, Whole: true, Signs: true, Groups: []GroupStatus{{Group: ids.RootGroup, Applied: due}}}
		}
		c.change(selves)
		if got := n.missing(leaders, selves, due); c.want == "" && got != "" || !strings.Contains(got, c.want) {
			t.Errorf("%s: %q", c.what, got)
		}
	}
}

// Two who have it leave are one: when the first gives up it leaves all the same,
// and both hear what is waited for. When the last gives up, it stays.
func TestLeavingIsOne(t *testing.T) {
	var d departing
	began, release := make(chan context.Context, 10), make(chan error)
	leave := func(ctx context.Context, say func(string)) error {
		began <- ctx
		say("waiting for godot")
		select {
		case err := <-release:
			return err
		case <-ctx.Done():
			return errs.E(errs.Interrupted, "", "", "it stays")
		}
	}
	type asked struct {
		cancel context.CancelFunc
		heard  chan string
		err    chan error
	}
	ask := func() asked {
		ctx, cancel := context.WithCancel(context.Background())
		t.Cleanup(cancel)
		a := asked{cancel, make(chan string, 10), make(chan error, 1)}
		go func() { a.err <- d.join(ctx, leave, func(s string) { a.heard <- s }) }()
		<-a.heard
		return a
	}
	first, second := ask(), ask()
	first.cancel()
	if err := <-first.err; !errs.Has(err, errs.Interrupted) || !strings.Contains(err.Error(), "all the same") {
		t.Fatal(err)
	}
	ctx := <-began
	if ctx.Err() != nil || len(began) != 0 {
		t.Fatal("it was interrupted, or begun twice")
	}
	second.cancel()
	if err := <-second.err; !errs.Has(err, errs.Interrupted) || ctx.Err() == nil {
		t.Fatal(err)
	}
	third := ask()
	release <- nil
	if err := <-third.err; err != nil {
		t.Fatal(err)
	}
	<-began
	if err := d.join(context.Background(), leave, func(string) {}); err != nil || len(began) != 0 {
		t.Fatalf("said again at the end: %v", err)
	}
}

// A node that cannot get rid of what it holds does not say that it has left, and
// keeps its directory; started again it leaves with all.
func TestNothingIsLeftBehind(t *testing.T) {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	n1, _ := founded(t)
	_, cfg2, stop2 := join(t, ctx, n1, record.RoleStore)
	voters(t, n1, 1, 2)
	settled(t, n1, 2)
	stop2()

	n2, err := Open(cfg2)
	if err != nil {
		t.Fatal(err)
	}
	n2.lastLimit = 100 * time.Millisecond
	n2.jobs.out = proc.NewOutbox(func(context.Context, []proc.JobRecord) error {
		return errs.E(errs.Unavailable, "", "", "nobody listens")
	}, n2.part("jobs"))
	rctx, stop := context.WithCancelCause(ctx)
	n2.end = stop
	parts := slices.DeleteFunc(n2.parts(), func(p part) bool { return p.name == "tree" || p.name == "manager" })
	ended := make(chan error, 1)
	go func() { ended <- n2.run(rctx, stop, parts) }()
	n2.jobs.Put(proc.JobRecord{Job: 7, Incarnation: 1, Home: 2, Node: 2, State: proc.Exited})
	if err := n2.Leave(ctx, func(string) {}); err != nil {
		t.Fatal(err)
	}
	if err := <-ended; !errs.Has(err, errs.Unavailable) || !strings.Contains(err.Error(), "has not heard of the end of 1 commands") || !strings.Contains(err.Error(), "unum leave again") {
		t.Fatalf("it ended with: %v", err)
	}
	if _, err := os.Stat(cfg2.path(fileNode)); err != nil {
		t.Fatal(err)
	}
	if m := (*n1.known.Load())[2]; m.State != record.Leaving {
		t.Fatalf("n2 is %v", m.State)
	}
	n2, _ = start(t, cfg2)
	if err := n2.Leave(ctx, func(string) {}); err != nil {
		t.Fatal(err)
	}
	await(t, "n2 has left", func() bool { return (*n1.known.Load())[2].State == record.Left })
	await(t, "its directory is no node's", func() bool {
		_, err := os.Stat(cfg2.path(fileNode))
		return errors.Is(err, os.ErrNotExist)
	})
}

// Who has a token made or a node removed is asked in the one way there is: on a
// client node by the credential of the user, and nobody else's word counts.
func TestWhoAdministers(t *testing.T) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	n1, _ := founded(t)
	c, _, _ := join(t, ctx, n1, record.RoleClient)
	_, _, stop3 := join(t, ctx, n1, record.RoleClient)
	for _, n := range []*Node{n1, c} {
		settled(t, n, 3)
	}
	stop3()
	await(t, "n3 is gone", func() bool { return !n1.alive(3) && !c.alive(3) })
	root := principal.Principal{Node: n1.id}
	v := principal.NewInvite()
	for _, cmd := range []record.Command{
		{PutUser: &record.User{Name: "boss", UID: 2000, GID: 2000, Admin: true}},
		{AddLogin: &record.LoginToken{ID: v.ID(), User: "boss", Expires: n1.cfg.Clock.Wall().Add(time.Hour).UnixNano()}},
	} {
		cmd.Who = root
		if _, err := n1.record.do(ctx, cmd); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := c.login(ctx, 5000, v.Text()); err != nil {
		t.Fatal(err)
	}
	for _, x := range []struct {
		who  string
		n    *Node
		ctx  context.Context
		want errs.Class
	}{
		{"nobody", n1, ctx, errs.Unauthorized},
		{"a user who is no administrator", n1, asUser(ctx, 1000), errs.Permission},
		{"one who has not logged in", c, asUser(ctx, 1000), errs.Unauthorized},
		{"the client node's root", c, asRoot(ctx, c), errs.Unauthorized},
	} {
		if _, err := x.n.token(x.ctx, 0, 0, 0); !errs.Has(err, x.want) {
			t.Errorf("a token for %s: %v", x.who, err)
		}
		if err := x.n.Remove(x.ctx, 3, false); !errs.Has(err, x.want) {
			t.Errorf("removal by %s: %v", x.who, err)
		}
	}
	// The administrator of the cluster is known on the client node, too. What the
	// record lets him do from there is its to say.
	if err := c.Remove(asUser(ctx, 5000), 3, false); !errs.Has(err, errs.Permission) {
		t.Errorf("removal by the administrator, logged in on a client node: %v", err)
	}
	if err := n1.Remove(asUser(ctx, 2000), 3, false); err != nil {
		t.Errorf("removal by the administrator on a storing node: %v", err)
	}
}

// What a storing node refuses to its own processes is in the audit, too.
func TestLocalRefusalsAreInTheAudit(t *testing.T) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	n, _ := founded(t)
	who := principal.Principal{Node: n.id, UID: 1000}
	if _, err := n.read(ctx, readRequest{Who: who, Audit: &pageQuery{}}, nil); !errs.Has(err, errs.Permission) {
		t.Errorf("reading the audit: %v", err)
	}
	n.calls.Refused(control.Cred{UID: 1000}, api.Node_Token_FullMethodName, errs.E(errs.Permission, "", "", "only root may do this"))
	for _, what := range []string{"read", "Token"} {
		await(t, what+" is in the audit", func() bool {
			es, err := n.record.view().Audit(0, 1<<20)
			return err == nil && slices.ContainsFunc(es, func(e record.Audit) bool {
				return e.Who == who && e.What == what && e.Err == uint8(errs.Permission)
			})
		})
	}
}

// A live node is put out by force: what it could not finish is lost, for all to
// see; and nothing that it says counts any more. Where that would cost the quorum
// it is refused.
func TestRemovalByForce(t *testing.T) {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	cfg1 := config(t)
	if err := Found(cfg1); err != nil {
		t.Fatal(err)
	}
	n1, _ := start(t, cfg1, func(n *Node) { n.began = n.began.Add(-2 * settling) })
	settled(t, n1, 1)
	n2, _, _ := join(t, ctx, n1, record.RoleStore)
	voters(t, n1, 1, 2)
	settled(t, n1, 2)
	if err := n1.Remove(asRoot(ctx, n1), 2, true); !errs.Has(err, errs.NoQuorum) {
		t.Fatalf("one of two: %v", err)
	}
	n3, _, _ := join(t, ctx, n1, record.RoleStore, func(n *Node) { n.grace = time.Second })
	for _, n := range []*Node{n1, n2, n3} {
		settled(t, n, 3)
		voters(t, n, 1, 2, 3)
	}
	id, err := n3.jobs.NewID(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := n3.record.do(ctx, record.Command{PutJobs: []record.Job{{ID: id, Incarnation: 1, Home: 3, Node: 3, State: record.JobRunning, Detached: true, Argv: [][]byte{[]byte("x")}}}}); err != nil {
		t.Fatal(err)
	}
	if err := n1.Remove(asRoot(ctx, n1), 3, true); err != nil {
		t.Fatal(err)
	}
	await(t, "its job is lost", func() bool {
		j, err := n1.record.view().Job(id)
		return err == nil && j.State == record.JobLost
	})
	if _, err := n1.believe(ctx, 3, principal.Of(3), nil, "propose"); !errs.Has(err, errs.Unauthorized) {
		t.Errorf("it is believed: %v", err)
	}
	voters(t, n1, 1, 2)
	await(t, "it knows that it is out", func() bool {
		c := find(n3.conditions(), health.Removed, "n3")
		return c != nil && strings.Contains(c.Text, "removed from the cluster")
	})
}

// The authority's key stays on a node that was given it for a vote to come, and goes
// from one that will not vote once another can sign.
func TestKeyOfASpare(t *testing.T) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	n1, _ := founded(t)
	c, _, _ := join(t, ctx, n1, record.RoleStore)
	join(t, ctx, n1, record.RoleStore)
	voters(t, n1, 1, 2, 3)
	n4, cfg4, _ := join(t, ctx, n1, record.RoleStore)
	settled(t, n4, 4)
	settled(t, c, 4)
	await(t, "n4 believes the others to be alive", func() bool { return n4.alive(1) })
	if err := n1.entrust(ctx, 4); err != nil {
		t.Fatal(err)
	}
	long := time.Now().Add(-2 * keepKeyFor)
	drop := func(voters ...ids.Node) bool {
		n4.dropAuthority(ctx, &guardian{since: long}, voters)
		return !holdsAuthority(cfg4)
	}
	if drop(1, 2, 3) {
		t.Fatal("it is removed before the vote for which it was given")
	}
	n4.entrusted.Store(long.UnixNano())
	if drop() {
		t.Fatal("it is removed though nobody says that he can sign")
	}
	if !drop(1, 2, 3) {
		t.Fatal("it is kept")
	}
}

// Who asks a node to leave hears how the attempt ended that he waited for, also
// when another begins at once.
func TestFailedLeavingIsTold(t *testing.T) {
	var d departing
	fails := errors.New("it cannot")
	leave := func(context.Context, func(string)) error {
		runtime.Gosched()
		return fails
	}
	var wrong atomic.Int64
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for range 20_000 {
				if err := d.join(context.Background(), leave, func(string) {}); err != fails {
					wrong.Add(1)
				}
			}
		})
	}
	wg.Wait()
	if n := wrong.Load(); n > 0 {
		t.Errorf("%d were told that the node leaves", n)
	}
}

// Who asks while the former one's attempt is being given up begins another.
func TestLeavingAgain(t *testing.T) {
	var d departing
	stays, began := make(chan struct{}), make(chan struct{}, 2)
	leave := func(ctx context.Context, _ func(string)) error {
		began <- struct{}{}
		<-ctx.Done()
		<-stays
		return errors.New("it stays")
	}
	ctx, giveUp := context.WithCancel(context.Background())
	first, second := make(chan error, 1), make(chan error, 1)
	go func() { first <- d.join(ctx, leave, func(string) {}) }()
	<-began
	giveUp()
	await(t, "the first has given up", func() bool {
		d.mu.Lock()
		defer d.mu.Unlock()
		return d.now.over
	})
	sctx, stop := context.WithCancel(context.Background())
	go func() { second <- d.join(sctx, leave, func(string) {}) }()
	close(stays)
	if err := <-first; err == nil {
		t.Error("the first was told that the node leaves")
	}
	select {
	case <-began:
	case err := <-second:
		t.Fatalf("the second was told of the first's attempt: %v", err)
	}
	stop()
	if err := <-second; err == nil {
		t.Error("the second was told that the node leaves")
	}
}

// heldUp is a writer on n1 that was held up: it believes that n3 alone stores.
func heldUp(n1 *Node) *block.Client {
	return block.New(block.Config{Self: n1.id, RPC: n1.ep, Key: n1.volumeKey, Alive: n1.alive,
		Replicas: func() []ids.Node { return []ids.Node{3} }})
}

// refuses checks that n takes no block from a writer that counts on it.
func refuses(t *testing.T, ctx context.Context, w *block.Client, n *Node, what string) {
	t.Helper()
	short, stop := context.WithTimeout(ctx, time.Second)
	defer stop()
	if _, err := w.Put(short, []byte(what)); !errs.Has(err, errs.Timeout) {
		t.Errorf("%s: %v", what, err)
	}
	if n.segs.Has(segment.Name(block.NameOf(n.volumeKey, []byte(what)))) {
		t.Errorf("%s: it took a block", what)
	}
}

// TestLeaverTakesNoBlocks: a node that leaves and whose place others have refuses
// blocks, of a writer that does not know it yet too; what it writes itself goes to
// the others, though its own replica may not have heard who they are. When it
// stays after all it takes them again.
func TestLeaverTakesNoBlocks(t *testing.T) {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	n1, _ := founded(t)
	n2, _, _ := join(t, ctx, n1, record.RoleStore)
	n3, _, _ := join(t, ctx, n1, record.RoleStore)
	for _, n := range []*Node{n1, n2, n3} {
		voters(t, n, 1, 2, 3)
	}
	old := heldUp(n1)
	if _, err := old.Put(ctx, []byte("before")); err != nil {
		t.Fatal(err)
	}
	if err := n3.setState(ctx, record.Leaving); err != nil {
		t.Fatal(err)
	}
	var due uint64
	await(t, "others have its place", func() bool {
		_, err := n3.holding(ctx, &due)
		return err == nil && due > 0
	})
	refuses(t, ctx, old, n3, "others have its place")
	name, err := n3.blocks.Put(ctx, []byte("its own"))
	if err != nil {
		t.Fatal(err)
	}
	for _, n := range []*Node{n1, n2, n3} {
		if got := n.segs.Has(segment.Name(name)); got != (n != n3) {
			t.Errorf("%v has it: %v", n.id, got)
		}
	}
	if err := n3.stay(ctx, "in a test"); !errs.Has(err, errs.Interrupted) {
		t.Fatal(err)
	}
	if _, err := old.Put(ctx, []byte("it stays")); err != nil {
		t.Error(err)
	}
	voters(t, n3, 1, 2, 3)
}

// TestLeaverIsSettled: a node that is marked as leaving, while nobody has it leave,
// takes no blocks as long as it has no place, also when it starts anew; and takes
// them again when it is heard that it stays after whoever wanted that has given up.
func TestLeaverIsSettled(t *testing.T) {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	n1, _ := founded(t)
	n2, _, _ := join(t, ctx, n1, record.RoleStore)
	n3, cfg3, stop3 := join(t, ctx, n1, record.RoleStore)
	for _, n := range []*Node{n1, n2, n3} {
		voters(t, n, 1, 2, 3)
	}
	old := heldUp(n1)
	if err := n3.setState(ctx, record.Leaving); err != nil {
		t.Fatal(err)
	}
	await(t, "it finds out that others have its place", func() bool {
		v := n3.unseated.Load()
		return v != nil && slices.Equal(*v, []ids.Node{1, 2})
	})
	refuses(t, ctx, old, n3, "others have its place")

	stop3()
	opened := false
	n3, _ = start(t, cfg3, func(n *Node) { opened = n.unseated.Load() != nil })
	if !opened {
		t.Error("it would take blocks before it knows whether it has a place")
	}
	await(t, "it hears of the others", func() bool { return n3.alive(1) && n1.alive(3) })
	refuses(t, ctx, old, n3, "started anew")
	if err := n3.setState(ctx, record.Active); err != nil { // as when it is done after stay has given up
		t.Fatal(err)
	}
	await(t, "it takes blocks", func() bool {
		short, stop := context.WithTimeout(ctx, time.Second)
		defer stop()
		_, err := old.Put(short, []byte("it stays"))
		return err == nil
	})
	voters(t, n3, 1, 2, 3)
	if got := n3.storing(); !slices.Equal(got, []ids.Node{1, 2, 3}) {
		t.Errorf("it believes that %v store", got)
	}
}
