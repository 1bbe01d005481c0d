package proc

import (
	"context"
	"log/slog"
	"sync"
	"time"

	"github.com/unum-os/unum/internal/ids"
)

// outboxBatch bounds the records told at once, and outboxBytes the size of those
// that are big: a proposal of bounded size. A single one may be bigger.
const (
	outboxBatch = 256
	outboxBytes = 512 << 10
	// outboxLimit bounds one telling, outboxLast the one that is tried when the
	// daemon stops.
	outboxLimit = 10 * time.Second
	outboxLast  = time.Second
	// outboxFirst is the pause after a telling that failed; it doubles up to
	// outboxMost.
	outboxFirst = 100 * time.Millisecond
	outboxMost  = 5 * time.Second
)

// Outbox keeps what the record must be told until it has been told. Of several
// records of one job only the one that supersedes the others is kept, so a job
// that is over before its start was told costs one message. While the record
// cannot be told the outbox grows by one message for each job started.
type Outbox struct {
	tell func(ctx context.Context, rs []JobRecord) error
	log  *slog.Logger
	wake chan struct{}

	mu      sync.Mutex // guards what follows
	pending map[ids.Job]JobRecord
	order   []ids.Job
}

// NewOutbox returns an outbox; Run empties it. tell is called from one goroutine
// and is given a context with a deadline; it may be called again with what it
// was given before when it failed.
func NewOutbox(tell func(ctx context.Context, rs []JobRecord) error, log *slog.Logger) *Outbox {
	return &Outbox{tell: tell, log: log, wake: make(chan struct{}, 1), pending: map[ids.Job]JobRecord{}}
}

// Put adds r. It never blocks.
func (o *Outbox) Put(r JobRecord) {
	o.mu.Lock()
	old, ok := o.pending[r.Job]
	if !ok {
		o.order = append(o.order, r.Job)
	}
	if !ok || r.Supersedes(&old) {
		o.pending[r.Job] = r
	}
	o.mu.Unlock()
	select {
	case o.wake <- struct{}{}:
	default:
	}
}

// Get returns what is waiting to be told about id.
func (o *Outbox) Get(id ids.Job) (JobRecord, bool) {
	o.mu.Lock()
	defer o.mu.Unlock()
	r, ok := o.pending[id]
	return r, ok
}

// List returns everything that is waiting.
func (o *Outbox) List() []JobRecord {
	o.mu.Lock()
	defer o.mu.Unlock()
	out := make([]JobRecord, 0, len(o.pending))
	for _, r := range o.pending {
		out = append(out, r)
	}
	return out
}

// Run tells the record until ctx ends, then makes one last attempt.
func (o *Outbox) Run(ctx context.Context) error {
	wait := outboxFirst
	for {
		err := o.flush(ctx)
		var again <-chan time.Time
		if err != nil && ctx.Err() == nil {
			if wait == outboxFirst {
				o.log.Warn("the record was not told about jobs, trying again", "err", err)
			}
			again = time.After(wait)
			wait = min(2*wait, outboxMost)
		} else {
			wait = outboxFirst
		}
		wake := o.wake
		if again != nil {
			wake = nil
		}
		select {
		case <-wake:
		case <-again:
		case <-ctx.Done():
			last, cancel := context.WithTimeout(context.WithoutCancel(ctx), outboxLast)
			defer cancel()
			if err := o.flush(last); err != nil {
				o.log.Warn("the record was not told about the last jobs", "err", err)
			}
			return nil
		}
	}
}

func (o *Outbox) flush(ctx context.Context) error {
	for {
		o.mu.Lock()
		var batch []JobRecord
		bytes := 0
		for _, id := range o.order[:min(len(o.order), outboxBatch)] {
			r := o.pending[id]
			bytes += r.size()
			if len(batch) > 0 && bytes > outboxBytes {
				break
			}
			batch = append(batch, r)
		}
		n := len(batch)
		o.mu.Unlock()
		if n == 0 {
			return nil
		}
		c, cancel := context.WithTimeout(ctx, outboxLimit)
		err := o.tell(c, batch)
		cancel()
		if err != nil {
			return err
		}
		o.mu.Lock()
		rest := o.order[n:]
		o.order = nil
		for i := range batch {
			id := batch[i].Job
			if now := o.pending[id]; now.Supersedes(&batch[i]) {
				o.order = append(o.order, id)
			} else {
				delete(o.pending, id)
			}
		}
		o.order = append(o.order, rest...)
		o.mu.Unlock()
	}
}

// size is what r takes in a message, but for some small numbers.
func (r *JobRecord) size() int {
	n := len(r.Cwd) + len(r.Receipt) + len(r.Text) + len(r.Name)
	for _, a := range r.Argv {
		n += len(a) + 8
	}
	return n
}
