package block

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/unum-os/unum/internal/errs"
	"github.com/unum-os/unum/internal/ids"
	"github.com/unum-os/unum/internal/segment"
	"github.com/unum-os/unum/internal/volume"
	"github.com/unum-os/unum/internal/wire"
)

type handler = func(ctx context.Context, from ids.Node, req []byte, data []byte) (any, []byte, error)

// cluster is some nodes and the network between them.
type cluster struct {
	t        *testing.T
	replicas []ids.Node
	nodes    map[ids.Node]*testNode

	mu       sync.Mutex
	dead     map[ids.Node]bool               // known to be
	silent   map[ids.Node]bool               // never answer
	delay    map[ids.Node]time.Duration      // before they do
	lies     map[ids.Node]bool               // change what they send
	fails    map[ids.Node]error              // answer this
	leaving  map[ids.Node]bool               // take no blocks any more
	calls    map[ids.Node]int                // made to each
	handlers map[ids.Node]map[string]handler //
	named    map[volume.BlockName]bool       // by the metadata
}

type testNode struct {
	*Client
	id    ids.Node
	store *segment.Store
	dir   string
}

// endpoint is the RPC of one node.
type endpoint struct {
	c    *cluster
	self ids.Node
}

func (e endpoint) Handle(method string, h handler) {
	if e.c.handlers[e.self] == nil {
		e.c.handlers[e.self] = map[string]handler{}
	}
	e.c.handlers[e.self][method] = h
}

func (e endpoint) Call(ctx context.Context, to ids.Node, method string, req any, data []byte, resp any) ([]byte, error) {
	c := e.c
	c.mu.Lock()
	c.calls[to]++
	dead, silent, delay, lies, fail := c.dead[to] || c.dead[e.self], c.silent[to], c.delay[to], c.lies[to], c.fails[to]
	h := c.handlers[to][method]
	c.mu.Unlock()
	if dead {
		return nil, errs.E(errs.Unavailable, "call", to.String(), "dead")
	}
	if delay > 0 || silent {
		if silent {
			delay = time.Hour
		}
		select {
		case <-time.After(delay):
		case <-ctx.Done():
			return nil, errs.E(errs.Timeout, "call", to.String(), "%w", ctx.Err())
		}
	}
	if fail != nil {
		return nil, fail
	}
	var b []byte
	if req != nil {
		b = wire.MustMarshal(req)
	}
	_, out, err := h(ctx, e.self, b, data)
	if err == nil && lies && method == MethodGet {
		out = bytes.Clone(out)
		out[len(out)/2] ^= 1
	}
	return out, err
}

// newCluster makes n storing nodes and one, number 100, that stores nothing.
func newCluster(t *testing.T, n int) *cluster {
	c := &cluster{t: t, nodes: map[ids.Node]*testNode{}, dead: map[ids.Node]bool{}, silent: map[ids.Node]bool{}, delay: map[ids.Node]time.Duration{},
		lies: map[ids.Node]bool{}, leaving: map[ids.Node]bool{}, fails: map[ids.Node]error{}, calls: map[ids.Node]int{}, handlers: map[ids.Node]map[string]handler{}, named: map[volume.BlockName]bool{}}
	for i := range n {
		c.replicas = append(c.replicas, ids.Node(i+1))
	}
	for _, id := range append(c.replicas[:n:n], 100) {
		tn := &testNode{id: id, dir: t.TempDir()}
		if id != 100 {
			var err error
			if tn.store, err = segment.Open(segment.Config{Dir: tn.dir}); err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { tn.store.Close() })
		}
		tn.Client = c.client(tn)
		c.nodes[id] = tn
	}
	return c
}

