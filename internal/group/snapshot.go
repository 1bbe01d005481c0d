package group

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/cockroachdb/pebble/v2"
	"github.com/cockroachdb/pebble/v2/objstorage/objstorageprovider"
	"github.com/cockroachdb/pebble/v2/sstable"
	"github.com/cockroachdb/pebble/v2/vfs"
	"go.etcd.io/raft/v3"
	pb "go.etcd.io/raft/v3/raftpb"
	"google.golang.org/protobuf/proto"

	"github.com/unum-os/unum/internal/errs"
	"github.com/unum-os/unum/internal/ids"
	"github.com/unum-os/unum/internal/wire"
)

// A snapshot travels as frames: one begin, chunks of keys and values, one end;
// then one answer comes back. The checksum of a chunk goes over all chunks so
// far, so that none is lost or swapped.
const (
	frameBegin byte = iota + 1
	frameChunk
	frameEnd
	frameAnswer
)

const (
	snapshotsOut  = 4                // snapshots sent at once, of all groups
	snapshotsIn   = 2                // snapshots received at once, of all groups; more are refused as busy
	chunkBytes    = 512 << 10        // bytes of keys and values in one frame of a snapshot
	tableBytes    = 32 << 20         // bytes of keys and values in one ingested table
	snapshotStall = 10 * time.Second // how long a snapshot goes on without a byte moving, or the dialling takes
	installWait   = 60 * time.Second // how long its sender waits for the answer after the end
	refusalWait   = time.Second      // how long a refusal may take to reach a sender that may not be listening yet
	snapshotRetry = 3                // ticks from a failed snapshot to the next attempt
)

type snapBegin struct {
	Group ids.Group `cbor:"1,keyasint"`
	Msg   []byte    `cbor:"2,keyasint"`           // raft's MsgSnap
	Bare  bool      `cbor:"3,keyasint,omitempty"` // for a witness: no chunk follows
}

type snapChunk struct {
	CRC uint32 `cbor:"1,keyasint"`
}

type snapEnd struct {
	Chunks uint64 `cbor:"1,keyasint"`
	Keys   uint64 `cbor:"2,keyasint"`
	CRC    uint32 `cbor:"3,keyasint"`
}

type snapAnswer struct {
	Refused string `cbor:"1,keyasint,omitempty"` // why; empty: installed
}

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// shipment is a snapshot on its way to a replica.
type shipment struct {
	w     *worker
	g     *Group
	to    ids.Node
	term  uint64
	bare  *pb.SnapshotMetadata // for a witness: all that it gets
	ready *reader              // let go when the state has the configuration raft uses, which has the peer
}

func (s *shipment) place() string { return fmt.Sprintf("snapshot of group %d to %v", s.g.id, s.to) }

// startSnapshot begins to send a snapshot. How it went is reported to raft;
// without the report the follower would stay paused.
func (w *worker) startSnapshot(g *Group, m *pb.Message) {
	g.holds[m.GetTo()] = m.GetSnapshot().GetMetadata().GetIndex()
	s := &shipment{w: w, g: g, to: ids.Node(m.GetTo()), term: m.GetTerm()}
	if w.h.witness(s.to) {
		s.bare = m.GetSnapshot().GetMetadata()
		g.told = max(g.told, s.bare.GetIndex())
	}
	select {
	case w.h.sending <- struct{}{}:
		s.ready = g.awaitApplied(w.ctx, g.confAt)
		w.launch(s)
	default:
		s.report(errs.E(errs.Busy, "send snapshot", s.to.String(), "%d are being sent", snapshotsOut))
	}
}

// run sends the snapshot, on a goroutine of its own.
func (s *shipment) run(ctx context.Context) error {
	var err error
	select {
	case o := <-s.ready.done:
		if err = o.err; err == nil {
			err = s.send(ctx)
		}
	case <-ctx.Done():
	}
	if ctx.Err() == nil {
		s.over(err)
	}
	return nil
}

