package fusefs

import (
	"bytes"
	"encoding/binary"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"syscall"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/unum-os/unum/internal/clock"
)

func lockThread() { runtime.LockOSThread() }

type dirent struct {
	name string
	ino  uint64
	size int
}

func parseDirent(b []byte) dirent {
	size := int(binary.NativeEndian.Uint16(b[16:]))
	name := b[19:size]
	return dirent{string(name[:bytes.IndexByte(name, 0)]), binary.NativeEndian.Uint64(b), size}
}

func TestDying(t *testing.T) {
	if dying(uint32(os.Getpid())) {
		t.Error("this test is not being killed")
	}
	if !dying(1 << 30) {
		t.Error("a thread that is not there cannot be waited for")
	}
}

// FuzzHandle feeds the worker what is not from a kernel. The replies go to a
// pipe's closed end.
func FuzzHandle(f *testing.F) {
	req := func(op uint32, body []byte) []byte {
		b := make([]byte, inHeaderSize, inHeaderSize+len(body))
		binary.NativeEndian.PutUint32(b[4:], op)
		binary.NativeEndian.PutUint64(b[8:], 2)
		binary.NativeEndian.PutUint64(b[16:], 1)
		return append(b, body...)
	}
	for op := range uint32(60) {
		f.Add(req(op, nil))
		f.Add(req(op, make([]byte, 64)))
		f.Add(req(op, []byte("name\x00other\x00")))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) > smallBuffer {
			return
		}
		if len(b) >= inHeaderSize {
			binary.NativeEndian.PutUint32(b, uint32(len(b)))
			if op := binary.NativeEndian.Uint32(b[4:]); op == opInit || op == opRelease || op == opReleasedir {
				return // never, and those whose handles the tree trusts
			}
		}
		m := New(Config{Tree: newMemTree()})
		m.ctx = t.Context()
		m.fd = -1
		w := newWorker(m)
		in := make([]byte, smallBuffer)
		w.handle(in, copy(in, b))
		if len(m.requests) != 0 || len(m.slots) != 0 {
			t.Fatal("a request was left behind")
		}
	})
}

func nanotime() int64 { return int64(clock.Now()) }

func reportMedian(b *testing.B, lat []int64) {
	slices.Sort(lat)
	b.ReportMetric(float64(lat[len(lat)/2])/1000, "median-us")
	b.ReportMetric(float64(lat[len(lat)*99/100])/1000, "p99-us")
}

func stat(b *testing.B, p string) {
	c, err := unix.BytePtrFromString(p)
	if err != nil {
		b.Fatal(err)
	}
	var st unix.Stat_t
	for b.Loop() {
		if _, _, e := syscall.Syscall(syscall.SYS_STAT, uintptr(unsafe.Pointer(c)), uintptr(unsafe.Pointer(&st)), 0); e != 0 {
			b.Fatal(e)
		}
	}
}

// BenchmarkGetattr is one round trip: fstat of an inode without a promise.
func BenchmarkGetattr(b *testing.B) {
	_, dir := up(b, newMemTree(), nil)
	f, err := os.Create(filepath.Join(dir, "f"))
	if err != nil {
		b.Fatal(err)
	}
	defer f.Close()
	var st unix.Stat_t
	lat := make([]int64, 0, 1<<20)
	for b.Loop() {
		at := nanotime()
		if err := unix.Fstat(int(f.Fd()), &st); err != nil {
			b.Fatal(err)
		}
		lat = append(lat, nanotime()-at)
	}
	reportMedian(b, lat)
}

// BenchmarkStat is stat by name: one LOOKUP.
func BenchmarkStat(b *testing.B) {
	_, dir := up(b, newMemTree(), nil)
	p := filepath.Join(dir, "f")
	if err := os.WriteFile(p, nil, 0o644); err != nil {
		b.Fatal(err)
	}
	stat(b, p)
}

// BenchmarkStatParallel is the same by as many threads as there are CPUs.
func BenchmarkStatParallel(b *testing.B) {
	_, dir := up(b, newMemTree(), nil)
	p := filepath.Join(dir, "f")
	if err := os.WriteFile(p, nil, 0o644); err != nil {
		b.Fatal(err)
	}
	b.RunParallel(func(pb *testing.PB) {
		var st unix.Stat_t
		for pb.Next() {
			if err := unix.Stat(p, &st); err != nil {
				b.Fatal(err)
			}
		}
	})
}

// BenchmarkCreate is create, write of 1 KiB, close.
func BenchmarkCreate(b *testing.B) {
	_, dir := up(b, newMemTree(), nil)
	data := make([]byte, 1024)
	lat := make([]int64, 0, 1<<20)
	i := 0
	for b.Loop() {
		i++
		p := filepath.Join(dir, strconv.Itoa(i))
		at := nanotime()
		fd, err := unix.Open(p, unix.O_CREAT|unix.O_EXCL|unix.O_WRONLY, 0o644)
		if err != nil {
			b.Fatal(err)
		}
		if _, err := unix.Write(fd, data); err != nil {
			b.Fatal(err)
		}
		if err := unix.Close(fd); err != nil {
			b.Fatal(err)
		}
		lat = append(lat, nanotime()-at)
	}
	reportMedian(b, lat)
}

// BenchmarkRead1M and BenchmarkWrite1M move whole blocks without the kernel's cache.
func BenchmarkRead1M(b *testing.B)  { transfer(b, unix.Pread) }
func BenchmarkWrite1M(b *testing.B) { transfer(b, unix.Pwrite) }

func transfer(b *testing.B, move func(int, []byte, int64) (int, error)) {
	tree := newMemTree()
	tree.direct = true
	_, dir := up(b, tree, nil)
	f, err := os.Create(filepath.Join(dir, "f"))
	if err != nil {
		b.Fatal(err)
	}
	defer f.Close()
	buf := make([]byte, 1<<20)
	if _, err := f.Write(buf); err != nil {
		b.Fatal(err)
	}
	b.SetBytes(1 << 20)
	for b.Loop() {
		if n, err := move(int(f.Fd()), buf, 0); err != nil || n != len(buf) {
			b.Fatal(n, err)
		}
	}
}
