package proc

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/unum-os/unum/internal/clock"
	"github.com/unum-os/unum/internal/control"
	"github.com/unum-os/unum/internal/control/api"
	"github.com/unum-os/unum/internal/errs"
	"github.com/unum-os/unum/internal/ids"
	"github.com/unum-os/unum/internal/proc/jobapi"
	"github.com/unum-os/unum/internal/wire"
)

// HomeConfig is what NewHome needs.
type HomeConfig struct {
	Self     ids.Node
	RPC      RPC
	Registry Registry
	Log      *slog.Logger
	Place    PlaceFunc
	// Resolve finds a node by what people call it: n2, or a host name.
	Resolve func(name string) (ids.Node, error)
	// Members returns the nodes that are alive now.
	Members func() []ids.Node
	// Host returns the host name of a node for messages; "" if unknown.
	Host func(ids.Node) string
	// Explain turns a receipt into the text of `unum why`; JSON when asked.
	Explain func(receipt []byte, json bool) (string, error)
	// Clock gives the times of jobs; nil: the machine's.
	Clock clock.Clock
}

const (
	// dialTimeout bounds the opening of a control stream.
	dialTimeout = 3 * time.Second
	// maxOffers bounds the nodes asked for one command.
	maxOffers = 8
	// askTimeout bounds a question to another node about its jobs.
	askTimeout = 2 * time.Second
	// watchTick is how often silence is looked for; two looks in a row decide, so
	// that a home that was stopped itself first reads what is waiting for it.
	watchTick = 250 * time.Millisecond
)

// Home is the home side of commands typed on this node.
type Home struct{ cfg HomeConfig }

// NewHome returns the home side. It starts nothing.
func NewHome(cfg HomeConfig) *Home {
	if cfg.Clock == nil {
		cfg.Clock = clock.Real
	}
	return &Home{cfg}
}

// nodeName is how a node appears in sentences.
func (h *Home) nodeName(n ids.Node) string {
	if h.cfg.Host != nil {
		if s := h.cfg.Host(n); s != "" && s != n.String() {
			return fmt.Sprintf("%v (%s)", n, s)
		}
	}
	return n.String()
}

// Stdio are a command's streams at its home, nil where it has none. Run closes
// them. They must be usable with the poller (not block).
type Stdio struct {
	In, Out, Err  *os.File
	TTYIn, TTYOut *os.File
}

func (s *Stdio) files() []*os.File { return []*os.File{s.In, s.Out, s.Err, s.TTYIn, s.TTYOut} }

func (s *Stdio) close() {
	for _, f := range s.files() {
		if f != nil {
			f.Close()
		}
	}
}

// Run runs a command for the user peer and returns how it ended, which is always
// something to tell the caller; for a detached one it returns when it has
// started. Messages of the caller come through tells. The end of ctx is the
// caller's going away, and kills the command.
func (h *Home) Run(ctx context.Context, peer control.Cred, a *jobapi.Ask, io Stdio, tells <-chan jobapi.Tell) jobapi.Event {
	defer io.close()
	r := &run{h: h, ask: a, io: io, tells: tells, began: h.cfg.Clock.Wall().UnixNano()}
	id, err := h.cfg.Registry.NewID(ctx)
	if err != nil {
		return failed(errs.Wrap(err, "no job number", ""))
	}
	r.l = launch{Job: id, Incarnation: 1, UID: peer.UID, GID: peer.GID, Groups: peer.Groups, Program: a.Program,
		Detach: a.Detach, Name: a.Name, Timeout: a.Timeout, Pinned: a.On != ""}
	ev := r.place(ctx)
	ev.Job = uint64(id)
	return ev
}

func failed(err error) jobapi.Event {
	return jobapi.Event{Ended: true, Code: jobapi.CodeFailed, Text: err.Error()}
}

// run is one command on its way.
type run struct {
	h     *Home
	ask   *jobapi.Ask
	l     launch
	io    Stdio
	tells <-chan jobapi.Tell
	began int64 // Unix nanoseconds
}

