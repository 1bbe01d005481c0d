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

	// What one set sends does not reach the other.
	OneWayCuts [][2][]string   `json:"one_way_cuts,omitempty"`
	Links      map[string]Link `json:"links,omitempty"` // each way, by node
	// The delays of Links once more.
	Delays map[string]time.Duration `json:"delays_ns,omitempty"`
	// What is paused, by node: "node" or "daemon".
	Paused map[string]string `json:"paused,omitempty"`
	Clocks map[string]Clock  `json:"clocks,omitempty"` // by node
}

// NodeStatus is how a node is.
type NodeStatus struct {
	Name    string `json:"name"`
	Kind    Kind   `json:"kind"`
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
		Links: s.Links, Paused: s.Paused, Clocks: s.Clocks,
	}
	for _, c := range s.Cuts {
		list := &st.Cuts
		if c.OneWay {
			list = &st.OneWayCuts
		}
		*list = append(*list, [2][]string{c.A, c.B})
	}
	for n, k := range s.Links {
		if k.Delay > 0 {
			if st.Delays == nil {
				st.Delays = map[string]time.Duration{}
			}
			st.Delays[n] = k.Delay
		}
	}
	var wg sync.WaitGroup
	for i, n := range s.Nodes {
		wg.Go(func() { st.Nodes[i] = l.nodeStatus(ctx, s, n) })
	}
	wg.Wait()
	return st, nil
}

func (l *Lab) nodeStatus(ctx context.Context, s *state, n *nodeState) NodeStatus {
	ns := NodeStatus{Name: n.Name, Kind: n.Kind, Addr: n.Addr.String(), Power: "off", Daemon: "none", Log: l.LogPath(n.Name)}
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
	if what := s.Paused[n.Name]; what != "" {
		ns.Why = "paused: the " + what
		return ns
	}
	if l.hooks.Healthy != nil {
		ctx, cancel := context.WithTimeout(ctx, healthTime)
		defer cancel()
		if err := l.hooks.Healthy(ctx, l, s.info(n)); err != nil {
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
	fmt.Fprintln(t, "NODE\tKIND\tADDRESS\tPOWER\tDAEMON\tHEALTH")
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
		fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%s\t%s\n", n.Name, n.Kind, n.Addr, n.Power, daemon, health)
	}
	if err := t.Flush(); err != nil {
		return err
	}
	for _, c := range st.Cuts {
		fmt.Fprintf(w, "cut: %s | %s\n", strings.Join(c[0], ","), strings.Join(c[1], ","))
	}
	for _, c := range st.OneWayCuts {
		fmt.Fprintf(w, "cut: %s -> %s\n", strings.Join(c[0], ","), strings.Join(c[1], ","))
	}
	for _, n := range slices.Sorted(maps.Keys(st.Links)) {
		fmt.Fprintf(w, "link: %s, each way: %s\n", n, st.Links[n])
	}
	for _, n := range slices.Sorted(maps.Keys(st.Paused)) {
		fmt.Fprintf(w, "paused: %s, its %s\n", n, strings.Replace(st.Paused[n], pausedNode, "whole node", 1))
	}
	for _, n := range slices.Sorted(maps.Keys(st.Clocks)) {
		fmt.Fprintf(w, "clock: %s, %s\n", n, st.Clocks[n])
	}
	return nil
}
