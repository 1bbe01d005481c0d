package group

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"path/filepath"
	"runtime/debug"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/cockroachdb/pebble/v2"
	"github.com/cockroachdb/pebble/v2/vfs"
	"go.etcd.io/raft/v3"

	"github.com/unum-os/unum/internal/errs"
	"github.com/unum-os/unum/internal/ids"
)

// Names under which a transport carries the host's traffic: messages go as
// casts of Method to Receive, snapshots as streams of Service to
// ReceiveSnapshot.
const (
	Method  = "raft"
	Service = "raft-snap"
)

// Timing, in ticks. With the default tick a leader is missed after 1 to 2 s and
// a beat may be lost four times before. One tick a beat, as each wakes a processor
// for every node: a finer one would spread elections no better, for the hosts'
// ticks are not in step.
const (
	DefaultTick    = 200 * time.Millisecond // one tick
	electionTicks  = 5                      // ticks without a beat after which a leader is missed: to twice as many, by chance
	heartbeatTicks = 1                      // ticks between two beats of a leader
	readRetryTicks = electionTicks / 2      // ticks after which the leader is asked again how far its log is
)

// Limits.
const (
	MaxCommand      = 1 << 20         // bytes of one command
	maxUnresolved   = 32 << 20        // bytes of a group's proposals waiting for their result
	maxUncommitted  = 64 << 20        // bytes of a leader's uncommitted entries
	maxInflight     = 16 << 20        // bytes of appends a follower has not acknowledged
	maxInflightMsgs = 256             // appends a follower has not acknowledged
	maxAppend       = 1 << 20         // bytes of entries in one append
	maxReady        = 8 << 20         // bytes of committed entries given to the applier at a time
	maxBacklog      = 64 << 20        // bytes committed but not applied, all groups; beyond it followers take no more
	stopGrace       = 5 * time.Second // how long a stop waits for goroutines stuck in a broken database
	DefaultLogBytes = 16 << 20        // bytes of a group's log from which it is cut, to a quarter unless a replica needs more
)

// Machine is a deterministic state machine. Its whole state is the keys of its
// group's Space in the state database.
type Machine interface {
	// Apply does one committed command. All reads and writes go through b, an
	// indexed batch that sees the effects of earlier commands, under
	// space.Key. It must be deterministic, and keep nothing of b or cmd. The
	// result goes to the proposer, if that was on this node.
	Apply(b *pebble.Batch, space Space, index uint64, cmd []byte) any
	// Applied is called when the effects of everything up to index are in the
	// state database (not synced), also after a snapshot has replaced the
	// state. Called from the applier: it must not block.
	Applied(index uint64)
}

// Transport carries messages between the hosts of a cluster.
type Transport interface {
	// Send delivers msg to the Receive of to's host, or not. It owns msg from
	// now on and must not block longer than it takes to queue it. An error
	// means it will surely not arrive.
	Send(to ids.Node, msg []byte) error
	// Dial opens a stream to to's ReceiveSnapshot under the service.
	Dial(ctx context.Context, to ids.Node, service string) (net.Conn, error)
}

// Config is what a host needs.
type Config struct {
	Self      ids.Node      // this node; never reused for another disk
	Dir       string        // holds both databases and snapshots on their way in
	Transport Transport     //
	Tick      time.Duration // 0: DefaultTick; the same on all nodes
	LogBytes  int64         // log a group keeps for followers that lag; 0: DefaultLogBytes
	Log       *slog.Logger
	FS        vfs.FS    // nil: the real one
	Rand      io.Reader // of the ids of proposals; nil: crypto/rand
	Hooks     *Hooks    // nil, except in the simulator

	// Witness says that this node keeps logs only. Never changed for a directory.
	Witness bool
	// IsWitness says of another node what Witness says of this one; nil: none is.
	// Called from anywhere and often: it must not block nor call the host. A node
	// should be known as a witness before it is added to a group; where it is not,
	// it is refused a snapshot with state until it is.
	IsWitness func(ids.Node) bool
	// WitnessLogBytes is what a witness's log of one group may come to for a full
	// replica that is away; 0: DefaultWitnessLogBytes.
	WitnessLogBytes int64
}

// Host holds this node's replicas of all groups.
type Host struct {
	cfg              Config
	fs               vfs.FS
	log              *slog.Logger
	logDB, stateDB   *pebble.DB
	stateOpts        *pebble.Options
	tails            tails
	nonce            uint64        // of this life of the host, in the ids of proposals and reads
	counter          atomic.Uint64 // with nonce and Self: unique for ever
	in               *inbox
	count            *counts
	apply            *applyQueue
	backlog          atomic.Int64
	trims            chan trim
	sending, filling chan struct{} // tokens for snapshots out and in
	snapSeq          atomic.Uint64

	failed  chan struct{} // closed by the first fail
	stopped chan struct{} // closed when Run has ended, or the host was closed without

	mu      sync.Mutex
	disk    map[ids.Group]bool // replicas on disk
	groups  map[ids.Group]*Group
	running bool
	ended   bool
	closed  bool

	failMu sync.Mutex // innermost: the databases call fail from anywhere
	err    error
}

