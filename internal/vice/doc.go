// Package vice is the server side of coherence: what the leader of a volume's
// metadata group does for its clients (AFS called that machine Vice).
//
// # Words
//
// A client (package venus, one on every node) holds one session with the group;
// leases live inside sessions; a recall (AFS: callback) asks for one back. A
// claim is the leader's own hold on inodes while a mutation of them runs.
//
// # Invariants
//
//   - Nothing is granted, and no mutation proposed, before every session that the
//     log knows has either named all leases that it holds (takeover) or surely
//     ended on its holder's own clock.
//   - A mutation is proposed only while no session holds a lease on an inode it
//     changes, except the write lease under which it was made; no lease is given
//     until it has been applied.
//   - A renewal is confirmed by a quorum after it arrived (ReadIndex): so a
//     session renewed by a deposed leader ends no later than Term after its
//     successor was elected.
//   - Reads never queue behind a mutation that waits for recalls: they are
//     answered from the applied state, without a lease.
//
// Reads need no round of the quorum: an answer is used only inside a session,
// and a successor changes nothing while a session of ours can still be alive.
//
// # Lock order
//
// leadership.mu guards the lease table, the waiters and the sessions. It is
// never held over a call, a proposal, or a read of the state.
//
// # Failure
//
// A client that does not answer a recall for recallPatience is not renewed any
// more; its session ends within Term and the others go on. A leader that loses
// its role drops everything; clients come back to the next one.
package vice
