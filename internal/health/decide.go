package health

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/unum-os/unum/internal/ids"
)

// What is too much, or too little.
const (
	// ClockApart is the difference of clocks from which it is said.
	ClockApart = time.Second
	// SpaceLeft is the space below which a disk is low: a few times what writers
	// leave (96 MiB), so that there is time to act; on a small disk a twentieth.
	SpaceLeft = 1 << 30
	// Behind is how many entries a replica may lag: some seconds of a busy group.
	Behind = 50_000
	// LogTimes is how much longer than its aim a log may be: it is cut when it has
	// grown to that, and grows to four times for a replica that needs it.
	LogTimes = 5
	// BlocksFor is how long copies may be missing before it is said: a new node
	// lacks all at first, and busy ones a few at any moment.
	BlocksFor = 10 * time.Second
	// SilentFor is how long a group may be without leader before more is said
	// than that an election is under way.
	SilentFor = 5 * time.Second
)

// Member is a member of the cluster as this node sees it.
type Member struct {
	ID       ids.Node
	Host     string
	Admitted bool
	Stores   bool // keeps replicas and blocks
	Witness  bool // votes, and keeps no state
	Leaving  bool // its seat and its blocks are being taken over
	Alive    bool
	Silent   time.Duration // for how long it has been dead
	Never    bool          // it has not been heard of since this node started
	// Displaced is the member that answers at its address in its place; 0: none.
	Displaced ids.Node
	// Successor is the last member that came after it at its address, which may
	// have left since; 0: none. The machine may be the same, and then this member
	// does not come back.
	Successor ids.Node
	Free      uint64 // bytes on its disk, as it says
	Disk      uint64 // size of it; 0: unknown
}

// name is how people know the member.
func (m Member) name() string {
	if m.Host == "" {
		return m.ID.String()
	}
	return fmt.Sprintf("%v (%s)", m.ID, m.Host)
}

// silence says since when a dead member is.
func (m Member) silence() string {
	if m.Never {
		return fmt.Sprintf("not heard of in the %v since this node started", m.Silent.Round(time.Second))
	}
	return fmt.Sprintf("silent for %v", m.Silent.Round(time.Second))
}

// Group is a replicated group as this node's replica of it sees it.
type Group struct {
	ID          ids.Group
	Name        string // what it keeps
	Leader      ids.Node
	Leaderless  time.Duration // for how long, if Leader is 0
	Voters      []ids.Node
	Commit      uint64
	Applied     uint64
	LogBytes    int64
	LogAim      int64               // what its log should not much exceed
	Match       map[ids.Node]uint64 // on the leader: what each other replica has
	Contradicts ids.Node            // who has other entries committed than this node; 0: nobody
	Unreplaced  []ids.Node          // voters silent for long whose seat nobody can take
}

func (g Group) subject() string { return fmt.Sprintf("group %d", g.ID) }

// Input is what conditions follow from.
type Input struct {
	Self    ids.Node
	Mount   string
	Members []Member // all that are in the cluster, this node included
	Groups  []Group
	Wanted  int // voters that so many members should have

	Stores     bool // what this node is: only then the next four mean something
	Session    bool
	Leader     ids.Node // of the root volume
	Mounted    bool
	Missing    int           // copies of blocks
	MissingFor time.Duration // for how long there have been any

	Reserve, ReserveWhole int64                      // bytes kept for the logs, now and wanted
	Certificate           time.Duration              // that is left of it
	Renewed               time.Duration              // that is left when it should have been renewed long ago
	Clocks                map[ids.Node]time.Duration // how far ahead of this node's
	Files, MaxFiles       uint64
	Metrics               error // why they cannot be read
	Keyless               error // why this voter cannot sign
	Removed               error // what others say when this node asks whether it is a member, if it is none
}

// Decide returns the conditions that hold, the most severe first.
func Decide(in Input) []Condition {
	d := &decision{in: in, cs: []Condition{}}
	d.membership()
	for _, g := range in.Groups {
		d.quorum(g)
		d.voters(g)
		d.log(g)
	}
	d.files()
	d.members()
	d.clocks()
	d.machine()
	Sort(d.cs)
	return d.cs
}

