package main

import (
	"fmt"
	"os"
	"time"

	"github.com/spf13/cobra"

	"github.com/unum-os/unum/internal/config"
	"github.com/unum-os/unum/internal/daemon"
	"github.com/unum-os/unum/internal/errs"
)

// stopWait is the default of --wait of down: a node ships what is pending for 3 s
// at most, and each part has its end; beyond this something is stuck.
const stopWait = time.Minute

func downCommand() *cobra.Command {
	wait := config.Duration(stopWait)
	cmd := &cobra.Command{
		Use:   "down",
		Short: "Stop this machine's daemon and wait until it has ended",
		Long: `Stop this machine's daemon and wait until it has ended. Attached commands that run
here end with it, detached ones go on. The node stays a member of its cluster.

Exit code 0 when the daemon has ended, 1 when none was running, 125 when it could
not be stopped or has not ended in time.`,
		Example: "  unum down\n  unum down --wait 5m",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			pid, err := daemon.Stop(cmd.Context(), pidPath(), time.Duration(wait), os.Stderr)
			if errs.Has(err, errs.NotFound) {
				fmt.Fprintln(os.Stderr, "unum: no daemon is running on this machine")
				return coded(1)
			}
			if err != nil {
				return err
			}
			fmt.Printf("unum: process %d has ended\n", pid)
			return nil
		},
	}
	cmd.Flags().Var(&wait, "wait", "how long to wait until it has ended")
	return cmd
}
