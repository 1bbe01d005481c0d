package sim

import (
	"container/heap"
	"crypto/rand"
	"crypto/sha256"
	"fmt"
	"hash"
	"io"
	"maps"
	mrand "math/rand/v2"
	"slices"
	"strconv"
	"sync"
	"time"

	"github.com/anishathalye/porcupine"
	"github.com/cockroachdb/pebble/v2/vfs"

	"github.com/unum-os/unum/internal/group"
	"github.com/unum-os/unum/internal/ids"
)

// Plant is a bug put in on purpose.
type Plant string

// group returns the fault in package group, if it is there.
func (p Plant) group() group.Fault { return plants[p] }

// Bugs planted in the simulator's own machine.
const (
	plantForgetSession    Plant = "forget session"   // a repeated command is done again
	plantNondeterministic Plant = "nondeterministic" // the state depends on the node
)

var plants = map[Plant]group.Fault{
	"":                    group.NoFault,
	"skip sync":           group.SkipSync,
	"ack before sync":     group.AckBeforeSync,
	"answer early":        group.AnswerEarly,
	"apply twice":         group.ApplyTwice,
	"reuse read context":  group.ReuseReadContext,
	"local read":          group.LocalRead,
	"forget vote":         group.ForgetVote,
	"trim unsynced":       group.TrimUnsynced,
	"reset early":         group.ResetEarly,
	"forget applied":      group.ForgetApplied,
	"no snapshot marker":  group.NoMarker,
	"forget conf":         group.ForgetConf,
	"unproven change":     group.Unproven,
	plantForgetSession:    group.NoFault,
	plantNondeterministic: group.NoFault,
}

// Plants lists the bugs that can be planted.
func Plants() []Plant {
	list := slices.Sorted(maps.Keys(plants))
	return list[1:] // without none
}

// Config is one run.
type Config struct {
	Seed  uint64
	Plant Plant
	Trace io.Writer // nil: the trace is only hashed
}

// Stats counts what happened. CrashesSending and CrashesSyncing are power
// failures at a message and at a sync, Crashes those between two steps; Unjudged
// are histories that were too long to judge, Gone machines that were taken out and
// stopped for ever, OutLed leaders without a vote, LedWithout groups that had to
// have a leader with a node down, Rivals pairs that were told to seek one term.
type Stats struct {
	Ops, Attempts, Unknown, Abandoned, Unjudged int
	Crashes, CrashesSending, CrashesSyncing     int
	Blackouts, Partitions, OneWay, Cuts, Storms int
	Pauses, Slow, Skews, Transfers, Rivals      int
	Ambushes, Stewarded, Witnesses, WitnessLed  int
	Gone, OutLed, LedWithout                    int
	Messages, Dropped, Duplicated               int
	Snapshots, SnapshotsTorn, Leaders, Changes  int
	Virtual                                     time.Duration
}

// Result is what came of a run.
type Result struct {
	Seed      uint64
	Trace     [32]byte // hash over all that happened
	Stats     Stats
	Violation error // nil: all promises held
}

// world is one run: everything in it happens on one goroutine, in the order of
// its queue.
type world struct {
	cfg   Config
	rng   *mrand.Rand
	now   time.Time
	queue queue
	seq   uint64
	hash  hash.Hash
	line  []byte
	err   error
	stats Stats

	nodes   []*node
	net     *network
	check   *checker
	clients []*client
	think   time.Duration // between a client's operations
	quiet   bool          // no more faults and no new operations
	stormy  bool

	late    *node                  // stays down until all others are up
	configs map[ids.Group][]config // in force, and those before it since a leader last called one done

	stewarded bool    // package quorum decides who votes
	ambushes  int     // one of so many votes is ambushed; 0: none
	votes     int     // were
	jitter    float64 // of the ticks
	logBytes  int64   // short logs make snapshots

	stamps   int64
	uniques  uint64
	lastRead map[uint64]uint64
	acked    map[mark]ids.Group
	history  []porcupine.Operation
}

// event is something that happens at a time; seq decides between those of one
// time.
type event struct {
	at  time.Time
	seq uint64
	do  func()
}

type queue []event

func (q queue) Len() int { return len(q) }
func (q queue) Less(i, j int) bool {
	if c := q[i].at.Compare(q[j].at); c != 0 {
		return c < 0
	}
	return q[i].seq < q[j].seq
}
func (q queue) Swap(i, j int) { q[i], q[j] = q[j], q[i] }
func (q *queue) Push(x any)   { *q = append(*q, x.(event)) }
func (q *queue) Pop() any {
	old := *q
	e := old[len(old)-1]
	old[len(old)-1] = event{}
	*q = old[:len(old)-1]
	return e
}

