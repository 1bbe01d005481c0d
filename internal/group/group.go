package group

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/cockroachdb/pebble/v2"
	"go.etcd.io/raft/v3"

	"github.com/unum-os/unum/internal/errs"
	"github.com/unum-os/unum/internal/ids"
)

// Role is what a replica is in its group at the moment.
type Role uint8

// The roles.
const (
	Follower Role = iota
	Candidate
	Leader
)

// String returns the role's word.
func (r Role) String() string { return [...]string{"follower", "candidate", "leader"}[r] }

// Progress is what a leader knows of another replica.
type Progress struct {
	Match, Next uint64 // last entry it surely has; next to send
	State       string // probe, replicate or snapshot
	Active      bool   // heard from lately
	Learner     bool
	CaughtUp    bool // lacks so little that it may be promoted
	Witness     bool
}

// Status is a replica's view of its group.
type Status struct {
	Group           ids.Group
	Role            Role
	Term            uint64
	Leader          ids.Node // 0: unknown
	Commit, Applied uint64
	Voters          []ids.Node // all that count, during a joint change both sides
	Learners        []ids.Node
	Joint           bool                  // a change of voters is under way, or on a leader, a majority of them may not know it
	Progress        map[ids.Node]Progress // of a leader; some ticks old
	Witness         bool                  // this replica is a witness: as a leader it serves nobody, and hands over
	Contradicts     ids.Node              // who has other entries committed than this replica, since the start; 0: nobody
	Needs           []ids.Node            // of a witness that leads and cannot hand over: one of these must come back
}

// NotLeaderError says that another replica must be asked. Its class is
// NotLeader.
type NotLeaderError struct {
	Group  ids.Group
	Leader ids.Node // 0: unknown
}

// Error names the group and its leader.
func (e *NotLeaderError) Error() string {
	if e.Leader == 0 {
		return fmt.Sprintf("group %d: no leader is known", e.Group)
	}
	return fmt.Sprintf("group %d: the leader is %v", e.Group, e.Leader)
}

// Unwrap gives the class.
func (e *NotLeaderError) Unwrap() error { return errs.NotLeader.Err() }

// Group is this node's replica of one group. Its methods may be called from
// anywhere, except from within a machine or a watcher.
type Group struct {
	h       *Host
	id      ids.Group
	m       Machine
	space   Space
	gate    gate
	applied atomic.Uint64

	size measured

	stepped // what belongs to the worker goroutine

	mu        sync.Mutex
	st        Status // Applied and Commit are filled in when asked for
	commit    uint64
	at        point // applied
	watchers  []func(Status)
	changed   chan struct{} // closed at the next change of st
	props     map[proposalID]*proposal
	byIndex   map[uint64]*proposal
	reads     []*reader // not yet asked for
	asked     bool      // the worker has been told of reads
	confirmed []readBatch
	stopped   error // no more proposals or reads
}

// proposal is a command or a change of configuration on its way.
type proposal struct {
	id     proposalID
	ctx    context.Context
	size   int64 // taken from the gate
	data   []byte
	change plan         // instead of data
	handed bool         // raft has it; the worker's
	index  uint64       // in the log, once there
	done   chan outcome // room for the one outcome
}

type outcome struct {
	result any
	index  uint64
	err    error
}

// reader waits for a read barrier.
type reader struct {
	ctx  context.Context
	done chan outcome
}

// readBatch is a number of readers with one barrier.
type readBatch struct {
	index   uint64
	readers []*reader
	tick    uint64 // when asked
}

func newGroup(h *Host, g ids.Group, m Machine) *Group {
	return &Group{
		h: h, id: g, m: m, space: NewSpace(g), gate: gate{free: maxUnresolved},
		changed: make(chan struct{}), props: map[proposalID]*proposal{}, byIndex: map[uint64]*proposal{},
		stepped: stepped{asking: map[proposalID]readBatch{}, holds: map[uint64]uint64{}, heard: map[ids.Node]uint64{}},
	}
}

