package member

import (
	"bytes"
	"context"
	"log"
	"log/slog"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/memberlist"

	"github.com/unum-os/unum/internal/clock"
	"github.com/unum-os/unum/internal/errs"
	"github.com/unum-os/unum/internal/ids"
)

const (
	// probeInterval is how often a node pings another, and how long the answer
	// may take, detours included. Two nodes idle cost each other four small casts
	// a second.
	probeInterval = 500 * time.Millisecond
	// probeTimeout is when the detours are tried.
	probeTimeout = 250 * time.Millisecond
	// suspicion is how long a suspect may contradict, in probe intervals: 1.5 s,
	// enough for a machine whose processors are all taken. With the wait for its
	// turn (half a second on average among three) and the failed ping, a dead node
	// is known after about 2.3 s.
	suspicion = 3
	// gossipInterval is how often news is passed on: three nodes know it after
	// one, a hundred after four or so. A tick without news does nothing but wake
	// this process, which is most of what an idle node costs.
	gossipInterval = 200 * time.Millisecond
	// pushPull is how often the whole state is exchanged with some node, for what
	// gossip has missed.
	pushPull = 15 * time.Second
	// seekInterval is how often one seed that is not alive is tried.
	seekInterval = time.Second
	// streamTimeout bounds an exchange of state.
	streamTimeout = 5 * time.Second
)

// Config is what Members needs; all but Meta must be set.
type Config struct {
	Self ids.Node
	Meta []byte // told to all others, at most memberlist.MetaMaxSize (512) bytes
	RPC  RPC
	Log  *slog.Logger
}

// Members is this node's opinion on the others.
type Members struct {
	cfg     Config
	trans   *transport
	queue   *memberlist.TransmitLimitedQueue // words on their way
	started chan struct{}                    // closed when list is set
	wake    chan struct{}                    // holds one: changed or news is not empty
	list    *memberlist.Memberlist           // set once, before started is closed

	deaths, returns, suspicions atomic.Uint64

	mu      sync.Mutex
	alive   map[ids.Node][]byte        // the nodes alive, this one included, and their Meta
	gone    map[ids.Node]clock.Instant // those that were, and when they died
	changed map[ids.Node]struct{}
	words   map[topic]*word
	news    map[topic]struct{}
	seq     uint64
	seeds   []ids.Node
	onNode  []func(ids.Node, bool)
	onWord  map[byte][]func(ids.Node, []byte)
}

// New makes a Members that registers with cfg.RPC and waits for Run.
func New(cfg Config) (*Members, error) {
	if len(cfg.Meta) > memberlist.MetaMaxSize {
		return nil, errs.E(errs.TooLarge, "start membership", cfg.Self.String(), "%d bytes of meta data, limit %d", len(cfg.Meta), memberlist.MetaMaxSize)
	}
	m := &Members{
		cfg: cfg, trans: newTransport(cfg.RPC, cfg.Self),
		started: make(chan struct{}), wake: make(chan struct{}, 1),
		alive:   map[ids.Node][]byte{cfg.Self: cfg.Meta},
		gone:    make(map[ids.Node]clock.Instant),
		changed: make(map[ids.Node]struct{}), words: make(map[topic]*word), news: make(map[topic]struct{}),
		seq:    uint64(time.Now().UnixNano()), // beats those of an earlier life, mostly; if not, hear sees to it
		onWord: make(map[byte][]func(ids.Node, []byte)),
	}
	m.queue = &memberlist.TransmitLimitedQueue{RetransmitMult: 3, NumNodes: func() int { return len(m.Alive()) }}
	m.trans.listen()
	return m, nil
}

// Run takes part in the gossip until ctx ends. It says no farewell:
// others find out by themselves.
func (m *Members) Run(ctx context.Context) error {
	c := memberlist.DefaultLANConfig()
	c.Name = m.cfg.Self.String()
	c.Transport = m.trans
	c.ProbeInterval, c.ProbeTimeout = probeInterval, probeTimeout
	c.SuspicionMult, c.SuspicionMaxTimeoutMult = suspicion, 1
	c.AwarenessMaxMultiplier = 2 // probes at most half as often when this node is slow itself
	c.DisableTcpPings = true     // packets are no less reliable than streams here
	c.GossipInterval, c.RetransmitMult = gossipInterval, 3
	c.PushPullInterval, c.TCPTimeout = pushPull, streamTimeout
	c.UDPBufferSize = packetSize
	c.EnableCompression = false
	c.Delegate, c.Events, c.Alive = delegate{m}, events{m}, events{m}
	c.Logger = log.New(logWriter{m}, "", 0)
	list, err := memberlist.Create(c)
	if err != nil {
		m.trans.Shutdown()
		return errs.Wrap(err, "start membership", m.cfg.Self.String())
	}
	m.list = list
	close(m.started)

	var wg sync.WaitGroup
	wg.Go(func() { m.tell(ctx) })
	wg.Go(func() { m.seek(ctx) })
	<-ctx.Done()
	err = list.Shutdown()
	wg.Wait()
	return errs.Wrap(err, "stop membership", m.cfg.Self.String())
}

// Join exchanges state with the nodes and returns when one has answered, with
// class Unavailable if none does. They become seeds in any case: one that is not
// alive is tried again, about once a second.
func (m *Members) Join(ctx context.Context, nodes []ids.Node) error {
	var others []ids.Node
	m.mu.Lock()
	for _, n := range nodes {
		if n == m.cfg.Self {
			continue
		}
		others = append(others, n)
		if !slices.Contains(m.seeds, n) {
			m.seeds = append(m.seeds, n)
		}
	}
	m.mu.Unlock()
	select {
	case <-m.started:
	case <-ctx.Done():
		return errs.E(errs.Interrupted, "join gossip", m.cfg.Self.String(), "%w", context.Cause(ctx))
	}
	if len(others) == 0 {
		return nil
	}
	results := make(chan error, len(others))
	for _, n := range others {
		go func() { results <- m.meet(n) }() // ends within streamTimeout or so
	}
	var last error
	for range others {
		select {
		case last = <-results:
			if last == nil {
				return nil
			}
		case <-ctx.Done():
			return errs.E(errs.Interrupted, "join gossip", m.cfg.Self.String(), "%w", context.Cause(ctx))
		}
	}
	return errs.E(errs.Unavailable, "join gossip", m.cfg.Self.String(), "none of %v answers: %w", others, last)
}

