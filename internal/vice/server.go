package vice

import (
	"context"
	"errors"
	"log/slog"
	"sync"
	"time"

	"github.com/unum-os/unum/internal/clock"
	"github.com/unum-os/unum/internal/errs"
	"github.com/unum-os/unum/internal/ids"
	"github.com/unum-os/unum/internal/lease"
	"github.com/unum-os/unum/internal/metric"
	"github.com/unum-os/unum/internal/volume"
	"github.com/unum-os/unum/internal/wire"
)

const (
	// recallPatience is how long a recall may go unanswered before its session is
	// no longer renewed; with Term and expireTick it stays below maxWait. A healthy
	// client answers in milliseconds; one that has to ship 64 MiB first to disks that
	// others keep busy needs seconds, and must not lose what it ships.
	recallPatience = 5 * time.Second
	// expiryMargin is added to Term before a new leader ends a silent session, whose
	// client has stopped by then: it counts ClientTerm.
	expiryMargin = 250 * time.Millisecond
	// expireTick is how often there is looked for clients that have not renewed: a
	// small part of what was waited for them already.
	expireTick = 500 * time.Millisecond
	// maxWait bounds how long a request may wait for leases: longer than it takes
	// to end a silent session, which is recallPatience, Term and expireTick.
	maxWait = 12 * time.Second
	// listingPage is the most entries in one answer.
	listingPage = volume.MaxListing - 1
	// extentPage bounds the bytes of inline data in one answer.
	extentPage = 1 << 20
	// maxExtents is the most extents in one answer.
	maxExtents = 2048
	// nudgePoll is how often there is looked whether this node leads, if nobody said
	// so.
	nudgePoll = time.Second
	// takeoverLimit bounds one question of a new leader to a session what it holds;
	// it is asked again until Term and expiryMargin are over.
	takeoverLimit = 2 * time.Second
)

// Replica is the group's replica on this node.
type Replica interface {
	Propose(ctx context.Context, cmd []byte) (result any, index uint64, err error)
	ReadIndex(ctx context.Context) (uint64, error)
	Leader() (leader ids.Node, term uint64)
}

// Peers makes calls to clients, and takes theirs.
type Peers interface {
	Call(ctx context.Context, to ids.Node, method string, req any, data []byte, resp any) ([]byte, error)
	Handle(method string, h func(ctx context.Context, from ids.Node, req, data []byte) (any, []byte, error))
}

// Config is what a Server needs.
type Config struct {
	Self    ids.Node
	Group   ids.Group
	Replica Replica
	State   State // this node's applied state
	Peers   Peers
	Log     *slog.Logger
}

// Server serves the clients of one group whenever this node leads it.
type Server struct {
	cfg   Config
	nudge chan struct{}
	count counts

	mu   sync.Mutex
	lead *leadership // nil while another leads
}

// New returns a server and registers its handlers; it serves once Run runs.
func New(cfg Config) *Server {
	s := &Server{cfg: cfg, nudge: make(chan struct{}, 1)}
	s.count.recalls = metric.Durations("unum_vice_recall_seconds", "Time from a recall to the lease's being given back, by answer.")
	handle(s, MethodOpen, s.open)
	handle(s, MethodRenew, s.renew)
	handle(s, MethodAcquire, s.acquire)
	handle(s, MethodLookup, s.lookup)
	handle(s, MethodReadDir, s.readdir)
	handle(s, MethodExtents, s.extents)
	handle(s, MethodXattrs, s.xattrs)
	handle(s, MethodApply, s.apply)
	handle(s, MethodRelease, s.release)
	handle(s, MethodClosed, s.closed)
	handle(s, MethodLock, s.lock)
	handle(s, MethodStat, s.stat)
	handle(s, MethodWhere, s.where)
	return s
}

// handle binds a typed method. One volume a process in this slice: the group in
// the request must be the server's.
func handle[Q any, R any](s *Server, method string, f func(ctx context.Context, from ids.Node, q *Q) (R, error)) {
	s.cfg.Peers.Handle(method, func(ctx context.Context, from ids.Node, req, _ []byte) (any, []byte, error) {
		var q Q
		if err := wire.Unmarshal(req, &q); err != nil {
			return nil, nil, err
		}
		if c, ok := any(&q).(interface{ group() ids.Group }); ok && c.group() != s.cfg.Group {
			return nil, nil, errs.E(errs.NotFound, method, "", "group %d is not served here", c.group())
		}
		r, err := f(ctx, from, &q)
		if err != nil {
			return nil, nil, forClient(method, err)
		}
		return r, nil, nil
	})
}

