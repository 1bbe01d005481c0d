package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/unum-os/unum/internal/control"
	"github.com/unum-os/unum/internal/control/cli"
	"github.com/unum-os/unum/internal/health"
	"github.com/unum-os/unum/internal/lab"
	"github.com/unum-os/unum/internal/node"
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
			var r node.TokenReply
			if err := cli.Call(ctx, control.Path(), node.VerbToken, node.TokenRequest{Uses: uses, Lifetime: int64(life)}, &r); err != nil {
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

func getStatus(ctx context.Context) (node.Status, error) {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	var st node.Status
	err := cli.Call(ctx, control.Path(), node.VerbStatus, nil, &st)
	return st, err
}

// nodeJSON is a node as `unum nodes --json` shows it.
type nodeJSON struct {
	ID       string  `json:"id"`
	Hostname string  `json:"hostname"`
	Addr     string  `json:"addr"`
	State    string  `json:"state"`
	Alive    bool    `json:"alive"`
	Mounted  bool    `json:"mounted"`
	Leads    []int   `json:"leads"`
	Jobs     int     `json:"jobs"`
	Load     float64 `json:"load_per_cpu"`
	CPUs     float64 `json:"cpus"`
	Free     int64   `json:"free_bytes"`
	Missing  int     `json:"missing_blocks"`
}

func toJSON(st node.Status) []nodeJSON {
	out := []nodeJSON{}
	for _, p := range st.Peers {
		j := nodeJSON{ID: p.Member.ID.String(), Hostname: p.Member.Hostname, Addr: p.Member.Addr, State: p.Member.State.String(),
			Alive: p.Alive, Load: p.Load, CPUs: p.CPUs, Leads: []int{}}
		if p.Self != nil {
			j.Mounted, j.Jobs, j.Free, j.Missing = p.Self.Mounted, p.Self.Jobs, p.Self.Free, p.Self.Missing
			for _, g := range p.Self.Groups {
				if g.Role == "leader" {
					j.Leads = append(j.Leads, int(g.Group))
				}
			}
		}
		out = append(out, j)
	}
	return out
}

func table(st node.Status) error {
	w := tabwriter.NewWriter(os.Stdout, 2, 8, 2, ' ', 0)
	fmt.Fprintln(w, "NODE\tHOST\tADDRESS\tSTATE\tALIVE\tTREE\tLEADS\tJOBS\tLOAD/CPU\tFREE")
	for _, j := range toJSON(st) {
		leads := "-"
		if len(j.Leads) > 0 {
			leads = strings.Trim(fmt.Sprint(j.Leads), "[]")
		}
		yes := map[bool]string{true: "yes", false: "no"}
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%s\t%s\t%d\t%.2f\t%.1f GiB\n", j.ID, j.Hostname, j.Addr, j.State, yes[j.Alive], yes[j.Mounted], leads, j.Jobs, j.Load, float64(j.Free)/(1<<30))
	}
	return w.Flush()
}

func printJSON(v any) error {
	e := json.NewEncoder(os.Stdout)
	e.SetIndent("", "  ")
	return e.Encode(v)
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
				ctx, cancel := context.WithTimeout(cmd.Context(), 5*time.Second)
				defer cancel()
				return cli.Call(ctx, control.Path(), node.VerbHealthy, nil, nil)
			}
			st, err := getStatus(cmd.Context())
			if err != nil {
				return err
			}
			if asJSON {
				if err := printJSON(map[string]any{"node": st.Node.String(), "cluster": st.Cluster, "mount": st.Mount, "addr": st.Addr,
					"healthy": st.Problem == "", "problem": st.Problem,
					"conditions": append([]health.Condition{}, st.Conditions...), "nodes": toJSON(st)}); err != nil {
					return err
				}
			} else {
				fmt.Printf("cluster %s, seen from %v; the tree is at %s\n", st.Cluster, st.Node, st.Mount)
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

func nodesCommand() *cobra.Command {
	var asJSON bool
	cmd := &cobra.Command{
		Use: "nodes", Short: "List the nodes", Example: "  unum nodes\n  unum nodes --json", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			st, err := getStatus(cmd.Context())
			if err != nil {
				return err
			}
			if asJSON {
				return printJSON(toJSON(st))
			}
			return table(st)
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "as JSON")
	return cmd
}

func jobCommands() []*cobra.Command {
	sock := control.Path()
	ret := func(n int) error {
		if n == 0 {
			return nil
		}
		return coded(n)
	}
	var asJSON, all, follow, whyJSON bool
	var sig string
	ps := &cobra.Command{Use: "ps", Short: "List the jobs of all nodes", Example: "  unum ps\n  unum ps --all --json", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return ret(cli.PS(cmd.Context(), sock, os.Stdout, os.Stderr, asJSON, all))
		}}
	ps.Flags().BoolVar(&asJSON, "json", false, "as JSON")
	ps.Flags().BoolVar(&all, "all", false, "finished ones too")
	kill := &cobra.Command{Use: "kill ID...", Short: "Send a signal to jobs", Example: "  unum kill 41\n  unum kill -s INT 41", Args: cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return ret(cli.Kill(cmd.Context(), sock, os.Stderr, sig, args))
		}}
	kill.Flags().StringVarP(&sig, "signal", "s", "TERM", "the signal, by name or number")
	wait := &cobra.Command{Use: "wait ID", Short: "Wait for a job and exit with its code", Example: "  id=$(unum run --detach make); unum wait $id", Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return ret(cli.Wait(cmd.Context(), sock, os.Stderr, args[0]))
		}}
	logs := &cobra.Command{Use: "logs ID", Short: "Print the output of a detached job", Example: "  unum logs 41\n  unum logs -f 41", Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return ret(cli.Logs(cmd.Context(), sock, os.Stdout, os.Stderr, follow, args[0]))
		}}
	logs.Flags().BoolVarP(&follow, "follow", "f", false, "go on until the job ends")
	why := &cobra.Command{Use: "why ID", Short: "Explain, in prices, why a job runs where it runs", Example: "  unum why 41\n  unum why --json 41", Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return ret(cli.Why(cmd.Context(), sock, os.Stdout, os.Stderr, whyJSON, args[0]))
		}}
	why.Flags().BoolVar(&whyJSON, "json", false, "as JSON")
	return []*cobra.Command{ps, kill, wait, logs, why}
}

