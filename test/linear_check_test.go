package test

import (
	"cmp"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/anishathalye/porcupine"
)

const (
	// linVolatile is how long after it returned a write without fsync may still
	// be lost with its node: 5 s by promise, and an election.
	linVolatile = 12 * time.Second
	// linPatience bounds the check of one history; a verdict that takes longer
	// is none. It takes milliseconds.
	linPatience = time.Minute
	never       = math.MaxInt64
)

// linRun is a worker of a run: one incarnation of a mount.
type linRun struct {
	mount  string
	killed int64 // linNow just before its node was killed, 0: it was not
}

// linHistory is what the clients of a run saw.
type linHistory struct {
	ops  []linOp
	runs []linRun // client c is of runs[c/linClients]
}

func (h *linHistory) run(op *linOp) *linRun { return &h.runs[op.Client/linClients] }

// ended reports whether the outcome of an operation is known.
func (op *linOp) ended() bool {
	switch {
	case op.Return == 0:
		return false
	case op.Errno == 0:
		return true
	case op.Errno == syscall.EEXIST:
		return op.At == "open"
	case op.Errno == syscall.ENOENT:
		return op.Kind == linUnlink || op.Kind == linStat || op.Kind == linRename
	}
	return false
}

// reads reports whether an operation changes nothing whatever its outcome.
func (op *linOp) reads() bool {
	return op.Kind == linRead || op.Kind == linStat || op.Kind == linList || op.Kind == linMember
}

func (op *linOp) writes() bool { return op.Kind == linWrite || op.Kind == linSync }

func (op *linOp) names() []int {
	switch op.Kind {
	case linList:
		return []int{0, 1, 2}[:linNames]
	case linRename:
		return []int{op.Name, op.To}
	}
	return []int{op.Name}
}

// counts returns the number of operations with a known outcome, and of those
// during which another mount did one on the same file or name.
func (h *linHistory) counts() (all, overlapping int) {
	keys := map[string][]int{}
	for i := range h.ops {
		op := &h.ops[i]
		if !op.ended() {
			continue
		}
		all++
		for _, n := range op.names() {
			k := fmt.Sprint(op.Key, "/", n)
			keys[k] = append(keys[k], i)
		}
	}
	met := make([]bool, len(h.ops))
	for _, is := range keys {
		slices.SortFunc(is, func(a, b int) int { return cmp.Compare(h.ops[a].Call, h.ops[b].Call) })
		for a, i := range is {
			for _, j := range is[a+1:] {
				if h.ops[j].Call > h.ops[i].Return {
					break
				}
				if h.run(&h.ops[i]).mount != h.run(&h.ops[j]).mount {
					met[i], met[j] = true, true
				}
			}
		}
	}
	for _, m := range met {
		if m {
			overlapping++
		}
	}
	return all, overlapping
}

// linInput is an operation as the models take it. Open: its outcome is unknown.
type linInput struct {
	linOp
	open bool
	id   int64 // unique in a history
}

// partitions returns the histories to be judged, one for each file and directory.
//
// An operation whose outcome is unknown may have happened at any time from its
// call on, or never: it returns after all others. Two things are not asked of a
// mount: that a write which was not synced outlives the power of its node, and
// that nobody on that node has read it before (P3). So a write that is unknown or
// was lost, and was seen on no other mount, is left out with its readers.
func (h *linHistory) partitions() map[string][]porcupine.Operation {
	keys := map[string][]*linOp{}
	for i := range h.ops {
		op := &h.ops[i]
		if op.ended() || !op.reads() {
			keys[op.Key] = append(keys[op.Key], op)
		}
	}
	parts := map[string][]porcupine.Operation{}
	for key, ops := range keys {
		seen := map[uint64]int64{} // by value: when another mount first knew of it
		by := map[uint64]*linOp{}
		for _, op := range ops {
			if op.writes() {
				by[op.Value] = op
			}
		}
		for _, op := range ops {
			if w := by[op.Value]; op.Kind == linRead && w != nil && h.run(w) != h.run(op) {
				if t, ok := seen[op.Value]; !ok || op.Return < t {
					seen[op.Value] = op.Return
				}
			}
		}
		lost := func(v uint64) bool {
			w := by[v]
			if w == nil || seen[v] != 0 {
				return false
			}
			killed := h.run(w).killed
			return !w.ended() || w.Kind == linWrite && killed != 0 && w.Return > killed-int64(linVolatile)
		}
		var part []porcupine.Operation
		add := func(op linOp) {
			in := linInput{linOp: op, open: !op.ended(), id: int64(len(part)) + 1}
			ret := op.Return
			if in.open {
				ret = never
				if op.writes() {
					ret = seen[op.Value] // it had happened by then
				}
			}
			part = append(part, porcupine.Operation{ClientId: op.Client, Input: in, Call: op.Call, Return: ret})
		}
		for _, op := range ops {
			switch {
			case (op.writes() || op.Kind == linRead) && lost(op.Value):
			case op.Kind == linList:
				for n, ino := range op.Listed {
					m := *op
					m.Kind, m.Name, m.Value = linMember, n, ino
					if ino == 0 {
						m.Errno = syscall.ENOENT
					}
					m.Listed = [linNames]uint64{}
					add(m)
				}
			default:
				add(*op)
			}
		}
		parts[key] = part
	}
	return parts
}

// registerModel is a register that holds 0 at first.
var registerModel = porcupine.Model{
	Init: func() any { return uint64(0) },
	Step: func(state, input, _ any) (bool, any) {
		in := input.(linInput)
		if in.Kind == linRead {
			return in.Value == state.(uint64), state
		}
		return true, in.Value
	},
	DescribeOperation: func(in, _ any) string { return in.(linInput).String() },
}

