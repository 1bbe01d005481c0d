// Package test runs the real binary on real clusters, each in a lab of its own.
package test

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/unum-os/unum/internal/need"
)

// builtBinary is the built unum.
func builtBinary(t *testing.T) string {
	t.Helper()
	p, err := filepath.Abs("../bin/unum")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(p); err != nil {
		t.Fatalf("%v: make build first", err)
	}
	return p
}

// cluster is a lab for one test.
type cluster struct {
	t    *testing.T
	bin  string
	name string
}

// needRoot skips the test where there is no root to run a lab, for which the
// machine's namespaces, mounts and loop devices are needed. With
// UNUM_TEST_REQUIRE set it fails instead.
func needRoot(t *testing.T) {
	t.Helper()
	need.Root(t, "for namespaces, mounts and loop devices")
}

// up makes a lab; flags are more of lab up's.
func up(t *testing.T, nodes int, flags ...string) *cluster {
	t.Helper()
	needRoot(t)
	c := &cluster{t: t, bin: builtBinary(t), name: fmt.Sprintf("t%d-%d", os.Getpid(), time.Now().UnixNano()%1e6)}
	t.Cleanup(func() {
		if t.Failed() {
			logs, _ := filepath.Glob("/var/lib/unum-lab/" + c.name + "/logs/*.log")
			for _, l := range logs {
				if b, err := os.ReadFile(l); err == nil {
					t.Logf("%s:\n%s", l, b[max(0, len(b)-6000):])
				}
			}
		}
		if _, errOut, code := c.unum(60*time.Second, "lab", "down", "--name", c.name); code != 0 {
			t.Errorf("lab down: %d %s", code, errOut)
		}
	})
	args := append([]string{"lab", "up", "--name", c.name, "--nodes", strconv.Itoa(nodes), "--disk-size", "2G"}, flags...)
	if _, errOut, code := c.unum(90*time.Second, args...); code != 0 {
		t.Fatalf("lab up: %d %s", code, errOut)
	}
	return c
}

func (c *cluster) unum(limit time.Duration, args ...string) (out, errOut string, code int) {
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	cmd := exec.CommandContext(ctx, c.bin, args...)
	var o, e bytes.Buffer
	cmd.Stdout, cmd.Stderr = &o, &e
	err := cmd.Run()
	if err != nil && cmd.ProcessState == nil {
		return "", err.Error(), -1
	}
	if ctx.Err() != nil {
		return o.String(), e.String() + " (over time)", -1
	}
	return o.String(), e.String(), cmd.ProcessState.ExitCode()
}

// sh runs a shell command in a node.
func (c *cluster) sh(node, script string) (out string, code int) {
	o, e, code := c.unum(60*time.Second, "lab", "exec", "--name", c.name, node, "--", "sh", "-c", strings.ReplaceAll(script, "UNUM", c.bin))
	if code != 0 {
		o += e
	}
	return o, code
}

// must runs a shell command in a node, which must succeed.
func (c *cluster) must(node, script string) string {
	c.t.Helper()
	out, code := c.sh(node, script)
	if code != 0 {
		c.t.Fatalf("%s: %s: exit code %d: %s", node, script, code, out)
	}
	return out
}

func (c *cluster) lab(verb string, args ...string) {
	c.t.Helper()
	if _, e, code := c.unum(60*time.Second, append([]string{"lab", verb, "--name", c.name}, args...)...); code != 0 {
		c.t.Fatalf("lab %s %v: %d %s", verb, args, code, e)
	}
}

