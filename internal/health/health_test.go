package health

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/unum-os/unum/internal/errs"
	"github.com/unum-os/unum/internal/ids"
)

// three is a sound cluster of three nodes as n1 sees it.
func three() Input {
	in := Input{Self: 1, Mount: "/unum", Wanted: 3, Stores: true, Session: true, Leader: 1, Mounted: true, Reserve: 64 << 20, ReserveWhole: 64 << 20,
		Certificate: 20 * time.Hour, Renewed: 7 * time.Hour, Files: 100, MaxFiles: 1024, Clocks: map[ids.Node]time.Duration{2: 0, 3: 10 * time.Millisecond}}
	for n := ids.Node(1); n <= 3; n++ {
		in.Members = append(in.Members, Member{ID: n, Host: string("abc"[n-1]), Admitted: true, Stores: true, Alive: true, Free: 50 << 30, Disk: 100 << 30})
	}
	for g := ids.Group(1); g <= 2; g++ {
		in.Groups = append(in.Groups, Group{ID: g, Name: [...]string{"", "the record", "the tree"}[g], Leader: 1, Voters: []ids.Node{1, 2, 3}, Commit: 1e6, Applied: 1e6,
			LogBytes: 1 << 20, LogAim: 16 << 20, Match: map[ids.Node]uint64{1: 1e6, 2: 1e6, 3: 1e6}})
	}
	return in
}

// die kills a member some time ago.
func (in *Input) die(n ids.Node, ago time.Duration) {
	in.Members[n-1].Alive, in.Members[n-1].Silent = false, ago
	delete(in.Clocks, n)
}

// bury says that nobody can take the seats of the dead voters.
func (in *Input) bury() {
	for i := range in.Groups {
		for _, v := range in.Groups[i].Voters {
			if int(v) > len(in.Members) || !in.Members[v-1].Alive {
				in.Groups[i].Unreplaced = append(in.Groups[i].Unreplaced, v)
			}
		}
	}
}

// shrink leaves the first n members, all voters.
func (in *Input) shrink(n int) {
	in.Members, in.Wanted = in.Members[:n], n
	for i := range in.Groups {
		in.Groups[i].Voters = in.Groups[i].Voters[:n]
	}
	for k := range in.Clocks {
		if int(k) > n {
			delete(in.Clocks, k)
		}
	}
}

// grow adds a member that does not vote.
func (in *Input) grow() {
	n := ids.Node(len(in.Members) + 1)
	in.Members = append(in.Members, Member{ID: n, Host: fmt.Sprint("host", n), Admitted: true, Stores: true, Alive: true})
}

