package group

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/cockroachdb/pebble/v2"
	"github.com/prometheus/client_golang/prometheus"
	"go.etcd.io/raft/v3"
	pb "go.etcd.io/raft/v3/raftpb"
	"google.golang.org/protobuf/proto"

	"github.com/unum-os/unum/internal/errs"
	"github.com/unum-os/unum/internal/ids"
)

// stepped is the part of a Group that only the worker touches.
type stepped struct {
	rn      *raft.RawNode
	log     *groupLog
	conf    *pb.ConfState // in force in raft
	confAt  uint64        // the entry that brought it, if since the start
	shown   *pb.ConfState // in the status
	leading bool
	lead    uint64
	term    uint64
	proof   uint64 // of a leader: an entry from here on proves the configuration, see proven
	ready   bool   // leading, and an entry of its own term is committed: knows all that was acknowledged
	dirty   bool
	lacking int                      // heartbeats in a row that spoke of entries which are not here
	asking  map[proposalID]readBatch // barriers not yet confirmed
	holds   map[uint64]uint64        // snapshots on their way: peer to index, which the log must keep
	change  *proposal                // of the configuration, handed to raft in this round
	fill    *filling                 // a snapshot that raft was told of in this round
	parked  *parked                  // waits for its snapshot to be installed
	trims   bool                     // a trim of the log is under way

	// Of a leader.
	since   uint64              // tick at which it began
	settled uint64              // entries that may change the configuration end here
	told    uint64              // a witness's log may begin after this
	sent    uint64              // the floor last sent
	heard   map[ids.Node]uint64 // of a witness: when others last spoke
	heir    ids.Node            // to whom it handed over, at tick handed
	handed  uint64

	floor   uint64 // of a witness: the last entry that no full replica lacks
	yielded uint64 // no votes are taken before this tick
}

// parked is a Ready with a snapshot: no further Ready is taken until it is
// installed. Messages and ticks still reach the group.
type parked struct {
	rd        raft.Ready
	fill      *filling
	installed bool
}

// worker steps all groups: it takes what came in, asks raft what is to be done,
// and does it in rounds, each one batch and at most one sync for all groups.
type worker struct {
	h      *Host
	ctx    context.Context // of Run
	groups []*Group
	dirty  []*Group
	ticks  uint64
	events []event
	out    map[ids.Node]*outgoing
	peers  []ids.Node // memory of flush
	failed []unreachable
	later  []delayed         // in no order
	damage error             // a log that must not go on
	launch func(s *shipment) // begins to send a snapshot
}

// delayed is something to be done at a tick.
type delayed struct {
	tick uint64
	g    *Group
	fn   func()
}

// outgoing is the transport message being made for one peer.
type outgoing struct {
	buf    []byte
	groups []*Group
}

type unreachable struct {
	g  *Group
	to ids.Node
}

// turn is a group's part of a round.
type turn struct {
	g  *Group
	rd raft.Ready
}

func newWorker(h *Host, ctx context.Context) *worker {
	return &worker{h: h, ctx: ctx, out: map[ids.Node]*outgoing{}}
}

func (w *worker) run(ctx context.Context) error {
	tick := time.NewTicker(w.h.cfg.Tick)
	defer tick.Stop()
	for {
		if len(w.dirty) == 0 {
			select {
			case <-ctx.Done():
				return nil
			case <-tick.C:
				w.tick()
			case <-w.h.in.wake:
			}
		} else {
			select {
			case <-ctx.Done():
				return nil
			case <-tick.C:
				w.tick()
			default:
			}
		}
		if err := w.step(); err != nil {
			return err
		}
	}
}

// step deals with what has come in, and does one round.
func (w *worker) step() error {
	w.events = w.h.in.take(w.events)
	for i := range w.events {
		w.handle(&w.events[i])
		if w.damage != nil {
			return w.damage
		}
	}
	return w.round()
}

func (w *worker) mark(g *Group) {
	if !g.dirty {
		g.dirty = true
		w.dirty = append(w.dirty, g)
	}
}