// labHooks say how a lab runs Unum.
func labHooks() lab.Hooks {
	exe := os.Getenv("UNUM_EXE")
	run := func(ctx context.Context, l *lab.Lab, n string, argv ...string) (string, error) {
		var out, errOut strings.Builder
		code, err := l.Exec(ctx, n, lab.ExecOptions{Argv: append([]string{exe}, argv...), Stdout: &out, Stderr: &errOut})
		if err != nil {
			return "", err
		}
		if code != 0 {
			return "", errors.New(strings.TrimSpace(strings.TrimPrefix(errOut.String(), "unum: ")))
		}
		return strings.TrimSpace(out.String()), nil
	}
	return lab.Hooks{
		Daemon: func(n lab.Node) []string {
			// The machine's settings are not those of the lab's nodes.
			common := []string{"--config", "", "--addr", n.Addr.String() + ":7400", "--dir", n.DataDir, "--mount", n.Mount, "--share", "0.34"}
			if !n.Fresh || n.First {
				return append([]string{exe, "up"}, common...)
			}
			how := map[lab.Kind][]string{lab.Store: {"join"}, lab.Client: {"join", "--client"}, lab.Witness: {"witness"}}[n.Kind]
			argv := append([]string{exe}, how...)
			return append(append(argv, n.Peer.String()+":7400", n.Token), common...)
		},
		Healthy: func(ctx context.Context, l *lab.Lab, n lab.Node) error {
			_, err := run(ctx, l, n.Name, "status", "--healthy")
			return err
		},
		Token: func(ctx context.Context, l *lab.Lab, from string) (string, error) {
			return run(ctx, l, from, "token", "--quiet", "--uses", strconv.Itoa(lab.MaxNodes), "--expires", "1h")
		},
	}
}
