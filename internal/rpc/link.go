package rpc

import (
	"bufio"
	"context"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/unum-os/unum/internal/errs"
	"github.com/unum-os/unum/internal/identity"
	"github.com/unum-os/unum/internal/ids"
	"github.com/unum-os/unum/internal/wire"
)

const (
	// sendLimit bounds what waits to be written on a link: enough to keep the
	// network busy, little enough that a small call behind it is not late.
	sendLimit = 4 << 20
	// castLimit bounds the casts received and not handled yet.
	castLimit = 16 << 20
	// callsInHand bounds the calls a node has in hand at a peer on the lane of
	// small ones, bulkInHand on that of big ones (each may hold a block at both
	// ends). The peer refuses beyond twice that: a caller that gave up makes
	// room at its end before the handler has ended.
	callsInHand = 1024
	bulkInHand  = 16
	// streamsInHand bounds the streams a node has open to a peer: each attached
	// command there needs up to four.
	streamsInHand = 8192
)

// link is one connection to a peer that carries frames (all lanes but streams,
// which use close and the watch alone). The dialler calls and casts, the other
// side answers.
type link struct {
	e       *Endpoint
	peer    ids.Node
	shown   identity.Peer // what its certificate proved
	proof   proof         // and for how long
	lane    laneKind
	dialled bool
	addr    string // that was dialled
	raw     *rawConn
	conn    net.Conn // TLS over raw
	out     *queue
	ctx     context.Context // ends with the link; its cause says why
	cancel  context.CancelCauseFunc
	ping    func() // asks the peer for a sign of life; never blocks

	over    int64 // when the watch first saw that the certificate had ended; the watch's
	made    time.Time
	waiting atomic.Int64 // answers or streams waited for
	serving atomic.Int64 // streams served, or calls whose answers have no room yet

	mu     sync.Mutex
	nextID uint64
	calls  map[uint64]chan reply         // of this side; nil once closed
	hands  map[uint64]context.CancelFunc // handlers of calls of the other side
}

type reply struct {
	hdr  replyHeader
	data []byte
	err  error
}

func (e *Endpoint) newLink(peer identity.Peer, lane laneKind, dialled bool, raw *rawConn, conn net.Conn) *link {
	l := &link{e: e, peer: peer.Node, shown: peer, proof: e.proofBy(peer), lane: lane, dialled: dialled, raw: raw, conn: conn, out: newQueue(sendLimit), made: time.Now(),
		calls: make(map[uint64]chan reply), hands: make(map[uint64]context.CancelFunc)}
	l.ctx, l.cancel = context.WithCancelCause(e.ctx)
	l.ping = func() { l.out.put(frame{typ: framePing}, true) }
	return l
}

// close ends the link because of err; the first reason counts. It never blocks.
func (l *link) close(err error) {
	l.cancel(err)
	l.raw.Conn.Close() // not TLS's close, which would wait for a peer that reads nothing
	l.out.close()
	l.mu.Lock()
	calls := l.calls
	l.calls = nil
	l.mu.Unlock()
	for _, ch := range calls {
		ch <- reply{err: context.Cause(l.ctx)}
	}
}

// permit refuses what the peer may not ask for.
func (l *link) permit(what string) error {
	return errs.Wrap(l.e.cfg.Permit(l.shown, what), what, l.e.cfg.Self.String())
}

func (l *link) alive() bool { return l.ctx.Err() == nil }

// run carries frames until the connection ends or close is called. It returns
// when the link's goroutines have ended, handlers excepted.
func (l *link) run() {
	stop := context.AfterFunc(l.ctx, func() { l.close(context.Cause(l.ctx)) })
	defer stop()
	var wg sync.WaitGroup
	wg.Go(l.write)
	var casts *queue
	if !l.dialled && l.lane == laneCast {
		casts = newQueue(castLimit)
		wg.Go(func() { l.e.handleCasts(l.ctx, l.peer, l.permit, casts) })
	}
	err := l.read(casts)
	l.close(err)
	if casts != nil {
		casts.close()
	}
	wg.Wait()
}

// write takes frames from the queue to the connection, as many as there are
// with one flush.
func (l *link) write() {
	l.raw.hold()
	w := bufio.NewWriterSize(l.conn, 16<<10) // one TLS record
	var buf []frame
	for {
		buf = l.out.take(l.ctx.Done(), buf)
		if buf == nil {
			return
		}
		var err error
		for _, f := range buf {
			if err = wire.WriteFrame(w, f.typ, f.header, f.body); err != nil {
				break
			}
		}
		if err == nil {
			err = w.Flush()
		}
		if err == nil {
			err = l.raw.flush()
		}
		if err != nil {
			l.close(lost(l.peer, err))
			return
		}
	}
}

// read handles frames as they come until the connection ends. It waits for
// nothing but the connection.
func (l *link) read(casts *queue) error {
	for {
		f, err := wire.ReadFrame(l.conn, wire.MaxFrame)
		if err != nil {
			return lost(l.peer, err)
		}
		switch f.Type {
		case framePing:
			l.out.put(frame{typ: framePong}, false) // no room: what fills the queue is a sign of life too
		case framePong:
		case frameReply:
			err = l.gotReply(f)
		case frameCall:
			err = l.gotCall(f)
		case frameCancel:
			err = l.gotCancel(f)
		case frameCast:
			if casts == nil {
				return errs.E(errs.Corrupt, "receive", l.peer.String(), "a cast on another lane")
			}
			casts.put(frame{header: f.Header, body: f.Body}, false) // no room: lost, as casts may be
		default:
			return errs.E(errs.Corrupt, "receive", l.peer.String(), "frame of type %d", f.Type)
		}
		if err != nil {
			return err
		}
	}
}