// New opens the databases under cfg.Dir and finds the replicas there. It starts
// no goroutine of its own. Errors: Corrupt if what is on disk does not hold,
// Busy if another host has it open.
func New(cfg Config) (*Host, error) {
	if cfg.Self == 0 || cfg.Dir == "" || cfg.Transport == nil {
		return nil, errs.E(errs.Invalid, "open groups", cfg.Dir, "a node id, a directory and a transport are needed")
	}
	if cfg.Tick == 0 {
		cfg.Tick = DefaultTick
	}
	if cfg.LogBytes == 0 {
		cfg.LogBytes = DefaultLogBytes
	}
	if cfg.WitnessLogBytes == 0 {
		cfg.WitnessLogBytes = DefaultWitnessLogBytes
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if cfg.FS == nil {
		cfg.FS = vfs.Default
	}
	h := &Host{
		cfg: cfg, fs: cfg.FS, log: cfg.Log,
		count: newCounts(), in: newInbox(), apply: newApplyQueue(), trims: make(chan trim, 64),
		sending: make(chan struct{}, snapshotsOut), filling: make(chan struct{}, snapshotsIn),
		failed: make(chan struct{}), stopped: make(chan struct{}),
		disk: map[ids.Group]bool{}, groups: map[ids.Group]*Group{},
	}
	var n [8]byte
	if cfg.Rand == nil {
		cfg.Rand = rand.Reader
	}
	if _, err := io.ReadFull(cfg.Rand, n[:]); err != nil {
		return nil, errs.Wrap(err, "open groups", cfg.Dir)
	}
	h.nonce = binary.BigEndian.Uint64(n[:])
	if err := h.guard(h.openAll); err != nil {
		return nil, err
	}
	return h, nil
}

func (h *Host) openAll() (err error) {
	dir := func(name string) string { return filepath.Join(h.cfg.Dir, name) }
	if err := h.fs.MkdirAll(dir("snapshots"), 0o700); err != nil {
		return errs.Wrap(err, "create", dir("snapshots"))
	}
	if err := clearDir(h.fs, dir("snapshots")); err != nil {
		return err
	}
	cache := pebble.NewCache(cacheBytes)
	defer cache.Unref() // the databases hold their own references
	for _, d := range []string{"raftlog", "state"} {
		if err := createDB(h.fs, dir(d), cache, h.log, h.fail); err != nil {
			return err
		}
	}
	if err := syncDir(h.fs, filepath.Dir(filepath.Clean(h.cfg.Dir))); err != nil {
		return err
	}
	if h.logDB, _, err = openDB(h.fs, dir("raftlog"), cache, h.log, h.fail); err != nil {
		return err
	}
	if h.stateDB, h.stateOpts, err = openDB(h.fs, dir("state"), cache, h.log, h.fail); err != nil {
		return errors.Join(err, h.logDB.Close())
	}
	if err = h.scan(); err != nil {
		return errors.Join(err, h.logDB.Close(), h.stateDB.Close())
	}
	return nil
}

// guard runs f, which uses the databases. A fatal error of theirs ends the
// goroutine or panics, and so fails f, not the caller. It may also end one of
// the engine's own goroutines, for which f then waits without end: guard leaves
// f behind and returns the error, after which the host is of no use.
func (h *Host) guard(f func() error) error {
	done := make(chan error, 1)
	go func() {
		var err error = errs.E(errs.IO, "use database", h.cfg.Dir, "it ended the operation")
		defer func() {
			if r := recover(); r != nil {
				h.fail(panicErr("use database", r))
			}
			if e := h.failure(); e != nil {
				err = e
			}
			done <- err
		}()
		err = f()
	}()
	select {
	case err := <-done:
		return err
	case <-h.failed:
		return h.failure()
	}
}

// panicErr makes an error of what was recovered; a disk's error keeps its class.
func panicErr(op string, r any) error {
	err, ok := r.(error)
	if !ok {
		err = fmt.Errorf("%v", r)
	}
	return dbErr(err, op, "")
}

// Groups lists the groups of which there is a replica on this node's disk, in
// order. After a restart each must be opened.
func (h *Host) Groups() []ids.Group {
	h.mu.Lock()
	defer h.mu.Unlock()
	out := make([]ids.Group, 0, len(h.disk))
	for g := range h.disk {
		out = append(out, g)
	}
	slices.Sort(out)
	return out
}

// State returns the state database. Only machines write to it, in Apply.
func (h *Host) State() *pebble.DB { return h.stateDB }

// Bootstrap makes the first replica of a new group, with the given voters; if
// there are several, each must be bootstrapped alike. Only for groups that
// never existed. Open comes next. Error: Exists.
func (h *Host) Bootstrap(g ids.Group, voters []ids.Node) error {
	if !slices.Contains(voters, h.cfg.Self) {
		return errs.E(errs.Invalid, "bootstrap", fmt.Sprintf("group %d", g), "%v is not among the voters", h.cfg.Self)
	}
	if h.cfg.Witness && len(voters) == 1 {
		return errs.E(errs.Invalid, "bootstrap", fmt.Sprintf("group %d", g), "%v is a witness: another must have the state", h.cfg.Self)
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if err := h.unusable(); err != nil {
		return err
	}
	if h.groups[g] != nil {
		return errs.E(errs.Exists, "bootstrap", fmt.Sprintf("group %d", g), "it is open")
	}
	if h.disk[g] { // from a bootstrap that a crash interrupted: then it is empty
		var l *groupLog
		if err := h.guard(func() (err error) { l, err = h.loadLog(g); return err }); err != nil {
			return err
		}
		if l.last != 0 || l.hard.GetTerm() != 0 {
			return errs.E(errs.Exists, "bootstrap", fmt.Sprintf("group %d", g), "there is a replica")
		}
	}
	if err := h.guard(func() error { return h.createReplica(g) }); err != nil {
		return err
	}
	h.disk[g] = true
	return h.guard(func() error { return h.bootstrap(g, voters) })
}

// Join makes an empty replica of g, which the group's leader fills once this
// node is its learner. Open comes next. Nothing happens if there is one.
func (h *Host) Join(g ids.Group) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if err := h.unusable(); err != nil || h.disk[g] {
		return err
	}
	if err := h.guard(func() error { return h.createReplica(g) }); err != nil {
		return err
	}
	h.disk[g] = true
	return nil
}

// Open starts the replica of g with its machine, before or during Run; on a
// witness m is nil. Errors: NotFound if there is no replica, Exists if it is
// open, Invalid if there should or should not be a machine, Corrupt.
func (h *Host) Open(g ids.Group, m Machine) (*Group, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	place := fmt.Sprintf("group %d", g)
	if err := h.unusable(); err != nil {
		return nil, err
	}
	if !h.disk[g] {
		return nil, errs.E(errs.NotFound, "open", place, "%v has no replica of it", h.cfg.Self)
	}
	if h.groups[g] != nil {
		return nil, errs.E(errs.Exists, "open", place, "it is open")
	}
	if h.cfg.Witness != (m == nil) {
		return nil, errs.E(errs.Invalid, "open", place, "only a witness has no machine")
	}
	if m == nil {
		m = nothing{}
	}
	// The tails are the worker's: a log to be opened has none yet.
	gr := newGroup(h, g, m)
	var l *groupLog
	err := h.guard(func() (err error) { l, err = h.loadLog(g); return err })
	if err != nil {
		return nil, err
	}
	gr.log = l
	l.applied = gr.point
	gr.setApplied(l.start)
	gr.conf = l.start.conf
	gr.rn, err = raft.NewRawNode(&raft.Config{
		ID: uint64(h.cfg.Self), ElectionTick: electionTicks, HeartbeatTick: heartbeatTicks,
		Storage: l, Applied: l.start.index,
		MaxSizePerMsg: maxAppend, MaxCommittedSizePerReady: maxReady,
		MaxInflightMsgs: maxInflightMsgs, MaxInflightBytes: maxInflight,
		MaxUncommittedEntriesSize: maxUncommitted,
		CheckQuorum:               true, PreVote: true, ReadOnlyOption: raft.ReadOnlySafe,
		DisableProposalForwarding: true, // and StepDownOnRemoval is off: see handOver
		Logger:                    raftLogger{h.log.With("group", uint64(g))},
	})
	if err != nil {
		return nil, errs.E(errs.Corrupt, "open", place, "%v", err)
	}
	gr.publish()
	h.groups[g] = gr
	h.in.push(event{kind: evOpen, g: gr})
	return gr, nil
}

// Group returns the open group g, or nil.
func (h *Host) Group(g ids.Group) *Group {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.groups[g]
}

func (h *Host) unusable() error {
	if err := h.failure(); err != nil {
		return err
	}
	if h.closed || h.ended {
		return errStopped()
	}
	return nil
}

func errStopped() error {
	return errs.E(errs.Unavailable, "use group", "", "this node's groups have stopped")
}

// Run steps the groups until ctx ends, which gives nil, or the host fails.
// Callers still waiting then get an error. A host runs once.
func (h *Host) Run(ctx context.Context) error {
	if err := h.begin(); err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var wg sync.WaitGroup
	w := newWorker(h, ctx)
	w.launch = func(s *shipment) {
		h.spawn(&wg, "snapshot sender", func() error { return s.run(ctx) })
	}
	h.spawn(&wg, "worker", func() error { return w.run(ctx) })
	h.spawn(&wg, "applier", func() error { return h.runApplier(ctx) })
	h.spawn(&wg, "trimmer", func() error { return h.runTrimmer(ctx) })
	select {
	case <-ctx.Done():
	case <-h.failed:
	}
	cancel()
	ended := make(chan struct{})
	go func() { wg.Wait(); close(ended) }()
	var grace <-chan time.Time
	for waiting := true; waiting; {
		failed := h.failed
		if grace != nil {
			failed = nil
		}
		select {
		case <-ended:
			waiting = false
		case <-failed:
			t := time.NewTimer(stopGrace)
			defer t.Stop()
			grace = t.C
		case <-grace:
			waiting = false
		}
	}
	return h.end()
}

// begin claims the right to step the groups, once.
func (h *Host) begin() error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if err := h.unusable(); err != nil {
		return err
	}
	if h.running {
		return errs.E(errs.Invalid, "run groups", h.cfg.Dir, "they run already")
	}
	h.running = true
	return nil
}

