// Package need is for tests only: it gives them what they need of the machine. Where
// that is missing a test is skipped; where UNUM_TEST_REQUIRE is set, as in CI, it
// fails: a test that nobody has run proves nothing.
package need

import (
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"strconv"
	"sync"
	"testing"
)

// Missing ends a test because the machine lacks what the text says.
func Missing(t testing.TB, format string, args ...any) {
	t.Helper()
	if os.Getenv("UNUM_TEST_REQUIRE") != "" {
		t.Fatalf("missing, and UNUM_TEST_REQUIRE is set: "+format, args...)
		return
	}
	t.Skipf(format, args...)
}

// Root ends a test that is not run by root; why says what it needs root for.
func Root(t testing.TB, why string) {
	t.Helper()
	if os.Geteuid() != 0 {
		Missing(t, "needs root: %s", why)
	}
}

// Program ends a test on a machine without the program.
func Program(t testing.TB, name string) {
	t.Helper()
	if _, err := exec.LookPath(name); err != nil {
		Missing(t, "needs %s: %v", name, err)
	}
}

// given are the ports that Address has given in this process.
var given sync.Map

// Address returns an address of this machine for a server that is stopped and
// started again: no outgoing connection, of whatever program, can come by its port
// meanwhile.
func Address(t testing.TB) string {
	t.Helper()
	const file = "/proc/sys/net/ipv4/ip_local_port_range"
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	var end int // from here on ports are for outgoing connections
	if _, err := fmt.Sscan(string(b), &end); err != nil || end <= 10000 {
		t.Fatalf("%s: %q: servers have no ports of their own here", file, b)
	}
	for range 1000 {
		port := 10000 + rand.IntN(end-10000)
		if _, taken := given.LoadOrStore(port, true); taken {
			continue
		}
		l, err := net.Listen("tcp", net.JoinHostPort("", strconv.Itoa(port)))
		if err != nil {
			continue
		}
		l.Close()
		return net.JoinHostPort("127.0.0.1", strconv.Itoa(port))
	}
	t.Fatal("no free port was found")
	return ""
}

// Self puts the test's own program at path, for every user to execute. Another
// process writes it: a child that this one forks meanwhile would hold it open for
// writing, and it could not be executed (ETXTBSY).
func Self(t testing.TB, path string) {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command("install", "-m", "755", self, path).CombinedOutput(); err != nil {
		t.Fatalf("install %s: %v: %s", path, err, out)
	}
}
