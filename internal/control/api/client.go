package api

import (
	"context"
	"errors"
	"net"
	"sync"
	"syscall"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/unum-os/unum/internal/control"
	"github.com/unum-os/unum/internal/errs"
)

// Client is a connection to the daemon. It may be used by many goroutines; errors
// are of package errs.
type Client struct {
	Node   NodeClient
	Jobs   JobsClient
	Record RecordClient
	Users  UsersClient

	cc   *grpc.ClientConn
	path string

	mu     sync.Mutex // guards what follows
	ready  net.Conn   // connected already, for the first call
	heard  *heard     // the latest connection
	failed error      // why there is none
}

// Dial connects to the daemon behind path. Nobody listening is an error of class
// Unavailable that says what to type. The context bounds the connecting alone.
func Dial(ctx context.Context, path string) (*Client, error) {
	conn, err := control.Connect(ctx, path)
	if err != nil {
		return nil, err
	}
	c := &Client{path: path, ready: conn}
	c.cc, err = grpc.NewClient("passthrough:///unum",
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return c.connect(ctx) }),
		grpc.WithTransportCredentials(insecure.NewCredentials()), // the socket is the kernel's
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(MaxResponse), grpc.MaxCallSendMsgSize(MaxRequest)),
		grpc.WithDisableRetry(), grpc.WithDisableServiceConfig(), grpc.WithIdleTimeout(0),
		grpc.WithUnaryInterceptor(c.unary), grpc.WithStreamInterceptor(c.stream))
	if err != nil {
		return nil, errors.Join(err, conn.Close())
	}
	c.Node, c.Jobs, c.Record, c.Users = NewNodeClient(c.cc), NewJobsClient(c.cc), NewRecordClient(c.cc), NewUsersClient(c.cc)
	return c, nil
}

// Close ends the connection; calls under way are cancelled at the daemon.
func (c *Client) Close() error {
	err := c.cc.Close()
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.ready != nil {
		err = errors.Join(err, c.ready.Close())
		c.ready = nil
	}
	return err
}

func (c *Client) connect(ctx context.Context) (net.Conn, error) {
	c.mu.Lock()
	conn := c.ready
	c.ready = nil
	c.mu.Unlock()
	var err error
	if conn == nil {
		conn, err = control.Connect(ctx, c.path)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.failed = err; err != nil {
		return nil, err
	}
	c.heard = &heard{Conn: conn}
	return c.heard, nil
}

// heard keeps the first that a connection says, which may be a refusal.
type heard struct {
	net.Conn
	mu    sync.Mutex
	first []byte
}

func (h *heard) Read(b []byte) (int, error) {
	n, err := h.Conn.Read(b)
	const most = 4 << 10
	h.mu.Lock()
	if left := most - len(h.first); left > 0 {
		h.first = append(h.first, b[:min(n, left)]...)
	}
	h.mu.Unlock()
	return n, err
}

// Write writes. When the daemon has turned the connection away meanwhile, what it
// said is still there to be read, and gRPC does not look.
func (h *heard) Write(b []byte) (int, error) {
	n, err := h.Conn.Write(b)
	if errors.Is(err, syscall.EPIPE) || errors.Is(err, syscall.ECONNRESET) {
		h.Read(make([]byte, 512))
	}
	return n, err
}

// wrap gives a call's error back as the daemon meant it.
func (c *Client) wrap(err error) error {
	if st, ok := status.FromError(err); !ok || st.Code() != codes.Unavailable || len(st.Details()) > 0 {
		return fromStatus(err)
	}
	c.mu.Lock()
	h, failed := c.heard, c.failed
	c.mu.Unlock()
	if failed != nil {
		return failed
	}
	if h == nil {
		return fromStatus(err)
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if len(h.first) == 0 {
		return errs.E(errs.Unavailable, "", "", "the daemon closed the connection without a word: it is stopping, or of an older version than this command").
			WithRemedy("restart the daemon with this unum")
	}
	if r := control.Refusal(h.first); r != nil {
		return r
	}
	return fromStatus(err)
}

func (c *Client) unary(ctx context.Context, method string, req, resp any, cc *grpc.ClientConn, call grpc.UnaryInvoker, opts ...grpc.CallOption) error {
	return c.wrap(call(metadata.AppendToOutgoingContext(ctx, versionKey, version()), method, req, resp, cc, opts...))
}

func (c *Client) stream(ctx context.Context, d *grpc.StreamDesc, cc *grpc.ClientConn, method string, open grpc.Streamer, opts ...grpc.CallOption) (grpc.ClientStream, error) {
	s, err := open(metadata.AppendToOutgoingContext(ctx, versionKey, version()), d, cc, method, opts...)
	if err != nil {
		return nil, c.wrap(err)
	}
	return &streamOut{s, c}, nil
}

type streamOut struct {
	grpc.ClientStream
	c *Client
}

func (s *streamOut) RecvMsg(m any) error { return s.c.wrap(s.ClientStream.RecvMsg(m)) }
func (s *streamOut) SendMsg(m any) error { return s.c.wrap(s.ClientStream.SendMsg(m)) }
