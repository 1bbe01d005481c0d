package vice

import (
	"context"
	"slices"
	"sync"
	"syscall"
	"time"

	"github.com/unum-os/unum/internal/clock"
	"github.com/unum-os/unum/internal/errs"
	"github.com/unum-os/unum/internal/ids"
	"github.com/unum-os/unum/internal/lease"
	"github.com/unum-os/unum/internal/volume"
)

func (s *Server) where(context.Context, ids.Node, *Caller) (WhereReply, error) {
	leader, _ := s.cfg.Replica.Leader()
	return WhereReply{Leader: leader}, nil
}

// open opens a session for the calling node, and ends its earlier ones.
func (s *Server) open(ctx context.Context, from ids.Node, q *OpenRequest) (OpenReply, error) {
	arrived := clock.Now()
	l, err := s.leading()
	if err != nil {
		return OpenReply{}, err
	}
	select {
	case <-l.ready:
	case <-ctx.Done():
		return OpenReply{}, errs.E(errs.Timeout, "open session", "", "the new leader is still waiting for old sessions to end")
	case <-l.ctx.Done():
		return OpenReply{}, context.Cause(l.ctx)
	}
	r, err := l.propose(ctx, &volume.Command{Open: &volume.OpenSession{Node: from, Nonce: q.Nonce}})
	if err != nil {
		return OpenReply{}, err
	}
	l.mu.Lock()
	var old []ids.Session
	for id, ss := range l.sessions {
		if ss.node == from && id < r.Session {
			old = append(old, id)
		}
	}
	over := false
	if ss := l.sessions[r.Session]; ss == nil {
		l.sessions[r.Session] = &session{id: r.Session, node: from, renewed: arrived, taken: true}
	} else { // the same request again: its node counts from the later one
		over = ss.ending
		ss.renewed = max(ss.renewed, arrived)
	}
	l.mu.Unlock()
	if over {
		return OpenReply{}, errs.E(errs.Unavailable, "open session", "", "session %d is being ended", r.Session)
	}
	for _, id := range old { // the log ended them with the same entry
		l.forget(id)
	}
	return OpenReply{Session: r.Session, Term: l.term}, nil
}

