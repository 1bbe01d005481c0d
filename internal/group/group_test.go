package group

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/cockroachdb/pebble/v2/vfs"

	"github.com/unum-os/unum/internal/errs"
	"github.com/unum-os/unum/internal/ids"
)

func TestSingleVoter(t *testing.T) {
	n, fs := newNetwork(), vfs.NewCrashableMem()
	nd := start(t, n, 1, fs, func(h *Host) { bootstrap(t, h, 1) })
	ctx := testCtx(t)
	for i := 1; i <= 20; i++ {
		v, ok, err := propose(ctx, []*node{nd}, fmt.Sprint("c", i))
		if err != nil || !ok || v != uint64(i) {
			t.Fatalf("command %d: %v %v %v", i, v, ok, err)
		}
	}
	g := nd.h.Group(tg)
	if _, err := g.ReadIndex(ctx); err != nil || count(t, g) != 20 {
		t.Fatal(err, count(t, g))
	}
	if st := g.Status(); st.Role != Leader || len(st.Voters) != 1 || st.Applied < 21 || st.Commit < st.Applied {
		t.Fatalf("%+v", st)
	}
	for _, err := range []error{nd.h.Bootstrap(tg, []ids.Node{1}), second(nd.h.Open(tg, &ledger{}))} {
		if !errs.Has(err, errs.Exists) {
			t.Fatal(err)
		}
	}
	if _, _, err := g.Propose(ctx, make([]byte, MaxCommand+1)); !errs.Has(err, errs.TooLarge) {
		t.Fatal(err)
	}
	if err := g.Remove(ctx, 1); !errs.Has(err, errs.Invalid) {
		t.Fatal(err)
	}
	if err := nd.stop(); err != nil {
		t.Fatal(err)
	}
	if _, _, err := g.Propose(ctx, []byte("late")); !errs.Has(err, errs.Unavailable) {
		t.Fatal(err)
	}
	nd = start(t, n, 1, fs, func(h *Host) { open(t, h) })
	if _, err := nd.h.Group(tg).ReadIndex(ctx); err != nil || count(t, nd.h.Group(tg)) != 20 {
		t.Fatal(err, count(t, nd.h.Group(tg)))
	}
}

func second(_ *Group, err error) error { return err }

func TestThreeVoters(t *testing.T) {
	n := newNetwork()
	nodes := three(t, n)
	ctx := testCtx(t)
	lead := leader(t, nodes)
	var wg sync.WaitGroup
	for k := range 8 {
		wg.Add(1)
		go func() {
			defer wg.Done()
			for i := range 25 {
				if _, ok, err := propose(ctx, nodes, fmt.Sprint(k, "-", i)); err != nil || !ok {
					t.Errorf("%v %v", ok, err)
				}
			}
		}()
	}
	wg.Wait()
	same(t, nodes)
	if c := count(t, nodes[0].h.Group(tg)); c != 200 {
		t.Fatalf("%d commands applied", c)
	}
	follower := nodes[lead.id%3]
	_, _, err := follower.h.Group(tg).Propose(ctx, []byte("x"))
	var nl *NotLeaderError
	if !errors.As(err, &nl) || !errs.Has(err, errs.NotLeader) || nl.Group != tg {
		t.Fatalf("proposal at a follower: %v", err)
	}
	if err := leader(t, nodes).h.Group(tg).TransferLeadership(ctx, follower.id); err != nil {
		t.Fatal(err)
	}
	if l, _ := follower.h.Group(tg).Leader(); l != follower.id {
		t.Fatalf("leader is %v after the transfer to %v", l, follower.id)
	}
}

func TestLeaderDies(t *testing.T) {
	n := newNetwork()
	nodes := three(t, n)
	ctx := testCtx(t)
	lead := leader(t, nodes)
	if _, ok, err := propose(ctx, nodes, "before"); err != nil || !ok {
		t.Fatal(ok, err)
	}
	fs := lead.crash()
	var rest []*node
	for _, nd := range nodes {
		if nd != lead {
			rest = append(rest, nd)
		}
	}
	for ok := false; !ok; {
		var err error
		if _, ok, err = propose(ctx, rest, "after"); err != nil {
			t.Fatal(err)
		}
	}
	back := start(t, n, lead.id, fs, func(h *Host) { open(t, h) })
	same(t, append(rest, back))
	has(t, back.h.Group(tg), "before")
	has(t, back.h.Group(tg), "after")
}

