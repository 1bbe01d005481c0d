package node

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"

	"github.com/unum-os/unum/internal/disk"
	"github.com/unum-os/unum/internal/errs"
	"github.com/unum-os/unum/internal/ids"
	"github.com/unum-os/unum/internal/principal"
	"github.com/unum-os/unum/internal/quorum"
	"github.com/unum-os/unum/internal/record"
)

// current is a disk whose syncs need power: while it is off none ends. What was
// acknowledged before was synced before; so what the disk holds at the moment is
// what a power failure leaves, however long the program goes on.
type current struct {
	disk.FS
	mu  sync.RWMutex // held for reading by each sync
	off atomic.Bool
}

type poweredFile struct {
	disk.File
	c *current
}

func (c *current) wrap(f disk.File, err error) (disk.File, error) {
	if err != nil {
		return nil, err
	}
	return &poweredFile{f, c}, nil
}

func (c *current) Create(path string, w vfs.DiskWriteCategory) (disk.File, error) {
	return c.wrap(c.FS.Create(path, w))
}

func (c *current) Open(path string, _ ...vfs.OpenOption) (disk.File, error) {
	return c.wrap(c.FS.Open(path))
}

func (c *current) OpenReadWrite(path string, w vfs.DiskWriteCategory, _ ...vfs.OpenOption) (disk.File, error) {
	return c.wrap(c.FS.OpenReadWrite(path, w))
}

func (c *current) OpenDir(path string) (disk.File, error) { return c.wrap(c.FS.OpenDir(path)) }

func (c *current) ReuseForWrite(from, to string, w vfs.DiskWriteCategory) (disk.File, error) {
	return c.wrap(c.FS.ReuseForWrite(from, to, w))
}

func (c *current) Unwrap() vfs.FS { return c.FS }

func (f *poweredFile) Sync() error {
	f.c.mu.RLock()
	defer f.c.mu.RUnlock()
	return f.File.Sync()
}

func (f *poweredFile) SyncData() error               { return f.Sync() }
func (f *poweredFile) SyncTo(int64) (bool, error)    { return false, nil }
func (f *poweredFile) Truncate(size int64) error     { return disk.Truncate(f.File, size) }
func (f *poweredFile) Allocate(from, to int64) error { return disk.Allocate(f.File, from, to) }

// box is a machine with a disk in memory, on which a node is made, started, and
// robbed of its power.
type box struct {
	t    *testing.T
	cfg  Config
	disk *disk.Mem
	cur  *current

	mu    sync.Mutex
	n     *Node // nil: it is off
	cut   context.CancelFunc
	stop  context.CancelCauseFunc
	ended chan error
}

func newBox(t *testing.T) *box {
	b := &box{t: t, disk: newDisk()}
	b.cfg = config(t)
	b.cfg.tick = 20 * time.Millisecond
	b.plug()
	t.Cleanup(func() {
		if b.node() != nil {
			b.halt()
		}
	})
	return b
}

// plug gives the disk current.
func (b *box) plug() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.cur = &current{FS: b.disk}
	b.cfg.FS = b.cur
}

// running returns the node, nil if it is off, and its current.
func (b *box) running() (*Node, *current) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.n, b.cur
}

func (b *box) node() *Node {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.n
}

// boot starts the node on the disk.
func (b *box) boot() *Node {
	b.t.Helper()
	n, err := Open(b.cfg)
	if err != nil {
		b.t.Fatal(err)
	}
	n.grace = time.Second
	ctx, stop := context.WithCancelCause(context.Background())
	n.end = stop
	cctx, cut := context.WithCancel(context.Background())
	parts := slices.DeleteFunc(n.parts(), func(p part) bool { return p.name == "tree" || p.name == "manager" || p.name == "control" })
	for i, p := range parts {
		if p.name == "rpc" { // it may end before the others: nobody hears what they say then
			parts[i].run = func(ctx context.Context) error {
				rctx, cancel := context.WithCancel(cctx)
				defer context.AfterFunc(ctx, cancel)()
				defer cancel()
				err := p.run(rctx)
				if cctx.Err() != nil {
					<-ctx.Done()
				}
				return err
			}
		}
	}
	ended := make(chan error, 1)
	go func() { ended <- n.run(ctx, stop, parts) }()
	b.mu.Lock()
	b.n, b.cut, b.stop, b.ended = n, cut, stop, ended
	b.mu.Unlock()
	return n
}

