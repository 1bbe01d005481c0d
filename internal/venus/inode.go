package venus

import (
	"context"
	"sync"
	"syscall"
	"time"

	"github.com/unum-os/unum/internal/clock"
	"github.com/unum-os/unum/internal/errs"
	"github.com/unum-os/unum/internal/fusefs"
	"github.com/unum-os/unum/internal/ids"
	"github.com/unum-os/unum/internal/vice"
	"github.com/unum-os/unum/internal/volume"
)

// inode is what the node knows of one inode.
type inode struct {
	ino  ids.Inode
	pins int // guarded by Client.mu

	mu      sync.Mutex
	wake    chan struct{} // closed when something below changed that is waited for
	used    clock.Instant
	lookups uint64 // the kernel's
	known   bool   // the kernel has named it to us: INVAL_INODE will find it

	// The lease, void unless epoch is the session's.
	epoch     uint64
	mode      vice.Mode
	seq       uint64
	through   uint64 // grants up to this seq are given back, or never taken
	acquiring bool   // one request for a lease at a time
	expecting int    // requests whose answers may bring a lease

	// Revocation.
	revoking bool // one at a time; nothing is promised to the kernel
	gated    bool // requests for content wait: while revoking, but for a moment now and then
	purging  bool // the session was lost: they fail
	inflight int  // requests for content that use the lease, until they are replied
	replies  int  // of these: done but for their reply to the kernel

	// Under a lease; without one attr is what was seen last.
	attr     volume.Attr
	target   string            // symbolic link, if not empty
	xattrs   map[string][]byte // nil: not known
	names    []string          // of xattrs, sorted
	base     extents           // committed content
	loaded   bool              // base is known
	loads    uint64            // grows when what a load in progress sees is outdated
	loading  bool              //
	pending  *pending          // nil: nothing
	shipping *pending          // being committed
	entries  map[string]dentry // directory: names known; ino 0: known to be missing
	complete bool              // entries are all

	// Open files.
	opens, writers int
	noted          bool          // the leader remembers us as an opener
	closing        chan struct{} // closed when the leader has forgotten us
	locked         bool          // may hold file locks
	unlocks        int           // ends of flock locks on their way; the kernel may use their owners again
}

type dentry struct {
	ino  ids.Inode
	mode uint32
}

// handle is an open file or directory.
type handle struct {
	in    *inode
	flags uint32
	mu    sync.Mutex
	lost  bool // a change made through it was dropped
	list  []volume.Dirent
	read  bool // list is filled
}

func (in *inode) isDir() bool { return in.attr.Mode&syscall.S_IFMT == syscall.S_IFDIR }

// changed wakes those who wait for the inode. The caller holds in.mu.
func (in *inode) changed() {
	if in.wake != nil {
		close(in.wake)
		in.wake = nil
	}
}

// wait lets go of in.mu until the inode changed or ctx ended, and takes it again.
func (in *inode) wait(ctx context.Context) error {
	if in.wake == nil {
		in.wake = make(chan struct{})
	}
	w := in.wake
	in.mu.Unlock()
	defer in.mu.Lock()
	select {
	case <-w:
		return nil
	case <-ctx.Done():
		return gaveUp(ctx, "another node did not give up its lease in time")
	}
}

// inode returns the entry of ino, a new one if there is none.
func (c *Client) inode(ino ids.Inode) *inode {
	c.mu.Lock()
	defer c.mu.Unlock()
	in := c.inodes[ino]
	if in == nil {
		in = &inode{ino: ino, used: clock.Now()}
		c.inodes[ino] = in
	}
	return in
}

// pin returns the entry of ino and keeps it from being swept until unpin is
// called. An inode that the kernel names needs no pin: its lookups keep it.
func (c *Client) pin(ino ids.Inode) (in *inode, unpin func()) {
	c.mu.Lock()
	defer c.mu.Unlock()
	in = c.inodes[ino]
	if in == nil {
		in = &inode{ino: ino, used: clock.Now()}
		c.inodes[ino] = in
	}
	in.pins++
	return in, func() {
		c.mu.Lock()
		in.pins--
		c.mu.Unlock()
	}
}

