package api

import (
	"context"
	"errors"
	"io"
	"strings"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/unum-os/unum/internal/errs"
)

// maxText bounds what an error says. It travels three times in the headers, and
// some clients take no more than 8 KiB of them.
const maxText = 1536

// Text returns s as it may stand in a message: valid UTF-8.
func Text(s string) string { return strings.ToValidUTF8(s, "\uFFFD") }

func clip(s string, most int) string {
	if len(s) > most {
		s = s[:most] + "..."
	}
	return Text(s)
}

// toStatus gives err the form in which it travels.
func toStatus(err error) error {
	if err == nil {
		return nil
	}
	class := errs.ClassOf(err)
	if _, own := err.(interface{ GRPCStatus() *status.Status }); own && class == errs.Unknown {
		return err // of gRPC itself: a message too large, a client that went away
	}
	switch {
	case class != errs.Unknown:
	case errors.Is(err, context.Canceled):
		class = errs.Interrupted
	case errors.Is(err, context.DeadlineExceeded):
		class = errs.Timeout
	}
	f := describe(err)
	f.Class = uint32(class)
	st := status.New(codes.Code(class.Code()), clip(err.Error(), maxText))
	if with, derr := st.WithDetails(f); derr == nil {
		st = with
	}
	return st.Err()
}

// describe takes an error apart. A remedy further in is told as err's own where
// err says it last.
func describe(err error) *Failure {
	f := &Failure{}
	cause := err
	if e, ok := err.(*errs.Error); ok {
		f.Op, f.Subject, f.Remedy, cause = e.Op, e.Subject, e.Remedy, e.Err
	}
	if cause != nil {
		f.Text = cause.Error()
	}
	var in *errs.Error
	for e := cause; f.Remedy == "" && errors.As(e, &in); e = in.Err {
		if text, ok := strings.CutSuffix(f.Text, "\ntry: "+in.Remedy); ok && in.Remedy != "" {
			f.Text, f.Remedy = text, in.Remedy
		}
	}
	f.Op, f.Subject, f.Text, f.Remedy = clip(f.Op, 256), clip(f.Subject, 256), clip(f.Text, maxText), clip(f.Remedy, 256)
	return f
}

// fromStatus returns the error that travelled as err. What gRPC itself says has
// no detail and keeps its code's sense.
func fromStatus(err error) error {
	if err == nil || err == io.EOF {
		return err
	}
	st, ok := status.FromError(err)
	if !ok {
		return err
	}
	for _, d := range st.Details() {
		if f, ok := d.(*Failure); ok {
			return f.asError()
		}
	}
	c, text := errs.Unknown, st.Message()
	switch st.Code() {
	case codes.Canceled:
		c, text = errs.Interrupted, "the caller gave up"
	case codes.DeadlineExceeded:
		c, text = errs.Timeout, "the daemon did not answer in time"
	case codes.Unavailable:
		c, text = errs.Unavailable, "the daemon went away ("+text+")"
	case codes.Unimplemented:
		c = errs.NotSupported
	case codes.ResourceExhausted:
		c = errs.TooLarge
	case codes.Internal:
		c, text = errs.Corrupt, "the daemon and this command do not understand each other ("+text+")"
	}
	return errs.E(c, "", "", "%s", text)
}

func (f *Failure) asError() error {
	e := &errs.Error{Op: f.Op, Subject: f.Subject, Remedy: f.Remedy}
	if f.Class <= 255 {
		e.Class = errs.Class(f.Class)
	}
	if f.Text != "" {
		e.Err = errors.New(f.Text)
	}
	return e
}
