// Package sched decides where a job runs: the economy's rules.
//
// It is rules only: what is known of the nodes comes in, a decision comes out.
// It does no I/O, reads no clock, draws no random numbers but from the seed it
// is given, and starts nothing; the same inputs give the same decision anywhere.
//
// # Words
//
// A load is what a home knows of one node when it decides. A demand is what a
// job is going to use, as far as that is known. The cost of a node is the sum
// over its resources of n^(used/available), n being the number of nodes; the
// price of a job there is the cost with it less the cost without it. A use that
// is not known is priced at the margin: the slope of the cost times a nominal
// use. A policy turns inputs into prices; the least price wins. A receipt is a
// decision, inputs included, in bytes.
//
// The CPU's use is jobs per CPU over a limit: the smallest power of two over the
// largest load seen of late (Limit). Jobs are counted, not weighed by the
// machine's speed: in simulation weighing did not help.
//
// # Invariants
//
// Decide is a pure function of Inputs and does not depend on the order of its
// slices. With Limit given, more load on a node never makes it the chosen one.
// Prices within Tie of the least count as equal; among equals home wins, then a
// hash of seed and node, so that many homes with the same view spread out. With
// more than Few nodes only some, drawn by the seed, are looked at, for the same
// reason; home always is.
//
// # Failure
//
// Nonsense in inputs (no CPU, NaN, negative) is taken as absent or gets the node
// refused, never a panic. If nobody is left, Chosen is zero and every
// candidate says why. A receipt that does not decode, or does not reproduce, is
// an error of class Corrupt.
package sched
