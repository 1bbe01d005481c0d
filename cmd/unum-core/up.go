package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/unum-os/unum/internal/config"
	"github.com/unum-os/unum/internal/control"
	"github.com/unum-os/unum/internal/control/cli"
	"github.com/unum-os/unum/internal/daemon"
	"github.com/unum-os/unum/internal/errs"
	"github.com/unum-os/unum/internal/ids"
	"github.com/unum-os/unum/internal/node"
	"github.com/unum-os/unum/internal/record"
)

// defaultLog is where a node in the background logs.
const defaultLog = "/var/log/unum/unum.log"

// pidPath is the daemon's pid file, beside its socket.
func pidPath() string { return strings.TrimSuffix(control.Path(), ".sock") + ".pid" }

// starting is what up and join are told: the settings, and how to run.
type starting struct {
	file   string
	flags  config.Flags
	detach bool
	log    string
	wait   config.Duration
	lost   string      // of up --without
	role   record.Role // to become; 0: what the directory or the token says
}

// startWait is the default of --wait of up and join: longer than an election and
// a mount, shorter than a person's patience.
const startWait = time.Minute

// nodeFlags are the flags of up and join.
func nodeFlags(cmd *cobra.Command, s *starting) {
	fileFlag(cmd, &s.file)
	for _, f := range s.flags.List() {
		cmd.Flags().Var(f, f.Name(), f.Help())
	}
	s.wait = config.Duration(startWait)
	cmd.Flags().BoolVarP(&s.detach, "detach", "d", false, "run in the background; return when the node is healthy")
	cmd.Flags().StringVar(&s.log, "log-file", defaultLog, "with -d: where it logs")
	cmd.Flags().Var(&s.wait, "wait", "with -d: how long to wait until it is healthy")
}

func fileFlag(cmd *cobra.Command, file *string) {
	cmd.Flags().StringVar(file, "config", config.DefaultFile, "the file with the settings; \"\" for none")
	_ = cmd.MarkFlagFilename("config", "toml") // fails only if there is no such flag
}

// check says what this machine lacks to be a node that stores, before anything is
// made. The others need nothing but their directory.
func check(role record.Role) error {
	if role == record.RoleWitness || role == record.RoleClient {
		return nil
	}
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
	if err := tryJob(context.Background()); err != nil {
		return errs.E(errs.Permission, "start a node", "", "this root may neither mount nor make namespaces: %v", err).
			WithRemedy("in a container, run it with --privileged")
	}
	return nil
}

// tryJob starts something as a job is started, which says more than a list of
// capabilities: what a job is started with, and the right to mount with it.
func tryJob(ctx context.Context) error {
	try := exec.CommandContext(ctx, os.Getenv("UNUM_EXE"), "run", "--help")
	try.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNS | unix.CLONE_NEWPID | unix.CLONE_NEWIPC}
	return try.Run()
}

// load reads the settings and checks that this machine can be a node. Nothing is
// made yet.
func (s *starting) load() (node.Config, error) {
	if s.file != "" { // in the background the directory is another
		abs, err := filepath.Abs(s.file)
		if err != nil {
			return node.Config{}, err
		}
		s.file = abs
	}
	l, err := config.Load(s.file, &s.flags)
	if err != nil {
		return node.Config{}, err
	}
	var lost ids.Node
	if s.lost != "" {
		if lost, err = ids.ParseNode(s.lost); err != nil {
			return node.Config{}, err
		}
	}
	c := node.Config{Without: lost, Role: s.role, Dir: l.Dir, Mount: l.Mount, Addr: l.Addr, Share: l.Share, Metrics: l.Metrics, Labels: l.Labels,
		Settings: l.Values(), Build: version(), Socket: control.Path(), Log: logger(l.Settings), ClockFile: os.Getenv("UNUM_CLOCK_FILE")}
	if c.Hostname, err = os.Hostname(); err != nil {
		return c, err
	}
	if c.Exe = os.Getenv("UNUM_EXE"); c.Exe == "" {
		return c, errs.E(errs.Invalid, "start a node", "", "UNUM_EXE is not set: the core is started by the unum binary")
	}
	role := s.role
	if is, err := node.RoleIn(c); err == nil { // else whoever reads the directory next says what is wrong
		role = is
	}
	return c, check(role)
}

