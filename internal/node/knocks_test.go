package node

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/unum-os/unum/internal/errs"
	"github.com/unum-os/unum/internal/ids"
	"github.com/unum-os/unum/internal/principal"
	"github.com/unum-os/unum/internal/record"
	"github.com/unum-os/unum/internal/wire"
)

func TestKnocks(t *testing.T) {
	var k knocks
	now := time.Unix(1000, 0)
	tell := func(peer ids.Node, times int) (told int) {
		for range times {
			if k.tell(peer, now) {
				told++
			}
		}
		return told
	}
	if n := tell(2, 200); n != refusalsAtOnce {
		t.Errorf("%d refusals told", n)
	}
	if n := tell(3, 1); n != 1 {
		t.Error("the loud node's neighbour is not heard")
	}
	if _, err := k.propose(2, 100, now); !errs.Has(err, errs.Busy) || !strings.Contains(err.Error(), "refused of late") {
		t.Error(err)
	}
	now = now.Add(10 * time.Second)
	if n := tell(2, 200); n != 10*refusalsPer {
		t.Errorf("%d told ten seconds later", n)
	}

	// A proposal costs nothing of that unless it is refused.
	for range proposalsAtOnce {
		settle, err := k.propose(3, 100, now)
		if err != nil {
			t.Fatal(err)
		}
		settle(false)
	}
	if _, err := k.propose(3, 100, now); !errs.Has(err, errs.Busy) || !strings.Contains(err.Error(), "proposed too much") {
		t.Error(err)
	}
	now = now.Add(time.Second)
	if _, err := k.propose(3, proposalsPer*proposalBytes, now); !errs.Has(err, errs.Busy) { // it is one and its size
		t.Error(err)
	}
	now = now.Add(time.Hour)
	if settle, err := k.propose(3, record.MaxCommand, now); err != nil { // costs all there is, and no more
		t.Error(err)
	} else {
		settle(false)
	}
	n := 0
	for ; ; n++ {
		settle, err := k.propose(4, 1, now)
		if err != nil {
			break
		}
		settle(true)
	}
	if n != refusalsAtOnce {
		t.Errorf("%d refused proposals", n)
	}
	for i := range refusalsAtOnce { // no more in hand than might be refused
		if _, err := k.propose(5, 1, now); err != nil {
			t.Fatal(i, err)
		}
	}
	if _, err := k.propose(5, 1, now); !errs.Has(err, errs.Busy) {
		t.Error(err)
	}

	// What was dropped is told once.
	if p := k.proposals.Load(); p != 5 || k.refusals.Load() != 300 {
		t.Errorf("%d proposals and %d refusals dropped", p, k.refusals.Load())
	}
	told := map[ids.Node]uint64{}
	for {
		peer, untold, since := k.due(now)
		if untold == 0 {
			break
		}
		if told[peer] += untold; now.Sub(since) < untoldEvery {
			t.Errorf("%v: told after %v", peer, now.Sub(since))
		}
	}
	if fmt.Sprint(told) != "map[n2:301 n3:2]" {
		t.Errorf("told: %v", told)
	}
	now = now.Add(untoldEvery)
	if peer, untold, _ := k.due(now); peer != 4 && peer != 5 || untold != 1 {
		t.Errorf("%v %d", peer, untold)
	}
}

// TestLoudClient is a client node that proposes what is refused as fast as it
// can: the audit has some of it and how much there was besides, the others are
// heard as ever, and in the log is no more of it than in the audit.
func TestLoudClient(t *testing.T) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	n1, _ := founded(t)
	loud, _, _ := join(t, ctx, n1, record.RoleClient)
	other, _, _ := join(t, ctx, n1, record.RoleClient)
	settled(t, n1, 3)
	propose := func(n *Node, seq uint64) error {
		c := record.Command{Client: 7, Seq: seq, Acked: seq, Who: principal.Of(n.id), Now: 1 << 62, GrantJobs: uint32(seq)}
		var res record.Result
		if _, err := n.ep.Call(ctx, n1.id, methodForward, rawItem(wire.MustMarshal(c)), nil, &res); err != nil {
			return err
		}
		return res.Refusal.Error("", "")
	}
	const attempts = 600
	began := time.Now()
	var busy, denied atomic.Int64
	var wg sync.WaitGroup
	for w := range uint64(6) {
		wg.Go(func() {
			for i := range uint64(attempts / 6) {
				switch err := propose(loud, w*attempts+i+1); errs.ClassOf(err) {
				case errs.Busy:
					busy.Add(1)
				case errs.Permission:
					denied.Add(1)
				default:
					t.Errorf("%v", err)
				}
			}
		})
	}
	wg.Wait()
	borne := int64(refusalsAtOnce + refusalsPer*(time.Since(began).Seconds()+1))
	if busy.Load() == 0 || denied.Load() == 0 || denied.Load() > borne || busy.Load()+denied.Load() != attempts {
		t.Errorf("%d refused, %d borne, %d turned away", denied.Load(), borne, busy.Load())
	}
	if err := propose(other, 1); !errs.Has(err, errs.Permission) {
		t.Errorf("another client node is not heard: %v", err)
	}
	before := time.Now()
	n1.tellUntold(ctx, before.Add(untoldEvery))
	all, err := n1.record.view().Audit(0, 1<<20)
	if err != nil {
		t.Fatal(err)
	}
	heard := map[ids.Node]int64{}
	summary := ""
	for _, e := range all {
		switch {
		case e.What == "grant jobs":
			heard[e.Who.Node] += int64(e.Count)
			if e.Time > before.Add(time.Hour).UnixNano() {
				t.Errorf("the audit has the sender's time: %v", time.Unix(0, e.Time))
			}
		case e.What == "ask too much" && e.Who == principal.Of(loud.id) && e.Door == n1.id:
			summary = e.Why
		}
	}
	if heard[loud.id] != denied.Load() || heard[other.id] != 1 {
		t.Errorf("the audit has %v refusals, %d were answered", heard, denied.Load())
	}
	if want := fmt.Sprintf("%d attempts in ", busy.Load()); !strings.HasPrefix(summary, want) {
		t.Errorf("the audit says %q, want %q", summary, want)
	}
	if n := n1.knocks.proposals.Load(); n != uint64(busy.Load()) {
		t.Errorf("%d counted as turned away, %d were", n, busy.Load())
	}
}
