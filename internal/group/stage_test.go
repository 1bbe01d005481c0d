package group

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/cockroachdb/pebble/v2"

	"github.com/unum-os/unum/internal/disk"
	"github.com/unum-os/unum/internal/errs"
	"github.com/unum-os/unum/internal/ids"
)

// stage is a cluster of real hosts that a test steps, on disks that lose power or
// fail. Nothing waits for a clock: when nobody has anything to do, all tick.
type stage struct {
	actors  map[ids.Node]*actor
	witness ids.Node // if any
	plant   Fault
	rng     *rand.Rand

	victim  ids.Node // it gets the fault
	fault   disk.Fault
	fs      *disk.Failing // where the fault is
	ops     int64         // counted there when the victim went off
	fired   string
	watch   bool // what is awaited is given up when the victim is off
	stuck   bool // it did not get on
	settled bool // whoever may be lost, may be lost now
	acked   []string
	tried   int
	ticks   int
	err     error // the first thing that is not as promised
	offErr  error // why the victim went off, unless its power failed

	mu      sync.Mutex
	mail    []letter
	parcels []*parcel
	cut     map[ids.Node]bool // from all others
}

type letter struct {
	from ids.Node
	to   *spell // a new life has new connections
	msg  []byte
}

// actor is one machine.
type actor struct {
	st   *stage
	id   ids.Node
	disk *disk.Mem
	l    *spell // nil: it is off
}

// spell is an actor from a start to its end.
type spell struct {
	a     *actor
	fs    *disk.Failing
	h     *Host
	s     *Stepper
	dead  atomic.Bool              // nobody hears of it any more
	image atomic.Pointer[disk.Mem] // what the power failure left

	rotates atomic.Bool // a database is told to begin a new log
}

func newStage(seed uint64, witness ids.Node, plant Fault, list ...ids.Node) *stage {
	st := &stage{actors: map[ids.Node]*actor{}, witness: witness, plant: plant, rng: rand.New(rand.NewPCG(seed, 3)), cut: map[ids.Node]bool{}}
	for _, id := range list {
		st.actors[id] = &actor{st: st, id: id, disk: disk.NewMem()}
	}
	return st
}

// cast lists the actors in order.
func (st *stage) cast() (out []*actor) {
	for id := ids.Node(1); len(out) < len(st.actors); id++ {
		if a := st.actors[id]; a != nil {
			out = append(out, a)
		}
	}
	return out
}

// wrong notes that something is not as promised.
func (st *stage) wrong(format string, args ...any) {
	if st.err == nil {
		st.err = fmt.Errorf(format, args...)
	}
}

// isolate cuts a from all others, or joins it with them again.
func (st *stage) isolate(a ids.Node, cut bool) {
	st.mu.Lock()
	defer st.mu.Unlock()
	st.cut[a] = cut
}

func (st *stage) reaches(from, to ids.Node) bool {
	st.mu.Lock()
	defer st.mu.Unlock()
	return !st.cut[from] && !st.cut[to]
}

// Send is part of Transport.
func (l *spell) Send(to ids.Node, msg []byte) error {
	if l.dead.Load() {
		return nil
	}
	st := l.a.st
	if !st.reaches(l.a.id, to) {
		return errs.E(errs.Unavailable, "send", to.String(), "cut")
	}
	st.mu.Lock()
	defer st.mu.Unlock()
	if peer := st.actors[to]; peer != nil {
		st.mail = append(st.mail, letter{l.a.id, peer.l, msg})
	}
	return nil
}

// Dial is part of Transport.
func (l *spell) Dial(_ context.Context, to ids.Node, _ string) (net.Conn, error) {
	st := l.a.st
	if l.dead.Load() || !st.reaches(l.a.id, to) {
		return nil, errs.E(errs.Unavailable, "dial", to.String(), "cut")
	}
	p := &parcel{from: l, to: to}
	p.sender = &tray{r: &p.back, w: &p.data}
	st.mu.Lock()
	defer st.mu.Unlock()
	st.parcels = append(st.parcels, p)
	return p.sender, nil
}

// parcel is a snapshot on its way: all of it is written before it is read.
type parcel struct {
	from       *spell
	to         ids.Node
	there      *spell // who has it
	data, back bytes.Buffer
	sender     *tray
	receiver   *tray
}

// tray is one end of a parcel.
type tray struct {
	net.Conn // never used
	r        io.Reader
	w        io.Writer
	closed   atomic.Bool
}

