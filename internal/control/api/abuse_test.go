package api

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"os"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc"

	"github.com/unum-os/unum/internal/control"
	"github.com/unum-os/unum/internal/errs"
)

const preface = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"

// The frames of HTTP/2 (RFC 9113) that the tests make by hand.
const (
	typeData         = 0
	typeHeaders      = 1
	typeReset        = 3
	typeSettings     = 4
	typePing         = 6
	typeWindow       = 8
	typeContinuation = 9

	endStream  = 1
	endHeaders = 4
)

func frame(typ, flags byte, stream uint32, payload []byte) []byte {
	n := len(payload)
	b := []byte{byte(n >> 16), byte(n >> 8), byte(n), typ, flags}
	return append(binary.BigEndian.AppendUint32(b, stream), payload...)
}

// opening is how a client begins.
func opening() []byte { return append([]byte(preface), frame(typeSettings, 0, 0, nil)...) }

// field is a header that the table of HPACK does not learn.
func field(name, value string) []byte {
	size := func(n int) []byte {
		if n < 127 {
			return []byte{byte(n)}
		}
		b := []byte{127}
		for n -= 127; n >= 128; n >>= 7 {
			b = append(b, byte(n)|128)
		}
		return append(b, byte(n))
	}
	b := append([]byte{0}, size(len(name))...)
	b = append(append(b, name...), size(len(value))...)
	return append(b, value...)
}

func headers(method string, more ...string) []byte {
	b := bytes.Join([][]byte{field(":method", "POST"), field(":scheme", "http"), field(":path", method), field(":authority", "unum"),
		field("content-type", "application/grpc"), field("te", "trailers")}, nil)
	for i := 0; i+1 < len(more); i += 2 {
		b = append(b, field(more[i], more[i+1])...)
	}
	return b
}

const statusMethod = "/unum.v1.Node/Status"

// answers says whether the daemon still serves others.
func answers(t testing.TB, path string) {
	t.Helper()
	if _, err := dial(t, path).Node.Status(within(t), &StatusRequest{}); err != nil {
		t.Errorf("the API: %v", err)
	}
	f, err := control.Dial(context.Background(), path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if b, err := f.Call(within(t), "echo", []byte("x")); err != nil || string(b) != "x" {
		t.Errorf("frames: %q, %v", b, err)
	}
}

// pour sends pieces on a connection of its own until the daemon takes no more,
// and returns what it said until it closed. half ends the sending.
func pour(t testing.TB, path string, half bool, pieces ...[]byte) []byte {
	t.Helper()
	c, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(60 * time.Second))
	go func() {
		for _, p := range pieces {
			if _, err := c.Write(p); err != nil {
				return
			}
		}
		if half {
			c.(*net.UnixConn).CloseWrite()
		}
	}()
	b, err := io.ReadAll(io.LimitReader(c, 64<<20))
	if errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("a connection with %d pieces is not closed", len(pieces))
	}
	return b
}

// repeated is a piece n times, in one.
func repeated(piece []byte, n int) []byte { return bytes.Repeat(piece, n) }

