package lab

import (
	"context"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"sync"
	"text/tabwriter"
	"time"

	"github.com/unum-os/unum/internal/errs"
)

// Status is how a lab is; its JSON is what `unum lab status --json` prints.
type Status struct {
	Name     string        `json:"name"`
	Dir      string        `json:"dir"`
	Complete bool          `json:"complete"` // false: still being made, or its maker died
	Subnet   string        `json:"subnet"`
	DataDir  string        `json:"data_dir"`
	Mount    string        `json:"mount"`
	Nodes    []NodeStatus  `json:"nodes"`
	Cuts     [][2][]string `json:"cuts"` // each pair of sets does not hear each other

	Delays map[string]time.Duration `json:"delays_ns,omitempty"` // each way, by node
}

// NodeStatus is how a node is.
type NodeStatus struct {
	Name    string `json:"name"`
	Addr    string `json:"addr"`
	Power   string `json:"power"`  // on, off, or died (it was not switched off)
	Daemon  string `json:"daemon"` // running, ended (with Exit), or none
	Exit    *int   `json:"exit,omitempty"`
	Healthy bool   `json:"healthy"`
	Why     string `json:"why,omitempty"` // why not healthy
	Pid     int    `json:"pid,omitempty"` // of its init, as this machine counts
	Log     string `json:"log"`
}

// healthTime bounds a health check of status, which should answer while a person waits.
const healthTime = 2 * time.Second

// Status asks every node how it is.
func (l *Lab) Status(ctx context.Context) (*Status, error) {
	s, err := readState(l.dir)
	if err != nil {
		return nil, err
	}
	st := &Status{
		Name: s.Name, Dir: s.Dir, Complete: s.Complete, Subnet: s.Subnet.String(), DataDir: s.DataDir, Mount: s.Mount,
		Nodes: make([]NodeStatus, len(s.Nodes)), Cuts: [][2][]string{},
		Delays: s.Delays,
	}
	for _, c := range s.Cuts {
		st.Cuts = append(st.Cuts, [2][]string{c.A, c.B})
	}
	var wg sync.WaitGroup
	for i, n := range s.Nodes {
		wg.Go(func() { st.Nodes[i] = l.nodeStatus(ctx, s, n) })
	}
	wg.Wait()
	return st, nil
}

func (l *Lab) nodeStatus(ctx context.Context, s *state, n *nodeState) NodeStatus {
	ns := NodeStatus{Name: n.Name, Addr: n.Addr.String(), Power: "off", Daemon: "none", Log: l.LogPath(n.Name)}
	switch {
	case n.On && n.Proc.alive():
		ns.Power, ns.Pid = "on", n.Proc.Pid
	case n.On:
		ns.Power = "died"
		return ns
	default:
		return ns
	}
	a, err := l.ask(ctx, n.Name, request{Op: "status"}, nil)
	if err != nil {
		ns.Why = err.Error()
		return ns
	}
	switch d := a.Daemon; {
	case d.Running:
		ns.Daemon = "running"
	case d.Started:
		ns.Daemon, ns.Exit = "ended", &d.Exit
		return ns
	default:
		return ns
	}
	if l.hooks.Healthy != nil {
		ctx, cancel := context.WithTimeout(ctx, healthTime)
		defer cancel()
		if err := l.hooks.Healthy(ctx, l, s.info(n, false, "")); err != nil {
			ns.Why = err.Error()
			if errs.Has(err, errs.Interrupted) {
				ns.Why = fmt.Sprintf("no answer within %v", healthTime)
			}
			return ns
		}
	}
	ns.Healthy = true
	return ns
}

// Print writes the status for people.
func (st *Status) Print(w io.Writer) error {
	half := ""
	if !st.Complete {
		half = "; half made (unum lab down --name " + st.Name + " removes it)"
	}
	fmt.Fprintf(w, "lab %s: %d nodes on %s, in %s%s\n", st.Name, len(st.Nodes), st.Subnet, st.Dir, half)
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "NODE\tADDRESS\tPOWER\tDAEMON\tHEALTH")
	for _, n := range st.Nodes {
		daemon, health := n.Daemon, "-"
		if n.Exit != nil {
			daemon = fmt.Sprintf("ended, code %d", *n.Exit)
		}
		if n.Healthy {
			health = "healthy"
		} else if n.Why != "" {
			health, _, _ = strings.Cut(n.Why, "\n")
		}
		fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%s\n", n.Name, n.Addr, n.Power, daemon, health)
	}
	if err := t.Flush(); err != nil {
		return err
	}
	for _, c := range st.Cuts {
		fmt.Fprintf(w, "cut: %s | %s\n", strings.Join(c[0], ","), strings.Join(c[1], ","))
	}
	for _, n := range slices.Sorted(maps.Keys(st.Delays)) {
		fmt.Fprintf(w, "delay: %s, %v each way\n", n, st.Delays[n])
	}
	return nil
}
