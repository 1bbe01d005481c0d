// Package lab makes a whole cluster on one machine: nodes with their own
// network, disk, host name and process tree that can lose power, be cut off, be
// slowed down, be stopped and have wrong clocks.
//
// Words. A lab is a set of nodes n1..nN and one switch. A node is a small init
// (this program, pid 1 of a new PID, mount, network, UTS and IPC namespace) and
// what runs below it. The switch is a process that holds a network namespace
// with the lab's bridge; the port of node nK on it is pK. A node's disk is an
// ext4 image on a loop device, mounted in that node only. The daemon is the
// command the caller wants to run on each node (normally the Unum daemon); which
// depends on the node's kind: store, witness or client. A node is fresh until it
// was healthy once with the disk it has. A link is what is wrong with a node's
// cable: delay, loss, rate.
//
// Invariants.
//   - Intent first: state.json, and before it the pointer below /run/unum-lab,
//     name whatever is about to be made, so that Down can clean after a maker
//     that was killed at any instruction.
//   - Everything in the kernel hangs off a process: mounts, loop devices
//     (autoclear), interfaces and the bridge go when the last process of their
//     namespace goes. Every process of a lab is in a cgroup of the lab: a new
//     one joins by itself and dies if its maker died before it was recorded.
//   - Power loss shuts the disk down without flushing its journal before
//     anything is killed, so no dying program's writes are kept.
//   - The state file is the truth; every verb that changes it reads and writes
//     it under the lab's lock (flock on /run/unum-lab/NAME). Lock order: lab,
//     then /run/unum-lab itself (directories shared by several labs).
//
// On failure Up removes what it made and says why, with the end of the log of
// the daemon that failed. The other verbs leave the lab as it is.
package lab