// renew prolongs a session, unless it leaves recalls unanswered.
func (s *Server) renew(ctx context.Context, from ids.Node, q *RenewRequest) (RenewReply, error) {
	arrived := clock.Now()
	l, err := s.leading()
	if err != nil {
		return RenewReply{}, err
	}
	if _, err := s.cfg.Replica.ReadIndex(ctx); err != nil {
		return RenewReply{}, err
	}
	// Another leader may have confirmed it, who knows nothing of this renewal.
	if leader, term := s.cfg.Replica.Leader(); leader != s.cfg.Self || term != l.term || l.ctx.Err() != nil {
		return RenewReply{}, errs.E(errs.NotLeader, "renew", "", "group %d is led by %v", s.cfg.Group, leader)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	ss := l.sessions[q.Session]
	if ss == nil {
		select {
		case <-l.ready:
			return RenewReply{}, errs.E(errs.Stale, "renew", "", "session %d is over", q.Session)
		default:
			return RenewReply{}, errs.E(errs.Unavailable, "renew", "", "the new leader is taking over")
		}
	}
	if ss.node != from || ss.ending {
		return RenewReply{}, errs.E(errs.Stale, "renew", "", "session %d is over", q.Session)
	}
	if !ss.taken {
		return RenewReply{}, errs.E(errs.Unavailable, "renew", "", "the new leader is taking over")
	}
	if slices.Contains(l.table.Overdue(arrived, recallPatience), ss.id) {
		return RenewReply{}, errs.E(errs.Busy, "renew", "", "a recall has not been answered")
	}
	ss.renewed = max(ss.renewed, arrived)
	return RenewReply{Term: l.term}, nil
}

// acquire gives a lease and the attributes under it.
func (s *Server) acquire(ctx context.Context, from ids.Node, q *AcquireRequest) (r AcquireReply, err error) {
	l, err := s.enter(ctx, from, &q.Caller)
	if err != nil {
		return AcquireReply{}, err
	}
	if q.Mode != Read && q.Mode != Write {
		return AcquireReply{}, errs.E(errs.Invalid, "acquire", "", "mode %d", q.Mode)
	}
	if q.Open {
		// A removal either sees the opener or is over before the attributes are
		// read, which then finds nothing.
		l.mu.Lock()
		noted := slices.Contains(l.table.Openers(q.Ino), q.Session)
		l.table.NoteOpen(q.Session, q.Ino)
		removals := l.removals[q.Ino]
		l.mu.Unlock()
		r.Noted = true
		defer func() {
			if err != nil && !noted { // the client will not hear that it is noted
				l.mu.Lock()
				l.table.Closed(q.Session, q.Ino)
				l.mu.Unlock()
			}
		}()
		for _, done := range removals {
			select {
			case <-done:
			case <-ctx.Done():
				return AcquireReply{}, errs.E(errs.Timeout, "open", "", "its removal by another is not over")
			case <-l.ctx.Done():
				return AcquireReply{}, context.Cause(l.ctx)
			}
		}
	}
	if r.Grant, err = l.lease(ctx, q.Session, q.Ino, q.Mode); err != nil {
		return AcquireReply{}, err
	}
	if r.Attr, err = s.cfg.State.GetAttr(q.Ino); err != nil {
		l.giveBack(q.Session, r.Grant)
		return AcquireReply{}, err
	}
	return r, nil
}

// giveBack ends a grant that its session will not hear of.
func (l *leadership) giveBack(s ids.Session, g Grant) {
	if g.Mode == None {
		return
	}
	l.mu.Lock()
	recalls := l.released(s, Held{Ino: g.Ino, Seq: g.Seq, Open: slices.Contains(l.table.Openers(g.Ino), s)})
	l.mu.Unlock()
	l.send(recalls)
}

// lookup resolves one name, with leases on the directory and on what it found.
func (s *Server) lookup(ctx context.Context, from ids.Node, q *LookupRequest) (LookupReply, error) {
	l, err := s.enter(ctx, from, &q.Caller)
	if err != nil {
		return LookupReply{}, err
	}
	var r LookupReply
	if r.Dir, err = l.lease(ctx, q.Session, q.Parent, Read); err != nil {
		return LookupReply{}, err
	}
	if r.DirAttr, err = s.cfg.State.GetAttr(q.Parent); err != nil {
		l.giveBack(q.Session, r.Dir)
		return LookupReply{}, err
	}
	for {
		d, err := s.cfg.State.Lookup(q.Parent, q.Name)
		if errs.Has(err, errs.NotFound) {
			return r, nil
		}
		if err != nil {
			l.giveBack(q.Session, r.Dir)
			return LookupReply{}, err
		}
		r.Ino = d.Ino
		if r.Child, err = l.lease(ctx, q.Session, d.Ino, Read); err != nil {
			l.giveBack(q.Session, r.Dir)
			return LookupReply{}, err
		}
		r.Attr, err = s.cfg.State.GetAttr(d.Ino)
		if err == nil {
			return r, nil
		}
		l.giveBack(q.Session, r.Child)
		if !errs.Has(err, errs.NotFound) || ctx.Err() != nil {
			l.giveBack(q.Session, r.Dir)
			return LookupReply{}, err
		}
		// Removed since: the directory was not held, or not for long. Look again.
		r.Child, r.Ino = Grant{}, 0
	}
}

// readdir lists a directory.
func (s *Server) readdir(ctx context.Context, from ids.Node, q *ReadDirRequest) (ReadDirReply, error) {
	l, err := s.enter(ctx, from, &q.Caller)
	if err != nil {
		return ReadDirReply{}, err
	}
	limit := q.Limit
	if limit <= 0 || limit > listingPage {
		limit = listingPage
	}
	var r ReadDirReply
	if r.Dir, err = l.lease(ctx, q.Session, q.Dir, Read); err != nil {
		return ReadDirReply{}, err
	}
	page, err := s.cfg.State.list(q.Dir, q.After, limit+1)
	if err != nil {
		l.giveBack(q.Session, r.Dir)
		return ReadDirReply{}, err
	}
	r.Attr, r.Entries = page.attr, page.entries
	if len(r.Entries) > limit {
		r.Entries, r.More = r.Entries[:limit], true
	}
	return r, nil
}

// extents returns a page of a file's extents, or a symbolic link's target.
func (s *Server) extents(ctx context.Context, from ids.Node, q *ExtentsRequest) (ExtentsReply, error) {
	if _, err := s.enter(ctx, from, &q.Caller); err != nil {
		return ExtentsReply{}, err
	}
	a, err := s.cfg.State.GetAttr(q.Ino)
	if err != nil {
		return ExtentsReply{}, err
	}
	if a.Mode&syscall.S_IFMT == syscall.S_IFLNK {
		t, err := s.cfg.State.readlink(q.Ino)
		return ExtentsReply{Target: t}, err
	}
	es, err := s.cfg.State.extents(q.Ino, q.From, maxExtents)
	if err != nil {
		return ExtentsReply{}, err
	}
	r := ExtentsReply{Extents: es, More: len(es) == maxExtents}
	bytes := 0
	for i := range es {
		if bytes += len(es[i].Data); bytes > extentPage && i > 0 {
			r.Extents, r.More = es[:i], true
			break
		}
	}
	return r, nil
}

func (s *Server) xattrs(ctx context.Context, from ids.Node, q *XattrsRequest) (XattrsReply, error) {
	if _, err := s.enter(ctx, from, &q.Caller); err != nil {
		return XattrsReply{}, err
	}
	return s.cfg.State.xattrs(q.Ino)
}

func (s *Server) stat(ctx context.Context, from ids.Node, q *StatRequest) (StatReply, error) {
	if _, err := s.enter(ctx, from, &q.Caller); err != nil {
		return StatReply{}, err
	}
	u, err := s.cfg.State.totals()
	return StatReply{Inodes: u.Inodes, Bytes: u.Bytes}, err
}

// apply does operations: claims what they change, proposes them, and gives the
// leases that nobody is in the way of.
func (s *Server) apply(ctx context.Context, from ids.Node, q *ApplyRequest) (ApplyReply, error) {
	l, err := s.enter(ctx, from, &q.Caller)
	if err != nil {
		return ApplyReply{}, err
	}
	if len(q.Ops) == 0 || len(q.Ops) > volume.MaxOps || q.Seq == 0 {
		return ApplyReply{}, errs.E(errs.Invalid, "apply", "", "%d operations, sequence number %d", len(q.Ops), q.Seq)
	}
	held := make([]lease.Held, len(q.Relinquish))
	l.mu.Lock()
	l.grown(q.Session, q.Acked)
	for i, h := range q.Relinquish {
		held[i] = lease.Held{Ino: h.Ino, Seq: h.Seq}
		if h.Open {
			l.table.NoteOpen(q.Session, h.Ino)
		}
	}
	l.mu.Unlock()
	var claim uint64
	defer func() { l.unclaim(claim) }()
	for {
		inos, err := s.resolve(l, q)
		if err != nil {
			return ApplyReply{}, err
		}
		if len(inos) == 0 && len(held) == 0 {
			break // all under the client's own write leases
		}
		e, err := l.ask(ctx, func(now clock.Instant, ticket uint64) []lease.Effect {
			claim = ticket
			return l.table.Claim(now, ticket, inos, q.Session, held)
		})
		if err != nil {
			return ApplyReply{}, err
		}
		if e.Kind == lease.Gone {
			return ApplyReply{}, errs.E(errs.Stale, "apply", "", "session %d is over", q.Session)
		}
		l.mu.Lock()
		for _, h := range held {
			wake(l.freed, h.Ino)
		}
		l.mu.Unlock()
		held = nil
		again, err := s.resolve(l, q)
		if err != nil {
			return ApplyReply{}, err
		}
		if subset(again, inos) {
			break
		}
		l.unclaim(claim) // a name led elsewhere meanwhile
	}
	noted := l.creating(q)
	defer noted()
	if err := l.created(ctx, q); err != nil {
		return ApplyReply{}, err
	}
	removed := s.keep(l, q)
	// Not given up with the caller: until its fate is known nobody may be given a
	// lease on the state before it.
	res, err := l.propose(l.ctx, &volume.Command{Session: q.Session, Seq: q.Seq, Acked: q.Acked, Ops: q.Ops})
	if err != nil {
		if undecided(err) {
			claim = 0 // kept for what is left of this role: the next leader may commit it
		} else {
			removed()
		}
		return ApplyReply{}, err
	}
	removed()
	s.count.done(q.Ops)
	r := ApplyReply{Results: res.Ops}
	l.mu.Lock()
	recalls := l.answer(l.table.Unclaim(clock.Now(), claim))
	claim = 0
	for i := range res.Ops {
		op, rs := &q.Ops[i], &res.Ops[i]
		if q.Open && op.Kind == volume.OpCreate && rs.Err == 0 {
			l.born[rs.Ino] = birth{q.Session, q.Seq}
		}
		if op.Kind == volume.OpCreate && rs.Err == 0 && op.Mode&syscall.S_IFMT == syscall.S_IFREG && rs.Ino != 0 {
			if g := l.grantIfFree(q.Session, rs.Ino, Write); g.Mode != None {
				r.Grants = append(r.Grants, g)
			}
		}
	}
	for _, ino := range q.Want {
		if g := l.grantIfFree(q.Session, ino, Read); g.Mode != None {
			r.Grants = append(r.Grants, g)
		}
	}
	l.mu.Unlock()
	l.send(recalls)
	for _, g := range slices.Clone(r.Grants) {
		a, err := s.cfg.State.GetAttr(g.Ino)
		if err != nil { // removed meanwhile; the recall is on its way
			l.giveBack(q.Session, g)
			r.Grants = slices.DeleteFunc(r.Grants, func(x Grant) bool { return x == g })
			continue
		}
		r.Attrs = append(r.Attrs, a)
	}
	return r, nil
}

// undecided reports whether a proposal that failed may be applied yet. The role
// is over then, or soon will be.
func undecided(err error) bool {
	switch errs.ClassOf(err) {
	case errs.Timeout, errs.Interrupted, errs.Unavailable, errs.NotLeader, errs.NoQuorum, errs.IO, errs.Unknown:
		return true
	}
	return false
}

func subset(a, b []ids.Inode) bool {
	for _, x := range a {
		if !slices.Contains(b, x) {
			return false
		}
	}
	return true
}

func (l *leadership) unclaim(ticket uint64) {
	if ticket == 0 {
		return
	}
	l.mu.Lock()
	recalls := l.answer(l.table.Unclaim(clock.Now(), ticket))
	l.mu.Unlock()
	l.send(recalls)
}

// resolve returns the inodes to be claimed for q's operations, all that they
// change but those whose data change under the session's own write lease, and
// fills in which children its names lead to now.
func (s *Server) resolve(l *leadership, q *ApplyRequest) ([]ids.Inode, error) {
	var inos []ids.Inode
	child := func(parent ids.Inode, name string) (ids.Inode, error) {
		d, err := s.cfg.State.Lookup(parent, name)
		if errs.Has(err, errs.NotFound) || errs.Has(err, errs.NotDir) || errs.Has(err, errs.TooLong) {
			return 0, nil // the state machine will say so
		}
		return d.Ino, err
	}
	present := func(parent ids.Inode, name string) (ids.Inode, error) {
		ino, err := child(parent, name)
		if ino == 0 {
			ino = volume.NoInode // whatever is put there meanwhile is not meant
		}
		return ino, err
	}
	for i := range q.Ops {
		op := &q.Ops[i]
		var err error
		switch op.Kind {
		case volume.OpCreate:
			inos = append(inos, op.Parent)
		case volume.OpUnlink, volume.OpRmdir:
			if op.Ino, err = present(op.Parent, op.Name); err != nil {
				return nil, err
			}
			inos = append(inos, op.Parent, op.Ino)
		case volume.OpRename:
			if op.Ino, err = present(op.Parent, op.Name); err != nil {
				return nil, err
			}
			if op.ToIno, err = child(op.ToParent, op.ToName); err != nil {
				return nil, err
			}
			inos = append(inos, op.Parent, op.ToParent, op.Ino, op.ToIno)
		case volume.OpLink:
			inos = append(inos, op.Parent, op.Ino)
		case volume.OpSetXattr, volume.OpRemoveXattr:
			inos = append(inos, op.Ino)
		case volume.OpSetAttr, volume.OpWrite, volume.OpPunch:
			l.mu.Lock()
			h, ok := l.table.Find(q.Session, op.Ino)
			l.mu.Unlock()
			if !ok || h.Mode != Write { // not under a write lease of its own
				inos = append(inos, op.Ino)
			}
		case volume.OpDrop:
		default:
			return nil, errs.E(errs.Invalid, "apply", "", "operation kind %d", op.Kind)
		}
	}
	inos = slices.DeleteFunc(inos, func(ino ids.Inode) bool { return ino == 0 || ino == volume.NoInode })
	slices.Sort(inos)
	return slices.Compact(inos), nil
}

// keep tells the operations which sessions have open what they may remove. All
// leases on it were given back, with word of who has it open. Who opens it from
// here on waits until removed is called.
func (s *Server) keep(l *leadership, q *ApplyRequest) (removed func()) {
	var inos []ids.Inode
	done := make(chan struct{})
	l.mu.Lock()
	defer l.mu.Unlock()
	for i := range q.Ops {
		op := &q.Ops[i]
		ino := op.Ino
		switch op.Kind {
		case volume.OpUnlink, volume.OpRmdir:
		case volume.OpRename:
			ino = op.ToIno
		default:
			continue
		}
		if ino == 0 || ino == volume.NoInode {
			continue
		}
		op.Keep = l.table.Openers(ino)
		if b, ok := l.born[ino]; ok && !slices.Contains(op.Keep, b.by) && l.sessions[b.by] != nil {
			op.Keep = append(slices.Clone(op.Keep), b.by)
		}
		inos = append(inos, ino)
		l.removals[ino] = append(l.removals[ino], done)
	}
	return sync.OnceFunc(func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		for _, ino := range inos {
			rest := slices.DeleteFunc(slices.Clone(l.removals[ino]), func(c chan struct{}) bool { return c == done })
			if l.removals[ino] = rest; len(rest) == 0 {
				delete(l.removals, ino)
			}
		}
		close(done)
	})
}