func (c *cluster) client(tn *testNode) *Client {
	return New(Config{
		Self: tn.id, RPC: endpoint{c, tn.id}, Local: tn.store, Key: [32]byte{42},
		Replicas: func() []ids.Node {
			c.mu.Lock()
			defer c.mu.Unlock()
			return c.replicas
		},
		Leaving: func() bool {
			c.mu.Lock()
			defer c.mu.Unlock()
			return c.leaving[tn.id]
		},
		Alive: func(n ids.Node) bool {
			c.mu.Lock()
			defer c.mu.Unlock()
			return !c.dead[n]
		},
		Walk: func(yield func(volume.BlockName) bool) error {
			c.mu.Lock()
			var names []volume.BlockName
			for n := range c.named {
				names = append(names, n)
			}
			c.mu.Unlock()
			for _, n := range names {
				if !yield(n) {
					break
				}
			}
			return nil
		},
	})
}

func set[V any](c *cluster, m map[ids.Node]V, n ids.Node, v V) {
	c.mu.Lock()
	defer c.mu.Unlock()
	m[n] = v
}

// run runs the nodes' clients until the end of the test.
func (c *cluster) run() (stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	for _, n := range c.nodes {
		wg.Go(func() {
			if err := n.Run(ctx); err != nil {
				c.t.Error(err)
			}
		})
	}
	return func() { cancel(); wg.Wait() }
}

func data(i, size int) []byte {
	b := make([]byte, size)
	rand.NewChaCha8(sha256.Sum256(binary.LittleEndian.AppendUint64(nil, uint64(i)))).Read(b)
	return b
}

func (c *cluster) put(n ids.Node, b []byte) volume.BlockName {
	c.t.Helper()
	name, err := c.nodes[n].Put(context.Background(), b)
	if err != nil {
		c.t.Fatalf("put at %v: %v", n, err)
	}
	return name
}

func (c *cluster) has(name volume.BlockName) (at []ids.Node) {
	for _, n := range c.replicas {
		if c.nodes[n].store.Has(segment.Name(name)) {
			at = append(at, n)
		}
	}
	return at
}

func (c *cluster) wantGet(n ids.Node, name volume.BlockName, want []byte) {
	c.t.Helper()
	got, err := c.nodes[n].Get(context.Background(), name)
	if err != nil || !bytes.Equal(got, want) {
		c.t.Fatalf("get at %v: %d bytes, %v", n, len(got), err)
	}
}

// spoil flips a byte of the payload in the node's segment file.
func (c *cluster) spoil(n ids.Node, payload []byte) {
	c.t.Helper()
	paths, _ := filepath.Glob(filepath.Join(c.nodes[n].dir, "*.seg"))
	for _, p := range paths {
		b, err := os.ReadFile(p)
		if err != nil {
			c.t.Fatal(err)
		}
		if at := bytes.Index(b, payload); at >= 0 {
			f, err := os.OpenFile(p, os.O_WRONLY, 0)
			if err != nil {
				c.t.Fatal(err)
			}
			if _, err := f.WriteAt([]byte{payload[5] ^ 0x40}, int64(at)+5); err != nil {
				c.t.Fatal(err)
			}
			f.Close()
			return
		}
	}
	c.t.Fatalf("the block is not in the files of %v", n)
}

func TestNeed(t *testing.T) {
	for n, want := range map[int]int{1: 1, 2: 2, 3: 2, 4: 3, 5: 3} {
		if Need(n) != want {
			t.Errorf("of %d: %d, want %d", n, Need(n), want)
		}
	}
}

func TestPutGet(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCluster(t, 3)
		big, empty := data(1, volume.MaxBlock), []byte{}
		for i, b := range [][]byte{big, data(2, 10), empty} {
			from := []ids.Node{1, 100, 2}[i]
			name := c.put(from, b)
			if at := c.has(name); len(at) != 3 {
				t.Fatalf("on %v", at)
			}
			for id := range c.nodes {
				c.wantGet(id, name, b)
				c.wantGet(id, name, b)
			}
		}
		if _, err := c.nodes[1].Put(t.Context(), make([]byte, volume.MaxBlock+1)); !errs.Has(err, errs.TooLarge) {
			t.Fatal(err)
		}
		st := c.nodes[100].Stats()
		if st.CacheHits == 0 || st.PeerReads == 0 || c.nodes[1].Stats().PeerReads != 0 {
			t.Fatalf("stats %+v", st)
		}
		has, err := c.nodes[100].Has(t.Context(), 2, []volume.BlockName{NameOf([32]byte{42}, big), {1}, NameOf([32]byte{42}, empty)})
		if err != nil || !has[0] || has[1] || !has[2] {
			t.Fatal(has, err)
		}
	})
}

