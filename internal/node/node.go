package node

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"

	"github.com/unum-os/unum/internal/block"
	"github.com/unum-os/unum/internal/clock"
	"github.com/unum-os/unum/internal/control"
	"github.com/unum-os/unum/internal/control/api"
	"github.com/unum-os/unum/internal/errs"
	"github.com/unum-os/unum/internal/fusefs"
	"github.com/unum-os/unum/internal/group"
	"github.com/unum-os/unum/internal/identity"
	"github.com/unum-os/unum/internal/ids"
	"github.com/unum-os/unum/internal/load"
	"github.com/unum-os/unum/internal/member"
	"github.com/unum-os/unum/internal/metric"
	"github.com/unum-os/unum/internal/proc"
	"github.com/unum-os/unum/internal/record"
	"github.com/unum-os/unum/internal/rpc"
	"github.com/unum-os/unum/internal/sched"
	"github.com/unum-os/unum/internal/segment"
	"github.com/unum-os/unum/internal/venus"
	"github.com/unum-os/unum/internal/vice"
	"github.com/unum-os/unum/internal/volume"
	"github.com/unum-os/unum/internal/wire"
)

// The service and method of raft traffic.
const (
	castRaft   = "raft"
	streamSnap = group.Service
)

// Node is one running node. What follows the members is there on nodes that
// store only.
type Node struct {
	cfg     Config
	id      ids.Node
	disk    *remembered
	lock    io.Closer // of the data directory
	holder  *identity.Holder
	ballast *ballast
	grace   time.Duration // see the constant; tests shorten it

	ep      *rpc.Endpoint
	host    *group.Host  // nil on a client node
	rec     *group.Group // nil on a client node
	root    *group.Group // nil on a client node
	record  *recordClient
	members *member.Members // nil on a client node
	ctl     *control.Server
	calls   *api.Server

	volumeKey [32]byte
	jobs      *registry
	segs      *segment.Store
	blocks    *block.Client
	vice      *vice.Server
	venus     *venus.Client
	mount     *fusefs.Mount
	manager   *proc.Manager
	home      *proc.Home
	meter     *load.Meter
	loads     *load.Table
	told      sched.Load // last, of publish only
	toldAt    clock.Instant

	metrics    *metric.Server
	clocks     clocks
	clockEvery time.Duration
	leaderless map[ids.Group]*leaderless
	parted     parted

	known     atomic.Pointer[map[ids.Node]record.Member] // the record's members
	roster    sync.Mutex                                 // over changes of known
	revision  uint64                                     // of the record at which known is true; by roster
	moves     sync.Map                                   // ids.Node to moved, of those that have said where they are
	strangers *strangers                                 // that show a good certificate
	stir      chan struct{}                              // holds one: the steward should look
	rung      bell                                       // the record has changed
	keyFile   keyFile                                    // the authority's
	outcast   atomic.Pointer[error]                      // what others said when this node asked whether it is a member, if it is none
	keyless   atomic.Pointer[error]                      // why this voter cannot sign, if it cannot
	entrusted atomic.Int64                               // when it was given the authority's key, Unix ns
	knocks    knocks                                     // on the door, of late
	logins    logins                                     // of a client node's users
	heard     atomic.Pointer[[]ids.Node]                 // who is alive, as a client node was told
	asked     atomic.Uint64                              // how often for the members
	turn      atomic.Uint64
	mounted   atomic.Bool
	departing departing
	unseated  atomic.Pointer[[]ids.Node] // of a node that leaves and is not known to have a place in the groups still: the root volume's voters
	goes      atomic.Bool                // it leaves for good when it stops
	gone      atomic.Bool                // it has, and the record knows
	stays     error                      // why it has not; of the part farewell, and of run when that has ended
	lastLimit time.Duration              // see the constant; tests shorten it
	end       context.CancelCauseFunc    // of Run
	began     time.Time
}

// noTransport is for a host that is not run.
type noTransport struct{}

func (noTransport) Send(ids.Node, []byte) error { return errs.Unavailable.Err() }
func (noTransport) Dial(context.Context, ids.Node, string) (net.Conn, error) {
	return nil, errs.Unavailable.Err()
}

