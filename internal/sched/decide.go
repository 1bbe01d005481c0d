package sched

import (
	"cmp"
	"fmt"
	"math"
	"math/bits"
	"slices"

	"github.com/unum-os/unum/internal/ids"
)

// Decide chooses a node. An unknown policy is taken as EPVM.
func Decide(in Inputs) Decision {
	in = sane(in)
	loads, refused := looked(in)
	var prices []Price
	switch in.Policy {
	case RoundRobin:
		prices = turns(in, loads)
	default:
		for _, l := range loads {
			prices = append(prices, price(in, l))
		}
	}
	rank := func(a, b Price) int {
		return cmp.Or(cmp.Compare(a.Total, b.Total), nearer(in, a.Node, b.Node))
	}
	slices.SortFunc(prices, rank)

	d := Decision{Policy: in.Policy, Seed: in.Seed}
	if i := pick(in, prices); i >= 0 {
		d.Chosen = prices[i].Node
		rest := slices.Delete(slices.Clone(prices), i, i+1)
		if j := pick(in, rest); j >= 0 {
			d.RunnerUp = rest[j].Node
		}
	}
	d.Candidates = append(prices, refused...)
	seen := make(map[ids.Node]bool, len(d.Candidates))
	for _, p := range d.Candidates {
		seen[p.Node] = true
	}
	in.Loads = slices.DeleteFunc(in.Loads, func(l Load) bool { return !seen[l.Node] })
	d.Inputs = in
	return d
}

// sane returns in with its slices copied, ordered and without doubles, nonsense
// taken out, and the defaults filled in.
func sane(in Inputs) Inputs {
	if !slices.Contains(Policies(), in.Policy) {
		in.Policy = EPVM
	}
	in.Exclude = slices.Clone(in.Exclude)
	slices.Sort(in.Exclude)
	in.Exclude = slices.Compact(in.Exclude)
	in.Demand.CPUs = amount(in.Demand.CPUs)
	in.Loads = slices.Clone(in.Loads)
	for i := range in.Loads {
		l := &in.Loads[i]
		l.CPUs, l.Speed = amount(l.CPUs), amount(l.Speed)
		l.Runnable, l.Used, l.PendingJobs = amount(l.Runnable), min(amount(l.Used), 1), amount(l.PendingJobs)
		l.MemStall = min(amount(l.MemStall), 1)
		l.Age = max(l.Age, 0)
	}
	// Of two samples of one node the younger counts.
	slices.SortStableFunc(in.Loads, func(a, b Load) int {
		return cmp.Or(cmp.Compare(a.Node, b.Node), cmp.Compare(a.Age, b.Age))
	})
	in.Loads = slices.CompactFunc(in.Loads, func(a, b Load) bool { return a.Node == b.Node })
	in.Loads = slices.DeleteFunc(in.Loads, func(l Load) bool { return l.Node == 0 })
	in.Nodes = min(max(in.Nodes, len(in.Loads)), maxNodes)
	if in.Limit = amount(in.Limit); in.Limit == 0 {
		var l Limit
		for _, x := range in.Loads {
			l.Observe(x.PerCPU(), 0)
		}
		in.Limit = l.Value()
	}
	in.Limit = max(in.Limit, 1)
	return in
}

// amount returns x if it makes sense as one, or 0.
func amount(x float64) float64 {
	if x > 0 && x < 1e12 { // false for NaN
		return x
	}
	return 0
}

// looked returns the loads to be priced and the nodes that were refused: all, or
// with more than Few nodes home and as many others, in an order drawn by the
// seed, as a logarithm of their number. RoundRobin looks at all.
func looked(in Inputs) (loads []Load, refused []Price) {
	order := slices.Clone(in.Loads)
	want := len(order)
	if in.Nodes > Few && in.Policy != RoundRobin {
		want = bits.Len(uint(in.Nodes))
		slices.SortFunc(order, func(a, b Load) int { return nearer(in, a.Node, b.Node) })
	}
	for _, l := range order {
		if len(loads) == want {
			break
		}
		if why := refuse(in, l); why != "" {
			refused = append(refused, Price{Node: l.Node, Refused: why})
			continue
		}
		loads = append(loads, l)
	}
	slices.SortFunc(refused, func(a, b Price) int { return cmp.Compare(a.Node, b.Node) })
	return loads, refused
}

