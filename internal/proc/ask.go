package proc

import (
	"context"
	"fmt"
	"sort"
	"sync"
	"time"

	"github.com/unum-os/unum/internal/errs"
	"github.com/unum-os/unum/internal/ids"
	"github.com/unum-os/unum/internal/wire"
)

// PSResp are the jobs of the cluster.
type PSResp struct {
	Jobs   []JobInfo
	Silent []ids.Node // members that did not answer
	Record string     // why the record could not be read, if so
}

// PS collects the jobs of all live nodes and what the record knows beside them.
func (h *Home) PS(ctx context.Context, all bool) PSResp {
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	var (
		resp PSResp
		mu   sync.Mutex
		wg   sync.WaitGroup
		seen = map[ids.Job]bool{}
	)
	nodes := h.cfg.Members()
	live := map[ids.Node]bool{}
	for _, n := range nodes {
		wg.Add(1)
		go func() {
			defer wg.Done()
			var r listResp
			_, err := h.cfg.RPC.Call(ctx, n, methodList, listReq{}, nil, &r)
			mu.Lock()
			defer mu.Unlock()
			if err != nil {
				resp.Silent = append(resp.Silent, n)
				return
			}
			live[n] = true
			for _, j := range r.Jobs {
				seen[j.Record.Job] = true
				if all || !j.Record.State.Finished() {
					resp.Jobs = append(resp.Jobs, j)
				}
			}
		}()
	}
	rs, err := h.cfg.Registry.List(ctx)
	wg.Wait()
	if err != nil {
		resp.Record = err.Error()
	}
	for _, r := range rs {
		switch {
		case seen[r.Job]:
		case r.State.Finished() && !all:
		case !r.State.Finished() && live[r.Node]:
			// It ended between the two answers; the record will hear.
		default:
			resp.Jobs = append(resp.Jobs, JobInfo{Record: r, CPU: r.CPU})
		}
	}
	sort.Slice(resp.Jobs, func(a, b int) bool { return resp.Jobs[a].Record.Job < resp.Jobs[b].Record.Job })
	sort.Slice(resp.Silent, func(a, b int) bool { return resp.Silent[a] < resp.Silent[b] })
	return resp
}

// locate finds the node of a job: by the record, else by asking the nodes, for a
// job so young that the record has not heard of it.
func (h *Home) locate(ctx context.Context, id ids.Job) (JobRecord, error) {
	r, err := h.cfg.Registry.Get(ctx, id)
	if err == nil {
		return r, nil
	}
	for _, j := range h.PS(ctx, true).Jobs {
		if j.Record.Job == id {
			return j.Record, nil
		}
	}
	if errs.Has(err, errs.NotFound) {
		return r, errs.E(errs.NotFound, "", "", "no job %d", id).WithRemedy("unum ps --all")
	}
	return r, err
}

// Kill signals a job for a user.
func (h *Home) Kill(ctx context.Context, id ids.Job, signal int, uid uint32) error {
	ctx, cancel := context.WithTimeout(ctx, 2*askTimeout)
	defer cancel()
	rec, err := h.locate(ctx, id)
	if err != nil {
		return err
	}
	// A lost one may live: its node was perhaps only cut off.
	if rec.State.Finished() && rec.State != Lost {
		return errs.E(errs.NotFound, "", "", "job %d has ended (%v)", id, rec.State)
	}
	_, err = h.cfg.RPC.Call(ctx, rec.Node, methodKill, killReq{id, signal, uid}, nil, nil)
	return errs.Wrap(err, "", "")
}

// waitFirst is the pause before a node that did not answer Wait is asked again; it
// doubles up to waitMost.
const (
	waitFirst = 50 * time.Millisecond
	waitMost  = time.Second
)

// Wait returns the final record of a job. A node that falls silent is asked
// again until the record says what became of the job. That a job is lost is a
// guess: its node is asked first.
func (h *Home) Wait(ctx context.Context, id ids.Job) (JobRecord, error) {
	rec, err := h.locate(ctx, id)
	if err != nil {
		return rec, err
	}
	ask := func() (w waitResp, err error) {
		wctx, cancel := context.WithTimeout(ctx, waitPoll+askTimeout)
		defer cancel()
		_, err = h.cfg.RPC.Call(wctx, rec.Node, methodWait, waitReq{id}, nil, &w)
		return w, err
	}
	if rec.State == Lost {
		if w, err := ask(); err == nil && w.Known {
			rec = w.Record
		}
	}
	pause := waitFirst
	for !rec.State.Finished() {
		w, err := ask()
		switch {
		case ctx.Err() != nil:
			return rec, ctx.Err()
		case err == nil && w.Known && w.Record.State.Finished():
			return w.Record, nil
		case err == nil && w.Known:
			pause = waitFirst
			continue // it asked long enough by itself
		}
		if now, err := h.cfg.Registry.Get(ctx, id); err == nil {
			rec = now
		}
		if rec.State.Finished() {
			break
		}
		t := time.NewTimer(pause)
		select {
		case <-t.C:
		case <-ctx.Done():
			t.Stop()
			return rec, ctx.Err()
		}
		pause = min(2*pause, waitMost)
	}
	return rec, nil
}

// Logs gives what a detached job has written, piece by piece (fd is 1 or 2), to
// the user it belongs to; with follow until the job ends. Data is out's until it
// returns.
func (h *Home) Logs(ctx context.Context, id ids.Job, uid uint32, follow bool, out func(fd int, data []byte) error) error {
	rec, err := h.locate(ctx, id)
	if err != nil {
		return err
	}
	if !rec.Detached {
		return errs.E(errs.NotFound, "", "", "job %d was not detached: its output went to its caller", id)
	}
	dctx, cancel := context.WithTimeout(ctx, dialTimeout)
	conn, err := h.cfg.RPC.Dial(dctx, rec.Node, streamLogs)
	cancel()
	if err != nil {
		return errs.Wrap(err, "", fmt.Sprintf("output of job %d is on node %s", id, h.nodeName(rec.Node)))
	}
	defer conn.Close()
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	defer stop()
	t := &talk{Conn: conn}
	if err := t.send(logsReq{id, uid, follow}); err != nil {
		return errs.Wrap(err, "", h.nodeName(rec.Node))
	}
	for {
		f, err := wire.ReadFrame(conn, maxMessage)
		switch {
		case ctx.Err() != nil:
			return ctx.Err()
		case err != nil:
			return errs.E(errs.Unavailable, "", "", "node %s went silent", h.nodeName(rec.Node))
		}
		switch f.Type {
		case logOut, logErr:
			if err := out(int(f.Type), f.Body); err != nil {
				return err
			}
		case logEnd:
			return nil
		default:
			var bad refusal
			if err := wire.Unmarshal(f.Header, &bad); err != nil {
				return err
			}
			return errs.E(errs.Class(bad.Class), "", "", "%s", bad.Text)
		}
	}
}

// Why explains the placement of a job.
func (h *Home) Why(ctx context.Context, id ids.Job, asJSON bool) (string, error) {
	rec, err := h.locate(ctx, id)
	switch {
	case err != nil:
		return "", err
	case len(rec.Receipt) > 0:
		return h.cfg.Explain(rec.Receipt, asJSON)
	case asJSON:
		return fmt.Sprintf("{\"job\": %d, \"chosen\": %q, \"reason\": \"named by its user\"}\n", id, rec.Node), nil
	}
	return fmt.Sprintf("job %d was placed on %s because its user named that node.\n", id, h.nodeName(rec.Node)), nil
}
