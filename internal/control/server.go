package control

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/unum-os/unum/internal/errs"
	"github.com/unum-os/unum/internal/wire"
)

const (
	// firstTimeout is how long a connection may stay without a request.
	firstTimeout = 10 * time.Second
	// maxConns bounds connections in all; maxUserConns those of one user other
	// than root, so that nobody can lock the others out. Each running command is
	// one connection.
	maxConns     = 4096
	maxUserConns = 512
	// queueLen bounds messages a handler has not yet taken; then the client waits.
	queueLen = 16
	// acceptAgain is the pause after a connection could not be accepted, for want of
	// descriptors or memory.
	acceptAgain = 100 * time.Millisecond
	// otherLimit is how long another daemon may take to show that it has the socket.
	otherLimit = time.Second
)

// Cred is who is at the other end, by the kernel's word.
type Cred struct {
	PID    int
	UID    uint32
	GID    uint32
	Groups []uint32
}

// Root reports whether the peer is root.
func (c Cred) Root() bool { return c.UID == 0 }

// Config is what New needs.
type Config struct {
	Path string       // of the socket; its directory is made if missing
	Log  *slog.Logger // required
	// First is how long a connection may stay without a request; 0 is 10 s.
	First time.Duration
}

// Handler serves one request. It ends the answer by returning: nil is success.
// The context ends when the client goes away.
type Handler func(ctx context.Context, c *Conn, req []byte) error

// Server answers requests on the socket.
type Server struct {
	cfg      Config
	handlers map[string]Handler
	http2    func(ctx context.Context, l net.Listener) error // nil: frames only

	mu    sync.Mutex
	users map[uint32]int // connections per uid
	total int
}

// New returns a server; Run starts it.
func New(cfg Config) *Server {
	if cfg.First == 0 {
		cfg.First = firstTimeout
	}
	return &Server{cfg: cfg, handlers: map[string]Handler{}, users: map[uint32]int{}}
}

// Handle registers h for verb, open to every user. Not after Run.
func (s *Server) Handle(verb string, h Handler) { s.handlers[verb] = h }

// Run listens until ctx ends and returns when every handler has returned. A
// daemon already behind the path is an error of class Busy.
func (s *Server) Run(ctx context.Context) error {
	l, err := listen(s.cfg.Path)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var wg sync.WaitGroup
	defer wg.Wait()
	stop := context.AfterFunc(ctx, func() { l.Close() })
	defer stop()
	defer l.Close()
	var h *hall
	if s.http2 != nil {
		h = newHall(l.Addr())
		wg.Go(func() {
			err := s.http2(ctx, h)
			h.Close()
			if err == nil {
				err = errors.New("it ended by itself")
			}
			cancel(ended{err}) // nothing if ctx has ended already
		})
	}
	for {
		c, err := l.AcceptUnix()
		if err != nil {
			if ctx.Err() != nil {
				return endOf(ctx)
			}
			// Out of descriptors or memory: the waiting client keeps its place in
			// the backlog; try again when something may have been freed.
			s.cfg.Log.Warn("accept failed", "err", err)
			select {
			case <-ctx.Done():
				return endOf(ctx)
			case <-time.After(acceptAgain):
			}
			continue
		}
		wg.Go(func() { s.serve(ctx, h, c) })
	}
}

// ended is the cause of Run's end when what serves HTTP/2 ended first.
type ended struct{ error }

func endOf(ctx context.Context) error {
	if e, ok := context.Cause(ctx).(ended); ok {
		return errs.Wrap(e.error, "serve HTTP/2", "")
	}
	return nil
}

func listen(path string) (*net.UnixListener, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return nil, errs.Wrap(err, "listen", path)
	}
	if c, err := net.DialTimeout("unix", path, otherLimit); err == nil {
		c.Close()
		return nil, errs.E(errs.Busy, "listen", path, "another daemon answers there")
	} else if errors.Is(err, syscall.ECONNREFUSED) {
		os.Remove(path) // left behind by a daemon that was killed
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		return nil, errs.Wrap(err, "listen", path)
	}
	if err := os.Chmod(path, 0o666); err != nil {
		return nil, errors.Join(errs.Wrap(err, "listen", path), l.Close())
	}
	return l, nil
}

// Conn is the server's end of a connection, as a handler sees it.
type Conn struct {
	Peer Cred

	c     *net.UnixConn
	in    chan frame
	files []*os.File
	busy  atomic.Bool // a request has come and is not answered

	mu sync.Mutex // one frame at a time
}

type frame struct {
	typ     byte
	payload []byte
	files   []*os.File
}

// Send sends one message of the answer. It blocks while the client does not
// read; a client that went away fails it.
func (c *Conn) Send(b []byte, files ...*os.File) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return writeFrame(c.c, frameMessage, b, files)
}

