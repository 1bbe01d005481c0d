package group

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/cockroachdb/pebble/v2"
	"github.com/cockroachdb/pebble/v2/vfs"
	"go.etcd.io/raft/v3"
	"go.etcd.io/raft/v3/tracker"

	"github.com/unum-os/unum/internal/errs"
	"github.com/unum-os/unum/internal/ids"
)

// withWitness starts the full voters n1 and n2 and the witness n3.
func withWitness(t testing.TB, more func(*Config)) (*network, []*node) {
	n := newNetwork()
	n.witness, n.more = map[ids.Node]bool{3: true}, more
	return n, three(t, n)
}

// onWorker runs f where it may look at everything.
func onWorker[T any](g *Group, f func() T) T {
	out := make(chan T, 1)
	g.h.in.push(event{kind: evCall, g: g, fn: func() { out <- f() }})
	return <-out
}

func logStart(nd *node) uint64 {
	g := nd.h.Group(tg)
	return onWorker(g, func() uint64 { return g.log.trunc })
}

// put proposes count commands of size bytes until all are acknowledged;
// where the outcome is unknown it proposes again.
func put(t testing.TB, nodes []*node, name string, count, size int) {
	t.Helper()
	ctx := testCtx(t)
	for i := range count {
		for ok := false; !ok; {
			var err error
			if _, ok, err = propose(ctx, nodes, named(name, i, size)); err != nil {
				t.Fatalf("%s %d: %v", name, i, err)
			}
		}
	}
}

func named(name string, i, size int) string { return fmt.Sprint(name, i, strings.Repeat("w", size)) }

func hasAll(t testing.TB, nd *node, name string, count, size int) {
	t.Helper()
	for i := range count {
		has(t, nd.h.Group(tg), named(name, i, size))
	}
}

// await waits for a condition on the node's status.
func await(t testing.TB, nd *node, what string, ok func(Status) bool) Status {
	t.Helper()
	var last Status
	if err := nd.h.Group(tg).wait(testCtx(t), what, func(st Status) bool { last = st; return ok(st) }); err != nil {
		t.Fatalf("%v: %v: %+v", nd.id, err, last)
	}
	return last
}

// lead makes nodes[i], a full voter, the leader.
func lead(t testing.TB, nodes []*node, to *node) {
	t.Helper()
	for ctx := testCtx(t); !to.h.Group(tg).IsLeader(); {
		await(t, to, "leader", func(st Status) bool { return st.Leader != 0 })
		for _, nd := range nodes {
			_ = nd.h.Group(tg).TransferLeadership(ctx, to.id) // of those only the leader can
		}
	}
}

func caught(t testing.TB, nd *node, index uint64) {
	t.Helper()
	for ctx := testCtx(t); nd.h.Group(tg).Status().Applied < index; {
		if ctx.Err() != nil {
			t.Fatalf("%v stays at %+v, want %d", nd.id, nd.h.Group(tg).Status(), index)
		}
		time.Sleep(testPause)
	}
}

