package group

import (
	"context"
	"net"
	"testing"

	"github.com/cockroachdb/pebble/v2/vfs"
	pb "go.etcd.io/raft/v3/raftpb"

	"github.com/unum-os/unum/internal/errs"
	"github.com/unum-os/unum/internal/ids"
)

// captured is a transport that keeps what is sent.
type captured struct{ sent map[ids.Node][][]byte }

func (c captured) Send(to ids.Node, msg []byte) error {
	c.sent[to] = append(c.sent[to], msg)
	return nil
}

func (captured) Dial(context.Context, ids.Node, string) (net.Conn, error) {
	return nil, errs.E(errs.Unavailable, "dial", "", "nobody is there")
}

// steppedHost makes a host, node 1, that a test steps.
func steppedHost(t *testing.T, voters ...ids.Node) (*Stepper, *Group, captured) {
	t.Helper()
	out := captured{map[ids.Node][][]byte{}}
	h, err := New(Config{Self: 1, Dir: "/d", Transport: out, FS: vfs.NewMem(), Log: complaints})
	if err != nil {
		t.Fatal(err)
	}
	if err := h.Bootstrap(tg, voters); err != nil {
		t.Fatal(err)
	}
	g, err := h.Open(tg, &ledger{})
	if err != nil {
		t.Fatal(err)
	}
	s, err := h.Stepper()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Stop(); err != nil {
			t.Error(err)
		}
		if err := h.Close(); err != nil {
			t.Error(err)
		}
	})
	return s, g, out
}

// quiesce steps until there is nothing to do.
func quiesce(t *testing.T, s *Stepper) {
	t.Helper()
	for d := s.Due(); d != (Due{}); d = s.Due() {
		for _, f := range []func() error{s.Work, s.Apply, s.Trim, s.Ship} {
			if err := f(); err != nil {
				t.Fatal(err)
			}
		}
	}
}

func TestStepper(t *testing.T) {
	s, g, _ := steppedHost(t, 1)
	if err := s.h.Run(context.Background()); !errs.Has(err, errs.Invalid) {
		t.Fatalf("run beside a stepper: %v", err)
	}
	quiesce(t, s)
	p := s.Propose(g, []byte("one"))
	if _, _, ok, _ := p.Poll(); ok {
		t.Fatal("answered without a step")
	}
	quiesce(t, s)
	if v, index, ok, err := p.Poll(); v != uint64(1) || index == 0 || !ok || err != nil {
		t.Fatal(v, index, ok, err)
	}
	r := s.ReadIndex(g)
	quiesce(t, s)
	if _, index, ok, err := r.Poll(); index == 0 || !ok || err != nil {
		t.Fatal(index, ok, err)
	}
	has(t, g, "one")
}

// A follower must not pass on a read barrier that another asked it for: it would
// speak in the other's name, and its whole message would be refused.
func TestBarrierIsNotPassedOn(t *testing.T) {
	s, _, out := steppedHost(t, 1, 2, 3)
	quiesce(t, s)
	heard := func(from ids.Node, m *pb.Message) {
		t.Helper()
		m.From, m.To = new(uint64(from)), new(uint64(1))
		b, err := appendMessage(nil, tg, m)
		if err == nil {
			err = s.h.Receive(from, b)
		}
		if err != nil {
			t.Fatal(err)
		}
		quiesce(t, s)
	}
	heard(2, &pb.Message{Type: pb.MsgHeartbeat.Enum(), Term: new(uint64(2)), Commit: new(uint64(1))})
	if len(out.sent[2]) == 0 {
		t.Fatal("node 1 does not answer its leader")
	}
	heard(3, &pb.Message{Type: pb.MsgReadIndex.Enum(), Entries: []*pb.Entry{{Data: make([]byte, len(proposalID{}))}}})
	for _, b := range out.sent[2] {
		if _, err := decodeMessages(1, 2, b); err != nil {
			t.Fatal(err)
		}
	}
}
