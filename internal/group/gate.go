package group

import (
	"context"
	"sync"
)

// gate bounds the bytes of unresolved proposals. First come, first served.
type gate struct {
	mu      sync.Mutex
	free    int64
	waiting []*gateWait
}

type gateWait struct {
	n  int64
	ok chan struct{}
}

// acquire takes n, waiting for it until ctx ends or stop is closed.
func (t *gate) acquire(ctx context.Context, n int64, stop <-chan struct{}) error {
	t.mu.Lock()
	if len(t.waiting) == 0 && t.free >= n {
		t.free -= n
		t.mu.Unlock()
		return nil
	}
	w := &gateWait{n, make(chan struct{})}
	t.waiting = append(t.waiting, w)
	t.mu.Unlock()
	err := errStopped()
	select {
	case <-w.ok:
		return nil
	case <-stop:
	case <-ctx.Done():
		err = ctx.Err()
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	for i, x := range t.waiting {
		if x == w {
			t.waiting = append(t.waiting[:i], t.waiting[i+1:]...)
			t.grant()
			return err
		}
	}
	return nil // granted meanwhile
}

// release gives n back.
func (t *gate) release(n int64) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.free += n
	t.grant()
}

func (t *gate) grant() {
	for len(t.waiting) > 0 && t.free >= t.waiting[0].n {
		w := t.waiting[0]
		t.waiting = t.waiting[1:]
		t.free -= w.n
		close(w.ok)
	}
}
