package lease

import (
	"cmp"
	"slices"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/unum-os/unum/internal/clock"
	"github.com/unum-os/unum/internal/ids"
)

// model is the table said naively: one list of requests in order of arrival,
// looked through from the start until nothing more happens. It keeps no seqs of
// its own but learns them from the table's answers.
type model struct {
	reqs   []*mreq
	leases map[ids.Inode]map[ids.Session]*mlease
	opens  map[ids.Inode]map[ids.Session]bool
}

type mreq struct {
	ticket uint64
	s      ids.Session
	inos   []ids.Inode
	mode   Mode // 0: claim
	active bool
}

type mlease struct {
	mode     Mode
	seq      uint64
	recalled bool
}

func newModel() *model {
	return &model{leases: map[ids.Inode]map[ids.Session]*mlease{}, opens: map[ids.Inode]map[ids.Session]bool{}}
}

func (m *model) give(ino ids.Inode, s ids.Session, mode Mode) {
	if m.leases[ino] == nil {
		m.leases[ino] = map[ids.Session]*mlease{}
	}
	if old := m.leases[ino][s]; old != nil {
		mode = max(mode, old.mode)
	}
	m.leases[ino][s] = &mlease{mode: mode}
}

func (m *model) acquire(s ids.Session, ino ids.Inode, mode Mode, ticket uint64) []Effect {
	var claim, write, any bool
	for _, r := range m.reqs {
		if slices.Contains(r.inos, ino) {
			claim = claim || r.mode == 0
			write = write || r.mode == Write
			any = any || !r.active
		}
	}
	if l := m.leases[ino][s]; l != nil && l.mode >= mode && (!l.recalled || !any) {
		m.give(ino, s, mode)
		return []Effect{{Kind: Granted, Ticket: ticket, Session: s, Ino: ino, Mode: m.leases[ino][s].mode}}
	}
	if mode == Read && (claim || write) {
		return []Effect{{Kind: NotNow, Ticket: ticket, Session: s, Ino: ino, Mode: mode}}
	}
	m.reqs = append(m.reqs, &mreq{ticket: ticket, s: s, inos: []ids.Inode{ino}, mode: mode})
	return m.settle(nil)
}

func (m *model) settle(out []Effect) []Effect {
	for again := true; again; {
		again = false
		for k, r := range m.reqs {
			if r.active {
				continue
			}
			ok := true
			for _, ino := range r.inos {
				bar := false
				for j, q := range m.reqs {
					if slices.Contains(q.inos, ino) && (r.mode == 0 && j < k && q.mode != 0 ||
						r.mode != 0 && (q.active || j < k)) {
						bar = true
					}
				}
				if bar {
					ok = false
					continue
				}
				for s, l := range m.leases[ino] {
					if r.mode != 0 && (s == r.s || r.mode == Read && l.mode == Read) {
						continue
					}
					ok = false
					if !l.recalled {
						l.recalled = true
						out = append(out, Effect{Kind: Recall, Session: s, Ino: ino, Mode: cmp.Or(r.mode, Write)})
					}
				}
			}
			if !ok {
				continue
			}
			again = true
			if r.mode == 0 {
				r.active = true
				out = append(out, Effect{Kind: Claimed, Ticket: r.ticket, Session: r.s})
			} else {
				m.give(r.inos[0], r.s, r.mode)
				out = append(out, Effect{Kind: Granted, Ticket: r.ticket, Session: r.s, Ino: r.inos[0], Mode: m.leases[r.inos[0]][r.s].mode})
				m.reqs = slices.Delete(m.reqs, k, k+1)
			}
			break
		}
	}
	return out
}

func (m *model) remove(f func(r *mreq) bool) { m.reqs = slices.DeleteFunc(m.reqs, f) }

// bare sorts effects and takes out the seqs, which the model does not predict.
func bare(es []Effect) []Effect {
	es = slices.Clone(es)
	for i := range es {
		es[i].Seq = 0
	}
	slices.SortFunc(es, func(a, b Effect) int {
		return cmp.Or(cmp.Compare(a.Kind, b.Kind), cmp.Compare(a.Ticket, b.Ticket),
			cmp.Compare(a.Session, b.Session), cmp.Compare(a.Ino, b.Ino))
	})
	return es
}

type world struct {
	t       *rapid.T
	tab     *Table
	twin    *Table // given the same calls: must say the same
	m       *model
	now     clock.Instant
	answers map[uint64]int
	asked   map[uint64]bool // to be answered exactly once
	recalls map[uint64]bool // seqs recalled so far
	tickets []uint64
	next    uint64
}

func (w *world) do(want []Effect, f func(*Table) []Effect) {
	got, again := f(w.tab), f(w.twin)
	if !slices.Equal(got, again) {
		w.t.Fatalf("not deterministic:\n%v\n%v", got, again)
	}
	if !slices.Equal(bare(got), bare(want)) {
		w.t.Fatalf("effects\n got %v\nwant %v", bare(got), bare(want))
	}
	for _, e := range got {
		switch e.Kind {
		case Recall:
			if w.recalls[e.Seq] {
				w.t.Fatalf("grant %d recalled twice", e.Seq)
			}
			w.recalls[e.Seq] = true
		case Granted:
			if l := w.m.leases[e.Ino][e.Session]; l != nil && l.seq < e.Seq {
				l.seq = e.Seq
			}
			w.answers[e.Ticket]++
		default:
			w.answers[e.Ticket]++
		}
	}
	w.check()
}

