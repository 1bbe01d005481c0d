package proc

import (
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/unum-os/unum/internal/control"
	"github.com/unum-os/unum/internal/need"
	"github.com/unum-os/unum/internal/proc/jobapi"
	"github.com/unum-os/unum/internal/wire"
)

// greedyEnv makes the test program a client that asks for more than is its own.
const greedyEnv = "UNUM_TEST_GREEDY"

// greedy runs a command with a niceness and limits its user may not give it, and
// prints what the command got.
func greedy() int {
	fail := func(err error) int {
		fmt.Println(err)
		return 1
	}
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: 100, Max: 200}); err != nil {
		return fail(err)
	}
	c, err := control.Dial(context.Background(), os.Getenv(greedyEnv))
	if err != nil {
		return fail(err)
	}
	r, w, err := os.Pipe()
	if err != nil {
		return fail(err)
	}
	a := jobapi.Ask{Program: jobapi.Program{Argv: [][]byte{[]byte("sh"), []byte("-c"), []byte("nice; ulimit -Sn; ulimit -Hn; id -u")}, Env: [][]byte{[]byte("PATH=/bin:/usr/bin")},
		Cwd: []byte("/"), Stdio: [3]uint8{jobapi.Null, jobapi.Pipe, jobapi.Same}, Nice: -20,
		Rlimits: []jobapi.Rlimit{{Resource: unix.RLIMIT_NOFILE, Cur: 5000, Max: 5000}, {Resource: 1 << 20, Cur: 1, Max: 1}, {Resource: -1}}}}
	if err := c.Start(jobapi.Verb, wire.MustMarshal(a), w); err != nil {
		return fail(err)
	}
	w.Close()
	if _, err := io.Copy(os.Stdout, r); err != nil {
		return fail(err)
	}
	if _, _, err := c.Recv(); err != nil {
		return fail(err)
	}
	return 0
}

// TestGreedyCaller: what a request says of limits and niceness counts as far as
// its user could have had it, and no further.
func TestGreedyCaller(t *testing.T) {
	r := newRig(t)
	path := filepath.Join(filepath.Dir(r.sock), "client") // where any user may execute it
	need.Self(t, path)
	c := exec.Command(path)
	c.Env, c.Dir = append(os.Environ(), greedyEnv+"="+r.sock), "/"
	c.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 1234, Gid: 1234}}
	out, err := c.CombinedOutput()
	if want := "0\n200\n200\n1234\n"; err != nil || string(out) != want {
		t.Errorf("%q, %v; want %q", strings.TrimSpace(string(out)), err, want)
	}
}
