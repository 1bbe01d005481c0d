package node

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/unum-os/unum/internal/disk"
	"github.com/unum-os/unum/internal/errs"
	"github.com/unum-os/unum/internal/identity"
	"github.com/unum-os/unum/internal/record"
)

// onDisk is for a node on the disk d, whose groups elect quickly.
func onDisk(t *testing.T, d disk.FS) Config {
	cfg := config(t)
	cfg.FS, cfg.tick = d, 12*time.Millisecond
	return cfg
}

// newDisk is small, so that the ballast on it is.
func newDisk() *disk.Mem {
	m := disk.NewMem()
	m.SetSize(16 << 20)
	return m
}

// engineDir spares the engine's directories, whose failing sync ends the process:
// what then is on the disk is tried by crashes.
func engineDir(k disk.Kind, path string) bool {
	return k == disk.OpSyncDir && (strings.Contains(path, "raftlog") || strings.Contains(path, "state"))
}

// faulty spares the engine's files until the node is open: an engine that cannot
// open its database may end the process (its own goroutines use what it has let
// go of), which crashes stand for too.
type faulty struct {
	*disk.Failing
	open atomic.Bool
}

func newFaulty(m *disk.Mem, f disk.Fault, fresh bool) *faulty {
	w := &faulty{}
	w.open.Store(fresh) // new databases have no tables yet
	f.Spare = func(k disk.Kind, path string) bool {
		return engineDir(k, path) || !w.open.Load() && strings.Contains(path, "/groups/")
	}
	w.Failing = disk.NewFailing(m, f)
	return w
}

// life runs of a node what needs no root, calls f once the record can be written,
// and stops it. The first error counts.
func life(cfg Config, f func(ctx context.Context, n *Node) error) error {
	n, err := Open(cfg)
	if err != nil {
		return err
	}
	if w, ok := cfg.FS.(*faulty); ok {
		w.open.Store(true)
	}
	n.refreshMembers()
	n.end = func(error) {}
	ctx, cancel := context.WithTimeoutCause(context.Background(), time.Minute, errs.E(errs.Timeout, "live", cfg.Dir, "it took too long"))
	defer cancel()
	ctx, fail := context.WithCancelCause(ctx)
	defer fail(nil)
	var undo []func()
	for _, p := range n.parts() {
		switch p.name {
		case "tree", "manager", "control", "load", "vice", "venus", "blocks": // these write nothing that is looked at here
			continue
		}
		pctx, stop := context.WithCancel(context.Background())
		var wg sync.WaitGroup
		wg.Go(func() {
			if err := p.run(pctx); err != nil {
				fail(err)
			}
		})
		undo = append(undo, func() { stop(); wg.Wait() })
	}
	_, err = n.record.info(ctx)
	for err != nil && ctx.Err() == nil { // no leader yet, or the record is not written yet
		pause(ctx, 5*time.Millisecond)
		_, err = n.record.info(ctx)
	}
	if err == nil {
		err = f(ctx, n)
	}
	if ctx.Err() != nil {
		err = context.Cause(ctx)
	}
	for _, f := range slices.Backward(undo) {
		f()
	}
	if err == nil && ctx.Err() != nil { // the last write of all
		err = context.Cause(ctx)
	}
	return errors.Join(err, n.close())
}

