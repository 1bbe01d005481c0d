package node

import (
	"bytes"
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/unum-os/unum/internal/disk"
	"github.com/unum-os/unum/internal/errs"
	"github.com/unum-os/unum/internal/health"
	"github.com/unum-os/unum/internal/identity"
	"github.com/unum-os/unum/internal/ids"
	"github.com/unum-os/unum/internal/principal"
	"github.com/unum-os/unum/internal/record"
)

// join makes another node of n's cluster and starts it.
func join(t *testing.T, ctx context.Context, n *Node, role record.Role, change ...func(*Node)) (*Node, Config, func()) {
	t.Helper()
	tok, err := n.token(asRoot(ctx, n), 0, 0, 0)
	if err != nil {
		t.Fatal(err)
	}
	cfg := config(t)
	cfg.Role = role
	if err := Join(ctx, cfg, n.cfg.Addr, tok); err != nil {
		t.Fatal(err)
	}
	m, stop := start(t, cfg, change...)
	return m, cfg, stop
}

// voters waits until the groups of n have these voters, and n knows a leader.
func voters(t *testing.T, n *Node, want ...ids.Node) {
	t.Helper()
	await(t, "the voters are as they should be", func() bool {
		for _, g := range n.groups() {
			if st := g.Status(); st.Leader == 0 || st.Joint || !slices.Equal(st.Voters, want) {
				return false
			}
		}
		return true
	})
}

func holdsAuthority(cfg Config) bool {
	_, err := os.Lstat(cfg.path(fileCAKey))
	return err == nil
}

