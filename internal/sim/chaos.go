package sim

import (
	"slices"
	"time"

	"github.com/unum-os/unum/internal/group"
	"github.com/unum-os/unum/internal/ids"
	"github.com/unum-os/unum/internal/quorum"
)

// act is something that goes wrong, or is asked for, now and then.
type act struct {
	name   string
	weight int
	do     func(w *world)
}

var acts = []act{
	{"crash", 12, func(w *world) { w.strike(w.anyNode()) }},
	{"crash leader", 8, func(w *world) { w.strike(w.leader(w.anyGroup())) }},
	{"power loss of all", 1, (*world).blackout},
	{"isolate", 6, func(w *world) { w.isolate(w.anyNode(), true, true) }},
	{"isolate leader", 6, func(w *world) { w.isolate(w.leader(w.anyGroup()), true, true) }},
	{"deafen", 4, func(w *world) { w.isolate(w.leaderOrAny(), true, false) }},
	{"mute", 4, func(w *world) { w.isolate(w.leaderOrAny(), false, true) }},
	{"cut one link", 4, func(w *world) { w.cutLink(w.anyNode(), w.anyNode()) }},
	{"split", 4, (*world).split},
	{"storm", 5, (*world).storm},
	{"pause", 5, func(w *world) { w.pause(w.leaderOrAny()) }},
	{"slow", 4, func(w *world) { w.slow(w.anyNode()) }},
	{"skew", 4, func(w *world) { w.skew(w.anyNode()) }},
	{"transfer", 6, (*world).transfer},
	{"rivals", 8, (*world).rivals},
	{"membership", 12, (*world).reconfigure},
}

// chaos does one act after the other until the world is to be quiet. Each seed
// likes some acts more than others.
func (w *world) chaos() {
	weights, sum := make([]int, len(acts)), 0
	for i, a := range acts {
		weights[i] = a.weight * w.rng.IntN(4)
		sum += weights[i]
	}
	pace := time.Duration(200+w.rng.IntN(1200)) * time.Millisecond
	var next func()
	next = func() {
		if w.quiet {
			return
		}
		if sum > 0 {
			x, i := w.rng.IntN(sum), 0
			for ; x >= weights[i]; i++ {
				x -= weights[i]
			}
			w.tracef("chaos: %s", acts[i].name)
			acts[i].do(w)
		}
		w.at(time.Duration(float64(pace)*w.rng.ExpFloat64()), next)
	}
	w.at(pace, next)
}

func (w *world) anyNode() *node { return w.nodes[w.rng.IntN(len(w.nodes))] }

func (w *world) anyGroup() ids.Group { return groups[w.rng.IntN(len(groups))] }

// leader returns who leads g in the latest term, or nil.
func (w *world) leader(g ids.Group) (lead *node) {
	var best uint64
	for _, n := range w.nodes {
		if n.up && n.group(g).IsLeader() {
			if _, term := n.group(g).Leader(); term >= best {
				lead, best = n, term
			}
		}
	}
	return lead
}

func (w *world) leaderOrAny() *node {
	if n := w.leader(w.anyGroup()); n != nil && w.rng.IntN(2) == 0 {
		return n
	}
	return w.anyNode()
}

// a while is usually short, at times long.
func (w *world) while() time.Duration {
	if w.rng.IntN(4) == 0 {
		return time.Duration(w.rng.Int64N(int64(6 * time.Second)))
	}
	return time.Duration(w.rng.Int64N(int64(time.Second)))
}

// strike takes the power from n: now, at one of its next messages, or at one of
// the next syncs of its log; and gives it back after a while.
func (w *world) strike(n *node) {
	if n == nil || !n.up {
		return
	}
	back := w.while()
	if w.rng.IntN(2) == 0 { // so soon that others do not notice
		back = time.Duration(w.rng.Int64N(int64(20 * time.Millisecond)))
	}
	n.back = back
	if w.rng.IntN(3) == 0 {
		n.crash()
		return
	}
	w.arm(n, 20, 20)
}

// arm takes the power from n at one of its next messages or syncs.
func (w *world) arm(n *node, sends, syncs int) {
	if w.rng.IntN(2) == 0 {
		n.armedSend = 1 + w.rng.IntN(sends)
	} else {
		n.disk.armed.Store(1 + w.rng.Int64N(int64(syncs)))
	}
}

// maxAmbushes bounds the ambushes of voters in a run: who is struck at each vote never
// gets to do anything else.
const maxAmbushes = 10

// ambush strikes where it hurts, when n is about to vote: at one of so many next
// messages or syncs. It is back before others notice.
func (w *world) ambush(n *node, sends, syncs int) {
	if w.quiet || !n.courted && (w.ambushes == 0 || w.rng.IntN(w.ambushes) > 0) {
		return
	}
	n.courted = false
	w.stats.Ambushes++
	if w.votes++; w.votes == maxAmbushes {
		w.ambushes = 0
	}
	n.back = time.Duration(w.rng.Int64N(int64(10 * time.Millisecond)))
	w.arm(n, sends, syncs)
}

