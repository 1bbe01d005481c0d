package node

import (
	"context"
	"sync"
	"time"

	"github.com/unum-os/unum/internal/errs"
	"github.com/unum-os/unum/internal/identity"
	"github.com/unum-os/unum/internal/ids"
	"github.com/unum-os/unum/internal/principal"
	"github.com/unum-os/unum/internal/record"
)

// A stranger shows a good certificate of a node that is not known here. It may
// have joined a moment ago, and this replica be behind; or somebody who voted once,
// and has kept the authority's key, has signed it for nobody. A node's joining is
// in the record before its certificate is signed: whoever is not there after a read
// barrier that began when it had come, is nobody. Until then it gets no more than
// who joins needs at once.

const (
	// maxStrangers bounds those that are looked up at a time; more are refused.
	maxStrangers = 256
	// refusedFor is how long one that is nobody is refused without another look: by
	// then a node may have got that number.
	refusedFor = time.Second
	// forgottenAfter is how long one is remembered that has gone before it was known.
	forgottenAfter = time.Minute
	// lookLimit bounds one attempt to learn who they are, and lookAgain is the first
	// pause between two.
	lookLimit = 2 * time.Second
	lookAgain = 100 * time.Millisecond
)

// stranger is one of them.
type stranger struct {
	first, last time.Time // when it was met
	nobody      time.Time // when that was found; zero: not yet
}

// strangers are those that are looked up.
type strangers struct {
	mu   sync.Mutex
	by   map[ids.Node]*stranger
	wake chan struct{} // holds one: somebody is to be looked up
}

func newStrangers() *strangers {
	return &strangers{by: map[ids.Node]*stranger{}, wake: make(chan struct{}, 1)}
}

// meet notes a stranger, and reports whether it may be somebody.
func (s *strangers) meet(p ids.Node) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	now := time.Now()
	x := s.by[p]
	if x != nil && !x.nobody.IsZero() && now.Sub(x.nobody) > refusedFor {
		x = nil
	}
	if x == nil {
		if len(s.by) >= maxStrangers && s.by[p] == nil {
			return false
		}
		x = &stranger{first: now}
		s.by[p] = x
	}
	x.last = now
	if !x.nobody.IsZero() {
		return false
	}
	select {
	case s.wake <- struct{}{}:
	default:
	}
	return true
}

// waiting reports whether there is anybody to look up, and forgets those that are
// known by now or have gone.
func (s *strangers) waiting(known func(ids.Node) bool) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	any := false
	for p, x := range s.by {
		switch {
		case known(p), time.Since(x.last) > forgottenAfter, !x.nobody.IsZero() && time.Since(x.nobody) > refusedFor:
			delete(s.by, p)
		case x.nobody.IsZero():
			any = true
		}
	}
	return any
}

// judge finds those to be nobody that were met before a read barrier began, and
// are not known after it.
func (s *strangers) judge(began time.Time, known func(ids.Node) bool) (nobody []ids.Node) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for p, x := range s.by {
		if x.first.Before(began) && x.nobody.IsZero() && !known(p) {
			x.nobody = time.Now()
			nobody = append(nobody, p)
		}
	}
	return nobody
}

// believed returns what is known of a node, if anything is. One that has not heard
// of any member yet believes in those that it was told of when it joined, or knew
// when it stopped: all of them store.
func (n *Node) believed(p ids.Node) (record.Member, bool) {
	known := *n.known.Load()
	m, ok := known[p]
	if !ok && len(known) == 0 {
		if a, told := n.disk.snapshot().Peers[p.String()]; told {
			return record.Member{ID: p, Addr: a, Role: record.RoleStore, State: record.Active}, true
		}
	}
	return m, ok
}

func (n *Node) isKnown(p ids.Node) bool {
	_, ok := n.believed(p)
	return ok
}

// allowed reports whether who shows a good certificate is a member still, and has
// the key with which that member joined, by which alone it is known: the
// certificate says no more than that somebody who could sign had signed. A peer
// that is about to be dialled has shown nothing yet.
func (n *Node) allowed(p identity.Peer) bool {
	m, ok := n.believed(p.Node)
	if !ok {
		return n.strangers.meet(p.Node)
	}
	if p.Role != "" && m.Joined != 0 && (m.Key != p.Key || m.Role.String() != string(p.Role)) {
		return false
	}
	return m.State.Belongs()
}

// lookUp finds out who strangers are.
func (n *Node) lookUp(ctx context.Context) error {
	for ctx.Err() == nil {
		select {
		case <-ctx.Done():
			return nil
		case <-n.strangers.wake:
		}
		for wait := lookAgain; n.strangers.waiting(n.isKnown) && ctx.Err() == nil; wait = min(2*wait, lookLimit) {
			n.identify(ctx)
			pause(ctx, wait)
		}
	}
	return nil
}

// identify brings what is known of the members up to date: by this node's replica,
// and by what others say, which proves that somebody is a member, but not that
// nobody is. A replica that is behind needs the others: its leader may be one of
// the strangers.
func (n *Node) identify(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, lookLimit)
	defer cancel()
	var others sync.WaitGroup
	others.Go(func() {
		if err := n.askMembers(ctx); err != nil && ctx.Err() == nil {
			n.cfg.Log.Debug("others are not heard about strangers", "err", err)
		}
	})
	defer others.Wait()
	if n.disk.Role != record.RoleStore {
		return
	}
	began := time.Now()
	if _, err := n.rec.ReadIndex(ctx); err != nil || n.refreshMembers() != nil {
		return
	}
	for _, p := range n.strangers.judge(began, n.isKnown) {
		no := errs.E(errs.Unauthorized, "accept", p.String(), "its certificate is good, but it is no member")
		go n.refused(context.WithoutCancel(ctx), principal.Of(p), "come in", anyStranger, no)
	}
}
