package group

import (
	"encoding/binary"
	"fmt"
	"sort"

	"github.com/cockroachdb/pebble/v2"
	"go.etcd.io/raft/v3"
	pb "go.etcd.io/raft/v3/raftpb"
	"google.golang.org/protobuf/proto"

	"github.com/unum-os/unum/internal/errs"
	"github.com/unum-os/unum/internal/ids"
)

// A key of the log database is the group (8 bytes, big endian), a kind, and for
// entries the index.
const (
	logReplica byte = 'G' // this node holds a replica: a version byte
	logHard    byte = 'H' // raft's hard state
	logEntry   byte = 'L' // one entry
	logMarker  byte = 'S' // a snapshot (a point) is being installed
	logTrunc   byte = 'T' // truncation point: index, term
)

// Memory for the tails of logs: what followers and the applier ask for next.
const (
	tailBytesGroup = 4 << 20 // bytes of one group's tail in memory
	tailBytesHost  = 8 << 20 // bytes of the tails of all groups of a node
	stepBytes      = 1 << 20 // distance of the places whose size is remembered
)

func logKey(g ids.Group, kind byte) []byte {
	return append(binary.BigEndian.AppendUint64(make([]byte, 0, 17), uint64(g)), kind)
}

func entryKey(g ids.Group, i uint64) []byte {
	return binary.BigEndian.AppendUint64(logKey(g, logEntry), i)
}

func encodeTrunc(index, term uint64) []byte {
	return binary.BigEndian.AppendUint64(binary.BigEndian.AppendUint64(nil, index), term)
}

// run is a stretch of entries of one term, from its first index on.
type run struct{ first, term uint64 }

// tails counts the memory of all groups' cached tails. Only the worker uses it.
type tails struct {
	bytes int
	logs  []*groupLog
}

// shrink brings the tails down to half the limit, the same share for each.
func (t *tails) shrink() {
	share := tailBytesHost / 2 / max(1, len(t.logs))
	for _, l := range t.logs {
		l.evict(share)
	}
}

// groupLog is one group's log: raft.Storage over the log database. Only the
// worker uses it (before that, Open).
type groupLog struct {
	g     ids.Group
	db    *pebble.DB
	tails *tails

	bare         bool // a witness's: there is no state to send
	hard         *pb.HardState
	applied      func() point // what a snapshot would hold now
	start        point        // applied when opened
	trunc, last  uint64
	changed      uint64 // no entry after this one changes the replicas
	truncTerm    uint64
	runs         []run       // terms of (trunc, last]
	tail         []*pb.Entry // the newest entries, ending with last
	tailSize     int
	bytes        int64  // size of (trunc, last], roughly
	steps        []step // places in it, stepBytes apart
	sinceStep    int64
	readErr      error // first error of the database; the worker stops at it
	bytesWritten int64 // since opened
}

type step struct {
	index uint64
	bytes int64 // of all entries up to index, from some origin
}

// InitialState is part of raft.Storage.
func (l *groupLog) InitialState() (*pb.HardState, *pb.ConfState, error) {
	return l.hard, l.start.conf, nil
}

// FirstIndex is part of raft.Storage.
func (l *groupLog) FirstIndex() (uint64, error) { return l.trunc + 1, nil }

// LastIndex is part of raft.Storage.
func (l *groupLog) LastIndex() (uint64, error) { return l.last, nil }

// Term is part of raft.Storage. It needs no disk.
func (l *groupLog) Term(i uint64) (uint64, error) {
	switch {
	case i == l.trunc:
		return l.truncTerm, nil
	case i < l.trunc:
		return 0, raft.ErrCompacted
	case i > l.last:
		return 0, raft.ErrUnavailable
	}
	n := sort.Search(len(l.runs), func(k int) bool { return l.runs[k].first > i })
	return l.runs[n-1].term, nil
}

// Entries is part of raft.Storage.
func (l *groupLog) Entries(lo, hi, maxSize uint64) ([]*pb.Entry, error) {
	if lo <= l.trunc {
		return nil, raft.ErrCompacted
	}
	if hi > l.last+1 || lo >= hi {
		return nil, raft.ErrUnavailable
	}
	var out []*pb.Entry
	var size uint64
	add := func(e *pb.Entry) bool {
		size += uint64(entrySize(e))
		if len(out) > 0 && size > maxSize {
			return false
		}
		out = append(out, e)
		return true
	}
	cached := l.last + 1 - uint64(len(l.tail))
	if lo < cached {
		full, err := l.read(lo, min(hi, cached), add)
		if err != nil {
			l.readErr = err
			return nil, err
		}
		if full {
			return out, nil
		}
		lo = cached
	}
	for ; lo < hi; lo++ {
		if !add(l.tail[lo-cached]) {
			break
		}
	}
	return out, nil
}

