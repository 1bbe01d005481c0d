package node

import (
	"context"
	"fmt"
	"path"
	"sync"
	"sync/atomic"
	"time"

	"github.com/unum-os/unum/internal/control"
	"github.com/unum-os/unum/internal/errs"
	"github.com/unum-os/unum/internal/ids"
	"github.com/unum-os/unum/internal/principal"
	"github.com/unum-os/unum/internal/record"
)

// What another node may make the record write through this one's door: whoever
// knocks all the time must neither fill its log nor crowd out what others do.
const (
	refusalsAtOnce  = 50      // refusals of a node that are told to the audit one by one, in a row
	refusalsPer     = 5       // and then so many refusals a second
	proposalsAtOnce = 500     // proposals of a node that does not store, in a row
	proposalsPer    = 100     // and then so many proposals a second: a busy person, not a store
	proposalBytes   = 8 << 10 // bytes of one such proposal
	// untoldEvery is how long what was turned away is gathered before the audit is
	// told how much it was.
	untoldEvery = time.Minute
	// noteLimit bounds the telling of one line to the audit.
	noteLimit = 5 * time.Second
)

// bucket lets so many through at once, and then so many a second.
type bucket struct {
	left   float64
	filled time.Time // zero: it is full
}

func (b *bucket) fill(now time.Time, atOnce, per float64) {
	if b.filled.IsZero() {
		b.left = atOnce
	} else if d := now.Sub(b.filled); d > 0 {
		b.left = min(atOnce, b.left+d.Seconds()*per)
	}
	b.filled = now
}

// anyStranger stands for whoever has no certificate: machines that join, and whose
// certificate is nobody's, share one bucket, for they can be any number. It is no
// node; what this node's own processes are refused counts as this node's.
const anyStranger ids.Node = 0

// knock is what of one node this one remembers.
type knock struct {
	refusals  bucket
	proposals bucket
	untold    uint64    // turned away, or refused and not told
	since     time.Time // the first of them
}

// knocks holds the door. It has an entry for each node that has knocked, and one for
// all who are no members.
type knocks struct {
	refusals  atomic.Uint64 // not told to the audit one by one
	proposals atomic.Uint64 // turned away

	mu sync.Mutex
	by map[ids.Node]*knock
}

// of returns the entry of a node, its buckets filled; k.mu is held.
func (k *knocks) of(peer ids.Node, now time.Time) *knock {
	if k.by == nil {
		k.by = map[ids.Node]*knock{}
	}
	p := k.by[peer]
	if p == nil {
		p = &knock{}
		k.by[peer] = p
	}
	p.refusals.fill(now, refusalsAtOnce, refusalsPer)
	p.proposals.fill(now, proposalsAtOnce, proposalsPer)
	return p
}

func (p *knock) drop(now time.Time) {
	if p.untold++; p.untold == 1 {
		p.since = now
	}
}

// tell reports whether the audit is to be told of one more refusal of a node.
func (k *knocks) tell(peer ids.Node, now time.Time) bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	p := k.of(peer, now)
	if p.refusals.left < 1 {
		p.drop(now)
		k.refusals.Add(1)
		return false
	}
	p.refusals.left--
	return true
}

// propose lets a proposal of so many bytes in, or turns it away with class Busy.
// It leaves a refusal as a deposit, for the record may refuse it, and will then
// write that down; settle says whether it did, and else gives the deposit back.
func (k *knocks) propose(peer ids.Node, size int, now time.Time) (settle func(denied bool), err error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	p := k.of(peer, now)
	cost := min(proposalsAtOnce, 1+float64(size/proposalBytes))
	why := ""
	switch {
	case p.refusals.left < 1:
		why = fmt.Sprintf("too much of what it proposed was refused of late, or has no answer yet; %d a second are borne", refusalsPer)
	case p.proposals.left < cost:
		why = fmt.Sprintf("it has proposed too much of late; %d a second are borne, of %d bytes each", proposalsPer, proposalBytes)
	}
	if why != "" {
		p.drop(now)
		k.proposals.Add(1)
		return nil, errs.E(errs.Busy, "propose", peer.String(), "%s", why).WithRemedy("unum audit, on a storing node, to see what is refused")
	}
	p.refusals.left--
	p.proposals.left -= cost
	return func(denied bool) {
		if denied {
			return
		}
		k.mu.Lock()
		defer k.mu.Unlock()
		p.refusals.left = min(refusalsAtOnce, p.refusals.left+1)
	}, nil
}

// due returns a node of which something was dropped a while ago, and how much
// since when; that is forgotten then. Untold 0: there is none.
func (k *knocks) due(now time.Time) (peer ids.Node, untold uint64, since time.Time) {
	k.mu.Lock()
	defer k.mu.Unlock()
	for id, p := range k.by {
		if p.untold > 0 && now.Sub(p.since) >= untoldEvery {
			untold, since = p.untold, p.since
			p.untold = 0
			return id, untold, since
		}
	}
	return 0, 0, time.Time{}
}

// tellKnocks tells the audit of what was dropped, for as long as ctx lasts. It
// waits for the record, as the steward must not.
func (n *Node) tellKnocks(ctx context.Context) error {
	for ctx.Err() == nil {
		n.tellUntold(ctx, time.Now())
		pause(ctx, stewardTick)
	}
	return nil
}

// tellUntold tells the audit, in one line, how much of a node was dropped.
func (n *Node) tellUntold(ctx context.Context, now time.Time) {
	peer, untold, since := n.knocks.due(now)
	if untold == 0 {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, noteLimit)
	defer cancel()
	what := "attempts"
	if peer == anyStranger {
		peer, what = n.id, "attempts of machines that are no members"
	}
	note := &record.Note{About: principal.Of(peer), What: "ask too much", On: peer.String(), Err: uint8(errs.Busy),
		Why: fmt.Sprintf("%d %s in %v were turned away, or refused without a line of their own", untold, what, now.Sub(since).Round(time.Second))}
	if _, err := n.record.do(ctx, record.Command{Note: note}); err != nil && ctx.Err() == nil {
		n.cfg.Log.Warn("not in the audit", "node", peer.String(), "untold", untold, "err", err)
	}
}

// refused tells the audit that this node has refused something at its door, and
// returns why.
func (n *Node) refused(ctx context.Context, about principal.Principal, what string, from ids.Node, why error) error {
	if !n.knocks.tell(from, time.Now()) {
		n.cfg.Log.Debug("refused, and not told to the audit one by one: there are too many", "what", what, "from", from.String(), "err", why)
		return why
	}
	if from == anyStranger {
		from = n.id
	}
	about.User = cut(about.User, record.MaxText)
	note := &record.Note{About: about, What: what, On: from.String(), Err: uint8(errs.ClassOf(why)), Why: cut(firstLine(why), record.MaxText)}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), noteLimit)
	defer cancel()
	if _, err := n.record.do(ctx, record.Command{Note: note}); err != nil {
		n.cfg.Log.Warn("a refusal is not in the audit", "what", what, "from", from.String(), "err", err)
	}
	return why
}

// refusedHere tells the audit what the control API has refused to a local process.
// The audit is written by nodes that store; on others nobody would believe it.
func (n *Node) refusedHere(who control.Cred, method string, why error) {
	if n.disk.Role == record.RoleStore {
		go n.refused(context.Background(), principal.Principal{Node: n.id, UID: n.localUID(who)}, path.Base(method), n.id, why)
	}
}
