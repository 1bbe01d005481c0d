package sched

import (
	"encoding/json"
	"fmt"
	"math"
	"slices"
	"strings"

	"github.com/unum-os/unum/internal/ids"
)

// Flip is a change of the chosen node's load that would have sent the job
// elsewhere.
type Flip struct {
	Resource string  `json:"resource"`
	More     float64 `json:"more"` // jobs, or bytes
	To       string  `json:"to"`
	to       ids.Node
}

// Flips returns, per resource, the least growth on the chosen node that changes
// the choice. A resource that cannot change it alone is left out.
func (d Decision) Flips() []Flip {
	i := slices.IndexFunc(d.Inputs.Loads, func(l Load) bool { return l.Node == d.Chosen })
	if d.Chosen == 0 || d.Policy == RoundRobin || i < 0 {
		return nil
	}
	try := func(change func(*Load)) ids.Node {
		in := d.Inputs
		in.Loads = slices.Clone(in.Loads)
		change(&in.Loads[i])
		return Decide(in).Chosen
	}
	var fs []Flip
	find := func(resource string, steps int, more func(step int) float64, change func(l *Load, x float64)) {
		at := func(k int) ids.Node { return try(func(l *Load) { change(l, more(k)) }) }
		lo, hi := 0, steps
		if hi <= 0 || at(hi) == d.Chosen {
			return
		}
		for hi-lo > 1 { // more load never brings the job back, so halving finds the least
			if mid := (lo + hi) / 2; at(mid) == d.Chosen {
				lo = mid
			} else {
				hi = mid
			}
		}
		to := at(hi)
		fs = append(fs, Flip{Resource: resource, More: more(hi), To: name(to), to: to})
	}
	l := d.Inputs.Loads[i]
	// Up to where prices stop growing, in tenths of a job.
	find(CPU, 1+int(10*min(l.CPUs*d.Inputs.Limit*maxUse, 1e6)), func(k int) float64 { return float64(k) / 10 },
		func(l *Load, x float64) { l.PendingJobs += x })
	if l.MemTotal > 0 && d.Policy == EPVM {
		// Up to all that is free, in MiB.
		free := l.MemTotal - l.memory()
		find(Memory, int((free+1<<20-1)>>20), func(k int) float64 { return min(float64(k)*(1<<20), float64(free)) },
			func(l *Load, x float64) { l.PendingMemory += uint64(x) })
	}
	return fs
}

// Explain tells people why: a table of nodes and prices, the choice, the
// runner-up, and what would have changed it.
func Explain(d Decision) string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s\n", headline(d))
	fmt.Fprintf(&b, "policy %s, home %s, %d nodes, limit %g jobs per CPU, seed %d\n", d.Policy, name(d.Inputs.Home), d.Inputs.Nodes, d.Inputs.Limit, d.Seed)
	fmt.Fprintf(&b, "demand: %s\n\n", demand(d))
	table(&b, d)
	b.WriteByte('\n')
	for _, s := range reasons(d) {
		fmt.Fprintf(&b, "%s\n", s)
	}
	return b.String()
}

func headline(d Decision) string {
	if d.Chosen == 0 {
		return "no node can take the job"
	}
	return fmt.Sprintf("%s takes the job", name(d.Chosen))
}

func demand(d Decision) string {
	cpu, mem := "CPU unknown", "memory unknown"
	if d.Inputs.Demand.CPUs > 0 {
		cpu = fmt.Sprintf("CPU %g", d.Inputs.Demand.CPUs)
	}
	if m := d.Inputs.Demand.Memory; m > 0 {
		mem = size(m) + " of memory"
	}
	s := cpu + ", " + mem
	if d.Policy == EPVM && (d.Inputs.Demand.CPUs == 0 || d.Inputs.Demand.Memory == 0) {
		s += " (unknown use is priced at the margin)"
	}
	return s
}

// table writes one line per candidate: its prices and the loads they come from.
func table(b *strings.Builder, d Decision) {
	var cols []string
	for _, r := range []string{CPU, Memory, Disk, Network, Turns} {
		if slices.ContainsFunc(d.Candidates, func(p Price) bool { _, ok := p.Of(r); return ok }) {
			cols = append(cols, r)
		}
	}
	rows := [][]string{{"NODE"}}
	for _, c := range cols {
		rows[0] = append(rows[0], strings.ToUpper(c))
	}
	rows[0] = append(rows[0], "TOTAL", "JOBS/CPUS", "MEMORY FREE", "")
	for _, p := range d.Candidates {
		row := []string{name(p.Node)}
		for _, c := range cols {
			if x, ok := p.Of(c); ok {
				row = append(row, fmt.Sprintf("%.6f", x))
			} else {
				row = append(row, "-")
			}
		}
		total, note := "-", p.Refused
		switch {
		case p.Refused != "":
			note = "refused: " + p.Refused
		case p.Node == d.Chosen:
			note = "chosen"
		case p.Node == d.RunnerUp:
			note = "runner-up"
		}
		if p.Refused == "" {
			total = fmt.Sprintf("%.6f", p.Total)
		}
		jobs, free := "-", "-"
		if i := slices.IndexFunc(d.Inputs.Loads, func(l Load) bool { return l.Node == p.Node }); i >= 0 {
			l := d.Inputs.Loads[i]
			jobs = fmt.Sprintf("%.1f/%g", l.Jobs(), l.CPUs)
			if l.MemTotal > 0 {
				free = size(l.MemTotal - l.memory())
			}
		}
		rows = append(rows, append(row, total, jobs, free, note))
	}
	width := make([]int, len(rows[0]))
	for _, r := range rows {
		for i, c := range r {
			width[i] = max(width[i], len(c))
		}
	}
	for _, r := range rows {
		line := ""
		for i, c := range r {
			line += fmt.Sprintf("%-*s  ", width[i], c)
		}
		b.WriteString(strings.TrimRight(line, " ") + "\n")
	}
}

