package sched

import (
	"encoding/json"
	"flag"
	"go/ast"
	"go/parser"
	"go/token"
	"math"
	"os"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/unum-os/unum/internal/errs"
	"github.com/unum-os/unum/internal/ids"
)

const gib = 1 << 30

func anyLoad(t *rapid.T, n ids.Node) Load {
	l := Load{
		Node:          n,
		CPUs:          rapid.Float64Range(0, 64).Draw(t, "cpus"),
		Speed:         rapid.Float64Range(0, 4).Draw(t, "speed"),
		Runnable:      float64(rapid.IntRange(0, 40).Draw(t, "runnable")),
		Used:          rapid.Float64Range(0, 1).Draw(t, "used"),
		MemTotal:      rapid.Uint64Range(0, 64*gib).Draw(t, "memtotal"),
		DiskTotal:     rapid.Uint64Range(0, 1000*gib).Draw(t, "disktotal"),
		NetMax:        rapid.Uint64Range(0, gib).Draw(t, "netmax"),
		Age:           time.Duration(rapid.Int64Range(0, int64(4*time.Second)).Draw(t, "age")),
		PendingJobs:   float64(rapid.IntRange(0, 4).Draw(t, "pending")),
		PendingMemory: rapid.Uint64Range(0, gib).Draw(t, "pendingmem"),
	}
	l.MemUsed = rapid.Uint64Range(0, l.MemTotal).Draw(t, "memused")
	l.DiskUsed = rapid.Uint64Range(0, l.DiskTotal).Draw(t, "diskused")
	l.NetUsed = rapid.Uint64Range(0, l.NetMax).Draw(t, "netused")
	return l
}

func anyInputs(t *rapid.T) Inputs {
	in := Inputs{
		Policy: rapid.SampledFrom(Policies()).Draw(t, "policy"),
		Home:   ids.Node(rapid.IntRange(0, 6).Draw(t, "home")),
		Seed:   rapid.Uint64().Draw(t, "seed"),
		Turn:   rapid.Uint64().Draw(t, "turn"),
		Limit:  rapid.SampledFrom([]float64{0, 1, 2, 8, 64}).Draw(t, "limit"),
		Demand: Demand{CPUs: rapid.SampledFrom([]float64{0, 0.5, 1, 4}).Draw(t, "dcpus"), Memory: rapid.SampledFrom([]uint64{0, 0, 1 << 20, gib, 20 * gib}).Draw(t, "dmem")},
	}
	for n := range rapid.IntRange(0, 20).Draw(t, "n") {
		in.Loads = append(in.Loads, anyLoad(t, ids.Node(n+1)))
		if rapid.IntRange(0, 9).Draw(t, "excluded") == 0 {
			in.Exclude = append(in.Exclude, ids.Node(n+1))
		}
	}
	return in
}

func TestReplayGivesTheSame(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		d := Decide(anyInputs(t))
		again, err := Replay(d.Receipt())
		if err != nil {
			t.Fatal(err)
		}
		if !slices.Equal(again.Receipt(), d.Receipt()) {
			t.Fatalf("replayed\n%+v\nfrom\n%+v", again, d)
		}
	})
}

func TestOrderOfInputsDoesNotMatter(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		in := anyInputs(t)
		d := Decide(in)
		in.Loads = rapid.Permutation(in.Loads).Draw(t, "loads")
		in.Exclude = rapid.Permutation(in.Exclude).Draw(t, "exclude")
		if e := Decide(in); !reflect.DeepEqual(d, e) {
			t.Fatalf("permuted:\n%+v\n%+v", d, e)
		}
	})
}

func TestInputsAreNotTouched(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		in := anyInputs(t)
		in.Loads = rapid.Permutation(in.Loads).Draw(t, "loads")
		was := slices.Clone(in.Loads)
		Decide(in)
		if !slices.Equal(was, in.Loads) {
			t.Fatal("Decide changed its inputs")
		}
	})
}

