package quorum

import (
	"fmt"
	"slices"

	"github.com/unum-os/unum/internal/ids"
)

// Member is what the rules need to know of a member of the cluster.
type Member struct {
	ID      ids.Node
	Witness bool // votes and keeps the log, stores nothing; else it stores
	Leaving bool // its seat is to be taken over
	Alive   bool
	Missed  bool // silent for longer than the grace; never with Alive
	// CaughtUp says of a member with a replica that it lacks little of the log.
	CaughtUp bool
}

// Group is the configuration of a group, as its leader knows it.
type Group struct {
	Leader   ids.Node
	Voters   []ids.Node
	Learners []ids.Node
	Joint    bool // a change is under way
}

// Kind says what a step does.
type Kind uint8

// The kinds of steps.
const (
	Nothing    Kind = iota // all is as it should be, or nothing can be done: see Why
	AddLearner             // Add, one member, gets a replica without a seat
	Reseat                 // Add get seats; Demote lose theirs and stay learners; Drop lose theirs and their replica
	Drop                   // Drop, learners, lose their replica
	Transfer               // the leadership goes to Add, one voter
)

// Step is one change of a group's configuration.
type Step struct {
	Kind   Kind
	Add    []ids.Node
	Demote []ids.Node
	Drop   []ids.Node
	Why    string // what is waited for, when Kind is Nothing and something is not as it should be
}

// Seats returns how many votes a group should have with so many storing members
// that stay, and a witness or none.
func Seats(storing int, witness bool) int {
	switch {
	case storing >= 5:
		return 5
	case storing >= 3:
		return 3
	case storing == 2 && witness:
		return 3
	}
	return storing
}

// Next returns the next step for a group whose leader knows these members, all
// that belong to the cluster and store or witness.
func Next(g Group, members []Member) Step {
	if g.Joint {
		return Step{Why: "a change of the voters is under way"}
	}
	ms := slices.Clone(members)
	slices.SortFunc(ms, func(a, b Member) int { return int(a.ID) - int(b.ID) })
	p := plan{g: g, by: map[ids.Node]Member{}}
	for _, m := range ms {
		p.by[m.ID] = m
		if !m.Leaving {
			p.stay = append(p.stay, m)
		}
	}
	for _, m := range p.stay { // everybody who stays has a replica
		if m.Alive && !p.voter(m.ID) && !slices.Contains(g.Learners, m.ID) {
			return Step{Kind: AddLearner, Add: []ids.Node{m.ID}}
		}
	}
	if s := p.reseat(); s.Kind != Nothing || s.Why != "" {
		return s
	}
	for _, n := range sorted(g.Learners) {
		if m, is := p.by[n]; !is || m.Leaving {
			return Step{Kind: Drop, Drop: []ids.Node{n}}
		}
	}
	return Step{}
}

// Unreplaced returns the voters that are missed and whose seats nobody can take.
func Unreplaced(g Group, members []Member) []ids.Node {
	var out []ids.Node
	spare := false
	for _, m := range members {
		spare = spare || m.Alive && !m.Leaving && !slices.Contains(g.Voters, m.ID)
	}
	for _, m := range members {
		if m.Missed && !spare && slices.Contains(g.Voters, m.ID) {
			out = append(out, m.ID)
		}
	}
	return sorted(out)
}

type plan struct {
	g    Group
	by   map[ids.Node]Member
	stay []Member // that do not leave, by id
}

func (p *plan) voter(n ids.Node) bool { return slices.Contains(p.g.Voters, n) }

// alive counts those of the list that are.
func (p *plan) alive(list []ids.Node) int {
	n := 0
	for _, x := range list {
		if p.by[x].Alive {
			n++
		}
	}
	return n
}

