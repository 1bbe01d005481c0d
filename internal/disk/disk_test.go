package disk

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/cockroachdb/pebble/v2"
	"github.com/cockroachdb/pebble/v2/vfs"

	"github.com/unum-os/unum/internal/errs"
)

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// put writes a file; sync makes it durable, its name included.
func put(t *testing.T, d FS, path string, data []byte, sync bool) {
	t.Helper()
	f, err := Create(d, path)
	must(t, err)
	_, err = f.Write(data)
	must(t, err)
	if sync {
		must(t, f.Sync())
		must(t, SyncDir(d, parent(path)))
	}
	must(t, f.Close())
}

// read returns a file's bytes; nil if there is none.
func read(t *testing.T, d FS, path string) []byte {
	t.Helper()
	f, err := d.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	must(t, err)
	defer f.Close()
	b, err := io.ReadAll(f)
	must(t, err)
	return append([]byte{}, b...)
}

// each runs a test on the real disk and on that in memory.
func each(t *testing.T, f func(t *testing.T, d FS, dir string)) {
	t.Run("real", func(t *testing.T) { f(t, Real, t.TempDir()) })
	t.Run("mem", func(t *testing.T) {
		m := NewMem()
		must(t, m.MkdirAll("/a/b", 0o700))
		f(t, m, "/a/b")
	})
	t.Run("failing", func(t *testing.T) { f(t, NewFailing(Real, Fault{}), t.TempDir()) })
}

// The implementations answer alike.
func TestAlike(t *testing.T) {
	each(t, func(t *testing.T, d FS, dir string) {
		p := func(n string) string { return filepath.Join(dir, n) }
		is := func(err, want error) {
			t.Helper()
			if !errors.Is(err, want) {
				t.Errorf("%v, want %v", err, want)
			}
		}
		put(t, d, p("f"), []byte("hello"), true)
		if st, err := d.Stat(p("f")); err != nil || st.Size() != 5 || st.Mode() != 0o600 || st.IsDir() {
			t.Errorf("%v %v", st, err)
		}
		f, err := OpenReadWrite(d, p("f"))
		must(t, err)
		_, err = f.WriteAt([]byte("J"), 0)
		must(t, err)
		must(t, Truncate(f, 3))
		must(t, Allocate(f, 3, 10))
		if n, err := Size(f); err != nil || n != 10 {
			t.Errorf("size %d %v", n, err)
		}
		must(t, f.SyncData())
		b := make([]byte, 20)
		if n, err := f.ReadAt(b, 0); n != 10 || err != io.EOF || string(b[:n]) != "Jel\x00\x00\x00\x00\x00\x00\x00" {
			t.Errorf("%q %v", b[:n], err)
		}
		must(t, f.Close())
		_, err = OpenReadWrite(d, p("none"))
		is(err, fs.ErrNotExist)
		_, err = d.Open(p("none"))
		is(err, syscall.ENOENT)
		_, err = d.Stat(p("f/x"))
		is(err, syscall.ENOTDIR)
		is(d.Remove(p("none")), syscall.ENOENT)
		is(d.Rename(p("none"), p("g")), syscall.ENOENT)
		must(t, d.Link(p("f"), p("l")))
		is(d.Link(p("f"), p("l")), syscall.EEXIST)
		must(t, d.MkdirAll(p("x/y"), 0o700))
		is(d.Remove(p("x")), syscall.ENOTEMPTY)
		put(t, d, p("x/y/z"), []byte("1"), false)
		must(t, d.Rename(p("x/y/z"), p("z")))
		must(t, d.Rename(p("l"), p("x/y/z")))
		must(t, d.RemoveAll(p("x")))
		must(t, d.RemoveAll(p("x")))
		is(d.MkdirAll(p("f/x"), 0o700), syscall.ENOTDIR)
		// Create gives a new file: who has the old one open keeps that.
		old, err := d.Open(p("z"))
		must(t, err)
		put(t, d, p("z"), []byte("2"), false)
		if b, err := io.ReadAll(old); err != nil || string(b) != "1" {
			t.Errorf("%q %v", b, err)
		}
		must(t, old.Close())
		g, err := d.ReuseForWrite(p("z"), p("w"), vfs.WriteCategoryUnspecified)
		must(t, err)
		_, err = g.Write([]byte("3"))
		must(t, err)
		must(t, g.Close())
		if b := read(t, d, p("w")); string(b) != "3" {
			t.Errorf("%q", b)
		}
		names, err := d.List(dir)
		must(t, err)
		slices.Sort(names)
		if got := strings.Join(names, " "); got != "f w" {
			t.Errorf("names %q", got)
		}
		for name, want := range map[string]bool{"f": true, "none": false} {
			if is, err := Exists(d, p(name)); is != want || err != nil {
				t.Errorf("%s: %v %v", name, is, err)
			}
		}
		if _, err := Exists(d, p("f/x")); err == nil {
			t.Error("what cannot be looked at was said not to be there")
		}
		if u, err := d.GetDiskUsage(dir); err != nil || u.AvailBytes == 0 || u.TotalBytes < u.AvailBytes {
			t.Errorf("%+v %v", u, err)
		}
	})
}