// holds reports whether the inode's lease is at least m and may be used now.
// The caller holds in.mu.
func (c *Client) holds(in *inode, m vice.Mode) bool {
	if in.mode < m || in.mode == vice.None {
		return false
	}
	s, ok := c.current()
	return ok && in.epoch == s.epoch
}

// renewEpoch drops a lease of an earlier epoch. The caller holds in.mu.
func (in *inode) renewEpoch(epoch uint64) {
	if in.epoch < epoch {
		in.forget()
		in.epoch, in.seq, in.through = epoch, 0, 0
		in.noted = false
	}
}

// forget drops the lease and what was known under it. What is pending stays.
func (in *inode) forget() {
	in.mode = vice.None
	in.through = max(in.through, in.seq)
	in.base, in.loaded = nil, false
	in.loads++
	in.entries, in.complete = nil, false
	in.xattrs, in.names = nil, nil
	in.target = ""
}

// install takes a grant that came with attr, unless it was recalled on the way.
// It reports whether the lease is in force. The caller holds in.mu.
func (c *Client) install(in *inode, g vice.Grant, attr *volume.Attr, s session) bool {
	if g.Mode == vice.None {
		return false
	}
	if now, ok := c.current(); !ok || now.epoch != s.epoch || now.term != s.term {
		return false
	}
	in.renewEpoch(s.epoch)
	if g.Seq <= in.through || g.Seq < in.seq {
		return in.mode >= g.Mode
	}
	if g.Mode == vice.Read && (in.writers > 0 || in.acquiring) && in.mode == vice.None {
		// Only a write lease will do while it is open for writing here. And a
		// request that waits in the leader's line with a page locked would never
		// be served, if the recall of this lease had to wait for that page.
		in.through = g.Seq
		go c.release(s, vice.Held{Ino: in.ino, Seq: g.Seq, Open: in.opens > 0})
		if in.opens > 0 {
			in.noted = true
		}
		return false
	}
	if in.mode == vice.None {
		in.forget()
	}
	if in.mode < vice.Write { // else ours is the newest
		in.attr = *attr
	}
	in.mode, in.seq = max(in.mode, g.Mode), g.Seq
	in.used = clock.Now()
	return true
}

// release gives a lease back unasked.
func (c *Client) release(s session, h vice.Held) {
	ctx, cancel := context.WithTimeout(context.Background(), opLimit)
	defer cancel()
	var r vice.Empty
	if err := c.once(ctx, vice.MethodRelease, vice.ReleaseRequest{Caller: c.caller(s), Leases: []vice.Held{h}}, &r); err != nil {
		c.cfg.Log.Debug("release", "inode", uint64(h.Ino), "err", err) // it will be recalled
	}
}

// need says what kind of admission ensure gives.
type need struct {
	mode    vice.Mode
	content bool // uses content: counted in inflight until done
	launder bool // written back from a mapping: passes the gate, never acquires
	open    bool // the file is being opened
	once    bool // attributes that are true now will do, without a lease
}

// ensure gets the lease that n asks for and calls admit under in.mu while it is
// held. If n.once and there is none to be had, it returns attributes that may be
// used once.
func (c *Client) ensure(ctx context.Context, in *inode, n need, admit func()) (once *volume.Attr, err error) {
	in.mu.Lock()
	defer in.mu.Unlock()
	start := c.epoch()
	inLine := false
	for {
		mode := n.mode
		if in.purging && n.content {
			return nil, lostErr()
		}
		if in.writers > 0 && !in.isDir() {
			mode = vice.Write
		}
		held := c.holds(in, mode)
		switch {
		case held && (!n.content || !in.gated || n.launder):
			c.count.hits.Add(1)
			in.used = clock.Now()
			if n.content {
				in.inflight++
			}
			if admit != nil {
				admit()
			}
			return nil, nil
		case n.launder:
			return nil, lostErr()
		case held || in.acquiring: // gated, or somebody asks already
			if err := in.wait(ctx); err != nil {
				return nil, err
			}
			continue
		}
		if n.content && c.epoch() != start {
			// The session was lost while we waited, with pages of the kernel locked
			// by this very request: let it go so that they can be emptied.
			return nil, lostErr()
		}
		if inLine {
			mode = vice.Write
		}
		c.count.misses.Add(1)
		in.acquiring = true
		in.expecting++
		in.mu.Unlock()
		actx, cancel := context.WithCancel(ctx)
		if n.content { // purge waits for this request
			c.while(actx, start, cancel)
		}
		r, s, err := ask[vice.AcquireReply](c, actx, vice.MethodAcquire, func(k vice.Caller) any {
			return vice.AcquireRequest{Caller: k, Ino: in.ino, Mode: mode, Open: n.open}
		})
		cancel()
		in.mu.Lock()
		in.acquiring = false
		in.expecting--
		in.changed()
		if err != nil {
			if n.content && c.epoch() != start {
				err = lostErr()
			}
			return nil, err
		}
		ok := c.install(in, r.Grant, &r.Attr, s)
		if r.Noted && in.epoch == s.epoch {
			in.noted = true
		}
		if !ok && r.Grant.Mode == vice.None {
			if n.once {
				return &r.Attr, nil
			}
			// Ask for more than is needed: that waits in line, so it will be had. If
			// another request brings a lesser lease first, that will do: to go on
			// waiting while holding it would be for ever, if its recall has to wait
			// for a page that this request has locked.
			inLine = true
		}
	}
}

