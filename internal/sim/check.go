package sim

import (
	"bytes"
	"fmt"
	"hash/crc64"
	"math"
	"slices"
	"time"

	"github.com/anishathalye/porcupine"
	"github.com/cockroachdb/pebble/v2"
	pb "go.etcd.io/raft/v3/raftpb"

	"github.com/unum-os/unum/internal/group"
	"github.com/unum-os/unum/internal/ids"
)

// checker watches all nodes for what raft promises:
//   - one leader a term
//   - log matching: an entry of an index and a term is the same everywhere, and
//     so is what comes before it
//   - leader completeness: a leader has all that was committed in earlier terms
//   - state machine safety: what is applied at an index is the same everywhere
type checker struct {
	w       *world
	leaders map[termKey]ids.Node
	entries map[entryKey]entry
	commits map[ids.Group][]commit // by index
	applies map[indexKey]uint64
}

type termKey struct {
	g    ids.Group
	term uint64
}

type indexKey struct {
	g     ids.Group
	index uint64
}

type entryKey struct {
	g           ids.Group
	index, term uint64
}

type entry struct{ digest, before uint64 } // before: the term of the entry before it

type commit struct{ term, digest, seen uint64 } // seen: the term in which it was first known

func newChecker(w *world) *checker {
	return &checker{w: w, leaders: map[termKey]ids.Node{}, entries: map[entryKey]entry{},
		commits: map[ids.Group][]commit{}, applies: map[indexKey]uint64{}}
}

func digest(e *pb.Entry) uint64 {
	return crc64.Update(uint64(e.GetType()), crcTable, e.Data)
}

func (c *checker) wrote(n *node, g ids.Group, ents []*pb.Entry) {
	if len(ents) == 0 || n.dying() {
		return
	}
	before, known := n.st.LogTerm(n.group(g), ents[0].GetIndex()-1)
	for _, e := range ents {
		k, is := entryKey{g, e.GetIndex(), e.GetTerm()}, entry{digest(e), before}
		was, ok := c.entries[k]
		if !known {
			is.before = was.before
		}
		switch {
		case !ok && known:
			c.entries[k] = is
		case ok && was != is:
			c.w.violated("logs differ: entry %d of term %d of group %d on %v is %x after term %d, elsewhere %x after term %d",
				k.index, k.term, g, n.id, is.digest, is.before, was.digest, was.before)
		}
		before, known = e.GetTerm(), true
	}
}

func (c *checker) committed(n *node, g ids.Group, term uint64, ents []*pb.Entry) {
	if n.dying() {
		return
	}
	for _, e := range ents {
		list, i := c.commits[g], int(e.GetIndex())
		for len(list) <= i {
			list = append(list, commit{})
		}
		is := commit{e.GetTerm(), digest(e), term}
		switch was := list[i]; {
		case was == commit{}:
			list[i] = is
			if e.GetType() == pb.EntryConfChangeV2 {
				c.w.stats.Changes++
			}
		case was.term != is.term || was.digest != is.digest:
			c.w.violated("%v holds entry %d of group %d of term %d as committed, which elsewhere is another, of term %d", n.id, i, g, is.term, was.term)
		}
		c.commits[g] = list
	}
}

func (c *checker) applied(n *node, g ids.Group, index uint64, cmd []byte) {
	if n.dying() {
		return
	}
	d := crc64.Checksum(cmd, crcTable)
	if was, ok := c.applies[indexKey{g, index}]; ok && was != d {
		c.w.violated("%v applies another command at entry %d of group %d than others did", n.id, index, g)
	}
	c.applies[indexKey{g, index}] = d
}