// opens checks that what is on the disk is a node, whole.
func opens(t *testing.T, cfg Config, what string) {
	t.Helper()
	n, err := Open(cfg)
	if err != nil {
		t.Fatalf("%s: %v", what, err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if err := errors.Join(n.ep.Run(ctx), n.close()); err != nil {
		t.Fatalf("%s: %v", what, err)
	}
}

// hasTokens is for life: it checks that the record knows all those tokens.
func hasTokens(toks []record.TokenID) func(context.Context, *Node) error {
	return func(_ context.Context, n *Node) error {
		have, err := n.record.view().Tokens()
		if err != nil {
			return err
		}
		for i, id := range toks {
			if !slices.ContainsFunc(have, func(k record.Token) bool { return k.ID == id }) {
				return fmt.Errorf("token %d of %d, which was acknowledged, is not in the record", i+1, len(toks))
			}
		}
		return nil
	}
}

// story is something that is done to a directory and may be cut off.
type story struct {
	name string
	// do does it; dead says that what comes after is not seen by anybody.
	do func(t *testing.T, cfg Config, dead *atomic.Bool) (acked []record.TokenID, err error)
	// again brings it to its end after a crash that left no node.
	again func(cfg Config) error
	prime func(t *testing.T, cfg Config) // what comes before, on a disk that does not fail
	step  int64                          // of the places tried, one in so many
}

func stories(t *testing.T) []*story {
	host, hcfg := founded(t)
	tokens := map[string]string{} // of each joiner's address
	join := func(cfg Config) error {
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		return Join(ctx, cfg, hcfg.Addr, tokens[cfg.Addr])
	}
	return []*story{
		{name: "up", step: 3, again: Found, do: func(_ *testing.T, cfg Config, _ *atomic.Bool) ([]record.TokenID, error) {
			return nil, Found(cfg)
		}},
		{name: "join", step: 3, again: join, do: func(_ *testing.T, cfg Config, _ *atomic.Bool) ([]record.TokenID, error) {
			return nil, join(cfg)
		}, prime: func(t *testing.T, cfg Config) {
			tok, err := host.token(asRoot(t.Context(), host), 0, 0, 0) // for one use
			if err != nil {
				t.Fatal(err)
			}
			tokens[cfg.Addr] = tok
		}},
		// The first start writes the record as well.
		{name: "first start", step: 4, do: twoTokens, prime: func(t *testing.T, cfg Config) {
			if err := Found(cfg); err != nil {
				t.Fatal(err)
			}
		}},
		{name: "restart", step: 4, do: twoTokens, prime: func(t *testing.T, cfg Config) {
			if err := Found(cfg); err != nil {
				t.Fatal(err)
			}
			if _, err := twoTokens(t, cfg, &atomic.Bool{}); err != nil {
				t.Fatal(err)
			}
		}},
	}
}

// twoTokens starts the node, has two tokens made, and stops it.
func twoTokens(_ *testing.T, cfg Config, dead *atomic.Bool) (acked []record.TokenID, err error) {
	return acked, life(cfg, func(ctx context.Context, n *Node) error {
		for range 2 {
			r, err := n.token(asRoot(ctx, n), 0, 0, 0)
			if err != nil {
				return err
			}
			tok, err := identity.ParseToken(r)
			if err != nil {
				return err
			}
			if !dead.Load() {
				acked = append(acked, record.TokenID(tok.ID()))
			}
		}
		return nil
	})
}

// recovers checks, twice, that the disk holds a node or none, that it becomes one,
// and that what was acknowledged is there. Every so often the node is run.
func recovers(t *testing.T, s *story, cfg Config, d *disk.Mem, acked []record.TokenID, seed uint64, what string) {
	t.Helper()
	for i := range uint64(2) {
		cfg.FS = d
		is, err := cfg.has(fileNode)
		if err != nil {
			t.Fatalf("%s: %v", what, err)
		}
		if !is {
			if s.again == nil || i > 0 {
				t.Fatalf("%s: the node is gone", what)
			}
			if err := s.again(cfg); err != nil {
				t.Fatalf("%s: said again: %v", what, err)
			}
		}
		if s.again == nil || s.name == "up" && seed%20 == 0 {
			if err := life(cfg, hasTokens(acked)); err != nil {
				t.Fatalf("%s: %v", what, err)
			}
		} else {
			opens(t, cfg, what)
		}
		d = d.Crash(seed*3 + i)
	}
}

// stride is of how many places one is tried: each, with UNUM_TORTURE set.
func stride(n int64) int64 {
	switch {
	case os.Getenv("UNUM_TORTURE") != "":
		return 1
	case testing.Short():
		return 7 * n
	}
	return n
}

// The power fails at each change that each story makes on the disk.
func TestCrashAtEveryChange(t *testing.T) {
	for _, s := range stories(t) {
		t.Run(s.name, func(t *testing.T) {
			step := stride(s.step)
			crashes, acks := 0, 0
			for k := int64(1); ; k += step {
				m := newDisk()
				cfg := onDisk(t, m)
				if s.prime != nil {
					s.prime(t, cfg)
				}
				var dead atomic.Bool
				var after *disk.Mem
				fault := disk.Fault{At: k, Do: func() { dead.Store(true); after = m.Crash(uint64(k)) }}
				if s.name == "join" { // what has lost its power spends no token
					fault.Err, fault.Spare = syscall.EIO, engineDir
				}
				w := disk.NewFailing(m, fault)
				cfg.FS = w
				acked, err := s.do(t, cfg, &dead)
				what := fmt.Sprintf("crash at change %d, %s", k, w.Fired())
				if err != nil && (fault.Err == nil || after == nil) {
					t.Fatalf("%s: %v", what, err)
				}
				if after == nil {
					t.Logf("%d changes, %d crashes, %d tokens acknowledged before", w.Count(), crashes, acks)
					recovers(t, s, cfg, m.Clone(), acked, uint64(k), "undisturbed")
					break
				}
				crashes++
				acks += len(acked)
				recovers(t, s, cfg, after, acked, uint64(k), what)
			}
			if crashes < 10 || s.again == nil && acks == 0 {
				t.Errorf("%d crashes, %d tokens", crashes, acks)
			}
		})
	}
}

// Each change fails, once or from then on: whatever was acknowledged is there,
// and the node or the directory is as good as before.
func TestFailEveryChange(t *testing.T) {
	for _, s := range stories(t) {
		t.Run(s.name, func(t *testing.T) {
			step := stride(s.step + 1)
			if s.prime != nil && s.again == nil { // a running node has few
				step = stride(1)
			}
			failures, noticed := 0, 0
			for k := int64(1); ; k += step {
				fail, once := syscall.EIO, k/step%2 == 0
				if k/step%4 < 2 {
					fail = syscall.ENOSPC
				}
				m := newDisk()
				cfg := onDisk(t, m)
				if s.prime != nil {
					s.prime(t, cfg)
				}
				w := newFaulty(m, disk.Fault{At: k, Once: once, Err: fail}, s.again != nil)
				cfg.FS = w
				acked, err := s.do(t, cfg, &atomic.Bool{})
				what := fmt.Sprintf("%v at change %d (once: %v), %s", fail, k, once, w.Fired())
				if w.Fired() == "" {
					if err != nil {
						t.Fatal(err)
					}
					t.Logf("%d changes, %d failures, %d noticed", w.Count(), failures, noticed)
					break
				}
				failures++
				if err != nil {
					noticed++
					if c := errs.ClassOf(err); c != errs.IO && c != errs.NoSpace {
						t.Fatalf("%s: class %v: %v", what, c, err)
					}
				}
				if s.name != "join" || k/step%3 == 0 { // a token is good for one recovery
					recovers(t, s, cfg, m.Clone(), acked, uint64(k), what+", killed")
				}
				if s.name != "join" || k/step%3 != 0 {
					recovers(t, s, cfg, m.Crash(uint64(k)), acked, uint64(k), what+", crash")
				}
			}
			if failures < 5 || noticed == 0 {
				t.Errorf("%d failures, %d noticed", failures, noticed)
			}
		})
	}
}
