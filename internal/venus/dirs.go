package venus

import (
	"context"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/unum-os/unum/internal/errs"
	"github.com/unum-os/unum/internal/fusefs"
	"github.com/unum-os/unum/internal/ids"
	"github.com/unum-os/unum/internal/vice"
	"github.com/unum-os/unum/internal/volume"
)

// OpenDir opens a directory for listing.
func (c *Client) OpenDir(ctx context.Context, _ fusefs.Caller, ino ids.Inode) (fusefs.Opened, error) {
	o := c.newHandle(c.inode(ino), syscall.O_RDONLY)
	return fusefs.Opened{Handle: o.Handle}, nil
}

// ReleaseDir ends a listing.
func (c *Client) ReleaseDir(ino ids.Inode, fh uint64) {
	c.mu.Lock()
	delete(c.handles, fh)
	c.mu.Unlock()
}

// ReadDir emits entries of the listing taken when it was last read from the
// start: a cookie is a place in it.
func (c *Client) ReadDir(ctx context.Context, dir ids.Inode, fh, cookie uint64, plus bool, emit func(volume.Dirent, uint64, *fusefs.Entry) bool) error {
	ctx, cancel := limit(ctx)
	defer cancel()
	h := c.handle(fh)
	if h == nil {
		return errs.E(errs.Invalid, "list", "", "no such handle")
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if cookie == 0 || !h.read {
		list, err := c.listing(ctx, h.in)
		if err != nil {
			return err
		}
		h.list, h.read = list, true
	}
	for i := cookie; i < uint64(len(h.list)); i++ {
		var e *fusefs.Entry
		if plus {
			e = c.atHand(h.list[i].Ino)
		}
		if !emit(h.list[i], i+1, e) {
			if e != nil {
				c.Forget(h.list[i].Ino, 1)
			}
			break
		}
	}
	return nil
}

// atHand returns an inode's entry with a lookup counted if a lease is held on it.
func (c *Client) atHand(ino ids.Inode) *fusefs.Entry {
	c.mu.Lock()
	in := c.inodes[ino]
	if in != nil {
		in.pins++
	}
	c.mu.Unlock()
	if in == nil {
		return nil
	}
	defer func() {
		c.mu.Lock()
		in.pins--
		c.mu.Unlock()
	}()
	in.mu.Lock()
	defer in.mu.Unlock()
	if !c.holds(in, vice.Read) {
		return nil
	}
	in.lookups++
	e := c.entry(in)
	return &e
}

// listing returns all entries of a directory in order of names: from the cache,
// or from the leader, in one state if it can be had.
func (c *Client) listing(ctx context.Context, d *inode) ([]volume.Dirent, error) {
	d.mu.Lock()
	if c.holds(d, vice.Read) && d.complete {
		out := make([]volume.Dirent, 0, len(d.entries))
		for name, e := range d.entries {
			if e.ino != 0 {
				out = append(out, volume.Dirent{Name: name, Ino: e.ino, Mode: e.mode})
			}
		}
		d.mu.Unlock()
		slices.SortFunc(out, func(a, b volume.Dirent) int { return strings.Compare(a.Name, b.Name) })
		return out, nil
	}
	d.mu.Unlock()
	for try := 0; ; try++ {
		list, whole, err := c.listRemote(ctx, d)
		// A large directory that changes all the time is listed as it was page by
		// page: entries that stay are in it once, as POSIX has it.
		if err != nil || whole || try == 3 {
			return list, err
		}
	}
}

// listRemote reads a listing page by page. whole: all pages are of one version.
func (c *Client) listRemote(ctx context.Context, d *inode) (list []volume.Dirent, whole bool, err error) {
	whole = true
	var version uint64
	for after, first := "", true; ; first = false {
		d.mu.Lock()
		d.expecting++
		d.mu.Unlock()
		r, s, err := ask[vice.ReadDirReply](c, ctx, vice.MethodReadDir, func(k vice.Caller) any {
			return vice.ReadDirRequest{Caller: k, Dir: d.ino, After: after}
		})
		d.mu.Lock()
		d.expecting--
		d.changed()
		if err != nil {
			d.mu.Unlock()
			return nil, false, err
		}
		c.install(d, r.Dir, &r.Attr, s)
		if first {
			version = r.Attr.Version
		}
		whole = whole && r.Attr.Version == version
		list = append(list, r.Entries...)
		if r.More && len(r.Entries) > 0 {
			d.mu.Unlock()
			after = r.Entries[len(r.Entries)-1].Name
			continue
		}
		if whole && c.holds(d, vice.Read) && d.attr.Version == version {
			d.entries = make(map[string]dentry, len(list))
			for _, e := range list {
				d.entries[e.Name] = dentry{e.Ino, e.Mode}
			}
			d.complete = true
		}
		d.mu.Unlock()
		return list, whole, nil
	}
}

// StatFS returns the volume's totals and the space that is left on the fullest
// storing node.
func (c *Client) StatFS(ctx context.Context) (fusefs.StatFS, error) {
	ctx, cancel := limit(ctx)
	defer cancel()
	r, _, err := ask[vice.StatReply](c, ctx, vice.MethodStat, func(k vice.Caller) any { return vice.StatRequest{Caller: k} })
	if err != nil {
		return fusefs.StatFS{}, err
	}
	const bs = 4096
	free := c.cfg.Space()
	avail := free - min(free, reserve)
	return fusefs.StatFS{
		Blocks: (r.Bytes + free) / bs, Free: avail / bs, Avail: avail / bs,
		Files: r.Inodes + 1<<32, FilesFree: 1 << 32, BlockSize: bs, NameLen: volume.MaxName,
	}, nil
}

// attributes returns all extended attributes of an inode.
func (c *Client) attributes(ctx context.Context, ino ids.Inode) ([]string, map[string][]byte, error) {
	in := c.inode(ino)
	var names []string
	var values map[string][]byte
	var seq uint64
	if _, err := c.ensure(ctx, in, need{mode: vice.Read, once: true}, func() {
		in.known = true
		names, values, seq = in.names, in.xattrs, in.seq
	}); err != nil || values != nil {
		return names, values, err
	}
	r, _, err := ask[vice.XattrsReply](c, ctx, vice.MethodXattrs, func(k vice.Caller) any {
		return vice.XattrsRequest{Caller: k, Ino: ino}
	})
	if err != nil {
		return nil, nil, err
	}
	if len(r.Names) != len(r.Values) {
		return nil, nil, errs.E(errs.Corrupt, "xattrs", "", "%d names, %d values", len(r.Names), len(r.Values))
	}
	values = make(map[string][]byte, len(r.Names))
	for i, n := range r.Names {
		values[n] = r.Values[i]
	}
	in.mu.Lock()
	if seq != 0 && c.holds(in, vice.Read) && in.seq == seq { // the lease held all the time
		in.names, in.xattrs = r.Names, values
	}
	in.mu.Unlock()
	return r.Names, values, nil
}

// GetXattr returns one extended attribute.
func (c *Client) GetXattr(ctx context.Context, _ fusefs.Caller, ino ids.Inode, name string) ([]byte, error) {
	ctx, cancel := limit(ctx)
	defer cancel()
	if acl(name) {
		return nil, errs.NotSupported.Err()
	}
	_, values, err := c.attributes(ctx, ino)
	if err != nil {
		return nil, err
	}
	v, ok := values[name]
	if !ok {
		return nil, errs.NoData.Err()
	}
	return v, nil
}

// ListXattr returns the names of all extended attributes.
func (c *Client) ListXattr(ctx context.Context, _ fusefs.Caller, ino ids.Inode) ([]string, error) {
	ctx, cancel := limit(ctx)
	defer cancel()
	names, _, err := c.attributes(ctx, ino)
	return names, err
}

// acl reports whether name is of POSIX ACLs: kept and not enforced they would be
// a lie.
func acl(name string) bool { return strings.HasPrefix(name, "system.posix_acl_") }

// SetXattr sets an extended attribute.
func (c *Client) SetXattr(ctx context.Context, _ fusefs.Caller, ino ids.Inode, name string, value []byte, flags uint32) error {
	if acl(name) {
		return errs.NotSupported.Err()
	}
	if len(name) > volume.MaxName || len(value) > volume.MaxXattr {
		return errs.Range.Err()
	}
	return c.changeXattr(ctx, volume.Op{Kind: volume.OpSetXattr, Ino: ino, Name: name, Value: value, Flags: flags, Time: now()})
}

// RemoveXattr removes an extended attribute.
func (c *Client) RemoveXattr(ctx context.Context, _ fusefs.Caller, ino ids.Inode, name string) error {
	return c.changeXattr(ctx, volume.Op{Kind: volume.OpRemoveXattr, Ino: ino, Name: name, Time: now()})
}

func (c *Client) changeXattr(ctx context.Context, op volume.Op) error {
	ctx, cancel := steady(ctx)
	defer cancel()
	var m mutation
	m.touch(c.inode(op.Ino))
	_, err := c.mutate(ctx, op, m)
	return err
}

// GetLock returns the first lock in the way of l, or l as an unlock.
func (c *Client) GetLock(ctx context.Context, ino ids.Inode, l volume.Lock) (volume.Lock, error) {
	ctx, cancel := limit(ctx)
	defer cancel()
	r, _, err := ask[vice.LockReply](c, ctx, vice.MethodLock, func(k vice.Caller) any {
		return vice.LockRequest{Caller: k, Ino: ino, Lock: l, Test: true}
	})
	if err != nil {
		return l, err
	}
	if r.Conflict != nil {
		return *r.Conflict, nil
	}
	l.Type = syscall.F_UNLCK
	return l, nil
}

// lockTurn is how long one request waits at the leader for a lock; then it asks
// again, so that a leader that has forgotten it costs no more than that.
const lockTurn = 5 * time.Second

// SetLock takes, changes or releases a lock.
func (c *Client) SetLock(ctx context.Context, ino ids.Inode, l volume.Lock, wait bool) error {
	in := c.inode(ino)
	in.mu.Lock()
	for in.unlocks > 0 {
		if err := in.wait(ctx); err != nil {
			in.mu.Unlock()
			return err
		}
	}
	in.locked = in.locked || l.Type != syscall.F_UNLCK
	in.mu.Unlock()
	for {
		turn, cancel := context.WithTimeout(ctx, lockTurn)
		if !wait {
			cancel()
			turn, cancel = steady(ctx)
		}
		r, _, err := ask[vice.LockReply](c, turn, vice.MethodLock, func(k vice.Caller) any {
			return vice.LockRequest{Caller: k, Ino: ino, Lock: l, Wait: wait}
		})
		cancel()
		switch {
		case err == nil && r.Conflict == nil:
			return nil
		case wait && ctx.Err() != nil:
			// It may have been granted at the last moment, in place of another that
			// the owner held: asked again without waiting, it is had or it is not.
			bg, cancel := context.WithTimeout(context.Background(), opLimit)
			defer cancel()
			r, _, err := ask[vice.LockReply](c, bg, vice.MethodLock, func(k vice.Caller) any {
				return vice.LockRequest{Caller: k, Ino: ino, Lock: l}
			})
			if err == nil && r.Conflict != nil {
				err = errs.Interrupted.Err()
			}
			return err
		case wait && (err == nil || errs.Has(err, errs.Timeout)):
			continue
		case err != nil:
			return err
		default:
			return errs.LockHeld.Err()
		}
	}
}

// unlockAll releases an owner's locks on a file.
func (c *Client) unlockAll(in *inode, kind volume.LockKind, owner uint64) {
	ctx, cancel := context.WithTimeout(context.Background(), opLimit)
	defer cancel()
	l := volume.Lock{Kind: kind, Owner: owner, Start: 0, End: 1<<63 - 1, Type: syscall.F_UNLCK}
	if _, _, err := ask[vice.LockReply](c, ctx, vice.MethodLock, func(k vice.Caller) any {
		return vice.LockRequest{Caller: k, Ino: in.ino, Lock: l}
	}); err != nil {
		c.cfg.Log.Warn("locks not released", "inode", uint64(in.ino), "err", err)
	}
}