func (w *world) at(d time.Duration, do func()) {
	w.seq++
	heap.Push(&w.queue, event{w.now.Add(max(d, 0)), w.seq, do})
}

func (w *world) stamp() int64 {
	w.stamps++
	return w.stamps
}

func (w *world) unique() uint64 {
	w.uniques++
	return w.uniques
}

// tracef adds a line to what the hash goes over.
func (w *world) tracef(f string, a ...any) {
	w.line = append(strconv.AppendInt(w.line[:0], w.now.UnixNano(), 10), ' ')
	w.line = append(fmt.Appendf(w.line, f, a...), '\n')
	w.hash.Write(w.line)
	if w.cfg.Trace != nil {
		w.cfg.Trace.Write(w.line)
	}
}

// violated ends the run; the first violation counts.
func (w *world) violated(f string, a ...any) {
	if w.err == nil {
		w.err = fmt.Errorf(f, a...)
		w.tracef("violated: %v", w.err)
	}
}

func (w *world) node(id ids.Node) *node {
	if id == 0 || int(id) > len(w.nodes) {
		return nil
	}
	return w.nodes[id-1]
}

// runUntil lets the world go on until ok holds, or for at most d; it tells
// whether ok holds.
func (w *world) runUntil(d time.Duration, ok func() bool) bool {
	end := w.now.Add(d)
	for w.err == nil && len(w.queue) > 0 && w.queue[0].at.Before(end) {
		e := heap.Pop(&w.queue).(event)
		w.now = e.at
		e.do()
		if ok != nil && ok() {
			return true
		}
	}
	if w.err == nil {
		w.now = end
	}
	return false
}

// blank is a disk with empty databases, made once: it is the slow part of a
// first start.
var blank = sync.OnceValues(func() (*vfs.MemFS, error) {
	mem := vfs.NewCrashableMem()
	h, err := group.New(group.Config{Self: 1, Dir: dir, Transport: port{}, FS: mem})
	if err != nil {
		return nil, err
	}
	return mem, h.Close()
})

// Fixed reads as zeros. Raft draws its election time-outs from crypto/rand, and
// takes no other source; in a process that simulates, crypto/rand.Reader must
// be Fixed. Then all time-outs are the shortest, and what tells nodes apart is
// the length of their ticks, which the seed draws.
type Fixed struct{}

// Read fills b with zeros.
func (Fixed) Read(b []byte) (int, error) {
	clear(b)
	return len(b), nil
}

// Run does one run. It panics when crypto/rand.Reader is not Fixed.
func Run(cfg Config) Result {
	if rand.Reader != (Fixed{}) {
		panic("sim: crypto/rand.Reader is not sim.Fixed: elections would not be reproducible")
	}
	w := &world{
		cfg: cfg, rng: mrand.New(mrand.NewPCG(cfg.Seed, 0x756e756d)), now: time.Unix(0, 0), hash: sha256.New(),
		lastRead: map[uint64]uint64{}, acked: map[mark]ids.Group{}, configs: map[ids.Group][]config{},
	}
	w.check = newChecker(w)
	w.net = &network{w: w, cut: map[[2]ids.Node]int{}}
	w.build()
	if w.err == nil {
		w.live()
	}
	if w.err == nil {
		w.finish()
	}
	for _, n := range w.nodes {
		n.release()
	}
	r := Result{Seed: cfg.Seed, Stats: w.stats, Violation: w.err}
	r.Stats.Virtual = w.now.Sub(time.Unix(0, 0))
	w.hash.Sum(r.Trace[:0])
	return r
}

