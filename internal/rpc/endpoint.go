package rpc

import (
	"context"
	"log/slog"
	"net"
	"slices"
	"sync"
	"time"

	"github.com/unum-os/unum/internal/clock"
	"github.com/unum-os/unum/internal/errs"
	"github.com/unum-os/unum/internal/identity"
	"github.com/unum-os/unum/internal/ids"
	"github.com/unum-os/unum/internal/wire"
)

const (
	// MaxData bounds the raw bytes of a call, an answer or a cast: a block with
	// room, so that a frame stays below wire.MaxFrame.
	MaxData = 3 << 20
	// maxMessage bounds the encoded request and data together, the frame's and
	// the header's own bytes left out.
	maxMessage = wire.MaxFrame - 64<<10
	// bulkFrom is the size of data from which a call takes the bulk lane: 64 KiB
	// delay a small call behind them by less than a millisecond on 1 Gbit/s.
	bulkFrom = 64 << 10
	// defaultTTL is the deadline of a call whose context has none.
	defaultTTL = 30 * time.Second
	// maxTTL bounds what a caller may ask for.
	maxTTL = 24 * time.Hour
)

// Config is what an Endpoint needs. Self, Cert, Resolve and Log must be set.
type Config struct {
	Self     ids.Node
	Cert     *identity.Holder // this node's certificate, and whom it trusts
	Listener net.Listener     // taken over; if nil, New listens on ListenAddr (host:port)
	// ListenAddr is used if Listener is nil.
	ListenAddr string
	// Resolve gives the address (host:port) at which a node listens. Called at
	// each dialling, concurrently.
	Resolve func(ids.Node) (addr string, ok bool)
	// Allowed reports whether who shows a valid certificate is (still) the member
	// that it names; before a peer is dialled only its Node is known. Nil allows all.
	// Called often and concurrently: it must be quick. When it turns false,
	// connections end within a second.
	Allowed func(identity.Peer) bool
	// Permit returns why a peer may not call the method, send the cast, or open the
	// stream of that name; nil permits all. It must be quick.
	Permit func(p identity.Peer, what string) error
	// Clock tells whether certificates hold; nil: the machine's. At a handshake that
	// is a matter of the time of day; a connection ends when as much time has passed
	// as its certificate had left then, and outlives the jumps of the time of day.
	Clock clock.Clock
	Log   *slog.Logger
}

// Handler answers calls. It owns req (the encoded request) and data. ctx ends
// with the caller's deadline, its giving up, or its death. Handlers of one peer
// run concurrently.
type Handler func(ctx context.Context, from ids.Node, req, data []byte) (resp any, respData []byte, err error)

// CastHandler takes casts, those of one peer one at a time: it should be quick.
// It owns req and data.
type CastHandler func(from ids.Node, req, data []byte)

// StreamHandler serves a stream, which is closed when it returns. ctx ends with
// the connection to the peer.
type StreamHandler func(ctx context.Context, from ids.Node, c net.Conn)

// JoinHandler answers a machine that has no certificate yet.
type JoinHandler func(ctx context.Context, remote net.Addr, req []byte) (resp []byte, err error)

// Endpoint is a node's end of all its connections.
type Endpoint struct {
	cfg    Config
	count  counts
	lis    net.Listener
	ctx    context.Context // ends when Run does
	cancel context.CancelCauseFunc
	self   *queue        // casts to oneself
	stir   chan struct{} // holds one: somebody in dirty changed

	hmu     sync.RWMutex
	calls   map[string]Handler
	bulk    map[string]bool
	casts   map[string]CastHandler
	streams map[string]StreamHandler
	join    JoinHandler
	onPeer  []func(ids.Node, bool)

	smu    sync.RWMutex // over closed and wg.Add
	closed bool
	wg     sync.WaitGroup

	mu    sync.Mutex
	peers map[ids.Node]*peer
	links map[*link]struct{}
	live  map[ids.Node]int      // links per peer
	dirty map[ids.Node]struct{} // peers whose liveness may have changed
	// proven is, of the certificates that a peer with links has shown, the last to end.
	proven  map[ids.Node]proof
	renewed time.Duration // renewedWithin; tests change it
}