// place offers the command to one node after the other until one takes it.
func (r *run) place(ctx context.Context) jobapi.Event {
	h := r.h
	d := Demand{UID: r.l.UID, Argv: r.l.Program.Argv, Cwd: r.l.Program.Cwd}
	for _, name := range r.ask.NotOn {
		n, err := h.cfg.Resolve(name)
		if err != nil {
			return failed(err)
		}
		d.Not = append(d.Not, n)
	}
	var last error
	for range maxOffers {
		var node ids.Node
		var err error
		if r.ask.On != "" {
			if node, err = h.cfg.Resolve(r.ask.On); err != nil {
				return failed(err)
			}
		} else if node, r.l.Receipt, err = h.cfg.Place(ctx, d); err != nil {
			return failed(errors.Join(err, last))
		}
		dctx, cancel := context.WithTimeout(ctx, dialTimeout)
		conn, err := h.cfg.RPC.Dial(dctx, node, streamJob)
		cancel()
		if err == nil {
			var ev jobapi.Event
			if ev, err = r.on(ctx, node, &talk{Conn: conn}); err == nil {
				ev.Node = uint64(node)
				return ev
			}
		}
		r.again()
		last = fmt.Errorf("%s: %w", h.nodeName(node), err)
		if r.ask.On != "" || ctx.Err() != nil {
			return failed(last)
		}
		d.Not = append(d.Not, node)
	}
	return failed(fmt.Errorf("%d nodes were asked, none took the command; the last, %w", maxOffers, last))
}

// on runs the command on node. An error means that the node has certainly not
// started it: another may be asked.
func (r *run) on(ctx context.Context, node ids.Node, t *talk) (jobapi.Event, error) {
	defer t.Conn.Close()
	if err := t.send(toNode{Launch: &r.l}); err != nil {
		if errs.Has(err, errs.TooLarge) {
			return failed(errs.E(errs.TooLarge, "", "", "arguments and environment exceed %d bytes", maxMessage)), nil
		}
		// It may have arrived. The node kills what has no home.
		return r.lost(node), nil
	}
	c := &course{r: r, node: node, t: t, heard: clock.Now(), msgs: make(chan toHome, 16), stop: make(chan struct{})}
	c.wg.Add(1)
	go func() { // the node's messages; ends with t
		defer c.wg.Done()
		defer close(c.msgs)
		for {
			var m toHome
			if err := t.recv(&m); err != nil {
				return
			}
			select {
			case c.msgs <- m:
			case <-c.stop:
				return
			}
		}
	}()
	defer func() {
		close(c.stop)
		t.Conn.Close()
		c.closeStreams()
		c.wg.Wait()
	}()
	if !r.ask.Detach {
		c.openStreams(ctx)
	}
	return c.follow(ctx)
}

func (r *run) lost(node ids.Node) jobapi.Event {
	text := fmt.Sprintf("node %s went silent: whether the command ended there is unknown; if it still runs, it is killed within %d s", r.h.nodeName(node), int(leaseTerm.Seconds()))
	if r.ask.Detach {
		text = fmt.Sprintf("node %s went silent: it is unknown whether the command was started; see unum ps", r.h.nodeName(node))
	} else {
		now := r.h.cfg.Clock.Wall().UnixNano()
		r.h.cfg.Registry.Put(JobRecord{Job: r.l.Job, Incarnation: r.l.Incarnation, Home: r.h.cfg.Self, Node: node, UID: r.l.UID, Argv: r.l.Program.Argv,
			Cwd: r.l.Program.Cwd, State: Lost, Name: r.l.Name, Receipt: r.l.Receipt, Start: r.began, End: now, Text: text})
	}
	return jobapi.Event{Ended: true, Code: jobapi.CodeFailed, Text: text}
}

// course is a command on the node that was offered it.
type course struct {
	r     *run
	node  ids.Node
	t     *talk
	heard clock.Instant // when the node was last heard; of the follow goroutine
	msgs  chan toHome
	stop  chan struct{}
	wg    sync.WaitGroup
	outs  sync.WaitGroup // outputs still flowing
	begin func()         // lets input flow

	started atomic.Bool // the node has the command for certain
	cut     atomic.Bool // an output ended before its end

	mu    sync.Mutex // guards what follows
	conns []net.Conn
	over  bool
}