// build makes the nodes and the clients.
func (w *world) build() {
	disk, err := blank()
	if err != nil {
		w.violated("no blank disk: %v", err)
		return
	}
	size := []int{3, 3, 5, 5, 4}[w.rng.IntN(5)]
	voters := []int{3, min(size, 5), 1, 2}[w.rng.IntN(4)]
	w.net.delay = []time.Duration{200 * time.Microsecond, 2 * time.Millisecond, 20 * time.Millisecond}[w.rng.IntN(3)]
	w.net.jitter = 2 * w.rng.Float64()
	if w.rng.IntN(2) == 0 {
		w.net.loss, w.net.dup, w.net.late = 0.05*w.rng.Float64(), 0.05*w.rng.Float64(), 0.02*w.rng.Float64()
	}
	w.think = time.Duration(5+w.rng.IntN(60)) * time.Millisecond
	w.tracef("%d nodes, %d voters, delay %v", size, voters, w.net.delay)
	var first []ids.Node
	for id := range voters {
		first = append(first, ids.Node(id+1))
	}
	w.stewarded = w.rng.IntN(3) == 0
	w.ambushes = []int{0, 1, 2, 6}[w.rng.IntN(4)]
	w.logBytes = []int64{1 << 10, 4 << 10, 64 << 10}[w.rng.IntN(3)]
	w.jitter = []float64{0.05, 0.2, 0.6}[w.rng.IntN(3)]
	for id := range size {
		w.nodes = append(w.nodes, &node{w: w, id: ids.Node(id + 1), rest: disk.CrashClone(vfs.CrashCloneCfg{}),
			rate: 1, slow: 1, had: map[ids.Group]bool{}, terms: map[ids.Group]uint64{}, seen: w.now, member: id < voters || w.rng.IntN(2) == 0})
	}
	if size >= 3 && w.rng.IntN(4) == 0 {
		last := w.nodes[max(voters, 3)-1] // a voter, or one that may come to be
		last.witness = true
		w.stats.Witnesses++
	}
	for _, n := range w.nodes {
		n.boot(func(h *group.Host) error {
			for _, g := range groups {
				begin := h.Join
				if int(n.id) <= voters {
					begin = func(g ids.Group) error { return h.Bootstrap(g, first) }
				}
				if err := begin(g); err != nil {
					return err
				}
			}
			return nil
		})
		if w.err != nil {
			return
		}
	}
}

// live is the time of faults.
func (w *world) live() {
	w.found()
	founder := w.clients[0]
	if !w.runUntil(time.Minute, func() bool { return w.stats.Ops > 0 }) {
		w.violated("nothing was founded within a minute: %v", founder)
		return
	}
	for i := range 6 {
		c := &client{w: w, id: uint64(i + 2), g: registerGroup}
		if i < 2 {
			c.g = recordGroup
		}
		w.clients = append(w.clients, c)
		c.next()
	}
	founder.g = recordGroup
	w.chaos()
	if w.stewarded {
		w.steward()
	}
	w.runUntil(time.Duration(6+w.rng.IntN(10))*time.Second, nil)
}

// finish ends all faults, and judges: everybody is answered, all replicas
// become equal, and stay so over a power failure of all nodes.
func (w *world) finish() {
	w.quiet = true
	w.heal()
	if !w.leads() {
		return
	}
	w.late = nil
	w.heal()
	if !w.settle() {
		return
	}
	w.tracef("all nodes lose power")
	for _, n := range w.nodes {
		n.back = 0
		n.crash()
	}
	w.runUntil(time.Second, nil)
	w.heal()
	if !w.settle() {
		return
	}
	w.durable()
	// What every node says now is part of the history.
	for i, n := range w.nodes {
		for _, k := range []uint64{0, 1, 2, 3, jobsKey, labelKey} {
			c := &client{w: w, id: uint64(100 + i), g: registerGroup}
			if k >= jobsKey {
				c.g = recordGroup
			}
			w.lastly(c, n, k)
		}
	}
	if w.err == nil {
		w.check.linearizable(w.history)
	}
}

// lastly reads a key at n, if n is a member.
func (w *world) lastly(c *client, n *node, key uint64) {
	lead := w.leader(c.g)
	if w.err != nil || lead == nil || n.witness || n.gone || !slices.Contains(members(lead.group(c.g).Status()), n.id) {
		return
	}
	w.clients = append(w.clients, c)
	c.busy, c.op, c.call, c.at = true, command{client: c.id, key: key, kind: opRead}, w.stamp(), n
	c.p = n.st.ReadIndex(n.group(c.g))
	n.plan()
	if !w.runUntil(30*time.Second, func() bool { return !c.busy }) {
		w.violated("%v does not answer a read of key %d within 30 s", n.id, key)
	}
}

func members(st group.Status) []ids.Node { return slices.Concat(st.Voters, st.Learners) }

// heal ends all faults.
func (w *world) heal() {
	clear(w.net.cut)
	w.net.loss, w.net.dup, w.net.late, w.net.delay = 0, 0, 0, 2*time.Millisecond
	for _, n := range w.nodes {
		n.rate, n.slow, n.pausedUntil, n.armedSend = 1, 1, time.Time{}, 0
		if n.disk != nil {
			n.disk.armed.Store(0)
		}
		if !n.up && !n.gone && n != w.late {
			n.boot(nil)
		}
	}
}

