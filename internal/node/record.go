package node

import (
	"context"
	"errors"
	"log/slog"
	"math/rand/v2"
	"slices"
	"sync"
	"time"
	"unicode/utf8"

	"github.com/unum-os/unum/internal/clock"
	"github.com/unum-os/unum/internal/errs"
	"github.com/unum-os/unum/internal/group"
	"github.com/unum-os/unum/internal/ids"
	"github.com/unum-os/unum/internal/principal"
	"github.com/unum-os/unum/internal/proc"
	"github.com/unum-os/unum/internal/record"
	"github.com/unum-os/unum/internal/rpc"
	"github.com/unum-os/unum/internal/wire"
)

// recordClient proposes to the cluster's record from any node, exactly once, and
// reads this node's replica of it, if it has one.
type recordClient struct {
	g      *group.Group // nil on a client node
	h      *group.Host
	ep     *rpc.Endpoint
	others func() []ids.Node // that store; this node may be among them
	log    *slog.Logger
	clock  clock.Clock

	// For what other nodes propose through this one.
	believe func(ctx context.Context, from ids.Node, who principal.Principal, proof []byte, what string) (stores bool, err error)
	knocks  *knocks

	mu     sync.Mutex
	client uint64
	seq    uint64
	flying map[uint64]struct{}
}

const (
	methodPropose = "record.propose" // an encoded record.Command -> record.Result; the leader answers
	methodForward = "record.forward" // the same; any node that stores answers, and asks the leader
)

func newRecordClient(n *Node) *recordClient {
	r := &recordClient{clock: n.cfg.Clock, g: n.rec, h: n.host, ep: n.ep, others: n.askFirst, log: n.part("record"), client: rand.Uint64() | 1, flying: map[uint64]struct{}{}}
	if n.disk.Role != record.RoleStore {
		return r
	}
	r.believe, r.knocks = n.believe, &n.knocks
	r.ep.Handle(methodPropose, r.door(r.local))
	r.ep.Handle(methodForward, r.door(r.forward))
	return r
}

// door is the door of the record: what another node proposes must come from who
// it says, and not be too much. A storing node has looked at it already, or it is
// its own. What others send gets this node's time, for it is for the audit.
func (r *recordClient) door(propose func(context.Context, []byte) (*record.Result, error)) func(context.Context, ids.Node, []byte, []byte) (any, []byte, error) {
	return func(ctx context.Context, from ids.Node, req, proof []byte) (any, []byte, error) {
		c, err := record.DecodeCommand(req)
		if err != nil {
			return nil, nil, err
		}
		stores, err := r.believe(ctx, from, c.Who, proof, "propose")
		if err != nil {
			return nil, nil, err
		}
		settle := func(bool) {}
		if !stores {
			if settle, err = r.knocks.propose(from, len(req), time.Now()); err != nil {
				return nil, nil, err
			}
			c.Now = r.clock.Wall().UnixNano()
			if req, err = wire.Marshal(c); err != nil {
				settle(false)
				return nil, nil, err
			}
		}
		res, err := propose(ctx, req)
		// One that was given up may be refused yet.
		settle(res != nil && res.Denied() || err != nil && ctx.Err() != nil)
		return res, nil, err
	}
}

// forward proposes on this node, or through the one that leads.
func (r *recordClient) forward(ctx context.Context, cmd []byte) (*record.Result, error) {
	res, err := r.local(ctx, cmd)
	var no *group.NotLeaderError
	if errors.As(err, &no) && no.Leader != 0 {
		res = &record.Result{}
		_, err = r.ep.Call(ctx, no.Leader, methodPropose, rawItem(cmd), nil, res)
	}
	return res, err
}

// local proposes on this node, which must lead.
func (r *recordClient) local(ctx context.Context, cmd []byte) (*record.Result, error) {
	res, _, err := r.g.Propose(ctx, cmd)
	if err != nil {
		return nil, err
	}
	out, ok := res.(*record.Result)
	if !ok {
		return nil, errs.E(errs.Unknown, "record", "", "unexpected result %T", res)
	}
	return out, nil
}

// do has one command done exactly once, whoever leads, until ctx ends. A command
// that does not say who asks is this node's own.
func (r *recordClient) do(ctx context.Context, c record.Command) (*record.Result, error) {
	return r.doAs(ctx, c, nil)
}

const (
	// recordLimit bounds a command to the record whose caller has set no time:
	// longer than an election.
	recordLimit = 20 * time.Second
	// recordFirst is the pause before a command is sent again that found no leader;
	// it doubles up to recordMost.
	recordFirst = 5 * time.Millisecond
	recordMost  = 200 * time.Millisecond
	// freshLimit bounds the asking of the leader how far the record is, before jobs
	// are looked up here; after it what is here must do.
	freshLimit = 2 * time.Second
)

