package proc

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/unum-os/unum/internal/control"
	"github.com/unum-os/unum/internal/control/api"
	"github.com/unum-os/unum/internal/errs"
	"github.com/unum-os/unum/internal/ids"
	"github.com/unum-os/unum/internal/need"
	"github.com/unum-os/unum/internal/wire"
)

// unumBin is the light binary, built once.
var unumBin string

func TestMain(m *testing.M) {
	if os.Getenv(greedyEnv) != "" {
		os.Exit(greedy())
	}
	dir, err := os.MkdirTemp("", "unum-proc-test-")
	if err != nil {
		panic(err)
	}
	os.Chmod(dir, 0o755)
	unumBin = filepath.Join(dir, "unum")
	b := exec.Command("go", "build", "-o", unumBin, "github.com/unum-os/unum/cmd/unum")
	b.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := b.CombinedOutput(); err != nil {
		fmt.Fprintf(os.Stderr, "build: %v\n%s", err, out)
		os.Exit(1)
	}
	code := m.Run()
	os.RemoveAll(dir)
	os.Exit(code)
}

// fabric joins endpoints in this process by socket pairs, which can be cut: then
// what is sent is lost and nobody is told.
type fabric struct {
	mu    sync.Mutex
	nodes map[ids.Node]*endpoint
	cut   atomic.Bool
	down  atomic.Bool // dial is refused
}

type endpoint struct {
	f        *fabric
	self     ids.Node
	handlers map[string]func(context.Context, ids.Node, []byte, []byte) (any, []byte, error)
	streams  map[string]func(context.Context, ids.Node, net.Conn)
	ctx      context.Context
	wg       *sync.WaitGroup
	dials    atomic.Int64
}

func (f *fabric) endpoint(ctx context.Context, wg *sync.WaitGroup, n ids.Node) *endpoint {
	f.mu.Lock()
	defer f.mu.Unlock()
	e := &endpoint{f: f, self: n, ctx: ctx, wg: wg, handlers: map[string]func(context.Context, ids.Node, []byte, []byte) (any, []byte, error){}, streams: map[string]func(context.Context, ids.Node, net.Conn){}}
	f.nodes[n] = e
	return e
}

func (f *fabric) get(n ids.Node) *endpoint {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.nodes[n]
}

func (e *endpoint) Handle(m string, h func(context.Context, ids.Node, []byte, []byte) (any, []byte, error)) {
	e.handlers[m] = h
}
func (e *endpoint) HandleStream(s string, h func(context.Context, ids.Node, net.Conn)) {
	e.streams[s] = h
}

func (e *endpoint) Call(ctx context.Context, to ids.Node, method string, req any, data []byte, resp any) ([]byte, error) {
	p := e.f.get(to)
	if p == nil || (to != e.self && (e.f.down.Load() || e.f.cut.Load())) {
		return nil, errs.E(errs.Unavailable, "call", to.String(), "not reachable")
	}
	r, d, err := p.handlers[method](ctx, e.self, wire.MustMarshal(req), data)
	if err != nil {
		return nil, err
	}
	if resp != nil {
		return d, wire.Unmarshal(wire.MustMarshal(r), resp)
	}
	return d, nil
}

func (e *endpoint) Dial(ctx context.Context, to ids.Node, service string) (net.Conn, error) {
	e.dials.Add(1)
	p := e.f.get(to)
	if p == nil || (to != e.self && e.f.down.Load()) {
		return nil, errs.E(errs.Unavailable, "dial", to.String(), "not reachable")
	}
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	var cs [2]net.Conn
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "pair")
		c, err := net.FileConn(f)
		f.Close()
		if err != nil {
			return nil, err
		}
		cs[i] = &cuttable{Conn: c, f: e.f, remote: to != e.self, closed: make(chan struct{})}
	}
	p.wg.Add(1)
	go func() {
		defer p.wg.Done()
		defer cs[1].Close()
		p.streams[service](p.ctx, e.self, cs[1])
	}()
	return cs[0], nil
}

type cuttable struct {
	net.Conn
	f      *fabric
	remote bool
	once   sync.Once
	closed chan struct{}
}

func (c *cuttable) Close() error {
	c.once.Do(func() { close(c.closed) })
	return c.Conn.Close()
}
func (c *cuttable) Write(b []byte) (int, error) {
	if c.remote && c.f.cut.Load() {
		return len(b), nil
	}
	return c.Conn.Write(b)
}
func (c *cuttable) Read(b []byte) (int, error) {
	for {
		n, err := c.Conn.Read(b)
		if c.remote && c.f.cut.Load() {
			if err == nil {
				continue // lost
			}
			if err == io.EOF { // the other end closed; a cut hides that too
				<-c.closed
			}
		}
		return n, err
	}
}
func (c *cuttable) CloseWrite() error {
	if c.remote && c.f.cut.Load() {
		return nil
	}
	return c.Conn.(*net.UnixConn).CloseWrite()
}

// registry is the record, in memory.
type registry struct {
	mu   sync.Mutex
	next ids.Job
	jobs map[ids.Job]JobRecord
}

func (r *registry) NewID(context.Context) (ids.Job, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.next++
	return r.next, nil
}
func (r *registry) Put(j JobRecord) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if old, ok := r.jobs[j.Job]; !ok || j.Supersedes(&old) {
		r.jobs[j.Job] = j
	}
}
func (r *registry) Get(_ context.Context, id ids.Job) (JobRecord, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	j, ok := r.jobs[id]
	if !ok {
		return j, errs.E(errs.NotFound, "", "", "no job %d", id)
	}
	return j, nil
}
func (r *registry) List(context.Context) ([]JobRecord, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	var out []JobRecord
	for _, j := range r.jobs {
		out = append(out, j)
	}
	return out, nil
}

