package group

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/cockroachdb/pebble/v2"
	"github.com/cockroachdb/pebble/v2/vfs"
	"golang.org/x/sys/unix"

	"github.com/unum-os/unum/internal/ids"
)

var testContext = context.Background()

// putter is a machine that stores the command under its index.
type putter struct{}

func (putter) Apply(b *pebble.Batch, s Space, index uint64, cmd []byte) any {
	if err := b.Set(s.Key(cmd[:8]), cmd, nil); err != nil {
		panic(err)
	}
	return nil
}
func (putter) Applied(uint64) {}

// benchHosts starts three hosts on the real disk with so many groups of three.
func benchHosts(b *testing.B, groups int) []*node {
	n := newNetwork()
	var out []*node
	for id := ids.Node(1); id <= 3; id++ {
		dead := &atomic.Bool{}
		cfg := config(n, id, vfs.Default, dead)
		cfg.Dir, cfg.Tick, cfg.LogBytes = b.TempDir(), 0, 0
		h, err := New(cfg)
		if err != nil {
			b.Fatal(err)
		}
		for g := ids.Group(1); g <= ids.Group(groups); g++ {
			if err := h.Bootstrap(g, []ids.Node{1, 2, 3}); err != nil {
				b.Fatal(err)
			}
			if _, err := h.Open(g, putter{}); err != nil {
				b.Fatal(err)
			}
		}
		nd := &node{t: b, id: id, h: h, dead: dead, ran: make(chan error, 1), net: n}
		out = append(out, nd)
		n.hosts[id] = h
	}
	for _, nd := range out {
		var ctx context.Context
		ctx, nd.cancel = context.WithCancel(context.Background())
		go func() { nd.ran <- nd.h.Run(ctx) }()
		b.Cleanup(func() { nd.stop() })
	}
	for g := ids.Group(1); g <= ids.Group(groups); g++ {
		for _, nd := range out {
			if err := nd.h.Group(g).wait(testCtx(b), "lead", func(st Status) bool { return st.Leader != 0 }); err != nil {
				b.Fatal(err)
			}
		}
	}
	return out
}

func cpu(b *testing.B) time.Duration {
	var r unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &r); err != nil {
		b.Fatal(err)
	}
	return time.Duration(r.Utime.Nano() + r.Stime.Nano())
}

// BenchmarkIdle50 measures the processor time of a node with 50 idle groups:
// percent of one core, for each of three nodes. One op is a second.
func BenchmarkIdle50(b *testing.B) {
	benchHosts(b, 50)
	from := cpu(b)
	b.ResetTimer()
	for b.Loop() {
		<-time.After(time.Second)
	}
	b.ReportMetric(100*float64(cpu(b)-from)/float64(b.Elapsed())/3, "%core/node")
}

func benchPropose(b *testing.B, proposers int) {
	nodes := benchHosts(b, 1)
	l, _ := nodes[0].h.Group(1).Leader()
	g := nodes[l-1].h.Group(1)
	var left atomic.Int64
	left.Store(int64(b.N))
	b.ResetTimer()
	var wg sync.WaitGroup
	for k := range proposers {
		wg.Add(1)
		go func() {
			defer wg.Done()
			cmd := make([]byte, 200)
			for i := 0; left.Add(-1) >= 0; i++ {
				cmd[0], cmd[1], cmd[2], cmd[3] = byte(k), byte(i), byte(i>>8), byte(i>>16)
				if _, _, err := g.Propose(testContext, cmd); err != nil {
					b.Error(err)
					return
				}
			}
		}()
	}
	wg.Wait()
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "proposals/s")
}

// BenchmarkPropose256 proposes 200 bytes at a time to a group of three, all on
// this machine's disk.
func BenchmarkPropose256(b *testing.B) { benchPropose(b, 256) }

// BenchmarkPropose1 is the same with one proposer.
func BenchmarkPropose1(b *testing.B) { benchPropose(b, 1) }

// BenchmarkReadIndex64 asks for read barriers at the leader.
func BenchmarkReadIndex64(b *testing.B) {
	nodes := benchHosts(b, 1)
	l, _ := nodes[0].h.Group(1).Leader()
	g := nodes[l-1].h.Group(1)
	b.SetParallelism(32)
	b.ResetTimer()
	b.RunParallel(func(p *testing.PB) {
		for p.Next() {
			if _, err := g.ReadIndex(testContext); err != nil {
				b.Error(err)
				return
			}
		}
	})
}

// The leader of two nodes and a witness dies: milliseconds to the next
// acknowledgement by the other node, with the default tick.
func BenchmarkWitnessTakeover(b *testing.B) {
	n, nodes := withWitness(b, func(c *Config) { c.Tick = DefaultTick })
	var took []float64
	for r := range b.N {
		put(b, nodes[:2], fmt.Sprint(r, "before"), 3, 100)
		i := int(leader(b, nodes[:2]).id) - 1
		fs := nodes[i].crash()
		began := time.Now()
		put(b, nodes[1-i:2-i], fmt.Sprint(r, "after"), 1, 100)
		took = append(took, float64(time.Since(began).Milliseconds()))
		nodes[i] = start(b, n, nodes[i].id, fs, func(h *Host) { open(b, h) })
		caught(b, nodes[i], nodes[1-i].h.Group(tg).Status().Commit)
	}
	slices.Sort(took)
	b.ReportMetric(took[len(took)/2], "p50-ms")
	b.ReportMetric(took[len(took)-1], "max-ms")
}