func (t *tray) Read(b []byte) (int, error)       { return t.r.Read(b) }
func (t *tray) Write(b []byte) (int, error)      { return t.w.Write(b) }
func (t *tray) Close() error                     { t.closed.Store(true); return nil }
func (t *tray) SetDeadline(time.Time) error      { return nil }
func (t *tray) SetReadDeadline(time.Time) error  { return nil }
func (t *tray) SetWriteDeadline(time.Time) error { return nil }

// spared leaves out what the engine does not survive in one piece (docs/disk.md).
func spared(k disk.Kind, path string) bool {
	return k == disk.OpSyncDir && (strings.Contains(path, "raftlog") || strings.Contains(path, "state"))
}

// boot starts a on its disk; prepare makes the replica, if there may be none. The fault begins at once if it is a power failure,
// else when the databases are open: an engine that cannot open its database may
// end the process.
func (a *actor) boot(f disk.Fault, prepare func(*Host) error) {
	st := a.st
	l := &spell{a: a}
	f = l.aimed(f)
	now, later := f, f.Err != nil && !empty(a.disk)
	if later {
		now = disk.Fault{}
	}
	l.fs = disk.NewFailing(a.disk, now)
	if a.l = l; st.watch && a.id == st.victim {
		st.fs = l.fs
	}
	h, err := New(Config{
		Self: a.id, Dir: "/d", Transport: l, LogBytes: 16 << 10, FS: l.fs,
		Witness: a.id == st.witness, IsWitness: func(n ids.Node) bool { return n == st.witness },
		Hooks: &Hooks{Fault: st.plant},
	})
	if err != nil {
		a.end(err)
		return
	}
	l.h = h
	if later {
		l.fs.Set(f)
	}
	err = func() error {
		if len(h.Groups()) == 0 || prepare != nil {
			if prepare == nil {
				return fmt.Errorf("%v has lost its replica", a.id)
			}
			if err := prepare(h); err != nil && !errs.Has(err, errs.Exists) {
				return err
			}
		}
		var m Machine
		if a.id != st.witness {
			m = &ledger{}
		}
		if _, err := h.Open(tg, m); err != nil {
			return err
		}
		l.s, err = h.Stepper()
		return err
	}()
	if err != nil || l.dead.Load() {
		a.end(err)
	}
}

// aimed returns f for this life: a fault without an error is a power failure. In
// one of four nothing survives of what was not synced, else any part of it.
func (l *spell) aimed(f disk.Fault) disk.Fault {
	if f.At > 0 && f.Err == nil {
		mem, seed := l.a.disk, uint64(f.At)%4*uint64(f.At)
		f.Do = func() { l.dead.Store(true); l.image.Store(mem.Crash(seed)) }
	}
	if spare := f.Spare; spare != nil { // the engine ends the process when it cannot change logs
		f.Spare = func(k disk.Kind, path string) bool {
			return spare(k, path) || l.rotates.Load() && strings.HasSuffix(path, ".log")
		}
	}
	return f
}

func empty(d *disk.Mem) bool {
	names, err := d.List("/d")
	return err != nil || len(names) == 0
}

// end takes a off: its power has failed, or the host has stopped with err.
func (a *actor) end(err error) {
	l := a.l
	a.l = nil
	image := l.image.Load()
	switch {
	case image != nil:
	case err == nil:
		image = a.disk.Crash(a.st.rng.Uint64())
	default:
		if a.id == a.st.victim {
			a.st.offErr = err
		}
		if l.fs.Fired() == "" {
			a.st.wrong("%v stopped, and its disk is sound: %w", a.id, err)
		} else if c := errs.ClassOf(err); c != errs.IO && c != errs.NoSpace {
			a.st.wrong("%v stopped with class %v: %w", a.id, c, err)
		}
		if image = a.disk.Clone(); a.st.rng.IntN(2) == 0 { // killed; or power fails
			image = a.disk.Crash(a.st.rng.Uint64())
		}
	}
	l.dead.Store(true)
	if l.fs == a.st.fs {
		a.st.ops, a.st.fired = l.fs.Count(), l.fs.Fired()
	}
	l.fs.Set(disk.Fault{}) // the engine's goroutines may go on until the process ends
	a.disk = image
	if l.h == nil || err != nil {
		return // it is of no use, and its databases are left as they are
	}
	if l.s != nil {
		_ = l.s.Stop() // it is dead
	}
	_ = l.h.Close() // into a disk that nobody reads
}

// do has the host do one step.
func (a *actor) do(f func() error) {
	l := a.l
	err := l.h.guard(f)
	if l.dead.Load() {
		err = nil
	}
	if err != nil || l.dead.Load() {
		a.end(err)
	}
}

// group returns a's replica.
func (a *actor) group() *Group { return a.l.h.Group(tg) }

