package test

import (
	"context"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/unum-os/unum/internal/lab"
)

const (
	// recTakes is how long a fault may take to show, and recMends how long the
	// cluster may take after it until every node answers. Elections take one to
	// two seconds; a loaded machine several times as long.
	recTakes, recMends = 40 * time.Second, 3 * time.Minute
	// recLonger is the longest that a fault lasts beyond that.
	recLonger = 2 * time.Second
)

// recFault is one kind of fault. All but kills and pauses of the whole node leave
// the victims' workers running.
type recFault struct {
	name   string
	few    int  // at most so many victims, at least one
	leader int  // whether the leader is one: yes 1, no -1, by chance 0
	pause  bool // it lasts for long at times
	begin  func(s *recStorm, victims []string)
	end    func(s *recStorm, victims []string)
}

var recFaults = []recFault{
	{name: "power loss of a follower", few: 1, leader: -1, begin: (*recStorm).kill, end: (*recStorm).start},
	{name: "power loss of the leader", few: 1, leader: 1, begin: (*recStorm).kill, end: (*recStorm).start},
	{name: "power loss of two", few: 2, begin: (*recStorm).kill, end: (*recStorm).start},
	{name: "power loss of all", few: 5, begin: (*recStorm).kill, end: (*recStorm).start},
	{name: "daemon killed", few: 1, begin: (*recStorm).killDaemon, end: (*recStorm).start},
	{name: "cut of a minority", few: 2, leader: -1, begin: (*recStorm).cut, end: (*recStorm).heal},
	{name: "cut of the leader", few: 1, leader: 1, begin: (*recStorm).cut, end: (*recStorm).heal},
	{name: "nobody hears the leader", few: 1, leader: 1, begin: (*recStorm).mute, end: (*recStorm).heal},
	{name: "the leader hears nobody", few: 1, leader: 1, begin: (*recStorm).deafen, end: (*recStorm).heal},
	{name: "one-way cut of a follower", few: 1, leader: -1, begin: (*recStorm).oneWay, end: (*recStorm).heal},
	{name: "pause of the leader", few: 1, leader: 1, pause: true, begin: (*recStorm).pause, end: (*recStorm).resume},
	{name: "pause of others", few: 2, leader: -1, pause: true, begin: (*recStorm).pause, end: (*recStorm).resume},
}

// recStorm brings faults over a cluster under load.
type recStorm struct {
	t       *testing.T
	c       *cluster
	rec     *recRecorder
	rng     *rand.Rand
	nodes   []string
	load    map[string]*recProcess // by node
	keys    string
	longest time.Duration // of a pause
	how     string        // what was chosen of what a fault may be

	tried, effective map[string]int
}

func newStorm(t *testing.T, c *cluster, nodes []string, seed uint64, keys string, longest time.Duration) *recStorm {
	s := &recStorm{t: t, c: c, rec: newRecorder(t), rng: rand.New(rand.NewPCG(seed, 5)), nodes: nodes, load: map[string]*recProcess{}, keys: keys,
		longest: longest, tried: map[string]int{}, effective: map[string]int{}}
	s.work(nodes)
	return s
}

// work starts the workers of nodes.
func (s *recStorm) work(nodes []string) {
	for _, n := range nodes {
		s.load[n] = s.rec.start(s.c, n, "record", "-keys", s.keys, "-from", fmt.Sprint(s.rec.from))
	}
}

func (s *recStorm) kill(victims []string) { s.rec.kill(s.c, victims...) }

func (s *recStorm) start(victims []string) {
	s.c.lab("start", append([]string{"--no-wait"}, victims...)...)
	for _, n := range victims {
		if s.load[n].ended() {
			s.work([]string{n})
		}
	}
}

func (s *recStorm) killDaemon(victims []string) {
	l, err := lab.Open(s.c.name, lab.Hooks{})
	if err == nil {
		ctx, cancel := context.WithTimeout(s.t.Context(), time.Minute)
		defer cancel()
		err = l.SignalDaemon(ctx, victims[0], unix.SIGKILL)
	}
	if err != nil {
		s.t.Fatal(err)
	}
	await(s.t, "the daemon of "+victims[0]+" is gone", time.Minute, func() bool {
		st, err := l.Status(s.t.Context())
		return err == nil && st.Nodes[slices.Index(s.nodes, victims[0])].Daemon == "ended"
	})
}

func (s *recStorm) cut(victims []string) { s.c.lab("cut", strings.Join(victims, ",")) }

func (s *recStorm) mute(victims []string) {
	s.c.lab("cut", "--one-way", strings.Join(victims, ","), strings.Join(s.others(victims), ","))
}

func (s *recStorm) deafen(victims []string) {
	s.c.lab("cut", "--one-way", strings.Join(s.others(victims), ","), strings.Join(victims, ","))
}

func (s *recStorm) oneWay(victims []string) {
	if s.rng.IntN(2) == 0 {
		s.how = ", not heard"
		s.mute(victims)
	} else {
		s.how = ", hearing nobody"
		s.deafen(victims)
	}
}

func (s *recStorm) heal([]string) { s.c.lab("heal") }

