package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/spf13/cobra"

	"github.com/unum-os/unum/internal/control"
	"github.com/unum-os/unum/internal/control/api"
	"github.com/unum-os/unum/internal/control/cli"
	"github.com/unum-os/unum/internal/daemon"
	"github.com/unum-os/unum/internal/errs"
	"github.com/unum-os/unum/internal/ids"
	"github.com/unum-os/unum/internal/node"
	"github.com/unum-os/unum/internal/record"
)

func leaveCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "leave",
		Short: "Take this machine out of its cluster in good order",
		Long: `Take this machine out of its cluster in good order. It gets no more commands; when
those that run here have ended, others have its votes, and every block that it
has is on the others, the daemon ends and the machine is no node any more. Says
what is waited for. Ctrl-C before the end: it stays, and it is said whether it does.

The last storing node cannot leave: stop it (unum down) and remove its directory.`,
		Example: "  sudo unum leave",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			ctx := cmd.Context()
			return cli.Ask(ctx, control.Path(), func(c *api.Client) error {
				dir, err := dataDir(ctx, c)
				if err != nil {
					return err
				}
				s, err := c.Node.Leave(ctx, &api.LeaveRequest{})
				for err == nil {
					var m *api.LeaveResponse
					if m, err = s.Recv(); err == nil {
						fmt.Fprintf(os.Stderr, "unum: %s\n", m.Text)
					}
				}
				if ctx.Err() != nil {
					return gaveUp(context.WithoutCancel(ctx), os.Stderr, stayLimit, ownState, func(ctx context.Context) error { return awaitLeft(ctx, dir) })
				}
				if !errors.Is(err, io.EOF) {
					return err
				}
				return awaitLeft(ctx, dir)
			})
		},
	}
}

// leftLimit bounds what comes after the others have everything: shipping, and
// the end of all parts.
const leftLimit = time.Minute

// stayLimit bounds how long is looked what has become of a leaving that was given
// up: a little longer than the daemon tries to take it back.
const stayLimit = 12 * time.Second

// gaveUp says, after Ctrl-C, where this node stands. The daemon takes a leaving
// back for which nobody waits any more, unless it is too late for that. Before that
// is over the state may be the one from before it began.
func gaveUp(ctx context.Context, out io.Writer, limit time.Duration, look func(context.Context) (string, bool, error), left func(context.Context) error) error {
	lctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	for {
		state, departing, err := look(lctx)
		switch {
		case err == nil && !departing && state == record.Active.String():
			fmt.Fprintln(out, "unum: interrupted: this node stays in its cluster; unum leave begins anew")
			return errs.E(errs.Interrupted, "leave", "", "interrupted")
		case errs.Has(err, errs.Unavailable) && lctx.Err() == nil: // its daemon ends
			fmt.Fprintln(out, "unum: interrupted too late: this node leaves")
			return left(ctx)
		}
		select {
		case <-time.After(100 * time.Millisecond):
		case <-lctx.Done():
			fmt.Fprintln(out, "unum: interrupted: this node is marked as leaving still (unum nodes shows it) and takes no commands: another unum leave waits for it, or no majority answers; unum leave goes on with it")
			return errs.E(errs.Interrupted, "leave", "", "interrupted")
		}
	}
}

// ownState returns the state of this node as its daemon knows it, and whether a
// leaving is under way there.
func ownState(ctx context.Context) (state string, departing bool, err error) {
	st, err := getStatus(ctx)
	if err != nil {
		return "", false, err
	}
	for _, m := range st.Members {
		if m.Id == st.Node {
			state = m.State
		}
	}
	return state, st.Departing, nil
}

// dataDir returns where the daemon's data are.
func dataDir(ctx context.Context, c *api.Client) (string, error) {
	r, err := c.Node.Config(ctx, &api.ConfigRequest{})
	if err != nil {
		return "", err
	}
	for _, s := range r.Settings {
		if s.Name == "dir" {
			return s.Value, nil
		}
	}
	return "", errs.E(errs.NotFound, "leave", "", "the daemon does not say where its data are")
}

// awaitLeft waits until the daemon has ended, and sees whether its directory is a
// node's still.
func awaitLeft(ctx context.Context, dir string) error {
	end := time.Now().Add(leftLimit)
	for {
		pid, runs, err := daemon.Running(pidPath())
		if err != nil {
			return err
		}
		if !runs {
			if is, err := node.Exists(dir); err != nil {
				return err
			} else if is {
				return errs.E(errs.Unavailable, "leave", "", "the daemon has ended, but this machine has not left: its log says what could not be told to the others").
					WithRemedy("unum up, and unum leave again")
			}
			fmt.Println("unum: this machine has left its cluster")
			return nil
		}
		if time.Now().After(end) || ctx.Err() != nil {
			return errs.E(errs.Timeout, "leave", "", "the daemon, process %d, has not ended yet", pid).WithRemedy("see its log; unum status on another node says whether this one has left")
		}
		time.Sleep(50 * time.Millisecond)
	}
}

// removeLimit bounds the putting out of a node: longer than an election.
const removeLimit = 30 * time.Second

func removeCommand() *cobra.Command {
	var force bool
	cmd := &cobra.Command{
		Use:   "remove NODE",
		Short: "Put a node out that will not come back",
		Long: `Put a node out of the cluster that will not come back: its votes go to others, it
is refused from now on, and what it alone had is lost. Its machine can join again
with an empty directory, as a new node. For a node that is alive use unum leave,
there.`,
		Example: "  unum remove n3\n  unum remove --force n3   # though it is alive",
		Args:    cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			n, err := ids.ParseNode(args[0])
			if err != nil {
				return err
			}
			ctx, cancel := context.WithTimeout(cmd.Context(), removeLimit)
			defer cancel()
			return cli.Ask(ctx, control.Path(), func(c *api.Client) error {
				_, err := c.Node.Remove(ctx, &api.RemoveRequest{Node: uint64(n), Force: force})
				return err
			})
		},
	}
	cmd.Flags().BoolVar(&force, "force", false, "also a node that is alive")
	return cmd
}
