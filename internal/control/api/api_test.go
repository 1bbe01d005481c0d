package api

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/reflection/grpc_reflection_v1"
	"google.golang.org/grpc/status"

	"github.com/unum-os/unum/internal/control"
	"github.com/unum-os/unum/internal/errs"
	"github.com/unum-os/unum/internal/need"
)

// anotherEnv makes this program a client of the socket it names, under whatever
// user it runs as.
const anotherEnv = "UNUM_TEST_ANOTHER"

func TestMain(m *testing.M) {
	if path := os.Getenv(anotherEnv); path != "" {
		os.Exit(another(path))
	}
	os.Exit(m.Run())
}

// daemon is both services with answers for tests.
type daemon struct {
	UnimplementedNodeServer
	UnimplementedJobsServer
	fail func() error

	mu      sync.Mutex
	peers   []control.Cred
	refused []string      // uid and method
	hangs   chan struct{} // Wait and Logs tell that they hang
	ended   chan error    // and how they ended
}

func (d *daemon) Status(ctx context.Context, _ *StatusRequest) (*StatusResponse, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.peers = append(d.peers, Peer(ctx))
	return &StatusResponse{Cluster: "c"}, nil
}

func (d *daemon) Healthy(context.Context, *HealthyRequest) (*HealthyResponse, error) {
	return &HealthyResponse{}, d.fail()
}

func (d *daemon) Token(context.Context, *TokenRequest) (*TokenResponse, error) {
	return &TokenResponse{Token: "t"}, nil
}

func (d *daemon) Kill(context.Context, *KillRequest) (*KillResponse, error) {
	return &KillResponse{}, nil
}

func (d *daemon) Wait(ctx context.Context, _ *WaitRequest) (*WaitResponse, error) {
	d.hangs <- struct{}{}
	<-ctx.Done()
	d.ended <- ctx.Err()
	return nil, ctx.Err()
}

func (d *daemon) Logs(req *LogsRequest, out grpc.ServerStreamingServer[LogsResponse]) error {
	if err := out.Send(&LogsResponse{Fd: 1, Data: make([]byte, req.Job)}); err != nil || !req.Follow {
		return err
	}
	d.hangs <- struct{}{}
	<-out.Context().Done()
	d.ended <- out.Context().Err()
	return fmt.Errorf("the source: %w", out.Context().Err())
}

func (d *daemon) Why(_ context.Context, r *WhyRequest) (*WhyResponse, error) {
	return &WhyResponse{Text: strings.Repeat("x", int(r.Job))}, nil
}

// start runs a daemon on a socket; stop ends it and returns what Run returned.
func start(t testing.TB, first time.Duration) (d *daemon, path string, stop func() error) {
	t.Helper()
	dir, err := os.MkdirTemp("", "unum-api-")
	if err != nil {
		t.Fatal(err)
	}
	os.Chmod(dir, 0o755)
	path = filepath.Join(dir, "sock")
	d = &daemon{fail: func() error { return nil }, hangs: make(chan struct{}, 8), ended: make(chan error, 8)}
	s := control.New(control.Config{Path: path, First: first, Log: slog.New(slog.NewTextHandler(io.Discard, nil))})
	calls := NewServer(first)
	calls.Refused = func(who control.Cred, method string, why error) {
		d.mu.Lock()
		defer d.mu.Unlock()
		d.refused = append(d.refused, fmt.Sprint(who.UID, " ", method, ": ", errs.ClassOf(why)))
	}
	s.HandleHTTP2(calls.Serve)
	s.Handle("echo", func(_ context.Context, c *control.Conn, req []byte) error { return c.Send(req) })
	RegisterNodeServer(calls, d)
	RegisterJobsServer(calls, d)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	stop = sync.OnceValue(func() error { cancel(); return <-done })
	t.Cleanup(func() {
		if err := stop(); err != nil {
			t.Error(err)
		}
		os.RemoveAll(dir)
	})
	await(t, "the daemon listens", func() bool {
		c, err := net.Dial("unix", path)
		if err == nil {
			c.Close()
		}
		return err == nil
	})
	return d, path, stop
}