func logger(s config.Settings) *slog.Logger {
	o := &slog.HandlerOptions{Level: s.LogLevel}
	if s.LogFormat == "json" {
		return slog.New(slog.NewJSONHandler(os.Stderr, o))
	}
	return slog.New(slog.NewTextHandler(os.Stderr, o))
}

// hold takes the pid file for what do does, and gives it back after.
func hold(do func() error) error {
	pf, err := daemon.Lock(pidPath())
	if err != nil {
		return err
	}
	err = do()
	return errors.Join(err, pf.Release())
}

// serve runs the node in the foreground, and tells the supervisor, if there is
// one. A person reads news, if there is any, when the node is healthy.
func serve(ctx context.Context, c node.Config, super daemon.Notifier, news string) error {
	n, err := node.Open(c)
	if err != nil {
		return err
	}
	tell := func(lines ...string) {
		if err := super.Tell(lines...); err != nil {
			c.Log.Warn("the supervisor was not told", "err", err)
		}
	}
	done := make(chan error, 1)
	go func() { done <- n.Run(ctx) }()
	go func() {
		if waitHealthy(ctx, c.Socket, func(why string) { tell("STATUS=" + why) }) == nil {
			tell("READY=1", "STATUS=healthy")
			if news != "" {
				fmt.Println(news)
			}
			fmt.Println(greeting(c))
		}
	}()
	stop := context.AfterFunc(ctx, func() { tell("STOPPING=1") })
	defer stop()
	if err = <-done; err != nil {
		return err
	}
	// A supervisor ends a node by SIGTERM, and that is no failure.
	if cause := context.Cause(ctx); !errors.Is(cause, signalled(syscall.SIGTERM)) {
		return cause
	}
	return nil
}

// greeting is what a person reads when a node is healthy.
func greeting(c node.Config) string {
	switch role, _ := node.RoleIn(c); role { // a healthy node has one
	case record.RoleWitness:
		return "unum: this machine is a witness of its cluster"
	case record.RoleClient:
		return "unum: this machine is a client node of its cluster; its users type `unum login`"
	}
	return fmt.Sprintf("unum: %s is mounted\nto add a machine, type `unum token` here and what it prints there", c.Mount)
}

// askHealthy returns nil when the daemon behind the socket is healthy.
func askHealthy(ctx context.Context, sock string) error {
	return cli.Healthy(ctx, sock)
}

// lookLimit bounds one question to a daemon that starts whether it is healthy.
const lookLimit = 2 * time.Second

// waitHealthy waits until the daemon is healthy, and tells each new reason why it
// is not.
func waitHealthy(ctx context.Context, sock string, tell func(why string)) error {
	last := ""
	for {
		cctx, cancel := context.WithTimeout(ctx, lookLimit)
		err := askHealthy(cctx, sock)
		cancel()
		if err == nil {
			return nil
		}
		if why, _, _ := strings.Cut(err.Error(), "\n"); why != last && ctx.Err() == nil {
			last = why
			tell(why)
		}
		select {
		case <-time.After(50 * time.Millisecond):
		case <-ctx.Done():
			return err
		}
	}
}

