package test

import (
	"bufio"
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"
)

func init() {
	workers["write"] = writeWorker
	workers["audit"] = auditWorker
}

// shapes are the ways in which the writers write; each is a file of its own per
// node: a journal that grows, a file replaced by rename, a file overwritten in
// place.
var shapes = []string{"journal", "replaced", "overwritten"}

// content is what generation n of a file holds: its number and bytes that
// follow from both. Journals hold one generation after the other.
func content(file string, n uint64) []byte {
	seed := sha256.Sum256(fmt.Append(nil, file, n))
	rng := rand.New(rand.NewChaCha8(seed))
	size := 16 + rng.IntN(2000)
	if rng.IntN(8) == 0 {
		size = 200_000 + rng.IntN(300_000) // more than fits a log record
	}
	if filepath.Base(filepath.Dir(file)) == "overwritten" {
		size = 4096 // in place: never longer than its successor
	}
	b := make([]byte, size)
	binary.LittleEndian.PutUint64(b, n)
	binary.LittleEndian.PutUint64(b[8:], uint64(size))
	for i := 16; i < size; i += 8 {
		var w [8]byte
		binary.LittleEndian.PutUint64(w[:], rng.Uint64())
		copy(b[i:], w[:])
	}
	return b
}

// put writes generation n of the file and returns when fsync has acknowledged it.
func put(shape, file string, n uint64) (err error) {
	name, flags := file, os.O_CREATE|os.O_WRONLY
	switch shape {
	case "journal":
		flags |= os.O_APPEND
	case "replaced":
		name, flags = file+".new", flags|os.O_TRUNC
	}
	f, err := os.OpenFile(name, flags, 0o644)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	if _, err := f.Write(content(file, n)); err != nil {
		return err
	}
	if err := f.Sync(); err != nil {
		return err
	}
	if shape == "replaced" {
		return os.Rename(name, file)
	}
	return nil
}

// found is a file as an audit finds it.
type found struct {
	File string
	Last uint64 // last generation in it, 0: none
	Torn int    // bytes beyond it
	Bad  string // what should never be
}

// writeWorker writes generation after generation from those in the audit on its
// standard input on, and prints what is acknowledged, until it dies.
func writeWorker([]string) int {
	var start []found
	if err := json.NewDecoder(os.Stdin).Decode(&start); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	var wg sync.WaitGroup
	var mu sync.Mutex
	failed := false
	for _, f := range start {
		shape := filepath.Base(filepath.Dir(f.File))
		wg.Go(func() {
			if shape == "journal" && f.Torn > 0 {
				st, err := os.Stat(f.File)
				if err == nil {
					err = os.Truncate(f.File, st.Size()-int64(f.Torn))
				}
				if err != nil {
					fmt.Fprintln(os.Stderr, err)
					return
				}
			}
			for n := f.Last + 1; ; n++ {
				err := put(shape, f.File, n)
				mu.Lock()
				if err != nil {
					fmt.Fprintln(os.Stderr, f.File, n, err)
					failed = true
				} else {
					fmt.Printf("%s %d\n", f.File, n)
				}
				mu.Unlock()
				if err != nil {
					return
				}
			}
		})
	}
	wg.Wait()
	if failed {
		return 1
	}
	return 0
}

// audit looks at one file.
func audit(file string) found {
	f := found{File: file}
	b, err := os.ReadFile(file)
	if errors.Is(err, fs.ErrNotExist) {
		return f
	}
	if err != nil {
		f.Bad = err.Error()
		return f
	}
	journal := filepath.Base(filepath.Dir(file)) == "journal"
	for len(b) >= 16 {
		n, size := binary.LittleEndian.Uint64(b), binary.LittleEndian.Uint64(b[8:])
		if journal && n != f.Last+1 {
			f.Bad = fmt.Sprintf("generation %d follows %d", n, f.Last)
			return f
		}
		if want := content(file, n); !bytes.Equal(b[:min(len(b), len(want))], want[:min(len(b), len(want))]) || size != uint64(len(want)) {
			f.Bad = fmt.Sprintf("generation %d is not what was written", n)
			return f
		} else if len(b) < len(want) {
			break
		}
		f.Last, b = n, b[size:]
		if !journal {
			break
		}
	}
	if f.Torn = len(b); f.Torn > 0 && !journal {
		f.Bad = fmt.Sprintf("%d bytes beyond generation %d", f.Torn, f.Last)
	}
	return f
}

