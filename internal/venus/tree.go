package venus

import (
	"context"
	"syscall"
	"time"

	"github.com/unum-os/unum/internal/clock"
	"github.com/unum-os/unum/internal/errs"
	"github.com/unum-os/unum/internal/fusefs"
	"github.com/unum-os/unum/internal/ids"
	"github.com/unum-os/unum/internal/vice"
	"github.com/unum-os/unum/internal/volume"
)

const accMode = syscall.O_ACCMODE

var _ fusefs.Tree = (*Client)(nil)

// result turns one operation's result into an error.
func result(r *volume.Result) error {
	if r.Err == 0 {
		return nil
	}
	return errs.E(errs.Class(r.Err), "", "", "%s", r.Why)
}

// Lookup resolves one name: from the directory's cached entries, or by the
// leader, who gives leases with the answer.
func (c *Client) Lookup(ctx context.Context, _ fusefs.Caller, parent ids.Inode, name string) (fusefs.Entry, error) {
	ctx, cancel := limit(ctx)
	defer cancel()
	if len(name) > volume.MaxName {
		return fusefs.Entry{}, errs.E(errs.TooLong, "lookup", "", "%d bytes, limit %d", len(name), volume.MaxName)
	}
	d := c.inode(parent)
	for {
		d.mu.Lock()
		if c.holds(d, vice.Read) {
			d.used = clock.Now()
			e, ok := d.entries[name]
			missing := ok && e.ino == 0 || !ok && d.complete
			d.mu.Unlock()
			if missing {
				c.count.hits.Add(1)
				return fusefs.Entry{}, errs.NotFound.Err()
			}
			if ok {
				ent, err := c.look(ctx, e.ino)
				if errs.Has(err, errs.NotFound) && !c.leads(d, name, e.ino) {
					continue // another was put in its place
				}
				return ent, err
			}
		} else {
			d.mu.Unlock()
		}
		return c.lookupRemote(ctx, d, name)
	}
}

// leads reports whether a name is known to lead to ino now.
func (c *Client) leads(d *inode, name string, ino ids.Inode) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return c.holds(d, vice.Read) && d.entries[name].ino == ino
}

// look returns the entry of an inode and counts a lookup.
func (c *Client) look(ctx context.Context, ino ids.Inode) (fusefs.Entry, error) {
	in, unpin := c.pin(ino)
	defer unpin()
	var e fusefs.Entry
	once, err := c.ensure(ctx, in, need{mode: vice.Read, once: true}, func() {
		e = c.entry(in)
		in.lookups++
	})
	if once != nil {
		e = fusefs.Entry{Attr: *once}
		in.mu.Lock()
		in.seen(once)
		in.lookups++
		in.mu.Unlock()
	}
	return e, err
}

// seen notes attributes that came without a lease. The caller holds in.mu.
func (in *inode) seen(a *volume.Attr) {
	if in.mode == vice.None {
		in.attr = *a
	}
}

func (c *Client) lookupRemote(ctx context.Context, d *inode, name string) (fusefs.Entry, error) {
	d.mu.Lock()
	d.expecting++
	d.mu.Unlock()
	c.count.misses.Add(1)
	r, s, err := ask[vice.LookupReply](c, ctx, vice.MethodLookup, func(k vice.Caller) any {
		return vice.LookupRequest{Caller: k, Parent: d.ino, Name: name}
	})
	d.mu.Lock()
	d.expecting--
	d.changed()
	if err != nil {
		d.mu.Unlock()
		return fusefs.Entry{}, err
	}
	if r.Ino != 0 && r.Ino == d.ino {
		d.mu.Unlock()
		return fusefs.Entry{}, errs.E(errs.Corrupt, "lookup", "", "directory %d holds itself", d.ino)
	}
	c.install(d, r.Dir, &r.DirAttr, s)
	c.remember(d, r.DirAttr.Version, name, dentry{r.Ino, r.Attr.Mode})
	d.mu.Unlock()
	if r.Ino == 0 {
		return fusefs.Entry{}, errs.NotFound.Err()
	}
	in, unpin := c.pin(r.Ino)
	defer unpin()
	in.mu.Lock()
	defer in.mu.Unlock()
	c.install(in, r.Child, &r.Attr, s)
	in.lookups++
	if c.holds(in, vice.Read) {
		return c.entry(in), nil
	}
	in.seen(&r.Attr)
	return fusefs.Entry{Attr: r.Attr}, nil
}