// TestGarbage: what is no HTTP/2, or abuses it, ends its connection and harms
// nobody else; no descriptor stays.
func TestGarbage(t *testing.T) {
	_, path, _ := start(t, 3*time.Second)
	answers(t, path)
	open := opening()
	with := func(parts ...[]byte) []byte { return bytes.Join(append([][]byte{open}, parts...), nil) }
	big := strings.Repeat("v", 15<<10)
	count := func() int { es, _ := os.ReadDir("/proc/self/fd"); return len(es) }
	before := count()
	var wg sync.WaitGroup
	for _, b := range map[string][]byte{
		"one byte":                  []byte("P"),
		"a truncated preface":       []byte(preface[:20]),
		"another preface":           []byte("PRI * HTTP/3.0\r\n\r\nSM\r\n\r\n"),
		"HTTP/1":                    []byte("POST / HTTP/1.1\r\nHost: unum\r\n\r\n"),
		"the preface alone":         []byte(preface),
		"no settings":               append([]byte(preface), frame(typePing, 0, 0, make([]byte, 8))...),
		"a frame of 16 MiB":         with([]byte{0xff, 0xff, 0xff, typeData, 0, 0, 0, 0, 1}, make([]byte, 1<<20)),
		"settings of 1 MiB":         with(frame(typeSettings, 0, 0, make([]byte, 1<<20-4))),
		"data of no call":           with(frame(typeData, 0, 7, make([]byte, 10))),
		"headers on no call":        with(frame(typeHeaders, endHeaders, 0, headers(statusMethod))),
		"headers on an even one":    with(frame(typeHeaders, endHeaders, 2, headers(statusMethod))),
		"continuation of nothing":   with(frame(typeContinuation, endHeaders, 1, nil)),
		"bad HPACK":                 with(frame(typeHeaders, endHeaders, 1, repeated([]byte{0xff}, 200))),
		"a header list of 100 KiB":  with(frame(typeHeaders, 0, 1, headers(statusMethod, "a", big)), repeated(frame(typeContinuation, 0, 1, field("b", big)), 7)),
		"endless continuations":     with(frame(typeHeaders, 0, 1, headers(statusMethod)), repeated(frame(typeContinuation, 0, 1, field("b", "c")), 100_000)),
		"a window that overflows":   with(frame(typeWindow, 0, 0, []byte{0x7f, 0xff, 0xff, 0xff}), frame(typeWindow, 0, 0, []byte{0x7f, 0xff, 0xff, 0xff})),
		"a flood of pings":          with(repeated(frame(typePing, 0, 0, make([]byte, 8)), 50_000)),
		"a flood of settings":       with(repeated(frame(typeSettings, 0, 0, nil), 50_000)),
		"calls opened and reset":    with(resets(20_000)),
		"a message that never ends": with(frame(typeHeaders, endHeaders, 1, headers(statusMethod)), frame(typeData, 0, 1, []byte{0, 0, 1, 0, 0, 1, 2, 3})),
		"a message of 4 GiB":        with(frame(typeHeaders, endHeaders, 1, headers(statusMethod)), frame(typeData, endStream, 1, []byte{0, 0xff, 0xff, 0xff, 0xff})),
		"a message of nonsense":     with(frame(typeHeaders, endHeaders, 1, headers(statusMethod)), frame(typeData, endStream, 1, []byte{0, 0, 0, 0, 3, 0xff, 0xff, 0xff})),
		"more than the window":      with(frame(typeHeaders, endHeaders, 1, headers(statusMethod)), repeated(frame(typeData, 0, 1, make([]byte, 16<<10)), 64)),
	} {
		wg.Go(func() { // each is closed by the daemon
			pour(t, path, false, b)
			answers(t, path)
		})
	}
	wg.Wait()
	for range 100 {
		b := make([]byte, 300)
		rand.Read(b)
		pour(t, path, true, open, b)
		pour(t, path, true, []byte("P"), b)
	}
	answers(t, path)
	await(t, "the descriptors are given back", func() bool { return count() <= before+2 })
}

func resets(n uint32) []byte {
	var b []byte
	h := headers("/unum.v1.Jobs/Wait")
	for i := range n {
		b = append(b, frame(typeHeaders, endHeaders, 2*i+1, h)...)
		b = append(b, frame(typeReset, 0, 2*i+1, []byte{0, 0, 0, 8})...)
	}
	return b
}

// TestDescriptors: those that come with HTTP/2 are nobody's, and are closed.
func TestDescriptors(t *testing.T) {
	_, path, _ := start(t, 0)
	for _, at := range []int{0, 1, 10, len(preface), len(opening())} {
		r, w, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		defer r.Close()
		nc, err := net.Dial("unix", path)
		if err != nil {
			t.Fatal(err)
		}
		defer nc.Close()
		c, b := nc.(*net.UnixConn), append(opening(), frame(typePing, 0, 0, make([]byte, 8))...)
		c.Write(b[:at])
		if _, _, err := c.WriteMsgUnix(b[at:], unix.UnixRights(int(w.Fd())), nil); err != nil {
			t.Fatal(err)
		}
		w.Close()
		r.SetReadDeadline(time.Now().Add(60 * time.Second))
		if n, err := r.Read(make([]byte, 1)); n != 0 || err != io.EOF {
			t.Errorf("passed after %d bytes: %v: the daemon keeps it", at, err)
		}
	}
	answers(t, path)
}

