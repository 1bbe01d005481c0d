package block

import (
	"container/heap"
	"context"
	"sync"
	"time"

	"github.com/unum-os/unum/internal/clock"
	"github.com/unum-os/unum/internal/errs"
	"github.com/unum-os/unum/internal/ids"
	"github.com/unum-os/unum/internal/segment"
	"github.com/unum-os/unum/internal/volume"
)

const (
	// maxWanted bounds the names repair remembers, about 10 MB; when there are
	// more a walk finds them again.
	maxWanted = 1 << 16
	// repairers is how many copies are fetched at a time: work goes first.
	repairers = 4
)

// repair is the list of blocks that should be here and may not be.
type repair struct {
	wake chan struct{} // a name was added, or a walk is due

	mu      sync.Mutex
	wanted  map[volume.BlockName]*wanted
	due     dueHeap       // those not being fetched
	missing int           // of wanted: looked for and not here
	since   clock.Instant // when missing became more than none
	walk    bool          // names may be missing that are not in the list
}

type wanted struct {
	name    volume.BlockName
	due     time.Time
	backoff time.Duration // of the last failure
	missing bool
}

func (r *repair) init() {
	r.wake = make(chan struct{}, 1)
	r.wanted = map[volume.BlockName]*wanted{}
}

func (r *repair) poke() {
	select {
	case r.wake <- struct{}{}:
	default:
	}
}

// Ensure says that the volume's metadata names these blocks, so that this node
// should have them if it is a replica: those that are still not here in a second
// are fetched. It does not block and may be called before Run.
func (c *Client) Ensure(names []volume.BlockName) {
	if c.cfg.Local == nil {
		return
	}
	for _, n := range names {
		c.want(n, c.times.settle)
	}
}

// want puts a name on the list, to be looked at after a while; it reports whether
// there was room.
func (c *Client) want(name volume.BlockName, after time.Duration) bool {
	if c.cfg.Local == nil || c.cfg.Local.Has(segment.Name(name)) {
		return true
	}
	r := &c.repair
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.wanted[name] != nil {
		return true
	}
	if len(r.wanted) >= maxWanted {
		r.walk = true
		return false
	}
	w := &wanted{name: name, due: time.Now().Add(after)}
	r.wanted[name] = w
	heap.Push(&r.due, w)
	r.poke()
	return true
}

// Missing returns how many blocks are known to be missing here.
func (c *Client) Missing() int {
	c.repair.mu.Lock()
	defer c.repair.mu.Unlock()
	return c.repair.missing
}

// Whole reports whether this node, being a replica, has every block that the
// metadata names, as far as it has looked: all were looked for, and none is
// missing.
func (c *Client) Whole() bool {
	c.repair.mu.Lock()
	defer c.repair.mu.Unlock()
	return c.walked.Load() && len(c.repair.wanted) == 0 && !c.repair.walk
}

// Run repairs until ctx ends, and returns when all that the client started has
// ended. Puts and gets fail after it. It returns nil.
func (c *Client) Run(ctx context.Context) error {
	defer c.tasks.close()
	defer c.stop()
	if c.cfg.Local == nil {
		<-ctx.Done()
		return nil
	}
	var wg sync.WaitGroup
	defer wg.Wait()
	wg.Go(func() { c.watch(ctx) })
	free := make(chan struct{}, repairers) // one for each fetch under way
	for {
		w, wait := c.next(time.Now())
		if w == nil {
			t := time.NewTimer(wait)
			select {
			case <-ctx.Done():
			case <-c.repair.wake:
			case <-t.C:
			}
			t.Stop()
			if ctx.Err() != nil {
				return nil
			}
			continue
		}
		if !c.storing() || c.cfg.Local.Has(segment.Name(w.name)) {
			c.done(w, nil)
			continue
		}
		c.miss(w)
		select {
		case free <- struct{}{}:
		case <-ctx.Done():
			return nil
		}
		wg.Go(func() {
			defer func() { <-free }()
			c.done(w, c.bring(ctx, w.name))
		})
	}
}

// bring fetches a block into the own store.
func (c *Client) bring(ctx context.Context, name volume.BlockName) error {
	data, err := c.fromPeers(ctx, name, errs.E(errs.NotFound, "repair block", short(name), "no good copy here"))
	if err != nil {
		return err
	}
	return c.mend(name, data)
}

