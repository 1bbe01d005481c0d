package test

import (
	"bufio"
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/unum-os/unum/internal/errs"
	"github.com/unum-os/unum/internal/ids"
)

// recRecorder collects what workers print, and lets the faults look at it while
// they last.
type recRecorder struct {
	t    *testing.T
	from int64

	mu     sync.Mutex
	began  map[[2]int]recOp // by client and number: no end seen yet
	ops    recHistory
	acked  map[string]int64 // by node: the latest call that was answered
	failed map[string]int64 // by node: the latest call that failed
	latest map[int]int64    // by client: the latest call that was answered
	files  []recOp          // writes of files
	nodes  []string         // by worker
	deaths map[string][][2]int64
	sights map[string]recSight // by node: the latest
	before int                 // workers of an earlier recorder of the same history
	wg     sync.WaitGroup
}

func newRecorder(t *testing.T) *recRecorder {
	return &recRecorder{t: t, from: linNow(), began: map[[2]int]recOp{}, acked: map[string]int64{}, latest: map[int]int64{}, failed: map[string]int64{}, deaths: map[string][][2]int64{}, sights: map[string]recSight{}}
}

// recProcess is a worker that runs.
type recProcess struct {
	node  string
	first int // its first client
	cmd   *exec.Cmd
	in    io.WriteCloser // its standard input
	err   bytes.Buffer
	end   chan struct{} // closed when it has ended
	fault error         // why it ended badly; after end
}

// start starts a worker on a node.
func (r *recRecorder) start(c *cluster, node, worker string, args ...string) *recProcess {
	r.t.Helper()
	r.mu.Lock()
	p := &recProcess{node: node, first: (r.before + len(r.nodes)) * recClients, end: make(chan struct{})}
	r.nodes = append(r.nodes, node)
	r.mu.Unlock()
	p.cmd = c.worker(node, worker, append(args, "-first", strconv.Itoa(p.first))...)
	p.cmd.Stderr = &p.err
	in, err := p.cmd.StdinPipe()
	p.in = in
	var out io.Reader
	if err == nil {
		out, err = p.cmd.StdoutPipe()
	}
	if err == nil {
		err = p.cmd.Start()
	}
	if err != nil {
		r.t.Fatal(err)
	}
	r.wg.Go(func() {
		r.read(node, out)
		err := p.cmd.Wait()
		if err != nil || p.err.Len() > 0 {
			p.fault = fmt.Errorf("the worker of %s: %v: %s", node, err, &p.err)
		}
		close(p.end)
	})
	return p
}

// read takes a worker's lines; a killed one's last may be torn.
func (r *recRecorder) read(node string, out io.Reader) {
	for s := bufio.NewScanner(out); s.Scan(); {
		var l recLine
		if err := json.Unmarshal(s.Bytes(), &l); err != nil {
			r.t.Logf("neither operation nor sight: %q", s.Text())
			continue
		}
		r.mu.Lock()
		switch {
		case l.Sight != nil:
			r.sights[node] = *l.Sight
		case l.File != nil:
			r.files = append(r.files, *l.File)
		case l.Op != nil && l.Op.Return == 0:
			r.began[[2]int{l.Op.Client, l.Op.N}] = *l.Op
		case l.Op != nil:
			delete(r.began, [2]int{l.Op.Client, l.Op.N})
			r.ops = append(r.ops, *l.Op)
			if l.Op.ended() {
				r.acked[node] = max(r.acked[node], l.Op.Call)
				r.latest[l.Op.Client] = l.Op.Call
			} else {
				r.failed[node] = max(r.failed[node], l.Op.Call)
			}
		}
		r.mu.Unlock()
	}
}

// answers reports whether an operation that began on the node after a time was
// answered.
func (r *recRecorder) answers(node string, after int64) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.acked[node] > after
}

// suffers reports whether an operation of a worker failed that began after a
// time, or has waited since then for longer than any does that is not disturbed.
func (r *recRecorder) suffers(p *recProcess, after int64) bool {
	const long = int64(time.Second)
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.failed[p.node] > after {
		return true
	}
	for id, op := range r.began {
		if id[0] >= p.first && id[0] < p.first+recClients && linNow()-max(op.Call, after) > long {
			return true
		}
	}
	return false
}

// leader returns the leader of the record's group and its term, as those nodes
// know it that know the latest; "" if they know none.
func (r *recRecorder) leader() (node string, term uint64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, s := range r.sights {
		switch {
		case s.Term > term:
			node, term = "", s.Term
			fallthrough
		case s.Term == term && s.Leader != 0:
			if s.Leader != 0 {
				node = ids.Node(s.Leader).String()
			}
		}
	}
	return node, term
}

// agreed returns the leader and its term if all nodes said the same when they
// were asked after a time.
func (r *recRecorder) agreed(nodes []string, after int64) (leader string, term uint64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	first := r.sights[nodes[0]]
	for _, n := range nodes {
		if s := r.sights[n]; s.Began < after || s.Leader != first.Leader || s.Term != first.Term || s.Leader == 0 {
			return "", 0
		}
	}
	return ids.Node(first.Leader).String(), first.Term
}

// kill takes the power from nodes.
func (r *recRecorder) kill(c *cluster, victims ...string) {
	r.t.Helper()
	from := linNow()
	c.lab("kill", victims...)
	for _, v := range victims {
		r.deaths[v] = append(r.deaths[v], [2]int64{from, linNow()})
	}
}

// complain fails the test for operations that failed as none should, whatever
// happens to the nodes. Only who loses power may say that he cannot read his disk.
func (r *recRecorder) complain(h recHistory) {
	r.t.Helper()
	n := map[string]int{}
	for i := range h {
		op := &h[i]
		if op.Return == 0 || op.ended() {
			continue
		}
		what := op.Class.String()
		switch op.Class {
		case errs.NoQuorum, errs.NotLeader, errs.Unavailable, errs.Timeout, errs.Busy, errs.Interrupted:
		default:
			node := r.nodes[op.Client/recClients-r.before]
			if op.Class == errs.IO && slices.ContainsFunc(r.deaths[node], func(d [2]int64) bool { return op.Return > d[0] && op.Call < d[1] }) {
				what += " on a node that loses its power"
				break
			}
			r.t.Errorf("%.3f s: %s: %s of %s failed: %s", float64(op.Return-r.from)/1e9, node, op.Kind, op.Key, strings.ReplaceAll(op.Text, "\n", " | "))
		}
		n[what]++
	}
	r.t.Logf("failed: %v", n)
}

// history is everything recorded, once all workers have ended.
func (r *recRecorder) history() recHistory {
	r.wg.Wait()
	h := slices.Clone(r.ops)
	for _, op := range r.began {
		h = append(h, op)
	}
	return h
}

// stop lets a worker finish, and says why it ended badly.
func (p *recProcess) stop() error {
	p.in.Close()
	select {
	case <-p.end:
		return p.fault
	case <-time.After(linHang):
		_ = p.cmd.Process.Kill()
		return fmt.Errorf("the worker of %s does not end: an operation hangs", p.node)
	}
}

// ended reports whether the worker is gone, as with its node.
func (p *recProcess) ended() bool {
	select {
	case <-p.end:
		return true
	default:
		return false
	}
}
