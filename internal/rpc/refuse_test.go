package rpc

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hashicorp/yamux"

	"github.com/unum-os/unum/internal/errs"
	"github.com/unum-os/unum/internal/identity"
	"github.com/unum-os/unum/internal/ids"
	"github.com/unum-os/unum/internal/wire"
)

func TestRefusals(t *testing.T) {
	n := newLAN(t)
	n.start(1, nil, echo)
	ctx := within(t, 20*time.Second)
	other, err := identity.NewCA("test")
	if err != nil {
		t.Fatal(err)
	}
	refusedAs := func(c errs.Class, what string, e *running, to ids.Node) {
		t.Helper()
		if _, err := e.Call(ctx, to, "echo", nil, nil, nil); !errs.Has(err, c) {
			t.Errorf("%s: call: %v (%v)", what, err, errs.ClassOf(err))
		}
		if _, err := e.Dial(ctx, to, "x"); !errs.Has(err, c) {
			t.Errorf("%s: dial: %v", what, err)
		}
	}
	refused := func(what string, e *running, to ids.Node) {
		t.Helper()
		refusedAs(errs.Unauthorized, what, e, to)
	}
	foreign := n.start(2, holder(t, other, 2, time.Now()), echo)
	refused("another authority", foreign, 1)
	expired := n.start(3, holder(t, n.ca, 3, time.Now().Add(-2*identity.NodeValidity)), echo)
	refused("expired client", expired, 1)
	fine := n.start(4, nil, echo)
	refused("expired server", fine, 3)
	refused("server of another authority", fine, 2)

	n.mu.Lock()
	n.at[5] = n.at[1]
	n.mu.Unlock()
	refusedAs(errs.Unavailable, "another node than meant", fine, 5) // who was there has gone

	// A member that is removed loses its connections and gets no new ones.
	if _, err := fine.Call(ctx, 1, "echo", nil, nil, nil); err != nil {
		t.Fatal(err)
	}
	n.mu.Lock()
	n.out[4] = true
	n.mu.Unlock()
	until(t, 3*time.Second, "removed member is refused", func() bool {
		_, err := fine.Call(ctx, 1, "echo", nil, nil, nil)
		return errs.Has(err, errs.Unauthorized)
	})
}

func TestNoCertificate(t *testing.T) {
	n := newLAN(t)
	n.start(1, nil, echo)
	for _, protos := range [][]string{{alpn[laneCall]}, {alpnJoin, alpn[laneCall]}, {"h2"}, nil, {alpnJoin}} {
		c, err := tls.Dial("tcp", n.at[1], &tls.Config{InsecureSkipVerify: true, NextProtos: protos})
		if err != nil {
			continue
		}
		c.SetDeadline(time.Now().Add(5 * time.Second))
		c.Write([]byte("GET / HTTP/1.0\r\n\r\n"))
		if b, err := io.ReadAll(c); len(b) > 0 || isTimeout(err) {
			t.Errorf("%q: read %q, %v", protos, b, err)
		}
		c.Close()
	}
}

func isTimeout(err error) bool {
	ne, ok := err.(net.Error)
	return ok && ne.Timeout()
}

func TestGarbageDisturbsNobody(t *testing.T) {
	n := newLAN(t)
	n.start(1, nil, echo)
	a := n.start(2, nil, nil)
	ctx := within(t, 20*time.Second)
	src := rand.NewChaCha8([32]byte{2})
	var idle []net.Conn
	for i := range maxHandshakesFrom + 20 { // more than the gate lets in
		c, err := net.Dial("tcp", n.at[1])
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		if i%2 == 0 {
			b := make([]byte, 512)
			src.Read(b)
			c.Write(b)
		}
		idle = append(idle, c)
	}
	// Calls get through as soon as the gate has closed the idle ones.
	until(t, handshakeLimit+3*time.Second, "a call gets through", func() bool {
		_, err := a.Call(ctx, 1, "echo", nil, nil, nil)
		return err == nil
	})
	for _, c := range idle {
		c.SetReadDeadline(time.Now().Add(handshakeLimit + time.Second))
		if _, err := io.ReadAll(c); isTimeout(err) {
			t.Fatal("an idle connection was kept")
		}
	}
}