func TestWitnessRefuses(t *testing.T) {
	n, nodes := withWitness(t, nil)
	ctx := testCtx(t)
	put(t, nodes[:2], "a", 20, 10)
	lead(t, nodes[:2], nodes[0])
	g, w := nodes[0].h.Group(tg), nodes[2].h.Group(tg)
	var nl *NotLeaderError
	await(t, nodes[2], "leader", func(st Status) bool { return st.Leader == 1 && st.Witness })
	if _, _, err := w.Propose(ctx, []byte("x")); !errors.As(err, &nl) || nl.Leader != 1 {
		t.Fatal(err)
	}
	if _, err := w.ReadIndex(ctx); !errors.As(err, &nl) || nl.Leader != 1 {
		t.Fatal(err)
	}
	if _, _, err := w.Get([]byte("x")); !errs.Has(err, errs.NotSupported) {
		t.Fatal(err)
	}
	if _, err := w.View(); !errs.Has(err, errs.NotSupported) {
		t.Fatal(err)
	}
	if err := g.TransferLeadership(ctx, 3); !errs.Has(err, errs.Invalid) {
		t.Fatal(err)
	}
	if err := nodes[2].h.Bootstrap(9, []ids.Node{3}); !errs.Has(err, errs.Invalid) {
		t.Fatal(err)
	}
	if err := errors.Join(nodes[2].h.Join(9), nodes[0].h.Join(9)); err != nil {
		t.Fatal(err)
	}
	if _, err := nodes[2].h.Open(9, &ledger{}); !errs.Has(err, errs.Invalid) {
		t.Fatal(err)
	}
	if _, err := nodes[0].h.Open(9, nil); !errs.Has(err, errs.Invalid) {
		t.Fatal(err)
	}
	if err := g.Remove(ctx, 2); err != nil {
		t.Fatal(err)
	}
	for _, err := range []error{g.Remove(ctx, 1), g.Reseat(ctx, nil, []ids.Node{1}, nil), g.Reseat(ctx, nil, nil, []ids.Node{1})} {
		if !errs.Has(err, errs.Invalid) {
			t.Fatalf("the last full voter lost its seat: %v", err)
		}
	}
	// A directory does not change sides.
	for _, nd := range []*node{nodes[0], nodes[2]} {
		fs := nd.crash()
		c := config(n, nd.id, fs, &atomic.Bool{})
		c.Witness = !c.Witness
		if _, err := New(c); !errs.Has(err, errs.Invalid) {
			t.Fatalf("%v: %v", nd.id, err)
		}
	}
}

// Emptiness is never taken for state, nor state where none is kept.
func TestBareSnapshotsAreForWitnesses(t *testing.T) {
	n := newNetwork()
	n.witness = map[ids.Node]bool{1: true}
	join := func(h *Host) {
		if err := h.Join(tg); err != nil {
			t.Fatal(err)
		}
		open(t, h)
	}
	wit := start(t, n, 1, vfs.NewCrashableMem(), join)
	full := start(t, newNetwork(), 1, vfs.NewCrashableMem(), join)
	bare := bareStream(t, snapMessage(10, nil))
	if err := receive(full.h, 2, bare, true); !errs.Has(err, errs.Invalid) {
		t.Fatalf("a full replica took a bare snapshot: %v", err)
	}
	if err := receive(wit.h, 2, snapStream(t, snapMessage(10, nil), "a"), true); !errs.Has(err, errs.Invalid) {
		t.Fatalf("a witness took state: %v", err)
	}
	if err := receive(wit.h, 2, bareStream(t, snapMessage(10, nil), "a"), true); !errs.Has(err, errs.Corrupt) {
		t.Fatalf("a witness took state in a bare snapshot: %v", err)
	}
	if a, b := wit.h.Group(tg).Status().Applied, full.h.Group(tg).Status().Applied; a != 0 || b != 0 {
		t.Fatal("installed", a, b)
	}
	if err := receive(wit.h, 2, bare, true); err != nil || wit.h.Group(tg).Status().Applied != 10 {
		t.Fatal(err)
	}
	// A floor is a number below what is applied, from the leader; garbage is refused.
	for _, b := range [][]byte{{1, 0, 0}, {1, 0, 1, 7}, {1, 0, 2, 0, 5}, {1, 0, 3, 7, 5, 0}, {1, 0, 4, 7, 5, 5, 5}, {1, 0, 2, 7, 0x80}} {
		if err := wit.h.Receive(2, b); !errs.Has(err, errs.Corrupt) {
			t.Errorf("floor %x: %v", b, err)
		}
	}
	g := wit.h.Group(tg)
	if err := wit.h.Receive(9, appendOwn(nil, tg, 1<<40, 0)); err != nil {
		t.Fatal(err)
	}
	if f := onWorker(g, func() uint64 { return g.floor }); f != 0 {
		t.Fatalf("a floor of %d from one who does not lead", f)
	}
}

