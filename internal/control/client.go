package control

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"syscall"
	"time"

	"github.com/unum-os/unum/internal/errs"
	"github.com/unum-os/unum/internal/wire"
)

// dialTimeout bounds the connect when the context has no deadline: a daemon that
// does not accept for so long is not there for a person.
const dialTimeout = 5 * time.Second

// Client is a connection to the daemon, for one request at a time. Send may be
// used while another goroutine is in Recv; nothing else at the same time.
type Client struct {
	c    *net.UnixConn
	path string
}

// Dial connects to the daemon behind path, for frames.
func Dial(ctx context.Context, path string) (*Client, error) {
	c, err := Connect(ctx, path)
	if err != nil {
		return nil, err
	}
	return &Client{c: c, path: path}, nil
}

// RemedyStart is what to type where no daemon runs: this process does not know
// whether the machine is a node.
const RemedyStart = "unum up, if this machine is a node; if not, unum up makes a new cluster of it, unum join ADDR TOKEN a node of another's"

// Connect connects to the daemon behind path. Nobody listening is an error of
// class Unavailable.
func Connect(ctx context.Context, path string) (*net.UnixConn, error) {
	if _, ok := ctx.Deadline(); !ok {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, dialTimeout)
		defer cancel()
	}
	var d net.Dialer
	c, err := d.DialContext(ctx, "unix", path)
	if err != nil {
		why := err
		switch {
		case errors.Is(err, syscall.ENOENT), errors.Is(err, syscall.ECONNREFUSED):
			why = errors.New("no daemon is running on this machine")
		case errors.Is(err, syscall.EACCES), errors.Is(err, syscall.EPERM):
			return nil, errs.E(errs.Permission, "", "", "the daemon's socket %s is not open to this user", path)
		}
		return nil, (&errs.Error{Class: errs.Unavailable, Err: wrapped{why, path}}).WithRemedy(RemedyStart)
	}
	return c.(*net.UnixConn), nil
}

type wrapped struct {
	err  error
	path string
}

func (w wrapped) Error() string { return w.err.Error() + " (socket " + w.path + ")" }
func (w wrapped) Unwrap() error { return w.err }

// Close ends the connection; a request under way is cancelled at the daemon.
func (c *Client) Close() error { return c.c.Close() }

// SetDeadline bounds all later reads and writes.
func (c *Client) SetDeadline(t time.Time) error { return c.c.SetDeadline(t) }

// Start sends a request. The files stay the caller's.
func (c *Client) Start(verb string, body []byte, files ...*os.File) error {
	err := writeFrame(c.c, frameRequest, wire.MustMarshal(request{verb, body}), files)
	if errors.Is(err, syscall.EPIPE) || errors.Is(err, syscall.ECONNRESET) {
		// The daemon has turned the connection away; what it said is still there.
		if typ, b, files, rerr := readFrame(c.c, MaxFrame); rerr == nil {
			closeAll(files)
			if typ == frameError {
				return decodeFailure(b)
			}
		}
	}
	return c.gone(err)
}

// Send sends a message to the request under way.
func (c *Client) Send(b []byte) error { return c.gone(writeFrame(c.c, frameMessage, b, nil)) }

// Recv returns the next message of the answer, with the descriptors that came
// with it (the caller's); io.EOF after success, the request's error otherwise.
func (c *Client) Recv() ([]byte, []*os.File, error) {
	typ, b, files, err := readFrame(c.c, MaxFrame)
	if err != nil {
		return nil, nil, c.gone(err)
	}
	switch typ {
	case frameMessage:
		return b, files, nil
	case frameDone:
		closeAll(files)
		return nil, nil, io.EOF
	case frameError:
		closeAll(files)
		return nil, nil, decodeFailure(b)
	}
	closeAll(files)
	return nil, nil, errs.E(errs.Corrupt, "", "", "the daemon's answer is malformed")
}

// Call sends a request and returns the last message of its answer. The context
// bounds it.
func (c *Client) Call(ctx context.Context, verb string, body []byte) ([]byte, error) {
	stop := context.AfterFunc(ctx, func() { c.c.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	if err := c.Start(verb, body); err != nil {
		return nil, err
	}
	var last []byte
	for {
		b, files, err := c.Recv()
		closeAll(files)
		switch {
		case err == io.EOF:
			return last, nil
		case err != nil && ctx.Err() == context.Canceled:
			return nil, errs.E(errs.Interrupted, "", "", "the caller gave up")
		case err != nil && ctx.Err() != nil:
			return nil, errs.E(errs.Timeout, "", "", "the daemon did not answer in time")
		case err != nil:
			return nil, err
		}
		last = b
	}
}

// gone gives the failures of the connection itself their class.
func (c *Client) gone(err error) error {
	var e *errs.Error
	if err == nil || errors.As(err, &e) {
		return err
	}
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return errs.E(errs.Timeout, "", "", "the daemon did not answer in time")
	}
	return &errs.Error{Class: errs.Unavailable, Err: errors.New("the daemon went away (" + err.Error() + ")")}
}