// over ends the shipment; the worker hears of it.
func (s *shipment) over(err error) {
	<-s.w.h.sending
	s.w.h.in.push(event{kind: evCall, g: s.g, fn: func() { s.report(err) }})
}

// report tells raft, on the worker: of a failure only when it is time to try
// again.
func (s *shipment) report(err error) {
	w, status := s.w, raft.SnapshotFinish
	tell := func() {
		delete(s.g.holds, uint64(s.to))
		s.g.rn.ReportSnapshot(uint64(s.to), status)
	}
	if err == nil {
		tell()
		return
	}
	status = raft.SnapshotFailure
	w.h.log.Info("snapshot not delivered", "group", uint64(s.g.id), "to", s.to, "err", err)
	w.later = append(w.later, delayed{w.ticks + snapshotRetry, s.g, tell})
}

// send streams the snapshot and waits for the answer.
func (s *shipment) send(ctx context.Context) error {
	dctx, cancel := context.WithTimeout(ctx, snapshotStall)
	defer cancel()
	c, err := s.w.h.cfg.Transport.Dial(dctx, s.to, Service)
	if err != nil {
		return errs.Wrap(err, "send", s.place())
	}
	defer c.Close()
	defer context.AfterFunc(ctx, func() { c.Close() })()
	if err := s.stream(c); err != nil {
		return err
	}
	return s.answer(c)
}

// stream writes the group's state as it is now, or for a witness only what raft
// has to know of the point in bare.
func (s *shipment) stream(c net.Conn) error {
	h, place := s.w.h, s.place()
	sw := newSnapWriter(h.metered(c))
	begin := func(md *pb.SnapshotMetadata) error {
		msg, err := proto.Marshal(&pb.Message{
			Type: pb.MsgSnap.Enum(), From: new(uint64(h.cfg.Self)), To: new(uint64(s.to)), Term: &s.term,
			Snapshot: &pb.Snapshot{Metadata: md},
		})
		if err != nil {
			return err
		}
		return errs.Wrap(sw.frame(frameBegin, wire.MustMarshal(snapBegin{s.g.id, msg, s.bare != nil}), nil), "send", place)
	}
	var err error
	if s.bare != nil {
		err = begin(s.bare)
	} else {
		err = h.sendState(s.g, place, sw, begin)
	}
	if err != nil {
		return err
	}
	return errs.Wrap(sw.end(), "send", place)
}

// answer reads what the receiver made of it.
func (s *shipment) answer(c net.Conn) error {
	place := s.place()
	if err := c.SetReadDeadline(time.Now().Add(installWait)); err != nil {
		return errs.Wrap(err, "send", place)
	}
	f, err := wire.ReadFrame(c, 64<<10)
	if err != nil {
		return errs.Wrap(err, "send", place)
	}
	var a snapAnswer
	if err := wire.Unmarshal(f.Header, &a); err != nil || f.Type != frameAnswer {
		return errs.E(errs.Corrupt, "send", place, "no answer but a frame of type %d (%v)", f.Type, err)
	}
	if a.Refused != "" {
		return errs.E(errs.Unavailable, "send", place, "refused: %s", a.Refused)
	}
	s.w.h.count.snapshotsOut.Add(1)
	return nil
}

// sendState sends the beginning and all keys. One iterator sees one state: the
// applied record, which comes first, and the keys belong together.
func (h *Host) sendState(g *Group, place string, s *snapWriter, begin func(*pb.SnapshotMetadata) error) error {
	lo, hi := groupBounds(g.id)
	it, err := h.stateDB.NewIter(&pebble.IterOptions{LowerBound: lo, UpperBound: hi})
	if err != nil {
		return dbErr(err, "send", place)
	}
	defer it.Close()
	if !it.First() || !bytes.Equal(it.Key(), appliedKey(g.id)) {
		return errors.Join(errs.E(errs.Corrupt, "send", place, "the state has no record"), it.Error())
	}
	v, err := it.ValueAndErr()
	if err != nil {
		return dbErr(err, "send", place)
	}
	p, err := decodePoint(v, place)
	if err != nil {
		return err
	}
	if err := begin(&pb.SnapshotMetadata{Index: &p.index, Term: &p.term, ConfState: p.conf}); err != nil {
		return err
	}
	for ok := it.Next(); ok; ok = it.Next() {
		v, err := it.ValueAndErr()
		if err != nil {
			return dbErr(err, "send", place)
		}
		if err := s.add(it.Key()[8:], v); err != nil {
			return errs.Wrap(err, "send", place)
		}
	}
	return dbErr(it.Error(), "send", place)
}