// follow hears the node out.
func (c *course) follow(ctx context.Context) (jobapi.Event, error) {
	tick := time.NewTicker(watchTick)
	defer tick.Stop()
	quiet := 0
	for {
		select {
		case m, ok := <-c.msgs:
			if !ok {
				return c.r.lost(c.node), nil
			}
			c.heard, quiet = clock.Now(), 0
			switch {
			case m.Time != 0:
				if err := c.t.send(toNode{Echo: m.Time}); err != nil {
					return c.broken(), nil
				}
			case m.Refused != nil:
				return jobapi.Event{}, errs.E(errs.Class(m.Refused.Class), "", "", "%s", m.Refused.Text)
			case m.Started && c.r.ask.Detach:
				return jobapi.Event{}, nil
			case m.Started:
				c.started.Store(true)
				if c.begin != nil {
					c.begin()
				}
			case m.NoInput:
				c.close(c.r.io.In)
			case m.End != nil:
				return c.end(ctx, m.End), nil
			}
		case tell, ok := <-c.r.tells:
			if !ok {
				c.r.tells = nil
				continue
			}
			if c.t.send(toNode{Signal: tell.Signal, Window: tell.Window}) != nil {
				return c.broken(), nil
			}
		case <-tick.C:
			if clock.Now().Sub(c.heard) < silence {
				quiet = 0
			} else if quiet++; quiet > 1 {
				return c.r.lost(c.node), nil
			}
		case <-ctx.Done():
			// The caller has gone; the node kills what has no home.
			return failed(errs.E(errs.Interrupted, "", "", "the caller went away")), nil
		}
	}
}

// broken is for a control stream that takes no more: what the node said before
// is heard out first, for an exit status beats loss.
func (c *course) broken() jobapi.Event {
	c.t.Conn.SetReadDeadline(time.Now().Add(watchTick))
	for m := range c.msgs {
		if m.End != nil {
			return c.end(context.Background(), m.End)
		}
	}
	return c.r.lost(c.node)
}

// end lets the output arrive, then tells how the command ended.
func (c *course) end(ctx context.Context, e *ending) jobapi.Event {
	delivered := make(chan struct{})
	go func() {
		c.outs.Wait()
		close(delivered)
	}()
	if e.State == 0 {
		c.closeStreams() // never started
	}
	select {
	case <-delivered:
		if e.State != 0 && c.cut.Load() {
			return failed(errs.E(errs.IO, "", "", "a part of the output was lost on the way from node %s", c.r.h.nodeName(c.node)))
		}
	case <-ctx.Done():
	}
	ev := jobapi.Event{Ended: true, Code: e.Code, Signal: e.Signal, Text: e.Text}
	if e.Signal != 0 {
		ev.Code = jobapi.CodeSignal + e.Signal
	}
	if e.State == Killed && e.Code == 0 {
		ev.Code, ev.Signal = jobapi.CodeFailed, 0
	}
	return ev
}

// openStreams opens the inputs and outputs; none of them waits for the node.
func (c *course) openStreams(ctx context.Context) {
	p := &c.r.l.Program
	open := func(stream uint8) net.Conn {
		dctx, cancel := context.WithTimeout(ctx, dialTimeout)
		defer cancel()
		conn, err := c.r.h.cfg.RPC.Dial(dctx, c.node, streamIO)
		if err == nil {
			t := &talk{Conn: conn}
			if err = t.send(ioHello{c.r.l.Job, c.r.l.Incarnation, stream}); err == nil {
				conn.SetWriteDeadline(time.Time{})
				c.mu.Lock()
				over := c.over
				if !over {
					c.conns = append(c.conns, conn)
				}
				c.mu.Unlock()
				if !over {
					return conn
				}
			}
			conn.Close()
		}
		c.t.Conn.Close() // without its streams the command cannot go on
		return nil
	}
	output := func(conn net.Conn, w *os.File, fd uint8) {
		c.outs.Add(1)
		c.wg.Add(1)
		go func() {
			defer c.wg.Done()
			defer c.outs.Done()
			rerr, werr := pump(w, conn)
			// A terminal on this node ends with a reset when typed input was not read.
			if rerr != nil && !(fd == 0 && errors.Is(rerr, unix.ECONNRESET)) {
				c.cut.Store(true)
			}
			if werr != nil && fd != 0 {
				c.t.send(toNode{Gone: fd}) // nobody reads this any more
			}
			if c.started.Load() {
				c.close(w) // its reader sees the end now, not when the command ends
			}
			conn.Close()
		}()
	}
	start := make(chan struct{})
	var once sync.Once
	c.begin = func() { once.Do(func() { close(start) }) }
	input := func(conn net.Conn, f *os.File) {
		c.wg.Add(1)
		go func() {
			defer c.wg.Done()
			select {
			case <-start: // taken by this node for certain
			case <-c.stop:
				return
			}
			pump(conn, f)
			closeWrite(conn)
		}()
	}
	for i, k := range p.Stdio {
		if k != jobapi.Pipe {
			continue
		}
		f := c.r.io.files()[i]
		if f == nil {
			continue
		}
		conn := open(uint8(i))
		switch {
		case conn == nil:
			return
		case i == 0:
			input(conn, f)
		default:
			output(conn, f, uint8(i))
		}
	}
	if p.NeedsTTY() && c.r.io.TTYOut != nil {
		conn := open(streamTTY)
		if conn == nil {
			return
		}
		output(conn, c.r.io.TTYOut, 0)
		if c.r.io.TTYIn != nil {
			input(conn, c.r.io.TTYIn)
		}
	}
}

