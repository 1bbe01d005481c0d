package rpc

import (
	"context"
	"errors"
	"io"
	"net"
	"testing"
	"time"

	"github.com/unum-os/unum/internal/clock"
	"github.com/unum-os/unum/internal/errs"
	"github.com/unum-os/unum/internal/identity"
	"github.com/unum-os/unum/internal/ids"
)

// A link does not outlive the certificates by which it was made. Who has renewed
// his is back at once, and his streams never notice; who has not is out.
func TestLinksEndWithTheirCertificates(t *testing.T) {
	n := newLAN(t)
	wall := &clock.Shifted{}
	n.clock = wall
	type made struct {
		h        *identity.Holder
		key, csr []byte
	}
	sign := func(m *made, id ids.Node, at time.Duration) {
		t.Helper()
		cert, err := n.ca.Sign(m.csr, id, identity.RoleStore, time.Now().Add(at))
		if err != nil {
			t.Fatal(err)
		}
		if m.h != nil {
			err = m.h.Swap(cert, m.key)
		} else {
			m.h, err = identity.NewHolder(n.ca.Trust(), cert, m.key)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	both := map[ids.Node]*made{1: {}, 2: {}}
	renew := func(at time.Duration) {
		t.Helper()
		for id, m := range both {
			sign(m, id, at)
		}
	}
	for _, m := range both {
		var err error
		if m.key, m.csr, err = identity.NewRequest(); err != nil {
			t.Fatal(err)
		}
	}
	renew(0)
	server := n.start(1, both[1].h, func(e *Endpoint) {
		echo(e)
		e.HandleStream("echo", func(_ context.Context, _ ids.Node, c net.Conn) { io.Copy(c, c) })
	})
	client := n.start(2, both[2].h, nil)
	limit := func(d time.Duration) {
		for _, r := range []*running{server, client} {
			r.mu.Lock()
			r.renewed = d
			r.mu.Unlock()
		}
	}
	limit(time.Hour)
	ctx := within(t, 60*time.Second)
	stream, err := client.Dial(ctx, 1, "echo")
	if err != nil {
		t.Fatal(err)
	}
	said := func() error {
		b := []byte("x")
		if _, err := stream.Write(b); err != nil {
			return err
		}
		_, err := io.ReadFull(stream, b)
		return err
	}
	call := func() error {
		_, err := client.Call(ctx, 1, "echo", nil, nil, nil)
		return err
	}
	if err := call(); err != nil {
		t.Fatal(err)
	}
	old := client.peer(1).lanes[laneCall].link

	// The time of day is set, there and back: nothing has ended.
	for _, jump := range []time.Duration{2 * identity.NodeValidity, -2 * identity.NodeValidity, 0} {
		if err := wall.Set(jump, 0); err != nil {
			t.Fatal(err)
		}
		for end := time.Now().Add(4 * watchTick); time.Now().Before(end); time.Sleep(watchTick / 5) {
			if err := errors.Join(said(), call()); err != nil || !old.alive() {
				t.Fatalf("clocks at %v: %v", jump, err)
			}
		}
	}

	// The certificates end; both have others, which hold for half a day more.
	renew(12 * time.Hour)
	if err := wall.Set(identity.NodeValidity+time.Hour, identity.NodeValidity+time.Hour); err != nil {
		t.Fatal(err)
	}
	until(t, 20*time.Second, "the connection made by the certificate that ended is closed", func() bool { return !old.alive() })
	until(t, 20*time.Second, "the renewed peer is back", func() bool { return call() == nil })
	limit(1)
	for end := time.Now().Add(4 * watchTick); time.Now().Before(end); time.Sleep(watchTick / 5) { // as often as the watch looks
		if err := said(); err != nil {
			t.Fatalf("the stream of a renewed peer: %v", err)
		}
	}

	// These end too, and nobody has others.
	if err := wall.Set(identity.NodeValidity+24*time.Hour, identity.NodeValidity+24*time.Hour); err != nil {
		t.Fatal(err)
	}
	until(t, 20*time.Second, "all connections end", func() bool { return !server.Connected(2) && !client.Connected(1) })
	if err := said(); err == nil {
		t.Error("the stream goes on")
	}
	if err := call(); !errs.Has(err, errs.Unauthorized) {
		t.Errorf("a new connection by an ended certificate: %v", err)
	}
}
