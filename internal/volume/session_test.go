package volume

import (
	"bytes"
	"errors"
	"flag"
	"os"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/unum-os/unum/internal/errs"
	"github.com/unum-os/unum/internal/ids"
	"github.com/unum-os/unum/internal/wire"
)

var update = flag.Bool("update", false, "rewrite golden files")

func TestExactlyOnce(t *testing.T) {
	r := newReplica(t)
	defer r.close()
	s := r.session
	cmd := func(seq, acked uint64, name string) *Results {
		return r.apply(Command{Session: s, Seq: seq, Acked: acked, Ops: []Op{
			{Kind: OpCreate, Parent: 1, Name: name, Mode: sIFREG},
			{Kind: OpCreate, Parent: 1, Name: name, Mode: sIFREG},
		}})
	}
	first := cmd(1, 0, "a")
	if first.Ops[0].Err != 0 || errs.Class(first.Ops[1].Err) != errs.Exists {
		t.Fatalf("%+v", first)
	}
	third := cmd(3, 0, "c") // out of order
	before := r.dumpBut()
	if again := cmd(1, 0, "a"); !bytes.Equal(wire.MustMarshal(again), wire.MustMarshal(first)) {
		t.Fatalf("%+v, want %+v", again, first)
	}
	if r.dumpBut() != before {
		t.Fatal("a repeated command changed something")
	}
	cmd(2, 2, "b")
	if again := cmd(3, 2, "c"); again.Ops[0].Ino != third.Ops[0].Ino {
		t.Fatalf("%+v", again)
	}
	if res := cmd(1, 0, "a"); errs.Class(res.Err) != errs.Stale {
		t.Fatalf("an acknowledged command was taken again: %+v", res)
	}
	if res := cmd(2+Window, 0, "z"); errs.Class(res.Err) != errs.Busy {
		t.Fatalf("%+v", res)
	}
	if res := cmd(1+Window, 0, "z"); res.Err != 0 {
		t.Fatalf("%+v", res)
	}
	r.apply(Command{End: s})
	if res := cmd(4, 0, "d"); errs.Class(res.Err) != errs.Stale {
		t.Fatalf("%+v", res)
	}
	if got := r.dumpBut('c', 'i', 'e'); bytes.Contains([]byte(got), []byte("Gd")) || bytes.Contains([]byte(got), []byte("Gs")) {
		t.Fatalf("an ended session left\n%s", got)
	}
	r.replay()
}

func TestSequenceZeroIsNotRemembered(t *testing.T) {
	r := newReplica(t)
	defer r.close()
	c := Command{Session: r.session, Ops: []Op{{Kind: OpCreate, Parent: 1, Name: "a", Mode: sIFREG}}}
	if res := r.apply(c); res.Err != 0 || res.Ops[0].Err != 0 {
		t.Fatalf("%+v", res)
	}
	if res := r.apply(c); res.Err != 0 || errs.Class(res.Ops[0].Err) != errs.Exists {
		t.Fatalf("%+v", res)
	}
	if bytes.Contains([]byte(r.dumpBut()), []byte("Gd")) {
		t.Fatal("its results were kept")
	}
	r.apply(Command{End: r.session})
	if res := r.apply(c); errs.Class(res.Err) != errs.Stale {
		t.Fatalf("%+v", res)
	}
	r.replay()
}

