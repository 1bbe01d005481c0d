package test

import (
	"encoding/json"
	"fmt"
	"os"
	"slices"
	"strconv"
	"sync"
	"testing"
	"time"
)

// recRun is how much is asked of a run.
type recRun struct {
	length  time.Duration // of the faults, at least
	limit   time.Duration // and at most
	ops     int
	each    int           // effective faults of each kind
	longest time.Duration // pause
}

// torture reports whether the long runs are wanted.
func torture() bool { return os.Getenv("UNUM_TORTURE") != "" }

// seed is the seed of a test's choices; UNUM_SEED sets it.
func seed(t *testing.T) uint64 {
	t.Helper()
	n := uint64(time.Now().UnixNano()) % 1e9
	if s := os.Getenv("UNUM_SEED"); s != "" {
		var err error
		if n, err = strconv.ParseUint(s, 10, 64); err != nil {
			t.Fatal(err)
		}
	}
	t.Logf("seed %d; again with UNUM_SEED=%d", n, n)
	return n
}

// TestRecordLinearizable records what clients on five nodes see of a few keys of
// the record while nodes lose power, are cut off, hear nobody or are not heard,
// are stopped, and lose their daemons: it is what one copy would have given, and
// afterwards all five agree byte for byte.
func TestRecordLinearizable(t *testing.T) {
	run := recRun{length: 30 * time.Second, limit: 6 * time.Minute, ops: 2000, each: 1, longest: 6 * time.Second}
	if torture() {
		run = recRun{length: 10 * time.Minute, limit: 40 * time.Minute, ops: 50_000, each: 10, longest: 30 * time.Second}
	} else {
		t.Parallel()
	}
	n := seed(t)
	nodes := []string{"n1", "n2", "n3", "n4", "n5"}
	c := up(t, len(nodes))
	recStaleIsSeen(t, c, nodes)

	s := newStorm(t, c, nodes, n, "run", run.longest)
	began := time.Now()
	least := func() int {
		m := run.each
		for _, f := range recFaults {
			m = min(m, s.effective[f.name])
		}
		return m
	}
	for round := 0; time.Since(began) < run.length || least() < run.each; round++ {
		if time.Since(began) > run.limit {
			t.Errorf("%v are over", run.limit)
			break
		}
		for _, i := range s.rng.Perm(len(recFaults)) {
			if f := &recFaults[i]; s.effective[f.name] <= least() || time.Since(began) < run.length {
				s.strike(f)
			}
		}
	}
	s.calm()
	h := s.end()
	s.rec.complain(h)
	h = append(h, recReadAll(t, c, nodes, h)...)

	for _, f := range recFaults {
		t.Logf("%3d of %d effective: %s", s.effective[f.name], s.tried[f.name], f.name)
		if s.effective[f.name] < run.each {
			t.Errorf("%d effective faults of the kind %q, at least %d are wanted", s.effective[f.name], f.name, run.each)
		}
	}
	all, overlapping := h.judge(t)
	if all < run.ops {
		t.Errorf("%d operations, at least %d are wanted", all, run.ops)
	}
	if overlapping*5 < all {
		t.Errorf("%d of %d operations overlapped on a key: less than a fifth", overlapping, all)
	}
	recAgree(t, c, nodes)
}

// recStaleIsSeen is the control: clients of a node that is cut off, who take what
// the node knows for what there is, give a history that is refused.
func recStaleIsSeen(t *testing.T, c *cluster, nodes []string) {
	t.Helper()
	rec := newRecorder(t)
	var ps []*recProcess
	for _, n := range nodes {
		ps = append(ps, rec.start(c, n, "record", "-keys", "control", "-from", fmt.Sprint(rec.from), "-stale"))
	}
	all := func(after int64) func() bool {
		return func() bool {
			return !slices.ContainsFunc(nodes, func(n string) bool { return !rec.answers(n, after) })
		}
	}
	await(t, "all nodes answer", recMends, all(rec.from))
	c.lab("cut", nodes[0])
	// Into the next epoch of keys, of which the node can know nothing.
	cut := linNow()
	await(t, "all nodes answer, each for itself", recMends, all(cut+int64(recEpoch)))
	c.lab("heal")
	for _, p := range ps {
		if err := p.stop(); err != nil {
			t.Error(err)
		}
	}
	h := rec.history()
	illegal, unknown := h.check()
	bad := h.revisions()
	t.Logf("control: %d operations, reads of what a node knows, one node cut off: illegal %v, no verdict on %v, %d times the record went back", len(h), illegal, unknown, len(bad))
	if len(illegal) == 0 {
		t.Error("the check accepts stale reads")
	}
}

// recReadAll reads all keys of a history on all nodes: nothing acknowledged is
// missing.
func recReadAll(t *testing.T, c *cluster, nodes []string, h recHistory) recHistory {
	t.Helper()
	var keys []string
	for i := range h {
		keys = append(keys, h[i].Key)
	}
	slices.Sort(keys)
	keys = slices.Compact(keys)
	list, err := json.Marshal(keys)
	if err != nil {
		t.Fatal(err)
	}
	rec := newRecorder(t)
	rec.before = 1 << 20 // clients that were not there before
	var wg sync.WaitGroup
	for _, n := range nodes {
		p := rec.start(c, n, "record-read")
		wg.Go(func() {
			if _, err := p.in.Write(list); err != nil {
				t.Errorf("%s: %v", n, err)
			}
			p.in.Close()
			<-p.end
			if p.fault != nil {
				t.Error(p.fault)
			}
		})
	}
	wg.Wait()
	return rec.history()
}

// recAgree waits until all nodes have applied the same, and compares what that
// made of their replicas, byte for byte.
func recAgree(t *testing.T, c *cluster, nodes []string) {
	t.Helper()
	digests := map[string]recDigest{}
	same := func() bool {
		for _, n := range nodes {
			out, err := c.worker(n, "record-digest").Output()
			var d recDigest
			if err != nil || json.Unmarshal(out, &d) != nil {
				return false
			}
			digests[n] = d
		}
		for _, n := range nodes[1:] {
			for g, a := range digests[nodes[0]] {
				b := digests[n][g]
				if a.Index != b.Index {
					return false
				}
				if a.Sum != b.Sum {
					t.Fatalf("group %v at index %d: %s has %s, %s has %s", g, a.Index, nodes[0], a.Sum, n, b.Sum)
				}
			}
		}
		return true
	}
	await(t, "all nodes have applied the same", recMends, same)
	t.Logf("all nodes agree: %v", digests[nodes[0]])
}
