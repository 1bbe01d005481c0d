package fusefs

import (
	"context"
	"encoding/binary"
	"fmt"
	"log"
	"log/slog"
	"os"
	"strings"
	"syscall"
	"time"
	"unsafe"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"github.com/unum-os/unum/internal/clock"
	"github.com/unum-os/unum/internal/ids"
)

// Request codes this file looks at.
const (
	opForget      = 2
	opRead        = 15
	opWrite       = 16
	opRelease     = 18
	opGetxattr    = 22
	opListxattr   = 23
	opFlush       = 25
	opInit        = 26
	opReaddir     = 28
	opReleasedir  = 29
	opSetlk       = 32
	opSetlkw      = 33
	opInterrupt   = 36
	opDestroy     = 38
	opIoctl       = 39
	opBatchForget = 42
	opReaddirplus = 44
)

const (
	inHeaderSize  = 40 // bytes of a request's header, as the kernel has it
	outHeaderSize = 16 // bytes of a reply's header
	// smallBuffer holds every request but large writes and attribute values,
	// and every reply but those with data.
	smallBuffer = 8 << 10
	// idleWorkers is how many workers wait for requests when there are none.
	// With one, each request would have to start another. With more, requests
	// go round among more threads and each finds colder caches: four cost half
	// as much again as two.
	idleWorkers = 2
	// bufferSize holds the largest request and the largest reply.
	bufferSize = maxWrite + 8<<10
)

// rootAlias stands for the root directory inside the decoder, which gives a
// meaning of its own to one name in the directory numbered 1.
const rootAlias = 1<<63 | uint64(ids.RootInode)

// head is what the loop needs of a request's header.
type head struct {
	op     uint32
	unique uint64
	node   uint64
	pid    uint32
}

// header reads a request's header.
func header(b []byte) (head, bool) {
	if len(b) < inHeaderSize || int(binary.NativeEndian.Uint32(b)) != len(b) {
		return head{}, false
	}
	return head{
		op:     binary.NativeEndian.Uint32(b[4:]),
		unique: binary.NativeEndian.Uint64(b[8:]),
		node:   binary.NativeEndian.Uint64(b[16:]),
		pid:    binary.NativeEndian.Uint32(b[32:]),
	}, true
}

// exempt reports whether the request in b must get through when MaxRequests
// are being carried out, because they may be waiting for it, or because it may
// wait for them for ever.
func exempt(op uint32, b []byte) bool {
	switch op {
	case opRelease, opReleasedir, opFlush, opSetlk, opSetlkw:
		return true
	case opWrite:
		return len(b) >= inHeaderSize+24 && binary.NativeEndian.Uint32(b[inHeaderSize+20:])&fuse.WRITE_CACHE != 0
	}
	return false
}

// replySize returns how long the reply to the request in b may be.
func replySize(op uint32, b []byte) int {
	at := 0
	switch op {
	case opRead, opReaddir, opReaddirplus:
		at = inHeaderSize + 16
	case opGetxattr, opListxattr:
		at = inHeaderSize
	case opIoctl:
		at = inHeaderSize + 28
	}
	if at == 0 || len(b) < at+4 {
		return smallBuffer
	}
	return smallBuffer + int(binary.NativeEndian.Uint32(b[at:]))
}

// request is a request being carried out.
type request struct {
	head
	ctx    context.Context
	cancel context.CancelFunc
	timer  *time.Timer // ends ctx when patience does; guarded by Mount.mu
}

// note is something to do when the reply has been written.
type note struct {
	ino    ids.Inode
	op     Op            // Replied is due, if not 0
	lookup bool          // Forget is due if the reply did not get there
	until  clock.Instant // attributes were promised until then, if not 0
	opened bool          // Release of handle is due if the reply did not get there
	dir    bool
	handle uint64
}

// worker is a goroutine's tools. It carries out one request at a time; the
// decoder calls its methods (raw.go).
type worker struct {
	m       *Mount
	decoder *fuse.ProtocolServer
	small   []byte // a small request, moved here so that its buffer is free
	out     []byte // a small reply
	in1     [1][]byte
	out1    [1][]byte

	req      *request
	notes    []note
	promised clock.Instant // when the first promise in notes was worked out
}

func newWorker(m *Mount) *worker {
	w := &worker{m: m, small: make([]byte, smallBuffer), out: make([]byte, 2*smallBuffer)}
	w.decoder = fuse.NewProtocolServer(w, &m.opts)
	if m.initReq != nil {
		// Each decoder keeps the connection's settings itself.
		w.decoder.HandleRequest([][]byte{m.initReq}, [][]byte{w.out})
	}
	return w
}

