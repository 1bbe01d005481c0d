package venus

import (
	"bytes"
	"context"
	"crypto/sha256"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/unum-os/unum/internal/errs"
	"github.com/unum-os/unum/internal/fusefs"
	"github.com/unum-os/unum/internal/group"
	"github.com/unum-os/unum/internal/ids"
	"github.com/unum-os/unum/internal/vice"
	"github.com/unum-os/unum/internal/volume"
	"github.com/unum-os/unum/internal/wire"
)

// hub carries calls between nodes of one process.
type hub struct {
	mu sync.Mutex
	h  map[ids.Node]map[string]func(ctx context.Context, from ids.Node, req, data []byte) (any, []byte, error)
}

// port is one node at the hub.
type port struct {
	*hub
	self ids.Node
}

func (p port) Handle(m string, f func(ctx context.Context, from ids.Node, req, data []byte) (any, []byte, error)) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.h[p.self] == nil {
		p.h[p.self] = map[string]func(ctx context.Context, from ids.Node, req, data []byte) (any, []byte, error){}
	}
	p.h[p.self][m] = f
}
func (p port) Call(ctx context.Context, to ids.Node, m string, req any, data []byte, resp any) ([]byte, error) {
	p.mu.Lock()
	f := p.h[to][m]
	p.mu.Unlock()
	if f == nil {
		return nil, errs.Unavailable.Err()
	}
	r, d, err := f(ctx, p.self, wire.MustMarshal(req), data)
	if err != nil {
		return nil, err
	}
	if resp != nil && r != nil {
		if err := wire.Unmarshal(wire.MustMarshal(r), resp); err != nil {
			return nil, err
		}
	}
	return d, nil
}

// noT is the transport of a group of one.
type noT struct{}

func (noT) Send(ids.Node, []byte) error { return errs.Unavailable.Err() }
func (noT) Dial(context.Context, ids.Node, string) (net.Conn, error) {
	return nil, errs.Unavailable.Err()
}

// blocks keeps content in memory.
type blocks struct{ m sync.Map }

func (b *blocks) Put(_ context.Context, d []byte) (volume.BlockName, error) {
	n := volume.BlockName(sha256.Sum256(d))
	b.m.Store(n, append([]byte(nil), d...))
	return n, nil
}
func (b *blocks) Get(_ context.Context, n volume.BlockName) ([]byte, error) {
	v, ok := b.m.Load(n)
	if !ok {
		return nil, errs.IO.Err()
	}
	return v.([]byte), nil
}

// slowReplica can hold back proposals of operations, as a slow majority does.
type slowReplica struct {
	*group.Group
	hold atomic.Pointer[chan struct{}]
}

func (s *slowReplica) Propose(ctx context.Context, cmd []byte) (any, uint64, error) {
	h := s.hold.Load()
	c, _ := volume.DecodeCommand(cmd)
	if h == nil || c == nil || len(c.Ops) == 0 {
		return s.Group.Propose(ctx, cmd)
	}
	type o struct {
		r any
		i uint64
		e error
	}
	ch := make(chan o, 1)
	go func() { <-*h; r, i, e := s.Group.Propose(context.Background(), cmd); ch <- o{r, i, e} }()
	select { // raft has it, the majority is slow
	case x := <-ch:
		return x.r, x.i, x.e
	case <-ctx.Done():
		return nil, 0, errs.Interrupted.Err()
	}
}

// world is a volume with its leader, real but for the network and the disk of
// blocks.
type world struct {
	t    testing.TB
	ctx  context.Context
	hub  *hub
	rep  *slowReplica
	host *group.Host
	st   vice.State
	b    *blocks
}