// snapWriter makes the frames of a snapshot.
type snapWriter struct {
	c            net.Conn
	w            *bufio.Writer
	buf          []byte
	crc          uint32
	chunks, keys uint64
}

func newSnapWriter(c net.Conn) *snapWriter {
	return &snapWriter{c: c, w: bufio.NewWriterSize(c, 64<<10)}
}

func (s *snapWriter) frame(typ byte, header, body []byte) error {
	if err := s.c.SetWriteDeadline(time.Now().Add(snapshotStall)); err != nil {
		return err
	}
	if err := wire.WriteFrame(s.w, typ, header, body); err != nil {
		return err
	}
	return s.w.Flush()
}

func (s *snapWriter) add(key, value []byte) error {
	s.buf = binary.AppendUvarint(s.buf, uint64(len(key)))
	s.buf = binary.AppendUvarint(s.buf, uint64(len(value)))
	s.buf = append(append(s.buf, key...), value...)
	s.keys++
	if len(s.buf) < chunkBytes {
		return nil
	}
	return s.chunk()
}

func (s *snapWriter) chunk() error {
	s.crc = crc32.Update(s.crc, castagnoli, s.buf)
	s.chunks++
	err := s.frame(frameChunk, wire.MustMarshal(snapChunk{s.crc}), s.buf)
	s.buf = s.buf[:0]
	return err
}

func (s *snapWriter) end() error {
	if len(s.buf) > 0 {
		if err := s.chunk(); err != nil {
			return err
		}
	}
	return s.frame(frameEnd, wire.MustMarshal(snapEnd{s.chunks, s.keys, s.crc}), nil)
}

// filling is a snapshot that arrives, or has arrived, as tables on disk.
type filling struct {
	h     *Host
	g     *Group
	msg   *pb.Message
	at    point
	files []string
	over  chan string // why it was refused, or empty when installed; room for one
}

func (f *filling) discard() error {
	var err error
	for _, name := range f.files {
		err = errors.Join(err, f.h.fs.Remove(name))
	}
	return err
}

// ReceiveSnapshot serves a stream that another host opened under Service. It
// returns when the snapshot is installed or refused, and closes c. While it
// comes in nothing of the group changes. Errors: Corrupt for a stream that does
// not hold, Busy, and what disk or connection say.
func (h *Host) ReceiveSnapshot(ctx context.Context, from ids.Node, c net.Conn) error {
	defer c.Close()
	defer context.AfterFunc(ctx, func() { c.Close() })()
	f, err := h.fillSnapshot(from, c)
	why := ""
	if err == nil {
		h.in.push(event{kind: evSnapshot, g: f.g, fill: f})
		select {
		case why = <-f.over:
		case <-h.stopped:
			why = "the node is stopping"
		}
	}
	return h.answerSnapshot(from, c, f, why, err)
}

// answerSnapshot tells the sender, and gives up the files of what was refused:
// by err, or with f by why.
func (h *Host) answerSnapshot(from ids.Node, c net.Conn, f *filling, why string, err error) error {
	answer := snapAnswer{Refused: why}
	switch {
	case err != nil:
		answer.Refused = errs.ClassOf(err).String()
	case why == "":
		h.count.snapshotsIn.Add(1)
	default:
		err = errs.E(errs.Busy, "install snapshot of group", fmt.Sprint(f.g.id), "%s", why)
	}
	if f != nil && answer.Refused != "" {
		err = errors.Join(err, f.discard())
	}
	limit := snapshotStall
	if answer.Refused != "" {
		limit = refusalWait
	}
	werr := c.SetWriteDeadline(time.Now().Add(limit))
	if werr == nil {
		werr = wire.WriteFrame(c, frameAnswer, wire.MustMarshal(answer), nil)
	}
	if err == nil {
		err = errs.Wrap(werr, "answer snapshot of", from.String())
	}
	return err
}

