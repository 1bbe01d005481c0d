package rpc

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"net"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/hashicorp/yamux"

	"github.com/unum-os/unum/internal/clock"
	"github.com/unum-os/unum/internal/errs"
	"github.com/unum-os/unum/internal/identity"
	"github.com/unum-os/unum/internal/ids"
	"github.com/unum-os/unum/internal/wire"
)

const (
	// handshakeLimit bounds the time a peer may take to show who it is.
	handshakeLimit = 5 * time.Second
	// maxHandshakes bounds the connections whose peer is not known yet, in all,
	// maxHandshakesFrom those from one address, so that one machine cannot keep the
	// others out.
	maxHandshakes     = 256
	maxHandshakesFrom = 64
	// maxLinksFrom bounds the connections of one kind that a known peer may have
	// here. One is right; those of its earlier lives are given up after goneAfter.
	maxLinksFrom = 8
)

// gate counts the connections whose peer is not known yet.
type gate struct {
	mu   sync.Mutex
	all  int
	from map[netip.Addr]int
}

func (g *gate) enter(a netip.Addr) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.all >= maxHandshakes || g.from[a] >= maxHandshakesFrom {
		return false
	}
	g.all++
	g.from[a]++
	return true
}

func (g *gate) leave(a netip.Addr) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.all--
	if g.from[a]--; g.from[a] == 0 {
		delete(g.from, a)
	}
}

// accept takes connections until the listener is closed.
func (e *Endpoint) accept() error {
	g := &gate{from: make(map[netip.Addr]int)}
	conf := e.serverTLS()
	for {
		c, err := e.lis.Accept()
		if err != nil {
			if e.ctx.Err() == nil && !errors.Is(err, net.ErrClosed) {
				// Out of descriptors, mostly: others will be given back.
				e.cfg.Log.Warn("cannot accept a connection", "err", err)
				select {
				case <-time.After(50 * time.Millisecond):
				case <-e.ctx.Done():
				}
				continue
			}
			return errs.Wrap(err, "accept", e.lis.Addr().String())
		}
		from := addrOf(c)
		if !g.enter(from) {
			e.count.refused.Add(1)
			c.Close()
			continue
		}
		if !e.spawn(func() { e.serve(c, conf, sync.OnceFunc(func() { g.leave(from) })) }) {
			g.leave(from)
			c.Close()
		}
	}
}

func addrOf(c net.Conn) netip.Addr {
	if t, ok := c.RemoteAddr().(*net.TCPAddr); ok {
		return t.AddrPort().Addr().Unmap()
	}
	return netip.Addr{}
}

// serve finds out who a connection comes from and serves it to its end. known
// is called when the peer is known or the connection given up.
func (e *Endpoint) serve(c net.Conn, conf *tls.Config, known func()) {
	defer known()
	defer c.Close()
	stop := context.AfterFunc(e.ctx, func() { c.Close() })
	defer stop()
	c.SetDeadline(time.Now().Add(handshakeLimit))
	raw := newRawConn(c, laneCall.buffer(), &e.count)
	conn := tls.Server(raw, conf)
	if err := conn.HandshakeContext(e.ctx); err != nil {
		e.count.refused.Add(1)
		e.cfg.Log.Debug("connection refused", "remote", c.RemoteAddr().String(), "err", err)
		return
	}
	cs := conn.ConnectionState()
	if cs.NegotiatedProtocol == alpnJoin {
		e.serveJoin(c, conn)
		return
	}
	kind := laneKind(slices.Index(alpn[:], cs.NegotiatedProtocol))
	if kind >= numLanes {
		return // a client that named no protocol
	}
	// The handshake verified the chain: this reads the name.
	p, err := e.cfg.Cert.Trust().Verify(cs.PeerCertificates, x509.ExtKeyUsageClientAuth, e.cfg.Clock.Wall())
	if err != nil {
		return
	}
	if n := e.linksFrom(p.Node, kind); n >= maxLinksFrom {
		e.count.refused.Add(1)
		e.cfg.Log.Warn("connection refused: the peer has too many", "node", p.Node, "lane", alpn[kind], "links", n)
		return
	}
	if err := wire.WriteFrame(conn, frameHello, wire.MustMarshal(hello{Node: e.cfg.Self, Version: version}), nil); err != nil {
		return
	}
	known()
	c.SetDeadline(time.Time{})
	l := e.newLink(p, kind, false, raw, conn)
	e.track(l)
	defer e.untrack(l)
	if kind != laneMux {
		l.run()
		return
	}
	session, err := yamux.Server(conn, e.yamuxConfig())
	if err != nil {
		l.close(err)
		return
	}
	e.attach(l, session)
	e.serveStreams(l, session)
}

