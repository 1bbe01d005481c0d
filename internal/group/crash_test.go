package group

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/cockroachdb/pebble/v2"
	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/cockroachdb/pebble/v2/vfs/errorfs"

	"github.com/unum-os/unum/internal/errs"
	"github.com/unum-os/unum/internal/ids"
)

// crasher counts the writing operations on a disk and keeps, at the k-th, what
// a power failure then would leave.
type crasher struct {
	mem     *vfs.MemFS
	k       int64
	n       atomic.Int64
	dead    atomic.Pointer[atomic.Bool] // the life that ends with the crash
	crashed chan struct{}
	clone   *vfs.MemFS
}

func newCrasher(mem *vfs.MemFS, k int64) (*crasher, vfs.FS) {
	c := &crasher{mem: mem, k: k, crashed: make(chan struct{})}
	return c, errorfs.Wrap(mem, errorfs.InjectorFunc(func(op errorfs.Op) error {
		if op.Kind.ReadOrWrite() == errorfs.OpIsWrite && c.n.Add(1) == c.k {
			if d := c.dead.Load(); d != nil {
				d.Store(true)
			}
			rng := rand.New(rand.NewPCG(uint64(c.k), 0))
			c.clone = mem.CrashClone(vfs.CrashCloneCfg{UnsyncedDataPercent: rng.IntN(2) * 50, RNG: rng})
			if disordered(c.clone) {
				c.clone = mem.CrashClone(vfs.CrashCloneCfg{})
			}
			close(c.crashed)
		}
		return nil
	}))
}

// disordered reports whether a database's marker survived that names a manifest
// made before it, in the same directory, which did not. The file systems that
// this runs on keep the order of a directory's changes; the engine needs it.
func disordered(fs vfs.FS) bool {
	for _, d := range []string{"raftlog", "raftlog.new", "state", "state.new"} {
		names, _ := fs.List("/d/" + d) // it may not be there yet
		slices.Sort(names)
		last := ""
		for _, n := range names {
			if strings.HasPrefix(n, "marker.manifest.") {
				last = n // the one that counts, by its number
			}
		}
		_, manifest, ok := strings.Cut(strings.TrimPrefix(last, "marker.manifest."), ".")
		if ok && !slices.Contains(names, manifest) {
			return true
		}
	}
	return false
}

func (c *crasher) done() bool {
	select {
	case <-c.crashed:
		return true
	default:
		return false
	}
}

// torture reports whether the long runs are asked for.
func torture() bool { return os.Getenv("UNUM_TORTURE") != "" }

// stride is how far apart the places are that are tried: every one in a long
// run, else one of n.
func stride(_ *testing.T, n int64) int64 {
	switch {
	case torture():
		return 1
	case testing.Short():
		return 3 * n
	}
	return n
}

// life runs one single-voter host through a script of proposals and returns
// those acknowledged while dead was not set.
func life(t *testing.T, fs vfs.FS, dead *atomic.Bool, script int) (acked []string, err error) {
	h, err := New(config(newNetwork(), 1, fs, dead))
	if err != nil {
		return nil, err
	}
	if err := h.Bootstrap(tg, []ids.Node{1}); err != nil {
		return nil, err
	}
	g, err := h.Open(tg, &ledger{})
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	ran := make(chan error, 1)
	go func() { ran <- h.Run(ctx) }()
	val := strings.Repeat("x", 8000) // the log is truncated a few times
	for i := range script {
		cmd := fmt.Sprint(i, val)
		for {
			_, _, err = g.Propose(ctx, []byte(cmd))
			if !errs.Has(err, errs.NotLeader) {
				break
			}
			if err = g.wait(ctx, "lead", func(st Status) bool { return st.Role == Leader }); err != nil {
				break
			}
		}
		if err != nil {
			break
		}
		if !dead.Load() {
			acked = append(acked, cmd)
		}
	}
	cancel()
	if rerr := <-ran; rerr != nil {
		return acked, rerr
	}
	if len(acked) == script && g.log.trunc == 0 {
		return acked, errors.New("the log was never truncated")
	}
	if cerr := h.Close(); cerr != nil {
		return acked, cerr
	}
	return acked, err
}

