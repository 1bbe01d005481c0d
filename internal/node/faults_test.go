package node

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/unum-os/unum/internal/control/api"
	"github.com/unum-os/unum/internal/errs"
	"github.com/unum-os/unum/internal/ids"
	"github.com/unum-os/unum/internal/principal"
	"github.com/unum-os/unum/internal/record"
)

// A machine that lost its disk comes back as another node at the same address.
// Nobody shows the old one alive, though gossip needs seconds to find out, and it
// can be put out at once.
func TestAnotherAtItsAddress(t *testing.T) {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	n1, _ := founded(t)
	n2, _, _ := join(t, ctx, n1, record.RoleStore)
	_, cfg3, stop3 := join(t, ctx, n1, record.RoleStore)
	voters(t, n1, 1, 2, 3)
	voters(t, n2, 1, 2, 3)
	tok, err := n1.token(asRoot(ctx, n1), 0, 0, 0)
	if err != nil {
		t.Fatal(err)
	}
	stop3()
	if err := os.RemoveAll(cfg3.Dir); err != nil {
		t.Fatal(err)
	}
	if err := Join(ctx, cfg3, n1.cfg.Addr, tok); err != nil {
		t.Fatal(err)
	}
	n4, _ := start(t, cfg3)
	settled(t, n4, 4)
	early := n1.members.IsAlive(3) || n2.members.IsAlive(3) || n4.members.IsAlive(3)
	for _, n := range []*Node{n1, n2, n4} {
		var st *api.StatusResponse
		await(t, fmt.Sprintf("%v asks n4", n.id), func() bool {
			st = n.status(ctx)
			return len(st.Members) == 4 && st.Members[3].Self != nil
		})
		for _, m := range st.Members {
			if m.Alive != (m.Id != 3) {
				t.Errorf("%v shows n%d alive: %v", n.id, m.Id, m.Alive)
			}
		}
		if i := slices.IndexFunc(st.Conditions, func(c *api.Condition) bool { return c.Subject == "n3" }); i < 0 || !strings.Contains(fmt.Sprint(st.Conditions[i]), "n4 answers at its address") {
			t.Errorf("%v says: %v", n.id, st.Conditions)
		}
	}
	t.Logf("gossip still believed in it: %v", early)
	if err := n2.Remove(asRoot(ctx, n2), 3, false); err != nil {
		t.Error(err)
	}
	for _, n := range []*Node{n1, n2, n4} {
		settled(t, n, 3)
		voters(t, n, 1, 2, 4)
	}
}

