package control

import (
	"encoding/binary"
	"errors"
	"io"
	"net"
	"os"

	"golang.org/x/sys/unix"

	"github.com/unum-os/unum/internal/errs"
	"github.com/unum-os/unum/internal/wire"
)

// Limits of one frame. Arguments and environment of a program may be a few MiB
// (the kernel's own limit is a quarter of the stack limit).
const (
	MaxFrame = 8 << 20 // bytes of one frame
	MaxFiles = 8       // descriptors that ride along with one frame
)

// maxMessage bounds a message of a client within a request: a signal or the size
// of a window. Many may wait for their handler, of many connections.
const maxMessage = 64 << 10

// DefaultPath is where the daemon listens unless told otherwise.
const DefaultPath = "/run/unum/unum.sock"

// Path returns the socket to use: $UNUM_SOCKET, or DefaultPath.
func Path() string {
	if p := os.Getenv("UNUM_SOCKET"); p != "" {
		return p
	}
	return DefaultPath
}

// Frame types.
const (
	frameRequest = 'R' // client: request
	frameMessage = 'M' // both ways: a message within a request
	frameDone    = 'D' // server: the request has succeeded
	frameError   = 'E' // server: the request has failed
)

// request is the payload of frameRequest.
type request struct {
	Verb string `cbor:"1,keyasint"`
	Body []byte `cbor:"2,keyasint"`
}

// failure is the payload of frameError.
type failure struct {
	Class  uint8  `cbor:"1,keyasint"`
	Text   string `cbor:"2,keyasint"`
	Remedy string `cbor:"3,keyasint,omitempty"`
}

func encodeFailure(err error) []byte {
	f := failure{Class: uint8(errs.ClassOf(err)), Text: err.Error()}
	var e *errs.Error
	if errors.As(err, &e) && e.Remedy != "" {
		f.Remedy = e.Remedy
		c := *e
		c.Remedy = ""
		if err == error(e) {
			f.Text = c.Error()
		}
	}
	return wire.MustMarshal(f)
}

func decodeFailure(b []byte) error {
	var f failure
	if err := wire.Unmarshal(b, &f); err != nil {
		return err
	}
	return &errs.Error{Class: errs.Class(f.Class), Err: errors.New(f.Text), Remedy: f.Remedy}
}

// writeFrame writes one frame; files ride on its first byte and stay the
// caller's.
func writeFrame(c *net.UnixConn, typ byte, payload []byte, files []*os.File) error {
	if len(payload)+1 > MaxFrame {
		return errs.E(errs.TooLarge, "send", "", "%d bytes, limit %d", len(payload), MaxFrame)
	}
	if len(files) > MaxFiles {
		return errs.E(errs.TooLarge, "send", "", "%d descriptors, limit %d", len(files), MaxFiles)
	}
	b := make([]byte, 5, 5+len(payload))
	binary.BigEndian.PutUint32(b, uint32(len(payload)+1))
	b[4] = typ
	b = append(b, payload...)
	if len(files) > 0 {
		fds := make([]int, len(files))
		for i, f := range files {
			fds[i] = int(f.Fd())
		}
		n, _, err := c.WriteMsgUnix(b, unix.UnixRights(fds...), nil)
		if err != nil {
			return err
		}
		b = b[n:]
	}
	if len(b) == 0 {
		return nil
	}
	_, err := c.Write(b)
	return err
}

// readFrame reads one frame, of a message at most so many bytes. io.EOF means the peer ended between frames. The
// files are the caller's, also those that come with an error: none do.
func readFrame(c *net.UnixConn, message uint32) (typ byte, payload []byte, files []*os.File, err error) {
	defer func() {
		if err != nil {
			closeAll(files)
			files = nil
		}
	}()
	var h [5]byte
	var oob [512]byte
	for got := 0; got < len(h); {
		n, oobn, flags, _, err := c.ReadMsgUnix(h[got:], oob[:])
		fs, perr := parseRights(oob[:oobn])
		files = append(files, fs...)
		switch {
		case err != nil:
			return 0, nil, files, err
		case n == 0 && got == 0:
			return 0, nil, files, io.EOF
		case n == 0:
			return 0, nil, files, io.ErrUnexpectedEOF
		case perr != nil || flags&unix.MSG_CTRUNC != 0 || len(files) > MaxFiles:
			return 0, nil, files, errs.E(errs.Corrupt, "read", "", "too many descriptors, or a malformed control message")
		}
		got += n
	}
	n := binary.BigEndian.Uint32(h[:])
	if n < 1 || n > MaxFrame {
		return 0, nil, files, errs.E(errs.Corrupt, "read", "", "frame of %d bytes, limit %d", n, MaxFrame)
	}
	switch h[4] {
	case frameMessage:
		if n > message {
			return 0, nil, files, errs.E(errs.Corrupt, "read", "", "message of %d bytes, limit %d", n, message)
		}
	case frameRequest, frameDone, frameError:
	default:
		return 0, nil, files, errs.E(errs.Corrupt, "read", "", "frame type %#x", h[4])
	}
	// Memory follows what arrives, not what the length promises.
	const step = 256 << 10
	left := int(n - 1)
	for left > 0 {
		k := min(left, max(step, len(payload)))
		at := len(payload)
		payload = append(payload, make([]byte, k)...)
		if _, err := io.ReadFull(c, payload[at:]); err != nil {
			if err == io.EOF {
				err = io.ErrUnexpectedEOF
			}
			return 0, nil, files, err
		}
		left -= k
	}
	return h[4], payload, files, nil
}

func parseRights(oob []byte) ([]*os.File, error) {
	if len(oob) == 0 {
		return nil, nil
	}
	ms, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return nil, err
	}
	var files []*os.File
	for i := range ms {
		fds, perr := unix.ParseUnixRights(&ms[i])
		if perr != nil {
			err = perr
			continue
		}
		for _, fd := range fds {
			// A read that blocks in the kernel cannot be given up: pipes and
			// sockets go to the poller, which os.NewFile does for those that
			// do not block.
			var st unix.Stat_t
			if unix.Fstat(fd, &st) == nil {
				if t := st.Mode & unix.S_IFMT; t == unix.S_IFIFO || t == unix.S_IFSOCK {
					unix.SetNonblock(fd, true)
				}
			}
			files = append(files, os.NewFile(uintptr(fd), "passed"))
		}
	}
	return files, err
}

func closeAll(files []*os.File) {
	for _, f := range files {
		if f != nil {
			f.Close()
		}
	}
}
