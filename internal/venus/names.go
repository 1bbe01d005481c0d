package venus

import (
	"context"
	"maps"
	"syscall"

	"github.com/unum-os/unum/internal/errs"
	"github.com/unum-os/unum/internal/fusefs"
	"github.com/unum-os/unum/internal/ids"
	"github.com/unum-os/unum/internal/vice"
	"github.com/unum-os/unum/internal/volume"
)

// mutation says what an operation at the leader touches of what is cached here.
type mutation struct {
	dirs   []*inode                            // directories whose entries it changes
	delta  func(d *inode, r *volume.Result)    // does the same to the cached entries
	others []*inode                            // directories that it changes otherwise
	files  []*inode                            // files whose attributes it changes
	grant  func(r *vice.ApplyReply, s session) // takes leases on what was created
	opened *func()                             // see apply
}

// mutate has one operation done by the leader. What is pending goes first, so
// that the order in which this node did things is kept. Leases on what changes
// are given up with the request: between the commit and the answer others may
// see the new state, and nobody here may see the old.
func (c *Client) mutate(ctx context.Context, op volume.Op, m mutation) (*volume.Result, error) {
	if err := c.ship(ctx); err != nil {
		return nil, err
	}
	for {
		r, err := c.mutateOnce(ctx, op, m)
		if errs.Has(err, errs.NameTooOld) && ctx.Err() == nil {
			continue // a name was led elsewhere by another node at that moment
		}
		return r, err
	}
}

// parked is a directory's cache while a change of it is on its way.
type parked struct {
	version  uint64
	entries  map[string]dentry
	complete bool
}

func (c *Client) mutateOnce(ctx context.Context, op volume.Op, m mutation) (*volume.Result, error) {
	under, err := c.valid(ctx)
	if err != nil {
		return nil, err
	}
	var held []vice.Held
	for _, in := range m.files {
		h, err := c.revoke(ctx, in)
		if err != nil {
			return nil, err
		}
		if h.Seq != 0 || h.Open {
			held = append(held, h)
		}
	}
	park := make([]parked, len(m.dirs))
	var want []ids.Inode
	give := func(d *inode, p *parked) {
		d.mu.Lock()
		if c.holds(d, vice.Read) {
			held = append(held, vice.Held{Ino: d.ino, Seq: d.seq, Open: d.opens > 0})
			d.noted = d.noted || d.opens > 0
			if p != nil {
				*p = parked{d.attr.Version, d.entries, d.complete}
			}
			d.entries = nil
			d.forget()
		}
		d.expecting++
		d.mu.Unlock()
	}
	for i, d := range m.dirs {
		give(d, &park[i])
		want = append(want, d.ino)
	}
	for _, d := range m.others {
		give(d, nil)
	}
	r, s, fresh, err := c.apply(ctx, under, []volume.Op{op}, held, want, m.opened)
	if m.opened != nil && (err != nil || r.Results[0].Err != 0) {
		(*m.opened)() // there is nothing to be kept
	}
	for i, d := range m.dirs {
		d.mu.Lock()
		d.expecting--
		if err == nil && fresh {
			c.unpark(d, &park[i], &r, s, m.delta)
		}
		d.changed()
		d.mu.Unlock()
	}
	for _, d := range m.others {
		d.mu.Lock()
		d.expecting--
		d.changed()
		d.mu.Unlock()
	}
	if err != nil {
		return nil, err
	}
	if err := result(&r.Results[0]); err != nil {
		return nil, err
	}
	if m.grant != nil {
		if !fresh {
			r.Grants = nil
		}
		m.grant(&r, s)
	}
	return &r.Results[0], nil
}

// unpark takes a directory's cache up again if nobody else changed it since. The
// caller holds d.mu.
func (c *Client) unpark(d *inode, p *parked, r *vice.ApplyReply, s session, delta func(*inode, *volume.Result)) {
	for i, g := range r.Grants {
		if g.Ino != d.ino || i >= len(r.Attrs) || d.mode != vice.None || !c.install(d, g, &r.Attrs[i], s) {
			continue
		}
		done := &r.Results[0]
		steps := uint64(1)
		if done.Err != 0 {
			steps = 0
		}
		if p.entries != nil && d.attr.Version == p.version+steps {
			d.entries, d.complete = p.entries, p.complete
			if done.Err == 0 && delta != nil {
				delta(d, done)
			}
		}
	}
}

