package group

import (
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/cockroachdb/pebble/v2"
	pb "go.etcd.io/raft/v3/raftpb"
	"google.golang.org/protobuf/proto"

	"github.com/unum-os/unum/internal/errs"
	"github.com/unum-os/unum/internal/ids"
)

const replicaVersion = 1 // format of what a replica keeps on disk

// get reads one key; a missing one gives nil.
func get(r pebble.Reader, key []byte, place string) ([]byte, error) {
	v, c, err := r.Get(key)
	if errors.Is(err, pebble.ErrNotFound) {
		return nil, nil
	}
	if err != nil {
		return nil, dbErr(err, "read", place)
	}
	out := append([]byte{}, v...)
	return out, dbErr(c.Close(), "read", place)
}

// readApplied reads what has been applied of g; index 0 means nothing.
func readApplied(r pebble.Reader, g ids.Group) (point, error) {
	place := fmt.Sprintf("state record of group %d", g)
	v, err := get(r, appliedKey(g), place)
	if err != nil {
		return point{}, err
	}
	if v == nil {
		return point{conf: &pb.ConfState{}}, nil
	}
	p, err := decodePoint(v, place)
	if err == nil && (p.index == 0 || p.term == 0) {
		err = errs.E(errs.Corrupt, "read", place, "index %d, term %d", p.index, p.term)
	}
	return p, err
}

// scan lists the groups that have a replica in the log, and checks that every
// state belongs to one of them: a log that vanished must not pass for an empty
// node.
func (h *Host) scan() error {
	err := eachGroup(h.logDB, func(g ids.Group) error {
		v, err := get(h.logDB, logKey(g, logReplica), fmt.Sprintf("replica of group %d", g))
		if err != nil {
			return err
		}
		if err := h.checkReplica(g, v); err != nil {
			return err
		}
		h.disk[g] = true
		return nil
	})
	if err != nil {
		return err
	}
	return eachGroup(h.stateDB, func(g ids.Group) error {
		if !h.disk[g] {
			return errs.E(errs.Corrupt, "open", fmt.Sprintf("group %d", g), "there is state but no log")
		}
		return nil
	})
}

// eachGroup calls f for each group that has a key in db.
func eachGroup(db *pebble.DB, f func(ids.Group) error) error {
	it, err := db.NewIter(nil)
	if err != nil {
		return dbErr(err, "read", "list of groups")
	}
	defer it.Close()
	for ok := it.First(); ok; {
		if len(it.Key()) < 9 {
			return errs.E(errs.Corrupt, "read", "list of groups", "key %x", it.Key())
		}
		g := ids.Group(binary.BigEndian.Uint64(it.Key()))
		if err := f(g); err != nil {
			return err
		}
		_, hi := groupBounds(g)
		ok = it.SeekGE(hi)
	}
	return dbErr(it.Error(), "read", "list of groups")
}

// createReplica records that this node holds a replica of g, empty so far.
func (h *Host) createReplica(g ids.Group) error {
	if g == 0 || g+1 == 0 {
		return errs.E(errs.Invalid, "create replica", fmt.Sprintf("group %d", g), "no such group number")
	}
	return dbErr(h.logDB.Set(logKey(g, logReplica), h.replicaRecord(), pebble.Sync), "create replica", fmt.Sprintf("group %d", g))
}

// bootstrap gives the empty replica of g its first point. It goes like the
// installation of a snapshot, so that a crash between the databases is repaired
// in the same way.
func (h *Host) bootstrap(g ids.Group, voters []ids.Node) error {
	p := point{index: 1, term: 1, conf: &pb.ConfState{}}
	for _, v := range voters {
		p.conf.Voters = append(p.conf.Voters, uint64(v))
	}
	v, err := p.encode()
	if err != nil {
		return err
	}
	place := fmt.Sprintf("group %d", g)
	if err := h.logDB.Set(logKey(g, logMarker), v, pebble.Sync); err != nil {
		return dbErr(err, "bootstrap", place)
	}
	if err := h.stateDB.Set(appliedKey(g), v, pebble.Sync); err != nil {
		return dbErr(err, "bootstrap", place)
	}
	_, err = h.finishInstall(g)
	return err
}

