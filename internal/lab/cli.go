package lab

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"syscall"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
	"golang.org/x/term"

	"github.com/unum-os/unum/internal/errs"
)

// ExitError carries the exit code a program should end with. Err is nil when
// there is nothing to say: the code is that of the command that was run.
type ExitError struct {
	Code int
	Err  error
}

// Error returns the text of Err.
func (e *ExitError) Error() string {
	if e.Err == nil {
		return fmt.Sprintf("exit code %d", e.Code)
	}
	return e.Err.Error()
}

// Unwrap returns Err.
func (e *ExitError) Unwrap() error { return e.Err }

// errQuiet is a failure of which there is nothing to say but its code.
var errQuiet = errors.New("interrupted")

// labFailure is the exit code when the lab, not the command, failed.
const labFailure = 125

// verb wraps a command's function: signals end its context, errors get a code.
func verb(f func(ctx context.Context, cmd *cobra.Command, args []string) error) func(*cobra.Command, []string) error {
	return func(cmd *cobra.Command, args []string) error {
		// The program around us may end its context by the same signals, and be
		// the quicker: then nobody could tell which one it was.
		ctx, cancel := context.WithCancelCause(context.WithoutCancel(cmd.Context()))
		defer cancel(nil)
		sigs := make(chan os.Signal, 1)
		hear(sigs, unix.SIGINT, unix.SIGTERM, unix.SIGHUP)
		defer signal.Stop(sigs)
		if cmd.Context().Err() != nil { // before ours were heard
			return context.Cause(cmd.Context())
		}
		hit := make(chan syscall.Signal, 1)
		go func() {
			select {
			case s := <-sigs:
				hit <- s.(syscall.Signal)
				cancel(errs.E(errs.Interrupted, "", "", "%v", s))
			case <-ctx.Done():
			}
		}()
		err := f(ctx, cmd, args)
		if err == nil {
			return nil
		}
		var coded *ExitError
		if errors.As(err, &coded) {
			return err
		}
		select {
		case s := <-hit:
			if err == errQuiet {
				cmd.SilenceErrors, err = true, nil
			}
			return &ExitError{Code: 128 + int(s), Err: err}
		default:
			return &ExitError{Code: labFailure, Err: err}
		}
	}
}

// hear has signals sent to c, but those that the caller ignores (nohup, a
// shell's &): they stay ignored.
func hear(c chan<- os.Signal, sigs ...os.Signal) {
	for _, s := range sigs {
		if !signal.Ignored(s) {
			signal.Notify(c, s)
		}
	}
}

func usage(format string, args ...any) error {
	return &ExitError{Code: labFailure, Err: fmt.Errorf(format, args...)}
}

// atLeast checks the number of arguments.
func atLeast(n int, want string) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		if len(args) < n {
			return usage("%s: want %s\ntry: %s --help", cmd.CommandPath(), want, cmd.CommandPath())
		}
		return nil
	}
}

func exactly(n int, want string) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		if len(args) != n {
			return usage("%s: want %s, got %d arguments\ntry: %s --help", cmd.CommandPath(), want, len(args), cmd.CommandPath())
		}
		return nil
	}
}

// names splits arguments like "n1 n2,n3" into node names.
func names(args ...string) []string {
	var out []string
	for _, a := range args {
		for _, n := range strings.Split(a, ",") {
			if n != "" {
				out = append(out, n)
			}
		}
	}
	return out
}

// Command returns `lab` and its verbs.
func Command(h Hooks) *cobra.Command {
	var name string
	root := &cobra.Command{
		Use:   "lab",
		Short: "A whole cluster on this machine, to try and to torment",
		Long: `A lab is a whole cluster on one machine. Every node has its own network, host
name, processes, /run, and a disk of its own; /unum is at the same path in each.
The rest of the machine's files are visible in every node as they are. Nodes
reach each other and nothing else. Needs root.`,
		Example: `  unum lab up --nodes 3
  unum lab exec n2 -- sh -c 'echo hello > /unum/greeting'
  unum lab exec n3 -- cat /unum/greeting
  unum lab kill n2                    # power loss: only what was synced stays
  unum lab start n2
  unum lab cut n1 n2,n3               # n1 hears nobody
  unum lab heal
  unum lab delay n3 20ms; unum lab loss n3 5%; unum lab rate n3 10mbit
  unum lab pause n2; unum lab resume n2
  unum lab clock n2 +1h
  unum lab add --client               # n4
  unum lab down`,
		SilenceUsage: true,
		Args:         cobra.ArbitraryArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) > 0 {
				return usage("%s: unknown verb %q\ntry: %s --help", cmd.CommandPath(), args[0], cmd.CommandPath())
			}
			return cmd.Help()
		},
	}
	root.PersistentFlags().StringVar(&name, "name", DefaultName, "which lab; several can stand side by side")
	root.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error {
		return usage("%s: %v\ntry: %s --help", cmd.CommandPath(), err, cmd.CommandPath())
	})
	open := func() (*Lab, error) { return Open(name, h) }
	root.AddCommand(upCommand(h, &name), execCommand(&name, h), downCommand(&name))

	root.AddCommand(
		&cobra.Command{
			Use: "kill NODE...", Short: "Take the power from nodes: their disks keep only what was synced",
			Long: `Take the power from nodes, all at once. Their disks are shut down without
flushing the journal, so that only what was synced is on them, names included;
then everything that ran on them is gone. No signal reaches any program first.`,
			Example: "  unum lab kill n2\n  unum lab kill n1,n2,n3",
			Args:    atLeast(1, "a node, as in n2"),
			RunE: verb(func(ctx context.Context, _ *cobra.Command, args []string) error {
				l, err := open()
				if err != nil {
					return err
				}
				return l.Kill(ctx, names(args...)...)
			}),
		},
		startCommand(open),
		statusCommand(open), logsCommand(open), addCommand(open), wipeCommand(open),
	)
	root.AddCommand(faultCommands(open)...)
	for _, c := range root.Commands() {
		c.SilenceUsage = true
	}
	return root
}

