package test

import (
	"bufio"
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/unum-os/unum/internal/ids"
)

const (
	// linLength is how long the check runs; UNUM_TEST_LINEAR=20s changes it.
	linLength = 2 * time.Minute
	// linKillEvery is the time between two deaths of a leader: an election, the
	// node's return, and a quiet time in which its caches fill again.
	linKillEvery = 20 * time.Second
	// linHang is longer than any operation may take (P7).
	linHang = 40 * time.Second
)

// linRecorder collects what workers print.
type linRecorder struct {
	t *testing.T

	mu    sync.Mutex
	began map[[2]int]linOp // by client and number: no end seen yet
	ops   []linOp
	runs  []linRun
	wg    sync.WaitGroup
}

// linProcess is a worker that runs.
type linProcess struct {
	rec *linRecorder
	run int
	cmd *exec.Cmd
	err bytes.Buffer
	end chan error
}

// start starts a worker; command makes one of its arguments.
func (r *linRecorder) start(mount string, command func(args ...string) *exec.Cmd, args ...string) *linProcess {
	r.t.Helper()
	r.mu.Lock()
	p := &linProcess{rec: r, run: len(r.runs), end: make(chan error, 1)}
	r.runs = append(r.runs, linRun{mount: mount})
	r.mu.Unlock()
	p.cmd = command(append(args, "-first", strconv.Itoa(p.run*linClients))...)
	p.cmd.Stderr = &p.err
	out, err := p.cmd.StdoutPipe()
	if err == nil {
		err = p.cmd.Start()
	}
	if err != nil {
		r.t.Fatal(err)
	}
	r.wg.Go(func() {
		r.read(out)
		p.end <- p.cmd.Wait()
	})
	return p
}

// read takes a worker's lines; a killed one's last may be torn.
func (r *linRecorder) read(out io.Reader) {
	for s := bufio.NewScanner(out); s.Scan(); {
		var op linOp
		if err := json.Unmarshal(s.Bytes(), &op); err != nil {
			r.t.Logf("not an operation: %q", s.Text())
			continue
		}
		id := [2]int{op.Client, op.N}
		r.mu.Lock()
		if op.Return == 0 {
			r.began[id] = op
		} else {
			delete(r.began, id)
			r.ops = append(r.ops, op)
		}
		r.mu.Unlock()
	}
}

// wait waits for a worker's end and says why it ended badly.
func (p *linProcess) wait(by time.Time) error {
	select {
	case err := <-p.end:
		if err != nil || p.err.Len() > 0 {
			return fmt.Errorf("the worker of %s: %v: %s", p.rec.runs[p.run].mount, err, &p.err)
		}
		return nil
	case <-time.After(time.Until(by)):
		_ = p.cmd.Process.Kill()
		return fmt.Errorf("the worker of %s does not end: an operation hangs", p.rec.runs[p.run].mount)
	}
}

// history is everything recorded, once all workers have ended.
func (r *linRecorder) history() *linHistory {
	r.wg.Wait()
	h := &linHistory{ops: slices.Clone(r.ops), runs: r.runs}
	for _, op := range r.began {
		h.ops = append(h.ops, op)
	}
	return h
}

// failures lists the operations that failed as none should, by mount, kind and
// error, with the seconds from a time on. Those of a node that had lost its power
// are not among them.
func (h *linHistory) failures(from int64) map[string][]string {
	n := map[string][]string{}
	for i := range h.ops {
		op := &h.ops[i]
		r := h.run(op)
		if dead := r.killed != 0 && (op.Return == 0 || op.Return >= r.killed); dead || op.ended() {
			continue
		}
		what := "no answer"
		if op.Return != 0 {
			what = op.At + ": " + op.Errno.Error()
		}
		what = fmt.Sprintf("%s %s: %s", r.mount, op.Kind, what)
		n[what] = append(n[what], fmt.Sprintf("%.3f..%.3f", float64(op.Call-from)/1e9, float64(op.Return-from)/1e9))
	}
	return n
}