func TestLockNamesTheProcess(t *testing.T) {
	each(t, func(t *testing.T, d FS, dir string) {
		p := filepath.Join(dir, "lock")
		for range 2 {
			l, err := Lock(d, p)
			must(t, err)
			_, err = Lock(d, p)
			if !errs.Has(err, errs.Busy) || !strings.Contains(err.Error(), fmt.Sprintf("process %d", os.Getpid())) {
				t.Errorf("%v", err)
			}
			must(t, l.Close())
		}
	})
}

// What was synced stays, what was not is gone: bytes, new names, renames and
// removals, and names below a directory whose own name was not synced.
func TestCrashLosesTheUnsynced(t *testing.T) {
	m := NewMem()
	must(t, m.MkdirAll("/d", 0o700))
	must(t, SyncDir(m, "/"))
	put(t, m, "/d/kept", []byte("kept"), true)
	put(t, m, "/d/old", []byte("old"), true)
	put(t, m, "/d/gone", []byte("gone"), true)
	put(t, m, "/d/nameless", []byte("x"), false)
	put(t, m, "/d/new", []byte("new"), false)
	f, err := m.Open("/d/new")
	must(t, err)
	must(t, f.Sync()) // the bytes, not the name
	must(t, m.Rename("/d/new", "/d/old"))
	must(t, m.Remove("/d/gone"))
	f, err = OpenReadWrite(m, "/d/kept")
	must(t, err)
	_, err = f.WriteAt([]byte("lost"), 0)
	must(t, err)
	must(t, m.MkdirAll("/d/e", 0o700))
	put(t, m, "/d/e/f", []byte("f"), true)

	look := func(d *Mem) string {
		var out []string
		names, err := d.List("/d")
		must(t, err)
		for _, n := range names {
			if n != "e" {
				n += "=" + string(read(t, d, "/d/"+n))
			}
			out = append(out, n)
		}
		return strings.Join(out, " ")
	}
	if got := look(m.Crash(0)); got != "gone=gone kept=kept old=old" {
		t.Errorf("after a crash: %s", got)
	}
	if got := look(m.Clone()); got != "e kept=lost nameless=x old=new" {
		t.Errorf("after a kill: %s", got)
	}
	if got := look(m.Clone().Crash(0)); got != "gone=gone kept=kept old=old" {
		t.Errorf("after a kill and a crash: %s", got)
	}
	must(t, SyncDir(m, "/d"))
	must(t, f.Sync())
	if got := look(m.Crash(0)); got != "e kept=lost nameless= old=new" {
		t.Errorf("after the syncs and a crash: %s", got)
	}
}

