package node

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
	"golang.org/x/sys/unix"

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

// Kinds of gossip words.
const wordLoad = 'l' // sched.Load of the sender

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

// runMount mounts the tree once there is a session: no program sees it before.
func (n *Node) runMount(ctx context.Context) error {
	for !n.venus.Ready() {
		pause(ctx, 10*time.Millisecond)
		if ctx.Err() != nil {
			return nil
		}
	}
	// A daemon that was killed leaves its mount, which answers everything so.
	for _, err := os.Stat(n.cfg.Mount); errors.Is(err, syscall.ENOTCONN); _, err = os.Stat(n.cfg.Mount) {
		if err := unix.Unmount(n.cfg.Mount, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW); err != nil {
			return errs.Wrap(err, "take away the dead mount", n.cfg.Mount)
		}
		n.cfg.Log.Info("dead mount taken away", "dir", n.cfg.Mount)
	}
	if err := os.MkdirAll(n.cfg.Mount, 0o755); err != nil {
		return errs.Wrap(err, "mount", n.cfg.Mount)
	}
	rctx, over := context.WithCancel(ctx)
	var ready sync.WaitGroup
	ready.Go(func() {
		select {
		case <-n.mount.Ready():
			n.mounted.Store(true)
		case <-rctx.Done():
		}
	})
	defer n.mounted.Store(false)
	defer ready.Wait()
	defer over()
	return n.mount.Run(ctx)
}

// refreshMembers reads the members anew, from this node's replica of the record.
func (n *Node) refreshMembers() error {
	if n.disk.Role != record.RoleStore {
		return nil
	}
	l, err := n.memberList()
	if err != nil {
		n.cfg.Log.Error("cannot read the members", "err", err)
		return err
	}
	n.setMembers(l)
	return nil
}

// memberList returns the members as this replica has them.
func (n *Node) memberList() (l memberList, err error) {
	v := n.record.view()
	if l.Revision, err = v.Revision(); err == nil { // before the members, which may then be newer
		l.Members, err = v.Members()
	}
	return l, err
}

// setMembers makes a list what is known, unless it is older than what is; it
// reports whether it has.
func (n *Node) setMembers(l memberList) bool {
	m := make(map[ids.Node]record.Member, len(l.Members))
	for _, x := range l.Members {
		m[x.ID] = x
	}
	n.roster.Lock()
	defer n.roster.Unlock()
	if l.Revision < n.revision {
		return false
	}
	n.revision = l.Revision
	n.known.Store(&m)
	n.nudge()
	return true
}

// resolve returns a node's address.
func (n *Node) resolve(p ids.Node) (string, bool) {
	if m, ok := (*n.known.Load())[p]; ok {
		return m.Addr, m.Addr != ""
	}
	a, ok := n.disk.snapshot().Peers[p.String()]
	return a, ok
}

// alive reports whether a node is believed to be. Client nodes take no part in
// the gossip: they are alive while they are connected, and believe of the others
// what a node that stores told them last. Nobody is alive at whose address another
// answers: gossip needs two seconds to find out, and a machine that came back as
// another node is heard of sooner.
func (n *Node) alive(p ids.Node) bool {
	switch {
	case p == n.id:
		return true
	case n.displacer(p) != 0:
		return false
	case n.members == nil:
		heard := n.heard.Load()
		return heard != nil && slices.Contains(*heard, p) || n.ep.Connected(p)
	case (*n.known.Load())[p].Role == record.RoleClient:
		return n.ep.Connected(p)
	}
	return n.members.IsAlive(p)
}

// displacer returns the member that answers at p's address in p's place, 0 if none
// is known to.
func (n *Node) displacer(p ids.Node) ids.Node {
	known := *n.known.Load()
	m, ok := known[p]
	if !ok || m.Addr == "" || p == n.id {
		return 0
	}
	at, when := n.ep.Reached(p)
	for q, x := range known {
		switch {
		case q == p || x.Addr != m.Addr || !x.State.Belongs():
		case q == n.id && at != m.Addr:
			return q
		case q != n.id:
			if qat, qwhen := n.ep.Reached(q); qat == m.Addr && (at != m.Addr || qwhen.After(when)) {
				return q
			}
		}
	}
	return 0
}

// successor returns the last member that came after m at its address and was
// admitted, whether or not it is one still; 0: none.
func (n *Node) successor(m record.Member) (last ids.Node) {
	for q, x := range *n.known.Load() {
		if q > max(m.ID, last) && x.Addr == m.Addr && x.State > record.Joining {
			last = q
		}
	}
	return last
}

// current lists the members that belong to the cluster, in order.
func (n *Node) current() []record.Member {
	var out []record.Member
	for _, m := range *n.known.Load() {
		if m.State.Belongs() {
			out = append(out, m)
		}
	}
	slices.SortFunc(out, func(a, b record.Member) int { return int(a.ID) - int(b.ID) })
	return out
}

func (n *Node) hostname(p ids.Node) string { return (*n.known.Load())[p].Hostname }

// byName finds a node by what people call it.
func (n *Node) byName(name string) (ids.Node, error) {
	if name == "." || name == "local" {
		return n.id, nil
	}
	var found []ids.Node
	for _, m := range n.current() {
		if m.ID.String() == name {
			return m.ID, nil
		}
		if m.Hostname == name {
			found = append(found, m.ID)
		}
	}
	switch len(found) {
	case 1:
		return found[0], nil
	case 0:
		return 0, errs.E(errs.NotFound, "find node", name, "there is no such node").WithRemedy("unum nodes")
	}
	return 0, errs.E(errs.Invalid, "find node", name, "%d nodes have this host name", len(found)).WithRemedy("unum nodes, and name it by its id")
}