// Any one of two nodes and a witness dies, again and again, at random moments
// under load: writes go on, and nothing acknowledged is missing.
func TestAnyOneOfThreeDies(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 0))
	n, nodes := withWitness(t, nil)
	var mu sync.Mutex // of nodes and last
	last := time.Now()
	var acked sync.Map
	rounds := 9
	if torture() {
		rounds = 60
	}
	ctx, cancel := context.WithTimeout(context.Background(), patience+time.Duration(rounds)*5*time.Second)
	defer cancel()
	var acks atomic.Int64
	var wg sync.WaitGroup
	for k := range 4 {
		wg.Add(1)
		go func() {
			defer wg.Done()
			for i := 0; ctx.Err() == nil; i++ {
				mu.Lock()
				nd := nodes[(k+i)%3]
				mu.Unlock()
				g := nd.h.Group(tg)
				cmd := fmt.Sprint(k, "-", i, strings.Repeat("y", i%3000))
				pctx, cancel := context.WithTimeout(ctx, 300*time.Millisecond)
				v, _, err := g.Propose(pctx, []byte(cmd))
				cancel()
				switch {
				case err == nil && !nd.dead.Load():
					if old, twice := acked.LoadOrStore(v, cmd); twice {
						t.Errorf("number %d for %.20q and %.20q", v, cmd, old)
					}
					acks.Add(1)
					mu.Lock()
					last = time.Now()
					mu.Unlock()
				case errs.Has(err, errs.NotLeader), errs.Has(err, errs.Unavailable), errs.Has(err, errs.Busy):
					time.Sleep(testPause) // a client's patience: spinning would starve the hosts
				}
			}
		}()
	}
	more := func(count int64) {
		want := acks.Load() + count
		for acks.Load() < want {
			if ctx.Err() != nil {
				t.Fatalf("writes stopped: %+v %+v %+v", nodes[0].h.Group(tg).Status(), nodes[1].h.Group(tg).Status(), nodes[2].h.Group(tg).Status())
			}
			time.Sleep(time.Millisecond)
		}
	}
	var gaps [3][]float64 // ticks from a death to the next acknowledgement, of each
	for r := range rounds {
		more(1 + rng.Int64N(60))
		i := r % 3
		began := time.Now()
		fs := nodes[i].crash()
		more(1)
		mu.Lock()
		gaps[i] = append(gaps[i], float64(last.Sub(began))/float64(testTick))
		mu.Unlock()
		more(rng.Int64N(60))
		back := start(t, n, nodes[i].id, fs, func(h *Host) { open(t, h) })
		mu.Lock()
		nodes[i] = back
		mu.Unlock()
		var commit uint64
		for _, nd := range nodes {
			commit = max(commit, nd.h.Group(tg).Status().Commit)
		}
		caught(t, back, commit) // only then may the next one die
	}
	cancel()
	wg.Wait()
	same(t, nodes[:2])
	total := 0
	acked.Range(func(_, cmd any) bool {
		total++
		has(t, nodes[total%2].h.Group(tg), cmd.(string))
		return true
	})
	for i, g := range gaps {
		slices.Sort(g)
		t.Logf("death of n%d: next commit after %.1f ticks at the median, %.1f at most (of 200 ms: %.2f s)", i+1, g[len(g)/2], g[len(g)-1], g[len(g)-1]/5)
	}
	t.Logf("%d acknowledged", total)
}

// n1 and the witness have committed what n2 has not; n1 dies: the witness must
// be elected, give n2 its tail and the leadership.
func TestWitnessHandsOver(t *testing.T) {
	n, nodes := withWitness(t, nil)
	var led atomic.Bool
	nodes[2].h.Group(tg).Watch(func(st Status) {
		if st.Role == Leader {
			led.Store(true)
		}
	})
	lead(t, nodes[:2], nodes[0])
	put(t, nodes[:1], "both", 5, 10)
	n.isolate(2, true)
	put(t, nodes[:1], "tail", 300, 3000) // much more than a full node's log keeps
	led.Store(false)
	nodes[0].crash()
	n.mu.Lock()
	n.cut = map[[2]ids.Node]bool{}
	n.mu.Unlock()
	await(t, nodes[1], "lead", func(st Status) bool { return st.Role == Leader })
	if !led.Load() {
		t.Fatal("the witness never led")
	}
	put(t, nodes[1:2], "after", 5, 10)
	hasAll(t, nodes[1], "both", 5, 10)
	hasAll(t, nodes[1], "tail", 300, 3000)
	if m := nodes[1].h.stateDB.Metrics(); m.Ingest.Count != 0 {
		t.Fatal("a snapshot came from somewhere")
	}
}