// Some crashes keep the whole last write, some nothing, some a part of its
// sectors; a rename is there or not; and the seed alone decides.
func TestCrashTearsTheLastWrite(t *testing.T) {
	build := func() *Mem {
		m := NewMem()
		must(t, m.MkdirAll("/d", 0o700))
		must(t, SyncDir(m, "/"))
		put(t, m, "/d/f", bytes.Repeat([]byte{1}, 8*sector), true)
		f, err := OpenReadWrite(m, "/d/f")
		must(t, err)
		_, err = f.WriteAt(bytes.Repeat([]byte{2}, 8*sector), 0)
		must(t, err)
		for i := range 20 {
			put(t, m, fmt.Sprintf("/d/n%d", i), bytes.Repeat([]byte{3}, 3*sector), false)
		}
		must(t, m.Rename("/d/f", "/d/g"))
		return m
	}
	m := build()
	kinds := map[string]int{}
	for seed := uint64(1); seed <= 60; seed++ {
		c, again := m.Crash(seed), build().Crash(seed)
		if a, b := everything(t, c), everything(t, again); a != b {
			t.Fatalf("seed %d gave\n%s\nand\n%s", seed, a, b)
		}
		path := "/d/f"
		if read(t, c, path) == nil {
			path = "/d/g"
			kinds["renamed"]++
		}
		b := read(t, c, path)
		if len(b) != 8*sector {
			t.Fatalf("seed %d: %d bytes", seed, len(b))
		}
		news := 0
		for i := range 8 {
			s := b[i*sector : (i+1)*sector]
			if !bytes.Equal(s, bytes.Repeat(s[:1], sector)) {
				t.Fatalf("seed %d: sector %d is torn itself", seed, i)
			}
			news += int(s[0] - 1)
		}
		switch news {
		case 0:
			kinds["old"]++
		case 8:
			kinds["new"]++
		default:
			kinds["torn"]++
		}
		// Names of one directory are kept in their order.
		for i := 1; i < 20; i++ {
			if read(t, c, fmt.Sprintf("/d/n%d", i)) != nil && read(t, c, fmt.Sprintf("/d/n%d", i-1)) == nil {
				t.Fatalf("seed %d: name %d without the one before", seed, i)
			}
		}
	}
	for _, k := range []string{"old", "new", "torn", "renamed"} {
		if kinds[k] == 0 || kinds[k] == 60 {
			t.Errorf("%s: %d of 60", k, kinds[k])
		}
	}
	t.Log(kinds)
}

// everything lists all of a disk.
func everything(t *testing.T, d FS) string {
	var out strings.Builder
	var walk func(dir string)
	walk = func(dir string) {
		names, err := d.List(dir)
		must(t, err)
		for _, n := range names {
			p := filepath.Join(dir, n)
			st, err := d.Stat(p)
			must(t, err)
			fmt.Fprintf(&out, "%s %v", p, st.Mode())
			if st.IsDir() {
				out.WriteByte('\n')
				walk(p)
			} else {
				fmt.Fprintf(&out, " %x\n", read(t, d, p))
			}
		}
	}
	walk("/")
	return out.String()
}

func TestFailing(t *testing.T) {
	script := func(d FS) (errors []error) {
		note := func(err error) { errors = append(errors, err) }
		note(d.MkdirAll("/d", 0o700)) // 1
		f, err := Create(d, "/d/f")   // 2
		note(err)
		if err == nil {
			_, err = f.Write([]byte("abcdefgh")) // 3
			note(err)
			note(f.Sync()) // 4
		}
		note(d.Rename("/d/f", "/d/g")) // 5
		note(d.Remove("/d/g"))         // 6
		_, err = d.Open("/d")
		note(err)
		return errors
	}
	count := func(es []error, want error) (n int) {
		for _, e := range es {
			if errors.Is(e, want) {
				n++
			}
		}
		return n
	}
	whole := NewFailing(NewMem(), Fault{})
	if es := script(whole); count(es, nil) != len(es) || whole.Count() != 6 || whole.Fired() != "" {
		t.Fatal(es, whole.Count())
	}
	for k := int64(1); k <= 6; k++ {
		w := NewFailing(NewMem(), Fault{At: k, Once: true, Err: syscall.EIO})
		if es := script(w); count(es, syscall.EIO) != 1 || w.Fired() == "" {
			t.Errorf("once at %d: %v", k, es)
		}
		w = NewFailing(NewMem(), Fault{At: k, Err: syscall.ENOSPC})
		es := script(w)
		if n := count(es, syscall.ENOSPC); int64(n) != w.Count()-k+1 || errs.ClassOf(es[len(es)-2]) != errs.NoSpace {
			t.Errorf("from %d on: %v", k, es)
		}
	}
	for kind, want := range map[Kind]string{OpWrite: "write /d/f", OpSync: "sync /d/f", OpCreate: "create /d/f", OpRename: "rename /d/g",
		OpRemove: "remove /d/g", OpMkdir: "mkdir /d", OpOpen: "open /d"} {
		w := NewFailing(NewMem(), Fault{Kinds: kind, At: 1, Err: syscall.EIO})
		if es := script(w); count(es, syscall.EIO) != 1 && kind != OpCreate || w.Fired() != want {
			t.Errorf("%v: %v, %q", kind, es, w.Fired())
		}
	}
	did := 0
	w := NewFailing(NewMem(), Fault{At: 3, Do: func() { did++ }})
	if es := script(w); count(es, nil) != len(es) || did != 1 {
		t.Errorf("%v, done %d times", es, did)
	}
}

