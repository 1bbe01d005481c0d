package main

import (
	"fmt"
	"io/fs"
	"os"
	"testing"

	"golang.org/x/sys/unix"
)

// TestImageIsUnchangeable: nobody writes to an unpacked core, not even its owner by
// a descriptor that is open for writing, and it is what is carried inside.
func TestImageIsUnchangeable(t *testing.T) {
	want, err := fs.ReadFile(files, coreFile)
	if err != nil {
		t.Fatalf("%v: make build first", err)
	}
	f, err := unpack()
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	anew, err := os.OpenFile(fmt.Sprintf("/proc/self/fd/%d", f.Fd()), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer anew.Close()
	for _, g := range []*os.File{f, anew} {
		if _, err := g.WriteAt([]byte("x"), 0); err == nil {
			t.Error("it can be written")
		}
		if _, err := g.WriteAt([]byte("x"), int64(len(want))); err == nil {
			t.Error("it can grow")
		}
		if err := g.Truncate(1); err == nil {
			t.Error("it can be cut off")
		}
		if err := unix.Fallocate(int(g.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, 0, 4096); err == nil {
			t.Error("it can be punched")
		}
		if _, err := unix.Mmap(int(g.Fd()), 0, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED); err == nil {
			t.Error("it can be mapped for writing")
		}
	}
	got := make([]byte, len(want))
	if n, err := f.ReadAt(got, 0); n != len(want) || string(got) != string(want) {
		t.Errorf("%d bytes of %d are the core's, %v", n, len(want), err)
	}
}
