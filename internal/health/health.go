package health

import (
	"cmp"
	"slices"
)

// Severity says how bad a condition is.
type Severity string

// The severities, the worst first.
const (
	Error   Severity = "error"   // this node does not do what it is there for
	Warning Severity = "warning" // degraded, or soon to be
	Info    Severity = "info"    // could be better; nothing is wrong
)

// rank orders severities, the worst first.
func (s Severity) rank() int { return slices.Index([]Severity{Error, Warning, Info}, s) }

// Code names a kind of condition. It never changes: alerts are written by it.
type Code string

// The codes.
const (
	Removed         Code = "removed"
	ReplicasDiffer  Code = "replicas-differ"
	NoQuorum        Code = "no-quorum"
	NotAdmitted     Code = "not-admitted"
	NoVote          Code = "no-vote"
	NoSession       Code = "no-session"
	NotMounted      Code = "not-mounted"
	MemberDead      Code = "member-dead"
	FewVoters       Code = "few-voters"
	NoReplacement   Code = "no-replacement"
	BlocksMissing   Code = "blocks-missing"
	DiskLow         Code = "disk-low"
	ReserveUsed     Code = "reserve-used"
	NoAuthority     Code = "no-authority"
	CertificateEnds Code = "certificate-ends"
	ClockDiffers    Code = "clock-differs"
	ReplicaBehind   Code = "replica-behind"
	LogLong         Code = "log-long"
	DescriptorsLow  Code = "descriptors-low"
	MetricsOff      Code = "metrics-off"
	TwoNodes        Code = "two-nodes"
)

// Kind is what holds for all conditions of a code.
type Kind struct {
	Code     Code
	Severity Severity
	Means    string // one line
	Remedy   string // what to do, where a condition does not say it better
}

// table has all kinds, in the order in which conditions of one severity are shown.
var table = []Kind{
	{Removed, Error, "this node was removed from its cluster: the others take nothing from it any more", "unum down, then move its data directory away; to come back as a new node: unum token on another node, and what it prints here"},
	{ReplicasDiffer, Error, "two replicas of a group have different entries committed: disks have lost what they had confirmed", "stop all nodes (unum down) and copy the data directories of all voters before anything else: one of them may have the only copy of changes"},
	{NotAdmitted, Error, "this node has joined, but the cluster has not admitted it yet", "wait some seconds; if it lasts, unum status on another node says what is missing there"},
	{NoQuorum, Error, "a group has no leader, so nothing that it keeps can be changed", "start the missing nodes (unum nodes lists them); a majority of the voters must be up"},
	{NoVote, Error, "this node is to vote in a group and does not yet", "wait some seconds; if it lasts, see that this node reaches the others' addresses (unum nodes)"},
	{NoSession, Error, "this node's client has no session with the leader of the root volume: files cannot be used here", "wait some seconds; if it lasts, see that this node reaches the leader"},
	{NotMounted, Error, "the tree is not mounted on this node", "see the daemon's log; starting unum again mounts it"},
	{MemberDead, Warning, "a member does not answer, or another answers at its address: its machine was made another node", "start unum there, or see why the network does not reach it"},
	{FewVoters, Warning, "a group has fewer voters than the members allow: it bears fewer deaths than it could", "start the nodes that are missing"},
	{NoReplacement, Warning, "a voter is dead and no other storing node is there to take its place", "start it again, or add a storing node: unum token here, and what it prints on that machine"},
	{BlocksMissing, Warning, "this node lacks copies of blocks that it should have; reading goes to the others meanwhile", "wait: they are fetched; if the number does not fall, start the other storing nodes"},
	{DiskLow, Warning, "little space is left on a node's disk: writes to the tree are refused below 96 MiB", "free space there, or use a larger disk"},
	{ReserveUsed, Warning, "the disk was full, and the space kept for the groups' logs is in use", "free space on the disk: the daemon ends when its logs cannot be written"},
	{NoAuthority, Warning, "this voter cannot sign certificates: it does not hold the authority's key, or what it holds is damaged or private no more", "see that it reaches the other voters, of which it fetches the key; if no node has it, bring identity/ca.key back from a copy"},
	{CertificateEnds, Warning, "this node's certificate ends soon or has ended, and has not been renewed", "see that this node reaches a node that keeps the record"},
	{ClockDiffers, Warning, "the clock of a node differs from the others' by more than a second: times of files and jobs are wrong; nothing else depends on it", "set it, and keep it right with an NTP client, such as chrony"},
	{ReplicaBehind, Warning, "a replica has yet to apply much of what its group has committed", "wait; if it does not catch up, that node's disk or processor is too slow"},
	{LogLong, Warning, "the log of a group is much longer than it should be", "wait; if it goes on growing, see why a replica does not follow"},
	{DescriptorsLow, Warning, "the daemon has almost as many files open as it may", "raise the limit of open files (ulimit -n, or LimitNOFILE= in the unit) and start unum again"},
	{MetricsOff, Warning, "the metrics cannot be read: their address cannot be listened on", "give another address, or end what listens there; it is tried again"},
	{TwoNodes, Info, "two nodes and no third voter: both must be up for anything to be changed", "unum token --witness here, and what it prints on any third machine; or add a third storing node (unum token)"},
}

// Kinds returns the table: each kind once, the order of the list.
func Kinds() []Kind { return slices.Clone(table) }

// place returns where a code stands in the table; Decide makes no other codes.
func place(c Code) int { return slices.IndexFunc(table, func(k Kind) bool { return k.Code == c }) }

// Condition is one thing that is not as it should be.
type Condition struct {
	Code     Code     `cbor:"1,keyasint" json:"code"`
	Severity Severity `cbor:"2,keyasint" json:"severity"`
	Subject  string   `cbor:"3,keyasint" json:"subject"` // n2, group 2, a path
	Text     string   `cbor:"4,keyasint" json:"text"`
	Remedy   string   `cbor:"5,keyasint" json:"remedy"`
}

// Sort orders conditions: the most severe first, then as in the table, then by
// subject.
func Sort(cs []Condition) {
	slices.SortStableFunc(cs, func(a, b Condition) int {
		return cmp.Or(cmp.Compare(a.Severity.rank(), b.Severity.rank()), cmp.Compare(place(a.Code), place(b.Code)), cmp.Compare(a.Subject, b.Subject))
	})
}
