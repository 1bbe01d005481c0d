package rpc

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/unum-os/unum/internal/clock"
	"github.com/unum-os/unum/internal/errs"
	"github.com/unum-os/unum/internal/identity"
	"github.com/unum-os/unum/internal/ids"
)

// net of endpoints over loopback with real TLS.
type lan struct {
	t   testing.TB
	ca  *identity.CA
	mu  sync.Mutex
	at  map[ids.Node]string
	out map[ids.Node]bool // not allowed
	end map[ids.Node]*running

	clock  clock.Clock                       // of those started later
	permit func(identity.Peer, string) error // of those started later; nil: all
}

type running struct {
	*Endpoint
	stop func()
}

func newLAN(t testing.TB) *lan {
	ca, err := identity.NewCA("test")
	if err != nil {
		t.Fatal(err)
	}
	n := &lan{t: t, ca: ca, at: make(map[ids.Node]string), out: make(map[ids.Node]bool), end: make(map[ids.Node]*running)}
	t.Cleanup(func() {
		for _, r := range n.end {
			r.stop()
		}
	})
	return n
}

func holder(t testing.TB, ca *identity.CA, n ids.Node, now time.Time) *identity.Holder {
	return holderAs(t, ca, n, identity.RoleStore, now)
}

func holderAs(t testing.TB, ca *identity.CA, n ids.Node, role identity.Role, now time.Time) *identity.Holder {
	key, csr, err := identity.NewRequest()
	if err != nil {
		t.Fatal(err)
	}
	cert, err := ca.Sign(csr, n, role, now)
	if err != nil {
		t.Fatal(err)
	}
	h, err := identity.NewHolder(ca.Trust(), cert, key)
	if err != nil {
		t.Fatal(err)
	}
	return h
}

func (n *lan) config(id ids.Node, h *identity.Holder) Config {
	n.mu.Lock()
	addr := n.at[id]
	n.mu.Unlock()
	if addr == "" {
		addr = "127.0.0.1:0"
	}
	return Config{
		Self: id, Cert: h, ListenAddr: addr, Log: slog.New(slog.DiscardHandler), Permit: n.permit, Clock: n.clock,
		Resolve: func(to ids.Node) (string, bool) {
			n.mu.Lock()
			defer n.mu.Unlock()
			a, ok := n.at[to]
			return a, ok
		},
		Allowed: func(p identity.Peer) bool {
			n.mu.Lock()
			defer n.mu.Unlock()
			return !n.out[p.Node]
		},
	}
}

// start runs node id; setup registers handlers before it accepts.
func (n *lan) start(id ids.Node, h *identity.Holder, setup func(*Endpoint)) *running {
	n.t.Helper()
	if h == nil {
		h = holder(n.t, n.ca, id, time.Now())
	}
	e, err := New(n.config(id, h))
	if err != nil {
		n.t.Fatal(err)
	}
	n.mu.Lock()
	n.at[id] = e.Addr().String()
	n.mu.Unlock()
	if setup != nil {
		setup(e)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- e.Run(ctx) }()
	r := &running{Endpoint: e, stop: sync.OnceFunc(func() {
		cancel()
		select {
		case err := <-ended:
			if err != nil {
				n.t.Errorf("run %v: %v", id, err)
			}
		case <-time.After(10 * time.Second):
			n.t.Errorf("%v does not stop", id)
		}
	})}
	n.end[id] = r
	return r
}

type note struct {
	N uint64 `cbor:"1,keyasint,omitempty"`
	S string `cbor:"2,keyasint,omitempty"`
}

func echo(e *Endpoint) {
	e.Handle("echo", func(_ context.Context, from ids.Node, req, data []byte) (any, []byte, error) {
		return note{N: uint64(from), S: string(req)}, data, nil
	})
	e.Handle("fail", func(context.Context, ids.Node, []byte, []byte) (any, []byte, error) {
		return nil, nil, errs.E(errs.NotEmpty, "remove", "/x", "has children").WithRemedy("remove them")
	})
	e.Bulk("bulk")
	e.Handle("bulk", func(context.Context, ids.Node, []byte, []byte) (any, []byte, error) {
		return nil, bytes.Repeat([]byte{7}, MaxData), nil
	})
}

func within(t testing.TB, d time.Duration) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), d)
	t.Cleanup(cancel)
	return ctx
}

