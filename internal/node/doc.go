// Package node puts the parts of a node together: it makes a node (Found, Join),
// starts its parts in order, and stops them in reverse.
//
// Words: see docs/terms.md. The steward is the loop that, where this node leads
// a group, brings the group's voters into line with the members, has the jobs of
// dead nodes marked lost, and renews this node's certificate.
//
// Invariants: a data directory holds a node if and only if node.json is in it,
// which is written last; where there are blocks without it, no node is made. The
// control socket answers "healthy" only when the tree is mounted and has a
// session.
//
// On failure: the first part that fails ends the others; Run returns its error.
package node