func (w *worker) tick() {
	w.ticks++
	for _, g := range w.groups {
		g.rn.Tick()
		w.prove(g)
		w.mark(g)
		for _, id := range g.askedIDs() {
			if b := g.asking[id]; w.ticks-b.tick >= readRetryTicks {
				delete(g.asking, id)
				w.ask(g, b.readers)
			}
		}
		if w.ticks%heartbeatTicks == 0 && g.leading {
			g.showProgress()
			if w.h.cfg.Witness {
				w.showNeeds(g)
			}
		}
		if w.ticks%electionTicks == 0 && g.leading {
			w.tellFloor(g)
		}
	}
	due := w.later
	w.later = nil
	for _, d := range due {
		if d.tick > w.ticks {
			w.later = append(w.later, d)
			continue
		}
		d.fn()
		w.mark(d.g)
	}
}

// askedIDs lists the barriers under way in the order in which they were asked.
func (g *Group) askedIDs() []proposalID {
	list := make([]proposalID, 0, len(g.asking))
	for id := range g.asking {
		list = append(list, id)
	}
	slices.SortFunc(list, func(a, b proposalID) int { return bytes.Compare(a[:], b[:]) })
	return list
}

func (w *worker) handle(e *event) {
	g := e.g
	switch e.kind {
	case evMessage:
		if w.acceptable(g, e.msg) && !w.yields(g, e.msg) {
			if w.h.cfg.Witness {
				g.heard[ids.Node(e.msg.GetFrom())] = w.ticks
			}
			// Errors mean that raft does not want the message (now).
			_ = g.rn.Step(e.msg)
		}
	case evPropose:
		w.propose(g, e.p)
	case evRead:
		g.mu.Lock()
		readers := g.reads
		g.reads, g.asked = nil, false
		g.mu.Unlock()
		w.ask(g, readers)
	case evOpen:
		w.groups = append(w.groups, g)
		w.h.tails.logs = append(w.h.tails.logs, g.log)
		if c := (conf{g.conf}).voters(); len(c) == 1 && c[0] == w.h.cfg.Self {
			_ = g.rn.Campaign() // nobody to wait for; the first tick tries again
		}
	case evCall:
		e.fn()
	case evSnapshot:
		w.offer(g, e.fill)
	case evInstalled:
		g.parked.installed = true
	case evFloor:
		w.hear(g, e.from, e.index)
	case evKnown:
		w.learn(g, e.from, e.index, e.term)
	}
	w.mark(g)
}

// maxLacking is how many heartbeats in a row may speak of entries that are not
// here before the log has lost them: one or two may be late, from before this
// replica began anew.
const maxLacking = 3

// acceptable refuses messages that a sound peer would not send to a sound
// replica, and appends when too much waits to be applied.
func (w *worker) acceptable(g *Group, m *pb.Message) bool {
	switch m.GetType() {
	case pb.MsgApp:
		if w.contradicts(g, m) {
			return false
		}
		return len(m.Entries) == 0 || w.h.backlog.Load() < maxBacklog
	case pb.MsgHeartbeat:
		if m.GetCommit() <= g.log.last || g.parked != nil {
			g.lacking = 0
			return true
		}
		b := g.rn.BasicStatus()
		if m.GetTerm() >= b.GetTerm() {
			g.lacking++
		}
		if g.lacking > maxLacking {
			w.damage = w.lost(g, m)
			return false
		}
		// The leader is heard, so that nobody is elected meanwhile; what it says of
		// the log is not believed, for the log's end may be what it was long ago.
		m.Commit = new(b.GetCommit())
	case pb.MsgVote, pb.MsgPreVote, pb.MsgVoteResp, pb.MsgPreVoteResp, pb.MsgTimeoutNow:
		return g.lacking == 0 // else this one might elect, or be, who lacks what is committed
	case pb.MsgAppResp:
		if m.GetIndex() <= g.log.last && m.GetRejectHint() <= g.log.last {
			return true
		}
		// Else it is of an earlier leader's entries, who may have been this node before
		// it lost its memory.
		if b := g.rn.BasicStatus(); b.RaftState == raft.StateLeader && m.GetTerm() == b.GetTerm() {
			w.differ(g, m)
		}
		return false
	case pb.MsgReadIndex:
		// Raft would pass it on in its sender's name, which the leader refuses,
		// and with it all that this node has to say. The sender asks again.
		return g.rn.BasicStatus().RaftState == raft.StateLeader && !g.out() // raft would not ask the only voter left
	}
	return true
}