// buffer holds any request and any reply.
type buffer [bufferSize]byte

// take returns a buffer.
func (m *Mount) take() *buffer {
	if b := m.spare.Swap(nil); b != nil {
		return b // the usual case, without a lock
	}
	select {
	case b := <-m.buffers:
		return b
	default:
		return new(buffer)
	}
}

// recycle takes a buffer back.
func (m *Mount) recycle(b *buffer) {
	if m.spare.CompareAndSwap(nil, b) {
		return
	}
	select {
	case m.buffers <- b:
	default: // enough of them are kept
	}
}

// spawn starts a worker.
func (m *Mount) spawn() {
	m.idle.Add(1)
	m.workers.Add(1)
	go m.serve()
}

// serve reads and carries out requests until enough others are idle or the
// connection is over.
func (m *Mount) serve() {
	defer m.workers.Done()
	w := m.pool.Get().(*worker)
	defer m.pool.Put(w)
	for {
		in := m.take()
		n, err := unix.Read(m.fd, in[:])
		switch err {
		case nil:
		case unix.EINTR, unix.EAGAIN, unix.ENOENT: // ENOENT: the request was withdrawn
			m.recycle(in)
			continue
		default: // ENODEV: unmounted or aborted
			if err != unix.ENODEV {
				m.log.Error("reading requests failed", "err", err)
			}
			m.recycle(in)
			m.closing.Do(func() { close(m.dead) })
			return
		}
		m.busy()
		w.handle(in, n)
		if m.surplus() {
			return
		}
	}
}

// busy ends the caller's being counted idle. The last one starts another.
func (m *Mount) busy() {
	if m.idle.Add(-1) == 0 {
		m.spawn()
	}
}

// surplus reports whether the caller, an idle worker, is one too many; it is
// then no longer counted.
func (m *Mount) surplus() bool {
	for {
		n := m.idle.Load()
		if n <= idleWorkers {
			return false
		}
		if m.idle.CompareAndSwap(n, n-1) {
			return true
		}
	}
}

// handle carries out the request in in[:n] and recycles in. When it returns
// the worker counts as idle: it does from the moment that nothing is left that
// can block, since the program that gets the reply may be back with its next
// request sooner than the worker with its next read.
func (w *worker) handle(in *buffer, n int) {
	idle := false
	defer func() {
		if !idle {
			w.m.idle.Add(1)
		}
	}()
	m := w.m
	b := in[:n]
	if n <= len(w.small) {
		b = w.small[:copy(w.small, b)]
		m.recycle(in)
	} else {
		defer m.recycle(in)
	}
	h, ok := header(b)
	if !ok {
		m.log.Error("malformed request", "bytes", n)
		return
	}
	switch h.op {
	case opInterrupt:
		if len(b) >= inHeaderSize+8 && !m.interrupt(binary.NativeEndian.Uint64(b[inHeaderSize:])) {
			// Not known yet: the worker that has read it has not come to enter
			// it. The kernel asks again, or knows by then that it was answered.
			w.fail(h.unique, syscall.EAGAIN)
		}
		return
	case opForget, opBatchForget:
		w.decode(b, w.out)
		return
	case opDestroy:
		w.fail(h.unique, 0)
		return
	}
	if h.node == uint64(ids.RootInode) && !m.probing.Load() {
		binary.NativeEndian.PutUint64(b[16:], rootAlias)
	}

	r := &request{head: h}
	r.ctx, r.cancel = context.WithCancel(m.ctx)
	m.enter(r)
	defer m.leave(r)
	if !exempt(h.op, b) {
		select {
		case m.slots <- struct{}{}:
		default:
			select {
			case m.slots <- struct{}{}:
			case <-r.ctx.Done():
				w.fail(h.unique, syscall.EINTR)
				return
			}
		}
		defer func() { <-m.slots }()
	}

	out := w.out
	if size := replySize(h.op, b); size > bufferSize {
		w.fail(h.unique, syscall.EIO) // the kernel never asks for more than it was told
		return
	} else if size > len(out) {
		big := m.take()
		defer m.recycle(big)
		out = big[:]
	}
	w.req = r
	k, st := w.decode(b, out)
	idle = true
	m.idle.Add(1)
	var err error
	if !st.Ok() || k == 0 {
		err = w.fail(h.unique, syscall.EIO)
	} else {
		err = m.write(out[:k])
	}
	w.finish(err == nil)
	w.req = nil
}

func (w *worker) decode(in, out []byte) (int, fuse.Status) {
	w.in1[0], w.out1[0] = in, out
	n, st := w.decoder.HandleRequest(w.in1[:], w.out1[:])
	w.in1[0], w.out1[0] = nil, nil
	return n, st
}