// Recv returns the client's next message; io.EOF when the client is gone.
func (c *Conn) Recv(ctx context.Context) ([]byte, error) {
	select {
	case f, ok := <-c.in:
		if !ok || f.typ != frameMessage {
			return nil, io.EOF
		}
		return f.payload, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// Files hands over the descriptors that came with the request; the caller closes
// them. Later calls return none.
func (c *Conn) Files() []*os.File {
	f := c.files
	c.files = nil
	return f
}

// serve serves one connection, for HTTP/2 in the hall.
func (s *Server) serve(ctx context.Context, h *hall, nc *net.UnixConn) {
	defer nc.Close()
	peer, err := peerCred(nc)
	if err != nil {
		s.cfg.Log.Warn("peer credentials unavailable", "err", err)
		return
	}
	c := &Conn{Peer: peer, c: nc, in: make(chan frame, queueLen)}
	if !s.enter(peer.UID) {
		c.finish(errs.E(errs.Busy, "", "", "too many connections to the daemon"))
		return
	}
	defer s.leave(peer.UID)
	nc.SetReadDeadline(time.Now().Add(s.cfg.First))
	if h != nil {
		stop := context.AfterFunc(ctx, func() { nc.Close() })
		first, err := peek(nc)
		if !stop() || err != nil {
			return
		}
		if first == preface[0] {
			s.host(ctx, h, nc, peer)
			return
		}
	}
	s.serveFrames(ctx, c)
}

// serveFrames answers the requests of one connection, one after the other.
func (s *Server) serveFrames(ctx context.Context, c *Conn) {
	nc, peer := c.c, c.Peer
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stop := context.AfterFunc(ctx, func() { nc.Close() })
	defer stop()
	done := make(chan struct{})
	defer func() {
		cancel()
		nc.Close()
		<-done
		for f := range c.in {
			closeAll(f.files)
		}
	}()
	go func() {
		defer close(done)
		defer close(c.in)
		defer cancel()
		for first := true; ; first = false {
			typ, b, files, err := readFrame(nc, maxMessage)
			switch {
			case err != nil:
			case typ == frameMessage && len(files) > 0:
				err = errs.E(errs.Corrupt, "read", "", "descriptors with a message")
			case typ == frameRequest && c.busy.Swap(true):
				err = errs.E(errs.Corrupt, "read", "", "a request before the last one is answered")
			}
			if err != nil {
				closeAll(files)
				if errs.Has(err, errs.Corrupt) {
					s.cfg.Log.Warn("malformed request", "uid", peer.UID, "err", err)
				}
				return
			}
			if first {
				nc.SetReadDeadline(time.Time{})
			}
			select {
			case c.in <- frame{typ, b, files}:
			case <-ctx.Done():
				closeAll(files)
				return
			}
		}
	}()
	for f := range c.in {
		if f.typ == frameMessage {
			continue // late, for the request before
		}
		if f.typ != frameRequest {
			closeAll(f.files)
			return
		}
		var r request
		if err := wire.Unmarshal(f.payload, &r); err != nil {
			closeAll(f.files)
			s.cfg.Log.Warn("malformed request", "uid", peer.UID, "err", err)
			return
		}
		c.files = f.files
		err := s.dispatch(ctx, c, r)
		closeAll(c.Files())
		if c.finish(err) != nil {
			return
		}
	}
}

func (s *Server) dispatch(ctx context.Context, c *Conn, r request) error {
	h := s.handlers[r.Verb]
	if h == nil {
		return errs.E(errs.NotSupported, "", "", "the daemon does not know %q: this is no storing node, or its version is another", r.Verb).
			WithRemedy("unum status here, and ask on a node whose ROLE is store")
	}
	return h(ctx, c, r.Body)
}

func (c *Conn) finish(err error) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.busy.Store(false) // the client may ask again as soon as it has read this
	if err != nil {
		return writeFrame(c.c, frameError, encodeFailure(err), nil)
	}
	return writeFrame(c.c, frameDone, nil, nil)
}

func (s *Server) enter(uid uint32) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.total >= maxConns || (uid != 0 && s.users[uid] >= maxUserConns) {
		return false
	}
	s.total++
	s.users[uid]++
	return true
}

func (s *Server) leave(uid uint32) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.total--
	if s.users[uid]--; s.users[uid] == 0 {
		delete(s.users, uid)
	}
}

// peerCred asks the kernel who connected.
func peerCred(c *net.UnixConn) (Cred, error) {
	rc, err := c.SyscallConn()
	if err != nil {
		return Cred{}, err
	}
	var cred Cred
	cerr := rc.Control(func(fd uintptr) {
		var u *unix.Ucred
		if u, err = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED); err != nil {
			return
		}
		cred = Cred{PID: int(u.Pid), UID: u.Uid, GID: u.Gid}
		cred.Groups, err = peerGroups(fd)
	})
	return cred, errors.Join(cerr, err)
}

func peerGroups(fd uintptr) ([]uint32, error) {
	g := make([]uint32, 64)
	for {
		n := uint32(len(g) * 4)
		_, _, en := unix.Syscall6(unix.SYS_GETSOCKOPT, fd, unix.SOL_SOCKET, unix.SO_PEERGROUPS,
			uintptr(unsafe.Pointer(&g[0])), uintptr(unsafe.Pointer(&n)), 0)
		switch en {
		case 0:
			return g[:n/4], nil
		case unix.ERANGE:
			g = make([]uint32, n/4+1)
		default:
			return nil, en
		}
	}
}

// Connections returns how many there are; each command that runs is one.
func (s *Server) Connections() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.total
}
