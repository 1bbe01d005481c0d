package main

import (
	"context"
	"fmt"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/unum-os/unum/internal/control"
	"github.com/unum-os/unum/internal/control/api"
	"github.com/unum-os/unum/internal/control/cli"
)

func tokenCommand() *cobra.Command {
	var uses uint32
	var life time.Duration
	var quiet bool
	cmd := &cobra.Command{
		Use:     "token",
		Short:   "Print what to type on a machine that is to join",
		Example: "  unum token\n  unum token --uses 5 --expires 1h",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			ctx, cancel := context.WithTimeout(cmd.Context(), 20*time.Second)
			defer cancel()
			var r *api.TokenResponse
			err := cli.Ask(ctx, control.Path(), func(c *api.Client) (err error) {
				r, err = c.Node.Token(ctx, &api.TokenRequest{Uses: uses, Lifetime: durationpb.New(life)})
				return err
			})
			if err != nil {
				return err
			}
			if quiet {
				fmt.Println(r.Token)
			} else {
				fmt.Printf("unum join %s %s\n", r.Addr, r.Token)
			}
			return nil
		},
	}
	cmd.Flags().Uint32Var(&uses, "uses", 1, "how many machines may join by it")
	cmd.Flags().DurationVar(&life, "expires", 24*time.Hour, "how long it is good")
	cmd.Flags().BoolVar(&quiet, "quiet", false, "print the token alone")
	return cmd
}