// decision collects conditions.
type decision struct {
	in Input
	cs []Condition
}

// say adds a condition; remedy "" takes the table's.
func (d *decision) say(c Code, subject, remedy, format string, args ...any) {
	k := table[place(c)]
	if remedy == "" {
		remedy = k.Remedy
	}
	d.cs = append(d.cs, Condition{Code: c, Severity: k.Severity, Subject: subject, Text: fmt.Sprintf(format, args...), Remedy: remedy})
}

func (d *decision) self() string { return d.in.Self.String() }

// member returns what is known of n; one that is not a member is dead.
func (d *decision) member(n ids.Node) Member {
	for _, m := range d.in.Members {
		if m.ID == n {
			return m
		}
	}
	return Member{ID: n}
}

// alive reports whether n is a member that answers; this node does.
func (d *decision) alive(n ids.Node) bool { return n == d.in.Self || d.member(n).Alive }

// membership is about this node's place in the cluster.
func (d *decision) membership() {
	if d.in.Removed != nil {
		d.say(Removed, d.self(), "", "%v is no member any more: %s", d.in.Self, words(d.in.Removed))
	} else if !d.member(d.in.Self).Admitted {
		d.say(NotAdmitted, d.self(), "", "%v is not admitted to the cluster yet", d.in.Self)
	}
	storing, witness := 0, false
	for _, m := range d.in.Members {
		if m.Stores && !m.Leaving {
			storing++
		}
		witness = witness || m.Witness
	}
	if storing == 2 && !witness {
		remedy := ""
		if slices.ContainsFunc(d.in.Groups, func(g Group) bool { return g.Leader == 0 && len(g.Voters) > 0 }) { // a token is a change, too
			remedy = "see to no-quorum first: nobody can be added until a majority of the voters is up"
		}
		d.say(TwoNodes, "cluster", remedy, "with two nodes and no third voter, the death of either stops all changes until it is back")
	}
}

// quorum is about a group without a leader.
func (d *decision) quorum(g Group) {
	if g.Leader != 0 || len(g.Voters) == 0 {
		return
	}
	var missing []string
	var start []string
	var lost ids.Node // the last of the missing
	for _, v := range g.Voters {
		if m := d.member(v); !d.alive(v) {
			lost = v
			missing = append(missing, m.name()+" "+m.silence())
			if m.Displaced == 0 && m.Successor == 0 {
				start = append(start, "unum up on "+m.name())
			}
		}
	}
	if len(start) == 0 {
		start = []string{"bring back what the missing ones had on their disks"}
	}
	alive := len(g.Voters) - len(missing)
	have := fmt.Sprintf("%s (%s) has no leader: %d of its %d voters are alive", g.subject(), g.Name, alive, len(g.Voters))
	switch {
	case len(missing) == 0 && g.Leaderless < SilentFor:
		d.say(NoQuorum, g.subject(), "wait: an election takes a second or two", "%s and are electing one", have)
	case len(missing) == 0:
		d.say(NoQuorum, g.subject(), "see that the nodes reach each other both ways, and their logs", "%s and have elected none for %v", have, g.Leaderless.Round(time.Second))
	case len(g.Voters) == 2:
		d.say(NoQuorum, g.subject(), fmt.Sprintf("%s: of two voters both must be up; if it is lost for good: unum down, then unum up --without %v, and this node goes on alone", start[0], lost),
			"%s; %s", have, missing[0])
	default:
		d.say(NoQuorum, g.subject(), fmt.Sprintf("%s, or see why the network does not reach them; %d of %d voters must be up", strings.Join(start, ", or "), len(g.Voters)/2+1, len(g.Voters)),
			"%s; %s", have, strings.Join(missing, "; "))
	}
}

