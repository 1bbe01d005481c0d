package group

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc64"
	"log/slog"
	"math/rand/v2"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/cockroachdb/pebble/v2"
	"github.com/cockroachdb/pebble/v2/vfs"

	"github.com/unum-os/unum/internal/errs"
	"github.com/unum-os/unum/internal/ids"
)

const (
	testTick  = 40 * time.Millisecond
	testPause = testTick / 4     // of a client between attempts
	patience  = 60 * time.Second // for anything that must happen on a busy machine
)

// ledger is a machine that remembers each command under its text, a digest over
// the history, and the number of commands. The result is the number.
type ledger struct{ applied atomic.Uint64 }

var crcTable = crc64.MakeTable(crc64.ECMA)

func (m *ledger) Apply(b *pebble.Batch, s Space, index uint64, cmd []byte) any {
	var n, digest uint64
	if v, err := get(b, s.Key([]byte("#")), "test"); err != nil {
		panic(err)
	} else if v != nil {
		n, digest = binary.BigEndian.Uint64(v), binary.BigEndian.Uint64(v[8:])
	}
	n++
	digest = crc64.Update(digest, crcTable, binary.BigEndian.AppendUint64(append([]byte{}, cmd...), index))
	v := binary.BigEndian.AppendUint64(binary.BigEndian.AppendUint64(nil, n), digest)
	if err := errors.Join(b.Set(s.Key([]byte("#")), v, nil), b.Set(s.Key([]byte("c"), cmd), binary.BigEndian.AppendUint64(nil, n), nil)); err != nil {
		panic(err)
	}
	return n
}

func (m *ledger) Applied(index uint64) {
	if old := m.applied.Swap(index); old > index {
		panic(fmt.Sprintf("applied went from %d to %d", old, index))
	}
}

func count(t testing.TB, g *Group) uint64 {
	v, ok, err := g.Get([]byte("#"))
	if err != nil {
		t.Fatal(err)
	}
	if !ok {
		return 0
	}
	return binary.BigEndian.Uint64(v)
}

// dump returns all of the group's applied state, and its index.
func dump(t testing.TB, g *Group) (string, uint64) {
	v, err := g.View()
	if err != nil {
		t.Fatal(err)
	}
	defer v.Close()
	lo, hi := v.Space.Bounds()
	it, err := v.NewIter(&pebble.IterOptions{LowerBound: lo, UpperBound: hi})
	if err != nil {
		t.Fatal(err)
	}
	defer it.Close()
	var b bytes.Buffer
	for it.First(); it.Valid(); it.Next() {
		fmt.Fprintf(&b, "%x=%x\n", it.Key(), it.Value())
	}
	return b.String(), v.Index
}

// network joins hosts of one process; links can be cut and lose messages.
type network struct {
	mu    sync.Mutex
	hosts map[ids.Node]*Host
	cut   map[[2]ids.Node]bool
	loss  float64
	broke chan struct{} // gets a token when a stream broke off
	tear  int           // bytes after which snapshot streams break off; 0: never
	rng   *rand.Rand

	witness map[ids.Node]bool
	more    func(*Config)              // if any
	hold    map[ids.Node][]held        // messages kept back, while it is there
	streams map[ids.Node]*bytes.Buffer // what was written to each node's streams
}

type held struct {
	from ids.Node
	msg  []byte
}

// release delivers what was held back, one of each node in turn.
func (n *network) release() {
	n.mu.Lock()
	all := n.hold
	n.hold = nil
	n.mu.Unlock()
	for more := true; more; {
		more = false
		for to, list := range all {
			if len(list) == 0 {
				continue
			}
			if h := n.peer(list[0].from, to, false); h != nil {
				_ = h.Receive(list[0].from, list[0].msg)
			}
			all[to], more = list[1:], true
		}
	}
}

func (n *network) isWitness(id ids.Node) bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.witness[id]
}

// spy keeps what is written.
type spy struct {
	net.Conn
	n  *network
	to ids.Node
}

func (s spy) Write(b []byte) (int, error) {
	s.n.mu.Lock()
	if s.n.streams[s.to] == nil {
		s.n.streams[s.to] = &bytes.Buffer{}
	}
	s.n.streams[s.to].Write(b)
	s.n.mu.Unlock()
	return s.Conn.Write(b)
}

func newNetwork() *network {
	return &network{hosts: map[ids.Node]*Host{}, cut: map[[2]ids.Node]bool{}, broke: make(chan struct{}, 1), rng: rand.New(rand.NewPCG(1, 2))}
}