func TestJoin(t *testing.T) {
	n := newLAN(t)
	n.start(1, nil, func(e *Endpoint) {
		e.HandleJoin(func(ctx context.Context, remote net.Addr, req []byte) ([]byte, error) {
			if string(req) != "please" {
				return nil, errs.E(errs.Unauthorized, "join", "", "wrong word")
			}
			return []byte("welcome"), nil
		})
	})
	n.start(2, nil, nil)
	ctx := within(t, 20*time.Second)
	fp := n.ca.Trust().Fingerprint()
	got, trust, err := Join(ctx, n.at[1], fp, []byte("please"))
	if err != nil || string(got) != "welcome" || trust.Fingerprint() != fp || trust.Cluster() != "test" {
		t.Fatalf("%q %v", got, err)
	}
	if _, _, err := Join(ctx, n.at[1], fp, []byte("let me")); !errs.Has(err, errs.Unauthorized) {
		t.Fatalf("refused by the handler: %v", err)
	}
	fp[3] ^= 1
	if _, _, err := Join(ctx, n.at[1], fp, []byte("please")); !errs.Has(err, errs.Unauthorized) {
		t.Fatalf("wrong fingerprint: %v (%v)", err, errs.ClassOf(err))
	}
	if _, _, err := Join(ctx, n.at[2], n.ca.Trust().Fingerprint(), []byte("please")); !errs.Has(err, errs.Unavailable) {
		t.Fatalf("no handler: %v (%v)", err, errs.ClassOf(err))
	}
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	lis.Close()
	if _, _, err := Join(ctx, lis.Addr().String(), fp, nil); !errs.Has(err, errs.Unavailable) {
		t.Fatalf("nobody there: %v (%v)", err, errs.ClassOf(err))
	}
}

// A peer that calls and reads no answers cannot make this node keep more of them
// than a correct one may have in hand.
func TestAnswersNotRead(t *testing.T) {
	n := newLAN(t)
	e, err := New(n.config(1, holder(t, n.ca, 1, time.Now())))
	if err != nil {
		t.Fatal(err)
	}
	defer e.lis.Close()
	var handled atomic.Int64
	big := make([]byte, 1<<20)
	e.Handle("big", func(context.Context, ids.Node, []byte, []byte) (any, []byte, error) {
		handled.Add(1)
		return nil, big, nil
	})
	near, far := net.Pipe()
	raw := newRawConn(near, 4096, &counts{})
	l := e.newLink(identity.Peer{Node: 2}, laneCall, false, raw, raw)
	done := make(chan struct{})
	go func() { l.run(); close(done) }()
	const calls = 4 * callsInHand
	for i := range calls {
		if err := wire.WriteFrame(far, frameCall, wire.MustMarshal(callHeader{ID: uint64(i + 1), Method: "big", TTL: int64(time.Minute / time.Microsecond)}), nil); err != nil {
			t.Fatal(err)
		}
	}
	until(t, 20*time.Second, "as many are handled as may be", func() bool { return handled.Load() >= 2*callsInHand })
	far.Close()
	<-done
	e.wg.Wait()
	if h := handled.Load(); h > 2*callsInHand+2*sendLimit>>20 {
		t.Fatalf("%d of %d calls handled", h, calls)
	}
}

// A known peer may not open connections without end.
func TestTooManyLinks(t *testing.T) {
	n := newLAN(t)
	n.start(1, nil, echo)
	a := n.start(2, nil, nil)
	var made []*link
	defer func() {
		for _, l := range made {
			l.close(net.ErrClosed)
		}
	}()
	for range maxLinksFrom {
		l, _, err := a.connect(1, laneCall)
		if err != nil {
			t.Fatal(err)
		}
		made = append(made, l)
	}
	until(t, 5*time.Second, "one more is refused", func() bool {
		l, _, err := a.connect(1, laneCall)
		if err == nil {
			made = append(made, l)
		}
		return errs.Has(err, errs.Unavailable)
	})
	if len(made) > maxLinksFrom+1 {
		t.Fatalf("%d connections", len(made))
	}
	if _, _, err := a.connect(1, laneBulk); err != nil {
		t.Fatalf("of another kind: %v", err)
	}
}

// FuzzLink feeds bytes to a link as if they came from an accepted peer.
func FuzzLink(f *testing.F) {
	n := newLAN(f)
	e, err := New(n.config(1, holder(f, n.ca, 1, time.Now())))
	if err != nil {
		f.Fatal(err)
	}
	f.Cleanup(func() { e.lis.Close() })
	e.Handle("echo", func(_ context.Context, _ ids.Node, req, data []byte) (any, []byte, error) { return nil, data, nil })
	e.HandleCast("say", func(ids.Node, []byte, []byte) {})
	for _, s := range seeds() {
		f.Add(s, uint8(laneCall), false)
		f.Add(s, uint8(laneCast), true)
	}
	f.Fuzz(func(t *testing.T, b []byte, lane uint8, dialled bool) {
		near, far := net.Pipe()
		raw := newRawConn(near, 4096, &counts{})
		l := e.newLink(identity.Peer{Node: 2}, laneKind(lane%uint8(laneMux)), dialled, raw, raw)
		sink := make(chan struct{})
		go func() { io.Copy(io.Discard, far); close(sink) }()
		done := make(chan struct{})
		go func() { l.run(); close(done) }()
		far.Write(b)
		far.Close()
		<-done
		<-sink
	})
}