// remember notes a name as it was at a version of the directory, if that is the
// version under the lease. The caller holds d.mu.
func (c *Client) remember(d *inode, version uint64, name string, e dentry) {
	if !c.holds(d, vice.Read) || d.attr.Version != version {
		return
	}
	if d.entries == nil {
		d.entries = map[string]dentry{}
	}
	d.entries[name] = e
}

// Forget counts the kernel's lookups down.
func (c *Client) Forget(ino ids.Inode, n uint64) {
	in := c.inode(ino)
	in.mu.Lock()
	in.lookups -= min(n, in.lookups)
	if in.lookups == 0 && ino != ids.RootInode {
		in.known = false
	}
	in.mu.Unlock()
}

// GetAttr returns attributes: under the lease, or once as the leader sees them.
// Of what is removed, and still named by a descriptor of a program (a directory,
// or any inode opened with O_PATH), those that were seen last.
func (c *Client) GetAttr(ctx context.Context, ino ids.Inode) (fusefs.Entry, error) {
	ctx, cancel := limit(ctx)
	defer cancel()
	in := c.inode(ino)
	var e fusefs.Entry
	once, err := c.ensure(ctx, in, need{mode: vice.Read, once: true}, func() {
		in.known = true
		e = c.entry(in)
	})
	in.mu.Lock()
	defer in.mu.Unlock()
	if once != nil {
		in.seen(once)
		e = fusefs.Entry{Attr: *once}
	}
	if errs.Has(err, errs.NotFound) && in.lookups > 0 && in.attr.Ino == ino {
		in.attr.Nlink = 0
		return fusefs.Entry{Attr: in.attr}, nil
	}
	return e, err
}

// now is the time an operation is stamped with.
func now() int64 { return time.Now().UnixNano() }

// touch stamps a change of attributes. The caller holds in.mu.
func (in *inode) touch(t int64) {
	in.attr.Ctime = max(in.attr.Ctime+1, t)
}

// modify stamps a change of content. The caller holds in.mu.
func (in *inode) modify(t int64) {
	in.attr.Ctime = max(in.attr.Ctime+1, t)
	in.attr.Mtime = in.attr.Ctime
}

// alter changes a file under its write lease. f runs with Client.cut shared and
// in.mu held and may touch attributes and what is pending. If it returns nil the
// caller ends the admission (inode.done, or Replied).
func (c *Client) alter(ctx context.Context, in *inode, n need, f func(p *pending) error) error {
	n.mode, n.content = vice.Write, true
	// What is pending goes in one record. Pages written back from a mapping must
	// not wait for a session; their order is the kernel's choice, so that several
	// records do no harm.
	for !n.launder && c.record.Load() > maxRecord {
		if err := c.ship(ctx); err != nil {
			return err
		}
	}
	if _, err := c.ensure(ctx, in, n, nil); err != nil {
		return err
	}
	c.cut.RLock()
	in.mu.Lock()
	if in.purging {
		in.inflight--
		in.changed()
		in.mu.Unlock()
		c.cut.RUnlock()
		return lostErr()
	}
	p := in.pending
	if p == nil {
		p = newPending()
	}
	bytes, cost := p.bytes, p.cost()
	err := f(p)
	c.dirty.Add(int64(p.bytes - bytes))
	c.record.Add(int64(p.cost() - cost))
	if !p.empty() && in.pending == nil {
		in.pending = p
		c.mu.Lock()
		c.dirtySet[in] = struct{}{}
		c.mu.Unlock()
	}
	if err != nil {
		in.inflight--
		in.changed()
	}
	in.mu.Unlock()
	c.cut.RUnlock()
	return err
}

// cutTo changes the size under in.mu.
func (in *inode) cutTo(p *pending, size uint64, t int64) {
	if size < in.attr.Size {
		p.truncate(size)
	}
	p.grown = true
	in.attr.Size = size
	in.modify(t)
}

