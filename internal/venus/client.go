package venus

import (
	"context"
	"log/slog"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"time"

	"github.com/unum-os/unum/internal/clock"
	"github.com/unum-os/unum/internal/errs"
	"github.com/unum-os/unum/internal/ids"
	"github.com/unum-os/unum/internal/metric"
	"github.com/unum-os/unum/internal/vice"
	"github.com/unum-os/unum/internal/volume"
	"github.com/unum-os/unum/internal/wire"
)

const (
	// opLimit bounds every operation of a program on the tree (P7): a leader's
	// death costs an election and up to one session term, with room.
	opLimit = 20 * time.Second
	// maxDirty is how much may be pending before writers ship themselves.
	maxDirty = 64 << 20
	// maxRecord is how large the record of what is pending may become before
	// writers ship: the content that travels inside and what all requests under
	// way may add still fit beside it (volume.MaxBatch, and volume.MaxOps by
	// three operations a file).
	maxRecord = 256 << 10
	// shipEvery bounds the age of pending changes (P3 allows 5 s).
	shipEvery = 2 * time.Second
	// reserve is left free on every storing node, for logs and repair.
	reserve = 96 << 20
	// keepInodes is how many inodes the cache keeps when idle.
	keepInodes = 100_000
	// idleFor is how long an inode stays unused before its lease is given back,
	// idleForFull when there are more than keepInodes; it is looked every sweepEvery.
	idleFor     = 5 * time.Minute
	idleForFull = 10 * time.Second
	sweepEvery  = 10 * time.Second
	// lastShip bounds the shipping of what is pending when the daemon stops.
	lastShip = 3 * time.Second
	// shipsAtOnce is how many blocks a ship writes at a time: they keep the disks
	// busy without holding every copy in memory.
	shipsAtOnce = 4
	// purgesAtOnce is how many inodes are emptied at a time when a session is lost.
	purgesAtOnce = 8
	// openLimit bounds one attempt to open a session, openAgain is the pause within
	// it while there is no leader.
	openLimit = 10 * time.Second
	openAgain = 50 * time.Millisecond
	// renewLimit bounds one renewal of the session, renewAgain is the pause after
	// one that failed.
	renewLimit = time.Second
	renewAgain = 100 * time.Millisecond
	// whereLimit bounds the question to one member who leads.
	whereLimit = 500 * time.Millisecond
	// askFirst is the pause before a request is sent again that found no leader; it
	// doubles up to askMost.
	askFirst = 5 * time.Millisecond
	askMost  = 200 * time.Millisecond
	// grantWait is how long a recall waits for its grant that is still on the way.
	grantWait = 300 * time.Millisecond
)

// Peers calls other nodes.
type Peers interface {
	Call(ctx context.Context, to ids.Node, method string, req any, data []byte, resp any) ([]byte, error)
	Handle(method string, h func(ctx context.Context, from ids.Node, req, data []byte) (any, []byte, error))
}

// Blocks stores and fetches content.
type Blocks interface {
	Put(ctx context.Context, data []byte) (volume.BlockName, error)
	Get(ctx context.Context, name volume.BlockName) ([]byte, error)
}

// Kernel empties the kernel's caches of an inode: off -1 its attributes only,
// else its pages from off on for length bytes (0: all) too.
type Kernel interface {
	InvalidateInode(ino ids.Inode, off, length int64) error
	// StalePages reports whether the kernel leaves pages as they were when a
	// handle that bypasses them writes (before Linux 6.6).
	StalePages() bool
}

// Config is what a Client needs.
type Config struct {
	Self    ids.Node
	Group   ids.Group
	Peers   Peers
	Blocks  Blocks
	Members func() []ids.Node // nodes that may know the group's leader, nearest first
	Space   func() uint64     // least free bytes among the storing nodes
	Log     *slog.Logger
}

// Client is the cache of one volume on this node.
type Client struct {
	cfg     Config
	count   counts
	leader  atomic.Uint64 // last known, a hint
	dirty   atomic.Int64  // bytes pending
	record  atomic.Int64  // what is pending would take in a log record, without content
	ships   chan struct{} // semaphore of one
	cut     sync.RWMutex  // shared by each change of pending state, exclusive to take a cut
	kernel  atomic.Pointer[Kernel]
	expires atomic.Int64 // clock.Instant at which the session ends here

	mu       sync.Mutex
	sess     session
	losing   bool          // the session was lost; what was cached under it is being dropped
	changed  chan struct{} // closed when sess changes
	inodes   map[ids.Inode]*inode
	dirtySet map[*inode]struct{}
	handles  map[uint64]*handle
	nextFh   uint64
	seq      uint64
	flying   map[uint64]struct{} // sequence numbers without an answer
}