// doAs is do for who shows a proof.
func (r *recordClient) doAs(ctx context.Context, c record.Command, proof principal.Proof) (*record.Result, error) {
	if _, ok := ctx.Deadline(); !ok {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, recordLimit)
		defer cancel()
	}
	if c.Who == (principal.Principal{}) {
		c.Who = principal.Of(r.ep.Self())
	}
	if c.Now == 0 {
		c.Now = r.clock.Wall().UnixNano()
	}
	r.mu.Lock()
	r.seq++
	c.Client, c.Seq = r.client, r.seq
	r.flying[c.Seq] = struct{}{}
	r.mu.Unlock()
	defer func() {
		r.mu.Lock()
		delete(r.flying, c.Seq)
		r.mu.Unlock()
	}()
	for try, wait := 0, recordFirst; ; try, wait = try+1, min(2*wait, recordMost) {
		c.Acked = r.acked(c.Seq) // more each time: who waits for a place behind others would wait for ever
		cmd, err := wire.Marshal(c)
		if err != nil {
			return nil, err
		}
		res, err := r.ask(ctx, try, cmd, proof)
		if err == nil && errs.Class(res.Refusal.Err) == errs.Busy { // too far ahead of the oldest: it was not done
			err = res.Refusal.Error("", "")
		} else if err == nil {
			return res, res.Refusal.Error("", "")
		}
		switch errs.ClassOf(err) {
		case errs.NotLeader, errs.Unavailable, errs.Timeout, errs.NoQuorum, errs.Busy:
		case errs.IO: // whose disk fails, ends: another leads then
		default:
			return nil, err
		}
		t := time.NewTimer(wait)
		select {
		case <-t.C:
		case <-ctx.Done():
			t.Stop()
			return nil, unanswered(err)
		}
	}
}

// unanswered is why the record gave no answer in time, and where to look.
func unanswered(err error) error {
	return errs.E(errs.ClassOf(err), "ask the record", "", "it does not answer: %s", firstLine(err)).WithRemedy("unum status")
}

// acked returns the oldest command that has no answer yet, seq among them.
func (r *recordClient) acked(seq uint64) uint64 {
	r.mu.Lock()
	defer r.mu.Unlock()
	for s := range r.flying {
		seq = min(seq, s)
	}
	return seq
}

// ask makes one attempt: at the leader, if this replica knows one, and every
// second time through another node that stores, which may know better: a
// replica that was taken out of the group, or that a node never had, does not.
func (r *recordClient) ask(ctx context.Context, try int, cmd []byte, proof principal.Proof) (*record.Result, error) {
	var leader ids.Node
	if r.g != nil {
		leader, _ = r.g.Leader()
	}
	res := &record.Result{}
	if leader == r.ep.Self() {
		return r.local(ctx, cmd)
	}
	if leader != 0 && try%2 == 0 {
		_, err := r.ep.Call(ctx, leader, methodPropose, rawItem(cmd), nil, res)
		return res, err
	}
	others := slices.DeleteFunc(r.others(), func(p ids.Node) bool { return p == r.ep.Self() })
	if len(others) == 0 {
		return nil, errs.E(errs.NoQuorum, "record", "", "too few storing nodes answer to elect a leader").WithRemedy("unum status")
	}
	_, err := r.ep.Call(ctx, others[try/2%len(others)], methodForward, rawItem(cmd), proof, res)
	if errs.Has(err, errs.NotLeader) {
		err = errs.E(errs.NoQuorum, "record", "", "too few storing nodes answer to elect a leader").WithRemedy("unum status")
	}
	return res, err
}

// rawItem sends an encoded command as it is.
type rawItem []byte

// MarshalCBOR implements cbor.Marshaler.
func (b rawItem) MarshalCBOR() ([]byte, error) { return b, nil }

// view reads this node's replica as of now.
func (r *recordClient) view() record.View { return record.NewView(r.h.State(), r.g.Space()) }

// info returns the cluster's identity. This node's replica is then not behind
// what was known when it was called.
func (r *recordClient) info(ctx context.Context) (record.Info, error) {
	if _, err := r.g.ReadIndex(ctx); err != nil {
		return record.Info{}, err
	}
	return r.view().Info()
}

// jobRange is how many job ids a node takes at a time: one proposal in a
// thousand commands.
const jobRange = 1000

// registry is the record of jobs as package proc sees it.
type registry struct {
	r   *recordClient
	log *slog.Logger
	out *proc.Outbox

	fetch chan struct{} // semaphore of one

	mu         sync.Mutex
	next, last ids.Job // ids left: next..last-1
}

func newRegistry(r *recordClient, log *slog.Logger) *registry {
	g := &registry{r: r, log: log, fetch: make(chan struct{}, 1)}
	g.out = proc.NewOutbox(g.tell, log)
	return g
}