// voters is about who votes, and who could.
func (d *decision) voters(g Group) {
	in := d.in
	vote := slices.Contains(g.Voters, in.Self)
	if self := d.member(in.Self); self.Stores && !self.Leaving && !vote && len(g.Voters) < in.Wanted && g.Leader != 0 {
		d.say(NoVote, g.subject(), "", "%v has no vote in %s (%s) yet", in.Self, g.subject(), g.Name)
	}
	if len(g.Voters) > 0 && len(g.Voters) < in.Wanted {
		var why []string
		for _, m := range in.Members {
			if m.Stores && !m.Leaving && !slices.Contains(g.Voters, m.ID) {
				switch {
				case !d.alive(m.ID):
					why = append(why, m.name()+" is "+m.silence())
				case !m.Admitted:
					why = append(why, m.name()+" is joining")
				default:
					why = append(why, m.name()+" has not caught up")
				}
			}
		}
		if len(why) == 0 {
			why = append(why, "there is no other storing node")
		}
		d.say(FewVoters, g.subject(), "", "%s (%s) has %d of %d voters: %s", g.subject(), g.Name, len(g.Voters), in.Wanted, strings.Join(why, "; "))
	}
	if len(g.Voters) < 3 { // of two the survivor can change nothing: said above
		return
	}
	for _, v := range g.Unreplaced {
		if !d.alive(v) {
			d.say(NoReplacement, g.subject(), "", "%s votes in %s (%s) and is %s; there is no other storing node to take its place", d.member(v).name(), g.subject(), g.Name, d.member(v).silence())
		}
	}
}

// log is about a group's log, and who follows it.
func (d *decision) log(g Group) {
	if g.Contradicts != 0 {
		d.say(ReplicasDiffer, g.subject(), "", "%s and %v have different entries of %s (%s) committed: one of them lacks what was acknowledged", d.member(g.Contradicts).name(), d.in.Self, g.subject(), g.Name)
	}
	if g.LogAim > 0 && g.LogBytes > LogTimes*g.LogAim {
		d.say(LogLong, g.subject(), "", "the log of %s (%s) has %d MiB here, %d are its aim", g.subject(), g.Name, g.LogBytes>>20, g.LogAim>>20)
	}
	if g.Commit > g.Applied && g.Commit-g.Applied > Behind {
		d.say(ReplicaBehind, g.subject()+" on "+d.self(), "", "%v has yet to apply %d entries of %s (%s)", d.in.Self, g.Commit-g.Applied, g.subject(), g.Name)
	}
	for n, match := range g.Match {
		if n != d.in.Self && g.Commit > match && g.Commit-match > Behind && d.alive(n) {
			d.say(ReplicaBehind, g.subject()+" on "+n.String(), "", "%s lacks %d entries of %s (%s)", d.member(n).name(), g.Commit-match, g.subject(), g.Name)
		}
	}
}

// files is about the tree on this node.
func (d *decision) files() {
	in := d.in
	if !in.Stores {
		return // it has no tree
	}
	if !in.Session {
		who := "the root volume has no leader"
		if in.Leader != 0 {
			who = "the root volume's leader is " + d.member(in.Leader).name()
		}
		d.say(NoSession, d.self(), "", "%v has no session: %s", in.Self, who)
	}
	if !in.Mounted {
		remedy := ""
		if !in.Session {
			remedy = "wait: it is mounted when there is a session"
		}
		d.say(NotMounted, in.Mount, remedy, "%s is not mounted on %v", in.Mount, in.Self)
	}
	if in.Missing > 0 && in.MissingFor >= BlocksFor {
		d.say(BlocksMissing, d.self(), "", "%v lacks %d copies of blocks, and has lacked some for %v", in.Self, in.Missing, in.MissingFor.Round(time.Second))
	}
}