// A hundred machines join at once: each by one token of a hundred uses, through
// any node, some saying it twice at the same time.
func TestHundredJoins(t *testing.T) {
	ctx, cancel := context.WithTimeout(context.Background(), 3*time.Minute)
	defer cancel()
	n1, _ := founded(t)
	n2, _, _ := join(t, ctx, n1, record.RoleStore)
	n3, _, _ := join(t, ctx, n1, record.RoleStore)
	nodes := []*Node{n1, n2, n3}
	for _, n := range nodes {
		voters(t, n, 1, 2, 3)
		settled(t, n, 3)
	}
	const many = 100
	tok, err := n1.token(asRoot(ctx, n1), many, 0, 0)
	if err != nil {
		t.Fatal(err)
	}
	few, err := n1.token(asRoot(ctx, n1), 7, 0, 0)
	if err != nil {
		t.Fatal(err)
	}
	// They have nothing but a directory, and do not listen. One in ten is to store.
	role := func(i int) record.Role {
		if i%10 == 0 {
			return record.RoleStore
		}
		return record.RoleClient
	}
	machine := func(i int) Config {
		c := n1.cfg
		c.Dir = filepath.Join(t.TempDir(), fmt.Sprint(i))
		c.Addr, c.Hostname, c.Role = fmt.Sprintf("127.0.0.2:%d", 10000+i), fmt.Sprintf("m%d", i), role(i)
		return c
	}
	type outcome struct {
		cfg Config
		err error
	}
	all := func(from, n int, tok string) []outcome {
		out := make([]outcome, n)
		begin := make(chan struct{})
		var wg sync.WaitGroup
		for i := range n {
			out[i].cfg = machine(from + i)
			wg.Go(func() {
				<-begin
				for try := 0; ; try++ { // the door takes so many strangers from one address at a time, and says so by closing
					err := Join(ctx, out[i].cfg, nodes[(i+try)%3].cfg.Addr, tok)
					out[i].err = err
					if !errs.Has(err, errs.Unavailable) && !errs.Has(err, errs.Timeout) && !errs.Has(err, errs.Busy) || ctx.Err() != nil {
						return
					}
					pause(ctx, 20*time.Millisecond)
				}
			})
		}
		close(begin)
		wg.Wait()
		return out
	}
	began := time.Now()
	seen := map[ids.Node]int{}
	for i, o := range all(0, many, tok) {
		if o.err != nil {
			t.Fatalf("machine %d: %v", i, o.err)
		}
		d, err := o.cfg.loadFile()
		if err != nil {
			t.Fatal(err)
		}
		if was, twice := seen[d.Node]; twice {
			t.Fatalf("m%d and m%d are both %v", was, i, d.Node)
		}
		seen[d.Node] = i
	}
	took := time.Since(began)
	if _, err := n2.record.info(ctx); err != nil {
		t.Fatal(err)
	}
	known := map[ids.Node]record.Member{}
	for _, m := range n2.current() {
		known[m.ID] = m
	}
	if len(known) != 3+many {
		t.Errorf("%d members, want %d", len(known), 3+many)
	}
	for id, i := range seen {
		if m := known[id]; m.Hostname != fmt.Sprintf("m%d", i) || m.Role != role(i) {
			t.Errorf("m%d became %v; the record says %+v", i, id, m)
		}
	}
	// The token is used up: for others, not for those who have joined by it.
	late := machine(many)
	if err := Join(ctx, late, n3.cfg.Addr, tok); !errs.Has(err, errs.Unauthorized) || !strings.Contains(err.Error(), "used up") {
		t.Errorf("one more: %v", err)
	}
	// Thirty for seven uses: seven get in.
	in, out := 0, 0
	for i, o := range all(many+1, 30, few) {
		switch {
		case o.err == nil:
			in++
		case errs.Has(o.err, errs.Unauthorized) && strings.Contains(o.err.Error(), "used up"):
			out++
			if _, err := os.Stat(o.cfg.Dir); !errors.Is(err, os.ErrNotExist) {
				t.Errorf("machine %d was refused and has a directory: %v", i, err)
			}
		default:
			t.Errorf("machine %d: %v", i, o.err)
		}
	}
	if in != 7 || out != 23 {
		t.Errorf("%d of 7 got in, %d of 23 were refused", in, out)
	}
	t.Logf("%d joins at once in %v", many, took)

	// Nine at once with one key are one node.
	again := machine(many + 51)
	one, err := n1.token(asRoot(ctx, n1), 2, 0, record.RoleClient)
	if err != nil {
		t.Fatal(err)
	}
	if err := Join(ctx, again, n1.cfg.Addr, one); err != nil {
		t.Fatal(err)
	}
	first, err := again.loadFile()
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	for i := range 9 {
		c := machine(many + 61 + i)
		if err := os.MkdirAll(c.path(dirIdentity), 0o700); err != nil {
			t.Fatal(err)
		}
		for _, f := range []string{fileKey, fileCSR} { // the answer was lost
			b, err := os.ReadFile(again.path(f))
			if err == nil {
				err = os.WriteFile(c.path(f), b, 0o600)
			}
			if err != nil {
				t.Fatal(err)
			}
		}
		wg.Go(func() {
			if err := Join(ctx, c, nodes[i%3].cfg.Addr, one); err != nil {
				t.Errorf("with the same key: %v", err)
				return
			}
			if d, err := c.loadFile(); err != nil || d.Node != first.Node {
				t.Errorf("the same key is %v, was %v (%v)", d.Node, first.Node, err)
			}
		})
	}
	wg.Wait()
	ts, err := n1.record.view().Tokens()
	if err != nil || !slices.ContainsFunc(ts, func(x record.Token) bool { return x.Uses == 1 && x.Role == record.RoleClient }) {
		t.Errorf("the token for two was used more than once by one: %+v, %v", ts, err)
	}
}