// config is who votes: two sides while a change is under way.
type config struct {
	at    uint64
	sides [2][]ids.Node
}

// learn keeps which configurations may be in force.
func (w *world) learn(n *node, g *group.Group, st group.Status) {
	voters, outgoing, at := n.st.Config(g)
	list := w.configs[st.Group]
	switch c := (config{at, [2][]ids.Node{voters, outgoing}}); {
	case len(list) == 0 || at > list[len(list)-1].at:
		list = append(list, c)
	case at < list[len(list)-1].at:
		return
	}
	if st.Role == group.Leader && !st.Joint {
		list = list[len(list)-1:]
	}
	w.configs[st.Group] = list
}

// leads waits, with one node down, for a leader of each group that has a majority
// without it: in the last configuration that was done, and in all since.
func (w *world) leads() bool {
	if w.late == nil {
		return true
	}
	w.runUntil(10*time.Second, nil) // whoever leads alone notices
	for _, g := range groups {
		able := true
		for _, c := range w.configs[g] {
			for _, side := range c.sides {
				alive := 0
				for _, id := range side {
					if w.node(id).up {
						alive++
					}
				}
				able = able && (len(side) == 0 || 2*alive > len(side))
			}
		}
		if !able || w.err != nil {
			continue
		}
		w.stats.LedWithout++
		if !w.runUntil(time.Minute, func() bool { return w.leader(g) != nil }) {
			w.violated("group %d has no leader, though of its voters %v only %v is down: %s", g, w.configs[g], w.late.id, w.state())
		}
	}
	return w.err == nil
}

// settle waits until all clients have their answers and all members of each
// group have applied the same, and compares them.
func (w *world) settle() bool {
	same := map[ids.Group][]*node{}
	next := w.now
	ok := w.runUntil(time.Minute, func() bool {
		if w.now.Before(next) {
			return false
		}
		next = w.now.Add(100 * time.Millisecond)
		for _, c := range w.clients {
			if c.busy {
				return false
			}
		}
		for _, g := range groups {
			if same[g] = w.together(g); same[g] == nil {
				return false
			}
		}
		return true
	})
	if w.err != nil {
		return false
	}
	if !ok {
		w.violated("a minute after the last fault it has not settled: %s", w.state())
		return false
	}
	for _, g := range groups {
		w.check.equal(g, same[g])
		for _, n := range w.nodes {
			if n.up && n.had[g] {
				if c := n.group(g).Status().Contradicts; c != 0 {
					w.violated("%v says that %v has other entries of group %d committed", n.id, c, g)
				}
			}
		}
	}
	return w.err == nil
}

// together returns the members of g that have its state, if all members have
// applied what is committed.
func (w *world) together(g ids.Group) []*node {
	lead := w.leader(g)
	if lead == nil || lead.witness { // it will hand over
		return nil
	}
	st := lead.group(g).Status()
	// Until a leader has committed something of its own it does not know what is.
	term, _ := lead.st.LogTerm(lead.group(g), st.Applied)
	if st.Joint || st.Applied != st.Commit || term != st.Term {
		return nil
	}
	var out []*node
	for _, id := range members(st) {
		if n := w.node(id); n.gone {
			continue // a learner again, by a change that was under way
		} else if !n.up || n.group(g).Status().Applied != st.Applied {
			return nil
		} else if !n.witness {
			out = append(out, n)
		}
	}
	return out
}

// durable looks for every acknowledged command in the state.
func (w *world) durable() {
	n := w.leader(registerGroup)
	g := n.group(registerGroup)
	keys := slices.SortedFunc(maps.Keys(w.acked), func(a, b mark) int {
		return slices.Compare([]uint64{a.client, a.seq}, []uint64{b.client, b.seq})
	})
	for _, m := range keys {
		if w.acked[m] != registerGroup {
			continue
		}
		if _, ok, err := g.Get([]byte("e"), u64(m.client, m.seq)); err != nil || !ok {
			w.violated("command %d of client %d was acknowledged and is missing (%v)", m.seq, m.client, err)
			return
		}
	}
}

// state describes who is where, for a person.
func (w *world) state() string {
	s := ""
	for _, n := range w.nodes {
		for _, g := range groups {
			if n.up {
				s += fmt.Sprintf("\n%v: %+v", n.id, n.group(g).Status())
			} else {
				s += fmt.Sprintf("\n%v: down", n.id)
			}
		}
	}
	for _, c := range w.clients {
		if c.busy {
			s += "\n" + c.String()
		}
	}
	return s
}
