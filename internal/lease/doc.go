// Package lease decides who may cache what: the lease table of the leader of a
// metadata group.
//
// It is rules only. Requests and the time come in, effects (answers and recalls
// to send) come out; it does no I/O, reads no clock, starts no goroutine, and
// takes no lock: the caller does, and sends the effects after letting go of its
// lock, in the order given.
//
// # Words
//
// A lease is a session's right to cache one inode: Read, shared with other
// readers, or Write, held alone. It has no term of its own; it lives inside the
// session and ends when it is released, relinquished, or the session ends.
// A grant is one giving of a lease; its seq is never used again in a table.
// A recall asks the holder of a grant to give it back; there is one per grant.
// A claim is the leader's own hold on a set of inodes while a mutation of them
// runs. Claims may overlap each other but no session's lease.
// A ticket is the caller's number for one request, unique in the table's life.
// An opener is a session known to have an inode open though it holds no lease.
//
// # Invariants
//
// A Write lease on an inode excludes every other lease on it; an active claim
// excludes every lease. Requests queue per inode in order of arrival, and a
// claim joins all its queues in one step, so that every wait is for an earlier
// arrival and no circle can form. While a Write request or a claim waits, no
// new Read lease is given (NotNow), so that writers do not starve. A claim that
// waits lets later claims pass beside it but no lease. Each ticket gets exactly
// one answer: Granted, Claimed, NotNow or Gone; a cancelled one gets none.
// Effects depend on the calls alone, never on map order.
//
// # What a client must do
//
// Answers and recalls may overtake each other on the way, so a client goes by
// seq: per inode it remembers the greatest seq that it has given back, ignores
// a Granted with a seq not above that, and of two Granted keeps the greater. A
// recall may come before the answer whose grant it recalls; when the recall has
// been answered, that answer is void. A recall older than the grant in hand is
// ignored. A NotNow says nothing about a
// lease the session may still hold. Released, NoteOpen and Closed for one inode
// of one session must reach the table in the order in which they happened.
//
// # Failure
//
// A holder that does not answer a recall shows up in Overdue; the caller ends
// its session and then calls SessionEnded, which lets the waiters go on. What a
// new leader does about leases it has never heard of is not this package's
// affair: it waits for the old sessions, or starts an empty table.
package lease
