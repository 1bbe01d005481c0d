package sim

import (
	"bytes"
	"context"
	"hash/crc32"
	"io"
	"net"
	"time"

	"github.com/unum-os/unum/internal/errs"
	"github.com/unum-os/unum/internal/ids"
	"github.com/unum-os/unum/internal/wire"
)

// network is what lies between the nodes.
type network struct {
	w         *world
	cut       map[[2]ids.Node]int // cuts that lie on a link, in one direction
	loss, dup float64
	delay     time.Duration // median of a message's way
	jitter    float64       // spread of it
	late      float64       // share of messages that are very late
	streams   []*stream     // snapshots under way
}

func (n *network) isCut(from, to ids.Node) bool { return n.cut[[2]ids.Node{from, to}] > 0 }

// way draws how long a message takes.
func (n *network) way() time.Duration {
	d := float64(n.delay) * (1 + n.jitter*n.w.rng.ExpFloat64())
	if n.w.rng.Float64() < n.late {
		d += float64(2*time.Second) * n.w.rng.Float64()
	}
	return time.Duration(d)
}

// port is a node's transport in one life.
type port struct {
	n    *node
	life int
}

// Send is part of group.Transport.
func (p port) Send(to ids.Node, msg []byte) error {
	n, w := p.n, p.n.w
	if n.life != p.life || n.dying() {
		return nil
	}
	w.tracef("%v sends %d bytes %08x to %v", n.id, len(msg), crc32.ChecksumIEEE(msg), to)
	w.stats.Messages++
	if n.armedSend > 0 {
		if n.armedSend--; n.armedSend == 0 {
			n.loseMemory()
			w.stats.CrashesSending++
			if w.rng.IntN(2) == 0 {
				return nil
			}
		}
	}
	if w.net.isCut(n.id, to) {
		w.stats.Dropped++
		if w.rng.IntN(2) == 0 {
			return errs.E(errs.Unavailable, "send", to.String(), "cut")
		}
		return nil
	}
	if w.rng.Float64() < w.net.loss {
		w.stats.Dropped++
		return nil
	}
	copies := 1
	if w.rng.Float64() < w.net.dup {
		w.stats.Duplicated++
		copies = 2
	}
	for range copies {
		m := bytes.Clone(msg) // the receiver keeps it
		w.at(w.net.way(), func() { w.deliver(n.id, to, m) })
	}
	return nil
}

func (w *world) deliver(from, to ids.Node, msg []byte) {
	n := w.node(to)
	if w.net.isCut(from, to) || n == nil || !n.up {
		w.stats.Dropped++
		return
	}
	if n.putOff(func() { w.deliver(from, to, msg) }) {
		return
	}
	w.tracef("%v gets %d bytes %08x from %v", to, len(msg), crc32.ChecksumIEEE(msg), from)
	if err := n.h.Receive(from, msg); err != nil {
		w.violated("%v refuses a message of %v: %v", to, from, err)
	}
	n.plan()
}

// stream carries one snapshot. Each end is a connection.
type stream struct {
	w          *world
	from, to   *node
	life       int // of from
	there      int // life of to, once it has it
	sender     *end
	data, back bytes.Buffer
	state      streamState
}

type streamState uint8

const (
	streamOpen  streamState = iota // being written, or on its way
	streamThere                    // with the receiver
	streamDone
)

// Dial is part of group.Transport.
func (p port) Dial(_ context.Context, to ids.Node, _ string) (net.Conn, error) {
	w := p.n.w
	if w.net.isCut(p.n.id, to) || !w.node(to).up {
		return nil, errs.E(errs.Unavailable, "dial", to.String(), "cut")
	}
	s := &stream{w: w, from: p.n, to: w.node(to), life: p.n.life}
	w.net.streams = append(w.net.streams, s)
	w.at(w.net.way(), func() { s.arrive() })
	s.sender = &end{s: s, r: &s.back, w: &s.data}
	return s.sender, nil
}

