package test

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

func init() { workers["ledger"] = ledgerWorker }

// ledgerWorker appends the numbers from args[1] on to the file args[0], each in a
// line of its own with an fsync, and prints those that were acknowledged. After a
// failure it goes on with the next number. It ends with its input.
func ledgerWorker(args []string) int {
	go func() {
		io.Copy(io.Discard, os.Stdin)
		os.Exit(0)
	}()
	n, err := strconv.Atoi(args[1])
	if err != nil {
		return 2
	}
	for ; ; n++ {
		if err := func() error {
			f, err := os.OpenFile(args[0], os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o644)
			if err != nil {
				return err
			}
			if _, err = fmt.Fprintf(f, "%d\n", n); err == nil {
				err = f.Sync()
			}
			if cerr := f.Close(); err == nil {
				err = cerr
			}
			return err
		}(); err != nil {
			time.Sleep(50 * time.Millisecond)
			continue
		}
		fmt.Println(n)
	}
}

// ledger is a file to which a node writes without end.
type ledger struct {
	c    *cluster
	node string
	file string

	cmd  *exec.Cmd
	in   io.Closer
	done chan struct{}

	mu    sync.Mutex
	acked []int
	last  atomic.Int64 // acknowledged
}

// write begins to write on a node.
func (c *cluster) write(node, file string) *ledger {
	l := &ledger{c: c, node: node, file: file}
	l.begin()
	return l
}

func (l *ledger) begin() {
	l.c.t.Helper()
	// A gap tells numbers of this run from those that were tried before.
	l.cmd = l.c.worker(l.node, "ledger", l.file, strconv.FormatInt(l.last.Load()+1000, 10))
	in, err := l.cmd.StdinPipe()
	if err != nil {
		l.c.t.Fatal(err)
	}
	out, err := l.cmd.StdoutPipe()
	if err != nil {
		l.c.t.Fatal(err)
	}
	if err := l.cmd.Start(); err != nil {
		l.c.t.Fatal(err)
	}
	l.in, l.done = in, make(chan struct{})
	done := l.done
	go func() {
		defer close(done)
		for s := bufio.NewScanner(out); s.Scan(); {
			n, err := strconv.Atoi(s.Text())
			if err != nil {
				continue // cut off with its writer
			}
			l.mu.Lock()
			l.acked = append(l.acked, n)
			l.mu.Unlock()
			l.last.Store(int64(n))
		}
	}()
}

// end ends the writer, if its node has not ended it.
func (l *ledger) end() {
	l.in.Close()
	<-l.done
	_ = l.cmd.Wait() // it may have been killed with its node
}

func (l *ledger) count() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.acked)
}

// more waits until so many more are acknowledged.
func (l *ledger) more(t *testing.T, what string, n int) {
	t.Helper()
	from := l.count()
	until(t, fmt.Sprintf("%s: %d more lines of %s are acknowledged", what, n, l.file), 60*time.Second, func() bool { return l.count() >= from+n })
}

// whole checks, on a node, that every acknowledged number is in the file.
func (l *ledger) whole(t *testing.T, what, node string) {
	t.Helper()
	l.mu.Lock()
	want := slices.Clone(l.acked)
	l.mu.Unlock()
	var r result
	until(t, what+": "+l.file+" can be read on "+node, 30*time.Second, func() bool {
		r = l.c.run(node, "cat "+l.file)
		return r.code == 0
	})
	has := map[int]bool{}
	for line := range strings.SplitSeq(r.out, "\n") {
		if n, err := strconv.Atoi(line); err == nil {
			has[n] = true
		}
	}
	missing := 0
	for _, n := range want {
		if !has[n] {
			missing++
		}
	}
	if missing > 0 {
		t.Errorf("%s: %d of %d acknowledged lines of %s are not there on %s", what, missing, len(want), l.file, node)
	}
}