// end gives all that wait their error; nothing is stepped any more.
func (h *Host) end() error {
	h.mu.Lock()
	h.ended, h.running = true, false
	err := h.failure()
	groups := make([]*Group, 0, len(h.groups))
	for _, g := range h.groups {
		groups = append(groups, g)
	}
	h.mu.Unlock()
	close(h.stopped)
	for _, g := range groups {
		g.failAll(errs.E(errs.Timeout, "propose to group", fmt.Sprint(g.id), "this node is stopping; the outcome is unknown"))
	}
	return err
}

// spawn runs f; a panic, or the end that the database gives a goroutine after a
// fatal error, fails the host.
func (h *Host) spawn(wg *sync.WaitGroup, what string, f func() error) {
	wg.Add(1)
	go func() {
		defer wg.Done()
		returned := false
		defer func() {
			if r := recover(); r != nil {
				h.log.Error("groups stopped by a broken invariant", "in", what, "panic", r, "stack", string(debug.Stack()))
				h.fail(panicErr("run groups: "+what, r))
			} else if !returned {
				h.fail(errs.E(errs.IO, "run groups", what, "ended by the database"))
			}
		}()
		err := f()
		returned = true
		if err != nil {
			h.fail(err)
		}
	}()
}

// fail stops the host for ever; the first error counts.
func (h *Host) fail(err error) {
	h.failMu.Lock()
	defer h.failMu.Unlock()
	if h.err == nil {
		h.err = err
		close(h.failed)
	}
}

