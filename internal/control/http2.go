package control

import (
	"context"
	"io"
	"net"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/unum-os/unum/internal/errs"
)

// preface is what a connection of HTTP/2 begins with (RFC 9113, 3.4). Its first
// byte alone tells it from frames: a length that begins so is above MaxFrame.
const preface = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"

// stopGrace is how long connections of HTTP/2 may live on when the server stops,
// for last answers to arrive.
const stopGrace = 2 * time.Second

// HandleHTTP2 has serve answer the connections that begin with HTTP/2's preface.
// They come from l as *Known, preface included, under the server's bounds; serve
// closes them. It runs as long as Run does and returns soon after ctx has ended;
// what it has left open then is closed. Not after Run.
func (s *Server) HandleHTTP2(serve func(ctx context.Context, l net.Listener) error) { s.http2 = serve }

// Known is a connection and who is at its other end.
type Known struct {
	net.Conn
	Peer Cred

	again  []byte // read already, to be read first; of the reader
	once   sync.Once
	closed chan struct{}
}

// Read reads what comes, the preface first.
func (k *Known) Read(b []byte) (int, error) {
	if len(k.again) > 0 {
		n := copy(b, k.again)
		k.again = k.again[n:]
		return n, nil
	}
	return k.Conn.Read(b)
}

// Close ends the connection.
func (k *Known) Close() error {
	err := k.Conn.Close()
	k.once.Do(func() { close(k.closed) })
	return err
}

// hall is the listener from which serve takes its connections.
type hall struct {
	addr   net.Addr
	ch     chan *Known
	once   sync.Once
	closed chan struct{}
}

func newHall(addr net.Addr) *hall {
	return &hall{addr: addr, ch: make(chan *Known), closed: make(chan struct{})}
}

// Accept returns the next connection; net.ErrClosed when there are to be no more.
func (h *hall) Accept() (net.Conn, error) {
	select {
	case k := <-h.ch:
		return k, nil
	case <-h.closed:
		return nil, net.ErrClosed
	}
}

// Close ends the accepting; connections stay.
func (h *hall) Close() error {
	h.once.Do(func() { close(h.closed) })
	return nil
}

// Addr returns the socket's.
func (h *hall) Addr() net.Addr { return h.addr }

// host gives the connection to the hall, once it has said its preface, and
// returns when it is closed.
func (s *Server) host(ctx context.Context, h *hall, c *net.UnixConn, peer Cred) {
	defer c.Close()
	stop := context.AfterFunc(ctx, func() { c.SetReadDeadline(time.Unix(1, 0)) })
	b := make([]byte, len(preface))
	_, err := io.ReadFull(c, b)
	if !stop() || err != nil {
		return
	}
	if string(b) != preface {
		s.cfg.Log.Warn("malformed request", "uid", peer.UID, "err", "neither a frame nor HTTP/2")
		return
	}
	c.SetReadDeadline(time.Time{})
	k := &Known{Conn: c, Peer: peer, again: b, closed: make(chan struct{})}
	select {
	case h.ch <- k:
	case <-h.closed:
		return
	case <-ctx.Done():
		return
	}
	select {
	case <-k.closed:
		return
	case <-ctx.Done():
	}
	t := time.NewTimer(stopGrace)
	defer t.Stop()
	select {
	case <-k.closed:
	case <-t.C:
		k.Close()
	}
}

// peek returns the first byte that comes and leaves it, and descriptors that
// came with it, where they are.
func peek(c *net.UnixConn) (byte, error) {
	rc, err := c.SyscallConn()
	if err != nil {
		return 0, err
	}
	var b [1]byte
	var n int
	rerr := rc.Read(func(fd uintptr) bool {
		for {
			n, _, err = unix.Recvfrom(int(fd), b[:], unix.MSG_PEEK)
			if err != unix.EINTR {
				return err != unix.EAGAIN
			}
		}
	})
	switch {
	case rerr != nil:
		return 0, rerr
	case err != nil:
		return 0, err
	case n == 0:
		return 0, io.EOF
	}
	return b[0], nil
}

// Refusal returns the error with which the server turned a connection away, if b,
// the first bytes it said, tell of one; else nil. It is for clients that do not
// speak frames, whom the server refuses before it knows.
func Refusal(b []byte) error {
	if len(b) < 5 || b[4] != frameError {
		return nil // a frame of HTTP/2, whose fifth byte are the flags of settings, is none
	}
	n := int(b[0])<<24 | int(b[1])<<16 | int(b[2])<<8 | int(b[3])
	if n < 1 || n-1 > len(b)-5 {
		return errs.E(errs.Unavailable, "", "", "the daemon refuses the connection")
	}
	return decodeFailure(b[5 : 4+n])
}