func startCommand(open opener) *cobra.Command {
	var noWait bool
	c := &cobra.Command{
		Use: "start NODE...", Short: "Give nodes power: same disk, same address",
		Long: `Give nodes power again, with the disks and addresses they had, and wait until
they are healthy. It does not wait when they cannot be healthy: while a cut is in
force, or while most nodes of the lab have no power or are paused.`,
		Example: "  unum lab start n2\n  unum lab start --no-wait n2,n3",
		Args:    atLeast(1, "a node, as in n2"),
		RunE: verb(func(ctx context.Context, _ *cobra.Command, args []string) error {
			l, err := open()
			if err != nil {
				return err
			}
			return l.start(ctx, names(args...), !noWait)
		}),
	}
	c.Flags().BoolVar(&noWait, "no-wait", false, "start the daemons and return")
	return c
}

func upCommand(h Hooks, name *string) *cobra.Command {
	cfg := Config{Hooks: h}
	size := "4G"
	c := &cobra.Command{
		Use: "up", Short: "Make a lab; returns when every node is healthy",
		Example: "  unum lab up\n  unum lab up --nodes 5 --name big --disk-size 8G\n  unum lab up --nodes 2 --witness --clients 1   # n3 is the witness, n4 the client",
		Args:    exactly(0, "no argument"),
		RunE: verb(func(ctx context.Context, cmd *cobra.Command, _ []string) error {
			n, err := parseSize(size)
			if err != nil {
				return err
			}
			if cfg.Nodes < 1 {
				return errs.E(errs.Invalid, "lab up", *name, "%d nodes: want 1 to %d", cfg.Nodes, MaxNodes)
			}
			if cfg.Timeout <= 0 {
				return errs.E(errs.Invalid, "lab up", *name, "want a time-out above 0")
			}
			cfg.Name, cfg.DiskSize, cfg.Progress = *name, n, cmd.ErrOrStderr()
			l, err := Up(ctx, cfg)
			if err != nil {
				return err
			}
			flag := ""
			if l.name != DefaultName {
				flag = " --name " + l.name
			}
			fmt.Fprintf(cmd.ErrOrStderr(), "lab %s is up. Try: unum lab exec%s n1 -- ls -la /unum   Remove it with: unum lab down%s\n", l.name, flag, flag)
			return nil
		}),
	}
	c.Flags().IntVar(&cfg.Nodes, "nodes", DefaultNodes, "how many nodes that store")
	c.Flags().BoolVar(&cfg.Witness, "witness", false, "and a witness, numbered after them")
	c.Flags().IntVar(&cfg.Clients, "clients", 0, "and so many clients, numbered last")
	c.Flags().StringVar(&cfg.Dir, "dir", "", "directory for disks, logs and state (default "+defaultBase+"/NAME)")
	c.Flags().StringVar(&size, "disk-size", size, "size of each node's disk; takes only what is written")
	c.Flags().DurationVar(&cfg.Timeout, "timeout", defaultTimeout, "give up and clean up after this time")
	c.Flags().BoolVar(&cfg.Keep, "keep", false, "if it fails, leave what was made for a look at it")
	return c
}

// parseSize reads 4G, 512M, 64MiB, or bytes.
func parseSize(s string) (int64, error) {
	t := strings.TrimSuffix(strings.TrimSuffix(strings.ToUpper(s), "IB"), "B")
	shift := 0
	if i := strings.IndexAny(t, "KMGT"); i >= 0 && i == len(t)-1 {
		shift = 10 * (1 + strings.IndexByte("KMGT", t[i]))
		t = t[:i]
	}
	n, err := strconv.ParseInt(t, 10, 64)
	if err != nil || n <= 0 || n > (1<<62)>>shift {
		return 0, errs.E(errs.Invalid, "lab up", s, "want a size, as in 4G or 512M")
	}
	return n << shift, nil
}