// forClient is what a client hears of an error: a host whose disk fails ends, and
// another node leads, so it asks there.
func forClient(method string, err error) error {
	if errs.Has(err, errs.IO) {
		return errs.E(errs.Unavailable, method, "", "the leader's disk fails: %w", err)
	}
	return err
}

func (c *Caller) group() ids.Group { return c.Group }

// Nudge tells the server that the group's leader or term may have changed. It
// never blocks.
func (s *Server) Nudge() {
	select {
	case s.nudge <- struct{}{}:
	default:
	}
}

// Run serves until ctx ends.
func (s *Server) Run(ctx context.Context) error {
	poll := time.NewTicker(nudgePoll) // a lost nudge costs a second, no more
	defer poll.Stop()
	var wg sync.WaitGroup
	defer wg.Wait()
	for {
		leader, term := s.cfg.Replica.Leader()
		s.mu.Lock()
		l := s.lead
		s.mu.Unlock()
		if l != nil && (leader != s.cfg.Self || term != l.term) {
			l.end(errs.E(errs.NotLeader, "serve", "", "n%d leads group %d now", leader, s.cfg.Group))
			l = nil
		}
		if l == nil && leader == s.cfg.Self {
			l = newLeadership(ctx, s, term)
			s.mu.Lock()
			s.lead = l
			s.mu.Unlock()
			wg.Go(func() {
				l.run()
				s.mu.Lock()
				if s.lead == l {
					s.lead = nil
				}
				s.mu.Unlock()
			})
		}
		select {
		case <-ctx.Done():
			if l != nil { // clients go on with the next leader
				l.end(errs.E(errs.Unavailable, "serve", "", "this node stops serving group %d", s.cfg.Group))
			}
			return nil
		case <-s.nudge:
		case <-poll.C:
		}
	}
}

// leading returns the leadership in force, ready or not.
func (s *Server) leading() (*leadership, error) {
	s.mu.Lock()
	l := s.lead
	s.mu.Unlock()
	if l == nil || l.ctx.Err() != nil {
		leader, _ := s.cfg.Replica.Leader()
		return nil, errs.E(errs.NotLeader, "serve", "", "group %d is led by %v", s.cfg.Group, leader)
	}
	return l, nil
}