// finishInstall settles an installation that a crash interrupted: either the
// state has the snapshot, then the log is reset to it, or it has not, then
// nothing happened. It returns what is applied.
func (h *Host) finishInstall(g ids.Group) (point, error) {
	place := fmt.Sprintf("group %d", g)
	applied, err := readApplied(h.stateDB, g)
	if err != nil {
		return point{}, err
	}
	v, err := get(h.logDB, logKey(g, logMarker), place)
	if err != nil || v == nil {
		return applied, err
	}
	p, err := decodePoint(v, "snapshot marker of "+place)
	if err != nil {
		return point{}, err
	}
	b := h.logDB.NewBatch()
	defer b.Close()
	if applied.index == p.index && applied.term == p.term {
		l := groupLog{g: g, tails: &h.tails}
		if err := l.reset(b, p); err != nil {
			return point{}, err
		}
		hard, err := h.readHard(g)
		if err != nil {
			return point{}, err
		}
		if hard.GetTerm() < p.term { // no message of the snapshot's term was answered yet
			hard = &pb.HardState{Term: &p.term, Vote: new(uint64)}
		}
		hard.Commit = &p.index // the log now ends there
		if err := l.write(b, nil, hard); err != nil {
			return point{}, err
		}
	} else if err := b.Delete(logKey(g, logMarker), nil); err != nil {
		return point{}, err
	}
	return applied, dbErr(b.Commit(pebble.Sync), "reset log", place)
}

func (h *Host) readHard(g ids.Group) (*pb.HardState, error) {
	place := fmt.Sprintf("hard state of group %d", g)
	v, err := get(h.logDB, logKey(g, logHard), place)
	if err != nil {
		return nil, err
	}
	hs := &pb.HardState{}
	if err := proto.Unmarshal(v, hs); err != nil {
		return nil, errs.E(errs.Corrupt, "read", place, "%v", err)
	}
	return hs, nil
}

// loadLog reads g's log and checks it against the state.
func (h *Host) loadLog(g ids.Group) (*groupLog, error) {
	place := fmt.Sprintf("log of group %d", g)
	applied, err := h.finishInstall(g)
	if err != nil {
		return nil, err
	}
	l := &groupLog{g: g, db: h.logDB, tails: &h.tails, start: applied, bare: h.cfg.Witness}
	v, err := get(h.logDB, logKey(g, logTrunc), place)
	if err != nil {
		return nil, err
	}
	if v != nil {
		if len(v) != 16 {
			return nil, errs.E(errs.Corrupt, "read", place, "truncation point %x", v)
		}
		l.trunc, l.truncTerm = binary.BigEndian.Uint64(v), binary.BigEndian.Uint64(v[8:])
	}
	l.last, l.changed = l.trunc, l.trunc
	it, err := h.logDB.NewIter(&pebble.IterOptions{LowerBound: logKey(g, logEntry), UpperBound: logKey(g, logEntry+1)})
	if err != nil {
		return nil, dbErr(err, "read", place)
	}
	defer it.Close()
	term := l.truncTerm
	for it.First(); it.Valid(); it.Next() {
		e, err := decodeEntry(g, it, l.last+1)
		if err != nil {
			return nil, err
		}
		if e.GetTerm() < term {
			return nil, errs.E(errs.Corrupt, "read", place, "entry %d has term %d after term %d", e.GetIndex(), e.GetTerm(), term)
		}
		term = e.GetTerm()
		l.note(e, int64(entrySize(e)))
	}
	if err := it.Error(); err != nil {
		return nil, dbErr(err, "read", place)
	}
	if l.hard, err = h.readHard(g); err != nil {
		return nil, err
	}
	switch t, terr := l.Term(applied.index); {
	case applied.index < l.trunc || applied.index > l.last:
		return nil, errs.E(errs.Corrupt, "open", place, "it holds %d to %d, but the state is at %d", l.trunc, l.last, applied.index)
	case terr != nil || t != applied.term:
		return nil, errs.E(errs.Corrupt, "open", place, "entry %d has term %d, but the state says %d", applied.index, t, applied.term)
	case l.hard.GetCommit() > l.last:
		return nil, errs.E(errs.Corrupt, "open", place, "it ends at %d, but %d is committed", l.last, l.hard.GetCommit())
	case l.hard.GetTerm() < term:
		return nil, errs.E(errs.Corrupt, "open", place, "hard state has term %d, the last entry %d", l.hard.GetTerm(), term)
	}
	// Updates of the commit index alone are not synced; what is applied was
	// committed.
	if l.hard.GetCommit() < applied.index {
		l.hard.Commit = &applied.index
	}
	return l, nil
}
