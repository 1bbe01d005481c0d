package test

import (
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/unum-os/unum/internal/errs"
)

// recRest is the pause of a writer between two writes.
const recRest = 5 * time.Millisecond

func init() { workers["record-write"] = recWriteWorker }

// recWriteWorker puts ever new values on keys of its own, each only if the last
// is there, and writes a file, until its standard input ends.
func recWriteWorker(args []string) int {
	l := &recLoad{stop: make(chan struct{})}
	f := flag.NewFlagSet("record-write", flag.ExitOnError)
	f.IntVar(&l.first, "first", 0, "number of the first client")
	file := f.String("file", "", "file to write")
	if err := f.Parse(args); err != nil {
		return 2
	}
	go func() {
		io.Copy(io.Discard, os.Stdin)
		close(l.stop)
	}()
	var wg sync.WaitGroup
	for i := range recClients {
		wg.Go(func() { l.writer(l.first + i) })
	}
	wg.Go(func() { l.file(*file) })
	wg.Wait()
	return 0
}

// writer puts, and after an unknown outcome looks what is there.
func (l *recLoad) writer(id int) {
	var d recDaemon
	key, mod, sure := fmt.Sprintf("user/0/written/w%d", id), uint64(0), true
	for n := 1; l.pause(recRest); n++ {
		op := recOp{Client: id, N: n, Key: key, Kind: recPut, Value: uint64(n), Expect: &mod}
		if !sure {
			op.Kind, op.Value, op.Expect = recGet, 0, nil
		}
		op.do(&d, recPatience, false)
		if sure = op.ended() && op.Class == errs.Unknown; sure {
			mod = op.Mod
		}
	}
}

// file writes and syncs a file again and again.
func (l *recLoad) file(path string) {
	for n := 1; l.pause(10 * recRest); n++ {
		op := recOp{Client: l.first, N: n, Key: path, Call: linNow()}
		err := linPut(path, uint64(n), true)
		if op.Return = linNow(); err != nil {
			op.Class, op.Text = errs.IO, err.Error()
		}
		recLine{File: &op}.print()
	}
}

// recGap returns the longest time without an end of an operation after from, up
// to the first that began after dead; 0 and false if there is none yet.
func recGap(ops []recOp, from, dead int64) (time.Duration, bool) {
	ends := []int64{from}
	to := int64(never)
	for i := range ops {
		if op := &ops[i]; op.Class == errs.Unknown && op.Return > from {
			ends = append(ends, op.Return)
			if op.Call > dead {
				to = min(to, op.Return)
			}
		}
	}
	slices.Sort(ends)
	var gap int64
	for i := 1; i < len(ends) && ends[i] <= to; i++ {
		gap = max(gap, ends[i]-ends[i-1])
	}
	return time.Duration(gap), to != never
}

// TestTwoAndAWitness takes the power from each of two storing nodes and a witness
// again and again, under load: the others go on soon, and nothing that was
// acknowledged is missing.
func TestTwoAndAWitness(t *testing.T) {
	// A survivor waits for an election, 1 to 2 s; a loaded machine for longer.
	times, limit := 2, time.Minute
	if torture() {
		times, limit = 20, 3*time.Second
	} else {
		t.Parallel()
	}
	rng := rand.New(rand.NewPCG(seed(t), 6))
	c := up(t, 2, "--witness")
	nodes, storing := []string{"n1", "n2", "n3"}, []string{"n1", "n2"}
	rec := newRecorder(t)
	load := map[string]*recProcess{}
	work := func(n string) {
		load[n] = rec.start(c, n, "record-write", "-file", "/unum/written-"+n)
	}
	for _, n := range storing {
		work(n)
	}
	// gaps returns how long the writers of a node, and its file, waited over a
	// death, when each of them has written since.
	gaps := func(p *recProcess, from, dead int64) (record, file time.Duration, ok bool) {
		rec.mu.Lock()
		defer rec.mu.Unlock()
		mine := func(ops []recOp) (out []recOp) {
			for i := len(ops) - 1; i >= 0 && ops[i].Return > from-int64(linHang); i-- {
				if c := ops[i].Client; c >= p.first && c < p.first+recClients && ops[i].Kind != recGet {
					out = append(out, ops[i])
				}
			}
			return out
		}
		puts := mine(rec.ops)
		record, ok = recGap(puts, from, dead)
		file, written := recGap(mine(rec.files), from, dead)
		for i := range recClients {
			ok = ok && rec.latest[p.first+i] > dead
		}
		return record, file, ok && written
	}
	worst, worstFile := map[string]time.Duration{}, map[string]time.Duration{}
	var victims []string
	for range times {
		for _, i := range rng.Perm(len(nodes)) {
			victims = append(victims, nodes[i])
		}
	}
	for i, v := range victims {
		await(t, "all nodes are healthy", recMends, c.healthy)
		now := linNow()
		for _, n := range storing {
			await(t, n+" writes", recMends, func() bool { _, _, ok := gaps(load[n], now, now); return ok })
		}
		time.Sleep(time.Duration(rng.Int64N(int64(time.Second)))) // a moment by chance
		from := linNow()
		rec.kill(c, v)
		dead := linNow()
		for _, n := range storing {
			if n == v {
				await(t, "the worker of "+n+" is gone", time.Minute, load[n].ended)
				continue
			}
			var record, file time.Duration
			await(t, n+" writes while "+v+" is dead", recMends, func() (ok bool) { record, file, ok = gaps(load[n], from, dead); return ok })
			t.Logf("death %d: %s; no put of %s was acknowledged for %.2f s, no file written for %.2f s", i+1, v, n, record.Seconds(), file.Seconds())
			worst[v], worstFile[v] = max(worst[v], record), max(worstFile[v], file)
			if record > limit {
				t.Errorf("%s died, and no put of %s was acknowledged for %.2f s; limit %v", v, n, record.Seconds(), limit)
			}
		}
		c.lab("start", v)
		if v != "n3" {
			work(v)
		}
	}
	for _, n := range storing {
		if err := load[n].stop(); err != nil {
			t.Error(err)
		}
	}
	h := rec.history()
	rec.complain(h)
	h = append(h, recReadAll(t, c, storing, h)...)
	for _, v := range nodes {
		t.Logf("%s died %d times; worst: %.2f s without a put, %.2f s without a file", v, times, worst[v].Seconds(), worstFile[v].Seconds())
	}
	h.judge(t)
	recAgree(t, c, storing)
}