func TestSessions(t *testing.T) {
	r := newReplica(t)
	defer r.close()
	if again := r.open(1, 11); again != r.session {
		t.Fatalf("the same open gave session %d, not %d", again, r.session)
	}
	two := r.open(2, 11)
	f := r.create(1, "f", sIFREG)
	r.must(Op{Kind: OpWrite, Ino: f, Extents: []Extent{{Len: 3, Data: []byte("abc")}}})
	lock := func(s ids.Session, typ uint32) Result {
		return r.ops(s, Op{Kind: OpSetLock, Ino: f, Lock: &Lock{Kind: LockFlock, Owner: 1, Type: typ}}).Ops[0]
	}
	if res := lock(r.session, unix.F_WRLCK); res.Err != 0 {
		t.Fatalf("%+v", res)
	}
	if res := lock(two, unix.F_RDLCK); errs.Class(res.Err) != errs.LockHeld || res.Lock == nil || res.Lock.Session != r.session {
		t.Fatalf("%+v", res)
	}
	if res := lock(r.session, unix.F_RDLCK); res.Err != 0 { // downgrade
		t.Fatalf("%+v", res)
	}
	if res := lock(two, unix.F_RDLCK); res.Err != 0 {
		t.Fatalf("%+v", res)
	}
	if res := lock(two, unix.F_WRLCK); errs.Class(res.Err) != errs.LockHeld {
		t.Fatalf("%+v", res)
	}
	res := r.must(Op{Kind: OpUnlink, Parent: 1, Name: "f", Keep: []ids.Session{two, r.session, 999, two}})
	if len(res.Gone) != 0 || res.Attrs[0].Nlink != 0 || res.Attrs[0].Size != 3 {
		t.Fatalf("%+v", res)
	}
	if kept, err := r.view().Orphans(two); err != nil || len(kept) != 1 || kept[0] != f {
		t.Fatalf("%v %v", kept, err)
	}
	r.check()
	newer := r.open(1, 12) // the node's first session ends
	if newer <= r.session {
		t.Fatalf("session %d after %d", newer, r.session)
	}
	if res := lock(two, unix.F_WRLCK); res.Err != 0 { // the reader is gone
		t.Fatalf("%+v", res)
	}
	r.check()
	if open, err := r.view().Sessions(); err != nil || len(open) != 2 || open[0] != (SessionInfo{two, 2}) || open[1] != (SessionInfo{newer, 1}) {
		t.Fatalf("%+v %v", open, err)
	}
	end := r.apply(Command{End: two})
	if len(end.Ops) != 1 || len(end.Ops[0].Gone) != 1 || end.Ops[0].Gone[0] != f {
		t.Fatalf("%+v", end)
	}
	if end := r.apply(Command{End: two}); end.Err != 0 || len(end.Ops) != 0 {
		t.Fatalf("%+v", end)
	}
	if u, err := r.view().Stat(); err != nil || u != (Usage{Inodes: 1}) {
		t.Fatalf("%+v %v", u, err)
	}
	r.check()
	r.replay()
}

func TestReplacedFileIsKeptAndItsLocksGoWithIt(t *testing.T) {
	r := newReplica(t)
	defer r.close()
	a, b := r.create(1, "a", sIFREG), r.create(1, "b", sIFREG)
	for _, kind := range []LockKind{LockPosix, LockFlock} {
		r.must(Op{Kind: OpSetLock, Ino: b, Lock: &Lock{Kind: kind, Owner: 1, End: 5, Type: unix.F_WRLCK}})
	}
	res := r.must(Op{Kind: OpRename, Parent: 1, Name: "a", Ino: a, ToParent: 1, ToName: "b", ToIno: b, Keep: []ids.Session{r.session}})
	if len(res.Gone) != 0 || r.attr(b).Nlink != 0 {
		t.Fatalf("%+v", res)
	}
	r.check()
	if res := r.must(Op{Kind: OpDrop, Ino: b}); len(res.Gone) != 1 {
		t.Fatalf("%+v", res)
	}
	if locks, err := r.view().Locks(b); err != nil || len(locks) != 0 {
		t.Fatalf("%+v %v", locks, err)
	}
	r.check()
	r.must(Op{Kind: OpSetLock, Ino: b, Lock: &Lock{Kind: LockPosix, Owner: 1, End: 5, Type: unix.F_UNLCK}})
	r.replay()
}

