package main

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"time"

	"github.com/spf13/cobra"

	"github.com/unum-os/unum/internal/control"
	"github.com/unum-os/unum/internal/control/api"
	"github.com/unum-os/unum/internal/control/cli"
	"github.com/unum-os/unum/internal/health"
	"github.com/unum-os/unum/internal/ids"
)

const (
	// statusLimit bounds the question to the daemon how the cluster is, which asks
	// others for that; healthyLimit that of status --healthy, which does not.
	statusLimit  = 10 * time.Second
	healthyLimit = 5 * time.Second
)

func getStatus(ctx context.Context) (*api.StatusResponse, error) {
	ctx, cancel := context.WithTimeout(ctx, statusLimit)
	defer cancel()
	var st *api.StatusResponse
	err := cli.Ask(ctx, control.Path(), func(c *api.Client) (err error) {
		st, err = c.Node.Status(ctx, &api.StatusRequest{})
		return err
	})
	return st, err
}

func printJSON(v any) error {
	e := json.NewEncoder(os.Stdout)
	e.SetIndent("", "  ")
	return e.Encode(v)
}

// conditions are the same list as a metric and a log see it.
func conditions(st *api.StatusResponse) []health.Condition {
	out := make([]health.Condition, 0, len(st.Conditions))
	for _, c := range st.Conditions {
		out = append(out, health.Condition{Code: health.Code(c.Code), Severity: health.Severity(c.Severity), Subject: c.Subject, Text: c.Text, Remedy: c.Remedy})
	}
	return out
}

func statusCommand() *cobra.Command {
	var asJSON, healthy bool
	cmd := &cobra.Command{
		Use:     "status",
		Short:   "Show the cluster as this node sees it",
		Long:    "Show the cluster as this node sees it. Exit code 0 when this node is healthy, 1 when it is not\n(125 with --healthy), 125 when it cannot be asked.",
		Example: "  unum status\n  unum status --json",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if healthy {
				ctx, cancel := context.WithTimeout(cmd.Context(), healthyLimit)
				defer cancel()
				return cli.Healthy(ctx, control.Path())
			}
			st, err := getStatus(cmd.Context())
			if err != nil {
				return err
			}
			if asJSON {
				if err := printJSON(map[string]any{"node": ids.Node(st.Node).String(), "cluster": st.Cluster, "mount": st.Mount, "addr": st.Addr,
					"healthy": st.Problem == "", "problem": st.Problem,
					"conditions": conditions(st), "nodes": toJSON(st)}); err != nil {
					return err
				}
			} else {
				tree := ""
				for _, m := range st.Members {
					if m.Id == st.Node && m.Role == "store" {
						tree = "; the tree is at " + st.Mount
					}
				}
				fmt.Printf("cluster %s, seen from %v%s\n", st.Cluster, ids.Node(st.Node), tree)
				if err := table(st); err != nil {
					return err
				}
				for _, c := range st.Conditions {
					fmt.Printf("%s %s: %s\n  try: %s\n", c.Severity, c.Code, c.Text, c.Remedy)
				}
			}
			if st.Problem != "" {
				return coded(1)
			}
			return nil
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "as JSON")
	cmd.Flags().BoolVar(&healthy, "healthy", false, "print nothing but what is wrong")
	return cmd
}
