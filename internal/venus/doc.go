// Package venus is a node's cache of one volume and its voice towards the
// volume's leader (AFS called that part Venus). It implements the tree behind
// the kernel face.
//
// # Words
//
// The client holds one session with the metadata group; leases on inodes live
// inside it. A regular file under a write lease is changed here and now: its
// changes are pending until they are shipped, all pending changes of the node in
// one log record (P3: what survives of a node is a prefix of what it did).
// Changes of names are sent to the leader at once, after what is pending. A
// recall makes the client revoke a lease: empty the kernel's caches of the
// inode, ship, forget.
//
// # Invariants
//
//   - Nothing cached is used unless the session is valid on this node's own
//     clock at that moment, and no kernel time-out reaches beyond it (P5).
//   - While an inode is open for writing here, only a write lease will do: pages
//     in the kernel may be dirtied through a mapping without a word to us.
//   - A request that waits for a lease waits while the node holds no lease on that
//     inode, or only to upgrade one: so emptying the kernel's caches never waits
//     for a request that waits for another node.
//   - A lease is used from its grant at least once before a recall of it is
//     answered, or not at all.
//
// # Lock order
//
// Client.cut, inode.mu, Client.mu (and the small leaf locks). Nothing is held
// over a call, a block, or a notification to the kernel. The ship semaphore is
// taken before all of them.
//
// # Failure
//
// A session that could not be renewed in time is lost: pending changes are
// dropped, which counts as a crash of this node at its last shipped record; the
// handles that made them get EIO; the kernel's caches are emptied before a new
// session is opened.
package venus
