package lab

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/unum-os/unum/internal/errs"
)

// asked keeps what hooks were told.
type asked struct {
	mu    sync.Mutex
	nodes []Node
	from  []string // who gave tokens
}

func (a *asked) hooks() Hooks {
	h := testHooks()
	daemon := h.Daemon
	h.Daemon = func(n Node) []string {
		a.mu.Lock()
		defer a.mu.Unlock()
		a.nodes = append(a.nodes, n)
		return daemon(n)
	}
	h.Token = func(_ context.Context, _ *Lab, from string) (string, error) {
		a.mu.Lock()
		defer a.mu.Unlock()
		a.from = append(a.from, from)
		if from == "n3" {
			return "", errs.E(errs.Unavailable, "token", from, "no token from here")
		}
		return "token of " + from, nil
	}
	return h
}

// told returns what hooks were told since the last call, one line a daemon.
func (a *asked) told(l *Lab) string {
	a.mu.Lock()
	defer a.mu.Unlock()
	slices.SortFunc(a.nodes, func(x, y Node) int { return x.Index - y.Index })
	var b strings.Builder
	for _, n := range a.nodes {
		how := "goes on"
		if n.Fresh && n.First {
			how = "makes"
		} else if n.Fresh {
			how = fmt.Sprintf("joins by %s at %d", n.Token, n.Peer.As4()[3])
		}
		fmt.Fprintf(&b, "%s %s %s\n", n.Name, n.Kind, how)
	}
	a.nodes = nil
	return b.String()
}

func TestKindsAddWipe(t *testing.T) {
	needRoot(t)
	ctx := t.Context()
	var a asked
	name, dir := fmt.Sprintf("k-%d", os.Getpid()), filepath.Join(t.TempDir(), "lab")
	t.Cleanup(func() {
		_ = Down(context.Background(), name)
		nothingLeft(t, name, dir)
	})
	l, err := Up(ctx, Config{Hooks: a.hooks(), Name: name, Nodes: 2, Witness: true, Clients: 1, Dir: dir, DiskSize: 64 << 20})
	must(t, err)
	told := func(what, want string) {
		t.Helper()
		if got := a.told(l); got != want {
			t.Errorf("%s: hooks were told\n%swant\n%s", what, got, want)
		}
	}
	told("up", `n1 store makes
n2 store joins by token of n1 at 1
n3 witness joins by token of n1 at 1
n4 client joins by token of n1 at 1
`)
	st, err := l.Status(ctx)
	must(t, err)
	var text bytes.Buffer
	must(t, st.Print(&text))
	if st.Nodes[2].Kind != Witness || st.Nodes[3].Kind != Client || !strings.Contains(text.String(), "witness") {
		t.Errorf("status: %s", text.String())
	}

	var progress bytes.Buffer
	added, err := l.Add(ctx, AddOptions{Count: 2, Parallel: true, Progress: &progress})
	must(t, err)
	if !slices.Equal(added, []string{"n5", "n6"}) || !strings.Contains(progress.String(), "n6 is healthy") {
		t.Errorf("added %v: %s", added, progress.String())
	}
	told("add", "n5 store joins by token of n1 at 1\nn6 store joins by token of n1 at 1\n")
	for _, pair := range [][2]string{{"n1", "n6"}, {"n6", "n1"}, {"n5", "n6"}} {
		if !reaches(t, l, pair[0], pair[1]) {
			t.Errorf("%s does not reach %s", pair[0], pair[1])
		}
	}
	want(t, l, "n2", "ip neigh show nud permanent | wc -l", "5") // by heart, the new ones too
	must(t, l.Cut(ctx, []string{"n6"}, nil))
	if reaches(t, l, "n1", "n6", "300ms") {
		t.Error("a new node cannot be cut off")
	}
	must(t, l.Heal(ctx))

	// Killed before anybody saw it healthy, it joins again.
	added, err = l.Add(ctx, AddOptions{Kind: Client, NoWait: true})
	must(t, err)
	must(t, l.Kill(ctx, added...))
	must(t, l.Start(ctx, added...))
	told("add and kill", strings.Repeat("n7 client joins by token of n1 at 1\n", 2))

	// A wiped node, the first of all too, joins what the others still are. Who gives no token is passed over.
	want(t, l, "n1", "echo x > /var/lib/unum/x && sync && echo ok", "ok")
	must(t, l.Wipe(ctx, "n1", "n1"))
	if st, err := l.Status(ctx); err != nil || st.Nodes[0].Power != "off" {
		t.Errorf("wiped: %+v, %v", st, err)
	}
	must(t, l.Kill(ctx, "n2"))
	must(t, l.Start(ctx, "n1"))
	told("wiped", "n1 store joins by token of n5 at 5\n")
	want(t, l, "n1", "ls /var/lib/unum", "lost+found")
	must(t, l.Start(ctx, "n2"))
	told("not wiped", "n2 store goes on\n")
	must(t, l.Kill(ctx, "n1"))
	must(t, l.Start(ctx, "n1"))
	told("healthy since it was wiped", "n1 store goes on\n")

	// Nobody of the cluster is there to be joined.
	must(t, l.PowerLossAll(ctx))
	must(t, l.Wipe(ctx, "n2"))
	if err := l.Start(ctx, "n2"); !errs.Has(err, errs.Unavailable) {
		t.Errorf("nobody to join: %v", err)
	}

	// What cannot get power is not added.
	must(t, os.WriteFile(filepath.Join(dir, "n8"), nil, 0o600))
	if _, err := l.Add(ctx, AddOptions{}); err == nil {
		t.Error("a node was added where its disk cannot be")
	}
	if st, err := l.Status(ctx); err != nil || len(st.Nodes) != 7 {
		t.Errorf("after a failed add: %d nodes, %v", len(st.Nodes), err)
	}
	for what, o := range map[string]AddOptions{"none": {Count: -1}, "too many": {Count: MaxNodes - 6}, "absurdly many": {Count: 1 << 40}, "a queen": {Kind: "queen"}} {
		if _, err := l.Add(ctx, o); !errs.Has(err, errs.Invalid) {
			t.Errorf("add of %s: %v", what, err)
		}
	}
	if err := l.Wipe(ctx, "n9"); !errs.Has(err, errs.NotFound) {
		t.Errorf("wipe of a node that is not: %v", err)
	}
	for what, c := range map[string]Config{"clients": {Clients: MaxNodes}, "fewer than no clients": {Clients: -1}, "nodes": {Nodes: MaxNodes, Witness: true}} {
		c.Hooks, c.Name = testHooks(), "never"
		if _, err := Up(ctx, c); !errs.Has(err, errs.Invalid) {
			t.Errorf("up with absurdly many %s: %v", what, err)
		}
	}
}

// Every node was wiped: the first makes a new cluster.
func TestWipeAll(t *testing.T) {
	l := upLab(t, "w", 2)
	var a asked
	l.hooks = a.hooks()
	must(t, l.Wipe(t.Context(), "n1", "n2"))
	must(t, l.Start(t.Context(), "n1"))
	must(t, l.Start(t.Context(), "n2"))
	if got := a.told(l); got != "n1 store makes\nn2 store joins by token of n1 at 1\n" {
		t.Errorf("hooks were told\n%s", got)
	}
}
