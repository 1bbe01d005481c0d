package segment

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/cockroachdb/pebble/v2/vfs"
	"golang.org/x/sys/unix"

	"github.com/unum-os/unum/internal/disk"
	"github.com/unum-os/unum/internal/errs"
	"github.com/unum-os/unum/internal/need"
)

// block makes the i-th block: its bytes and its name follow from i.
func block(i, size int) Block {
	b := make([]byte, size)
	rand.NewChaCha8([32]byte{byte(i), byte(i >> 8)}).Read(b)
	return Block{sha256.Sum256(binary.LittleEndian.AppendUint64(nil, uint64(i))), b}
}

func open(t testing.TB, cfg Config) *Store {
	t.Helper()
	s, err := Open(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

func wantBlock(t testing.TB, s *Store, b Block) {
	t.Helper()
	got, err := s.Get(b.Name, nil)
	if err != nil || !bytes.Equal(got, b.Data) {
		t.Fatalf("get %s: %d bytes of %d, %v", short(b.Name), len(got), len(b.Data), err)
	}
}

// crashCopy copies a store's directory as a killed process leaves it.
func crashCopy(t testing.TB, dir string) string {
	t.Helper()
	to := t.TempDir()
	names, err := disk.Real.List(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, n := range names {
		b, err := os.ReadFile(filepath.Join(dir, n))
		if err == nil {
			err = os.WriteFile(filepath.Join(to, n), b, 0o600)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	return to
}

func flip(t testing.TB, path string, off int64) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var b [1]byte
	if _, err := f.ReadAt(b[:], off); err != nil {
		t.Fatal(err)
	}
	b[0] ^= 0x10
	if _, err := f.WriteAt(b[:], off); err != nil {
		t.Fatal(err)
	}
}

func TestPutGetReopen(t *testing.T) {
	cfg := Config{Dir: filepath.Join(t.TempDir(), "blocks"), SegmentSize: 2 << 20, MaxOpen: 2}
	s := open(t, cfg)
	var all []Block
	for i, size := range []int{0, 1, 63, 64, 65, 4096, 100_000, MaxData, MaxData, MaxData - 1, 4096, MaxData, 5000} {
		all = append(all, block(i, size))
		if err := s.Put(all[i].Name, all[i].Data); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.PutBatch([]Block{block(20, 10), block(21, 20), block(20, 10), all[0]}); err != nil {
		t.Fatal(err)
	}
	all = append(all, block(20, 10), block(21, 20))
	check := func(s *Store) {
		t.Helper()
		for _, b := range all {
			if !s.Has(b.Name) {
				t.Fatalf("%s is not there", short(b.Name))
			}
			wantBlock(t, s, b)
		}
		if d := s.Damage(); len(d) > 0 {
			t.Fatalf("damage: %v", d)
		}
		if st := s.Stats(); st.Blocks != len(all) || st.Segments < 3 {
			t.Fatalf("stats %+v", st)
		}
	}
	check(s)
	before := s.Stats()
	if err := s.Put(all[3].Name, all[3].Data); err != nil || s.Stats() != before {
		t.Fatalf("second put of a name wrote: %v", err)
	}
	if _, err := Open(cfg); !errs.Has(err, errs.Busy) {
		t.Fatalf("opened twice: %v", err)
	}
	if err := s.Put(Name{}, make([]byte, MaxData+1)); !errs.Has(err, errs.TooLarge) {
		t.Fatalf("too large: %v", err)
	}
	if _, err := s.Get(Name{}, nil); !errs.Has(err, errs.NotFound) {
		t.Fatalf("not there: %v", err)
	}

	killed := cfg
	killed.Dir = crashCopy(t, cfg.Dir)
	check(open(t, killed))

	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if err := s.Put(all[0].Name, all[0].Data); err != nil && !errs.Has(err, errs.Unavailable) {
		t.Fatal(err)
	}
	if err := s.Put(Name{7}, nil); !errs.Has(err, errs.Unavailable) {
		t.Fatalf("put in a closed store: %v", err)
	}
	s = open(t, cfg)
	check(s)
	s.Close()
	idx, _ := filepath.Glob(filepath.Join(cfg.Dir, "*.idx"))
	if len(idx) < 3 {
		t.Fatalf("index files: %v", idx)
	}
	flip(t, idx[0], 60)
	if err := os.Remove(idx[1]); err != nil {
		t.Fatal(err)
	}
	check(open(t, cfg))
}

// The bytes on disk are a promise.
func TestGolden(t *testing.T) {
	id := storeID{1, 2, 3}
	h := appendSegmentHeader(nil, segmentHeader{store: id, number: 7, prev: 6, prevLen: 4096 + 64})
	r := appendRecord(nil, &record{name: Name{9}, length: 5, crc: checksum([]byte("hello")), durable: 4096}, id, 7, 4160)
	x := encodeIndex(id, 7, 4352, []placed{{Name{9}, 4160, 5, checksum([]byte("hello"))}})
	got := fmt.Sprintf("%x\n%x\n%x\n", h, r, x)
	path := filepath.Join("testdata", "format-v1.txt")
	want, err := os.ReadFile(path)
	if errors.Is(err, os.ErrNotExist) && os.Getenv("UPDATE_GOLDEN") != "" {
		if err := os.MkdirAll("testdata", 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	if err != nil {
		t.Fatal(err)
	}
	if got != string(want) {
		t.Fatalf("the format changed:\n%s\nwant\n%s", got, want)
	}
	if back, err := decodeSegmentHeader(h); err != nil || back.number != 7 || back.prevLen != 4160 {
		t.Fatal(back, err)
	}
	if _, ok := decodeRecord(r, id, 7, 4160); !ok {
		t.Fatal("record")
	}
	if _, ok := decodeRecord(r, id, 7, 4160+64); ok {
		t.Fatal("record at another place")
	}
	if _, _, _, recs, ok := decodeIndex(x); !ok || len(recs) != 1 {
		t.Fatal("index")
	}
}

func TestLaterVersionIsRefused(t *testing.T) {
	dir := t.TempDir()
	s := open(t, Config{Dir: dir})
	if err := s.Put(Name{1}, []byte("x")); err != nil {
		t.Fatal(err)
	}
	s.Close()
	f, err := disk.OpenReadWrite(disk.Real, s.segmentPath(1))
	if err != nil {
		t.Fatal(err)
	}
	b := appendSegmentHeader(nil, segmentHeader{store: s.id, number: 1})
	b[8] = version + 1
	binary.LittleEndian.PutUint32(b[60:], checksum(b[:60]))
	f.WriteAt(b, 0)
	f.Close()
	if _, err := Open(Config{Dir: dir}); !errs.Has(err, errs.NotSupported) {
		t.Fatalf("opened: %v", err)
	}
}

func TestDamage(t *testing.T) {
	dir := t.TempDir()
	cfg := Config{Dir: dir, SegmentSize: 2 << 20}
	s := open(t, cfg)
	var all []Block
	for i := range 100 { // several segments
		all = append(all, block(i, 60_000))
		if err := s.Put(all[i].Name, all[i].Data); err != nil {
			t.Fatal(err)
		}
	}
	where := func(i int) (string, int64) {
		e := s.index[all[i].Name]
		return s.segmentPath(e.segment), int64(e.off)
	}
	s.Close()

	// A flipped bit in a payload is found by Get, and a put heals.
	path, off := where(3)
	flip(t, path, off+recordSize+77)
	s = open(t, cfg)
	if _, err := s.Get(all[3].Name, nil); !errs.Has(err, errs.Corrupt) {
		t.Fatalf("flipped bit: %v", err)
	}
	d := s.Damage()
	if len(d) != 1 || d[0].File != path || d[0].Off != off || s.Has(all[3].Name) {
		t.Fatalf("damage %v, want %s at %d", d, path, off)
	}
	if err := s.Put(all[3].Name, all[3].Data); err != nil {
		t.Fatal(err)
	}
	for _, b := range all {
		wantBlock(t, s, b)
	}
	s.Close()
	s = open(t, cfg)
	wantBlock(t, s, all[3])

	// A flipped bit in a header costs that record when there is no index, in a
	// sealed segment and in the last one alike.
	p1, o1 := where(10)
	p2, o2 := where(97)
	s.Close()
	flip(t, p1, o1+9)
	flip(t, p2, o2+9)
	flip(t, s.segmentPath(2), 3) // first copy of a segment's header
	idx, _ := filepath.Glob(filepath.Join(dir, "*.idx"))
	for _, p := range idx {
		os.Remove(p)
	}
	for range 2 {
		s = open(t, cfg)
		for i, b := range all {
			if i != 10 && i != 97 {
				wantBlock(t, s, b)
			} else if s.Has(b.Name) {
				t.Fatalf("block %d is there", i)
			}
		}
		d := s.Damage()
		if len(d) != 2 || d[0].File != p1 || d[0].Off != o1 || d[1].File != p2 || d[1].Off != o2 || !errs.Has(d[0].Err, errs.Corrupt) {
			t.Fatalf("damage %v", d)
		}
		s.Close()
	}
	// Forget makes room for a better copy.
	s = open(t, cfg)
	s.Forget(all[50].Name)
	if s.Has(all[50].Name) {
		t.Fatal("not forgotten")
	}
	for _, i := range []int{10, 97, 50} {
		if err := s.Put(all[i].Name, all[i].Data); err != nil {
			t.Fatal(err)
		}
	}
	s.Close()
	s = open(t, cfg)
	for _, b := range all {
		wantBlock(t, s, b)
	}
	s.Close()

	// A whole sealed segment missing, and one cut short.
	os.Remove(s.segmentPath(1))
	if err := os.Truncate(s.segmentPath(2), 1<<20); err != nil {
		t.Fatal(err)
	}
	s = open(t, cfg)
	lost := 0
	for _, b := range all {
		if got, err := s.Get(b.Name, nil); err != nil {
			lost++
		} else if !bytes.Equal(got, b.Data) {
			t.Fatal("wrong bytes")
		}
	}
	if lost == 0 || lost > 60 || len(s.Damage()) == 0 {
		t.Fatalf("%d lost, damage %v", lost, s.Damage())
	}
}

func TestConcurrent(t *testing.T) {
	s := open(t, Config{Dir: t.TempDir(), SegmentSize: 2 << 20, MaxOpen: 1})
	const workers, each = 8, 60
	var wg sync.WaitGroup
	for w := range workers {
		wg.Add(1)
		go func() {
			defer wg.Done()
			r := rand.New(rand.NewPCG(uint64(w), 2))
			var buf []byte
			for range each {
				b := block(r.IntN(200), 9000) // names meet
				if err := s.Put(b.Name, b.Data); err != nil {
					t.Error(err)
				}
				got, err := s.Get(b.Name, buf)
				if err != nil || !bytes.Equal(got, b.Data) {
					t.Errorf("get: %v", err)
				}
				buf = got
				if other := block(r.IntN(200), 9000); s.Has(other.Name) {
					if got, err := s.Get(other.Name, nil); err != nil || !bytes.Equal(got, other.Data) {
						t.Errorf("get other: %v", err)
					}
				}
			}
			if err := s.Sync(); err != nil {
				t.Error(err)
			}
		}()
	}
	wg.Wait()
	st := s.Stats()
	if st.Puts != uint64(st.Blocks) {
		t.Fatalf("a block was written twice: %+v", st)
	}
	if st.Syncs >= st.Puts {
		t.Logf("puts shared no sync: %+v", st)
	}
}

// slowSync holds the first sync until more puts have queued.
type slowSync struct {
	disk.FS
	hold  chan struct{}
	held  chan struct{}
	armed atomic.Bool
}

type slowFile struct {
	disk.File
	fs *slowSync
}

func (f *slowSync) Create(p string, c vfs.DiskWriteCategory) (disk.File, error) {
	file, err := f.FS.Create(p, c)
	return &slowFile{file, f}, err
}

func (f *slowFile) SyncData() error {
	if f.fs.armed.CompareAndSwap(true, false) {
		f.fs.held <- struct{}{}
		<-f.fs.hold
	}
	return f.File.SyncData()
}

func TestGroupCommit(t *testing.T) {
	fs := &slowSync{FS: disk.Real, hold: make(chan struct{}), held: make(chan struct{})}
	s := open(t, Config{Dir: t.TempDir(), FS: fs})
	if err := s.Put(block(0, 10).Name, block(0, 10).Data); err != nil {
		t.Fatal(err)
	}
	before := s.Stats().Syncs
	fs.armed.Store(true)
	var wg sync.WaitGroup
	put := func(i int) {
		wg.Add(1)
		go func() {
			defer wg.Done()
			b := block(i, 100)
			if err := s.Put(b.Name, b.Data); err != nil {
				t.Error(err)
			}
		}()
	}
	put(1)
	<-fs.held
	if s.Has(block(1, 100).Name) {
		t.Fatal("seen before it was durable")
	}
	for i := range 20 {
		put(i + 1) // the first is the one under way: waits for its sync
	}
	for {
		s.mu.Lock()
		n := len(s.queue)
		s.mu.Unlock()
		if n == 19 {
			break
		}
	}
	close(fs.hold)
	wg.Wait()
	if st := s.Stats(); st.Syncs-before != 2 || st.Puts != 21 {
		t.Fatalf("20 puts took %d syncs: %+v", st.Syncs-before, st)
	}
}

func TestFullDisk(t *testing.T) {
	need.Root(t, "to mount a small tmpfs")
	dir := t.TempDir()
	if err := unix.Mount("unum-test", dir, "tmpfs", 0, "size=16m"); err != nil {
		need.Missing(t, "cannot mount a tmpfs: %v", err)
	}
	t.Cleanup(func() { unix.Unmount(dir, unix.MNT_DETACH) })
	s := open(t, Config{Dir: filepath.Join(dir, "blocks"), Reserve: 1 << 20})
	fill := func(s *Store, from, to int) (n int, err error) {
		for i := from; i < to; i++ {
			b := block(i, 300_000)
			if err := s.Put(b.Name, b.Data); err != nil {
				return i, err
			}
		}
		return to, nil
	}
	n, err := fill(s, 0, 100)
	if !errs.Has(err, errs.NoSpace) || n < 40 {
		t.Fatalf("after %d blocks: %v", n, err)
	}
	if free, err := s.Free(); err != nil || free > 300_000+recordSize+align {
		t.Fatalf("free %d, %v", free, err)
	}
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil || int64(st.Bavail)*st.Bsize < 1<<20 {
		t.Fatalf("the reserve was used: %d, %v", int64(st.Bavail)*st.Bsize, err)
	}
	for i := range n {
		wantBlock(t, s, block(i, 300_000))
	}
	s.Close()

	// Without a reserve the disk itself says no.
	s = open(t, Config{Dir: filepath.Join(dir, "blocks"), Reserve: -1, FS: lyingFree{disk.Real}})
	n2, err := fill(s, n, 100)
	if !errs.Has(err, errs.NoSpace) || n2 <= n {
		t.Fatalf("after %d blocks: %v", n2, err)
	}
	ballast := filepath.Join(dir, "ballast")
	for i := range n2 {
		wantBlock(t, s, block(i, 300_000))
	}
	if s.last != 1 {
		t.Fatalf("%d segments: a full disk closes none", s.last)
	}
	s.Close()

	// With space again it goes on. (tmpfs can grow.)
	s = open(t, Config{Dir: filepath.Join(dir, "blocks"), Reserve: -1})
	if err := os.WriteFile(ballast, make([]byte, 64<<10), 0o600); err == nil {
		os.Remove(ballast)
	}
	if _, err := fill(s, n2, n2+1); !errs.Has(err, errs.NoSpace) {
		t.Fatal(err)
	}
	if err := unix.Mount("unum-test", dir, "tmpfs", unix.MS_REMOUNT, "size=20m"); err != nil {
		t.Fatal(err)
	}
	if n2, err = fill(s, n2, n2+5); err != nil {
		t.Fatal(err)
	}
	s.Close()
	s = open(t, Config{Dir: filepath.Join(dir, "blocks")})
	for i := range n2 {
		wantBlock(t, s, block(i, 300_000))
	}
	if d := s.Damage(); len(d) > 0 {
		t.Fatal(d)
	}
}

// lyingFree never sees a full disk coming.
type lyingFree struct{ disk.FS }

func (lyingFree) GetDiskUsage(string) (vfs.DiskUsage, error) {
	return vfs.DiskUsage{AvailBytes: 1 << 40}, nil
}

func FuzzDecode(f *testing.F) {
	id := storeID{1}
	f.Add(appendRecord(nil, &record{name: Name{9}, length: 5}, id, 7, 4096))
	f.Add(appendSegmentHeader(nil, segmentHeader{store: id, number: 7}))
	f.Add(encodeIndex(id, 7, 8192, []placed{{Name{9}, 4160, 5, 1}}))
	f.Fuzz(func(t *testing.T, b []byte) {
		if r, ok := decodeRecord(b, id, 7, 4096); ok {
			if !bytes.Equal(appendRecord(nil, &r, id, 7, 4096)[:52], b[:52]) {
				t.Fatalf("record %+v does not encode to what it was read from", r)
			}
		}
		if h, err := decodeSegmentHeader(b); err == nil && h.number == 0 {
			t.Fatal("segment 0")
		}
		if gid, n, cov, recs, ok := decodeIndex(b); ok {
			if !bytes.Equal(encodeIndex(gid, n, cov, recs), b) {
				t.Fatal("index does not encode to what it was read from")
			}
		}
	})
}

// FuzzOpen puts any bytes after a good segment's first record: whatever they
// are, the record is served and the store can be written.
func FuzzOpen(f *testing.F) {
	f.Add([]byte("UREC\x01"), uint16(0))
	f.Add(bytes.Repeat([]byte{0xff}, 300), uint16(17))
	f.Fuzz(func(t *testing.T, tail []byte, at uint16) {
		cfg := Config{Dir: "/s", FS: disk.NewMem()}
		s := open(t, cfg)
		a, b := block(1, 100), block(2, 200)
		if err := s.Put(a.Name, a.Data); err != nil {
			t.Fatal(err)
		}
		s.Close()
		file, err := disk.OpenReadWrite(cfg.FS, s.segmentPath(1))
		if err != nil {
			t.Fatal(err)
		}
		file.WriteAt(tail, headerSize+recordSize+padded(100)+int64(at))
		for range 2 {
			s = open(t, cfg)
			wantBlock(t, s, a)
			if err := s.Put(b.Name, b.Data); err != nil {
				t.Fatal(err)
			}
			wantBlock(t, s, b)
			s.Close()
		}
	})
}

func BenchmarkPut(b *testing.B) {
	for _, size := range []int{4 << 10, 1 << 20} {
		b.Run(fmt.Sprintf("%dKiB", size>>10), func(b *testing.B) {
			s := open(b, Config{Dir: b.TempDir()})
			data := block(0, size).Data
			var n atomic.Uint64
			b.SetBytes(int64(size))
			b.SetParallelism(16)
			b.RunParallel(func(pb *testing.PB) {
				for pb.Next() {
					var name Name
					binary.LittleEndian.PutUint64(name[:], n.Add(1))
					if err := s.Put(name, data); err != nil {
						b.Error(err)
					}
				}
			})
			b.ReportMetric(float64(s.Stats().Puts)/float64(s.Stats().Syncs), "puts/sync")
		})
	}
}

func BenchmarkGet(b *testing.B) {
	for _, size := range []int{4 << 10, 1 << 20} {
		b.Run(fmt.Sprintf("%dKiB", size>>10), func(b *testing.B) {
			s := open(b, Config{Dir: b.TempDir()})
			var all []Block
			for i := range 64 {
				all = append(all, block(i, size))
			}
			if err := s.PutBatch(all); err != nil {
				b.Fatal(err)
			}
			b.SetBytes(int64(size))
			b.RunParallel(func(pb *testing.PB) {
				buf := make([]byte, size)
				for i := 0; pb.Next(); i++ {
					if _, err := s.Get(all[i%64].Name, buf); err != nil {
						b.Error(err)
					}
				}
			})
		})
	}
}

func BenchmarkOpen100k(b *testing.B) {
	dir := b.TempDir()
	s := open(b, Config{Dir: dir})
	for i := 0; i < 100_000; i += 1000 {
		batch := make([]Block, 1000)
		for j := range batch {
			binary.LittleEndian.PutUint64(batch[j].Name[:], uint64(i+j))
			batch[j].Data = make([]byte, 4096)
		}
		if err := s.PutBatch(batch); err != nil {
			b.Fatal(err)
		}
	}
	s.Close()
	for b.Loop() {
		s, err := Open(Config{Dir: dir})
		if err != nil {
			b.Fatal(err)
		}
		s.Close()
	}
}
