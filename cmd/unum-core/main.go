// Command unum-core is everything of unum but the light face: the daemon, the
// lab, and the verbs for people. Package cmd/unum carries it inside.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"runtime/debug"
	"strings"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/unum-os/unum/internal/errs"
	"github.com/unum-os/unum/internal/fusefs"
	"github.com/unum-os/unum/internal/lab"
)

// coded ends the program with a code and nothing said.
type coded int

func (c coded) Error() string { return fmt.Sprintf("exit code %d", int(c)) }

func main() {
	fusefs.GuardMain()
	lab.InitMain()
	ctx := untilSignal()
	root := &cobra.Command{
		Use:     "unum",
		Short:   "Out of many machines, one computer",
		Version: version(),
		Long: `Unum turns a set of Linux machines into one computer: one file tree, /unum, and
one process table.`,
		Example: `  unum up                          # a cluster of one
  unum token                       # the line to type on the next machine
  unum join alpha:7400 TOKEN       # make this machine a node
  cd /unum && unum run make -j8    # run a command where it costs least
  unum lab up --nodes 3            # try it all on one machine`,
		SilenceErrors: true,
		SilenceUsage:  true,
	}
	root.AddCommand(upCommand(), joinCommand(), tokenCommand(), statusCommand(), nodesCommand(), doctorCommand(), lab.Command(labHooks()))
	root.AddCommand(jobCommands()...)
	root.AddCommand(
		&cobra.Command{Use: "run [flags] CMD [ARG...]", Short: "Run a command on the node where it costs least (unum run --help)", DisableFlagParsing: true, RunE: lightOnly},
		&cobra.Command{Use: "sh [-c STRING]", Short: "A shell whose commands run on the cluster, for make SHELL= and xargs", DisableFlagParsing: true, RunE: lightOnly},
	)
	os.Exit(code(ctx, root.ExecuteContext(ctx)))
}

// version is what the build knows of the source: the commit, and whether it was
// changed since.
func version() string {
	bi, ok := debug.ReadBuildInfo()
	if !ok {
		return "unknown"
	}
	v := bi.Main.Version
	for _, s := range bi.Settings {
		if s.Key == "vcs.revision" && !strings.Contains(v, s.Value[:min(12, len(s.Value))]) {
			v += " " + s.Value
		}
	}
	return v
}

// signalled is the cause of a context that a signal ended.
type signalled syscall.Signal

func (s signalled) Error() string { return syscall.Signal(s).String() }

// untilSignal returns a context that the first signal ends; later ones change
// nothing, so that an impatient second Ctrl-C does not leave a mount behind.
// What the caller ignores (nohup, a shell's &) stays ignored.
func untilSignal() context.Context {
	ctx, cancel := context.WithCancelCause(context.Background())
	sigs := make(chan os.Signal, 1)
	for _, s := range []os.Signal{syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP} {
		if !signal.Ignored(s) {
			signal.Notify(sigs, s)
		}
	}
	go func() { cancel(signalled((<-sigs).(syscall.Signal))) }()
	return ctx
}

// lightOnly stands for verbs that the light face serves before the core starts.
func lightOnly(cmd *cobra.Command, _ []string) error {
	return fmt.Errorf("%s is served by the unum binary, not by its core", cmd.Name())
}

// code says what is to be said of err and returns the exit code: 128+n after
// signal n, of which its sender knows.
func code(ctx context.Context, err error) int {
	if err == nil {
		return 0
	}
	n := 125
	var c coded
	var e *lab.ExitError
	var s signalled
	switch hit := errors.As(context.Cause(ctx), &s); {
	case errors.As(err, &e): // it hears signals itself
		n, err = e.Code, e.Err
	case errors.As(err, &c) && (!hit || c != 125):
		return int(c)
	case hit:
		n = 128 + int(s)
		if errors.Is(err, s) || errs.Has(err, errs.Interrupted) || errors.As(err, &c) {
			return n
		}
	}
	if err != nil {
		fmt.Fprintf(os.Stderr, "unum: %v\n", err)
	}
	return n
}