// askFirst lists nodes that may know the groups' leaders: those that store, this
// one first.
func (n *Node) askFirst() []ids.Node {
	var out []ids.Node
	if n.disk.Role == record.RoleStore {
		out = append(out, n.id)
	}
	for _, m := range n.current() {
		if m.ID != n.id && m.Role == record.RoleStore {
			out = append(out, m.ID)
		}
	}
	if len(out) == 0 { // nobody is known yet but whom the joining named
		for name := range n.disk.snapshot().Peers {
			if p, err := ids.ParseNode(name); err == nil {
				out = append(out, p)
			}
		}
		slices.Sort(out)
	}
	return out
}

// witness reports whether a node keeps logs only.
func (n *Node) witness(p ids.Node) bool {
	return (*n.known.Load())[p].Role == record.RoleWitness || p == n.id && n.disk.Role == record.RoleWitness
}

// storing lists the nodes that keep the root volume's blocks: its voters but
// for a witness.
func (n *Node) storing() []ids.Node {
	voters := n.root.Status().Voters
	if v := n.unseated.Load(); v != nil {
		voters = *v
	}
	return slices.DeleteFunc(slices.Clone(voters), n.witness)
}

// holders lists the nodes that may have blocks: all that store.
func (n *Node) holders() []ids.Node {
	var out []ids.Node
	for _, m := range n.current() {
		if m.Role == record.RoleStore {
			out = append(out, m.ID)
		}
	}
	return out
}

// walkBlocks names every block of the root volume.
func (n *Node) walkBlocks(yield func(volume.BlockName) bool) error {
	snap := n.host.State().NewSnapshot()
	err := volume.NewView(snap, n.root.Space()).WalkBlocks(func(b volume.BlockName, _ uint32) bool { return yield(b) })
	return errors.Join(err, snap.Close())
}

// space returns the least free bytes among the storing nodes that are heard of.
func (n *Node) space() uint64 {
	least := ^uint64(0)
	if free, err := n.segs.Free(); err == nil {
		least = uint64(max(free, 0))
	}
	store := n.storing()
	for _, l := range n.loads.Snapshot(clock.Now()) {
		if slices.Contains(store, l.Node) && l.Node != n.id && l.DiskTotal > 0 {
			least = min(least, l.DiskTotal-min(l.DiskUsed, l.DiskTotal))
		}
	}
	return least
}

// publish notes this node's load, and tells everybody if it is news to them. Only
// the load meter calls it.
func (n *Node) publish(l sched.Load) {
	now := clock.Now()
	n.loads.Put(now, l)
	if now.Sub(n.toldAt) < load.TellEvery-load.Every/2 && !load.Changed(n.told, l) {
		return
	}
	n.told, n.toldAt = l, now
	if err := n.members.Broadcast(wordLoad, wire.MustMarshal(l)); err != nil {
		n.cfg.Log.Debug("load not told", "err", err)
	}
}

// onMember reacts to a node that comes or goes; its jobs are the steward's.
func (n *Node) onMember(p ids.Node, alive bool) {
	n.cfg.Log.Info("member changed", "member", p.String(), "alive", alive)
	n.nudge()
	if !alive {
		n.loads.Remove(p)
	}
}

// minMemory is what a node must have free to accept a command, in bytes; the
// sentence of accept says it too.
const minMemory = 64 << 20

// accept decides by this node's own numbers whether a job may start here.
func (n *Node) accept(proc.Demand) error {
	for _, l := range n.loads.Snapshot(clock.Now()) {
		if l.Node == n.id && l.MemTotal > 0 && l.MemTotal-min(l.MemUsed, l.MemTotal) < minMemory {
			return errs.E(errs.Busy, "start", "", "%v has less than 64 MiB of memory left", n.id)
		}
	}
	return nil
}

// place chooses a node for a command.
func (n *Node) place(ctx context.Context, d proc.Demand) (ids.Node, []byte, error) {
	now := clock.Now()
	known := *n.known.Load()
	loads := slices.DeleteFunc(n.loads.Snapshot(now), func(l sched.Load) bool {
		return !n.members.IsAlive(l.Node) || known[l.Node].State == record.Leaving
	})
	turn := n.turn.Add(1)
	dec := sched.Decide(sched.Inputs{Policy: sched.EPVM, Home: n.id, Seed: uint64(now) ^ turn<<32, Turn: turn,
		Limit: n.loads.Limit(), Loads: loads, Exclude: d.Not})
	if dec.Chosen == 0 {
		var why []string
		for _, c := range dec.Candidates {
			why = append(why, fmt.Sprintf("%v: %s", c.Node, c.Refused))
		}
		if len(why) == 0 {
			why = append(why, "no node's load is known yet")
		}
		return 0, nil, errs.E(errs.Busy, "place the command", "", "no node can take it (%s)", strings.Join(why, "; ")).WithRemedy("unum nodes")
	}
	n.loads.Placed(now, dec.Chosen, sched.Demand{})
	return dec.Chosen, dec.Receipt(), nil
}

// explain turns a receipt into words.
func explain(receipt []byte, asJSON bool) (string, error) {
	d, err := sched.Decode(receipt)
	if err != nil {
		return "", err
	}
	if asJSON {
		b, err := sched.JSON(d)
		return string(b), err
	}
	return sched.Explain(d), nil
}
