package record

import (
	"github.com/unum-os/unum/internal/group"
	"github.com/unum-os/unum/internal/ids"
	"github.com/unum-os/unum/internal/principal"
)

// Limits.
const (
	MaxFinished   = 1000      // finished jobs kept: a day of a busy person, a second of a busy queue
	MaxUnfinished = 100_000   // jobs that run or might; more are refused
	StoreClients  = 64        // clients of a storing node whose commands are exactly-once; its longest silent one is forgotten
	OtherClients  = 8         // such clients of any other node
	Window        = 4096      // how far a storing node's client's Seq may run ahead of what it acknowledged
	OtherWindow   = 256       // how far the client of any other node may run ahead
	MaxText       = 255       // bytes of a host name, an address, a label
	MaxLabels     = 64        // labels of a member
	MaxTokens     = 1024      // tokens at a time; a used-up one goes first, then the one that ends soonest
	MaxPEM        = 64 << 10  // bytes of a certificate
	MaxArgv       = 128 << 10 // bytes of a job's argv in the record
	MaxPath       = 4096      // bytes of a working directory
	MaxReceipt    = 64 << 10  // bytes of a receipt
	MaxPut        = 256       // jobs in one PutJobs
	MaxGrant      = 1 << 20   // job ids in one grant

	MaxCommand = group.MaxCommand // bytes of an encoded command

	// MaxApart is how far the time of a command of a node that does not store may
	// be from the last that a storing node has said, ns. In so long a time one has
	// said something: nobody's login lasts longer.
	MaxApart = int64(principal.Renewal)
)

// Role says what a member does for the cluster.
type Role uint8

// The roles.
const (
	RoleStore   Role = 1 // holds metadata replicas and blocks
	RoleClient  Role = 2 // uses the cluster, is trusted with nothing of others
	RoleWitness Role = 3 // votes and keeps logs, so that two storing nodes survive either's death
)

// State says where a member is in its life. It only grows.
type State uint8

// The states.
const (
	Joining State = 1 // has its id, is not ready yet
	Active  State = 2 // a member
	Leaving State = 3 // its seats and blocks are being taken over; it still serves
	Left    State = 4 // went in good order
	Removed State = 5 // was put out
)

// String returns the state's word.
func (s State) String() string {
	return word(int(s), "", "joining", "member", "leaving", "left", "removed")
}

// Belongs reports whether a machine in this state belongs to the cluster: others
// talk to it.
func (s State) Belongs() bool { return s >= Joining && s <= Leaving }

// String returns the role's word.
func (r Role) String() string { return word(int(r), "", "store", "client", "witness") }

func word(i int, words ...string) string {
	if i > 0 && i < len(words) {
		return words[i]
	}
	return "unknown"
}

// TokenID is the hash of a token's secret.
type TokenID [32]byte

// KeyHash is the SHA-256 of a node's public key, the 32 bytes of Ed25519.
type KeyHash [32]byte

// Info is the cluster's identity. There is no secret in it: the log is written by
// witnesses, too. The authority's private key and the volumes' keys are in files
// of the nodes that need them. Number 5, here and in Init, was the volume's key.
type Info struct {
	ClusterID [16]byte `cbor:"1,keyasint"`
	Name      string   `cbor:"2,keyasint"`
	CACert    []byte   `cbor:"3,keyasint"` // PEM
	Created   int64    `cbor:"6,keyasint"` // cluster time, ns

	Counters `cbor:"-"` // kept apart: they change all the time
}

// Counters are what the record counts.
type Counters struct {
	Revision   uint64   `cbor:"1,keyasint"`
	NextNode   ids.Node `cbor:"2,keyasint"` // 0: the cluster is not founded
	NextJob    ids.Job  `cbor:"3,keyasint"`
	Unfinished uint64   `cbor:"4,keyasint"` // jobs
	Finished   uint64   `cbor:"5,keyasint"` // jobs kept
	Clients    uint64   `cbor:"6,keyasint"`
	Acts       uint64   `cbor:"7,keyasint,omitempty"` // audited, ever
	Refusals   uint64   `cbor:"8,keyasint,omitempty"` // audited, ever
	Users      uint64   `cbor:"9,keyasint,omitempty"`
	Index      uint64   `cbor:"10,keyasint"`           // log index of the last command that wrote anything
	Time       int64    `cbor:"11,keyasint,omitempty"` // cluster time of the last command of a storing node, ns
}

