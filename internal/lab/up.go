package lab

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/unum-os/unum/internal/errs"
)

// Up makes a lab and returns when every node is healthy. If it fails or ctx ends
// it removes what it made (unless cfg.Keep), and the error says why.
func Up(ctx context.Context, cfg Config) (*Lab, error) {
	if err := cfg.fill(); err != nil {
		return nil, err
	}
	if err := preflight(); err != nil {
		return nil, err
	}
	exists := func() error {
		return errs.E(errs.Exists, "lab up", cfg.Name, "there is a lab of this name, whole or half made").
			WithRemedy("unum lab down --name %s, or choose another --name", cfg.Name)
	}
	if _, err := readPointer(cfg.Name); err == nil {
		return nil, exists()
	}
	ctx, cancel := context.WithTimeoutCause(ctx, cfg.Timeout,
		errs.E(errs.Timeout, "lab up", cfg.Name, "not healthy after %v", cfg.Timeout))
	defer cancel()
	unlock, err := lockDir(ctx, runDir(cfg.Name))
	if err != nil {
		return nil, err
	}
	defer unlock()
	if _, err := os.Stat(pointerPath(cfg.Name)); err == nil {
		return nil, exists()
	}
	l := &Lab{name: cfg.Name, dir: cfg.Dir, hooks: cfg.Hooks}
	if ents, err := os.ReadDir(cfg.Dir); err == nil && len(ents) > 0 {
		_ = unix.Rmdir(runDir(cfg.Name)) // made by the lock
		return nil, errs.E(errs.NotEmpty, "lab up", cfg.Dir, "the directory has something in it already")
	}
	s, err := l.build(ctx, &cfg)
	if err == nil {
		return l, nil
	}
	if cause := context.Cause(ctx); cause != nil && ctx.Err() != nil && !errs.Has(err, errs.Timeout) {
		if errs.ClassOf(cause) == errs.Unknown {
			cause = errs.E(errs.Interrupted, "lab up", cfg.Name, "%w", cause)
		}
		err = fmt.Errorf("%w\n%v", cause, err)
	}
	if cfg.Keep {
		return nil, err
	}
	if derr := l.remove(s); derr != nil {
		err = fmt.Errorf("%w\nand cleaning up failed: %v", err, derr)
	}
	return nil, err
}

// reached is called at the stages of making; tests end the process there.
var reached = func(stage string) {}

// build makes everything. The state it returns, also with an error, may be nil.
func (l *Lab) build(ctx context.Context, cfg *Config) (*state, error) {
	say := sayTo(cfg.Progress, time.Now())
	ptr := pointer{Dir: cfg.Dir}
	reached("lock")
	if err := writeJSON(pointerPath(cfg.Name), ptr); err != nil {
		return nil, err
	}
	reached("pointer")
	err := mkdirs(cfg.Dir, func(made []string) error {
		ptr.MadeDir = made
		return writeJSON(pointerPath(cfg.Name), ptr)
	})
	if err != nil {
		return nil, err
	}
	subnet, err := freeSubnet(cfg.Name)
	if err != nil {
		return nil, err
	}
	self, err := identify(os.Getpid())
	if err != nil {
		return nil, errs.Wrap(err, "lab up", cfg.Name)
	}
	s := &state{
		Version: stateVersion, Name: cfg.Name, Dir: cfg.Dir, Creator: self,
		DataDir: cfg.DataDir, Mount: cfg.Mount, DiskSize: cfg.DiskSize, Subnet: subnet, Loops: loopsBefore(cfg.Name),
	}
	if err := s.save(); err != nil {
		return s, err
	}
	reached("state")
	if err := os.Mkdir(filepath.Join(s.Dir, "logs"), 0o755); err != nil {
		return s, errs.Wrap(err, "lab up", s.Dir)
	}
	if err := os.WriteFile(filepath.Join(s.Dir, "hosts"), []byte("127.0.0.1 localhost\n::1 localhost\n"), 0o644); err != nil {
		return s, errs.Wrap(err, "lab up", s.Dir)
	}
	for _, p := range []string{s.DataDir, s.Mount} {
		if err := makeShared(ctx, p); err != nil {
			return s, err
		}
	}

	reached("directories")
	if err := s.power(ctx, s.grow(cfg.kinds())); err != nil {
		return s, err
	}
	say("%d nodes have power: network %s, disks of %d MiB", len(s.Nodes), s.Subnet, s.DiskSize>>20)
	reached("power")
	// One after the other, so that the cluster names them as the lab does.
	token := Node{}
	for i, n := range s.Nodes {
		info := s.info(n)
		if i == 1 {
			guest := []Node{info}
			if err := l.invite(ctx, s, guest); err != nil {
				return s, err
			}
			token = guest[0]
		}
		info.Peer, info.Token = token.Peer, token.Token
		if err := l.startDaemon(ctx, info); err != nil {
			return s, err
		}
		if err := l.waitHealthy(ctx, info); err != nil {
			return s, err
		}
		n.Fresh = false
		say("%s is healthy", n.Name)
	}
	reached("healthy")
	s.Complete = true
	return s, s.save()
}

