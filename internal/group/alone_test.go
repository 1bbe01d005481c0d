package group

import (
	"fmt"
	"slices"
	"testing"

	"github.com/cockroachdb/pebble/v2/vfs"

	"github.com/unum-os/unum/internal/errs"
	"github.com/unum-os/unum/internal/ids"
)

// One of two voters is gone for good: the other goes on alone with everything
// that was acknowledged, a learner follows, and what is left of the lost one
// gets nowhere.
func TestGoAlone(t *testing.T) {
	n := newNetwork()
	ctx := testCtx(t)
	first := start(t, n, 1, vfs.NewCrashableMem(), func(h *Host) { bootstrap(t, h, 1) })
	joined := func(id ids.Node) *node {
		nd := start(t, n, id, vfs.NewCrashableMem(), func(h *Host) {
			if err := h.Join(tg); err != nil {
				t.Fatal(err)
			}
			open(t, h)
		})
		if err := first.h.Group(tg).AddLearner(ctx, id); err != nil {
			t.Fatal(err)
		}
		if _, err := nd.h.Group(tg).ReadIndex(ctx); err != nil {
			t.Fatal(err)
		}
		return nd
	}
	second, learner := joined(2), joined(3)
	for errs.Has(first.h.Group(tg).Promote(ctx, 2), errs.Busy) {
	}
	acked := uint64(0)
	for i := range 50 {
		if _, ok, err := propose(ctx, []*node{first, second}, fmt.Sprint("x", i)); err != nil || !ok {
			t.Fatal(ok, err)
		}
		acked++
	}
	lost := leader(t, []*node{first, second})
	rest := first
	if lost == first {
		rest = second
	}
	lostFS, restFS := lost.crash(), rest.crash()

	// Only offline, only without the one other voter.
	rest = start(t, n, rest.id, restFS, func(h *Host) {
		if err := h.GoAlone(tg, 3); !errs.Has(err, errs.Invalid) {
			t.Fatalf("without a learner: %v", err)
		}
		for range 2 {
			if err := h.GoAlone(tg, lost.id); err != nil {
				t.Fatal(err)
			}
		}
		open(t, h)
		if err := h.GoAlone(tg, lost.id); !errs.Has(err, errs.Exists) {
			t.Fatalf("while open: %v", err)
		}
	})
	g := leader(t, []*node{rest}).h.Group(tg)
	if _, ok, err := propose(ctx, []*node{rest}, "alone"); err != nil || !ok {
		t.Fatal(ok, err)
	}
	same(t, []*node{rest, learner})
	if got := count(t, g); got != acked+1 {
		t.Fatalf("%d commands, want %d", got, acked+1)
	}
	for _, nd := range []*node{rest, learner} {
		if st := nd.h.Group(tg).Status(); !slices.Equal(st.Voters, []ids.Node{rest.id}) || !slices.Equal(st.Learners, []ids.Node{3}) {
			t.Fatalf("%v believes %+v", nd.id, st)
		}
	}
	// What is left of the lost one can neither lead nor disturb.
	term := g.Status().Term
	back := start(t, n, lost.id, lostFS, func(h *Host) { open(t, h) })
	for i := range 20 {
		if _, ok, err := propose(ctx, []*node{rest}, fmt.Sprint("still alone", i)); err != nil || !ok {
			t.Fatal(ok, err)
		}
	}
	if back.h.Group(tg).IsLeader() || g.Status().Term != term {
		t.Fatalf("it leads: %v; term %d after %d", back.h.Group(tg).IsLeader(), g.Status().Term, term)
	}
}