// A witness cuts its log only below what both others have, but then does.
func TestWitnessTruncates(t *testing.T) {
	n, nodes := withWitness(t, nil)
	lead(t, nodes[:2], nodes[0])
	put(t, nodes[:1], "a", 10, 1000)
	same(t, nodes[:2])
	n.isolate(2, true)
	behind := nodes[1].h.Group(tg).Status()
	put(t, nodes[:1], "b", 400, 3000)
	if s := logStart(nodes[0]); s <= behind.Commit {
		t.Fatalf("n1 keeps its log from %d", s)
	}
	if s := logStart(nodes[2]); s > onWorker(nodes[1].h.Group(tg), func() uint64 { return nodes[1].h.Group(tg).log.last }) {
		t.Fatalf("the witness begins at %d, n2 ends at %+v", s, behind)
	}
	n.isolate(2, false)
	same(t, nodes[:2])
	top := nodes[0].h.Group(tg).Status().Commit
	ctx := testCtx(t)
	for i := 0; logStart(nodes[2]) < top; i++ {
		if ctx.Err() != nil {
			t.Fatalf("the witness begins at %d, all are beyond %d", logStart(nodes[2]), top)
		}
		put(t, nodes[:1], "c", 1, 3000+i)
	}
	// Meanwhile both have whatever is gone.
	for range 50 {
		put(t, nodes[:1], "d", 1, 3000)
		s := logStart(nodes[2])
		for _, nd := range nodes[:2] {
			g := nd.h.Group(tg)
			if l := onWorker(g, func() uint64 { return g.log.last }); l < s {
				t.Fatalf("the witness begins at %d, %v ends at %d", s, nd.id, l)
			}
		}
	}
}

// Where the witness's log no longer has what the only live full voter lacks, the
// witness keeps what it has, says whom it needs, and serves nobody.
func TestWitnessWaits(t *testing.T) {
	n, nodes := withWitness(t, func(c *Config) { c.WitnessLogBytes = 2 << 20 })
	lead(t, nodes[:2], nodes[0])
	put(t, nodes[:1], "a", 10, 1000)
	n.isolate(2, true)
	put(t, nodes[:1], "b", 100, 60_000)
	if s := logStart(nodes[2]); s < 20 {
		t.Fatalf("the witness keeps its log from %d, beyond its limit", s)
	}
	fs := nodes[0].crash()
	n.mu.Lock()
	n.cut = map[[2]ids.Node]bool{}
	n.mu.Unlock()
	st := await(t, nodes[2], "need", func(st Status) bool { return len(st.Needs) > 0 })
	if st.Role != Leader || !slices.Equal(st.Needs, []ids.Node{1}) {
		t.Fatalf("%+v", st)
	}
	ctx := testCtx(t)
	w, b := nodes[2].h.Group(tg), nodes[1].h.Group(tg)
	if _, _, err := w.Propose(ctx, []byte("x")); !errs.Has(err, errs.Busy) {
		t.Fatal(err)
	}
	if _, err := w.ReadIndex(ctx); !errs.Has(err, errs.Busy) {
		t.Fatal(err)
	}
	if err := w.Remove(ctx, 1); !errs.Has(err, errs.Busy) {
		t.Fatal(err)
	}
	if _, _, err := b.Propose(ctx, []byte("x")); !errs.Has(err, errs.NotLeader) {
		t.Fatal(err)
	}
	if b.IsLeader() {
		t.Fatal("n2 leads without what was acknowledged")
	}
	nodes[0] = start(t, n, 1, fs, func(h *Host) { open(t, h) })
	put(t, nodes[:2], "c", 10, 1000)
	same(t, nodes[:2])
	hasAll(t, nodes[1], "a", 10, 1000)
	hasAll(t, nodes[1], "b", 100, 60_000)
	if st := w.Status(); len(st.Needs) != 0 || st.Role == Leader {
		t.Fatalf("%+v", st)
	}
}