// A write that fails leaves half; what a failed sync did not write, no later
// sync does.
func TestFailingIsAsDisksFail(t *testing.T) {
	m := NewMem()
	w := NewFailing(m, Fault{Kinds: OpWrite, At: 1, Once: true, Err: syscall.ENOSPC})
	f, err := Create(w, "/f")
	must(t, err)
	must(t, SyncDir(w, "/"))
	if n, err := f.Write([]byte("abcdefgh")); n != 4 || !errs.Has(err, errs.NoSpace) {
		t.Fatal(n, err)
	}
	if b := read(t, m, "/f"); string(b) != "abcd" {
		t.Fatalf("%q", b)
	}
	lost := 0
	for range 20 {
		_, err = f.WriteAt(bytes.Repeat([]byte{7}, 100), 0)
		must(t, err)
		must(t, f.Sync())
		_, err = f.WriteAt(bytes.Repeat([]byte{8}, 100), 0)
		must(t, err)
		w.Set(Fault{Kinds: OpSync, At: 1, Once: true, Err: syscall.EIO})
		if err := f.Sync(); !errs.Has(err, errs.IO) {
			t.Fatal(err)
		}
		must(t, f.Sync())
		if read(t, m, "/f")[0] != 8 {
			t.Fatal("a failed sync takes nothing from who reads")
		}
		if read(t, m.Crash(0), "/f")[0] == 7 {
			lost++
		}
	}
	if lost == 0 || lost == 20 {
		t.Errorf("%d of 20 lost", lost)
	}
}

// The engine on this disk: what it acknowledged is there after a crash at any
// change, whatever the seed leaves of the rest.
func TestEngineSurvivesCrashes(t *testing.T) {
	open := func(d FS) (*pebble.DB, error) {
		return pebble.Open("/db", &pebble.Options{FS: d, FormatMajorVersion: pebble.FormatNewest, Logger: quiet{}, MemTableSize: 64 << 10})
	}
	value := bytes.Repeat([]byte("v"), 3000)
	crashes := 0
	for k := int64(5); ; k += 7 {
		m := NewMem()
		var after *Mem
		acked := -1
		w := NewFailing(m, Fault{At: k, Do: func() { after = m.Crash(uint64(k)) }})
		db, err := open(w)
		must(t, err)
		must(t, SyncDir(w, "/"))
		made := w.Fired() == "" // before, there may be no database at all
		rng := rand.New(rand.NewPCG(uint64(k), 9))
		for i := range 60 {
			must(t, db.Set(fmt.Appendf(nil, "k%d", i), value, &pebble.WriteOptions{Sync: rng.IntN(2) == 0}))
			if w.Fired() == "" {
				must(t, db.LogData(nil, pebble.Sync))
				if w.Fired() == "" {
					acked = i
				}
			}
		}
		must(t, db.Close())
		if after == nil {
			break
		}
		if !made {
			continue
		}
		crashes++
		db, err = open(after)
		if err != nil {
			t.Fatalf("change %d: %v", k, err)
		}
		for i := range acked + 1 {
			v, c, err := db.Get(fmt.Appendf(nil, "k%d", i))
			if err != nil || !bytes.Equal(v, value) {
				t.Fatalf("change %d: key %d of %d: %v", k, i, acked, err)
			}
			must(t, c.Close())
		}
		must(t, db.Close())
	}
	if crashes < 10 {
		t.Fatalf("%d crashes", crashes)
	}
}

type quiet struct{}

func (quiet) Infof(string, ...any)  {}
func (quiet) Errorf(string, ...any) {}
func (quiet) Fatalf(f string, a ...any) {
	panic(fmt.Sprintf(f, a...))
}
