package test

import (
	"cmp"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/anishathalye/porcupine"

	"github.com/unum-os/unum/internal/errs"
)

// recUnseen stands for the revision of a write whose caller did not learn of its
// outcome, and that nobody has seen.
const recUnseen = ^uint64(0)

// recHistory is what the clients of a run saw.
type recHistory []recOp

// ended reports whether the outcome of an operation is known: it was done, or the
// record itself refused it for what it found.
func (op *recOp) ended() bool {
	switch {
	case op.Return == 0:
		return false
	case op.Class == errs.Unknown:
		return true
	case op.Kind == recGet:
		return false
	case op.Class == errs.NotFound:
		return op.Kind == recDelete || op.Expect != nil && *op.Expect != 0
	case op.Class == errs.Exists:
		return op.Expect != nil && *op.Expect == 0
	case op.Class == errs.Stale:
		return op.Expect != nil && *op.Expect != 0
	}
	return false
}

// counts returns the number of operations with a known outcome, and of those
// during which another client did one on the same key.
func (h recHistory) counts() (all, overlapping int) {
	keys := map[string][]*recOp{}
	for i := range h {
		if op := &h[i]; op.ended() {
			all++
			keys[op.Key] = append(keys[op.Key], op)
		}
	}
	met := map[*recOp]bool{}
	for _, ops := range keys {
		slices.SortFunc(ops, func(a, b *recOp) int { return cmp.Compare(a.Call, b.Call) })
		for i, a := range ops {
			for _, b := range ops[i+1:] {
				if b.Call > a.Return {
					break
				}
				met[a], met[b] = true, true
			}
		}
	}
	return all, len(met)
}

// recInput is an operation as the model takes it: one that was done or refused,
// and how many writes and deletions had begun when it ended of which nobody
// learned whether they were done.
type recInput struct {
	recOp
	puts, deletes int
}

// recState is a key: what it holds, and the last revision at which it was
// written. Version is the least that it can be.
type recState struct {
	value, mod, version uint64 // all 0: there is no such key
	last                uint64
	puts, deletes       int // done that nobody learned of
}

// rewrite has a write be done whose caller did not learn of it.
func (s *recState) rewrite(in *recInput) bool {
	s.value, s.mod, s.version = recUnseen, recUnseen, s.version+1
	s.puts++
	return s.puts <= in.puts
}

// vanish has a deletion be done whose caller did not learn of it.
func (s *recState) vanish(in *recInput) bool {
	s.value, s.mod, s.version = 0, 0, 0
	s.deletes++
	return s.deletes <= in.deletes
}

// recModel is a key that does not exist at first. Besides the values it asks that
// each write has a later revision than those before it, and that nothing was
// written more often than it was asked for. What nobody learned of, and nobody
// saw, was done where there is no other explanation: trying all places of each
// would take for ever when power was lost under many.
var recModel = porcupine.Model{
	Init: func() any { return recState{} },
	Step: func(state, input, _ any) (bool, any) {
		s, in := state.(recState), input.(recInput)
		ok := s.step(&in)
		return ok, s
	},
	DescribeOperation: func(in, _ any) string { return in.(recInput).String() },
}

func (s *recState) step(in *recInput) bool {
	if in.Kind == recGet {
		return s.read(in)
	}
	there := s.mod != 0
	switch in.Class {
	case errs.NotFound:
		return !there || s.vanish(in)
	case errs.Exists:
		return there || s.rewrite(in)
	case errs.Stale:
		return there && *in.Expect != s.mod || s.rewrite(in)
	}
	switch {
	case in.Expect != nil && *in.Expect == 0 && there && !s.vanish(in),
		in.Expect != nil && *in.Expect != 0 && *in.Expect != s.mod:
		return false
	case in.Kind == recDelete:
		ok := there || s.rewrite(in)
		s.value, s.mod, s.version = 0, 0, 0
		return ok
	}
	s.value, s.mod, s.version = in.Value, in.Mod, s.version+1
	ok := in.Mod > s.last
	s.last = in.Mod
	return ok
}