// Member is a machine of the cluster.
type Member struct {
	ID       ids.Node          `cbor:"1,keyasint"`
	Hostname string            `cbor:"2,keyasint"`
	Addr     string            `cbor:"3,keyasint"` // host:port of its endpoint
	Role     Role              `cbor:"4,keyasint"`
	State    State             `cbor:"5,keyasint"`
	Labels   map[string]string `cbor:"6,keyasint,omitempty"`
	Joined   uint64            `cbor:"7,keyasint"` // revision at which it got its id
	JoinedAt int64             `cbor:"8,keyasint"` // cluster time, ns
	Key      KeyHash           `cbor:"9,keyasint"`
	Token    TokenID           `cbor:"10,keyasint"` // by which it came; zero for the first member
}

// Token lets machines join.
type Token struct {
	ID      TokenID `cbor:"1,keyasint"`
	Expires int64   `cbor:"2,keyasint"` // cluster time, ns; 0: never
	Uses    uint32  `cbor:"3,keyasint"` // left
	Role    Role    `cbor:"4,keyasint"` // what its users may become
}

// JobState says where a job is in its life.
type JobState uint8

// The states of a job.
const (
	JobRunning JobState = 1
	JobExited  JobState = 2 // ended by itself: ExitCode
	JobKilled  JobState = 3 // ended by a signal: Signal
	JobLost    JobState = 4 // its node is gone; presumed dead
)

// String returns the state's word.
func (s JobState) String() string {
	return word(int(s), "", "running", "exited", "killed", "lost")
}

// Finished reports whether s is an end.
func (s JobState) Finished() bool { return s >= JobExited }

// Job is a command that was run.
type Job struct {
	ID          ids.Job         `cbor:"1,keyasint"`
	Incarnation ids.Incarnation `cbor:"2,keyasint"`
	Home        ids.Node        `cbor:"3,keyasint"`
	Node        ids.Node        `cbor:"4,keyasint"`
	User        string          `cbor:"5,keyasint,omitempty"`
	Uid         uint32          `cbor:"6,keyasint"`
	Argv        [][]byte        `cbor:"7,keyasint"`
	Cwd         string          `cbor:"8,keyasint"`
	State       JobState        `cbor:"9,keyasint"`
	ExitCode    int32           `cbor:"10,keyasint,omitempty"`
	Signal      uint32          `cbor:"11,keyasint,omitempty"`
	Detached    bool            `cbor:"12,keyasint,omitempty"`
	Started     int64           `cbor:"13,keyasint"`           // ns since 1970, of its node; of its home if no node took it
	Ended       int64           `cbor:"14,keyasint,omitempty"` // ns since 1970, of its node; of who says lost, if that is its end
	Receipt     []byte          `cbor:"15,keyasint,omitempty"` // why it runs where it runs; opaque here
	Name        string          `cbor:"16,keyasint,omitempty"`

	// FinishedAt is the revision at which the record learned the end; apply sets it.
	FinishedAt uint64 `cbor:"17,keyasint,omitempty"`

	CPU  int64  `cbor:"18,keyasint,omitempty"` // ns used, once it has ended
	Text string `cbor:"19,keyasint,omitempty"` // why it ended so, when that needs a sentence
}