// Nodes come, leave in good order and are put out; voters follow, and the
// authority's key with them. The last survivor goes on alone.
func TestComeAndGo(t *testing.T) {
	ctx, cancel := context.WithTimeout(context.Background(), 3*time.Minute)
	defer cancel()
	n1, cfg1 := founded(t)
	n2, cfg2, _ := join(t, ctx, n1, record.RoleStore)
	n3, cfg3, stop3 := join(t, ctx, n1, record.RoleStore)
	n4, cfg4, _ := join(t, ctx, n1, record.RoleStore)
	for _, n := range []*Node{n1, n2, n3, n4} {
		settled(t, n, 4)
	}
	voters(t, n1, 1, 2, 3)
	for i, c := range []Config{cfg1, cfg2, cfg3, cfg4} {
		if holdsAuthority(c) != (i < 3) {
			t.Fatalf("n%d holds the authority's key: %v", i+1, i >= 3)
		}
	}

	// The leader leaves; the fourth takes its seat.
	var said []string
	if err := n1.Leave(ctx, func(s string) { said = append(said, s) }); err != nil {
		t.Fatal(err, said)
	}
	await(t, "nothing is left of n1 in its directory", func() bool {
		m, err := filepath.Glob(filepath.Join(cfg1.Dir, "*"))
		return err == nil && !slices.ContainsFunc(m, func(f string) bool { return filepath.Base(f) != "sock" })
	})
	voters(t, n2, 2, 3, 4)
	await(t, "n1 has left", func() bool { return (*n2.known.Load())[1].State == record.Left })
	await(t, "n4 holds the authority's key", func() bool { return holdsAuthority(cfg4) })
	if len(said) == 0 || !strings.Contains(said[len(said)-1], "stops") {
		t.Errorf("it said %q", said)
	}

	// One dies for good and is put out.
	if err := n2.Remove(asRoot(ctx, n2), 3, false); !errs.Has(err, errs.Busy) {
		t.Fatalf("removal of a live node: %v", err)
	}
	stop3()
	await(t, "n3 is dead", func() bool { return !n2.alive(3) })
	if err := n2.Remove(asRoot(ctx, n2), 3, false); err != nil {
		t.Fatal(err)
	}
	voters(t, n2, 2, 4)
	back, err := Open(cfg3)
	if err != nil {
		t.Fatal(err)
	}
	bctx, bcancel := context.WithCancelCause(ctx)
	back.end = bcancel
	bended := make(chan error, 1)
	go func() { bended <- back.run(bctx, bcancel, []part{{"rpc", back.ep.Run}}) }()
	if _, err := back.ep.Call(ctx, 2, methodSelf, nil, nil, nil); err == nil {
		t.Error("one that was put out is heard")
	}
	bcancel(nil)
	if err := <-bended; err != nil {
		t.Error(err)
	}

	// The survivor of a clean leave goes on alone.
	if err := n4.Leave(ctx, func(string) {}); err != nil {
		t.Fatal(err)
	}
	voters(t, n2, 2)
	if _, err := n2.token(asRoot(ctx, n2), 0, 0, 0); err != nil {
		t.Fatal(err)
	}
	if err := n2.Leave(ctx, func(string) {}); !errs.Has(err, errs.Invalid) {
		t.Fatalf("the last one leaves: %v", err)
	}
	// And a machine that left may come again, under a new number.
	tok, err := n2.token(asRoot(ctx, n2), 0, 0, 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := Join(ctx, cfg1, cfg2.Addr, tok); err != nil {
		t.Fatal(err)
	}
	again, _ := start(t, cfg1)
	if again.id != 5 {
		t.Fatalf("it came back as %v", again.id)
	}
	voters(t, n2, 2, 5)
}

// A dead voter's seat goes to a spare node, and stays there when it returns.
func TestDeadVoterIsReplaced(t *testing.T) {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	n1, _ := founded(t)
	n1.grace = time.Second
	join(t, ctx, n1, record.RoleStore)
	_, cfg3, stop3 := join(t, ctx, n1, record.RoleStore)
	voters(t, n1, 1, 2, 3)
	_, cfg4, _ := join(t, ctx, n1, record.RoleStore)
	settled(t, n1, 4)
	lead, _ := n1.rec.Leader()
	if lead == 3 {
		t.Fatal("n1 does not lead")
	}
	stop3()
	voters(t, n1, 1, 2, 4)
	if !holdsAuthority(cfg4) {
		t.Error("n4 votes without the authority's key")
	}
	n3, _ := start(t, cfg3)
	settled(t, n3, 4)
	await(t, "n3 is a learner", func() bool { return slices.Contains(n3.rec.Status().Learners, 3) })
	voters(t, n3, 1, 2, 4)
}

// A client node is a member, holds no keys and no replicas, and is refused what
// it may not ask for.
func TestClientNode(t *testing.T) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	n1, cfg1 := founded(t)
	c, cfg, stop := join(t, ctx, n1, record.RoleClient)
	settled(t, c, 2)
	settled(t, n1, 2)
	if err := c.healthy(); err != nil {
		t.Fatal(err)
	}
	for _, f := range []string{fileCAKey, fileVolume, "groups", "blocks"} {
		if _, err := os.Lstat(cfg.path(f)); !os.IsNotExist(err) {
			t.Errorf("a client node has %s (%v)", f, err)
		}
	}
	voters(t, n1, 1)
	for _, m := range []string{methodPropose, methodAuthority, methodEntrust, methodJoin, "vice.open", "block.get", "block.put", "job.list"} {
		if _, err := c.ep.Call(ctx, 1, m, nil, nil, nil); !errs.Has(err, errs.Unauthorized) {
			t.Errorf("%s: %v", m, err)
		}
	}
	for _, s := range []string{streamSnap, "gossip", "job"} {
		if _, err := c.ep.Dial(ctx, 1, s); !errs.Has(err, errs.Unauthorized) {
			t.Errorf("stream %s: %v", s, err)
		}
	}
	// What it joined by, asked again, does not make it more.
	tok, err := n1.token(asRoot(ctx, n1), 0, 0, record.RoleClient)
	if err != nil {
		t.Fatal(err)
	}
	other := config(t)
	other.Role = record.RoleStore
	if err := Join(ctx, other, cfg1.Addr, tok); !errs.Has(err, errs.Unauthorized) {
		t.Fatalf("a client's token makes a storing node: %v", err)
	}
	// Its certificate ends while it is off: its key opens the door. That it is off
	// is no fault, and is seen.
	if m := n1.status(ctx).Members[1]; !m.Alive || m.Silent != nil {
		t.Errorf("while it is on: %v", m)
	}
	stop()
	await(t, "it is known since when it is off", func() bool {
		m := n1.status(ctx).Members[1]
		return !m.Alive && !m.Unheard && m.Silent.AsDuration() > 0
	})
	for _, c := range n1.conditions() {
		if c.Code == health.MemberDead || c.Subject == "n2" {
			t.Errorf("a client node is off: %+v", c)
		}
	}
	b, err := identity.Load(disk.Real, cfg1.path(fileCAKey))
	if err != nil {
		t.Fatal(err)
	}
	ca, err := identity.ParseCA(n1.holder.Trust().CertPEM(), b)
	if err != nil {
		t.Fatal(err)
	}
	age(t, cfg, ca, c.id, identity.RoleClient, time.Now().Add(-2*identity.NodeValidity))
	was, err := identity.Load(disk.Real, cfg.path(fileCert))
	if err != nil {
		t.Fatal(err)
	}
	c, _ = start(t, cfg)
	await(t, "the certificate is a new one", func() bool {
		now, err := identity.Load(disk.Real, cfg.path(fileCert))
		return err == nil && !bytes.Equal(was, now)
	})
	settled(t, c, 2)
}