// attrOf returns the attributes of an inode among a result's.
func attrOf(r *volume.Result, ino ids.Inode) *volume.Attr {
	for i := range r.Attrs {
		if r.Attrs[i].Ino == ino {
			return &r.Attrs[i]
		}
	}
	return nil
}

// create makes an inode and returns it with one lookup counted. With open it is
// kept by the leader, however soon its name goes, until unpin.
func (c *Client) create(ctx context.Context, caller fusefs.Caller, op volume.Op, open bool) (in *inode, unpin func(), a volume.Attr, err error) {
	op.Kind, op.Uid, op.Gid, op.Time = volume.OpCreate, caller.Uid, caller.Gid, now()
	unpin = func() {}
	m := mutation{delta: func(d *inode, r *volume.Result) {
		d.entries[op.Name] = dentry{r.Ino, op.Mode}
	}}
	opened := func() {}
	if open {
		m.opened = &opened
	}
	if op.Flags&volume.CreateTmpfile == 0 {
		m.dirs = []*inode{c.inode(op.Parent)}
	}
	m.grant = func(r *vice.ApplyReply, s session) {
		res := &r.Results[0]
		var let func()
		in, let = c.pin(res.Ino)
		unpin = func() { let(); opened() }
		in.mu.Lock()
		defer in.mu.Unlock()
		in.lookups++
		if at := attrOf(res, res.Ino); at != nil {
			a = *at
			in.seen(at)
		}
		if op.Flags&volume.CreateTmpfile != 0 {
			in.renewEpoch(s.epoch)
			in.noted = true // the last close lets it go
		}
		if open {
			in.opens++
		}
		for i, g := range r.Grants {
			if g.Ino == res.Ino && i < len(r.Attrs) && c.install(in, g, &r.Attrs[i], s) {
				in.base, in.loaded = nil, r.Attrs[i].Size == 0
				in.xattrs, in.names = map[string][]byte{}, nil
				a = in.attr
			}
		}
	}
	if len(op.Name) > volume.MaxName {
		return nil, unpin, a, errs.TooLong.Err()
	}
	if err = c.room(ctx, 0); err != nil {
		return nil, unpin, a, err
	}
	_, err = c.mutate(ctx, op, m)
	if err == nil && a.Ino == 0 {
		err = errs.E(errs.Corrupt, "create", "", "the answer lacks the attributes of inode %d", in.ino)
	}
	return in, unpin, a, err
}

// Create makes and opens a regular file.
func (c *Client) Create(ctx context.Context, caller fusefs.Caller, parent ids.Inode, name string, mode, flags uint32) (fusefs.Entry, fusefs.Opened, error) {
	ctx, cancel := steady(ctx)
	defer cancel()
	return c.createOpen(ctx, caller, volume.Op{Parent: parent, Name: name, Mode: syscall.S_IFREG | mode&07777}, flags)
}

// Tmpfile makes and opens a regular file without a name.
func (c *Client) Tmpfile(ctx context.Context, caller fusefs.Caller, parent ids.Inode, mode, flags uint32) (fusefs.Entry, fusefs.Opened, error) {
	ctx, cancel := steady(ctx)
	defer cancel()
	return c.createOpen(ctx, caller, volume.Op{Parent: parent, Flags: volume.CreateTmpfile, Mode: syscall.S_IFREG | mode&07777}, flags)
}

