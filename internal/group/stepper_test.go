package group

import (
	"context"
	"net"
	"testing"

	"github.com/cockroachdb/pebble/v2/vfs"
	pb "go.etcd.io/raft/v3/raftpb"
	"google.golang.org/protobuf/proto"

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
	heard := func(from ids.Node, m *pb.Message) { t.Helper(); hears(t, s, from, m) }
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

// hears gives a host a raft message.
func hears(t *testing.T, s *Stepper, from ids.Node, m *pb.Message) {
	t.Helper()
	m.From, m.To = new(uint64(from)), new(uint64(1))
	hearsBytes(t, s, from, framed(t, m))
}

func hearsBytes(t *testing.T, s *Stepper, from ids.Node, b []byte) {
	t.Helper()
	if err := s.h.Receive(from, b); err != nil {
		t.Fatal(err)
	}
	quiesce(t, s)
}

// Node 1 has the change that makes it the only voter, and missed its commit. The
// one that went has a longer log and gives no vote, but says what is committed.
func TestCommitIsToldWithVotes(t *testing.T) {
	s, g, out := steppedHost(t, 1, 2)
	quiesce(t, s)
	at := g.Status().Commit
	gone := change(pb.ConfChangeRemoveNode, 2)
	data, err := proto.Marshal(gone)
	if err != nil {
		t.Fatal(err)
	}
	last, _ := g.log.Term(at)
	e := &pb.Entry{Index: new(at + 1), Term: new(uint64(9)), Type: pb.EntryConfChangeV2.Enum(), Data: data}
	hears(t, s, 2, &pb.Message{Type: pb.MsgApp.Enum(), Term: new(uint64(9)), Index: &at, LogTerm: &last, Entries: []*pb.Entry{e}, Commit: &at})
	if l, err := s.h.loadLog(tg); err != nil || l.changed != at+1 || g.log.changed != at+1 {
		t.Fatalf("the change is not found in the log: %v, %v, %v", err, l.changed, g.log.changed)
	}
	ticks(t, s, 4*electionTicks)
	if st := g.Status(); st.Role != Candidate || len(st.Voters) != 2 {
		t.Fatalf("before it is told: %+v", st)
	}
	asked := false
	for _, b := range out.sent[2] {
		ms, err := decodeMessages(1, 2, b)
		if err != nil {
			t.Fatal(err)
		}
		for i, m := range ms {
			if m.m.GetType() == pb.MsgPreVote {
				told := ms[i+1]
				asked = told.m == nil && told.index == at && told.term == last
			}
		}
	}
	if !asked {
		t.Fatal("it asked for a vote and did not say what it knows to be committed")
	}
	for _, wrong := range [][2]uint64{{at + 1, 8}, {at + 2, 9}, {1 << 40, 9}} { // not its entry; not here
		hearsBytes(t, s, 2, appendOwn(nil, tg, wrong[0], wrong[1]))
	}
	if st := g.Status(); st.Commit != at {
		t.Fatalf("it took %+v", st)
	}
	hearsBytes(t, s, 2, appendOwn(nil, tg, at+1, 9))
	if st := g.Status(); st.Commit != at+1 || st.Leader != 0 || len(st.Voters) != 1 {
		t.Fatalf("it did not learn: %+v", st)
	}
	ticks(t, s, 4*electionTicks)
	if st := g.Status(); st.Role != Leader || st.Joint {
		t.Fatalf("it is not elected by itself: %+v", st)
	}
}

// Of a commit that changes no replica a candidate is told too: it must not give
// up its candidacy for that.
func TestCandidateGoesOn(t *testing.T) {
	s, g, _ := steppedHost(t, 1, 2, 3)
	quiesce(t, s)
	at := g.Status().Commit
	last, _ := g.log.Term(at)
	e := &pb.Entry{Index: new(at + 1), Term: new(uint64(9))}
	hears(t, s, 2, &pb.Message{Type: pb.MsgApp.Enum(), Term: new(uint64(9)), Index: &at, LogTerm: &last, Entries: []*pb.Entry{e}, Commit: &at})
	ticks(t, s, 4*electionTicks)
	hearsBytes(t, s, 3, appendOwn(nil, tg, at+1, 9))
	if st := g.Status(); st.Role != Candidate || st.Commit != at {
		t.Fatalf("after it was told: %+v", st)
	}
	term := g.Status().Term
	hears(t, s, 3, &pb.Message{Type: pb.MsgPreVoteResp.Enum(), Term: new(term + 1)})
	hears(t, s, 3, &pb.Message{Type: pb.MsgVoteResp.Enum(), Term: new(term + 1)})
	if st := g.Status(); st.Role != Leader {
		t.Fatalf("with a majority's votes: %+v", st)
	}
}

// ticks lets time pass.
func ticks(t *testing.T, s *Stepper, n int) {
	t.Helper()
	for range n {
		if err := s.Tick(); err != nil {
			t.Fatal(err)
		}
		quiesce(t, s)
	}
}