// holding returns a file below dir that has the bytes in it.
func holding(dir string, secret []byte) (found string, err error) {
	err = filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) || err == nil && !e.Type().IsRegular() {
			return nil
		}
		if err != nil {
			return err
		}
		b, err := os.ReadFile(path)
		if errors.Is(err, fs.ErrNotExist) { // databases take away what they do not need
			return nil
		}
		if bytes.Contains(b, secret) {
			found = path
		}
		return err
	})
	return found, err
}

// Two nodes and a witness: it votes, holds logs and no keys, and lets either of
// the two die; a third storing node takes its seat.
func TestWitness(t *testing.T) {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	n1, _ := founded(t)
	n2, cfg2, stop2 := join(t, ctx, n1, record.RoleStore)
	settled(t, n2, 2)
	w, wcfg, _ := join(t, ctx, n1, record.RoleWitness)
	for _, n := range []*Node{n1, n2, w} {
		settled(t, n, 3)
		voters(t, n, 1, 2, 3)
	}
	if err := w.healthy(); err != nil {
		t.Fatal(err)
	}
	for _, f := range []string{fileCAKey, fileVolume, "blocks"} {
		if _, err := os.Lstat(wcfg.path(f)); !os.IsNotExist(err) {
			t.Errorf("a witness has %s (%v)", f, err)
		}
	}
	// Nor is the volume's key in what the groups write, of which the witness has a part.
	if n1.volumeKey != n2.volumeKey {
		t.Error("two nodes that store have two keys for one volume")
	}
	for _, n := range []*Node{n1, n2, w} {
		if file, err := holding(n.cfg.path(dirGroups), n1.volumeKey[:]); err != nil || file != "" {
			t.Errorf("%v has the volume's key in %q (%v)", n.id, file, err)
		}
	}
	if got := n1.storing(); !slices.Equal(got, []ids.Node{1, 2}) {
		t.Errorf("blocks are kept by %v", got)
	}
	if err := w.Leave(ctx, func(string) {}); err != nil { // and in again, under another number
		t.Fatal(err)
	}
	voters(t, n1, 1, 2)
	w, _, _ = join(t, ctx, n1, record.RoleWitness)
	voters(t, n1, 1, 2, 4)
	voters(t, n2, 1, 2, 4)

	lead, _ := n1.rec.Leader()
	stop2() // with the leader or without
	await(t, "the record is written again", func() bool {
		_, err := n1.token(asRoot(ctx, n1), 0, 0, 0)
		return err == nil
	})
	t.Logf("n2 died, n%d led", lead)
	n2, _ = start(t, cfg2)
	settled(t, n2, 3)
	await(t, "n2 has caught up", func() bool { return n2.rec.Status().Applied == n1.rec.Status().Applied })
	n3, _, _ := join(t, ctx, n1, record.RoleStore)
	voters(t, n1, 1, 2, 5)
	voters(t, n3, 1, 2, 5)
	await(t, "the witness is a learner", func() bool { return slices.Contains(n1.rec.Status().Learners, w.id) })
}

