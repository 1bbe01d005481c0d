package lease

import (
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/unum-os/unum/internal/clock"
	"github.com/unum-os/unum/internal/ids"
)

func want(t *testing.T, what string, got []Effect, want ...Effect) {
	t.Helper()
	if !slices.Equal(got, want) {
		t.Fatalf("%s:\n got %+v\nwant %+v", what, got, want)
	}
}

func TestWriterAmongReaders(t *testing.T) {
	tab := New()
	want(t, "first reader", tab.Acquire(0, 1, 9, Read, 1), Effect{Kind: Granted, Ticket: 1, Session: 1, Ino: 9, Mode: Read, Seq: 1})
	want(t, "second reader", tab.Acquire(0, 2, 9, Read, 2), Effect{Kind: Granted, Ticket: 2, Session: 2, Ino: 9, Mode: Read, Seq: 2})
	want(t, "reader wants to write: only the other is recalled", tab.Acquire(5, 1, 9, Write, 3),
		Effect{Kind: Recall, Session: 2, Ino: 9, Mode: Write, Seq: 2})
	want(t, "a reader does not pass the writer", tab.Acquire(5, 3, 9, Read, 4), Effect{Kind: NotNow, Ticket: 4, Session: 3, Ino: 9, Mode: Read})
	want(t, "the waiting writer still reads", tab.Acquire(5, 1, 9, Read, 5), Effect{Kind: Granted, Ticket: 5, Session: 1, Ino: 9, Mode: Read, Seq: 3})
	if o := tab.Overdue(clock.Instant(2*time.Second), time.Second); !slices.Equal(o, []ids.Session{2}) {
		t.Fatalf("overdue %v", o)
	}
	if o := tab.Overdue(clock.Instant(time.Second), time.Second); o != nil {
		t.Fatalf("overdue too early: %v", o)
	}
	want(t, "a late answer is no answer", tab.Released(6, 2, 9, 1, false))
	want(t, "the answer", tab.Released(6, 2, 9, 2, true), Effect{Kind: Granted, Ticket: 3, Session: 1, Ino: 9, Mode: Write, Seq: 4})
	if o := tab.Openers(9); !slices.Equal(o, []ids.Session{2}) {
		t.Fatalf("openers %v", o)
	}
	want(t, "a writer that asks to read keeps write", tab.Acquire(6, 1, 9, Read, 6), Effect{Kind: Granted, Ticket: 6, Session: 1, Ino: 9, Mode: Write, Seq: 5})
	want(t, "a reader waits for a writer", tab.Acquire(7, 2, 9, Read, 7), Effect{Kind: Recall, Session: 1, Ino: 9, Mode: Read, Seq: 5})
	want(t, "so does the next", tab.Acquire(7, 3, 9, Read, 8))
	want(t, "both are let in", tab.Released(8, 1, 9, 5, false),
		Effect{Kind: Granted, Ticket: 7, Session: 2, Ino: 9, Mode: Read, Seq: 6}, Effect{Kind: Granted, Ticket: 8, Session: 3, Ino: 9, Mode: Read, Seq: 7})
}

// Since tells a session that goes on holding from one that has given up and
// holds again.
func TestSince(t *testing.T) {
	tab := New()
	since := func() uint64 {
		t.Helper()
		h, ok := tab.Find(1, 9)
		if !ok {
			t.Fatal("it does not hold")
		}
		return h.Since
	}
	tab.Acquire(0, 1, 9, Read, 1)
	if s := since(); s != 1 {
		t.Fatalf("first grant: since %d", s)
	}
	tab.Acquire(0, 1, 9, Write, 2)
	if s := since(); s != 1 {
		t.Fatalf("more, without a break: since %d", s)
	}
	tab.Acquire(0, 2, 9, Write, 3)
	tab.Released(0, 1, 9, 2, true)
	tab.Acquire(0, 1, 9, Write, 4)
	tab.Released(0, 2, 9, 3, true)
	if s := since(); s != 4 {
		t.Fatalf("after another: since %d", s)
	}
}

