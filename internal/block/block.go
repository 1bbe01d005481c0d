package block

import (
	"context"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/zeebo/blake3"

	"github.com/unum-os/unum/internal/errs"
	"github.com/unum-os/unum/internal/ids"
	"github.com/unum-os/unum/internal/segment"
	"github.com/unum-os/unum/internal/volume"
)

// RPC is what the client needs of the node's endpoint.
type RPC interface {
	Handle(method string, h func(ctx context.Context, from ids.Node, req []byte, data []byte) (resp any, respData []byte, err error))
	Call(ctx context.Context, to ids.Node, method string, req any, data []byte, resp any) (respData []byte, err error)
}

// Config says who the client is and what it works with. Zero CacheBytes takes
// the default.
type Config struct {
	Self  ids.Node
	RPC   RPC
	Local *segment.Store // this node's store; nil: it stores nothing
	Key   [32]byte       // of the volume

	// Replicas returns the volume's storing nodes, all, dead or alive. Alive
	// says whether a node is believed to be. Both must not block; the client
	// does not keep or change the slice.
	Replicas func() []ids.Node
	Alive    func(ids.Node) bool
	// Holders returns nodes that may have blocks besides: replicas of before. They
	// are asked after the replicas, and sent nothing. Nil: there are none.
	Holders func() []ids.Node

	// Leaving reports whether this node is to take no blocks any more, because it
	// leaves and others have its place. Nil: it never is.
	Leaving func() bool

	// Walk calls yield for every block the volume's metadata names, until it
	// returns false; a name may come twice. On storing nodes only. It runs in a
	// goroutine of its own.
	Walk func(yield func(volume.BlockName) bool) error

	CacheBytes int64 // memory for blocks read; 32 MiB: some dozens of files being read
	Log        *slog.Logger
}

// Client reads and writes a volume's blocks. Its methods may be called
// concurrently, before Run too.
type Client struct {
	cfg    Config
	log    *slog.Logger
	cache  cache
	repair repair
	walked atomic.Bool // every block the metadata named was looked for, since this node is a replica
	times  times
	count  counters

	base  context.Context // ends with Run: of work that outlives its caller
	stop  context.CancelFunc
	tasks tasks

	mu      sync.Mutex
	fetches map[volume.BlockName]*fetch // gets under way
}

// times are the client's durations; tests have no others.
type times struct {
	call    time.Duration // one call to one peer; a block over a slow line takes seconds
	grace   time.Duration // a put waits for the rest after Need have answered
	hedge   time.Duration // a get asks the next peer after silence
	settle  time.Duration // a newly named block may be on its way here: repair waits
	backoff time.Duration // between attempts to repair one block; doubles
	longest time.Duration // what backoff doubles up to
	tick    time.Duration // looking at who is alive
	rewalk  time.Duration // between walks at least
}

var defaultTimes = times{
	call:    5 * time.Second,
	grace:   250 * time.Millisecond,
	hedge:   200 * time.Millisecond,
	settle:  time.Second,
	backoff: time.Second,
	longest: time.Minute,
	tick:    time.Second,
	rewalk:  10 * time.Second,
}

// defaultCache is the memory for blocks read, in bytes: some dozens of files.
const defaultCache = 32 << 20