// done ends an admission with content.
func (in *inode) done() {
	in.mu.Lock()
	in.inflight--
	in.changed()
	in.mu.Unlock()
}

// revoke empties the kernel's caches of the inode, ships what is pending on it,
// and drops the lease. It returns the grant given up.
func (c *Client) revoke(ctx context.Context, in *inode) (vice.Held, error) {
	in.mu.Lock()
	for in.revoking {
		if err := in.wait(ctx); err != nil {
			in.mu.Unlock()
			return vice.Held{}, err
		}
	}
	if in.mode == vice.None {
		h := vice.Held{Ino: in.ino, Seq: in.through, Open: in.opens > 0}
		in.noted = in.noted || h.Open
		in.mu.Unlock()
		return h, nil
	}
	epoch := in.epoch
	in.revoking, in.gated = true, true
	err := c.quiesce(ctx, in)
	for err == nil && !(in.pending.empty() && in.shipping == nil) {
		in.mu.Unlock()
		err = c.ship(ctx)
		in.mu.Lock()
	}
	h := vice.Held{Ino: in.ino, Seq: in.seq, Open: in.opens > 0}
	if err == nil && in.epoch != epoch {
		err = lostErr() // and the lease it had with it; there may be another
	}
	if err == nil {
		in.forget()
		in.noted = in.noted || h.Open
	}
	in.revoking, in.gated = false, false
	in.changed()
	in.mu.Unlock()
	return h, err
}

// quiesce brings the inode to a state in which no request uses its content and
// the kernel caches nothing of it. The caller holds in.mu and has closed the
// gate; it is closed again at the end.
//
// Emptying the pages waits for those that a request has locked. Such a request
// may stand at the gate: then it is opened, and all is done once more.
func (c *Client) quiesce(ctx context.Context, in *inode) error {
	for patience := 2 * time.Millisecond; ; patience *= 2 {
		for in.inflight > 0 {
			if err := in.wait(ctx); err != nil {
				return err
			}
		}
		k := c.kernel.Load()
		if k == nil || in.lookups == 0 || in.isDir() {
			return nil // nothing of it is in the kernel, or no more than names
		}
		in.mu.Unlock()
		done := make(chan error, 1)
		go func() { done <- (*k).InvalidateInode(in.ino, 0, 0) }()
		t := time.NewTimer(patience)
		select {
		case err := <-done:
			t.Stop()
			in.mu.Lock()
			return err
		case <-t.C:
		}
		in.mu.Lock()
		in.gated = false
		in.changed()
		in.mu.Unlock()
		var err error
		select {
		case err = <-done:
		case <-ctx.Done():
			err = gaveUp(ctx, "the kernel's pages could not be emptied")
		}
		in.mu.Lock()
		in.gated = true
		if err != nil {
			return err
		}
	}
}