func TestDecide(t *testing.T) {
	none := func(*Input) {}
	for _, c := range []struct {
		name   string
		change func(*Input)
		want   []string // code subject; words of the text; of the remedy
	}{
		{"all is well", none, nil},
		{"one node", func(in *Input) { in.shrink(1) }, nil},
		{"two nodes", func(in *Input) { in.shrink(2) }, []string{"two-nodes cluster;the death of either;unum token"}},
		{"two nodes and a witness", func(in *Input) { in.Members[2].Stores, in.Members[2].Witness = false, true }, nil},
		{"one of three is dead", func(in *Input) { in.die(3, 14*time.Second); in.bury() },
			[]string{"member-dead n3;n3 (c) is silent for 14s;unum up on n3 (c)", "no-replacement group 1;n3 (c) votes in group 1;add a storing node", "no-replacement group 2;"}},
		{"one of three is dead and another could vote", func(in *Input) { in.die(3, time.Minute); in.grow() }, []string{"member-dead n3;"}},
		{"another is in its place", func(in *Input) { in.die(3, time.Second); in.Members[2].Displaced = 4; in.grow() },
			[]string{"member-dead n3;n3 (c) is gone: n4 answers at its address;unum remove n3"}},
		{"another was in its place, and left", func(in *Input) { in.die(3, time.Minute); in.Members[2].Successor = 7; in.grow() },
			[]string{"member-dead n3;n3 (c) is silent for 1m0s; n7 came after it at its address;unum remove n3, if its machine has become n7"}},
		{"no quorum of two, and the other is another node now", func(in *Input) {
			in.shrink(2)
			in.die(2, 5*time.Second)
			in.Members[1].Successor = 3
			in.Groups[0].Leader = 0
		}, []string{"no-quorum group 1;bring back what the missing ones had on their disks: of two voters both must be up;unum up --without n2", "member-dead n2;", "two-nodes cluster;"}},
		{"never seen", func(in *Input) { in.die(3, 20*time.Second); in.Members[2].Never = true; in.grow() }, []string{"member-dead n3;not heard of in the 20s since this node started;"}},
		{"no quorum of three", func(in *Input) {
			in.die(2, 7*time.Second)
			in.die(3, 14*time.Second)
			in.Groups[1].Leader, in.Leader, in.Session = 0, 0, false
			in.bury()
		}, []string{"no-quorum group 2;1 of its 3 voters are alive; n2 (b) silent for 7s; n3 (c) silent for 14s;unum up on n2 (b), or unum up on n3 (c), or see why the network does not reach them; 2 of 3 voters must be up",
			"no-session n1;no leader;", "member-dead n2;", "member-dead n3;", "no-replacement group 1;", "no-replacement group 1;", "no-replacement group 2;", "no-replacement group 2;"}},
		{"no quorum of two", func(in *Input) { in.shrink(2); in.die(2, 5*time.Second); in.Groups[0].Leader = 0 },
			[]string{"no-quorum group 1;1 of its 2 voters are alive; n2 (b) silent for 5s;unum up on n2 (b): of two voters both must be up", "member-dead n2;", "two-nodes cluster;see to no-quorum first"}},
		{"a voter that is no member any more", func(in *Input) {
			in.shrink(2)
			in.Groups[0].Voters = []ids.Node{1, 2, 9}
			in.Groups[0].Leader = 0
			in.bury()
		},
			[]string{"no-quorum group 1;n9;", "no-replacement group 1;n9;", "two-nodes cluster;"}},
		{"an election", func(in *Input) { in.Groups[1].Leader = 0 }, []string{"no-quorum group 2;electing;wait"}},
		{"an election without end", func(in *Input) { in.Groups[1].Leader, in.Groups[1].Leaderless = 0, time.Minute },
			[]string{"no-quorum group 2;elected none for 1m0s;reach each other both ways"}},
		{"replicas differ", func(in *Input) { in.Groups[1].Contradicts = 2 }, []string{"replicas-differ group 2;n2 (b) and n1 have different entries;copy the data directories"}},
		{"removed", func(in *Input) {
			in.Members[0].Admitted = false
			in.Removed = errs.E(errs.Unauthorized, "renew certificate", "n1", "it has been removed from the cluster").WithRemedy("x")
		}, []string{"removed n1;it has been removed from the cluster;data directory"}},
		{"just joined", func(in *Input) {
			in.Members[0].Admitted, in.Session, in.Mounted, in.Leader = false, false, false, 0
			in.Groups = []Group{{ID: 1}, {ID: 2}}
		}, []string{"not-admitted n1;", "no-session n1;", "not-mounted /unum;;when there is a session"}},
		{"no vote yet", func(in *Input) { in.Groups[1].Voters = []ids.Node{2, 3}; in.Groups[1].Leader = 2 },
			[]string{"no-vote group 2;", "few-voters group 2;has 2 of 3 voters: n1 (a) has not caught up;"}},
		{"few voters, dead", func(in *Input) { in.Groups[1].Voters = []ids.Node{1, 2}; in.die(3, 3*time.Second) },
			[]string{"member-dead n3;", "few-voters group 2;n3 (c) is silent for 3s;"}},
		{"few voters, joining", func(in *Input) { in.Groups[1].Voters = []ids.Node{1, 2}; in.Members[2].Admitted = false },
			[]string{"few-voters group 2;n3 (c) is joining;"}},
		{"few voters, nobody", func(in *Input) { in.Groups[1].Voters = []ids.Node{1, 2}; in.Members[2].Stores = false },
			[]string{"few-voters group 2;there is no other storing node;", "two-nodes cluster;"}},
		{"a member leaves", func(in *Input) { in.shrink(2); in.Members = three().Members; in.Members[2].Leaving = true }, []string{"two-nodes cluster;"}},
		{"this node leaves, and has given up its seat", func(in *Input) {
			in.Members[0].Leaving, in.Wanted = true, 2
			in.Groups[0].Voters, in.Groups[1].Voters = []ids.Node{2, 3}, []ids.Node{2, 3}
		}, []string{"two-nodes cluster;"}},
		{"a client is away", func(in *Input) { in.grow(); in.Members[3].Stores, in.Members[3].Alive = false, false }, nil},
		{"a witness is dead", func(in *Input) { in.Members[2].Stores, in.Members[2].Witness = false, true; in.die(3, time.Second) }, []string{"member-dead n3;"}},
		{"as a client sees it", func(in *Input) {
			in.Members[0].Stores, in.Stores, in.Session, in.Mounted, in.Groups = false, false, false, false, nil
		}, []string{"two-nodes cluster;"}},
		{"no session with a leader", func(in *Input) { in.Session = false; in.Leader = 2 }, []string{"no-session n1;leader is n2 (b);"}},
		{"not mounted", func(in *Input) { in.Mounted = false }, []string{"not-mounted /unum;/unum is not mounted on n1;see the daemon's log"}},
		{"copies missing for a moment", func(in *Input) { in.Missing, in.MissingFor = 5, BlocksFor-1 }, nil},
		{"copies missing", func(in *Input) { in.Missing, in.MissingFor = 5, time.Minute }, []string{"blocks-missing n1;lacks 5 copies;"}},
		{"a disk is low", func(in *Input) { in.Members[1].Free = SpaceLeft - 1 }, []string{"disk-low n2;n2 (b) has 1023 MiB free;"}},
		{"a small disk is not low", func(in *Input) { in.Members[1].Disk, in.Members[1].Free = 1<<30, 100<<20 }, nil},
		{"a small disk is low", func(in *Input) { in.Members[1].Disk, in.Members[1].Free = 1<<30, 40<<20 }, []string{"disk-low n2;"}},
		{"a disk that is not known", func(in *Input) { in.Members[1].Disk, in.Members[1].Free = 0, 0 }, nil},
		{"the disk of a dead member", func(in *Input) { in.die(2, 1); in.Members[1].Free = 0; in.grow() }, []string{"member-dead n2;"}},
		{"the reserve is used", func(in *Input) { in.Reserve = 60 << 20 }, []string{"reserve-used n1;of 64 MiB kept;free space"}},
		{"the authority's key is damaged", func(in *Input) { in.Keyless = fmt.Errorf("read key: no PEM\ntry: pray\nnobody has it") },
			[]string{"no-authority n1;n1 votes and cannot sign certificates: read key: no PEM;nobody has it;identity/ca.key"}},
		{"the certificate ends", func(in *Input) { in.Certificate = 6 * time.Hour }, []string{"certificate-ends n1;ends in 6h0m0s;"}},
		{"the certificate has ended", func(in *Input) { in.Certificate = -time.Hour }, []string{"certificate-ends n1;ended 1h0m0s ago;"}},
		{"another's clock is ahead", func(in *Input) { in.Clocks[2] = 90 * time.Second }, []string{"clock-differs n2;clock of n2 (b) is 1m30s ahead of that of n1 (a);"}},
		{"another's clock is behind", func(in *Input) { in.Clocks[2] = -2 * time.Second }, []string{"clock-differs n2;is 2s behind that of n1 (a);"}},
		{"one second is not said", func(in *Input) { in.Clocks[2] = -time.Second }, nil},
		{"this clock", func(in *Input) { in.Clocks[2], in.Clocks[3] = 5*time.Second, 6*time.Second }, []string{"clock-differs n1;clock of n1 (a) is 6s behind those of all 2 others;"}},
		{"of two nobody knows whose", func(in *Input) { in.shrink(2); in.Clocks[2] = time.Hour },
			[]string{"clock-differs n1, n2;of the clocks of n1 (a) and n2 (b) one is wrong: the second is 1h0m0s ahead of the first;which of them is wrong", "two-nodes cluster;"}},
		{"of three, of which one is dead, neither", func(in *Input) { in.die(3, 1); in.grow(); in.Clocks[2] = -time.Hour },
			[]string{"member-dead n3;", "clock-differs n1, n2;the second is 1h0m0s behind the first;"}},
		{"all three differ", func(in *Input) { in.Clocks[2], in.Clocks[3] = 5*time.Second, -5*time.Second },
			[]string{"clock-differs n1, n2;5s ahead of the first;", "clock-differs n1, n3;5s behind the first;"}},
		{"two against two", func(in *Input) { in.grow(); in.Clocks[2], in.Clocks[3], in.Clocks[4] = time.Minute, time.Minute, 0 },
			[]string{"clock-differs n1, n2;too few others;", "clock-differs n1, n3;"}},
		{"a long log", func(in *Input) { in.Groups[0].LogBytes = 81 << 20 }, []string{"log-long group 1;has 81 MiB here, 16 are its aim;"}},
		{"this replica is behind", func(in *Input) { in.Groups[1].Applied -= Behind + 1 }, []string{"replica-behind group 2 on n1;n1 has yet to apply 50001 entries;"}},
		{"another is behind", func(in *Input) { in.Groups[1].Match[3] = 0 }, []string{"replica-behind group 2 on n3;n3 (c) lacks 1000000 entries;"}},
		{"another is dead, not behind", func(in *Input) { in.Groups[1].Match[3] = 0; in.die(3, 1); in.grow() }, []string{"member-dead n3;"}},
		{"descriptors", func(in *Input) { in.Files = 950 }, []string{"descriptors-low n1;950 of 1024;ulimit -n"}},
		{"metrics", func(in *Input) { in.Metrics = errors.New("in use") }, []string{"metrics-off n1;in use;"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			in := three()
			c.change(&in)
			got := Decide(in)
			if again := Decide(in); !slices.Equal(got, again) {
				t.Errorf("not the same twice:\n%+v\n%+v", got, again)
			}
			if len(got) != len(c.want) {
				t.Fatalf("got %d conditions, want %d:\n%+v", len(got), len(c.want), got)
			}
			for i, w := range c.want {
				f := strings.SplitN(w, ";", 2)
				if have := string(got[i].Code) + " " + got[i].Subject; have != f[0] {
					t.Errorf("%d is %q, want %q", i, have, f[0])
				}
				for _, words := range strings.Split(f[1], ";") {
					words = strings.TrimSpace(words)
					if !strings.Contains(got[i].Text+"\n"+got[i].Remedy, words) {
						t.Errorf("%q lacks %q: %s\ntry: %s", f[0], words, got[i].Text, got[i].Remedy)
					}
				}
				if got[i].Text == "" || got[i].Remedy == "" || got[i].Severity == "" {
					t.Errorf("incomplete: %+v", got[i])
				}
			}
		})
	}
}