// New makes a client and registers its handlers if the node stores. It starts
// nothing.
func New(cfg Config) *Client {
	if cfg.CacheBytes == 0 {
		cfg.CacheBytes = defaultCache
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	c := &Client{cfg: cfg, log: cfg.Log, times: defaultTimes, fetches: map[volume.BlockName]*fetch{}}
	c.cache.init(cfg.CacheBytes)
	c.repair.init()
	c.base, c.stop = context.WithCancel(context.Background())
	if cfg.Local != nil {
		c.serve()
	}
	return c
}

// NameOf returns the name of data in the volume with that key.
func NameOf(key [32]byte, data []byte) volume.BlockName {
	h, err := blake3.NewKeyed(key[:])
	if err != nil {
		panic("block: " + err.Error()) // only for another length of key
	}
	h.Write(data)
	var n volume.BlockName
	h.Sum(n[:0])
	return n
}

// Need is how many of n replicas must have a block: a majority.
func Need(n int) int { return n/2 + 1 }

// Stats counts since New; Missing and Repairs tell the present.
type Stats struct {
	CacheHits  uint64 // gets answered from memory
	LocalReads uint64 // from the own store
	PeerReads  uint64 // from a peer
	BadLocal   uint64 // own copies found damaged
	BadPeer    uint64 // answers that were not the block asked for
	Degraded   uint64 // puts that reached Need but not all replicas
	Repaired   uint64 // copies fetched by repair, or replaced by a get
	Walks      uint64 // of the metadata, finished
	Missing    int    // copies known to be missing here
}

type counters struct {
	cacheHits, localReads, peerReads, badLocal, badPeer, degraded, repaired, walks atomic.Uint64
	puts, putBytes                                                                 atomic.Uint64

	late atomic.Int64 // bytes on their way to replicas that puts did not wait for
}

// Stats returns the counts.
func (c *Client) Stats() Stats {
	return Stats{
		CacheHits:  c.count.cacheHits.Load(),
		LocalReads: c.count.localReads.Load(),
		PeerReads:  c.count.peerReads.Load(),
		BadLocal:   c.count.badLocal.Load(),
		BadPeer:    c.count.badPeer.Load(),
		Degraded:   c.count.degraded.Load(),
		Repaired:   c.count.repaired.Load(),
		Walks:      c.count.walks.Load(),
		Missing:    c.Missing(),
	}
}

// alive is Alive, but this node always is.
func (c *Client) alive(n ids.Node) bool { return n == c.cfg.Self || c.cfg.Alive(n) }

// storing reports whether this node is to have the volume's blocks.
func (c *Client) storing() bool {
	if c.cfg.Local == nil {
		return false
	}
	for _, n := range c.cfg.Replicas() {
		if n == c.cfg.Self {
			return true
		}
	}
	return false
}

// local reads the block from the own store and verifies it; a bad copy is
// forgotten and counted. Class NotFound: there is none.
func (c *Client) local(name volume.BlockName) ([]byte, error) {
	if c.cfg.Local == nil {
		return nil, errs.E(errs.NotFound, "get block", short(name), "this node stores nothing")
	}
	data, err := c.cfg.Local.Get(name, nil)
	switch {
	case err == nil && NameOf(c.cfg.Key, data) != name:
		c.cfg.Local.Forget(segment.Name(name))
		err = errs.E(errs.Corrupt, "get block", short(name), "its hash is another")
	case err == nil:
		return data, nil
	case errs.Has(err, errs.NotFound):
		return nil, err
	}
	if !c.cfg.Local.Has(name) { // the store, or we, gave it up
		c.count.badLocal.Add(1)
		c.log.Warn("local copy of a block is bad", "block", short(name), "err", err)
	}
	return nil, err
}

// tasks are goroutines that outlive the call that began them, until close.
type tasks struct {
	mu     sync.Mutex
	wg     sync.WaitGroup
	closed bool
}

// goes runs f unless close was called; it reports whether it does.
func (t *tasks) goes(f func()) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.closed {
		return false
	}
	t.wg.Go(f)
	return true
}

// close refuses further ones and waits for the rest.
func (t *tasks) close() {
	t.mu.Lock()
	t.closed = true
	t.mu.Unlock()
	t.wg.Wait()
}

// gaveUp is the error of a caller whose context has ended.
func gaveUp(ctx context.Context, op string, name volume.BlockName) error {
	if context.Cause(ctx) == context.DeadlineExceeded {
		return errs.E(errs.Timeout, op, short(name), "no answer in time")
	}
	return errs.E(errs.Interrupted, op, short(name), "%w", context.Cause(ctx))
}