// rig is two nodes; n1 is the home, everything goes to n2 unless said otherwise.
type rig struct {
	t      testing.TB
	f      *fabric
	reg    *registry
	sock   string
	mgrs   map[ids.Node]*Manager
	home   *Home
	accept atomic.Pointer[func(Demand) error]
	dirs   map[ids.Node]string
	cgroup string
	stop   func()
}

func newRig(t testing.TB) *rig {
	t.Helper()
	need.Root(t, "jobs are started in namespaces of their own")
	r := &rig{t: t, f: &fabric{nodes: map[ids.Node]*endpoint{}}, reg: &registry{jobs: map[ids.Job]JobRecord{}}, mgrs: map[ids.Node]*Manager{}, dirs: map[ids.Node]string{}}
	dir, err := os.MkdirTemp("", "unum-rig-")
	if err != nil {
		t.Fatal(err)
	}
	os.Chmod(dir, 0o755)
	t.Cleanup(func() { os.RemoveAll(dir) })
	r.sock = filepath.Join(dir, "sock")
	r.cgroup = "unum-test-" + filepath.Base(dir)
	r.dirs[1], r.dirs[2] = filepath.Join(dir, "n1"), filepath.Join(dir, "n2")
	r.up()
	t.Cleanup(func() { r.stop() })
	return r
}

func (r *rig) up() {
	log := slog.New(slog.NewTextHandler(testWriter{r.t}, nil))
	ctx, cancel := context.WithCancel(context.Background())
	var wg, streams sync.WaitGroup
	for n := ids.Node(1); n <= 2; n++ {
		e := r.f.endpoint(ctx, &streams, n)
		m, err := NewManager(ManagerConfig{Self: n, RPC: e, Registry: r.reg, Log: log, Dir: r.dirs[n], Exe: unumBin, Cgroup: r.cgroup + "/" + n.String(), Socket: r.sock,
			Accept: func(d Demand) error {
				if f := r.accept.Load(); f != nil {
					return (*f)(d)
				}
				return nil
			}})
		if err != nil {
			r.t.Fatal(err)
		}
		r.mgrs[n] = m
		wg.Add(1)
		go func() { defer wg.Done(); m.Run(ctx) }()
	}
	for n := ids.Node(1); n <= 2; n++ {
		for {
			r.mgrs[n].mu.Lock()
			ok := r.mgrs[n].base != nil
			r.mgrs[n].mu.Unlock()
			if ok {
				break
			}
			time.Sleep(time.Millisecond)
		}
	}
	resolve := func(s string) (ids.Node, error) {
		n, err := ids.ParseNode(s)
		if err != nil || n > 2 {
			return 0, errs.E(errs.NotFound, "", "", "no node %s", s)
		}
		return n, nil
	}
	r.home = NewHome(HomeConfig{Self: 1, RPC: r.f.get(1), Registry: r.reg, Log: log, Resolve: resolve,
		Place: func(_ context.Context, d Demand) (ids.Node, []byte, error) {
			for _, n := range []ids.Node{2, 1} {
				ok := true
				for _, x := range d.Not {
					ok = ok && x != n
				}
				if ok {
					return n, []byte("receipt"), nil
				}
			}
			return 0, nil, errs.E(errs.Busy, "", "", "no node left")
		},
		Members: func() []ids.Node { return []ids.Node{1, 2} },
		Host:    func(n ids.Node) string { return "host" + n.String()[1:] },
		Explain: func(b []byte, json bool) (string, error) { return string(b), nil },
	})
	s := control.New(control.Config{Path: r.sock, Log: log})
	calls := api.NewServer(0)
	s.HandleHTTP2(calls.Serve)
	r.home.Register(s, calls)
	wg.Add(1)
	ready := make(chan struct{})
	go func() {
		defer wg.Done()
		close(ready)
		s.Run(ctx)
	}()
	<-ready
	for {
		if c, err := control.Dial(ctx, r.sock); err == nil {
			c.Close()
			break
		}
		time.Sleep(time.Millisecond)
	}
	r.stop = func() {
		cancel()
		wg.Wait()
		streams.Wait()
		// The base of this rig's groups, shared by its nodes.
		for _, h := range []string{"cpuacct", "memory", "pids", "freezer", ""} {
			os.Remove(filepath.Join("/sys/fs/cgroup", h, r.cgroup))
		}
	}
}

type testWriter struct{ t testing.TB }

func (w testWriter) Write(b []byte) (int, error) {
	fmt.Fprint(os.Stderr, strings.TrimRight(string(b), "\n")+"\n")
	return len(b), nil
}

// cmd makes the command line for `unum ARGS...`.
func (r *rig) cmd(args ...string) *exec.Cmd {
	c := exec.Command(unumBin, args...)
	c.Env = append(os.Environ(), "UNUM_SOCKET="+r.sock)
	c.Dir = "/"
	return c
}

type result struct {
	code     int
	out, err string
}

func (r *rig) run(stdin io.Reader, args ...string) result {
	r.t.Helper()
	return r.finish(r.cmd(args...), stdin)
}

func (r *rig) finish(c *exec.Cmd, stdin io.Reader) result {
	r.t.Helper()
	var out, errb strings.Builder
	c.Stdin, c.Stdout, c.Stderr = stdin, &out, &errb
	err := c.Run()
	if _, ok := err.(*exec.ExitError); err != nil && !ok {
		r.t.Fatalf("%v: %v", c.Args, err)
	}
	code := c.ProcessState.ExitCode()
	if ws := c.ProcessState.Sys().(syscall.WaitStatus); ws.Signaled() {
		code = -int(ws.Signal())
	}
	return result{code, out.String(), errb.String()}
}
