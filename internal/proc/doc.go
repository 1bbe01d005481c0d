// Package proc runs commands on the cluster: the home side, where a command was
// typed, and the node manager, which executes it.
//
// Words: a job is one command run by Unum; its home is the node where it was
// typed; the manager is the part of a node that starts and ends jobs there; an
// attached job has a caller waiting for it, a detached one has not; the control
// stream carries what home and manager say about one job, and each of its input
// and output flows in a stream of its own, so that none can hold up another; the
// record is the cluster's memory of jobs (Registry).
//
// Invariants:
//   - A job has at most one live incarnation: once its start was sent to a node
//     and not refused, no other node is ever offered it.
//   - An attached job lives on a lease: the manager sends its own time, the home
//     returns it, and the job may live three seconds from that time. A pause of
//     either side therefore never prolongs it, and the shim enforces it even
//     when the manager is stopped.
//   - An exit status is reported once, after all output that was written before
//     the job's namespace ended; if a part of that was lost on the way, code 125
//     and a sentence are reported in its place. It beats the node's silence if it
//     arrived.
//   - No descriptor, process, or control group of a job is left after it.
//
// Lock order: Manager.mu before job.mu; neither is held over rpc or disk.
//
// On failure: a node that refuses or cannot be reached before the start was sent
// is replaced by the next candidate; a node that falls silent later makes the
// job lost, and its caller is told within five seconds with code 125; a home that
// falls silent makes the manager kill its attached jobs. A detached job outlives
// home and daemon; the daemon that comes back adopts it.
package proc
