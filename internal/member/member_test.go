package member

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/unum-os/unum/internal/errs"
	"github.com/unum-os/unum/internal/identity"
	"github.com/unum-os/unum/internal/ids"
	"github.com/unum-os/unum/internal/rpc"
	"github.com/unum-os/unum/internal/wire"
)

// severed is an endpoint whose cable can be pulled without anybody being told.
type severed struct {
	*rpc.Endpoint
	cut atomic.Bool
}

func (s *severed) Cast(to ids.Node, method string, req any, data []byte) error {
	if s.cut.Load() {
		return nil
	}
	return s.Endpoint.Cast(to, method, req, data)
}

func (s *severed) HandleCast(method string, h func(from ids.Node, req, data []byte)) {
	s.Endpoint.HandleCast(method, func(from ids.Node, req, data []byte) {
		if !s.cut.Load() {
			h(from, req, data)
		}
	})
}

func (s *severed) Dial(ctx context.Context, to ids.Node, service string) (net.Conn, error) {
	if s.cut.Load() {
		return nil, errors.New("cut")
	}
	return s.Endpoint.Dial(ctx, to, service)
}

func (s *severed) HandleStream(service string, h func(ctx context.Context, from ids.Node, c net.Conn)) {
	s.Endpoint.HandleStream(service, func(ctx context.Context, from ids.Node, c net.Conn) {
		if !s.cut.Load() {
			h(ctx, from, c)
		}
	})
}

type cluster struct {
	t  *testing.T
	ca *identity.CA
	mu sync.Mutex
	at map[ids.Node]string
}

func newCluster(t *testing.T) *cluster {
	ca, err := identity.NewCA("test")
	if err != nil {
		t.Fatal(err)
	}
	return &cluster{t: t, ca: ca, at: make(map[ids.Node]string)}
}

type machine struct {
	*Members
	wire *severed
	stop func() // at once, no farewell

	mu    sync.Mutex
	log   []string
	words map[string]string
}

func (c *cluster) start(id ids.Node, join ...ids.Node) *machine {
	c.t.Helper()
	key, csr, err := identity.NewRequest()
	if err != nil {
		c.t.Fatal(err)
	}
	cert, err := c.ca.Sign(csr, id, identity.RoleStore, time.Now())
	if err != nil {
		c.t.Fatal(err)
	}
	h, err := identity.NewHolder(c.ca.Trust(), cert, key)
	if err != nil {
		c.t.Fatal(err)
	}
	c.mu.Lock()
	listen := c.at[id]
	c.mu.Unlock()
	if listen == "" {
		listen = "127.0.0.1:0"
	}
	quiet := slog.New(slog.DiscardHandler)
	e, err := rpc.New(rpc.Config{Self: id, Cert: h, ListenAddr: listen, Log: quiet, Resolve: func(n ids.Node) (string, bool) {
		c.mu.Lock()
		defer c.mu.Unlock()
		a, ok := c.at[n]
		return a, ok
	}})
	if err != nil {
		c.t.Fatal(err)
	}
	c.mu.Lock()
	c.at[id] = e.Addr().String()
	c.mu.Unlock()
	x := &machine{wire: &severed{Endpoint: e}, words: make(map[string]string)}
	x.Members, err = New(Config{Self: id, Meta: []byte("meta of " + id.String()), RPC: x.wire, Log: quiet})
	if err != nil {
		c.t.Fatal(err)
	}
	x.OnChange(func(n ids.Node, alive bool) {
		x.mu.Lock()
		x.log = append(x.log, fmt.Sprint(n, alive))
		x.mu.Unlock()
	})
	x.OnBroadcast(1, func(from ids.Node, p []byte) {
		x.mu.Lock()
		x.words[from.String()] = string(p)
		x.mu.Unlock()
	})
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() {
		if err := e.Run(ctx); err != nil {
			c.t.Errorf("rpc of %v: %v", id, err)
		}
	})
	wg.Go(func() {
		if err := x.Run(ctx); err != nil {
			c.t.Errorf("gossip of %v: %v", id, err)
		}
	})
	x.stop = func() { cancel(); wg.Wait() }
	c.t.Cleanup(x.stop)
	if err := x.Join(ctx, join); err != nil {
		c.t.Fatal(err)
	}
	return x
}