// background starts the node that is in c.Dir, or a new one, as a process of its
// own.
func (s *starting) background(ctx context.Context, c node.Config) error {
	argv := append([]string{c.Exe, "up", "--config", s.file}, s.flags.Args()...)
	if s.lost != "" {
		argv = append(argv, "--without", s.lost)
	}
	pid, err := daemon.Start(ctx, daemon.Spec{Argv: argv, Env: os.Environ(), Log: s.log, Wait: time.Duration(s.wait), Tell: os.Stderr,
		Healthy: func(ctx context.Context) error { return askHealthy(ctx, c.Socket) }})
	if errs.Has(err, errs.Timeout) {
		fmt.Fprintf(os.Stderr, "unum: %v\n", err)
		return coded(1)
	}
	if err != nil {
		if pid > 0 {
			fmt.Fprintf(os.Stderr, "unum: process %d goes on in the background\n", pid)
		}
		return err
	}
	fmt.Printf("%s\nprocess %d, log %s\n", greeting(c), pid, s.log)
	return nil
}

// exitCodes is said of up and join.
const exitCodes = `
In the foreground it ends with code 0 after SIGTERM and 128+n after another
signal. With -d: 0 when the node is healthy, 1 when it runs but is not healthy
in time, 125 when it does not run.`

// without is said of up.
const without = `
Of two nodes without a witness each has everything, but one alone must not
write: it cannot know that the other does not. If the other is lost for good,
--without says so: this node goes on alone, nothing is lost, and the other is
refused from then on. Bring it back as a new one: empty its directory, unum join.
`

func upCommand() *cobra.Command {
	var s starting
	cmd := &cobra.Command{
		Use:     "up",
		Short:   "Start this machine as a node; the first time, as a cluster of one",
		Long:    "Start this machine as a node; the first time, as a cluster of one.\n" + without + exitCodes,
		Example: "  unum up\n  unum up -d\n  unum up --without n2\n  unum up --dir /srv/unum --labels place=attic,failure-domain=rack1",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			super := daemon.NewNotifier()
			c, err := s.load()
			if err != nil {
				return err
			}
			if s.detach {
				if err := hold(func() error { return nil }); err != nil { // a plain word rather than a log's
					return err
				}
				return s.background(cmd.Context(), c)
			}
			return hold(func() error {
				if was, err := node.Exists(c.Dir); err != nil {
					return err
				} else if !was && c.Without != 0 {
					return errs.E(errs.NotFound, "go on alone", c.Dir, "there is no node here").WithRemedy("give its directory by --dir; where there is none, unum up without --without makes a new cluster, unum join ADDR TOKEN joins one")
				} else if !was {
					if err := node.Found(c); err != nil {
						return err
					}
					return serve(cmd.Context(), c, super, "unum: this machine was no node: it is a new cluster of its own now (to join another: unum down, remove "+c.Dir+", unum join)")
				}
				return serve(cmd.Context(), c, super, "")
			})
		},
	}
	nodeFlags(cmd, &s)
	cmd.Flags().StringVar(&s.lost, "without", "", "the other one of two nodes, which is lost for good")
	return cmd
}

// maxTokenInput bounds what is read as a token, in bytes: 90, and room for
// spaces and line breaks in it.
const maxTokenInput = 4096

func joinCommand() *cobra.Command {
	var client bool
	cmd := joining(func() record.Role {
		if client {
			return record.RoleClient
		}
		return 0
	})
	cmd.Use = "join ADDR TOKEN"
	cmd.Short = "Make this machine a node of the cluster of which ADDR is a node"
	cmd.Long = "Make this machine a node of the cluster of which ADDR is a node, and start it.\nTOKEN may be -, then it is read from standard input.\n" + exitCodes
	cmd.Example = "  unum join alpha:7400 TOKEN\n  unum join -d alpha:7400 TOKEN\n  unum join --client alpha:7400 TOKEN\n  unum token --quiet | ssh beta unum join alpha:7400 -"
	cmd.Flags().BoolVar(&client, "client", false, "as a client node: it uses the cluster, stores nothing, and is trusted with nothing of others")
	return cmd
}

