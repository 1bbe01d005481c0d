package rpc

import (
	"context"
	"encoding/binary"
	"errors"
	"io"
	"log/slog"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/yamux"
	"golang.org/x/sys/unix"

	"github.com/unum-os/unum/internal/errs"
	"github.com/unum-os/unum/internal/ids"
	"github.com/unum-os/unum/internal/wire"
)

const (
	// chunkLimit bounds a chunk of a stream.
	chunkLimit = 64 << 10
	chunkHead  = 4 // bytes before a chunk of a stream: its length
	// streamWindow is what a stream may send ahead of its reader: 1 Gbit/s over
	// 8 ms.
	streamWindow = 1 << 20
	// maxUnaccepted bounds the streams of a link that the other side has opened and
	// that are not accepted here yet.
	maxUnaccepted = 256
	// openLimit is how long the other side may take to accept one; then the link
	// is given up.
	openLimit = time.Minute
)

func (e *Endpoint) yamuxConfig() *yamux.Config {
	return &yamux.Config{
		AcceptBacklog:          maxUnaccepted,
		EnableKeepAlive:        false, // the watch does it
		KeepAliveInterval:      time.Minute,
		ConnectionWriteTimeout: slowAfter,
		MaxStreamWindowSize:    streamWindow,
		StreamOpenTimeout:      openLimit,
		// Never: yamux would reset the stream after it, and with that would go what a
		// slow reader has not read yet. The end of the session ends a dead peer's.
		StreamCloseTimeout: 0,
		Logger:             slog.NewLogLogger(e.cfg.Log.Handler(), slog.LevelDebug),
	}
}

// attach makes link and session end together and the link's ping yamux's.
func (e *Endpoint) attach(l *link, s *yamux.Session) {
	context.AfterFunc(l.ctx, func() {
		l.close(context.Cause(l.ctx))
		s.Close()
	})
	var asking atomic.Bool
	l.ping = func() {
		if asking.CompareAndSwap(false, true) {
			e.spawn(func() {
				defer asking.Store(false)
				s.Ping() // its answer counts when it comes; if none does, the watch acts
			})
		}
	}
}

// Dial opens a stream to a service of a node, within two seconds. The connection
// has, besides net.Conn's methods, CloseWrite, after which the other side reads
// io.EOF. A service that does not exist gives an error of class NotSupported.
func (e *Endpoint) Dial(ctx context.Context, to ids.Node, service string) (net.Conn, error) {
	if to == e.cfg.Self {
		return e.dialSelf(service)
	}
	limited, cancel := context.WithTimeout(ctx, dialLimit)
	defer cancel()
	c, err := e.dialPeer(limited, to, service)
	if err != nil && ctx.Err() != nil {
		return nil, ctxError(ctx, "open "+service, to.String())
	}
	if err != nil && limited.Err() != nil {
		return nil, errs.E(errs.Unavailable, "open "+service, to.String(), "does not answer")
	}
	return c, err
}

