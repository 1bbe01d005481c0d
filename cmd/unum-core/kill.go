package main

import (
	"os"

	"github.com/spf13/cobra"

	"github.com/unum-os/unum/internal/control"
	"github.com/unum-os/unum/internal/control/cli"
)

func killCommand() *cobra.Command {
	var sig string
	cmd := &cobra.Command{Use: "kill ID...", Short: "Send a signal to jobs", Example: "  unum kill 41\n  unum kill -s INT 41", Args: cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return exit(cli.Kill(cmd.Context(), control.Path(), os.Stderr, sig, args))
		}}
	cmd.Flags().StringVarP(&sig, "signal", "s", "TERM", "the signal, by name or number")
	return cmd
}