// creating announces files that will be open from the start. Who removes one
// waits until noted is called: its opener is not known before.
func (l *leadership) creating(q *ApplyRequest) (noted func()) {
	if !q.Open {
		return func() {}
	}
	done := make(chan struct{})
	l.mu.Lock()
	defer l.mu.Unlock()
	for i := range q.Ops {
		l.creates[q.Ops[i].Parent] = append(l.creates[q.Ops[i].Parent], done)
	}
	return func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		for i := range q.Ops {
			p := q.Ops[i].Parent
			rest := slices.DeleteFunc(slices.Clone(l.creates[p]), func(c chan struct{}) bool { return c == done })
			if l.creates[p] = rest; len(rest) == 0 {
				delete(l.creates, p)
			}
		}
		close(done)
	}
}

// grown forgets births of which the creators have acknowledged the answers, and
// those of sessions that are over. The caller holds l.mu.
func (l *leadership) grown(by ids.Session, acked uint64) {
	for ino, b := range l.born {
		if b.by == by && b.seq < acked || l.sessions[b.by] == nil {
			delete(l.born, ino)
		}
	}
}

// created waits until it is noted who opens what q may remove, if that is just
// being created.
func (l *leadership) created(ctx context.Context, q *ApplyRequest) error {
	var wait []chan struct{}
	l.mu.Lock()
	for i := range q.Ops {
		switch op := &q.Ops[i]; {
		case op.Kind == volume.OpUnlink && op.Ino != 0:
			wait = append(wait, l.creates[op.Parent]...)
		case op.Kind == volume.OpRename && op.ToIno != 0:
			wait = append(wait, l.creates[op.ToParent]...)
		}
	}
	l.mu.Unlock()
	for _, done := range wait {
		select {
		case <-done:
		case <-ctx.Done():
			return errs.E(errs.Timeout, "remove", "", "its creation is not over")
		case <-l.ctx.Done():
			return context.Cause(l.ctx)
		}
	}
	return nil
}