// target returns who should vote, whether or not it can already: the members
// with the best claim first.
func (p *plan) target() []ids.Node {
	storing, witness := 0, false
	for _, m := range p.stay {
		if m.Witness {
			witness = true
		} else {
			storing++
		}
	}
	seats := Seats(storing, witness)
	var out []ids.Node
	take := func(ok func(Member) bool) {
		for _, m := range p.stay {
			if len(out) < seats && ok(m) && !slices.Contains(out, m.ID) {
				out = append(out, m.ID)
			}
		}
	}
	take(func(m Member) bool { return !m.Witness && m.Alive && p.voter(m.ID) })
	take(func(m Member) bool { return !m.Witness && !m.Missed && p.voter(m.ID) })
	take(func(m Member) bool { return !m.Witness && m.Alive && m.CaughtUp }) // a dead voter's seat waits for nobody who lags
	take(func(m Member) bool { return !m.Witness && m.Alive })
	take(func(m Member) bool { return m.Witness && (m.Alive || !m.Missed && p.voter(m.ID)) })
	take(func(m Member) bool { return !m.Witness && p.voter(m.ID) }) // missed, and nobody for the seat
	take(func(m Member) bool { return m.Witness && p.voter(m.ID) })
	return out
}

// reseat returns the step that brings the voters nearer to the target.
func (p *plan) reseat() Step {
	want := p.target()
	var next, add, waiting []ids.Node
	for _, n := range want {
		switch m := p.by[n]; {
		case p.voter(n):
			next = append(next, n)
		case m.Alive && m.CaughtUp && slices.Contains(p.g.Learners, n):
			next, add = append(next, n), append(add, n)
		default:
			waiting = append(waiting, n)
		}
	}
	// Those who should give up their seats keep them until there is somebody for
	// each: the live ones first, those who were put out not at all.
	var old []ids.Node
	for _, n := range sorted(p.g.Voters) {
		if !slices.Contains(want, n) {
			old = append(old, n)
		}
	}
	for _, alive := range []bool{true, false} {
		for _, n := range old {
			if m, is := p.by[n]; is && m.Alive == alive && len(next) < len(want) {
				next = append(next, n)
			}
		}
	}
	if len(next) == 4 { // bears no more deaths than three
		if len(add) == 0 {
			return Step{Why: "four voters are left, and nobody to make them five or three"}
		}
		last := add[len(add)-1]
		add = add[:len(add)-1]
		next = slices.DeleteFunc(next, func(n ids.Node) bool { return n == last })
	}
	if len(next) > 0 && !slices.Contains(next, p.g.Leader) {
		for _, n := range next {
			if m := p.by[n]; p.voter(n) && m.Alive && !m.Witness {
				return Step{Kind: Transfer, Add: []ids.Node{n}}
			}
		}
		if len(add) == 0 {
			return Step{Why: fmt.Sprintf("nobody can take the leadership from %v", p.g.Leader)}
		}
		// The leader stays until one of the new can follow it: in the place of a
		// witness or a dead voter, so that there is no even number.
		if len(next) >= 3 {
			i := slices.IndexFunc(next, func(n ids.Node) bool { return !slices.Contains(add, n) })
			if i < 0 {
				i, add = len(next)-1, add[:len(add)-1]
			}
			next = slices.Delete(next, i, i+1)
		}
		next = append(next, p.g.Leader)
	}
	s := Step{Add: sorted(add)}
	for _, n := range sorted(p.g.Voters) {
		if slices.Contains(next, n) {
			continue
		}
		if m, is := p.by[n]; is && !m.Leaving {
			s.Demote = append(s.Demote, n)
		} else {
			s.Drop = append(s.Drop, n)
		}
	}
	switch {
	case len(s.Add)+len(s.Demote)+len(s.Drop) > 0:
		if p.alive(next)*2 <= len(next) && p.alive(p.g.Voters)*2 > len(p.g.Voters) {
			return Step{Why: fmt.Sprint("of ", sorted(next), " too few are alive")}
		}
		s.Kind = Reseat
	case len(waiting) > 0:
		s.Why = fmt.Sprint("waiting for ", waiting, " to catch up")
	}
	return s
}

func sorted(list []ids.Node) []ids.Node {
	out := slices.Clone(list)
	slices.Sort(out)
	return out
}