// lose is power loss: the disk is what it is at this moment, with the seed's
// choice of what was not synced, and nobody hears of anything that the node does
// from now on. also ends what else is done on this machine.
func (b *box) lose(seed uint64, also func()) {
	b.cur.off.Store(true)
	b.cur.mu.Lock() // once the syncs that run have ended
	after := b.disk.Crash(seed)
	if also != nil {
		also()
	}
	b.mu.Lock()
	n, cut, stop, ended := b.n, b.cut, b.stop, b.ended
	b.n = nil
	b.mu.Unlock()
	if n != nil {
		cut()
		for end := time.Now().Add(30 * time.Second); ; time.Sleep(time.Millisecond) {
			linked := false
			for p := range *n.known.Load() {
				linked = linked || p != n.id && n.ep.Connected(p)
			}
			if !linked {
				break
			}
			if time.Now().After(end) {
				b.t.Errorf("%v: its connections do not end", n.id)
				break
			}
		}
	}
	b.cur.mu.Unlock()
	if n != nil {
		stop(nil)
		<-ended // what it fails with is nobody's business
	}
	b.disk = after
	b.plug()
}

// halt stops the node in good order.
func (b *box) halt() {
	b.t.Helper()
	b.mu.Lock()
	n, stop, ended := b.n, b.stop, b.ended
	b.n = nil
	b.mu.Unlock()
	stop(nil)
	if err := <-ended; err != nil {
		b.t.Errorf("%v: %v", n.id, err)
	}
}

// writer writes 1, 2, 3 ... to a key through whichever node runs; after a write
// of which nothing is known, to another key.
type writer struct {
	boxes func() []*box
	stop  atomic.Bool
	done  chan struct{}

	mu          sync.Mutex
	keys        map[string][2]int // acknowledged, attempted
	acks, fails int
}

func newWriter(seed uint64, boxes func() []*box) *writer {
	w := &writer{boxes: boxes, done: make(chan struct{}), keys: map[string][2]int{}}
	go w.run(seed)
	return w
}

// goOn waits for writes that are acknowledged.
func (w *writer) goOn(t *testing.T, what string) {
	t.Helper()
	acks := func() int {
		w.mu.Lock()
		defer w.mu.Unlock()
		return w.acks
	}
	before := acks()
	await(t, what+": writes go on", func() bool { return acks() > before+5 })
}

func (w *writer) run(seed uint64) {
	defer close(w.done)
	rng := rand.New(rand.NewPCG(seed, 7))
	key, n := "settings/k0", 0
	for k := 1; !w.stop.Load(); {
		bs := w.boxes()
		node, cur := bs[rng.IntN(len(bs))].running()
		if node == nil {
			time.Sleep(time.Millisecond)
			continue
		}
		n++
		w.mu.Lock()
		was := w.keys[key]
		w.keys[key] = [2]int{was[0], n}
		w.mu.Unlock()
		ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
		_, err := node.record.do(ctx, record.Command{Who: principal.Principal{Node: node.id}, Put: &record.Put{Key: key, Value: []byte(strconv.Itoa(n))}})
		cancel()
		w.mu.Lock()
		if err == nil && !cur.off.Load() { // else the power may have failed before
			w.keys[key] = [2]int{n, n}
			w.acks++
		} else {
			w.fails++
			key, n = fmt.Sprintf("settings/k%d", k), 0
			k++
		}
		w.mu.Unlock()
		time.Sleep(2 * time.Millisecond)
	}
}

// acked returns what is acknowledged now.
func (w *writer) acked() map[string]int {
	w.mu.Lock()
	defer w.mu.Unlock()
	out := map[string]int{}
	for key, v := range w.keys {
		out[key] = v[0]
	}
	return out
}

// check compares what a node's record has with what was acknowledged before it
// was asked, and what was ever tried.
func (w *writer) check(n *Node, acked map[string]int) error {
	for key, least := range acked {
		k, err := n.record.view().Get(key)
		if errs.Has(err, errs.NotFound) {
			k.Value, err = []byte("0"), nil
		}
		if err != nil {
			return err
		}
		w.mu.Lock()
		most := w.keys[key][1]
		w.mu.Unlock()
		if has, err := strconv.Atoi(string(k.Value)); err != nil || has < least || has > most {
			return fmt.Errorf("%v: %s is %q (%v); %d was acknowledged, %d was the last that was tried", n.id, key, k.Value, err, least, most)
		}
	}
	return nil
}

