// Command unum-core is everything of unum but the light face: the daemon, the
// lab, and the verbs for people. Package cmd/unum carries it inside.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"strings"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/unum-os/unum/internal/errs"
	"github.com/unum-os/unum/internal/fusefs"
	"github.com/unum-os/unum/internal/lab"
	"github.com/unum-os/unum/internal/proc/face"
)

// coded ends the program with a code and nothing said.
type coded int

func (c coded) Error() string { return fmt.Sprintf("exit code %d", int(c)) }

// exit makes an error of an exit code about which all has been said.
func exit(n int) error {
	if n == 0 {
		return nil
	}
	return coded(n)
}

func main() {
	fusefs.GuardMain()
	lab.InitMain()
	ctx := untilSignal()
	os.Exit(code(ctx, rootCommand().ExecuteContext(ctx)))
}

// rootCommand is the tree of all commands.
func rootCommand() *cobra.Command {
	root := &cobra.Command{
		Use:     "unum",
		Short:   "Out of many machines, one computer",
		Version: version(),
		Long: `Unum turns a set of Linux machines into one computer: one file tree, /unum, and
one process table.`,
		Example: `  unum up -d                       # a cluster of one, in the background
  unum token                       # the line to type on the next machine
  unum join alpha:7400 TOKEN       # make this machine a node
  cd /unum && unum run make -j8    # run a command where it costs least
  unum lab up --nodes 3            # try it all on one machine`,
		SilenceErrors: true,
		SilenceUsage:  true,
	}
	root.AddCommand(upCommand(), joinCommand(), witnessCommand(), downCommand(), leaveCommand(), removeCommand(), tokenCommand(), statusCommand(), nodesCommand(),
		configCommand(), doctorCommand(), versionCommand(), manCommand(), lab.Command(labHooks()))
	root.AddCommand(recordCommand(), userCommand(), loginCommand(), logoutCommand(), whoamiCommand(), auditCommand())
	root.AddCommand(psCommand(), killCommand(), waitCommand(), logsCommand(), whyCommand())
	root.AddCommand(lightCommands()...)
	return root
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

// lightCommands stand for the verbs that the light face serves before the core
// starts, so that help, completion and manual know them.
func lightCommands() []*cobra.Command {
	light := func(name, use, short string) *cobra.Command {
		long, example, _ := strings.Cut(face.Usage(name), "\nExamples:\n")
		_, long, _ = strings.Cut(long, "\n\n")                    // the first line is the usage
		long = strings.Replace(long, "Flags:\n", "Flags:\n\n", 1) // so that the manual leaves the lines as they are
		if name == "sh" {
			example = "  make -j8 SHELL=\"unum sh\"\n  xargs -P8 -I{} unum sh -c '{}' < commands"
		}
		return &cobra.Command{Use: use, Short: short, Long: long, Example: strings.TrimRight(example, "\n"), DisableFlagParsing: true,
			RunE: func(*cobra.Command, []string) error {
				return fmt.Errorf("%s is served by the unum binary, not by its core", name)
			}}
	}
	return []*cobra.Command{
		light("run", "run [flags] CMD [ARG...]", "Run a command on the node where it costs least (unum run --help)"),
		light("sh", "sh [-c STRING]", "A shell whose commands run on the cluster, for make SHELL= and xargs"),
	}
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
