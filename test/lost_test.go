package test

import (
	"encoding/json"
	"os/exec"
	"strconv"
	"strings"
	"testing"
	"time"
)

// hold starts a command that does not end on a node, from that node, so that
// nobody else knows of it but by the record; and waits until the record does.
func (c *cluster) hold(node, asked string) (id string) {
	c.t.Helper()
	cmd := exec.Command(c.bin, "lab", "exec", "--name", c.name, node, "--", c.bin, "run", "--on", node, "sleep", "7654321")
	if err := cmd.Start(); err != nil {
		c.t.Fatal(err)
	}
	c.t.Cleanup(func() { cmd.Wait() }) // it ends with its node
	until(c.t, "the command on "+node+" runs", 20*time.Second, func() bool {
		for _, j := range c.jobs(asked, "ps --json") {
			if j.Node == node && j.State == "running" && strings.Contains(j.Command, "7654321") {
				id = strconv.FormatUint(j.ID, 10)
			}
		}
		return id != ""
	})
	// A node tells the record of its jobs in their order, and one that has ended
	// is shown by the record alone.
	mark := "told-" + id
	c.must(node, "UNUM run --on "+node+" echo "+mark)
	until(c.t, "the record knows the command on "+node, 20*time.Second, func() bool {
		for _, j := range c.jobs(asked, "ps --all --json") {
			if j.State == "exited" && strings.Contains(j.Command, mark) {
				return true
			}
		}
		return false
	})
	return id
}

type psJob struct {
	ID      uint64 `json:"id"`
	Node    string `json:"node"`
	State   string `json:"state"`
	Command string `json:"command"`
}

func (c *cluster) jobs(node, verb string) (out []psJob) {
	c.t.Helper()
	s := c.must(node, "UNUM "+verb)
	if err := json.Unmarshal([]byte(s), &out); err != nil {
		c.t.Fatalf("%s: %v: %s", verb, err, s)
	}
	return out
}

// lost checks that the jobs, by id, become lost, and that who waits is told.
func (c *cluster) lost(asked string, ids ...string) {
	c.t.Helper()
	state := map[string]string{}
	until(c.t, "the jobs are lost", 40*time.Second, func() bool {
		clear(state)
		for _, j := range c.jobs(asked, "ps --all --json") {
			state[strconv.FormatUint(j.ID, 10)] = j.State
		}
		for _, id := range ids {
			if state[id] != "lost" {
				return false
			}
		}
		return true
	})
	for _, id := range ids {
		if out, code := c.sh(asked, "timeout 30 UNUM wait "+id); code != 125 || !strings.Contains(out, "lost") {
			c.t.Errorf("wait %s: exit code %d: %s", id, code, out)
		}
	}
}

// TestJobsOfTheDeadAreLost: whoever dies, in whatever company, and whether it
// comes back or not, its commands do not stay in the process table.
func TestJobsOfTheDeadAreLost(t *testing.T) {
	c := up(t, 3)
	// Two at once: for a while nobody can lead the record and note the deaths.
	j1, j2 := c.hold("n1", "n3"), c.hold("n2", "n3")
	c.lab("kill", "n1", "n2")
	c.lab("start", "n2")
	c.lost("n3", j1, j2)
	// All: nobody is left who has seen a death.
	c.lab("start", "n1")
	j1, j3 := c.hold("n1", "n2"), c.hold("n3", "n2")
	c.lab("kill", "n1", "n2", "n3")
	c.lab("start", "n1", "n2", "n3")
	c.lost("n2", j1, j3)
}