// fail answers a request with an errno, or with success and no data.
func (w *worker) fail(unique uint64, en syscall.Errno) error {
	var b [outHeaderSize]byte
	binary.NativeEndian.PutUint32(b[:], outHeaderSize)
	binary.NativeEndian.PutUint32(b[4:], uint32(-int32(en)))
	binary.NativeEndian.PutUint64(b[8:], unique)
	return w.m.write(b[:])
}

// write writes a reply. An error means that the kernel did not take it: the
// request or the connection is gone.
func (m *Mount) write(b []byte) error {
	var en syscall.Errno
	if len(b) <= smallBuffer {
		// It never blocks: not worth telling the scheduler.
		_, _, en = syscall.RawSyscall(syscall.SYS_WRITE, uintptr(m.fd), uintptr(unsafe.Pointer(&b[0])), uintptr(len(b)))
	} else {
		_, _, en = syscall.Syscall(syscall.SYS_WRITE, uintptr(m.fd), uintptr(unsafe.Pointer(&b[0])), uintptr(len(b)))
	}
	if en != 0 {
		if en != syscall.ENOENT && en != syscall.ENODEV {
			m.log.Error("reply refused by the kernel", "bytes", len(b), "err", en)
		}
		return en
	}
	return nil
}

// finish does what the notes say. The worker counts as idle before and after.
func (w *worker) finish(taken bool) {
	m := w.m
	late := false
	if w.promised != 0 {
		late = clock.Now().Sub(w.promised) > pauseLimit
		w.promised = 0
	}
	if late || !taken { // notifications and the Tree's Release may block
		m.busy()
		defer m.idle.Add(1)
	}
	for i := range w.notes {
		n := &w.notes[i]
		if n.until != 0 && taken && late {
			m.withdraw(n.ino, n.until)
		}
		if n.lookup && !taken {
			m.cfg.Tree.Forget(n.ino, 1)
		}
		if n.opened && !taken {
			if n.dir {
				m.cfg.Tree.ReleaseDir(n.ino, n.handle)
			} else {
				m.cfg.Tree.Release(n.ino, n.handle, 0, false)
			}
		}
		if n.op != 0 {
			m.cfg.Tree.Replied(n.op, n.ino)
		}
	}
	if cap(w.notes) > 64 {
		w.notes = nil // a long listing's
	}
	w.notes = w.notes[:0]
}

func (m *Mount) enter(r *request) {
	m.mu.Lock()
	m.requests[r.unique] = r
	m.mu.Unlock()
}

func (m *Mount) leave(r *request) {
	m.mu.Lock()
	delete(m.requests, r.unique)
	t := r.timer
	m.mu.Unlock()
	if t != nil {
		t.Stop()
	}
	r.cancel()
}

// interrupt ends a request's context, at once or after a while (see Signals in
// doc.go). It reports false if the request is not known.
func (m *Mount) interrupt(unique uint64) bool {
	m.mu.Lock()
	r := m.requests[unique]
	m.mu.Unlock()
	if r == nil {
		return false
	}
	if r.op == opSetlkw || dying(r.pid) {
		r.cancel()
		return true
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.requests[unique] == r && r.timer == nil {
		// The kernel tells of the first signal only: whether one that kills has
		// followed must be looked for.
		start, look := clock.Now(), min(killLook, m.cfg.Patience)
		r.timer = time.AfterFunc(look, func() {
			if clock.Now().Sub(start) >= m.cfg.Patience || dying(r.pid) {
				r.cancel()
				return
			}
			m.mu.Lock()
			defer m.mu.Unlock()
			if m.requests[unique] == r {
				r.timer.Reset(look)
			}
		})
	}
	return true
}

// killLook is how soon a call ends when its program is killed after another
// signal.
const killLook = 200 * time.Millisecond

// dying reports whether a thread is being killed, or is not to be seen. A
// signal that ends a process is turned into SIGKILL for each of its threads.
func dying(tid uint32) bool {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", tid))
	if err != nil {
		return true
	}
	for line := range strings.Lines(string(b)) {
		var set uint64
		if n, _ := fmt.Sscanf(line, "SigPnd: %x", &set); n == 1 {
			return set&(1<<(unix.SIGKILL-1)) != 0
		}
	}
	return true
}

// decoderLog turns the decoder's lines into log records.
func decoderLog(l *slog.Logger) *log.Logger {
	return slog.NewLogLogger(l.With("from", "decoder").Handler(), slog.LevelDebug)
}
