package node

import (
	"bytes"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"maps"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil/promlint"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"

	dto "github.com/prometheus/client_model/go"

	"github.com/unum-os/unum/internal/clock"
	"github.com/unum-os/unum/internal/errs"
	"github.com/unum-os/unum/internal/health"
	"github.com/unum-os/unum/internal/ids"
	"github.com/unum-os/unum/internal/record"
)

var update = flag.Bool("update", false, "write the table of docs/metrics.md")

// pair is a founded node and one that has joined it; change is done to both.
func pair(t *testing.T, change ...func(*Node)) (*Node, *Node, func()) {
	t.Helper()
	cfg := config(t)
	cfg.Metrics = "127.0.0.1:0"
	if err := Found(cfg); err != nil {
		t.Fatal(err)
	}
	n1, _ := start(t, cfg, change...)
	settled(t, n1, 1)
	tok, err := n1.token(asRoot(t.Context(), n1), 0, 0, 0)
	if err != nil {
		t.Fatal(err)
	}
	cfg2 := config(t)
	if err := Join(t.Context(), cfg2, cfg.Addr, tok); err != nil {
		t.Fatal(err)
	}
	n2, stop := start(t, cfg2, change...)
	settled(t, n1, 2)
	settled(t, n2, 2)
	return n1, n2, stop
}

// scrape reads a node's metrics as Prometheus does.
func scrape(t *testing.T, n *Node) map[string]*dto.MetricFamily {
	t.Helper()
	await(t, "the metrics can be read", func() bool { return n.metrics.Addr() != nil })
	r, err := http.Get("http://" + n.metrics.Addr().String() + "/metrics")
	if err != nil {
		t.Fatal(err)
	}
	defer r.Body.Close()
	b, err := io.ReadAll(r.Body)
	if err != nil || r.StatusCode != http.StatusOK {
		t.Fatal(r.Status, err)
	}
	p := expfmt.NewTextParser(model.LegacyValidation)
	fs, err := p.TextToMetricFamilies(bytes.NewReader(b))
	if err != nil {
		t.Fatal(err)
	}
	return fs
}

// lines returns the table of docs/metrics.md for what was scraped.
func lines(fs map[string]*dto.MetricFamily) []string {
	var out []string
	for _, name := range slices.Sorted(maps.Keys(fs)) {
		if !strings.HasPrefix(name, "unum_") {
			continue
		}
		labels := map[string]bool{}
		for _, m := range fs[name].Metric {
			for _, l := range m.Label {
				labels[l.GetName()] = true
			}
		}
		out = append(out, fmt.Sprintf("| `%s` | %s | %s | %s |", name, strings.ToLower(fs[name].GetType().String()),
			strings.Join(slices.Sorted(maps.Keys(labels)), ", "), fs[name].GetHelp()))
	}
	return out
}

