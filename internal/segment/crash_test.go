package segment

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"path/filepath"
	"sync"
	"syscall"
	"testing"

	"github.com/unum-os/unum/internal/errs"
)

var errPower = errors.New("the power is off")

// memFS is a disk in memory that can lose power after its k-th change, keeping
// any part of what was not synced, and can fail the k-th change.
type memFS struct {
	mu      sync.Mutex
	rng     *rand.Rand
	names   map[string]*memInode // as processes see them
	durable map[string]*memInode
	pending []func(map[string]*memInode) // changes of names, in order
	ops     int
	offAt   int // no change from this one on; 0: never
	failAt  int
	fail    error
	failed  string // what failed
}

type memInode struct {
	data, synced []byte
	pending      []memWrite
}

// memWrite is one change of a file: bytes at off, or (nil) a new size.
type memWrite struct {
	off  int64
	data []byte
}

func newMemFS(seed uint64) *memFS {
	return &memFS{rng: rand.New(rand.NewPCG(seed, 3)), names: map[string]*memInode{}, durable: map[string]*memInode{}}
}

// change counts one. mu is held.
func (m *memFS) change(what string) error {
	m.ops++
	if m.offAt > 0 && m.ops >= m.offAt {
		return errPower
	}
	if m.ops == m.failAt {
		m.failed = what
		return m.fail
	}
	return nil
}

// crash returns the disk as the next boot finds it.
func (m *memFS) crash(seed uint64) *memFS {
	m.mu.Lock()
	defer m.mu.Unlock()
	n := newMemFS(seed)
	for _, f := range m.pending[:n.rng.IntN(len(m.pending)+1)] { // a journal keeps the order
		f(m.durable)
	}
	seen := map[*memInode]*memInode{}
	for name, ino := range m.durable {
		c := seen[ino]
		if c == nil {
			c = &memInode{synced: bytes.Clone(ino.synced)}
			for _, w := range ino.pending {
				switch n.rng.IntN(3) {
				case 0: // lost
				case 1:
					c.synced = w.apply(c.synced)
				case 2: // torn: some sectors
					if w.data == nil {
						break
					}
					for at := 0; at < len(w.data); at += 512 {
						if n.rng.IntN(2) == 0 {
							c.synced = memWrite{w.off + int64(at), w.data[at:min(at+512, len(w.data))]}.apply(c.synced)
						}
					}
				}
			}
			c.data = bytes.Clone(c.synced)
			seen[ino] = c
		}
		n.names[name], n.durable[name] = c, c
	}
	return n
}

func (w memWrite) apply(b []byte) []byte {
	end := w.off + int64(len(w.data))
	if w.data == nil && end < int64(len(b)) {
		return b[:end:end]
	}
	if end > int64(len(b)) {
		b = append(b, make([]byte, end-int64(len(b)))...)
	}
	copy(b[w.off:], w.data)
	return b
}

func (m *memFS) setName(f func(map[string]*memInode)) {
	f(m.names)
	m.pending = append(m.pending, f)
}

func (m *memFS) MkdirAll(string) error          { return nil }
func (m *memFS) Free(string) (int64, error)     { return 1 << 40, nil }
func (m *memFS) Lock(string) (io.Closer, error) { return io.NopCloser(nil), nil }
func (m *memFS) notExist(op, p string) error {
	return &fs.PathError{Op: op, Path: p, Err: syscall.ENOENT}
}
func (m *memFS) locked() func()                      { m.mu.Lock(); return m.mu.Unlock }
func (m *memFS) file(ino *memInode, p string) *memFD { return &memFD{m, ino, p} }

func (m *memFS) List(dir string) ([]string, error) {
	defer m.locked()()
	var names []string
	for n := range m.names {
		names = append(names, filepath.Base(n))
	}
	return names, nil
}

func (m *memFS) Open(p string) (File, error) {
	defer m.locked()()
	if ino := m.names[p]; ino != nil {
		return m.file(ino, p), nil
	}
	return nil, m.notExist("open", p)
}

func (m *memFS) Create(p string) (File, error) {
	defer m.locked()()
	if err := m.change("create " + filepath.Ext(p)); err != nil {
		return nil, err
	}
	ino := m.names[p]
	if ino == nil {
		ino = &memInode{}
		m.setName(func(d map[string]*memInode) { d[p] = ino })
	} else {
		ino.data = nil
		ino.pending = append(ino.pending, memWrite{})
	}
	return m.file(ino, p), nil
}

func (m *memFS) Rename(from, to string) error {
	defer m.locked()()
	if err := m.change("rename"); err != nil {
		return err
	}
	if m.names[from] == nil {
		return m.notExist("rename", from)
	}
	m.setName(func(d map[string]*memInode) {
		if d[from] != nil {
			d[to] = d[from]
			delete(d, from)
		}
	})
	return nil
}

func (m *memFS) Remove(p string) error {
	defer m.locked()()
	if err := m.change("remove"); err != nil {
		return err
	}
	m.setName(func(d map[string]*memInode) { delete(d, p) })
	return nil
}

func (m *memFS) SyncDir(dir string) error {
	defer m.locked()()
	if err := m.change("syncdir"); err != nil {
		return err
	}
	for _, f := range m.pending {
		f(m.durable)
	}
	m.pending = nil
	return nil
}

type memFD struct {
	m   *memFS
	ino *memInode
	p   string
}

func (f *memFD) Close() error { return nil }

func (f *memFD) Size() (int64, error) {
	defer f.m.locked()()
	return int64(len(f.ino.data)), nil
}

func (f *memFD) ReadAt(b []byte, off int64) (int, error) {
	defer f.m.locked()()
	if off >= int64(len(f.ino.data)) {
		return 0, io.EOF
	}
	n := copy(b, f.ino.data[off:])
	if n < len(b) {
		return n, io.EOF
	}
	return n, nil
}