// peer returns the host to, if from reaches it.
func (n *network) peer(from, to ids.Node, lossy bool) *Host {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.hosts[from] == nil || n.cut[[2]ids.Node{from, to}] || lossy && n.loss > 0 && n.rng.Float64() < n.loss {
		return nil
	}
	return n.hosts[to]
}

func (n *network) isolate(a ids.Node, cut bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	for b := range n.hosts {
		n.cut[[2]ids.Node{a, b}], n.cut[[2]ids.Node{b, a}] = cut, cut
	}
}

func (n *network) remove(a ids.Node) {
	n.mu.Lock()
	defer n.mu.Unlock()
	delete(n.hosts, a)
}

type endpoint struct {
	n    *network
	self ids.Node
	dead *atomic.Bool // this life is over; a later one may have begun
}

func (e endpoint) Send(to ids.Node, msg []byte) error {
	if e.dead.Load() {
		return nil
	}
	if h := e.n.peer(e.self, to, true); h != nil {
		e.n.mu.Lock()
		if e.n.hold != nil {
			e.n.hold[to] = append(e.n.hold[to], held{e.self, msg})
			e.n.mu.Unlock()
			return nil
		}
		e.n.mu.Unlock()
		if err := h.Receive(e.self, msg); err != nil && !errs.Has(err, errs.Busy) {
			panic(err)
		}
		return nil
	}
	return errs.E(errs.Unavailable, "send", to.String(), "cut")
}

func (e endpoint) Dial(ctx context.Context, to ids.Node, service string) (net.Conn, error) {
	h := e.n.peer(e.self, to, false)
	if h == nil || e.dead.Load() || service != Service {
		return nil, errs.E(errs.Unavailable, "dial", to.String(), "cut")
	}
	a, b := net.Pipe()
	go h.ReceiveSnapshot(context.Background(), e.self, b)
	e.n.mu.Lock()
	defer e.n.mu.Unlock()
	if e.n.tear > 0 {
		return &torn{Conn: a, left: e.n.tear, broke: e.n.broke}, nil
	}
	if e.n.streams != nil {
		return spy{a, e.n, to}, nil
	}
	return a, nil
}

// torn flips a bit and closes after some bytes.
type torn struct {
	net.Conn
	left  int
	broke chan struct{}
}

func (c *torn) Write(b []byte) (int, error) {
	if c.left -= len(b); c.left < 0 {
		b = append([]byte{}, b...)
		b[len(b)/2] ^= 1
		c.Conn.Write(b)
		c.Conn.Close()
		select {
		case c.broke <- struct{}{}:
		default:
		}
		return 0, net.ErrClosed
	}
	return c.Conn.Write(b)
}

// node is one host with its disk.
type node struct {
	t      testing.TB
	id     ids.Node
	fs     vfs.FS
	h      *Host
	dead   *atomic.Bool
	cancel context.CancelFunc
	ran    chan error
	net    *network
}

func config(n *network, id ids.Node, fs vfs.FS, dead *atomic.Bool) Config {
	c := Config{Self: id, Dir: "/d", Transport: endpoint{n, id, dead}, Tick: testTick, LogBytes: 64 << 10, FS: fs, Log: complaints,
		Witness: n.isWitness(id), IsWitness: n.isWitness}
	if n.more != nil {
		n.more(&c)
	}
	return c
}

// complaints shows what the host has to say only when it is an error.
var complaints = slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelError}))

// start opens a host; prepare may bootstrap and open before it runs.
func start(t testing.TB, n *network, id ids.Node, fs vfs.FS, prepare func(*Host)) *node {
	t.Helper()
	dead := &atomic.Bool{}
	h, err := New(config(n, id, fs, dead))
	if err != nil {
		t.Fatal(err)
	}
	nd := &node{t: t, id: id, fs: fs, h: h, dead: dead, ran: make(chan error, 1), net: n}
	prepare(h)
	var ctx context.Context
	ctx, nd.cancel = context.WithCancel(context.Background())
	n.mu.Lock()
	n.hosts[id] = h
	n.mu.Unlock()
	go func() { nd.ran <- h.Run(ctx) }()
	t.Cleanup(func() { nd.stop() })
	return nd
}

// stop ends the host in an orderly way; again is harmless.
func (nd *node) stop() error {
	if nd.cancel == nil {
		return nil
	}
	nd.dead.Store(true)
	nd.cancel()
	nd.cancel = nil
	err := <-nd.ran
	if err != nil {
		nd.t.Errorf("%v stopped: %v", nd.id, err)
	}
	if cerr := nd.h.Close(); cerr != nil {
		nd.t.Errorf("close: %v", cerr)
	}
	return err
}