// A leader that is cut off can neither acknowledge nor confirm a read; its
// proposals get no success, and it comes back into line.
func TestCutLeader(t *testing.T) {
	n := newNetwork()
	nodes := three(t, n)
	ctx := testCtx(t)
	lead := leader(t, nodes)
	g := lead.h.Group(tg)
	n.isolate(lead.id, true)
	proposed := make(chan error, 1)
	go func() { _, _, err := g.Propose(ctx, []byte("lost")); proposed <- err }()
	rctx, cancel := context.WithTimeout(ctx, 4*electionTicks*testTick)
	defer cancel()
	if _, err := g.ReadIndex(rctx); !errs.Has(err, errs.Timeout) {
		t.Fatalf("a cut-off leader confirmed a read: %v", err)
	}
	if err := <-proposed; err == nil || !errs.Has(err, errs.Timeout) && !errs.Has(err, errs.NotLeader) {
		t.Fatalf("proposal at a cut-off leader: %v", err)
	}
	if _, ok, err := propose(ctx, []*node{nodes[lead.id%3], nodes[(lead.id+1)%3]}, "won"); err != nil || !ok {
		t.Fatal(ok, err)
	}
	n.isolate(lead.id, false)
	same(t, nodes)
	if _, ok, err := g.Get([]byte("c"), []byte("lost")); ok || err != nil {
		t.Fatal("a command of the cut-off leader was applied", err)
	}
}

// Reads at any replica see everything acknowledged before they began, while
// messages are lost and leaders change.
func TestReadsAreLinearizable(t *testing.T) {
	n := newNetwork()
	n.loss = 0.05
	nodes := three(t, n)
	ctx := testCtx(t)
	leader(t, nodes)
	var acked atomic.Uint64
	stop := make(chan struct{})
	var wg sync.WaitGroup
	for _, nd := range nodes {
		wg.Add(1)
		go func() {
			defer wg.Done()
			for {
				select {
				case <-stop:
					return
				default:
				}
				before := acked.Load()
				if _, err := nd.h.Group(tg).ReadIndex(ctx); err != nil {
					t.Errorf("read at %v: %v", nd.id, err)
					return
				}
				if c := count(t, nd.h.Group(tg)); c < before {
					t.Errorf("%v read %d after %d were acknowledged", nd.id, c, before)
					return
				}
			}
		}()
	}
	proposals := 120
	if torture() {
		proposals = 1000
	}
	for i := range proposals {
		v, ok, err := propose(ctx, nodes, fmt.Sprint(i))
		if err != nil {
			t.Fatal(err)
		}
		if ok {
			acked.Store(v)
		}
		if i%24 == 23 {
			l := leader(t, nodes)
			_ = l.h.Group(tg).TransferLeadership(ctx, l.id%3+1) // it may fail under loss
		}
	}
	close(stop)
	wg.Wait()
	if acked.Load() == 0 {
		t.Fatal("nothing was acknowledged")
	}
}

