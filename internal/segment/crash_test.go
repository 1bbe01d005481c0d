package segment

import (
	"bytes"
	"errors"
	"fmt"
	"path/filepath"
	"syscall"
	"testing"

	"github.com/cockroachdb/pebble/v2/vfs"

	"github.com/unum-os/unum/internal/disk"
	"github.com/unum-os/unum/internal/errs"
)

var errPower = errors.New("the power is off")

// whole counts the changes of a story that nothing disturbs.
func whole(t *testing.T) int64 {
	t.Helper()
	d := disk.NewFailing(disk.NewMem(), disk.Fault{})
	if _, err := story(d); err != nil {
		t.Fatal(err)
	}
	return d.Count()
}

// story is what the crash tests do: single puts, batches over segment borders,
// a clean close in the middle. It returns what was acknowledged.
func story(m disk.FS) (acked []Block, err error) {
	i := 0
	next := func(size int) Block { i++; return block(i, size) }
	for life := range 2 {
		s, oerr := Open(Config{Dir: "/s", SegmentSize: minSegment, FS: m})
		if oerr != nil {
			err = errors.Join(err, oerr)
			continue
		}
		for _, sizes := range [][]int{{5}, {19_000}, {20, 4096, 64, 700}, {25_000, 31_000, 30}, {80_000}, {1000}} {
			var batch []Block
			for _, size := range sizes {
				batch = append(batch, next(size-life))
			}
			if perr := s.PutBatch(batch); perr != nil {
				err = errors.Join(err, perr)
				continue
			}
			acked = append(acked, batch...)
		}
		err = errors.Join(err, s.Close())
	}
	return acked, err
}

// holds checks that everything acknowledged is in the store and everything in
// it is right, and that it can be written. It returns what the store says it has:
// that must hold as what was acknowledged does.
func holds(t *testing.T, m disk.FS, acked []Block, what string) (all []Block) {
	t.Helper()
	s, err := Open(Config{Dir: "/s", SegmentSize: minSegment, FS: m})
	if err != nil {
		t.Fatalf("%s: open: %v", what, err)
	}
	for _, b := range acked {
		if got, err := s.Get(b.Name, nil); err != nil || !bytes.Equal(got, b.Data) {
			t.Fatalf("%s: acknowledged block of %d bytes: %v", what, len(b.Data), err)
		}
	}
	for i := range 40 {
		if got, err := s.Get(block(i, 0).Name, nil); err == nil {
			if want := block(i, len(got)); !bytes.Equal(got, want.Data) {
				t.Fatalf("%s: wrong bytes in block %d", what, i)
			}
			all = append(all, block(i, len(got)))
		} else if !errs.Has(err, errs.NotFound) {
			t.Fatalf("%s: block %d: %v", what, i, err)
		}
	}
	if d := s.Damage(); len(d) > 0 {
		t.Fatalf("%s: a crash was taken for damage: %v", what, d[0])
	}
	b := block(1000, 77)
	if err := s.Put(b.Name, b.Data); err != nil {
		t.Fatalf("%s: put afterwards: %v", what, err)
	}
	return append(all, b)
}

func TestCrashAfterEachChange(t *testing.T) {
	seeds := uint64(3) // of which 0 keeps nothing that was not synced
	if testing.Short() {
		seeds = 1
	}
	unnoticed, all := 0, whole(t)
	for k := int64(1); k <= all; k++ {
		m := disk.NewMem()
		var after []*disk.Mem
		acked, err := story(disk.NewFailing(m, disk.Fault{At: k, Err: errPower, Do: func() {
			for seed := range seeds {
				after = append(after, m.Crash(seed))
			}
		}}))
		if err == nil {
			unnoticed++ // an index file was being written at the end
		}
		for seed, n := range after {
			what := fmt.Sprintf("k=%d seed=%d", k, seed)
			// Lose power in the recovery too, somewhere, and once after it.
			if s, err := Open(Config{Dir: "/s", SegmentSize: minSegment, FS: disk.NewFailing(n, disk.Fault{At: 1 + int64(seed)*2, Err: errPower})}); err == nil {
				s.Close()
			}
			n = n.Crash(uint64(seed) + 100)
			has := holds(t, n, acked, what)
			n = n.Crash(uint64(seed) + 200)
			holds(t, n, has, what+" again")
		}
		if len(after) == 0 {
			t.Fatalf("nothing crashed at %d of %d", k, all)
		}
	}
	if unnoticed > 4 {
		t.Fatalf("%d crashes noticed by nobody", unnoticed)
	}
}

