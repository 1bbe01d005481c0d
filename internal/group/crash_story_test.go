package group

import (
	"context"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"syscall"
	"testing"

	"github.com/cockroachdb/pebble/v2"

	"github.com/unum-os/unum/internal/disk"
	"github.com/unum-os/unum/internal/ids"
)

// story is an operation of a group during which one machine, the victim, loses
// its power at a change of its disk, or has its disk fail there. Then the victim
// comes back, twice; then lose goes for good, so that what was acknowledged must
// be on the victim, which the third has to learn it from.
type story struct {
	name    string
	witness ids.Node   // if any
	start   []ids.Node // voters at first
	others  []ids.Node // machines that join
	victim  ids.Node
	lose    []ids.Node
	off     bool // the victim is off when do begins
	reads   bool // reading from the disk fails too
	before  func(*stage) bool
	do      func(*stage) bool // it can be done again
}

// apart has n commands acknowledged while who is cut off: the other two have them.
func (st *stage) apart(who ids.Node, n int) bool {
	st.isolate(who, true)
	return st.put(n)
}

// flush puts what the databases of n have in memory into tables, and merges them.
func (st *stage) flush(n ids.Node) bool {
	a := st.actors[n]
	lo, hi := groupBounds(tg)
	h := a.l.h
	for _, db := range []*pebble.DB{h.stateDB, h.logDB} {
		if a.l != nil {
			l := a.l
			l.rotates.Store(true)
			a.do(db.Flush)
			l.rotates.Store(false)
		}
		if a.l != nil {
			a.do(func() error { return db.Compact(context.Background(), lo, hi, false) })
		}
	}
	return !st.lost()
}

// trimmed awaits that the log of n begins later than it did.
func (st *stage) trimmed(n ids.Node) bool {
	a, was := st.actors[n], uint64(0)
	if a.l != nil {
		was, _ = a.l.s.LogBounds(a.group())
	}
	for i := 0; i < 100 && !st.lost(); i++ {
		if now, _ := a.l.s.LogBounds(a.group()); now > was {
			return true
		}
		if !st.put(4) {
			return false
		}
	}
	st.wrong("the log of %v is never cut", n)
	return false
}

// knows awaits that n has applied what the leader knows as committed now.
func (st *stage) knows(n ids.Node) bool {
	top := uint64(0)
	return st.until(fmt.Sprint("catching up of ", n), func() bool {
		if l := st.leader(); top == 0 && l != nil {
			top = l.group().Status().Commit
		}
		a := st.actors[n]
		return top > 0 && a.l != nil && a.group().Status().Applied >= top
	})
}

// snapshot brings 3, whose log ends before the leader's begins, up.
func snapshot(st *stage) bool {
	st.isolate(2, false)
	st.isolate(3, false)
	st.settled = true
	return st.knows(3) && st.apart(2, 4)
}

func behind(st *stage) bool {
	return st.put(6) && st.apart(3, 2) && st.trimmed(1) && st.trimmed(1) && st.put(20) && st.flush(1)
}

func compaction(n ids.Node) func(*stage) bool {
	return func(st *stage) bool {
		st.settled = true
		return st.apart(2, 1) && st.trimmed(n) && st.flush(n) && st.trimmed(n) && st.flush(n) && st.put(2)
	}
}

func join(st *stage) bool {
	st.isolate(2, false)
	if st.actors[3].l == nil {
		st.bring(3)
	}
	if !st.ask("learner", func(s *Stepper, g *Group) *Pending { return s.AddLearner(g, 3) }, nil) {
		return false
	}
	if !st.knows(3) || !st.ask("promotion", func(s *Stepper, g *Group) *Pending { return s.Reseat(g, []ids.Node{3}, nil, nil) }, nil) {
		return false
	}
	if !st.seats(1, 2, 3) || !st.knows(2) { // it must be able to elect 3
		return false
	}
	st.settled = true
	return st.apart(2, 4)
}

// exchange gives 4 the seat of 3.
func exchange(st *stage) bool {
	st.isolate(2, false)
	if !st.ask("exchange", func(s *Stepper, g *Group) *Pending { return s.Reseat(g, []ids.Node{4}, nil, []ids.Node{3}) }, nil) {
		return false
	}
	if !st.seats(1, 2, 4) || !st.knows(2) {
		return false
	}
	st.settled = true
	return st.apart(2, 4)
}