func (x *machine) heard(from ids.Node) string {
	x.mu.Lock()
	defer x.mu.Unlock()
	return x.words[from.String()]
}

// soon waits until f holds and returns how long it took; more than limit fails.
func soon(t *testing.T, limit time.Duration, what string, f func() bool) time.Duration {
	t.Helper()
	start := time.Now()
	for !f() {
		if time.Since(start) > limit {
			t.Fatalf("not within %v: %s", limit, what)
		}
		time.Sleep(2 * time.Millisecond)
	}
	return time.Since(start)
}

func sees(x *machine, ns ...ids.Node) func() bool {
	return func() bool { return slices.Equal(x.Alive(), ns) }
}

func TestLife(t *testing.T) {
	c := newCluster(t)
	a := c.start(1)
	b := c.start(2, 1)
	d := c.start(3, 1)
	for _, x := range []*machine{a, b, d} {
		soon(t, 2*time.Second, "three converge", sees(x, 1, 2, 3))
	}
	if got := string(a.Meta(3)); got != "meta of n3" {
		t.Fatalf("meta %q", got)
	}

	// A broadcast reaches all, newer replaces older, and one that comes late hears it.
	for i := range 20 {
		if err := b.Broadcast(1, fmt.Append(nil, "load ", i)); err != nil {
			t.Fatal(err)
		}
	}
	took := soon(t, time.Second, "broadcast arrives", func() bool { return a.heard(2) == "load 19" && d.heard(2) == "load 19" })
	t.Logf("broadcast took %v", took)
	late := c.start(4, 1)
	soon(t, 2*time.Second, "the late one hears it", func() bool { return late.heard(2) == "load 19" })
	if err := b.Broadcast(1, make([]byte, MaxPayload+1)); !errs.Has(err, errs.TooLarge) {
		t.Fatal(err)
	}

	late.stop()
	took = soon(t, 4*time.Second, "end of n4", func() bool { return !a.IsAlive(4) && !b.IsAlive(4) && !d.IsAlive(4) })
	t.Logf("death without a farewell took %v", took)

	// A killed node is dead soon, and alive again soon after its return.
	d.stop()
	took = soon(t, 4*time.Second, "death of n3", func() bool { return !a.IsAlive(3) && !b.IsAlive(3) })
	t.Logf("death after a kill took %v", took)
	if ago, ok := a.Dead()[3]; !ok || ago > took+time.Minute || len(a.Dead()) != 2 {
		t.Fatalf("dead: %v", a.Dead())
	}
	if a.deaths.Load() != 2 || a.returns.Load() != 3 || a.suspicions.Load()+b.suspicions.Load() == 0 {
		t.Fatalf("counted: %d deaths, %d returns, %d and %d suspicions", a.deaths.Load(), a.returns.Load(), a.suspicions.Load(), b.suspicions.Load())
	}
	d = c.start(3, 1, 2)
	took = soon(t, 2*time.Second, "return of n3", func() bool { return a.IsAlive(3) && b.IsAlive(3) && sees(d, 1, 2, 3)() })
	t.Logf("return took %v", took)
	if _, ok := a.Dead()[3]; ok {
		t.Fatal("n3 is alive and dead")
	}

	// So is one that returns before it was missed, and its words count.
	d.stop()
	d = c.start(3, 1, 2)
	if err := d.Broadcast(1, []byte("again")); err != nil {
		t.Fatal(err)
	}
	soon(t, 2*time.Second, "words after a restart", func() bool { return a.heard(3) == "again" && b.heard(3) == "again" })
	soon(t, 2*time.Second, "n3 alive", func() bool { return a.IsAlive(3) && b.IsAlive(3) && sees(d, 1, 2, 3)() })

	// A cut cable tells nobody; when it is mended all find each other.
	d.wire.cut.Store(true)
	took = soon(t, 5*time.Second, "death of the cut off n3", func() bool { return !a.IsAlive(3) && !b.IsAlive(3) })
	t.Logf("death after a cut took %v", took)
	soon(t, 5*time.Second, "n3 believes it is alone", sees(d, 3))
	d.wire.cut.Store(false)
	took = soon(t, 4*time.Second, "n3 is back", func() bool { return a.IsAlive(3) && b.IsAlive(3) && sees(d, 1, 2, 3)() })
	t.Logf("return after a cut took %v", took)
}