func (s *recState) read(in *recInput) bool {
	switch {
	case in.Mod == 0:
		return s.mod == 0 || s.vanish(in)
	case in.Mod != s.mod || in.Value != s.value:
		return false
	case in.Version < s.version: // it was deleted before its last writing
		s.deletes++
	default: // it was written more often
		s.puts += int(in.Version - s.version)
	}
	s.version = in.Version
	return s.puts <= in.puts && s.deletes <= in.deletes
}

func (in recInput) String() string {
	result := fmt.Sprint("revision ", in.Mod)
	expect := ""
	if in.Expect != nil {
		expect = fmt.Sprintf(" expecting %d", *in.Expect)
	}
	switch {
	case in.Kind == recGet && in.Mod == 0:
		return "get: there is none"
	case in.Kind == recGet:
		return fmt.Sprintf("get: %#x, revision %d, version %d", in.Value, in.Mod, in.Version)
	case !in.ended():
		result += ", as was seen"
	case in.Class != errs.Unknown:
		result = in.Class.String()
	case in.Kind == recDelete:
		result = "done"
	}
	return fmt.Sprintf("%s %#x%s: %s", in.Kind, in.Value, expect, result)
}

// partitions returns the histories to be judged, one for each key. A write whose
// outcome is unknown and whose value was read was done between its call and that;
// one that nobody saw, and a deletion, may have been done at any time from its
// call on, or never.
func (h recHistory) partitions() map[string][]porcupine.Operation {
	keys := map[string][]*recOp{}
	for i := range h {
		if op := &h[i]; op.ended() || op.Kind != recGet {
			keys[op.Key] = append(keys[op.Key], op)
		}
	}
	parts := map[string][]porcupine.Operation{}
	for key, ops := range keys {
		seen := map[uint64]*recOp{} // by value: the first that read it
		for _, op := range ops {
			if was := seen[op.Value]; op.Kind == recGet && op.Mod != 0 && (was == nil || op.Return < was.Return) {
				seen[op.Value] = op
			}
		}
		var puts, deletes []int64 // calls of those that nobody saw
		var part []porcupine.Operation
		for _, op := range ops {
			in := recInput{recOp: *op}
			r := seen[op.Value]
			switch {
			case op.ended():
				part = append(part, porcupine.Operation{ClientId: op.Client, Input: in, Call: op.Call, Return: op.Return})
			case op.Kind == recDelete:
				deletes = append(deletes, op.Call)
			case r == nil:
				puts = append(puts, op.Call)
			default:
				in.Mod, in.Class, in.Return = r.Mod, errs.Unknown, 0
				part = append(part, porcupine.Operation{ClientId: op.Client, Input: in, Call: op.Call, Return: max(r.Return, op.Call)})
			}
		}
		slices.Sort(puts)
		slices.Sort(deletes)
		for i := range part {
			in := part[i].Input.(recInput)
			in.puts, _ = slices.BinarySearch(puts, part[i].Return)
			in.deletes, _ = slices.BinarySearch(deletes, part[i].Return)
			part[i].Input = in
		}
		parts[key] = part
	}
	return parts
}

// check judges all histories and returns the keys of those that no single copy
// could have given, and of those without a verdict.
func (h recHistory) check() (illegal, unknown []string) {
	var mu sync.Mutex
	var wg sync.WaitGroup
	room := make(chan struct{}, 2)
	for key, part := range h.partitions() {
		wg.Go(func() {
			room <- struct{}{}
			defer func() { <-room }()
			r := porcupine.CheckOperationsTimeout(recModel, part, linPatience)
			mu.Lock()
			defer mu.Unlock()
			switch r {
			case porcupine.Illegal:
				illegal = append(illegal, key)
			case porcupine.Unknown:
				unknown = append(unknown, key)
			}
		})
	}
	wg.Wait()
	slices.Sort(illegal)
	slices.Sort(unknown)
	return illegal, unknown
}