// onRecall answers the leader's recall of a lease.
func (c *Client) onRecall(ctx context.Context, from ids.Node, req, _ []byte) (any, []byte, error) {
	q, err := decode[vice.RecallRequest](req)
	if err != nil {
		return nil, nil, err
	}
	c.mu.Lock()
	s, losing := c.sess, c.losing
	c.mu.Unlock()
	if losing { // the kernel's caches are being emptied
		return nil, nil, errs.E(errs.Unavailable, "recall", "", "a session is being given up here")
	}
	if q.Session != s.id || q.Term != s.term {
		// Not of this session or term: nothing of it is in use here. A recall of a
		// later term than we know cannot be: its leader takes over first.
		if q.Session == s.id && q.Term > s.term {
			return nil, nil, errs.E(errs.Unavailable, "recall", "", "term %d is not known here yet", q.Term)
		}
		return vice.RecallReply{}, nil, nil
	}
	in, unpin := c.pin(q.Ino)
	defer unpin()
	in.mu.Lock()
	in.renewEpoch(s.epoch)
	if in.seq < q.Seq && in.through < q.Seq && in.expecting > 0 {
		// Its grant is on the way: let it be used once. Not for long: the answer
		// may have been lost, and the next one stand in line behind this recall.
		wctx, cancel := context.WithTimeout(ctx, grantWait)
		for in.seq < q.Seq && in.through < q.Seq && in.expecting > 0 && in.wait(wctx) == nil {
		}
		cancel()
	}
	if in.seq > q.Seq || in.epoch != s.epoch { // late
		open := in.opens > 0
		in.mu.Unlock()
		return vice.RecallReply{Open: open}, nil, nil
	}
	in.through = max(in.through, q.Seq) // whatever comes later with it is not taken
	in.mu.Unlock()
	h, err := c.revoke(ctx, in)
	if err != nil {
		return nil, nil, err
	}
	in.mu.Lock()
	in.noted = in.noted || h.Open
	in.mu.Unlock()
	return vice.RecallReply{Open: h.Open}, nil, nil
}

// onTakeover tells a new leader which leases are held here and what is open.
func (c *Client) onTakeover(ctx context.Context, from ids.Node, req, _ []byte) (any, []byte, error) {
	q, err := decode[vice.TakeoverRequest](req)
	if err != nil {
		return nil, nil, err
	}
	c.mu.Lock()
	switch {
	case c.losing || q.Session == c.sess.id && !c.alive():
		c.mu.Unlock()
		return nil, nil, errs.E(errs.Unavailable, "takeover", "", "the session is being given up here")
	case q.Session != c.sess.id:
		c.mu.Unlock()
		return vice.TakeoverReply{Unknown: true}, nil, nil
	case q.Term < c.sess.term:
		c.mu.Unlock()
		return nil, nil, errs.E(errs.Stale, "takeover", "", "term %d is known here", c.sess.term)
	}
	// From here on no answer of an earlier term brings a lease (see install), so
	// that the list is whole.
	c.sess.term = q.Term
	s := c.sess
	all := make([]*inode, 0, len(c.inodes))
	for _, in := range c.inodes {
		all = append(all, in)
	}
	c.leader.Store(uint64(from))
	c.wakeLocked()
	c.mu.Unlock()
	var r vice.TakeoverReply
	for _, in := range all {
		in.mu.Lock()
		if in.epoch == s.epoch {
			in.seq, in.through = 0, 0 // the new leader counts anew
			if in.mode != vice.None {
				r.Held = append(r.Held, vice.Reclaimed{Ino: in.ino, Mode: in.mode})
			}
		}
		if in.opens > 0 {
			r.Open = append(r.Open, in.ino)
			in.noted = true
		}
		in.mu.Unlock()
	}
	return r, nil, nil
}

func (c *Client) epoch() uint64 {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.sess.epoch
}

// entry makes what the kernel is told of an inode, under in.mu.
func (c *Client) entry(in *inode) fusefs.Entry {
	e := fusefs.Entry{Attr: in.attr}
	for _, p := range []*pending{in.shipping, in.pending} {
		if p != nil { // overwritten or new: known when it is shipped, new is likely
			e.Attr.Alloc = max(e.Attr.Alloc, min(e.Attr.Alloc+uint64(p.bytes), e.Attr.Size))
		}
	}
	if in.known && !in.revoking && !in.isDir() && c.holds(in, vice.Read) {
		e.Until = clock.Instant(c.expires.Load())
	}
	return e
}