// refuse returns why a job must not go to l's node whatever the price, or "".
func refuse(in Inputs, l Load) string {
	switch {
	case slices.Contains(in.Exclude, l.Node):
		return "it has refused this job"
	case l.Stale() && l.Node != in.Home: // home knows itself
		return fmt.Sprintf("its load is %.1f s old", l.Age.Seconds())
	case l.CPUs < 0.01:
		return "it reports no CPU"
	case in.Demand.Memory > 0 && l.MemTotal > 0 && in.Demand.Memory > l.MemTotal-l.memory():
		return fmt.Sprintf("%s of memory asked, %s free", size(in.Demand.Memory), size(l.MemTotal-l.memory()))
	}
	return ""
}

// price prices the job on l's node.
func price(in Inputs, l Load) Price {
	p := Price{Node: l.Node}
	add := func(resource string, x float64) {
		p.Prices = append(p.Prices, ResourcePrice{resource, x})
		p.Total += x
	}
	if in.Policy == LeastLoaded {
		speed := l.Speed
		if speed == 0 {
			speed = 1
		}
		job := cmp.Or(in.Demand.CPUs, nominalCPUs)
		add(CPU, (l.Jobs()+job)/(l.CPUs*speed))
		return p
	}
	n := float64(max(in.Nodes, 2))
	cpu := marginal(n, l.Jobs(), in.Demand.CPUs, nominalCPUs, l.CPUs*in.Limit)
	add(CPU, cpu)
	if l.MemTotal > 0 {
		used := l.memory()
		mem := marginal(n, float64(used), float64(in.Demand.Memory), nominalMemory, float64(l.MemTotal))
		short := in.Demand.Memory == 0 && l.MemTotal-used < min(nominalMemory, l.MemTotal/16)
		if short || l.MemStall > thrashing {
			mem += (thrash - 1) * cpu
		}
		add(Memory, mem)
	}
	if l.DiskTotal > 0 {
		add(Disk, marginal(n, float64(min(l.DiskUsed, l.DiskTotal)), 0, nominalDisk, float64(l.DiskTotal)))
	}
	if l.NetMax > 0 {
		add(Network, marginal(n, float64(l.NetUsed), 0, nominalNet, float64(l.NetMax)))
	}
	return p
}

// marginal is the price of using demand more of a resource of which used is in
// use: n^((used+demand)/available) - n^(used/available). An unknown demand (0)
// costs the slope at used times the nominal one.
func marginal(n, used, demand, nominal, available float64) float64 {
	ln := math.Log(n)
	now := math.Exp(ln * min(used/available, maxUse))
	if demand == 0 {
		return now * ln * min(nominal/available, maxUse)
	}
	return now * math.Expm1(ln*min(demand/available, maxUse))
}

// turns prices each node with the turns to go until its own.
func turns(in Inputs, loads []Load) []Price {
	ps := make([]Price, len(loads))
	for i, l := range loads {
		n := uint64(len(loads))
		togo := float64((uint64(i) + n - in.Turn%n) % n)
		ps[i] = Price{Node: l.Node, Prices: []ResourcePrice{{Turns, togo}}, Total: togo}
	}
	return ps
}

// pick returns the index of the one to take among ranked prices, or -1: the
// nearest of those within Tie of the least.
func pick(in Inputs, prices []Price) int {
	best := -1
	for i, p := range prices {
		if p.Total > prices[0].Total*(1+Tie) {
			break
		}
		if best < 0 || nearer(in, p.Node, prices[best].Node) < 0 {
			best = i
		}
	}
	return best
}

// nearer orders nodes that cost the same: home first, then by a hash of seed and
// node.
func nearer(in Inputs, a, b ids.Node) int {
	key := func(n ids.Node) uint64 {
		if n == in.Home {
			return 0
		}
		return mix(in.Seed ^ mix(uint64(n)))
	}
	return cmp.Or(cmp.Compare(key(a), key(b)), cmp.Compare(a, b))
}

// mix is the finalizer of splitmix64: it spreads every bit over all.
func mix(x uint64) uint64 {
	x += 0x9e3779b97f4a7c15
	x = (x ^ x>>30) * 0xbf58476d1ce4e5b9
	x = (x ^ x>>27) * 0x94d049bb133111eb
	return x ^ x>>31
}

// size prints bytes for people.
func size(b uint64) string {
	switch {
	case b >= 1<<30:
		return fmt.Sprintf("%.1f GiB", float64(b)/(1<<30))
	case b >= 1<<20:
		return fmt.Sprintf("%.0f MiB", float64(b)/(1<<20))
	}
	return fmt.Sprintf("%d bytes", b)
}
