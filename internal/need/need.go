// Package need is for tests only: it says what they need of the machine. Where
// that is missing a test is skipped; where UNUM_TEST_REQUIRE is set, as in CI, it
// fails: a test that nobody has run proves nothing.
package need

import (
	"os"
	"os/exec"
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