func (s *recStorm) pause(victims []string) {
	if s.rng.IntN(2) == 0 {
		s.how = ", all of it"
		s.c.lab("pause", victims...)
	} else {
		s.how = ", the daemon"
		s.c.lab("pause", append([]string{"--daemon"}, victims...)...)
	}
}

func (s *recStorm) resume(victims []string) { s.c.lab("resume", victims...) }

// weather makes the network of a node bad, or of none, and returns what it did and
// what ends it.
func (s *recStorm) weather() (what string, end func()) {
	n := s.nodes[s.rng.IntN(len(s.nodes))]
	verb, how := "", ""
	switch s.rng.IntN(4) {
	case 0:
		verb, how = "loss", fmt.Sprintf("%d%%", 1+s.rng.IntN(10))
	case 1:
		verb, how = "delay", fmt.Sprintf("%dms", 1+s.rng.IntN(30))
	default:
		return "", func() {}
	}
	s.c.lab(verb, n, how)
	return fmt.Sprintf("; %s of %s on %s", verb, how, n), func() { s.c.lab(verb, n, "0") }
}

func (s *recStorm) others(victims []string) []string {
	return slices.DeleteFunc(slices.Clone(s.nodes), func(n string) bool { return slices.Contains(victims, n) })
}

// wait waits until a condition holds, and reports whether it came to that.
func (s *recStorm) wait(limit time.Duration, f func() bool) bool {
	for end := time.Now().Add(limit); !f(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(end) {
			return false
		}
	}
	return true
}

// calm waits until all nodes answer what they are asked from now on, and agree
// who leads.
func (s *recStorm) calm() (leader string, term uint64) {
	s.t.Helper()
	now := linNow()
	silent := s.nodes
	if !s.wait(recMends, func() bool {
		silent = slices.DeleteFunc(slices.Clone(silent), func(n string) bool { return s.rec.answers(n, now) })
		leader, term = s.rec.agreed(s.nodes, now)
		return len(silent) == 0 && leader != ""
	}) {
		s.t.Fatalf("%v after everything was mended: %v do not answer, leader %q", recMends, silent, leader)
	}
	return leader, term
}

// choose picks the victims of a fault.
func (s *recStorm) choose(f *recFault, leader string) []string {
	rest := slices.DeleteFunc(slices.Clone(s.nodes), func(n string) bool { return f.leader != 0 && n == leader })
	s.rng.Shuffle(len(rest), func(i, j int) { rest[i], rest[j] = rest[j], rest[i] })
	n := f.few
	if f.few == 2 && f.leader < 0 { // a minority is one or two
		n = 1 + s.rng.IntN(2)
	}
	if f.leader > 0 {
		return append([]string{leader}, rest[:n-1]...)
	}
	return rest[:n]
}

// strike does one fault and mends it. It is effective if each victim answered
// before, and then got and gave no answer, those that are a majority without it
// went on, and another leader was chosen where the leader was hit.
func (s *recStorm) strike(f *recFault) {
	s.t.Helper()
	leader, term := s.calm()
	victims := s.choose(f, leader)
	rest := s.others(victims)
	time.Sleep(time.Duration(s.rng.Int64N(int64(200 * time.Millisecond)))) // a moment by chance
	s.tried[f.name]++
	weather, fair := s.weather()
	s.how = ""
	f.begin(s, victims)
	// What began before this moment may still have been answered.
	at := linNow()
	shown := func() bool {
		for _, v := range victims {
			if p := s.load[v]; !p.ended() && !s.rec.suffers(p, at) {
				return false
			}
		}
		if len(rest) <= len(s.nodes)/2 {
			return true
		}
		for _, n := range rest {
			if !s.rec.answers(n, at) {
				return false
			}
		}
		if slices.Contains(victims, leader) && f.name != "daemon killed" {
			now, later := s.rec.leader()
			return later > term && now != "" && !slices.Contains(victims, now)
		}
		return true
	}
	ok := s.wait(recTakes, shown)
	took := time.Duration(linNow() - at)
	longer := time.Duration(s.rng.Int64N(int64(recLonger)))
	if f.pause && s.rng.IntN(4) == 0 {
		longer = max(longer, s.longest-took)
	}
	time.Sleep(longer) // how long it lasts
	for _, v := range victims {
		// A daemon that was told to stop may have had the answer under way.
		if s.rec.answers(v, at) {
			ok = false
		}
	}
	lasted := time.Duration(linNow() - at)
	f.end(s, victims)
	if s.rng.IntN(2) == 0 { // or it returns in bad weather
		fair()
	}
	mending := linNow()
	_, after := s.calm()
	mended := linNow()
	fair()
	if ok {
		s.effective[f.name]++
	}
	s.t.Logf("%6.1f s: %s: %s%s; leader was %s, term %d; lasted %.1f s, mended in %.1f s, term %d%s%s", float64(at-s.rec.from)/1e9, f.name,
		strings.Join(victims, ","), s.how, leader, term, lasted.Seconds(), float64(mended-mending)/1e9, after, weather, map[bool]string{false: "; without effect"}[ok])
}

// end stops the load and returns what was seen.
func (s *recStorm) end() recHistory {
	for _, n := range s.nodes {
		if err := s.load[n].stop(); err != nil {
			s.t.Error(err)
		}
	}
	return s.rec.history()
}