// ID returns the group's number.
func (g *Group) ID() ids.Group { return g.id }

// Propose brings cmd into the log and returns, when it is applied here, what the
// machine made of it and its index. cmd is copied. Errors: NotLeader (as
// *NotLeaderError; surely not applied), Busy (refused, try again), TooLarge,
// and Timeout or Interrupted (it may be applied yet, or never).
func (g *Group) Propose(ctx context.Context, cmd []byte) (any, uint64, error) {
	p, err := g.proposal(ctx, ctx, cmd)
	if err != nil {
		return nil, 0, err
	}
	start := time.Now()
	o := g.submit(ctx, p)
	g.h.count.proposed(start, o)
	return o.result, o.index, o.err
}

// proposal makes a proposal of cmd, for which room is awaited until room ends.
func (g *Group) proposal(ctx, room context.Context, cmd []byte) (*proposal, error) {
	place := fmt.Sprint(g.id)
	if len(cmd) == 0 || len(cmd) > MaxCommand {
		return nil, errs.E(errs.TooLarge, "propose to group", place, "%d bytes, want 1 to %d", len(cmd), MaxCommand)
	}
	if leader, _ := g.Leader(); leader != g.h.cfg.Self {
		return nil, &NotLeaderError{g.id, leader}
	}
	if g.h.cfg.Witness {
		return nil, g.notHere("propose to group")
	}
	n := int64(len(cmd) + 256) // and what surrounds it
	switch err := g.gate.acquire(room, n, g.h.stopped); {
	case errs.Has(err, errs.Unavailable):
		return nil, err
	case err != nil:
		return nil, errs.E(errs.Busy, "propose to group", place, "too much is waiting to be applied")
	}
	p := &proposal{id: g.h.newID(), ctx: ctx, size: n, done: make(chan outcome, 1)}
	p.data = append(append(append(make([]byte, 0, entryHeader+len(cmd)), entryVersion), p.id[:]...), cmd...)
	return p, nil
}

// enqueue hands p to the worker.
func (g *Group) enqueue(p *proposal) error {
	g.mu.Lock()
	if g.stopped != nil {
		g.mu.Unlock()
		g.gate.release(p.size)
		return g.stopped
	}
	g.props[p.id] = p
	g.mu.Unlock()
	g.h.in.push(event{kind: evPropose, g: g, p: p})
	return nil
}

// submit hands p to the worker and waits.
func (g *Group) submit(ctx context.Context, p *proposal) outcome {
	if err := g.enqueue(p); err != nil {
		return outcome{err: err}
	}
	select {
	case o := <-p.done:
		return o
	case <-ctx.Done():
		return outcome{err: waitErr(ctx, "propose to group", g.id, "; the outcome is unknown")}
	}
}

func waitErr(ctx context.Context, op string, g ids.Group, more string) error {
	c := errs.Timeout
	if errors.Is(ctx.Err(), context.Canceled) {
		c = errs.Interrupted
	}
	return errs.E(c, op, fmt.Sprint(g), "%v%s", context.Cause(ctx), more)
}

// resolve gives the proposal id its outcome, if it waits here.
func (g *Group) resolve(id proposalID, o outcome) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.resolveLocked(id, o)
}

func (g *Group) resolveLocked(id proposalID, o outcome) {
	if p := g.props[id]; p != nil {
		delete(g.props, id)
		if g.byIndex[p.index] == p {
			delete(g.byIndex, p.index)
		}
		g.gate.release(p.size)
		p.done <- o
	}
}

// failProposals ends all proposals that raft has and that are not applied.
func (g *Group) failProposals(err error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	for id, p := range g.props {
		if p.handed {
			g.resolveLocked(id, outcome{err: err})
		}
	}
}