func until(t testing.TB, d time.Duration, what string, f func() bool) {
	t.Helper()
	for end := time.Now().Add(d); !f(); {
		if time.Now().After(end) {
			t.Fatalf("not within %v: %s", d, what)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

func TestCalls(t *testing.T) {
	n := newLAN(t)
	var all []*running
	for id := ids.Node(1); id <= 3; id++ {
		all = append(all, n.start(id, nil, echo))
	}
	ctx := within(t, 20*time.Second)
	for _, from := range all {
		for to := ids.Node(1); to <= 3; to++ {
			for _, size := range []int{0, 10, bulkFrom + 1, MaxData} {
				var got note
				data := bytes.Repeat([]byte{byte(to)}, size)
				back, err := from.Call(ctx, to, "echo", note{N: 5}, data, &got)
				if err != nil || got.N != uint64(from.Self()) || !bytes.Equal(back, data) {
					t.Fatalf("%v to %v, %d bytes: %+v, %d bytes back, %v", from.Self(), to, size, got, len(back), err)
				}
			}
			_, err := from.Call(ctx, to, "fail", nil, nil, nil)
			if !errs.Has(err, errs.NotEmpty) || err.Error() != "remove /x: has children\ntry: remove them" {
				t.Fatalf("error came back as %v (%v)", err, errs.ClassOf(err))
			}
			if back, err := from.Call(ctx, to, "bulk", nil, nil, nil); err != nil || len(back) != MaxData {
				t.Fatalf("bulk: %d bytes, %v", len(back), err)
			}
			if _, err := from.Call(ctx, to, "none", nil, nil, nil); !errs.Has(err, errs.NotSupported) {
				t.Fatalf("no such method: %v", err)
			}
			if _, err := from.Call(ctx, to, "echo", nil, make([]byte, MaxData+1), nil); !errs.Has(err, errs.TooLarge) {
				t.Fatalf("too large: %v", err)
			}
		}
	}
	if _, err := all[0].Call(ctx, 9, "echo", nil, nil, nil); !errs.Has(err, errs.Unavailable) {
		t.Fatalf("unknown node: %v", err)
	}
}

func TestConcurrentCalls(t *testing.T) {
	n := newLAN(t)
	a := n.start(1, nil, nil)
	const callers = 300
	var inside atomic.Int64
	full := make(chan struct{})
	n.start(2, nil, func(e *Endpoint) {
		e.Handle("meet", func(ctx context.Context, _ ids.Node, req, data []byte) (any, []byte, error) {
			if inside.Add(1) == callers {
				close(full)
			}
			select {
			case <-full:
				return nil, data, nil
			case <-ctx.Done():
				return nil, nil, ctx.Err()
			}
		})
	})
	ctx := within(t, 20*time.Second)
	var wg sync.WaitGroup
	for i := range callers {
		wg.Go(func() {
			want := fmt.Sprint(i)
			got, err := a.Call(ctx, 2, "meet", nil, []byte(want), nil)
			if err != nil || string(got) != want {
				t.Errorf("%q: %q %v", want, got, err)
			}
		})
	}
	wg.Wait()
}

func TestCancelAndDeadline(t *testing.T) {
	n := newLAN(t)
	a := n.start(1, nil, nil)
	began, ended := make(chan struct{}, 1), make(chan error, 1)
	n.start(2, nil, func(e *Endpoint) {
		e.Handle("wait", func(ctx context.Context, _ ids.Node, _, _ []byte) (any, []byte, error) {
			began <- struct{}{}
			<-ctx.Done()
			ended <- ctx.Err()
			return nil, nil, ctx.Err()
		})
	})
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	go func() { <-began; cancel() }()
	if _, err := a.Call(ctx, 2, "wait", nil, nil, nil); !errs.Has(err, errs.Interrupted) {
		t.Fatalf("cancelled: %v", err)
	}
	if err := <-ended; err != context.Canceled {
		t.Fatalf("handler: %v", err)
	}
	if _, err := a.Call(within(t, 100*time.Millisecond), 2, "wait", nil, nil, nil); !errs.Has(err, errs.Timeout) {
		t.Fatalf("deadline: %v", err)
	}
	<-began
	<-ended
}

func TestCastsKeepOrder(t *testing.T) {
	n := newLAN(t)
	a := n.start(1, nil, nil)
	got := make(chan string, 1000)
	take := func(e *Endpoint) {
		e.HandleCast("say", func(from ids.Node, _, data []byte) { got <- fmt.Sprint(from, string(data)) })
	}
	take(a.Endpoint)
	n.start(2, nil, take)
	for _, to := range []ids.Node{1, 2} {
		for i := range 500 {
			if err := a.Cast(to, "say", nil, []byte(fmt.Sprint(i))); err != nil {
				t.Fatal(err)
			}
		}
		for i := range 500 {
			select {
			case s := <-got:
				if s != fmt.Sprintf("n1%d", i) {
					t.Fatalf("to %v: got %q at %d", to, s, i)
				}
			case <-time.After(5 * time.Second):
				t.Fatalf("cast %d to %v lost", i, to)
			}
		}
	}
}

// relay stands between nodes, so that a test can cut the cable without telling
// either end.
type relay struct {
	addr string
	cut  atomic.Bool
}

func newRelay(t testing.TB, to string) *relay {
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	r := &relay{addr: lis.Addr().String()}
	var wg sync.WaitGroup
	var mu sync.Mutex
	var conns []net.Conn
	t.Cleanup(func() {
		lis.Close()
		mu.Lock()
		for _, c := range conns {
			c.Close()
		}
		mu.Unlock()
		wg.Wait()
	})
	pump := func(dst, src net.Conn) {
		defer dst.Close()
		b := make([]byte, 32<<10)
		for {
			k, err := src.Read(b)
			if err != nil {
				return
			}
			if r.cut.Load() {
				continue
			}
			if _, err := dst.Write(b[:k]); err != nil {
				return
			}
		}
	}
	wg.Go(func() {
		for {
			c, err := lis.Accept()
			if err != nil {
				return
			}
			d, err := net.Dial("tcp", to)
			if err != nil {
				c.Close()
				continue
			}
			mu.Lock()
			conns = append(conns, c, d)
			mu.Unlock()
			wg.Go(func() { pump(d, c) })
			wg.Go(func() { pump(c, d) })
		}
	})
	return r
}

func TestDeadPeer(t *testing.T) {
	n := newLAN(t)
	a := n.start(1, nil, nil)
	var mu sync.Mutex
	var told []string
	a.OnPeer(func(p ids.Node, up bool) {
		mu.Lock()
		told = append(told, fmt.Sprint(p, up))
		mu.Unlock()
	})
	block := make(chan struct{})
	n.start(2, nil, func(e *Endpoint) {
		echo(e)
		e.Handle("hang", func(ctx context.Context, _ ids.Node, _, _ []byte) (any, []byte, error) {
			select { // not woken by the caller's death: pings must do without handlers
			case <-block:
			case <-time.After(5 * time.Second):
			}
			return nil, nil, nil
		})
		e.HandleStream("sink", func(_ context.Context, _ ids.Node, c net.Conn) { io.Copy(io.Discard, c) })
	})
	defer close(block)
	r := newRelay(t, n.at[2])
	n.mu.Lock()
	n.at[2] = r.addr
	n.mu.Unlock()
	ctx := within(t, 30*time.Second)
	if _, err := a.Call(ctx, 2, "echo", nil, nil, nil); err != nil {
		t.Fatal(err)
	}
	c, err := a.Dial(ctx, 2, "sink")
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if !a.Connected(2) {
		t.Fatal("not connected")
	}
	failed := make(chan error, 2)
	go func() {
		_, err := a.Call(ctx, 2, "hang", nil, nil, nil)
		failed <- err
	}()
	go func() {
		_, err := c.Read(make([]byte, 1))
		failed <- err
	}()
	r.cut.Store(true)
	start := time.Now()
	for range 2 {
		if err := <-failed; !errs.Has(err, errs.Unavailable) {
			t.Fatalf("dead peer: %v", err)
		}
	}
	if d := time.Since(start); d > 3500*time.Millisecond {
		t.Fatalf("dead peer found after %v", d)
	}
	// Still away, the wire takes connections and says nothing: quick all the same
	// after the first attempt.
	a.Call(ctx, 2, "echo", nil, nil, nil)
	start = time.Now()
	if _, err := a.Call(ctx, 2, "echo", nil, nil, nil); !errs.Has(err, errs.Unavailable) || time.Since(start) > time.Second {
		t.Fatalf("away: %v after %v", err, time.Since(start))
	}
	until(t, 5*time.Second, "told down", func() bool {
		mu.Lock()
		defer mu.Unlock()
		return fmt.Sprint(told) == "[n2 true n2 false]"
	})
	r.cut.Store(false)
	until(t, 5*time.Second, "back", func() bool { _, err := a.Call(ctx, 2, "echo", nil, nil, nil); return err == nil })
}

func TestRestart(t *testing.T) {
	n := newLAN(t)
	a := n.start(1, nil, nil)
	b := n.start(2, nil, echo)
	ctx := within(t, 20*time.Second)
	if _, err := a.Call(ctx, 2, "echo", nil, nil, nil); err != nil {
		t.Fatal(err)
	}
	b.stop()
	start := time.Now()
	if _, err := a.Call(ctx, 2, "echo", nil, nil, nil); !errs.Has(err, errs.Unavailable) || time.Since(start) > time.Second {
		t.Fatalf("stopped peer: %v after %v", err, time.Since(start))
	}
	n.start(2, nil, echo)
	until(t, 2*time.Second, "restarted peer answers", func() bool { _, err := a.Call(ctx, 2, "echo", nil, nil, nil); return err == nil })
}
