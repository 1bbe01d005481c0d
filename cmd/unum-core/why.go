package main

import (
	"os"

	"github.com/spf13/cobra"

	"github.com/unum-os/unum/internal/control"
	"github.com/unum-os/unum/internal/control/cli"
)

func whyCommand() *cobra.Command {
	var asJSON bool
	cmd := &cobra.Command{Use: "why ID", Short: "Explain, in prices, why a job runs where it runs", Example: "  unum why 41\n  unum why --json 41", Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return exit(cli.Why(cmd.Context(), control.Path(), os.Stdout, os.Stderr, asJSON, args[0]))
		}}
	cmd.Flags().BoolVar(&asJSON, "json", false, "as JSON")
	return cmd
}
