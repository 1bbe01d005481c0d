// Package health says what is wrong with a node or its cluster, in one list.
//
// A condition is one thing that is not as it should be, now: a code by which
// programs know it, a severity, a subject (a node, a group, a place), a text for
// people and a remedy, what to type next. Status, its JSON and the metrics show
// the same list. Error means that this node does not do what it is there for,
// warning that something is degraded or soon will be, info that the cluster bears
// less than it could.
//
// Decide is a function of plain values: it asks nobody, reads no clock and keeps
// nothing. The node gathers the values (package node, health.go).
//
// Invariants. A code has one severity, and stands in the table once, with what it
// means and what to do about it; docs/health.md explains each. Nothing in the
// system decides by a condition: they are for people and their programs.
package health