// NewID gives the next id of the range, and fetches another when it is used up.
func (g *registry) NewID(ctx context.Context) (ids.Job, error) {
	if id, ok := g.take(); ok {
		return id, nil
	}
	select {
	case g.fetch <- struct{}{}:
	case <-ctx.Done():
		return 0, ctx.Err()
	}
	defer func() { <-g.fetch }()
	if id, ok := g.take(); ok { // another has fetched meanwhile
		return id, nil
	}
	res, err := g.r.do(ctx, record.Command{GrantJobs: jobRange})
	if err != nil {
		return 0, err
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	g.next, g.last = res.FirstJob+1, res.FirstJob+jobRange
	return res.FirstJob, nil
}

// take gives the next id of the range, if there is one.
func (g *registry) take() (ids.Job, bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.next == g.last {
		return 0, false
	}
	g.next++
	return g.next - 1, true
}

// Put tells the record later, until it was told.
func (g *registry) Put(r proc.JobRecord) { g.out.Put(r) }

func (g *registry) tell(ctx context.Context, rs []proc.JobRecord) error {
	c := record.Command{PutJobs: make([]record.Job, len(rs))}
	for i := range rs {
		c.PutJobs[i] = toRecord(&rs[i])
	}
	res, err := g.r.do(ctx, c)
	if err != nil {
		return err
	}
	for i, no := range res.Jobs {
		if err := no.Error("", ""); err != nil && !errs.Has(err, errs.Stale) { // stale: it knows better already
			g.log.Warn("the record refuses a job", "job", rs[i].Job, "state", rs[i].State.String(), "err", err)
		}
	}
	return nil
}

// Get returns a job's record.
func (g *registry) Get(ctx context.Context, id ids.Job) (proc.JobRecord, error) {
	if r, ok := g.out.Get(id); ok {
		return r, nil
	}
	// Not behind what was known when the question was asked, if that can be had.
	ctx, cancel := context.WithTimeout(ctx, freshLimit)
	defer cancel()
	g.r.g.ReadIndex(ctx)
	j, err := g.r.view().Job(id)
	if err != nil {
		return proc.JobRecord{}, err
	}
	return fromRecord(&j), nil
}

// List returns all jobs the record keeps, with what it has yet to be told.
func (g *registry) List(ctx context.Context) ([]proc.JobRecord, error) {
	ctx, cancel := context.WithTimeout(ctx, freshLimit)
	defer cancel()
	g.r.g.ReadIndex(ctx)
	js, err := g.r.view().Jobs()
	if err != nil {
		return nil, err
	}
	out := make([]proc.JobRecord, 0, len(js))
	at := map[ids.Job]int{}
	for i := range js {
		at[js[i].ID] = len(out)
		out = append(out, fromRecord(&js[i]))
	}
	for _, r := range g.out.List() {
		if i, ok := at[r.Job]; !ok {
			out = append(out, r)
		} else if r.Supersedes(&out[i]) {
			out[i] = r
		}
	}
	return out, nil
}

var jobStates = map[proc.State]record.JobState{
	proc.Running: record.JobRunning, proc.Exited: record.JobExited, proc.Killed: record.JobKilled, proc.Lost: record.JobLost,
}

// argvTold is how much of a command line the record is told, in bytes: enough to
// know a command by, and with what else a job may say far below MaxCommand.
const argvTold = 64 << 10

// toRecord cuts what the record would refuse: that a job has ended is worth more
// than the end of its sentence.
func toRecord(r *proc.JobRecord) record.Job {
	j := record.Job{ID: r.Job, Incarnation: r.Incarnation, Home: r.Home, Node: r.Node, Uid: r.UID, Argv: cutArgv(r.Argv), Cwd: cut(string(r.Cwd), record.MaxPath),
		State: jobStates[r.State], ExitCode: int32(r.Code), Signal: uint32(r.Signal), Detached: r.Detached, Started: r.Start, Ended: r.End,
		Receipt: r.Receipt, Name: cut(r.Name, record.MaxText), CPU: r.CPU, Text: cut(r.Text, record.MaxText)}
	if len(j.Receipt) > record.MaxReceipt { // a part of it says nothing
		j.Receipt = nil
	}
	return j
}

// cut returns the first n bytes of s, less what would be half a letter.
func cut(s string, n int) string {
	if len(s) <= n {
		return s
	}
	for n > 0 && !utf8.RuneStart(s[n]) {
		n--
	}
	return s[:n]
}

// cutArgv returns the first argvTold bytes of argv, of which each word takes one
// more than it has.
func cutArgv(argv [][]byte) [][]byte {
	left := argvTold
	for i, a := range argv {
		if left -= len(a) + 1; left < 0 {
			out := slices.Clone(argv[:i])
			if n := left + len(a); n > 0 {
				out = append(out, a[:n])
			}
			return out
		}
	}
	return argv
}

func fromRecord(j *record.Job) proc.JobRecord {
	r := proc.JobRecord{Job: j.ID, Incarnation: j.Incarnation, Home: j.Home, Node: j.Node, UID: j.Uid, Argv: j.Argv, Cwd: []byte(j.Cwd),
		Code: int(j.ExitCode), Signal: int(j.Signal), Detached: j.Detached, Start: j.Started, End: j.Ended,
		Receipt: j.Receipt, Name: j.Name, CPU: j.CPU, Text: j.Text}
	for s, w := range jobStates {
		if w == j.State {
			r.State = s
		}
	}
	return r
}