// fillSnapshot reads a stream into tables. What it returns besides an error may
// have files to be discarded.
func (h *Host) fillSnapshot(from ids.Node, c net.Conn) (*filling, error) {
	bad := func(s string, a ...any) error {
		return errs.E(errs.Corrupt, "receive snapshot", "from "+from.String(), s, a...)
	}
	select {
	case h.filling <- struct{}{}:
		defer func() { <-h.filling }()
	default:
		return nil, errs.E(errs.Busy, "receive snapshot", "from "+from.String(), "%d are coming in", snapshotsIn)
	}
	r := bufio.NewReaderSize(h.metered(c), 64<<10)
	next := func() (wire.Frame, error) {
		if err := c.SetReadDeadline(time.Now().Add(snapshotStall)); err != nil {
			return wire.Frame{}, err
		}
		f, err := wire.ReadFrame(r, wire.MaxFrame)
		switch {
		case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
			err = bad("it breaks off")
		case errors.Is(err, os.ErrDeadlineExceeded):
			err = errs.E(errs.Timeout, "receive snapshot", "from "+from.String(), "nothing came for %v", snapshotStall)
		}
		return f, err
	}
	fr, err := next()
	if err != nil {
		return nil, err
	}
	var begin snapBegin
	if err := wire.Unmarshal(fr.Header, &begin); err != nil || fr.Type != frameBegin {
		return nil, bad("frame of type %d instead of a beginning (%v)", fr.Type, err)
	}
	msg := &pb.Message{}
	if err := proto.Unmarshal(begin.Msg, msg); err != nil {
		return nil, bad("%v", err)
	}
	if err := checkSnap(msg, from, h.cfg.Self); err != nil {
		return nil, bad("%v", err)
	}
	g := h.Group(begin.Group)
	if g == nil {
		return nil, errs.E(errs.Unavailable, "receive snapshot", "from "+from.String(), "group %d is not open here", begin.Group)
	}
	if begin.Bare != h.cfg.Witness { // nobody takes emptiness for state, or state where none is kept
		return nil, errs.E(errs.Invalid, "receive snapshot", "from "+from.String(), "of group %d: with state: %v, but %v is a witness: %v",
			g.id, !begin.Bare, h.cfg.Self, h.cfg.Witness)
	}
	md := msg.Snapshot.Metadata
	f := &filling{h: h, g: g, msg: msg, over: make(chan string, 1),
		at: point{index: md.GetIndex(), term: md.GetTerm(), conf: md.ConfState}}
	t := tables{h: h, f: f}
	if err := t.begin(); err != nil {
		return f, errors.Join(err, t.abandon())
	}
	var crc uint32
	var chunks, keys uint64
	for {
		fr, err := next()
		if err != nil {
			return f, errors.Join(err, t.abandon())
		}
		if fr.Type == frameEnd {
			var end snapEnd
			if err = wire.Unmarshal(fr.Header, &end); err == nil && end != (snapEnd{chunks, keys, crc}) {
				err = bad("%d chunks with %d keys came, the end says %d with %d", chunks, keys, end.Chunks, end.Keys)
			}
			if err != nil {
				return f, errors.Join(err, t.abandon())
			}
			return f, t.finish()
		}
		var ch snapChunk
		crc = crc32.Update(crc, castagnoli, fr.Body)
		if err = wire.Unmarshal(fr.Header, &ch); err == nil && (fr.Type != frameChunk || ch.CRC != crc) {
			err = bad("chunk %d (type %d) does not match its checksum", chunks, fr.Type)
		}
		chunks++
		if err == nil && begin.Bare {
			err = bad("state in a snapshot for a witness")
		}
		for b := fr.Body; err == nil && len(b) > 0; keys++ {
			var k, v []byte
			if k, v, b, err = cutKey(b); err == nil {
				err = t.set(k, v)
			} else {
				err = bad("chunk %d: %v", chunks, err)
			}
		}
		if err != nil {
			return f, errors.Join(err, t.abandon())
		}
	}
}