func TestTmpfile(t *testing.T) {
	r := newReplica(t)
	defer r.close()
	tmp := func() ids.Inode {
		return r.must(Op{Kind: OpCreate, Parent: 1, Mode: sIFREG, Flags: CreateTmpfile}).Ino
	}
	one, two := tmp(), tmp()
	if r.attr(1).Size != 0 || r.attr(one).Nlink != 0 {
		t.Fatal("a temporary file has a name")
	}
	r.must(Op{Kind: OpLink, Ino: one, Parent: 1, Name: "alive"})
	r.check()
	r.must(Op{Kind: OpDrop, Ino: one})
	if res := r.must(Op{Kind: OpDrop, Ino: two}); len(res.Gone) != 1 {
		t.Fatalf("%+v", res)
	}
	r.must(Op{Kind: OpDrop, Ino: two})
	if res := r.must(Op{Kind: OpUnlink, Parent: 1, Name: "alive", Keep: []ids.Session{r.session}}); len(res.Gone) != 0 {
		t.Fatalf("%+v", res)
	}
	r.refuse(Op{Kind: OpLink, Ino: one, Parent: 1, Name: "again"}, errs.NotFound)
	r.check()
	r.replay()
}

func TestBlocksAreTold(t *testing.T) {
	r := newReplica(t)
	defer r.close()
	var told []BlockName
	r.m.OnBlocks = func(names []BlockName) { told = append(told, names...) }
	f := r.create(1, "f", sIFREG)
	c := Command{Session: r.session, Seq: 100, Ops: []Op{
		{Kind: OpWrite, Ino: f, Extents: []Extent{{Len: 5, Block: blockName(1), From: 3}, {Off: 5, Len: 1, Data: []byte("x")}, {Off: 9, Len: 7, Block: blockName(2)}}},
		{Kind: OpWrite, Ino: 99, Extents: []Extent{{Len: 5, Block: blockName(3)}}},
	}}
	r.apply(c)
	r.apply(c)
	if len(told) != 2 || told[0] != *blockName(1) || told[1] != *blockName(2) {
		t.Fatalf("%v", told)
	}
	need := map[BlockName]uint32{}
	if err := r.view().WalkBlocks(func(n BlockName, len uint32) bool { need[n] = len; return true }); err != nil {
		t.Fatal(err)
	}
	if len(need) != 2 || need[*blockName(1)] != 8 || need[*blockName(2)] != 7 {
		t.Fatalf("%v", need)
	}
}

func TestBadCommands(t *testing.T) {
	r := newReplica(t)
	defer r.close()
	op := []Op{{Kind: OpDrop}}
	for _, c := range []struct {
		what string
		cmd  []byte
		want errs.Class
	}{
		{"nothing", nil, errs.Corrupt},
		{"garbage", []byte{0xff, 1, 2}, errs.Corrupt},
		{"trailing", append(wire.MustMarshal(Command{Barrier: true}), 0), errs.Corrupt},
		{"empty", wire.MustMarshal(Command{}), errs.Invalid},
		{"two things", wire.MustMarshal(Command{Barrier: true, End: 1}), errs.Invalid},
		{"no node", wire.MustMarshal(Command{Open: &OpenSession{}}), errs.Invalid},
		{"acknowledges the future", wire.MustMarshal(Command{Session: 1, Seq: 1, Acked: 2, Ops: op}), errs.Invalid},
		{"no session", wire.MustMarshal(Command{Session: 7, Seq: 1, Ops: op}), errs.Stale},
		{"too many", wire.MustMarshal(Command{Session: 1, Seq: 1, Ops: make([]Op, MaxOps+1)}), errs.TooLarge},
		{"too long", make([]byte, MaxBatch+1), errs.TooLarge},
	} {
		before := r.dumpBut()
		if res := r.raw(c.cmd); errs.Class(res.Err) != c.want || res.Index != r.index {
			t.Errorf("%s: %+v, want %v", c.what, res, c.want)
		}
		if r.dumpBut() != before {
			t.Errorf("%s changed the state", c.what)
		}
	}
	if res := r.apply(Command{Barrier: true}); res.Err != 0 {
		t.Fatalf("%+v", res)
	}
}