func witnessCommand() *cobra.Command {
	cmd := joining(func() record.Role { return record.RoleWitness })
	cmd.Use = "witness ADDR TOKEN"
	cmd.Short = "Make this machine the witness of two: a vote, so that any one of the three may die"
	cmd.Long = `Make this machine a witness in the cluster of which ADDR is a node, and start it.
A witness votes and keeps the latest of the logs (at most 1 GiB a group), no
files: where two nodes store, either of them, or the witness, may then die and
the rest goes on. It needs no FUSE, only a directory of its own and its port.
Where three or more nodes store it sits idle. Later starts are unum up.
TOKEN may be -, then it is read from standard input.
` + exitCodes
	cmd.Example = "  unum witness alpha:7400 TOKEN\n  unum witness -d --dir /srv/unum alpha:7400 TOKEN"
	return cmd
}

// joining is a verb that makes this machine a member and starts it.
func joining(role func() record.Role) *cobra.Command {
	var s starting
	var repair bool
	cmd := &cobra.Command{
		Args: cobra.ExactArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			super := daemon.NewNotifier()
			s.role = role()
			c, err := s.load()
			if err != nil {
				return err
			}
			c.Repair = repair
			token := args[1]
			if token == "-" {
				b, err := io.ReadAll(io.LimitReader(os.Stdin, maxTokenInput))
				if err != nil {
					return errs.Wrap(err, "read the token", "standard input")
				}
				token = string(b)
			}
			if s.detach {
				if err := hold(func() error { return join(cmd.Context(), c, args[0], token) }); err != nil {
					return err
				}
				return s.background(cmd.Context(), c)
			}
			return hold(func() error {
				if err := join(cmd.Context(), c, args[0], token); err != nil {
					return err
				}
				return serve(cmd.Context(), c, super, "")
			})
		},
	}
	nodeFlags(cmd, &s)
	cmd.Flags().BoolVar(&repair, "repair", false, "set a damaged node that is here aside first; its blocks are kept")
	return cmd
}

const (
	// joinLimit is how long a machine that wants to join knocks: longer than an
	// election there, and than a start of the node it asks.
	joinLimit = 30 * time.Second
	// joinAgain is how long it waits between two attempts.
	joinAgain = 300 * time.Millisecond
	// joinQuiet is how long it does so without a word.
	joinQuiet = 2 * time.Second
)

// join is repeated while the other does not answer yet, and says so when
// that takes long.
func join(ctx context.Context, c node.Config, addr, token string) error {
	return knock(ctx, os.Stderr, joinLimit, joinQuiet, addr, func(ctx context.Context) error { return node.Join(ctx, c, addr, token) })
}

func knock(ctx context.Context, out io.Writer, limit, quiet time.Duration, addr string, try func(ctx context.Context) error) error {
	lctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	said := make(chan struct{})
	tell := time.AfterFunc(quiet, func() {
		defer close(said)
		fmt.Fprintf(out, "unum: waiting for %s, which does not answer yet (%v at most; Ctrl-C ends it) ...\n", addr, limit)
	})
	defer func() {
		if !tell.Stop() {
			<-said // nothing is written after it has returned
		}
	}()
	for {
		err := try(lctx)
		again := errs.Has(err, errs.Unavailable) || errs.Has(err, errs.NoQuorum) || errs.Has(err, errs.Timeout) // one attempt has a limit of its own
		if again && lctx.Err() == nil {
			select {
			case <-time.After(joinAgain):
				continue
			case <-lctx.Done():
			}
		}
		if ctx.Err() == nil && (errs.Has(err, errs.Unavailable) || errs.Has(err, errs.Timeout)) {
			return silent(err, addr)
		}
		return err
	}
}

// silent says what to look at when nobody has answered at addr.
func silent(err error, addr string) error {
	for e := err; e != nil; e = errors.Unwrap(e) {
		if has, is := e.(*errs.Error); is && has.Remedy != "" {
			return err
		}
	}
	port := "port 7400"
	if _, p, err := net.SplitHostPort(addr); err == nil {
		port = "port " + p
	}
	return (&errs.Error{Class: errs.ClassOf(err), Err: err}).
		WithRemedy("see that this is the address (unum token there prints it), that %s is open to this machine, and that unum status there says healthy", port)
}
