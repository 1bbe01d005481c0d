package sched

import (
	"time"

	"github.com/unum-os/unum/internal/ids"
)

// Constants of the rules.
const (
	// StaleAfter is the age past which a node's load is not placed by: six
	// samples missed, about when failure detection takes the node for dead.
	StaleAfter = 3 * time.Second
	// Tie is the part of the least price by which another may be dearer and
	// still count as equal. Smaller than what one job changes on the two CPUs of
	// one of three nodes at a limit of 16, larger than the noise of an idle
	// machine: a tenth of a running job, some hundred MiB of memory.
	Tie = 0.03
	// Few is the number of nodes up to which all are looked at.
	Few = 8

	// What a job of unknown demand is priced for, at the margin: one CPU, the
	// memory of one run of a compiler, little disk and network.
	nominalCPUs   = 1         // CPUs a job of unknown demand is priced for
	nominalMemory = 256 << 20 // bytes of memory it is priced for
	nominalDisk   = 64 << 20  // bytes of disk it is priced for
	nominalNet    = 1 << 20   // bytes a second it is priced for

	// thrash is how much dearer a node's CPU gets when it has no memory left for a
	// job of unknown demand, or stalls for memory: the slowdown that the model's authors give to thrashing.
	thrash = 10
	// thrashing is the MemStall from which a node counts as having none left.
	thrashing = 0.2
	// The base and the exponent are bounded so that no price overflows.
	maxNodes = 1e6 // the base of prices: nodes
	maxUse   = 16  // the exponent of prices: use of a resource, as a part of what there is
)

// Policy names a way of pricing.
type Policy string

// The policies.
const (
	EPVM        Policy = "e-pvm"        // the marginal cost
	LeastLoaded Policy = "least-loaded" // jobs per CPU and speed, nothing else
	RoundRobin  Policy = "round-robin"  // each node in turn
)

// Policies returns the names that Decide knows, the default first.
func Policies() []Policy { return []Policy{EPVM, LeastLoaded, RoundRobin} }

// Load is what a home knows of one node. Zero in a total means unknown: the
// resource is not priced.
type Load struct {
	Node      ids.Node `cbor:"1,keyasint" json:"-"`
	CPUs      float64  `cbor:"2,keyasint" json:"cpus"`                                // usable, may be a fraction
	Speed     float64  `cbor:"3,keyasint,omitempty" json:"speed"`                     // of one CPU; 1 is usual, 0 unknown
	Runnable  float64  `cbor:"4,keyasint,omitempty" json:"runnable"`                  // threads running or ready to
	Used      float64  `cbor:"5,keyasint,omitempty" json:"cpu_used"`                  // part of CPUs in use, 0 to 1
	MemTotal  uint64   `cbor:"6,keyasint,omitempty" json:"memory_total_bytes"`        //
	MemUsed   uint64   `cbor:"7,keyasint,omitempty" json:"memory_used_bytes"`         // what cannot be had for a job
	DiskTotal uint64   `cbor:"8,keyasint,omitempty" json:"disk_total_bytes"`          //
	DiskUsed  uint64   `cbor:"9,keyasint,omitempty" json:"disk_used_bytes"`           //
	NetMax    uint64   `cbor:"10,keyasint,omitempty" json:"network_max_bytes_second"` //
	NetUsed   uint64   `cbor:"11,keyasint,omitempty" json:"network_bytes_second"`     // in and out

	// MemStall is the part of the last seconds in which something waited for
	// memory (the kernel's pressure figure); a node that stalls much counts as thrashing.
	MemStall float64 `cbor:"15,keyasint,omitempty" json:"memory_stall"`

	// Age is how old the sample is where the decision is made.
	Age time.Duration `cbor:"12,keyasint,omitempty" json:"age_ns"`
	// What this home has placed there that the sample cannot know yet.
	PendingJobs   float64 `cbor:"13,keyasint,omitempty" json:"pending_jobs"`
	PendingMemory uint64  `cbor:"14,keyasint,omitempty" json:"pending_memory_bytes"`
}