// recovered checks, twice, that a disk holds what was acknowledged, in order.
func recovered(t *testing.T, fs *vfs.MemFS, acked []string) {
	t.Helper()
	for range 2 {
		n := newNetwork()
		nd := start(t, n, 1, fs, func(h *Host) {
			err := h.Bootstrap(tg, []ids.Node{1})
			if err != nil && !errs.Has(err, errs.Exists) || err == nil && len(acked) > 0 {
				t.Fatalf("%d acknowledged, bootstrap: %v", len(acked), err)
			}
			open(t, h)
		})
		ctx := testCtx(t)
		g := nd.h.Group(tg)
		if _, err := g.ReadIndex(ctx); err != nil {
			t.Fatal(err)
		}
		for i, cmd := range acked {
			v, ok, err := g.Get([]byte("c"), []byte(cmd))
			if err != nil || !ok || v[7] != byte(i+1) {
				t.Fatalf("command %d of %d: %x %v %v", i, len(acked), v, ok, err)
			}
		}
		before := count(t, g)
		if v, ok, err := propose(ctx, []*node{nd}, fmt.Sprint("again", before)); err != nil || !ok || v != before+1 {
			t.Fatal(v, ok, err)
		}
		fs = nd.crash()
	}
}

func TestCrashAtEveryWrite(t *testing.T) {
	full := 0
	for k := int64(1); ; k += stride(t, 7) {
		c, fs := newCrasher(vfs.NewCrashableMem(), k)
		var dead atomic.Bool
		c.dead.Store(&dead)
		acked, err := life(t, fs, &dead, 24)
		if err != nil {
			t.Fatalf("write %d: %v", k, err)
		}
		if !c.done() {
			t.Logf("%d writes", c.n.Load())
			if k < 50 || len(acked) != 24 {
				t.Fatal("the script did too little")
			}
			break
		}
		if len(acked) > 0 {
			full++
		}
		recovered(t, c.clone, acked)
		if t.Failed() {
			t.Fatalf("after a crash at write %d", k)
		}
	}
	if full == 0 {
		t.Fatal("no crash came after an acknowledgement")
	}
}

// From the k-th write on the disk is full: nothing more may be acknowledged, the
// host stops with the class, and the disk holds what was acknowledged.
func TestDiskFullAtEveryWrite(t *testing.T) {
	stopped := 0
	for k := int64(1); ; k += stride(t, 7) {
		mem := vfs.NewCrashableMem()
		var n atomic.Int64
		fs := errorfs.Wrap(mem, errorfs.InjectorFunc(func(op errorfs.Op) error {
			switch op.Kind {
			case errorfs.OpFileWrite, errorfs.OpFileSync, errorfs.OpFileSyncData, errorfs.OpFileSyncTo, errorfs.OpCreate, errorfs.OpReuseForWrite:
				if n.Add(1) >= k {
					return syscall.ENOSPC
				}
			}
			return nil
		}))
		var dead atomic.Bool
		acked, err := life(t, fs, &dead, 24)
		if err == nil {
			if n.Load() >= k && len(acked) != 24 {
				t.Fatalf("write %d failed and nobody noticed", k)
			}
			break
		}
		if !errs.Has(err, errs.NoSpace) && !errs.Has(err, errs.Timeout) {
			t.Fatalf("write %d: %v is %v", k, err, errs.ClassOf(err))
		}
		stopped++
		recovered(t, mem.CrashClone(vfs.CrashCloneCfg{}), acked)
	}
	if stopped < 10 {
		t.Fatalf("only %d failures", stopped)
	}
}