func TestPutWithFewer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCluster(t, 3)
		took := func(f func()) time.Duration { t0 := time.Now(); f(); return time.Since(t0) }

		set(c, c.dead, 3, true) // known
		if d := took(func() { c.put(1, data(1, 100)) }); d > 10*time.Millisecond {
			t.Fatalf("a dead replica cost %v", d)
		}
		set(c, c.dead, 3, false)
		set(c, c.silent, 3, true) // not known yet
		if d := took(func() { c.put(1, data(2, 100)) }); d > time.Second {
			t.Fatalf("a silent replica cost %v", d)
		}
		set(c, c.silent, 3, false)
		set(c, c.delay, 3, time.Second) // slow: the copy still arrives
		name := c.put(100, data(3, 100))
		if n := len(c.has(name)); n != 2 {
			t.Fatalf("%d copies", n)
		}
		time.Sleep(2 * time.Second) // of the bubble
		synctest.Wait()
		if n := len(c.has(name)); n != 3 {
			t.Fatalf("%d copies", n)
		}
		set(c, c.delay, 3, 0)
		if st := c.nodes[1].Stats(); st.Degraded != 2 {
			t.Fatalf("%+v", st)
		}

		set(c, c.dead, 3, true)
		set(c, c.dead, 2, true)
		if _, err := c.nodes[1].Put(t.Context(), data(4, 100)); !errs.Has(err, errs.NoQuorum) {
			t.Fatal(err)
		}
		set(c, c.dead, 2, false)
		set(c, c.silent, 2, true)
		d := took(func() {
			if _, err := c.nodes[1].Put(t.Context(), data(5, 100)); !errs.Has(err, errs.NoQuorum) {
				t.Fatal(err)
			}
		})
		if d > 6*time.Second {
			t.Fatalf("no quorum took %v", d)
		}
		set(c, c.silent, 2, false)
		set(c, c.fails, 2, error(errs.E(errs.NoSpace, "put block", "", "full")))
		if _, err := c.nodes[1].Put(t.Context(), data(6, 100)); !errs.Has(err, errs.NoSpace) {
			t.Fatal(err)
		}
		set(c, c.dead, 3, false) // one full replica of three is not needed
		c.put(1, data(7, 100))
	})
}

// Two of three leave, and a writer does not know yet: they refuse, also what they
// write themselves, and it waits until it knows who has their places.
func TestPutFindsNewReplicas(t *testing.T) {
	for _, writer := range []ids.Node{1, 2, 100} {
		synctest.Test(t, func(t *testing.T) {
			c := newCluster(t, 5)
			c.replicas = []ids.Node{1, 2, 3}
			set(c, c.leaving, 2, true)
			set(c, c.leaving, 3, true)
			if writer == 100 { // nobody tells it
				began := time.Now()
				if _, err := c.nodes[writer].Put(t.Context(), data(1, 100)); !errs.Has(err, errs.NoQuorum) || !strings.Contains(err.Error(), "takes no blocks any more") {
					t.Fatal(err)
				}
				if d := time.Since(began); d < 5*time.Second || d > 10*time.Second {
					t.Fatalf("it gave up after %v", d)
				}
				ctx, cancel := context.WithTimeout(t.Context(), time.Second)
				defer cancel()
				if _, err := c.nodes[writer].Put(ctx, data(1, 100)); !errs.Has(err, errs.Timeout) {
					t.Fatal(err)
				}
			}
			time.AfterFunc(2*time.Second, func() {
				c.mu.Lock()
				defer c.mu.Unlock()
				c.replicas = []ids.Node{1, 4, 5}
			})
			began := time.Now()
			name, err := c.nodes[writer].Put(t.Context(), data(2, 100))
			if err != nil {
				t.Fatal(err)
			}
			synctest.Wait()
			if at := c.has(name); !slices.Equal(at, []ids.Node{1, 4, 5}) {
				t.Errorf("%v put it on %v", writer, at)
			}
			if d := time.Since(began); d < 2*time.Second || d > 3*time.Second {
				t.Errorf("it took %v", d)
			}
		})
	}
}

