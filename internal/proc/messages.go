package proc

import (
	"io"
	"net"
	"sync"
	"time"

	"github.com/unum-os/unum/internal/errs"
	"github.com/unum-os/unum/internal/ids"
	"github.com/unum-os/unum/internal/proc/jobapi"
	"github.com/unum-os/unum/internal/wire"
)

// Stream services and methods of the endpoint.
const (
	streamJob  = "job"      // control stream of one job
	streamIO   = "job.io"   // one of its inputs or outputs
	streamLogs = "job.logs" // output of a detached job
	methodList = "job.list"
	methodKill = "job.kill"
	methodWait = "job.wait"
)

// launch is the first message of a control stream.
type launch struct {
	Job         ids.Job         `cbor:"1,keyasint"`
	Incarnation ids.Incarnation `cbor:"2,keyasint"`
	UID         uint32          `cbor:"3,keyasint"`
	GID         uint32          `cbor:"4,keyasint"`
	Groups      []uint32        `cbor:"5,keyasint"`
	Program     jobapi.Program  `cbor:"6,keyasint"`
	Detach      bool            `cbor:"7,keyasint,omitempty"`
	Name        string          `cbor:"8,keyasint,omitempty"`
	Timeout     int64           `cbor:"9,keyasint,omitempty"`
	Receipt     []byte          `cbor:"10,keyasint,omitempty"`
	Pinned      bool            `cbor:"11,keyasint,omitempty"` // the user named the node: admission does not refuse
}

// toNode is a message of the home. One field is set.
type toNode struct {
	Launch *launch        `cbor:"1,keyasint,omitempty"`
	Signal int            `cbor:"2,keyasint,omitempty"`
	Window *jobapi.Window `cbor:"3,keyasint,omitempty"`
	Echo   int64          `cbor:"4,keyasint,omitempty"` // the time the manager sent
	Gone   uint8          `cbor:"5,keyasint,omitempty"` // nobody reads this descriptor's output any more
}

// toHome is a message of the manager. One field is set.
type toHome struct {
	Refused *refusal `cbor:"1,keyasint,omitempty"`
	Started bool     `cbor:"2,keyasint,omitempty"`
	Time    int64    `cbor:"3,keyasint,omitempty"` // the manager's clock, to be returned
	NoInput bool     `cbor:"4,keyasint,omitempty"` // the program closed its input
	End     *ending  `cbor:"5,keyasint,omitempty"`
}

type refusal struct {
	Class uint8  `cbor:"1,keyasint"`
	Text  string `cbor:"2,keyasint"`
}

// ending says how a job ended, or why it never began (State 0).
type ending struct {
	State  State  `cbor:"1,keyasint,omitempty"`
	Code   int    `cbor:"2,keyasint,omitempty"`
	Signal int    `cbor:"3,keyasint,omitempty"`
	Text   string `cbor:"4,keyasint,omitempty"`
}

// ioHello is the first message of an input or output stream.
type ioHello struct {
	Job         ids.Job         `cbor:"1,keyasint"`
	Incarnation ids.Incarnation `cbor:"2,keyasint"`
	Stream      uint8           `cbor:"3,keyasint"`
}

// Streams of a job: its descriptors 0, 1, 2, and its terminal.
const (
	streamTTY  = 3
	numStreams = 4 // streams of a job
)

// maxMessage bounds a control message; a launch carries arguments and
// environment.
const maxMessage = wire.MaxFrame

// sendTimeout bounds a control message to a peer that does not read.
const sendTimeout = 3 * time.Second

// settleTimeout bounds the wait for what a command wrote to be safe: as long as
// any operation on the tree may take.
const settleTimeout = 20 * time.Second

// talk is a connection that carries messages in frames. send may be used by
// several goroutines.
type talk struct {
	net.Conn
	mu sync.Mutex // one frame at a time
}

func (t *talk) send(m any) error {
	b, err := wire.Marshal(m)
	if err != nil {
		return err
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.SetWriteDeadline(time.Now().Add(sendTimeout))
	return wire.WriteFrame(t.Conn, 0, b, nil)
}

func (t *talk) recv(m any) error {
	f, err := wire.ReadFrame(t.Conn, maxMessage)
	if err != nil {
		return err
	}
	return wire.Unmarshal(f.Header, m)
}

// closeWrite ends one direction, where the connection can.
func closeWrite(c net.Conn) {
	if h, ok := c.(interface{ CloseWrite() error }); ok {
		h.CloseWrite()
		return
	}
	c.Close()
}

// copyBuf is the size of one read of a stream: a few of them fill a window.
const copyBuf = 64 << 10

var bufs = sync.Pool{New: func() any { b := make([]byte, copyBuf); return &b }}

// pump copies until r ends (nil) or one side fails. It tells which side it was.
func pump(w io.Writer, r io.Reader) (rerr, werr error) {
	b := bufs.Get().(*[]byte)
	defer bufs.Put(b)
	for {
		n, err := r.Read(*b)
		if n > 0 {
			if _, werr := w.Write((*b)[:n]); werr != nil {
				return nil, werr
			}
		}
		if err == io.EOF {
			return nil, nil
		}
		if err != nil {
			return err, nil
		}
	}
}

// JobInfo is a job as its node sees it now.
type JobInfo struct {
	Record JobRecord `cbor:"1,keyasint"`
	CPU    int64     `cbor:"2,keyasint,omitempty"` // nanoseconds
	RSS    int64     `cbor:"3,keyasint,omitempty"` // bytes
}

type listReq struct{}

type listResp struct {
	Jobs []JobInfo `cbor:"1,keyasint"`
}

type killReq struct {
	Job    ids.Job `cbor:"1,keyasint"`
	Signal int     `cbor:"2,keyasint"`
	UID    uint32  `cbor:"3,keyasint"`
}

type waitReq struct {
	Job ids.Job `cbor:"1,keyasint"`
}

type waitResp struct {
	Known  bool      `cbor:"1,keyasint"` // this node has, or remembers, the job
	Record JobRecord `cbor:"2,keyasint"`
}

type logsReq struct {
	Job    ids.Job `cbor:"1,keyasint"`
	UID    uint32  `cbor:"2,keyasint"`
	Follow bool    `cbor:"3,keyasint,omitempty"`
}

// Frame types of a logs stream: output of descriptor 1, of 2, the end, or a
// refusal.
const (
	logOut = 1
	logErr = 2
	logEnd = 3
	logBad = 4
)

func refuse(err error) *refusal {
	return &refusal{Class: uint8(errs.ClassOf(err)), Text: err.Error()}
}