// converged waits until the nodes agree: all are members and no others, and
// vote as docs/quorum.md says; and each has what was acknowledged.
func converged(t *testing.T, what string, boxes []*box) {
	t.Helper()
	var why string
	ok := func() bool {
		var want []ids.Node
		for _, b := range boxes {
			want = append(want, b.node().id)
		}
		slices.Sort(want)
		for _, b := range boxes {
			n := b.node()
			var have []ids.Node
			for _, m := range n.current() {
				if m.State != record.Active {
					why = fmt.Sprintf("%v knows %v as %v", n.id, m.ID, m.State)
					return false
				}
				have = append(have, m.ID)
			}
			if !slices.Equal(have, want) {
				why = fmt.Sprintf("%v knows the members %v, want %v", n.id, have, want)
				return false
			}
			for i, g := range n.groups() {
				st, first := g.Status(), boxes[0].node().groups()[i].Status()
				if st.Joint || st.Leader == 0 || len(st.Voters) != quorum.Seats(len(want), false) || !slices.Equal(st.Voters, first.Voters) {
					why = fmt.Sprintf("%v, group %d: voters %v (joint: %v), leader %v, of %d members", n.id, g.ID(), st.Voters, st.Joint, st.Leader, len(want))
					return false
				}
				for _, v := range st.Voters {
					if !slices.Contains(want, v) {
						why = fmt.Sprintf("%v votes, which is no member", v)
						return false
					}
				}
				if len(st.Voters)+len(st.Learners) != len(want) {
					why = fmt.Sprintf("%v, group %d: voters %v, learners %v, of %d members", n.id, g.ID(), st.Voters, st.Learners, len(want))
					return false
				}
			}
		}
		return true
	}
	for end := time.Now().Add(60 * time.Second); !ok(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("%s: never: %s", what, why)
		}
	}
}

// nothingMissing checks that each node has what was acknowledged, once it has
// heard of everything.
func nothingMissing(t *testing.T, what string, w *writer, boxes []*box) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	for _, b := range boxes {
		n, acked := b.node(), w.acked()
		var err error
		for {
			if _, err = n.record.info(ctx); err == nil || ctx.Err() != nil {
				break
			}
			pause(ctx, 10*time.Millisecond)
		}
		if err == nil {
			err = w.check(n, acked)
		}
		if err != nil {
			t.Fatalf("%s: %v", what, err)
		}
	}
}

// torture returns n, or more with UNUM_TORTURE set.
func torture(n, more int) int {
	if os.Getenv("UNUM_TORTURE") != "" {
		return more
	}
	return n
}

func seedOf(t *testing.T) uint64 {
	seed := rand.Uint64()
	if s := os.Getenv("UNUM_SEED"); s != "" {
		n, err := strconv.ParseUint(s, 10, 64)
		if err != nil {
			t.Fatal(err)
		}
		seed = n
	}
	t.Logf("UNUM_SEED=%d", seed)
	return seed
}

