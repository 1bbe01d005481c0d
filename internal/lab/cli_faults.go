package lab

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/unum-os/unum/internal/errs"
)

// opener finds the lab that a verb is about.
type opener func() (*Lab, error)

// onNodes makes a verb's function that does f to each node of a list, when all of
// them are nodes of the lab.
func onNodes(open opener, list func(args []string) []string, f func(ctx context.Context, l *Lab, node string, args []string) error) func(*cobra.Command, []string) error {
	return verb(func(ctx context.Context, cmd *cobra.Command, args []string) error {
		l, err := open()
		if err != nil {
			return err
		}
		s, err := readState(l.dir)
		if err != nil {
			return err
		}
		nodes, err := s.pick("lab "+cmd.Name(), list(args))
		if err != nil {
			return err
		}
		for _, n := range nodes {
			if err := f(ctx, l, n.Name, args); err != nil {
				return err
			}
		}
		return nil
	})
}

func firstArg(args []string) []string { return names(args[0]) }

func allArgs(args []string) []string { return names(args...) }

// faultCommands are the verbs that do something to nodes.
func faultCommands(open opener) []*cobra.Command {
	return []*cobra.Command{
		cutCommand(open), healCommand(open), delayCommand(open), lossCommand(open), rateCommand(open),
		pauseCommand(open), resumeCommand(open), clockCommand(open),
	}
}

func cutCommand(open opener) *cobra.Command {
	var oneWay bool
	c := &cobra.Command{
		Use: "cut NODES [NODES]", Short: "Drop everything between two sets of nodes",
		Long: `Drop everything between two sets of nodes, both ways and silently, as a cut
cable does. With one set, between it and all other nodes. With --one-way only what
the first set sends to the second is dropped. Several cuts add up.`,
		Example: "  unum lab cut n1 n2,n3\n  unum lab cut n1\n  unum lab cut --one-way n1 n2,n3     # they do not hear n1; n1 hears them",
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) != 1 && len(args) != 2 {
				return usage("%s: want one or two lists of nodes, as in n1 n2,n3\ntry: %s --help", cmd.CommandPath(), cmd.CommandPath())
			}
			return nil
		},
		RunE: verb(func(ctx context.Context, _ *cobra.Command, args []string) error {
			l, err := open()
			if err != nil {
				return err
			}
			if len(args) == 2 && len(names(args[1])) == 0 {
				return errs.E(errs.Invalid, "lab cut", "", "the second list is empty; leave it out to mean all other nodes")
			}
			if oneWay {
				return l.CutOneWay(ctx, names(args[0]), names(args[1:]...))
			}
			return l.Cut(ctx, names(args[0]), names(args[1:]...))
		}),
	}
	c.Flags().BoolVar(&oneWay, "one-way", false, "drop only what the first set sends to the second")
	return c
}

func healCommand(open opener) *cobra.Command {
	return &cobra.Command{
		Use: "heal [NODE...]", Short: "End cuts, delays, losses and rates, all or those of some nodes",
		Long: `End what is wrong with the network: all cuts, delays, losses and rates, or those
of the named nodes. What is paused stays paused, and clocks stay as they are.`,
		Example: "  unum lab heal\n  unum lab heal n1",
		Args:    atLeast(0, ""),
		RunE: verb(func(ctx context.Context, _ *cobra.Command, args []string) error {
			l, err := open()
			if err != nil {
				return err
			}
			nodes := names(args...)
			if len(args) > 0 && len(nodes) == 0 {
				return errs.E(errs.Invalid, "lab heal", strings.Join(args, " "), "name nodes, as in n1,n2, or none for all")
			}
			return l.Heal(ctx, nodes...)
		}),
	}
}

func delayCommand(open opener) *cobra.Command {
	return &cobra.Command{
		Use: "delay NODES TIME", Short: "Hold what nodes send and receive for a time",
		Long: `Hold what nodes send and receive for a time, each way: a round trip takes twice
as long. It combines with loss and rate; 0 ends it.`,
		Example: "  unum lab delay n1 20ms\n  unum lab delay n1 0",
		Args:    exactly(2, "a node and a time, as in n1 20ms"),
		RunE: onNodes(open, firstArg, func(ctx context.Context, l *Lab, node string, args []string) error {
			d, err := time.ParseDuration(args[1])
			if err != nil {
				return errs.E(errs.Invalid, "lab delay", args[1], "want a time with its unit, as in 20ms")
			}
			return l.Delay(ctx, node, d)
		}),
	}
}