// members is about the others, and all disks.
func (d *decision) members() {
	for _, m := range d.in.Members {
		if !m.Stores && !m.Witness {
			continue // clients come and go: unum nodes says since when one is away
		}
		if !d.alive(m.ID) && m.Displaced != 0 {
			d.say(MemberDead, m.ID.String(), fmt.Sprintf("unum remove %v, if its disk will not come back; else an address of its own there (unum up --addr)", m.ID),
				"%s is gone: %v answers at its address", m.name(), m.Displaced)
			continue
		}
		if !d.alive(m.ID) && m.Successor != 0 {
			d.say(MemberDead, m.ID.String(), fmt.Sprintf("unum remove %v, if its machine has become %v, or its disk will not come back; else unum up there", m.ID, m.Successor),
				"%s is %s; %v came after it at its address", m.name(), m.silence(), d.member(m.Successor).name())
			continue
		}
		if !d.alive(m.ID) {
			d.say(MemberDead, m.ID.String(), fmt.Sprintf("unum up on %s, or see why the network does not reach it", m.name()), "%s is %s", m.name(), m.silence())
			continue
		}
		if m.Stores && m.Disk > 0 && m.Free < min(SpaceLeft, m.Disk/20) {
			d.say(DiskLow, m.ID.String(), "", "%s has %d MiB free on the disk of its data, %d in all", m.name(), m.Free>>20, m.Disk>>20)
		}
	}
}

// clocks finds whose clock is wrong, by majority: this node's, if all others agree
// that it is, and those of the fewer, if more agree with this node. Of two, and
// where there is no majority, nobody knows.
func (d *decision) clocks() {
	var off []ids.Node
	for n, by := range d.in.Clocks {
		if by.Abs() > ClockApart && d.alive(n) {
			off = append(off, n)
		}
	}
	slices.Sort(off)
	here := d.member(d.in.Self).name()
	by := make([]time.Duration, 0, len(off))
	for _, n := range off {
		by = append(by, d.in.Clocks[n])
	}
	slices.Sort(by)
	agree := len(d.in.Clocks) - len(off) + 1 // with this node, itself included
	if len(off) > 1 && agree == 1 && by[len(by)-1]-by[0] <= ClockApart {
		d.say(ClockDiffers, d.self(), "", "the clock of %s is %s those of all %d others", here, ahead(-by[len(by)/2]), len(off))
		return
	}
	for _, n := range off {
		if agree > len(off) {
			d.say(ClockDiffers, n.String(), "", "the clock of %s is %s that of %s", d.member(n).name(), ahead(d.in.Clocks[n]), here)
			continue
		}
		d.say(ClockDiffers, fmt.Sprintf("%v, %v", d.in.Self, n), "see which of them is wrong (date, on both), set it, and keep both right with an NTP client, such as chrony",
			"of the clocks of %s and %s one is wrong: the second is %s the first; too few others answer to tell which", here, d.member(n).name(), ahead(d.in.Clocks[n]))
	}
}

func ahead(by time.Duration) string {
	if by < 0 {
		return (-by).Round(100*time.Millisecond).String() + " behind"
	}
	return by.Round(100*time.Millisecond).String() + " ahead of"
}

// words puts an error on one line, without what to type.
func words(err error) string {
	var out []string
	for l := range strings.Lines(err.Error()) {
		if l = strings.TrimSpace(l); l != "" && !strings.HasPrefix(l, "try: ") {
			out = append(out, l)
		}
	}
	return strings.Join(out, "; ")
}

// machine is about what this node stands on.
func (d *decision) machine() {
	in := d.in
	if in.ReserveWhole > 0 && in.Reserve < in.ReserveWhole {
		d.say(ReserveUsed, d.self(), "", "of %d MiB kept for the groups' logs on the disk of %v %d are left", in.ReserveWhole>>20, in.Self, in.Reserve>>20)
	}
	switch left := in.Certificate; {
	case left <= 0:
		d.say(CertificateEnds, d.self(), "", "the certificate of %v ended %v ago", in.Self, (-left).Round(time.Minute))
	case left < in.Renewed:
		d.say(CertificateEnds, d.self(), "", "the certificate of %v ends in %v and has not been renewed", in.Self, left.Round(time.Minute))
	}
	if in.Keyless != nil {
		d.say(NoAuthority, d.self(), "", "%v votes and cannot sign certificates: %s", in.Self, words(in.Keyless))
	}
	if in.MaxFiles > 0 && in.Files > in.MaxFiles/10*9 {
		d.say(DescriptorsLow, d.self(), "", "the daemon of %v has %d of %d files open", in.Self, in.Files, in.MaxFiles)
	}
	if in.Metrics != nil {
		d.say(MetricsOff, d.self(), "", "no metrics: %v", in.Metrics)
	}
}