// A node whose place others get while it writes a block does not say that it has
// it: neither to a peer nor to its own writer.
func TestLeaverWhileItWrites(t *testing.T) {
	for _, writer := range []ids.Node{1, 2, 100} {
		synctest.Test(t, func(t *testing.T) {
			c := newCluster(t, 3)
			name := NameOf(c.nodes[1].cfg.Key, data(1, 100))
			for _, id := range []ids.Node{2, 3} {
				n := c.nodes[id]
				n.cfg.Leaving = func() bool { return n.store.Has(segment.Name(name)) }
			}
			if _, err := c.nodes[writer].Put(t.Context(), data(1, 100)); !errs.Has(err, errs.NoQuorum) || strings.Contains(err.Error(), "2 of 3 replicas have it") || !strings.Contains(err.Error(), "takes no blocks any more") {
				t.Errorf("%v wrote: %v", writer, err)
			}
			if at := c.has(name); !slices.Contains(at, 2) || !slices.Contains(at, 3) { // n1's copy is given up where the two have refused before
				t.Errorf("it was written on %v", at)
			}
		})
	}
}

func TestCancel(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCluster(t, 3)
		name := c.put(1, data(1, 100))
		for _, n := range c.replicas {
			set(c, c.silent, n, true)
		}
		ctx, cancel := context.WithCancel(t.Context())
		time.AfterFunc(time.Second, cancel)
		for _, f := range []func() error{
			func() error { _, err := c.nodes[100].Get(ctx, name); return err },
			func() error { _, err := c.nodes[100].Put(ctx, data(2, 100)); return err },
		} {
			if err := f(); !errs.Has(err, errs.Interrupted) {
				t.Fatal(err)
			}
		}
		ctx, cancel = context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if _, err := c.nodes[100].Get(ctx, name); !errs.Has(err, errs.Timeout) {
			t.Fatal(err)
		}
		synctest.Wait()
		if n := len(c.nodes[100].fetches); n != 0 {
			t.Fatalf("%d gets go on", n)
		}
	})
}

func TestGetHedgesAndShares(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCluster(t, 3)
		b := data(1, 1000)
		name := c.put(1, b)
		first := c.nodes[100].order(name)[0]
		set(c, c.silent, first, true)
		c.calls = map[ids.Node]int{}
		t0 := time.Now()
		var wg sync.WaitGroup
		for range 10 {
			wg.Go(func() { c.nodes[100].cfgGet(t, name, b) })
		}
		wg.Wait()
		if d := time.Since(t0); d != 200*time.Millisecond {
			t.Fatalf("took %v", d)
		}
		total := 0
		for _, n := range c.calls {
			total += n
		}
		if total != 2 {
			t.Fatalf("%d calls for ten gets of one block", total)
		}
		// A node believed dead is asked last, but asked.
		c.nodes[100].Client = c.client(c.nodes[100])
		set(c, c.silent, first, false)
		for _, n := range c.replicas {
			if n != first {
				set(c, c.fails, n, error(errs.E(errs.NotFound, "get", "", "gone")))
			}
		}
		c.wantGet(100, name, b)
		// Nobody has it; or nobody answers.
		if _, err := c.nodes[100].Get(t.Context(), volume.BlockName{1}); !errs.Has(err, errs.IO) {
			t.Fatal(err)
		}
		set(c, c.dead, first, true)
		if _, err := c.nodes[100].Get(t.Context(), volume.BlockName{2}); !errs.Has(err, errs.Unavailable) {
			t.Fatal(err)
		}
	})
}

func (n *testNode) cfgGet(t *testing.T, name volume.BlockName, want []byte) {
	if got, err := n.Get(t.Context(), name); err != nil || !bytes.Equal(got, want) {
		t.Errorf("get: %v", err)
	}
}