// release takes idle leases back.
func (s *Server) release(ctx context.Context, from ids.Node, q *ReleaseRequest) (Empty, error) {
	l, err := s.enter(ctx, from, &q.Caller)
	if err != nil {
		return Empty{}, err
	}
	var recalls []lease.Effect
	l.mu.Lock()
	for _, h := range q.Leases {
		recalls = append(recalls, l.released(q.Session, h)...)
	}
	l.mu.Unlock()
	l.send(recalls)
	return Empty{}, nil
}

// closed forgets openers, and lets go of what only they kept.
func (s *Server) closed(ctx context.Context, from ids.Node, q *ClosedRequest) (Empty, error) {
	l, err := s.enter(ctx, from, &q.Caller)
	if err != nil {
		return Empty{}, err
	}
	var closed []ids.Inode
	l.mu.Lock()
	l.grown(q.Session, q.Acked)
	for _, ino := range q.Inos {
		l.table.Closed(q.Session, ino)
		if l.born[ino].by != q.Session { // else its creator will open it yet, and close it
			closed = append(closed, ino)
		}
	}
	l.mu.Unlock()
	var ops []volume.Op
	for _, ino := range closed {
		a, err := s.cfg.State.GetAttr(ino)
		if err == nil && a.Nlink == 0 {
			ops = append(ops, volume.Op{Kind: volume.OpDrop, Ino: ino})
		}
	}
	if len(ops) == 0 {
		return Empty{}, nil
	}
	_, err = l.propose(ctx, &volume.Command{Session: q.Session, Ops: ops})
	return Empty{}, err
}