// rev is the revision that an operation has seen, 0 if it saw none.
func (op *recOp) rev() uint64 {
	if op.Return == 0 || op.Class != errs.Unknown {
		return 0
	}
	return max(op.Rev, op.Mod)
}

// revisions looks at all keys together: no operation may see a revision of the
// record older than one that was seen before it began, and no write may get one
// that was seen by then. It describes what does not hold.
func (h recHistory) revisions() (bad []string) {
	byCall, byReturn := []*recOp{}, []*recOp{}
	for i := range h {
		if op := &h[i]; op.rev() != 0 {
			byCall, byReturn = append(byCall, op), append(byReturn, op)
		}
	}
	slices.SortFunc(byCall, func(a, b *recOp) int { return cmp.Compare(a.Call, b.Call) })
	slices.SortFunc(byReturn, func(a, b *recOp) int { return cmp.Compare(a.Return, b.Return) })
	var newest *recOp
	n := 0
	for _, op := range byCall {
		for ; n < len(byReturn) && byReturn[n].Return < op.Call; n++ {
			if newest == nil || byReturn[n].rev() > newest.rev() {
				newest = byReturn[n]
			}
		}
		if newest != nil && (op.rev() < newest.rev() || op.Kind == recPut && op.Mod == newest.rev()) {
			bad = append(bad, fmt.Sprintf("client %d saw revision %d at %d; client %d began at %d and saw %d",
				newest.Client, newest.rev(), newest.Return, op.Client, op.Call, op.rev()))
		}
	}
	return bad
}

// judge checks a history, and keeps one that is refused in a file that outlives
// the test.
func (h recHistory) judge(t *testing.T) (all, overlapping int) {
	t.Helper()
	all, overlapping = h.counts()
	began := time.Now()
	illegal, unknown := h.check()
	bad := h.revisions()
	t.Logf("%d operations with a known outcome of %d, %d of them (%d %%) overlapped with another on their key; %d histories judged in %.1f s",
		all, len(h), overlapping, 100*overlapping/max(1, all), len(h.partitions()), time.Since(began).Seconds())
	if len(unknown) > 0 {
		t.Errorf("no verdict on %v", unknown)
	}
	for _, key := range illegal[:min(8, len(illegal))] {
		h.explain(t, key)
	}
	if len(illegal) > 0 {
		t.Errorf("not linearizable: %v", illegal)
	}
	if len(bad) > 0 {
		t.Errorf("%d times the record went back: %s", len(bad), strings.Join(bad[:min(8, len(bad))], "\n"))
	}
	if t.Failed() {
		if f, err := os.CreateTemp("", "unum-record-*.json"); err == nil {
			_ = json.NewEncoder(f).Encode(h)
			_ = f.Close()
			t.Log("the history is in ", f.Name())
		}
	}
	return all, overlapping
}