func (w *world) blackout() {
	w.stats.Blackouts++
	for _, n := range w.nodes {
		n.back = w.while()
		n.crash()
	}
}

// cutLink cuts one direction for a while.
func (w *world) cutLink(from, to *node) {
	if from == to {
		return
	}
	k := [2]ids.Node{from.id, to.id}
	w.net.cut[k]++
	w.stats.Cuts++
	w.at(w.while(), func() { w.net.cut[k]-- })
}

func (w *world) isolate(n *node, in, out bool) {
	if n == nil {
		return
	}
	d := w.while()
	w.partition(d, func(a, b *node) bool { return in && b == n || out && a == n })
	if in != out {
		w.stats.OneWay++
	}
}

func (w *world) split() {
	side := map[ids.Node]bool{}
	for _, n := range w.nodes {
		side[n.id] = w.rng.IntN(2) == 0
	}
	w.partition(w.while(), func(a, b *node) bool { return side[a.id] != side[b.id] })
}

func (w *world) partition(d time.Duration, between func(a, b *node) bool) {
	w.stats.Partitions++
	for _, a := range w.nodes {
		for _, b := range w.nodes {
			if a != b && between(a, b) {
				k := [2]ids.Node{a.id, b.id}
				w.net.cut[k]++
				w.at(d, func() { w.net.cut[k]-- })
			}
		}
	}
}

// storm makes the network bad for a while.
func (w *world) storm() {
	if w.stormy {
		return
	}
	w.stormy = true
	w.stats.Storms++
	was := *w.net
	w.net.loss, w.net.dup, w.net.late = 0.4*w.rng.Float64(), 0.3*w.rng.Float64(), 0.1*w.rng.Float64()
	w.net.delay = time.Duration(1+w.rng.IntN(100)) * time.Millisecond
	w.at(w.while(), func() {
		w.stormy = false
		w.net.loss, w.net.dup, w.net.late, w.net.delay = was.loss, was.dup, was.late, was.delay
	})
}

func (w *world) pause(n *node) {
	if n.up {
		w.stats.Pauses++
		n.pausedUntil = w.now.Add(w.while())
	}
}

func (w *world) slow(n *node) {
	w.stats.Slow++
	n.slow = 1 + 200*w.rng.Float64()
	life := n.life
	w.at(w.while(), func() {
		if n.life == life {
			n.slow = 1
		}
	})
}

func (w *world) skew(n *node) {
	w.stats.Skews++
	n.rate = 0.4 + 2*w.rng.Float64()
	w.at(w.while(), func() { n.rate = 1 })
}

func (w *world) transfer() {
	g := w.anyGroup()
	if n := w.leader(g); n != nil && !n.pausedUntil.After(w.now) {
		st := n.group(g).Status()
		w.stats.Transfers++
		n.st.Transfer(n.group(g), st.Voters[w.rng.IntN(len(st.Voters))])
		n.plan()
	}
}

// rivals lets two voters seek the same term at once, one of them late, and neither
// of the other: who votes for the first is struck, and is then asked by the second.
func (w *world) rivals() {
	g := w.anyGroup()
	n := w.leader(g)
	if n == nil || n.pausedUntil.After(w.now) {
		return
	}
	list := slices.DeleteFunc(slices.Clone(n.group(g).Status().Voters), func(id ids.Node) bool { return id == n.id || !w.node(id).up })
	if len(list) < 2 {
		return
	}
	w.rng.Shuffle(len(list), func(i, j int) { list[i], list[j] = list[j], list[i] })
	a, b := w.node(list[0]), w.node(list[1])
	w.stats.Rivals++
	w.partition(time.Second, func(x, y *node) bool { return x == a && y == b || x == b && y == a })
	w.slow(b)
	for _, x := range w.nodes {
		x.courted = x != a && x != b
	}
	n.st.Transfer(n.group(g), a.id) // raft tells both, if both have all entries
	n.st.Transfer(n.group(g), b.id)
	n.plan()
}

// reconfigure asks the leader of a group for some change of its replicas. What
// becomes of it is not awaited.
func (w *world) reconfigure() {
	if w.stewarded {
		w.comeOrGo()
		return
	}
	g := w.anyGroup()
	n := w.leader(g)
	if n == nil || n.pausedUntil.After(w.now) {
		return
	}
	gr := n.group(g)
	st := gr.Status()
	var outside []ids.Node
	for _, x := range w.nodes {
		if !x.gone && !slices.Contains(st.Voters, x.id) && !slices.Contains(st.Learners, x.id) {
			outside = append(outside, x.id)
		}
	}
	pick := func(list []ids.Node) ids.Node { return list[w.rng.IntN(len(list))] }
	switch x := w.rng.IntN(8); {
	case x < 3 && len(outside) > 0:
		n.st.AddLearner(gr, pick(outside))
	case x < 5 && len(st.Learners) > 0:
		n.st.Reseat(gr, []ids.Node{pick(st.Learners)}, nil, nil)
	case x == 5 && len(st.Learners) > 1:
		n.st.Reseat(gr, st.Learners, nil, nil)
	case x == 5 && len(st.Learners) > 0 && len(st.Voters) > 1:
		n.st.Reseat(gr, []ids.Node{pick(st.Learners)}, []ids.Node{pick(st.Voters)}, nil)
	case x == 6 && len(st.Learners) > 0 && len(st.Voters) > 1:
		n.st.Reseat(gr, []ids.Node{pick(st.Learners)}, nil, []ids.Node{pick(st.Voters)})
	case x == 7 && len(st.Learners) > 0 && w.rng.IntN(3) == 0:
		n.st.Remove(gr, pick(st.Learners))
	case len(st.Voters) > 2 || len(st.Voters) == 2 && w.rng.IntN(2) == 0:
		n.st.Remove(gr, pick(st.Voters))
	default:
		return
	}
	n.plan()
}