// read gives the entries [lo, hi) from the database to add until it says no.
func (l *groupLog) read(lo, hi uint64, add func(*pb.Entry) bool) (full bool, err error) {
	it, err := l.db.NewIter(&pebble.IterOptions{LowerBound: entryKey(l.g, lo), UpperBound: entryKey(l.g, hi)})
	if err != nil {
		return false, dbErr(err, "read log of group", fmt.Sprint(l.g))
	}
	defer it.Close()
	want := lo
	for it.First(); it.Valid(); it.Next() {
		e, err := decodeEntry(l.g, it, want)
		if err != nil {
			return false, err
		}
		want++
		if !add(e) {
			return true, nil
		}
	}
	if err := it.Error(); err != nil {
		return false, dbErr(err, "read log of group", fmt.Sprint(l.g))
	}
	if want != hi {
		return false, errs.E(errs.Corrupt, "read log of group", fmt.Sprint(l.g), "entry %d is missing", want)
	}
	return false, nil
}

// decodeEntry reads the entry at it, which must have index want.
func decodeEntry(g ids.Group, it *pebble.Iterator, want uint64) (*pb.Entry, error) {
	place := fmt.Sprintf("entry %d of group %d", want, g)
	if k := it.Key(); len(k) != 17 || binary.BigEndian.Uint64(k[9:]) != want {
		return nil, errs.E(errs.Corrupt, "read", place, "it is missing: the next key is %x", k)
	}
	v, err := it.ValueAndErr()
	if err != nil {
		return nil, dbErr(err, "read", place)
	}
	e := &pb.Entry{}
	if err := proto.Unmarshal(v, e); err != nil {
		return nil, errs.E(errs.Corrupt, "read", place, "%v", err)
	}
	if e.GetIndex() != want || e.GetTerm() == 0 {
		return nil, errs.E(errs.Corrupt, "read", place, "it says index %d, term %d", e.GetIndex(), e.GetTerm())
	}
	return e, nil
}

// Snapshot is part of raft.Storage: it says which state could be sent now. The
// state sent is taken later and may be newer.
func (l *groupLog) Snapshot() (*pb.Snapshot, error) {
	p := l.applied()
	if l.bare || p.index == 0 || p.index < l.trunc {
		return nil, raft.ErrSnapshotTemporarilyUnavailable
	}
	return &pb.Snapshot{Metadata: &pb.SnapshotMetadata{ConfState: p.conf, Index: &p.index, Term: &p.term}}, nil
}

// write puts entries and hard state into b. A conflicting tail goes in the same
// batch. The log itself changes in wrote, once b is on disk.
func (l *groupLog) write(b *pebble.Batch, ents []*pb.Entry, hard *pb.HardState) error {
	if len(ents) > 0 && ents[0].GetIndex() <= l.last {
		if err := b.DeleteRange(entryKey(l.g, ents[0].GetIndex()), logKey(l.g, logEntry+1), nil); err != nil {
			return err
		}
	}
	for _, e := range ents {
		v, err := proto.Marshal(e)
		if err != nil {
			return err
		}
		if err := b.Set(entryKey(l.g, e.GetIndex()), v, nil); err != nil {
			return err
		}
	}
	if hard != nil {
		v, err := proto.Marshal(hard)
		if err != nil {
			return err
		}
		return b.Set(logKey(l.g, logHard), v, nil)
	}
	return nil
}

// wrote takes over what write put on disk.
func (l *groupLog) wrote(ents []*pb.Entry, hard *pb.HardState) {
	if hard != nil {
		l.hard = hard
	}
	if len(ents) == 0 {
		return
	}
	if first := ents[0].GetIndex(); first <= l.last {
		l.cut(first)
	}
	for _, e := range ents {
		n := entrySize(e)
		l.note(e, int64(n))
		l.tail = append(l.tail, e)
		l.tailSize += n
		l.tails.bytes += n
	}
	if l.tailSize > tailBytesGroup {
		l.evict(tailBytesGroup * 3 / 4) // what stays is copied: not in every round
	}
	if l.tails.bytes > tailBytesHost {
		l.tails.shrink()
	}
}