// The power fails at any moment of joining, which is a snapshot and mostly a
// change of the voters too, and of leaving: on the machine that does it, on the
// leader, on another or on all. All come back, what was begun is brought to its
// end, and then the voters are who they should be and nothing is missing that was
// acknowledged.
func TestPowerFailsAtAnyMoment(t *testing.T) {
	seed := seedOf(t)
	rng := rand.New(rand.NewPCG(seed, 1))
	ctx := t.Context()
	var mu sync.Mutex
	var all []*box
	boxes := func() []*box {
		mu.Lock()
		defer mu.Unlock()
		return slices.Clone(all)
	}
	set := func(bs []*box) {
		mu.Lock()
		defer mu.Unlock()
		all = bs
	}
	first := newBox(t)
	if err := Found(first.cfg); err != nil {
		t.Fatal(err)
	}
	first.boot()
	set([]*box{first})
	converged(t, "founding", boxes())
	w := newWriter(seed, boxes)
	defer func() { w.stop.Store(true); <-w.done }()

	token := func() (addr, tok string) {
		t.Helper()
		for ctx.Err() == nil {
			for _, b := range boxes() {
				n := b.node()
				if n == nil {
					continue
				}
				tctx, stop := context.WithTimeout(ctx, 2*time.Second)
				tok, err := n.token(asRoot(tctx, n), 1, 0, 0)
				stop()
				if err == nil {
					return b.cfg.Addr, tok
				}
			}
		}
		t.Fatal("nobody gives a token")
		return
	}
	// grow makes a machine a node, however often it must be said.
	grow := func(ctx context.Context, what string, b *box, interrupted <-chan struct{}) {
		addr, tok := token()
		jctx, stop := context.WithCancel(ctx)
		joined := make(chan error, 1)
		go func() {
			err := Join(jctx, b.cfg, addr, tok)
			if err == nil && jctx.Err() == nil {
				err = jctx.Err()
			}
			joined <- err
		}()
		var lost bool
		select {
		case <-interrupted:
			lost = true
			b.lose(rng.Uint64(), stop)
			<-joined
		case err := <-joined:
			if err != nil && interrupted == nil {
				t.Fatalf("%s: %v", what, err)
			}
			lost = err != nil
		}
		stop()
		for lost { // as a person does who reads the sentence
			is, err := b.cfg.has(fileNode)
			if err != nil {
				t.Fatal(err)
			}
			if is {
				break
			}
			err = Join(ctx, b.cfg, addr, tok)
			if lost = err != nil; lost && ctx.Err() != nil {
				t.Fatalf("%s: said again: %v", what, err)
			}
			if errs.Has(err, errs.Unauthorized) { // used up, and the answer was lost with the key: another token
				addr, tok = token()
			}
		}
		b.boot()
		set(append(boxes(), b))
	}
	kinds := map[string]int{}
	for round := range torture(6, 400) {
		ctx, cancel := context.WithTimeout(ctx, 2*time.Minute)
		defer cancel()
		w.goOn(t, fmt.Sprint("before round ", round))
		began, now := time.Now(), boxes()
		leaving := len(now) > 4 || len(now) > 2 && rng.IntN(2) == 0
		who := []string{"itself", "leader", "another", "all"}[rng.IntN(4)]
		if len(now) < 2 && who == "another" {
			who = "leader"
		}
		delay := time.Duration(rng.IntN(400)) * time.Millisecond
		what := fmt.Sprintf("round %d: leaving %v, power fails on %s after %v, %d nodes", round, leaving, who, delay, len(now))
		var victims []*box
		lead := func() *box {
			for _, b := range now {
				if n := b.node(); n != nil && n.rec.IsLeader() {
					return b
				}
			}
			return now[0]
		}
		if leaving {
			b := now[rng.IntN(len(now))]
			lctx, stop := context.WithCancel(ctx)
			left := make(chan error, 1)
			n := b.node()
			var said progress
			go func() { left <- n.Leave(lctx, said.note) }()
			time.Sleep(delay)
			switch who {
			case "itself":
				victims = []*box{b}
			case "leader":
				victims = []*box{lead()}
			case "another":
				victims = []*box{now[rng.IntN(len(now))]}
			case "all":
				victims = now
			}
			gone := false
			for _, v := range victims {
				if v == b {
					select {
					case err := <-b.ended: // it has left already
						b.ended <- err
					default:
					}
				}
				v.lose(rng.Uint64(), func() {
					if v == b {
						stop()
					}
				})
			}
			for _, v := range victims {
				if is, err := v.cfg.has(fileNode); err != nil {
					t.Fatal(err)
				} else if !is && v == b {
					gone = true
				} else if !is {
					t.Fatalf("%s: a node is gone that did not leave", what)
				} else {
					v.boot()
				}
			}
			if !gone && slices.Contains(victims, b) {
				<-left
				// It was interrupted: it is said again.
				leaveAgain(t, ctx, what, b)
			} else if !gone {
				if err := <-left; err != nil {
					t.Fatalf("%s: %v; it said %q", what, err, said.all())
				}
				if err := <-b.ended; err != nil {
					t.Fatalf("%s: %v", what, err)
				}
				b.mu.Lock()
				b.n = nil
				b.mu.Unlock()
			}
			stop()
			if is, err := b.cfg.has(fileNode); is || err != nil {
				t.Fatalf("%s: it has left, and its directory is a node's (%v)", what, err)
			}
			set(slices.DeleteFunc(boxes(), func(x *box) bool { return x == b }))
			kinds["leave, "+who]++
		} else {
			b := newBox(t)
			interrupted := make(chan struct{})
			var wg sync.WaitGroup
			if who == "itself" {
				// Either while it joins or afterwards, while its replicas are filled.
				time.AfterFunc(delay/4, func() { close(interrupted) })
				grow(ctx, what, b, interrupted)
				time.Sleep(delay)
				b.lose(rng.Uint64(), nil)
				b.boot()
			} else {
				go func() {
					defer wg.Done()
					grow(ctx, what, b, make(chan struct{}))
				}()
				wg.Add(1)
				time.Sleep(delay)
				switch who {
				case "leader":
					victims = []*box{lead()}
				case "another":
					victims = []*box{now[rng.IntN(len(now))]}
				case "all":
					victims = now
				}
				for _, v := range victims {
					v.lose(rng.Uint64(), nil)
				}
				for _, v := range victims {
					v.boot()
				}
				wg.Wait()
			}
			kinds["join, "+who]++
		}
		if t.Failed() {
			return
		}
		converged(t, what, boxes())
		w.goOn(t, what)
		nothingMissing(t, what, w, boxes())
		t.Logf("%s: %v", what, time.Since(began).Round(time.Millisecond))
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	t.Logf("%v; %d writes acknowledged, %d not", kinds, w.acks, w.fails)
}

// progress is what a leaving node says.
type progress struct {
	mu   sync.Mutex
	said []string
}

func (p *progress) note(s string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.said = append(p.said, s)
}

func (p *progress) all() []string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return slices.Clone(p.said)
}

