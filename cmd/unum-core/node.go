package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/unum-os/unum/internal/control"
	"github.com/unum-os/unum/internal/control/cli"
	"github.com/unum-os/unum/internal/errs"
	"github.com/unum-os/unum/internal/lab"
	"github.com/unum-os/unum/internal/node"
)

// nodeFlags are the flags of up and join.
func nodeFlags(cmd *cobra.Command, c *node.Config) {
	f := cmd.Flags()
	f.StringVar(&c.Dir, "dir", "/var/lib/unum", "the node's data")
	f.StringVar(&c.Mount, "mount", "/unum", "where the tree appears")
	f.StringVar(&c.Addr, "addr", "", "host:port at which other nodes reach this one (default: found out, port 7400)")
	f.Float64Var(&c.Share, "share", 0, "this node's part, 0 to 1, of a machine that several nodes share (0: all of it)")
	c.Socket = control.Path()
}

// check says what this machine lacks to be a node, before anything is made.
func check() error {
	if os.Geteuid() != 0 {
		return errs.E(errs.Permission, "start a node", "", "root is needed, to mount the tree and to run commands as their users").WithRemedy("sudo unum %s", strings.Join(os.Args[1:], " "))
	}
	f, err := os.OpenFile("/dev/fuse", os.O_RDWR, 0)
	if err != nil {
		return errs.E(errs.NotSupported, "start a node", "/dev/fuse", "%v", err).WithRemedy("modprobe fuse, or a kernel with FUSE")
	}
	if err := f.Close(); err != nil {
		return err
	}
	// A try says more than a list of capabilities: what a job is started with,
	// and the right to mount with it.
	try := exec.Command(os.Getenv("UNUM_EXE"), "run", "--help")
	try.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNS | unix.CLONE_NEWPID | unix.CLONE_NEWIPC}
	if err := try.Run(); err != nil {
		return errs.E(errs.Permission, "start a node", "", "this root may neither mount nor make namespaces: %v", err).
			WithRemedy("in a container, run it with --privileged")
	}
	return nil
}

func fill(c *node.Config) error {
	c.Log = slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelInfo}))
	var err error
	if c.Hostname, err = os.Hostname(); err != nil {
		return err
	}
	if c.Exe = os.Getenv("UNUM_EXE"); c.Exe == "" {
		return errs.E(errs.Invalid, "start a node", "", "UNUM_EXE is not set: the core is started by the unum binary")
	}
	return check()
}

// serve runs the node in the foreground.
func serve(ctx context.Context, c node.Config, greet bool) error {
	n, err := node.Open(c)
	if err != nil {
		return err
	}
	done := make(chan error, 1)
	go func() { done <- n.Run(ctx) }()
	if greet {
		go func() {
			if waitHealthy(ctx, c.Socket) == nil {
				fmt.Printf("unum: %s is mounted\nto add a machine, type `unum token` here and what it prints there\n", c.Mount)
			}
		}()
	}
	if err = <-done; err != nil {
		return err
	}
	// A supervisor ends a node by SIGTERM, and that is no failure.
	if cause := context.Cause(ctx); !errors.Is(cause, signalled(syscall.SIGTERM)) {
		return cause
	}
	return nil
}

func waitHealthy(ctx context.Context, sock string) error {
	for {
		cctx, cancel := context.WithTimeout(ctx, 2*time.Second)
		err := cli.Call(cctx, sock, node.VerbHealthy, nil, nil)
		cancel()
		if err == nil {
			return nil
		}
		select {
		case <-time.After(50 * time.Millisecond):
		case <-ctx.Done():
			return err
		}
	}
}

func upCommand() *cobra.Command {
	var c node.Config
	cmd := &cobra.Command{
		Use:     "up",
		Short:   "Start this machine as a node; the first time, as a cluster of one",
		Example: "  unum up\n  unum up --dir /srv/unum --mount /unum",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := fill(&c); err != nil {
				return err
			}
			if was, err := node.Exists(c.Dir); err != nil {
				return err
			} else if !was {
				if err := node.Found(c); err != nil {
					return err
				}
			}
			return serve(cmd.Context(), c, true)
		},
	}
	nodeFlags(cmd, &c)
	return cmd
}

// maxTokenInput bounds what is read as a token, in bytes: 90, and room for
// spaces and line breaks in it.
const maxTokenInput = 4096

