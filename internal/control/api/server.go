package api

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/grpclog"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/reflection"
	"google.golang.org/grpc/stats"

	"github.com/unum-os/unum/internal/control"
	"github.com/unum-os/unum/internal/errs"
)

// Bounds. A connection can make the daemon hold maxStreams requests, together no
// more than one frame (control.MaxFrame).
const (
	MaxRequest  = 256 << 10        // bytes of a message to the daemon
	MaxResponse = control.MaxFrame // bytes of a message of the daemon

	maxStreams = 32       // calls at a time of one connection
	maxHeaders = 16 << 10 // bytes of a call's headers
	window     = 64 << 10 // bytes in flight of one call; four times that of a connection
	// firstLimit is how long a call's first message may take, and how long a
	// connection may be without calls.
	firstLimit = 10 * time.Second
)

func init() {
	// gRPC's own log goes to stderr, where a command's user would see it. What it
	// has to say comes back as errors.
	grpclog.SetLoggerV2(grpclog.NewLoggerV2(io.Discard, io.Discard, io.Discard))
}

// Server is the daemon's side. Services are registered with it before Serve.
type Server struct {
	// Refused is told, before Serve is called set if at all, what was refused to
	// whom by the table access. It must not wait.
	Refused func(who control.Cred, method string, why error)

	g    *grpc.Server
	base context.Context // of Serve, set before it accepts
}

// NewServer returns a server that closes connections without a call, and calls
// without a message, after first; 0 is ten seconds.
func NewServer(first time.Duration) *Server {
	if first == 0 {
		first = firstLimit
	}
	s := &Server{}
	s.g = grpc.NewServer(
		grpc.Creds(kernelCreds{}),
		grpc.MaxRecvMsgSize(MaxRequest), grpc.MaxSendMsgSize(MaxResponse),
		grpc.MaxConcurrentStreams(maxStreams), grpc.MaxHeaderListSize(maxHeaders),
		grpc.StaticStreamWindowSize(window), grpc.StaticConnWindowSize(4*window),
		grpc.ReadBufferSize(8<<10), grpc.WriteBufferSize(32<<10),
		grpc.ConnectionTimeout(first),
		grpc.KeepaliveParams(keepalive.ServerParameters{MaxConnectionIdle: first}),
		grpc.StatsHandler(firstMessage(first)),
		grpc.WaitForHandlers(true),
		grpc.UnaryInterceptor(s.unary), grpc.StreamInterceptor(s.stream),
		grpc.UnknownServiceHandler(func(_ any, ss grpc.ServerStream) error {
			m, _ := grpc.MethodFromServerStream(ss)
			return unknown(ss.Context(), m)
		}),
	)
	reflection.Register(s.g)
	return s
}

// RegisterService is what the generated Register functions call.
func (s *Server) RegisterService(d *grpc.ServiceDesc, impl any) { s.g.RegisterService(d, impl) }

// Serve answers the connections of l, which are of type *control.Known, until ctx
// ends. Then calls under way are cancelled; it returns when they have ended and
// the connections are closed, which the caller does in the end.
func (s *Server) Serve(ctx context.Context, l net.Listener) error {
	s.base = ctx
	stopped := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(stopped)
		s.g.GracefulStop()
	})
	err := s.g.Serve(l)
	if !stop() {
		<-stopped
		return nil
	}
	s.g.Stop()
	return err
}

// begin lets a call in: its context ends with the server's too.
func (s *Server) begin(ctx context.Context, method string) (context.Context, context.CancelCauseFunc, error) {
	if err := grpc.SetHeader(ctx, metadata.Pairs(versionKey, version())); err != nil {
		return nil, nil, err
	}
	if err := fits(ctx); err != nil {
		return nil, nil, err
	}
	r, ok := access[method]
	if !ok {
		return nil, nil, unknown(ctx, method)
	}
	if c := Peer(ctx); r.admin && !c.Root() && int(c.UID) != os.Geteuid() {
		err := errs.E(errs.Permission, "", "", "only root may do this").WithRemedy("%s", r.try)
		if s.Refused != nil {
			s.Refused(c, method, err)
		}
		return nil, nil, err
	}
	ctx, cancel := context.WithCancelCause(ctx)
	stop := context.AfterFunc(s.base, func() { cancel(errStopping) })
	return ctx, func(err error) { stop(); cancel(err) }, nil
}

var errStopping = errs.E(errs.Unavailable, "", "", "the daemon is stopping")