// arrive hands the whole stream, or a part of it, to the receiver.
func (s *stream) arrive() {
	w := s.w
	if s.state != streamOpen || s.from.life != s.life {
		s.state = streamDone
		return
	}
	if w.net.isCut(s.from.id, s.to.id) || !s.to.up {
		s.fail("the connection is cut")
		return
	}
	if s.to.putOff(s.arrive) {
		return
	}
	data := s.data.Bytes()
	if w.rng.Float64() < 0.1 {
		data = data[:w.rng.IntN(len(data)+1)]
		w.stats.SnapshotsTorn++
	}
	w.tracef("%v gets a snapshot of %d bytes %08x from %v", s.to.id, len(data), crc32.ChecksumIEEE(data), s.from.id)
	s.state, s.there = streamThere, s.to.life
	if !w.quiet && w.rng.IntN(3) == 0 {
		w.stats.Ambushes++
		s.to.back = time.Duration(w.rng.Int64N(int64(10 * time.Millisecond)))
		s.to.disk.armed.Store(1 + w.rng.Int64N(3)) // the marker's, the reset's, or one between
	}
	s.to.st.ReceiveSnapshot(s.from.id, &end{s: s, r: bytes.NewReader(data), w: &s.back, receiver: true})
	s.to.plan()
}

// fail ends the stream for its sender, who learns of it late.
func (s *stream) fail(why string) {
	if s.state == streamDone {
		return
	}
	s.state = streamDone
	s.w.at(time.Duration(s.w.rng.Int64N(int64(2*time.Second))), func() {
		s.over(errs.E(errs.Unavailable, "send snapshot", s.to.id.String(), "%s", why))
	})
}

func (s *stream) over(err error) {
	if s.from.life != s.life || !s.from.up {
		return
	}
	if s.from.putOff(func() { s.over(err) }) {
		return
	}
	s.w.tracef("%v: snapshot to %v is over: %v", s.from.id, s.to.id, err)
	s.from.shipped(s, err)
}

// answered is called when the receiver closes its end.
func (s *stream) answered() {
	if s.state != streamThere {
		return
	}
	if s.back.Len() == 0 || s.w.net.isCut(s.to.id, s.from.id) {
		s.fail("no answer came")
		return
	}
	s.state = streamDone
	var a struct {
		Refused string `cbor:"1,keyasint,omitempty"`
	}
	f, err := wire.ReadFrame(bytes.NewReader(s.back.Bytes()), 64<<10)
	if err == nil {
		err = wire.Unmarshal(f.Header, &a)
	}
	if err != nil {
		s.w.violated("answer of %v to a snapshot: %v", s.to.id, err)
	}
	if a.Refused == "" {
		s.w.stats.Snapshots++
	}
	s.w.tracef("%v answers the snapshot of %v: %q", s.to.id, s.from.id, a.Refused)
	s.w.at(s.w.net.way(), func() { s.over(nil) })
}

// dropStreams ends what a dead node had open.
func (n *network) dropStreams(dead *node) {
	var left []*stream
	for _, s := range n.streams {
		switch {
		case s.state == streamDone:
		case s.from == dead:
			s.state = streamDone
		case s.to == dead && s.state == streamThere:
			s.fail("the peer died")
		default:
			left = append(left, s)
		}
	}
	n.streams = left
}

// end is one side of a stream.
type end struct {
	s        *stream
	r        io.Reader
	w        io.Writer
	receiver bool
}

func (e *end) Read(b []byte) (int, error)  { return e.r.Read(b) }
func (e *end) Write(b []byte) (int, error) { return e.w.Write(b) }

func (e *end) Close() error {
	if e.receiver {
		e.s.answered()
	}
	return nil
}

func (e *end) LocalAddr() net.Addr              { return nil }
func (e *end) RemoteAddr() net.Addr             { return nil }
func (e *end) SetDeadline(time.Time) error      { return nil }
func (e *end) SetReadDeadline(time.Time) error  { return nil }
func (e *end) SetWriteDeadline(time.Time) error { return nil }
