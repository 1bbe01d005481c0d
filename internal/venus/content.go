package venus

import (
	"context"
	"syscall"

	"github.com/unum-os/unum/internal/errs"
	"github.com/unum-os/unum/internal/ids"
	"github.com/unum-os/unum/internal/vice"
	"github.com/unum-os/unum/internal/volume"
)

// load makes the file's committed extents known. The caller is admitted, so the
// lease stays for as long as the session does.
func (c *Client) load(ctx context.Context, in *inode) error {
	in.mu.Lock()
	defer in.mu.Unlock()
	epoch := c.epoch()
	for !in.loaded {
		if in.loading {
			if err := in.wait(ctx); err != nil {
				return err
			}
			continue
		}
		in.loading = true
		gen := in.loads
		in.mu.Unlock()
		base, err := c.fetchExtents(ctx, in.ino, epoch)
		in.mu.Lock()
		in.loading = false
		in.changed()
		if err != nil {
			return err
		}
		if c.epoch() != epoch || in.purging {
			return lostErr()
		}
		if in.loads == gen {
			in.base, in.loaded = base, true
		}
	}
	return nil
}

// fetchExtents asks the leader for all extents. It fails when the session is
// lost: whoever empties the kernel's pages may be waiting for this request.
func (c *Client) fetchExtents(ctx context.Context, ino ids.Inode, epoch uint64) (extents, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	c.while(ctx, epoch, cancel)
	var base extents
	for from := uint64(0); ; {
		if c.epoch() != epoch {
			return nil, lostErr()
		}
		r, s, err := ask[vice.ExtentsReply](c, ctx, vice.MethodExtents, func(k vice.Caller) any {
			return vice.ExtentsRequest{Caller: k, Ino: ino, From: from}
		})
		if c.epoch() != epoch || err == nil && s.epoch != epoch {
			return nil, lostErr()
		}
		if err != nil {
			return nil, err
		}
		base = append(base, r.Extents...)
		if !r.More || len(r.Extents) == 0 {
			return base, nil
		}
		last := r.Extents[len(r.Extents)-1]
		from = last.Off + uint64(last.Len)
	}
}

// while sees to it that cancel is called when the epoch is over, until ctx ends.
func (c *Client) while(ctx context.Context, epoch uint64, cancel context.CancelFunc) {
	c.mu.Lock()
	s, changed := c.sess, c.changed
	c.mu.Unlock()
	go func() {
		for s.epoch == epoch {
			select {
			case <-changed:
			case <-ctx.Done():
				return
			}
			c.mu.Lock()
			s, changed = c.sess, c.changed
			c.mu.Unlock()
		}
		cancel()
	}()
}

// piece is a part of an answer that comes from a block.
type piece struct {
	name volume.BlockName
	from uint32
	dst  []byte
}

// readAt fills buf from off as far as the file reaches. The caller is admitted.
func (c *Client) readAt(ctx context.Context, in *inode, off uint64, buf []byte) (int, error) {
	if err := c.load(ctx, in); err != nil {
		return 0, err
	}
	in.mu.Lock()
	if in.purging || !in.loaded {
		in.mu.Unlock()
		return 0, lostErr()
	}
	epoch := in.epoch
	size := in.attr.Size
	if off >= size {
		in.mu.Unlock()
		return 0, nil
	}
	buf = buf[:min(uint64(len(buf)), size-off)]
	clear(buf)
	end := off + uint64(len(buf))
	below := end // committed content counts below every cut since
	for _, p := range []*pending{in.shipping, in.pending} {
		if p != nil {
			below = min(below, p.trunc)
		}
	}
	var pieces []piece
	for i := in.base.from(off); off < below && i < len(in.base) && in.base[i].Off < below; i++ {
		e := cutExtent(in.base[i], off, below)
		dst := buf[e.Off-off:][:e.Len]
		switch {
		case e.Data != nil:
			copy(dst, e.Data)
		case e.Block != nil:
			pieces = append(pieces, piece{*e.Block, e.From, dst})
		}
	}
	// What lies over the committed content, as of now too.
	var over []patch
	limit := size
	if in.pending != nil {
		limit = min(limit, in.pending.trunc)
	}
	if in.shipping != nil {
		over = in.shipping.patches(over, off, min(end, limit))
	}
	if in.pending != nil {
		over = in.pending.patches(over, off, end)
	}
	in.mu.Unlock()
	if len(pieces) > 0 { // purge waits for this request
		var cancel context.CancelFunc
		ctx, cancel = context.WithCancel(ctx)
		defer cancel()
		c.while(ctx, epoch, cancel)
	}
	for _, p := range pieces { // blocks never change
		b, err := c.cfg.Blocks.Get(ctx, p.name)
		if err != nil && c.epoch() != epoch {
			err = lostErr()
		}
		if err != nil {
			return 0, err
		}
		if int(p.from)+len(p.dst) > len(b) {
			return 0, errs.E(errs.Corrupt, "read", "", "block %x has %d bytes, %d are named", p.name[:4], len(b), int(p.from)+len(p.dst))
		}
		copy(p.dst, b[p.from:])
	}
	for _, p := range over {
		copy(buf[p.off-off:], p.data)
	}
	return len(buf), nil
}

