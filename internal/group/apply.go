package group

import (
	"context"
	"errors"
	"fmt"
	"sync"

	"github.com/cockroachdb/pebble/v2"
	"go.etcd.io/raft/v3"
	pb "go.etcd.io/raft/v3/raftpb"

	"github.com/unum-os/unum/internal/errs"
	"github.com/unum-os/unum/internal/ids"
)

// applyBatch is the size at which a batch of effects is committed.
const applyBatch = 1 << 20

// applyItem is work for the applier: committed entries, or a snapshot.
type applyItem struct {
	g       *Group
	entries []*pb.Entry
	confs   []*pb.ConfState // one for each change of configuration among entries
	bytes   int64           // of entries, counted in the host's backlog
	install *filling
}

// applyQueue hands items to the applier. The backlog bounds it: see acceptable
// and maxUnresolved.
type applyQueue struct {
	wake chan struct{}

	mu    sync.Mutex
	items []applyItem
}

func newApplyQueue() *applyQueue { return &applyQueue{wake: make(chan struct{}, 1)} }

func (q *applyQueue) push(a applyItem) {
	q.mu.Lock()
	q.items = append(q.items, a)
	q.mu.Unlock()
	select {
	case q.wake <- struct{}{}:
	default:
	}
}

func (q *applyQueue) waiting() bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	return len(q.items) > 0
}

func (q *applyQueue) take() []applyItem {
	q.mu.Lock()
	defer q.mu.Unlock()
	out := q.items
	q.items = nil
	return out
}

// applier owns the writes to the state database.
type applier struct {
	h       *Host
	b       *pebble.Batch
	touched []*Group            // with effects in b, in order
	at      map[*Group]point    // where b brings them
	results map[*Group][]result // of commands in b
	bytes   int64               // of the entries in b
}

type result struct {
	id    proposalID
	index uint64
	value any
}

func (h *Host) runApplier(ctx context.Context) error {
	a := newApplier(h)
	defer a.drop()
	for {
		select {
		case <-ctx.Done():
			return nil // the log has it all
		case <-h.apply.wake:
		}
		if err := a.step(ctx); err != nil {
			return err
		}
	}
}

func newApplier(h *Host) *applier {
	return &applier{h: h, at: map[*Group]point{}, results: map[*Group][]result{}}
}

// step applies what waits.
func (a *applier) step(ctx context.Context) error {
	for _, it := range a.h.apply.take() {
		if err := a.take(it); err != nil {
			return err
		}
		if ctx.Err() != nil {
			return nil // what is in the batch is dropped: the log has it
		}
	}
	return a.commit()
}

// drop gives up what is not committed.
func (a *applier) drop() {
	if a.b != nil {
		a.b.Close()
		a.b = nil
	}
}

func (a *applier) take(it applyItem) error {
	g := it.g
	if it.install != nil {
		if err := a.commit(); err != nil {
			return err
		}
		return a.install(g, it.install)
	}
	for _, e := range it.entries {
		if a.b == nil {
			a.b = a.h.stateDB.NewIndexedBatch()
		}
		p, ok := a.at[g]
		if !ok {
			p = g.point()
			a.touched = append(a.touched, g)
		}
		if e.GetIndex() != p.index+1 {
			return errs.E(errs.Corrupt, "apply", fmt.Sprintf("group %d", g.id), "entry %d after %d", e.GetIndex(), p.index)
		}
		p.index, p.term = e.GetIndex(), e.GetTerm()
		switch {
		case e.GetType() == pb.EntryConfChangeV2:
			if !a.h.cfg.Hooks.plants(ForgetConf) {
				p.conf = it.confs[0]
			}
			it.confs = it.confs[1:]
		case len(e.Data) > 0:
			if err := checkData(e); err != nil {
				return errs.E(errs.Corrupt, "apply", fmt.Sprintf("entry %d of group %d", p.index, g.id), "%v", err)
			}
			v := g.m.Apply(a.b, g.space, p.index, e.Data[entryHeader:])
			if a.h.cfg.Hooks.plants(ApplyTwice) && p.index%8 == 0 {
				v = g.m.Apply(a.b, g.space, p.index, e.Data[entryHeader:])
			}
			a.results[g] = append(a.results[g], result{entryID(e), p.index, v})
		default:
			a.results[g] = append(a.results[g], result{index: p.index})
		}
		a.at[g] = p
		if a.b.Len() >= applyBatch {
			if err := a.commit(); err != nil {
				return err
			}
		}
	}
	a.bytes += it.bytes
	return nil
}

