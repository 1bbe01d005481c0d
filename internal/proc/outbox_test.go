package proc

import (
	"context"
	"errors"
	"log/slog"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/unum-os/unum/internal/errs"
	"github.com/unum-os/unum/internal/ids"
	"github.com/unum-os/unum/internal/wire"
)

// TestOutbox: what could not be told stays and is told later; of one job only
// the latest.
func TestOutbox(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var mu sync.Mutex
		var down = true
		var told []JobRecord
		o := NewOutbox(func(ctx context.Context, rs []JobRecord) error {
			mu.Lock()
			defer mu.Unlock()
			if down {
				return errors.New("no quorum")
			}
			if len(rs) > outboxBatch {
				t.Errorf("%d at once", len(rs))
			}
			told = append(told, rs...)
			return nil
		}, slog.New(slog.DiscardHandler))
		ctx, cancel := context.WithCancel(context.Background())
		done := make(chan struct{})
		go func() { o.Run(ctx); close(done) }()
		const n = 3 * outboxBatch
		for i := range n {
			o.Put(JobRecord{Job: ids.Job(i + 1), Incarnation: 1, State: Running})
		}
		for i := range n {
			o.Put(JobRecord{Job: ids.Job(i + 1), Incarnation: 1, State: Exited, Code: i})
			o.Put(JobRecord{Job: ids.Job(i + 1), Incarnation: 1, State: Lost}) // a guess does not beat it
		}
		time.Sleep(time.Minute)
		if r, ok := o.Get(5); !ok || r.Code != 4 || len(o.List()) != n {
			t.Errorf("%+v, %d waiting", r, len(o.List()))
		}
		mu.Lock()
		down = false
		mu.Unlock()
		time.Sleep(time.Minute)
		mu.Lock()
		if len(told) != n || len(o.List()) != 0 {
			t.Errorf("%d told, %d waiting", len(told), len(o.List()))
		}
		for i, r := range told {
			if r.Job != ids.Job(i+1) || r.State != Exited || r.Code != i {
				t.Errorf("%d: %+v", i, r)
				break
			}
		}
		told = nil
		mu.Unlock()
		o.Put(JobRecord{Job: 9999, State: Running})
		cancel() // what is there at the end is told too
		<-done
		if len(told) != 1 {
			t.Errorf("%+v", told)
		}
	})
}

func TestSupersedes(t *testing.T) {
	order := []JobRecord{{Incarnation: 1, State: Running}, {Incarnation: 1, State: Lost}, {Incarnation: 1, State: Exited}, {Incarnation: 2, State: Running}, {Incarnation: 2, State: Killed}}
	for i := range order {
		for j := range order {
			if got := order[i].Supersedes(&order[j]); got != (i > j) {
				t.Errorf("%d over %d: %v", i, j, got)
			}
		}
	}
}

// TestOutboxBigRecords: long command lines go over in several messages, each of
// which the record takes.
func TestOutboxBigRecords(t *testing.T) {
	const limit, n = 1 << 20, 9 // the record's limit of a command
	told := 0
	o := NewOutbox(func(ctx context.Context, rs []JobRecord) error {
		if b := wire.MustMarshal(rs); len(b) > limit {
			return errs.E(errs.TooLarge, "", "", "%d bytes", len(b))
		}
		told += len(rs)
		return nil
	}, slog.New(slog.DiscardHandler))
	for i := range n {
		o.Put(JobRecord{Job: ids.Job(i + 1), Incarnation: 1, State: Exited, Argv: [][]byte{make([]byte, 120<<10)}})
	}
	o.Put(JobRecord{Job: 99, Incarnation: 1, State: Exited, Argv: [][]byte{make([]byte, 600<<10)}}) // alone, then
	if err := o.flush(context.Background()); err != nil || told != n+1 || len(o.List()) != 0 {
		t.Errorf("%v, %d told, %d waiting", err, told, len(o.List()))
	}
}
