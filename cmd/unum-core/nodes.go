package main

import (
	"fmt"
	"os"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/unum-os/unum/internal/control/api"
	"github.com/unum-os/unum/internal/ids"
)

// nodeJSON is a node as `unum nodes --json` shows it.
type nodeJSON struct {
	ID       string  `json:"id"`
	Hostname string  `json:"hostname"`
	Addr     string  `json:"addr"`
	Role     string  `json:"role"`
	State    string  `json:"state"`
	Alive    bool    `json:"alive"`
	Silent   float64 `json:"silent_seconds,omitempty"` // how long it has been dead
	Unheard  bool    `json:"unheard,omitempty"`        // silent since the node that answers started, or longer
	Mounted  bool    `json:"mounted"`
	Leads    []int   `json:"leads"`
	Jobs     int     `json:"jobs"`
	Load     float64 `json:"load_per_cpu"`
	CPUs     float64 `json:"cpus"`
	Free     int64   `json:"free_bytes"`
	Missing  int     `json:"missing_blocks"`
}

func toJSON(st *api.StatusResponse) []nodeJSON {
	out := []nodeJSON{}
	for _, m := range st.Members {
		j := nodeJSON{ID: ids.Node(m.Id).String(), Hostname: m.Hostname, Addr: m.Addr, Role: m.Role, State: m.State,
			Alive: m.Alive, Load: m.LoadPerCpu, CPUs: m.Cpus, Leads: []int{}}
		if m.Silent != nil {
			j.Silent, j.Unheard = m.Silent.AsDuration().Seconds(), m.Unheard
		}
		if s := m.Self; s != nil {
			j.Mounted, j.Jobs, j.Free, j.Missing = s.Mounted, int(s.Jobs), s.FreeBytes, int(s.MissingBlocks)
			for _, g := range s.Groups {
				if g.Role == "leader" {
					j.Leads = append(j.Leads, int(g.Id))
				}
			}
		}
		out = append(out, j)
	}
	return out
}

// silence is for how long a node has been dead, in few letters.
func (j *nodeJSON) silence() string {
	if j.Alive {
		return "-"
	}
	more := map[bool]string{true: ">"}[j.Unheard]
	return more + time.Duration(j.Silent*float64(time.Second)).Round(time.Second).String()
}

func table(st *api.StatusResponse) error {
	w := tabwriter.NewWriter(os.Stdout, 2, 8, 2, ' ', 0)
	fmt.Fprintln(w, "NODE\tHOST\tADDRESS\tROLE\tSTATE\tALIVE\tSILENT\tTREE\tLEADS\tJOBS\tLOAD/CPU\tDISK FREE")
	for _, j := range toJSON(st) {
		leads := "-"
		if len(j.Leads) > 0 {
			leads = strings.Trim(fmt.Sprint(j.Leads), "[]")
		}
		yes := map[bool]string{true: "yes", false: "no"}
		tree, jobs, load, free := "-", "-", "-", "-"
		if j.Role == "store" && j.Alive {
			tree, jobs, load, free = yes[j.Mounted], fmt.Sprint(j.Jobs), fmt.Sprintf("%.2f", j.Load), fmt.Sprintf("%.1f GiB", float64(j.Free)/(1<<30))
		}
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\n", j.ID, j.Hostname, j.Addr, j.Role, j.State, yes[j.Alive], j.silence(), tree, leads, jobs, load, free)
	}
	return w.Flush()
}

func nodesCommand() *cobra.Command {
	var asJSON bool
	cmd := &cobra.Command{
		Use: "nodes", Short: "List the nodes",
		Long:    "List the nodes. SILENT is for how long a node that is not alive has not been heard of;\nwith > since before this node started. A client node that is off is no fault: this is\nwhere it is seen.",
		Example: "  unum nodes\n  unum nodes --json", Args: cobra.NoArgs,
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
