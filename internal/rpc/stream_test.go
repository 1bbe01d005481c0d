package rpc

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"sync/atomic"
	"testing"
	"time"

	"github.com/unum-os/unum/internal/errs"
	"github.com/unum-os/unum/internal/ids"
	"github.com/unum-os/unum/internal/wire"
)

type closeWriter interface{ CloseWrite() error }

func TestStreamHalfClose(t *testing.T) {
	n := newLAN(t)
	setup := func(e *Endpoint) {
		e.HandleStream("sum", func(_ context.Context, _ ids.Node, c net.Conn) {
			h := sha256.New()
			if _, err := io.Copy(h, c); err == nil {
				c.Write(h.Sum(nil))
			}
		})
	}
	a := n.start(1, nil, setup)
	n.start(2, nil, setup)
	in := make([]byte, 5<<20)
	rand.NewChaCha8([32]byte{1}).Read(in)
	want := sha256.Sum256(in)
	for _, to := range []ids.Node{1, 2} {
		c, err := a.Dial(within(t, 5*time.Second), to, "sum")
		if err != nil {
			t.Fatal(err)
		}
		c.SetDeadline(time.Now().Add(20 * time.Second))
		if k, err := c.Write(in); err != nil || k != len(in) {
			t.Fatal(k, err)
		}
		if err := c.(closeWriter).CloseWrite(); err != nil {
			t.Fatal(err)
		}
		if got, err := io.ReadAll(c); err != nil || !bytes.Equal(got, want[:]) {
			t.Fatalf("to %v: %x %v", to, got, err)
		}
		if _, err := c.Write([]byte("x")); err == nil {
			t.Fatal("wrote after CloseWrite")
		}
		c.Close()
		if _, err := a.Dial(within(t, 5*time.Second), to, "none"); !errs.Has(err, errs.NotSupported) {
			t.Fatalf("no such service: %v", err)
		}
	}
}

func TestStreamBackPressure(t *testing.T) {
	n := newLAN(t)
	a := n.start(1, nil, nil)
	ready := make(chan struct{})
	n.start(2, nil, func(e *Endpoint) {
		e.HandleStream("slow", func(_ context.Context, _ ids.Node, c net.Conn) {
			<-ready
			k, _ := io.Copy(io.Discard, c)
			if k == 0 {
				return
			}
			c.Write([]byte("done"))
		})
	})
	c, err := a.Dial(within(t, 5*time.Second), 2, "slow")
	if err != nil {
		t.Fatal(err)
	}
	c.SetWriteDeadline(time.Now().Add(300 * time.Millisecond))
	total := 0
	for {
		k, err := c.Write(make([]byte, 8<<10))
		total += k
		if err != nil {
			if !errors.Is(err, os.ErrDeadlineExceeded) {
				t.Fatal(err)
			}
			break
		}
		if total > 16<<20 {
			t.Fatal("no back-pressure")
		}
	}
	// The others are not held up.
	ctx := within(t, 5*time.Second)
	if _, err := a.Dial(ctx, 2, "slow"); err != nil {
		t.Fatal(err)
	}
	close(ready)
	c.Close()
}

// What was written before Close arrives whole, however slow the reader.
func TestStreamCloseDelivers(t *testing.T) {
	n := newLAN(t)
	a := n.start(1, nil, nil)
	type result struct {
		n   int64
		err error
	}
	got := make(chan result, 1)
	closed := make(chan struct{})
	n.start(2, nil, func(e *Endpoint) {
		e.HandleStream("in", func(_ context.Context, _ ids.Node, c net.Conn) {
			<-closed
			k, err := io.Copy(io.Discard, c)
			got <- result{k, err}
		})
	})
	for _, size := range []int{0, 1, 100 << 10, streamWindow / (chunkLimit + chunkHead) * chunkLimit, 900 << 10} {
		c, err := a.Dial(within(t, 5*time.Second), 2, "in")
		if err != nil {
			t.Fatal(err)
		}
		if _, err := c.Write(make([]byte, size)); err != nil {
			t.Fatal(err)
		}
		c.Close()
		closed <- struct{}{}
		if r := <-got; r.n != int64(size) || r.err != nil {
			t.Fatalf("%d bytes: %d arrived, %v", size, r.n, r.err)
		}
	}
}

