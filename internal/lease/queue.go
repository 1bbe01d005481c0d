package lease

import (
	"cmp"
	"fmt"
	"slices"

	"github.com/unum-os/unum/internal/clock"
	"github.com/unum-os/unum/internal/ids"
)

// fresh checks that ticket is not in use.
func (t *Table) fresh(ticket uint64) {
	if t.requests[ticket] != nil {
		panic(fmt.Sprintf("lease: ticket %d is in use", ticket))
	}
}

// at returns the entry of ino, a new one if there is none.
func (t *Table) at(ino ids.Inode) *inode {
	in := t.inodes[ino]
	if in == nil {
		in = &inode{ino: ino}
		t.inodes[ino] = in
	}
	return in
}

// of returns the index of s, a new one if there is none.
func (t *Table) of(s ids.Session) *session {
	ss := t.sessions[s]
	if ss == nil {
		ss = &session{grants: map[*inode]*grant{}, opens: map[*inode]struct{}{}, waits: map[*request]struct{}{}}
		t.sessions[s] = ss
	}
	return ss
}

// tidy drops in from the table if nothing is left in it.
func (t *Table) tidy(in *inode) {
	if len(in.holders) == 0 && len(in.queue) == 0 && in.claims == 0 && len(in.openers) == 0 {
		delete(t.inodes, in.ino)
	}
}

// tidySession drops the index of s if nothing is left in it.
func (t *Table) tidySession(s ids.Session) {
	if ss := t.sessions[s]; ss != nil && len(ss.grants) == 0 && len(ss.opens) == 0 && len(ss.waits) == 0 {
		delete(t.sessions, s)
	}
}

// place returns where s is, or belongs, among the holders.
func (in *inode) place(s ids.Session) (int, bool) {
	return slices.BinarySearchFunc(in.holders, s, func(g *grant, s ids.Session) int { return cmp.Compare(g.session, s) })
}

// holder returns the grant of s, or nil.
func (in *inode) holder(s ids.Session) *grant {
	if i, ok := in.place(s); ok {
		return in.holders[i]
	}
	return nil
}

func (g *grant) holder() Holder {
	return Holder{Session: g.session, Mode: g.mode, Seq: g.seq, Since: g.since, Recalled: g.recalled}
}

// closedToReaders reports whether a new Read lease must not be given nor waited
// for: a claim is active, or somebody other than a reader waits.
func (in *inode) closedToReaders() bool {
	return in.claims > 0 || slices.ContainsFunc(in.queue, func(p *part) bool { return p.req.mode != Read })
}

// enqueue puts r at the end of the queues of ins.
func (t *Table) enqueue(r *request, ins ...*inode) {
	t.requests[r.ticket] = r
	t.n.Waiting++
	t.of(r.session).waits[r] = struct{}{}
	r.parts = make([]*part, len(ins))
	for i, in := range ins {
		r.parts[i] = &part{req: r, in: in}
		in.queue = append(in.queue, r.parts[i])
	}
}

// dequeue takes r out of all queues.
func (t *Table) dequeue(r *request) {
	t.n.Waiting--
	delete(t.sessions[r.session].waits, r)
	t.tidySession(r.session)
	for _, p := range r.parts {
		i := slices.Index(p.in.queue, p)
		p.in.queue = slices.Delete(p.in.queue, i, i+1)
	}
}

// withdraw ends r, which waits, and returns its inodes in order.
func (t *Table) withdraw(r *request) []ids.Inode {
	t.dequeue(r)
	delete(t.requests, r.ticket)
	inos := make([]ids.Inode, len(r.parts))
	for i, p := range r.parts {
		inos[i] = p.in.ino
	}
	return inos
}

// activate makes a waiting claim active.
func (t *Table) activate(r *request) Effect {
	t.dequeue(r)
	r.active = true
	t.n.Claims++
	for _, p := range r.parts {
		p.in.claims++
	}
	return Effect{Kind: Claimed, Ticket: r.ticket, Session: r.session}
}