// New makes an endpoint and begins to listen; nothing is accepted before Run.
// Calls may be made before Run.
func New(cfg Config) (*Endpoint, error) {
	if cfg.Cert.Node() != cfg.Self {
		return nil, errs.E(errs.Invalid, "start endpoint", cfg.Self.String(), "the certificate is %v's", cfg.Cert.Node())
	}
	if cfg.Allowed == nil {
		cfg.Allowed = func(identity.Peer) bool { return true }
	}
	if cfg.Permit == nil {
		cfg.Permit = func(identity.Peer, string) error { return nil }
	}
	if cfg.Clock == nil {
		cfg.Clock = clock.Real
	}
	lis := cfg.Listener
	if lis == nil {
		var err error
		if lis, err = net.Listen("tcp", cfg.ListenAddr); err != nil {
			return nil, errs.Wrap(err, "listen", cfg.ListenAddr)
		}
	}
	e := &Endpoint{
		cfg: cfg, lis: lis, self: newQueue(castLimit), stir: make(chan struct{}, 1),
		calls: make(map[string]Handler), bulk: make(map[string]bool), casts: make(map[string]CastHandler), streams: make(map[string]StreamHandler),
		peers: make(map[ids.Node]*peer), links: make(map[*link]struct{}), live: make(map[ids.Node]int), dirty: make(map[ids.Node]struct{}),
		proven: make(map[ids.Node]proof), renewed: renewedWithin,
	}
	e.ctx, e.cancel = context.WithCancelCause(context.Background())
	return e, nil
}

// Addr returns the address listened on.
func (e *Endpoint) Addr() net.Addr { return e.lis.Addr() }

// Self returns the node's own id.
func (e *Endpoint) Self() ids.Node { return e.cfg.Self }

// Handle makes h answer the calls of a method. A later one replaces an earlier.
func (e *Endpoint) Handle(method string, h func(ctx context.Context, from ids.Node, req, data []byte) (resp any, respData []byte, err error)) {
	e.hmu.Lock()
	e.calls[method] = h
	e.hmu.Unlock()
}

// Bulk makes this node's calls of the methods take the bulk lane whatever their
// size, for those whose answers are big.
func (e *Endpoint) Bulk(methods ...string) {
	e.hmu.Lock()
	for _, m := range methods {
		e.bulk[m] = true
	}
	e.hmu.Unlock()
}

// HandleCast makes h take the casts of a method.
func (e *Endpoint) HandleCast(method string, h func(from ids.Node, req, data []byte)) {
	e.hmu.Lock()
	e.casts[method] = h
	e.hmu.Unlock()
}

// HandleStream makes h serve the streams of a service.
func (e *Endpoint) HandleStream(service string, h func(ctx context.Context, from ids.Node, c net.Conn)) {
	e.hmu.Lock()
	e.streams[service] = h
	e.hmu.Unlock()
}

// HandleJoin makes h answer machines that have no certificate yet. Without it
// they are refused.
func (e *Endpoint) HandleJoin(h func(ctx context.Context, remote net.Addr, req []byte) (resp []byte, err error)) {
	e.hmu.Lock()
	e.join = h
	e.hmu.Unlock()
}

// OnPeer makes f be told when the first connection with a peer is made and when
// the last is lost, one at a time; quick changes may be told as none. Not being
// connected does not mean that the peer is dead.
func (e *Endpoint) OnPeer(f func(n ids.Node, up bool)) {
	e.hmu.Lock()
	e.onPeer = append(e.onPeer, f)
	e.hmu.Unlock()
}

// Connected reports whether there is a live connection with n, made by either.
// The node itself always is.
func (e *Endpoint) Connected(n ids.Node) bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	return n == e.cfg.Self || e.live[n] > 0
}

// Reached returns the address at which n has shown its certificate to this node,
// and when it did so last, of the connections that live; "" if none does. Who was
// reached later at an address than another is the one that is there.
func (e *Endpoint) Reached(n ids.Node) (addr string, when time.Time) {
	e.mu.Lock()
	p := e.peers[n]
	e.mu.Unlock()
	if p == nil {
		return "", when
	}
	for _, ln := range p.lanes {
		ln.mu.Lock()
		l := ln.link
		ln.mu.Unlock()
		if l != nil && l.alive() && l.made.After(when) {
			addr, when = l.addr, l.made
		}
	}
	return addr, when
}