// TestRolesAreHeld: what a role may not ask for never reaches a handler.
func TestRolesAreHeld(t *testing.T) {
	n := newLAN(t)
	n.permit = func(p identity.Peer, what string) error {
		if p.Role == identity.RoleStore || what == "open" || what == "done" {
			return nil
		}
		return errs.E(errs.Unauthorized, "", "", "a %s node may not", p.Role)
	}
	var reached atomic.Int64
	done := make(chan struct{})
	n.start(1, nil, func(e *Endpoint) {
		reach := func(context.Context, ids.Node, []byte, []byte) (any, []byte, error) {
			reached.Add(1)
			return nil, nil, nil
		}
		e.Handle("open", reach)
		e.Handle("closed", reach)
		e.HandleCast("closed", func(ids.Node, []byte, []byte) { reached.Add(1) })
		e.HandleCast("done", func(ids.Node, []byte, []byte) { close(done) })
		e.HandleStream("closed", func(context.Context, ids.Node, net.Conn) { reached.Add(1) })
	})
	client := n.start(2, holderAs(t, n.ca, 2, identity.RoleClient, time.Now()), nil)
	ctx := within(t, 20*time.Second)
	if _, err := client.Call(ctx, 1, "open", nil, nil, nil); err != nil {
		t.Fatal(err)
	}
	if _, err := client.Call(ctx, 1, "closed", nil, nil, nil); !errs.Has(err, errs.Unauthorized) {
		t.Fatalf("call: %v", err)
	}
	if s, err := client.Dial(ctx, 1, "closed"); !errs.Has(err, errs.Unauthorized) {
		t.Fatalf("stream: %v %v", s, err)
	}
	if err := errors.Join(client.Cast(1, "closed", nil, nil), client.Cast(1, "done", nil, nil)); err != nil {
		t.Fatal(err)
	}
	<-done // after the other
	if n := reached.Load(); n != 1 {
		t.Fatalf("%d reached a handler, want 1", n)
	}
	if _, err := n.start(3, nil, nil).Call(ctx, 1, "closed", nil, nil, nil); err != nil {
		t.Fatal(err)
	}
}

// FuzzStream opens a stream by any bytes, and feeds a served one with any.
func FuzzStream(f *testing.F) {
	n := newLAN(f)
	e, err := New(n.config(1, holder(f, n.ca, 1, time.Now())))
	if err != nil {
		f.Fatal(err)
	}
	f.Cleanup(func() { e.lis.Close() })
	e.HandleStream("echo", func(_ context.Context, _ ids.Node, c net.Conn) { io.Copy(io.Discard, c) })
	var open bytes.Buffer
	if err := wire.WriteFrame(&open, frameOpen, wire.MustMarshal(openHeader{Service: "echo"}), nil); err != nil {
		f.Fatal(err)
	}
	f.Add(open.Bytes())
	f.Add(append(bytes.Clone(open.Bytes()), 0, 0, 0, 1, 'x', 0, 0, 0, 0))
	f.Add(append(bytes.Clone(open.Bytes()), 0xff, 0xff, 0xff, 0xff))
	f.Add([]byte{0, 0, 0, 0})
	f.Fuzz(func(t *testing.T, b []byte) {
		near, far := net.Pipe()
		client, err := yamux.Client(far, e.yamuxConfig())
		if err != nil {
			t.Fatal(err)
		}
		server, err := yamux.Server(near, e.yamuxConfig())
		if err != nil {
			t.Fatal(err)
		}
		raw := newRawConn(near, 4096, &counts{})
		l := e.newLink(identity.Peer{Node: 2}, laneMux, false, raw, raw)
		ended := make(chan struct{})
		go func() {
			defer close(ended)
			ys, err := server.AcceptStream()
			if err == nil {
				e.serveStream(l, ys)
			}
		}()
		ys, err := client.OpenStream()
		if err != nil {
			t.Fatal(err)
		}
		ys.Write(b)
		ys.Close()
		<-ended
		l.close(errs.Unavailable.Err())
		client.Close()
		server.Close()
	})
}
