package main

import (
	"context"
	"fmt"
	"os"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/unum-os/unum/internal/config"
	"github.com/unum-os/unum/internal/control"
	"github.com/unum-os/unum/internal/control/api"
	"github.com/unum-os/unum/internal/control/cli"
	"github.com/unum-os/unum/internal/daemon"
)

// configLimit bounds the question to the daemon for its settings.
const configLimit = 5 * time.Second

// runningSettings returns what the daemon of this machine runs with; nil if none
// runs.
func runningSettings(ctx context.Context) ([]config.Value, error) {
	if _, runs, err := daemon.Running(pidPath()); err != nil || !runs {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, configLimit)
	defer cancel()
	var vs []config.Value
	err := cli.Ask(ctx, control.Path(), func(c *api.Client) error {
		r, err := c.Node.Config(ctx, &api.ConfigRequest{})
		for _, s := range r.GetSettings() {
			vs = append(vs, config.Value{Name: s.Name, Value: s.Value, Source: s.Source})
		}
		return err
	})
	return vs, err
}

func configCommand() *cobra.Command {
	var file string
	var asJSON, example bool
	cmd := &cobra.Command{
		Use:   "config",
		Short: "Print the settings in force and where each came from",
		Long: `Print the settings with which this machine's daemon runs, if it does, and those
with which it would start now, and where each came from: the default, a line of
the file, or a flag. Settings are fixed once a node has started.`,
		Example: "  unum config\n  unum config --json\n  unum config --config ./new.toml    # check a file\n  unum config --example > unum.toml  # all settings, as comments",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if example {
				fmt.Print(config.Example())
				return nil
			}
			l, err := config.Load(file, nil)
			if err != nil {
				return err
			}
			running, err := runningSettings(cmd.Context())
			if err != nil {
				fmt.Fprintf(os.Stderr, "unum: what the daemon runs with is not known: %v\n", err)
			}
			if asJSON {
				return printJSON(map[string]any{"file": file, "running": running, "next_start": l.Values()})
			}
			return settingsTable(running, l.Values())
		},
	}
	fileFlag(cmd, &file)
	cmd.Flags().BoolVar(&asJSON, "json", false, "as JSON")
	cmd.Flags().BoolVar(&example, "example", false, "print a file with all settings and their defaults, as comments")
	return cmd
}

func settingsTable(running, next []config.Value) error {
	w := tabwriter.NewWriter(os.Stdout, 2, 8, 2, ' ', 0)
	shown := func(v string) string {
		if v == "" {
			return "-"
		}
		return v
	}
	if running == nil {
		fmt.Fprintln(w, "SETTING\tVALUE\tFROM")
	} else {
		fmt.Fprintln(w, "SETTING\tRUNS WITH\tFROM\tNEXT START\tFROM")
	}
	now := map[string]config.Value{}
	for _, v := range running {
		now[v.Name] = v
	}
	for _, v := range next {
		if running == nil {
			fmt.Fprintf(w, "%s\t%s\t%s\n", v.Name, shown(v.Value), v.Source)
		} else {
			r := now[v.Name]
			fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\n", v.Name, shown(r.Value), shown(r.Source), shown(v.Value), v.Source)
		}
	}
	return w.Flush()
}