// Jobs is the CPU load: what runs or wants to, whichever of the moment's count
// and the average use is greater, and what is on its way there.
func (l Load) Jobs() float64 { return max(l.Runnable, l.Used*l.CPUs) + l.PendingJobs }

// PerCPU is Jobs for each CPU: what Limit observes.
func (l Load) PerCPU() float64 {
	if l.CPUs <= 0 {
		return 0
	}
	return l.Jobs() / l.CPUs
}

// Stale reports whether the sample is too old to place by.
func (l Load) Stale() bool { return l.Age > StaleAfter }

// memory is the memory in use or promised.
func (l Load) memory() uint64 {
	if l.MemUsed+l.PendingMemory < l.MemUsed {
		return l.MemTotal
	}
	return min(l.MemUsed+l.PendingMemory, l.MemTotal)
}

// Demand is what a job is going to use; 0 is unknown.
type Demand struct {
	CPUs   float64 `cbor:"1,keyasint,omitempty" json:"cpus"`
	Memory uint64  `cbor:"2,keyasint,omitempty" json:"memory_bytes"`
}

// Inputs is everything a decision depends on.
type Inputs struct {
	Policy  Policy     `cbor:"1,keyasint"`           // empty: EPVM
	Home    ids.Node   `cbor:"2,keyasint,omitempty"` // where the job was asked for
	Seed    uint64     `cbor:"3,keyasint,omitempty"` // drawn once per request
	Turn    uint64     `cbor:"4,keyasint,omitempty"` // the home's count of placements, for RoundRobin
	Nodes   int        `cbor:"5,keyasint,omitempty"` // n; 0: as many as Loads
	Limit   float64    `cbor:"6,keyasint,omitempty"` // L, from Limit.Value; 0: from Loads alone
	Demand  Demand     `cbor:"7,keyasint,omitempty"`
	Loads   []Load     `cbor:"8,keyasint,omitempty"`
	Exclude []ids.Node `cbor:"9,keyasint,omitempty"` // nodes that have refused this job
}

// Names of the columns of prices.
const (
	CPU     = "cpu"
	Memory  = "memory"
	Disk    = "disk"
	Network = "network"
	Turns   = "turn" // RoundRobin: turns to go
)

// ResourcePrice is one term of a price.
type ResourcePrice struct {
	Resource string  `cbor:"1,keyasint" json:"resource"`
	Price    float64 `cbor:"2,keyasint" json:"price"`
}

// Price is what a job costs on one node, or why it may not run there.
type Price struct {
	Node    ids.Node        `cbor:"1,keyasint"`
	Prices  []ResourcePrice `cbor:"2,keyasint,omitempty"`
	Total   float64         `cbor:"3,keyasint,omitempty"`
	Refused string          `cbor:"4,keyasint,omitempty"` // the reason; empty: it may
}

// Of returns the price's term for a resource, and whether it has one.
func (p Price) Of(resource string) (float64, bool) {
	for _, r := range p.Prices {
		if r.Resource == resource {
			return r.Price, true
		}
	}
	return 0, false
}

// Decision is where a job goes and why.
type Decision struct {
	Chosen     ids.Node `cbor:"1,keyasint,omitempty"` // 0: no node may take it
	RunnerUp   ids.Node `cbor:"2,keyasint,omitempty"` // 0: there was no other choice
	Policy     Policy   `cbor:"3,keyasint"`
	Seed       uint64   `cbor:"4,keyasint,omitempty"`
	Candidates []Price  `cbor:"5,keyasint,omitempty"` // cheapest first, the refused last
	// Inputs is what the decision follows from: made sane, and with the loads of
	// only those nodes that were looked at.
	Inputs Inputs `cbor:"6,keyasint"`
}

// candidate returns the price of n.
func (d Decision) candidate(n ids.Node) Price {
	for _, p := range d.Candidates {
		if p.Node == n {
			return p
		}
	}
	return Price{}
}
