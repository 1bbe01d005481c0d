package block

import (
	"context"
	"errors"
	"time"

	"github.com/unum-os/unum/internal/errs"
	"github.com/unum-os/unum/internal/ids"
	"github.com/unum-os/unum/internal/segment"
	"github.com/unum-os/unum/internal/volume"
)

// maxLate bounds the bytes still on their way to slow replicas after their puts
// have returned; beyond it a put that returns gives its slow copies up, and
// repair brings them.
const maxLate = 16 << 20

// Put stores data on all live replicas and returns its name when all have synced
// it, or Need of all have and the rest have failed or been silent for 250 ms.
// Copies may still be on their way then: the caller must not change data any
// more. It fails with class NoQuorum when fewer than Need can have it, NoSpace
// when a needed one is full, TooLarge, or Timeout or Interrupted when ctx ends;
// the block may be on some replicas then.
// Where replicas refuse because they leave, and Need is not reached, those that
// are named next are asked, for as long as one call may take.
func (c *Client) Put(ctx context.Context, data []byte) (volume.BlockName, error) {
	began := time.Now()
	for {
		name, err := c.putOnce(ctx, data)
		if !errors.Is(err, errs.Stale.Err()) || time.Since(began) > c.times.call {
			return name, err
		}
		select { // until the change of the voters is known here
		case <-time.After(c.times.grace):
		case <-ctx.Done():
			return name, gaveUp(ctx, "put block", name)
		}
	}
}

// putOnce is Put with the replicas as they are known now. An error that has class
// Stale in it may be another's when they are asked again.
func (c *Client) putOnce(ctx context.Context, data []byte) (volume.BlockName, error) {
	if len(data) > volume.MaxBlock {
		return volume.BlockName{}, errs.E(errs.TooLarge, "put block", "", "%d bytes, limit %d", len(data), volume.MaxBlock)
	}
	name := NameOf(c.cfg.Key, data)
	all := c.cfg.Replicas()
	need := Need(len(all))
	var live []ids.Node
	for _, n := range all {
		if c.alive(n) {
			live = append(live, n)
		}
	}
	if len(live) < need {
		return name, c.tooFew(name, need, len(all), 0, nil)
	}

	calls, cancel := context.WithTimeout(c.base, c.times.call)
	type result struct {
		node ids.Node
		err  error
	}
	results := make(chan result, len(live))
	for _, n := range live {
		started := c.tasks.goes(func() { results <- result{n, c.putTo(calls, n, name, data)} })
		if !started {
			results <- result{n, errs.E(errs.Unavailable, "put block", short(name), "this node is stopping")}
		}
	}

	got, left := 0, len(live)
	var failures []error
	var grace <-chan time.Time
wait:
	for left > 0 && got+left >= need {
		select {
		case r := <-results:
			left--
			if r.err != nil {
				failures = append(failures, r.err)
				if r.node == c.cfg.Self {
					c.want(name, c.times.settle)
				}
				continue
			}
			if got++; got == need && left > 0 {
				t := time.NewTimer(c.times.grace)
				defer t.Stop()
				grace = t.C
			}
		case <-grace:
			break wait
		case <-ctx.Done():
			cancel()
			return name, gaveUp(ctx, "put block", name)
		}
	}
	if got < need {
		cancel()
		return name, c.tooFew(name, need, len(all), got, failures)
	}
	c.count.puts.Add(1)
	c.count.putBytes.Add(uint64(len(data)))
	if got < len(all) {
		c.count.degraded.Add(1)
	}
	if left == 0 {
		cancel()
	} else {
		c.late(int64(len(data)), left, cancel, func() { <-results })
	}
	if c.cfg.Local == nil { // what was written is often read, and there is no other copy near
		c.cache.put(name, append([]byte(nil), data...))
	}
	return name, nil
}

// late lets copies under way go on, if there are not too many of them, and
// cancels what is left of them in the end.
func (c *Client) late(size int64, left int, cancel func(), wait func()) {
	n := size * int64(left)
	if c.count.late.Add(n) > maxLate {
		cancel()
	}
	follow := func() {
		for range left {
			wait()
		}
		c.count.late.Add(-n)
		cancel()
	}
	if !c.tasks.goes(follow) {
		c.count.late.Add(-n)
		cancel()
	}
}

// putTo stores the block on one replica.
func (c *Client) putTo(ctx context.Context, n ids.Node, name volume.BlockName, data []byte) error {
	if n == c.cfg.Self && c.cfg.Local != nil {
		return c.take(func() error { return c.cfg.Local.Put(segment.Name(name), data) })
	}
	_, err := c.cfg.RPC.Call(ctx, n, MethodPut, nameMsg{name}, data, nil)
	return errs.Wrap(err, "put block on", n.String())
}

// tooFew is the error of a put that did not reach Need.
func (c *Client) tooFew(name volume.BlockName, need, all, got int, failures []error) error {
	why := errors.Join(failures...)
	for _, f := range failures {
		if errs.Has(f, errs.NoSpace) {
			return errs.E(errs.NoSpace, "put block", short(name), "%d of %d replicas have it, %d are needed: %w", got, all, need, why)
		}
	}
	if why == nil {
		return errs.E(errs.NoQuorum, "put block", short(name), "fewer than %d of %d replicas are alive", need, all)
	}
	return errs.E(errs.NoQuorum, "put block", short(name), "%d of %d replicas have it, %d are needed: %w", got, all, need, why)
}