func TestStreamPeerStops(t *testing.T) {
	n := newLAN(t)
	a := n.start(1, nil, nil)
	b := n.start(2, nil, func(e *Endpoint) {
		e.HandleStream("hold", func(ctx context.Context, _ ids.Node, c net.Conn) { <-ctx.Done() })
	})
	c, err := a.Dial(within(t, 5*time.Second), 2, "hold")
	if err != nil {
		t.Fatal(err)
	}
	b.stop()
	if _, err := c.Read(make([]byte, 1)); err == nil {
		t.Fatal("read from a dead peer")
	}
	c.Close()
}

// A reader that takes long still gets everything: nothing ends a closed stream
// that it has not read to its end.
func TestStreamSlowReader(t *testing.T) {
	n := newLAN(t)
	a := n.start(1, nil, nil)
	const size = 900 << 10
	n.start(2, nil, func(e *Endpoint) {
		e.HandleStream("out", func(_ context.Context, _ ids.Node, c net.Conn) { c.Write(make([]byte, size)) })
	})
	c, err := a.Dial(within(t, 5*time.Second), 2, "out")
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, err := io.ReadFull(c, make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	time.Sleep(7 * time.Second) // longer than the five after which a stream used to be reset
	if k, err := io.Copy(io.Discard, c); k != size-1 || err != nil {
		t.Fatalf("%d bytes, %v", k, err)
	}
}

// Close with the peer's window full: what was written and the end of it arrive
// when the peer reads.
func TestStreamCloseWithoutRoom(t *testing.T) {
	n := newLAN(t)
	a := n.start(1, nil, nil)
	begin, got := make(chan struct{}), make(chan error, 1)
	var arrived atomic.Int64
	n.start(2, nil, func(e *Endpoint) {
		e.HandleStream("in", func(_ context.Context, _ ids.Node, c net.Conn) {
			<-begin
			k, err := io.Copy(io.Discard, c)
			arrived.Store(k)
			got <- err
		})
	})
	open := func() net.Conn {
		c, err := a.Dial(within(t, 5*time.Second), 2, "in")
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	var opening bytes.Buffer
	if err := wire.WriteFrame(&opening, frameOpen, wire.MustMarshal(openHeader{Service: "in"}), nil); err != nil {
		t.Fatal(err)
	}
	window := streamWindow - opening.Len()
	// Whole chunks, and one that fills the rest but for two bytes.
	const whole = streamWindow/(chunkLimit+chunkHead) - 1
	size := window - 2 - (whole+2)*chunkHead
	c := open()
	if _, err := c.Write(make([]byte, size)); err != nil {
		t.Fatal(err)
	}
	c.Close()
	begin <- struct{}{}
	if err := <-got; err != nil || arrived.Load() != int64(size) {
		t.Fatalf("%d of %d bytes, %v", arrived.Load(), size, err)
	}

	// A Write that was cut between two chunks is no end.
	c = open()
	if _, err := c.Write(make([]byte, size+2)); err != nil {
		t.Fatal(err)
	}
	cut := make(chan error, 1)
	go func() {
		_, err := c.Write([]byte("more"))
		cut <- err
	}()
	until(t, 5*time.Second, "the Write is under way", func() bool {
		s := c.(*stream)
		free := s.wmu.TryLock()
		if free {
			s.wmu.Unlock()
		}
		return !free
	})
	c.Close()
	if err := <-cut; err == nil {
		t.Fatal("a Write ended well that had no room")
	}
	begin <- struct{}{}
	if err := <-got; err != io.ErrUnexpectedEOF {
		t.Fatalf("after a cut Write: %d bytes, %v", arrived.Load(), err)
	}
}

// One that writes to a stream whose reader has closed it is not held up for ever.
func TestStreamReaderGone(t *testing.T) {
	n := newLAN(t)
	a := n.start(1, nil, nil)
	wrote := make(chan error, 1)
	n.start(2, nil, func(e *Endpoint) {
		e.HandleStream("out", func(_ context.Context, _ ids.Node, c net.Conn) {
			_, err := c.Write(make([]byte, 4*streamWindow))
			wrote <- err
		})
	})
	c, err := a.Dial(within(t, 5*time.Second), 2, "out")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(c, make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	c.Close()
	select {
	case <-wrote:
	case <-time.After(20 * time.Second):
		t.Fatal("still writing")
	}
	if _, err := c.Read(make([]byte, 1)); err != net.ErrClosed {
		t.Fatalf("read after Close: %v", err)
	}
}
