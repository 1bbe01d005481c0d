package main

import (
	"os"

	"github.com/spf13/cobra"

	"github.com/unum-os/unum/internal/control"
	"github.com/unum-os/unum/internal/control/cli"
)

func psCommand() *cobra.Command {
	var asJSON, all bool
	cmd := &cobra.Command{Use: "ps", Short: "List the jobs of all nodes", Example: "  unum ps\n  unum ps --all --json", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return exit(cli.PS(cmd.Context(), control.Path(), os.Stdout, os.Stderr, asJSON, all))
		}}
	cmd.Flags().BoolVar(&asJSON, "json", false, "as JSON")
	cmd.Flags().BoolVar(&all, "all", false, "finished ones too")
	return cmd
}
