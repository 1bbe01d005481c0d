// Package principal says who asks: a user through a node, or a node itself; and
// how a user proves it on a node that is not believed.
//
// # Words
//
// A principal is who asks. A system principal is a node itself: its steward, its
// job manager; the node's certificate proves it. A node vouches for its local
// users when it says their uid and is believed: storing nodes are, others never.
// A credential is the cluster's signed, short-lived word that a user may speak
// from one node. A proof is a credential as it travels. The door is where a node
// that serves a request finds out who asks.
//
// # Invariants
//
//   - A principal has been proven at the door before it stands in a command of
//     the record: Believe is the rule. What it may do is the record's to say.
//   - A credential holds for one cluster, one node and one time. Its signature is
//     over a domain of its own, so that no other signature of the authority can
//     be taken for one.
//   - One credential has one encoding; any other is malformed.
//   - A proof shows in no log: its text is whose it is and when it ends.
//
// Rules only: no clock, no I/O; random numbers are the caller's.
//
// # Locks
//
// None.
//
// # Failure
//
// Whatever is wrong with a proof is class Unauthorized, and Reason says what.
// Making one of senseless parts is class Invalid.
package principal
