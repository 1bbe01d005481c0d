package group

import (
	"context"
	"net"
	"runtime/debug"

	"github.com/unum-os/unum/internal/ids"
)

// Stepper drives a host from one goroutine, in place of Run: it does the steps
// of the worker, the applier and the trimmer when it is told to, and never waits
// but for the disk. With the same calls, the same Rand and the same disk a host
// does the same. Its methods, and those of the host and its groups that do not
// wait, are called from one goroutine.
type Stepper struct {
	h   *Host
	w   *worker
	a   *applier
	out []*sending
	in  []arrival
}

// sending is a shipment; c is nil until its stream is written.
type sending struct {
	*shipment
	c net.Conn
}

// arrival is a snapshot that has come in and waits for its installation.
type arrival struct {
	from ids.Node
	c    net.Conn
	f    *filling
}

// Due says what a host has to do.
type Due struct{ Work, Apply, Trim, Ship bool }

// Stepper begins to drive the host, once and instead of Run.
func (h *Host) Stepper() (*Stepper, error) {
	if err := h.begin(); err != nil {
		return nil, err
	}
	s := &Stepper{h: h, w: newWorker(h, context.Background()), a: newApplier(h)}
	s.w.launch = func(m *shipment) { s.out = append(s.out, &sending{shipment: m}) }
	return s, nil
}

// Stop ends the driving; all that waits gets its error. Close comes next.
func (s *Stepper) Stop() error {
	s.a.drop()
	return s.h.end()
}

// Due tells what there is to do.
func (s *Stepper) Due() (d Due) {
	d.Work = len(s.w.dirty) > 0 || s.h.in.waiting()
	d.Apply = s.h.apply.waiting()
	d.Trim = len(s.h.trims) > 0
	for _, m := range s.out {
		d.Ship = d.Ship || m.c == nil && len(m.ready.done) > 0
	}
	return d
}

// Tick lets one tick pass.
func (s *Stepper) Tick() error {
	return s.do("worker", func() error { s.w.tick(); return nil })
}

// Work does one step of the worker.
func (s *Stepper) Work() error {
	err := s.do("worker", s.w.step)
	s.settle()
	return err
}

// Apply does one step of the applier.
func (s *Stepper) Apply() error {
	return s.do("applier", func() error { return s.a.step(context.Background()) })
}

// Trim does one step of the trimmer.
func (s *Stepper) Trim() error {
	return s.do("trimmer", func() error {
		select {
		case t := <-s.h.trims:
			return s.h.trim(t)
		default:
			return nil
		}
	})
}

// Ship writes the streams of the snapshots that may go, to connections that
// take them without waiting. How each ends is told by Shipped.
func (s *Stepper) Ship() error {
	return s.do("snapshot sender", func() error {
		var left []*sending
		for _, m := range s.out {
			if m.c != nil || len(m.ready.done) == 0 {
				left = append(left, m)
				continue
			}
			err := (<-m.ready.done).err
			if err == nil {
				m.c, err = s.h.cfg.Transport.Dial(context.Background(), m.to, Service)
			}
			if err == nil {
				if err = m.stream(m.c); err != nil {
					m.c.Close()
				}
			}
			if err != nil {
				m.over(err)
				continue
			}
			left = append(left, m)
		}
		s.out = left
		return nil
	})
}

// Shipped ends the sending of a snapshot over c: if err is nil, the answer can
// be read from it.
func (s *Stepper) Shipped(c net.Conn, err error) {
	for i, m := range s.out {
		if m.c == c {
			if err == nil {
				err = m.answer(c)
			}
			c.Close()
			s.out = append(s.out[:i:i], s.out[i+1:]...)
			m.over(err)
			return
		}
	}
}

// ReceiveSnapshot takes a snapshot from c, where all of it can be read, and
// answers on c, perhaps later, and closes it.
func (s *Stepper) ReceiveSnapshot(from ids.Node, c net.Conn) {
	f, err := s.h.fillSnapshot(from, c)
	if err != nil {
		s.answer(arrival{from, c, f}, "", err)
		return
	}
	s.h.in.push(event{kind: evSnapshot, g: f.g, fill: f})
	s.in = append(s.in, arrival{from, c, f})
}