// session is what the client knows of its session. Epoch counts sessions lost:
// leases of an earlier one are void.
type session struct {
	id    ids.Session // 0: none
	term  uint64
	epoch uint64
}

// New returns a client and registers its callbacks. Run makes it work.
func New(cfg Config) *Client {
	c := &Client{
		cfg: cfg, ships: make(chan struct{}, 1), changed: make(chan struct{}),
		inodes: map[ids.Inode]*inode{}, dirtySet: map[*inode]struct{}{},
		handles: map[uint64]*handle{}, flying: map[uint64]struct{}{},
	}
	c.count.ships = metric.Durations("unum_venus_ship_seconds", "Time to make durable what is pending, when something is.")
	cfg.Peers.Handle(vice.MethodRecall, c.onRecall)
	cfg.Peers.Handle(vice.MethodTakeover, c.onTakeover)
	return c
}

// SetKernel tells the client whose caches to empty. Before it, there are none.
func (c *Client) SetKernel(k Kernel) { c.kernel.Store(&k) }

// Run keeps the session and ships what is pending, until ctx ends; then it ships
// once more.
func (c *Client) Run(ctx context.Context) error {
	var wg sync.WaitGroup
	wg.Go(func() { c.keepSession(ctx) })
	wg.Go(func() { c.shipRegularly(ctx) })
	wg.Go(func() { c.sweepRegularly(ctx) })
	wg.Wait()
	return nil
}

// keepSession opens a session, renews it, and opens another when it is lost.
func (c *Client) keepSession(ctx context.Context) {
	var again sync.WaitGroup
	defer again.Wait()
	for ctx.Err() == nil {
		c.mu.Lock()
		losing, changed := c.losing, c.changed
		c.mu.Unlock()
		if losing {
			select {
			case <-changed:
			case <-ctx.Done():
			}
			continue
		}
		if s, _ := c.current(); s.id == 0 {
			if err := c.openSession(ctx); err != nil {
				c.cfg.Log.Debug("no session yet", "err", err)
				pause(ctx, 100*time.Millisecond)
			} else {
				again.Go(func() { c.reopen(ctx) })
			}
			continue
		}
		s, valid := c.current()
		if !valid {
			c.lose(s.epoch, "it could not be renewed in time")
			continue
		}
		next := vice.RenewEvery
		if err := c.renew(ctx, s); errs.Has(err, errs.Stale) {
			c.lose(s.epoch, err.Error())
			continue
		} else if err != nil {
			next = renewAgain
		}
		pause(ctx, min(next, max(0, clock.Instant(c.expires.Load()).Sub(clock.Now()))))
	}
}

// pause waits for d or the end of ctx.
func pause(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
	case <-t.C:
	}
}

func (c *Client) openSession(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, openLimit)
	defer cancel()
	nonce := rand.Uint64()
	var r vice.OpenReply
	var sent clock.Instant
	for { // each attempt on its own: the session counts from when it was asked for
		sent = clock.Now()
		err := c.once(ctx, vice.MethodOpen, vice.OpenRequest{Caller: vice.Caller{Group: c.cfg.Group}, Nonce: nonce}, &r)
		if err == nil {
			break
		}
		if !retry(err) || ctx.Err() != nil {
			return err
		}
		pause(ctx, openAgain)
	}
	if clock.Now().Sub(sent) > vice.ClientTerm {
		return errs.E(errs.Timeout, "open session", "", "the answer took longer than the session lasts")
	}
	c.mu.Lock()
	c.sess = session{id: r.Session, term: r.Term, epoch: c.sess.epoch}
	c.seq = 0
	clear(c.flying)
	c.expires.Store(int64(sent.Add(vice.ClientTerm)))
	c.wakeLocked()
	c.mu.Unlock()
	c.cfg.Log.Info("session opened", "session", uint64(r.Session), "term", r.Term)
	return nil
}