// explain logs what is left of an illegal history when all that returned after
// it became illegal is taken out, and what changed nothing.
func (h recHistory) explain(t *testing.T, key string) {
	t.Helper()
	part := h.partitions()[key]
	slices.SortFunc(part, func(a, b porcupine.Operation) int { return cmp.Compare(a.Return, b.Return) })
	// begin is the history as it was when n operations had returned: of what had
	// begun by then, each may have been done.
	begin := func(n int) []porcupine.Operation {
		ops := slices.Clone(part[:n])
		for i := range ops {
			in := ops[i].Input.(recInput)
			for _, op := range part[n:] {
				if kind := op.Input.(recInput).Kind; op.Call < ops[i].Return {
					in.puts += map[bool]int{true: 1}[kind == recPut]
					in.deletes += map[bool]int{true: 1}[kind == recDelete]
				}
			}
			ops[i].Input = in
		}
		for _, op := range part[n:] { // what was seen by then
			in := op.Input.(recInput)
			if in.Kind == recPut && in.Class == errs.Unknown && op.Call < part[n-1].Return {
				op.Return = never
				ops = append(ops, op)
			}
		}
		return ops
	}
	illegal := func(ops []porcupine.Operation) bool {
		return porcupine.CheckOperationsTimeout(recModel, ops, 2*time.Second) == porcupine.Illegal
	}
	lo, hi := 0, len(part)
	for hi-lo > 1 {
		if mid := (lo + hi) / 2; illegal(begin(mid)) {
			hi = mid
		} else {
			lo = mid
		}
	}
	ops := begin(hi)
	for i := len(ops) - 1; i >= 0; i-- {
		in := ops[i].Input.(recInput)
		idle := in.Kind == recGet || in.Class != errs.Unknown
		if less := slices.Delete(slices.Clone(ops), i, i+1); idle && len(less) > 0 && illegal(less) {
			ops = less
		}
	}
	slices.SortFunc(ops, func(a, b porcupine.Operation) int { return cmp.Compare(a.Call, b.Call) })
	var b strings.Builder
	for _, op := range ops[max(0, len(ops)-60):] {
		in := op.Input.(recInput)
		end := "?"
		if in.Return != 0 {
			end = fmt.Sprintf("%.6f", float64(in.Return-part[0].Call)/1e9)
		}
		fmt.Fprintf(&b, "  %.6f .. %s  client %d: %v\n", float64(op.Call-part[0].Call)/1e9, end, op.ClientId, in)
	}
	t.Logf("%s: no one order explains these %d of %d operations; seconds since %d:\n%s", key, len(ops), len(part), part[0].Call, b.String())
}

// recReal is a true record of one key with clients that overlap: each operation
// takes place at a moment between its call and its return.
func recReal(seed uint64, ops int) recHistory {
	rng := rand.New(rand.NewPCG(seed, 4))
	var h recHistory
	var s recState
	now := int64(0)
	free := [8]int64{} // by client: when it may begin
	known := uint64(0) // a revision that some client has seen
	for n := range ops {
		now += 1 + rng.Int64N(50)
		c := rng.IntN(len(free))
		op := recOp{Client: c, N: n, Key: "k", Call: max(free[c]+1, now-rng.Int64N(100)), Return: now + rng.Int64N(100), Value: uint64(n + 1)}
		free[c] = op.Return
		if op.Call >= now { // this client cannot have begun yet
			continue
		}
		op.Kind = []string{recGet, recGet, recPut, recPut, recDelete}[rng.IntN(5)]
		if rng.IntN(2) == 0 && op.Kind != recGet {
			x := known
			op.Expect = &x
		}
		switch {
		case op.Kind == recGet:
			op.Value, op.Mod, op.Version = s.value, s.mod, s.version
			op.Rev = max(s.last, 1)
			if s.mod == 0 {
				op.Rev = 0
			}
		case op.Expect != nil && *op.Expect == 0 && s.mod != 0:
			op.Class = errs.Exists
		case op.Expect != nil && *op.Expect != s.mod, op.Kind == recDelete && s.mod == 0:
			op.Class = errs.Stale
			if s.mod == 0 {
				op.Class = errs.NotFound
			}
		case op.Kind == recDelete:
			s = recState{last: s.last + 1}
		default:
			s = recState{value: op.Value, mod: s.last + 1, version: s.version + 1, last: s.last + 1}
			op.Mod = s.mod
		}
		if op.Kind != recGet && rng.IntN(20) == 0 { // it never learns
			op.Class, op.Mod = errs.Timeout, 0
		} else if op.Kind != recDelete && op.Class == errs.Unknown {
			known = op.Mod
		}
		h = append(h, op)
	}
	return h
}