// A process that is killed leaves bytes that are read but not durable: what the
// next one says it has must be.
func TestKillAfterEachChange(t *testing.T) {
	for k := int64(1); k <= whole(t); k++ {
		m := disk.NewMem()
		var after *disk.Mem
		story(disk.NewFailing(m, disk.Fault{At: k, Do: func() { after = m.Clone() }}))
		s := open(t, Config{Dir: "/s", SegmentSize: minSegment, FS: after})
		var has []Block
		for i := range 40 {
			if got, err := s.Get(block(i, 0).Name, nil); err == nil {
				has = append(has, block(i, len(got)))
			}
		}
		holds(t, after.Crash(uint64(k)), has, fmt.Sprintf("k=%d", k))
	}
}

func TestFailEachChange(t *testing.T) {
	all := whole(t)
	for _, fail := range []error{syscall.EIO, syscall.ENOSPC} {
		noticed := 0
		for k := int64(1); k <= all; k++ {
			m := disk.NewMem()
			w := disk.NewFailing(m, disk.Fault{At: k, Once: true, Err: fail})
			acked, err := story(w)
			what := fmt.Sprintf("%v at k=%d, %s", fail, k, w.Fired())
			if w.Fired() == "" {
				t.Fatalf("%s: nothing failed", what)
			}
			if err != nil {
				noticed++
				if fail == syscall.ENOSPC && !errs.Has(err, errs.NoSpace) {
					t.Fatalf("%s: class %v: %v", what, errs.ClassOf(err), err)
				}
			}
			// The process is killed, then the power fails.
			has := holds(t, m, acked, what)
			holds(t, m.Crash(uint64(k)), has, what+" and crash")
		}
		if noticed == 0 {
			t.Fatal("no failure reached a put")
		}
	}
}

// An error while the last segment is read must not make anything be cut off.
func TestUnreadableTail(t *testing.T) {
	m := disk.NewMem()
	s := open(t, Config{Dir: "/s", FS: m})
	var all []Block
	for i := range 40 {
		all = append(all, block(i, 20_000))
		if err := s.Put(all[i].Name, all[i].Data); err != nil {
			t.Fatal(err)
		}
	}
	n := m.Crash(1) // no index file
	bad := &badSector{FS: n, from: 400_000, to: 400_512}
	s = open(t, Config{Dir: "/s", FS: bad})
	if len(s.Damage()) == 0 {
		t.Fatal("not reported")
	}
	have := 0
	for _, b := range all {
		if s.Has(b.Name) {
			wantBlock(t, s, b)
			have++
		}
	}
	if have != 39 {
		t.Fatalf("%d of 40 blocks", have)
	}
	b := block(100, 10)
	if err := s.Put(b.Name, b.Data); err != nil {
		t.Fatal(err)
	}
	s.Close()
	s = open(t, Config{Dir: "/s", FS: n}) // the disk has recovered
	for _, b := range append(all, b) {
		wantBlock(t, s, b)
	}
}

type badSector struct {
	disk.FS
	from, to int64
}

type badFile struct {
	disk.File
	fs *badSector
}

func (f *badSector) bad(p string, file disk.File, err error) (disk.File, error) {
	if err != nil || filepath.Ext(p) != ".seg" {
		return file, err
	}
	return &badFile{file, f}, nil
}

func (f *badSector) Open(p string, opts ...vfs.OpenOption) (disk.File, error) {
	file, err := f.FS.Open(p, opts...)
	return f.bad(p, file, err)
}

func (f *badSector) OpenReadWrite(p string, c vfs.DiskWriteCategory, opts ...vfs.OpenOption) (disk.File, error) {
	file, err := f.FS.OpenReadWrite(p, c, opts...)
	return f.bad(p, file, err)
}

func (f *badFile) Truncate(size int64) error { return disk.Truncate(f.File, size) }

func (f *badFile) Allocate(from, to int64) error { return disk.Allocate(f.File, from, to) }

func (f *badFile) ReadAt(b []byte, off int64) (int, error) {
	if off < f.fs.to && off+int64(len(b)) > f.fs.from {
		n := max(f.fs.from-off, 0)
		got, _ := f.File.ReadAt(b[:n], off)
		return got, syscall.EIO
	}
	return f.File.ReadAt(b, off)
}
