// Package jobapi is what the command line, the home daemon and the shim say to
// each other about one command. Everything here is data; it must stay cheap to
// import, because the light binary does.
//
// Words: a stream kind says what one of the descriptors 0, 1, 2 is; an ask is
// what the command line wants run; an event is what it hears back; a spec is
// what the shim starts.
package jobapi

// Stream kinds of the descriptors 0, 1 and 2 of a command.
const (
	Closed uint8 = iota // the caller has none, the program gets none
	Null                // /dev/null
	Pipe                // a pipe relayed byte by byte
	TTY                 // the job's terminal
	Same                // descriptor 2 only: the same open file as descriptor 1
)

// Verb is the verb of the control socket that runs a command.
const Verb = "run"

// Rlimit is one resource limit, as setrlimit takes it.
type Rlimit struct {
	Resource int    `cbor:"1,keyasint"`
	Cur      uint64 `cbor:"2,keyasint"`
	Max      uint64 `cbor:"3,keyasint"`
}

// Window is a terminal's size in characters and pixels.
type Window struct {
	Rows uint16 `cbor:"1,keyasint"`
	Cols uint16 `cbor:"2,keyasint"`
	X    uint16 `cbor:"3,keyasint,omitempty"`
	Y    uint16 `cbor:"4,keyasint,omitempty"`
}

// Termios is a terminal's line discipline settings.
type Termios struct {
	Iflag  uint32 `cbor:"1,keyasint"`
	Oflag  uint32 `cbor:"2,keyasint"`
	Cflag  uint32 `cbor:"3,keyasint"`
	Lflag  uint32 `cbor:"4,keyasint"`
	Cc     []byte `cbor:"5,keyasint"`
	Ispeed uint32 `cbor:"6,keyasint,omitempty"`
	Ospeed uint32 `cbor:"7,keyasint,omitempty"`
}

// Program is what is needed to start a command as if it had been typed here.
// Strings are bytes: neither arguments nor names need be text.
type Program struct {
	Argv    [][]byte `cbor:"1,keyasint"`
	Env     [][]byte `cbor:"2,keyasint"` // KEY=value
	Cwd     []byte   `cbor:"3,keyasint"`
	CwdGone bool     `cbor:"4,keyasint,omitempty"` // the working directory was removed
	Umask   int      `cbor:"5,keyasint"`
	Nice    int      `cbor:"6,keyasint,omitempty"`
	Rlimits []Rlimit `cbor:"7,keyasint,omitempty"`
	Ignored []int    `cbor:"8,keyasint,omitempty"` // signals the program starts ignoring
	Stdio   [3]uint8 `cbor:"9,keyasint"`           // stream kinds
	Window  *Window  `cbor:"10,keyasint,omitempty"`
	Termios *Termios `cbor:"11,keyasint,omitempty"`
}

// NeedsTTY reports whether one of the descriptors is the job's terminal.
func (p *Program) NeedsTTY() bool {
	return p.Stdio[0] == TTY || p.Stdio[1] == TTY || p.Stdio[2] == TTY
}

// Ask is the request of Verb. With it come the daemon's ends of pipes: the
// read end for descriptor 0, the write ends for 1 and 2, each only where its
// kind is Pipe; and, when NeedsTTY, the read end of the terminal's input and the
// write end of its output.
type Ask struct {
	Program Program  `cbor:"1,keyasint"`
	On      string   `cbor:"2,keyasint,omitempty"` // run here and nowhere else
	NotOn   []string `cbor:"3,keyasint,omitempty"`
	Detach  bool     `cbor:"4,keyasint,omitempty"`
	Name    string   `cbor:"5,keyasint,omitempty"`
	Timeout int64    `cbor:"6,keyasint,omitempty"` // nanoseconds; 0 is none
}

// Tell is a message of the command line while its command runs.
type Tell struct {
	Signal int     `cbor:"1,keyasint,omitempty"`
	Window *Window `cbor:"2,keyasint,omitempty"`
}

// Event is the answer to an Ask: for a detached command Job alone, else how it
// ended.
type Event struct {
	Job    uint64 `cbor:"1,keyasint,omitempty"`
	Node   uint64 `cbor:"2,keyasint,omitempty"`
	Ended  bool   `cbor:"3,keyasint,omitempty"`
	Code   int    `cbor:"4,keyasint,omitempty"` // exit code of the command line
	Signal int    `cbor:"5,keyasint,omitempty"` // that killed the program, if one did
	Text   string `cbor:"6,keyasint,omitempty"` // what to say on stderr, if anything
}

// Exit codes that are Unum's own, not the command's.
const (
	CodeFailed        = 125 // Unum failed
	CodeNotExecutable = 126
	CodeNotFound      = 127
	CodeSignal        = 128 // plus the signal
)
