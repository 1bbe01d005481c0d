// Package sim runs the raft host of package group under a deterministic
// simulator: a few nodes, their network, disks and clocks, and clients, driven
// by one goroutine and one seed, while everything goes wrong that can.
//
// Words. A seed is the number from which a run draws all that is left to
// chance. A run is one world with its nodes, from founding to judgement; its
// trace is a line for each thing that happens, of which a hash is kept. A life
// of a node lies between two power failures. A planted bug is one put in on
// purpose, to show that it is found.
//
// What runs is the real code: raft, the host with its two databases, the
// record's machine, snapshots, the rules of who votes. The host is driven step
// by step (group.Stepper) in place of its goroutines; network, disk, clock and
// the clients are the simulator's.
//
// Invariants:
//   - Everything that shows in the trace happens on one goroutine, in the order
//     of the queue of events, and depends on the seed alone. The storage engine
//     has goroutines of its own; what they do never shows, since a disk after a
//     power failure holds what was synced and a part, drawn from the seed, of
//     what a sync at that moment would have added.
//   - Runs share nothing: many may go on at once.
//
// What is judged, in each run: one leader a term, log matching, leader
// completeness, state machine safety, each command's effect once,
// linearizability of the registers and of the record, no acknowledged command
// missing after all nodes lost power, all replicas equal byte for byte, and an
// end: a minute after the last fault everybody is answered.
//
// Failure. A run ends at the first violation and returns it with the seed. A
// host that stops, or does not come up from its own disk, is a violation.
package sim