// failAll ends everything that waits, for good.
func (g *Group) failAll(err error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.stopped = errStopped()
	for id := range g.props {
		g.resolveLocked(id, outcome{err: err})
	}
	for _, r := range g.reads {
		r.done <- outcome{err: g.stopped}
	}
	for _, b := range g.confirmed {
		for _, r := range b.readers {
			r.done <- outcome{err: g.stopped}
		}
	}
	for _, b := range g.asking {
		for _, r := range b.readers {
			r.done <- outcome{err: g.stopped}
		}
	}
	g.reads, g.confirmed = nil, nil
	close(g.changed)
	g.changed = make(chan struct{})
}

// ReadIndex waits until this replica has applied everything that was
// acknowledged anywhere before the call: what is then read here is
// linearizable. It returns an index that is applied. It works on any replica
// while a leader can be reached, and writes nothing. Errors: Timeout,
// Interrupted, Unavailable; on a witness NotLeader, or Busy when it leads.
func (g *Group) ReadIndex(ctx context.Context) (uint64, error) {
	r, err := g.reader(ctx)
	if err != nil {
		return 0, err
	}
	select {
	case o := <-r.done:
		return o.index, o.err
	case <-ctx.Done():
		return 0, waitErr(ctx, "read from group", g.id, "; no leader confirmed the read")
	}
}

// reader begins a read and tells the worker.
func (g *Group) reader(ctx context.Context) (*reader, error) {
	if g.h.cfg.Witness {
		return nil, g.notHere("read from group")
	}
	r := &reader{ctx: ctx, done: make(chan outcome, 1)}
	g.mu.Lock()
	if g.stopped != nil {
		g.mu.Unlock()
		return nil, g.stopped
	}
	g.reads = append(g.reads, r)
	tell := !g.asked
	g.asked = true
	g.mu.Unlock()
	if tell {
		g.h.in.push(event{kind: evRead, g: g})
	}
	return r, nil
}

// releaseReads lets the readers go whose barrier is applied.
func (g *Group) releaseReads() {
	g.mu.Lock()
	defer g.mu.Unlock()
	applied, left := g.applied.Load(), g.confirmed[:0]
	for _, b := range g.confirmed {
		if b.index > applied {
			left = append(left, b)
			continue
		}
		for _, r := range b.readers {
			r.done <- outcome{index: b.index}
		}
	}
	clear(g.confirmed[len(left):])
	g.confirmed = left
}

// awaitApplied returns a reader that is let go when index is applied.
func (g *Group) awaitApplied(ctx context.Context, index uint64) *reader {
	r := &reader{ctx: ctx, done: make(chan outcome, 1)}
	g.mu.Lock()
	g.confirmed = append(g.confirmed, readBatch{index: index, readers: []*reader{r}})
	g.mu.Unlock()
	g.releaseReads()
	return r
}

// Leader returns the leader this replica follows, 0 if none, and its term.
func (g *Group) Leader() (ids.Node, uint64) {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.st.Leader, g.st.Term
}

// IsLeader reports whether this replica believes to lead. Another may lead a
// later term already: only a proposal or a read barrier proves it.
func (g *Group) IsLeader() bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.st.Role == Leader
}

// Status returns what this replica knows.
func (g *Group) Status() Status {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.statusLocked()
}

func (g *Group) statusLocked() Status {
	st := g.st
	st.Commit, st.Applied = g.commit, g.applied.Load()
	st.Witness, st.Needs = g.h.cfg.Witness, slices.Clone(g.st.Needs)
	if st.Progress != nil {
		st.Progress = make(map[ids.Node]Progress, len(g.st.Progress))
		for n, p := range g.st.Progress {
			st.Progress[n] = p
		}
	}
	return st
}

// Watch has f called, on the worker, after each change of role, term, leader or
// configuration, in order. f must not block nor call the group. There is no way
// to end it.
func (g *Group) Watch(f func(Status)) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.watchers = append(g.watchers, f)
}

