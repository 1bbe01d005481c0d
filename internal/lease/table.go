package lease

import (
	"cmp"
	"fmt"
	"slices"
	"time"

	"github.com/unum-os/unum/internal/clock"
	"github.com/unum-os/unum/internal/ids"
)

// Mode is what a lease allows. Zero is no lease.
type Mode uint8

// The modes, weakest first.
const (
	Read  Mode = 1 // cache and serve reads; shared
	Write Mode = 2 // also change without telling; held alone
)

// String returns the mode's word.
func (m Mode) String() string {
	switch m {
	case Read:
		return "read"
	case Write:
		return "write"
	}
	return fmt.Sprintf("mode %d", uint8(m))
}

// Kind says what an Effect is.
type Kind uint8

// The kinds of effects; the fields that each sets.
const (
	// Granted answers an Acquire: Ticket, Session, Ino, Seq, and the Mode now
	// held, which may be more than was asked for.
	Granted Kind = iota + 1
	// NotNow answers an Acquire that will not be granted nor wait: Ticket,
	// Session, Ino, Mode (as asked). Serve it from committed state, no lease.
	NotNow
	// Claimed answers a Claim: Ticket, Session.
	Claimed
	// Gone answers an Acquire or Claim that waited when its session ended:
	// Ticket, Session.
	Gone
	// Recall is to be sent to a holder: Session, Ino, Seq of the grant, and in
	// Mode what the other wants (a claim wants Write). Ticket is zero.
	Recall
)

// String returns the kind's word.
func (k Kind) String() string {
	switch k {
	case Granted:
		return "granted"
	case NotNow:
		return "not now"
	case Claimed:
		return "claimed"
	case Gone:
		return "gone"
	case Recall:
		return "recall"
	}
	return fmt.Sprintf("kind %d", uint8(k))
}

// Effect is something for the caller to do.
type Effect struct {
	Kind    Kind
	Ticket  uint64
	Session ids.Session
	Ino     ids.Inode
	Mode    Mode
	Seq     uint64
}

// Held names one grant, as the session that has it knows it.
type Held struct {
	Ino ids.Inode
	Seq uint64
}

// Holder is one lease in force.
type Holder struct {
	Session  ids.Session
	Mode     Mode
	Seq      uint64
	Since    uint64 // Seq of the first grant since which the session has held it without a break
	Recalled bool   // asked back and not yet given back
}

// Counts is the table in numbers, for status.
type Counts struct {
	Read    int // leases
	Write   int // leases
	Claims  int // active claims
	Waiting int // requests that wait
	Recalls int // recalls not yet answered
	Openers int // pairs of session and inode
}

// Table is the lease table of one group's leader. It is not safe for concurrent
// use: the caller's lock guards it. Times given to it must not go backwards.
type Table struct {
	seq      uint64
	inodes   map[ids.Inode]*inode
	sessions map[ids.Session]*session
	requests map[uint64]*request // waiting, and active claims
	recalled map[*grant]struct{}
	n        Counts // Recalls is len(recalled)
}

// inode is what the table knows of one inode; it is dropped when empty.
type inode struct {
	ino     ids.Inode
	holders []*grant // by session
	queue   []*part  // by arrival
	claims  int      // active ones
	openers []ids.Session
}

type grant struct {
	session  ids.Session
	in       *inode
	mode     Mode
	seq      uint64
	since    uint64 // seq of the first of the grants that followed each other without a break
	recalled bool
	at       clock.Instant // of the recall
}

// request is an Acquire or Claim that waits, or a claim that is active.
type request struct {
	ticket  uint64
	session ids.Session
	mode    Mode // of an acquire; 0: a claim
	parts   []*part
	missing int  // parts of a waiting claim that are not free yet
	active  bool // a claim that has been answered
}

// part is a request's place in one inode's queue.
type part struct {
	req  *request
	in   *inode
	free bool // of a claim: nobody holds the inode, and nobody will before the claim
}

// session is the index of what SessionEnded has to drop.
type session struct {
	grants map[*inode]*grant
	opens  map[*inode]struct{}
	waits  map[*request]struct{}
}