// Nodes lose power at random writes under load and come back: everything
// acknowledged stays, each number was given once, all replicas are equal.
func TestCrashUnderLoad(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 0))
	n := newNetwork()
	nodes := make([]*node, 3)
	crashers := make([]*crasher, 3)
	var mu sync.Mutex // of nodes
	begin := func(i int, mem *vfs.MemFS, prepare func(*Host)) {
		c, fs := newCrasher(mem, 1+rng.Int64N(400))
		nd := start(t, n, ids.Node(i+1), fs, prepare)
		c.dead.Store(nd.dead)
		mu.Lock()
		nodes[i], crashers[i] = nd, c
		mu.Unlock()
	}
	for i := range nodes {
		begin(i, vfs.NewCrashableMem(), func(h *Host) { bootstrap(t, h, 1, 2, 3) })
	}
	ctx, cancel := context.WithCancel(testCtx(t))
	var acked sync.Map
	var wg sync.WaitGroup
	for k := range 6 {
		wg.Add(1)
		go func() {
			defer wg.Done()
			for i := 0; ctx.Err() == nil; i++ {
				mu.Lock()
				nd := nodes[(k+i)%3]
				mu.Unlock()
				g := nd.h.Group(tg)
				cmd := fmt.Sprint(k, "-", i, strings.Repeat("y", i%2000))
				pctx, cancel := context.WithTimeout(ctx, 300*time.Millisecond)
				v, _, err := g.Propose(pctx, []byte(cmd))
				cancel()
				switch {
				case err == nil && !nd.dead.Load():
					if old, twice := acked.LoadOrStore(v, cmd); twice {
						t.Errorf("number %d for %.20q and %.20q", v, cmd, old)
					}
				case errs.Has(err, errs.NotLeader), errs.Has(err, errs.Unavailable):
					wctx, cancel := context.WithTimeout(ctx, testPause)
					_ = g.wait(wctx, "wait", func(st Status) bool { return st.Role == Leader })
					cancel()
				}
			}
		}()
	}
	crashes := 8
	if torture() {
		crashes = 60
	}
	for range crashes {
		// Whoever reaches its write first crashes.
		var i int
		select {
		case <-crashers[0].crashed:
			i = 0
		case <-crashers[1].crashed:
			i = 1
		case <-crashers[2].crashed:
			i = 2
		case <-ctx.Done():
			t.Fatal("no crash within the time")
		}
		n.remove(ids.Node(i + 1))
		nodes[i].stop()
		begin(i, crashers[i].clone, func(h *Host) {
			if len(h.Groups()) == 0 { // it crashed before it had anything
				bootstrap(t, h, 1, 2, 3)
				return
			}
			if err := h.Bootstrap(tg, []ids.Node{1, 2, 3}); err != nil && !errs.Has(err, errs.Exists) {
				t.Fatal(err)
			}
			open(t, h)
		})
	}
	for _, c := range crashers { // no more crashes
		c.n.Store(1 << 40)
	}
	cancel()
	wg.Wait()
	for i, c := range crashers {
		if c.done() {
			n.remove(ids.Node(i + 1))
			nodes[i].stop()
			nodes[i] = start(t, n, ids.Node(i+1), c.clone, func(h *Host) { open(t, h) })
		}
	}
	same(t, nodes)
	total := 0
	acked.Range(func(_, cmd any) bool {
		total++
		has(t, nodes[total%3].h.Group(tg), cmd.(string))
		return true
	})
	t.Logf("%d acknowledged of %d applied", total, count(t, nodes[0].h.Group(tg)))
	if total == 0 {
		t.Fatal("nothing was acknowledged")
	}
}

