package group

import (
	"fmt"
	"log/slog"
	"slices"

	"github.com/cockroachdb/pebble/v2"
	"go.etcd.io/raft/v3"
	pb "go.etcd.io/raft/v3/raftpb"
	"google.golang.org/protobuf/proto"

	"github.com/unum-os/unum/internal/errs"
	"github.com/unum-os/unum/internal/ids"
)

// GoAlone makes this node the only voter of g, before Open, where lost is the
// only other one. Of two voters each has everything that was acknowledged, so
// nothing is lost: what the log holds is committed, and after it comes an entry
// of a new term that takes lost out, so that learners hear of it too. But lost
// must never serve again: it has none of what comes from now on. Nothing happens
// if this node is the only voter already. Errors: Invalid if there are other
// voters than these two, Busy if a change of voters was half done, Exists if g
// is open.
func (h *Host) GoAlone(g ids.Group, lost ids.Node) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	place := fmt.Sprintf("group %d", g)
	if err := h.unusable(); err != nil {
		return err
	}
	switch {
	case h.groups[g] != nil:
		return errs.E(errs.Exists, "go on alone", place, "it is open")
	case !h.disk[g]:
		return errs.E(errs.NotFound, "go on alone", place, "%v has no replica of it", h.cfg.Self)
	case h.cfg.Witness:
		return errs.E(errs.Invalid, "go on alone", place, "%v is a witness and has no state", h.cfg.Self)
	case lost == h.cfg.Self || lost == 0:
		return errs.E(errs.Invalid, "go on alone", place, "without whom? not %v", lost)
	}
	return h.guard(func() error {
		l, err := h.loadLog(g)
		if err != nil {
			return err
		}
		c, err := l.lastConf(h.log)
		if err != nil {
			return err
		}
		self, other := uint64(h.cfg.Self), uint64(lost)
		voters := slices.Sorted(slices.Values(c.Voters))
		switch {
		case len(c.VotersOutgoing) > 0:
			return errs.E(errs.Busy, "go on alone", place, "a change of its voters is half done").WithRemedy("start %v", lost)
		case slices.Equal(voters, []uint64{self}):
			return nil
		case !slices.Equal(voters, slices.Sorted(slices.Values([]uint64{self, other}))):
			return errs.E(errs.Invalid, "go on alone", place, "its voters are %v, not %v and %v alone", nodes(voters), h.cfg.Self, lost)
		}
		data, err := proto.Marshal(change(pb.ConfChangeRemoveNode, lost))
		if err != nil {
			return err
		}
		index, term := l.last+1, l.hard.GetTerm()+1 // in this term nobody leads without this node's vote
		e := &pb.Entry{Type: pb.EntryConfChangeV2.Enum(), Term: &term, Index: &index, Data: data}
		b := h.logDB.NewBatch()
		defer b.Close()
		if err := l.write(b, []*pb.Entry{e}, &pb.HardState{Term: &term, Vote: &self, Commit: &index}); err != nil {
			return err
		}
		h.log.Warn("this node is now the only voter", "group", uint64(g), "without", lost)
		return dbErr(b.Commit(pebble.Sync), "go on alone", place)
	})
}

// lastConf returns the configuration at the end of the log, whether or not all of
// it is committed.
func (l *groupLog) lastConf(log *slog.Logger) (*pb.ConfState, error) {
	c := l.start.conf
	rn, err := raft.NewRawNode(&raft.Config{ID: 1, ElectionTick: electionTicks, HeartbeatTick: heartbeatTicks, Storage: l,
		Applied: l.start.index, MaxInflightMsgs: 1, Logger: raftLogger{log}})
	if err != nil {
		return nil, err
	}
	for i := l.start.index + 1; i <= l.last; i++ {
		es, err := l.Entries(i, i+1, 1)
		if err != nil {
			return nil, err
		}
		if es[0].GetType() != pb.EntryConfChangeV2 {
			continue
		}
		cc := &pb.ConfChangeV2{}
		if err := proto.Unmarshal(es[0].Data, cc); err != nil {
			return nil, errs.E(errs.Corrupt, "read", fmt.Sprintf("entry %d of group %d", i, l.g), "%v", err)
		}
		c = rn.ApplyConfChange(cc)
	}
	return c, nil
}