// leaveAgain has a node that was interrupted while it left leave, as its user
// would; it reports that it has.
func leaveAgain(t *testing.T, ctx context.Context, what string, b *box) {
	t.Helper()
	n := b.node()
	var said progress
	if err := n.Leave(ctx, said.note); err != nil {
		t.Fatalf("%s: said again: %v; it said %q", what, err, said.all())
	}
	if err := <-b.ended; err != nil {
		t.Fatalf("%s: %v", what, err)
	}
	b.mu.Lock()
	b.n = nil
	b.mu.Unlock()
}

// Clusters of 1, 2, 3, 5 and 7: the voters are as many as docs/quorum.md says;
// any minority of them loses its power at once while the others go on, and
// returns; then all lose it, and return in any order.
func TestOneToSeven(t *testing.T) {
	seed := seedOf(t)
	rng := rand.New(rand.NewPCG(seed, 2))
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	defer cancel()
	var mu sync.Mutex
	var all []*box
	boxes := func() []*box {
		mu.Lock()
		defer mu.Unlock()
		return slices.Clone(all)
	}
	var w *writer
	for size := 1; size <= 7; size++ {
		b := newBox(t)
		if size == 1 {
			if err := Found(b.cfg); err != nil {
				t.Fatal(err)
			}
		} else {
			n := all[0].node()
			tok, err := n.token(asRoot(ctx, n), 1, 0, 0)
			if err != nil {
				t.Fatal(err)
			}
			if err := Join(ctx, b.cfg, all[rng.IntN(len(all))].cfg.Addr, tok); err != nil {
				t.Fatal(err)
			}
		}
		b.boot()
		mu.Lock()
		all = append(all, b)
		mu.Unlock()
		converged(t, fmt.Sprintf("%d nodes", size), all)
		if want := []int{1, 2, 3, 3, 5, 5, 5}[size-1]; len(b.node().rec.Status().Voters) != want || len(b.node().root.Status().Voters) != want {
			t.Fatalf("%d nodes: %v and %v vote, want %d", size, b.node().rec.Status().Voters, b.node().root.Status().Voters, want)
		}
		if w == nil {
			w = newWriter(seed, boxes)
			defer func() { w.stop.Store(true); <-w.done }()
		}
		if size == 4 || size == 6 {
			continue
		}
		votes := b.node().rec.Status().Voters
		var dead []*box
		for _, i := range rng.Perm(len(votes))[:(len(votes)-1)/2] {
			dead = append(dead, all[slices.IndexFunc(all, func(b *box) bool { return b.node().id == votes[i] })])
		}
		what := fmt.Sprintf("%d nodes, %d dead", size, len(dead))
		for _, d := range dead {
			d.lose(rng.Uint64(), nil)
		}
		w.goOn(t, what)
		for _, d := range dead {
			d.boot()
		}
		converged(t, what+" and back", all)
		nothingMissing(t, what+" and back", w, all)
		for _, b := range all {
			b.lose(rng.Uint64(), nil)
		}
		for _, i := range rng.Perm(len(all)) {
			all[i].boot()
		}
		what = fmt.Sprintf("%d nodes, all were off", size)
		converged(t, what, all)
		nothingMissing(t, what, w, all)
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	t.Logf("%d writes acknowledged, %d not", w.acks, w.fails)
}