// One node grows to three: learners by snapshot, promoted at once.
func TestGrow(t *testing.T) {
	n := newNetwork()
	first := start(t, n, 1, vfs.NewCrashableMem(), func(h *Host) { bootstrap(t, h, 1) })
	ctx := testCtx(t)
	val := strings.Repeat("v", 1000)
	for i := range 300 { // far more than the log keeps
		if _, ok, err := propose(ctx, []*node{first}, fmt.Sprint(val, i)); err != nil || !ok {
			t.Fatal(ok, err)
		}
	}
	g := first.h.Group(tg)
	var seen atomic.Int32
	g.Watch(func(st Status) { seen.Store(int32(len(st.Voters)*10 + len(st.Learners))) })
	var others []*node
	for id := ids.Node(2); id <= 3; id++ {
		others = append(others, start(t, n, id, vfs.NewCrashableMem(), func(h *Host) {
			if err := h.Join(tg); err != nil {
				t.Fatal(err)
			}
			open(t, h)
		}))
	}
	if err := g.Promote(ctx, 2); !errs.Has(err, errs.Invalid) {
		t.Fatalf("promotion of a stranger: %v", err)
	}
	n.mu.Lock()
	n.tear = 100_000 // the first streams break off, damaged
	n.mu.Unlock()
	for id := ids.Node(2); id <= 3; id++ {
		if err := g.AddLearner(ctx, id); err != nil {
			t.Fatal(err)
		}
		if err := g.AddLearner(ctx, id); err != nil { // again is harmless
			t.Fatal(err)
		}
	}
	select {
	case <-n.broke:
	case <-ctx.Done():
		t.Fatal("no stream broke off")
	}
	if err := g.Promote(ctx, 2, 3); !errs.Has(err, errs.Busy) {
		t.Fatalf("promotion of empty learners: %v", err)
	}
	if others[0].h.Group(tg).Status().Applied != 0 {
		t.Fatal("a torn snapshot was installed")
	}
	n.mu.Lock()
	n.tear = 0
	n.mu.Unlock()
	for _, nd := range others { // a read barrier on the learner waits for its snapshot
		if _, err := nd.h.Group(tg).ReadIndex(ctx); err != nil {
			t.Fatal(err)
		}
	}
	for {
		err := g.Promote(ctx, 2, 3)
		if err == nil {
			break
		}
		if !errs.Has(err, errs.Busy) {
			t.Fatal(err)
		}
	}
	all := append([]*node{first}, others...)
	if st := g.Status(); len(st.Voters) != 3 || len(st.Learners) != 0 || st.Joint || seen.Load() != 30 {
		t.Fatalf("%+v, watched %d", st, seen.Load())
	}
	same(t, all)
	// The first leaves: the others go on without it.
	if err := g.Remove(ctx, 1); err != nil {
		t.Fatal(err)
	}
	for ok := false; !ok; {
		var err error
		if _, ok, err = propose(ctx, others, "without the first"); err != nil {
			t.Fatal(err)
		}
	}
	same(t, others)
	if st := others[0].h.Group(tg).Status(); len(st.Voters) != 2 {
		t.Fatalf("%+v", st)
	}
	// A fourth takes the seat of the one that does not lead, which stays a learner.
	fourth := start(t, n, 4, vfs.NewCrashableMem(), func(h *Host) {
		if err := h.Join(tg); err != nil {
			t.Fatal(err)
		}
		open(t, h)
	})
	lead := leader(t, others)
	g, demoted := lead.h.Group(tg), 5-lead.id
	if err := g.AddLearner(ctx, 4); err != nil {
		t.Fatal(err)
	}
	if _, err := fourth.h.Group(tg).ReadIndex(ctx); err != nil {
		t.Fatal(err)
	}
	for {
		err := g.Reseat(ctx, []ids.Node{4}, []ids.Node{demoted}, nil)
		if err == nil {
			break
		}
		if !errs.Has(err, errs.Busy) {
			t.Fatal(err)
		}
	}
	if st := g.Status(); !slices.Equal(st.Voters, []ids.Node{lead.id, 4}) || !slices.Equal(st.Learners, []ids.Node{demoted}) {
		t.Fatalf("%+v", st)
	}
	if err := g.Reseat(ctx, nil, []ids.Node{4}, []ids.Node{lead.id}); !errs.Has(err, errs.Invalid) {
		t.Fatalf("all seats taken away: %v", err)
	}
	if _, ok, err := propose(ctx, []*node{lead}, "with the fourth"); err != nil || !ok {
		t.Fatal(ok, err)
	}
	same(t, append(others, fourth))
}

// A follower that was away while the log was truncated comes back through a
// snapshot that replaces its old state, keys that are gone included.
func TestTruncationAndReturn(t *testing.T) {
	n := newNetwork()
	nodes := three(t, n)
	ctx := testCtx(t)
	lead := leader(t, nodes)
	away := nodes[lead.id%3]
	rest := []*node{lead, nodes[(lead.id+1)%3]}
	if _, ok, err := propose(ctx, nodes, "early"); err != nil || !ok {
		t.Fatal(ok, err)
	}
	same(t, nodes)
	fs := away.crash()
	val := strings.Repeat("w", 4000)
	for i := range 400 { // 1.6 MB; the log keeps 256 KiB even for laggards
		if _, ok, err := propose(ctx, rest, fmt.Sprint(val, i)); err != nil || !ok {
			t.Fatal(ok, err)
		}
	}
	trunc := make(chan uint64, 1)
	lead.h.in.push(event{kind: evCall, g: lead.h.Group(tg), fn: func() { trunc <- lead.h.Group(tg).log.trunc }})
	if tr := <-trunc; tr < 100 {
		t.Fatalf("the log begins at %d", tr)
	}
	back := start(t, n, away.id, fs, func(h *Host) { open(t, h) })
	all := append(rest, back)
	same(t, all)
	if m := back.h.stateDB.Metrics(); m.Ingest.Count == 0 {
		t.Fatal("it came back without a snapshot")
	}
	// And from a restart of everything.
	for i, nd := range all {
		fs := nd.crash()
		all[i] = start(t, n, nd.id, fs, func(h *Host) { open(t, h) })
	}
	if _, ok, err := propose(ctx, all, "late"); err != nil || !ok {
		t.Fatal(ok, err)
	}
	same(t, all)
	has(t, all[0].h.Group(tg), "early")
	has(t, all[2].h.Group(tg), fmt.Sprint(val, 399))
}
