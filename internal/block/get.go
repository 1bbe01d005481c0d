package block

import (
	"context"
	"errors"
	"slices"
	"time"

	"github.com/unum-os/unum/internal/errs"
	"github.com/unum-os/unum/internal/ids"
	"github.com/unum-os/unum/internal/segment"
	"github.com/unum-os/unum/internal/volume"
)

// fetch is a get under way; those who want the same block share it.
type fetch struct {
	waiters int // guarded by Client.mu
	cancel  context.CancelFunc
	done    chan struct{} // closed when data and err are final
	data    []byte
	err     error
}

// Get returns the block's bytes, verified. They are shared: nobody may change
// them. Memory is asked first, then the own store, then the replicas in turn. It
// fails with class Unavailable when a replica that may have the block does not
// answer, IO when all have answered and none has a good copy, or Timeout or
// Interrupted when ctx ends.
func (c *Client) Get(ctx context.Context, name volume.BlockName) ([]byte, error) {
	if data, ok := c.cache.get(name); ok {
		c.count.cacheHits.Add(1)
		return data, nil
	}
	c.mu.Lock()
	f := c.fetches[name]
	if f == nil {
		fctx, cancel := context.WithCancel(c.base)
		f = &fetch{cancel: cancel, done: make(chan struct{})}
		if !c.tasks.goes(func() { c.fetch(fctx, name, f) }) {
			c.mu.Unlock()
			cancel()
			return nil, errs.E(errs.Unavailable, "get block", short(name), "this node is stopping")
		}
		c.fetches[name] = f
	}
	f.waiters++
	c.mu.Unlock()

	select {
	case <-f.done:
		return f.data, f.err
	case <-ctx.Done():
	}
	c.mu.Lock()
	if f.waiters--; f.waiters == 0 {
		f.cancel() // nobody wants it any more
		if c.fetches[name] == f {
			delete(c.fetches, name)
		}
	}
	c.mu.Unlock()
	return nil, gaveUp(ctx, "get block", name)
}

// fetch carries a get out.
func (c *Client) fetch(ctx context.Context, name volume.BlockName, f *fetch) {
	defer f.cancel()
	data, err := c.local(name)
	mend := false
	if err == nil {
		c.count.localReads.Add(1)
	} else {
		mend = c.storing()
		if data, err = c.fromPeers(ctx, name, err); err == nil {
			c.count.peerReads.Add(1)
		}
	}
	if err == nil {
		c.cache.put(name, data)
	}
	c.mu.Lock()
	f.data, f.err = data, err
	if c.fetches[name] == f {
		delete(c.fetches, name)
	}
	c.mu.Unlock()
	close(f.done)
	if mend {
		if err == nil {
			err = c.mend(name, data)
		}
		if err != nil {
			c.want(name, c.times.backoff)
		}
	}
}

// mend puts a verified block into the own store, which lacked it.
func (c *Client) mend(name volume.BlockName, data []byte) error {
	if c.cfg.Local.Has(segment.Name(name)) {
		return nil
	}
	if err := c.cfg.Local.Put(segment.Name(name), data); err != nil {
		return err
	}
	c.count.repaired.Add(1)
	return nil
}

// fromPeers asks the other replicas, the live ones first, one after the other:
// the next when one has failed or been silent for a while. local says why the
// own copy will not do.
func (c *Client) fromPeers(ctx context.Context, name volume.BlockName, local error) ([]byte, error) {
	peers := c.order(name)
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	type result struct {
		data []byte
		err  error
	}
	results := make(chan result, len(peers))
	hedge := time.NewTimer(0) // the first at once
	defer hedge.Stop()
	failures := []error{local}
	silent := false
	for asked, left := 0, len(peers); left > 0; {
		select {
		case <-hedge.C:
		case r := <-results:
			left--
			if r.err == nil {
				return r.data, nil
			}
			failures = append(failures, r.err)
			if !errs.Has(r.err, errs.NotFound) && !errs.Has(r.err, errs.Corrupt) {
				silent = true
			}
		case <-ctx.Done():
			return nil, gaveUp(ctx, "get block", name)
		}
		if asked < len(peers) {
			n := peers[asked]
			asked++
			if !c.tasks.goes(func() {
				data, err := c.getFrom(ctx, n, name)
				results <- result{data, err}
			}) {
				results <- result{nil, errs.E(errs.Unavailable, "get block", short(name), "this node is stopping")}
			}
			hedge.Reset(c.times.hedge)
		}
	}
	why := errors.Join(failures...)
	if silent {
		return nil, errs.E(errs.Unavailable, "get block", short(name), "no replica gave it: %w", why)
	}
	return nil, errs.E(errs.IO, "get block", short(name), "no replica has a good copy: %w", why)
}

// order returns the other replicas as they are to be asked. It begins at a place
// that depends on the block, so that reads spread over the replicas.
func (c *Client) order(name volume.BlockName) []ids.Node {
	all := c.cfg.Replicas()
	var live, dead []ids.Node
	for i := range all {
		n := all[(i+int(name[0]))%len(all)]
		switch {
		case n == c.cfg.Self:
		case c.cfg.Alive(n):
			live = append(live, n)
		default:
			dead = append(dead, n)
		}
	}
	if c.cfg.Holders != nil {
		for _, n := range c.cfg.Holders() {
			if n != c.cfg.Self && !slices.Contains(all, n) && c.cfg.Alive(n) {
				live = append(live, n)
			}
		}
	}
	return append(live, dead...)
}

// getFrom asks one replica and verifies what it sends.
func (c *Client) getFrom(ctx context.Context, n ids.Node, name volume.BlockName) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, c.times.call)
	defer cancel()
	data, err := c.cfg.RPC.Call(ctx, n, MethodGet, nameMsg{name}, nil, nil)
	if err != nil {
		return nil, errs.Wrap(err, "get block from", n.String())
	}
	if NameOf(c.cfg.Key, data) != name {
		c.count.badPeer.Add(1)
		c.log.Warn("a peer sent bytes that are not the block asked for", "peer", n, "block", short(name), "bytes", len(data))
		return nil, errs.E(errs.Corrupt, "get block from", n.String(), "it sent something else")
	}
	return data, nil
}
