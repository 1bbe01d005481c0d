package node

import (
	"context"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	"github.com/unum-os/unum/internal/clock"
	"github.com/unum-os/unum/internal/errs"
	"github.com/unum-os/unum/internal/identity"
	"github.com/unum-os/unum/internal/ids"
)

// The time of day jumps by an hour, both ways, on one node and on both: no
// connection, no session and no leader is lost. (A machine that stands still for
// seconds loses them too: undisturbed once in five is what is asked. A jump that
// broke something would break it each time.)
func TestWallJumpsBreakNothing(t *testing.T) {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	var c1, c2 clock.Shifted
	cfg1, cfg2 := config(t), config(t)
	cfg1.Clock, cfg2.Clock = &c1, &c2
	if err := Found(cfg1); err != nil {
		t.Fatal(err)
	}
	n1, _ := start(t, cfg1)
	settled(t, n1, 1)
	tok, err := n1.token(asRoot(ctx, n1), 2, 30*time.Minute, 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := Join(ctx, cfg2, cfg1.Addr, tok); err != nil {
		t.Fatal(err)
	}
	n2, _ := start(t, cfg2)
	settled(t, n2, 2)
	var downs atomic.Int64
	for _, n := range []*Node{n1, n2} {
		n.ep.OnPeer(func(_ ids.Node, up bool) {
			if !up {
				downs.Add(1)
			}
		})
	}
	await(t, "both have a session", func() bool { return n1.venus.Ready() && n2.venus.Ready() })
	await(t, "both vote", func() bool { return len(n1.rec.Status().Voters) == 2 && len(n1.root.Status().Voters) == 2 })

	round := func() bool { // whether nothing was lost
		d, rec, root := downs.Load(), n2.rec.Status(), n2.root.Status()
		for _, jump := range []struct{ a, b time.Duration }{{time.Hour, 0}, {time.Hour, time.Hour}, {-time.Hour, time.Hour}, {-time.Hour, -time.Hour}, {0, 0}} {
			for i, c := range []*clock.Shifted{&c1, &c2} {
				if err := c.Set([]time.Duration{jump.a, jump.b}[i], 0); err != nil {
					t.Fatal(err)
				}
			}
			for range 30 { // longer than a peer may be silent, and a session unrenewed
				if _, err := n2.ep.Call(ctx, 1, methodSelf, struct{}{}, nil, nil); err != nil {
					return false
				}
				if _, err := n2.token(asRoot(ctx, n2), 0, 0, 0); err != nil {
					t.Fatal(err)
				}
				if !n1.venus.Ready() || !n2.venus.Ready() {
					return false
				}
				pause(ctx, 50*time.Millisecond)
			}
		}
		r, o := n2.rec.Status(), n2.root.Status()
		return downs.Load() == d && r.Term == rec.Term && r.Leader == rec.Leader && o.Term == root.Term && o.Leader == root.Leader
	}
	for try := 1; !round(); try++ {
		if try == 5 {
			t.Fatal("something is lost at every jump")
		}
		t.Log("disturbed; once more")
		await(t, "both have a session", func() bool { return n1.venus.Ready() && n2.venus.Ready() })
	}

	// A token ends by the time of day of those who keep the record.
	cfg3 := config(t)
	for _, c := range []*clock.Shifted{&c1, &c2} {
		if err := c.Set(time.Hour, 0); err != nil {
			t.Fatal(err)
		}
	}
	if err := Join(ctx, cfg3, cfg1.Addr, tok); !errs.Has(err, errs.Unauthorized) {
		t.Errorf("a token that ended half an hour ago: %v", err)
	}
	for _, c := range []*clock.Shifted{&c1, &c2} {
		if err := c.Set(0, 0); err != nil {
			t.Fatal(err)
		}
	}
	if err := Join(ctx, cfg3, cfg1.Addr, tok); err != nil {
		t.Errorf("a token that holds again: %v", err)
	}
}

// The end of a certificate is passed by a jump, or its beginning by one back: its
// node gets another; then others take its new connections again.
func TestJumpPastTheCertificate(t *testing.T) {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	var c1, c2 clock.Shifted
	const far = 50 * 24 * time.Hour
	set := func(d time.Duration) {
		for _, c := range []*clock.Shifted{&c1, &c2} {
			if err := c.Set(d, 0); err != nil {
				t.Fatal(err)
			}
		}
	}
	cfg1, cfg2 := config(t), config(t)
	cfg1.Clock, cfg2.Clock = &c1, &c2
	if err := Found(cfg1); err != nil {
		t.Fatal(err)
	}
	n1, stop1 := start(t, cfg1)
	settled(t, n1, 1)
	tok, err := n1.token(asRoot(ctx, n1), 0, 0, 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := Join(ctx, cfg2, cfg1.Addr, tok); err != nil {
		t.Fatal(err)
	}
	n2, stop2 := start(t, cfg2)
	settled(t, n2, 2)
	await(t, "both vote", func() bool { return len(n1.rec.Status().Voters) == 2 })
	holds := func(n *Node) bool {
		now := n.cfg.Clock.Wall()
		return n.holder.NotBefore().Before(now) && n.holder.NotAfter().Sub(now) > identity.NodeValidity-time.Hour
	}
	again := func(what string) {
		t.Helper()
		stop1()
		stop2() // so that all connections are new
		n1, stop1 = start(t, cfg1)
		n2, stop2 = start(t, cfg2)
		await(t, what+": a certificate that holds", func() bool { return holds(n1) && holds(n2) })
		await(t, what+": new connections", func() bool {
			_, err := n2.ep.Call(ctx, 1, methodSelf, struct{}{}, nil, nil)
			return err == nil
		})
	}
	set(far)
	if n2.holder.NotAfter().After(c2.Wall()) {
		t.Fatal("the end is not passed")
	}
	await(t, "both renew while they run", func() bool { return holds(n1) && holds(n2) })
	again("forward")
	set(0)
	if !n2.holder.NotBefore().After(c2.Wall()) {
		t.Fatal("it holds already")
	}
	again("back") // who asked less than a minute ago asks when it starts
}

// A lab sets the clocks of a node by a file.
func TestClockFile(t *testing.T) {
	defer clock.Use(nil)
	cfg := config(t)
	cfg.ClockFile = filepath.Join(t.TempDir(), "clock")
	write := func(s string) {
		if err := os.WriteFile(cfg.ClockFile+".new", []byte(s), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(cfg.ClockFile+".new", cfg.ClockFile); err != nil {
			t.Fatal(err)
		}
	}
	if err := Found(cfg); err != nil { // there is none yet
		t.Fatal(err)
	}
	write("wall=-2h")
	n, stop := start(t, cfg)
	off := func(d time.Duration) bool {
		return (n.cfg.Clock.Wall().Sub(clock.Real.Wall()) - d).Abs() < 10*time.Minute
	}
	if !off(-2 * time.Hour) {
		t.Fatal("not set when it starts")
	}
	write("wall=+1h boot=+30s")
	await(t, "the file counts", func() bool { return off(time.Hour) && clock.Now().Sub(clock.Real.Now()) > 29*time.Second })
	settled(t, n, 1) // it works on
	stop()
	write("nonsense")
	if _, err := Open(cfg); !errs.Has(err, errs.Invalid) {
		t.Errorf("started with a clock that means nothing: %v", err)
	}
}
