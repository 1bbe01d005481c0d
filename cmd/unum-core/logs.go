package main

import (
	"os"

	"github.com/spf13/cobra"

	"github.com/unum-os/unum/internal/control"
	"github.com/unum-os/unum/internal/control/cli"
)

func logsCommand() *cobra.Command {
	var follow bool
	cmd := &cobra.Command{Use: "logs ID", Short: "Print the output of a detached job", Example: "  unum logs 41\n  unum logs -f 41", Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return exit(cli.Logs(cmd.Context(), control.Path(), os.Stdout, os.Stderr, follow, args[0]))
		}}
	cmd.Flags().BoolVarP(&follow, "follow", "f", false, "go on until the job ends")
	return cmd
}