func TestClaims(t *testing.T) {
	tab := New()
	tab.Acquire(0, 1, 5, Write, 1) // seq 1
	tab.Acquire(0, 2, 6, Read, 2)  // seq 2
	want(t, "what the claimant gives up is not recalled", tab.Claim(0, 3, []ids.Inode{5, 6}, 1, []Held{{5, 1}}),
		Effect{Kind: Recall, Session: 2, Ino: 6, Mode: Write, Seq: 2})
	want(t, "a reader is sent to the committed state", tab.Acquire(0, 3, 5, Read, 4), Effect{Kind: NotNow, Ticket: 4, Session: 3, Ino: 5, Mode: Read})
	want(t, "a claim passes beside one that waits", tab.Claim(0, 5, []ids.Inode{5}, 3, nil), Effect{Kind: Claimed, Ticket: 5, Session: 3})
	want(t, "a writer queues", tab.Acquire(0, 3, 5, Write, 6))
	want(t, "a later claim does not pass the writer", tab.Claim(0, 7, []ids.Inode{5}, 0, nil))
	want(t, "free", tab.Released(0, 2, 6, 2, false), Effect{Kind: Claimed, Ticket: 3, Session: 1})
	want(t, "one claim ends", tab.Unclaim(0, 5))
	want(t, "the other too: the writer, and at once the next claim's recall", tab.Unclaim(0, 3),
		Effect{Kind: Granted, Ticket: 6, Session: 3, Ino: 5, Mode: Write, Seq: 3},
		Effect{Kind: Recall, Session: 3, Ino: 5, Mode: Write, Seq: 3})
	want(t, "the session ends", tab.SessionEnded(0, 3), Effect{Kind: Claimed, Ticket: 7})
	want(t, "cancelling an active claim does nothing", tab.Cancel(0, 7))
	want(t, "an answer older than the grant gives nothing up", tab.Claim(0, 8, nil, 3, nil), Effect{Kind: Claimed, Ticket: 8, Session: 3})
}

func TestRelinquishingAnOlderGrantIsNotEnough(t *testing.T) {
	tab := New()
	tab.Acquire(0, 1, 5, Read, 1)
	tab.Acquire(0, 1, 5, Read, 2) // a second answer, seq 2, is on its way to the client
	want(t, "claim", tab.Claim(0, 3, []ids.Inode{5}, 1, []Held{{5, 1}}), Effect{Kind: Recall, Session: 1, Ino: 5, Mode: Write, Seq: 2})
}

func TestWaitersOfAnEndedSession(t *testing.T) {
	tab := New()
	tab.Acquire(0, 1, 5, Write, 1)
	tab.Acquire(0, 2, 5, Write, 2)
	tab.Claim(0, 3, []ids.Inode{5, 6}, 2, nil)
	tab.Acquire(0, 3, 6, Write, 4)
	want(t, "gone, and the one behind goes on", tab.SessionEnded(0, 2),
		Effect{Kind: Gone, Ticket: 2, Session: 2}, Effect{Kind: Gone, Ticket: 3, Session: 2},
		Effect{Kind: Granted, Ticket: 4, Session: 3, Ino: 6, Mode: Write, Seq: 2})
}

// TestRulesOnly holds the package to what doc.go promises: no I/O, no clock, no
// goroutine.
func TestRulesOnly(t *testing.T) {
	allowed := []string{"cmp", "fmt", "slices", "time", // time: for Duration alone
		"github.com/unum-os/unum/internal/clock", // for Instant alone
		"github.com/unum-os/unum/internal/ids"}
	files, err := os.ReadDir(".")
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		if !strings.HasSuffix(f.Name(), ".go") || strings.HasSuffix(f.Name(), "_test.go") {
			continue
		}
		tree, err := parser.ParseFile(token.NewFileSet(), f.Name(), nil, 0)
		if err != nil {
			t.Fatal(err)
		}
		for _, im := range tree.Imports {
			if p, _ := strconv.Unquote(im.Path.Value); !slices.Contains(allowed, p) {
				t.Errorf("%s imports %s", f.Name(), p)
			}
		}
		ast.Inspect(tree, func(n ast.Node) bool {
			switch n := n.(type) {
			case *ast.GoStmt:
				t.Errorf("%s starts a goroutine", f.Name())
			case *ast.SelectorExpr:
				x, ok := n.X.(*ast.Ident)
				if ok && (x.Name == "clock" && n.Sel.Name != "Instant" || x.Name == "time" && n.Sel.Name != "Duration") {
					t.Errorf("%s uses %s.%s", f.Name(), x.Name, n.Sel.Name)
				}
			}
			return true
		})
	}
}

func BenchmarkAcquireRelease(b *testing.B) {
	tab := New()
	for i := range b.N {
		ino := ids.Inode(i % 100000)
		es := tab.Acquire(0, 1, ino, Read, uint64(i))
		tab.Released(0, 1, ino, es[0].Seq, false)
	}
}

func BenchmarkClaim(b *testing.B) {
	tab := New()
	inos := []ids.Inode{1, 2}
	for i := range b.N {
		tab.Claim(0, uint64(i), inos, 1, nil)
		tab.Unclaim(0, uint64(i))
	}
}