func TestBadCopies(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCluster(t, 3)
		stop := c.run()
		defer stop()
		b := data(1, 5000)
		name := c.put(1, b)

		// The own copy is bad: replaced and counted.
		c.spoil(2, b)
		c.wantGet(2, name, b)
		synctest.Wait()
		if st := c.nodes[2].Stats(); st.BadLocal != 1 || st.Repaired != 1 {
			t.Fatalf("%+v", st)
		}
		if got, err := c.nodes[2].store.Get(segment.Name(name), nil); err != nil || !bytes.Equal(got, b) {
			t.Fatalf("not replaced: %v", err)
		}

		// Bytes that are not the block although the checksum is right.
		b2 := data(2, 5000)
		name2 := NameOf([32]byte{42}, b2)
		if err := c.nodes[2].store.Put(segment.Name(name2), data(3, 5000)); err != nil {
			t.Fatal(err)
		}
		c.nodes[1].store.Put(segment.Name(name2), b2)
		c.wantGet(2, name2, b2)
		synctest.Wait()
		if got, err := c.nodes[2].store.Get(segment.Name(name2), nil); err != nil || !bytes.Equal(got, b2) {
			t.Fatalf("not replaced: %v", err)
		}

		// A peer whose copy is bad does not send it, and mends it.
		b3 := data(4, 5000)
		name3 := c.put(1, b3)
		first := c.nodes[100].order(name3)[0]
		c.spoil(first, b3)
		c.nodes[100].cache.init(0)
		c.wantGet(100, name3, b3)
		time.Sleep(time.Second)
		synctest.Wait()
		if st := c.nodes[first].Stats(); st.BadLocal == 0 || !c.nodes[first].store.Has(segment.Name(name3)) {
			t.Fatalf("%+v", st)
		}

		// A lying peer is passed over, and cannot store.
		b4 := data(5, 5000)
		name4 := c.put(1, b4)
		liar := c.nodes[100].order(name4)[0]
		set(c, c.lies, liar, true)
		c.wantGet(100, name4, b4)
		if st := c.nodes[100].Stats(); st.BadPeer != 1 {
			t.Fatalf("%+v", st)
		}
		_, err := endpoint{c, 100}.Call(t.Context(), 1, MethodPut, nameMsg{volume.BlockName{9}}, b4, nil)
		if !errs.Has(err, errs.Corrupt) || c.nodes[1].store.Has(segment.Name{9}) {
			t.Fatal(err)
		}
	})
}

func TestRepair(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCluster(t, 3)
		stop := c.run()
		defer stop()
		time.Sleep(time.Minute)

		// A block the metadata names and that nobody has: missing, then found.
		b := data(1, 100)
		lost := NameOf([32]byte{42}, b)
		c.nodes[1].Ensure([]volume.BlockName{lost, lost})
		if n := c.nodes[1].Missing(); n != 0 {
			t.Fatalf("%d missing before it had time to come", n)
		}
		time.Sleep(10 * time.Second)
		synctest.Wait()
		if n := c.nodes[1].Missing(); n != 1 {
			t.Fatalf("%d missing", n)
		}
		c.nodes[2].store.Put(segment.Name(lost), b)
		time.Sleep(time.Minute)
		synctest.Wait()
		if n := c.nodes[1].Missing(); n != 0 || !c.nodes[1].store.Has(segment.Name(lost)) {
			t.Fatalf("%d missing", n)
		}

		// A node that was away catches up by the walk when it sees its peers again.
		set(c, c.dead, 3, true)
		var names []volume.BlockName
		for i := range 50 {
			name := c.put(1, data(10+i, 2000))
			names = append(names, name)
			c.mu.Lock()
			c.named[name] = true
			c.mu.Unlock()
		}
		time.Sleep(10 * time.Second)
		for _, n := range names {
			if at := c.has(n); len(at) != 2 {
				t.Fatalf("on %v while one is dead", at)
			}
		}
		set(c, c.dead, 3, false)
		// It saw its peers all the time in this test, so let one go and come.
		set(c, c.dead, 1, true)
		time.Sleep(3 * time.Second)
		set(c, c.dead, 1, false)
		time.Sleep(30 * time.Second)
		synctest.Wait()
		for _, n := range names {
			if at := c.has(n); len(at) != 3 {
				t.Fatalf("on %v afterwards", at)
			}
		}
		if st := c.nodes[3].Stats(); st.Repaired != 50 || st.Missing != 0 || st.Walks < 2 {
			t.Fatalf("%+v", st)
		}
	})
}

