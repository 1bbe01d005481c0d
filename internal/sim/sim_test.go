package sim

import (
	"crypto/rand"
	"flag"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"reflect"
	"runtime"
	"runtime/debug"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

var (
	oneSeed  = flag.Uint64("seed", 0, "TestSeed runs this seed; with -v it prints the trace")
	onePlant = flag.String("plant", "", "the bug planted in TestSeed, and the only one in TestPlantedBugsAreFound")
	first    = flag.Uint64("first", 1, "where TestSeeds begins")
	many     = flag.Uint64("seeds", 0, "how many seeds TestSeeds runs; 0: some hundreds, or 10,000 with UNUM_TORTURE=1")
)

func TestMain(m *testing.M) {
	flag.Parse()
	rand.Reader = Fixed{}
	debug.SetGCPercent(400) // a run is short and its databases small
	os.Exit(m.Run())
}

func torture() bool { return os.Getenv("UNUM_TORTURE") != "" }

// TestSeed runs one seed, and tells what came of it.
func TestSeed(t *testing.T) {
	if *oneSeed == 0 {
		t.Skip("no -seed is given")
	}
	cfg := Config{Seed: *oneSeed, Plant: Plant(*onePlant)}
	if testing.Verbose() {
		cfg.Trace = os.Stdout
	}
	r := Run(cfg)
	t.Logf("trace %x, %+v", r.Trace, r.Stats)
	if r.Violation != nil {
		t.Fatal(r.Violation)
	}
}

// repeat is what a person types to see a seed again.
func repeat(r Result, p Plant) string {
	more := ""
	if p != "" {
		more = fmt.Sprintf(" -plant=%q", p)
	}
	return fmt.Sprintf("seed %d: %v\nagain, with its trace: go test ./internal/sim -run 'TestSeed$' -seed=%d%s -v", r.Seed, r.Violation, r.Seed, more)
}

// each runs f for so many seeds from the first on, on all processors, until f
// says no.
func each(first, n uint64, f func(seed uint64) bool) {
	var next atomic.Uint64
	var end atomic.Bool
	var wg sync.WaitGroup
	for range runtime.GOMAXPROCS(0) {
		wg.Add(1)
		go func() {
			defer wg.Done()
			for !end.Load() {
				i := next.Add(1) - 1
				if i >= n {
					return
				}
				if !f(first + i) {
					end.Store(true)
				}
			}
		}()
	}
	wg.Wait()
}

// add adds what b counts to a.
func add(a *Stats, b Stats) {
	x, y := reflect.ValueOf(a).Elem(), reflect.ValueOf(b)
	for i := range x.NumField() {
		x.Field(i).SetInt(x.Field(i).Int() + y.Field(i).Int())
	}
}

// brief is a line about the most important counts.
func (s Stats) brief() string {
	return fmt.Sprintf("%d operations; %d crashes, %d partitions, %d pauses, messages: %d dropped, %d doubled; %d snapshots, %d leaders, %d without a vote, %d changes of replicas, %d left for ever",
		s.Ops, s.Crashes+s.CrashesSending+s.CrashesSyncing, s.Partitions+s.Cuts, s.Pauses, s.Dropped, s.Duplicated, s.Snapshots, s.Leaders, s.OutLed, s.Changes, s.Gone)
}

// TestSeeds runs many seeds; none may break a promise, and every kind of fault
// must have happened.
func TestSeeds(t *testing.T) {
	n := *many
	switch {
	case n > 0:
	case torture():
		n = 10_000
	case testing.Short():
		n = 40
	default:
		n = 200
	}
	var mu sync.Mutex
	var sum Stats
	var done, bad int
	began, told := time.Now(), time.Now()
	each(*first, n, func(seed uint64) bool {
		r := Run(Config{Seed: seed})
		mu.Lock()
		defer mu.Unlock()
		add(&sum, r.Stats)
		done++
		if r.Violation != nil {
			bad++
			t.Error(repeat(r, ""))
		}
		if torture() && time.Since(told) > 5*time.Second {
			told = time.Now()
			fmt.Printf("%v: %d of %d seeds, %d bad; %s\n", time.Since(began).Round(time.Second), done, n, bad, sum.brief())
		}
		return bad < 10
	})
	t.Logf("seeds %d to %d in %v, %d bad", *first, *first+n-1, time.Since(began).Round(time.Millisecond), bad)
	v := reflect.ValueOf(sum)
	var zero []string
	for i := range v.NumField() {
		name := v.Type().Field(i).Name
		if v.Field(i).Int() == 0 && name != "Unjudged" {
			zero = append(zero, name)
		}
	}
	t.Logf("%s", sum.brief())
	t.Logf("%+v", sum)
	if n >= 200 && len(zero) > 0 {
		t.Errorf("in %d seeds this never happened: %v", n, zero)
	}
	if sum.Unjudged > done/100 {
		t.Errorf("%d histories were too long to judge", sum.Unjudged)
	}
}

// TestSameSeedSameBytes runs seeds twice, the second time while others run.
func TestSameSeedSameBytes(t *testing.T) {
	seeds := uint64(10)
	if torture() {
		seeds = 100
	}
	var once sync.Map
	each(1, 2*seeds, func(i uint64) bool {
		seed := 1000 + i%seeds
		r := Run(Config{Seed: seed})
		if was, twice := once.LoadOrStore(seed, r); twice && was != r {
			t.Errorf("seed %d: %+v, then %+v", seed, was, r)
		}
		return true
	})
}

// finders are seeds that find a planted bug, to try first: a short run shows
// that each is found, a long one how soon it is by seeds taken as they come.
var finders = map[Plant][]uint64{
	"forget applied":     {16},
	"forget vote":        {45},
	"local read":         {18},
	"reuse read context": {7},
	"unproven change":    {133, 386},
}

// TestPlantedBugsAreFound plants one bug after the other: each must be found
// within a number of seeds.
func TestPlantedBugsAreFound(t *testing.T) {
	const limit = 2000
	plants := Plants()
	if len(plants) < 6 {
		t.Fatal(plants)
	}
	if *onePlant != "" {
		plants = []Plant{Plant(*onePlant)}
	}
	var mu sync.Mutex
	each(0, uint64(len(plants)), func(i uint64) bool {
		p, began := plants[i], time.Now()
		var seeds []uint64
		if !torture() {
			seeds = finders[p]
		}
		for n := uint64(1); n <= limit; n++ {
			seeds = append(seeds, n)
		}
		for tried, seed := range seeds {
			if r := Run(Config{Seed: seed, Plant: p}); r.Violation != nil {
				text, _, _ := strings.Cut(r.Violation.Error(), "\n")
				mu.Lock()
				t.Logf("%-20s found by seed %d, the %d. tried, in %v: %.150s", p, seed, tried+1, time.Since(began).Round(time.Millisecond), text)
				fmt.Printf("planted %s: found by seed %d\n", p, seed)
				mu.Unlock()
				return true
			}
		}
		mu.Lock()
		defer mu.Unlock()
		t.Errorf("%s: not found within %d seeds", p, limit)
		return true
	})
}

// The seam for planted bugs is used here only.
func TestNobodyElsePlants(t *testing.T) {
	seen := 0
	err := filepath.WalkDir("../..", func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() || !strings.HasSuffix(path, ".go") {
			return err
		}
		b, err := os.ReadFile(path)
		if err != nil || !strings.Contains(string(b), "group."+"Hooks") {
			return err
		}
		if !strings.Contains(filepath.ToSlash(path), "internal/sim/") {
			t.Errorf("%s uses the simulator's hooks", path)
		}
		seen++
		return nil
	})
	if err != nil || seen == 0 {
		t.Fatal(seen, err)
	}
}