// Nothing is advised that cannot be done: a token is a change, for which a
// majority is needed; who has become another node does not come up.
func TestAdviceCanBeTaken(t *testing.T) {
	in := three()
	in.shrink(2)
	in.die(2, time.Minute)
	in.Groups[0].Leader = 0
	for _, c := range Decide(in) {
		if strings.Contains(c.Remedy, "unum token") {
			t.Errorf("a token without a majority: %+v", c)
		}
	}
	in = three()
	in.die(2, time.Minute)
	in.die(3, time.Minute)
	in.Members[1].Successor, in.Members[2].Displaced = 7, 8
	in.Groups[0].Leader = 0
	for _, c := range Decide(in) {
		if strings.Contains(c.Remedy, "unum up on") {
			t.Errorf("who has become another is to come up: %+v", c)
		}
	}
}

// Each code is in the table once, is decided somewhere, is tried by TestDecide
// above, and is explained in the docs with its severity and its meaning.
func TestTableIsWhole(t *testing.T) {
	read := func(name string) string {
		b, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		return string(b)
	}
	doc, decide, tests := read(filepath.Join("..", "..", "docs", "health.md")), read("decide.go"), read("health_test.go")
	consts := regexp.MustCompile(`(?m)^\t(\w+)\s+Code = "([a-z-]+)"$`).FindAllStringSubmatch(read("health.go"), -1)
	if len(consts) != len(table) || len(consts) == 0 {
		t.Fatalf("%d codes, %d in the table", len(consts), len(table))
	}
	for _, m := range consts {
		name, code := m[1], Code(m[2])
		i := place(code)
		if i < 0 {
			t.Errorf("%s is not in the table", code)
			continue
		}
		k := table[i]
		if k.Severity.rank() < 0 || k.Means == "" || k.Remedy == "" || strings.Contains(k.Means, "\n") {
			t.Errorf("%s is incomplete: %+v", code, k)
		}
		if !strings.Contains(decide, "d.say("+name+",") {
			t.Errorf("nothing decides %s", code)
		}
		if !strings.Contains(tests, `"`+string(code)+" ") {
			t.Errorf("no test decides %s", code)
		}
		if line := fmt.Sprintf("| `%s` | %s | %s |", code, k.Severity, k.Means); !strings.Contains(doc, line) {
			t.Errorf("docs/health.md lacks the line\n%s", line)
		}
	}
	for i, k := range Kinds() {
		if i > 0 && k.Severity.rank() < table[i-1].Severity.rank() {
			t.Errorf("%s stands behind a milder one", k.Code)
		}
	}
}
