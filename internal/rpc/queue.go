package rpc

import (
	"context"
	"sync"
)

// frame is a frame on its way: encoded header and raw body.
type frame struct {
	typ    byte
	header []byte
	body   []byte
}

// frameCost is what a frame costs a queue besides its bytes.
const frameCost = 64

func (f frame) size() int { return len(f.header) + len(f.body) + frameCost }

// queue is a first-in first-out queue of frames bounded in bytes. One goroutine
// takes, any number put.
type queue struct {
	limit int
	wake  chan struct{} // holds one: there may be frames

	mu     sync.Mutex
	frames []frame
	bytes  int
	closed bool
	room   chan struct{} // closed when room is made; nil while nobody waits
}

func newQueue(limit int) *queue {
	return &queue{limit: limit, wake: make(chan struct{}, 1)}
}

// put adds f if there is room, or in any case if force is set (small control
// frames). An empty queue has room for any frame.
func (q *queue) put(f frame, force bool) (ok, closed bool) {
	q.mu.Lock()
	ok, closed = q.putLocked(f, force)
	q.mu.Unlock()
	return ok, closed
}

func (q *queue) putLocked(f frame, force bool) (ok, closed bool) {
	if q.closed {
		return false, true
	}
	if !force && q.bytes > 0 && q.bytes+f.size() > q.limit {
		return false, false
	}
	q.frames = append(q.frames, f)
	q.bytes += f.size()
	select {
	case q.wake <- struct{}{}:
	default:
	}
	return true, false
}

// putWait is put that waits for room until ctx ends. It reports false if ctx
// ended or the queue was closed.
func (q *queue) putWait(ctx context.Context, f frame) bool {
	for {
		q.mu.Lock()
		ok, closed := q.putLocked(f, false)
		if ok || closed {
			q.mu.Unlock()
			return ok
		}
		if q.room == nil {
			q.room = make(chan struct{})
		}
		room := q.room
		q.mu.Unlock()
		select {
		case <-room:
		case <-ctx.Done():
			return false
		}
	}
}

// take returns all frames, waiting for the first until done is closed or the
// queue is (then nil). buf is reused for the queue's next frames.
func (q *queue) take(done <-chan struct{}, buf []frame) []frame {
	for {
		q.mu.Lock()
		if q.closed {
			q.mu.Unlock()
			return nil
		}
		if len(q.frames) > 0 {
			got := q.frames
			clear(buf[:cap(buf)])
			q.frames, q.bytes = buf[:0], 0
			if q.room != nil {
				close(q.room)
				q.room = nil
			}
			q.mu.Unlock()
			return got
		}
		q.mu.Unlock()
		select {
		case <-q.wake:
		case <-done:
			return nil
		}
	}
}

// close drops what is queued and refuses more.
func (q *queue) close() {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.closed = true
	q.frames = nil
	if q.room != nil {
		close(q.room)
		q.room = nil
	}
	select {
	case q.wake <- struct{}{}:
	default:
	}
}
