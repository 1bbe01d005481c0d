package venus

import (
	"context"
	"slices"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/unum-os/unum/internal/clock"
	"github.com/unum-os/unum/internal/errs"
	"github.com/unum-os/unum/internal/ids"
	"github.com/unum-os/unum/internal/vice"
	"github.com/unum-os/unum/internal/volume"
)

// inlineBudget bounds the content that travels inside one log record; more goes
// as blocks, so that one record always holds all that is pending.
const inlineBudget = 512 << 10

// maxPieces is how many pieces of one file go in one operation: with the content
// that travels inside it is less than a record.
const maxPieces = 2500

// recordHead is more than what a record holds besides its operations.
const recordHead = 1 << 10

// parcel is one file's share of a ship.
type parcel struct {
	in   *inode
	p    *pending
	attr volume.Attr // as of the cut
	ops  []volume.Op
}

// ship makes all that is pending on this node durable: blocks first, then one
// log record that names them. What was done before it was called is committed
// when it returns nil.
func (c *Client) ship(ctx context.Context) error {
	select {
	case c.ships <- struct{}{}:
	case <-ctx.Done():
		return gaveUp(ctx, "earlier changes of this node are still being written")
	}
	defer func() { <-c.ships }()
	s, err := c.valid(ctx)
	if err != nil {
		return err
	}
	parcels := c.takeCut()
	if len(parcels) == 0 {
		return nil
	}
	defer prometheus.NewTimer(c.count.ships).ObserveDuration()
	// From here on it is not given up because one caller is: others rely on it.
	ctx, cancel := steady(ctx)
	defer cancel()
	ops, err := c.pack(ctx, parcels)
	var results []volume.Result
	for _, part := range records(ops) {
		if err != nil {
			break
		}
		var r vice.ApplyReply
		r, _, _, err = c.apply(ctx, s, part, nil, nil, nil)
		results = append(results, r.Results...)
	}
	if err == nil {
		alloc := make(map[ids.Inode]uint64, len(parcels))
		for i := range results {
			if a := attrOf(&results[i], ops[i].Ino); a != nil {
				alloc[a.Ino] = a.Alloc
			}
			if e := results[i]; e.Err != 0 && errs.Class(e.Err) != errs.NotFound {
				// The state machine refuses what was done under a lease: a bug here
				// or there. Nothing of this operation was done.
				err = errs.E(errs.IO, "ship", "", "operation %d on inode %d refused: %s", i, ops[i].Ino, e.Why)
				c.cfg.Log.Error("shipped operation refused", "inode", uint64(ops[i].Ino), "kind", ops[i].Kind, "why", e.Why)
			}
		}
		c.shipped(parcels, alloc)
		return err
	}
	c.unship(parcels)
	return err
}

// Settle ships what is pending, if anything is.
func (c *Client) Settle(ctx context.Context) error {
	c.mu.Lock()
	clean := len(c.dirtySet) == 0
	c.mu.Unlock()
	if clean && len(c.ships) == 0 {
		return nil
	}
	return c.ship(ctx)
}

// records divides operations among log records: one, but for a flood of pages
// written back from mappings.
func records(ops []volume.Op) [][]volume.Op {
	var out [][]volume.Op
	first, size := 0, 0
	for i := range ops {
		n := fileCost
		for _, e := range ops[i].Extents {
			n += pieceCost + len(e.Data)
		}
		if i > first && (size+n > volume.MaxBatch-recordHead || i-first == volume.MaxOps) {
			out = append(out, ops[first:i])
			first, size = i, 0
		}
		size += n
	}
	return append(out, ops[first:])
}

// takeCut moves everything pending to shipping.
func (c *Client) takeCut() []*parcel {
	c.cut.Lock()
	defer c.cut.Unlock()
	c.mu.Lock()
	ins := make([]*inode, 0, len(c.dirtySet))
	for in := range c.dirtySet {
		ins = append(ins, in)
	}
	clear(c.dirtySet)
	c.mu.Unlock()
	var out []*parcel
	for _, in := range ins {
		in.mu.Lock()
		if !in.pending.empty() {
			in.shipping, in.pending = in.pending, nil
			out = append(out, &parcel{in: in, p: in.shipping, attr: in.attr})
		}
		in.mu.Unlock()
	}
	return out
}