func newWorld(t testing.TB) *world {
	ctx, cancel := context.WithCancel(context.Background())
	h, err := group.New(group.Config{Self: 1, Dir: t.TempDir(), Transport: noT{}, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	if err := h.Bootstrap(ids.RootGroup, []ids.Node{1}); err != nil {
		t.Fatal(err)
	}
	g, err := h.Open(ids.RootGroup, &volume.Machine{})
	if err != nil {
		t.Fatal(err)
	}
	w := &world{t: t, ctx: ctx, hub: &hub{h: map[ids.Node]map[string]func(ctx context.Context, from ids.Node, req, data []byte) (any, []byte, error){}}, rep: &slowReplica{Group: g}, host: h, st: vice.NewState(h.State(), g.Space()), b: &blocks{}}
	v := vice.New(vice.Config{Self: 1, Group: ids.RootGroup, Replica: w.rep, State: w.st, Peers: port{w.hub, 1}, Log: slog.New(slog.DiscardHandler)})
	g.Watch(func(group.Status) { v.Nudge() })
	var wg sync.WaitGroup
	wg.Go(func() { h.Run(ctx) })
	wg.Go(func() { v.Run(ctx) })
	t.Cleanup(func() { cancel(); wg.Wait(); h.Close() })
	return w
}

func (w *world) client(n ids.Node) *Client {
	c := New(Config{Self: n, Group: ids.RootGroup, Peers: port{w.hub, n}, Blocks: w.b, Members: func() []ids.Node { return []ids.Node{1} }, Space: func() uint64 { return 1 << 40 }, Log: slog.New(slog.DiscardHandler)})
	go c.Run(w.ctx)
	w.until(c.Ready)
	return c
}

var who = fusefs.Caller{}

// until waits for a condition.
func (w *world) until(cond func() bool) {
	w.t.Helper()
	for end := time.Now().Add(30 * time.Second); !cond(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			w.t.Fatal("the condition does not come")
		}
	}
}

// file makes and opens one in the root.
func (w *world) file(c *Client, name string) (ids.Inode, uint64) {
	w.t.Helper()
	e, o, err := c.Create(w.ctx, who, ids.RootInode, name, 0o644, syscall.O_RDWR)
	w.ok(err)
	return e.Attr.Ino, o.Handle
}

func (w *world) write(c *Client, ino ids.Inode, fh, off uint64, data []byte) {
	w.t.Helper()
	_, err := c.Write(w.ctx, ino, fh, off, data, fusefs.WriteInfo{})
	w.ok(err)
	c.Replied(fusefs.OpWrite, ino)
}

func (w *world) open(c *Client, ino ids.Inode) uint64 {
	w.t.Helper()
	o, err := c.Open(w.ctx, who, ino, syscall.O_RDWR, false)
	w.ok(err)
	return o.Handle
}

// hold holds proposals of operations back until it is called.
func (w *world) hold() (free func()) {
	ch := make(chan struct{})
	w.rep.hold.Store(&ch)
	return func() { w.rep.hold.Store(nil); close(ch) }
}

func (w *world) ok(err error) {
	w.t.Helper()
	if err != nil {
		w.t.Fatal(err)
	}
}

func (w *world) totals() (volume.Usage, error) {
	s := w.host.State().NewSnapshot()
	defer s.Close()
	return volume.NewView(s, w.rep.Space()).Stat()
}

// Reads of a file that was cut and has grown again since it was shipped.
func TestReadBeyondACut(t *testing.T) {
	w := newWorld(t)
	c := w.client(1)
	ino, fh := w.file(c, "f")
	w.write(c, ino, fh, 0, bytes.Repeat([]byte("x"), 20000))
	w.ok(c.Fsync(w.ctx, ino, fh, false))
	for _, size := range []uint64{10, 20000} {
		_, err := c.SetAttr(w.ctx, who, ino, 0, fusefs.SetAttr{Mask: volume.SetSize, Size: size})
		w.ok(err)
	}
	want := append(bytes.Repeat([]byte("x"), 10), make([]byte, 19990)...)
	for _, off := range []int{0, 9, 10, 4096, 19999} {
		buf := make([]byte, 4096)
		n, err := c.Read(w.ctx, ino, fh, uint64(off), buf)
		w.ok(err)
		c.Replied(fusefs.OpRead, ino)
		if !bytes.Equal(buf[:n], want[off:min(off+4096, len(want))]) {
			t.Errorf("at %d: %d bytes, wrong", off, n)
		}
	}
}

// More files and more pieces than a log record holds.
func TestFloodIsShipped(t *testing.T) {
	w := newWorld(t)
	c := w.client(1)
	var inos []ids.Inode
	for i := range volume.MaxOps + 100 {
		e, err := c.Mknod(w.ctx, who, ids.RootInode, fmt.Sprint("f", i), syscall.S_IFREG|0o644, 0)
		w.ok(err)
		inos = append(inos, e.Attr.Ino)
	}
	for _, ino := range inos {
		_, err := c.SetAttr(w.ctx, who, ino, 0, fusefs.SetAttr{Mask: volume.SetMode, Mode: 0o600})
		w.ok(err)
	}
	w.ok(c.Fsync(w.ctx, inos[0], 0, false))
	for _, ino := range inos {
		if a, err := w.st.GetAttr(ino); err != nil || a.Mode&0o777 != 0o600 {
			t.Fatalf("inode %d: %o %v", ino, a.Mode, err)
		}
	}
	ino, fh := w.file(c, "scattered")
	buf := make([]byte, 4096)
	for i := range 12000 {
		buf[0], buf[1] = byte(i), byte(i>>8)
		w.write(c, ino, fh, uint64(i)*8192+1<<30, buf)
	}
	w.ok(c.Fsync(w.ctx, ino, fh, false))
}

func TestTmpfilesGo(t *testing.T) {
	w := newWorld(t)
	c := w.client(1)
	before, err := w.totals()
	w.ok(err)
	for range 5 {
		e, o, err := c.Tmpfile(w.ctx, who, ids.RootInode, 0o644, syscall.O_RDWR)
		w.ok(err)
		c.Release(e.Attr.Ino, o.Handle, 0, false)
		c.Forget(e.Attr.Ino, 1)
	}
	w.until(func() bool { u, err := w.totals(); return err == nil && u.Inodes == before.Inodes })
}

// An upgrade that a signal interrupts leaves the lock there was.
func TestInterruptedLockKeepsTheOld(t *testing.T) {
	w := newWorld(t)
	a, b := w.client(1), w.client(2)
	e, err := a.Mknod(w.ctx, who, ids.RootInode, "f", syscall.S_IFREG|0o644, 0)
	w.ok(err)
	ino := e.Attr.Ino
	mine := volume.Lock{Kind: volume.LockPosix, Owner: 7, Start: 0, End: 10, Type: syscall.F_RDLCK}
	w.ok(a.SetLock(w.ctx, ino, mine, false))
	theirs := mine
	theirs.Owner = 8
	w.ok(b.SetLock(w.ctx, ino, theirs, false))
	mine.Type = syscall.F_WRLCK
	ictx, cancel := context.WithTimeout(w.ctx, 100*time.Millisecond)
	defer cancel()
	if err := a.SetLock(ictx, ino, mine, true); !errs.Has(err, errs.Interrupted) {
		t.Fatal(err)
	}
	theirs.Type = syscall.F_UNLCK
	w.ok(b.SetLock(w.ctx, ino, theirs, false))
	theirs.Type = syscall.F_WRLCK
	if err := b.SetLock(w.ctx, ino, theirs, false); !errs.Has(err, errs.LockHeld) {
		t.Errorf("beside a's read lock: %v", err)
	}
}

// A removal whose caller goes away while the majority is slow: nobody is given
// a lease on the state before it.
func TestAbandonedMutationKeepsItsClaim(t *testing.T) {
	w := newWorld(t)
	a, b := w.client(1), w.client(2)
	_, err := a.Mknod(w.ctx, who, ids.RootInode, "f", syscall.S_IFREG|0o644, 0)
	w.ok(err)
	free := w.hold()
	s, _ := a.current()
	actx, cancel := context.WithTimeout(w.ctx, 200*time.Millisecond)
	defer cancel()
	done := make(chan struct{})
	go func() { // a's request, whose connection breaks
		defer close(done)
		var r vice.ApplyReply
		port{w.hub, 1}.Call(actx, 1, vice.MethodApply, vice.ApplyRequest{Caller: a.caller(s), Seq: 1000, Acked: 1,
			Ops: []volume.Op{{Kind: volume.OpUnlink, Parent: ids.RootInode, Name: "f"}}}, nil, &r)
	}()
	<-actx.Done()
	if _, err := b.Lookup(w.ctx, who, ids.RootInode, "f"); err != nil { // as it is
		t.Error(err)
	}
	if d := b.inode(ids.RootInode); b.leads(d, "f", 0) {
		t.Error("the name is cached")
	}
	free()
	<-done
	w.until(func() bool { _, err := w.st.Lookup(ids.RootInode, "f"); return errs.Has(err, errs.NotFound) })
	if _, err := b.Lookup(w.ctx, who, ids.RootInode, "f"); !errs.Has(err, errs.NotFound) {
		t.Errorf("removed, and still seen: %v", err)
	}
}

// kern hears of invalidations.
type kern struct{ f func(ino ids.Inode) }

func (k kern) InvalidateInode(ino ids.Inode, _, _ int64) error { k.f(ino); return nil }
func (k kern) StalePages() bool                                { return false }

// Nothing is promised to the kernel between its emptying and the lease's end.
func TestNoPromiseWhileRevoked(t *testing.T) {
	w := newWorld(t)
	a, b := w.client(1), w.client(2)
	ino, fh := w.file(a, "f")
	w.write(a, ino, fh, 0, make([]byte, 100))
	var invals atomic.Int64
	a.SetKernel(kern{func(ids.Inode) { invals.Add(1) }})
	free := w.hold() // the ship of the revocation waits
	opened := make(chan uint64)
	go func() { opened <- w.open(b, ino) }()
	w.until(func() bool { return invals.Load() > 0 })
	e, err := a.GetAttr(w.ctx, ino)
	w.ok(err)
	if e.Until != 0 && invals.Load() == 1 {
		t.Error("a promise that no invalidation follows")
	}
	free()
	<-opened
}

// The kernel takes the size in the reply to a create whatever it has learnt since
// it asked: of a file that was there already, it may not rely on it.
func TestNoPromiseWithACreateOfWhatIsThere(t *testing.T) {
	w := newWorld(t)
	a := w.client(1)
	ino, fh := w.file(a, "f")
	w.write(a, ino, fh, 0, make([]byte, 100))
	e, o, err := a.Create(w.ctx, who, ids.RootInode, "f", 0o644, syscall.O_WRONLY)
	w.ok(err)
	if e.Attr.Ino != ino || o.Handle == 0 || e.Attr.Size != 100 || e.Until != 0 {
		t.Errorf("%+v", e)
	}
}

// Two revocations at once, the first of which waits for the kernel: the second
// waits for it, and what is granted after both stays.
func TestOneRevocationAtATime(t *testing.T) {
	w := newWorld(t)
	a := w.client(1)
	ino, fh := w.file(a, "f")
	in := a.inode(ino)
	var calls atomic.Int64
	busy := make(chan struct{})
	a.SetKernel(kern{func(ids.Inode) {
		if calls.Add(1) == 1 {
			<-busy // a large file, or a page that a request has locked
		}
	}})
	var wg sync.WaitGroup
	over := make(chan vice.Held, 2)
	revoke := func() {
		h, err := a.revoke(w.ctx, in)
		if err != nil {
			t.Error(err)
		}
		over <- h
	}
	wg.Go(revoke)
	w.until(func() bool { in.mu.Lock(); defer in.mu.Unlock(); return calls.Load() == 1 && in.revoking && !in.gated })
	wg.Go(revoke)
	w.write(a, ino, fh, 0, []byte("through the open gate"))
	if len(over) > 0 {
		t.Error("the second revocation did not wait")
	}
	close(busy)
	wg.Wait()
	s, _ := a.current()
	a.release(s, <-over)
	w.write(a, ino, fh, 0, []byte("under a new lease"))
	in.mu.Lock()
	defer in.mu.Unlock()
	if in.mode != vice.Write {
		t.Error("the new lease was dropped")
	}
}

// A directory handle on the root outlives the sweep of what is idle.
func TestRootStaysAfterSweep(t *testing.T) {
	w := newWorld(t)
	a, b := w.client(1), w.client(2)
	o, err := a.OpenDir(w.ctx, who, ids.RootInode)
	w.ok(err)
	ls := func() (n int) {
		w.ok(a.ReadDir(w.ctx, ids.RootInode, o.Handle, 0, false, func(volume.Dirent, uint64, *fusefs.Entry) bool { n++; return true }))
		return
	}
	ls()
	a.sweep(w.ctx, a.inode(ids.RootInode), 0)
	ls()
	_, err = b.Mknod(w.ctx, who, ids.RootInode, "new", syscall.S_IFREG|0o644, 0)
	w.ok(err)
	if n := ls(); n != 1 {
		t.Errorf("%d entries, want 1", n)
	}
}

// What was pending under a session that was lost is not done under the next.
func TestShipEndsWithItsSession(t *testing.T) {
	w := newWorld(t)
	a, b := w.client(1), w.client(2)
	ino, fh := w.file(a, "f")
	w.write(a, ino, fh, 0, []byte("AAAA"))
	s, _ := a.current()
	ops, err := a.pack(w.ctx, a.takeCut())
	w.ok(err)
	a.lose(s.epoch, "the node stood still between two steps of a ship")
	w.until(a.Ready)
	theirs := w.open(b, ino)
	w.write(b, ino, theirs, 0, []byte("BBBB"))
	w.ok(b.Fsync(w.ctx, ino, theirs, false))
	if _, _, _, err := a.apply(w.ctx, s, ops, nil, nil, nil); !errs.Has(err, errs.IO) {
		t.Errorf("the ship of the lost session: %v", err)
	}
	if err := a.Fsync(w.ctx, ino, fh, false); !errs.Has(err, errs.IO) {
		t.Errorf("fsync of the lost change: %v", err)
	}
	buf := make([]byte, 4)
	_, err = b.Read(w.ctx, ino, theirs, 0, buf)
	w.ok(err)
	b.Replied(fusefs.OpRead, ino)
	if string(buf) != "BBBB" {
		t.Errorf("BBBB, made durable, is now %s", buf)
	}
}

// FuzzCalls gives the volume's server, which leads, and a client with a session
// any request: it is answered or refused, and both go on.
func FuzzCalls(f *testing.F) {
	w := newWorld(f)
	c := w.client(2)
	call := vice.Caller{Group: ids.RootGroup}
	for _, q := range []any{call, vice.RecallRequest{}, vice.TakeoverRequest{}, map[int]any{1: call, 2: 1 << 62, 3: []byte("x"), 4: []any{1, -1}}} {
		f.Add(wire.MustMarshal(q))
	}
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, req []byte) {
		ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
		defer cancel()
		for _, node := range []ids.Node{1, 2} {
			w.hub.mu.Lock()
			hs := maps.Clone(w.hub.h[node])
			w.hub.mu.Unlock()
			for _, h := range hs {
				h(ctx, 2, req, nil)
				h(ctx, 9, req, nil) // a node without a session
			}
		}
		for end := time.Now().Add(30 * time.Second); !c.Ready(); time.Sleep(time.Millisecond) { // a takeover that it believed may end its session, for a while
			if time.Now().After(end) {
				t.Fatal("the client has no session any more")
			}
		}
	})
}

// While writers take turns on a file, who only looks at it is served.
func TestReaderAmongWritersIsServed(t *testing.T) {
	w := newWorld(t)
	writers := []*Client{w.client(1), w.client(2)}
	reader := w.client(3)
	ino, _ := w.file(writers[0], "f")
	stop := make(chan struct{})
	var turns atomic.Int64
	var wg sync.WaitGroup
	for i, c := range writers {
		fh := w.open(c, ino)
		wg.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				if _, err := c.Write(w.ctx, ino, fh, uint64(i), []byte{1}, fusefs.WriteInfo{}); err != nil {
					t.Error(err)
					return
				}
				c.Replied(fusefs.OpWrite, ino)
				turns.Add(1)
			}
		})
	}
	for range 20 {
		before := turns.Load()
		w.until(func() bool { return turns.Load() > before+2 })
		_, err := reader.Lookup(w.ctx, who, ids.RootInode, "f")
		if err != nil {
			t.Error(err)
			break
		}
	}
	close(stop)
	wg.Wait()
}