// New returns an empty table.
func New() *Table {
	return &Table{
		inodes:   map[ids.Inode]*inode{},
		sessions: map[ids.Session]*session{},
		requests: map[uint64]*request{},
		recalled: map[*grant]struct{}{},
	}
}

// Acquire asks for a lease of s on ino. It is answered
//
//   - Granted at once, if nothing stands against it;
//   - Granted at once under a new seq (the old one is void), if s holds enough
//     already and that has not been recalled for somebody who still waits. A
//     session with Write that asks Read keeps Write;
//   - NotNow at once, if it is for Read and a claim is active or waits on ino, or
//     a Write request waits;
//   - later, after Recall effects to the holders in the way, in order of arrival.
//     A session with Read that asks Write keeps Read while it waits for the
//     other readers.
func (t *Table) Acquire(now clock.Instant, s ids.Session, ino ids.Inode, m Mode, ticket uint64) []Effect {
	if m != Read && m != Write {
		panic("lease: acquire with " + m.String())
	}
	t.fresh(ticket)
	in := t.at(ino)
	if g := in.holder(s); g != nil && g.mode >= m && (!g.recalled || len(in.queue) == 0) {
		return []Effect{t.grant(in, s, m, ticket)}
	}
	if m == Read && in.closedToReaders() {
		return []Effect{{Kind: NotNow, Ticket: ticket, Session: s, Ino: ino, Mode: m}}
	}
	t.enqueue(&request{ticket: ticket, session: s, mode: m}, in)
	return t.pump(now, in, nil)
}

// Claim asks for inos to be free of leases for a mutation sent by session by (0
// if it is the leader's own). Leases that by gives up with the request are in
// relinquished and end at once, if the seq is that of the grant in force;
// otherwise, and for all other leases, recalls go out. Claimed comes when no
// lease is left on any of them, and lasts until Unclaim.
func (t *Table) Claim(now clock.Instant, ticket uint64, inos []ids.Inode, by ids.Session, relinquished []Held) []Effect {
	t.fresh(ticket)
	inos = slices.Clone(inos)
	slices.Sort(inos)
	inos = slices.Compact(inos)
	ins := make([]*inode, len(inos))
	for i, ino := range inos {
		ins[i] = t.at(ino)
	}
	r := &request{ticket: ticket, session: by, missing: len(ins)}
	t.enqueue(r, ins...)
	// Dropped only now: the claim stands in its queues, so that what the
	// dropping lets through came before it.
	var freed []ids.Inode
	for _, h := range relinquished {
		if in := t.inodes[h.Ino]; in != nil {
			if g := in.holder(by); g != nil && g.seq == h.Seq {
				t.drop(g)
				freed = append(freed, h.Ino)
			}
		}
	}
	var out []Effect
	if len(ins) == 0 {
		out = append(out, t.activate(r))
	}
	all := append(freed, inos...)
	slices.Sort(all)
	return t.pumpAll(now, slices.Compact(all), out)
}

// Unclaim ends an active claim. A ticket that is not an active claim's is
// ignored.
func (t *Table) Unclaim(now clock.Instant, ticket uint64) []Effect {
	r := t.requests[ticket]
	if r == nil || !r.active {
		return nil
	}
	delete(t.requests, ticket)
	t.n.Claims--
	inos := make([]ids.Inode, 0, len(r.parts))
	for _, p := range r.parts {
		p.in.claims--
		inos = append(inos, p.in.ino)
	}
	return t.pumpAll(now, inos, nil)
}

// Cancel takes a request that waits out of all queues: its caller gave up. There
// will be no answer. A ticket that was answered before is ignored: a lease then
// has to be released, a claim ended by Unclaim.
func (t *Table) Cancel(now clock.Instant, ticket uint64) []Effect {
	r := t.requests[ticket]
	if r == nil || r.active {
		return nil
	}
	return t.pumpAll(now, t.withdraw(r), nil)
}