// A learner loses power at every write while a snapshot replaces its state.
func TestCrashDuringInstall(t *testing.T) {
	n := newNetwork()
	first := start(t, n, 1, vfs.NewCrashableMem(), func(h *Host) { bootstrap(t, h, 1) })
	ctx := testCtx(t)
	g := first.h.Group(tg)
	val := strings.Repeat("z", 2000)
	for i := range 200 {
		if _, ok, err := propose(ctx, []*node{first}, fmt.Sprint(val, i)); err != nil || !ok {
			t.Fatal(ok, err)
		}
	}
	interrupted := 0
	probe, fs := newCrasher(vfs.NewCrashableMem(), -1)
	start(t, newNetwork(), 1, fs, func(h *Host) {
		if err := h.Join(tg); err != nil {
			t.Fatal(err)
		}
		open(t, h)
	}).stop()
	for k := probe.n.Load() / 2; ; k += stride(t, 4) { // what comes before is tested above
		id := ids.Node(k + 1) // a wiped disk is a new node
		ctx := testCtx(t)
		c, fs := newCrasher(vfs.NewCrashableMem(), k)
		join := func(h *Host) {
			if err := h.Join(tg); err != nil {
				t.Fatal(err)
			}
			open(t, h)
		}
		nd := start(t, n, id, fs, join)
		c.dead.Store(nd.dead)
		if c.done() { // before it was told whom to mark dead
			nd.dead.Store(true)
		}
		if err := g.AddLearner(ctx, id); err != nil {
			t.Fatal(err)
		}
		rctx, cancel := context.WithCancel(ctx)
		go func() {
			select {
			case <-c.crashed:
				cancel()
			case <-rctx.Done():
			}
		}()
		_, err := nd.h.Group(tg).ReadIndex(rctx)
		cancel()
		if !c.done() {
			if err != nil {
				t.Fatal(err)
			}
			same(t, []*node{first, nd})
			if !c.done() {
				break
			}
		}
		n.remove(id)
		nd.stop()
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
		same(t, []*node{first, back})
		if err := g.Remove(ctx, id); err != nil {
			t.Fatal(err)
		}
		n.remove(id)
		back.stop()
	}
	t.Logf("%d crashes hit an installation", interrupted)
	if interrupted == 0 && !testing.Short() {
		t.Fatal("no crash hit an installation")
	}
}

// The k-th writing operation of a learner's disk fails, once, while a snapshot
// replaces its state: either the host stops, and comes back, or it takes the
// snapshot when it is sent again.
func TestDiskFailsDuringInstall(t *testing.T) {
	n := newNetwork()
	first := start(t, n, 1, vfs.NewCrashableMem(), func(h *Host) { bootstrap(t, h, 1) })
	put(t, []*node{first}, "z", 100, 4000)
	g := first.h.Group(tg)
	join := func(h *Host) {
		if err := h.Join(tg); err != nil {
			t.Fatal(err)
		}
		open(t, h)
	}
	stopped, lived := 0, 0
	for k := int64(1); ; k += stride(t, 3) {
		ctx, id, mem := testCtx(t), ids.Node(k+1), vfs.NewCrashableMem()
		var armed atomic.Bool
		var count atomic.Int64
		fs := errorfs.Wrap(mem, errorfs.InjectorFunc(func(op errorfs.Op) error {
			if op.Kind.ReadOrWrite() == errorfs.OpIsWrite && armed.Load() && count.Add(1) == k {
				return syscall.EIO
			}
			return nil
		}))
		nd := start(t, n, id, fs, join)
		armed.Store(true)
		if err := g.AddLearner(ctx, id); err != nil {
			t.Fatal(err)
		}
		_, err := nd.h.Group(tg).ReadIndex(ctx) // the snapshot is installed, or the host has stopped
		armed.Store(false)
		fired := count.Load() >= k
		if err != nil && (!fired || ctx.Err() != nil) {
			t.Fatalf("write %d: %v", k, err)
		}
		if fired { // and is started again, if it did not stop
			n.remove(id)
			nd.dead.Store(true)
			nd.cancel()
			nd.cancel = nil
			if err := <-nd.ran; err != nil {
				stopped++
			} else {
				lived++
			}
			image := mem.CrashClone(vfs.CrashCloneCfg{})
			_ = nd.h.Close() // whatever it says of a host that failed
			nd = start(t, n, id, image, join)
		}
		same(t, []*node{first, nd})
		if err := g.Remove(ctx, id); err != nil {
			t.Fatal(err)
		}
		n.remove(id)
		nd.stop()
		if t.Failed() {
			t.Fatalf("after a failure of write %d", k)
		}
		if !fired {
			break
		}
	}
	t.Logf("%d failures stopped the host, %d it lived through", stopped, lived)
	if stopped == 0 {
		t.Fatal("no failure stopped the host")
	}
}

