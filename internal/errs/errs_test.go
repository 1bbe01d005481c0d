package errs

import (
	"errors"
	"fmt"
	"syscall"
	"testing"
)

func TestEveryClassIsInTheTable(t *testing.T) {
	for c := Class(0); c < numClasses; c++ {
		if table[c].name == "" || table[c].errno == 0 || table[c].code == 0 {
			t.Errorf("class %d has no words, no errno, or no code", c)
		}
	}
}

func TestClassSurvivesWrapping(t *testing.T) {
	base := E(NoSpace, "write", "/unum/x", "3 bytes left on n2").WithRemedy("free some space on n2")
	err := fmt.Errorf("shipping: %w", Wrap(base, "ship", "n1"))
	if !Has(err, NoSpace) || Errno(err) != syscall.ENOSPC || !errors.Is(err, NoSpace.Err()) {
		t.Fatalf("class lost: %v is %v", err, ClassOf(err))
	}
	if Has(errors.Join(errors.New("a"), base), NotFound) || !Has(errors.Join(errors.New("a"), base), NoSpace) {
		t.Fatal("class of a joined error")
	}
	want := "write /unum/x: 3 bytes left on n2\ntry: free some space on n2"
	if base.Error() != want {
		t.Fatalf("got %q want %q", base.Error(), want)
	}
}

func TestErrno(t *testing.T) {
	if Errno(nil) != 0 || Errno(errors.New("x")) != syscall.EIO || Errno(syscall.ENOTDIR) != syscall.ENOTDIR {
		t.Fatal("errno mapping")
	}
}