// linksFrom counts the connections of a kind that a peer has made here.
func (e *Endpoint) linksFrom(n ids.Node, kind laneKind) int {
	e.mu.Lock()
	defer e.mu.Unlock()
	count := 0
	for l := range e.links {
		if l.peer == n && l.lane == kind && !l.dialled {
			count++
		}
	}
	return count
}

// serverTLS is the listener's side: a certificate is demanded of everybody but
// those who speak the join protocol and nothing else.
func (e *Endpoint) serverTLS() *tls.Config {
	node := &tls.Config{
		MinVersion:             tls.VersionTLS13,
		NextProtos:             alpn[:],
		GetCertificate:         e.cfg.Cert.GetCertificate,
		ClientAuth:             tls.RequireAnyClientCert, // verified below, like a server's
		SessionTicketsDisabled: true,                     // each connection proves anew who it is
		VerifyConnection: func(cs tls.ConnectionState) error {
			p, err := e.cfg.Cert.Trust().Verify(cs.PeerCertificates, x509.ExtKeyUsageClientAuth, e.cfg.Clock.Wall())
			if err != nil {
				return err
			}
			if p.Node == e.cfg.Self || !e.cfg.Allowed(p) {
				return errs.E(errs.Unauthorized, "accept", p.Node.String(), "not a member of this cluster, or this node itself")
			}
			return nil
		},
		DynamicRecordSizingDisabled: true, // it favours first bytes of web pages
	}
	join := &tls.Config{
		MinVersion:             tls.VersionTLS13,
		NextProtos:             []string{alpnJoin},
		GetCertificate:         e.cfg.Cert.GetChain,
		SessionTicketsDisabled: true,
	}
	return &tls.Config{
		MinVersion: tls.VersionTLS13,
		GetConfigForClient: func(h *tls.ClientHelloInfo) (*tls.Config, error) {
			if len(h.SupportedProtos) == 1 && h.SupportedProtos[0] == alpnJoin {
				return join, nil
			}
			return node, nil
		},
	}
}

// clientTLS is the dialler's side: the peer must be the node that is meant.
func (e *Endpoint) clientTLS(to ids.Node, kind laneKind) *tls.Config {
	return &tls.Config{
		MinVersion:             tls.VersionTLS13,
		NextProtos:             []string{alpn[kind]},
		GetClientCertificate:   e.cfg.Cert.GetClientCertificate,
		InsecureSkipVerify:     true, // certificates name nodes, not hosts: VerifyConnection checks them
		SessionTicketsDisabled: true,
		VerifyConnection: func(cs tls.ConnectionState) error {
			p, err := e.cfg.Cert.Trust().Verify(cs.PeerCertificates, x509.ExtKeyUsageServerAuth, e.cfg.Clock.Wall())
			if err != nil {
				return err
			}
			if p.Node != to { // a good node, at an address that was another's: that one is gone
				return errs.E(errs.Unavailable, "verify certificate", p.Node.String(), "%v was meant", to)
			}
			if !e.cfg.Allowed(p) {
				return errs.E(errs.Unauthorized, "verify certificate", p.Node.String(), "it is not the member of this name")
			}
			return nil
		},
		DynamicRecordSizingDisabled: true,
	}
}