// startDaemon starts the node's daemon; its output goes to the node's log.
func (l *Lab) startDaemon(ctx context.Context, n Node) error {
	log, err := os.OpenFile(l.LogPath(n.Name), os.O_WRONLY|os.O_APPEND|os.O_CREATE, 0o644)
	if err != nil {
		return errs.Wrap(err, "lab: start", n.Name)
	}
	defer log.Close()
	null, err := os.Open(os.DevNull)
	if err != nil {
		return errs.Wrap(err, "lab: start", n.Name)
	}
	defer null.Close()
	out := int(log.Fd())
	env := slices.DeleteFunc(os.Environ(), func(e string) bool { return strings.HasPrefix(e, ClockEnv+"=") })
	env = append(env, ClockEnv+"="+clockPath(l.dir, n.Name))
	_, err = l.ask(ctx, n.Name, request{Op: "daemon", Argv: l.hooks.Daemon(n), Env: env, Dir: "/"}, []int{int(null.Fd()), out, out})
	reached("daemon")
	return err
}

// waitHealthy asks until the node is healthy, its daemon has ended, or ctx has.
func (l *Lab) waitHealthy(ctx context.Context, n Node) error {
	tick := time.NewTicker(healthPoll)
	defer tick.Stop()
	var last error
	for {
		a, err := l.ask(ctx, n.Name, request{Op: "status"}, nil)
		if ctx.Err() == nil {
			if err != nil {
				return err
			}
			if !a.Daemon.Running {
				return errs.E(errs.Unavailable, "lab: start", n.Name, "the daemon ended with code %d; the end of its log:\n%s", a.Daemon.Exit, l.logTail(n.Name))
			}
			if l.hooks.Healthy == nil {
				return nil
			}
			one, cancel := context.WithTimeout(ctx, askTime)
			err = l.hooks.Healthy(one, l, n)
			cancel()
			if err == nil {
				return nil
			}
			if ctx.Err() == nil {
				last = err
			}
		}
		select {
		case <-ctx.Done():
			c := errs.Interrupted
			if ctx.Err() == context.DeadlineExceeded {
				c = errs.Timeout
			}
			if last == nil {
				last = ctx.Err()
			}
			return errs.E(c, "lab: start", n.Name, "not healthy yet: %v; the end of its log:\n%s", last, l.logTail(n.Name))
		case <-tick.C:
		}
	}
}

// logTail returns the last lines of node's log, for people.
func (l *Lab) logTail(node string) string {
	b, err := os.ReadFile(l.LogPath(node))
	if err != nil {
		return err.Error()
	}
	lines := strings.Split(strings.TrimRight(string(b), "\n"), "\n")
	return "    " + strings.Join(lines[max(0, len(lines)-15):], "\n    ")
}

// Start powers nodes on, with the disks they had, and starts their daemons; in a
// node that has power but whose daemon ended, the daemon alone. It then waits
// until they are healthy, unless they cannot be: with a cut in force, or without
// power on most nodes of the lab, paused ones among them.
func (l *Lab) Start(ctx context.Context, nodes ...string) error {
	return l.start(ctx, nodes, true)
}

// StartNoWait does as Start, and does not wait for health.
func (l *Lab) StartNoWait(ctx context.Context, nodes ...string) error {
	return l.start(ctx, nodes, false)
}

func (l *Lab) start(ctx context.Context, nodes []string, wait bool) error {
	ctx, cancel := context.WithTimeout(ctx, defaultTimeout)
	defer cancel()
	err := l.change(ctx, func(s *state) error {
		if err := s.whole("lab start"); err != nil {
			return err
		}
		hit, err := s.pick("lab start", nodes)
		if err != nil {
			return err
		}
		off := slices.DeleteFunc(hit, func(n *nodeState) bool { return n.On && n.Proc.alive() })
		for _, n := range off {
			if err := s.clear(n); err != nil { // one that died by itself may still be going
				return err
			}
			delete(s.Paused, n.Name)
		}
		if len(off) > 0 {
			if err := s.boot(ctx, off, nil); err != nil {
				return err
			}
		}
		wait = wait && s.canBeHealthy()
		return nil
	})
	if err != nil {
		return err
	}
	return l.join(ctx, nodes, wait, func(string, ...any) {})
}

// canBeHealthy reports whether nodes that are started can become healthy: more
// than half of those that are the cluster go, or there is no cluster yet.
func (s *state) canBeHealthy() bool {
	going, all := 0, 0
	for _, n := range s.Nodes {
		if n.Kind == Client || n.Fresh {
			continue
		}
		all++
		if n.On && n.Proc.alive() && s.Paused[n.Name] == "" {
			going++
		}
	}
	return len(s.Cuts) == 0 && (2*going > all || all == 0)
}
