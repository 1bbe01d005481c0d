package group

import (
	"bytes"
	"net"
	"testing"

	"github.com/cockroachdb/pebble/v2/vfs"
	pb "go.etcd.io/raft/v3/raftpb"
	"google.golang.org/protobuf/proto"

	"github.com/unum-os/unum/internal/errs"
	"github.com/unum-os/unum/internal/ids"
	"github.com/unum-os/unum/internal/wire"
)

func message(typ pb.MessageType, change func(*pb.Message)) *pb.Message {
	m := &pb.Message{Type: typ.Enum(), From: new(uint64(2)), To: new(uint64(1)), Term: new(uint64(3))}
	if change != nil {
		change(m)
	}
	return m
}

func entry(index, term uint64, data string) *pb.Entry {
	return &pb.Entry{Index: &index, Term: &term, Type: pb.EntryNormal.Enum(), Data: []byte(data)}
}

func framed(t testing.TB, ms ...*pb.Message) []byte {
	var b []byte
	var err error
	for _, m := range ms {
		if b, err = appendMessage(b, tg, m); err != nil {
			t.Fatal(err)
		}
	}
	return b
}

func TestGarbageIsRefused(t *testing.T) {
	n := newNetwork()
	nd := start(t, n, 1, vfs.NewCrashableMem(), func(h *Host) { bootstrap(t, h, 1) })
	if _, ok, err := propose(testCtx(t), []*node{nd}, "x"); err != nil || !ok {
		t.Fatal(ok, err)
	}
	good := framed(t, message(pb.MsgHeartbeat, nil))
	conf := pb.EntryConfChange
	for name, b := range map[string][]byte{
		"empty":           {},
		"other version":   {9, 1, 1},
		"cut":             good[:len(good)-1],
		"length too long": {1, 7, 0xff, 0xff, 0xff, 0xff, 0x0f},
		"noise":           append([]byte{1, 7, 20}, bytes.Repeat([]byte{0xa7}, 20)...),
		"too large":       make([]byte, MaxMessage+1),
		"from another":    framed(t, message(pb.MsgHeartbeat, func(m *pb.Message) { m.From = new(uint64(3)) })),
		"for another":     framed(t, message(pb.MsgHeartbeat, func(m *pb.Message) { m.To = new(uint64(3)) })),
		"proposal":        framed(t, message(pb.MsgProp, nil)),
		"hup":             framed(t, message(pb.MsgHup, nil)),
		"unreachable":     framed(t, message(pb.MsgUnreachable, nil)),
		"snapshot":        framed(t, message(pb.MsgSnap, func(m *pb.Message) { m.Snapshot = &pb.Snapshot{} })),
		"termless vote":   framed(t, message(pb.MsgVote, func(m *pb.Message) { m.Term = nil })),
		"odd context":     framed(t, message(pb.MsgHeartbeatResp, func(m *pb.Message) { m.Context = []byte("abc") })),
		"empty read":      framed(t, message(pb.MsgReadIndex, func(m *pb.Message) { m.Term = nil })),
		"gap":             framed(t, message(pb.MsgApp, func(m *pb.Message) { m.Entries = []*pb.Entry{entry(5, 1, "")} })),
		"future term":     framed(t, message(pb.MsgApp, func(m *pb.Message) { m.Entries = []*pb.Entry{entry(1, 9, "")} })),
		"no command":      framed(t, message(pb.MsgApp, func(m *pb.Message) { m.Entries = []*pb.Entry{entry(1, 1, "zzz")} })),
		"old conf change": framed(t, message(pb.MsgApp, func(m *pb.Message) {
			e := entry(1, 1, "")
			e.Type = &conf
			m.Entries = []*pb.Entry{e}
		})),
	} {
		if err := nd.h.Receive(2, b); !errs.Has(err, errs.Corrupt) {
			t.Errorf("%s: %v", name, err)
		}
	}
	// Well formed, but of a cluster that knows more than this replica has.
	if err := nd.h.Receive(2, framed(t, message(pb.MsgHeartbeat, func(m *pb.Message) { m.Commit, m.Term = new(uint64(1000)), new(uint64(99)) }),
		message(pb.MsgAppResp, func(m *pb.Message) { m.Index = new(uint64(1000)) }))); err != nil {
		t.Fatal(err)
	}
	if _, ok, err := propose(testCtx(t), []*node{nd}, "y"); err != nil || !ok {
		t.Fatal("the host did not survive:", ok, err)
	}
}

// snapStream gives what a sender would write for the keys.
func snapStream(t testing.TB, m *pb.Message, keys ...string) []byte {
	return stream(t, m, false, keys...)
}

// bareStream says that it is for a witness.
func bareStream(t testing.TB, m *pb.Message, keys ...string) []byte {
	return stream(t, m, true, keys...)
}

func stream(t testing.TB, m *pb.Message, bare bool, keys ...string) []byte {
	raw, err := proto.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	a, b := net.Pipe()
	done := make(chan []byte)
	go func() {
		var buf bytes.Buffer
		buf.ReadFrom(b)
		done <- buf.Bytes()
	}()
	s := newSnapWriter(a)
	err = s.frame(frameBegin, wire.MustMarshal(snapBegin{tg, raw, bare}), nil)
	for _, k := range keys {
		if err == nil {
			err = s.add(append([]byte{kindData}, k...), []byte("v"))
		}
	}
	if err == nil {
		err = s.end()
	}
	if err != nil {
		t.Fatal(err)
	}
	a.Close()
	return <-done
}

