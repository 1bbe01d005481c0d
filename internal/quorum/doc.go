// Package quorum holds the rules by which members become voters of a group:
// which of them should vote, and what the next single step towards that is. It
// does no I/O and reads no clock; the daemon's steward and the simulator share
// it.
//
// # Words
//
// A seat is a vote in a group. A member is spare if it has a replica and no
// seat. A member is missed when it has been silent for longer than the grace.
//
// # Rules
//
//   - Seats are 2f+1 (P2): one for one storing member, three for three or four,
//     five from five on. Two storing members have two seats, or three with a
//     witness, which sits only there, or where a storing member is missed.
//   - Who has a seat keeps it, unless it leaves, is put out, or is missed while
//     another can take the seat.
//   - A seat is taken by a spare that has caught up, alive, and entrusted; an old
//     voter is taken out in the same change (joint consensus), so that there are
//     never fewer voters than before and never four.
//   - A leader that is to lose its seat hands over the leadership first.
//
// Nothing here depends on the order of maps; equal input gives an equal step.
//
// # Failure
//
// There is none: if nothing can be done, the step says so, and why.
package quorum