// Command is one entry of the record's log: one thing asked for, from Init on,
// done exactly once by (Who.Node, Client, Seq). A repeated one gets the first one's result.
// Results of sequence numbers below Acked are forgotten. Who asks was proven at
// the door of the node that proposes it; Init and Barrier need nobody.
type Command struct {
	Client uint64 `cbor:"1,keyasint"` // chosen at random at each start of a proposer
	Seq    uint64 `cbor:"2,keyasint"` // from 1
	Acked  uint64 `cbor:"3,keyasint,omitempty"`

	Init         *Init         `cbor:"4,keyasint,omitempty"`
	AddToken     *Token        `cbor:"5,keyasint,omitempty"`
	DropToken    *TokenID      `cbor:"6,keyasint,omitempty"`
	AddMember    *AddMember    `cbor:"7,keyasint,omitempty"`
	UpdateMember *UpdateMember `cbor:"8,keyasint,omitempty"`
	GrantJobs    uint32        `cbor:"9,keyasint,omitempty"` // how many ids
	PutJobs      []Job         `cbor:"10,keyasint,omitempty"`
	Barrier      bool          `cbor:"11,keyasint,omitempty"` // changes nothing

	Who principal.Principal `cbor:"12,keyasint,omitempty"`
	Now int64               `cbor:"13,keyasint,omitempty"` // cluster time, ns, for the audit

	Put      *Put        `cbor:"14,keyasint,omitempty"`
	Delete   *Delete     `cbor:"15,keyasint,omitempty"`
	Batch    []Put       `cbor:"16,keyasint,omitempty"`
	PutUser  *User       `cbor:"17,keyasint,omitempty"`
	DropUser string      `cbor:"18,keyasint,omitempty"` // the name
	AddLogin *LoginToken `cbor:"19,keyasint,omitempty"`
	Login    *Login      `cbor:"20,keyasint,omitempty"`
	Note     *Note       `cbor:"21,keyasint,omitempty"`
}

// Init founds the cluster; the first member is node 1 and active at once.
type Init struct {
	ClusterID [16]byte          `cbor:"1,keyasint"`
	Name      string            `cbor:"2,keyasint"`
	CACert    []byte            `cbor:"3,keyasint"`
	Hostname  string            `cbor:"6,keyasint"`
	Addr      string            `cbor:"7,keyasint"`
	Labels    map[string]string `cbor:"8,keyasint,omitempty"`
	Key       KeyHash           `cbor:"9,keyasint"`
	Now       int64             `cbor:"10,keyasint"` // cluster time, ns
}

// AddMember gives a machine a node id and uses a token up by one. Asked again
// with the same key and token, it gives the same id and uses nothing.
type AddMember struct {
	Token    TokenID           `cbor:"1,keyasint"`
	Key      KeyHash           `cbor:"2,keyasint"`
	Hostname string            `cbor:"3,keyasint"`
	Addr     string            `cbor:"4,keyasint"`
	Role     Role              `cbor:"5,keyasint,omitempty"` // 0: the token's
	Labels   map[string]string `cbor:"6,keyasint,omitempty"`
	Now      int64             `cbor:"7,keyasint"` // cluster time, ns
}

// UpdateMember changes what is not zero. Labels, when given, replace all. A
// state only grows, but for a leaving member that stays after all; the last
// storing node can neither leave nor be removed.
type UpdateMember struct {
	Node     ids.Node          `cbor:"1,keyasint"`
	Hostname string            `cbor:"2,keyasint,omitempty"`
	Addr     string            `cbor:"3,keyasint,omitempty"`
	State    State             `cbor:"5,keyasint,omitempty"`
	Labels   map[string]string `cbor:"6,keyasint,omitempty"`
}

// Refusal is why something was not done; Err zero means it was.
type Refusal struct {
	Err uint8  `cbor:"1,keyasint,omitempty"` // an errs.Class
	Why string `cbor:"2,keyasint,omitempty"`
}

// Result answers a Command.
type Result struct {
	Refusal  Refusal   `cbor:"1,keyasint"`
	Node     ids.Node  `cbor:"2,keyasint,omitempty"` // AddMember, Init
	FirstJob ids.Job   `cbor:"3,keyasint,omitempty"` // GrantJobs: the first of as many as asked for
	Jobs     []Refusal `cbor:"4,keyasint,omitempty"` // PutJobs: one for each; only the first that refuses says why
	Revision uint64    `cbor:"5,keyasint,omitempty"` // of the record, after the command
	Index    uint64    `cbor:"6,keyasint,omitempty"` // log index at which it was applied

	// Mod is the revision of the key of a Put or Delete: the new one, or that
	// because of which it was refused; 0: there is no such key.
	Mod  uint64      `cbor:"7,keyasint,omitempty"`
	Keys []KeyResult `cbor:"8,keyasint,omitempty"` // Batch: one for each
	User *User       `cbor:"9,keyasint,omitempty"` // Login: who logged in
}