// A witness whose disk was wiped comes back as another node. Nothing of the
// state reaches it, and when it is a voter any one may die again.
func TestWipedWitness(t *testing.T) {
	n, nodes := withWitness(t, nil)
	ctx := testCtx(t)
	put(t, nodes[:2], "a", 200, 2000) // the log's beginning is gone
	nodes[2].crash()
	n.mu.Lock()
	n.witness[4], n.streams = true, map[ids.Node]*bytes.Buffer{}
	n.mu.Unlock()
	nodes[2] = start(t, n, 4, vfs.NewCrashableMem(), func(h *Host) {
		if err := h.Join(tg); err != nil {
			t.Fatal(err)
		}
		open(t, h)
	})
	change := func(f func(*Group) error) {
		t.Helper()
		for {
			err := f(leader(t, nodes[:2]).h.Group(tg))
			if err == nil {
				return
			}
			if !errs.Has(err, errs.Busy) && !errs.Has(err, errs.NotLeader) {
				t.Fatal(err)
			}
			time.Sleep(testPause)
		}
	}
	change(func(g *Group) error { return g.Remove(ctx, 3) })
	change(func(g *Group) error { return g.AddLearner(ctx, 4) })
	change(func(g *Group) error { return g.Promote(ctx, 4) })
	n.mu.Lock()
	if b := n.streams[4]; b == nil || b.Len() > 1000 || bytes.Contains(b.Bytes(), []byte("wwww")) {
		t.Errorf("streams to the witness: %v bytes", b)
	}
	n.mu.Unlock()
	w := nodes[2].h
	lo, hi := NewSpace(tg).Bounds()
	it, err := w.stateDB.NewIter(&pebble.IterOptions{LowerBound: lo, UpperBound: hi})
	if err != nil || it.First() {
		t.Fatal("the witness has state", err)
	}
	it.Close()
	for i := range 2 {
		caught(t, nodes[2], leader(t, nodes[:2]).h.Group(tg).Status().Commit)
		fs := nodes[i].crash()
		put(t, nodes[1-i:2-i], fmt.Sprint("without", i, "-"), 20, 100)
		nodes[i] = start(t, n, nodes[i].id, fs, func(h *Host) { open(t, h) })
		same(t, nodes[:2])
	}
	hasAll(t, nodes[0], "a", 200, 2000)
}

// A learner is not promoted while a witness may lack what it still has to get:
// if the leader died then, nobody could bring it up.
func TestPromotionWaitsForTheWitness(t *testing.T) {
	n := newNetwork()
	n.witness = map[ids.Node]bool{3: true}
	first := start(t, n, 1, vfs.NewCrashableMem(), func(h *Host) { bootstrap(t, h, 1) })
	ctx := testCtx(t)
	put(t, []*node{first}, "a", 10, 100)
	g := first.h.Group(tg)
	await(t, first, "lead", func(st Status) bool { return st.Role == Leader })
	join := func(id ids.Node) *node {
		nd := start(t, n, id, vfs.NewCrashableMem(), func(h *Host) {
			if err := h.Join(tg); err != nil {
				t.Fatal(err)
			}
			open(t, h)
		})
		if err := g.AddLearner(ctx, id); err != nil {
			t.Fatal(err)
		}
		return nd
	}
	b := join(2)
	caught(t, b, g.Status().Commit)
	n.isolate(2, true)
	put(t, []*node{first}, "b", 200, 1000) // within what counts as caught up
	wit := join(3)
	caught(t, wit, g.Status().Commit)
	if s, told := logStart(wit), onWorker(g, func() uint64 { return g.told }); s == 0 || told < s {
		t.Fatalf("the witness begins at %d, the leader thinks at most %d", s, told)
	}
	match := g.Status().Applied
	if onWorker(g, func() (ready bool) {
		g.rn.WithProgress(func(id uint64, _ raft.ProgressType, p raftProgress) {
			if id == 2 { // as if it had been heard a moment ago, and took what it is sent
				match, p.RecentActive, p.State = p.Match, true, tracker.StateReplicate
				ready = g.caughtUp(2, p)
			}
		})
		return ready
	}) {
		t.Fatalf("n2 could be promoted at %d, but nobody could bring it up", match)
	}
	n.isolate(2, false)
	for {
		err := g.Promote(ctx, 2, 3)
		if err == nil {
			break
		}
		if !errs.Has(err, errs.Busy) {
			t.Fatal(err)
		}
		time.Sleep(testPause)
	}
	for _, nd := range []*node{b, wit} { // before they know that they are voters they do not seek election
		caught(t, nd, g.Status().Commit)
	}
	first.crash()
	put(t, []*node{b}, "c", 10, 100)
	hasAll(t, b, "b", 200, 1000)
}

