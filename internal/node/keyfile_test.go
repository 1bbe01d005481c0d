package node

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"

	"github.com/unum-os/unum/internal/disk"
	"github.com/unum-os/unum/internal/errs"
	"github.com/unum-os/unum/internal/identity"
)

// reads counts what is opened.
type reads struct {
	disk.FS
	n int
}

func (r *reads) Open(name string, o ...vfs.OpenOption) (vfs.File, error) {
	r.n++
	return r.FS.Open(name, o...)
}

// TestKeyIsReadWhenItChanges: the authority's key is read anew when its file is
// another, has other bytes or rights, was changed a moment ago, or was read a
// minute ago, and only then.
func TestKeyIsReadWhenItChanges(t *testing.T) {
	ca, err := identity.NewCA("here")
	if err != nil {
		t.Fatal(err)
	}
	other, err := identity.NewCA("elsewhere")
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "key")
	save := func(b []byte) {
		t.Helper()
		if err := identity.Save(disk.Real, path, b); err != nil {
			t.Fatal(err)
		}
	}
	save(ca.KeyPEM())
	var k keyFile
	d := &reads{FS: disk.Real}
	now := time.Now()
	look := func(what string, after time.Duration, read int, want errs.Class) {
		t.Helper()
		now = now.Add(after)
		was := d.n
		got, err := k.load(now, d, path, ca.Trust())
		if want == 0 && (err != nil || string(got.KeyPEM()) != string(ca.KeyPEM())) || want != 0 && !errs.Has(err, want) {
			t.Fatalf("%s: %v, want %v", what, err, want)
		}
		if d.n-was != read {
			t.Errorf("%s: read %d times, want %d", what, d.n-was, read)
		}
	}
	look("new", 0, 1, 0)
	look("changed a moment ago", 0, 1, 0)
	look("settled", keySettled+time.Second, 1, 0)
	look("the same", time.Second, 0, 0)
	look("the same, later", keyReadEvery-2*time.Second, 0, 0)
	look("a minute ago", time.Second, 1, 0)
	look("the clock was set back", -time.Hour, 1, 0)
	look("and is right again", time.Hour, 1, 0)
	look("the same once more", time.Second, 0, 0)

	save(other.KeyPEM())
	look("another's key", time.Second, 1, errs.Corrupt)
	look("still", time.Second, 1, errs.Corrupt)
	save(ca.KeyPEM())
	look("mended", time.Hour, 1, 0)
	look("the same again", time.Second, 0, 0)
	// Bytes are changed in place, and the time of that is hidden, as far as one can.
	st, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	b := ca.KeyPEM()
	b[len(b)/2] ^= 1
	was, _, ok := stampOf(st)
	await(t, "the file has another stamp", func() bool { // the kernel's clock for files goes by ticks
		f, err := os.OpenFile(path, os.O_WRONLY, 0)
		if err != nil {
			t.Fatal(err)
		}
		_, err = f.Write(b)
		if err := errors.Join(err, f.Close(), os.Chtimes(path, st.ModTime(), st.ModTime())); err != nil {
			t.Fatal(err)
		}
		st, err := os.Stat(path)
		if err != nil {
			t.Fatal(err)
		}
		now, _, _ := stampOf(st)
		return !ok || now != was
	})
	if got, err := k.load(now, d, path, ca.Trust()); err == nil {
		t.Fatalf("a flipped bit: %v", got)
	}
	save(ca.KeyPEM())
	look("mended again", time.Hour, 1, 0)
	if err := os.Chmod(path, 0o644); err != nil {
		t.Fatal(err)
	}
	look("others may read it", time.Second, 1, errs.Permission)
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	if _, err := k.load(now, d, path, ca.Trust()); !errors.Is(err, fs.ErrNotExist) {
		t.Fatalf("gone: %v", err)
	}

	// A file system that tells nothing is read each time.
	mem := &reads{FS: disk.NewMem()}
	if err := identity.Save(mem, "key", ca.KeyPEM()); err != nil {
		t.Fatal(err)
	}
	opened := mem.n
	for range 3 {
		if _, err := k.load(now, mem, "key", ca.Trust()); err != nil {
			t.Fatal(err)
		}
	}
	if mem.n-opened != 3 {
		t.Errorf("read %d times of 3", mem.n-opened)
	}
}

// BenchmarkLoadAuthority is what the steward and every question about this node
// pay.
func BenchmarkLoadAuthority(b *testing.B) {
	ca, err := identity.NewCA("here")
	if err != nil {
		b.Fatal(err)
	}
	path := filepath.Join(b.TempDir(), "key")
	if err := identity.Save(disk.Real, path, ca.KeyPEM()); err != nil {
		b.Fatal(err)
	}
	for name, now := range map[string]time.Time{"read": time.Now(), "remembered": time.Now().Add(time.Hour)} {
		b.Run(name, func(b *testing.B) {
			var k keyFile
			for b.Loop() {
				if _, err := k.load(now, disk.Real, path, ca.Trust()); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