// TestSlow: connections that ask nothing, and calls that do not come to an end,
// are closed in time; meanwhile others are served.
func TestSlow(t *testing.T) {
	_, path, _ := start(t, 200*time.Millisecond)
	call := append(opening(), frame(typeHeaders, endHeaders, 1, headers(statusMethod))...)
	for what, b := range map[string][]byte{
		"nothing":             nil,
		"one byte":            []byte("P"),
		"half a preface":      []byte(preface[:12]),
		"the preface":         []byte(preface),
		"no call":             opening(),
		"half a header":       call[:len(call)-20],
		"a call without body": call,
		"half a message":      append(call[:len(call):len(call)], frame(typeData, 0, 1, []byte{0, 0, 0, 1, 0, 7})...),
	} {
		t.Run(what, func(t *testing.T) {
			t.Parallel()
			pour(t, path, false, b)
			answers(t, path)
		})
	}
}

// TestHangingCallsStay: a stream whose client said its part may last longer.
func TestHangingCallsStay(t *testing.T) {
	const first = 50 * time.Millisecond
	d, path, _ := start(t, first)
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	s, err := dial(t, path).Jobs.Logs(ctx, &LogsRequest{Job: 1, Follow: true})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Recv(); err != nil {
		t.Fatal(err)
	}
	<-d.hangs
	select {
	case err := <-d.ended:
		t.Errorf("it ended: %v", err)
	case <-time.After(10 * first): // what must not happen has no event to wait for
	}
	cancel()
	<-d.ended
	// An idle connection is closed; the client dials anew by itself.
	c := dial(t, path)
	for range 3 {
		if _, err := c.Node.Status(within(t), &StatusRequest{}); err != nil {
			t.Error(err)
		}
		time.Sleep(4 * first)
	}
}

// TestBounds: messages have a largest size, either way, and the answer says so.
func TestBounds(t *testing.T) {
	_, path, _ := start(t, 0)
	c := dial(t, path)
	if r, err := c.Jobs.Why(within(t), &WhyRequest{Job: MaxResponse - 16}); err != nil || len(r.Text) != MaxResponse-16 {
		t.Errorf("%v", err)
	}
	for _, size := range []uint64{MaxResponse + 1, 4 * MaxResponse} {
		if _, err := c.Jobs.Why(within(t), &WhyRequest{Job: size}); !errs.Has(err, errs.TooLarge) {
			t.Errorf("%d bytes: %v", size, err)
		}
	}
	s, err := c.Jobs.Logs(within(t), &LogsRequest{Job: MaxResponse - 16})
	if err != nil {
		t.Fatal(err)
	}
	if p, err := s.Recv(); err != nil || len(p.Data) != MaxResponse-16 {
		t.Errorf("%v", err)
	}
	if _, err := s.Recv(); err != io.EOF {
		t.Errorf("%v", err)
	}
	// A request above the bound is refused at home, and at the daemon too.
	long := make([]byte, MaxRequest+1)
	req := &Failure{Text: string(long)}
	if err := c.cc.Invoke(within(t), statusMethod, req, &StatusResponse{}); !errs.Has(err, errs.TooLarge) {
		t.Errorf("%v", err)
	}
	if err := c.cc.Invoke(within(t), statusMethod, req, &StatusResponse{}, grpc.MaxCallSendMsgSize(4*MaxRequest)); !errs.Has(err, errs.TooLarge) {
		t.Errorf("%v", err)
	}
	answers(t, path)
}

// TestManyCalls: more calls than a connection may have at a time wait for others
// to end.
func TestManyCalls(t *testing.T) {
	d, path, _ := start(t, 0)
	d.hangs = make(chan struct{}, 4*maxStreams)
	d.ended = make(chan error, 4*maxStreams)
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	c := dial(t, path)
	got := make(chan error, 2*maxStreams)
	for range 2 * maxStreams {
		go func() {
			_, err := c.Jobs.Wait(ctx, &WaitRequest{})
			got <- err
		}()
	}
	for range maxStreams {
		<-d.hangs
	}
	answers(t, path) // on another connection
	if n := len(d.hangs); n != 0 {
		t.Errorf("%d calls more than the bound", n)
	}
	cancel()
	for range 2 * maxStreams {
		if err := <-got; !errs.Has(err, errs.Interrupted) {
			t.Errorf("%v", err)
		}
	}
}