// Two that seek the same election in the same moment do not split the vote: the
// witness lets the full voter win, in the first term.
func TestNoSplitVote(t *testing.T) {
	n, nodes := withWitness(t, func(c *Config) { c.Tick = time.Second })
	campaign := func(nd *node) {
		g := nd.h.Group(tg)
		if err := onWorker(g, g.rn.Campaign); err != nil {
			t.Fatal(err)
		}
	}
	campaign(nodes[0])
	await(t, nodes[0], "lead", func(st Status) bool { return st.Role == Leader })
	put(t, nodes[:1], "a", 1, 10)
	same(t, nodes[:2])
	caught(t, nodes[2], nodes[0].h.Group(tg).Status().Commit)
	term := nodes[0].h.Group(tg).Status().Term
	nodes[0].crash()
	n.mu.Lock()
	n.hold = map[ids.Node][]held{}
	n.mu.Unlock()
	for _, nd := range nodes[1:] { // the leader is missed
		g := nd.h.Group(tg)
		onWorker(g, func() int {
			for range electionTicks { // the least time after which another's votes count
				g.rn.Tick()
			}
			return 0
		})
	}
	for _, nd := range nodes[1:] {
		campaign(nd)
		await(t, nd, "campaign", func(st Status) bool { return st.Role == Candidate })
	}
	n.release()
	if st := await(t, nodes[1], "lead", func(st Status) bool { return st.Role == Leader }); st.Term != term+1 {
		t.Fatalf("it took %d elections", st.Term-term)
	}
	put(t, nodes[1:2], "b", 1, 10)
}

// The witness loses power at every write, when what it acknowledged is on n1 and
// on it alone; then n1 dies.
func TestWitnessCrashAtEveryWrite(t *testing.T) {
	const count, size = 24, 8000
	probe, fs := newCrasher(vfs.NewCrashableMem(), -1)
	pn := newNetwork()
	pn.witness = map[ids.Node]bool{3: true}
	start(t, pn, 3, fs, func(h *Host) { bootstrap(t, h, 1, 2, 3) }).stop()
	hit := 0
	for k := probe.n.Load() / 2; ; k += stride(t, 24) {
		n := newNetwork()
		n.witness = map[ids.Node]bool{3: true}
		begin := func(id ids.Node, fs vfs.FS) *node {
			return start(t, n, id, fs, func(h *Host) { bootstrap(t, h, 1, 2, 3) })
		}
		c, fs := newCrasher(vfs.NewCrashableMem(), k)
		nodes := []*node{begin(1, vfs.NewCrashableMem()), begin(2, vfs.NewCrashableMem()), begin(3, fs)}
		c.dead.Store(nodes[2].dead)
		if c.done() { // before it was told whom to mark dead
			nodes[2].dead.Store(true)
		}
		ctx, cancel := context.WithCancel(testCtx(t))
		go func() {
			select {
			case <-c.crashed:
				cancel()
			case <-ctx.Done():
			}
		}()
		acked := script(ctx, n, nodes, count, size)
		cancel()
		if !c.done() {
			if acked < 2*count {
				t.Fatalf("only %d acknowledged without a crash", acked)
			}
			t.Logf("%d writes, %d crashes after acknowledgements", c.n.Load(), hit)
			break
		}
		if acked > count { // by n1 and the witness
			hit++
		}
		n.remove(3)
		nodes[2].stop()
		nodes[0].crash()
		n.mu.Lock()
		n.cut = map[[2]ids.Node]bool{}
		n.mu.Unlock()
		nodes[2] = start(t, n, 3, c.clone, func(h *Host) {
			if err := h.Bootstrap(tg, []ids.Node{1, 2, 3}); err != nil && !errs.Has(err, errs.Exists) {
				t.Fatal(err)
			}
			open(t, h)
		})
		put(t, nodes[1:2], "after", 1, 10)
		for i := range acked {
			if !t.Failed() {
				has(t, nodes[1].h.Group(tg), named("s", i, size))
			}
		}
		if t.Failed() {
			t.Fatalf("after a crash at write %d, %d acknowledged", k, acked)
		}
		nodes[1].crash()
		nodes[2].crash()
	}
	if hit == 0 && !testing.Short() {
		t.Fatal("no crash came after the witness had acknowledged alone")
	}
}

