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
	"github.com/unum-os/unum/internal/errs"
	"github.com/unum-os/unum/internal/node"
)

func tokenCommand() *cobra.Command {
	var uses uint32
	var life time.Duration
	var quiet, client, witness bool
	cmd := &cobra.Command{
		Use:     "token",
		Short:   "Print what to type on a machine that is to join",
		Long:    "Print what to type on a machine that is to join. With neither --client nor --witness the\nmachine may become anything, also a node that stores and is trusted with everything.",
		Example: "  unum token\n  unum token --uses 5 --expires 1h\n  unum token --client",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			ctx, cancel := context.WithTimeout(cmd.Context(), recordTimeout)
			defer cancel()
			role, verb := api.Role_STORE, "join"
			switch {
			case client && witness:
				return errs.E(errs.Invalid, "make token", "", "--client and --witness: one of the two")
			case client:
				role, verb = api.Role_CLIENT, "join --client"
			case witness:
				role, verb = api.Role_WITNESS, "witness"
			}
			var r *api.TokenResponse
			err := cli.Ask(ctx, control.Path(), func(c *api.Client) (err error) {
				r, err = c.Node.Token(ctx, &api.TokenRequest{Uses: uses, Lifetime: durationpb.New(life), Role: role})
				return err
			})
			if err != nil {
				return err
			}
			if quiet {
				fmt.Println(r.Token)
			} else {
				fmt.Printf("unum %s %s %s\n", verb, r.Addr, r.Token)
			}
			return nil
		},
	}
	cmd.Flags().Uint32Var(&uses, "uses", 1, "how many machines may join by it")
	cmd.Flags().DurationVar(&life, "expires", node.TokenLife, "how long it is good")
	cmd.Flags().BoolVar(&client, "client", false, "for a client node only")
	cmd.Flags().BoolVar(&witness, "witness", false, "for a witness only")
	cmd.Flags().BoolVar(&quiet, "quiet", false, "print the token alone")
	return cmd
}
