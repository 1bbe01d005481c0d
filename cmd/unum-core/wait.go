package main

import (
	"os"

	"github.com/spf13/cobra"

	"github.com/unum-os/unum/internal/control"
	"github.com/unum-os/unum/internal/control/cli"
)

func waitCommand() *cobra.Command {
	return &cobra.Command{Use: "wait ID", Short: "Wait for a job and exit with its code", Example: "  id=$(unum run --detach make); unum wait $id", Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return exit(cli.Wait(cmd.Context(), control.Path(), os.Stderr, args[0]))
		}}
}
