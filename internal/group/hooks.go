package group

import (
	pb "go.etcd.io/raft/v3/raftpb"

	"github.com/unum-os/unum/internal/ids"
)

// Hooks let the simulator look into a host and plant a fault in it. Only
// internal/sim and this package's tests make them; a host of the product has none.
type Hooks struct {
	Wrote     func(g ids.Group, ents []*pb.Entry)              // entries have come into the log
	Committed func(g ids.Group, term uint64, ents []*pb.Entry) // seen as committed in a term, not yet applied
	Fault     Fault
}

// Fault is a bug that is planted to show that the simulator finds it.
type Fault uint8

// The faults.
const (
	NoFault          Fault = iota
	SkipSync               // the log is not synced
	AckBeforeSync          // promises leave before what they promise is synced
	AnswerEarly            // a proposal is answered when it is in the leader's log
	ApplyTwice             // some commands are applied twice
	ReuseReadContext       // a read joins a barrier asked for before it
	LocalRead              // a leader reads without asking the others
	ForgetVote             // the vote is not on disk
	TrimUnsynced           // the log is truncated before the state is durable
	ForgetApplied          // the applied index is not in the batch of the effects
	ResetEarly             // the log is reset to a snapshot before the state has it
	NoMarker               // a snapshot is installed without its marker in the log
	ForgetConf             // the configuration applied is not kept
	Unproven               // a change of replicas is told before a majority of the voters know it
)

// plants tells whether f is planted.
func (k *Hooks) plants(f Fault) bool { return k != nil && k.Fault == f }