// pause returns the longest time after t, and before the next death, in which no
// operation of others than run ended.
func (h *linHistory) pause(t int64, run int) time.Duration {
	ends := []int64{t}
	for _, op := range h.ops {
		if op.ended() && op.Client/linClients != run && op.Return > t && op.Return < t+int64(linKillEvery) {
			ends = append(ends, op.Return)
		}
	}
	slices.Sort(ends)
	var longest int64
	for i := range ends[1:] {
		longest = max(longest, ends[i+1]-ends[i])
	}
	return time.Duration(longest)
}

// judge checks a history of real mounts.
func (h *linHistory) judge(t *testing.T) (all, overlapping int) {
	t.Helper()
	all, overlapping = h.counts()
	kinds := map[string]int{}
	for i := range h.ops {
		if h.ops[i].ended() {
			kinds[h.ops[i].Kind]++
		}
	}
	began := time.Now()
	illegal, unknown := h.check()
	t.Logf("%d operations (%v), %d of them (%d %%) overlapped with one of another mount on the same file or name; %d histories judged in %.1f s",
		all, kinds, overlapping, 100*overlapping/max(1, all), len(h.partitions()), time.Since(began).Seconds())
	if len(unknown) > 0 {
		t.Errorf("no verdict on %v", unknown)
	}
	for i, key := range illegal {
		t.Errorf("%s: not linearizable", key)
		if i < 8 {
			h.explain(t, key)
		}
	}
	return all, overlapping
}

func linDuration(t *testing.T) time.Duration {
	d := linLength
	if testing.Short() {
		d = 30 * time.Second
	}
	if s := os.Getenv("UNUM_TEST_LINEAR"); s != "" {
		var err error
		if d, err = time.ParseDuration(s); err != nil {
			t.Fatal(err)
		}
	}
	return d
}

// await waits until a condition holds.
func await(t *testing.T, what string, limit time.Duration, f func() bool) {
	t.Helper()
	for end := time.Now().Add(limit); !f(); time.Sleep(100 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("not in %v: %s", limit, what)
		}
	}
}

// leader returns the node that leads the root volume's group, as another sees it,
// or "".
func (c *cluster) leader(asked string) string {
	out, _ := c.sh(asked, "UNUM nodes --json")
	var nodes []struct {
		Hostname string      `json:"hostname"`
		Leads    []ids.Group `json:"leads"`
	}
	if json.Unmarshal([]byte(out), &nodes) != nil {
		return ""
	}
	for _, n := range nodes {
		if slices.Contains(n.Leads, ids.RootGroup) {
			return n.Hostname
		}
	}
	return ""
}

func (c *cluster) healthy() bool {
	out, _, code := c.unum(20*time.Second, "lab", "status", "--name", c.name, "--json")
	var st struct {
		Nodes []struct {
			Healthy bool `json:"healthy"`
		} `json:"nodes"`
	}
	if code != 0 || json.Unmarshal([]byte(out), &st) != nil || len(st.Nodes) == 0 {
		return false
	}
	for _, n := range st.Nodes {
		if !n.Healthy {
			return false
		}
	}
	return true
}