// killPriv clears set-id bits as a write does, under in.mu.
func (in *inode) killPriv(p *pending) {
	m := in.attr.Mode &^ syscall.S_ISUID
	if m&0010 != 0 {
		m &^= syscall.S_ISGID
	}
	if m != in.attr.Mode && !in.isDir() {
		in.attr.Mode = m
		p.set |= volume.SetMode
	}
}

// SetAttr changes attributes: of files here, under a write lease; of directories
// at the leader.
func (c *Client) SetAttr(ctx context.Context, _ fusefs.Caller, ino ids.Inode, fh uint64, a fusefs.SetAttr) (fusefs.Entry, error) {
	ctx, cancel := steady(ctx)
	defer cancel()
	in := c.inode(ino)
	first, err := c.GetAttr(ctx, ino) // also learns whether it is a directory
	if err != nil {
		return fusefs.Entry{}, err
	}
	if first.Attr.Mode&syscall.S_IFMT == syscall.S_IFDIR {
		op := volume.Op{Kind: volume.OpSetAttr, Ino: ino, Mask: a.Mask &^ volume.KillPriv, Mode: a.Mode, Uid: a.Uid, Gid: a.Gid, Atime: a.Atime, Mtime: a.Mtime, Time: now()}
		if a.Mask&volume.SetSize != 0 {
			return fusefs.Entry{}, errs.IsDir.Err()
		}
		r, err := c.mutate(ctx, op, mutation{others: []*inode{in}})
		if err != nil {
			return fusefs.Entry{}, err
		}
		if len(r.Attrs) > 0 && r.Attrs[0].Ino == ino {
			return fusefs.Entry{Attr: r.Attrs[0]}, nil
		}
		return c.GetAttr(ctx, ino)
	}
	if a.Mask&volume.SetSize != 0 {
		if a.Size > volume.MaxFile {
			return fusefs.Entry{}, errs.TooLarge.Err()
		}
		if err := c.room(ctx, 0); err != nil && a.Size > first.Attr.Size {
			return fusefs.Entry{}, err
		}
	}
	var e fusefs.Entry
	err = c.alter(ctx, in, need{}, func(p *pending) error {
		t := now()
		if a.Mask&volume.KillPriv != 0 {
			in.killPriv(p)
		}
		if a.Mask&volume.SetSize != 0 {
			in.cutTo(p, a.Size, t)
		}
		if a.Mask&volume.SetMode != 0 {
			in.attr.Mode = in.attr.Mode&syscall.S_IFMT | a.Mode&07777
		}
		if a.Mask&volume.SetUid != 0 {
			in.attr.Uid = a.Uid
		}
		if a.Mask&volume.SetGid != 0 {
			in.attr.Gid = a.Gid
		}
		if a.Mask&volume.SetAtime != 0 {
			in.attr.Atime = a.Atime
		}
		if a.Mask&volume.SetMtime != 0 {
			in.attr.Mtime = a.Mtime
		}
		p.set |= a.Mask & (volume.SetMode | volume.SetUid | volume.SetGid | volume.SetAtime | volume.SetMtime | volume.SetCtime)
		in.touch(t)
		in.known = true
		e = c.entry(in)
		return nil
	})
	if err == nil {
		in.done()
	}
	return e, err
}

// room refuses what could not be stored: a write that would not fit on one of
// the storing nodes beside what is pending (ENOSPC comes at the write).
func (c *Client) room(ctx context.Context, more int) error {
	if free := c.cfg.Space(); free < reserve+uint64(c.dirty.Load())+uint64(more) {
		return errs.E(errs.NoSpace, "write", "", "a storing node has %d MiB left, %d are kept in reserve", free>>20, reserve>>20)
	}
	if c.dirty.Load() > maxDirty {
		return c.ship(ctx)
	}
	return nil
}

// Open opens a file; for writing, under a write lease from the start.
func (c *Client) Open(ctx context.Context, _ fusefs.Caller, ino ids.Inode, flags uint32, killPriv bool) (fusefs.Opened, error) {
	ctx, cancel := limit(ctx)
	defer cancel()
	return c.open(ctx, c.inode(ino), flags, killPriv)
}