func (c *course) close(f *os.File) {
	if f != nil {
		f.Close() // a second close of an os.File is an error and nothing else
	}
}

// closeStreams ends every pump: network side and caller's side.
func (c *course) closeStreams() {
	c.mu.Lock()
	c.over = true
	cs := c.conns
	c.conns = nil
	c.mu.Unlock()
	for _, conn := range cs {
		conn.Close()
	}
	// The pumps sit in the files as well. A refused course must leave these open
	// for the next.
	for _, f := range c.r.io.files() {
		if f != nil {
			f.SetDeadline(time.Unix(1, 0))
		}
	}
}

// again makes the files usable for the next course.
func (r *run) again() {
	for _, f := range r.io.files() {
		if f != nil {
			f.SetDeadline(time.Time{})
		}
	}
}

// Register makes commands known to the node's control socket: running them, which
// needs descriptors, by frames, everything else by the API.
func (h *Home) Register(s *control.Server, a *api.Server) {
	s.Handle(jobapi.Verb, h.serveRun)
	api.RegisterJobsServer(a, &jobsAPI{h: h})
}

// serveRun runs one command for a command line.
func (h *Home) serveRun(ctx context.Context, c *control.Conn, req []byte) error {
	files := c.Files()
	closeAll := func() {
		for _, f := range files {
			f.Close()
		}
	}
	var a jobapi.Ask
	if err := wire.Unmarshal(req, &a); err != nil {
		closeAll()
		return err
	}
	s, err := assign(&a, files)
	if err != nil {
		closeAll()
		return err
	}
	if c.Peer.UID != 0 {
		bound(&a.Program, c.Peer)
	}
	tells := make(chan jobapi.Tell, 16)
	done := make(chan struct{})
	rctx, cancel := context.WithCancel(ctx)
	go func() {
		defer close(done)
		for {
			b, err := c.Recv(rctx)
			if err != nil {
				return
			}
			var t jobapi.Tell
			if wire.Unmarshal(b, &t) != nil {
				continue
			}
			select {
			case tells <- t:
			case <-rctx.Done():
				return
			}
		}
	}()
	ev := h.Run(ctx, c.Peer, &a, s, tells)
	cancel()
	<-done
	return c.Send(wire.MustMarshal(ev))
}

// assign gives the descriptors that came with an ask their places.
func assign(a *jobapi.Ask, files []*os.File) (Stdio, error) {
	var s Stdio
	if len(a.Program.Argv) == 0 {
		return s, errs.E(errs.Invalid, "", "", "no command")
	}
	next := func() *os.File {
		if len(files) == 0 {
			return nil
		}
		f := files[0]
		files = files[1:]
		return f
	}
	want := 0
	if !a.Detach {
		for i, dst := range []**os.File{&s.In, &s.Out, &s.Err} {
			if a.Program.Stdio[i] == jobapi.Pipe {
				*dst = next()
				want++
			}
		}
		if a.Program.NeedsTTY() {
			s.TTYIn, s.TTYOut = next(), next()
			want += 2
		}
	}
	have := 0
	for _, f := range s.files() {
		if f != nil {
			have++
			if !isPipe(f) {
				return s, errs.E(errs.Invalid, "", "", "streams must come as pipes")
			}
		}
	}
	if have != want || len(files) != 0 {
		return s, errs.E(errs.Invalid, "", "", "%d streams wanted, %d came", want, have+len(files))
	}
	return s, nil
}

func isPipe(f *os.File) bool {
	st, err := f.Stat()
	return err == nil && st.Mode()&os.ModeNamedPipe != 0
}
