package group

import (
	"fmt"
	"testing"

	"github.com/unum-os/unum/internal/disk"
	"github.com/unum-os/unum/internal/ids"
)

// forgetful makes a group of three whose second has lost what it and the first
// have acknowledged, while the third was away.
func forgetful(t *testing.T) *stage {
	t.Helper()
	st := newStage(1, 0, 0, 1, 2, 3)
	t.Cleanup(st.close)
	for id := ids.Node(1); id <= 3; id++ {
		st.actors[id].boot(disk.Fault{}, func(h *Host) error { return h.Bootstrap(tg, []ids.Node{1, 2, 3}) })
	}
	if !st.lead(1) || !st.put(2) || !st.equal() {
		t.Fatal(st.err)
	}
	two := st.actors[2]
	old := two.disk.Crash(0) // what a lying disk keeps
	st.isolate(3, true)
	if !st.put(3) {
		t.Fatal(st.err)
	}
	two.end(nil)
	two.disk = old
	two.boot(disk.Fault{}, nil)
	return st
}

// pass lets ticks pass; each is told when it is over.
func (st *stage) pass(ticks int, each func() (on bool)) {
	for end := st.ticks + ticks; st.ticks < end; {
		if st.pump() {
			continue
		}
		st.ticks++
		for _, a := range st.cast() {
			if a.l != nil {
				a.do(a.l.s.Tick)
			}
		}
		if !each() {
			return
		}
	}
}

// TestLackingElectsNobody: a replica that has heard that it lacks what it
// acknowledged neither leads nor votes, however early its leader is gone.
func TestLackingElectsNobody(t *testing.T) {
	for beats := 1; beats <= maxLacking; beats++ {
		t.Run(fmt.Sprint(beats), func(t *testing.T) {
			st := forgetful(t)
			two, three := st.actors[2], st.actors[3]
			if !st.until("beats", func() bool { return two.group().lacking >= beats }) {
				t.Fatal(st.err)
			}
			st.isolate(1, true)
			st.isolate(3, false)
			st.pass(12*electionTicks, func() bool {
				for _, a := range []*actor{two, three} {
					if a.l != nil && a.group().Status().Role == Leader {
						t.Errorf("%v leads without what was acknowledged", a.id)
						return false
					}
				}
				return true
			})
			st.isolate(1, false)
			if !st.put(1) || !st.equal() { // with the same leader it ends and comes back no more, with a new one it is filled again
				t.Fatal(st.err)
			}
		})
	}
}

// TestLackingIsFoundByTwo: the leader keeps its majority, and its term, until the
// damage is found, with nobody else there too.
func TestLackingIsFoundByTwo(t *testing.T) {
	st := forgetful(t)
	term := st.actors[1].group().Status().Term
	st.until("two ends", func() bool { return st.actors[2].l == nil || st.actors[1].group().Status().Term != term })
	if st.actors[2].l != nil {
		t.Errorf("it goes on: term %d, now %d", term, st.actors[1].group().Status().Term)
	}
}

// TestContradictionIsTold: where two of three have lost the same before they heard of
// it, the one that has it takes nothing from them, says so, and does not drown them.
func TestContradictionIsTold(t *testing.T) {
	st := forgetful(t)
	one, two, three := st.actors[1], st.actors[2], st.actors[3]
	st.isolate(1, true) // two has heard nothing
	st.isolate(3, false)
	if !st.until("one leads", func() bool {
		return two.group().Status().Role == Leader || three.group().Status().Role == Leader
	}) {
		t.Fatal(st.err)
	}
	commit := one.group().Status().Commit
	st.isolate(1, false)
	if !st.until("it is told", func() bool {
		return one.group().Status().Contradicts != 0 || two.group().Status().Contradicts == 1 || three.group().Status().Contradicts == 1
	}) {
		t.Fatal(st.err)
	}
	st.pass(4*electionTicks, func() bool { return true }) // it comes to rest between ticks
	s := one.group().Status()
	if s.Commit != commit || s.Role == Leader {
		t.Errorf("the first went on: %+v", s)
	}
	v, err := one.group().View()
	if err != nil {
		t.Fatal(err)
	}
	defer v.Close()
	have, _, _, err := history(v)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range st.acked {
		if !have[c] {
			t.Errorf("the first lacks %q", c)
		}
	}
}
