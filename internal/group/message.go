package group

import (
	"encoding/binary"
	"fmt"

	pb "go.etcd.io/raft/v3/raftpb"
	"google.golang.org/protobuf/proto"

	"github.com/unum-os/unum/internal/errs"
	"github.com/unum-os/unum/internal/ids"
)

// A transport message is a version byte and any number of raft messages of any
// groups to one node, each [group uvarint][length uvarint][message]. What the
// worker has for a peer in one round goes as one. Group 0 marks a message of the
// host's own: see appendOwn.
const (
	messageVersion = 1       // format of a transport message
	frameTarget    = 1 << 20 // bytes after which a new transport message begins
	MaxMessage     = 3 << 20 // bytes of a transport message
)

// An entry's data is a version byte, the proposal's id and the command.
const (
	entryVersion = 1 // format of an entry's data
	entryHeader  = 1 + len(proposalID{})
)

// proposalID is unique for ever: node, nonce of the host's life, counter.
type proposalID [24]byte

func (h *Host) newID() (id proposalID) {
	binary.BigEndian.PutUint64(id[:], uint64(h.cfg.Self))
	binary.BigEndian.PutUint64(id[8:], h.nonce)
	binary.BigEndian.PutUint64(id[16:], h.counter.Add(1))
	return id
}

// appendMessage adds one raft message to a transport message.
func appendMessage(b []byte, g ids.Group, m *pb.Message) ([]byte, error) {
	if len(b) == 0 {
		b = append(b, messageVersion)
	}
	b = binary.AppendUvarint(b, uint64(g))
	b = binary.AppendUvarint(b, uint64(proto.Size(m)))
	return proto.MarshalOptions{UseCachedSize: true}.MarshalAppend(b, m)
}

type groupMessage struct {
	g    ids.Group
	m    *pb.Message // nil: it is the host's own, see appendOwn
	size int

	index, term uint64 // term 0: a floor
}

// decodeMessages takes a transport message apart and refuses, as a whole, what
// no host would send.
func decodeMessages(from, to ids.Node, b []byte) ([]groupMessage, error) {
	bad := func(f string, a ...any) error {
		return errs.E(errs.Corrupt, "read raft message", "from "+from.String(), f, a...)
	}
	if len(b) > MaxMessage {
		return nil, bad("%d bytes, limit %d", len(b), MaxMessage)
	}
	if len(b) == 0 || b[0] != messageVersion {
		return nil, bad("not version %d", messageVersion)
	}
	var out []groupMessage
	for b = b[1:]; len(b) > 0; {
		g, n := binary.Uvarint(b)
		if n <= 0 {
			return nil, bad("group cut off")
		}
		b = b[n:]
		size, n := binary.Uvarint(b)
		if n <= 0 || size > uint64(len(b)-n) {
			return nil, bad("length cut off or too great")
		}
		if g == 0 {
			f, err := decodeOwn(b[n : n+int(size)])
			if err != nil {
				return nil, bad("%v", err)
			}
			b = b[n+int(size):]
			out = append(out, f)
			continue
		}
		m := &pb.Message{}
		if err := proto.Unmarshal(b[n:n+int(size)], m); err != nil {
			return nil, bad("%v", err)
		}
		if err := checkMessage(m, from, to); err != nil {
			return nil, bad("%v", err)
		}
		b = b[n+int(size):]
		out = append(out, groupMessage{g: ids.Group(g), m: m, size: int(size)})
	}
	return out, nil
}

// checkMessage refuses what would break raft's invariants or speaks for another
// node. What depends on a replica's state is checked by the worker.
func checkMessage(m *pb.Message, from, to ids.Node) error {
	switch {
	case m.GetFrom() != uint64(from):
		return fmt.Errorf("it says it is from %v", ids.Node(m.GetFrom()))
	case m.GetTo() != uint64(to):
		return fmt.Errorf("it is for %v", ids.Node(m.GetTo()))
	case m.Snapshot != nil || len(m.Responses) > 0 || m.GetVote() != 0:
		return fmt.Errorf("%v with a snapshot, responses or a vote", m.GetType())
	case len(m.GetContext()) > 64:
		return fmt.Errorf("context of %d bytes", len(m.GetContext()))
	}
	entries, term := 0, true
	switch m.GetType() {
	case pb.MsgApp:
		return checkEntries(m)
	case pb.MsgAppResp, pb.MsgVote, pb.MsgVoteResp, pb.MsgPreVote, pb.MsgPreVoteResp, pb.MsgTimeoutNow:
	case pb.MsgHeartbeat, pb.MsgHeartbeatResp:
		if n := len(m.GetContext()); n != 0 && n != 8 {
			return fmt.Errorf("%v with a context of %d bytes", m.GetType(), n)
		}
	case pb.MsgReadIndex:
		entries, term = 1, false
	case pb.MsgReadIndexResp:
		entries = 1
	default:
		return fmt.Errorf("%v does not travel", m.GetType())
	}
	if len(m.Entries) != entries {
		return fmt.Errorf("%v with %d entries", m.GetType(), len(m.Entries))
	}
	if entries == 1 && len(m.Entries[0].GetData()) != len(proposalID{}) {
		return fmt.Errorf("%v with a context of %d bytes", m.GetType(), len(m.Entries[0].GetData()))
	}
	if term == (m.GetTerm() == 0) {
		return fmt.Errorf("%v with term %d", m.GetType(), m.GetTerm())
	}
	return nil
}

func checkEntries(m *pb.Message) error {
	if m.GetTerm() == 0 || m.GetLogTerm() > m.GetTerm() {
		return fmt.Errorf("append of term %d after term %d", m.GetTerm(), m.GetLogTerm())
	}
	index, term := m.GetIndex(), m.GetLogTerm()
	for _, e := range m.Entries {
		if index++; e.GetIndex() != index || e.GetTerm() < max(term, 1) || e.GetTerm() > m.GetTerm() {
			return fmt.Errorf("entry %d of term %d where %d of terms %d to %d is due", e.GetIndex(), e.GetTerm(), index, term, m.GetTerm())
		}
		term = e.GetTerm()
		if err := checkData(e); err != nil {
			return fmt.Errorf("entry %d: %w", index, err)
		}
	}
	return nil
}

func checkData(e *pb.Entry) error {
	switch e.GetType() {
	case pb.EntryNormal:
		if n := len(e.Data); n != 0 && (n <= entryHeader || e.Data[0] != entryVersion || n > entryHeader+MaxCommand) {
			return fmt.Errorf("%d bytes that are no command", n)
		}
		return nil
	case pb.EntryConfChangeV2:
		return proto.Unmarshal(e.Data, &pb.ConfChangeV2{})
	}
	return fmt.Errorf("unknown type %v", e.GetType())
}