// TestHoard: a connection cannot make the daemon keep more than its calls may ask
// with, and has no more of them than the bound.
func TestHoard(t *testing.T) {
	_, path, _ := start(t, time.Minute)
	nc, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer nc.Close()
	nc.SetDeadline(time.Now().Add(60 * time.Second))
	heap := func() uint64 {
		var m runtime.MemStats
		for range 3 { // pools give up what they hold at the second
			runtime.GC()
		}
		runtime.ReadMemStats(&m)
		return m.HeapAlloc
	}
	before := heap()
	// It is a client that keeps to the windows it is given.
	widened, refused, acks := make(chan uint32, 2*maxStreams), make(chan uint32, 2*maxStreams), make(chan bool, 1)
	credit := make(chan int, 1<<16)
	go func() {
		defer close(credit)
		for h := make([]byte, 9); ; {
			if _, err := io.ReadFull(nc, h); err != nil {
				return
			}
			b := make([]byte, int(h[0])<<16|int(h[1])<<8|int(h[2]))
			if _, err := io.ReadFull(nc, b); err != nil {
				return
			}
			switch stream := binary.BigEndian.Uint32(h[5:]); {
			case h[3] == typeWindow && stream == 0:
				credit <- int(binary.BigEndian.Uint32(b))
			case h[3] == typeWindow:
				widened <- stream
			case h[3] == typeReset:
				refused <- stream
			case h[3] == typePing && h[4] == 1:
				acks <- true
			}
		}
	}()
	left := 65535
	data := func(stream uint32, b []byte) {
		t.Helper()
		for left < len(b) {
			n, ok := <-credit
			if !ok {
				t.Fatal("the connection is closed")
			}
			left += n
		}
		left -= len(b)
		nc.Write(frame(typeData, 0, stream, b))
	}
	nc.Write(opening())
	const part = 16 << 10
	for i := range uint32(maxStreams) {
		nc.Write(frame(typeHeaders, endHeaders, 2*i+1, headers(statusMethod)))
		data(2*i+1, binary.BigEndian.AppendUint32([]byte{0}, MaxRequest))
	}
	nc.Write(frame(typeHeaders, endHeaders, 2*maxStreams+1, headers(statusMethod)))
	if s := <-refused; s != 2*maxStreams+1 {
		t.Errorf("call %d is refused", s)
	}
	for range maxStreams {
		<-widened
	}
	for i := range uint32(maxStreams) {
		for range MaxRequest/part - 1 {
			data(2*i+1, make([]byte, part))
		}
	}
	nc.Write(frame(typePing, 0, 0, []byte("received"))) // it is answered after all the rest
	select {
	case <-acks:
	case s := <-refused:
		t.Fatalf("call %d is refused", s)
	}
	if grown := int64(heap()) - int64(before); grown > 3*maxStreams*MaxRequest/2 {
		t.Errorf("the daemon keeps %d KiB for one connection", grown>>10)
	} else if grown < maxStreams*MaxRequest/2 {
		t.Errorf("the daemon keeps %d KiB: the requests did not arrive", grown>>10)
	}
	answers(t, path)
}

func FuzzConnection(f *testing.F) {
	_, path, _ := start(f, 0)
	f.Add([]byte(nil))
	f.Add(frame(typeSettings, 0, 0, nil))
	f.Add(append(frame(typeSettings, 0, 0, nil), frame(typeHeaders, endHeaders|endStream, 1, headers(statusMethod))...))
	f.Add(bytes.Join([][]byte{frame(typeSettings, 0, 0, nil), frame(typeHeaders, endHeaders, 1, headers(statusMethod)),
		frame(typeData, endStream, 1, []byte{0, 0, 0, 0, 0})}, nil))
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) > 1<<16 {
			return
		}
		pour(t, path, true, []byte(preface), b)
		answers(t, path)
	})
}
