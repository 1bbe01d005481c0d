// Package load measures how busy this node is and keeps what is known of the
// others: the inputs of placement.
//
// # Words
//
// A Meter takes samples of this node: a sched.Load. A Table keeps the latest
// sample of every node with its age. A placement is pending from when this home
// decides it until a sample can have seen it.
//
// # Invariants
//
// A sample is a few small reads from /proc and costs well under a millisecond.
// Where a control group limits CPU or memory, its limits and use count instead
// of the machine's. A node that shares its machine with others (Config.Share,
// as in a lab) reports its share of the machine, and as use only that of the
// processes it sees in its own PID namespace, so that nodes on one machine do
// not look alike.
//
// A running thread counts when two samples in a row have seen it, or when the
// CPUs are nearly all in use: on an idle machine one count is chance.
//
// # Lock order
//
// Table has one mutex, held over nothing. A Meter is used by one goroutine.
//
// # Failure
//
// A source that cannot be read leaves its fields zero, which means unknown; it is
// logged once. A node that sends nothing is stale after sched.StaleAfter and
// gone from the table after Forget.
package load