// contradicts reports whether a leader has another entry where this replica has a
// committed one, which raft makes impossible: what was acknowledged is missing there,
// because disks have lost what they had confirmed. Nothing of such a leader is
// taken. Raft would refuse the message too, and answer it, again and again.
func (w *worker) contradicts(g *Group, m *pb.Message) bool {
	b := g.rn.BasicStatus()
	if g.parked != nil || m.GetTerm() < b.GetTerm() || m.GetIndex() > b.GetCommit() {
		return false
	}
	t, err := g.log.Term(m.GetIndex())
	if err != nil || t == m.GetLogTerm() {
		return false
	}
	w.differ(g, m)
	return true
}

// differ brings into the status that the sender and this replica have different
// entries committed: a leader other ones than this, or a follower some that are not
// here.
func (w *worker) differ(g *Group, m *pb.Message) {
	g.mu.Lock()
	known := g.st.Contradicts
	g.st.Contradicts = ids.Node(m.GetFrom())
	g.mu.Unlock()
	if known == 0 {
		w.h.log.Error("raft message refused: it speaks of other committed entries than are here; disks have lost what they had confirmed",
			"group", uint64(g.id), "type", m.GetType(), "from", ids.Node(m.GetFrom()), "index", m.GetIndex(), "last", g.log.last)
	}
}

// lost deals with a log that lacks what this replica has acknowledged: a leader's
// heartbeat speaks of no entry that is not committed and acknowledged by the one
// it is sent to. The disk has lost what it confirmed. Such a replica must not
// vote: it would help to elect who lacks the same. The commit index is kept, so
// that the next start finds the damage too.
func (w *worker) lost(g *Group, m *pb.Message) error {
	hard := proto.Clone(g.log.hard).(*pb.HardState)
	hard.Commit = m.Commit
	b := w.h.logDB.NewBatch()
	defer b.Close()
	err := g.log.write(b, nil, hard)
	if err == nil {
		err = dbErr(b.Commit(pebble.Sync), "note the loss", fmt.Sprintf("log of group %d", g.id))
	}
	return errors.Join(errs.E(errs.Corrupt, "follow", fmt.Sprintf("log of group %d", g.id), "it ends at %d, but %v leads with entries up to %d that were acknowledged here: the disk has lost what it had confirmed",
		g.log.last, ids.Node(m.GetFrom()), m.GetCommit()), err)
}

func (w *worker) propose(g *Group, p *proposal) {
	refuse := func(err error) { g.resolve(p.id, outcome{err: err}) }
	b := g.rn.BasicStatus()
	switch {
	case p.ctx.Err() != nil:
		refuse(waitErr(p.ctx, "propose to group", g.id, ""))
		return
	case b.RaftState != raft.StateLeader:
		refuse(&NotLeaderError{g.id, ids.Node(b.Lead)})
		return
	case w.h.cfg.Witness: // changes of its replicas too: it has no say in them
		refuse(g.notHere("propose to group"))
		return
	case g.out():
		refuse(errs.E(errs.Busy, "propose to group", fmt.Sprint(g.id), "%v has no vote any more: it leads only until another can", w.h.cfg.Self))
		return
	case b.LeadTransferee != 0:
		refuse(errs.E(errs.Busy, "propose to group", fmt.Sprint(g.id), "leadership is moving to %v", ids.Node(b.LeadTransferee)))
		return
	}
	var err error
	if p.change == nil {
		err = g.rn.Propose(p.data)
	} else {
		err = w.proposeChange(g, p)
	}
	if err != nil {
		if err == raft.ErrProposalDropped {
			err = errs.E(errs.Busy, "propose to group", fmt.Sprint(g.id), "too much is waiting for a majority")
		}
		refuse(err)
		return
	}
	p.handed = true
}