// enter returns the leadership once it is ready, and the caller's session.
func (s *Server) enter(ctx context.Context, from ids.Node, c *Caller) (*leadership, error) {
	l, err := s.leading()
	if err != nil {
		return nil, err
	}
	if c.Term != l.term {
		return nil, errs.E(errs.NotLeader, "serve", "", "the client knows term %d, this is term %d", c.Term, l.term)
	}
	select {
	case <-l.ready:
	case <-l.ctx.Done():
		return nil, context.Cause(l.ctx)
	case <-ctx.Done():
		return nil, errs.E(errs.Timeout, "serve", "", "the new leader is still waiting for old sessions to end")
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if ss := l.sessions[c.Session]; ss == nil || ss.node != from || ss.ending {
		return nil, errs.E(errs.Stale, "serve", "", "session %d of %v is over", c.Session, from)
	}
	return l, nil
}

// leadership is one term during which this node leads.
type leadership struct {
	s     *Server
	term  uint64
	ctx   context.Context // ends with the role
	end   context.CancelCauseFunc
	ready chan struct{}
	wg    sync.WaitGroup

	mu       sync.Mutex
	table    *lease.Table
	ticket   uint64
	waits    map[uint64]chan lease.Effect
	sessions map[ids.Session]*session
	locks    map[ids.Inode]chan struct{}   // closed when a lock of the inode changed
	freed    map[ids.Inode]chan struct{}   // closed when a lease on the inode ended
	creates  map[ids.Inode][]chan struct{} // in the directory, of files that will be open; closed when in born
	born     map[ids.Inode]birth           // files whose creators open them
	removals map[ids.Inode][]chan struct{} // of the inode, proposed; closed when applied or refused
}

// birth says who created a file and may have it open without a lease or a note.
type birth struct {
	by  ids.Session
	seq uint64 // of the request; over when the client has acknowledged its answer
}

// session is one open session as the leader knows it.
type session struct {
	id      ids.Session
	node    ids.Node
	renewed clock.Instant // lives until renewed+Term
	taken   bool          // its leases of earlier terms are in the table
	ending  bool          // its end is being proposed
}

func newLeadership(ctx context.Context, s *Server, term uint64) *leadership {
	l := &leadership{
		s: s, term: term, ready: make(chan struct{}),
		table: lease.New(), waits: map[uint64]chan lease.Effect{},
		sessions: map[ids.Session]*session{}, locks: map[ids.Inode]chan struct{}{},
		freed: map[ids.Inode]chan struct{}{}, removals: map[ids.Inode][]chan struct{}{},
		creates: map[ids.Inode][]chan struct{}{}, born: map[ids.Inode]birth{},
	}
	l.ctx, l.end = context.WithCancelCause(ctx)
	return l
}

// run takes over from the leader before, then watches the sessions.
func (l *leadership) run() {
	log := l.s.cfg.Log.With("group", uint64(l.s.cfg.Group), "term", l.term)
	defer l.wg.Wait()
	defer l.end(errors.New("leadership ended"))
	elected := clock.Now()
	if err := l.takeover(elected); err != nil {
		if l.ctx.Err() == nil {
			log.Warn("takeover failed", "err", err)
			l.end(err)
			// Stand back; Run tries again at the next poll.
		}
		return
	}
	close(l.ready)
	log.Info("serving", "after", clock.Now().Sub(elected).Round(time.Millisecond))
	tick := time.NewTicker(expireTick)
	defer tick.Stop()
	for {
		select {
		case <-l.ctx.Done():
			return
		case <-tick.C:
			l.expire()
		}
	}
}

// takeover makes sure that no lease given before this term is in use.
func (l *leadership) takeover(elected clock.Instant) error {
	// Commit something of this term: with it everything committed before is
	// applied here, and this node surely led at some moment after its election.
	if _, err := l.propose(l.ctx, &volume.Command{Barrier: true}); err != nil {
		return err
	}
	open, err := l.s.cfg.State.sessions()
	if err != nil {
		return err
	}
	deadline := elected.Add(Term + expiryMargin)
	var wg sync.WaitGroup
	errc := make(chan error, len(open))
	for _, si := range open {
		ss := &session{id: si.ID, node: si.Node, renewed: elected}
		l.mu.Lock()
		l.sessions[si.ID] = ss
		l.mu.Unlock()
		wg.Go(func() { errc <- l.takeSession(ss, deadline) })
	}
	wg.Wait()
	close(errc)
	for err := range errc {
		if err != nil {
			return err
		}
	}
	return nil
}

// takeSession has one session drop its leases, or ends it after deadline.
func (l *leadership) takeSession(ss *session, deadline clock.Instant) error {
	req := TakeoverRequest{Caller: Caller{Group: l.s.cfg.Group, Session: ss.id, Term: l.term}}
	for l.ctx.Err() == nil {
		left := deadline.Sub(clock.Now())
		if left <= 0 {
			return l.endSession(ss, "silent when a new leader took over")
		}
		ctx, cancel := context.WithTimeout(l.ctx, min(left, takeoverLimit))
		var r TakeoverReply
		_, err := l.s.cfg.Peers.Call(ctx, ss.node, MethodTakeover, req, nil, &r)
		cancel()
		if err == nil && r.Unknown {
			return l.endSession(ss, "its node does not know it")
		}
		if err == nil {
			l.mu.Lock()
			ok := l.reclaim(ss, &r)
			l.mu.Unlock()
			if ok {
				return nil
			}
			return l.endSession(ss, "it claims leases that another holds")
		}
		if !sleep(l.ctx, 100*time.Millisecond) {
			break
		}
	}
	return context.Cause(l.ctx)
}

// reclaim puts what a session holds into the table. It cannot meet a conflict
// unless somebody lies. The caller holds l.mu.
func (l *leadership) reclaim(ss *session, r *TakeoverReply) bool {
	for _, h := range r.Held {
		if h.Mode != Read && h.Mode != Write || l.grantIfFree(ss.id, h.Ino, h.Mode).Mode < h.Mode {
			return false
		}
	}
	for _, ino := range r.Open {
		l.table.NoteOpen(ss.id, ino)
	}
	ss.taken = true
	return true
}

// sleep waits for d and reports whether ctx is still alive.
func sleep(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-t.C:
		return true
	}
}

