package main

import (
	"bufio"
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"runtime/pprof"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/cockroachdb/pebble/v2"

	"github.com/unum-os/unum/internal/disk"
	"github.com/unum-os/unum/internal/errs"
	"github.com/unum-os/unum/internal/group"
	"github.com/unum-os/unum/internal/identity"
	"github.com/unum-os/unum/internal/ids"
	"github.com/unum-os/unum/internal/principal"
	"github.com/unum-os/unum/internal/record"
	"github.com/unum-os/unum/internal/rpc"
	"github.com/unum-os/unum/internal/wire"
)

// The groups of a host: the first takes bare commands, the second is a record,
// the others idle.
const (
	bareGroup   ids.Group = 1
	recordGroup ids.Group = 2
)

// bare stores a command under its first bytes.
type bare struct{}

func (bare) Apply(b *pebble.Batch, s group.Space, _ uint64, cmd []byte) any {
	if err := b.Set(s.Key(cmd[:8]), cmd, nil); err != nil {
		panic(err)
	}
	return nil
}

func (bare) Applied(uint64) {}

// question is what a host is asked on its standard input; the answer, a line of
// JSON, goes to its standard output.
type question struct {
	What    string // see ask
	Workers int
	Time    time.Duration
	N       int
	To      ids.Node
	File    string
}

// answer is all that a host may answer.
type answer struct {
	Err    string        `json:",omitempty"`
	Result result        `json:",omitzero"`
	Leader [3]ids.Node   `json:",omitzero"` // of the bare group, of the record, of the last
	Usage  usage         `json:",omitzero"`
	Gap    time.Duration `json:",omitzero"`
}

// host is one process of three.
type host struct {
	id    ids.Node
	addrs []string
	dir   string
	n     int
	ep    *rpc.Endpoint
	h     *group.Host
	turn  atomic.Uint64 // of the record's commands
	me    uint64

	profile *os.File
}

type transport struct{ ep *rpc.Endpoint }

func (t transport) Send(to ids.Node, msg []byte) error {
	return t.ep.Cast(to, group.Method, struct{}{}, msg)
}

func (t transport) Dial(ctx context.Context, to ids.Node, service string) (net.Conn, error) {
	return t.ep.Dial(ctx, to, service)
}

func hostVerb(fs *flag.FlagSet) func() error {
	id := fs.Uint("id", 1, "number of this node")
	dir := fs.String("dir", "", "its directory, with ca.crt, node.crt, node.key")
	addrs := fs.String("addrs", "", "where the nodes listen")
	groups := fs.Int("groups", 2, "how many groups")
	return func() error {
		h := &host{id: ids.Node(*id), addrs: strings.Split(*addrs, ","), dir: *dir, n: *groups, me: rand.Uint64() | 1}
		return h.serve()
	}
}

// start opens endpoint and groups and runs them until ctx ends.
func (h *host) start(ctx context.Context) (func() error, error) {
	log := slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelWarn}))
	file := func(name string) []byte {
		b, err := identity.Load(disk.Real, filepath.Join(h.dir, name))
		if err != nil {
			panic(err)
		}
		return b
	}
	trust, err := identity.ParseTrust(file("ca.crt"))
	if err != nil {
		return nil, err
	}
	cert, err := identity.NewHolder(trust, file("node.crt"), file("node.key"))
	if err != nil {
		return nil, err
	}
	h.ep, err = rpc.New(rpc.Config{Self: h.id, Cert: cert, ListenAddr: h.addrs[h.id-1], Log: log,
		Resolve: func(n ids.Node) (string, bool) { return h.addrs[n-1], true }})
	if err != nil {
		return nil, err
	}
	h.h, err = group.New(group.Config{Self: h.id, Dir: filepath.Join(h.dir, "groups"), Transport: transport{h.ep}, Log: log})
	if err != nil {
		return nil, err
	}
	h.ep.HandleCast(group.Method, func(from ids.Node, _, msg []byte) { h.h.Receive(from, msg) })
	h.ep.HandleStream(group.Service, func(ctx context.Context, from ids.Node, c net.Conn) { h.h.ReceiveSnapshot(ctx, from, c) })
	h.ep.Handle("nothing", func(context.Context, ids.Node, []byte, []byte) (any, []byte, error) { return nil, nil, nil })
	for g := ids.Group(1); g <= ids.Group(h.n); g++ {
		if err := h.h.Bootstrap(g, []ids.Node{1, 2, 3}); err != nil && !errs.Has(err, errs.Exists) {
			return nil, err
		}
		var m group.Machine = bare{}
		if g == recordGroup {
			m = &record.Machine{}
		}
		if _, err := h.h.Open(g, m); err != nil {
			return nil, err
		}
	}
	favour()
	ctx, cancel := context.WithCancel(ctx)
	ended := make(chan error, 3)
	go func() { ended <- h.ep.Run(ctx) }()
	go func() { ended <- h.h.Run(ctx) }()
	go func() { ended <- echo(echoAddr(h.addrs[h.id-1])) }()
	return func() error { cancel(); return <-ended }, nil
}

// favour does what the daemon does for itself (package node): precedence, and
// coarse timers. The niceness itself was given at the start.
func favour() {
	os.WriteFile("/proc/self/autogroup", []byte("-10"), 0)
	tasks, _ := os.ReadDir("/proc/self/task")
	for _, t := range tasks {
		os.WriteFile("/proc/"+t.Name()+"/timerslack_ns", []byte("1000000"), 0)
	}
}