func TestRepairOverflowWalks(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCluster(t, 3)
		b := data(1, 100)
		name := NameOf([32]byte{42}, b)
		c.named[name] = true
		c.nodes[2].store.Put(segment.Name(name), b)
		n1 := c.nodes[1]
		stop := c.run()
		time.Sleep(30 * time.Second)
		n1.store.Forget(segment.Name(name))
		walks := n1.Stats().Walks
		n1.repair.mu.Lock()
		for i := range maxWanted {
			var n volume.BlockName
			binary.LittleEndian.PutUint32(n[:], uint32(i))
			n1.repair.wanted[n] = &wanted{name: n}
		}
		n1.repair.mu.Unlock()
		n1.Ensure([]volume.BlockName{name}) // no room
		time.Sleep(30 * time.Second)
		synctest.Wait()
		if n1.Stats().Walks != walks || n1.store.Has(segment.Name(name)) {
			t.Fatal("walked while there was no room")
		}
		n1.repair.mu.Lock()
		clear(n1.repair.wanted)
		n1.repair.mu.Unlock()
		time.Sleep(30 * time.Second)
		synctest.Wait()
		if n1.Stats().Walks == walks || !n1.store.Has(segment.Name(name)) {
			t.Fatal("not walked")
		}
		stop()
		if _, err := n1.Get(t.Context(), volume.BlockName{1}); !errs.Has(err, errs.Unavailable) {
			t.Fatalf("get after the end: %v", err)
		}
		if _, err := n1.Put(t.Context(), b); err == nil {
			t.Fatal("put after the end")
		}
	})
}

func TestOneNode(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCluster(t, 1)
		b := data(1, 100)
		c.wantGet(1, c.put(1, b), b)
		if st := c.nodes[1].Stats(); st.Degraded != 0 {
			t.Fatalf("%+v", st)
		}
	})
}

func TestCacheIsBounded(t *testing.T) {
	var c cache
	c.init(10_000)
	for i := range 100 {
		c.put(volume.BlockName{byte(i)}, make([]byte, 1000))
		c.get(volume.BlockName{0})
	}
	if _, ok := c.get(volume.BlockName{0}); !ok || c.size > 10_000 || c.recent.Len() != len(c.byName) || len(c.byName) < 5 {
		t.Fatalf("%v: %d bytes, %d entries", ok, c.size, len(c.byName))
	}
	c.put(volume.BlockName{200}, make([]byte, 20_000))
	if c.size > 10_000 {
		t.Fatal(c.size)
	}
}

// FuzzServe gives the handlers any request.
func FuzzServe(f *testing.F) {
	f.Add(wire.MustMarshal(nameMsg{volume.BlockName{1}}), []byte("x"))
	f.Add([]byte{}, make([]byte, 64))
	store, err := segment.Open(segment.Config{Dir: f.TempDir()})
	if err != nil {
		f.Fatal(err)
	}
	f.Cleanup(func() { store.Close() })
	c := &cluster{handlers: map[ids.Node]map[string]handler{}}
	New(Config{Self: 1, RPC: endpoint{c, 1}, Local: store, Replicas: func() []ids.Node { return nil }, Alive: func(ids.Node) bool { return false }})
	f.Fuzz(func(t *testing.T, req, data []byte) {
		for method, h := range c.handlers[1] {
			if _, out, err := h(t.Context(), 2, req, data); err == nil && method == MethodHas && len(out) != (len(data)/32+7)/8 {
				t.Fatalf("%d bytes for %d", len(out), len(data))
			}
		}
	})
}

func BenchmarkName(b *testing.B) {
	d := data(1, 1<<20)
	b.SetBytes(1 << 20)
	for b.Loop() {
		NameOf([32]byte{1}, d)
	}
}
