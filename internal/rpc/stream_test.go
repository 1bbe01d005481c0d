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
	"testing"
	"time"

	"github.com/unum-os/unum/internal/errs"
	"github.com/unum-os/unum/internal/ids"
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
