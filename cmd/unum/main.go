// Command unum is the program people type. It is light on purpose: `unum run` and
// `unum sh` stand in for other commands, thousands of times in a make, and the
// shim stands under every program; they must start in a millisecond. Everything
// else, the daemon included, is the core, a program of its own carried inside
// and started from memory when one of its verbs is asked for.
package main

import (
	"os"

	"github.com/unum-os/unum/internal/proc/face"
	"github.com/unum-os/unum/internal/proc/shim"
)

func main() {
	if len(os.Args) > 1 {
		switch os.Args[1] {
		case "run":
			os.Exit(face.Run(os.Args[2:]))
		case "sh":
			os.Exit(face.Sh(os.Args[2:]))
		case shim.Arg:
			shim.Main()
		}
	}
	os.Exit(core())
}