// lock takes, changes, releases or tests a lock.
func (s *Server) lock(ctx context.Context, from ids.Node, q *LockRequest) (LockReply, error) {
	l, err := s.enter(ctx, from, &q.Caller)
	if err != nil {
		return LockReply{}, err
	}
	q.Lock.Session = q.Session
	if q.Test {
		c, err := s.cfg.State.getLock(q.Ino, q.Lock)
		if err != nil || c.Type == syscall.F_UNLCK {
			return LockReply{}, err
		}
		return LockReply{Conflict: &c}, nil
	}
	op := volume.Op{Kind: volume.OpSetLock, Ino: q.Ino, Lock: &q.Lock, Time: time.Now().UnixNano()}
	for {
		l.mu.Lock()
		changed := waitOn(l.locks, q.Ino)
		l.mu.Unlock()
		// Not remembered (sequence number 0): the same owner may ask twice.
		res, err := l.propose(ctx, &volume.Command{Session: q.Session, Ops: []volume.Op{op}})
		if err != nil {
			return LockReply{}, err
		}
		if len(res.Ops) != 1 {
			return LockReply{}, errs.E(errs.Unknown, "lock", "", "no result")
		}
		r := res.Ops[0]
		switch {
		case r.Err == 0:
			l.mu.Lock()
			wake(l.locks, q.Ino) // somebody may wait for what it gave up
			l.mu.Unlock()
			return LockReply{}, nil
		case errs.Class(r.Err) != errs.LockHeld:
			return LockReply{}, errs.E(errs.Class(r.Err), "lock", "", "%s", r.Why)
		case !q.Wait:
			return LockReply{Conflict: r.Lock}, nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return LockReply{Conflict: r.Lock}, nil
		case <-l.ctx.Done():
			return LockReply{}, context.Cause(l.ctx)
		}
	}
}