// settle answers what is installed or refused.
func (s *Stepper) settle() {
	left := s.in[:0]
	for _, a := range s.in {
		select {
		case why := <-a.f.over:
			s.answer(a, why, nil)
		default:
			left = append(left, a)
		}
	}
	s.in = left
}

func (s *Stepper) answer(a arrival, why string, err error) {
	// What comes back has been told to the sender, or the connection is gone.
	_ = s.h.answerSnapshot(a.from, a.c, a.f, why, err)
	a.c.Close()
}

// do runs one step; an error or a panic ends the host.
func (s *Stepper) do(what string, f func() error) (err error) {
	defer func() {
		if r := recover(); r != nil {
			s.h.log.Error("groups stopped by a broken invariant", "in", what, "panic", r, "stack", string(debug.Stack()))
			err = panicErr("run groups: "+what, r)
		}
		if err != nil {
			s.h.fail(err)
		}
	}()
	if err := s.h.failure(); err != nil {
		return err
	}
	return f()
}

// Pending is a proposal, a change of replicas or a read that was begun.
type Pending struct {
	done   chan outcome
	cancel context.CancelFunc
}

// Poll returns the outcome once there is one: a proposal's result and index, or
// the error. Later calls give nothing.
func (p *Pending) Poll() (result any, index uint64, ok bool, err error) {
	select {
	case o := <-p.done:
		p.cancel()
		return o.result, o.index, true, o.err
	default:
		return nil, 0, false, nil
	}
}

// GiveUp stops the waiting, as the end of a context does.
func (p *Pending) GiveUp() { p.cancel() }

func pending(f func(ctx context.Context) (chan outcome, error)) *Pending {
	ctx, cancel := context.WithCancel(context.Background())
	done, err := f(ctx)
	if err != nil {
		done = make(chan outcome, 1)
		done <- outcome{err: err}
	}
	return &Pending{done, cancel}
}

// Propose begins what Group.Propose does; where that would wait for room, it is
// refused.
func (s *Stepper) Propose(g *Group, cmd []byte) *Pending {
	room, cancel := context.WithCancel(context.Background())
	cancel()
	return pending(func(ctx context.Context) (chan outcome, error) {
		p, err := g.proposal(ctx, room, cmd)
		if err != nil {
			return nil, err
		}
		return p.done, g.enqueue(p)
	})
}

// ReadIndex begins what Group.ReadIndex does.
func (s *Stepper) ReadIndex(g *Group) *Pending {
	return pending(func(ctx context.Context) (chan outcome, error) {
		r, err := g.reader(ctx)
		if err != nil {
			return nil, err
		}
		return r.done, nil
	})
}

// AddLearner begins one attempt of what Group.AddLearner does, as do those that
// follow for their like.
func (s *Stepper) AddLearner(g *Group, n ids.Node) *Pending { return attempt(g, addLearner(n)) }

// Reseat changes who votes.
func (s *Stepper) Reseat(g *Group, add, demote, drop []ids.Node) *Pending {
	return attempt(g, g.reseat(add, demote, drop))
}

// Remove takes a replica out.
func (s *Stepper) Remove(g *Group, n ids.Node) *Pending { return attempt(g, g.remove(n)) }

func attempt(g *Group, want plan) *Pending {
	return pending(func(ctx context.Context) (chan outcome, error) {
		p := &proposal{id: g.h.newID(), ctx: ctx, change: want, done: make(chan outcome, 1)}
		return p.done, g.enqueue(p)
	})
}

// Transfer asks for the leadership to move.
func (s *Stepper) Transfer(g *Group, to ids.Node) {
	s.h.in.push(event{kind: evCall, g: g, fn: func() { _ = g.transfer("transfer leadership", to) }})
}

// LogTerm returns the term of an entry in the replica's log, if it is there.
func (s *Stepper) LogTerm(g *Group, index uint64) (term uint64, ok bool) {
	t, err := g.log.Term(index)
	return t, err == nil
}

// Config returns the voters in force at a replica, those of the other side while
// a change is under way, and the entry that brought them, if since its start.
func (s *Stepper) Config(g *Group) (voters, outgoing []ids.Node, at uint64) {
	return nodes(g.conf.Voters), nodes(g.conf.VotersOutgoing), g.confAt
}

// LogBounds returns the truncation point and the last entry of the log.
func (s *Stepper) LogBounds(g *Group) (trunc, last uint64) { return g.log.trunc, g.log.last }