func (c *Client) createOpen(ctx context.Context, caller fusefs.Caller, op volume.Op, flags uint32) (fusefs.Entry, fusefs.Opened, error) {
	for {
		in, unpin, a, err := c.create(ctx, caller, op, true)
		if errs.Has(err, errs.Exists) && flags&syscall.O_EXCL == 0 && op.Flags == 0 {
			unpin()
			e, err := c.Lookup(ctx, caller, op.Parent, op.Name)
			if errs.Has(err, errs.NotFound) {
				continue // removed again
			}
			if err != nil {
				return e, fusefs.Opened{}, err
			}
			if e.Attr.Mode&syscall.S_IFMT == syscall.S_IFLNK {
				c.Forget(e.Attr.Ino, 1)
				return fusefs.Entry{}, fusefs.Opened{}, errs.E(errs.Loop, "create", "", "the name became a symbolic link meanwhile")
			}
			o, err := c.open(ctx, c.inode(e.Attr.Ino), flags, true)
			if err != nil {
				c.Forget(e.Attr.Ino, 1)
				return fusefs.Entry{}, o, err
			}
			// The kernel takes the size in this reply whatever it knows by then, and
			// opening may have waited while others here wrote: it is told the latest,
			// and to ask before it relies on that.
			if now, err := c.GetAttr(ctx, e.Attr.Ino); err == nil {
				e.Attr = now.Attr
			}
			return fusefs.Entry{Attr: e.Attr}, o, nil
		}
		if err != nil {
			unpin()
			return fusefs.Entry{}, fusefs.Opened{}, err
		}
		// Opened under the lease that came with it; else one is asked for now.
		o, err := c.open(ctx, in, flags&^syscall.O_TRUNC, false)
		if errs.Has(err, errs.NotFound) {
			// Another node removed it and then the leader died, with the word that
			// it is open here. It is, and has no content any more.
			o, err = c.openLost(in, flags), nil
			a.Nlink = 0
		}
		c.closeInode(in, false) // the count that create made
		unpin()
		if err != nil {
			c.Forget(a.Ino, 1)
			return fusefs.Entry{}, fusefs.Opened{}, err
		}
		return fusefs.Entry{Attr: a}, o, nil
	}
}

func (c *Client) make(ctx context.Context, caller fusefs.Caller, op volume.Op) (fusefs.Entry, error) {
	ctx, cancel := steady(ctx)
	defer cancel()
	_, unpin, a, err := c.create(ctx, caller, op, false)
	unpin()
	if err != nil {
		return fusefs.Entry{}, err
	}
	return fusefs.Entry{Attr: a}, nil
}

// Mknod makes a file of any kind but directory and symbolic link.
func (c *Client) Mknod(ctx context.Context, caller fusefs.Caller, parent ids.Inode, name string, mode, rdev uint32) (fusefs.Entry, error) {
	if mode&syscall.S_IFMT == 0 {
		mode |= syscall.S_IFREG
	}
	return c.make(ctx, caller, volume.Op{Parent: parent, Name: name, Mode: mode, Rdev: rdev})
}

// Mkdir makes a directory.
func (c *Client) Mkdir(ctx context.Context, caller fusefs.Caller, parent ids.Inode, name string, mode uint32) (fusefs.Entry, error) {
	return c.make(ctx, caller, volume.Op{Parent: parent, Name: name, Mode: syscall.S_IFDIR | mode&07777})
}

// Symlink makes a symbolic link.
func (c *Client) Symlink(ctx context.Context, caller fusefs.Caller, parent ids.Inode, name, target string) (fusefs.Entry, error) {
	if len(target) > volume.MaxTarget {
		return fusefs.Entry{}, errs.TooLong.Err()
	}
	return c.make(ctx, caller, volume.Op{Parent: parent, Name: name, Mode: syscall.S_IFLNK | 0777, Target: target})
}

// Link makes another name of a file.
func (c *Client) Link(ctx context.Context, _ fusefs.Caller, ino, parent ids.Inode, name string) (fusefs.Entry, error) {
	ctx, cancel := steady(ctx)
	defer cancel()
	if len(name) > volume.MaxName {
		return fusefs.Entry{}, errs.TooLong.Err()
	}
	in := c.inode(ino)
	r, err := c.mutate(ctx, volume.Op{Kind: volume.OpLink, Ino: ino, Parent: parent, Name: name, Time: now()}, mutation{
		dirs:  []*inode{c.inode(parent)},
		files: []*inode{in},
		delta: func(d *inode, r *volume.Result) { delete(d.entries, name); d.complete = false },
	})
	if err != nil {
		return fusefs.Entry{}, err
	}
	in.mu.Lock()
	in.lookups++
	in.mu.Unlock()
	if a := attrOf(r, ino); a != nil {
		return fusefs.Entry{Attr: *a}, nil
	}
	return fusefs.Entry{}, errs.E(errs.Corrupt, "link", "", "the answer lacks the attributes of inode %d", ino)
}