// member is a node as `unum nodes --json` shows it.
type member struct {
	ID, Hostname, State string
	Alive               bool
	Leads               []int
}

func (c *cluster) members(node string) []member {
	r := c.run(node, "UNUM nodes --json")
	var ms []member
	if r.code != 0 || json.Unmarshal([]byte(r.out), &ms) != nil {
		return nil
	}
	return ms
}

// rootLeader returns the node that leads the root volume.
func (c *cluster) rootLeader(asked string) string {
	c.t.Helper()
	lead := ""
	until(c.t, "somebody leads", 60*time.Second, func() bool {
		for _, m := range c.members(asked) {
			if m.Alive && slices.Contains(m.Leads, 2) {
				lead = m.Hostname
			}
		}
		return lead != ""
	})
	return lead
}

func (c *cluster) healthyOn(t *testing.T, what string, nodes ...string) {
	t.Helper()
	for _, n := range nodes {
		var last result
		for end := time.Now().Add(60 * time.Second); ; time.Sleep(100 * time.Millisecond) {
			if last = c.run(n, "UNUM status --healthy"); last.code == 0 {
				break
			}
			if time.Now().After(end) {
				t.Fatalf("%s: %s is not healthy: %v", what, n, last)
			}
		}
	}
}

// Three nodes under load: the leader is stopped for half a minute and goes on,
// clocks jump, also over the ends of all certificates and back, a disk is wiped,
// and one is damaged and its node repaired. What was acknowledged is there.
func TestFaultsUnderLoad(t *testing.T) {
	t.Parallel()
	c := up(t, 3)
	nodes := []string{"n1", "n2", "n3"}
	ls := map[string]*ledger{}
	for _, n := range nodes {
		ls[n] = c.write(n, "/unum/ledger-"+n)
		defer ls[n].end()
	}
	intact := func(t *testing.T, what string, on ...string) {
		t.Helper()
		for _, l := range ls {
			for _, n := range on {
				l.whole(t, what, n)
			}
		}
	}
	for _, l := range ls {
		l.more(t, "at first", 5)
	}
	stop := 30 * time.Second
	if testing.Short() {
		stop = 10 * time.Second
	}

	t.Run("leader stopped", func(t *testing.T) {
		c := c.in(t)
		lead := c.rootLeader("n1")
		others := slices.DeleteFunc(slices.Clone(nodes), func(n string) bool { return n == lead })
		began := time.Now()
		c.lab("pause", lead)
		defer c.unum(60*time.Second, "lab", "resume", "--name", c.name, lead) // others' writers end even if this fails
		next := ""
		until(t, "another leads", 60*time.Second, func() bool {
			next = c.rootLeader(others[0])
			return next != lead
		})
		for _, n := range others {
			ls[n].more(t, "the leader is stopped", 5)
		}
		// Meanwhile the others' clocks jump, apart and both ways.
		for _, jump := range [][2]string{{"+1h", "-1h"}, {"-1h", "+1h"}, {"+240h", "+240h"}, {"-240h", "0"}, {"0", "0"}} {
			for i, n := range others {
				c.lab("clock", n, jump[i])
			}
			for _, n := range others {
				ls[n].more(t, "clocks at "+jump[0]+" and "+jump[1], 5)
			}
		}
		time.Sleep(time.Until(began.Add(stop))) // this is the fault, not a wait for something
		c.lab("resume", lead)
		for _, n := range nodes {
			ls[n].more(t, "the old leader goes on", 5)
		}
		c.healthyOn(t, "the old leader goes on", nodes...)
		for _, n := range nodes {
			if was := c.rootLeader(n); was == lead && c.rootLeader(others[0]) != lead {
				t.Errorf("%s takes %s for the leader still", n, lead)
			}
		}
		intact(t, "the old leader goes on", nodes...)
	})

	t.Run("clocks past the certificates", func(t *testing.T) {
		c := c.in(t)
		for _, jump := range []string{"+240h", "0"} { // a certificate lasts a week, and begins shortly before it is made
			c.lab("clock", "n1,n2,n3", jump)
			for _, l := range ls {
				l.more(t, "clocks at "+jump, 5)
			}
			c.lab("kill", "n2") // its connections are new then
			ls["n2"].end()
			c.lab("start", "n2")
			ls["n2"].begin()
			for _, l := range ls {
				l.more(t, "n2 is back, clocks at "+jump, 5)
			}
			c.healthyOn(t, "clocks at "+jump, nodes...)
			intact(t, "clocks at "+jump, nodes...)
		}
	})

	t.Run("wiped", func(t *testing.T) {
		c := c.in(t)
		c.lab("wipe", "n3")
		ls["n3"].end()
		c.lab("start", "n3")
		for _, n := range nodes { // at once: the old id is another machine's past
			for _, m := range c.members(n) {
				if m.Alive != (m.ID != "n3") {
					t.Errorf("%s shows %s (%s) alive: %v", n, m.ID, m.Hostname, m.Alive)
				}
			}
		}
		if out := c.must("n1", "UNUM status || true"); !strings.Contains(out, "n4 answers at its address") {
			t.Errorf("status does not say who is there: %s", out)
		}
		intact(t, "wiped", nodes...)
		if r := c.run("n1", "UNUM remove n3"); r.code != 0 {
			t.Errorf("removal of the old id: %v", r)
		}
		until(t, "the three are n1, n2, n4", 30*time.Second, func() bool {
			var ids []string
			for _, m := range c.members("n2") {
				ids = append(ids, m.ID)
			}
			return slices.Equal(ids, []string{"n1", "n2", "n4"})
		})
		ls["n3"].begin()
		for _, l := range ls {
			l.more(t, "wiped and back", 5)
		}
	})

	t.Run("damaged", func(t *testing.T) {
		c := c.in(t)
		ls["n3"].end()
		// Its daemon is stopped, and one bit of the log's database is another.
		if r := c.run("n3", "UNUM down"); r.code != 0 {
			t.Fatalf("down: %v", r)
		}
		if out := c.must("n3", "f=$(ls -S /var/lib/unum/groups/raftlog/*.log /var/lib/unum/groups/raftlog/*.sst 2>/dev/null | head -1); echo $f; "+flip("$f", 40)); !strings.Contains(out, "raftlog") {
			t.Fatalf("nothing was flipped: %s", out)
		}
		r := c.run("n3", "UNUM up")
		sentence(t, "damaged", r, 125, "/var/lib/unum/groups", "unum join --repair ADDR TOKEN")
		first := strings.TrimSpace(c.must("n1", "hostname -I")) + ":7400"
		tok := strings.TrimSpace(c.must("n1", "UNUM token --quiet"))
		if r := c.run("n3", "UNUM join -d --wait 50s --log-file /var/lib/unum/log --repair "+first+" "+tok); r.code != 0 {
			t.Fatalf("join --repair: %v", r)
		}
		c.healthyOn(t, "repaired", nodes...)
		for _, n := range nodes {
			for _, m := range c.members(n) {
				if m.Alive != (m.ID != "n4") {
					t.Errorf("%s shows %s (%s) alive: %v", n, m.ID, m.Hostname, m.Alive)
				}
			}
		}
		if r := c.run("n2", "UNUM remove n4"); r.code != 0 {
			t.Errorf("removal of the damaged one: %v", r)
		}
		until(t, "the three are n1, n2, n5", 30*time.Second, func() bool {
			var ids []string
			for _, m := range c.members("n3") {
				ids = append(ids, m.ID)
			}
			return slices.Equal(ids, []string{"n1", "n2", "n5"})
		})
		if out := c.must("n3", "ls /var/lib/unum"); !strings.Contains(out, "damaged-1") {
			t.Errorf("what was damaged is not kept: %s", out)
		}
		ls["n3"].begin()
		for _, l := range ls {
			l.more(t, "repaired", 5)
		}
		intact(t, "repaired", nodes...)
		// It votes: another may die.
		c.lab("kill", "n1")
		ls["n1"].end()
		ls["n2"].more(t, "n1 is dead", 5)
		ls["n3"].more(t, "n1 is dead", 5)
		c.lab("start", "--no-wait", "n1")
		c.healthyOn(t, "n1 is back", nodes...)
		intact(t, "n1 is back", nodes...)
	})
	total := 0
	for _, l := range ls {
		total += l.count()
	}
	t.Logf("%d lines acknowledged", total)
}

