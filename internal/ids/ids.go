// Package ids holds the typed names of the things Unum speaks about.
//
// All are numbers given out once and never reused, so that an old message can
// never be taken for one about a new thing.
package ids

import (
	"fmt"
	"strconv"
	"strings"
)

// Node names a machine of the cluster; it is also its raft id. A machine whose
// disk was wiped comes back under a new one. Zero means none.
type Node uint64

// String prints n as people see and type it: n1, n2, ...
func (n Node) String() string { return "n" + strconv.FormatUint(uint64(n), 10) }

// ParseNode reads what String printed.
func ParseNode(s string) (Node, error) {
	v, err := strconv.ParseUint(strings.TrimPrefix(s, "n"), 10, 64)
	if err != nil || v == 0 || !strings.HasPrefix(s, "n") {
		return 0, fmt.Errorf("node %q: want n followed by a number, as in n2", s)
	}
	return Node(v), nil
}

// Group names a replicated metadata group (a raft group).
type Group uint64

// The groups that exist in every cluster.
const (
	RecordGroup Group = 1 // the cluster's own record: members, tokens, jobs
	RootGroup   Group = 2 // the root volume's metadata
)

// Inode names a file of a volume. 1 is the volume's root directory, as in FUSE.
type Inode uint64

// RootInode is the root directory of every volume.
const RootInode Inode = 1

// Session names one client session with one group: the index of the log entry
// that opened it. A later session of the same node has a greater one.
type Session uint64

// Job names a command run by Unum, cluster-wide.
type Job uint64

// Incarnation counts the lives of a job; an older one has no authority.
type Incarnation uint64