// TestRecordCheck is the check's own: what one copy gives is accepted, with
// unknown outcomes among it; a stale read, a lost write, a write done twice and
// one done though it was refused are found.
func TestRecordCheck(t *testing.T) {
	t.Parallel()
	for seed := range uint64(20) {
		h := recReal(seed, 400)
		if illegal, unknown := h.check(); len(illegal)+len(unknown) > 0 {
			h.explain(t, "k")
			t.Fatalf("seed %d: a true history is refused: %v, %v", seed, illegal, unknown)
		}
		if bad := h.revisions(); len(bad) > 0 {
			t.Fatalf("seed %d: %v", seed, bad)
		}
	}
	one := uint64(1)
	put := func(at int64, value, mod uint64) recOp {
		return recOp{Key: "k", Kind: recPut, Value: value, Mod: mod, Call: at, Return: at + 5}
	}
	get := func(at int64, value, mod, version uint64) recOp {
		return recOp{Key: "k", Kind: recGet, Value: value, Mod: mod, Version: version, Rev: mod, Call: at, Return: at + 5}
	}
	unknown := put(25, 9, 0)
	unknown.Class = errs.Timeout
	refused := recOp{Key: "k", Kind: recPut, Value: 9, Expect: &one, Class: errs.Stale, Call: 25, Return: 28}
	stale := recOp{Key: "k", Kind: recPut, Value: 9, Expect: &one, Class: errs.Stale, Call: 15, Return: 18}
	for _, c := range []struct {
		name  string
		h     recHistory
		legal bool
	}{
		{"all is well", recHistory{put(10, 7, 1), put(20, 8, 2), get(30, 8, 2, 2)}, true},
		{"a stale read", recHistory{put(10, 7, 1), put(20, 8, 2), get(30, 7, 1, 1)}, false},
		{"a read that overlaps", recHistory{put(10, 7, 1), put(20, 8, 2), get(22, 7, 1, 1)}, true},
		{"a lost write", recHistory{put(10, 7, 1), put(20, 8, 2), get(30, 8, 2, 2), get(40, 7, 1, 1)}, false},
		{"a lost key", recHistory{put(10, 7, 1), {Key: "k", Kind: recGet, Call: 20, Return: 25}}, false},
		{"a write done twice", recHistory{put(10, 7, 1), put(20, 8, 3), get(30, 8, 3, 3)}, false},
		{"the same, but there was one more", recHistory{put(10, 7, 1), unknown, put(40, 8, 3), get(50, 8, 3, 3)}, true},
		{"an unknown outcome, done", recHistory{put(10, 7, 1), unknown, get(40, 9, 2, 2)}, true},
		{"an unknown outcome, not done", recHistory{put(10, 7, 1), unknown, get(40, 7, 1, 1)}, true},
		{"done, and undone", recHistory{put(10, 7, 1), unknown, get(40, 9, 2, 2), get(50, 7, 1, 1)}, false},
		{"refused with reason", recHistory{put(10, 7, 1), put(20, 8, 2), refused}, true},
		{"refused, and done", recHistory{put(10, 7, 1), put(20, 8, 2), refused, get(40, 9, 3, 3)}, false},
		{"refused without reason", recHistory{put(5, 7, 1), stale, put(20, 8, 2)}, false},
		{"a revision that goes back", recHistory{put(10, 7, 3), put(20, 8, 2)}, false},
	} {
		illegal, none := c.h.check()
		if len(none) > 0 || (len(illegal) == 0) != c.legal {
			t.Errorf("%s: illegal %v, no verdict on %v", c.name, illegal, none)
		}
	}
	other := put(20, 8, 1)
	other.Key = "l"
	if len(recHistory{put(10, 7, 1), other}.revisions()) == 0 {
		t.Error("two writes got one revision, and nobody noticed")
	}
	other = get(20, 8, 1, 1)
	other.Key = "l"
	if len(recHistory{put(10, 7, 2), other}.revisions()) == 0 {
		t.Error("a read of another key went back, and nobody noticed")
	}
}