// commit writes the batch and answers.
func (a *applier) commit() error {
	if a.b != nil {
		if a.h.cfg.Hooks.plants(ForgetApplied) {
			if err := errors.Join(a.b.Commit(pebble.NoSync), a.b.Close()); err != nil {
				return err
			}
			a.b = a.h.stateDB.NewIndexedBatch()
		}
		for _, g := range a.touched {
			v, err := a.at[g].encode()
			if err != nil {
				return err
			}
			if err := a.b.Set(appliedKey(g.id), v, nil); err != nil {
				return err
			}
		}
		if err := a.b.Commit(pebble.NoSync); err != nil {
			return dbErr(err, "write", "state")
		}
		if err := a.b.Close(); err != nil {
			return dbErr(err, "write", "state")
		}
		a.b = nil
	}
	for _, g := range a.touched {
		p := a.at[g]
		g.setApplied(p)
		g.m.Applied(p.index)
		g.answer(a.results[g])
		g.releaseReads()
		clear(a.results[g])
		a.results[g] = a.results[g][:0]
	}
	clear(a.touched)
	a.touched = a.touched[:0]
	clear(a.at)
	a.h.backlog.Add(-a.bytes)
	a.bytes = 0
	return nil
}

// answer gives the results of applied entries to those who proposed them here.
// A proposal whose place in the log another entry took is lost.
func (g *Group) answer(results []result) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if len(g.props) == 0 {
		return
	}
	for _, r := range results {
		if p := g.byIndex[r.index]; p != nil && p.id != r.id {
			g.resolveLocked(p.id, outcome{err: &NotLeaderError{g.id, g.st.Leader}})
		}
		g.resolveLocked(r.id, outcome{result: r.value, index: r.index})
	}
}

// trim asks for the truncation of a log up to an index.
type trim struct {
	g  *Group
	to uint64
}

// maxLogEntries bounds the log of a group whose entries are small.
const maxLogEntries = 100_000

// trim starts a truncation if the log is long: of three quarters of what is
// applied, or less if a full replica needs more and the log is not far too long.
func (w *worker) trim(g *Group) {
	l := g.log
	if g.trims || l.bytes < w.h.cfg.LogBytes && l.last-l.trunc < maxLogEntries {
		return
	}
	applied := g.applied.Load()
	if applied <= l.trunc {
		return
	}
	to := l.trunc + (applied-l.trunc+1)*3/4
	if w.h.cfg.Witness {
		to = w.spare(g, applied, to)
	} else if g.leading && l.bytes < 4*w.h.cfg.LogBytes && l.last-l.trunc < 4*maxLogEntries {
		g.rn.WithProgress(func(id uint64, _ raft.ProgressType, p raftProgress) {
			if !w.h.witness(ids.Node(id)) { // a snapshot brings a witness up for nothing
				to = min(to, p.Match)
			}
		})
		for _, i := range g.holds {
			to = min(to, i)
		}
	}
	if to <= l.trunc+(l.last-l.trunc)/16 { // not worth it
		return
	}
	select {
	case w.h.trims <- trim{g, to}:
		g.trims = true
	default:
	}
}

// runTrimmer makes the state durable before logs are truncated.
func (h *Host) runTrimmer(ctx context.Context) error {
	for {
		select {
		case <-ctx.Done():
			return nil
		case t := <-h.trims:
			if err := h.trim(t); err != nil {
				return err
			}
		}
	}
}

// trim syncs the state for t and all others that wait, and passes them on.
func (h *Host) trim(t trim) error {
	list := []trim{t}
	for n := len(h.trims); n > 0; n-- {
		list = append(list, <-h.trims)
	}
	if !h.cfg.Hooks.plants(TrimUnsynced) {
		if err := h.stateDB.LogData(nil, pebble.Sync); err != nil {
			return dbErr(err, "sync", "state")
		}
	}
	for _, t := range list {
		h.in.push(event{kind: evCall, g: t.g, fn: func() { h.truncate(t) }})
	}
	return nil
}

// truncate runs on the worker.
func (h *Host) truncate(t trim) {
	g := t.g
	g.trims = false
	if g.parked != nil || t.to <= g.log.trunc || t.to > g.log.last {
		return // a snapshot has replaced the log
	}
	b := h.logDB.NewBatch()
	defer b.Close()
	err := g.log.truncate(b, t.to)
	if err == nil {
		err = b.Commit(pebble.NoSync)
	}
	if err != nil {
		h.fail(dbErr(err, "truncate log of group", fmt.Sprint(g.id)))
	}
}