// entrySize is about how many bytes e takes, in the log as on the wire. It is
// asked for so often that counting them was a tenth of a busy worker's time.
func entrySize(e *pb.Entry) int { return len(e.Data) + 16 }

// note records one more entry at the end.
func (l *groupLog) note(e *pb.Entry, size int64) {
	index, term := e.GetIndex(), e.GetTerm()
	if e.GetType() == pb.EntryConfChangeV2 {
		l.changed = index
	}
	if len(l.runs) == 0 || l.runs[len(l.runs)-1].term != term {
		l.runs = append(l.runs, run{index, term})
	}
	l.last = index
	l.bytes += size
	l.bytesWritten += size
	if l.sinceStep += size; l.sinceStep >= stepBytes {
		l.steps = append(l.steps, step{index, l.bytesWritten})
		l.sinceStep = 0
	}
}

// cut forgets the entries from first on; others take their place.
func (l *groupLog) cut(first uint64) {
	for n := len(l.tail); n > 0 && l.tail[n-1].GetIndex() >= first; n = len(l.tail) {
		l.dropTail(n-1, n)
	}
	for n := len(l.runs); n > 0 && l.runs[n-1].first >= first; n = len(l.runs) {
		l.runs = l.runs[:n-1]
	}
	for n := len(l.steps); n > 0 && l.steps[n-1].index >= first; n = len(l.steps) {
		l.steps = l.steps[:n-1]
	}
	l.last = first - 1
	l.changed = min(l.changed, l.last)
}

// evict drops the oldest of the tail until it holds at most limit bytes.
func (l *groupLog) evict(limit int) {
	n, size := 0, l.tailSize
	for ; n < len(l.tail) && size > limit; n++ {
		size -= entrySize(l.tail[n])
	}
	if n > 0 {
		l.dropTail(0, n)
	}
}

func (l *groupLog) dropTail(from, to int) {
	for _, e := range l.tail[from:to] {
		n := entrySize(e)
		l.tailSize -= n
		l.tails.bytes -= n
	}
	if to == len(l.tail) {
		clear(l.tail[from:])
		l.tail = l.tail[:from]
		return
	}
	l.tail = append([]*pb.Entry(nil), l.tail[to:]...) // from is 0; free the array
}

// truncate takes the entries up to index away, in b. index must be in the log.
func (l *groupLog) truncate(b *pebble.Batch, index uint64) error {
	term, err := l.Term(index)
	if err != nil {
		return err
	}
	if err := b.Set(logKey(l.g, logTrunc), encodeTrunc(index, term), nil); err != nil {
		return err
	}
	if err := b.DeleteRange(logKey(l.g, logEntry), entryKey(l.g, index+1), nil); err != nil {
		return err
	}
	for len(l.tail) > 0 && l.tail[0].GetIndex() <= index {
		n := int(min(index-l.tail[0].GetIndex()+1, uint64(len(l.tail))))
		l.dropTail(0, n)
	}
	for len(l.runs) > 1 && l.runs[1].first <= index+1 {
		l.runs = l.runs[1:]
	}
	if index == l.last {
		l.runs = nil
	}
	n := sort.Search(len(l.steps), func(k int) bool { return l.steps[k].index > index })
	if n > 0 {
		l.bytes = l.bytesWritten - l.steps[n-1].bytes
		l.steps = append([]step(nil), l.steps[n:]...)
	}
	if index == l.last {
		l.bytes = 0
	}
	l.trunc, l.truncTerm = index, term
	return nil
}

// reset replaces the whole log by a snapshot's point, in b; it also takes the
// installation's marker away.
func (l *groupLog) reset(b *pebble.Batch, p point) error {
	if err := b.DeleteRange(logKey(l.g, logEntry), logKey(l.g, logEntry+1), nil); err != nil {
		return err
	}
	if err := b.Delete(logKey(l.g, logMarker), nil); err != nil {
		return err
	}
	if err := b.Set(logKey(l.g, logTrunc), encodeTrunc(p.index, p.term), nil); err != nil {
		return err
	}
	l.dropTail(0, len(l.tail))
	l.runs, l.steps, l.bytes, l.sinceStep = nil, nil, 0, 0
	l.trunc, l.truncTerm, l.last, l.changed = p.index, p.term, p.index, p.index
	return nil
}
