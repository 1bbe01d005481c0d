// Command tree times operations on a directory beside the same on another file
// system, in turns, and prints one line per operation: medians in microseconds,
// and their ratio.
//
//	tree -dir /unum/b -ref /var/tmp/b [-second /proc/PID/root/unum/b] [-n 200]
//
// With -second, the same directory seen through another node, it also times how
// long after a close here the new content has been read there.
package main

import (
	"bytes"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"time"
)

func main() {
	dir := flag.String("dir", "", "directory to be measured")
	ref := flag.String("ref", "", "directory to compare with")
	second := flag.String("second", "", "dir through another node")
	n := flag.Int("n", 200, "rounds")
	flag.Parse()
	if err := run(*dir, *ref, *second, *n); err != nil {
		fmt.Fprintln(os.Stderr, "tree:", err)
		os.Exit(1)
	}
}

// op is one timed operation on the i-th file of a directory.
type op struct {
	name string
	do   func(dir string, i int) error
}

func path(dir string, i int) string { return filepath.Join(dir, fmt.Sprintf("f%05d", i)) }

var block = bytes.Repeat([]byte("unum"), 1024)

func write(dir string, i int, sync bool) error {
	f, err := os.OpenFile(path(dir, i), os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	if _, err := f.Write(block); err != nil {
		return err
	}
	if sync {
		return f.Sync()
	}
	return f.Close()
}

var ops = []op{
	{"create and close an empty file", func(d string, i int) error {
		f, err := os.OpenFile(path(d, i), os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o644)
		if err != nil {
			return err
		}
		return f.Close()
	}},
	{"open, write 4 KiB, close", func(d string, i int) error { return write(d, i, false) }},
	{"open, write 4 KiB, fsync, close", func(d string, i int) error { return write(d, i, true) }},
	{"stat", func(d string, i int) error { _, err := os.Lstat(path(d, i)); return err }},
	{"open, read 4 KiB, close", func(d string, i int) error { _, err := os.ReadFile(path(d, i)); return err }},
	{"rename", func(d string, i int) error { return os.Rename(path(d, i), path(d, i)+"r") }},
	{"unlink", func(d string, i int) error { return os.Remove(path(d, i) + "r") }},
}

func run(dir, ref, second string, n int) error {
	fmt.Printf("%-36s %10s %10s %8s\n", "", "unum us", "ref us", "ratio")
	for _, o := range ops {
		var times [2][]time.Duration
		for i := range n {
			for k, d := range []string{dir, ref} {
				t := time.Now()
				if err := o.do(d, i); err != nil {
					return fmt.Errorf("%s: %w", o.name, err)
				}
				times[k] = append(times[k], time.Since(t))
			}
		}
		a, b := median(times[0]), median(times[1])
		fmt.Printf("%-36s %10.1f %10.1f %8.1f\n", o.name, us(a), us(b), us(a)/us(b))
	}
	if second == "" {
		return nil
	}
	var times []time.Duration
	for i := range n {
		want := fmt.Appendf(nil, "round %d", i)
		if err := os.WriteFile(path(dir, n), want, 0o644); err != nil {
			return err
		}
		t := time.Now()
		got, err := os.ReadFile(path(second, n))
		if err != nil {
			return err
		}
		times = append(times, time.Since(t))
		if !bytes.Equal(got, want) {
			return fmt.Errorf("round %d: the other node reads %q", i, got)
		}
	}
	fmt.Printf("%-36s %10.1f\n", "closed here, read there", us(median(times)))
	return nil
}

func median(d []time.Duration) time.Duration {
	slices.Sort(d)
	return d[len(d)/2]
}

func us(d time.Duration) float64 { return float64(d) / float64(time.Microsecond) }
