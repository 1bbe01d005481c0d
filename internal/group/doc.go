// Package group runs the replicas of many raft groups on one node: one log, one
// sync per round for all of them, one state database.
//
// Words. A group is a replicated state machine; a replica is this node's part
// of it; the host runs all replicas of a node. A machine is the deterministic
// code that applies a group's commands to its space, the keys of the state
// database that are the group's. A voter counts for majorities, a learner only
// follows. The log holds commands not yet known to be durable in the state; its
// truncation point is the last entry taken away. A snapshot is a group's whole
// state at one index, streamed from a leader to a replica that is too far back
// for the log. A witness is a node whose replicas keep the log only: they vote,
// have no machine, and lead only to hand over; the other replicas are full. A
// floor is the last entry that no full replica lacks; a bare snapshot, for a
// witness, has index, term and configuration and no state.
//
// Consensus itself is go.etcd.io/raft. This package owns storage, transport
// framing, snapshots, and the waiting of callers.
//
// Goroutines. The worker steps all groups and owns their raft state and log;
// nothing else touches the log database after Open. The applier owns the state
// database's writes: it applies commands and installs snapshots. The trimmer
// syncs the state so that the worker may truncate logs. Snapshots are sent and
// received on goroutines of their own, a few at a time. All of these only call
// steps; a Stepper calls them from one goroutine, for the simulator.
//
// Invariants:
//   - A vote or an acknowledgement leaves only after what it promises is synced;
//     only a leader's MsgApp and heartbeats may leave before.
//   - The applied index, its term and the configuration at it are written in
//     the same batch as the effects of the commands up to it.
//   - truncation point <= index durable in the state <= applied <= last entry.
//   - The commit of a change of replicas is synced before it is told or acted on. A
//     leader calls the change done when a majority of the new voters have it synced.
//   - A snapshot is installed by one atomic ingestion. A marker in the log,
//     synced before it, lets a restart tell an installed snapshot whose log was
//     not yet reset from damage.
//   - A proposal is answered exactly once: with its result when its own entry,
//     known by a unique id inside it, is applied; otherwise with an error that
//     says whether it is lost or unknown. Never with success by index alone.
//   - Each attempt of a read barrier carries a context of its own; contexts are
//     never reused.
//   - A witness truncates up to a floor, and beyond it only at its limit in
//     bytes. A full learner becomes a voter only when it has everything that a
//     witness may lack.
//   - No full replica takes a bare snapshot; no witness takes, keeps or sends
//     state. A directory never changes from one to the other.
//
// Lock order: Host.mu, then Group.mu, then gate.mu or inbox.mu, then
// Host.failMu. None is held over a sync, a send, a machine's method or a
// watcher; only Bootstrap, Join, Open and Close hold Host.mu over the disk.
//
// Failure. The host is fail-stop: when a write or sync of either database
// fails, or raft finds its invariants broken, nothing more is acknowledged and
// Run returns the error; the databases are then not closed, since the storage
// engine's state is unknown, and the process should end. Damage found at start
// is an error of class Corrupt that names the place. A lost message, a peer that
// is down, or a snapshot that breaks off costs time only. Machine methods that
// panic stop the host in the same way.
package group