// linEntriesState is a directory: the inode under each name, 0 if there is none,
// -n if it was made by operation n, whose caller did not learn which it is.
type linEntriesState [linNames]int64

// entriesModel is a directory that is empty at first.
var entriesModel = porcupine.Model{
	Init: func() any { return linEntriesState{} },
	Step: func(state, input, _ any) (bool, any) {
		s, in := state.(linEntriesState), input.(linInput)
		at := &s[in.Name]
		there := *at != 0
		switch {
		case in.open && in.Kind == linCreate:
			if !there {
				*at = -in.id
			}
			return true, s
		case in.open && !there: // an unlink or rename, for nothing
			return true, s
		case in.Errno == syscall.ENOENT:
			return !there, s
		case in.Errno == syscall.EEXIST:
			return there, s
		}
		switch in.Kind {
		case linCreate:
			*at = int64(in.Value)
			return !there, s
		case linUnlink:
			*at = 0
		case linRename:
			s[in.To], *at = *at, 0
		case linStat, linMember:
			there = there && (*at < 0 || *at == int64(in.Value))
			*at = int64(in.Value)
		}
		return there, s
	},
	DescribeOperation: func(in, _ any) string { return in.(linInput).String() },
}

func (in linInput) String() string {
	result := "ok"
	switch {
	case in.open && in.Errno != 0:
		result = "unknown: " + in.Errno.Error()
	case in.open:
		result = "unknown"
	case in.Errno != 0:
		result = in.Errno.Error()
	}
	name := string(rune('a' + in.Name))
	switch in.Kind {
	case linRead:
		return fmt.Sprintf("read %#x", in.Value)
	case linWrite, linSync:
		return fmt.Sprintf("%s %#x: %s", in.Kind, in.Value, result)
	case linRename:
		return fmt.Sprintf("rename %s %c: %s", name, 'a'+in.To, result)
	}
	return fmt.Sprintf("%s %s: %s, inode %d", in.Kind, name, result, in.Value)
}

func modelOf(key string) porcupine.Model {
	if strings.HasPrefix(filepath.Base(key), "r") {
		return registerModel
	}
	return entriesModel
}

// check judges all histories and returns the keys of those that no single copy
// could have given, and of those without a verdict.
func (h *linHistory) check() (illegal, unknown []string) {
	parts := h.partitions()
	var mu sync.Mutex
	var wg sync.WaitGroup
	room := make(chan struct{}, 2)
	for key, part := range parts {
		wg.Go(func() {
			room <- struct{}{}
			defer func() { <-room }()
			r := porcupine.CheckOperationsTimeout(modelOf(key), part, linPatience)
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

// explain draws an illegal history in a file that outlives the test, and logs
// what is left of it when all is taken out that it would be illegal without.
func (h *linHistory) explain(t *testing.T, key string) {
	t.Helper()
	model, part := modelOf(key), h.partitions()[key]
	if f, err := os.CreateTemp("", "unum-linear-*.html"); err == nil {
		_, info := porcupine.CheckOperationsVerbose(model, part, linPatience)
		if err := porcupine.Visualize(model, info, f); err != nil {
			t.Log(err)
		}
		t.Logf("%s: all %d operations are drawn in %s", key, len(part), f.Name())
		f.Close()
	}
	var b strings.Builder
	short := linShrink(model, part)
	from := short[0].Call
	for _, op := range short[max(0, len(short)-60):] {
		in := op.Input.(linInput)
		end := "?"
		if in.Return != 0 {
			end = fmt.Sprintf("%.6f", float64(in.Return-from)/1e9)
		}
		fmt.Fprintf(&b, "  %.6f .. %s  %s client %d: %v\n", float64(op.Call-from)/1e9, end, h.run(&in.linOp).mount, op.ClientId, in)
	}
	t.Logf("%s: no one order explains these %d operations; seconds since %d:\n%s", key, len(short), from, b.String())
}

// linShrink returns a smaller illegal history: the shortest beginning, without
// what does not matter.
func linShrink(model porcupine.Model, part []porcupine.Operation) []porcupine.Operation {
	illegal := func(ops []porcupine.Operation) bool {
		return porcupine.CheckOperationsTimeout(model, ops, 2*time.Second) == porcupine.Illegal
	}
	part = slices.Clone(part)
	slices.SortFunc(part, func(a, b porcupine.Operation) int { return cmp.Compare(a.Return, b.Return) })
	// begin is the history as it was when n operations had returned.
	begin := func(n int) []porcupine.Operation {
		ops := slices.Clone(part[:n])
		for _, op := range part[n:] {
			in := op.Input.(linInput)
			if op.Call <= part[n-1].Return && !in.reads() {
				in.open, op.Return = true, never
				op.Input = in
				ops = append(ops, op)
			}
		}
		return ops
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
	if !illegal(ops) {
		ops = part
	}
	// What changed nothing can be left out of any history, and so can a write
	// that nobody read.
	for shorter := true; shorter; {
		shorter = false
		for i := len(ops) - 1; i >= 0; i-- {
			in := ops[i].Input.(linInput)
			idle := in.reads() || in.Errno != 0 && !in.open
			if in.writes() {
				idle = !slices.ContainsFunc(ops, func(o porcupine.Operation) bool {
					r := o.Input.(linInput)
					return r.Kind == linRead && r.Value == in.Value
				})
			}
			if less := slices.Delete(slices.Clone(ops), i, i+1); idle && len(less) > 0 && illegal(less) {
				ops, shorter = less, true
			}
		}
	}
	slices.SortFunc(ops, func(a, b porcupine.Operation) int { return cmp.Compare(a.Call, b.Call) })
	return ops
}
