package test

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func init() { workers["flood"] = floodWorker }

// floodWorker makes far more pending changes than a log record holds, before it
// calls fsync: thousands of rewritten files, tens of thousands of scattered
// writes into one file, and as many scattered pages of a mapping.
func floodWorker(args []string) int {
	if err := flood(args[0]); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

const (
	files = 1500
	pages = 8000
)

func flood(dir string) error {
	for _, word := range []string{"old", "new"} { // the first time they are created, one by one
		for i := range files {
			if err := os.WriteFile(filepath.Join(dir, fmt.Sprint("f", i)), fmt.Append(nil, word, i), 0o644); err != nil {
				return err
			}
		}
	}
	f, err := os.Create(filepath.Join(dir, "scattered"))
	if err != nil {
		return err
	}
	m, err := os.Create(filepath.Join(dir, "mapped"))
	if err != nil {
		return err
	}
	if err := errors.Join(f.Truncate(pages*8192), m.Truncate(pages*8192)); err != nil {
		return err
	}
	mem, err := unix.Mmap(int(m.Fd()), 0, pages*8192, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return err
	}
	for _, i := range rand.Perm(pages) {
		word := fmt.Sprintf("page %5d", i)
		if _, err := f.WriteAt([]byte(word), int64(i)*8192); err != nil {
			return err
		}
		copy(mem[i*8192:], word)
	}
	return errors.Join(unix.Msync(mem, unix.MS_SYNC), f.Sync(), m.Sync(), unix.Munmap(mem), f.Close(), m.Close())
}

func TestMoreIsPendingThanARecordHolds(t *testing.T) {
	t.Parallel()
	c := up(t, 3)
	c.must("n1", "mkdir /unum/flood")
	if out, err := c.worker("n1", "flood", "/unum/flood").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	for _, f := range []string{"scattered", "mapped"} {
		if got := strings.TrimSpace(c.must("n2", "tr -d '\\0' < /unum/flood/"+f+" | grep -o 'page [ 0-9]\\{5\\}' | sort -u | wc -l")); got != fmt.Sprint(pages) {
			t.Errorf("%s: %s of %d pages are there", f, got, pages)
		}
	}
	if got := strings.TrimSpace(c.must("n3", "cat /unum/flood/f* | grep -o new | wc -l")); got != fmt.Sprint(files) {
		t.Errorf("%s of %d files are as written", got, files)
	}
	c.must("n1", "mkdir /unum/flood/after") // ships what is pending first
}
