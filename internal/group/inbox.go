package group

import (
	"sync"

	pb "go.etcd.io/raft/v3/raftpb"

	"github.com/unum-os/unum/internal/ids"
)

// maxInbox bounds the bytes of messages waiting for the worker; more are
// dropped, as by a network. Callers' events are bounded by their callers.
const maxInbox = 64 << 20

type eventKind uint8

const (
	evMessage   eventKind = iota // msg came from another node
	evPropose                    // p is new
	evRead                       // g.reads has grown
	evOpen                       // g is new
	evCall                       // fn wants to run on the worker
	evSnapshot                   // fill is complete on disk
	evInstalled                  // the parked snapshot is in the state
	evFloor                      // from told index, up to which a witness may truncate
	evKnown                      // from told of an entry that it is committed
)

// event is something the worker has to deal with.
type event struct {
	kind eventKind
	g    *Group
	msg  *pb.Message
	size int
	p    *proposal
	fill *filling
	fn   func()

	from        ids.Node
	index, term uint64
}

// inbox is the worker's queue.
type inbox struct {
	wake chan struct{} // holds a token while there may be events

	mu     sync.Mutex
	events []event
	bytes  int
}

func newInbox() *inbox { return &inbox{wake: make(chan struct{}, 1)} }

// push queues e; it refuses only what came from another node, which has a size.
func (q *inbox) push(e event) bool {
	q.mu.Lock()
	if e.size > 0 && q.bytes+e.size > maxInbox {
		q.mu.Unlock()
		return false
	}
	q.events = append(q.events, e)
	q.bytes += e.size
	q.mu.Unlock()
	select {
	case q.wake <- struct{}{}:
	default:
	}
	return true
}

func (q *inbox) waiting() bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	return len(q.events) > 0
}

// take empties the queue; spare becomes its memory.
func (q *inbox) take(spare []event) []event {
	clear(spare[:cap(spare)])
	q.mu.Lock()
	defer q.mu.Unlock()
	out := q.events
	q.events, q.bytes = spare[:0], 0
	return out
}
