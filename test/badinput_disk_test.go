package test

import (
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"testing"
	"time"
)

// upSized is up with disks of a size.
func upSized(t *testing.T, nodes int, size string) *cluster {
	t.Helper()
	needRoot(t)
	c := &cluster{t: t, bin: builtBinary(t), name: fmt.Sprintf("td%d", os.Getpid())}
	t.Cleanup(func() {
		if t.Failed() {
			logs, _ := exec.Command("sh", "-c", "tail -n 20 /var/lib/unum-lab/"+c.name+"/logs/n*.log").Output()
			t.Logf("%s", logs)
		}
		if _, errOut, code := c.unum(60*time.Second, "lab", "down", "--name", c.name); code != 0 {
			t.Errorf("lab down: %d %s", code, errOut)
		}
	})
	if _, errOut, code := c.unum(90*time.Second, "lab", "up", "--name", c.name, "--nodes", strconv.Itoa(nodes), "--disk-size", size); code != 0 {
		t.Fatalf("lab up: %d %s", code, errOut)
	}
	return c
}

// acknowledge writes files of random bytes until one fails, and prints the sum
// and the name of each that was synced, then why the next was not.
const acknowledge = `cd /unum && i=0; while [ $i -lt MOST ]; do
	head -c 1000003 /dev/urandom > /run/block
	{ cat /run/block > PREFIX$i && sync PREFIX$i; } 2> /run/why || { echo "stopped: $(cat /run/why)"; rm -f PREFIX$i; break; }
	sha256sum < /run/block | sed "s/-/PREFIX$i/"
	i=$((i+1)); done; rm /run/block`

// TestFullDisk fills the disks of the nodes, by writing to the tree and from
// beside it. Writers are told, nothing that was acknowledged is lost, reading
// goes on, and when there is space again so does all else.
func TestFullDisk(t *testing.T) {
	t.Parallel()
	c := upSized(t, 3, "256M")
	daemons := func() (all string) {
		for _, n := range []string{"n1", "n2", "n3"} {
			all += c.must(n, `for p in /proc/[0-9]*; do case "$(tr '\0' ' ' < $p/cmdline 2>/dev/null)" in "unum "*" --dir /var/lib/unum "*) echo ${p#/proc/};; esac; done`)
		}
		return all
	}
	began := daemons()
	var acked string
	write := func(node, prefix, most string) (stopped string) {
		t.Helper()
		out := c.must(node, strings.NewReplacer("PREFIX", prefix, "MOST", most).Replace(acknowledge))
		out, stopped, _ = strings.Cut(out, "stopped: ")
		acked += out
		return stopped
	}
	intact := func(when string) {
		t.Helper()
		for _, n := range []string{"n2", "n3", "n1"} {
			if r := c.run(n, "cd /unum && sha256sum --quiet -c <<'EOF'\n"+acked+"EOF\n"); r.code != 0 {
				t.Errorf("%s, read on %s: %v", when, n, r)
			}
		}
	}

	if why := write("n1", "a", "8"); why != "" {
		t.Fatalf("it stopped because of %q", why)
	}
	// From beside it, to the last byte.
	for _, n := range []string{"n1", "n2", "n3"} {
		if r := c.run(n, "cat /dev/zero > /var/lib/unum/filler"); !strings.Contains(r.err, "No space left") {
			t.Fatalf("%s cannot be filled: %v", n, r)
		}
	}
	for _, n := range []string{"n1", "n2", "n3"} {
		for _, script := range []string{
			"echo new > /unum/new && sync /unum/new",
			"head -c 100000 /dev/urandom >> /unum/a0-copy && sync /unum/a0-copy",
			"cp /unum/a0 /unum/copy && sync /unum/copy",
		} {
			if r := c.run(n, script); r.code == 0 || !strings.Contains(r.err, "No space left") && !strings.Contains(r.err, "quota") {
				t.Errorf("%s on %s with full disks: %v", script, n, r)
			}
		}
	}
	intact("all disks are full")
	// Changes that need no data go on for a while: to remove files must be possible.
	if out, code := c.sh("n2", "cd /unum && i=0; while [ $i -lt 500 ]; do ln a0 link && rm link || exit 1; i=$((i+1)); done"); code != 0 {
		t.Errorf("a thousand changes of names with full disks: %s", out)
	}
	if got := c.must("n3", "UNUM run --on n1 echo attached"); got != "attached\n" {
		t.Errorf("an attached command says %q", got)
	}
	if now := daemons(); now != began {
		t.Errorf("the daemons were %q, are %q", began, now)
	}

	// Space again.
	for _, n := range []string{"n1", "n2", "n3"} {
		c.must(n, "rm /var/lib/unum/filler")
	}
	c.must("n1", "rm /unum/a1 /unum/a2")
	var kept []string
	for _, line := range strings.SplitAfter(acked, "\n") {
		if !strings.HasSuffix(line, " a1\n") && !strings.HasSuffix(line, " a2\n") {
			kept = append(kept, line)
		}
	}
	acked = strings.Join(kept, "")
	for _, n := range []string{"n1", "n2", "n3"} {
		until(t, n+" can write again", 20*time.Second, func() bool {
			return c.run(n, "echo again > /unum/again-"+n+" && sync /unum/again-"+n).code == 0
		})
	}
	intact("there is space again")
	if now := daemons(); now != began {
		t.Errorf("the daemons were %q, are %q", began, now)
	}
	// By writing to the tree.
	if why := write("n1", "b", "500"); !strings.Contains(why, "No space left on device") {
		t.Fatalf("no disk is full after %d files; writing stopped because of %q", strings.Count(acked, "\n"), why)
	}
	for _, n := range []string{"n1", "n2", "n3"} {
		if r := c.run(n, "head -c 30000000 /dev/urandom > /unum/more && sync /unum/more"); r.code == 0 || !strings.Contains(r.err, "No space left") && !strings.Contains(r.err, "quota") {
			t.Errorf("a write to the full tree on %s: %v", n, r)
		}
	}
	intact("the tree is full")
	if now := daemons(); now != began {
		t.Errorf("the daemons were %q, are %q", began, now)
	}
	c.lab("kill", "n1", "n2", "n3")
	c.lab("start", "n1", "n2", "n3")
	intact("after a power loss of all")
	if got := c.must("n2", "cat /unum/again-n1 /unum/again-n3"); got != "again\nagain\n" {
		t.Errorf("after a power loss: %q", got)
	}
}