func execCommand(name *string, h Hooks) *cobra.Command {
	c := &cobra.Command{
		Use: "exec NODE -- CMD...", Short: "Run a command in a node",
		Long: `Run a command in a node: its network, its files, its processes. Input, output,
terminal and signals are passed through. The exit code is the command's own,
128+n when signal n ended it, 126 when it cannot be executed, 127 when it was not
found, 125 when the lab failed.`,
		Example: "  unum lab exec n2 -- hostname\n  unum lab exec n1 -- bash",
		Args:    atLeast(2, "a node and a command, as in n2 -- hostname"),
		RunE: func(cmd *cobra.Command, args []string) error {
			l, err := Open(*name, h)
			if err != nil {
				return &ExitError{Code: labFailure, Err: err}
			}
			node, argv := args[0], args[1:]
			if argv[0] == "--" {
				argv = argv[1:]
			}
			if len(argv) == 0 {
				return usage("%s: no command given", cmd.CommandPath())
			}
			code, err := execHere(l, node, argv)
			if err != nil {
				return &ExitError{Code: labFailure, Err: err}
			}
			if code != 0 {
				cmd.SilenceErrors = true // it is the command's own to explain
				return &ExitError{Code: code}
			}
			return nil
		},
	}
	c.Flags().SetInterspersed(false)
	return c
}

// execHere runs argv in node as though it ran here.
func execHere(l *Lab, node string, argv []string) (int, error) {
	// Caught from before the command exists, so that none is lost.
	sigs := make(chan os.Signal, 16)
	hear(sigs, unix.SIGHUP, unix.SIGINT, unix.SIGQUIT, unix.SIGTERM, unix.SIGUSR1, unix.SIGUSR2, unix.SIGCONT, unix.SIGALRM)
	defer signal.Stop(sigs)
	dir, err := os.Getwd()
	if err != nil {
		dir = "/"
	}
	p, err := l.ExecStart(node, ExecOptions{
		Argv: argv, Dir: dir, Stdin: os.Stdin, Stdout: os.Stdout, Stderr: os.Stderr,
		TTY: term.IsTerminal(0) && term.IsTerminal(1),
	})
	if err != nil {
		return 0, err
	}
	done := make(chan struct{})
	defer close(done)
	go func() {
		for {
			select {
			case s := <-sigs:
				_ = p.Signal(s.(syscall.Signal)) // it may just have ended
			case <-done:
				return
			}
		}
	}()
	return p.Wait()
}

func statusCommand(open opener) *cobra.Command {
	var asJSON bool
	c := &cobra.Command{
		Use: "status", Short: "How the lab and its nodes are", Args: exactly(0, "no argument"),
		Example: "  unum lab status\n  unum lab status --json",
		RunE: verb(func(ctx context.Context, cmd *cobra.Command, _ []string) error {
			l, err := open()
			if err != nil {
				return err
			}
			st, err := l.Status(ctx)
			if err != nil {
				return err
			}
			if !asJSON {
				return st.Print(cmd.OutOrStdout())
			}
			e := json.NewEncoder(cmd.OutOrStdout())
			e.SetIndent("", "  ")
			return e.Encode(st)
		}),
	}
	c.Flags().BoolVar(&asJSON, "json", false, "for programs")
	return c
}

func downCommand(name *string) *cobra.Command {
	var all bool
	c := &cobra.Command{
		Use: "down", Short: "Remove a lab and everything it made, also a half made one",
		Example: "  unum lab down\n  unum lab down --all",
		Args:    exactly(0, "no argument"),
		RunE: verb(func(ctx context.Context, cmd *cobra.Command, _ []string) error {
			out := cmd.ErrOrStderr()
			if !all {
				return downOne(ctx, *name, out)
			}
			labs, err := List()
			if err != nil {
				return err
			}
			if len(labs) == 0 {
				fmt.Fprintln(out, "there is no lab on this machine: nothing to do")
			}
			var failed []error
			for _, n := range labs {
				failed = append(failed, downOne(ctx, n, out))
			}
			return errors.Join(failed...)
		}),
	}
	c.Flags().BoolVar(&all, "all", false, "every lab of this machine")
	return c
}

func downOne(ctx context.Context, name string, out io.Writer) error {
	err := Down(ctx, name)
	switch {
	case errs.Has(err, errs.NotFound):
		fmt.Fprintf(out, "there is no lab %s on this machine: nothing to do\n", name)
		if labs, err := List(); err == nil && len(labs) == 1 {
			fmt.Fprintf(out, "there is one called %s: unum lab down --name %s\n", labs[0], labs[0])
		}
		return nil
	case err != nil:
		return err
	}
	fmt.Fprintf(out, "lab %s is gone\n", name)
	return nil
}
