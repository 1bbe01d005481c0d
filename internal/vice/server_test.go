package vice

import (
	"testing"

	"github.com/unum-os/unum/internal/errs"
)

// A host whose disk fails ends, and another leads: who asked it asks there, and
// what he did has not failed.
func TestFailingDiskIsNoAnswer(t *testing.T) {
	for class, want := range map[errs.Class]errs.Class{errs.IO: errs.Unavailable, errs.Corrupt: errs.Corrupt, errs.NoSpace: errs.NoSpace, errs.NotFound: errs.NotFound} {
		err := forClient("vice.x", errs.E(class, "write", "log", "it is so"))
		if got := errs.ClassOf(err); got != want {
			t.Errorf("%v is told as %v", class, got)
		}
	}
	if err := forClient("vice.x", nil); err != nil {
		t.Error(err)
	}
}