// lost says that the connection to a peer broke.
func lost(n ids.Node, err error) error {
	if errs.Has(err, errs.Corrupt) {
		return err
	}
	return errs.E(errs.Unavailable, "", n.String(), "connection lost: %w", err)
}

func (l *link) gotReply(f wire.Frame) error {
	var h replyHeader
	if err := wire.Unmarshal(f.Header, &h); err != nil {
		return err
	}
	l.mu.Lock()
	ch := l.calls[h.ID]
	delete(l.calls, h.ID)
	l.mu.Unlock()
	if ch != nil { // else the caller gave up
		ch <- reply{hdr: h, data: f.Body}
	}
	return nil
}

func (l *link) gotCancel(f wire.Frame) error {
	var h callHeader
	if err := wire.Unmarshal(f.Header, &h); err != nil {
		return err
	}
	l.mu.Lock()
	cancel := l.hands[h.ID]
	l.mu.Unlock()
	if cancel != nil {
		cancel()
	}
	return nil
}

func (l *link) gotCall(f wire.Frame) error {
	var h callHeader
	if err := wire.Unmarshal(f.Header, &h); err != nil {
		return err
	}
	if l.dialled || l.lane != laneCall && l.lane != laneBulk {
		return errs.E(errs.Corrupt, "receive", l.peer.String(), "a call on the wrong connection")
	}
	if l.serving.Load() >= 2*l.lane.inHand() {
		l.answer(h.ID, frame{}, errs.E(errs.Busy, h.Method, l.e.cfg.Self.String(), "%d calls in hand", l.serving.Load()), true)
		return nil
	}
	ctx, cancel := context.WithTimeout(l.ctx, time.Duration(min(max(h.TTL, 1), int64(maxTTL/time.Microsecond)))*time.Microsecond)
	l.mu.Lock()
	_, twice := l.hands[h.ID]
	if !twice {
		l.hands[h.ID] = cancel
	}
	l.mu.Unlock()
	if twice {
		cancel()
		return errs.E(errs.Corrupt, "receive", l.peer.String(), "call %d begun twice", h.ID)
	}
	l.serving.Add(1)
	done := func() {
		cancel()
		l.mu.Lock()
		delete(l.hands, h.ID)
		l.mu.Unlock()
	}
	if !l.e.spawn(func() {
		// A call is in hand until its answer has room: a peer that reads none cannot
		// make this node keep more of them than it may have in hand.
		defer l.serving.Add(-1)
		var resp, data []byte
		err := l.permit(h.Method)
		if err == nil {
			resp, data, err = l.e.handle(ctx, l.peer, h.Method, h.Req, f.Body)
		}
		done()
		l.answer(h.ID, frame{header: resp, body: data}, err, false)
	}) {
		done()
		l.serving.Add(-1)
	}
	return nil
}

// answer sends what a handler gave, waiting for room unless now is set.
func (l *link) answer(id uint64, f frame, err error, now bool) {
	h := replyHeader{ID: id, Resp: f.header, Err: packError(err)}
	out := frame{typ: frameReply, body: f.body}
	if err == nil && len(f.header)+len(f.body) > maxMessage {
		h.Resp, out.body = nil, nil
		h.Err = packError(errs.E(errs.TooLarge, "answer", l.peer.String(), "%d bytes, limit %d", len(f.header)+len(f.body), maxMessage))
	}
	out.header = wire.MustMarshal(h)
	if now {
		l.out.put(out, false) // a peer that sends more calls than it may, and reads no answers, gets none
		return
	}
	l.out.putWait(l.ctx, out) // false: the link is gone, and the caller knows
}

// call sends a request and waits for its answer. sent reports whether the
// request may have reached the peer.
func (l *link) call(ctx context.Context, method string, req, data []byte) (r reply, sent bool) {
	ch := make(chan reply, 1)
	l.mu.Lock()
	if l.calls == nil {
		l.mu.Unlock()
		return reply{err: context.Cause(l.ctx)}, false
	}
	l.nextID++
	id := l.nextID
	l.calls[id] = ch
	l.mu.Unlock()
	l.waiting.Add(1)
	defer l.waiting.Add(-1)

	f := frame{typ: frameCall, header: wire.MustMarshal(callHeader{ID: id, Method: method, TTL: ttl(ctx), Req: req}), body: data}
	if !l.out.putWait(ctx, f) {
		l.forget(id)
		if l.alive() {
			return reply{err: ctxError(ctx, method, l.peer.String())}, false
		}
		return reply{err: context.Cause(l.ctx)}, false
	}
	select {
	case r := <-ch:
		return r, true
	case <-ctx.Done():
		l.forget(id)
		l.out.put(frame{typ: frameCancel, header: wire.MustMarshal(callHeader{ID: id})}, true)
		return reply{err: ctxError(ctx, method, l.peer.String())}, true
	}
}

func (l *link) forget(id uint64) {
	l.mu.Lock()
	delete(l.calls, id)
	l.mu.Unlock()
}