func (c *Client) open(ctx context.Context, in *inode, flags uint32, killPriv bool) (fusefs.Opened, error) {
	in.mu.Lock()
	for in.closing != nil {
		done := in.closing
		in.mu.Unlock()
		select {
		case <-done:
		case <-ctx.Done():
			return fusefs.Opened{}, gaveUp(ctx, "the leader does not answer")
		}
		in.mu.Lock()
	}
	in.opens++ // before a lease is had: a recall on the way must hear of it
	in.known = true
	in.mu.Unlock()
	writes := flags&accMode != syscall.O_RDONLY
	n := need{mode: vice.Read, open: true, once: true}
	if writes {
		n = need{mode: vice.Write, open: true}
	}
	_, err := c.ensure(ctx, in, n, func() {
		if writes {
			in.writers++
		}
	})
	if err == nil && writes && flags&syscall.O_TRUNC != 0 {
		err = c.alter(ctx, in, need{}, func(p *pending) error {
			if killPriv {
				in.killPriv(p)
			}
			in.cutTo(p, 0, now())
			return nil
		})
		if err == nil {
			in.done()
		} else {
			in.mu.Lock()
			in.writers--
			in.mu.Unlock()
		}
	}
	if err != nil {
		c.closeInode(in, false)
		return fusefs.Opened{}, err
	}
	return c.newHandle(in, flags), nil
}

func (c *Client) newHandle(in *inode, flags uint32) fusefs.Opened {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.nextFh++
	c.handles[c.nextFh] = &handle{in: in, flags: flags}
	return fusefs.Opened{Handle: c.nextFh, Direct: direct(flags), KeepCache: true}
}

// direct reports whether writes through a handle with these flags bypass the
// kernel's pages. Appends go by the file's real end, not the kernel's idea of it.
// And a write through a page that the kernel has is seen there before it is sent
// to us: a program here would read what is not done yet, and may come after the
// write of another node. What is also read by its descriptor, or mapped, needs
// pages.
func direct(flags uint32) bool {
	return flags&accMode == syscall.O_WRONLY || flags&syscall.O_APPEND != 0 && flags&accMode != syscall.O_RDONLY
}

// openLost opens what does not exist any more: all that is done with it fails.
func (c *Client) openLost(in *inode, flags uint32) fusefs.Opened {
	in.mu.Lock()
	in.opens++
	if flags&accMode != syscall.O_RDONLY {
		in.writers++
	}
	in.mu.Unlock()
	o := c.newHandle(in, flags)
	h := c.handle(o.Handle)
	h.mu.Lock()
	h.lost = true
	h.mu.Unlock()
	return o
}

func (c *Client) handle(fh uint64) *handle {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.handles[fh]
}

