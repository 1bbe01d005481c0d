package member

import (
	"context"
	"errors"
	"net"
	"slices"
	"sync"
	"time"

	"github.com/hashicorp/memberlist"

	"github.com/unum-os/unum/internal/ids"
)

// Service names the streams and casts of the gossip.
const Service = "gossip"

// RPC is what gossip needs of package rpc's Endpoint.
type RPC interface {
	// Cast sends data, which it keeps, without waiting; it may be lost.
	Cast(to ids.Node, method string, req any, data []byte) error
	HandleCast(method string, h func(from ids.Node, req, data []byte))
	Dial(ctx context.Context, to ids.Node, service string) (net.Conn, error)
	HandleStream(service string, h func(ctx context.Context, from ids.Node, c net.Conn))
}

// transport is memberlist's view of rpc.
type transport struct {
	rpc     RPC
	self    ids.Node
	packets chan *memberlist.Packet
	streams chan net.Conn
	done    chan struct{} // closed by Shutdown
	once    sync.Once
}

// maxPackets bounds the packets of gossip not handled yet: seconds of it in a large
// cluster; more are dropped, as datagrams would be.
const maxPackets = 256

func newTransport(rpc RPC, self ids.Node) *transport {
	return &transport{rpc: rpc, self: self, packets: make(chan *memberlist.Packet, maxPackets), streams: make(chan net.Conn), done: make(chan struct{})}
}

// listen registers the handlers with rpc.
func (t *transport) listen() {
	t.rpc.HandleCast(Service, func(from ids.Node, _, data []byte) {
		select {
		case <-t.done:
		case t.packets <- &memberlist.Packet{Buf: data, From: addr(from), Timestamp: time.Now()}:
		default:
		}
	})
	t.rpc.HandleStream(Service, func(ctx context.Context, from ids.Node, c net.Conn) {
		s := &stream{Conn: c, peer: from, closed: make(chan struct{})}
		select {
		case t.streams <- s:
		case <-ctx.Done():
			return
		case <-t.done:
			return
		}
		select {
		case <-s.closed:
		case <-ctx.Done():
		case <-t.done:
		}
	})
}

// stream tells when memberlist has closed it.
type stream struct {
	net.Conn
	peer   ids.Node
	once   sync.Once
	closed chan struct{}
}

func (s *stream) RemoteAddr() net.Addr { return addr(s.peer) }

func (s *stream) Close() error {
	s.once.Do(func() { close(s.closed) })
	return s.Conn.Close()
}

func (t *transport) FinalAdvertiseAddr(string, int) (net.IP, int, error) {
	return ipOf(t.self), port, nil
}

func (t *transport) PacketCh() <-chan *memberlist.Packet { return t.packets }

func (t *transport) StreamCh() <-chan net.Conn { return t.streams }

func (t *transport) WriteTo(b []byte, to string) (time.Time, error) {
	n, ok := nodeOf(to)
	if !ok {
		return time.Time{}, failure("write", errors.New("no node has address "+to))
	}
	if err := t.rpc.Cast(n, Service, nil, slices.Clone(b)); err != nil {
		return time.Time{}, failure("write", err)
	}
	return time.Now(), nil
}

func (t *transport) WriteToAddress(b []byte, to memberlist.Address) (time.Time, error) {
	return t.WriteTo(b, to.Addr)
}

func (t *transport) DialTimeout(to string, timeout time.Duration) (net.Conn, error) {
	n, ok := nodeOf(to)
	if !ok {
		return nil, failure("dial", errors.New("no node has address "+to))
	}
	select {
	case <-t.done:
		return nil, failure("dial", net.ErrClosed)
	default:
	}
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	defer cancel()
	c, err := t.rpc.Dial(ctx, n, Service)
	if err != nil {
		return nil, failure("dial", err)
	}
	return c, nil
}

func (t *transport) DialAddressTimeout(to memberlist.Address, timeout time.Duration) (net.Conn, error) {
	return t.DialTimeout(to.Addr, timeout)
}

func (t *transport) Shutdown() error {
	t.once.Do(func() { close(t.done) })
	return nil
}

// failure gives err the form in which memberlist sees that the other end failed,
// not this one; without it a failed ping would count for nothing.
func failure(op string, err error) error {
	return &net.OpError{Op: op, Net: "tcp", Err: err}
}
