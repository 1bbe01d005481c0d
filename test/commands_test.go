package test

import (
	"bufio"
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
)

func init() { workers["callers"] = callersWorker }

// outcome is what a caller got.
type outcome struct {
	N      int
	Code   int
	Out    string
	Err    string
	Failed string // could not even be started
}

// callersWorker runs commands first..first+4*each-1 from four callers at once.
// args: the binary, a directory, first, each.
func callersWorker(args []string) int {
	bin, dir := args[0], args[1]
	first, err1 := strconv.Atoi(args[2])
	each, err2 := strconv.Atoi(args[3])
	if err1 != nil || err2 != nil {
		return 2
	}
	enc := json.NewEncoder(os.Stdout)
	var mu sync.Mutex
	var wg sync.WaitGroup
	for k := range 4 {
		wg.Go(func() {
			for i := range each {
				n := first + k*each + i
				// It lasts a little, so that some run when the node dies, and it
				// leaves a trace by which its word can be checked.
				cmd := exec.Command(bin, "run", "sh", "-c", `sleep 0.2; read x; echo "$x on $(hostname)"; echo done >> "$1"; exit $2`,
					"sh", filepath.Join(dir, strconv.Itoa(n)), strconv.Itoa(n%100))
				cmd.Stdin = strings.NewReader(fmt.Sprintf("command %d\n", n))
				var o, e bytes.Buffer
				cmd.Stdout, cmd.Stderr = &o, &e
				r := outcome{N: n}
				if err := cmd.Run(); err != nil && cmd.ProcessState == nil {
					r.Failed = err.Error()
				} else {
					r.Code = cmd.ProcessState.ExitCode()
				}
				r.Out, r.Err = o.String(), e.String()
				mu.Lock()
				enc.Encode(r)
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	return 0
}

// 200 commands from 8 callers on two nodes, spread over three, one of which dies
// meanwhile: every caller gets the true result.
func TestEveryCallerGetsTheTrueResult(t *testing.T) {
	t.Parallel()
	const each = 25
	c := up(t, 3)
	c.must("n1", "mkdir /unum/ran")
	var mu sync.Mutex
	var got []outcome
	some := make(chan struct{})
	var wg sync.WaitGroup
	for i, n := range []string{"n1", "n2"} {
		cmd := c.worker(n, "callers", c.bin, "/unum/ran", strconv.Itoa(1+i*4*each), strconv.Itoa(each))
		cmd.Stderr = os.Stderr
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		wg.Go(func() {
			for s := bufio.NewScanner(out); s.Scan(); {
				var r outcome
				if err := json.Unmarshal(s.Bytes(), &r); err != nil {
					t.Errorf("%s: %v", s.Text(), err)
					continue
				}
				mu.Lock()
				if got = append(got, r); len(got) == 40 {
					close(some)
				}
				mu.Unlock()
			}
			if err := cmd.Wait(); err != nil {
				t.Errorf("callers on %s: %v", n, err)
			}
		})
	}
	all := make(chan struct{})
	go func() { wg.Wait(); close(all) }()
	select {
	case <-some:
	case <-all:
		t.Fatalf("the callers ended after %d results", len(got))
	}
	// One runs there at that moment whatever the chances: it says so first.
	held, heldOut := exec.Command(c.bin, "lab", "exec", "--name", c.name, "n1", "--",
		c.bin, "run", "--on", "n3", "tail", "-n", "1", "-f", "/etc/passwd"), &lines{}
	held.Stdout, held.Stderr = heldOut, heldOut
	if err := held.Start(); err != nil {
		t.Fatal(err)
	}
	until(t, "a command that does not end runs on n3", 20*time.Second, func() bool { return heldOut.count() > 0 })
	c.lab("kill", "n3")
	<-all
	if code := waitFor(t, held, heldOut); code != 125 || !strings.Contains(heldOut.String(), "n3") {
		t.Errorf("the command that did not end: exit code %d: %v", code, heldOut)
	}
	if len(got) != 8*each {
		t.Fatalf("%d results of %d", len(got), 8*each)
	}
	ran := map[string]int{}
	lost := 1
	for _, r := range got {
		on := strings.TrimPrefix(strings.TrimSpace(r.Out), fmt.Sprintf("command %d on ", r.N))
		switch {
		case r.Failed != "":
			t.Errorf("command %d: %s", r.N, r.Failed)
		case r.Code == 125:
			// Lost with its node: said so, by name.
			lost++
			if !strings.Contains(r.Err, "n3") {
				t.Errorf("command %d: exit code 125 with %q", r.N, r.Err)
			}
		case r.Code != r.N%100:
			t.Errorf("command %d: exit code %d, want %d: %q %q", r.N, r.Code, r.N%100, r.Out, r.Err)
		case on != "n1" && on != "n2" && on != "n3" || r.Err != "":
			t.Errorf("command %d: %q %q", r.N, r.Out, r.Err)
		default:
			ran[on]++
			if trace := c.must("n1", fmt.Sprintf("cat /unum/ran/%d", r.N)); trace != "done\n" {
				t.Errorf("command %d ended with %d and left %q", r.N, r.Code, trace)
			}
		}
	}
	t.Logf("ran on %v, lost %d", ran, lost)
	if ran["n1"] == 0 || ran["n2"] == 0 || ran["n3"] == 0 {
		t.Errorf("not spread: %v", ran)
	}
	// The process table comes to tell the same: that a job is lost is presumed at
	// once, and yields when its home has told the record of the end it saw.
	var told string
	for end := time.Now().Add(20 * time.Second); ; time.Sleep(100 * time.Millisecond) {
		states := map[string]int{}
		var jobs []struct {
			State string `json:"state"`
			Node  string `json:"node"`
		}
		out := c.must("n2", "UNUM ps --all --json")
		if err := json.Unmarshal([]byte(out), &jobs); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		for _, j := range jobs {
			states[j.State]++
		}
		if len(jobs) == 8*each+1 && states["lost"] == lost {
			break
		}
		if told = fmt.Sprintf("%d jobs: %v", len(jobs), states); time.Now().After(end) {
			t.Fatalf("the process table has %s; %d callers were told of a loss", told, lost)
		}
	}
}