// cached returns what is cached of the inode that a name leads to, if anything.
func (c *Client) cached(d *inode, name string) *inode {
	d.mu.Lock()
	e, ok := d.entries[name]
	d.mu.Unlock()
	if !ok || e.ino == 0 {
		return nil
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.inodes[e.ino]
}

// sort puts an inode that an operation changes where mutate wants it.
func (m *mutation) touch(in *inode) {
	if in == nil {
		return
	}
	in.mu.Lock()
	dir := in.isDir()
	in.mu.Unlock()
	if dir {
		m.others = append(m.others, in)
	} else {
		m.files = append(m.files, in)
	}
}

// Unlink removes a name that is not a directory.
func (c *Client) Unlink(ctx context.Context, caller fusefs.Caller, parent ids.Inode, name string) error {
	return c.remove(ctx, volume.OpUnlink, parent, name)
}

// Rmdir removes an empty directory.
func (c *Client) Rmdir(ctx context.Context, caller fusefs.Caller, parent ids.Inode, name string) error {
	return c.remove(ctx, volume.OpRmdir, parent, name)
}

func (c *Client) remove(ctx context.Context, kind volume.OpKind, parent ids.Inode, name string) error {
	ctx, cancel := steady(ctx)
	defer cancel()
	d := c.inode(parent)
	m := mutation{dirs: []*inode{d}, delta: func(d *inode, _ *volume.Result) {
		d.entries[name] = dentry{}
	}}
	m.touch(c.cached(d, name))
	_, err := c.mutate(ctx, volume.Op{Kind: kind, Parent: parent, Name: name, Time: now()}, m)
	return err
}

// Rename moves a name.
func (c *Client) Rename(ctx context.Context, caller fusefs.Caller, parent ids.Inode, name string, newParent ids.Inode, newName string, flags uint32) error {
	ctx, cancel := steady(ctx)
	defer cancel()
	if len(newName) > volume.MaxName {
		return errs.TooLong.Err()
	}
	d, nd := c.inode(parent), c.inode(newParent)
	m := mutation{dirs: []*inode{d}}
	if nd != d {
		m.dirs = append(m.dirs, nd)
	}
	a, b := c.cached(d, name), c.cached(nd, newName)
	m.touch(a)
	if b != a {
		m.touch(b)
	}
	m.delta = func(x *inode, _ *volume.Result) { // both names are asked for again
		x.entries = maps.Clone(x.entries)
		delete(x.entries, name)
		delete(x.entries, newName)
		x.complete = false
	}
	_, err := c.mutate(ctx, volume.Op{Kind: volume.OpRename, Parent: parent, Name: name, ToParent: newParent, ToName: newName, Flags: flags, Time: now()}, m)
	return err
}

// Readlink returns a symbolic link's target.
func (c *Client) Readlink(ctx context.Context, ino ids.Inode) (string, error) {
	ctx, cancel := limit(ctx)
	defer cancel()
	in := c.inode(ino)
	var target string
	if _, err := c.ensure(ctx, in, need{mode: vice.Read, once: true}, func() { target = in.target }); err != nil || target != "" {
		return target, err
	}
	r, _, err := ask[vice.ExtentsReply](c, ctx, vice.MethodExtents, func(k vice.Caller) any {
		return vice.ExtentsRequest{Caller: k, Ino: ino}
	})
	if err != nil {
		return "", err
	}
	if r.Target == "" {
		return "", errs.Invalid.Err()
	}
	in.mu.Lock()
	if c.holds(in, vice.Read) { // a link's target never changes
		in.target = r.Target
	}
	in.mu.Unlock()
	return r.Target, nil
}