func TestJoinNobody(t *testing.T) {
	c := newCluster(t)
	a := c.start(1)
	if err := a.Join(context.Background(), []ids.Node{1}); err != nil {
		t.Fatalf("alone: %v", err)
	}
	if err := a.Join(context.Background(), []ids.Node{7}); !errs.Has(err, errs.Unavailable) {
		t.Fatalf("nobody there: %v", err)
	}
	c.start(7) // told of nobody: n1 finds it, its seed
	soon(t, 3*time.Second, "the seed is found", sees(a, 1, 7))
}

// An earlier life's words, said by a clock that was ahead, do not silence this one.
func TestWordsOfAnEarlierLife(t *testing.T) {
	e := &fakeRPC{}
	m, err := New(Config{Self: 1, RPC: e, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	if err := m.Broadcast(1, []byte("new")); err != nil {
		t.Fatal(err)
	}
	old := m.words[topic{1, 1}].Seq + 1e18
	delegate{m}.NotifyMsg(wire.MustMarshal(word{Node: 1, Kind: 1, Seq: old, Payload: []byte("old")}))
	if w := m.words[topic{1, 1}]; w.Seq <= old || string(w.Payload) != "new" {
		t.Fatalf("%+v", w)
	}
	if err := m.Broadcast(1, []byte("newer")); err != nil {
		t.Fatal(err)
	}
	if w := m.words[topic{1, 1}]; w.Seq <= old+1 {
		t.Fatalf("%+v", w)
	}
}

// A peer cannot fill this node with the words of nodes that do not exist; those of
// the living are taken all the same.
func TestWordsOfNobody(t *testing.T) {
	m, err := New(Config{Self: 1, RPC: &fakeRPC{}, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	m.alive[5000] = nil
	for n := range ids.Node(5000) {
		delegate{m}.NotifyMsg(wire.MustMarshal(word{Node: n + 2, Kind: 1, Seq: 1, Payload: make([]byte, 100)}))
	}
	if len(m.words) > maxStrange+1 || m.words[topic{5000, 1}] == nil || m.words[topic{2, 1}] == nil {
		t.Fatalf("%d words kept", len(m.words))
	}
}

type fakeRPC struct{}

func (*fakeRPC) Cast(ids.Node, string, any, []byte) error                 { return nil }
func (*fakeRPC) HandleCast(string, func(ids.Node, []byte, []byte))        {}
func (*fakeRPC) Dial(context.Context, ids.Node, string) (net.Conn, error) { return nil, net.ErrClosed }
func (*fakeRPC) HandleStream(string, func(context.Context, ids.Node, net.Conn)) {
}

func TestAddress(t *testing.T) {
	for _, n := range []ids.Node{1, 2, 1 << 40, 1<<64 - 1} {
		if got, ok := nodeOf(hostPort(n)); !ok || got != n {
			t.Errorf("%v became %v", n, got)
		}
	}
	for _, s := range []string{"", "10.0.0.1:7400", "[::1]:7400", hostPort(0), "n2"} {
		if n, ok := nodeOf(s); ok {
			t.Errorf("%q is %v", s, n)
		}
	}
}

func FuzzWords(f *testing.F) {
	f.Add(wire.MustMarshal(word{Node: 2, Kind: 1, Seq: 3, Payload: []byte("x")}), false)
	f.Add(wire.MustMarshal([]word{{Node: 2, Kind: 1, Seq: 3}}), true)
	f.Fuzz(func(t *testing.T, b []byte, state bool) {
		m, err := New(Config{Self: 1, RPC: &fakeRPC{}, Log: slog.New(slog.DiscardHandler)})
		if err != nil {
			t.Fatal(err)
		}
		if state {
			delegate{m}.MergeRemoteState(b, false)
		} else {
			delegate{m}.NotifyMsg(b)
		}
		delegate{m}.LocalState(false)
	})
}
