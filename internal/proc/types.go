package proc

import (
	"context"
	"net"
	"time"

	"github.com/unum-os/unum/internal/ids"
	"github.com/unum-os/unum/internal/proc/jobapi"
)

// RPC is what this package uses of the node's endpoint (package rpc).
type RPC interface {
	Handle(method string, h func(ctx context.Context, from ids.Node, req []byte, data []byte) (resp any, respData []byte, err error))
	Call(ctx context.Context, to ids.Node, method string, req any, data []byte, resp any) (respData []byte, err error)
	HandleStream(service string, h func(ctx context.Context, from ids.Node, c net.Conn))
	Dial(ctx context.Context, to ids.Node, service string) (net.Conn, error)
}

// Demand is what a command asks of a node, for placement and for admission.
type Demand struct {
	UID  uint32     `cbor:"1,keyasint"`
	Argv [][]byte   `cbor:"2,keyasint"`
	Cwd  []byte     `cbor:"3,keyasint"`
	Not  []ids.Node `cbor:"4,keyasint,omitempty"` // not these: refused, unreachable, or excluded by the user
}

// PlaceFunc chooses a node for a command. The receipt is the decision with its
// inputs, opaque here. No candidate left is an error, of class Busy or
// Unavailable.
type PlaceFunc func(ctx context.Context, d Demand) (node ids.Node, receipt []byte, err error)

// State is how far a job has come.
type State uint8

// The states. Append only: the numbers are on the wire and in the record.
const (
	Running State = 1 // started, not known to have ended
	Lost    State = 2 // its node died or fell silent: its fate is unknown, its output may be incomplete
	Exited  State = 3 // ended by itself or by a signal; Code and Signal say how
	Killed  State = 4 // ended by Unum: its lease ran out, its time was up, its caller went away
)

// String returns the word shown to people.
func (s State) String() string {
	switch s {
	case Running:
		return "running"
	case Lost:
		return "lost"
	case Exited:
		return "exited"
	case Killed:
		return "killed"
	}
	return "unknown"
}

// Finished reports whether nothing more is to come.
func (s State) Finished() bool { return s != Running }

// JobRecord is what the cluster's record keeps of a job.
type JobRecord struct {
	Job         ids.Job         `cbor:"1,keyasint"`
	Incarnation ids.Incarnation `cbor:"2,keyasint"`
	Home        ids.Node        `cbor:"3,keyasint"`
	Node        ids.Node        `cbor:"4,keyasint"`
	UID         uint32          `cbor:"5,keyasint"`
	Argv        [][]byte        `cbor:"6,keyasint"`
	Cwd         []byte          `cbor:"7,keyasint"`
	State       State           `cbor:"8,keyasint"`
	Code        int             `cbor:"9,keyasint,omitempty"`  // exit code, when Signal is 0
	Signal      int             `cbor:"10,keyasint,omitempty"` // that ended it
	Detached    bool            `cbor:"11,keyasint,omitempty"`
	Name        string          `cbor:"12,keyasint,omitempty"`
	Start       int64           `cbor:"13,keyasint"`           // Unix nanoseconds
	End         int64           `cbor:"14,keyasint,omitempty"` // Unix nanoseconds, 0 while running
	Receipt     []byte          `cbor:"15,keyasint,omitempty"`
	CPU         int64           `cbor:"16,keyasint,omitempty"` // nanoseconds, when finished
	Text        string          `cbor:"17,keyasint,omitempty"` // why it ended so, when that needs a sentence
}

// Supersedes reports whether r says more than old about the same job: a later
// incarnation, or within one a later state. The word of the node that ran the
// job (exited, killed) stands above a guess (lost).
func (r *JobRecord) Supersedes(old *JobRecord) bool {
	if r.Incarnation != old.Incarnation {
		return r.Incarnation > old.Incarnation
	}
	return rank(r.State) > rank(old.State)
}

func rank(s State) int {
	switch s {
	case Lost:
		return 1
	case Exited, Killed:
		return 2
	}
	return 0
}

// ExitCode returns the code a caller that waits for the job exits with: the same
// as the one who runs it.
func (r *JobRecord) ExitCode() int {
	switch {
	case r.State == Lost, r.State == Running, r.State == Killed && r.Code == 0:
		return jobapi.CodeFailed
	case r.Signal != 0:
		return 128 + r.Signal
	}
	return r.Code
}

// Registry is the cluster's record of jobs, as this package sees it.
type Registry interface {
	// NewID gives a number no job ever had. It is local and fast: it comes from
	// a range granted beforehand.
	NewID(ctx context.Context) (ids.Job, error)
	// Put tells the record, later: it never blocks, what it was told waits in
	// memory until the record has it (see Outbox), and is gone with a daemon that
	// is killed before. The record keeps what Supersedes the rest.
	Put(JobRecord)
	Get(ctx context.Context, id ids.Job) (JobRecord, error) // class NotFound
	List(ctx context.Context) ([]JobRecord, error)
}

// The lease of an attached job. A node that ran the job and cannot reach its
// home kills the job leaseTerm after it last asked successfully; the home gives
// up silence later than that, and tells its caller within five seconds in all.
const (
	leaseTerm = 3 * time.Second        // an attached job's life after its node last asked its home with success; shorter than any node's silence
	leaseBeat = 500 * time.Millisecond // between two such questions
	silence   = 4 * time.Second        // how long a node may be silent until the home gives its jobs up; longer than any node's leaseTerm
)