// pack turns parcels into operations and stores their larger pieces as blocks.
func (c *Client) pack(ctx context.Context, parcels []*parcel) ([]volume.Op, error) {
	// Pieces share blocks: a block is a file on three disks.
	type bin struct {
		data []byte
		es   []*volume.Extent
	}
	var bins []*bin
	open := &bin{}
	inline := 0
	for _, pc := range parcels {
		ino, a := pc.in.ino, &pc.attr
		if pc.p.trunc != noTrunc {
			pc.ops = append(pc.ops, volume.Op{Kind: volume.OpSetAttr, Ino: ino, Mask: volume.SetSize, Size: pc.p.trunc})
		}
		if pc.p.grown {
			spans := pc.p.spans()
			es := make([]volume.Extent, len(spans))
			for i, s := range spans {
				ch := pc.p.chunks[s.lo/volume.MaxBlock]
				data := ch.buf[s.lo-ch.base : s.hi-ch.base]
				es[i] = volume.Extent{Off: s.lo, Len: uint32(len(data))}
				if len(data) <= volume.MaxInline && inline+len(data) <= inlineBudget {
					es[i].Data = data
					inline += len(data)
				} else {
					if len(open.data)+len(data) > volume.MaxBlock {
						bins, open = append(bins, open), &bin{}
					}
					es[i].From = uint32(len(open.data))
					open.data = append(open.data, data...) // a copy: a slow disk may read it after the chunk has changed
					open.es = append(open.es, &es[i])
				}
			}
			for part := range slices.Chunk(es, maxPieces) {
				pc.ops = append(pc.ops, volume.Op{Kind: volume.OpWrite, Ino: ino, Extents: part, Size: a.Size})
			}
			if len(es) == 0 {
				pc.ops = append(pc.ops, volume.Op{Kind: volume.OpWrite, Ino: ino, Size: a.Size})
			}
		}
		set := pc.p.set
		if pc.p.trunc != noTrunc || pc.p.grown {
			set |= volume.SetMtime // as programs here have seen it, to the nanosecond
		}
		if set != 0 {
			pc.ops = append(pc.ops, volume.Op{Kind: volume.OpSetAttr, Ino: ino, Mask: set, Mode: a.Mode & 07777,
				Uid: a.Uid, Gid: a.Gid, Atime: a.Atime, Mtime: a.Mtime, Time: a.Ctime})
		}
	}
	// Four at a time keep the disks busy without holding every copy in memory.
	if len(open.es) > 0 {
		bins = append(bins, open)
	}
	var wg sync.WaitGroup
	sem := make(chan struct{}, shipsAtOnce)
	errc := make(chan error, len(bins))
	for _, p := range bins {
		sem <- struct{}{}
		wg.Go(func() {
			defer func() { <-sem }()
			name, err := c.cfg.Blocks.Put(ctx, p.data)
			if err != nil {
				errc <- err
				return
			}
			for _, e := range p.es {
				e.Block = &name
			}
		})
	}
	wg.Wait()
	close(errc)
	if err := <-errc; err != nil {
		return nil, errs.Wrap(err, "store blocks", "")
	}
	var ops []volume.Op
	for _, pc := range parcels {
		ops = append(ops, pc.ops...)
	}
	return ops, nil
}

// shipped takes committed parcels into the base; alloc says how many bytes of
// each file are covered now.
func (c *Client) shipped(parcels []*parcel, alloc map[ids.Inode]uint64) {
	for _, pc := range parcels {
		in := pc.in
		in.mu.Lock()
		if in.shipping == pc.p { // else the session was lost meanwhile
			in.shipping = nil
			in.attr.Alloc = alloc[in.ino]
			c.dirty.Add(-int64(pc.p.bytes))
			c.record.Add(-int64(pc.p.cost()))
			in.loads++ // a load in progress may or may not have seen this
			if in.loaded {
				if pc.p.trunc != noTrunc {
					in.base = in.base.without(pc.p.trunc, noTrunc)
				}
				for _, op := range pc.ops {
					for _, e := range op.Extents {
						if e.Data != nil {
							e.Data = append([]byte(nil), e.Data...) // the chunk's buffer goes
						}
						in.base = in.base.with(e)
					}
				}
			}
			in.changed()
		}
		in.mu.Unlock()
	}
}

// unship puts parcels that could not be committed back under what came later.
func (c *Client) unship(parcels []*parcel) {
	c.cut.RLock()
	defer c.cut.RUnlock()
	for _, pc := range parcels {
		in := pc.in
		in.mu.Lock()
		if in.shipping == pc.p {
			in.shipping = nil
			bytes, cost := pc.p.bytes, pc.p.cost()
			if in.pending != nil {
				bytes, cost = bytes+in.pending.bytes, cost+in.pending.cost()
				pc.p.merge(in.pending)
			}
			c.dirty.Add(int64(pc.p.bytes - bytes))
			c.record.Add(int64(pc.p.cost() - cost))
			in.pending = pc.p
			c.mu.Lock()
			c.dirtySet[in] = struct{}{}
			c.mu.Unlock()
			in.changed()
		}
		in.mu.Unlock()
	}
}

// shipRegularly ships what is pending every shipEvery.
func (c *Client) shipRegularly(ctx context.Context) {
	for {
		pause(ctx, shipEvery)
		if ctx.Err() != nil {
			last, cancel := context.WithTimeout(context.Background(), lastShip)
			if err := c.Settle(last); err != nil {
				c.cfg.Log.Warn("not shipped at the end", "err", err)
			}
			cancel()
			return
		}
		sctx, cancel := limit(ctx)
		if err := c.ship(sctx); err != nil && ctx.Err() == nil {
			c.cfg.Log.Warn("cannot ship", "err", err, "pending_bytes", c.dirty.Load())
		}
		cancel()
	}
}