// Nodes of two clusters that are told to join each other say no, in both
// directions, and nothing changes; nor does a node that takes another cluster's
// for its peer.
func TestTwoClusters(t *testing.T) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	a, cfgA := founded(t)
	b, cfgB := founded(t)
	tokA, err := a.token(asRoot(ctx, a), 5, 0, 0)
	if err != nil {
		t.Fatal(err)
	}
	tokB, err := b.token(asRoot(ctx, b), 5, 0, 0)
	if err != nil {
		t.Fatal(err)
	}
	for _, n := range []*Node{a, b} {
		await(t, "founding is over", func() bool {
			d, err := n.cfg.loadFile()
			return err == nil && !d.Founding
		})
	}
	before := [2]uint64{a.rec.Status().Applied, b.rec.Status().Applied}
	files := func(dir string) map[string]string {
		out := map[string]string{}
		for _, f := range []string{fileNode, fileCA, fileCAKey, fileCert, fileKey, fileCSR, fileVolume} {
			b, err := os.ReadFile(filepath.Join(dir, f))
			if err != nil {
				t.Fatal(err)
			}
			out[f] = string(b)
		}
		return out
	}
	was := [2]map[string]string{files(cfgA.Dir), files(cfgB.Dir)}
	for _, v := range []struct {
		what    string
		cfg     Config
		to, tok string
		class   errs.Class
		words   string
	}{
		{"A joins B", cfgA, cfgB.Addr, tokB, errs.Exists, "another cluster"},
		{"B joins A", cfgB, cfgA.Addr, tokA, errs.Exists, "another cluster"},
		{"A joins B, with repair", func() Config { c := cfgA; c.Repair = true; return c }(), cfgB.Addr, tokB, errs.Busy, "in use"},
		{"a machine, A's token, B's address", config(t), cfgB.Addr, tokA, errs.Unauthorized, "unum token"},
		{"a machine, B's token, A's address", config(t), cfgA.Addr, tokB, errs.Unauthorized, "unum token"},
	} {
		if err := Join(ctx, v.cfg, v.to, v.tok); !errs.Has(err, v.class) || !strings.Contains(err.Error(), v.words) || !strings.Contains(err.Error(), "\ntry: ") {
			t.Errorf("%s: %v", v.what, err)
		}
		if _, err := os.Stat(v.cfg.Dir); v.class == errs.Unauthorized && !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s: the refused machine has a directory: %v", v.what, err)
		}
	}
	for i, n := range []*Node{a, b} {
		if ms := n.current(); len(ms) != 1 {
			t.Errorf("members: %+v", ms)
		}
		if now := n.rec.Status().Applied; now != before[i] {
			t.Errorf("%d entries were written", now-before[i])
		}
	}
	for i, c := range []Config{cfgA, cfgB} {
		for f, now := range files(c.Dir) {
			if now != was[i][f] {
				t.Errorf("%s has changed", f)
			}
		}
	}
}

// A node that left, and lost its power before it had forgotten, is refused by all
// the others; saying it again makes an end of it. One that was put out is told so,
// and keeps what it has.
func TestLeaveIsSaidAgain(t *testing.T) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	n1, _ := founded(t)
	n2, cfg2, _ := join(t, ctx, n1, record.RoleStore)
	n3, _, _ := join(t, ctx, n1, record.RoleStore)
	voters(t, n1, 1, 2, 3)
	n4, cfg4, _ := join(t, ctx, n1, record.RoleStore) // has no vote
	for _, n := range []*Node{n1, n2, n3, n4} {
		settled(t, n, 4)
	}
	for _, u := range []record.UpdateMember{{Node: 4, State: record.Removed}, {Node: 2, State: record.Leaving}, {Node: 2, State: record.Left}} {
		if _, err := n1.record.do(ctx, record.Command{Who: principal.Principal{Node: n1.id}, UpdateMember: &u}); err != nil {
			t.Fatal(err)
		}
	}
	voters(t, n1, 1, 3)
	var said []string
	await(t, "n2 has left, for itself too", func() bool {
		lctx, cancel := context.WithTimeout(ctx, 2*time.Second)
		defer cancel()
		err := n2.Leave(lctx, func(s string) { said = append(said, s) })
		return err == nil
	})
	if !strings.Contains(fmt.Sprint(said), "has left already") {
		t.Errorf("it said %q", said)
	}
	await(t, "nothing is left of it", func() bool {
		m, err := filepath.Glob(filepath.Join(cfg2.Dir, "*"))
		return err == nil && !slices.ContainsFunc(m, func(f string) bool { return filepath.Base(f) != "sock" })
	})
	var err error
	await(t, "n4 is told that it was put out", func() bool {
		lctx, cancel := context.WithTimeout(ctx, 2*time.Second)
		defer cancel()
		err = n4.Leave(lctx, func(string) {})
		return errs.Has(err, errs.Unauthorized) && strings.Contains(err.Error(), "it has been removed from the cluster")
	})
	if _, err := os.Stat(cfg4.path(fileNode)); err != nil {
		t.Error(err)
	}
}