func await(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(30 * time.Second); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("not within 30 s: %s", what)
		}
	}
}

func within(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), 60*time.Second)
	t.Cleanup(cancel)
	return ctx
}

func dial(t testing.TB, path string) *Client {
	t.Helper()
	c, err := Dial(within(t), path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

// TestAccess: whoever adds a method says who may call it, and what others are to
// type.
func TestAccess(t *testing.T) {
	s := NewServer(0)
	RegisterNodeServer(s, &daemon{})
	RegisterJobsServer(s, &daemon{})
	RegisterRecordServer(s, &UnimplementedRecordServer{})
	RegisterUsersServer(s, &UnimplementedUsersServer{})
	there := map[string]bool{}
	for service, info := range s.g.GetServiceInfo() {
		for _, m := range info.Methods {
			there["/"+service+"/"+m.Name] = true
		}
	}
	for services, i := File_unum_proto.Services(), 0; i < services.Len(); i++ {
		sd := services.Get(i)
		for j := range sd.Methods().Len() {
			m := fmt.Sprintf("/%s/%s", sd.FullName(), sd.Methods().Get(j).Name())
			if !there[m] {
				t.Errorf("%s is in unum.proto, and this test does not register it", m)
			}
		}
	}
	if len(there) < 11 {
		t.Errorf("only %d methods seen", len(there))
	}
	for m := range there {
		if _, ok := access[m]; !ok {
			t.Errorf("%s is not in the table access", m)
		}
	}
	for m, r := range access {
		if !there[m] {
			t.Errorf("%s is in the table access and nowhere else", m)
		}
		if r.admin != (r.try != "") {
			t.Errorf("%s: %+v", m, r)
		}
	}
}

// TestErrorsTravel: what comes back is what was returned: class, text and remedy,
// for every class there is.
func TestErrorsTravel(t *testing.T) {
	d, path, _ := start(t, 0)
	c := dial(t, path)
	ask := func(err error) error {
		d.fail = func() error { return err }
		_, got := c.Node.Healthy(within(t), &HealthyRequest{})
		return got
	}
	classes := 0
	for class := errs.Class(0); !strings.HasPrefix(class.String(), "class "); class++ {
		classes++
		if codes.Code(class.Code()) == codes.OK || class.Code() > uint32(codes.Unauthenticated) {
			t.Errorf("%v has the code %d", class, class.Code())
		}
		for _, sent := range []*errs.Error{
			errs.E(class, "open", "x", "it is full").WithRemedy("wait"),
			errs.E(class, "", "", "it is full"),
			{Op: "open", Class: class},
		} {
			got := ask(sent)
			var e *errs.Error
			if !errors.As(got, &e) || e.Class != class || e.Op != sent.Op || e.Subject != sent.Subject || e.Remedy != sent.Remedy || got.Error() != sent.Error() {
				t.Errorf("%v: sent %q, got %q", class, sent, got)
			}
			if s, _ := status.FromError(toStatus(sent)); s.Code() != codes.Code(class.Code()) {
				t.Errorf("%v: code %v", class, s.Code())
			}
		}
	}
	if classes < 29 {
		t.Errorf("only %d classes seen", classes)
	}
	inner := errs.E(errs.NoSpace, "write", "/unum/x", "3 bytes left").WithRemedy("free some")
	for _, sent := range []error{
		errs.Wrap(inner, "ship", "n1"),
		fmt.Errorf("at night: %w", inner),
		errors.Join(errors.New("two"), inner),
	} {
		got := ask(sent)
		var e *errs.Error
		if !errors.As(got, &e) || !errs.Has(got, errs.NoSpace) || e.Remedy != "free some" || got.Error() != sent.Error() {
			t.Errorf("sent %q, got %q", sent, got)
		}
	}
	for sent, class := range map[error]errs.Class{context.Canceled: errs.Interrupted, context.DeadlineExceeded: errs.Timeout,
		syscall.ENOSPC: errs.NoSpace, errors.New("\xff\xfe"): errs.Unknown} {
		if got := ask(sent); got == nil || errs.ClassOf(got) != class {
			t.Errorf("%v came as %v of class %v", sent, got, errs.ClassOf(got))
		}
	}
	long := strings.Repeat("y", 1<<20)
	if got := ask(errs.E(errs.Busy, long, long, "%s", long).WithRemedy("%s", long)); !errs.Has(got, errs.Busy) || len(got.Error()) > 4096 {
		t.Errorf("a long error came with %d bytes", len(got.Error()))
	}
	// A class of a later version keeps its number.
	if got := fromStatus(toStatus(&errs.Error{Class: 200, Err: errors.New("new")})); errs.ClassOf(got) != 200 || got.Error() != "new" {
		t.Errorf("%v", got)
	}
}

func TestNoDaemon(t *testing.T) {
	_, err := Dial(context.Background(), filepath.Join(t.TempDir(), "none"))
	if !errs.Has(err, errs.Unavailable) || !strings.HasPrefix(err.Error(), "no daemon is running on this machine (socket ") || !strings.HasSuffix(err.Error(), "\ntry: "+control.RemedyStart) {
		t.Errorf("%v", err)
	}
	// It goes away between two questions, and while one is asked.
	d, path, stop := start(t, 0)
	c := dial(t, path)
	if _, err := c.Node.Status(within(t), &StatusRequest{}); err != nil {
		t.Fatal(err)
	}
	got := make(chan error, 2)
	go func() {
		_, err := c.Jobs.Wait(within(t), &WaitRequest{})
		got <- err
	}()
	go func() {
		l, err := c.Jobs.Logs(within(t), &LogsRequest{Follow: true})
		for err == nil {
			_, err = l.Recv()
		}
		got <- err
	}()
	<-d.hangs
	<-d.hangs
	if err := stop(); err != nil {
		t.Error(err)
	}
	for range 2 {
		if err := <-got; !errs.Has(err, errs.Unavailable) || err.Error() != "the daemon is stopping" {
			t.Errorf("%v", err)
		}
		if err := <-d.ended; !errors.Is(err, context.Canceled) {
			t.Errorf("a handler ended by %v", err)
		}
	}
	if _, err := c.Node.Status(within(t), &StatusRequest{}); !errs.Has(err, errs.Unavailable) || !strings.HasSuffix(err.Error(), "\ntry: "+control.RemedyStart) {
		t.Errorf("%v", err)
	}
}

// TestOldDaemon: one that speaks frames only closes the connection; the command
// says so.
func TestOldDaemon(t *testing.T) {
	path := filepath.Join(t.TempDir(), "sock")
	s := control.New(control.Config{Path: path, Log: slog.New(slog.NewTextHandler(io.Discard, nil))})
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error)
	go func() { done <- s.Run(ctx) }()
	defer func() { cancel(); <-done }()
	await(t, "it listens", func() bool { _, err := os.Stat(path); return err == nil })
	var c *Client
	await(t, "it answers", func() (ok bool) { var err error; c, err = Dial(ctx, path); return err == nil })
	defer c.Close()
	_, err := c.Node.Status(within(t), &StatusRequest{})
	if !errs.Has(err, errs.Unavailable) || !strings.Contains(err.Error(), "an older version") {
		t.Errorf("%v", err)
	}
}

// TestCancel: a caller that goes away, or gives up, ends its call at the daemon.
func TestCancel(t *testing.T) {
	d, path, _ := start(t, 0)
	ctx, cancel := context.WithCancel(context.Background())
	got := make(chan error, 1)
	c := dial(t, path)
	go func() {
		_, err := c.Jobs.Wait(ctx, &WaitRequest{})
		got <- err
	}()
	<-d.hangs
	cancel()
	if err := <-got; !errs.Has(err, errs.Interrupted) {
		t.Errorf("%v", err)
	}
	<-d.ended
	if _, err := c.Jobs.Logs(within(t), &LogsRequest{Follow: true}); err != nil {
		t.Fatal(err)
	}
	<-d.hangs
	c.Close()
	<-d.ended
	ctx, cancel = context.WithTimeout(context.Background(), 50*time.Millisecond)
	defer cancel()
	if _, err := dial(t, path).Jobs.Wait(ctx, &WaitRequest{}); !errs.Has(err, errs.Timeout) {
		t.Errorf("%v", err)
	}
}

// TestVersions: programs of another version are told so.
func TestVersions(t *testing.T) {
	_, path, _ := start(t, 0)
	cc, err := grpc.NewClient("unix:"+path, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer cc.Close()
	call := func(version, method string) (string, error) {
		ctx := within(t)
		if version != "" {
			ctx = metadata.AppendToOutgoingContext(ctx, versionKey, version)
		}
		var h metadata.MD
		err := cc.Invoke(ctx, method, &StatusRequest{}, &StatusResponse{}, grpc.Header(&h))
		return strings.Join(h.Get(versionKey), ","), fromStatus(err)
	}
	const status = "/unum.v1.Node/Status"
	for _, v := range []struct{ version, method, want string }{
		{"", status, ""},
		{"1.3", status, ""},
		{"1.99", status, ""},
		{"2.0", status, "this command speaks version 2.0 of the control API, the daemon version 1.3"},
		{"x", status, "this command speaks version x of the control API"},
		{"", "/unum.v1.Node/Nosuch", "the daemon does not know /unum.v1.Node/Nosuch"},
		{"1.99", "/unum.v1.Node/Nosuch", "the daemon does not know /unum.v1.Node/Nosuch: it speaks version 1.3 of the control API, this command version 1.99\ntry: restart"},
		{"2.0", "/unum.v2.Node/Status", "this command speaks version 2.0"},
		{"", "/unum.v2.Node/Status", "the daemon does not know /unum.v2.Node/Status"},
	} {
		says, err := call(v.version, v.method)
		if says != "1.3" {
			t.Errorf("%v: the daemon says version %q", v, says)
		}
		if v.want == "" && err != nil || v.want != "" && (!errs.Has(err, errs.NotSupported) || !strings.HasPrefix(err.Error(), v.want)) {
			t.Errorf("%+v: %v", v, err)
		}
	}
}

// TestReflection: a foreign client finds the services by itself.
func TestReflection(t *testing.T) {
	_, path, _ := start(t, 0)
	cc, err := grpc.NewClient("unix:"+path, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer cc.Close()
	s, err := grpc_reflection_v1.NewServerReflectionClient(cc).ServerReflectionInfo(within(t))
	if err != nil {
		t.Fatal(err)
	}
	ask := func(q *grpc_reflection_v1.ServerReflectionRequest) *grpc_reflection_v1.ServerReflectionResponse {
		if err := s.Send(q); err != nil {
			t.Fatal(err)
		}
		r, err := s.Recv()
		if err != nil {
			t.Fatal(err)
		}
		return r
	}
	var names []string
	for _, x := range ask(&grpc_reflection_v1.ServerReflectionRequest{MessageRequest: &grpc_reflection_v1.ServerReflectionRequest_ListServices{}}).GetListServicesResponse().GetService() {
		names = append(names, x.Name)
	}
	for _, want := range []string{"unum.v1.Node", "unum.v1.Jobs", "grpc.reflection.v1.ServerReflection"} {
		if !slices.Contains(names, want) {
			t.Errorf("no %s in %v", want, names)
		}
	}
	r := ask(&grpc_reflection_v1.ServerReflectionRequest{MessageRequest: &grpc_reflection_v1.ServerReflectionRequest_FileContainingSymbol{FileContainingSymbol: "unum.v1.Jobs"}})
	if fs := r.GetFileDescriptorResponse().GetFileDescriptorProto(); len(fs) == 0 || !strings.Contains(string(fs[0]), "ListJobsRequest") {
		t.Errorf("%v", r)
	}
}

// TestPeer: who asks is what the kernel says, for calls and for streams.
func TestPeer(t *testing.T) {
	d, path, _ := start(t, 0)
	c := dial(t, path)
	if _, err := c.Node.Status(within(t), &StatusRequest{}); err != nil {
		t.Fatal(err)
	}
	d.mu.Lock()
	me := d.peers[0]
	d.mu.Unlock()
	if int(me.UID) != os.Geteuid() || int(me.GID) != os.Getegid() || me.PID != os.Getpid() {
		t.Errorf("%+v", me)
	}
	if _, err := c.Node.Token(within(t), &TokenRequest{}); err != nil {
		t.Errorf("the daemon's own user: %v", err)
	}
	if nobody := Peer(context.Background()); nobody.Root() || int(nobody.UID) == os.Geteuid() {
		t.Errorf("%+v", nobody)
	}
}

// TestAnotherUser: he may ask, may not administer, and cannot lock others out.
func TestAnotherUser(t *testing.T) {
	need.Root(t, "to be another user")
	d, path, _ := start(t, time.Minute)               // he takes his time
	self := filepath.Join(filepath.Dir(path), "self") // where he can read it
	need.Self(t, self)
	cmd := exec.Command(self)
	cmd.Dir = "/"
	cmd.Env = []string{anotherEnv + "=" + path}
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 1234, Gid: 6, Groups: []uint32{7, 8}}}
	hold, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	said, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	out, err := io.ReadAll(said) // he closes it when he holds all he can
	if err != nil {
		t.Fatal(err)
	}
	const want = `status: ok
token: only root may do this
try: sudo unum token
one more: too many connections to the daemon
a frame: too many connections to the daemon
`
	if string(out) != want {
		t.Errorf("he was told\n%s", out)
	}
	if _, err := dial(t, path).Node.Status(within(t), &StatusRequest{}); err != nil {
		t.Errorf("while he holds all he can: %v", err)
	}
	hold.Close()
	if err := cmd.Wait(); err != nil {
		t.Error(err)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if want := fmt.Sprint("1234 ", Node_Token_FullMethodName, ": ", errs.Permission); !slices.Equal(d.refused, []string{want}) {
		t.Errorf("told of refusals: %q, want %q", d.refused, want)
	}
	if him := d.peers[0]; him.UID != 1234 || him.GID != 6 || !slices.Equal(him.Groups, []uint32{7, 8}) || him.PID != cmd.Process.Pid {
		t.Errorf("%+v", him)
	}
}

// another is the other user.
func another(path string) int {
	ctx, cancel := context.WithTimeout(context.Background(), 60*time.Second)
	defer cancel()
	say := func(what string, err error) {
		if err != nil {
			fmt.Printf("%s: %v\n", what, err)
		} else {
			fmt.Println(what + ": ok")
		}
	}
	c, err := Dial(ctx, path)
	if err != nil {
		fmt.Println(err)
		return 1
	}
	_, err = c.Node.Status(ctx, &StatusRequest{})
	say("status", err)
	_, err = c.Node.Token(ctx, &TokenRequest{})
	say("token", err)
	// As many as he gets, each with a call that does not end.
	var held []net.Conn
	for range 2000 {
		conn, err := net.Dial("unix", path)
		if err != nil {
			fmt.Println(err)
			return 1
		}
		conn.Write(opening())
		b := make([]byte, 5)
		if _, err := io.ReadFull(conn, b); err != nil || b[4] == 'E' {
			conn.Close()
			break
		}
		held = append(held, conn)
	}
	more, err := Dial(ctx, path)
	if err == nil {
		_, err = more.Node.Status(ctx, &StatusRequest{})
	}
	say("one more", err)
	f, err := control.Dial(ctx, path)
	if err == nil {
		_, err = f.Call(ctx, "echo", nil)
	}
	say("a frame", err)
	os.Stdout.Close()
	io.Copy(io.Discard, os.Stdin)
	if len(held) < 400 {
		return 1
	}
	return 0
}