// Seek finds data or a hole.
func (c *Client) Seek(ctx context.Context, ino ids.Inode, fh, off uint64, whence uint32) (uint64, error) {
	const seekData, seekHole = 3, 4
	ctx, cancel := limit(ctx)
	defer cancel()
	in := c.inode(ino)
	// Of what is committed and not changed since: ship first.
	if err := c.ship(ctx); err != nil {
		return 0, err
	}
	if _, err := c.ensure(ctx, in, need{mode: vice.Read, content: true}, nil); err != nil {
		return 0, err
	}
	defer in.done()
	if err := c.load(ctx, in); err != nil {
		return 0, err
	}
	in.mu.Lock()
	defer in.mu.Unlock()
	size := in.attr.Size
	if off >= size {
		return 0, syscall.ENXIO
	}
	if !in.pending.empty() || in.shipping != nil { // changed again: all of it may be data
		if whence == seekData {
			return off, nil
		}
		return size, nil
	}
	at := off
	for i := in.base.from(off); i < len(in.base); i++ {
		e := &in.base[i]
		if e.Off > at { // a hole at at
			if whence == seekHole {
				return at, nil
			}
			at = e.Off
		}
		if whence == seekData && !e.Hole() {
			return min(at, size), nil
		}
		if whence == seekHole && e.Hole() {
			return at, nil
		}
		at = e.Off + uint64(e.Len)
	}
	if whence == seekData {
		return 0, syscall.ENXIO
	}
	return min(at, size), nil
}

// Fallocate grows the file, or makes a hole in it.
func (c *Client) Fallocate(ctx context.Context, ino ids.Inode, fh, off, length uint64, mode uint32) error {
	const keepSize, punchHole, zeroRange = 1, 2, 16
	ctx, cancel := steady(ctx)
	defer cancel()
	in := c.inode(ino)
	end := off + length
	if length == 0 || end < off {
		return errs.Invalid.Err()
	}
	if end > volume.MaxFile {
		return errs.TooLarge.Err()
	}
	switch mode {
	case 0, keepSize:
		if err := c.room(ctx, int(min(length, 1<<40))); err != nil {
			return err
		}
	case punchHole | keepSize, zeroRange, zeroRange | keepSize:
	default:
		return errs.NotSupported.Err()
	}
	punch := mode&(punchHole|zeroRange) != 0
	var s session
	for {
		again := false
		if punch { // content pending there goes first, then the hole
			if err := c.ship(ctx); err != nil {
				return err
			}
		}
		err := c.alter(ctx, in, need{}, func(p *pending) error {
			if punch && !p.empty() {
				again = true
				return nil
			}
			s, _ = c.current()
			if mode&keepSize == 0 && end > in.attr.Size {
				in.attr.Size = end
				p.grown = true
				in.modify(now())
			}
			return nil
		})
		if err != nil {
			return err
		}
		if again {
			in.done()
			continue
		}
		break
	}
	defer in.done()
	if !punch {
		return nil
	}
	r, _, _, err := c.apply(ctx, s, []volume.Op{{Kind: volume.OpPunch, Ino: ino, Off: off, Len: length, Time: now()}}, nil, nil, nil)
	if err != nil {
		return err
	}
	if err := result(&r.Results[0]); err != nil {
		return err
	}
	in.mu.Lock()
	defer in.mu.Unlock()
	in.loads++
	if in.loaded {
		in.base = in.base.without(off, end)
	}
	if a := attrOf(&r.Results[0], ino); a != nil {
		in.attr.Mtime, in.attr.Ctime, in.attr.Alloc = max(in.attr.Mtime, a.Mtime), max(in.attr.Ctime, a.Ctime), a.Alloc
	}
	return nil
}