// transport carries the groups' messages over the endpoint.
type transport struct{ ep *rpc.Endpoint }

func (t transport) Send(to ids.Node, msg []byte) error {
	return t.ep.Cast(to, castRaft, struct{}{}, msg)
}

func (t transport) Dial(ctx context.Context, to ids.Node, service string) (net.Conn, error) {
	return t.ep.Dial(ctx, to, service)
}

// Open reads the node in cfg.Dir and makes its parts; Run starts them. Errors
// are sentences for whoever typed the command.
func Open(cfg Config) (n *Node, err error) {
	if err := cfg.ready(); err != nil {
		return nil, err
	}
	n = &Node{cfg: cfg, loads: load.NewTable(), began: time.Now(), grace: grace, lastLimit: lastLimit, stir: make(chan struct{}, 1),
		clockEvery: clockEvery, leaderless: map[ids.Group]*leaderless{}, strangers: newStrangers()}
	n.known.Store(&map[ids.Node]record.Member{})
	var undo []func() error
	defer func() {
		if err != nil {
			for _, f := range slices.Backward(undo) {
				err = errors.Join(err, f())
			}
		}
	}()
	if is, err := cfg.has(fileNode); err != nil {
		return nil, err
	} else if is { // else there is nothing to lock, and loadFile says so
		if n.lock, err = cfg.lock(); err != nil {
			return nil, err
		}
		undo = append(undo, n.lock.Close)
	}
	d, err := cfg.loadFile()
	if err != nil {
		return nil, err
	}
	was := d.Addr
	if cfg.Addr != "" { // it may have moved
		if d.Addr, err = address(cfg.Addr, ""); err != nil {
			return nil, err
		}
	}
	if n.holder, n.volumeKey, err = cfg.loadIdentity(d); err != nil {
		return nil, err
	}
	n.id, n.disk, n.revision = d.Node, remember(d), d.Revision
	if cfg.shift != nil {
		clock.Use(cfg.shift)
	}
	n.cfg.Log = cfg.Log.With("node", n.id.String())
	n.ep, err = rpc.New(rpc.Config{Self: n.id, Cert: n.holder, ListenAddr: listenAddr(n.disk.Addr),
		Resolve: n.resolve, Allowed: n.allowed, Permit: n.permitted, Clock: cfg.Clock, Log: n.part("rpc")})
	if err != nil {
		return nil, err
	}
	n.ep.OnPeer(n.parted.note)
	ep := n.ep                         // n is nil when this is called
	undo = append(undo, func() error { // Run with a context that is over releases it
		ctx, cancel := context.WithCancel(context.Background())
		cancel()
		return ep.Run(ctx)
	})
	n.ctl, n.calls = control.New(control.Config{Path: cfg.Socket, Log: n.part("control")}), api.NewServer(0)
	n.ctl.HandleImage()
	n.ctl.HandleHTTP2(n.calls.Serve)
	n.calls.Refused = n.refusedHere
	n.ballast = openBallast(cfg.FS, cfg.path(fileBallast), n.part("ballast"))
	if n.disk.Role != record.RoleClient {
		if err := n.openGroups(&undo); err != nil {
			return nil, err
		}
	}
	n.record = newRecordClient(n)
	if n.disk.Role == record.RoleClient {
		if err := n.loadLogins(); err != nil {
			return nil, err
		}
	}
	if n.disk.Role == record.RoleStore {
		if err := n.openStore(&undo); err != nil {
			return nil, err
		}
	}
	api.RegisterNodeServer(n.calls, &nodeAPI{n: n})
	api.RegisterRecordServer(n.calls, &recordAPI{n: n})
	api.RegisterUsersServer(n.calls, &usersAPI{n: n})
	n.servePeers()
	if n.metrics, err = n.newMetrics(); err != nil {
		return nil, err
	}
	if d.Addr != was { // later starts that say none stay there
		if err := n.disk.change(&n.cfg, func(*nodeFile) {}); err != nil {
			return nil, err
		}
	}
	return n, nil
}

func (n *Node) part(name string) *slog.Logger { return n.cfg.Log.With("part", name) }