// lose gives up the session of the given epoch: what is pending is dropped, and
// the kernel's caches are emptied, before another session is opened.
func (c *Client) lose(epoch uint64, why string) {
	c.mu.Lock()
	if c.sess.epoch != epoch || c.sess.id == 0 {
		c.mu.Unlock()
		return
	}
	old := c.sess
	c.losing = true
	c.expires.Store(0)
	c.sess = session{epoch: epoch + 1}
	c.wakeLocked()
	ins := make([]*inode, 0, len(c.inodes))
	for _, in := range c.inodes {
		ins = append(ins, in)
	}
	clear(c.dirtySet)
	hs := make([]*handle, 0, len(c.handles))
	for _, h := range c.handles {
		hs = append(hs, h)
	}
	c.mu.Unlock()
	c.count.lost.Add(1)
	c.cfg.Log.Warn("session lost", "session", uint64(old.id), "why", why)
	c.cut.Lock()
	hurt, locked := map[*inode]bool{}, map[*inode]bool{}
	for _, in := range ins {
		in.mu.Lock()
		dropped := 0
		for _, p := range []*pending{in.shipping, in.pending} {
			if !p.empty() {
				dropped += p.bytes
				hurt[in] = true
				c.dirty.Add(-int64(p.bytes))
				c.record.Add(-int64(p.cost()))
			}
		}
		in.shipping, in.pending = nil, nil
		if in.locked {
			locked[in] = true
			in.locked = false
		}
		if hurt[in] && dropped > 0 {
			c.cfg.Log.Error("unshipped changes dropped", "inode", uint64(in.ino), "bytes", dropped)
		}
		if in.mode != vice.None {
			in.purging = true
		}
		in.changed()
		in.mu.Unlock()
	}
	c.cut.Unlock()
	for _, h := range hs {
		if hurt[h.in] && h.flags&accMode != 0 || locked[h.in] {
			h.mu.Lock()
			h.lost = true
			h.mu.Unlock()
		}
	}
	// Not by the caller, which may be a request that the kernel's pages wait for.
	go func() {
		var wg sync.WaitGroup
		sem := make(chan struct{}, purgesAtOnce)
		for _, in := range ins {
			sem <- struct{}{}
			wg.Go(func() { defer func() { <-sem }(); c.purge(in) })
		}
		wg.Wait()
		c.mu.Lock()
		c.losing = false
		c.wakeLocked()
		c.mu.Unlock()
	}()
}

// purge empties what the kernel caches of an inode whose lease is void.
func (c *Client) purge(in *inode) {
	in.mu.Lock()
	defer in.mu.Unlock()
	if !in.purging {
		return
	}
	for in.inflight > 0 {
		in.wait(context.Background()) // each ends: those that wait for a leader do so within opLimit
	}
	in.forget()
	in.mu.Unlock()
	if k := c.kernel.Load(); k != nil {
		if err := (*k).InvalidateInode(in.ino, 0, 0); err != nil {
			c.cfg.Log.Error("kernel caches not emptied", "inode", uint64(in.ino), "err", err)
		}
	}
	in.mu.Lock()
	in.purging = false
	in.changed()
}

// sweepRegularly gives back what has been idle for long, and drops what nothing
// needs any more.
func (c *Client) sweepRegularly(ctx context.Context) {
	for {
		pause(ctx, sweepEvery)
		if ctx.Err() != nil {
			return
		}
		idle := idleFor
		c.mu.Lock()
		if len(c.inodes) > keepInodes {
			idle = idleForFull
		}
		all := make([]*inode, 0, len(c.inodes))
		for _, in := range c.inodes {
			all = append(all, in)
		}
		c.mu.Unlock()
		for _, in := range all {
			if ctx.Err() != nil {
				return
			}
			c.sweep(ctx, in, idle)
		}
	}
}

func (c *Client) sweep(ctx context.Context, in *inode, idle time.Duration) {
	in.mu.Lock()
	busy := in.opens > 0 || in.inflight > 0 || in.expecting > 0 || in.revoking || in.purging || in.closing != nil ||
		!in.pending.empty() || in.shipping != nil || clock.Now().Sub(in.used) < idle
	held := in.mode != vice.None
	s, _ := c.current()
	stale := in.epoch != s.epoch
	in.mu.Unlock()
	if busy {
		return
	}
	if held && !stale {
		ctx, cancel := limit(ctx)
		defer cancel()
		h, err := c.revoke(ctx, in)
		if err != nil || h.Seq == 0 {
			return
		}
		c.release(s, h)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if in.pins > 0 || !in.mu.TryLock() { // against the lock order: next time
		return
	}
	defer in.mu.Unlock()
	if in.ino != ids.RootInode && in.lookups == 0 && in.opens == 0 && in.mode == vice.None && in.expecting == 0 && in.inflight == 0 &&
		in.pending == nil && in.shipping == nil && !in.revoking && in.closing == nil {
		delete(c.inodes, in.ino)
	}
}

// Inodes returns how many inodes the cache has, for status.
func (c *Client) Inodes() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.inodes)
}

// Ready reports whether the client has a session.
func (c *Client) Ready() bool { _, ok := c.current(); return ok }

// Session returns the client's session, 0 if it has none.
func (c *Client) Session() ids.Session { s, _ := c.current(); return s.id }