func snapMessage(index uint64, change func(*pb.Message)) *pb.Message {
	return message(pb.MsgSnap, func(m *pb.Message) {
		m.Snapshot = &pb.Snapshot{Metadata: &pb.SnapshotMetadata{Index: &index, Term: new(uint64(2)),
			ConfState: &pb.ConfState{Voters: []uint64{2}, Learners: []uint64{1}}}}
		if change != nil {
			change(m)
		}
	})
}

// receive gives the host a stream that ends after what is given, or, if whole,
// waits for the answer.
func receive(h *Host, from ids.Node, stream []byte, whole bool) error {
	a, b := net.Pipe()
	go func() {
		a.Write(stream)
		if !whole {
			a.Close()
		}
		if _, err := wire.ReadFrame(a, 1<<16); err != nil {
			_ = err // the host hung up
		}
		a.Close()
	}()
	return h.ReceiveSnapshot(testContext, from, b)
}

func TestBadSnapshotsAreRefused(t *testing.T) {
	nd := start(t, newNetwork(), 1, vfs.NewCrashableMem(), func(h *Host) {
		if err := h.Join(tg); err != nil {
			t.Fatal(err)
		}
		open(t, h)
	})
	good := snapStream(t, snapMessage(10, nil), "a", "b")
	flipped := bytes.Clone(good)
	flipped[bytes.LastIndexByte(good, 'b')] ^= 2
	for name, s := range map[string][]byte{
		"empty":         {},
		"cut":           good[:len(good)-20],
		"flipped":       flipped,
		"out of order":  snapStream(t, snapMessage(10, nil), "b", "a"),
		"no index":      snapStream(t, snapMessage(0, nil), "a"),
		"from another":  snapStream(t, snapMessage(10, func(m *pb.Message) { m.From = new(uint64(5)) }), "a"),
		"not a member":  snapStream(t, snapMessage(10, func(m *pb.Message) { m.Snapshot.Metadata.ConfState.Learners = nil }), "a"),
		"no voters":     snapStream(t, snapMessage(10, func(m *pb.Message) { m.Snapshot.Metadata.ConfState.Voters = nil }), "a"),
		"not a message": append([]byte{0, 0, 0, 9, frameBegin, 0, 0, 0, 4}, "abcd"...),
	} {
		// Of one whose sender hangs up, that may be what is said.
		hung := name == "empty" || name == "cut"
		if err := receive(nd.h, 2, s, !hung); err == nil || !hung && !errs.Has(err, errs.Corrupt) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if names, err := nd.fs.List("/d/snapshots"); err != nil || len(names) != 0 {
		t.Fatalf("left over: %v %v", names, err)
	}
	g := nd.h.Group(tg)
	if g.Status().Applied != 0 {
		t.Fatal("a bad snapshot was installed")
	}
	if err := receive(nd.h, 2, good, true); err != nil {
		t.Fatal(err)
	}
	if v, ok, err := g.Get([]byte("b")); err != nil || !ok || string(v) != "v" || g.Status().Applied != 10 {
		t.Fatalf("%q %v %v %+v", v, ok, err, g.Status())
	}
	if err := receive(nd.h, 2, good, true); !errs.Has(err, errs.Busy) { // raft has no use for it
		t.Fatal(err)
	}
}

func FuzzMessages(f *testing.F) {
	f.Add(framed(f, message(pb.MsgHeartbeat, nil), message(pb.MsgVote, nil)))
	f.Add(appendOwn(framed(f, message(pb.MsgHeartbeat, nil)), tg, 300, 0))
	f.Add(appendOwn(framed(f, message(pb.MsgVote, nil)), tg, 300, 7))
	f.Add(framed(f, message(pb.MsgApp, func(m *pb.Message) { m.Entries = []*pb.Entry{entry(1, 1, ""), entry(2, 3, "")} })))
	f.Fuzz(func(t *testing.T, b []byte) {
		ms, err := decodeMessages(2, 1, b)
		if err != nil {
			return
		}
		var again []byte
		for _, m := range ms {
			if m.m == nil {
				again = appendOwn(again, m.g, m.index, m.term)
			} else if again, err = appendMessage(again, m.g, m.m); err != nil {
				t.Fatal(err)
			}
		}
		if len(ms) == 0 {
			return
		}
		if back, err := decodeMessages(2, 1, again); err != nil || len(back) != len(ms) {
			t.Fatalf("%d messages became %d: %v", len(ms), len(back), err)
		}
	})
}

func FuzzSnapshot(f *testing.F) {
	good := snapStream(f, snapMessage(10, nil), "a", "b")
	f.Add(good)
	f.Add(good[:30])
	nd := start(f, newNetwork(), 1, vfs.NewMem(), func(h *Host) {
		if err := h.Join(tg); err != nil {
			f.Fatal(err)
		}
		open(f, h)
	})
	f.Fuzz(func(t *testing.T, b []byte) {
		if err := receive(nd.h, 2, b, false); err != nil && nd.h.failure() != nil {
			t.Fatal(nd.h.failure())
		}
	})
}

func FuzzPoint(f *testing.F) {
	b, err := point{3, 2, &pb.ConfState{Voters: []uint64{1}}}.encode()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Fuzz(func(t *testing.T, b []byte) {
		p, err := decodePoint(b, "test")
		if err != nil {
			return
		}
		if _, err := p.encode(); err != nil {
			t.Fatal(err)
		}
	})
}
