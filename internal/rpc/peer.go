package rpc

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"net"
	"slices"
	"sync"
	"time"

	"github.com/hashicorp/yamux"

	"github.com/unum-os/unum/internal/errs"
	"github.com/unum-os/unum/internal/identity"
	"github.com/unum-os/unum/internal/ids"
	"github.com/unum-os/unum/internal/wire"
)

const (
	// dialLimit bounds making a connection, TLS included.
	dialLimit = 2 * time.Second
	// awayWait is how long a call waits for a connection to a peer that did not
	// answer last time: on a local network it is made in a few milliseconds, or
	// not at all.
	awayWait = 200 * time.Millisecond
	// firstBackoff and maxBackoff bound the pause between attempts to reach a
	// peer; the one after the first failure is made at once.
	firstBackoff = 50 * time.Millisecond
	maxBackoff   = time.Second
	// pendingLimit bounds the casts that wait for a connection.
	pendingLimit = 1 << 20
)

type laneKind uint8

const (
	laneCall laneKind = iota
	laneBulk
	laneCast
	laneMux
	numLanes
)

// The protocols of the lanes as ALPN names them, and of joining.
var alpn = [numLanes]string{"unum-rpc/1", "unum-bulk/1", "unum-cast/1", "unum-mux/1"}

const alpnJoin = "unum-join/1"

// Protocols lists what this program speaks with other nodes, by name and version.
func Protocols() []string { return append(slices.Clone(alpn[:]), alpnJoin) }

// inHand is how many calls (streams, for that lane) may be in hand.
func (k laneKind) inHand() int64 {
	switch k {
	case laneBulk:
		return bulkInHand
	case laneMux:
		return streamsInHand
	}
	return callsInHand
}

// bulkBuffer is the size in bytes of the buffers under TLS of a link for bulk,
// callBuffer of any other.
const (
	bulkBuffer = 128 << 10
	callBuffer = 32 << 10
)

// buffer is the size of the buffers under TLS, each way.
func (k laneKind) buffer() int {
	if k == laneBulk {
		return bulkBuffer
	}
	return callBuffer
}

type peer struct{ lanes [numLanes]*lane }

// lane is the dialling side of one kind of connection to one peer.
type lane struct {
	e      *Endpoint
	node   ids.Node
	kind   laneKind
	inHand chan struct{} // a place for each call in hand

	mu      sync.Mutex
	link    *link          // the last one; perhaps no longer alive
	session *yamux.Session // with link, on the mux lane
	dialing *dialing       // not nil while one is being made
	fails   int            // attempts failed since the last success
	retry   time.Time      // no attempt before
	lastErr error          // why the last attempt failed
	pending []frame        // casts that wait for the connection
	bytes   int            // of pending
}

type dialing struct {
	done chan struct{} // closed when link or err is set
	link *link
	err  error
}

func (e *Endpoint) peer(n ids.Node) *peer {
	e.mu.Lock()
	defer e.mu.Unlock()
	p := e.peers[n]
	if p == nil {
		p = &peer{}
		for k := range numLanes {
			p.lanes[k] = &lane{e: e, node: n, kind: k, inHand: make(chan struct{}, k.inHand())}
		}
		e.peers[n] = p
	}
	return p
}

// get returns a live link, dialling if there is none. Errors are of class
// Unavailable, Unauthorized, or the context's.
func (n *lane) get(ctx context.Context) (*link, error) {
	n.mu.Lock()
	if n.link != nil && n.link.alive() {
		l := n.link
		n.mu.Unlock()
		return l, nil
	}
	d, err := n.dialLocked()
	away := n.fails > 0
	n.mu.Unlock()
	if err != nil {
		return nil, err
	}
	var patience <-chan time.Time
	if away {
		t := time.NewTimer(awayWait)
		defer t.Stop()
		patience = t.C
	}
	select {
	case <-d.done:
		return d.link, d.err
	case <-patience:
		return nil, errs.E(errs.Unavailable, "", n.node.String(), "does not answer")
	case <-ctx.Done():
		return nil, ctxError(ctx, "connect", n.node.String())
	}
}

// dialLocked returns the attempt under way, or begins one unless it is too early.
func (n *lane) dialLocked() (*dialing, error) {
	if n.dialing != nil {
		return n.dialing, nil
	}
	if n.fails > 1 && time.Now().Before(n.retry) {
		return nil, n.lastErr
	}
	d := &dialing{done: make(chan struct{})}
	if !n.e.spawn(func() { n.dial(d) }) {
		return nil, errs.E(errs.Unavailable, "", n.node.String(), "this node is stopping")
	}
	n.dialing = d
	return d, nil
}