// pump does what there is to do, once round; false: there was nothing.
func (st *stage) pump() bool {
	busy := false
	for _, a := range st.cast() {
		if a.l == nil {
			continue
		}
		s := a.l.s
		for _, one := range []struct {
			due func(Due) bool
			f   func() error
		}{
			{func(d Due) bool { return d.Work }, s.Work},
			{func(d Due) bool { return d.Apply }, s.Apply},
			{func(d Due) bool { return d.Trim }, s.Trim},
			{func(d Due) bool { return d.Ship }, s.Ship},
		} {
			if a.l != nil && one.due(s.Due()) {
				busy = true
				a.do(one.f)
			}
		}
	}
	st.mu.Lock()
	mail := st.mail
	st.mail = nil
	st.mu.Unlock()
	for _, m := range mail {
		busy = true
		if m.to == nil || m.to.a.l != m.to || !st.reaches(m.from, m.to.a.id) {
			continue
		}
		if err := m.to.h.Receive(m.from, m.msg); err != nil && !errs.Has(err, errs.Busy) {
			st.wrong("%v refuses what %v says: %w", m.to.a.id, m.from, err)
		}
	}
	return st.carry() || busy
}

// carry brings the parcels on.
func (st *stage) carry() (moved bool) {
	st.mu.Lock()
	all := st.parcels
	st.parcels = nil
	st.mu.Unlock()
	var left []*parcel
	for _, p := range all {
		over := func(err error) {
			moved = true
			if a := p.from.a; a.l == p.from {
				a.do(func() error { p.from.s.Shipped(p.sender, err); return nil })
			}
		}
		to := st.actors[p.to]
		switch {
		case to.l == nil || p.there != nil && to.l != p.there || !st.reaches(p.from.a.id, p.to):
			over(errs.E(errs.Unavailable, "send snapshot", p.to.String(), "cut"))
		case p.from.a.l != p.from: // the sender is no more
		case p.there == nil:
			moved = true
			p.there, p.receiver = to.l, &tray{r: bytes.NewReader(p.data.Bytes()), w: &p.back}
			to.do(func() error { p.there.s.ReceiveSnapshot(p.from.a.id, p.receiver); return nil })
			left = append(left, p)
		case p.receiver.closed.Load():
			over(nil)
		default:
			left = append(left, p)
		}
	}
	st.mu.Lock()
	st.parcels = append(st.parcels, left...)
	st.mu.Unlock()
	return moved
}

// lost reports whether there is no use in going on.
func (st *stage) lost() bool {
	return st.err != nil || st.watch && (st.stuck || st.actors[st.victim].l == nil)
}

// mayStick reports whether the victim's disk fails for good, which a host may live
// with, without getting on, where it promises nothing: for tables that come in.
func (st *stage) mayStick() bool { return st.watch && st.fault.Err != nil && !st.fault.Once }

// until goes on until ok; false: something is wrong, or the victim is off.
func (st *stage) until(what string, ok func() bool) bool {
	end := st.ticks + 500
	if st.mayStick() {
		end = st.ticks + 60
	}
	for rounds := 1; st.ticks < end; rounds++ {
		if st.lost() {
			return false
		}
		if ok() {
			return !st.lost()
		}
		if st.pump() && rounds%100 != 0 { // time passes in the end, however busy they are
			continue
		}
		st.ticks++
		for _, a := range st.cast() {
			if a.l != nil {
				a.do(a.l.s.Tick)
			}
		}
	}
	if st.mayStick() && st.fs.Fired() != "" {
		st.stuck = true
		return false
	}
	s := ""
	for _, a := range st.cast() {
		if a.l != nil {
			trunc, last := a.l.s.LogBounds(a.group())
			s += fmt.Sprintf("\n%v (log %d to %d): %+v", a.id, trunc, last, a.group().Status())
		}
	}
	st.wrong("%s: never; %s", what, s)
	return false
}

// leader returns who leads and can serve, or nil.
func (st *stage) leader() (lead *actor) {
	var term uint64
	for _, a := range st.cast() {
		if a.l == nil {
			continue
		}
		if s := a.group().Status(); s.Role == Leader && s.Term > term && !s.Witness {
			lead, term = a, s.Term
		}
	}
	return lead
}

// lead has n lead.
func (st *stage) lead(n ids.Node) bool {
	asked := -1
	return st.until("lead", func() bool {
		l := st.leader()
		if l != nil && l.id == n {
			return true
		}
		if (asked < 0 || st.ticks > asked+2*electionTicks) && st.actors[n].l != nil {
			asked = st.ticks
			if l != nil {
				l.l.s.Transfer(l.group(), n)
			} else {
				g := st.actors[n].group()
				g.h.in.push(event{kind: evCall, g: g, fn: func() { _ = g.rn.Campaign() }})
			}
		}
		return false
	})
}