func TestDamageIsRefused(t *testing.T) {
	whole := func() *vfs.MemFS {
		fs := vfs.NewCrashableMem()
		nd := start(t, newNetwork(), 1, fs, func(h *Host) { bootstrap(t, h, 1) })
		for i := range 10 {
			if _, ok, err := propose(testCtx(t), []*node{nd}, fmt.Sprint("c", i)); err != nil || !ok {
				t.Fatal(ok, err)
			}
		}
		if err := nd.stop(); err != nil {
			t.Fatal(err)
		}
		return fs
	}
	edit := func(db string, f func(*pebble.DB) error) func(vfs.FS) error {
		return func(fs vfs.FS) error {
			d, err := pebble.Open("/d/"+db, &pebble.Options{FS: fs, FormatMajorVersion: pebble.FormatNewest, Logger: dbLogger{slog.New(slog.DiscardHandler), nil}})
			if err != nil {
				return err
			}
			if err := f(d); err != nil {
				return err
			}
			return d.Close()
		}
	}
	for name, damage := range map[string]func(vfs.FS) error{
		"log gone":   func(fs vfs.FS) error { return fs.RemoveAll("/d/raftlog") },
		"state gone": func(fs vfs.FS) error { return fs.RemoveAll("/d/state") },
		"entry gone": edit("raftlog", func(d *pebble.DB) error { return d.Delete(entryKey(tg, 5), nil) }),
		"tail gone": edit("raftlog", func(d *pebble.DB) error {
			return d.DeleteRange(entryKey(tg, 5), entryKey(tg, 1000), nil)
		}),
		"entry garbled": edit("raftlog", func(d *pebble.DB) error { return d.Set(entryKey(tg, 5), []byte{0xff}, nil) }),
		"hard garbled":  edit("raftlog", func(d *pebble.DB) error { return d.Set(logKey(tg, logHard), []byte{0xff}, nil) }),
		"record short":  edit("state", func(d *pebble.DB) error { return d.Set(appliedKey(tg), []byte{1}, nil) }),
		"record of another term": edit("state", func(d *pebble.DB) error {
			p, err := readApplied(d, tg)
			if err != nil {
				return err
			}
			p.term += 5
			v, err := p.encode()
			if err != nil {
				return err
			}
			return d.Set(appliedKey(tg), v, nil)
		}),
		"manifest cut": func(fs vfs.FS) error {
			names, err := fs.List("/d/state")
			if err != nil {
				return err
			}
			for _, n := range names {
				if strings.HasPrefix(n, "MANIFEST") {
					if err := fs.Remove("/d/state/" + n); err != nil {
						return err
					}
				}
			}
			return nil
		},
	} {
		t.Run(name, func(t *testing.T) {
			fs := whole()
			if err := damage(fs); err != nil {
				t.Fatal(err)
			}
			h, err := New(config(newNetwork(), 1, fs, &atomic.Bool{}))
			if err == nil {
				_, err = h.Open(tg, &ledger{})
				if cerr := h.Close(); cerr != nil {
					t.Error(cerr)
				}
			}
			if !errs.Has(err, errs.Corrupt) {
				t.Fatalf("opened with %v (%v)", err, errs.ClassOf(err))
			}
		})
	}
}

