package node

import (
	"context"
	"log/slog"
	"slices"
	"testing"
	"time"

	"github.com/unum-os/unum/internal/errs"
	"github.com/unum-os/unum/internal/identity"
	"github.com/unum-os/unum/internal/ids"
	"github.com/unum-os/unum/internal/principal"
	"github.com/unum-os/unum/internal/record"
	"github.com/unum-os/unum/internal/rpc"
)

// forge makes an endpoint of whoever has the authority's key, under any name.
func forge(t *testing.T, ca *identity.CA, id ids.Node, role identity.Role, to *Node) *rpc.Endpoint {
	t.Helper()
	key, csr, err := identity.NewRequest()
	if err != nil {
		t.Fatal(err)
	}
	cert, err := ca.Sign(csr, id, role, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	h, err := identity.NewHolder(ca.Trust(), cert, key)
	if err != nil {
		t.Fatal(err)
	}
	ep, err := rpc.New(rpc.Config{Self: id, Cert: h, ListenAddr: "127.0.0.1:0", Log: slog.New(slog.DiscardHandler),
		Resolve: func(p ids.Node) (string, bool) { return to.disk.Addr, p == to.id }})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- ep.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
	return ep
}

// Who voted once has the authority's key, and can sign what he likes: a
// certificate for a node that there is not gets him no further than the door, and
// one for a node that there is not even there.
func TestForgedCertificates(t *testing.T) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	n1, _ := founded(t)
	n2, _, _ := join(t, ctx, n1, record.RoleStore)
	settled(t, n1, 2)
	settled(t, n2, 2)
	voters(t, n1, 1, 2)
	ca, err := n1.authority()
	if err != nil {
		t.Fatal(err)
	}

	stranger := forge(t, ca, 77, identity.RoleStore, n1)
	for _, m := range []string{methodPropose, methodForward, methodRead, methodMembers, methodAuthority, methodEntrust, methodJoin, "vice.open", "block.get"} {
		if _, err := stranger.Call(ctx, 1, m, nil, nil, nil); !errs.Has(err, errs.Unavailable) && !errs.Has(err, errs.Unauthorized) {
			t.Errorf("%s, of nobody: %v", m, err)
		}
	}
	for _, s := range []string{streamSnap, "gossip", "job"} {
		if _, err := stranger.Dial(ctx, 1, s); !errs.Has(err, errs.Unavailable) && !errs.Has(err, errs.Unauthorized) {
			t.Errorf("stream %s, of nobody: %v", s, err)
		}
	}
	await(t, "it is put out", func() bool {
		_, err := stranger.Call(ctx, 1, methodSelf, nil, nil, nil)
		return errs.Has(err, errs.Unauthorized) // at the handshake
	})
	await(t, "it is in the audit", func() bool {
		es, err := n1.record.view().Audit(0, 1<<20)
		return err == nil && slices.ContainsFunc(es, func(e record.Audit) bool { return e.Who == principal.Of(77) && e.Err == uint8(errs.Unauthorized) })
	})

	for _, role := range []identity.Role{identity.RoleStore, identity.RoleClient} {
		twin := forge(t, ca, 2, role, n1)
		if _, err := twin.Call(ctx, 1, methodSelf, nil, nil, nil); !errs.Has(err, errs.Unauthorized) {
			t.Errorf("a %s node by the name of n2: %v", role, err)
		}
	}
	if _, err := n2.ep.Call(ctx, 1, methodSelf, nil, nil, nil); err != nil {
		t.Errorf("n2 itself: %v", err)
	}
}

// A stranger is nobody if a read barrier that began after it had come has not
// shown it; it gets another look later, and is forgotten in the end. Their number
// is bounded.
func TestStrangers(t *testing.T) {
	s := newStrangers()
	nobody := func(ids.Node) bool { return false }
	before := time.Now().Add(-time.Second)
	if !s.meet(7) {
		t.Fatal("refused at first sight")
	}
	if got := s.judge(before, nobody); len(got) != 0 || !s.meet(7) {
		t.Fatalf("judged by what was read before it came: %v", got)
	}
	after := time.Now().Add(time.Second)
	if got := s.judge(after, func(ids.Node) bool { return true }); len(got) != 0 {
		t.Fatalf("a member is nobody: %v", got)
	}
	if got := s.judge(after, nobody); !slices.Equal(got, []ids.Node{7}) || s.meet(7) {
		t.Fatalf("not refused: %v", got)
	}
	if s.waiting(nobody) {
		t.Error("it is looked up again")
	}
	s.by[7].nobody = time.Now().Add(-2 * refusedFor)
	if !s.meet(7) || !s.waiting(nobody) {
		t.Error("refused for good")
	}
	if s.waiting(func(ids.Node) bool { return true }) || len(s.by) != 0 {
		t.Error("a member is looked up")
	}
	for i := range maxStrangers {
		if !s.meet(ids.Node(i + 10)) {
			t.Fatalf("stranger %d is refused", i)
		}
	}
	if s.meet(9) || !s.meet(10) {
		t.Error("their number is not bounded")
	}
	for _, x := range s.by {
		x.last = time.Now().Add(-2 * forgottenAfter)
	}
	if s.waiting(nobody) || len(s.by) != 0 {
		t.Error("those that are gone are remembered")
	}
}

// A client node that was off while a node was put out asks that one too when it is
// back, and believes the others; afterwards nothing older counts.
func TestOldListIsNotBelieved(t *testing.T) {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	cfg1 := config(t)
	if err := Found(cfg1); err != nil {
		t.Fatal(err)
	}
	n1, stop1 := start(t, cfg1)
	settled(t, n1, 1)
	n2, _, _ := join(t, ctx, n1, record.RoleStore)
	n3, _, _ := join(t, ctx, n1, record.RoleStore)
	voters(t, n1, 1, 2, 3)
	c, ccfg, cstop := join(t, ctx, n1, record.RoleClient)
	settled(t, c, 4)
	settled(t, n2, 4)
	settled(t, n3, 4)
	await(t, "it keeps the revision with the addresses", func() bool {
		d := c.disk.snapshot()
		return len(d.Peers) == 3 && d.Revision > 0
	})
	cstop()

	stop1()
	await(t, "n1 is dead", func() bool { return !n2.alive(1) })
	if err := n2.Remove(asRoot(ctx, n2), 1, false); err != nil {
		t.Fatal(err)
	}
	n1, _ = start(t, cfg1)
	await(t, "n1, which has not heard of it, is a member for itself", func() bool { return (*n1.known.Load())[1].State == record.Active })
	c, _ = start(t, ccfg)
	await(t, "the client has heard that n1 was put out", func() bool { return (*c.known.Load())[1].State == record.Removed })

	old, err := n1.memberList()
	if err != nil {
		t.Fatal(err)
	}
	if err := c.takeList(2, &old); !errs.Has(err, errs.Stale) {
		t.Errorf("an older list: %v", err)
	}
	if err := c.takeList(1, &memberList{Revision: 1 << 60}); !errs.Has(err, errs.Unauthorized) {
		t.Errorf("a list of a node that was put out: %v", err)
	}
	if err := c.takeList(c.id, &memberList{Revision: 1 << 60}); !errs.Has(err, errs.Unauthorized) {
		t.Errorf("a list of a node that does not store: %v", err)
	}
	if m := (*c.known.Load())[1]; m.State != record.Removed {
		t.Errorf("n1 is %v", m.State)
	}
}