// TestLinearizable records what programs on three nodes see of a few files and
// names while the volume's leader dies again and again: it is what one copy would
// have given (P1), and what was seen never un-happens (P4).
func TestLinearizable(t *testing.T) {
	length := linDuration(t)
	c := up(t, 3)
	nodes := []string{"n1", "n2", "n3"}
	rec := &linRecorder{t: t, began: map[[2]int]linOp{}}
	from := linNow()
	until := from + int64(length)
	running := map[string]*linProcess{}
	start := func(node string) {
		running[node] = rec.start(node, func(args ...string) *exec.Cmd { return c.worker(node, "linear", args...) },
			"-root", "/unum/linear", "-mount", fmt.Sprint(slices.Index(nodes, node)), "-from", fmt.Sprint(from), "-until", fmt.Sprint(until))
	}
	for _, n := range nodes {
		start(n)
	}
	var kills []int // runs
	for next := from + int64(linKillEvery)/2; next < until-int64(linKillEvery)/2; next = max(next, linNow()) + int64(linKillEvery) {
		time.Sleep(time.Duration(next - linNow())) // the pace of the deaths
		await(t, "all nodes are healthy", time.Minute, c.healthy)
		var old string
		await(t, "the volume has a leader", time.Minute, func() bool { old = c.leader("n1"); return old != "" })
		p := running[old]
		kills = append(kills, p.run)
		rec.mu.Lock()
		rec.runs[p.run].killed = linNow()
		rec.mu.Unlock()
		c.lab("kill", old)
		if p.wait(time.Now().Add(linHang)) == nil {
			t.Errorf("the worker of %s outlived its node", old)
		}
		other := nodes[(slices.Index(nodes, old)+1)%3]
		await(t, "another node leads the volume", time.Minute, func() bool { l := c.leader(other); return l != "" && l != old })
		c.lab("start", old)
		start(old)
	}
	for _, n := range nodes {
		if err := running[n].wait(time.Now().Add(time.Duration(until-linNow()) + linHang)); err != nil {
			t.Error(err)
		}
	}
	h := rec.history()
	for _, run := range kills {
		at := h.runs[run].killed
		t.Logf("%5.1f s: %s, the leader, was killed; the others got no answer for %.1f s", float64(at-from)/1e9, h.runs[run].mount, h.pause(at, run).Seconds())
	}
	for what, when := range h.failures(from) {
		t.Errorf("%d times %s, at %v s", len(when), what, when[:min(5, len(when))])
	}
	all, overlapping := h.judge(t)
	if want := int(10_000 * length / linLength); all < want {
		t.Errorf("%d operations, at least %d are wanted", all, want)
	}
	if overlapping*5 < all {
		t.Errorf("%d of %d operations overlapped with those of other mounts: less than a fifth", overlapping, all)
	}
	if want := int(length / (2 * linKillEvery)); len(kills) < want {
		t.Errorf("the leader died %d times, at least %d are wanted", len(kills), want)
	}
}

// TestLinearCheckSeesIncoherence is the check's own: it accepts what two programs
// see of one directory, and refuses what they see through two mounts of it whose
// caches nobody empties.
func TestLinearCheckSeesIncoherence(t *testing.T) {
	needRoot(t)
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	record := func(dir string, cached bool) *linHistory {
		rec := &linRecorder{t: t, began: map[[2]int]linOp{}}
		from := linNow()
		until := from + int64(linEpoch) + int64(linEpoch)/2
		var ps []*linProcess
		for i := range 2 {
			args := []string{"-mount", fmt.Sprint(i), "-from", fmt.Sprint(from), "-until", fmt.Sprint(until)}
			if cached {
				args = append(args, "-root", t.TempDir(), "-cached", dir)
			} else {
				args = append(args, "-root", dir)
			}
			ps = append(ps, rec.start(fmt.Sprint("m", i+1), func(args ...string) *exec.Cmd {
				cmd := exec.Command(self, args...)
				cmd.Env = append(os.Environ(), "UNUM_TEST_WORKER=linear")
				cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS}
				return cmd
			}, args...))
		}
		for _, p := range ps {
			if err := p.wait(time.Now().Add(linHang)); err != nil {
				t.Error(err)
			}
		}
		return rec.history()
	}
	one := record(t.TempDir(), false)
	if all, _ := one.judge(t); all < 100 {
		t.Errorf("%d operations on one directory", all)
	}
	two := record(t.TempDir(), true)
	all, overlapping := two.counts()
	illegal, unknown := two.check()
	t.Logf("two incoherent mounts: %d operations, %d overlapping, illegal %v, no verdict on %v", all, overlapping, illegal, unknown)
	for _, kind := range []string{"r", "d"} {
		if !slices.ContainsFunc(illegal, func(key string) bool { return strings.HasPrefix(filepath.Base(key), kind) }) {
			t.Errorf("the check accepts what was seen of %s* through two incoherent mounts", kind)
		}
	}
}