// The choice is among the cheapest, and nobody refused is chosen.
func TestTheLeastPriceWins(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		d := Decide(anyInputs(t))
		allowed := 0
		for _, p := range d.Candidates {
			if p.Refused != "" {
				if p.Node == d.Chosen || p.Node == d.RunnerUp {
					t.Fatalf("%v was refused: %+v", p.Node, d)
				}
				continue
			}
			allowed++
			if c := d.candidate(d.Chosen); c.Total > p.Total*(1+Tie) {
				t.Fatalf("%v is cheaper than %v: %+v", p.Node, d.Chosen, d)
			}
		}
		if (d.Chosen != 0) != (allowed > 0) || (d.RunnerUp != 0) != (allowed > 1) {
			t.Fatalf("%d allowed: %+v", allowed, d)
		}
	})
}

// More load on a node never makes it the chosen one, less on the chosen one
// never takes the job away.
func TestMonotone(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		in := anyInputs(t)
		in.Limit = 8
		if in.Policy == RoundRobin {
			in.Policy = EPVM
		}
		if len(in.Loads) == 0 {
			return
		}
		before := Decide(in)
		in.Loads = slices.Clone(in.Loads)
		l := &in.Loads[rapid.IntRange(0, len(in.Loads)-1).Draw(t, "which")]
		switch rapid.IntRange(0, 3).Draw(t, "what") {
		case 0:
			l.Runnable += rapid.Float64Range(0, 30).Draw(t, "more")
		case 1:
			l.PendingJobs++
		case 2:
			l.MemUsed = rapid.Uint64Range(l.MemUsed, l.MemTotal).Draw(t, "mem")
		case 3:
			l.DiskUsed = rapid.Uint64Range(l.DiskUsed, l.DiskTotal).Draw(t, "disk")
		}
		after := Decide(in)
		if after.Chosen == l.Node && before.Chosen != l.Node {
			t.Fatalf("more load on %v drew the job from %v:\n%s\n%s", l.Node, before.Chosen, Explain(before), Explain(after))
		}
	})
}

func three() Inputs {
	in := Inputs{Home: 1, Seed: 42, Limit: 2}
	for n := ids.Node(1); n <= 3; n++ {
		in.Loads = append(in.Loads, Load{Node: n, CPUs: 2, Speed: 1, MemTotal: 8 * gib, MemUsed: gib})
	}
	return in
}

func TestEqualMachinesShareWithoutBias(t *testing.T) {
	count := map[ids.Node]int{}
	in := three()
	in.Home = 9 // none of them
	for seed := range uint64(3000) {
		in.Seed = seed
		count[Decide(in).Chosen]++
	}
	for n := ids.Node(1); n <= 3; n++ {
		if count[n] < 900 || count[n] > 1100 {
			t.Fatalf("of 3000 jobs: %v", count)
		}
	}
}

func TestHomeWinsAmongEquals(t *testing.T) {
	in := three()
	for seed := range uint64(50) {
		in.Seed = seed
		in.Loads[0].MemUsed = gib + 40<<20 // noise
		if d := Decide(in); d.Chosen != 1 {
			t.Fatalf("seed %d: %v", seed, d.Chosen)
		}
	}
	in.Loads[0].PendingJobs = 1
	if d := Decide(in); d.Chosen == 1 {
		t.Fatalf("home is busy:\n%s", Explain(d))
	}
}

// Six jobs one after the other on three idle machines of two CPUs: two each.
func TestPlacementsSpread(t *testing.T) {
	for _, p := range Policies() {
		in := three()
		in.Policy = p
		count := map[ids.Node]int{}
		for i := range 6 {
			in.Seed, in.Turn = uint64(i), uint64(i)
			d := Decide(in)
			count[d.Chosen]++
			in.Loads[d.Chosen-1].PendingJobs++
		}
		for n := ids.Node(1); n <= 3; n++ {
			if count[n] != 2 {
				t.Fatalf("%s: %v", p, count)
			}
		}
	}
}