// openGroups makes what a node that votes has.
func (n *Node) openGroups(undo *[]func() error) (err error) {
	witness := n.disk.Role == record.RoleWitness
	var recm, volm group.Machine // a witness has none
	if !witness {
		recm = &record.Machine{OnChange: func(uint64) { n.refreshMembers(); n.rung.ring() }}
		volm = &volume.Machine{OnBlocks: func(names []volume.BlockName) { n.blocks.Ensure(names) }}
	}
	n.host, n.rec, n.root, err = n.cfg.openHost(group.Config{Self: n.id, Dir: n.cfg.path(dirGroups), Transport: transport{n.ep}, Log: n.part("group"),
		Witness: witness, IsWitness: n.witness, FS: vfs.OnDiskFull(n.cfg.FS, n.ballast.give), Tick: n.cfg.tick}, recm, volm)
	if err != nil {
		return err
	}
	*undo = append(*undo, n.host.Close)
	n.ep.HandleCast(castRaft, func(from ids.Node, _, data []byte) {
		if err := n.host.Receive(from, data); err != nil {
			n.cfg.Log.Debug("raft message refused", "from", from.String(), "err", err)
		}
	})
	n.ep.HandleStream(streamSnap, func(ctx context.Context, from ids.Node, c net.Conn) {
		if err := n.host.ReceiveSnapshot(ctx, from, c); err != nil {
			n.cfg.Log.Warn("snapshot not taken", "from", from.String(), "err", err)
		}
	})
	for _, g := range n.groups() {
		g.Watch(func(group.Status) { n.nudge() })
		l := &leaderless{}
		n.leaderless[g.ID()] = l
		g.Watch(l.watch)
		l.watch(g.Status())
	}
	if n.members, err = member.New(member.Config{Self: n.id, RPC: n.ep, Log: n.part("member")}); err != nil {
		return err
	}
	n.members.OnChange(n.onMember)
	return nil
}

// openStore makes what a node that stores has besides.
func (n *Node) openStore(undo *[]func() error) (err error) {
	cfg := n.cfg
	n.jobs = newRegistry(n.record, n.part("jobs"))
	if err := cfg.takeKept(); err != nil {
		return err
	}
	if n.segs, err = segment.Open(segment.Config{Dir: cfg.path(dirBlocks), FS: cfg.FS, Log: n.part("segment")}); err != nil {
		return cfg.damagedBlocks(err)
	}
	*undo = append(*undo, n.segs.Close)
	n.blocks = block.New(block.Config{Self: n.id, RPC: n.ep, Local: n.segs, Key: n.volumeKey,
		Replicas: n.storing, Holders: n.holders, Alive: n.members.IsAlive, Walk: n.walkBlocks, Log: n.part("block"),
		Leaving: func() bool { return n.unseated.Load() != nil }})
	// A leaving node that starts may have lost its place while it was off. Until the
	// leaders have said (settleSeat, a second later) it takes no blocks: a writer to
	// whom it matters asks it anew for longer than that, and whatever is written now
	// needs those same leaders to be named.
	if m, err := n.record.view().Member(n.id); err == nil && m.State == record.Leaving {
		voters := n.root.Status().Voters
		n.unseated.Store(&voters)
	}
	n.ep.Bulk(block.MethodGet) // small questions, large answers
	n.vice = vice.New(vice.Config{Self: n.id, Group: ids.RootGroup, Replica: n.root,
		State: vice.NewState(n.host.State(), n.root.Space()), Peers: n.ep, Log: n.part("vice")})
	n.root.Watch(func(group.Status) { n.vice.Nudge() })
	n.venus = venus.New(venus.Config{Self: n.id, Group: ids.RootGroup, Peers: n.ep, Blocks: n.blocks,
		Members: n.askFirst, Space: n.space, Log: n.part("venus")})
	n.mount = fusefs.New(fusefs.Config{Dir: cfg.Mount, Tree: n.venus, Log: n.part("fusefs"), Guard: true})
	n.venus.SetKernel(n.mount)
	n.manager, err = proc.NewManager(proc.ManagerConfig{Self: n.id, RPC: n.ep, Registry: n.jobs, Log: n.part("proc"),
		Dir: cfg.Dir, Exe: cfg.Exe, Cgroup: filepath.Join("unum", n.disk.Cluster[:8]+"-"+n.id.String()), Accept: n.accept, Socket: cfg.Socket, Settle: n.venus.Settle, Clock: cfg.Clock})
	if err != nil {
		return err
	}
	n.home = proc.NewHome(proc.HomeConfig{Self: n.id, RPC: n.ep, Registry: n.jobs, Log: n.part("home"), Place: n.place,
		Resolve: n.byName, Members: n.members.Alive, Host: n.hostname, Explain: explain, Clock: cfg.Clock})
	n.home.Register(n.ctl, n.calls)
	n.meter = load.New(load.Config{Node: n.id, Dir: cfg.Dir, Share: cfg.Share, Log: n.part("load")})
	n.members.OnBroadcast(wordLoad, func(from ids.Node, b []byte) {
		var l sched.Load
		if err := wire.Unmarshal(b, &l); err != nil || l.Node != from {
			n.cfg.Log.Warn("malformed load", "from", from.String())
			return
		}
		n.loads.Put(clock.Now(), l)
	})
	return nil
}