// auditWorker prints what it finds in the files given.
func auditWorker(files []string) int {
	out := make([]found, len(files))
	for i, f := range files {
		out[i] = audit(f)
	}
	if err := json.NewEncoder(os.Stdout).Encode(out); err != nil {
		return 1
	}
	return 0
}

// Ten times all nodes lose power while programs on each of them write: nothing
// that fsync (or, for the new name, rename after it) acknowledged is missing,
// and nothing is there that was not written.
func TestTenPowerLosses(t *testing.T) {
	t.Parallel()
	c := up(t, 3)
	nodes := []string{"n1", "n2", "n3"}
	files := map[string][]string{}
	var all []string
	for _, s := range shapes {
		c.must("n1", "mkdir -p /unum/load/"+s)
		for _, n := range nodes {
			files[n] = append(files[n], filepath.Join("/unum/load", s, n))
		}
	}
	for _, n := range nodes {
		all = append(all, files[n]...)
	}
	state := map[string]found{}
	for _, f := range all {
		state[f] = found{File: f}
	}
	total := 0
	for round := range 10 {
		var wg sync.WaitGroup
		var mu sync.Mutex
		acked := map[string]uint64{}
		enough := make(chan struct{})
		remaining := len(all)
		const each = 4 // acknowledged per file before the power goes
		for _, n := range nodes {
			var start []found
			for _, f := range files[n] {
				start = append(start, state[f])
			}
			in, err := json.Marshal(start)
			if err != nil {
				t.Fatal(err)
			}
			cmd := c.worker(n, "write")
			cmd.Stdin = bytes.NewReader(in)
			var complaints bytes.Buffer
			cmd.Stderr = &complaints
			out, err := cmd.StdoutPipe()
			if err != nil {
				t.Fatal(err)
			}
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			wg.Go(func() {
				for s := bufio.NewScanner(out); s.Scan(); {
					var f string
					var g uint64
					if k, err := fmt.Sscanf(s.Text(), "%s %d", &f, &g); k != 2 {
						continue // cut off with its writer
					} else if err != nil {
						continue
					}
					mu.Lock()
					if _, known := state[f]; known && g > acked[f] {
						acked[f] = g
						total++
						if g == state[f].Last+each {
							if remaining--; remaining == 0 {
								close(enough)
							}
						}
					}
					mu.Unlock()
				}
				io.Copy(io.Discard, out)
				cmd.Wait() // killed with its node
				if complaints.Len() > 0 {
					t.Logf("round %d, %s: %s", round, n, complaints.Bytes())
				}
			})
		}
		select {
		case <-enough:
		case <-time.After(90 * time.Second):
			mu.Lock()
			t.Errorf("round %d: the writers do not get on: %v", round, acked)
			mu.Unlock()
		}
		c.lab("kill", nodes...)
		wg.Wait()
		c.lab("start", nodes...)
		on := nodes[round%3]
		out, err := c.worker(on, "audit", all...).Output()
		if err != nil {
			t.Fatalf("round %d: audit on %s: %v", round, on, err)
		}
		var fs []found
		if err := json.Unmarshal(out, &fs); err != nil {
			t.Fatalf("round %d: audit on %s: %v: %s", round, on, err, out)
		}
		for _, f := range fs {
			if f.Bad != "" {
				t.Errorf("round %d: %s: %s", round, f.File, f.Bad)
			}
			if f.Last < acked[f.File] {
				t.Errorf("round %d: %s: generation %d was acknowledged, %d is there", round, f.File, acked[f.File], f.Last)
			}
			state[f.File] = f
		}
		if t.Failed() {
			return
		}
	}
	t.Logf("%d writes acknowledged in 10 rounds, none lost", total)
}