// check compares the states and looks for two things that exclude each other.
func (w *world) check() {
	n := Counts{}
	for _, r := range w.m.reqs {
		if r.active {
			n.Claims++
		} else {
			n.Waiting++
		}
	}
	for ino := ids.Inode(1); ino <= inodes; ino++ {
		hs := w.tab.Holders(ino)
		if len(hs) != len(w.m.leases[ino]) {
			w.t.Fatalf("inode %d: holders %v, model has %d", ino, hs, len(w.m.leases[ino]))
		}
		for _, h := range hs {
			l := w.m.leases[ino][h.Session]
			if l == nil || l.mode != h.Mode || l.seq != h.Seq || l.recalled != h.Recalled {
				w.t.Fatalf("inode %d: holder %+v, model %+v", ino, h, l)
			}
			if h.Mode == Write && len(hs) > 1 {
				w.t.Fatalf("inode %d: a writer among others: %v", ino, hs)
			}
			if h.Mode == Write {
				n.Write++
			} else {
				n.Read++
			}
			if h.Recalled {
				n.Recalls++
			}
		}
		for _, r := range w.m.reqs {
			if r.active && slices.Contains(r.inos, ino) && len(hs) > 0 {
				w.t.Fatalf("inode %d: claim %d beside leases %v", ino, r.ticket, hs)
			}
		}
		for _, s := range w.tab.Openers(ino) {
			if !w.m.opens[ino][s] {
				w.t.Fatalf("inode %d: opener %d", ino, s)
			}
			n.Openers++
		}
		if len(w.tab.Openers(ino)) != len(w.m.opens[ino]) {
			w.t.Fatalf("inode %d: openers %v want %v", ino, w.tab.Openers(ino), w.m.opens[ino])
		}
	}
	if got := w.tab.Counts(); got != n {
		w.t.Fatalf("counts %+v want %+v", got, n)
	}
}

const (
	inodes   = 4
	sessions = 4
)

func (w *world) ticket() uint64 {
	w.next++
	w.tickets = append(w.tickets, w.next)
	w.asked[w.next] = true
	return w.next
}

func (w *world) acquire(s ids.Session, ino ids.Inode, m Mode) {
	k := w.ticket()
	w.do(w.m.acquire(s, ino, m, k), func(t *Table) []Effect { return t.Acquire(w.now, s, ino, m, k) })
}

func (w *world) claim(by ids.Session, inos []ids.Inode, gone []Held) {
	k := w.ticket()
	w.m.reqs = append(w.m.reqs, &mreq{ticket: k, s: by, inos: inos})
	for _, h := range gone {
		if l := w.m.leases[h.Ino][by]; l != nil && l.seq == h.Seq {
			delete(w.m.leases[h.Ino], by)
		}
	}
	w.do(w.m.settle(nil), func(t *Table) []Effect { return t.Claim(w.now, k, inos, by, gone) })
}

func (w *world) released(s ids.Session, ino ids.Inode, seq uint64, open bool) {
	if l := w.m.leases[ino][s]; l != nil && l.seq == seq {
		delete(w.m.leases[ino], s)
		w.open(s, ino, open)
	}
	w.do(w.m.settle(nil), func(t *Table) []Effect { return t.Released(w.now, s, ino, seq, open) })
}

func (w *world) open(s ids.Session, ino ids.Inode, open bool) {
	if w.m.opens[ino] == nil {
		w.m.opens[ino] = map[ids.Session]bool{}
	}
	if open {
		w.m.opens[ino][s] = true
	} else {
		delete(w.m.opens[ino], s)
	}
}

func (w *world) unclaim(k uint64) {
	w.m.remove(func(r *mreq) bool { return r.active && r.ticket == k })
	w.do(w.m.settle(nil), func(t *Table) []Effect { return t.Unclaim(w.now, k) })
}

func (w *world) cancel(k uint64) {
	w.m.remove(func(r *mreq) bool {
		if !r.active && r.ticket == k {
			delete(w.asked, k)
			return true
		}
		return false
	})
	w.do(w.m.settle(nil), func(t *Table) []Effect { return t.Cancel(w.now, k) })
}

func (w *world) end(s ids.Session) {
	var out []Effect
	w.m.remove(func(r *mreq) bool {
		if r.active || r.s != s {
			return false
		}
		out = append(out, Effect{Kind: Gone, Ticket: r.ticket, Session: s})
		return true
	})
	for ino := ids.Inode(1); ino <= inodes; ino++ {
		delete(w.m.leases[ino], s)
		delete(w.m.opens[ino], s)
	}
	w.do(w.m.settle(out), func(t *Table) []Effect { return t.SessionEnded(w.now, s) })
}