func (c *checker) status(n *node, g *group.Group, st group.Status) {
	if n.dying() {
		return
	}
	c.w.tracef("%v is %v of group %d in term %d, voters %v, learners %v", n.id, st.Role, g.ID(), st.Term, st.Voters, st.Learners)
	if st.Term != n.terms[g.ID()] {
		n.terms[g.ID()] = st.Term
		c.w.ambush(n, 2, 2)
	}
	if n.st != nil {
		c.w.learn(n, g, st)
	}
	if st.Role != group.Leader {
		return
	}
	for _, id := range members(st) {
		c.w.node(id).had[st.Group] = true
	}
	if !slices.Contains(st.Voters, n.id) {
		c.w.stats.OutLed++
	}
	c.w.depart(n, st)
	k := termKey{g.ID(), st.Term}
	other, ok := c.leaders[k]
	if ok && other != n.id {
		c.w.violated("two leaders of group %d in term %d: %v and %v", g.ID(), st.Term, other, n.id)
	}
	if ok || n.st == nil {
		return
	}
	c.leaders[k] = n.id
	c.w.stats.Leaders++
	if n.witness {
		c.w.stats.WitnessLed++
	}
	trunc, _ := n.st.LogBounds(g)
	for i, e := range c.commits[g.ID()] {
		if uint64(i) <= trunc || e.term == 0 || e.seen >= st.Term {
			continue
		}
		if t, ok := n.st.LogTerm(g, uint64(i)); !ok || t != e.term {
			c.w.violated("%v leads group %d in term %d without entry %d, which was committed by term %d (its own is of term %d)", n.id, g.ID(), st.Term, i, e.seen, t)
			return
		}
	}
}

// dump is all of a group's state.
func dump(g *group.Group) ([]byte, error) {
	v, err := g.View()
	if err != nil {
		return nil, err
	}
	defer v.Close()
	lo, hi := v.Space.Bounds()
	it, err := v.NewIter(&pebble.IterOptions{LowerBound: lo, UpperBound: hi})
	if err != nil {
		return nil, err
	}
	defer it.Close()
	var b bytes.Buffer
	for it.First(); it.Valid(); it.Next() {
		fmt.Fprintf(&b, "%x=%x\n", it.Key(), it.Value())
	}
	return b.Bytes(), it.Error()
}

// equal compares the replicas of the members, which have all applied the same.
func (c *checker) equal(g ids.Group, members []*node) {
	var first []byte
	for _, n := range members {
		b, err := dump(n.group(g))
		switch {
		case err != nil:
			c.w.violated("reading the state of group %d on %v: %v", g, n.id, err)
		case first == nil:
			first = b
			c.w.tracef("group %d has %d bytes %016x", g, len(b), crc64.Checksum(b, crcTable))
		case !bytes.Equal(first, b):
			c.w.violated("group %d differs on %v and %v:\n%s", g, members[0].id, n.id, diff(first, b))
		}
	}
}

func diff(a, b []byte) string {
	x, y := bytes.Split(a, []byte("\n")), bytes.Split(b, []byte("\n"))
	for i := range x {
		if i >= len(y) || !bytes.Equal(x[i], y[i]) {
			other := []byte("nothing")
			if i < len(y) {
				other = y[i]
			}
			return fmt.Sprintf("%s\n%s", x[i], other)
		}
	}
	return fmt.Sprintf("%d lines, %d lines", len(x), len(y))
}

// outcome is what an operation returned.
type outcome struct {
	value uint64
	known bool
}

// model is one register.
var model = porcupine.Model{
	Init: func() any { return uint64(0) },
	Step: func(state, input, output any) (bool, any) {
		old, in, out := state.(uint64), input.(command), output.(outcome)
		switch in.kind {
		case opRead:
			return !out.known || out.value == old, old
		case opWrite:
			return true, in.a
		case opAdd:
			return !out.known || out.value == old, old + in.a
		}
		if old != in.a {
			return !out.known || out.value == 0, old
		}
		return !out.known || out.value == 1, in.b
	},
	DescribeOperation: func(input, output any) string {
		in, out := input.(command), output.(outcome)
		return fmt.Sprintf("%d(%d, %d) -> %d, %v", in.kind, in.a, in.b, out.value, out.known)
	},
}

// linearizable judges the history, key by key.
func (c *checker) linearizable(history []porcupine.Operation) {
	keys := map[uint64][]porcupine.Operation{}
	var order []uint64
	for _, op := range history {
		k := op.Input.(command).key
		if keys[k] == nil {
			order = append(order, k)
		}
		keys[k] = append(keys[k], op)
	}
	for _, k := range order {
		switch porcupine.CheckOperationsTimeout(model, keys[k], 20*time.Second) {
		case porcupine.Illegal:
			c.w.violated("the history of key %d, %d operations, is not linearizable", k, len(keys[k]))
		case porcupine.Unknown:
			c.w.stats.Unjudged++
		}
	}
}

const forever = math.MaxInt64
