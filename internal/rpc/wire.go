package rpc

import (
	"context"
	"errors"
	"time"

	"github.com/unum-os/unum/internal/errs"
	"github.com/unum-os/unum/internal/ids"
)

// Frame types on call, bulk and cast lanes; frameHello and frameOpen on others.
const (
	frameCall   byte = 1 // callHeader, data
	frameReply  byte = 2 // replyHeader, data
	frameCancel byte = 3 // callHeader with the id alone
	frameCast   byte = 4 // callHeader without id, data
	framePing   byte = 5
	framePong   byte = 6
	frameHello  byte = 7 // hello: the server's first word on every link
	frameOpen   byte = 8 // openHeader: the first word on a stream
	frameJoin   byte = 9 // raw bytes
)

// hello tells the dialler that it has been accepted; with TLS 1.3 alone it would
// learn of a refusal only with its first answer.
type hello struct {
	Node    ids.Node `cbor:"1,keyasint"`
	Version uint     `cbor:"2,keyasint"`
}

// version is that of the protocol between nodes, told in each link's hello.
const version = 1

type callHeader struct {
	ID     uint64 `cbor:"1,keyasint,omitempty"`
	Method string `cbor:"2,keyasint,omitempty"`
	TTL    int64  `cbor:"3,keyasint,omitempty"` // time the caller waits, microseconds
	Req    []byte `cbor:"4,keyasint,omitempty"`
}

type replyHeader struct {
	ID   uint64     `cbor:"1,keyasint"`
	Resp []byte     `cbor:"2,keyasint,omitempty"`
	Err  *wireError `cbor:"3,keyasint,omitempty"`
}

type openHeader struct {
	Service string `cbor:"1,keyasint"`
}

type openReply struct {
	Err *wireError `cbor:"1,keyasint,omitempty"`
}

// wireError is an error on its way: class and texts.
type wireError struct {
	Class   errs.Class `cbor:"1,keyasint"`
	Op      string     `cbor:"2,keyasint,omitempty"`
	Subject string     `cbor:"3,keyasint,omitempty"`
	Text    string     `cbor:"4,keyasint,omitempty"`
	Remedy  string     `cbor:"5,keyasint,omitempty"`
}

// maxErrorText bounds each text of an error, so that it fits a frame always.
const maxErrorText = 4 << 10

func packError(err error) *wireError {
	if err == nil {
		return nil
	}
	cut := func(s string) string { return s[:min(len(s), maxErrorText)] }
	w := &wireError{Class: classOf(err)}
	if e, ok := err.(*errs.Error); ok {
		w.Op, w.Subject, w.Remedy = cut(e.Op), cut(e.Subject), cut(e.Remedy)
		if e.Err != nil {
			w.Text = cut(e.Err.Error())
		}
	} else {
		w.Text = cut(err.Error())
	}
	return w
}

func (w *wireError) unpack() error {
	if w == nil {
		return nil
	}
	e := &errs.Error{Op: w.Op, Subject: w.Subject, Class: w.Class, Remedy: w.Remedy}
	if w.Text != "" {
		e.Err = errors.New(w.Text)
	}
	return e
}

// classOf is errs.ClassOf that knows what the end of a context means.
func classOf(err error) errs.Class {
	c := errs.ClassOf(err)
	if c == errs.Unknown {
		switch {
		case errors.Is(err, context.DeadlineExceeded):
			return errs.Timeout
		case errors.Is(err, context.Canceled):
			return errs.Interrupted
		}
	}
	return c
}

// ctxError says why a call whose context ended ended.
func ctxError(ctx context.Context, op, subject string) error {
	if errors.Is(ctx.Err(), context.DeadlineExceeded) {
		return errs.E(errs.Timeout, op, subject, "no answer in time")
	}
	return errs.E(errs.Interrupted, op, subject, "the caller gave up")
}

// ttl is what is left of a context that has a deadline, in microseconds, at
// least one.
func ttl(ctx context.Context) int64 {
	d, _ := ctx.Deadline()
	return max(1, time.Until(d).Microseconds())
}