// script has count commands go to all three and as many to n1 and n3 alone, and
// returns how many were acknowledged, in order.
func script(ctx context.Context, n *network, nodes []*node, count, size int) int {
	for !nodes[0].h.Group(tg).IsLeader() {
		if ctx.Err() != nil {
			return 0
		}
		_ = nodes[1].h.Group(tg).TransferLeadership(ctx, 1)
		wctx, cancel := context.WithTimeout(ctx, testPause)
		_ = nodes[0].h.Group(tg).wait(wctx, "lead", func(st Status) bool { return st.Role == Leader })
		cancel()
	}
	for i := range 2 * count {
		if i == count {
			for logStart(nodes[2]) <= 1 && ctx.Err() == nil { // a leader's floor comes, and the log is cut
				time.Sleep(testPause)
			}
			n.isolate(2, true)
		}
		if _, _, err := nodes[0].h.Group(tg).Propose(ctx, []byte(named("s", i, size))); err != nil {
			return i
		}
	}
	return 2 * count
}

// A new witness loses power at every write while the leader brings it up.
func TestWitnessCrashDuringInstall(t *testing.T) {
	n := newNetwork()
	n.witness = map[ids.Node]bool{}
	first := start(t, n, 1, vfs.NewCrashableMem(), func(h *Host) { bootstrap(t, h, 1) })
	put(t, []*node{first}, "a", 30, 10_000)
	ctx := testCtx(t)
	g := first.h.Group(tg)
	probe, fs := newCrasher(vfs.NewCrashableMem(), -1)
	join := func(h *Host) {
		if err := h.Join(tg); err != nil {
			t.Fatal(err)
		}
		open(t, h)
	}
	start(t, newNetwork(), 1, fs, join).stop()
	interrupted := 0
	for k := probe.n.Load() / 2; ; k += stride(t, 3) {
		id := ids.Node(k + 1)
		n.mu.Lock()
		n.witness[id] = true
		n.mu.Unlock()
		c, fs := newCrasher(vfs.NewCrashableMem(), k)
		nd := start(t, n, id, fs, join)
		c.dead.Store(nd.dead)
		if c.done() {
			nd.dead.Store(true)
		}
		if err := g.AddLearner(ctx, id); err != nil {
			t.Fatal(err)
		}
		top := g.Status().Commit
		for !c.done() && nd.h.Group(tg).Status().Applied < top {
			if ctx.Err() != nil {
				t.Fatalf("%+v", nd.h.Group(tg).Status())
			}
			time.Sleep(time.Millisecond)
		}
		crashed := c.done()
		n.remove(id)
		nd.stop()
		if crashed {
			back := start(t, n, id, c.clone, func(h *Host) {
				if len(h.Groups()) > 0 {
					if v, err := get(h.logDB, logKey(tg, logMarker), "test"); err != nil {
						t.Fatal(err)
					} else if v != nil {
						interrupted++
					}
				}
				join(h)
			})
			caught(t, back, top)
			n.remove(id)
			back.stop()
		}
		if err := g.Remove(ctx, id); err != nil {
			t.Fatal(err)
		}
		if !crashed {
			break
		}
	}
	t.Logf("%d crashes hit an installation", interrupted)
	if interrupted == 0 && !testing.Short() {
		t.Fatal("no crash hit an installation")
	}
}
