package metric

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"net/http"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/unum-os/unum/internal/errs"
)

const (
	// maxConns bounds the connections: a scraper or two, and a person who looks.
	// More wait in the kernel's backlog.
	maxConns = 16
	// maxAtOnce bounds the answers being made.
	maxAtOnce = 2
	// maxHeader bounds the bytes of a request's header.
	maxHeader = 8 << 10
	// headerLimit, answerLimit and idleLimit bound how long a client may take.
	headerLimit = 5 * time.Second
	answerLimit = 15 * time.Second
	idleLimit   = time.Minute
	// listenAgain is how often an address that cannot be listened on is tried.
	listenAgain = 5 * time.Second
)

// Server is the endpoint.
type Server struct {
	addr  string
	again time.Duration // listenAgain but in tests
	http  *http.Server
	log   *slog.Logger

	mu  sync.Mutex
	at  net.Addr // listened on; nil: not yet
	err error    // why not
}

// NewServer returns a server of what is in reg, at addr (host:port). Run starts it.
func NewServer(addr string, reg *prometheus.Registry, log *slog.Logger) *Server {
	s := &Server{addr: addr, again: listenAgain, log: log}
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(reg, promhttp.HandlerOpts{
		MaxRequestsInFlight: maxAtOnce, Timeout: answerLimit - headerLimit, ErrorLog: slog.NewLogLogger(log.Handler(), slog.LevelWarn),
		ErrorHandling: promhttp.ContinueOnError, // a part that fails must not hide the others
	}))
	s.http = &http.Server{Handler: http.MaxBytesHandler(mux, 0), ReadHeaderTimeout: headerLimit, ReadTimeout: headerLimit, WriteTimeout: answerLimit,
		IdleTimeout: idleLimit, MaxHeaderBytes: maxHeader, ErrorLog: slog.NewLogLogger(log.Handler(), slog.LevelDebug)}
	return s
}

// Addr returns the address listened on, nil while there is none.
func (s *Server) Addr() net.Addr {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.at
}

// Err says why nothing is listened on; nil if something is, or nothing should be.
func (s *Server) Err() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.err
}

func (s *Server) set(at net.Addr, err error) (changed bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	changed = (s.err == nil) != (err == nil)
	s.at, s.err = at, err
	return changed
}

// Run serves until ctx ends. That the address cannot be listened on is no error:
// it tries again. With no address it only waits.
func (s *Server) Run(ctx context.Context) error {
	if s.addr == "" {
		<-ctx.Done()
		return nil
	}
	for ctx.Err() == nil {
		l, err := net.Listen("tcp", s.addr)
		if err != nil {
			err = errs.Wrap(err, "listen", s.addr)
		} else {
			s.set(l.Addr(), nil)
			s.log.Info("metrics can be read", "addr", l.Addr().String())
			stop := context.AfterFunc(ctx, func() { s.http.Close() })
			err = s.http.Serve(&bounded{Listener: l, free: make(chan struct{}, maxConns), closed: make(chan struct{})})
			stop()
			if ctx.Err() != nil || errors.Is(err, http.ErrServerClosed) {
				break
			}
			err = errs.Wrap(err, "serve metrics", s.addr)
		}
		if s.set(nil, err) {
			s.log.Warn("metrics cannot be read", "err", err)
		}
		t := time.NewTimer(s.again)
		select {
		case <-ctx.Done():
		case <-t.C:
		}
		t.Stop()
	}
	s.set(nil, nil)
	return nil
}

// bounded accepts a connection only when there are few.
type bounded struct {
	net.Listener
	free   chan struct{} // a token for each connection
	once   sync.Once
	closed chan struct{}
}

// Accept waits until there is room for one more.
func (b *bounded) Accept() (net.Conn, error) {
	select {
	case b.free <- struct{}{}:
	case <-b.closed:
		return nil, net.ErrClosed
	}
	c, err := b.Listener.Accept()
	if err != nil {
		<-b.free
		return nil, err
	}
	return &counted{Conn: c, left: sync.OnceFunc(func() { <-b.free })}, nil
}

// Close ends Accept too when it waits for room.
func (b *bounded) Close() error {
	b.once.Do(func() { close(b.closed) })
	return b.Listener.Close()
}

// counted gives its place back when it is closed.
type counted struct {
	net.Conn
	left func()
}

// Close is part of net.Conn.
func (c *counted) Close() error {
	err := c.Conn.Close()
	c.left()
	return err
}