// What a node shows is well formed, is what docs/metrics.md lists, and has the
// conditions that status has.
func TestMetrics(t *testing.T) {
	n, _, _ := pair(t, func(n *Node) { n.clockEvery = 50 * time.Millisecond })
	await(t, "calls are made", func() bool { return len(n.clocks.ahead()) > 0 })
	await(t, "calls are served", func() bool { _, ok := scrape(t, n)["unum_rpc_served_total"]; return ok })
	fs := scrape(t, n)

	var own []*dto.MetricFamily
	for name, f := range fs {
		if strings.HasPrefix(name, "unum_") {
			own = append(own, f)
		} else if !strings.HasPrefix(name, "go_") && !strings.HasPrefix(name, "process_") {
			t.Errorf("%s: whose is it?", name)
		}
		for _, m := range f.Metric {
			for _, l := range m.Label {
				if strings.ContainsAny(l.GetValue(), "/") || strings.Contains(l.GetValue(), n.cfg.Dir) {
					t.Errorf("%s: label %s=%q", name, l.GetName(), l.GetValue())
				}
			}
		}
	}
	problems, err := promlint.NewWithMetricFamilies(own).Lint()
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range problems {
		t.Errorf("%s: %s", p.Metric, p.Text)
	}
	for _, part := range []string{"group", "rpc", "member", "vice", "venus", "block", "segment", "proc", "control", "health", "node", "build"} {
		if !slices.ContainsFunc(own, func(f *dto.MetricFamily) bool { return strings.HasPrefix(f.GetName(), "unum_"+part+"_") }) {
			t.Errorf("nothing of part %s", part)
		}
	}
	for name, least := range map[string]float64{"unum_group_sync_seconds": 1, "unum_group_commit_seconds": 1, "unum_group_log_bytes": 1, "unum_member_alive": 2,
		"unum_rpc_connections": 1, "unum_rpc_sent_bytes_total": 1000, "unum_rpc_received_bytes_total": 1000, "go_goroutines": 1, "process_open_fds": 1} {
		sum := 0.0
		if f := fs[name]; f != nil {
			for _, m := range f.Metric {
				sum += m.GetGauge().GetValue() + m.GetCounter().GetValue() + float64(m.GetHistogram().GetSampleCount())
			}
		}
		if sum < least {
			t.Errorf("%s is %v, want %v at least", name, sum, least)
		}
	}

	path := filepath.Join("..", "..", "docs", "metrics.md")
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	row := regexp.MustCompile("(?m)^\\| `.*\n?")
	want := lines(fs)
	if *update {
		first := true
		b = row.ReplaceAllFunc(b, func([]byte) []byte {
			defer func() { first = false }()
			if first {
				return []byte(strings.Join(want, "\n") + "\n")
			}
			return nil
		})
		if err := os.WriteFile(path, b, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	have := strings.Split(strings.TrimSpace(strings.Join(row.FindAllString(string(b), -1), "")), "\n")
	if !slices.Equal(have, want) {
		t.Errorf("docs/metrics.md lists other metrics (go test ./internal/node -run TestMetrics -update writes the table):\n%s\nwant\n%s", strings.Join(have, "\n"), strings.Join(want, "\n"))
	}

	// One list: status, its JSON, the metrics.
	same := func() bool {
		st := n.status(t.Context())
		var a, b []string
		for _, m := range scrape(t, n)["unum_health_condition"].Metric {
			if m.GetGauge().GetValue() == 1 {
				a = append(a, m.Label[0].GetValue()+" "+m.Label[1].GetValue())
			}
		}
		for _, c := range st.Conditions {
			b = append(b, string(c.Code)+" "+string(c.Severity))
		}
		slices.Sort(a)
		slices.Sort(b)
		return slices.Equal(a, slices.Compact(b)) && slices.Contains(a, "not-mounted error") && slices.Contains(a, "two-nodes info")
	}
	await(t, "status and metrics show the same", same)
	if len(fs["unum_health_condition"].Metric) != len(health.Kinds()) {
		t.Error("a condition that does not hold is to be 0")
	}
	j, err := json.Marshal(n.conditions()[0])
	if err != nil || !strings.HasPrefix(string(j), `{"code":"not-mounted","severity":"error","subject":"`+n.cfg.Mount+`","text":"`) || !strings.Contains(string(j), `"remedy":"`) {
		t.Errorf("%s %v", j, err)
	}
}

func find(cs []health.Condition, c health.Code, subject string) *health.Condition {
	if i := slices.IndexFunc(cs, func(x health.Condition) bool { return x.Code == c && x.Subject == subject }); i >= 0 {
		return &cs[i]
	}
	return nil
}

// The survivor of two says whom it misses, since when, and what to type.
func TestSurvivorSaysWhatIsMissing(t *testing.T) {
	n, _, stop := pair(t)
	await(t, "both vote in both groups", func() bool { return len(n.rec.Status().Voters) == 2 && len(n.root.Status().Voters) == 2 })
	if c := find(n.conditions(), health.NoQuorum, "group 1"); c != nil {
		t.Fatalf("%+v", c)
	}
	stop()
	await(t, "both groups miss their quorum", func() bool {
		cs := n.conditions()
		return find(cs, health.NoQuorum, "group 1") != nil && find(cs, health.NoQuorum, "group 2") != nil && find(cs, health.MemberDead, "n2") != nil
	})
	c := find(n.conditions(), health.NoQuorum, "group 2")
	if !strings.Contains(c.Text, "1 of its 2 voters are alive; n2 (host) silent for ") || !strings.Contains(c.Remedy, "unum up on n2 (host)") {
		t.Errorf("%+v", c)
	}
	if err := n.healthy(); !errs.Has(err, errs.NoQuorum) || !strings.Contains(err.Error(), "\ntry: unum up on n2") {
		t.Errorf("%v", err)
	}
}

// Clocks that differ are found, from both sides, and forgotten with the node; of
// two none is accused.
func TestClockDiffers(t *testing.T) {
	n1, n2, stop := pair(t, func(n *Node) {
		n.clockEvery = 20 * time.Millisecond
		if n.id == 2 {
			ahead := &clock.Shifted{}
			if err := ahead.Set(time.Hour, 0); err != nil {
				t.Error(err)
			}
			n.cfg.Clock = ahead
		}
	})
	said := func(n *Node, about, how string) func() bool {
		return func() bool {
			c := find(n.conditions(), health.ClockDiffers, about)
			return c != nil && strings.Contains(c.Text, how) && (strings.Contains(c.Text, "1h0m0s") || strings.Contains(c.Text, "59m59.9s"))
		}
	}
	await(t, "n1 says that the clocks differ", said(n1, "n1, n2", "the second is"))
	await(t, "n2 says that n1's is behind its own", said(n2, "n2, n1", "behind the first"))
	stop()
	await(t, "n1 forgets it", func() bool { return len(n1.clocks.ahead()) == 0 })
}

// The daemon goes on when its metrics' address is taken, and says so.
func TestMetricsAddressTaken(t *testing.T) {
	n1, _ := founded(t)
	cfg := config(t)
	cfg.Metrics = n1.cfg.Addr // where n1 listens
	if err := Found(cfg); err != nil {
		t.Fatal(err)
	}
	n, _ := start(t, cfg)
	settled(t, n, 1)
	await(t, "the condition", func() bool {
		c := find(n.conditions(), health.MetricsOff, "n1")
		return c != nil && c.Severity == health.Warning && strings.Contains(c.Text, "address already in use")
	})
}

// TestSuccessor: who came later at the address of a member, and was admitted, is
// known also when it has left.
func TestSuccessor(t *testing.T) {
	n := &Node{id: 1, stir: make(chan struct{}, 1)}
	list := memberList{Revision: 1}
	for i, m := range []struct {
		addr  string
		state record.State
	}{{"a:1", record.Active}, {"b:1", record.Active}, {"c:1", record.Active}, {"b:1", record.Left}, {"b:1", record.Joining}, {"c:1", record.Removed}, {"c:1", record.Active}} {
		list.Members = append(list.Members, record.Member{ID: ids.Node(i + 1), Addr: m.addr, State: m.state})
	}
	n.setMembers(list)
	for p, want := range map[ids.Node]ids.Node{1: 0, 2: 4, 3: 7, 4: 0, 7: 0} {
		if got := n.successor(list.Members[p-1]); got != want {
			t.Errorf("after %v came %v, want %v", p, got, want)
		}
	}
}