func fourth(st *stage) bool {
	st.bring(4)
	return st.ask("learner", func(s *Stepper, g *Group) *Pending { return s.AddLearner(g, 4) }, nil) && st.put(12) && st.knows(4)
}

// handOver has 2 lead in the place of 1, while 3 hears of nothing.
func handOver(st *stage) bool {
	st.settled = true
	st.isolate(3, false)
	return st.lead(1) && st.put(2) && st.apart(3, 2) && st.lead(2) && st.put(3)
}

// witnessed: the witness, 3, leads when 1 is lost, and hands over to 2, which
// lacks what 1 and 3 have acknowledged.
func witnessed(st *stage) bool {
	st.settled = true
	st.isolate(1, true)
	st.isolate(2, false)
	return st.until("hand-over", func() bool { l := st.leader(); return l != nil && l.id == 2 }) && st.put(3)
}

func stories() []*story {
	again := func(st *stage) bool {
		st.settled = true
		st.isolate(3, false)
		if st.actors[3].l == nil {
			st.bring(3)
		}
		return st.knows(3) && st.apart(2, 4)
	}
	one2, one23, three, four := []ids.Node{1, 2}, []ids.Node{1, 2, 3}, []ids.Node{3}, []ids.Node{4}
	return []*story{
		{name: "restart", start: one23, victim: 3, lose: []ids.Node{1}, off: true, do: again,
			before: func(st *stage) bool { return st.put(30) && st.flush(3) && st.apart(2, 12) }},
		{name: "join", start: one2, others: three, victim: 3, lose: []ids.Node{1}, off: true, do: join,
			before: func(st *stage) bool { return st.trimmed(1) && st.put(10) }},
		{name: "join, the leader", start: one2, others: three, victim: 1, lose: []ids.Node{3}, do: join,
			before: func(st *stage) bool { return st.trimmed(1) && st.put(10) }},
		{name: "snapshot, who sends", start: one23, victim: 1, lose: []ids.Node{3}, reads: true, do: snapshot, before: behind},
		{name: "snapshot, who installs", start: one23, victim: 3, lose: []ids.Node{1}, do: snapshot, before: behind},
		{name: "compaction", start: one23, victim: 3, lose: []ids.Node{1}, do: compaction(3), before: func(st *stage) bool { return st.put(10) }},
		{name: "compaction, the leader", start: one23, victim: 1, lose: []ids.Node{3}, do: compaction(1), before: func(st *stage) bool { return st.put(10) }},
		{name: "voter change, the leader", start: one23, others: four, victim: 1, lose: []ids.Node{4, 3}, do: exchange, before: fourth},
		{name: "voter change, who comes", start: one23, others: four, victim: 4, lose: []ids.Node{1, 3}, do: exchange, before: fourth},
		{name: "hand-over, who leads", start: one23, victim: 1, lose: []ids.Node{2}, do: handOver, before: func(st *stage) bool { return st.put(3) }},
		{name: "hand-over, who takes over", start: one23, victim: 2, lose: []ids.Node{1}, do: handOver, before: func(st *stage) bool { return st.put(3) }},
		{name: "hand-over, the witness", start: one23, witness: 3, victim: 3, lose: []ids.Node{1}, do: witnessed,
			before: func(st *stage) bool { return st.put(6) && st.apart(2, 6) }},
		{name: "hand-over from the witness", start: one23, witness: 3, victim: 2, lose: []ids.Node{1}, do: witnessed,
			before: func(st *stage) bool { return st.put(6) && st.apart(2, 6) }},
	}
}

// bring starts a machine that joins, with the fault if it is the victim's first
// start in do.
func (st *stage) bring(n ids.Node) {
	f := disk.Fault{}
	if st.watch && n == st.victim {
		f = st.fault
	}
	st.actors[n].boot(f, func(h *Host) error { return h.Join(tg) })
}

// scene is what a story begins with: disks, and what was acknowledged.
type scene struct {
	*story
	seed  uint64
	plant Fault
	disks map[ids.Node]*disk.Mem
	cut   map[ids.Node]bool
	acked []string
	tried int
}