func (e *Endpoint) dialPeer(ctx context.Context, to ids.Node, service string) (net.Conn, error) {
	ln := e.peer(to).lanes[laneMux]
	select {
	case ln.inHand <- struct{}{}:
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	free := sync.OnceFunc(func() { <-ln.inHand })
	l, err := ln.get(ctx)
	if err != nil {
		free()
		return nil, errs.Wrap(err, "open "+service, "")
	}
	ln.mu.Lock()
	session := ln.session // l's or a later one's
	ln.mu.Unlock()
	l.waiting.Add(1)
	defer l.waiting.Add(-1)
	ys, err := session.OpenStream()
	if err != nil {
		free()
		return nil, errs.Wrap(lost(to, err), "open "+service, "")
	}
	stop := context.AfterFunc(ctx, func() { ys.SetDeadline(time.Unix(1, 0)) })
	err = wire.WriteFrame(ys, frameOpen, wire.MustMarshal(openHeader{Service: service}), nil)
	var f wire.Frame
	if err == nil {
		f, err = wire.ReadFrame(ys, joinFrame)
	}
	var h openReply
	if err == nil {
		if err = wire.Unmarshal(f.Header, &h); err == nil && h.Err != nil {
			err = h.Err.unpack()
		}
	} else {
		err = lost(to, err)
	}
	if !stop() && err == nil {
		err = ctx.Err()
	}
	if err != nil {
		e.newStream(ys, to, free).Close()
		return nil, errs.Wrap(err, "open "+service, "")
	}
	return e.newStream(ys, to, free), nil
}

// serveStreams accepts a session's streams until it ends.
func (e *Endpoint) serveStreams(l *link, s *yamux.Session) {
	for {
		ys, err := s.AcceptStream()
		if err != nil {
			l.close(lost(l.peer, err))
			return
		}
		if !e.spawn(func() { e.serveStream(l, ys) }) {
			ys.Close()
		}
	}
}

func (e *Endpoint) serveStream(l *link, ys *yamux.Stream) {
	busy := l.serving.Add(1) > 2*laneMux.inHand()
	defer l.serving.Add(-1)
	c := e.newStream(ys, l.peer, func() {})
	ys.SetDeadline(time.Now().Add(handshakeLimit))
	f, err := wire.ReadFrame(ys, joinFrame)
	var h openHeader
	if err == nil && f.Type == frameOpen {
		err = wire.Unmarshal(f.Header, &h)
	}
	if err != nil || f.Type != frameOpen {
		ys.Close()
		return
	}
	e.hmu.RLock()
	handler := e.streams[h.Service]
	e.hmu.RUnlock()
	refusal := l.permit(h.Service)
	switch {
	case refusal != nil:
	case busy:
		refusal = errs.E(errs.Busy, "open "+h.Service, e.cfg.Self.String(), "too many streams")
	case handler == nil:
		refusal = errs.E(errs.NotSupported, "open "+h.Service, e.cfg.Self.String(), "no such service")
	}
	if err := wire.WriteFrame(ys, frameOpen, wire.MustMarshal(openReply{Err: packError(refusal)}), nil); err != nil || refusal != nil {
		ys.Close()
		return
	}
	ys.SetDeadline(time.Time{})
	defer c.Close()
	handler(l.ctx, l.peer, c)
}

// dialSelf connects the two ends of a socket pair.
func (e *Endpoint) dialSelf(service string) (net.Conn, error) {
	me := e.cfg.Self
	e.hmu.RLock()
	h := e.streams[service]
	e.hmu.RUnlock()
	if h == nil {
		return nil, errs.E(errs.NotSupported, "open "+service, me.String(), "no such service")
	}
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, errs.Wrap(err, "open "+service, me.String())
	}
	var ends [2]net.Conn
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "stream")
		c, cerr := net.FileConn(f)
		f.Close()
		ends[i] = c
		err = errors.Join(err, cerr)
	}
	if err == nil && e.spawn(func() {
		defer ends[0].Close()
		defer context.AfterFunc(e.ctx, func() { ends[0].Close(); ends[1].Close() })()
		h(e.ctx, me, ends[0])
	}) {
		return ends[1], nil
	}
	for _, c := range ends {
		if c != nil {
			c.Close()
		}
	}
	if err != nil {
		return nil, errs.Wrap(err, "open "+service, me.String())
	}
	return nil, errs.E(errs.Unavailable, "open "+service, me.String(), "this node is stopping")
}

// stream is a yamux stream with half close: bytes go in chunks of a length (u32,
// big endian) and so many bytes; length 0 says that no more will come. Reads may
// run concurrently with writes and Close.
type stream struct {
	e      *Endpoint
	ys     *yamux.Stream
	peer   ids.Node
	free   func() // gives back the place at the dialler
	closed atomic.Bool

	rmu  sync.Mutex // over the fields below, held while reading
	head [chunkHead]byte
	have int  // bytes of head read
	left int  // bytes of the chunk not read yet
	eof  bool // the peer said so

	wmu  sync.Mutex // over the fields below, held while writing
	buf  []byte
	werr error // why nothing more can be written
}

func (e *Endpoint) newStream(ys *yamux.Stream, peer ids.Node, free func()) *stream {
	return &stream{e: e, ys: ys, peer: peer, free: free}
}

func (s *stream) Read(p []byte) (int, error) {
	s.rmu.Lock()
	defer s.rmu.Unlock()
	if s.closed.Load() {
		return 0, net.ErrClosed
	}
	if len(p) == 0 {
		return 0, nil
	}
	for s.left == 0 {
		if s.eof {
			return 0, io.EOF
		}
		n, err := s.ys.Read(s.head[s.have:])
		if s.have += n; s.have == chunkHead {
			s.have = 0
			s.left = int(binary.BigEndian.Uint32(s.head[:]))
			if s.left > chunkLimit {
				s.left, s.eof = 0, true
				return 0, errs.E(errs.Corrupt, "read stream", s.peer.String(), "chunk longer than %d", chunkLimit)
			}
			s.eof = s.left == 0
			continue
		}
		if err != nil {
			return 0, s.failed(err) // not io.EOF: the peer has not said that this is all
		}
	}
	n, err := s.ys.Read(p[:min(len(p), s.left)])
	s.left -= n
	if n > 0 {
		return n, nil
	}
	return 0, s.failed(err)
}