func lossCommand(open opener) *cobra.Command {
	var seed uint32
	c := &cobra.Command{
		Use: "loss NODES PERCENT", Short: "Lose a part of what nodes send and receive",
		Long: `Lose a part of the frames that nodes send and receive, each way, chosen at random.
The seed of the choice is in the lab's status. It combines with delay and rate; 0
ends it.`,
		Example: "  unum lab loss n1 30%\n  unum lab loss --seed 7 n1 0.5%\n  unum lab loss n1 0",
		Args:    exactly(2, "a node and a part, as in n1 30%"),
		RunE: onNodes(open, firstArg, func(ctx context.Context, l *Lab, node string, args []string) error {
			p, err := parsePercent(args[1])
			if err != nil {
				return err
			}
			return l.Loss(ctx, node, p, seed)
		}),
	}
	c.Flags().Uint32Var(&seed, "seed", 0, "choose the same again; 0: a new one")
	return c
}

// parsePercent reads 30% or 0.
func parsePercent(s string) (float64, error) {
	num, ok := strings.CutSuffix(s, "%")
	p, err := strconv.ParseFloat(num, 64)
	if err != nil || !ok && p != 0 {
		return 0, errs.E(errs.Invalid, "lab loss", s, "want a part in percent, as in 30%%")
	}
	return p / 100, nil
}

func rateCommand(open opener) *cobra.Command {
	return &cobra.Command{
		Use: "rate NODES RATE", Short: "Make the line of nodes slow",
		Long: `Let nodes send, and be sent, no more than so many bits a second, each way. Half a
second's worth waits in a queue; what is more is lost. It combines with delay and
loss; 0 ends it.`,
		Example: "  unum lab rate n1 1mbit\n  unum lab rate n1 500kbit\n  unum lab rate n1 0",
		Args:    exactly(2, "a node and a rate, as in n1 1mbit"),
		RunE: onNodes(open, firstArg, func(ctx context.Context, l *Lab, node string, args []string) error {
			r, err := parseRate(args[1])
			if err != nil {
				return err
			}
			return l.Rate(ctx, node, r)
		}),
	}
}

// parseRate reads 1mbit, 1.5gbit, 9600bit, or 0.
func parseRate(s string) (int64, error) {
	if s == "0" {
		return 0, nil
	}
	for _, u := range rateUnits {
		num, ok := strings.CutSuffix(strings.ToLower(s), u.name)
		if f, err := strconv.ParseFloat(num, 64); ok && err == nil {
			if bits := f * float64(u.bits); bits >= minRate && bits <= maxRate {
				return int64(bits), nil
			}
			return 0, errs.E(errs.Invalid, "lab rate", s, "want 0 or %s to %s", formatRate(minRate), formatRate(maxRate))
		}
	}
	return 0, errs.E(errs.Invalid, "lab rate", s, "want a rate with its unit, as in 1mbit, 500kbit or 1gbit")
}

func pauseCommand(open opener) *cobra.Command {
	var daemonOnly bool
	c := &cobra.Command{
		Use: "pause NODE...", Short: "Stop all that runs on nodes, or their daemons, as SIGSTOP does",
		Long: `Stop all that runs on nodes, or only their daemons, as SIGSTOP does. The nodes keep
power and network. What exec starts in them later runs.`,
		Example: "  unum lab pause n1\n  unum lab pause --daemon n1",
		Args:    atLeast(1, "a node, as in n2"),
		RunE: onNodes(open, allArgs, func(ctx context.Context, l *Lab, node string, _ []string) error {
			return l.Pause(ctx, node, daemonOnly)
		}),
	}
	c.Flags().BoolVar(&daemonOnly, "daemon", false, "only the node's daemon")
	return c
}

func resumeCommand(open opener) *cobra.Command {
	return &cobra.Command{
		Use: "resume NODE...", Short: "Let what was paused on nodes go on",
		Example: "  unum lab resume n1",
		Args:    atLeast(1, "a node, as in n2"),
		RunE: onNodes(open, allArgs, func(ctx context.Context, l *Lab, node string, _ []string) error {
			return l.Resume(ctx, node)
		}),
	}
}

