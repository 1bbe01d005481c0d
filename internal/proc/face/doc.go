// Package face is the command line's side of `unum run` and `unum sh`: it stands
// where the command would have stood, and gives it this place on another node.
//
// Words: the stream kinds are those of package jobapi; the terminal is the
// caller's; raw mode is when its line discipline is switched off here because
// the job's terminal on the other node does that work.
//
// Invariants: the terminal's settings are put back on every way out but SIGKILL;
// the exit code is the command's, 128+n for signal n, or 125 to 127 with a
// sentence on stderr; every byte of output is written before the exit.
//
// On failure: no daemon is code 125 and says what to type; output that cannot be
// written breaks the command's pipe, as it would have here.
//
// This package and what it imports are what the light binary starts with; they
// must stay cheap to initialize.
package face
