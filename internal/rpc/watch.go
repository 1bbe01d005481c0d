package rpc

import (
	"time"

	"github.com/unum-os/unum/internal/clock"
	"github.com/unum-os/unum/internal/errs"
	"github.com/unum-os/unum/internal/identity"
	"github.com/unum-os/unum/internal/ids"
)

// The watch asks peers for signs of life and gives up those that give none. A
// dialler asks, the other side only listens: it hears a question at least every
// second.
const (
	// watchTick is how often each link is looked at.
	watchTick = 500 * time.Millisecond
	// idleTick is how often an idle link is asked; one that owes answers is asked
	// at every tick.
	idleTick = time.Second
	// deadAfter is the silence after which a peer that was asked is dead.
	deadAfter = 2 * time.Second
	// slowAfter bounds the silence of a peer whose kernel is taking what we send.
	slowAfter = 10 * time.Second
	// goneAfter is the silence after which the answering side gives up; it is the
	// dialler's part to find out sooner.
	goneAfter = 6 * time.Second
	// renewedWithin is how long streams may go on by a certificate that has ended:
	// the peer's other connections end at once, and show its next one when they are
	// made anew.
	renewedWithin = 10 * time.Second
)

func (e *Endpoint) watch() {
	t := time.NewTicker(watchTick)
	defer t.Stop()
	last := mono()
	for {
		select {
		case <-e.ctx.Done():
			return
		case <-t.C:
		}
		now := mono()
		// If this process did not run, the silence is its own.
		stalled := time.Duration(now-last) > 2*watchTick
		last = now
		e.mu.Lock()
		links := make([]*link, 0, len(e.links))
		for l := range e.links {
			links = append(links, l)
		}
		e.mu.Unlock()
		for _, l := range links {
			if stalled {
				l.raw.excuse()
			}
			e.judge(l)
		}
	}
}

// judge asks a link's peer for a sign of life if it is time, or gives it up.
func (e *Endpoint) judge(l *link) {
	if !e.cfg.Allowed(l.shown) {
		l.close(errs.E(errs.Unauthorized, "", l.peer.String(), "no longer a member of this cluster"))
		return
	}
	if e.ended(l) {
		l.close(errs.E(errs.Unavailable, "", l.peer.String(), "the certificate it came by, which held until %s, has ended", l.shown.Until.UTC().Format(time.RFC3339)))
		return
	}
	silent := l.raw.silence()
	limit := goneAfter
	if l.dialled {
		limit = deadAfter
		if silent > deadAfter && l.raw.progressing() {
			limit = slowAfter
		}
	}
	if silent > limit {
		l.close(errs.E(errs.Unavailable, "", l.peer.String(), "silent for %v", silent.Round(100*time.Millisecond)))
		return
	}
	// Ticks come a little early at times: ask then too.
	const early = watchTick / 10
	if l.dialled && (silent > idleTick-early || silent > watchTick-early && l.waiting.Load() > 0) {
		l.ping()
	}
}

// proof is what a peer has shown for a link: by which key, and until when on this
// machine's clock of time that passes. Of the time of day, which may be set, only
// the handshake asks; a link outlives its jumps.
type proof struct {
	key   [32]byte
	until clock.Instant
}

func (e *Endpoint) proofBy(p identity.Peer) proof {
	c := e.cfg.Clock
	return proof{p.Key, c.Now().Add(p.Until.Sub(c.Wall()))}
}

// ended reports whether the peer has nothing to show for a link any more. A
// connection that is made anew shows the certificate of the day; streams cannot
// be made anew, and go on by one that the same key has shown elsewhere.
func (e *Endpoint) ended(l *link) bool {
	now := e.cfg.Clock.Now()
	if now <= l.proof.until {
		return false
	}
	if l.lane != laneMux {
		return true
	}
	e.mu.Lock()
	best, limit := e.proven[l.peer], e.renewed
	e.mu.Unlock()
	if best.key == l.proof.key && now <= best.until {
		l.over = 0
		return false
	}
	if l.over == 0 {
		l.over = mono()
	}
	return time.Duration(mono()-l.over) > limit
}

// track makes the watch look after a link until untrack.
func (e *Endpoint) track(l *link) {
	e.mu.Lock()
	e.links[l] = struct{}{}
	e.live[l.peer]++
	if best := e.proven[l.peer]; best.key != l.proof.key || l.proof.until > best.until {
		e.proven[l.peer] = l.proof
	}
	e.stirLocked(l.peer)
	e.mu.Unlock()
}

func (e *Endpoint) untrack(l *link) {
	e.mu.Lock()
	delete(e.links, l)
	if e.live[l.peer]--; e.live[l.peer] == 0 {
		delete(e.live, l.peer)
		delete(e.proven, l.peer)
	}
	e.stirLocked(l.peer)
	e.mu.Unlock()
}

func (e *Endpoint) stirLocked(n ids.Node) {
	e.dirty[n] = struct{}{}
	select {
	case e.stir <- struct{}{}:
	default:
	}
}

// tellPeers tells OnPeer's functions what changed.
func (e *Endpoint) tellPeers() {
	told := make(map[ids.Node]bool) // those told to be up
	for {
		select {
		case <-e.ctx.Done():
			return
		case <-e.stir:
		}
		e.mu.Lock()
		changed := make(map[ids.Node]bool)
		for n := range e.dirty {
			if up := e.live[n] > 0; up != told[n] {
				changed[n] = up
			}
		}
		clear(e.dirty)
		e.mu.Unlock()
		e.hmu.RLock()
		fs := e.onPeer
		e.hmu.RUnlock()
		for n, up := range changed {
			if up {
				told[n] = true
			} else {
				delete(told, n)
			}
			for _, f := range fs {
				f(n, up)
			}
		}
	}
}
