package fusefs

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

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

// TestMain is also the program that maps files of the mount: a process that
// serves a mount must not touch mappings of it, for a page fault holds up the
// Go scheduler and with it the answer.
func TestMain(m *testing.M) {
	GuardMain()
	if dir := os.Getenv("FUSEFS_TEST_SERVE"); dir != "" {
		fmt.Println(stuckServer(dir))
		os.Exit(1)
	}
	if p := os.Getenv("FUSEFS_TEST_MAP"); p != "" {
		if err := mapper(p); err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	if v := os.Getenv("FUSEFS_TEST_BENCH"); v != "" {
		var op, dir string
		var n int
		if _, err := fmt.Sscan(v, &op, &n, &dir); err == nil {
			err = measure(op, dir, n)
			if err != nil {
				fmt.Println(err)
				os.Exit(1)
			}
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// measure does op n times on what is under dir and prints the median and the
// 99th percentile of the time each took, in microseconds.
func measure(op, dir string, n int) error {
	p := filepath.Join(dir, "f")
	fd, err := unix.Open(p, unix.O_CREAT|unix.O_RDWR, 0o644)
	if err != nil {
		return err
	}
	var st unix.Stat_t
	data := make([]byte, 1024)
	lat := make([]int64, n)
	for i := range lat {
		q := filepath.Join(dir, "new"+strconv.Itoa(i))
		at := clock.Now()
		switch op {
		case "fstat": // GETATTR
			err = unix.Fstat(fd, &st)
		case "stat": // LOOKUP
			err = unix.Stat(p, &st)
		case "open": // LOOKUP, OPEN, FLUSH, asynchronous RELEASE
			var g int
			if g, err = unix.Open(p, unix.O_RDONLY, 0); err == nil {
				err = unix.Close(g)
			}
		case "create": // LOOKUP, CREATE, WRITE of 1 KiB, FLUSH, asynchronous RELEASE
			var g int
			if g, err = unix.Open(q, unix.O_CREAT|unix.O_EXCL|unix.O_WRONLY, 0o644); err == nil {
				_, err = unix.Write(g, data)
				err = errors.Join(err, unix.Close(g))
			}
		}
		lat[i] = int64(clock.Now().Sub(at))
		if err != nil {
			return err
		}
	}
	slices.Sort(lat)
	fmt.Println(float64(lat[n/2])/1000, float64(lat[n*99/100])/1000)
	return nil
}

// BenchmarkLatency measures from another process: median-us is the figure.
func BenchmarkLatency(b *testing.B) {
	for _, op := range []string{"fstat", "stat", "open", "create"} {
		b.Run(op, func(b *testing.B) {
			tree := newMemTree()
			if op != "fstat" {
				tree.valid = time.Hour // as under a lease
			}
			_, dir := up(b, tree, nil)
			cmd := exec.Command("/proc/self/exe")
			cmd.Env = append(os.Environ(), "FUSEFS_TEST_BENCH="+op+" "+strconv.Itoa(b.N)+" "+dir)
			out, err := cmd.Output()
			if err != nil {
				b.Fatalf("%v: %s", err, out)
			}
			var median, p99 float64
			if _, err := fmt.Sscan(string(out), &median, &p99); err != nil {
				b.Fatal(err)
			}
			b.ReportMetric(median, "median-us")
			b.ReportMetric(p99, "p99-us")
		})
	}
}

// mapper maps the file p and does what its standard input says: "store TEXT"
// at the second page, "load", "sync", "write" (with write(2), to the end).
func mapper(p string) error {
	f, err := os.OpenFile(p, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	mem, err := unix.Mmap(int(f.Fd()), 0, 8192, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return err
	}
	for in := bufio.NewScanner(os.Stdin); in.Scan(); {
		var out any = "done"
		cmd, text, _ := strings.Cut(in.Text(), " ")
		switch cmd {
		case "store":
			copy(mem[4096:], text)
		case "load":
			out = string(mem[4096:4102])
		case "sync":
			err = unix.Msync(mem, unix.MS_SYNC)
		case "write":
			_, err = f.WriteAt([]byte("x"), 8192)
		}
		if err != nil {
			out = err
		}
		fmt.Println(out)
	}
	return nil
}

// mapping is a running mapper.
type mapping struct {
	t   *testing.T
	in  io.Writer
	out *bufio.Scanner
}

func newMapping(t *testing.T, p string) *mapping {
	t.Helper()
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), "FUSEFS_TEST_MAP="+p)
	cmd.Stderr = t.Output()
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = in.Close()
		if err := cmd.Wait(); err != nil {
			t.Error(err)
		}
	})
	return &mapping{t, in, bufio.NewScanner(out)}
}

// do has the mapper do something and returns what it says.
func (m *mapping) do(cmd string) string {
	m.t.Helper()
	if _, err := fmt.Fprintln(m.in, cmd); err != nil {
		m.t.Fatal(err)
	}
	if !m.out.Scan() {
		m.t.Fatalf("the mapper has ended: %v", m.out.Err())
	}
	return m.out.Text()
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
		m.idle.Store(1) // another worker is
		w := newWorker(m)
		in := new(buffer)
		w.handle(in, copy(in[:], b))
		if m.idle.Load() != 2 {
			t.Fatalf("%d workers count as idle, not both", m.idle.Load())
		}
		if len(m.requests) != 0 || len(m.slots) != 0 {
			t.Fatal("a request was left behind")
		}
	})
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