// steward changes the replicas of each group by the rules of package quorum, as
// the leader's node sees the others: often right.
func (w *world) steward() {
	if w.quiet {
		return
	}
	for _, g := range groups {
		if n := w.leader(g); n != nil && !n.pausedUntil.After(w.now) {
			w.govern(n, n.group(g))
		}
	}
	w.at(time.Duration(100+w.rng.IntN(400))*time.Millisecond, w.steward)
}

// grace is how long a member may be silent before its seat is given away.
const grace = time.Second

func (w *world) govern(n *node, g *group.Group) {
	st := g.Status()
	var members []quorum.Member
	for _, x := range w.nodes {
		alive := x.up && !x.pausedUntil.After(w.now) && !w.net.isCut(x.id, n.id) && !w.net.isCut(n.id, x.id)
		if alive = alive || w.rng.IntN(50) == 0; alive {
			x.seen = w.now
		}
		if x.member {
			members = append(members, quorum.Member{ID: x.id, Witness: x.witness, Leaving: x.leaving, Alive: alive,
				Missed: !alive && w.now.Sub(x.seen) > grace, CaughtUp: st.Progress[x.id].CaughtUp})
		}
	}
	step := quorum.Next(quorum.Group{Leader: n.id, Voters: st.Voters, Learners: st.Learners, Joint: st.Joint}, members)
	if step.Kind == quorum.Nothing {
		return
	}
	w.tracef("steward of group %d on %v: %+v", g.ID(), n.id, step)
	w.stats.Stewarded++
	switch step.Kind {
	case quorum.AddLearner:
		n.st.AddLearner(g, step.Add[0])
	case quorum.Reseat, quorum.Drop:
		n.st.Reseat(g, step.Add, step.Demote, step.Drop)
	case quorum.Transfer:
		n.st.Transfer(g, step.Add[0])
	}
	n.plan()
}

// depart lets machines stop for ever as soon as leaders say that they were taken
// out of their groups. It happens on the spot, and who said so may lose power at
// once, or stay away: the others must have known.
func (w *world) depart(lead *node, st group.Status) {
	if w.quiet || st.Joint || w.rng.IntN(4) == 0 {
		return
	}
	for _, n := range w.nodes {
		if n == lead || n.gone || !n.had[st.Group] || w.rng.IntN(4) == 0 || slices.Contains(members(st), n.id) || w.hasReplicaBut(n, st.Group) {
			continue
		}
		w.tracef("%v goes for good", n.id)
		w.stats.Gone++
		n.gone, n.member = true, false
		w.at(0, func() {
			n.crash()
			if w.rng.IntN(4) > 0 { // what it has just sent is lost
				w.partition(200*time.Millisecond, func(a, _ *node) bool { return a == lead })
			}
			switch x := w.rng.IntN(6); {
			case x < 4 && w.late == nil: // for the rest of the faults
				lead.back = time.Hour
				lead.crash()
				w.late = lead
			case x < 5:
				lead.back = w.while()
				lead.crash()
			}
		})
	}
}

// hasReplicaBut tells whether n may belong to a group other than g.
func (w *world) hasReplicaBut(n *node, g ids.Group) bool {
	for _, o := range groups {
		if o == g || !n.had[o] {
			continue
		}
		lead := w.leader(o)
		if lead == nil {
			return true
		}
		if st := lead.group(o).Status(); st.Joint || slices.Contains(members(st), n.id) {
			return true
		}
	}
	return false
}

// comeOrGo makes a machine a member, lets one leave, or ends its leaving.
func (w *world) comeOrGo() {
	n, staying := w.anyNode(), 0
	if n.gone {
		return
	}
	for _, x := range w.nodes {
		if x.member && !x.leaving && !x.witness {
			staying++
		}
	}
	switch {
	case !n.member:
		n.member = true
	case !n.leaving && (staying > 1 || n.witness):
		n.leaving = true
	case n.leaving && w.rng.IntN(2) == 0:
		n.leaving = false // it stays after all
	case n.leaving && !w.hasReplica(n):
		n.member, n.leaving = false, false
	}
}

func (w *world) hasReplica(n *node) bool {
	for _, g := range groups {
		lead := w.leader(g)
		if lead == nil || slices.Contains(members(lead.group(g).Status()), n.id) {
			return true
		}
	}
	return false
}