func (f *memFD) write(w memWrite) {
	f.ino.data = w.apply(f.ino.data)
	f.ino.pending = append(f.ino.pending, w)
}

func (f *memFD) WriteAt(b []byte, off int64) (int, error) {
	defer f.m.locked()()
	b = bytes.Clone(b)
	if err := f.m.change("write " + filepath.Ext(f.p)); err != nil {
		f.write(memWrite{off, b[:len(b)/2]})
		return len(b) / 2, err
	}
	f.write(memWrite{off, b})
	return len(b), nil
}

func (f *memFD) Truncate(size int64) error {
	defer f.m.locked()()
	if err := f.m.change("truncate"); err != nil {
		return err
	}
	f.write(memWrite{off: size})
	return nil
}

func (f *memFD) Allocate(from, to int64) error {
	defer f.m.locked()()
	if err := f.m.change("allocate"); err != nil {
		return err
	}
	f.write(memWrite{off: max(to, int64(len(f.ino.data)))})
	return nil
}

func (f *memFD) Sync() error {
	defer f.m.locked()()
	err := f.m.change("sync " + filepath.Ext(f.p))
	for _, w := range f.ino.pending {
		// After a failed sync none or some of it is on disk, and the rest counts
		// as clean all the same.
		if err == nil || (err == syscall.ENOSPC && f.m.rng.IntN(2) == 0) {
			f.ino.synced = w.apply(f.ino.synced)
		}
	}
	if err != errPower {
		f.ino.pending = nil
	}
	return err
}

// story is what the crash tests do: single puts, batches over segment borders,
// a clean close in the middle. It returns what was acknowledged.
func story(m *memFS) (acked []Block, err error) {
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
func holds(t *testing.T, m *memFS, acked []Block, what string) (all []Block) {
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
	whole := newMemFS(0)
	if _, err := story(whole); err != nil {
		t.Fatal(err)
	}
	seeds := 3
	if testing.Short() {
		seeds = 1
	}
	unnoticed := 0
	for k := 1; k <= whole.ops+1; k++ {
		m := newMemFS(uint64(k))
		m.offAt = k
		acked, err := story(m)
		if err != nil && k > whole.ops {
			t.Fatal(err)
		}
		if err == nil && k <= whole.ops {
			unnoticed++ // an index file was being written at the end
		}
		for seed := range uint64(seeds) {
			what := fmt.Sprintf("k=%d seed=%d", k, seed)
			n := m.crash(seed)
			// Lose power in the recovery too, somewhere, and once after it.
			n.offAt = 1 + int(seed)*2
			if s, err := Open(Config{Dir: "/s", SegmentSize: minSegment, FS: n}); err == nil {
				s.Close()
			}
			n = n.crash(seed + 100)
			has := holds(t, n, acked, what)
			n = n.crash(seed + 200)
			holds(t, n, has, what+" again")
		}
	}
	if unnoticed > 4 {
		t.Fatalf("%d crashes noticed by nobody", unnoticed)
	}
}

// A process that is killed leaves bytes that are read but not durable: what the
// next one says it has must be.
func TestKillAfterEachChange(t *testing.T) {
	whole := newMemFS(0)
	if _, err := story(whole); err != nil {
		t.Fatal(err)
	}
	for k := 1; k <= whole.ops; k++ {
		m := newMemFS(uint64(k))
		m.offAt = k
		story(m)
		m.offAt = 0
		s := open(t, Config{Dir: "/s", SegmentSize: minSegment, FS: m})
		var has []Block
		for i := range 40 {
			if got, err := s.Get(block(i, 0).Name, nil); err == nil {
				has = append(has, block(i, len(got)))
			}
		}
		holds(t, m.crash(uint64(k)), has, fmt.Sprintf("k=%d", k))
	}
}

func TestFailEachChange(t *testing.T) {
	whole := newMemFS(0)
	if _, err := story(whole); err != nil {
		t.Fatal(err)
	}
	for _, fail := range []error{syscall.EIO, syscall.ENOSPC} {
		noticed := 0
		for k := 1; k <= whole.ops; k++ {
			m := newMemFS(uint64(k))
			m.failAt, m.fail = k, fail
			acked, err := story(m)
			what := fmt.Sprintf("%v at k=%d, %s", fail, k, m.failed)
			if m.failed == "" {
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
			holds(t, m.crash(uint64(k)), has, what+" and crash")
		}
		if noticed == 0 {
			t.Fatal("no failure reached a put")
		}
	}
}

// An error while the last segment is read must not make anything be cut off.
func TestUnreadableTail(t *testing.T) {
	m := newMemFS(0)
	s := open(t, Config{Dir: "/s", FS: m})
	var all []Block
	for i := range 40 {
		all = append(all, block(i, 20_000))
		if err := s.Put(all[i].Name, all[i].Data); err != nil {
			t.Fatal(err)
		}
	}
	n := m.crash(1) // no index file
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
	FS
	from, to int64
}

type badFile struct {
	File
	fs *badSector
}

func (f *badSector) Open(p string) (File, error) {
	file, err := f.FS.Open(p)
	if err != nil || filepath.Ext(p) != ".seg" {
		return file, err
	}
	return &badFile{file, f}, nil
}

func (f *badFile) ReadAt(b []byte, off int64) (int, error) {
	if off < f.fs.to && off+int64(len(b)) > f.fs.from {
		n := max(f.fs.from-off, 0)
		got, _ := f.File.ReadAt(b[:n], off)
		return got, syscall.EIO
	}
	return f.File.ReadAt(b, off)
}