// reopen tells the leader of a new session which inodes are open here, so that it
// keeps them when their names go.
func (c *Client) reopen(ctx context.Context) {
	var open []*inode
	c.mu.Lock()
	for _, h := range c.handles {
		open = append(open, h.in)
	}
	c.mu.Unlock()
	ctx, cancel := limit(ctx)
	defer cancel()
	for _, in := range open {
		in.mu.Lock()
		tell := in.opens > 0 && !(in.noted && in.epoch == c.epoch())
		in.mu.Unlock()
		if !tell {
			continue
		}
		if _, err := c.ensure(ctx, in, need{mode: vice.Read, open: true, once: true}, nil); err != nil {
			c.cfg.Log.Warn("the leader was not told of an open file", "inode", uint64(in.ino), "err", err)
		}
	}
}

func (c *Client) renew(ctx context.Context, s session) error {
	ctx, cancel := context.WithTimeout(ctx, renewLimit)
	defer cancel()
	sent := clock.Now()
	var r vice.RenewReply
	if err := c.once(ctx, vice.MethodRenew, vice.RenewRequest{Caller: c.caller(s)}, &r); err != nil {
		return err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.sess.id != s.id {
		return nil
	}
	if e := int64(sent.Add(vice.ClientTerm)); e > c.expires.Load() && int64(clock.Now()) < c.expires.Load() {
		c.expires.Store(e)
	}
	return nil
}

func (c *Client) caller(s session) vice.Caller {
	return vice.Caller{Group: c.cfg.Group, Session: s.id, Term: s.term}
}

// wakeLocked tells those who wait that the session changed.
func (c *Client) wakeLocked() {
	close(c.changed)
	c.changed = make(chan struct{})
}

// current returns the session and whether it may be relied on now.
func (c *Client) current() (session, bool) {
	c.mu.Lock()
	s := c.sess
	c.mu.Unlock()
	return s, s.id != 0 && c.alive()
}

// alive reports whether the session has time left on this node's clock.
func (c *Client) alive() bool { return int64(clock.Now()) < c.expires.Load() }

// valid waits for a session that may be relied on.
func (c *Client) valid(ctx context.Context) (session, error) {
	for {
		c.mu.Lock()
		s, changed := c.sess, c.changed
		c.mu.Unlock()
		if s.id != 0 && c.alive() {
			return s, nil
		}
		select {
		case <-changed:
		case <-time.After(50 * time.Millisecond): // expired, and not lost yet
		case <-ctx.Done():
			return session{}, gaveUp(ctx, "no session with the volume's leader: too few storing nodes answer")
		}
	}
}

// gaveUp says why an operation ended early.
func gaveUp(ctx context.Context, why string) error {
	if context.Cause(ctx) == context.DeadlineExceeded {
		return errs.E(errs.Timeout, "", "", "%s", why)
	}
	return errs.E(errs.Interrupted, "", "", "interrupted")
}

// limit bounds an operation.
func limit(ctx context.Context) (context.Context, context.CancelFunc) {
	return context.WithTimeout(ctx, opLimit)
}

// steady bounds an operation that is not given up halfway because its caller got
// a signal: its outcome would be unknown.
func steady(ctx context.Context) (context.Context, context.CancelFunc) {
	return context.WithTimeout(context.WithoutCancel(ctx), opLimit)
}

// retry reports whether another attempt, perhaps at another node, may succeed.
func retry(err error) bool {
	switch errs.ClassOf(err) {
	case errs.NotLeader, errs.Unavailable, errs.Timeout, errs.NoQuorum, errs.Busy:
		return true
	}
	return false
}

// once makes one attempt at the node believed to lead the group.
func (c *Client) once(ctx context.Context, method string, req, resp any) error {
	n := ids.Node(c.leader.Load())
	if n == 0 {
		if n = c.findLeader(ctx); n == 0 {
			return errs.E(errs.NoQuorum, method, "", "no node knows who leads the volume")
		}
		c.leader.Store(uint64(n))
	}
	_, err := c.cfg.Peers.Call(ctx, n, method, req, nil, resp)
	if err != nil && (retry(err) || errs.Has(err, errs.Unauthorized)) { // perhaps another leads
		c.leader.CompareAndSwap(uint64(n), 0)
	}
	return err
}

// findLeader asks the members.
func (c *Client) findLeader(ctx context.Context) ids.Node {
	for _, n := range c.cfg.Members() {
		ctx, cancel := context.WithTimeout(ctx, whereLimit)
		var r vice.WhereReply
		_, err := c.cfg.Peers.Call(ctx, n, vice.MethodWhere, vice.Caller{Group: c.cfg.Group}, nil, &r)
		cancel()
		if err == nil && r.Leader != 0 {
			return r.Leader
		}
	}
	return 0
}

// ask makes a request under the session, until it is answered by the leader that
// the session's leases come from, and returns the session it was answered under.
// build makes the request anew for each attempt.
func ask[R any](c *Client, ctx context.Context, method string, build func(vice.Caller) any) (R, session, error) {
	for wait := askFirst; ; wait = min(2*wait, askMost) {
		var r R
		s, err := c.valid(ctx)
		if err != nil {
			return r, s, err
		}
		err = c.once(ctx, method, build(c.caller(s)), &r)
		if err == nil {
			if now, ok := c.current(); ok && now.epoch == s.epoch && now.term == s.term {
				return r, s, nil
			}
			continue // the answer is of a time that is over
		}
		if errs.Has(err, errs.Stale) {
			c.lose(s.epoch, err.Error())
			continue
		}
		if !retry(err) {
			return r, s, err
		}
		if ctx.Err() != nil {
			return r, s, gaveUp(ctx, err.Error())
		}
		pause(ctx, wait)
	}
}

// apply has operations done exactly once, under the session first: in no other
// would they be about the same leases. Their results may be relied on whatever
// became of the leader; leases given with them only if fresh. What is
// relinquished was held in first's term. With opened, what ops create is open
// from the start: the leader keeps it for this node until *opened, which apply
// sets, has been called.
func (c *Client) apply(ctx context.Context, first session, ops []volume.Op, relinquish []vice.Held, want []ids.Inode, opened *func()) (r vice.ApplyReply, s session, fresh bool, err error) {
	landed := func() {}
	if opened == nil {
		defer func() { landed() }()
	} else {
		defer func() { *opened = landed }()
	}
	if s, err = c.still(ctx, first); err != nil {
		return r, s, false, err
	}
	c.mu.Lock()
	if c.sess.id != first.id {
		c.mu.Unlock()
		return r, s, false, lostErr()
	}
	c.seq++
	seq := c.seq
	c.flying[seq] = struct{}{}
	c.mu.Unlock()
	landed = sync.OnceFunc(func() {
		c.mu.Lock()
		if c.sess.id == first.id { // another session counts anew
			delete(c.flying, seq)
		}
		c.mu.Unlock()
	})
	for wait := askFirst; ; wait = min(2*wait, askMost) {
		q := vice.ApplyRequest{Caller: c.caller(s), Seq: seq, Acked: c.acked(), Ops: ops, Open: opened != nil}
		if s.term == first.term { // leases are a term's: a new leader knows none
			q.Relinquish, q.Want = relinquish, want
		}
		r = vice.ApplyReply{}
		err = c.once(ctx, vice.MethodApply, q, &r)
		if err == nil && len(r.Results) != len(ops) {
			return r, s, false, errs.E(errs.Corrupt, "apply", "", "%d results for %d operations", len(r.Results), len(ops))
		}
		if err == nil {
			now, ok := c.current()
			return r, s, ok && now == s && s.term == first.term, nil
		}
		if errs.Has(err, errs.Stale) {
			c.lose(s.epoch, err.Error())
			return r, s, false, lostErr()
		}
		if !retry(err) {
			return r, s, false, err
		}
		if ctx.Err() != nil {
			return r, s, false, gaveUp(ctx, err.Error())
		}
		pause(ctx, wait)
		if s, err = c.still(ctx, first); err != nil {
			return r, s, false, err
		}
	}
}

// still waits until the session first may be relied on, perhaps in a later term.
// It fails at once when that session is lost: purge waits for some who call it.
func (c *Client) still(ctx context.Context, first session) (session, error) {
	for {
		c.mu.Lock()
		s, changed := c.sess, c.changed
		c.mu.Unlock()
		switch {
		case s.id != first.id || s.id == 0:
			return s, lostErr()
		case c.alive():
			return s, nil
		}
		select {
		case <-changed:
		case <-time.After(50 * time.Millisecond): // expired, and not lost yet
		case <-ctx.Done():
			return s, gaveUp(ctx, "no session with the volume's leader: too few storing nodes answer")
		}
	}
}

func lostErr() error {
	return errs.E(errs.IO, "", "", "this node was cut off for longer than its session lasts")
}

// acked returns the sequence number below which all are answered.
func (c *Client) acked() uint64 {
	c.mu.Lock()
	defer c.mu.Unlock()
	a := c.seq + 1
	for s := range c.flying {
		a = min(a, s)
	}
	return a
}

// call decodes a callback's request and checks that it is for this session.
func decode[Q any](req []byte) (Q, error) {
	var q Q
	err := wire.Unmarshal(req, &q)
	return q, err
}