// Call sends a request to a node and waits for the answer, which is decoded
// into resp unless that is nil. req is encoded by package wire (nil sends
// nothing), data goes as it is, at most MaxData bytes; it must not be changed
// before Call returns, nor ever if Call failed with Timeout, Interrupted or
// Unavailable. The handler's error comes back with its class and texts. Calls
// to the node itself go to the handler directly, with a copy of data. If ctx has
// no deadline, the call has one of 30 seconds.
func (e *Endpoint) Call(ctx context.Context, to ids.Node, method string, req any, data []byte, resp any) ([]byte, error) {
	if len(data) > MaxData {
		return nil, errs.E(errs.TooLarge, method, to.String(), "%d bytes of data, limit %d", len(data), MaxData)
	}
	var body []byte
	if req != nil {
		var err error
		if body, err = wire.Marshal(req); err != nil {
			return nil, errs.E(errs.Invalid, method, to.String(), "encode request: %w", err)
		}
	}
	if len(body)+len(data) > maxMessage {
		return nil, errs.E(errs.TooLarge, method, to.String(), "%d bytes, limit %d", len(body)+len(data), maxMessage)
	}
	if _, ok := ctx.Deadline(); !ok {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, defaultTTL)
		defer cancel()
	}
	var r reply
	if to == e.cfg.Self {
		r.hdr.Resp, r.data, r.err = e.callSelf(ctx, method, body, data)
	} else {
		r = e.callPeer(ctx, to, method, body, data)
	}
	if r.err == nil {
		r.err = r.hdr.Err.unpack()
	}
	tally(&e.count.made, method, r.err)
	if r.err != nil {
		return nil, r.err
	}
	if resp != nil {
		if err := wire.Unmarshal(r.hdr.Resp, resp); err != nil {
			return nil, errs.Wrap(err, method, to.String())
		}
	}
	return r.data, nil
}

func (e *Endpoint) callSelf(ctx context.Context, method string, req, data []byte) ([]byte, []byte, error) {
	resp, data, err := e.handle(ctx, e.cfg.Self, method, req, slices.Clone(data))
	if err != nil {
		if ctx.Err() != nil {
			err = ctxError(ctx, method, e.cfg.Self.String())
		}
		return nil, nil, packError(err).unpack() // as from afar: class and texts, no more
	}
	return resp, data, nil
}

func (e *Endpoint) callPeer(ctx context.Context, to ids.Node, method string, req, data []byte) reply {
	kind := laneCall
	e.hmu.RLock()
	if len(req)+len(data) > bulkFrom || e.bulk[method] {
		kind = laneBulk
	}
	e.hmu.RUnlock()
	ln := e.peer(to).lanes[kind]
	select {
	case ln.inHand <- struct{}{}:
	case <-ctx.Done():
		return reply{err: ctxError(ctx, method, to.String())}
	}
	defer func() { <-ln.inHand }()
	for try := 0; ; try++ {
		l, err := ln.get(ctx)
		if err != nil {
			return reply{err: errs.Wrap(err, method, "")}
		}
		r, sent := l.call(ctx, method, req, data)
		if r.err != nil && !sent && try == 0 && ctx.Err() == nil {
			continue // the link had just ended: nothing was sent, another may do
		}
		if r.err != nil && ctx.Err() == nil {
			r.err = errs.Wrap(r.err, method, "")
		}
		return r
	}
}

// handle runs the handler of a method and encodes its answer.
func (e *Endpoint) handle(ctx context.Context, from ids.Node, method string, req, data []byte) ([]byte, []byte, error) {
	e.hmu.RLock()
	h := e.calls[method]
	e.hmu.RUnlock()
	if h == nil {
		return nil, nil, errs.E(errs.NotSupported, method, e.cfg.Self.String(), "no such method")
	}
	resp, data, err := h(ctx, from, req, data)
	tally(&e.count.served, method, err)
	if err != nil {
		return nil, nil, err
	}
	if resp == nil {
		return nil, data, nil
	}
	b, err := wire.Marshal(resp)
	if err != nil {
		return nil, nil, errs.E(errs.Invalid, method, e.cfg.Self.String(), "encode answer: %w", err)
	}
	return b, data, nil
}

