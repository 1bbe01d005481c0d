package test

import (
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

// workers are the programs that this test binary is when a node runs it with
// UNUM_TEST_WORKER set: tests that act inside a node, where the lab's /unum is.
var workers = map[string]func(args []string) int{}

func TestMain(m *testing.M) {
	if w := workers[os.Getenv("UNUM_TEST_WORKER")]; w != nil {
		os.Exit(w(os.Args[1:]))
	}
	os.Exit(m.Run())
}

// worker is the command that runs a worker on a node; its standard streams are
// the caller's to connect.
func (c *cluster) worker(node, name string, args ...string) *exec.Cmd {
	self, err := os.Executable()
	if err != nil {
		c.t.Fatal(err)
	}
	if self, err = filepath.EvalSymlinks(self); err != nil {
		c.t.Fatal(err)
	}
	return exec.Command(c.bin, append([]string{"lab", "exec", "--name", c.name, node, "--",
		"env", "UNUM_TEST_WORKER=" + name, self}, args...)...)
}