// propose puts one command into the log and returns its results.
func (l *leadership) propose(ctx context.Context, c *volume.Command) (*volume.Results, error) {
	b, err := wire.Marshal(c)
	if err != nil {
		return nil, err
	}
	if len(b) > volume.MaxBatch {
		return nil, errs.E(errs.TooLarge, "propose", "", "%d bytes, limit %d", len(b), volume.MaxBatch)
	}
	res, _, err := l.s.cfg.Replica.Propose(ctx, b)
	if err != nil {
		return nil, err
	}
	r, ok := res.(*volume.Results)
	if !ok {
		return nil, errs.E(errs.Unknown, "propose", "", "unexpected result %T", res)
	}
	if r.Err != 0 {
		return nil, errs.E(errs.Class(r.Err), "apply", "", "%s", r.Why)
	}
	return r, nil
}

// endSession commits the end of a session, then drops what it held.
func (l *leadership) endSession(ss *session, why string) error {
	l.mu.Lock()
	ss.ending = true
	l.mu.Unlock()
	if _, err := l.propose(l.ctx, &volume.Command{End: ss.id}); err != nil && !errs.Has(err, errs.Stale) {
		return err
	}
	l.s.cfg.Log.Info("session ended", "session", uint64(ss.id), "node", ss.node.String(), "why", why)
	l.s.count.ended.Add(1)
	l.forget(ss.id)
	return nil
}

// forget drops a session whose end is committed.
func (l *leadership) forget(id ids.Session) {
	l.mu.Lock()
	delete(l.sessions, id)
	effs := l.table.SessionEnded(clock.Now(), id)
	recalls := l.answer(effs)
	wakeAll(l.locks) // its locks are gone, and its leases
	wakeAll(l.freed)
	l.mu.Unlock()
	l.send(recalls)
}

// expire ends the sessions that were not renewed.
func (l *leadership) expire() {
	now := clock.Now()
	var due []*session
	l.mu.Lock()
	for _, ss := range l.sessions {
		if !ss.ending && now.Sub(ss.renewed) > Term {
			ss.ending = true
			due = append(due, ss)
		}
	}
	l.mu.Unlock()
	for _, ss := range due {
		l.wg.Go(func() {
			for l.ctx.Err() == nil {
				if err := l.endSession(ss, "not renewed"); err == nil {
					return
				}
				sleep(l.ctx, 100*time.Millisecond)
			}
		})
	}
}

// answer hands answers to their waiters and returns the recalls to send. The
// caller holds l.mu.
func (l *leadership) answer(effs []lease.Effect) (recalls []lease.Effect) {
	for _, e := range effs {
		if e.Kind == lease.Recall {
			recalls = append(recalls, e)
			continue
		}
		if ch := l.waits[e.Ticket]; ch != nil {
			delete(l.waits, e.Ticket)
			ch <- e
		}
	}
	return recalls
}

// released takes a lease back and returns the recalls to send. The caller holds
// l.mu.
func (l *leadership) released(s ids.Session, h Held) []lease.Effect {
	recalls := l.answer(l.table.Released(clock.Now(), s, h.Ino, h.Seq, h.Open))
	wake(l.freed, h.Ino)
	return recalls
}

// wake wakes those who wait for something about ino.
func wake(m map[ids.Inode]chan struct{}, ino ids.Inode) {
	if ch := m[ino]; ch != nil {
		close(ch)
		delete(m, ino)
	}
}

func wakeAll(m map[ids.Inode]chan struct{}) {
	for ino := range m {
		wake(m, ino)
	}
}

// waitOn returns the channel that wake closes. The caller holds l.mu.
func waitOn(m map[ids.Inode]chan struct{}, ino ids.Inode) <-chan struct{} {
	if m[ino] == nil {
		m[ino] = make(chan struct{})
	}
	return m[ino]
}

// shipped waits until the session that now holds ino for writing has given it up:
// what it has done is not in the applied state before. It is for readers that
// were told NotNow, because somebody already waits for that holder's answer to a
// recall. What a later holder does is done after the reader asked; to wait for
// that too would be for ever, where writers take turns.
func (l *leadership) shipped(ctx context.Context, by ids.Session, ino ids.Inode) error {
	ctx, cancel := context.WithTimeout(ctx, maxWait)
	defer cancel()
	var holder lease.Holder
	l.mu.Lock()
	for _, h := range l.table.Holders(ino) {
		if h.Mode == Write && h.Session != by {
			holder = h
		}
	}
	for {
		if h, held := l.table.Find(holder.Session, ino); !held || h.Since != holder.Since {
			l.mu.Unlock()
			return nil
		}
		freed := waitOn(l.freed, ino)
		l.mu.Unlock()
		select {
		case <-freed:
		case <-ctx.Done():
			return errs.E(errs.Timeout, "wait for a lease", "", "another node did not give it up in time")
		case <-l.ctx.Done():
			return context.Cause(l.ctx)
		}
		l.mu.Lock()
	}
}