func clockCommand(open opener) *cobra.Command {
	var boot bool
	c := &cobra.Command{
		Use: "clock NODES OFFSET", Short: "Make the clocks of nodes' daemons wrong",
		Long: `Set how far the time of day is from the machine's, as the daemons of nodes see it;
with --boot, how much more time has gone since boot, as after a suspend. Other
programs see the machine's time. 0 ends it. The time of day stays wrong when a
node loses power; the time since boot begins anew.`,
		Example: "  unum lab clock n1 +1h\n  unum lab clock n1 -1h\n  unum lab clock --boot n1 30s\n  unum lab clock n1 0",
		Args:    exactly(2, "a node and an offset, as in n1 +1h"),
		RunE: onNodes(open, firstArg, func(ctx context.Context, l *Lab, node string, args []string) error {
			d, err := time.ParseDuration(args[1])
			if err != nil {
				return errs.E(errs.Invalid, "lab clock", args[1], "want an offset with its unit, as in +1h, -90s or 0; at most %v", maxSkew)
			}
			return l.setClock(ctx, node, func(c *Clock) {
				if boot {
					c.Boot = d
				} else {
					c.Wall = d
				}
			})
		}),
	}
	c.Flags().BoolVar(&boot, "boot", false, "the time since boot, not the time of day")
	c.Flags().SetInterspersed(false) // -1h is no flag
	return c
}

func addCommand(open opener) *cobra.Command {
	var o AddOptions
	var witness, client bool
	c := &cobra.Command{
		Use: "add", Short: "Add nodes to a lab; returns when they are healthy",
		Example: "  unum lab add\n  unum lab add --count 2 --client\n  unum lab add --count 100 --parallel --timeout 5m",
		Args:    exactly(0, "no argument"),
		RunE: verb(func(ctx context.Context, cmd *cobra.Command, _ []string) error {
			l, err := open()
			if err != nil {
				return err
			}
			switch {
			case witness && client:
				return errs.E(errs.Invalid, "lab add", l.name, "a node is a witness or a client, not both")
			case witness:
				o.Kind = Witness
			case client:
				o.Kind = Client
			}
			if o.Count < 1 {
				return errs.E(errs.Invalid, "lab add", l.name, "%d nodes: want 1 to %d", o.Count, MaxNodes)
			}
			if o.Timeout <= 0 {
				return errs.E(errs.Invalid, "lab add", l.name, "want a time-out above 0")
			}
			o.Progress = cmd.ErrOrStderr()
			added, err := l.Add(ctx, o)
			if len(added) > 0 {
				fmt.Fprintln(cmd.OutOrStdout(), strings.Join(added, " "))
			}
			return err
		}),
	}
	f := c.Flags()
	f.IntVar(&o.Count, "count", 1, "how many")
	f.BoolVar(&witness, "witness", false, "a witness: it votes and stores nothing")
	f.BoolVar(&client, "client", false, "clients: they only use the cluster")
	f.BoolVar(&o.Parallel, "parallel", false, "let all join at the same time; their numbers in the cluster are then by chance")
	f.BoolVar(&o.NoWait, "no-wait", false, "start their daemons and return")
	f.DurationVar(&o.Timeout, "timeout", defaultTimeout, "give up after this time")
	return c
}

func wipeCommand(open opener) *cobra.Command {
	return &cobra.Command{
		Use: "wipe NODE...", Short: "Take the power from nodes and give them empty disks",
		Long: `Take the power from nodes and give them empty disks. They stay without power; at
their next start they join the cluster as new machines with the old address.`,
		Example: "  unum lab wipe n2 && unum lab start n2",
		Args:    atLeast(1, "a node, as in n2"),
		RunE: verb(func(ctx context.Context, _ *cobra.Command, args []string) error {
			l, err := open()
			if err != nil {
				return err
			}
			return l.Wipe(ctx, names(args...)...)
		}),
	}
}

func logsCommand(open opener) *cobra.Command {
	var follow bool
	c := &cobra.Command{
		Use: "logs NODE", Short: "What a node's init and daemon wrote",
		Example: "  unum lab logs n2\n  unum lab logs -f n2",
		Args:    exactly(1, "a node, as in n2"),
		RunE: verb(func(ctx context.Context, cmd *cobra.Command, args []string) error {
			l, err := open()
			if err != nil {
				return err
			}
			err = l.Logs(ctx, args[0], cmd.OutOrStdout(), follow)
			if ctx.Err() != nil && errors.Is(err, ctx.Err()) {
				return errQuiet
			}
			return err
		}),
	}
	c.Flags().BoolVarP(&follow, "follow", "f", false, "go on until it is interrupted or the lab is gone")
	return c
}