// TestForgedProposals: what a client node's root proposes in the name of others
// is refused at the door, and stands in the audit; what the node may, it may.
func TestForgedProposals(t *testing.T) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	n1, _ := founded(t)
	n2, _, _ := join(t, ctx, n1, record.RoleClient)
	token := &record.Token{ID: record.TokenID{1}, Uses: 1, Role: record.RoleStore}
	for i, who := range []principal.Principal{
		{Node: 1},             // root of the other node
		{Node: 2},             // its own root
		{Node: 2, UID: 1000},  // a user without a credential
		principal.Of(n1.id),   // the other node
		{UID: 7, User: "ana"}, // of no node
	} {
		before, err := n1.record.view().Audit(0, 1<<20)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := n2.record.do(ctx, record.Command{Who: who, AddToken: token}); !errs.Has(err, errs.Unauthorized) {
			t.Errorf("%v: %v", who, err)
		}
		after, err := n1.record.view().Audit(before[len(before)-1].Seq, 10)
		if err != nil || !slices.ContainsFunc(after, func(e record.Audit) bool {
			return e.Who == who && e.Door == n1.id && e.On == n2.id.String() && e.Err == uint8(errs.Unauthorized)
		}) { // others may have done something meanwhile
			t.Errorf("%d: the audit has %+v, %v", i, after, err)
		}
	}
	all, err := n1.record.view().Audit(0, 1<<20)
	if err != nil {
		t.Fatal(err)
	}
	r, err := n1.readHere(ctx, &readRequest{Who: principal.Principal{Node: n1.id}, Audit: &pageQuery{Limit: 2, Newest: true}})
	if err != nil || len(r.Audit) != 2 || r.Audit[1].Seq < all[len(all)-1].Seq || r.Audit[0].Seq+1 != r.Audit[1].Seq {
		t.Errorf("the newest two: %+v, %v", r, err)
	}
	if _, err := n2.record.do(ctx, record.Command{AddToken: token}); !errs.Has(err, errs.Permission) { // itself, but no administrator
		t.Error(err)
	}
	if _, err := n2.record.do(ctx, record.Command{UpdateMember: &record.UpdateMember{Node: 2, Addr: "moved:1"}}); err != nil {
		t.Error(err)
	}
	if ts, err := n1.record.view().Tokens(); err != nil || slices.ContainsFunc(ts, func(t record.Token) bool { return t.ID == token.ID }) {
		t.Errorf("%+v %v", ts, err)
	}
}

// Of two nodes one is lost for good: the other is told so, and goes on alone
// with everything; what is left of the lost one is refused.
func TestWithout(t *testing.T) {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	cfg1 := config(t)
	if err := Found(cfg1); err != nil {
		t.Fatal(err)
	}
	n1, stop1 := start(t, cfg1)
	settled(t, n1, 1)
	n2, cfg2, stop2 := join(t, ctx, n1, record.RoleStore)
	settled(t, n2, 2)
	voters(t, n2, 1, 2)
	if _, err := n2.token(asRoot(ctx, n2), 7, 0, 0); err != nil {
		t.Fatal(err)
	}
	stop1()
	stop2()
	cfg2.Without = 3
	if _, err := Open(cfg2); !errs.Has(err, errs.Invalid) {
		t.Fatalf("without a stranger: %v", err)
	}
	cfg2.Without = 1
	n2, _ = start(t, cfg2)
	voters(t, n2, 2)
	await(t, "n1 is put out", func() bool { return (*n2.known.Load())[1].State == record.Removed })
	ts, err := n2.record.view().Tokens()
	if err != nil || !slices.ContainsFunc(ts, func(t record.Token) bool { return t.Uses == 7 }) {
		t.Fatalf("what was acknowledged is not there: %+v %v", ts, err)
	}
	n1, _ = start(t, cfg1)
	n3, _, _ := join(t, ctx, n2, record.RoleStore)
	settled(t, n3, 2)
	voters(t, n2, 2, 3)
	voters(t, n3, 2, 3)
	if _, err := n1.ep.Call(ctx, 2, methodSelf, nil, nil, nil); err == nil {
		t.Error("the lost node is heard")
	}
}