// ask starts a read barrier with a new context for those still waiting.
func (w *worker) ask(g *Group, readers []*reader) {
	var left []*reader
	for _, r := range readers {
		if r.ctx.Err() == nil {
			left = append(left, r)
		}
	}
	if len(left) == 0 {
		return
	}
	switch k := w.h.cfg.Hooks; {
	case k.plants(ReuseReadContext):
		for _, id := range g.askedIDs() {
			batch := g.asking[id]
			batch.readers = append(batch.readers, left...)
			g.asking[id] = batch
			return
		}
	case k.plants(LocalRead) && g.leading:
		g.mu.Lock()
		g.confirmed = append(g.confirmed, readBatch{index: g.rn.BasicStatus().GetCommit(), readers: left})
		g.mu.Unlock()
		g.releaseReads()
		return
	}
	id := w.h.newID()
	g.asking[id] = readBatch{readers: left, tick: w.ticks}
	if g.leading && !g.ready || g.out() {
		return // raft checks this itself, but not for a single voter
	}
	g.rn.ReadIndex(id[:])
}

// round does what raft asks for, for all groups that have something.
func (w *worker) round() error {
	if len(w.dirty) == 0 {
		return nil
	}
	work := w.dirty
	w.dirty = nil
	b := w.h.logDB.NewBatch()
	defer b.Close()
	sync := false
	var turns []turn
	var parking []*Group
	for _, g := range work {
		g.dirty = false
		if g.parked != nil {
			if g.parked.installed {
				t, err := w.unpark(g, b)
				if err != nil {
					return err
				}
				turns, sync = append(turns, t), true
			}
			g.dropFill("a snapshot is being installed")
			continue
		}
		w.handOver(g)
		if !g.rn.HasReady() {
			g.dropFill("not wanted")
			continue
		}
		rd := g.rn.Ready()
		w.notice(g)
		if !raft.IsEmptySnap(rd.Snapshot) {
			if err := w.park(g, rd, b); err != nil {
				return err
			}
			parking, sync = append(parking, g), true
			continue
		}
		g.dropFill("not wanted")
		switch {
		case w.h.cfg.Hooks.plants(AckBeforeSync):
			w.sendAll(g, rd.Messages)
		case g.leading: // the others may write while this node does
			w.send(g, rd.Messages, true)
		}
		w.match(g, rd.Entries)
		hard := rd.HardState
		if hard != nil && w.h.cfg.Hooks.plants(ForgetVote) {
			hard = &pb.HardState{Term: hard.Term, Commit: hard.Commit, Vote: new(uint64)}
		}
		if err := g.log.write(b, rd.Entries, hard); err != nil {
			return dbErr(err, "write log of group", fmt.Sprint(g.id))
		}
		sync = sync || rd.MustSync || changesReplicas(rd.CommittedEntries)
		turns = append(turns, turn{g, rd})
	}
	w.flush()
	if err := w.commit(b, sync); err != nil {
		return err
	}
	for _, g := range parking {
		w.h.apply.push(applyItem{g: g, install: g.parked.fill})
	}
	for _, t := range turns {
		if err := w.finish(t); err != nil {
			return err
		}
	}
	w.flush()
	for _, f := range w.failed {
		f.g.rn.ReportUnreachable(uint64(f.to))
		w.mark(f.g)
	}
	w.failed = w.failed[:0]
	return nil
}

// changesReplicas tells whether a configuration is committed with the entries. The
// commit must then be durable before anybody hears of it: who was taken out may
// go for good, and a node that forgets would wait for its vote for ever.
func changesReplicas(ents []*pb.Entry) bool {
	return slices.ContainsFunc(ents, func(e *pb.Entry) bool { return e.GetType() == pb.EntryConfChangeV2 })
}

func (w *worker) commit(b *pebble.Batch, sync bool) error {
	if b.Empty() {
		return nil
	}
	o := pebble.NoSync
	if sync && !w.h.cfg.Hooks.plants(SkipSync) {
		o = pebble.Sync
	}
	if sync {
		defer prometheus.NewTimer(w.h.count.syncs).ObserveDuration()
	}
	return dbErr(b.Commit(o), "write", "raft log")
}