// scene does what comes before.
func (s *story) scene(seed uint64) (*scene, error) {
	st := newStage(seed, s.witness, NoFault, slices.Concat(s.start, s.others)...)
	for _, id := range s.start {
		st.actors[id].boot(disk.Fault{}, func(h *Host) error { return h.Bootstrap(tg, s.start) })
	}
	if st.lead(1) {
		s.before(st)
	}
	st.close()
	sc := &scene{story: s, seed: seed, disks: map[ids.Node]*disk.Mem{}, cut: st.cut, acked: st.acked, tried: st.tried}
	for id, a := range st.actors {
		sc.disks[id] = a.disk
	}
	return sc, st.err
}

// cutting is what came of a run.
type cutting struct {
	ops   int64  // counted on the victim's disk
	fired string // the operation that it was, or nothing
	acks  int    // acknowledged in the story by then
	why   error  // with which the victim stopped
}

// play runs the story with the fault; the error is what is not as promised.
func (sc *scene) play(f disk.Fault) (c cutting, err error) {
	st := newStage(sc.seed+uint64(f.At), sc.witness, sc.plant, slices.Concat(sc.start, sc.others)...)
	defer st.close()
	st.acked, st.tried, st.victim, st.fault, st.cut = slices.Clone(sc.acked), sc.tried, sc.victim, f, maps.Clone(sc.cut)
	for id, d := range sc.disks {
		st.actors[id].disk = d.Clone()
	}
	for _, a := range st.cast() {
		if !(sc.off && a.id == sc.victim) && !empty(a.disk) {
			a.boot(disk.Fault{}, nil)
		}
	}
	v := st.actors[sc.victim]
	if !sc.off {
		if !st.lead(1) {
			return c, st.err
		}
		st.fs = v.l.fs
		st.fs.Set(v.l.aimed(f))
		st.watch = true
		sc.do(st)
	} else {
		st.watch = true
		if st.bring(sc.victim); v.l != nil {
			sc.do(st)
		}
	}
	st.watch = false
	acks := len(st.acked) - len(sc.acked)
	if v.l != nil { // undisturbed, or the host went on all the same
		v.end(nil)
	}
	c = cutting{st.ops, st.fired, acks, st.offErr}
	if st.err == nil {
		sc.recover(st)
	}
	return c, st.err
}

// recover has the victim come back twice, and the others go on with what it kept.
func (sc *scene) recover(st *stage) {
	v := st.actors[sc.victim]
	var prepare func(*Host) error
	if slices.Contains(sc.others, sc.victim) {
		prepare = func(h *Host) error { return h.Join(tg) }
	}
	apart := st.cut[v.id]
	st.isolate(v.id, true)
	for range 2 { // and again, while it recovers or soon afterwards
		v.boot(disk.Fault{At: 1 + st.rng.Int64N(40)}, prepare)
		for i := 0; i < 2*electionTicks && v.l != nil; i++ {
			v.do(v.l.s.Tick)
			for i := 0; i < 4 && v.l != nil; i++ {
				st.pump()
			}
		}
		if v.l != nil {
			v.end(nil)
		}
	}
	v.boot(disk.Fault{}, prepare)
	st.isolate(v.id, apart)
	if !st.settled && !sc.do(st) {
		return
	}
	for _, n := range sc.lose {
		if a := st.actors[n]; a.l != nil {
			a.end(nil)
		}
	}
	for id := range st.actors {
		st.isolate(id, false)
	}
	st.equal()
}

// places returns at which of n operations something happens: all of them with
// UNUM_TORTURE, else so many, drawn evenly, but every second from the end of the
// story, where there are promises.
func places(n int64, some int, rng *rand.Rand) (out []int64) {
	if os.Getenv("UNUM_TORTURE") != "" || n <= int64(some) {
		for k := int64(1); k <= n+n/10; k++ { // the engine's own work varies
			out = append(out, k)
		}
		return out
	}
	for i := range int64(some) {
		lo, hi := 1+i*n/int64(some), 1+(i+1)*n/int64(some)
		if i%2 == 1 {
			lo, hi = max(1, n-12), n+1
		}
		out = append(out, lo+rng.Int64N(hi-lo))
	}
	return out
}

// seedOf returns a seed, or the one of UNUM_SEED, and prints it.
func seedOf(t *testing.T) uint64 {
	seed := rand.Uint64N(1 << 32)
	if s := os.Getenv("UNUM_SEED"); s != "" {
		n, err := strconv.ParseUint(s, 10, 64)
		if err != nil {
			t.Fatal(err)
		}
		seed = n
	}
	t.Logf("UNUM_SEED=%d", seed)
	return seed
}