// Cast sends a message that may be lost. It never waits: the error (Busy: no
// room; Unavailable: the peer is known to be away) says that it was not even
// begun. Casts to one node are handled in the order sent, unless lost; they have
// no order with calls. data must not be changed afterwards. If there is no
// connection, one is made, and the casts that fit the queue wait for it.
func (e *Endpoint) Cast(to ids.Node, method string, req any, data []byte) error {
	if len(data) > MaxData {
		return errs.E(errs.TooLarge, method, to.String(), "%d bytes of data, limit %d", len(data), MaxData)
	}
	h := callHeader{Method: method}
	if req != nil {
		var err error
		if h.Req, err = wire.Marshal(req); err != nil {
			return errs.E(errs.Invalid, method, to.String(), "encode cast: %w", err)
		}
	}
	if len(h.Req)+len(data) > maxMessage {
		return errs.E(errs.TooLarge, method, to.String(), "%d bytes, limit %d", len(h.Req)+len(data), maxMessage)
	}
	f := frame{typ: frameCast, header: wire.MustMarshal(h), body: data}
	if to == e.cfg.Self {
		f.body = slices.Clone(data)
		ok, closed := e.self.put(f, false)
		return castError(method, to, ok, closed)
	}
	err := e.peer(to).lanes[laneCast].cast(method, f)
	tally(&e.count.cast, method, err)
	return err
}

func castError(method string, to ids.Node, ok, closed bool) error {
	switch {
	case ok:
		return nil
	case closed:
		return errs.E(errs.Unavailable, method, to.String(), "the connection has ended")
	default:
		return errs.E(errs.Busy, method, to.String(), "too many messages wait to be sent")
	}
}

// handleCasts runs the handlers of the casts in q that permit lets pass, until ctx
// ends or q is closed.
func (e *Endpoint) handleCasts(ctx context.Context, from ids.Node, permit func(string) error, q *queue) {
	var buf []frame
	for {
		if buf = q.take(ctx.Done(), buf); buf == nil {
			return
		}
		for _, f := range buf {
			var h callHeader
			if err := wire.Unmarshal(f.header, &h); err != nil {
				e.cfg.Log.Warn("malformed cast dropped", "from", from, "err", err)
				continue
			}
			if err := permit(h.Method); err != nil {
				level := slog.LevelWarn
				if errs.Has(err, errs.Unavailable) { // of one who is not known yet: there may be many
					level = slog.LevelDebug
				}
				e.cfg.Log.Log(context.Background(), level, "cast refused", "from", from, "err", err)
				continue
			}
			e.hmu.RLock()
			fn := e.casts[h.Method]
			e.hmu.RUnlock()
			if fn != nil && ctx.Err() == nil {
				fn(from, h.Req, f.body)
			}
		}
	}
}

// spawn runs f in a goroutine that Run waits for; false if Run has ended.
func (e *Endpoint) spawn(f func()) bool {
	e.smu.RLock()
	defer e.smu.RUnlock()
	if e.closed {
		return false
	}
	e.wg.Go(f)
	return true
}

// Run accepts connections and serves them until ctx ends, then ends all
// connections and waits for all handlers. An endpoint runs once.
func (e *Endpoint) Run(ctx context.Context) error {
	stop := context.AfterFunc(ctx, func() {
		e.cancel(errs.E(errs.Unavailable, "", e.cfg.Self.String(), "this node is stopping"))
		e.lis.Close()
	})
	defer stop()
	e.spawn(func() { e.handleCasts(e.ctx, e.cfg.Self, func(string) error { return nil }, e.self) })
	e.spawn(e.watch)
	e.spawn(e.tellPeers)
	err := e.accept()

	e.cancel(errs.E(errs.Unavailable, "", e.cfg.Self.String(), "this node is stopping"))
	e.lis.Close()
	e.self.close()
	e.smu.Lock()
	e.closed = true
	e.smu.Unlock()
	e.wg.Wait()
	if ctx.Err() != nil {
		return nil
	}
	return err
}