// finish does what comes after the sync.
func (w *worker) finish(t turn) error {
	g, rd := t.g, t.rd
	g.log.wrote(rd.Entries, rd.HardState)
	k := w.h.cfg.Hooks
	if k != nil && k.Wrote != nil {
		k.Wrote(g.id, rd.Entries)
	}
	switch {
	case k.plants(AckBeforeSync):
	case g.leading:
		w.send(g, rd.Messages, false)
	default:
		w.sendAll(g, rd.Messages)
	}
	if k != nil && k.Committed != nil {
		k.Committed(g.id, g.term, rd.CommittedEntries)
	}
	item := applyItem{g: g, entries: rd.CommittedEntries}
	for _, e := range rd.CommittedEntries {
		item.bytes += int64(entrySize(e))
		if e.GetType() == pb.EntryConfChangeV2 {
			cs, err := w.applyChange(g, e)
			if err != nil {
				return err
			}
			item.confs = append(item.confs, cs)
		}
	}
	if len(item.entries) > 0 {
		w.h.backlog.Add(item.bytes)
		w.h.apply.push(item)
	}
	for _, rs := range rd.ReadStates {
		id := proposalID{}
		copy(id[:], rs.RequestCtx)
		if batch, ok := g.asking[id]; ok {
			delete(g.asking, id)
			batch.index = rs.Index
			g.mu.Lock()
			g.confirmed = append(g.confirmed, batch)
			g.mu.Unlock()
			g.releaseReads()
		}
	}
	g.rn.Advance(rd)
	if err := g.log.readErr; err != nil {
		return err
	}
	w.prove(g)
	w.notice(g)
	g.measure()
	w.trim(g)
	if g.rn.HasReady() {
		w.mark(g)
	}
	return nil
}

// notice looks at role, term and leader, and ends what does not outlive them.
func (w *worker) notice(g *Group) {
	b := g.rn.BasicStatus()
	leading := b.RaftState == raft.StateLeader
	if g.leading && (!leading || b.GetTerm() != g.term) {
		g.failProposals(errs.E(errs.Timeout, "propose to group", fmt.Sprint(g.id),
			"this node stopped leading the group; the outcome is unknown"))
		clear(g.holds)
	}
	again := b.Lead != g.lead && b.Lead != 0 // what the old leader was asked is lost
	if !leading || b.GetTerm() != g.term {
		g.ready = false
	}
	if leading && (!g.leading || b.GetTerm() != g.term) {
		g.since, g.settled, g.told, g.sent, g.heir, g.proof = w.ticks, 0, 0, 0, 0, 0
		clear(g.heard)
	}
	g.leading, g.lead, g.term = leading, b.Lead, b.GetTerm()
	if leading && !g.ready {
		t, err := g.log.Term(b.GetCommit())
		if g.ready = err == nil && t == g.term; g.ready {
			g.settled, g.told = max(g.settled, b.GetCommit()), max(g.told, b.GetCommit()) // whatever the leaders before did
		}
		again = again || g.ready
	}
	g.publish()
	if again && len(g.asking) > 0 {
		var readers []*reader
		for _, id := range g.askedIDs() {
			readers = append(readers, g.asking[id].readers...)
		}
		clear(g.asking)
		w.ask(g, readers)
		w.mark(g)
	}
}