const (
	// joinLimit bounds a join from the first byte to the last.
	joinLimit = 10 * time.Second
	// joinFrame bounds each message of it.
	joinFrame = 64 << 10
)

// serveJoin answers one machine without a certificate. The connection counts as
// one whose peer is not known to its end, which bounds their number.
func (e *Endpoint) serveJoin(c net.Conn, conn *tls.Conn) {
	e.hmu.RLock()
	h := e.join
	e.hmu.RUnlock()
	if h == nil {
		return
	}
	ctx, cancel := context.WithTimeout(e.ctx, joinLimit)
	defer cancel()
	deadline, _ := ctx.Deadline()
	c.SetDeadline(deadline)
	f, err := wire.ReadFrame(conn, joinFrame)
	if err != nil || f.Type != frameJoin {
		return
	}
	resp, err := h(ctx, c.RemoteAddr(), f.Body)
	if err == nil && len(resp) > joinFrame-1024 {
		err = errs.E(errs.TooLarge, "join", "", "answer of %d bytes", len(resp))
	}
	if err != nil {
		resp = nil
	}
	err = wire.WriteFrame(conn, frameJoin, wire.MustMarshal(openReply{Err: packError(err)}), resp)
	if err == nil {
		err = conn.CloseWrite()
	}
	if err != nil {
		e.cfg.Log.Debug("join not answered", "remote", c.RemoteAddr().String(), "err", err)
	}
}

// Join sends one message to a node's join handler and returns the answer and
// the cluster's authority. The server must show a chain that ends in the
// authority with the fingerprint; before it has, it is told nothing.
func Join(ctx context.Context, addr string, authority [32]byte, req []byte) ([]byte, *identity.Trust, error) {
	return JoinAt(ctx, clock.Real, addr, authority, req)
}

// JoinAt is Join by another clock than the machine's.
func JoinAt(ctx context.Context, clk clock.Clock, addr string, authority [32]byte, req []byte) ([]byte, *identity.Trust, error) {
	ctx, cancel := context.WithTimeout(ctx, joinLimit)
	defer cancel()
	fail := func(err error) ([]byte, *identity.Trust, error) {
		if ctx.Err() != nil {
			return nil, nil, ctxError(ctx, "join", addr)
		}
		if c := classOf(err); c != errs.Unknown && c != errs.IO {
			return nil, nil, errs.Wrap(err, "join", addr)
		}
		return nil, nil, errs.E(errs.Unavailable, "join", addr, "%w", err)
	}
	c, err := (&net.Dialer{}).DialContext(ctx, "tcp", addr)
	if err != nil {
		return fail(err)
	}
	defer c.Close()
	deadline, _ := ctx.Deadline()
	c.SetDeadline(deadline)
	defer context.AfterFunc(ctx, func() { c.SetDeadline(time.Unix(1, 0)) })()
	var trust *identity.Trust
	conn := tls.Client(c, &tls.Config{
		MinVersion:         tls.VersionTLS13,
		NextProtos:         []string{alpnJoin},
		InsecureSkipVerify: true, // VerifyConnection checks
		VerifyConnection: func(cs tls.ConnectionState) (err error) {
			trust, err = identity.VerifyJoin(cs.PeerCertificates, authority, clk.Wall())
			return err
		},
	})
	if err := conn.HandshakeContext(ctx); err != nil {
		return fail(err)
	}
	if err := wire.WriteFrame(conn, frameJoin, nil, req); err != nil {
		return fail(err)
	}
	f, err := wire.ReadFrame(conn, joinFrame)
	if err != nil {
		return fail(err)
	}
	var h openReply
	if err := wire.Unmarshal(f.Header, &h); err != nil {
		return fail(err)
	}
	if h.Err != nil {
		return nil, nil, h.Err.unpack()
	}
	return f.Body, trust, nil
}
