package node

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/unum-os/unum/internal/clock"
	"github.com/unum-os/unum/internal/errs"
	"github.com/unum-os/unum/internal/ids"
	"github.com/unum-os/unum/internal/load"
	"github.com/unum-os/unum/internal/proc"
	"github.com/unum-os/unum/internal/record"
	"github.com/unum-os/unum/internal/sched"
	"github.com/unum-os/unum/internal/wire"
)

// Kinds of gossip words.
const wordLoad = 'l' // sched.Load of the sender

// publish notes this node's load, and tells everybody if it is news to them. Only
// the load meter calls it.
func (n *Node) publish(l sched.Load) {
	now := clock.Now()
	n.loads.Put(now, l)
	if now.Sub(n.toldAt) < load.TellEvery-load.Every/2 && !load.Changed(n.told, l) {
		return
	}
	n.told, n.toldAt = l, now
	if err := n.members.Broadcast(wordLoad, wire.MustMarshal(l)); err != nil {
		n.cfg.Log.Debug("load not told", "err", err)
	}
}

// minMemory is what a node must have free to accept a command, in bytes; the
// sentence of accept says it too.
const minMemory = 64 << 20

// accept decides by this node's own numbers whether a job may start here.
func (n *Node) accept(proc.Demand) error {
	for _, l := range n.loads.Snapshot(clock.Now()) {
		if l.Node == n.id && l.MemTotal > 0 && l.MemTotal-min(l.MemUsed, l.MemTotal) < minMemory {
			return errs.E(errs.Busy, "start", "", "%v has less than 64 MiB of memory left", n.id)
		}
	}
	return nil
}

// place chooses a node for a command.
func (n *Node) place(ctx context.Context, d proc.Demand) (ids.Node, []byte, error) {
	now := clock.Now()
	known := *n.known.Load()
	loads := slices.DeleteFunc(n.loads.Snapshot(now), func(l sched.Load) bool {
		return !n.members.IsAlive(l.Node) || known[l.Node].State == record.Leaving
	})
	turn := n.turn.Add(1)
	dec := sched.Decide(sched.Inputs{Policy: sched.EPVM, Home: n.id, Seed: uint64(now) ^ turn<<32, Turn: turn,
		Limit: n.loads.Limit(), Loads: loads, Exclude: d.Not})
	if dec.Chosen == 0 {
		var why []string
		for _, c := range dec.Candidates {
			why = append(why, fmt.Sprintf("%v: %s", c.Node, c.Refused))
		}
		if len(why) == 0 {
			why = append(why, "no node's load is known yet")
		}
		return 0, nil, errs.E(errs.Busy, "place the command", "", "no node can take it (%s)", strings.Join(why, "; ")).WithRemedy("unum nodes")
	}
	n.loads.Placed(now, dec.Chosen, sched.Demand{})
	return dec.Chosen, dec.Receipt(), nil
}

// explain turns a receipt into words.
func explain(receipt []byte, asJSON bool) (string, error) {
	d, err := sched.Decode(receipt)
	if err != nil {
		return "", err
	}
	if asJSON {
		b, err := sched.JSON(d)
		return string(b), err
	}
	return sched.Explain(d), nil
}