func TestMemoryDecidesWhenItIsTight(t *testing.T) {
	in := three()
	in.Loads[0].MemUsed = 7 * gib
	in.Loads[1].MemUsed = 6 * gib
	in.Loads[2].MemUsed = 2 * gib
	in.Loads[2].Runnable = 0.2
	in.Demand.Memory = 2 * gib
	d := Decide(in)
	if d.Chosen != 3 || d.RunnerUp != 2 || d.candidate(1).Refused == "" {
		t.Fatal(Explain(d))
	}
	in = three()
	in.Loads[0].MemUsed = 8*gib - 10<<20 // nothing left: as dear as thrashing
	in.Loads[1].Runnable, in.Loads[2].Runnable = 2, 2
	if d := Decide(in); d.Chosen == 1 {
		t.Fatal(Explain(d))
	}
}

func TestRefusals(t *testing.T) {
	in := three()
	in.Exclude = []ids.Node{2}
	in.Loads[2].Age = StaleAfter + 1
	in.Loads[0].Age = time.Minute // home knows itself
	d := Decide(in)
	if d.Chosen != 1 || d.RunnerUp != 0 || d.candidate(2).Refused == "" || d.candidate(3).Refused == "" {
		t.Fatal(Explain(d))
	}
	in.Exclude = append(in.Exclude, 1)
	if d := Decide(in); d.Chosen != 0 || len(d.Candidates) != 3 {
		t.Fatal(Explain(d))
	}
	if d := Decide(Inputs{}); d.Chosen != 0 {
		t.Fatal(Explain(d))
	}
}

func TestManyNodesLookAtAFew(t *testing.T) {
	in := Inputs{Home: 7, Limit: 1}
	for n := ids.Node(1); n <= 1000; n++ {
		in.Loads = append(in.Loads, Load{Node: n, CPUs: 1, Runnable: 1})
	}
	met := map[ids.Node]bool{}
	for seed := range uint64(400) {
		in.Seed = seed
		d := Decide(in)
		if len(d.Candidates) != 10 || d.candidate(7).Node == 0 || d.Inputs.Nodes != 1000 {
			t.Fatalf("%d candidates of %d", len(d.Candidates), d.Inputs.Nodes)
		}
		if len(d.Receipt()) > 2048 {
			t.Fatalf("receipt of %d bytes", len(d.Receipt()))
		}
		for _, p := range d.Candidates {
			met[p.Node] = true
		}
		if _, err := Replay(d.Receipt()); err != nil {
			t.Fatal(err)
		}
	}
	if len(met) < 900 {
		t.Fatalf("only %d nodes ever looked at", len(met))
	}
}

func TestLimit(t *testing.T) {
	var l Limit
	if l.Value() != 1 {
		t.Fatal(l.Value())
	}
	for _, c := range []struct{ load, want float64 }{{0.5, 1}, {1, 2}, {3.9, 4}, {2, 4}, {4, 8}} {
		if l.Observe(c.load, 0); l.Value() != c.want {
			t.Fatalf("after %g: %g want %g", c.load, l.Value(), c.want)
		}
	}
	l.Observe(0, LimitHalfLife+time.Second)
	if l.Value() != 2 {
		t.Fatalf("after a half life: %g", l.Value())
	}
	l.Observe(math.NaN(), 0)
	l.Observe(math.Inf(1), 0)
	l.Observe(-1, -time.Second)
	if l.Value() != 2 {
		t.Fatalf("after nonsense: %g", l.Value())
	}
}

func TestABadReceipt(t *testing.T) {
	d := Decide(three())
	d.Chosen = 3
	if _, err := Replay(d.Receipt()); !errs.Has(err, errs.Corrupt) {
		t.Fatalf("a false receipt: %v", err)
	}
	if _, err := Replay([]byte("x")); !errs.Has(err, errs.Corrupt) {
		t.Fatalf("no receipt: %v", err)
	}
}

var update = flag.Bool("update", false, "rewrite the expected output")