// crash ends the host as a power failure would, and returns the disk after it.
func (nd *node) crash() *vfs.MemFS {
	nd.dead.Store(true)
	nd.net.remove(nd.id)
	fs := nd.fs.(*vfs.MemFS).CrashClone(vfs.CrashCloneCfg{})
	nd.stop()
	return fs
}

const tg = ids.Group(7) // the group of most tests

func open(t testing.TB, h *Host, groups ...ids.Group) {
	t.Helper()
	if len(groups) == 0 {
		groups = h.Groups()
	}
	for _, g := range groups {
		var m Machine
		if !h.cfg.Witness {
			m = &ledger{}
		}
		if _, err := h.Open(g, m); err != nil {
			t.Fatal(err)
		}
	}
}

func bootstrap(t testing.TB, h *Host, voters ...ids.Node) {
	t.Helper()
	if err := h.Bootstrap(tg, voters); err != nil {
		t.Fatal(err)
	}
	open(t, h)
}

func testCtx(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	t.Cleanup(cancel)
	return ctx
}

// three starts a group of three voters.
func three(t testing.TB, n *network) []*node {
	t.Helper()
	var out []*node
	for id := ids.Node(1); id <= 3; id++ {
		out = append(out, start(t, n, id, vfs.NewCrashableMem(), func(h *Host) { bootstrap(t, h, 1, 2, 3) }))
	}
	return out
}

// leader waits until one of the nodes leads with another of them following.
func leader(t testing.TB, nodes []*node) *node {
	t.Helper()
	ctx := testCtx(t)
	g := nodes[0].h.Group(tg)
	var lead ids.Node
	err := g.wait(ctx, "await leader", func(st Status) bool {
		for _, nd := range nodes {
			if nd.id == st.Leader && nd.h.Group(tg).IsLeader() {
				lead = st.Leader
				return true
			}
		}
		return false
	})
	for _, nd := range nodes {
		if nd.id == lead {
			return nd
		}
	}
	t.Fatalf("no leader: %v, %+v", err, g.Status())
	return nil
}

// propose proposes at whoever leads until it is acknowledged. A command whose
// outcome is unknown is not repeated: it gives false.
func propose(ctx context.Context, nodes []*node, cmd string) (uint64, bool, error) {
	for i := 0; ; i++ {
		nd := nodes[i%len(nodes)]
		g := nd.h.Group(tg)
		pctx, cancel := context.WithTimeout(ctx, 500*time.Millisecond)
		v, _, err := g.Propose(pctx, []byte(cmd))
		cancel()
		switch {
		case err == nil:
			return v.(uint64), true, nil
		case errs.Has(err, errs.Timeout):
			return 0, false, nil
		case errs.Has(err, errs.NotLeader), errs.Has(err, errs.Busy), errs.Has(err, errs.Unavailable):
		default:
			return 0, false, err
		}
		st := g.Status()
		wctx, cancel := context.WithTimeout(ctx, testPause)
		_ = g.wait(wctx, "wait", func(s Status) bool { return s.Leader != st.Leader })
		cancel()
		if ctx.Err() != nil {
			return 0, false, ctx.Err()
		}
	}
}

// same waits until all nodes have applied the same and have equal states.
func same(t testing.TB, nodes []*node) {
	t.Helper()
	ctx := testCtx(t)
	var want uint64
	for _, nd := range nodes {
		i, err := nd.h.Group(tg).ReadIndex(ctx)
		if err != nil {
			t.Fatalf("%v: %v; %+v", nd.id, err, nd.h.Group(tg).Status())
		}
		want = max(want, i)
	}
	for {
		var first string
		var at uint64
		equal := true
		for k, nd := range nodes {
			s, i := dump(t, nd.h.Group(tg))
			if k == 0 {
				first, at = s, i
			}
			if i == at && s != first {
				t.Fatalf("%v differs at index %d:\n%s\nthe first has\n%s", nd.id, i, s, first)
			}
			equal = equal && i == at && i >= want
		}
		if equal {
			return
		}
		// What is behind moves on with the next beat.
		if _, err := nodes[0].h.Group(tg).ReadIndex(ctx); err != nil {
			t.Fatal(err)
		}
	}
}

// has checks that the state holds the command.
func has(t testing.TB, g *Group, cmd string) {
	t.Helper()
	if _, ok, err := g.Get([]byte("c"), []byte(cmd)); err != nil || !ok {
		t.Fatalf("acknowledged command %.40q is lost (%v); %+v", cmd, err, g.Status())
	}
}