// send sends recalls, each until it is answered or its session has ended.
func (l *leadership) send(recalls []lease.Effect) {
	for _, e := range recalls {
		l.wg.Go(func() { l.recall(e) })
	}
}

func (l *leadership) recall(e lease.Effect) {
	began := time.Now()
	req := RecallRequest{Caller: Caller{Group: l.s.cfg.Group, Session: e.Session, Term: l.term}, Ino: e.Ino, Seq: e.Seq}
	for l.ctx.Err() == nil {
		var recalls []lease.Effect
		l.mu.Lock()
		ss := l.sessions[e.Session]
		h, held := l.table.Find(e.Session, e.Ino)
		over := ss == nil || !held || h.Seq != e.Seq
		if ss == nil && held { // given to a request that outlived its session
			recalls = l.answer(l.table.SessionEnded(clock.Now(), e.Session))
		}
		if over {
			wake(l.freed, e.Ino)
		}
		l.mu.Unlock()
		l.send(recalls)
		if over {
			return
		}
		ctx, cancel := context.WithTimeout(l.ctx, Term)
		var r RecallReply
		_, err := l.s.cfg.Peers.Call(ctx, ss.node, MethodRecall, req, nil, &r)
		cancel()
		if err == nil {
			l.s.count.recalls.Observe(time.Since(began).Seconds())
			l.mu.Lock()
			recalls := l.released(e.Session, Held{Ino: e.Ino, Seq: e.Seq, Open: r.Open})
			l.mu.Unlock()
			l.send(recalls)
			return
		}
		if !sleep(l.ctx, 50*time.Millisecond) {
			return
		}
	}
}

// ask makes a request of the table and waits for its answer. When the caller
// gives up, undo takes back what may have been given at the last moment.
func (l *leadership) ask(ctx context.Context, request func(now clock.Instant, ticket uint64) []lease.Effect) (lease.Effect, error) {
	ctx, cancel := context.WithTimeout(ctx, maxWait)
	defer cancel()
	ch := make(chan lease.Effect, 1)
	l.mu.Lock()
	l.ticket++
	ticket := l.ticket
	l.waits[ticket] = ch
	recalls := l.answer(request(clock.Now(), ticket))
	l.mu.Unlock()
	l.send(recalls)
	select {
	case e := <-ch:
		return e, nil
	case <-ctx.Done():
	case <-l.ctx.Done():
		return lease.Effect{}, context.Cause(l.ctx)
	}
	l.mu.Lock()
	defer func() { l.mu.Unlock(); l.send(recalls) }()
	select {
	case e := <-ch:
		recalls = nil
		return e, nil
	default:
	}
	delete(l.waits, ticket)
	recalls = l.answer(l.table.Cancel(clock.Now(), ticket))
	return lease.Effect{}, errs.E(errs.Timeout, "wait for a lease", "", "another node did not give it up in time")
}

// grantIfFree gives a lease if that needs no recall and no wait. The caller
// holds l.mu.
func (l *leadership) grantIfFree(s ids.Session, ino ids.Inode, m Mode) Grant {
	for _, h := range l.table.Holders(ino) {
		if h.Session != s && (m == Write || h.Mode == Write) || h.Recalled {
			return Grant{Ino: ino}
		}
	}
	l.ticket++
	ticket := l.ticket
	for _, e := range l.table.Acquire(clock.Now(), s, ino, m, ticket) {
		if e.Kind == lease.Granted && e.Ticket == ticket {
			return Grant{Ino: ino, Mode: e.Mode, Seq: e.Seq}
		}
	}
	l.table.Cancel(clock.Now(), ticket)
	return Grant{Ino: ino}
}

// lease acquires a lease for a session and turns the answer into a grant.
func (l *leadership) lease(ctx context.Context, s ids.Session, ino ids.Inode, m Mode) (Grant, error) {
	e, err := l.ask(ctx, func(now clock.Instant, ticket uint64) []lease.Effect {
		return l.table.Acquire(now, s, ino, m, ticket)
	})
	if err != nil {
		return Grant{}, err
	}
	switch e.Kind {
	case lease.Granted:
		return Grant{Ino: ino, Mode: e.Mode, Seq: e.Seq}, nil
	case lease.Gone:
		return Grant{}, errs.E(errs.Stale, "lease", "", "session %d is over", s)
	}
	return Grant{Ino: ino}, l.shipped(ctx, s, ino)
}
