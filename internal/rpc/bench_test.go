package rpc

import (
	"bytes"
	"context"
	"testing"
	"time"

	"github.com/unum-os/unum/internal/errs"
	"github.com/unum-os/unum/internal/ids"
	"github.com/unum-os/unum/internal/wire"
)

// seeds are well-formed beginnings of what links carry.
func seeds() [][]byte {
	var out [][]byte
	add := func(typ byte, h any, body string) {
		var b bytes.Buffer
		wire.WriteFrame(&b, typ, wire.MustMarshal(h), []byte(body))
		out = append(out, b.Bytes())
	}
	add(frameCall, callHeader{ID: 1, Method: "echo", TTL: 1000, Req: []byte{0xa0}}, "data")
	add(frameReply, replyHeader{ID: 1, Err: packError(errs.E(errs.NotFound, "a", "b", "c"))}, "")
	add(frameCancel, callHeader{ID: 1}, "")
	add(frameCast, callHeader{Method: "say"}, "x")
	add(framePing, 0, "")
	return out
}

func BenchmarkCall(b *testing.B) {
	n := newLAN(b)
	a := n.start(1, nil, nil)
	n.start(2, nil, echo)
	ctx := within(b, 10*time.Minute)
	data := make([]byte, 200)
	for b.Loop() {
		if _, err := a.Call(ctx, 2, "echo", note{N: 1}, data, nil); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkCallParallel(b *testing.B) {
	n := newLAN(b)
	a := n.start(1, nil, nil)
	n.start(2, nil, echo)
	ctx := within(b, 10*time.Minute)
	b.SetParallelism(32)
	b.RunParallel(func(pb *testing.PB) {
		data := make([]byte, 200)
		for pb.Next() {
			if _, err := a.Call(ctx, 2, "echo", note{N: 1}, data, nil); err != nil {
				b.Error(err)
			}
		}
	})
}

func BenchmarkBulk1MiB(b *testing.B) {
	n := newLAN(b)
	a := n.start(1, nil, nil)
	n.start(2, nil, func(e *Endpoint) {
		e.Handle("put", func(ctx context.Context, _ ids.Node, _, data []byte) (any, []byte, error) { return nil, nil, nil })
	})
	ctx := within(b, 10*time.Minute)
	data := make([]byte, 1<<20)
	b.SetBytes(1 << 20)
	for b.Loop() {
		if _, err := a.Call(ctx, 2, "put", nil, data, nil); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkConnect(b *testing.B) {
	n := newLAN(b)
	a := n.start(1, nil, nil)
	n.start(2, nil, echo)
	for b.Loop() {
		l, _, err := a.connect(2, laneCall)
		if err != nil {
			b.Fatal(err)
		}
		l.close(errs.Interrupted.Err())
	}
}
