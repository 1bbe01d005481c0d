// Package member knows which nodes of the cluster are alive, and tells all of
// them small things.
//
// Words. Alive is what the nodes believe of each other by SWIM gossip
// (hashicorp/memberlist): each pings another every half second; one that answers
// neither directly nor through others is suspected, and dead if it does not
// contradict within a second and a half. Being alive is an opinion: authority
// comes from leases and quorums only. A broadcast is the latest word of a node
// on a kind of thing (its load, say): newer replaces older, everywhere in the
// end. A seed is a node that we were told of and try to reach while it is not
// alive.
//
// Packets travel as casts of package rpc and streams as its streams, so gossip
// needs no port and hears nobody who has no certificate. memberlist wants
// addresses: they are made up from node numbers (address.go).
//
// Invariants. Callbacks come from one goroutine, with no lock held; quick changes
// may be told as one. A node is never told dead to itself.
//
// Locks: Members.mu is a leaf; memberlist calls back with its own locks held, so
// nothing of memberlist is called under mu.
//
// Failure. A peer killed or cut off is dead after about two seconds, three at
// most in a small cluster. One that returns under the same id contradicts its
// death as soon as it has reached one node. Both halves of a cluster that was cut
// apart longer find each other again through their seeds.
package member