// failed says what an error of yamux means to the user of a net.Conn.
func (s *stream) failed(err error) error {
	switch {
	case s.closed.Load():
		return net.ErrClosed
	case errors.Is(err, yamux.ErrTimeout):
		return os.ErrDeadlineExceeded
	case err == io.EOF && !s.ys.Session().IsClosed():
		return io.ErrUnexpectedEOF
	default:
		return lost(s.peer, err)
	}
}

func (s *stream) Write(p []byte) (int, error) {
	s.wmu.Lock()
	defer s.wmu.Unlock()
	done := 0
	for len(p) > 0 {
		n := min(len(p), chunkLimit)
		if err := s.chunkLocked(p[:n]); err != nil {
			return done, err
		}
		done += n
		p = p[n:]
	}
	return done, nil
}

// chunkLocked writes one chunk. If only a part of it went out, nothing more can
// follow.
func (s *stream) chunkLocked(p []byte) error {
	if s.werr != nil {
		return s.werr
	}
	if s.closed.Load() {
		return net.ErrClosed
	}
	s.buf = append(binary.BigEndian.AppendUint32(s.buf[:0], uint32(len(p))), p...)
	n, err := s.ys.Write(s.buf)
	if err == nil {
		return nil
	}
	err = s.failed(err)
	if n > 0 || !errors.Is(err, os.ErrDeadlineExceeded) {
		s.werr = err
	}
	return err
}

// CloseWrite says that no more bytes will come; reading goes on.
func (s *stream) CloseWrite() error {
	s.wmu.Lock()
	defer s.wmu.Unlock()
	err := s.chunkLocked(nil)
	if err == nil {
		s.werr = net.ErrClosed
	}
	return err
}

// Close ends both directions without waiting for the peer. What was written
// before arrives, however slowly the peer reads, and the peer then reads io.EOF;
// after the part of a Write that was under way it reads io.ErrUnexpectedEOF. What
// the peer still writes is thrown away, until it closes too.
func (s *stream) Close() error {
	if s.closed.Swap(true) {
		return nil
	}
	defer s.free()
	s.ys.SetDeadline(time.Unix(1, 0)) // ends a Read and a Write under way
	var last []byte
	if s.wmu.TryLock() { // else a Write is under way, and is cut
		if s.werr == nil {
			last = make([]byte, chunkHead)
			n, err := s.ys.Write(last)
			if last = last[n:]; err != nil && !errors.Is(err, yamux.ErrTimeout) {
				last = nil
			}
			s.werr = net.ErrClosed
		}
		s.wmu.Unlock()
	}
	if len(last) == 0 {
		s.ys.Close()
	}
	if !s.e.spawn(func() { s.linger(last) }) {
		s.ys.Close() // the endpoint is ending, and the session with it
	}
	return nil
}

// linger ends a closed stream in good order: last, the rest of the word that no
// more will come, goes out when there is room for it, and nothing that the peer
// sends keeps it waiting for room. It returns when the peer has closed too or the
// connection ends.
func (s *stream) linger(last []byte) {
	var wg sync.WaitGroup
	if len(last) > 0 {
		s.ys.SetWriteDeadline(time.Time{})
		wg.Go(func() {
			s.ys.Write(last)
			s.ys.Close()
		})
	}
	s.rmu.Lock() // a Read under way ends first
	s.ys.SetReadDeadline(time.Time{})
	s.rmu.Unlock()
	io.Copy(io.Discard, s.ys)
	wg.Wait()
}

func (s *stream) LocalAddr() net.Addr                { return s.ys.LocalAddr() }
func (s *stream) RemoteAddr() net.Addr               { return s.ys.RemoteAddr() }
func (s *stream) SetDeadline(t time.Time) error      { return s.ys.SetDeadline(t) }
func (s *stream) SetReadDeadline(t time.Time) error  { return s.ys.SetReadDeadline(t) }
func (s *stream) SetWriteDeadline(t time.Time) error { return s.ys.SetWriteDeadline(t) }