// cuts plays each story with a fault at each of its places.
func cuts(t *testing.T, some int, fault func(s *story, k int64) disk.Fault) {
	seed := seedOf(t)
	if testing.Short() {
		some = 2
	}
	all := os.Getenv("UNUM_TORTURE") != ""
	hits, stops := 0, 0
	for _, s := range stories() {
		t.Run(s.name, func(t *testing.T) {
			sc, err := s.scene(seed)
			if err != nil {
				t.Fatal(err)
			}
			f := fault(s, 1)
			f.At = 0
			whole, err := sc.play(f)
			if err != nil {
				t.Fatalf("undisturbed: %v", err)
			}
			hit, late, stopped := 0, 0, 0
			for _, k := range places(whole.ops, some, rand.New(rand.NewPCG(seed, 1))) {
				f := fault(s, k)
				c, err := sc.play(f)
				if err != nil {
					t.Fatalf("operation %d (%s; %+v), %d acknowledged in the story, stopped by %v: %v", k, c.fired, f, c.acks, c.why, err)
				}
				if c.fired != "" {
					hit++
				}
				if c.acks > 0 {
					late++
				}
				if c.why != nil {
					stopped++
				}
			}
			t.Logf("%d operations, %d acknowledged; %d tried, %d of them after an acknowledgement, %d stopped the host", whole.ops, whole.acks, hit, late, stopped)
			if hit == 0 || all && (late == 0 || f.Err != nil && stopped == 0) {
				t.Error("too little")
			}
			hits, stops = hits+hit, stops+stopped
		})
	}
	if fault(stories()[0], 1).Err != nil && stops == 0 && !t.Failed() {
		t.Errorf("of %d failures none stopped a host", hits)
	}
}

// The power fails at each change that each story makes on its victim's disk.
func TestCrashInEachStory(t *testing.T) {
	cuts(t, 8, func(_ *story, k int64) disk.Fault { return disk.Fault{At: k} })
}

// Each operation of each story fails on its victim's disk, once or from then on.
func TestFailInEachStory(t *testing.T) {
	cuts(t, 6, func(s *story, k int64) disk.Fault {
		f := disk.Fault{At: k, Once: k%2 == 0, Err: syscall.EIO, Spare: spared}
		if k%4 < 2 {
			f.Err = syscall.ENOSPC
		}
		if s.reads {
			f.Kinds = disk.Changes | disk.OpOpen | disk.OpRead
		}
		return f
	})
}

// TestPlantedFaultsAreCut shows that the stories find what they are for: a host
// with a fault planted breaks a promise when its power fails.
func TestPlantedFaultsAreCut(t *testing.T) {
	seed := seedOf(t)
	for _, c := range []struct {
		name  string
		fault Fault
		story string
	}{
		{"the log is not synced", SkipSync, "hand-over, who takes over"},
		{"promises leave before the sync", AckBeforeSync, "voter change, who comes"},
		{"the log is cut before the state is durable", TrimUnsynced, "compaction"},
		{"a snapshot has no marker", NoMarker, "snapshot, who installs"},
		{"the log is reset before the snapshot is there", ResetEarly, "snapshot, who installs"},
		{"the configuration is not kept", ForgetConf, "join"},
	} {
		t.Run(c.name, func(t *testing.T) {
			all := stories()
			s := all[slices.IndexFunc(all, func(s *story) bool { return s.name == c.story })]
			sc, err := s.scene(seed)
			if err != nil {
				t.Fatal(err)
			}
			sc.plant = c.fault
			whole, err := sc.play(disk.Fault{})
			if err != nil {
				t.Logf("found undisturbed: %v", err)
				return
			}
			rng := rand.New(rand.NewPCG(seed, 2))
			for tries := 1; tries <= 200; tries++ {
				k := 1 + rng.Int64N(whole.ops)
				if got, err := sc.play(disk.Fault{At: k}); err != nil {
					t.Logf("found by run %d, at operation %d of %d (%s): %.300v", tries, k, whole.ops, got.fired, err)
					return
				}
			}
			t.Error("not found")
		})
	}
}
