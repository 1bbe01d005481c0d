package quorum

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"github.com/unum-os/unum/internal/ids"
)

// parse reads members like "1 2- 3! 4w 5~ 6L": - silent, ! missed, w witness, ~
// not caught up, L leaving.
func parse(s string) []Member {
	var out []Member
	for _, f := range strings.Fields(s) {
		m := Member{Alive: true, CaughtUp: true}
		num := strings.TrimRight(f, "-!w~L")
		fmt.Sscan(num, &m.ID)
		for _, c := range f[len(num):] {
			switch c {
			case '-':
				m.Alive = false
			case '!':
				m.Alive, m.Missed = false, true
			case 'w':
				m.Witness = true
			case '~':
				m.CaughtUp = false
			case 'L':
				m.Leaving = true
			}
		}
		out = append(out, m)
	}
	return out
}

func list(n ...ids.Node) []ids.Node { return n }

func show(s Step) string {
	switch s.Kind {
	case AddLearner:
		return fmt.Sprint("learner ", s.Add)
	case Reseat:
		return fmt.Sprint("add ", s.Add, " demote ", s.Demote, " drop ", s.Drop)
	case Drop:
		return fmt.Sprint("drop ", s.Drop)
	case Transfer:
		return fmt.Sprint("transfer ", s.Add)
	}
	return strings.TrimSpace("nothing " + s.Why)
}

func TestNext(t *testing.T) {
	for _, c := range []struct {
		name             string
		voters, learners []ids.Node
		members          string
		want             string
	}{
		{"one", list(1), nil, "1", "nothing"},
		{"a second comes", list(1), nil, "1 2", "learner [n2]"},
		{"it has caught up", list(1), list(2), "1 2", "add [n2] demote [] drop []"},
		{"it has not", list(1), list(2), "1 2~", "nothing waiting for [n2] to catch up"},
		{"a third", list(1, 2), list(3), "1 2 3", "add [n3] demote [] drop []"},
		{"both at once", list(1), list(2, 3), "1 2 3", "add [n2 n3] demote [] drop []"},
		{"a fourth is spare", list(1, 2, 3), list(4), "1 2 3 4", "nothing"},
		{"never four", list(1, 2, 3), list(4, 5), "1 2 3 4 5~", "nothing waiting for [n5] to catch up"},
		{"five", list(1, 2, 3), list(4, 5), "1 2 3 4 5", "add [n4 n5] demote [] drop []"},
		{"two and a witness", list(1, 2), list(3), "1 2 3w", "add [n3] demote [] drop []"},
		{"one and a witness", list(1), list(3), "1 3w", "nothing"},
		{"the third takes the witness's seat", list(1, 2, 3), list(4), "1 2 3w 4", "add [n4] demote [n3] drop []"},
		{"the witness sits for a missed node", list(1, 2, 4), list(3), "1 2 3w 4!", "add [n3] demote [n4] drop []"},
		{"not at once", list(1, 2, 4), list(3), "1 2 3w 4-", "nothing"},
		{"a missed voter is replaced", list(1, 2, 3), list(4), "1 2 3! 4", "add [n4] demote [n3] drop []"},
		{"its seat waits for nobody who lags", list(1, 2, 3, 4, 5), list(6, 7), "1 2 3 4 5! 6~ 7", "add [n7] demote [n5] drop []"},
		{"by nobody", list(1, 2, 3), nil, "1 2 3!", "nothing"},
		{"it comes back", list(1, 2, 4), list(3), "1 2 3 4", "nothing"},
		{"one of three leaves", list(1, 2, 3), nil, "1 2 3L", "add [] demote [] drop [n3]"},
		{"one of three leaves, the fourth follows", list(1, 2, 3), list(4), "1 2 3L 4", "add [n4] demote [] drop [n3]"},
		{"and has not caught up", list(1, 2, 3), list(4), "1 2 3L 4~", "nothing waiting for [n4] to catch up"},
		{"one of two leaves", list(1, 2), nil, "1 2L", "add [] demote [] drop [n2]"},
		{"one of two and a witness leaves", list(1, 2, 3), nil, "1 2L 3w", "add [] demote [n3] drop [n2]"},
		{"the leader leaves", list(1, 2, 3), nil, "1L 2 3", "transfer [n2]"},
		{"the leader leaves, alone so far", list(1), list(2), "1L 2", "add [n2] demote [] drop []"},
		{"a leaving learner", list(1, 2, 3), list(4), "1 2 3 4L", "drop [n4]"},
		{"one that was put out", list(1, 2, 3), list(4), "1 2 3", "drop [n4]"},
		{"a voter that was put out", list(1, 2, 3), nil, "1 2", "add [] demote [] drop [n3]"},
		{"of five, one that was put out", list(1, 2, 3, 4, 5), nil, "1 2 3 4", "add [] demote [n4] drop [n5]"},
		{"not at the price of the majority", list(1, 2, 3), nil, "1 2- 3L", "nothing of [n1 n2] too few are alive"},
	} {
		g := Group{Leader: 1, Voters: c.voters, Learners: c.learners}
		if got := show(Next(g, parse(c.members))); got != c.want {
			t.Errorf("%s: %s, want %s", c.name, got, c.want)
		}
	}
	if s := Next(Group{Leader: 1, Voters: list(1, 2), Joint: true}, parse("1 2 3")); s.Kind != Nothing {
		t.Errorf("during a change: %v", show(s))
	}
	if got := Unreplaced(Group{Voters: list(1, 2, 3)}, parse("1 2 3!")); !slices.Equal(got, list(3)) {
		t.Errorf("unreplaced %v", got)
	}
	if got := Unreplaced(Group{Voters: list(1, 2, 3)}, parse("1 2 3! 4")); len(got) > 0 {
		t.Errorf("unreplaced %v", got)
	}
}