// groups lists the groups of which this node has a replica.
func (n *Node) groups() []*group.Group {
	if n.host == nil {
		return nil
	}
	return []*group.Group{n.rec, n.root}
}

// loadIdentity reads the files of the identity and holds them against each other
// and against node.json.
func (c *Config) loadIdentity(d nodeFile) (h *identity.Holder, volumeKey [32]byte, err error) {
	names := []string{fileCA, fileCert, fileKey, fileCSR}
	if d.Role == record.RoleStore {
		names = append(names, fileVolume)
	}
	files := map[string][]byte{}
	for _, name := range names {
		if files[name], err = identity.Load(c.FS, c.path(name)); err != nil {
			return nil, volumeKey, c.damaged(name, err)
		}
	}
	trust, err := identity.ParseTrust(files[fileCA])
	if err != nil {
		return nil, volumeKey, c.damaged(fileCA, err)
	}
	if trust.Cluster() != d.Cluster {
		return nil, volumeKey, c.foreign(fileCA, "the authority is that of cluster %s, %s says cluster %s", trust.Cluster(), fileNode, d.Cluster)
	}
	if h, err = identity.NewHolder(trust, files[fileCert], files[fileKey]); err != nil {
		return nil, volumeKey, c.damaged(fileCert, fmt.Errorf("with %s and %s: %w", fileKey, fileCA, err))
	}
	if h.Node() != d.Node {
		return nil, volumeKey, c.foreign(fileCert, "the certificate is that of %v, %s says %v", h.Node(), fileNode, d.Node)
	}
	if pub, err := identity.RequestKey(files[fileCSR]); err != nil {
		return nil, volumeKey, c.damaged(fileCSR, errs.E(errs.Corrupt, "", "", "%v", err))
	} else if !h.Holds(pub) {
		return nil, volumeKey, c.damaged(fileCSR, errs.E(errs.Corrupt, "", "", "it is for another key"))
	}
	if d.Role == record.RoleStore {
		if volumeKey, err = decodeKey(files[fileVolume]); err != nil {
			return nil, volumeKey, c.damaged(fileVolume, err)
		}
	}
	return h, volumeKey, nil
}

// part is something that runs until its context ends.
type part struct {
	name string
	run  func(ctx context.Context) error
}

// parts lists what runs on this node, in the order of starting.
func (n *Node) parts() []part {
	ps := []part{{"clock", n.followClock}, {"ballast", n.ballast.run}, {"metrics", n.metrics.Run}, {"rpc", n.ep.Run}}
	if n.host != nil {
		ps = append(ps, part{partGroups, n.host.Run}, part{"members", n.members.Run}, part{"clocks", n.watchClocks})
	}
	ps = append(ps, part{"strangers", n.lookUp}, part{"farewell", n.farewell})
	if n.disk.Role == record.RoleClient {
		ps = append(ps, part{"logins", n.keepLogins})
	}
	if n.disk.Role != record.RoleStore {
		return append(ps, part{"seek", n.seek}, part{"follow", n.follow}, part{"steward", n.steward}, part{"control", n.ctl.Run})
	}
	return append(ps, part{"blocks", n.blocks.Run}, part{"vice", n.vice.Run}, part{"venus", n.venus.Run},
		part{"leftovers", n.leftovers}, part{"seek", n.seek}, part{"steward", n.steward}, part{"knocks", n.tellKnocks}, part{"jobs", n.jobs.out.Run},
		part{"load", func(ctx context.Context) error { return n.meter.Run(ctx, n.publish) }},
		part{"control", n.ctl.Run}, part{"tree", n.runMount}, part{"manager", n.manager.Run})
}

