package shim

import (
	"io"
	"net"
	"os"

	"golang.org/x/sys/unix"

	"github.com/unum-os/unum/internal/proc/jobapi"
	"github.com/unum-os/unum/internal/wire"
)

// Arg is the hidden first argument that makes the light binary the shim.
const Arg = "__shim"

// linkFD is the link: a stream socket that carries frames of wire. With the spec
// come the program's descriptors 0, 1, 2 and, for a detached job, one of its
// directory.
const (
	linkFD   = 3
	maxFiles = 4 // descriptors that come with the spec
)

// ExitFile is the name, in the job's directory, of what a detached job's shim
// leaves when the program ended: one CBOR Exited.
const ExitFile = "exit"

// Spec says what to start and as whom.
type Spec struct {
	Program  jobapi.Program `cbor:"1,keyasint"`
	UID      uint32         `cbor:"2,keyasint"`
	GID      uint32         `cbor:"3,keyasint"`
	Groups   []uint32       `cbor:"4,keyasint"`
	Deadline int64          `cbor:"5,keyasint"` // of the lease, a clock.Instant; 0: detached, none
}

// ToShim is a message of the manager: one of its fields is set.
type ToShim struct {
	Spec     *Spec `cbor:"1,keyasint,omitempty"`
	Signal   int   `cbor:"2,keyasint,omitempty"`
	Deadline int64 `cbor:"3,keyasint,omitempty"` // the lease now ends here
}

// FromShim is a message of the shim: one of its fields is set.
type FromShim struct {
	Started int     `cbor:"1,keyasint,omitempty"` // pid of the program in its namespace
	Failed  *Failed `cbor:"2,keyasint,omitempty"`
	Exited  *Exited `cbor:"3,keyasint,omitempty"`
}

// Step is the part of a start that failed.
type Step uint8

// The steps.
const (
	StepNone Step = iota
	StepSetup
	StepIdentity
	StepTerminal
	StepChdir
	StepExec
)

// Failed says why the program was not started.
type Failed struct {
	Step  Step   `cbor:"1,keyasint"`
	Errno int    `cbor:"2,keyasint"`
	IsDir bool   `cbor:"3,keyasint,omitempty"` // the command is a directory
	Text  string `cbor:"4,keyasint,omitempty"` // for StepSetup: what was being done
}

// Exited says how the program ended.
type Exited struct {
	Code   int   `cbor:"1,keyasint"`
	Signal int   `cbor:"2,keyasint,omitempty"`
	CPU    int64 `cbor:"3,keyasint,omitempty"` // nanoseconds, of the program and what it waited for
	End    int64 `cbor:"4,keyasint,omitempty"` // Unix nanoseconds
}

// Write sends one message on the link.
func Write(w io.Writer, m any) error {
	b, err := wire.Marshal(m)
	if err != nil {
		return err
	}
	return wire.WriteFrame(w, 0, b, nil)
}

// Read receives one message into m.
func Read(r io.Reader, m any) error {
	f, err := wire.ReadFrame(r, wire.MaxFrame)
	if err != nil {
		return err
	}
	return wire.Unmarshal(f.Header, m)
}

// Give sends the spec with its descriptors, which stay the caller's.
func Give(link *net.UnixConn, spec *Spec, files []*os.File) error {
	return Write(&giver{link, files}, ToShim{Spec: spec})
}

type giver struct {
	link  *net.UnixConn
	files []*os.File
}

func (g *giver) Write(b []byte) (int, error) {
	if len(g.files) == 0 {
		return g.link.Write(b)
	}
	fds := make([]int, len(g.files))
	for i, f := range g.files {
		fds[i] = int(f.Fd())
	}
	g.files = nil
	n, _, err := g.link.WriteMsgUnix(b, unix.UnixRights(fds...), nil)
	if err != nil || n == len(b) {
		return n, err
	}
	m, err := g.link.Write(b[n:])
	return n + m, err
}