func TestExplain(t *testing.T) {
	busy := three()
	busy.Demand = Demand{CPUs: 1, Memory: gib}
	busy.Loads[0].Runnable, busy.Loads[1].Runnable, busy.Loads[1].MemUsed = 3, 1, 4*gib
	busy.Loads[2].Age = 4200 * time.Millisecond
	turn := three()
	turn.Policy, turn.Turn = RoundRobin, 4
	none := three()
	none.Exclude = []ids.Node{1, 2, 3}
	var b strings.Builder
	for _, in := range []Inputs{three(), busy, turn, none} {
		b.WriteString(Explain(Decide(in)) + "----\n")
	}
	js, err := JSON(Decide(busy))
	if err != nil || !json.Valid(js) {
		t.Fatal(err)
	}
	b.Write(js)
	const golden = "testdata/explain.txt"
	if *update {
		if err := os.WriteFile(golden, []byte(b.String()), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(golden)
	if err != nil {
		t.Fatal(err)
	}
	if b.String() != string(want) {
		t.Fatalf("got\n%s\nwant\n%s", b.String(), want)
	}
}

// What Explain says would change the choice does, and a little less does not.
func TestFlipsAreTrue(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		in := anyInputs(t)
		in.Limit = 4
		d := Decide(in)
		for _, f := range d.Flips() {
			try := func(x float64) ids.Node {
				in := d.Inputs
				in.Loads = slices.Clone(in.Loads)
				i := slices.IndexFunc(in.Loads, func(l Load) bool { return l.Node == d.Chosen })
				if f.Resource == CPU {
					in.Loads[i].PendingJobs += x
				} else {
					in.Loads[i].PendingMemory += uint64(x)
				}
				return Decide(in).Chosen
			}
			step := 0.1
			if f.Resource == Memory {
				step = 1 << 20
			}
			if try(f.More) == d.Chosen || name(try(f.More)) != f.To || try(max(0, f.More-1.01*step)) != d.Chosen {
				t.Fatalf("%+v of\n%s", f, Explain(d))
			}
		}
		Explain(d)
	})
}

func FuzzReplay(f *testing.F) {
	f.Add(Decide(three()).Receipt())
	f.Add(Decide(Inputs{}).Receipt())
	f.Fuzz(func(t *testing.T, b []byte) {
		d, err := Decode(b)
		if err != nil || len(d.Inputs.Loads) > 100 {
			return
		}
		Explain(d)
		d = Decide(d.Inputs)
		Explain(d)
		if _, err := Replay(d.Receipt()); err != nil {
			t.Fatalf("%v\n%+v", err, d)
		}
		if _, err := JSON(d); err != nil {
			t.Fatal(err)
		}
	})
}

// TestRulesOnly holds the package to what doc.go promises.
func TestRulesOnly(t *testing.T) {
	allowed := []string{"cmp", "encoding/json", "fmt", "math", "math/bits", "slices", "strings", "time",
		"github.com/unum-os/unum/internal/errs", "github.com/unum-os/unum/internal/ids", "github.com/unum-os/unum/internal/wire"}
	files, err := os.ReadDir(".")
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		if !strings.HasSuffix(f.Name(), ".go") || strings.HasSuffix(f.Name(), "_test.go") {
			continue
		}
		tree, err := parser.ParseFile(token.NewFileSet(), f.Name(), nil, 0)
		if err != nil {
			t.Fatal(err)
		}
		for _, im := range tree.Imports {
			if p, _ := strconv.Unquote(im.Path.Value); !slices.Contains(allowed, p) {
				t.Errorf("%s imports %s", f.Name(), p)
			}
		}
		ast.Inspect(tree, func(n ast.Node) bool {
			switch n := n.(type) {
			case *ast.GoStmt:
				t.Errorf("%s starts a goroutine", f.Name())
			case *ast.SelectorExpr:
				if x, ok := n.X.(*ast.Ident); ok && x.Name == "time" && n.Sel.Name != "Duration" && n.Sel.Name != "Second" {
					t.Errorf("%s uses time.%s", f.Name(), n.Sel.Name)
				}
			}
			return true
		})
	}
}

func BenchmarkDecide3(b *testing.B) {
	in := three()
	for i := range b.N {
		in.Seed = uint64(i)
		Decide(in).Receipt()
	}
}