// cutKey takes one key and value off a chunk.
func cutKey(b []byte) (k, v, rest []byte, err error) {
	kl, n := binary.Uvarint(b)
	if n <= 0 {
		return nil, nil, nil, errors.New("length cut off")
	}
	b = b[n:]
	vl, n := binary.Uvarint(b)
	if n <= 0 {
		return nil, nil, nil, errors.New("length cut off")
	}
	b = b[n:]
	if kl < 1 || kl > uint64(len(b)) || vl > uint64(len(b))-kl {
		return nil, nil, nil, fmt.Errorf("key of %d, value of %d bytes, %d are left", kl, vl, len(b))
	}
	if b[0] != kindData {
		return nil, nil, nil, fmt.Errorf("key of kind %d", b[0])
	}
	return b[:kl], b[kl : kl+vl], b[kl+vl:], nil
}

func checkSnap(m *pb.Message, from, to ids.Node) error {
	md := m.GetSnapshot().GetMetadata()
	switch {
	case m.GetType() != pb.MsgSnap, m.GetFrom() != uint64(from), m.GetTo() != uint64(to),
		len(m.Entries) > 0, len(m.Responses) > 0, len(m.GetSnapshot().GetData()) > 0:
		return errors.New("message is no snapshot's, or for or from another")
	case md.GetIndex() == 0, md.GetTerm() == 0, md.GetTerm() > m.GetTerm():
		return fmt.Errorf("snapshot at index %d, term %d in term %d", md.GetIndex(), md.GetTerm(), m.GetTerm())
	case len(md.GetConfState().GetVoters()) == 0:
		return errors.New("configuration without voters")
	case !slices.Contains(slices.Concat(md.ConfState.Voters, md.ConfState.VotersOutgoing, md.ConfState.Learners), uint64(to)):
		return fmt.Errorf("%v is not in its configuration", to)
	}
	return nil
}

// tables writes the snapshot's keys into tables that together cover the group's
// whole range: each begins with the removal of everything in its part, so that
// their ingestion replaces the state in one step, and readers with an older view
// keep it.
type tables struct {
	h     *Host
	f     *filling
	w     *sstable.Writer
	start []byte // of the open table's part
	last  []byte
	size  int
}

func (t *tables) begin() error {
	lo, _ := groupBounds(t.f.g.id)
	if err := t.open(lo); err != nil {
		return err
	}
	v, err := t.f.at.encode()
	if err != nil {
		return err
	}
	t.last = appliedKey(t.f.g.id)
	return t.w.Set(t.last, v)
}

func (t *tables) open(start []byte) error {
	name := filepath.Join(t.h.cfg.Dir, "snapshots", fmt.Sprintf("%d-%d.sst", t.f.g.id, t.h.snapSeq.Add(1)))
	file, err := t.h.fs.Create(name, vfs.WriteCategoryUnspecified)
	if err != nil {
		return errs.Wrap(err, "create", name)
	}
	t.f.files = append(t.f.files, name)
	o := t.h.stateOpts.MakeWriterOptions(0, t.h.stateDB.FormatMajorVersion().MaxTableFormat())
	t.w = sstable.NewWriter(objstorageprovider.NewFileWritable(file), o)
	t.start, t.size = start, 0
	return nil
}

// shut ends the open table; its part goes up to end.
func (t *tables) shut(end []byte) error {
	w := t.w
	t.w = nil
	err := w.DeleteRange(t.start, end)
	return dbErr(errors.Join(err, w.Close()), "write", "snapshot table")
}