// apply does a step to a group.
func apply(g Group, s Step) Group {
	del := func(l []ids.Node, out ...ids.Node) []ids.Node {
		return slices.DeleteFunc(slices.Clone(l), func(n ids.Node) bool { return slices.Contains(out, n) })
	}
	switch s.Kind {
	case AddLearner:
		g.Learners = append(slices.Clone(g.Learners), s.Add...)
	case Reseat:
		g.Voters = append(del(del(g.Voters, s.Demote...), s.Drop...), s.Add...)
		g.Learners = append(del(del(g.Learners, s.Add...), s.Drop...), s.Demote...)
	case Drop:
		g.Learners = del(g.Learners, s.Drop...)
	case Transfer:
		g.Leader = s.Add[0]
	}
	return g
}

func live(l []ids.Node, ms []Member) int {
	n := 0
	for _, m := range ms {
		if m.Alive && slices.Contains(l, m.ID) {
			n++
		}
	}
	return n
}

// TestAnyHistory lets nodes come, die, return, leave and be put out in any
// order, and checks each step and where the steps lead.
func TestAnyHistory(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		ms := []Member{{ID: 1, Alive: true, CaughtUp: true}}
		g := Group{Leader: 1, Voters: list(1)}
		next := ids.Node(2)
		step := func() bool {
			s := Next(g, ms)
			shuffled := rapid.Permutation(ms).Draw(t, "order")
			if show(Next(g, shuffled)) != show(s) {
				t.Fatalf("%v depends on the order of the members", show(s))
			}
			if s.Kind == Nothing {
				return false
			}
			was := g
			g = apply(g, s)
			if len(g.Voters) == 0 || len(g.Voters) == 4 || len(g.Voters) > 5 {
				t.Fatalf("%v leads from %v to %v", show(s), was.Voters, g.Voters)
			}
			if live(was.Voters, ms)*2 > len(was.Voters) && live(g.Voters, ms)*2 <= len(g.Voters) {
				t.Fatalf("%v loses the majority: %v to %v of %+v", show(s), was.Voters, g.Voters, ms)
			}
			if !slices.Contains(g.Voters, g.Leader) {
				t.Fatalf("%v takes the leader's seat: %v", show(s), g)
			}
			for _, n := range s.Add {
				if s.Kind == Reseat && !slices.Contains(was.Learners, n) {
					t.Fatalf("%v seats one that is no learner", show(s))
				}
			}
			return true
		}
		settle := func() {
			for i := 0; step(); i++ {
				if i > 50 {
					t.Fatalf("no end: %+v of %+v", g, ms)
				}
			}
		}
		elect := func() { // raft's part
			for _, m := range ms {
				if m.ID == g.Leader && m.Alive {
					return
				}
			}
			for _, m := range ms {
				if m.Alive && !m.Witness && slices.Contains(g.Voters, m.ID) {
					g.Leader = m.ID
					return
				}
			}
		}
		for range rapid.IntRange(1, 25).Draw(t, "events") {
			i := rapid.IntRange(0, len(ms)-1).Draw(t, "who")
			m := &ms[i]
			switch rapid.IntRange(0, 6).Draw(t, "event") {
			case 0, 1:
				witness := false
				for _, m := range ms {
					witness = witness || m.Witness
				}
				ms = append(ms, Member{ID: next, Alive: true, CaughtUp: rapid.Bool().Draw(t, "caught up"), Witness: !witness && rapid.Bool().Draw(t, "witness")})
				next++
			case 2:
				if m.Alive && slices.Contains(g.Voters, m.ID) && (live(g.Voters, ms)-1)*2 <= len(g.Voters) {
					continue // the majority would be gone: nothing is done then
				}
				m.Alive = false
			case 3:
				m.Missed = !m.Alive
			case 4:
				m.Alive, m.Missed, m.CaughtUp = true, false, true
			case 5, 6:
				storing := 0
				for _, x := range ms {
					if x.ID != m.ID && !x.Witness && !x.Leaving {
						storing++
					}
				}
				if storing > 0 {
					m.Leaving = true
				}
			}
			elect()
			if rapid.Bool().Draw(t, "settle") {
				settle()
			} else {
				step()
			}
		}
		// In the end all are well: everybody has the seat that is due.
		for i := range ms {
			ms[i].Alive, ms[i].Missed, ms[i].CaughtUp = true, false, true
		}
		elect()
		settle()
		storing, witness := 0, false
		for _, m := range ms {
			if !m.Leaving {
				witness = witness || m.Witness
				if !m.Witness {
					storing++
				}
			}
			if m.Leaving && (slices.Contains(g.Voters, m.ID) || slices.Contains(g.Learners, m.ID)) {
				t.Fatalf("%v has not left: %+v", m.ID, g)
			}
			if m.Witness && storing > 2 && slices.Contains(g.Voters, m.ID) {
				t.Fatalf("the witness keeps a seat: %+v", g)
			}
		}
		if want := Seats(storing, witness); len(g.Voters) != want {
			t.Fatalf("%d seats, want %d: %+v of %+v: %s", len(g.Voters), want, g, ms, Next(g, ms).Why)
		}
	})
}