// finish gives a call's error its form.
func finish(ctx context.Context, err error) error {
	if err != nil && errors.Is(context.Cause(ctx), errStopping) {
		err = errStopping
	}
	return toStatus(err)
}

// sayWhy is kept of a caller's time to tell it why there is no answer.
const sayWhy = time.Second

func (s *Server) unary(ctx context.Context, req any, info *grpc.UnaryServerInfo, h grpc.UnaryHandler) (any, error) {
	ctx, cancel, err := s.begin(ctx, info.FullMethod)
	if err != nil {
		return nil, toStatus(err)
	}
	defer cancel(nil)
	if end, ok := ctx.Deadline(); ok { // what keeps the answer away is said before the caller gives up
		left := time.Until(end)
		var stop context.CancelFunc
		ctx, stop = context.WithDeadline(ctx, end.Add(-min(sayWhy, left/10)))
		defer stop()
	}
	resp, err := h(ctx, req)
	return resp, finish(ctx, err)
}

func (s *Server) stream(srv any, ss grpc.ServerStream, info *grpc.StreamServerInfo, h grpc.StreamHandler) error {
	ctx, cancel, err := s.begin(ss.Context(), info.FullMethod)
	if err != nil {
		return toStatus(err)
	}
	defer cancel(nil)
	return finish(ctx, h(srv, &streamIn{ss, ctx}))
}

// streamIn is a stream whose context is the one that begin made.
type streamIn struct {
	grpc.ServerStream
	ctx context.Context
}

func (s *streamIn) Context() context.Context { return s.ctx }

// Peer returns who asks, by the kernel's word. In a context that is not of a call
// that is a user who may nothing.
func Peer(ctx context.Context) control.Cred {
	if k := known(ctx); k != nil {
		return k.Peer
	}
	const nobody = ^uint32(0)
	return control.Cred{UID: nobody, GID: nobody}
}

// WithPeer returns a context in which Peer says c: that of a call without a
// connection.
func WithPeer(ctx context.Context, c control.Cred) context.Context {
	return peer.NewContext(ctx, &peer.Peer{AuthInfo: who{Known: &control.Known{Peer: c}}})
}

func known(ctx context.Context) *control.Known {
	if p, ok := peer.FromContext(ctx); ok {
		if w, ok := p.AuthInfo.(who); ok {
			return w.Known
		}
	}
	return nil
}

// who is what a connection knows of its peer.
type who struct {
	credentials.CommonAuthInfo
	*control.Known
}

func (who) AuthType() string { return "unix" }

// kernelCreds are the credentials of a unix socket: the kernel has vouched for
// the peer before the connection came here.
type kernelCreds struct{}

func (kernelCreds) ServerHandshake(c net.Conn) (net.Conn, credentials.AuthInfo, error) {
	k, ok := c.(*control.Known)
	if !ok {
		return nil, nil, errors.New("the connection's peer is not known")
	}
	return c, who{credentials.CommonAuthInfo{SecurityLevel: credentials.PrivacyAndIntegrity}, k}, nil
}

func (kernelCreds) ClientHandshake(context.Context, string, net.Conn) (net.Conn, credentials.AuthInfo, error) {
	return nil, nil, errors.New("not for clients")
}

func (kernelCreds) Info() credentials.ProtocolInfo {
	return credentials.ProtocolInfo{SecurityProtocol: "unix"}
}
func (k kernelCreds) Clone() credentials.TransportCredentials { return k }
func (kernelCreds) OverrideServerName(string) error           { return nil }

// firstMessage closes the connection of a call whose first message does not come
// in time: until then the call costs the daemon memory and its user nothing.
type firstMessage time.Duration

type timerKey struct{}

func (f firstMessage) TagRPC(ctx context.Context, _ *stats.RPCTagInfo) context.Context {
	k := known(ctx)
	if k == nil {
		return ctx
	}
	return context.WithValue(ctx, timerKey{}, time.AfterFunc(time.Duration(f), func() { k.Close() }))
}

func (f firstMessage) HandleRPC(ctx context.Context, s stats.RPCStats) {
	switch s.(type) {
	case *stats.InPayload, *stats.End:
		if t, ok := ctx.Value(timerKey{}).(*time.Timer); ok {
			t.Stop()
		}
	}
}

func (firstMessage) TagConn(ctx context.Context, _ *stats.ConnTagInfo) context.Context { return ctx }
func (firstMessage) HandleConn(context.Context, stats.ConnStats)                       {}