func (t *tables) set(suffix, value []byte) error {
	key := append(binary.BigEndian.AppendUint64(make([]byte, 0, 8+len(suffix)), uint64(t.f.g.id)), suffix...)
	if bytes.Compare(key, t.last) <= 0 {
		return errs.E(errs.Corrupt, "receive snapshot", fmt.Sprintf("of group %d", t.f.g.id), "keys out of order")
	}
	if t.size >= tableBytes {
		if err := t.shut(key); err != nil {
			return err
		}
		if err := t.open(key); err != nil {
			return err
		}
	}
	t.last = key
	t.size += len(key) + len(value)
	return dbErr(t.w.Set(key, value), "write", "snapshot table")
}

func (t *tables) finish() error {
	_, hi := groupBounds(t.f.g.id)
	return t.shut(hi)
}

// abandon closes the open table; the files are discarded by their owner.
func (t *tables) abandon() error {
	if t.w == nil {
		return nil
	}
	w := t.w
	t.w = nil
	return w.Close()
}

// offer tells raft of a complete snapshot, on the worker. What raft makes of it
// shows in the next Ready.
func (w *worker) offer(g *Group, f *filling) {
	g.dropFill("another one has come")
	if g.parked != nil {
		f.over <- "a snapshot is being installed"
		return
	}
	g.fill = f
	_ = g.rn.Step(f.msg)
}

// dropFill refuses the snapshot that raft did not take.
func (g *Group) dropFill(why string) {
	if g.fill != nil {
		g.fill.over <- why
		g.fill = nil
	}
}

// park begins the installation of the snapshot in rd: the marker goes into b.
func (w *worker) park(g *Group, rd raft.Ready, b *pebble.Batch) error {
	md := rd.Snapshot.GetMetadata()
	f := g.fill
	g.fill = nil
	if f == nil || f.at.index != md.GetIndex() || f.at.term != md.GetTerm() {
		return errs.E(errs.IO, "install snapshot of group", fmt.Sprint(g.id), "raft wants index %d, which did not come", md.GetIndex())
	}
	v, err := f.at.encode()
	if err != nil {
		return err
	}
	g.parked = &parked{rd: rd, fill: f}
	switch k := w.h.cfg.Hooks; {
	case k.plants(NoMarker):
		return nil
	case k.plants(ResetEarly):
		return g.log.reset(b, f.at)
	}
	return dbErr(b.Set(logKey(g.id, logMarker), v, nil), "install snapshot of group", fmt.Sprint(g.id))
}

// install puts the snapshot into the state, on the applier, after the marker is
// synced. The ingestion is atomic.
func (a *applier) install(g *Group, f *filling) error {
	place := fmt.Sprintf("group %d", g.id)
	if err := a.h.stateDB.Ingest(context.Background(), f.files); err != nil {
		return dbErr(err, "install snapshot of", place)
	}
	if err := a.h.stateDB.LogData(nil, pebble.Sync); err != nil {
		return dbErr(err, "install snapshot of", place)
	}
	f.files = nil // the database's now
	g.setApplied(f.at)
	g.m.Applied(f.at.index)
	g.releaseReads()
	a.h.in.push(event{kind: evInstalled, g: g})
	return nil
}

// unpark resets the log to the installed snapshot, in b, and goes on with the
// rest of the Ready.
func (w *worker) unpark(g *Group, b *pebble.Batch) (turn, error) {
	p := g.parked
	g.parked = nil
	if err := g.log.reset(b, p.fill.at); err != nil {
		return turn{}, dbErr(err, "reset log of group", fmt.Sprint(g.id))
	}
	if err := g.log.write(b, p.rd.Entries, p.rd.HardState); err != nil {
		return turn{}, dbErr(err, "reset log of group", fmt.Sprint(g.id))
	}
	g.conf = p.fill.at.conf
	p.fill.over <- ""
	w.h.log.Info("snapshot installed", "group", uint64(g.id), "index", p.fill.at.index)
	return turn{g, p.rd}, nil
}