// Released says that s gave back the grant seq of ino, asked or unasked. open
// says whether s still has ino open: then it becomes an opener, else it is none
// any more. If seq is not that of the grant in force it is late and ignored.
func (t *Table) Released(now clock.Instant, s ids.Session, ino ids.Inode, seq uint64, open bool) []Effect {
	in := t.inodes[ino]
	if in == nil {
		return nil
	}
	g := in.holder(s)
	if g == nil || g.seq != seq {
		return nil
	}
	t.setOpen(s, in, open)
	t.drop(g)
	return t.pumpAll(now, []ids.Inode{ino}, nil)
}

// SessionEnded drops everything of s: leases, openings, and requests that wait
// (answered Gone). Its active claims stay until Unclaim: their mutation runs.
func (t *Table) SessionEnded(now clock.Instant, s ids.Session) []Effect {
	ss := t.sessions[s]
	if ss == nil {
		return nil
	}
	waits := make([]*request, 0, len(ss.waits))
	for r := range ss.waits {
		waits = append(waits, r)
	}
	slices.SortFunc(waits, func(a, b *request) int { return cmp.Compare(a.ticket, b.ticket) })
	var out []Effect
	var inos []ids.Inode
	for _, r := range waits {
		inos = append(inos, t.withdraw(r)...)
		out = append(out, Effect{Kind: Gone, Ticket: r.ticket, Session: s})
	}
	for in, g := range ss.grants {
		inos = append(inos, in.ino)
		t.drop(g)
	}
	for in := range ss.opens {
		inos = append(inos, in.ino)
		t.setOpen(s, in, false)
	}
	slices.Sort(inos)
	return t.pumpAll(now, slices.Compact(inos), out)
}

// NoteOpen remembers that s has ino open.
func (t *Table) NoteOpen(s ids.Session, ino ids.Inode) { t.setOpen(s, t.at(ino), true) }

// Closed forgets that s had ino open.
func (t *Table) Closed(s ids.Session, ino ids.Inode) {
	if in := t.inodes[ino]; in != nil {
		t.setOpen(s, in, false)
		t.tidy(in)
	}
}

// Openers returns the sessions remembered to have ino open, in order. Holders of
// a lease, who may have it open without telling, are not among them unless they
// were remembered before.
func (t *Table) Openers(ino ids.Inode) []ids.Session {
	if in := t.inodes[ino]; in != nil {
		return slices.Clone(in.openers)
	}
	return nil
}

// Holders returns the leases on ino in order of session.
func (t *Table) Holders(ino ids.Inode) []Holder {
	in := t.inodes[ino]
	if in == nil {
		return nil
	}
	hs := make([]Holder, len(in.holders))
	for i, g := range in.holders {
		hs[i] = g.holder()
	}
	return hs
}

// Find returns the lease of s on ino, if it has one.
func (t *Table) Find(s ids.Session, ino ids.Inode) (Holder, bool) {
	if in := t.inodes[ino]; in != nil {
		if g := in.holder(s); g != nil {
			return g.holder(), true
		}
	}
	return Holder{}, false
}

// Overdue returns, in order, the sessions that have left a recall unanswered for
// longer than limit.
func (t *Table) Overdue(now clock.Instant, limit time.Duration) []ids.Session {
	var ss []ids.Session
	for g := range t.recalled {
		if now.Sub(g.at) > limit {
			ss = append(ss, g.session)
		}
	}
	slices.Sort(ss)
	return slices.Compact(ss)
}

// Outstanding returns the recalls s has not answered, in order of inode, to be
// sent once more to a session that was out of reach. Mode is always Write there.
func (t *Table) Outstanding(s ids.Session) []Effect {
	var es []Effect
	for g := range t.recalled {
		if g.session == s {
			es = append(es, Effect{Kind: Recall, Session: s, Ino: g.in.ino, Mode: Write, Seq: g.seq})
		}
	}
	slices.SortFunc(es, func(a, b Effect) int { return cmp.Compare(a.Ino, b.Ino) })
	return es
}

// Counts returns the table in numbers.
func (t *Table) Counts() Counts {
	n := t.n
	n.Recalls = len(t.recalled)
	return n
}