// check returns an error if a change made through the handle was dropped.
func (h *handle) check() error {
	if h == nil {
		return nil
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.lost {
		return lostErr()
	}
	return nil
}

// closeInode counts an open file down and tells the leader of the last one.
func (c *Client) closeInode(in *inode, writer bool) {
	in.mu.Lock()
	in.opens--
	if writer {
		in.writers--
	}
	if in.opens > 0 || !in.noted {
		in.mu.Unlock()
		return
	}
	in.noted = false
	epoch := c.epoch()
	if in.epoch != 0 && in.epoch != epoch {
		in.mu.Unlock() // the session in which it was noted is over
		return
	}
	done := make(chan struct{})
	in.closing = done
	in.mu.Unlock()
	go func() {
		ctx, cancel := context.WithTimeout(context.Background(), opLimit)
		defer cancel()
		// What is pending on it must not come after its end.
		err := c.ship(ctx)
		if c.epoch() == epoch {
			_, _, aerr := ask[vice.Empty](c, ctx, vice.MethodClosed, func(k vice.Caller) any {
				return vice.ClosedRequest{Caller: k, Inos: []ids.Inode{in.ino}, Acked: c.acked()}
			})
			err = aerr
		}
		if err != nil {
			c.cfg.Log.Warn("the leader was not told of a close", "inode", uint64(in.ino), "err", err)
		}
		in.mu.Lock()
		in.closing = nil
		in.mu.Unlock()
		close(done)
	}()
}

// Release ends a handle.
func (c *Client) Release(ino ids.Inode, fh, owner uint64, unlock bool) {
	c.mu.Lock()
	h := c.handles[fh]
	delete(c.handles, fh)
	c.mu.Unlock()
	if h == nil {
		return
	}
	if unlock {
		h.in.mu.Lock()
		h.in.unlocks++
		h.in.mu.Unlock()
		go func() {
			c.unlockAll(h.in, volume.LockFlock, owner)
			h.in.mu.Lock()
			h.in.unlocks--
			h.in.changed()
			h.in.mu.Unlock()
		}()
	}
	c.closeInode(h.in, h.flags&accMode != syscall.O_RDONLY)
}

// Flush is close: it reports what was lost, and ends the process's locks.
func (c *Client) Flush(ctx context.Context, ino ids.Inode, fh, owner uint64) error {
	h := c.handle(fh)
	if h != nil {
		h.in.mu.Lock()
		locked := h.in.locked
		h.in.mu.Unlock()
		if locked {
			c.unlockAll(h.in, volume.LockPosix, owner)
		}
	}
	return h.check()
}

// Fsync makes everything this node did so far durable.
func (c *Client) Fsync(ctx context.Context, ino ids.Inode, fh uint64, _ bool) error {
	ctx, cancel := steady(ctx)
	defer cancel()
	h := c.handle(fh)
	if err := h.check(); err != nil {
		return err
	}
	if err := c.ship(ctx); err != nil {
		return err
	}
	return h.check()
}

// FsyncDir is Fsync: names are durable when their operation returns, what they
// lead to may be pending.
func (c *Client) FsyncDir(ctx context.Context, ino ids.Inode, fh uint64, _ bool) error {
	return c.Fsync(ctx, ino, 0, false)
}

// Read reads content under a lease.
func (c *Client) Read(ctx context.Context, ino ids.Inode, fh, off uint64, buf []byte) (int, error) {
	ctx, cancel := limit(ctx)
	defer cancel()
	in := c.inode(ino)
	var counted bool
	_, err := c.ensure(ctx, in, need{mode: vice.Read, content: true}, func() { in.known, counted = true, true })
	if counted {
		defer c.useUntilReplied(in)
	}
	if err != nil {
		return 0, err
	}
	return c.readAt(ctx, in, off, buf)
}

// Write changes content under a write lease; it is pending when it returns.
func (c *Client) Write(ctx context.Context, ino ids.Inode, fh, off uint64, data []byte, w fusefs.WriteInfo) (int, error) {
	ctx, cancel := steady(ctx)
	defer cancel()
	in := c.inode(ino)
	h := c.handle(fh)
	if err := h.check(); err != nil {
		return 0, err
	}
	if off+uint64(len(data)) > volume.MaxFile {
		return 0, errs.TooLarge.Err()
	}
	if !w.FromCache {
		if err := c.room(ctx, len(data)); err != nil {
			return 0, err
		}
	}
	err := c.alter(ctx, in, need{launder: w.FromCache}, func(p *pending) error {
		if w.Append {
			off = in.attr.Size
		}
		p.write(off, data)
		in.attr.Size = max(in.attr.Size, off+uint64(len(data)))
		in.modify(now())
		if w.KillPriv {
			in.killPriv(p)
		}
		in.known = true
		return nil
	})
	if err != nil {
		if w.FromCache {
			c.cfg.Log.Error("a mapped change was dropped", "inode", uint64(ino), "bytes", len(data), "err", err)
		}
		return 0, err
	}
	if k := c.kernel.Load(); h != nil && direct(h.flags) && k != nil && (*k).StalePages() {
		if err := (*k).InvalidateInode(ino, int64(off), int64(len(data))); err != nil {
			c.cfg.Log.Error("kernel pages not emptied after a direct write", "inode", uint64(ino), "err", err)
		}
	}
	c.useUntilReplied(in)
	return len(data), nil
}

// useUntilReplied hands an admission over to Replied.
func (c *Client) useUntilReplied(in *inode) {
	in.mu.Lock()
	in.replies++
	in.mu.Unlock()
}

// Replied ends the admission of a read or write.
func (c *Client) Replied(op fusefs.Op, ino ids.Inode) {
	if op != fusefs.OpRead && op != fusefs.OpWrite {
		return
	}
	in := c.inode(ino)
	in.mu.Lock()
	if in.replies > 0 { // each reply frees one: which one does not matter
		in.replies--
		in.inflight--
		in.changed()
	}
	in.mu.Unlock()
}