// drain answers every recall and ends every claim until nothing waits.
func (w *world) drain() {
	for len(w.m.reqs) > 0 {
		moved := false
		for _, r := range slices.Clone(w.m.reqs) {
			if r.active {
				w.unclaim(r.ticket)
				moved = true
			}
		}
		for s := ids.Session(1); s <= sessions; s++ {
			for _, e := range w.tab.Outstanding(s) {
				w.released(s, e.Ino, e.Seq, false)
				moved = true
			}
		}
		if !moved {
			w.t.Fatalf("stuck: %d wait, no recall and no claim outstanding", len(w.m.reqs))
		}
	}
	for k := range w.answers {
		if w.answers[k] != 1 || !w.asked[k] {
			w.t.Fatalf("ticket %d answered %d times (wanted: %v)", k, w.answers[k], w.asked[k])
		}
	}
	for k := range w.asked {
		if w.answers[k] != 1 {
			w.t.Fatalf("ticket %d not answered", k)
		}
	}
}

func TestAgainstModel(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		w := &world{t: rt, tab: New(), twin: New(), m: newModel(), answers: map[uint64]int{}, asked: map[uint64]bool{}, recalls: map[uint64]bool{}}
		anyS := rapid.Custom(func(t *rapid.T) ids.Session { return ids.Session(rapid.IntRange(1, sessions).Draw(t, "s")) })
		anyI := rapid.Custom(func(t *rapid.T) ids.Inode { return ids.Inode(rapid.IntRange(1, inodes).Draw(t, "ino")) })
		anyOf := func(t *rapid.T) (uint64, bool) {
			if len(w.tickets) == 0 {
				return 0, false
			}
			return rapid.SampledFrom(w.tickets[max(0, len(w.tickets)-8):]).Draw(t, "ticket"), true
		}
		rt.Repeat(map[string]func(*rapid.T){
			"acquire": func(t *rapid.T) {
				w.acquire(anyS.Draw(t, "session"), anyI.Draw(t, "inode"), rapid.SampledFrom([]Mode{Read, Read, Write}).Draw(t, "mode"))
			},
			"claim": func(t *rapid.T) {
				by := anyS.Draw(t, "by")
				inos := rapid.SliceOfNDistinct(anyI, 0, 3, rapid.ID).Draw(t, "inos")
				var gone []Held
				for _, ino := range rapid.SliceOfNDistinct(anyI, 0, 2, rapid.ID).Draw(t, "relinquished") {
					h, ok := w.tab.Find(by, ino)
					if late := rapid.IntRange(0, 3).Draw(t, "late") == 0; late || !ok {
						h.Seq += 7
					}
					gone = append(gone, Held{Ino: ino, Seq: h.Seq})
				}
				w.claim(by, inos, gone)
			},
			"release": func(t *rapid.T) {
				ino := anyI.Draw(t, "inode")
				if hs := w.tab.Holders(ino); len(hs) > 0 {
					h := rapid.SampledFrom(hs).Draw(t, "holder")
					w.released(h.Session, ino, h.Seq, rapid.Bool().Draw(t, "open"))
				}
			},
			"late": func(t *rapid.T) {
				w.released(anyS.Draw(t, "session"), anyI.Draw(t, "inode"), w.tab.seq+1, true)
			},
			"answer": func(t *rapid.T) {
				s := anyS.Draw(t, "session")
				for _, e := range w.tab.Outstanding(s) {
					w.released(s, e.Ino, e.Seq, rapid.Bool().Draw(t, "open"))
				}
			},
			"unclaim": func(t *rapid.T) {
				if k, ok := anyOf(t); ok {
					w.unclaim(k)
				}
			},
			"cancel": func(t *rapid.T) {
				if k, ok := anyOf(t); ok {
					w.cancel(k)
				}
			},
			"end": func(t *rapid.T) {
				if rapid.IntRange(0, 3).Draw(t, "rarely") == 0 {
					w.end(anyS.Draw(t, "session"))
				}
			},
			"open": func(t *rapid.T) {
				s, ino := anyS.Draw(t, "session"), anyI.Draw(t, "inode")
				w.open(s, ino, true)
				w.tab.NoteOpen(s, ino)
				w.twin.NoteOpen(s, ino)
				w.check()
			},
			"closed": func(t *rapid.T) {
				s, ino := anyS.Draw(t, "session"), anyI.Draw(t, "inode")
				w.open(s, ino, false)
				w.tab.Closed(s, ino)
				w.twin.Closed(s, ino)
				w.check()
			},
			"time": func(t *rapid.T) {
				w.now = w.now.Add(time.Duration(rapid.IntRange(0, 1000).Draw(t, "ms")) * time.Millisecond)
			},
		})
		w.drain()
		for s := ids.Session(1); s <= sessions; s++ {
			w.end(s)
		}
		if len(w.tab.inodes)+len(w.tab.sessions)+len(w.tab.requests)+len(w.tab.recalled) != 0 {
			rt.Fatalf("left over: %d inodes, %d sessions, %d requests, %d recalls",
				len(w.tab.inodes), len(w.tab.sessions), len(w.tab.requests), len(w.tab.recalled))
		}
	})
}