// reasons returns sentences on what decided and what would have changed it.
func reasons(d Decision) []string {
	if d.Chosen == 0 {
		return []string{"Every node was refused; the table says why."}
	}
	var out []string
	c := d.candidate(d.Chosen)
	if d.RunnerUp == 0 {
		return append(out, fmt.Sprintf("There was no other node to choose: %s was the only one not refused.", name(d.Chosen)))
	}
	r := d.candidate(d.RunnerUp)
	switch {
	case d.Policy == RoundRobin:
		return append(out, fmt.Sprintf("It was %s's turn; %s is next.", name(d.Chosen), name(d.RunnerUp)))
	case math.Abs(r.Total-c.Total) <= Tie*min(r.Total, c.Total):
		why := "the seed's draw favours it"
		if d.Chosen == d.Inputs.Home {
			why = "it is home"
		}
		out = append(out, fmt.Sprintf("%s and the runner-up %s cost the same within %g %%; %s was taken because %s.",
			name(d.Chosen), name(d.RunnerUp), Tie*100, name(d.Chosen), why))
	default:
		resource, most := "", 0.0
		for _, p := range r.Prices {
			if own, _ := c.Of(p.Resource); p.Price-own > most {
				resource, most = p.Resource, p.Price-own
			}
		}
		out = append(out, fmt.Sprintf("The runner-up %s costs %.1f %% more; most of that is its %s (%.6f more).",
			name(d.RunnerUp), (r.Total/c.Total-1)*100, resource, most))
	}
	fs := d.Flips()
	for _, f := range fs {
		more := fmt.Sprintf("%.1f more running jobs", f.More)
		if f.Resource == Memory {
			more = size(uint64(f.More)) + " more memory in use"
		}
		dest := f.To
		if f.to == 0 {
			dest = "nobody"
		}
		out = append(out, fmt.Sprintf("With %s on %s the job would have gone to %s.", more, name(d.Chosen), dest))
	}
	if len(fs) == 0 {
		out = append(out, fmt.Sprintf("No load on %s alone would have changed the choice.", name(d.Chosen)))
	}
	return out
}

func name(n ids.Node) string {
	if n == 0 {
		return "none"
	}
	return n.String()
}

// JSON returns the same for programs: an object with chosen, runner_up, policy,
// home, seed, turn, nodes, limit, demand, candidates (node, prices, total,
// refused, load) and flips.
func JSON(d Decision) ([]byte, error) {
	type candidate struct {
		Node    string          `json:"node"`
		Prices  []ResourcePrice `json:"prices"`
		Total   float64         `json:"total"`
		Refused string          `json:"refused,omitempty"`
		Load    *Load           `json:"load,omitempty"`
	}
	v := struct {
		Chosen     string      `json:"chosen"`
		RunnerUp   string      `json:"runner_up"`
		Policy     Policy      `json:"policy"`
		Home       string      `json:"home"`
		Seed       uint64      `json:"seed"`
		Turn       uint64      `json:"turn"`
		Nodes      int         `json:"nodes"`
		Limit      float64     `json:"limit"`
		Demand     Demand      `json:"demand"`
		Candidates []candidate `json:"candidates"`
		Flips      []Flip      `json:"flips"`
	}{Chosen: name(d.Chosen), RunnerUp: name(d.RunnerUp), Policy: d.Policy, Home: name(d.Inputs.Home), Seed: d.Seed,
		Turn: d.Inputs.Turn, Nodes: d.Inputs.Nodes, Limit: d.Inputs.Limit, Demand: d.Inputs.Demand,
		Candidates: []candidate{}, Flips: append([]Flip{}, d.Flips()...)}
	for _, p := range d.Candidates {
		c := candidate{Node: name(p.Node), Prices: append([]ResourcePrice{}, p.Prices...), Total: p.Total, Refused: p.Refused}
		if i := slices.IndexFunc(d.Inputs.Loads, func(l Load) bool { return l.Node == p.Node }); i >= 0 {
			c.Load = &d.Inputs.Loads[i]
		}
		v.Candidates = append(v.Candidates, c)
	}
	return json.MarshalIndent(v, "", "  ")
}