// ask has the leader begin something, again until it is done.
func (st *stage) ask(what string, begin func(*Stepper, *Group) *Pending, done func(l *spell)) bool {
	var p *Pending
	var at *spell
	begun := -1
	return st.until(what, func() bool {
		if p != nil {
			_, _, ok, err := p.Poll()
			switch {
			case ok && err == nil:
				if !at.dead.Load() && done != nil {
					done(at)
				}
				return true
			case ok || at.a.l != at:
				p = nil
			}
		}
		if l := st.leader(); p == nil && l != nil && st.ticks > begun {
			at, begun = l.l, st.ticks
			p = begin(at.s, l.group())
		}
		return false
	})
}

// put has n commands acknowledged. One that is not is not repeated.
func (st *stage) put(n int) bool {
	pad := strings.Repeat("x", 3000)
	for range n {
		cmd := ""
		if !st.ask("command", func(s *Stepper, g *Group) *Pending {
			st.tried++
			cmd = fmt.Sprint(st.tried, pad)
			return s.Propose(g, []byte(cmd))
		}, func(*spell) { st.acked = append(st.acked, cmd) }) {
			return false
		}
	}
	return true
}

// seats awaits a configuration that is settled, as who leads knows it.
func (st *stage) seats(voters ...ids.Node) bool {
	return st.until(fmt.Sprint("voters ", voters), func() bool {
		l := st.leader()
		if l == nil {
			return false
		}
		s := l.group().Status()
		return !s.Joint && slices.Equal(s.Voters, voters)
	})
}

// equal awaits that all full replicas that run have applied what is committed and
// compares them: they are the same, each command that was acknowledged is there,
// and each that is there has come once.
func (st *stage) equal() bool {
	states := map[ids.Node]string{}
	if !st.put(1) || !st.until("equal replicas", func() bool {
		l := st.leader()
		if l == nil {
			return false
		}
		top := l.group().Status().Commit
		for _, a := range st.cast() {
			if a.l == nil || a.id == st.witness || !slices.Contains(membersOf(l.group().Status()), a.id) {
				continue
			}
			if s := a.group().Status(); s.Applied != top || s.Commit != top {
				return false
			}
		}
		return true
	}) {
		return false
	}
	l := st.leader()
	for _, a := range st.cast() {
		if a.l == nil || a.id == st.witness || !slices.Contains(membersOf(l.group().Status()), a.id) {
			continue
		}
		v, err := a.group().View()
		if err != nil {
			st.wrong("%v: %w", a.id, err)
			return false
		}
		cmds, n, all, err := history(v)
		v.Close()
		if err != nil {
			st.wrong("%v: %w", a.id, err)
			return false
		}
		states[a.id] = all
		if n != uint64(len(cmds)) {
			st.wrong("%v applied %d commands, and has %d: one came twice, or is gone", a.id, n, len(cmds))
		}
		for i, c := range st.acked {
			if !cmds[c] {
				st.wrong("%v lacks command %.6q, the %dth of %d that were acknowledged", a.id, c, i+1, len(st.acked))
			}
		}
		if all != states[l.id] && states[l.id] != "" {
			st.wrong("%v and %v differ", a.id, l.id)
		}
	}
	return st.err == nil
}

func membersOf(s Status) []ids.Node { return slices.Concat(s.Voters, s.Learners) }

// history reads a ledger: its commands, how many were applied, and everything.
func history(v *View) (cmds map[string]bool, n uint64, all string, err error) {
	lo, hi := v.Space.Bounds()
	it, err := v.NewIter(&pebble.IterOptions{LowerBound: lo, UpperBound: hi})
	if err != nil {
		return nil, 0, "", err
	}
	defer it.Close()
	cmds = map[string]bool{}
	prefix := len(v.Space.Key([]byte("c"), []byte("x"))) - 1
	var b strings.Builder
	for it.First(); it.Valid(); it.Next() {
		k, val := string(it.Key()), it.Value()
		fmt.Fprintf(&b, "%x=%x\n", k, val)
		if bytes.Equal(it.Key(), v.Space.Key([]byte("#"))) {
			for _, c := range val[:8] {
				n = n<<8 | uint64(c)
			}
			continue
		}
		cmds[k[prefix:]] = true
	}
	return cmds, n, b.String(), it.Error()
}

// close ends all that runs.
func (st *stage) close() {
	for _, a := range st.cast() {
		if a.l != nil {
			a.end(nil)
		}
	}
}