// dial makes a connection, publishes it, and then serves it.
func (n *lane) dial(d *dialing) {
	var session *yamux.Session
	d.link, session, d.err = n.e.connect(n.node, n.kind)
	n.mu.Lock()
	n.dialing = nil
	n.lastErr = d.err
	if d.err == nil {
		n.link, n.session, n.fails = d.link, session, 0
		for _, f := range n.pending {
			d.link.out.put(f, true)
		}
	} else {
		n.fails++
		n.retry = time.Now().Add(min(maxBackoff, firstBackoff<<min(n.fails, 10)))
	}
	n.pending, n.bytes = nil, 0
	n.mu.Unlock()
	if d.err == nil {
		n.e.track(d.link)
	}
	close(d.done)
	if d.err != nil {
		return
	}
	if session != nil {
		<-session.CloseChan()
		d.link.close(lost(n.node, errors.New("closed")))
	} else {
		d.link.run()
	}
	n.e.untrack(d.link)
}

// cast sends f or keeps it until there is a connection.
func (n *lane) cast(method string, f frame) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.link != nil && n.link.alive() {
		ok, closed := n.link.out.put(f, false)
		if !closed {
			return castError(method, n.node, ok, closed)
		}
	}
	if n.bytes > 0 && n.bytes+f.size() > pendingLimit {
		return castError(method, n.node, false, false)
	}
	if _, err := n.dialLocked(); err != nil {
		return errs.Wrap(err, method, "")
	}
	n.pending = append(n.pending, f)
	n.bytes += f.size()
	return nil
}

// connect makes one connection to a node, as far as the node's hello.
func (e *Endpoint) connect(to ids.Node, kind laneKind) (*link, *yamux.Session, error) {
	ctx, cancel := context.WithTimeout(e.ctx, dialLimit)
	defer cancel()
	if !e.cfg.Allowed(identity.Peer{Node: to}) {
		return nil, nil, errs.E(errs.Unauthorized, "connect", to.String(), "not a member of this cluster")
	}
	addr, ok := e.cfg.Resolve(to)
	if !ok {
		return nil, nil, errs.E(errs.Unavailable, "connect", to.String(), "its address is not known")
	}
	c, err := (&net.Dialer{}).DialContext(ctx, "tcp", addr)
	if err != nil {
		return nil, nil, errs.E(errs.Unavailable, "connect", to.String(), "%w", err)
	}
	raw := newRawConn(c, kind.buffer(), &e.count)
	conn := tls.Client(raw, e.clientTLS(to, kind))
	deadline, _ := ctx.Deadline()
	stop := context.AfterFunc(ctx, func() { c.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	c.SetDeadline(deadline)
	err = conn.HandshakeContext(ctx)
	var f wire.Frame
	if err == nil {
		f, err = wire.ReadFrame(conn, 4<<10)
	}
	var h hello
	if err == nil {
		err = wire.Unmarshal(f.Header, &h)
	}
	if err == nil && (f.Type != frameHello || h.Node != to) {
		err = errs.E(errs.Corrupt, "connect", to.String(), "the peer's first word is not a hello")
	}
	if err == nil && !stop() {
		err = context.Cause(ctx)
	}
	var shown identity.Peer
	if err == nil { // the handshake verified the chain: this reads it
		shown, err = e.cfg.Cert.Trust().Verify(conn.ConnectionState().PeerCertificates, x509.ExtKeyUsageServerAuth, e.cfg.Clock.Wall())
	}
	if err != nil {
		c.Close()
		return nil, nil, connectError(to, err)
	}
	c.SetDeadline(time.Time{})
	l := e.newLink(shown, kind, true, raw, conn)
	l.addr = addr
	if kind != laneMux {
		return l, nil, nil
	}
	session, err := yamux.Client(conn, e.yamuxConfig())
	if err != nil {
		c.Close()
		return nil, nil, errs.E(errs.Invalid, "connect", to.String(), "%w", err)
	}
	e.attach(l, session)
	return l, session, nil
}

// connectError gives the failure to connect its class: Unauthorized if one side
// refused the other's certificate, else Unavailable.
func connectError(to ids.Node, err error) error {
	var op *net.OpError
	switch {
	case errs.Has(err, errs.Unauthorized):
		return errs.Wrap(err, "connect", to.String())
	case errors.As(err, &op) && op.Op == "remote error": // a TLS alert
		return errs.E(errs.Unauthorized, "connect", to.String(), "it refused this node: %w", err)
	default:
		return errs.E(errs.Unavailable, "connect", to.String(), "%w", err)
	}
}