func joinCommand() *cobra.Command {
	var c node.Config
	cmd := &cobra.Command{
		Use:     "join ADDR TOKEN",
		Short:   "Make this machine a node of the cluster of which ADDR is a node",
		Long:    "Make this machine a node of the cluster of which ADDR is a node, and start it.\nTOKEN may be -, then it is read from standard input.",
		Example: "  unum join alpha:7400 TOKEN\n  unum token --quiet | ssh beta unum join alpha:7400 -",
		Args:    cobra.ExactArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := fill(&c); err != nil {
				return err
			}
			token := args[1]
			if token == "-" {
				b, err := io.ReadAll(io.LimitReader(os.Stdin, maxTokenInput))
				if err != nil {
					return errs.Wrap(err, "read the token", "standard input")
				}
				token = string(b)
			}
			// Joining is repeated while the other does not answer yet.
			ctx, cancel := context.WithTimeout(cmd.Context(), 30*time.Second)
			defer cancel()
			for {
				err := node.Join(ctx, c, args[0], token)
				if err == nil {
					break
				}
				if !errs.Has(err, errs.Unavailable) && !errs.Has(err, errs.NoQuorum) || ctx.Err() != nil {
					return err
				}
				select {
				case <-time.After(300 * time.Millisecond):
				case <-ctx.Done():
					return err
				}
			}
			return serve(cmd.Context(), c, true)
		},
	}
	nodeFlags(cmd, &c)
	return cmd
}

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
					"healthy": st.Problem == "", "problem": st.Problem, "nodes": toJSON(st)}); err != nil {
					return err
				}
			} else {
				fmt.Printf("cluster %s, seen from %v; the tree is at %s\n", st.Cluster, st.Node, st.Mount)
				if err := table(st); err != nil {
					return err
				}
				if st.Problem != "" {
					fmt.Printf("not healthy: %s\n", st.Problem)
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

// doctorCommand says what this machine lacks.
func doctorCommand() *cobra.Command {
	var asJSON bool
	type finding struct {
		What   string `json:"what"`
		OK     bool   `json:"ok"`
		Detail string `json:"detail"`
		Remedy string `json:"remedy,omitempty"`
	}
	cmd := &cobra.Command{
		Use: "doctor", Short: "Say what this machine lacks, what then does not work, and what to type",
		Long: "Say what this machine lacks. Exit code 1 if something needed is missing.", Example: "  unum doctor\n  unum doctor --json", Args: cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			var fs []finding
			add := func(what string, ok bool, detail, remedy string) {
				if ok {
					remedy = ""
				}
				fs = append(fs, finding{what, ok, detail, remedy})
			}
			add("root", os.Geteuid() == 0, fmt.Sprintf("uid %d; needed to start a node, not to use one", os.Geteuid()), "sudo unum up")
			_, err := os.Stat("/dev/fuse")
			add("/dev/fuse", err == nil, "the tree is mounted through it", "modprobe fuse")
			var u unix.Utsname
			err = unix.Uname(&u)
			add("kernel", err == nil, "Linux "+unix.ByteSliceToString(u.Release[:]), "")
			_, err = os.Stat("/sys/fs/cgroup")
			entries, _ := os.ReadDir("/sys/fs/cgroup")
			add("control groups", err == nil && len(entries) > 0, "without them jobs are not accounted for", "mount -t cgroup2 none /sys/fs/cgroup")
			for _, tool := range []string{"ip", "tc", "mkfs.ext4"} {
				p, err := exec.LookPath(tool)
				add(tool, err == nil, "needed by `unum lab` only "+p, "apt-get install iproute2 e2fsprogs")
			}
			ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
			defer cancel()
			err = cli.Call(ctx, control.Path(), node.VerbHealthy, nil, nil)
			detail := "answers and is healthy"
			if err != nil {
				detail, _, _ = strings.Cut(err.Error(), "\n") // the remedy is given below
			}
			add("daemon", err == nil, detail, "unum up")
			bad := false
			for _, f := range fs {
				bad = bad || !f.OK
			}
			if asJSON {
				if err := printJSON(fs); err != nil {
					return err
				}
			} else {
				for _, f := range fs {
					mark := "ok  "
					if !f.OK {
						mark = "LACK"
					}
					fmt.Printf("%s  %s: %s\n", mark, f.What, f.Detail)
					if f.Remedy != "" {
						fmt.Printf("      try: %s\n", f.Remedy)
					}
				}
			}
			if bad {
				return coded(1)
			}
			return nil
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "as JSON")
	return cmd
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
			common := []string{"--addr", n.Addr.String() + ":7400", "--dir", n.DataDir, "--mount", n.Mount, "--share", "0.34"}
			if n.Fresh && !n.First {
				return append([]string{exe, "join", n.Peer.String() + ":7400", n.Token}, common...)
			}
			return append([]string{exe, "up"}, common...)
		},
		Healthy: func(ctx context.Context, l *lab.Lab, n lab.Node) error {
			_, err := run(ctx, l, n.Name, "status", "--healthy")
			return err
		},
		Token: func(ctx context.Context, l *lab.Lab) (string, error) {
			return run(ctx, l, "n1", "token", "--quiet", "--uses", "64", "--expires", "1h")
		},
	}
}