// match gives proposals of this node their index, and finds a change of the
// configuration that raft turned into nothing.
func (w *worker) match(g *Group, ents []*pb.Entry) {
	if !g.leading {
		g.change = nil
		return
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	for _, e := range ents {
		if p := g.props[entryID(e)]; p != nil {
			p.index = e.GetIndex()
			g.byIndex[p.index] = p
			if w.h.cfg.Hooks.plants(AnswerEarly) {
				g.resolveLocked(p.id, outcome{index: p.index})
			}
		}
		if e.GetType() == pb.EntryConfChangeV2 {
			g.settled = e.GetIndex()
		}
	}
	if p := g.change; p != nil && p.index == 0 {
		g.resolveLocked(p.id, outcome{err: errPending(g.id)})
	}
	g.change = nil
}

// entryID returns the id of the proposal that made e, or zeros.
func entryID(e *pb.Entry) (id proposalID) {
	switch e.GetType() {
	case pb.EntryNormal:
		if len(e.Data) > entryHeader {
			copy(id[:], e.Data[1:])
		}
	case pb.EntryConfChangeV2:
		cc := &pb.ConfChangeV2{}
		if proto.Unmarshal(e.Data, cc) == nil && len(cc.Context) == len(id) {
			copy(id[:], cc.Context)
		}
	}
	return id
}

// early tells which of a leader's messages promise nothing about its own disk.
func early(m *pb.Message) bool {
	return m.GetType() == pb.MsgApp || m.GetType() == pb.MsgHeartbeat
}

// send passes on a leader's messages, the early ones or the others.
func (w *worker) send(g *Group, msgs []*pb.Message, now bool) {
	for _, m := range msgs {
		if early(m) == now {
			w.post(g, m)
		}
	}
}

func (w *worker) sendAll(g *Group, msgs []*pb.Message) {
	for _, m := range msgs {
		w.post(g, m)
	}
}

func (w *worker) post(g *Group, m *pb.Message) {
	to := ids.Node(m.GetTo())
	if m.GetType() == pb.MsgSnap {
		w.startSnapshot(g, m)
		return
	}
	o := w.outgoing(to, g)
	if len(o.buf) > 0 && len(o.buf)+proto.Size(m) > frameTarget {
		w.deliver(to, o)
		o.groups = append(o.groups, g)
	}
	b, err := appendMessage(o.buf, g.id, m)
	if err != nil { // our own message does not encode
		panic(err)
	}
	o.buf = b
	switch m.GetType() {
	case pb.MsgPreVote, pb.MsgPreVoteResp, pb.MsgVote, pb.MsgVoteResp:
		w.tellKnown(g, o)
	}
}

// outgoing returns the transport message for to, which gets something of g.
func (w *worker) outgoing(to ids.Node, g *Group) *outgoing {
	o := w.out[to]
	if o == nil {
		o = &outgoing{}
		w.out[to] = o
	}
	if n := len(o.groups); n == 0 || o.groups[n-1] != g {
		o.groups = append(o.groups, g)
	}
	return o
}

func (w *worker) flush() {
	peers := w.peers[:0]
	for to, o := range w.out {
		if len(o.buf) > 0 {
			peers = append(peers, to)
		}
	}
	slices.Sort(peers)
	for _, to := range peers {
		w.deliver(to, w.out[to])
	}
	w.peers = peers
}

func (w *worker) deliver(to ids.Node, o *outgoing) {
	if err := w.h.cfg.Transport.Send(to, o.buf); err != nil {
		for _, g := range o.groups {
			w.failed = append(w.failed, unreachable{g, to})
			w.h.count.dropped.Add(1)
		}
	}
	clear(o.groups)
	o.buf, o.groups = nil, o.groups[:0]
}

// Receive takes a transport message from another node's host. Errors: Corrupt
// for what no host sends (nothing of it is used), Busy when it is dropped.
// msg is the host's from now on.
func (h *Host) Receive(from ids.Node, msg []byte) error {
	ms, err := decodeMessages(from, h.cfg.Self, msg)
	if err != nil {
		return err
	}
	dropped := 0
	for _, m := range ms {
		g := h.Group(m.g)
		if g == nil { // not here, or not open yet
			continue
		}
		e := event{kind: evMessage, g: g, msg: m.m, size: m.size}
		if m.m == nil {
			e.kind, e.from, e.index, e.term = evFloor, from, m.index, m.term
			if m.term > 0 {
				e.kind = evKnown
			}
		}
		if !h.in.push(e) {
			dropped++
		}
	}
	h.count.dropped.Add(uint64(dropped))
	if dropped > 0 {
		return errs.E(errs.Busy, "take raft messages", "from "+from.String(), "%d dropped", dropped)
	}
	return nil
}