// flip is the shell's words for the change of one bit of a file at an offset.
func flip(file string, at int) string {
	return fmt.Sprintf(`b=$(od -An -tu1 -j%d -N1 %s | tr -d ' '); printf "\\$(printf %%o $((b ^ 1)))" | dd of=%s bs=1 seek=%d conv=notrunc status=none && sync`, at, file, file, at)
}

// Five nodes under load: any two die at once and return; then all lose power at
// once and return one by one in any order. With UNUM_TORTURE set, seven too, and
// more often.
func TestFiveNodesDieAndReturn(t *testing.T) {
	t.Parallel()
	sizes, rounds := []int{5}, 1
	if os.Getenv("UNUM_TORTURE") != "" {
		sizes, rounds = []int{5, 7}, 20
	}
	seed := rand.Uint64()
	if s, err := strconv.ParseUint(os.Getenv("UNUM_SEED"), 10, 64); err == nil {
		seed = s
	}
	t.Logf("UNUM_SEED=%d", seed)
	for _, size := range sizes {
		t.Run(fmt.Sprint(size), func(t *testing.T) { dieAndReturn(t, size, rounds, rand.New(rand.NewPCG(seed, uint64(size)))) })
	}
}

func dieAndReturn(t *testing.T, size, rounds int, rng *rand.Rand) {
	c := up(t, size)
	var nodes []string
	ls := map[string]*ledger{}
	for i := range size {
		n := fmt.Sprintf("n%d", i+1)
		nodes = append(nodes, n)
		ls[n] = c.write(n, "/unum/ledger-"+n)
		defer func() { ls[n].end() }()
	}
	pick := func(k int) []string {
		var out []string
		for _, i := range rng.Perm(size)[:k] {
			out = append(out, nodes[i])
		}
		return out
	}
	for _, l := range ls {
		l.more(t, "at first", 3)
	}
	for round := range rounds {
		dead := pick(2) // a minority of five votes, whoever has them
		what := fmt.Sprintf("round %d, %v dead", round, dead)
		c.lab("kill", dead...)
		for _, n := range nodes {
			if slices.Contains(dead, n) {
				ls[n].end()
			} else {
				ls[n].more(t, what, 3)
			}
		}
		for _, n := range dead {
			c.lab("start", "--no-wait", n)
		}
		c.healthyOn(t, what, nodes...)
		for _, n := range dead {
			ls[n].begin()
		}
		order := pick(size)
		what = fmt.Sprintf("round %d, all return in the order %v", round, order)
		for _, l := range ls {
			l.more(t, what, 3)
		}
		c.lab("kill", nodes...)
		for _, l := range ls {
			l.end()
		}
		for _, n := range order {
			c.lab("start", "--no-wait", n)
			time.Sleep(time.Duration(rng.IntN(500)) * time.Millisecond) // one after the other is what is tried
		}
		c.healthyOn(t, what, nodes...)
		for _, l := range ls {
			l.whole(t, what, order[size-1])
			l.whole(t, what, order[0])
			l.begin()
		}
		for _, m := range c.members(order[0]) {
			if !m.Alive || m.State != "member" {
				t.Errorf("%s: %+v", what, m)
			}
		}
	}
	total := 0
	for _, l := range ls {
		total += l.count()
	}
	t.Logf("%d lines acknowledged", total)
}