func (h *Host) failure() error {
	h.failMu.Lock()
	defer h.failMu.Unlock()
	return h.err
}

// Close closes the databases, after Run has ended or instead of it. After a
// failure it leaves them as they are.
func (h *Host) Close() error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.running {
		return errs.E(errs.Busy, "close groups", h.cfg.Dir, "they still run")
	}
	if h.closed {
		return nil
	}
	h.closed = true
	if !h.ended {
		close(h.stopped)
	}
	select {
	case <-h.failed:
		return nil
	default:
	}
	return h.guard(func() error {
		err := dbErr(h.stateDB.LogData(nil, pebble.Sync), "sync", "state")
		return errors.Join(err, dbErr(h.stateDB.Close(), "close", "state"), dbErr(h.logDB.Close(), "close", "log"))
	})
}

// syncDir makes the names in dir durable.
func syncDir(fsys vfs.FS, dir string) error {
	d, err := fsys.OpenDir(dir)
	if err != nil {
		return errs.Wrap(err, "open", dir)
	}
	return errs.Wrap(errors.Join(d.Sync(), d.Close()), "sync", dir)
}

func clearDir(fsys vfs.FS, dir string) error {
	names, err := fsys.List(dir)
	if err != nil {
		return errs.Wrap(err, "list", dir)
	}
	for _, n := range names {
		if err := fsys.Remove(fsys.PathJoin(dir, n)); err != nil {
			return errs.Wrap(err, "remove", fsys.PathJoin(dir, n))
		}
	}
	return nil
}