// grant gives s a lease on in, in place of the one it may have.
func (t *Table) grant(in *inode, s ids.Session, m Mode, ticket uint64) Effect {
	t.seq++
	since := t.seq
	if old := in.holder(s); old != nil {
		m, since = max(m, old.mode), old.since
		t.drop(old)
	}
	g := &grant{session: s, in: in, mode: m, seq: t.seq, since: since}
	i, _ := in.place(s)
	in.holders = slices.Insert(in.holders, i, g)
	t.of(s).grants[in] = g
	t.tally(m, 1)
	return Effect{Kind: Granted, Ticket: ticket, Session: s, Ino: in.ino, Mode: m, Seq: g.seq}
}

// drop ends a lease.
func (t *Table) drop(g *grant) {
	i, _ := g.in.place(g.session)
	g.in.holders = slices.Delete(g.in.holders, i, i+1)
	delete(t.recalled, g)
	delete(t.sessions[g.session].grants, g.in)
	t.tidySession(g.session)
	t.tally(g.mode, -1)
}

func (t *Table) tally(m Mode, d int) {
	if m == Write {
		t.n.Write += d
	} else {
		t.n.Read += d
	}
}

// setOpen makes s an opener of in, or no longer one.
func (t *Table) setOpen(s ids.Session, in *inode, open bool) {
	i, is := slices.BinarySearch(in.openers, s)
	switch {
	case open && !is:
		in.openers = slices.Insert(in.openers, i, s)
		t.of(s).opens[in] = struct{}{}
		t.n.Openers++
	case !open && is:
		in.openers = slices.Delete(in.openers, i, i+1)
		delete(t.sessions[s].opens, in)
		t.tidySession(s)
		t.n.Openers--
	}
}

// recall asks every holder that is in the way of a request by s for mode m (0: a
// claim), once per grant, and reports whether there is any.
func (t *Table) recall(now clock.Instant, in *inode, s ids.Session, m Mode, out []Effect) ([]Effect, bool) {
	inWay := false
	for _, g := range in.holders {
		switch {
		case m != 0 && g.session == s: // its own: replaced by the new grant
		case m == Read && g.mode == Read:
		default:
			inWay = true
			if !g.recalled {
				g.recalled, g.at = true, now
				t.recalled[g] = struct{}{}
				want := m
				if m == 0 {
					want = Write
				}
				out = append(out, Effect{Kind: Recall, Session: g.session, Ino: in.ino, Mode: want, Seq: g.seq})
			}
		}
	}
	return out, inWay
}

// pump lets the requests at the head of in's queue go on as far as they can.
//
// Nothing it does lets a request in another queue go on: a claim that becomes
// active bars what it barred while it waited.
func (t *Table) pump(now clock.Instant, in *inode, out []Effect) []Effect {
	inWay, claimed := false, in.claims > 0
	for i := 0; i < len(in.queue); {
		p := in.queue[i]
		r := p.req
		if r.mode != 0 {
			if claimed {
				return out
			}
			if out, inWay = t.recall(now, in, r.session, r.mode, out); inWay {
				return out
			}
			t.dequeue(r)
			delete(t.requests, r.ticket)
			out = append(out, t.grant(in, r.session, r.mode, r.ticket))
			continue
		}
		claimed = true
		if !p.free {
			if out, inWay = t.recall(now, in, r.session, 0, out); !inWay {
				p.free = true
				r.missing--
			}
		}
		if r.missing == 0 {
			out = append(out, t.activate(r))
			continue
		}
		i++
	}
	return out
}

// pumpAll pumps inos, which must be in order, and drops those left empty.
func (t *Table) pumpAll(now clock.Instant, inos []ids.Inode, out []Effect) []Effect {
	for _, ino := range inos {
		if in := t.inodes[ino]; in != nil {
			out = t.pump(now, in, out)
			t.tidy(in)
		}
	}
	return out
}