// One of two leaves for good, the leader or the other, as soon as a leader says
// that it is out; who stays loses power at once, and goes on alone.
func TestSurvivorOfTwoLosesPower(t *testing.T) {
	for i := range 4 {
		n := newNetwork()
		two := []ids.Node{1, 2}
		var nodes []*node
		for _, id := range two {
			nodes = append(nodes, start(t, n, id, vfs.NewCrashableMem(), func(h *Host) { bootstrap(t, h, two...) }))
		}
		lead := leader(t, nodes)
		ctx := testCtx(t)
		goes, stays := nodes[2-lead.id], lead
		if i%2 == 0 {
			goes, stays = lead, goes
		}
		if err := lead.h.Group(tg).Remove(ctx, goes.id); err != nil {
			t.Fatal(err)
		}
		out := func(st Status) bool { return st.Role == Leader && !st.Joint && len(st.Voters) == 1 }
		if err := stays.h.Group(tg).wait(ctx, "be alone", out); err != nil {
			t.Fatalf("%v: %+v", err, stays.h.Group(tg).Status())
		}
		fs := stays.crash()
		n.remove(goes.id)
		goes.stop()
		alone := start(t, n, stays.id, fs, func(h *Host) { open(t, h) })
		if _, ok, err := propose(ctx, []*node{alone}, "alone"); err != nil || !ok {
			t.Fatal(ok, err)
		}
		alone.stop()
	}
}

// TestLogThatLostIsDamage: a replica whose disk has lost what it had confirmed
// neither follows nor votes: it ends, and its host does not open again.
func TestLogThatLostIsDamage(t *testing.T) {
	for range 10 { // an election by chance heals it: the new leader does not know
		n := newNetwork()
		nodes := three(t, n)
		lead := leader(t, nodes)
		f := nodes[lead.id%3]
		ctx := testCtx(t)
		put := func(cmd string) {
			if _, ok, err := propose(ctx, nodes, cmd); err != nil || !ok {
				t.Fatal(ok, err)
			}
		}
		put("kept")
		same(t, nodes)
		old := f.fs.(*vfs.MemFS).CrashClone(vfs.CrashCloneCfg{})
		for i := range 20 {
			put(fmt.Sprint("lost ", i))
		}
		same(t, nodes)
		term := lead.h.Group(tg).Status().Term
		f.crash()
		back := start(t, n, f.id, old, func(h *Host) { open(t, h) })
		// It ends, or another term begins.
		var err error
		ended := false
		for !ended && lead.h.Group(tg).Status().Term == term {
			wctx, cancel := context.WithTimeout(ctx, testPause)
			select {
			case err = <-back.ran:
				ended = true
			case <-wctx.Done():
			}
			cancel()
			if ctx.Err() != nil {
				t.Fatalf("it goes on: %+v", back.h.Group(tg).Status())
			}
		}
		if !ended {
			for _, nd := range append(nodes, back) {
				nd.stop()
			}
			continue
		}
		back.dead.Store(true)
		back.cancel()
		back.cancel = nil
		n.remove(f.id)
		if cerr := back.h.Close(); cerr != nil {
			t.Fatal(cerr)
		}
		if !errs.Has(err, errs.Corrupt) || !strings.Contains(err.Error(), "lost what it had confirmed") {
			t.Fatalf("it ended with %v", err)
		}
		h, err := New(config(n, f.id, old.CrashClone(vfs.CrashCloneCfg{}), &atomic.Bool{}))
		if err == nil {
			_, err = h.Open(tg, &ledger{})
			if cerr := h.Close(); cerr != nil {
				t.Fatal(cerr)
			}
		}
		if !errs.Has(err, errs.Corrupt) {
			t.Fatalf("opened again: %v", err)
		}
		has(t, lead.h.Group(tg), "lost 19")
		if _, ok, err := propose(ctx, []*node{lead}, "the others go on"); err != nil || !ok {
			t.Fatal(ok, err)
		}
		return
	}
	t.Fatal("there was an election each time")
}