func TestDamagedStateIsAnError(t *testing.T) {
	r := newReplica(t)
	defer r.close()
	f := r.create(1, "f", sIFREG)
	s := store{prefix: space.Key()}
	if err := r.db.Set(s.key(tagInode, uint64(f)), []byte{0xff}, nil); err != nil {
		t.Fatal(err)
	}
	if _, err := r.view().Lookup(1, "f"); !errs.Has(err, errs.Corrupt) {
		t.Fatal(err)
	}
	defer func() {
		if err, ok := recover().(error); !ok || !errors.Is(err, errs.Corrupt.Err()) {
			t.Fatalf("Apply went on over a damaged state: %v", err)
		}
	}()
	r.do(Op{Kind: OpSetAttr, Ino: f, Mask: SetMode})
}

// story leaves every family of keys in the state.
func story(r *replica) {
	two := r.open(2, 22)
	d := r.create(1, "dir", sIFDIR|0o755)
	f := r.create(d, "file", sIFREG|0o644)
	r.must(Op{Kind: OpWrite, Ino: f, Time: 5, Extents: []Extent{{Len: 5, Data: []byte("hello")}, {Off: 4096, Len: 100, From: 7, Block: blockName(9)}}})
	r.must(Op{Kind: OpSetXattr, Ino: f, Name: "user.x", Value: []byte("v")})
	r.must(Op{Kind: OpCreate, Parent: d, Name: "sym", Mode: sIFLNK, Target: "file"})
	r.must(Op{Kind: OpSetLock, Ino: f, Lock: &Lock{Kind: LockPosix, Owner: 3, Start: 1, End: 2, Type: unix.F_WRLCK, Pid: 4}})
	r.create(1, "gone", sIFREG)
	r.must(Op{Kind: OpUnlink, Parent: 1, Name: "gone", Keep: []ids.Session{two}})
	r.must(Op{Kind: OpCreate, Parent: 1, Mode: sIFREG, Flags: CreateTmpfile})
}

func TestLayoutIsGolden(t *testing.T) {
	r := newReplica(t)
	defer r.close()
	story(r)
	r.check()
	const file = "testdata/layout.golden"
	got := []byte(r.dumpBut())
	if *update {
		if err := os.WriteFile(file, got, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Fatalf("the state's format changed: got\n%s\nwant\n%s", got, want)
	}
}

func FuzzCommand(f *testing.F) {
	r := newReplica(f)
	story(r)
	for _, cmd := range r.log {
		f.Add(cmd)
	}
	f.Cleanup(r.close)
	f.Fuzz(func(t *testing.T, cmd []byte) {
		b := r.db.NewIndexedBatch() // never committed: each input meets the same state
		defer b.Close()
		var m Machine
		res := m.ApplyTo(b, space, r.index+1, cmd)
		if _, err := wire.Marshal(res); err != nil {
			t.Fatalf("results that cannot be encoded: %v", err)
		}
		if c, err := DecodeCommand(cmd); err == nil {
			if _, err := DecodeCommand(wire.MustMarshal(c)); err != nil {
				t.Fatalf("encoded again it is refused: %v", err)
			}
		} else if res.Err == 0 {
			t.Fatalf("%v, and was done", err)
		}
	})
}

func BenchmarkCreates(b *testing.B) {
	r := newReplica(b)
	defer r.close()
	n := 0
	b.ReportAllocs()
	for b.Loop() {
		ops := make([]Op, 256)
		for i := range ops {
			n++
			ops[i] = Op{Kind: OpCreate, Parent: 1, Name: string(rune('a'+n%26)) + string(wire.MustMarshal(n)[1:]), Mode: sIFREG, Time: int64(n)}
		}
		r.log = nil
		r.ops(r.session, ops...)
	}
	b.ReportMetric(float64(n)/b.Elapsed().Seconds(), "creates/s")
}