// meet exchanges state with one node.
func (m *Members) meet(n ids.Node) error {
	_, err := m.list.Join([]string{n.String() + "/" + hostPort(n)})
	return err
}

// seek tries the seeds that are not alive, one at a time.
func (m *Members) seek(ctx context.Context) {
	t := time.NewTicker(seekInterval)
	defer t.Stop()
	for i := 0; ; i++ {
		select {
		case <-ctx.Done():
			return
		case <-t.C:
		}
		var away []ids.Node
		m.mu.Lock()
		for _, n := range m.seeds {
			if _, ok := m.alive[n]; !ok {
				away = append(away, n)
			}
		}
		m.mu.Unlock()
		if len(away) == 0 {
			continue
		}
		n := away[i%len(away)]
		if err := m.meet(n); err != nil {
			m.cfg.Log.Debug("seed does not answer", "node", n, "err", err)
		}
	}
}

// Alive returns the nodes believed alive in order, this one included.
func (m *Members) Alive() []ids.Node {
	m.mu.Lock()
	defer m.mu.Unlock()
	ns := make([]ids.Node, 0, len(m.alive))
	for n := range m.alive {
		ns = append(ns, n)
	}
	slices.Sort(ns)
	return ns
}

// IsAlive reports whether n is believed alive.
func (m *Members) IsAlive(n ids.Node) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	_, ok := m.alive[n]
	return ok
}

// Meta returns what n told about itself, nil if it is not alive. Not to be
// changed.
func (m *Members) Meta(n ids.Node) []byte {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.alive[n]
}

// OnChange makes f be told when another node comes alive or dies. To be called
// before Run.
func (m *Members) OnChange(f func(n ids.Node, alive bool)) {
	m.mu.Lock()
	m.onNode = append(m.onNode, f)
	m.mu.Unlock()
}

func (m *Members) stir() {
	select {
	case m.wake <- struct{}{}:
	default:
	}
}

// tell runs the callbacks.
func (m *Members) tell(ctx context.Context) {
	told := map[ids.Node]bool{}
	for {
		select {
		case <-ctx.Done():
			return
		case <-m.wake:
		}
		type change struct {
			n     ids.Node
			alive bool
		}
		var changes []change
		var words []*word
		m.mu.Lock()
		for n := range m.changed {
			if _, up := m.alive[n]; up != told[n] {
				changes = append(changes, change{n, up})
			}
		}
		for t := range m.news {
			words = append(words, m.words[t])
		}
		clear(m.changed)
		clear(m.news)
		onNode, onWord := m.onNode, m.onWord
		m.mu.Unlock()
		for _, c := range changes {
			if told[c.n] = c.alive; !c.alive {
				delete(told, c.n)
			}
			m.cfg.Log.Info("membership changed", "node", c.n, "alive", c.alive)
			for _, f := range onNode {
				f(c.n, c.alive)
			}
		}
		for _, w := range words {
			if w == nil {
				continue // its node died and was forgotten
			}
			for _, f := range onWord[w.Kind] {
				f(w.Node, w.Payload)
			}
		}
	}
}

// events is what memberlist tells about nodes, its locks held.
type events struct{ m *Members }

// NotifyAlive refuses members whose name and address are not a node's.
func (e events) NotifyAlive(n *memberlist.Node) error {
	id, err := ids.ParseNode(n.Name)
	if err != nil {
		return err
	}
	if at, ok := nodeOfIP(n.Addr); !ok || at != id || n.Port != port {
		return errs.E(errs.Invalid, "accept member", n.Name, "its address %v is not that of its name", n.Addr)
	}
	return nil
}

func (e events) NotifyJoin(n *memberlist.Node)   { e.set(n, true) }
func (e events) NotifyUpdate(n *memberlist.Node) { e.set(n, true) }
func (e events) NotifyLeave(n *memberlist.Node)  { e.set(n, false) }

func (e events) set(n *memberlist.Node, alive bool) {
	id, err := ids.ParseNode(n.Name)
	if err != nil || id == e.m.cfg.Self {
		return // NotifyAlive lets no other name in
	}
	e.m.mu.Lock()
	_, was := e.m.alive[id]
	switch {
	case alive:
		e.m.alive[id] = bytes.Clone(n.Meta)
		delete(e.m.gone, id)
	case was:
		delete(e.m.alive, id)
		e.m.gone[id] = clock.Now()
		e.m.deaths.Add(1)
	}
	if alive && !was {
		e.m.returns.Add(1)
	}
	e.m.changed[id] = struct{}{}
	e.m.mu.Unlock()
	e.m.stir()
}

// logWriter takes memberlist's lines. What matters of them is logged by tell.
type logWriter struct{ m *Members }

// suspects begins the line of a ping that was not answered. There is no other
// word of it to be had than this one; only a count depends on it.
var suspects = []byte("memberlist: Suspect ")

func (w logWriter) Write(b []byte) (int, error) {
	if bytes.Contains(b, suspects) {
		w.m.suspicions.Add(1)
	}
	w.m.cfg.Log.Debug("gossip", "text", string(bytes.TrimSpace(b)))
	return len(b), nil
}