func TestThreeNodesAreOneComputer(t *testing.T) {
	t.Parallel()
	c := up(t, 3)
	c.must("n1", "mkdir /unum/d && echo one > /unum/d/f")
	if got := c.must("n2", "cat /unum/d/f"); got != "one\n" {
		t.Fatalf("n2 reads %q", got)
	}
	// Rewritten in place and by rename, read at once elsewhere: never stale.
	for i := range 20 {
		want := fmt.Sprintf("round %d\n", i)
		if i%2 == 0 {
			c.must("n1", fmt.Sprintf("echo round %d > /unum/d/f", i))
		} else {
			c.must("n3", fmt.Sprintf("echo round %d > /unum/d/g && mv /unum/d/g /unum/d/f", i))
		}
		if got := c.must("n2", "cat /unum/d/f"); got != want {
			t.Fatalf("n2 reads %q, want %q", got, want)
		}
	}
	// Appends from three nodes at once: none lost.
	var wg sync.WaitGroup
	for _, n := range []string{"n1", "n2", "n3"} {
		wg.Go(func() {
			if out, code := c.sh(n, "i=0; while [ $i -lt 50 ]; do echo "+n+" $i >> /unum/d/log; i=$((i+1)); done"); code != 0 {
				t.Errorf("%s: %s", n, out)
			}
		})
	}
	wg.Wait()
	if got := strings.TrimSpace(c.must("n2", "sort -u /unum/d/log | wc -l")); got != "150" {
		t.Fatalf("%s of 150 appended lines are there", got)
	}
	// Commands: where they run, what they see, how they end.
	if got := c.must("n1", "cd /unum/d && UNUM run --on n2 sh -c 'hostname; pwd'"); got != "n2\n/unum/d\n" {
		t.Fatalf("run: %q", got)
	}
	for script, want := range map[string]int{
		"UNUM run --on n3 sh -c 'exit 7'":               7,
		"UNUM run --on n3 sh -c 'kill -9 $$'":           137,
		"UNUM run --on n3 /no/such":                     127,
		"UNUM run --on n3 /etc/passwd":                  126,
		"UNUM run --on n3 /etc":                         126,
		"UNUM run --on nowhere true":                    125,
		"UNUM sh -c 'exit 3'":                           3,
		"UNUM wait $(UNUM run --detach sh -c 'exit 5')": 5,
	} {
		if out, code := c.sh("n1", script); code != want {
			t.Errorf("%s: exit code %d, want %d: %s", script, code, want, out)
		}
	}
	if out := c.must("n2", "UNUM why $(UNUM run --detach true)"); !strings.Contains(out, "n1") || !strings.Contains(out, "n3") {
		t.Errorf("why: %s", out)
	}
	// Any one of three may die: files and writes go on.
	c.lab("kill", "n1")
	if got := c.must("n2", "sort -u /unum/d/log | wc -l; echo after > /unum/d/after; sync /unum/d/after"); strings.TrimSpace(got) != "150" {
		t.Fatalf("after n1 died: %s", got)
	}
	if got := c.must("n3", "cat /unum/d/after"); got != "after\n" {
		t.Fatalf("n3 reads %q", got)
	}
	c.lab("start", "n1")
	if got := c.must("n1", "cat /unum/d/after"); got != "after\n" {
		t.Fatalf("n1 reads %q after its return", got)
	}
}

func TestAllLosePowerAndReturn(t *testing.T) {
	t.Parallel()
	c := up(t, 3)
	for i := range 3 {
		c.must("n1", fmt.Sprintf("head -c 300000 /dev/urandom > /unum/big%d && sync /unum/big%d && echo %d > /unum/small && sync /unum/small", i, i, i))
		sum := c.must("n2", fmt.Sprintf("sha256sum < /unum/big%d", i))
		c.lab("kill", "n1", "n2", "n3")
		c.lab("start", "n1", "n2", "n3")
		if got := c.must("n3", fmt.Sprintf("sha256sum < /unum/big%d", i)); got != sum {
			t.Fatalf("round %d: %s, was %s", i, got, sum)
		}
		if got := c.must("n2", "cat /unum/small"); got != fmt.Sprintf("%d\n", i) {
			t.Fatalf("round %d: small reads %q", i, got)
		}
	}
}
