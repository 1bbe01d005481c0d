package node

import (
	"fmt"
	"syscall"
	"testing"

	"github.com/unum-os/unum/internal/disk"
	"github.com/unum-os/unum/internal/errs"
)

// A node that has left forgets that it was one. The power fails at each change of
// that, or the change fails: the directory is then a node's, whole, which can
// leave again, or none's, in which a cluster can be founded; and so again.
func TestForgetIsCutAtEveryChange(t *testing.T) {
	m := newDisk()
	cfg := onDisk(t, m)
	if err := Found(cfg); err != nil {
		t.Fatal(err)
	}
	if err := life(cfg, hasTokens(nil)); err != nil { // the first start makes blocks and databases
		t.Fatal(err)
	}
	whole, none := 0, 0
	// after checks what is left on d.
	after := func(d *disk.Mem, seed uint64, what string) {
		t.Helper()
		for i := range uint64(2) {
			cfg.FS = d
			is, err := cfg.has(fileNode)
			if err != nil {
				t.Fatalf("%s: %v", what, err)
			}
			if is {
				whole++
				opens(t, cfg, what)
			} else {
				none++
			}
			again := d.Clone() // what a person may do next
			cfg.FS = again
			if is {
				err = cfg.forget()
			}
			if err == nil {
				err = Found(cfg)
			}
			if err != nil {
				t.Fatalf("%s: founded again: %v", what, err)
			}
			opens(t, cfg, what+", founded again")
			// Or the same ends in the middle once more.
			w := disk.NewFailing(d, disk.Fault{At: 1 + int64(seed%3), Do: func() { again = d.Crash(seed + i) }})
			if cfg.FS = w; is {
				_ = cfg.forget() // it is cut off
			}
			if w.Fired() == "" {
				again = d.Crash(seed + i)
			}
			d = again
		}
	}
	k, crashes, failures := int64(1), 0, 0
	for ; ; k++ {
		d := m.Clone()
		var cut *disk.Mem
		w := disk.NewFailing(d, disk.Fault{At: k, Do: func() { cut = d.Crash(uint64(k)) }})
		cfg.FS = w
		if err := cfg.forget(); err != nil {
			t.Fatal(err)
		}
		if cut == nil {
			break
		}
		crashes++
		after(cut, uint64(k), fmt.Sprintf("crash at change %d, %s", k, w.Fired()))
		for _, once := range []bool{true, false} {
			d := m.Clone()
			w := disk.NewFailing(d, disk.Fault{At: k, Once: once, Err: syscall.EIO})
			cfg.FS = w
			err := cfg.forget()
			what := fmt.Sprintf("change %d fails (once: %v), %s", k, once, w.Fired())
			if !errs.Has(err, errs.IO) {
				t.Fatalf("%s: %v", what, err)
			}
			failures++
			after(d.Clone(), uint64(k), what+", killed")
			after(d.Crash(uint64(k)), uint64(k), what+", crash")
		}
	}
	t.Logf("%d changes, %d crashes, %d failures; the directory was a node's %d times, none's %d times", k-1, crashes, failures, whole, none)
	if whole == 0 || none == 0 {
		t.Error("too little")
	}
}
