// Command cluster measures the replicated groups and the record, and what the
// machine itself does in the same run. bench/cluster/run calls it; by itself:
//
//	cluster hosts -dir DIR -net PREFIX [-rounds 3]      latency and rates of three hosts
//	cluster idle -dir DIR -net PREFIX -groups 50        processor time of three idle hosts
//	cluster death -dir DIR -net PREFIX -rounds 15       a leader's line is cut and it is killed
//	cluster disk -dir DIR                               append 4 KiB and fdatasync
//	cluster echo -listen ADDR                           answers rtt
//	cluster rtt -to ADDR                                a byte there and back over TCP
//	cluster product -socket PATH                        Record.Put and Record.Get of a daemon
//	cluster gap -socket PATH                            how long no Put is acknowledged; see gap.go
//	cluster leader -socket PATH                         the node that leads the record
//	cluster usage -seconds 30 PID...                    processor time, wake-ups, memory
//
// hosts, idle and death start three processes of `cluster host` in the network
// namespaces PREFIX1 to PREFIX3, which the script makes; without -net all listen
// on the loopback.
package main

import (
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"sort"
	"strconv"
	"time"
)

// verb is one of the words above.
type verb func(fs *flag.FlagSet) func() error

var verbs = map[string]verb{
	"hosts": hostsVerb, "idle": idleVerb, "death": deathVerb, "host": hostVerb, "disk": diskVerb, "echo": echoVerb,
	"rtt": rttVerb, "product": productVerb, "gap": gapVerb, "leader": leaderVerb, "usage": usageVerb,
}

func main() {
	if len(os.Args) < 2 || verbs[os.Args[1]] == nil {
		var names []string
		for n := range verbs {
			names = append(names, n)
		}
		sort.Strings(names)
		fmt.Fprintln(os.Stderr, "usage: cluster VERB [flags], VERB one of", names)
		os.Exit(2)
	}
	fs := flag.NewFlagSet(os.Args[1], flag.ExitOnError)
	run := verbs[os.Args[1]](fs)
	fs.Parse(os.Args[2:])
	if err := run(); err != nil {
		fmt.Fprintf(os.Stderr, "cluster %s: %v\n", os.Args[1], err)
		os.Exit(1)
	}
}

func diskVerb(fs *flag.FlagSet) func() error {
	dir := fs.String("dir", ".", "on the disk to be measured")
	n := fs.Int("n", 2000, "rounds")
	return func() error {
		r, err := syncs(*dir, *n)
		return show(r, err)
	}
}

func echoVerb(fs *flag.FlagSet) func() error {
	addr := fs.String("listen", ":7999", "address")
	return func() error { return echo(*addr) }
}

func rttVerb(fs *flag.FlagSet) func() error {
	to := fs.String("to", "", "address of an echo")
	n := fs.Int("n", 5000, "rounds")
	return func() error {
		r, err := trips(*to, *n)
		return show(r, err)
	}
}

func usageVerb(fs *flag.FlagSet) func() error {
	d := fs.Duration("time", 30*time.Second, "how long")
	return func() error {
		var was []usage
		for _, a := range fs.Args() {
			pid, err := strconv.Atoi(a)
			if err != nil {
				return err
			}
			u, err := usageOf(pid)
			if err != nil {
				return err
			}
			was = append(was, u)
		}
		time.Sleep(*d) // the measurement itself
		for _, w := range was {
			u, err := usageOf(w.Pid)
			if err != nil {
				return err
			}
			fmt.Printf("%d: %s\n", w.Pid, u.since(w))
		}
		return nil
	}
}

// show prints a result as a line of JSON.
func show(r any, err error) error {
	if err != nil {
		return err
	}
	return json.NewEncoder(os.Stdout).Encode(r)
}