// wait returns when ok holds for the status, or ctx ends.
func (g *Group) wait(ctx context.Context, op string, ok func(Status) bool) error {
	for {
		g.mu.Lock()
		st, changed, stopped := g.statusLocked(), g.changed, g.stopped
		g.mu.Unlock()
		switch {
		case stopped != nil:
			return stopped
		case ok(st):
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return waitErr(ctx, op, g.id, "")
		}
	}
}

// point returns what is applied.
func (g *Group) point() point {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.at
}

func (g *Group) setApplied(p point) {
	g.mu.Lock()
	g.at = p
	g.mu.Unlock()
	g.applied.Store(p.index)
}

// publish brings the status up to date, and tells the watchers if it changed.
// Only the worker calls it (and Open before there is one).
func (g *Group) publish() {
	b := g.rn.BasicStatus()
	role := Follower
	switch b.RaftState {
	case raft.StateLeader:
		role = Leader
	case raft.StateCandidate, raft.StatePreCandidate:
		role = Candidate
	}
	joint := !g.proven()
	g.mu.Lock()
	g.commit = b.GetCommit()
	if g.st.Group == g.id && g.st.Role == role && g.st.Joint == joint && g.st.Term == b.GetTerm() && g.st.Leader == ids.Node(b.Lead) && g.shown == g.conf {
		g.mu.Unlock()
		return
	}
	g.shown = g.conf
	g.h.count.follow(g.st.Leader, ids.Node(b.Lead))
	g.st.Group, g.st.Role, g.st.Term, g.st.Leader = g.id, role, b.GetTerm(), ids.Node(b.Lead)
	c := conf{g.conf}
	g.st.Voters, g.st.Learners, g.st.Joint = c.voters(), nodes(g.conf.Learners), joint
	if role != Leader {
		g.st.Progress, g.st.Needs = nil, nil
	}
	close(g.changed)
	g.changed = make(chan struct{})
	st, watchers := g.statusLocked(), g.watchers
	g.mu.Unlock()
	for _, f := range watchers {
		f(st)
	}
}

// showProgress copies a leader's view of the others into the status.
func (g *Group) showProgress() {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.st.Progress == nil {
		g.st.Progress = map[ids.Node]Progress{}
	}
	clear(g.st.Progress)
	g.rn.WithProgress(func(id uint64, t raft.ProgressType, p raftProgress) {
		g.st.Progress[ids.Node(id)] = Progress{
			Match: p.Match, Next: p.Next, State: stateWord(p), Active: p.RecentActive, Learner: t == raft.ProgressTypeLearner,
			CaughtUp: g.caughtUp(ids.Node(id), p),
			Witness:  g.h.witness(ids.Node(id)),
		}
	})
}

// View is the applied state at one index. It must be closed.
type View struct {
	*pebble.Snapshot
	Space Space
	Index uint64
}

// View returns the applied state as it is now: a database snapshot, the group's
// space in it and the index it stands at.
func (g *Group) View() (*View, error) {
	if err := g.usable(); err != nil {
		return nil, err
	}
	s := g.h.stateDB.NewSnapshot()
	p, err := readApplied(s, g.id)
	if err != nil {
		return nil, errors.Join(err, s.Close())
	}
	return &View{Snapshot: s, Space: g.space, Index: p.index}, nil
}

// Get reads one key of the applied state as it is now. The value is the
// caller's; ok is false if there is none.
func (g *Group) Get(parts ...[]byte) (value []byte, ok bool, err error) {
	if err := g.usable(); err != nil {
		return nil, false, err
	}
	v, err := get(g.h.stateDB, g.space.Key(parts...), fmt.Sprintf("state of group %d", g.id))
	return v, v != nil, err
}

// Space returns the group's part of the state database.
func (g *Group) Space() Space { return g.space }

func (g *Group) usable() error {
	g.h.mu.Lock()
	defer g.h.mu.Unlock()
	if g.h.closed {
		return errStopped()
	}
	if g.h.cfg.Witness {
		return errs.E(errs.NotSupported, "read from group", fmt.Sprint(g.id), "%v is a witness and has no state", g.h.cfg.Self)
	}
	return nil
}
