package need

import (
	"testing"
)

// outcome is a test that remembers how it was ended.
type outcome struct {
	testing.TB
	skipped, failed bool
}

func (o *outcome) Helper()               {}
func (o *outcome) Skipf(string, ...any)  { o.skipped = true }
func (o *outcome) Fatalf(string, ...any) { o.failed = true }

// TestMissing: what is missing is skipped, unless it is required.
func TestMissing(t *testing.T) {
	for required, want := range map[string]outcome{"": {skipped: true}, "1": {failed: true}} {
		t.Setenv("UNUM_TEST_REQUIRE", required)
		var o outcome
		if Program(&o, "unum-no-such-program"); o.skipped != want.skipped || o.failed != want.failed {
			t.Errorf("UNUM_TEST_REQUIRE=%q: skipped %v, failed %v", required, o.skipped, o.failed)
		}
		o = outcome{}
		if Program(&o, "go"); o.skipped || o.failed {
			t.Errorf("what is there is missing: %+v", o)
		}
	}
}