// next takes the name that is due, or says how long there is none.
func (c *Client) next(now time.Time) (*wanted, time.Duration) {
	r := &c.repair
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.due) == 0 {
		return nil, time.Hour // wake comes before
	}
	if d := r.due[0].due.Sub(now); d > 0 {
		return nil, d
	}
	return heap.Pop(&r.due).(*wanted), 0
}

// miss notes that w is known to be missing.
func (c *Client) miss(w *wanted) {
	c.repair.mu.Lock()
	defer c.repair.mu.Unlock()
	if !w.missing {
		w.missing = true
		if c.repair.missing == 0 {
			c.repair.since = clock.Now()
		}
		c.repair.missing++
	}
}

// done takes w off the list, or puts it back to be tried again after err.
func (c *Client) done(w *wanted, err error) {
	r := &c.repair
	r.mu.Lock()
	defer r.mu.Unlock()
	if err == nil {
		delete(r.wanted, w.name)
		if w.missing {
			r.missing--
		}
		return
	}
	first := w.backoff == 0
	w.backoff = min(max(w.backoff*2, c.times.backoff), c.times.longest)
	w.due = time.Now().Add(w.backoff)
	heap.Push(&r.due, w)
	r.poke()
	if first {
		c.log.Debug("block not repaired yet", "block", short(w.name), "err", err)
	}
}

// hurry makes all that waits after a failure due now.
func (c *Client) hurry() {
	r := &c.repair
	r.mu.Lock()
	defer r.mu.Unlock()
	now := time.Now()
	for _, w := range r.due {
		if w.backoff > 0 {
			w.backoff = 0
			w.due = now
		}
	}
	heap.Init(&r.due)
	r.poke()
}

// watch looks who is alive, and walks the metadata when that is called for: when
// this node has become a replica or begins to run, when the list was full, when
// a peer came back.
func (c *Client) watch(ctx context.Context) {
	up := map[ids.Node]bool{}
	for _, n := range c.cfg.Replicas() {
		up[n] = c.alive(n)
	}
	tick := time.NewTicker(c.times.tick)
	defer tick.Stop()
	stored := false
	var last time.Time
	for {
		back := false
		for _, n := range c.cfg.Replicas() {
			is := c.alive(n)
			back = back || is && !up[n]
			up[n] = is
		}
		if back {
			c.hurry()
		}
		storing := c.storing()
		r := &c.repair
		r.mu.Lock()
		r.walk = r.walk || back || storing && !stored
		walk := r.walk && storing && len(r.wanted) < maxWanted/2 && (last.IsZero() || time.Since(last) >= c.times.rewalk)
		if walk {
			r.walk = false
			c.walked.Store(false)
		}
		r.mu.Unlock()
		if storing != stored {
			c.walked.Store(false)
		}
		stored = storing
		if walk && c.cfg.Walk != nil {
			c.walk(ctx)
			last = time.Now()
		}
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

// walk puts every block that the metadata names and that is not here on the list.
func (c *Client) walk(ctx context.Context) {
	whole := true
	err := c.cfg.Walk(func(n volume.BlockName) bool {
		whole = ctx.Err() == nil && c.want(n, c.times.settle)
		return whole
	})
	if err != nil {
		c.log.Warn("blocks not walked", "err", err)
		c.repair.mu.Lock()
		c.repair.walk = true
		c.repair.mu.Unlock()
		return
	}
	if whole { // else want has asked for another
		c.count.walks.Add(1)
		c.walked.Store(true)
	}
}

// dueHeap is a heap by time.
type dueHeap []*wanted

func (h dueHeap) Len() int           { return len(h) }
func (h dueHeap) Less(i, j int) bool { return h[i].due.Before(h[j].due) }
func (h dueHeap) Swap(i, j int)      { h[i], h[j] = h[j], h[i] }
func (h *dueHeap) Push(x any)        { *h = append(*h, x.(*wanted)) }
func (h *dueHeap) Pop() any {
	old := *h
	w := old[len(old)-1]
	old[len(old)-1] = nil
	*h = old[:len(old)-1]
	return w
}