// Run starts the parts in order and stops them in reverse when ctx ends or one of
// them fails. A node that has left the cluster is then no longer in its
// directory.
func (n *Node) Run(ctx context.Context) error {
	syscall.Umask(0) // the kernel has applied the caller's mask already
	favour(n.cfg.Log)
	ctx, stop := context.WithCancelCause(ctx)
	defer stop(nil)
	n.end = stop
	return n.run(ctx, stop, n.parts())
}

// run runs the parts until ctx ends, which the end of one brings about by stop.
func (n *Node) run(ctx context.Context, stop context.CancelCauseFunc, parts []part) error {
	n.refreshMembers()
	type running struct {
		cancel context.CancelFunc
		done   chan struct{}
	}
	var started []running
	var errMu sync.Mutex
	var failed error
	for _, p := range parts {
		pctx, cancel := context.WithCancel(context.WithoutCancel(ctx))
		r := running{cancel, make(chan struct{})}
		started = append(started, r)
		go func() {
			defer close(r.done)
			err := p.run(pctx)
			if pctx.Err() != nil {
				return
			}
			if err == nil {
				err = errs.E(errs.Unavailable, "", "", "it ended by itself")
			}
			if p.name == partGroups {
				err = n.cfg.damaged(dirGroups, err)
			}
			errMu.Lock()
			failed = errors.Join(failed, errs.Wrap(err, p.name, ""))
			errMu.Unlock()
			stop(err)
		}()
	}
	n.cfg.Log.Info("node started", "addr", n.disk.Addr, "mount", n.cfg.Mount)
	<-ctx.Done()
	for _, r := range slices.Backward(started) {
		r.cancel()
		<-r.done
	}
	err := n.closeData()
	errMu.Lock()
	defer errMu.Unlock()
	if err = errors.Join(failed, n.stays, err); err == nil && n.gone.Load() {
		err = n.cfg.forget()
	}
	return errors.Join(err, n.lock.Close())
}

const partGroups = "groups"

// closeData lets go of the databases and the blocks, when no part runs.
func (n *Node) closeData() (err error) {
	if n.host != nil {
		err = n.host.Close()
	}
	if n.segs != nil {
		err = errors.Join(err, n.segs.Close())
	}
	return err
}

// close lets go of the disk, when no part runs.
func (n *Node) close() error { return errors.Join(n.closeData(), n.lock.Close()) }

// followClock keeps a lab's clock at what its file says.
func (n *Node) followClock(ctx context.Context) error {
	if n.cfg.shift == nil {
		<-ctx.Done()
		return nil
	}
	return n.cfg.shift.Follow(ctx, n.cfg.ClockFile, n.cfg.Log.With("part", "clock"))
}

// seek tells membership whom to look for, finishes what founding left, and then
// waits for the end of ctx.
func (n *Node) seek(ctx context.Context) error {
	var peers []ids.Node
	for name := range n.disk.snapshot().Peers {
		if p, err := ids.ParseNode(name); err == nil {
			peers = append(peers, p)
		}
	}
	for p := range *n.known.Load() {
		if !slices.Contains(peers, p) && p != n.id {
			peers = append(peers, p)
		}
	}
	if n.members != nil && len(peers) > 0 {
		if err := n.members.Join(ctx, peers); err != nil && ctx.Err() == nil {
			n.cfg.Log.Warn("no other node answers yet", "err", err)
		}
	}
	for n.disk.snapshot().Founding && ctx.Err() == nil {
		if err := n.finishFounding(ctx); err != nil && ctx.Err() == nil {
			n.cfg.Log.Warn("the cluster's record is not written yet", "err", err)
			pause(ctx, 100*time.Millisecond)
		}
	}
	<-ctx.Done()
	return nil
}

func pause(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
	case <-t.C:
	}
}