// echoAddr is where the echo beside an endpoint listens.
func echoAddr(addr string) string {
	ip, port, _ := net.SplitHostPort(addr)
	return net.JoinHostPort(ip, "1"+port)
}

// serve answers questions until there are no more.
func (h *host) serve() error {
	stop, err := h.start(context.Background())
	if err != nil {
		return err
	}
	out := json.NewEncoder(os.Stdout)
	in := bufio.NewScanner(os.Stdin)
	for in.Scan() {
		var q question
		if err := json.Unmarshal(in.Bytes(), &q); err != nil {
			return err
		}
		a, err := h.ask(q)
		if err != nil {
			a.Err = err.Error()
		}
		if err := out.Encode(a); err != nil {
			return err
		}
	}
	return stop()
}

func (h *host) ask(q question) (a answer, err error) {
	switch q.What {
	case "disk":
		a.Result, err = syncs(h.dir, q.N)
	case "rtt":
		a.Result, err = trips(echoAddr(h.addrs[q.To-1]), q.N)
	case "call":
		a.Result, err = load(q.Workers, q.Time, func(ctx context.Context, _, _ int) error {
			_, err := h.ep.Call(ctx, q.To, "nothing", struct{}{}, nil, nil)
			return err
		})
	case "propose":
		a.Result, err = h.propose(q)
	case "batch":
		a.Result, err = h.batch(q)
	case "read":
		g := h.h.Group(bareGroup)
		a.Result, err = load(q.Workers, q.Time, func(ctx context.Context, _, _ int) error {
			_, err := g.ReadIndex(ctx)
			return err
		})
	case "status":
		for i, g := range []ids.Group{bareGroup, recordGroup, ids.Group(h.n)} {
			a.Leader[i], _ = h.h.Group(g).Leader()
		}
	case "lead":
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		for g := ids.Group(1); g <= ids.Group(h.n) && err == nil; g++ {
			if r := h.h.Group(g); r.IsLeader() && h.id != q.To {
				err = r.TransferLeadership(ctx, q.To)
			}
		}
	case "usage":
		a.Usage, err = usageOf(os.Getpid())
	case "profile": // begin one, or end it
		if h.profile != nil {
			pprof.StopCPUProfile()
			err, h.profile = h.profile.Close(), nil
		} else if h.profile, err = os.Create(q.File); err == nil {
			err = pprof.StartCPUProfile(h.profile)
		}
	case "gap":
		a.Gap, err = h.gap(q.Time)
	default:
		err = fmt.Errorf("what is %q?", q.What)
	}
	return a, err
}

func (h *host) propose(q question) (result, error) {
	g := h.h.Group(bareGroup)
	return load(q.Workers, q.Time, func(ctx context.Context, w, i int) error {
		cmd := make([]byte, 200)
		cmd[0], cmd[1], cmd[2], cmd[3] = byte(w), byte(w>>8), byte(i), byte(i>>8)
		_, _, err := g.Propose(ctx, cmd)
		return err
	})
}

// batch proposes batches of puts to the record. The rate counts puts.
func (h *host) batch(q question) (result, error) {
	g := h.h.Group(recordGroup)
	do := func(ctx context.Context, c record.Command) error {
		cmd, err := wire.Marshal(c)
		if err != nil {
			return err
		}
		res, _, err := g.Propose(ctx, cmd)
		if err != nil {
			return err
		}
		r := res.(*record.Result)
		if len(r.Keys) > 0 {
			r.Refusal = r.Keys[len(r.Keys)-1].Refusal
		}
		return r.Refusal.Error("record", "")
	}
	err := do(context.Background(), record.Command{Client: h.me, Seq: h.turn.Add(1), Who: principal.Of(1), Init: &record.Init{ClusterID: [16]byte{1}, Name: "bench",
		CACert: []byte("none"), Hostname: "n1", Addr: h.addrs[0], Key: record.KeyHash{1}, Now: time.Now().UnixNano()}})
	if err != nil && !errs.Has(err, errs.Exists) {
		return result{}, err
	}
	value := make([]byte, 110)
	var mu sync.Mutex
	flying := map[uint64]bool{}
	r, err := load(q.Workers, q.Time, func(ctx context.Context, w, i int) error {
		c := record.Command{Client: h.me, Who: principal.Principal{Node: 1, UID: 1000}, Now: time.Now().UnixNano(), Batch: make([]record.Put, record.MaxBatch)}
		for k := range c.Batch {
			c.Batch[k] = record.Put{Key: fmt.Sprintf("user/1000/k%d", k), Value: value}
		}
		mu.Lock()
		c.Seq = h.turn.Add(1)
		flying[c.Seq] = true
		c.Acked = c.Seq
		for s := range flying {
			c.Acked = min(c.Acked, s)
		}
		mu.Unlock()
		err := do(ctx, c)
		mu.Lock()
		delete(flying, c.Seq)
		mu.Unlock()
		return err
	})
	r.Rate *= record.MaxBatch
	return r, err
}

// gap proposes all the time, as soon as this host leads, until something was
// acknowledged; it returns how long that took.
func (h *host) gap(limit time.Duration) (time.Duration, error) {
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	g := h.h.Group(bareGroup)
	begin := time.Now()
	for ctx.Err() == nil {
		cmd := make([]byte, 200)
		if _, _, err := g.Propose(ctx, cmd); err == nil {
			return time.Since(begin), nil
		}
		time.Sleep(time.Millisecond) // how finely it is measured
	}
	return 0, ctx.Err()
}
