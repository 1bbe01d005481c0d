// Command unum-core is everything of unum but the light face: the daemon, the
// lab, and the verbs for people. Package cmd/unum carries it inside.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/unum-os/unum/internal/lab"
)

// coded ends the program with a code and nothing said.
type coded int

func (c coded) Error() string { return fmt.Sprintf("exit code %d", int(c)) }

func main() {
	lab.InitMain()
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	root := &cobra.Command{
		Use:   "unum",
		Short: "Out of many machines, one computer",
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
	err := root.ExecuteContext(ctx)
	stop()
	os.Exit(code(err))
}

// lightOnly stands for verbs that the light face serves before the core starts.
func lightOnly(cmd *cobra.Command, _ []string) error {
	return fmt.Errorf("%s is served by the unum binary, not by its core", cmd.Name())
}

func code(err error) int {
	if err == nil {
		return 0
	}
	var c coded
	if errors.As(err, &c) {
		return int(c)
	}
	n := 125
	var e *lab.ExitError
	if errors.As(err, &e) {
		n, err = e.Code, e.Err
	}
	if err != nil {
		fmt.Fprintf(os.Stderr, "unum: %v\n", err)
	}
	return n
}
