package lab

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/unum-os/unum/internal/errs"
)

// AddOptions say which nodes are to be added to a lab.
type AddOptions struct {
	Count    int           // 0: one
	Kind     Kind          // "": Store
	Parallel bool          // start all at the same time, not one after the other
	NoWait   bool          // do not wait for their health
	Timeout  time.Duration // for all of it; 0: the same as Up
	Progress io.Writer     // nil: none
}

// Add gives the lab more nodes and returns their names, in order, when they are
// healthy. If they cannot get power they are removed again; one that does not
// become healthy stays as it is, and the error says why.
func (l *Lab) Add(ctx context.Context, o AddOptions) ([]string, error) {
	if o.Count == 0 {
		o.Count = 1
	}
	if o.Kind == "" {
		o.Kind = Store
	}
	if o.Count < 0 || o.Count > MaxNodes {
		return nil, errs.E(errs.Invalid, "lab add", l.name, "%d nodes: want 1 to %d", o.Count, MaxNodes)
	}
	if !slices.Contains([]Kind{Store, Witness, Client}, o.Kind) {
		return nil, errs.E(errs.Invalid, "lab add", string(o.Kind), "want %s, %s or %s", Store, Witness, Client)
	}
	if o.Timeout == 0 {
		o.Timeout = defaultTimeout
	}
	if err := preflight(); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeoutCause(ctx, o.Timeout, errs.E(errs.Timeout, "lab add", l.name, "not healthy after %v", o.Timeout))
	defer cancel()
	began := time.Now()
	var names []string
	err := l.change(ctx, func(s *state) error {
		if err := s.whole("lab add"); err != nil {
			return err
		}
		if len(s.Nodes)+o.Count > MaxNodes {
			return errs.E(errs.Invalid, "lab add", l.name, "it has %d nodes; with %d more they would be over %d", len(s.Nodes), o.Count, MaxNodes)
		}
		fresh := s.grow(slices.Repeat([]Kind{o.Kind}, o.Count))
		for _, n := range fresh {
			names = append(names, n.Name)
		}
		if err := s.power(ctx, fresh); err != nil {
			return errors.Join(err, s.shrink(fresh))
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	say := o.progress(began)
	say("%s: power", strings.Join(names, ", "))
	if o.Parallel {
		return names, l.join(ctx, names, !o.NoWait, say)
	}
	for _, n := range names {
		if err := l.join(ctx, []string{n}, !o.NoWait, say); err != nil {
			return names, err
		}
	}
	return names, nil
}

func (o AddOptions) progress(began time.Time) func(format string, args ...any) {
	if o.Progress == nil {
		return func(string, ...any) {}
	}
	return sayTo(o.Progress, began)
}

// sayTo returns what writes lines of progress, also from several goroutines.
func sayTo(w io.Writer, began time.Time) func(format string, args ...any) {
	var line sync.Mutex
	return func(format string, args ...any) {
		line.Lock()
		defer line.Unlock()
		fmt.Fprintf(w, "%5.2fs  %s\n", time.Since(began).Seconds(), fmt.Sprintf(format, args...))
	}
}

// whole refuses what a half made lab cannot do.
func (s *state) whole(op string) error {
	if s.Complete {
		return nil
	}
	return errs.E(errs.Stale, op, s.Name, "the lab is half made").WithRemedy("unum lab down --name %s", s.Name)
}

// grow enters new nodes into the state; nothing is made yet.
func (s *state) grow(kinds []Kind) []*nodeState {
	var fresh []*nodeState
	for _, kind := range kinds {
		k := len(s.Nodes) + 1
		n := &nodeState{Name: fmt.Sprintf("n%d", k), Kind: kind, Index: k, Addr: s.addr(k), Fresh: true}
		s.Nodes = append(s.Nodes, n)
		fresh = append(fresh, n)
	}
	return fresh
}

// disksAtOnce bounds how many disks are made at the same time.
const disksAtOnce = 8

// power makes the disks of new nodes and powers them on. The state is saved first.
func (s *state) power(ctx context.Context, fresh []*nodeState) error {
	if err := s.save(); err != nil {
		return err
	}
	reached("recorded")
	if err := s.addHosts(ctx, fresh); err != nil {
		return err
	}
	// Disks are made while namespaces and cables are.
	made := make(chan error, 1)
	go func() { made <- s.makeDisks(ctx, fresh) }()
	var once sync.Once
	var derr error
	wait := func() error {
		once.Do(func() { derr = <-made })
		return derr
	}
	defer func() { _ = wait() }() // whoever failed before has the reason
	if s.Switch.Pid == 0 {
		if err := s.startSwitch(ctx); err != nil {
			return err
		}
	}
	reached("switch")
	return s.boot(ctx, fresh, wait)
}

func (s *state) makeDisks(ctx context.Context, nodes []*nodeState) error {
	var wg sync.WaitGroup
	failed := make([]error, len(nodes))
	slot := make(chan struct{}, disksAtOnce)
	for i, n := range nodes {
		wg.Go(func() {
			slot <- struct{}{}
			defer func() { <-slot }()
			failed[i] = s.makeDisk(ctx, n.Name)
		})
	}
	wg.Wait()
	for _, err := range failed {
		if err != nil {
			return err
		}
	}
	return nil
}

// addHosts makes new nodes known to the others: their names, and their hardware
// addresses. The file of names grows in place: nodes have it mounted.
func (s *state) addHosts(ctx context.Context, fresh []*nodeState) error {
	f, err := os.OpenFile(filepath.Join(s.Dir, "hosts"), os.O_WRONLY|os.O_APPEND|os.O_CREATE, 0o644)
	if err != nil {
		return errs.Wrap(err, "lab: names of", s.Name)
	}
	var lines, batch strings.Builder
	for _, n := range fresh {
		fmt.Fprintf(&lines, "%s %s\n", n.Addr, n.Name)
		batch.WriteString(neighbour(n.Addr.String(), macString(s.mac(n.Index))))
	}
	_, err = f.WriteString(lines.String())
	if err = errors.Join(err, f.Close()); err != nil {
		return errs.Wrap(err, "lab: names of", s.Name)
	}
	for _, n := range s.powered() {
		if err := n.inNet(ctx, batch.String(), "ip", "-batch", "-"); err != nil && n.Proc.alive() {
			return errs.Wrap(err, "lab: neighbours of", n.Name)
		}
	}
	return nil
}

// shrink takes back nodes that grow has entered, the last ones of the lab.
func (s *state) shrink(fresh []*nodeState) error {
	for _, n := range fresh {
		if err := s.clear(n); err != nil {
			return err
		}
		dirs, err := cgroupDirs(s.Name, n.Name)
		if err != nil {
			return err
		}
		if err := removeCgroups(dirs); err != nil {
			return err
		}
		for _, p := range []string{filepath.Join(s.Dir, n.Name), filepath.Join(s.Dir, "logs", n.Name+".log"), sockPath(s.Name, n.Name)} {
			if err := os.RemoveAll(p); err != nil {
				return errs.Wrap(err, "lab add", n.Name)
			}
		}
	}
	dropLoops(s.Loops)
	s.Nodes = s.Nodes[:len(s.Nodes)-len(fresh)]
	return s.save()
}

// clear kills what may still be of a node that has no power.
func (s *state) clear(n *nodeState) error {
	dirs, err := cgroupDirs(s.Name, n.Name)
	if err != nil {
		return err
	}
	if err := killCgroups(dirs); err != nil {
		return err
	}
	if err := waitGone(n.Proc); err != nil {
		return err
	}
	return waitLoops(filepath.Join(s.Dir, n.Name))
}

// join starts the daemons of nodes that have power, and waits until they are
// healthy if wait says so. The lab is not locked but for moments: what happens to
// nodes while they join is for others to do.
func (l *Lab) join(ctx context.Context, names []string, wait bool, say func(string, ...any)) error {
	s, err := readState(l.dir)
	if err != nil {
		return err
	}
	var infos []Node
	for _, name := range unique(names) {
		n, err := s.node(name)
		if err != nil {
			return err
		}
		infos = append(infos, s.info(n))
	}
	if err := l.invite(ctx, s, infos); err != nil {
		return err
	}
	err = l.change(ctx, func(s *state) error {
		for _, n := range infos {
			a, err := l.ask(ctx, n.Name, request{Op: "status"}, nil)
			if err != nil {
				return err
			}
			if !a.Daemon.Running {
				if err := l.startDaemon(ctx, n); err != nil {
					return err
				}
			}
		}
		return nil
	})
	if err != nil || !wait {
		return err
	}
	var wg sync.WaitGroup
	failed := make([]error, len(infos))
	for i, n := range infos {
		wg.Go(func() {
			if failed[i] = l.waitHealthy(ctx, n); failed[i] == nil {
				say("%s is healthy", n.Name)
			}
		})
	}
	wg.Wait()
	return errors.Join(append(failed, l.settle(ctx, infos, failed))...)
}

// settle records which nodes became healthy: from now on they are what is on
// their disks.
func (l *Lab) settle(ctx context.Context, infos []Node, failed []error) error {
	return l.change(ctx, func(s *state) error {
		for i, info := range infos {
			if n, err := s.node(info.Name); err == nil && failed[i] == nil {
				n.Fresh = false
			}
		}
		return nil
	})
}

// WaitHealthy waits until nodes (all that have power, if none is named) are
// healthy, or ctx ends.
func (l *Lab) WaitHealthy(ctx context.Context, nodes ...string) error {
	s, err := readState(l.dir)
	if err != nil {
		return err
	}
	if len(nodes) == 0 {
		for _, n := range s.powered() {
			nodes = append(nodes, n.Name)
		}
	}
	infos, failed := make([]Node, len(nodes)), make([]error, len(nodes))
	var wg sync.WaitGroup
	for i, name := range nodes {
		n, err := s.node(name)
		if err != nil {
			return err
		}
		infos[i] = s.info(n)
		wg.Go(func() { failed[i] = l.waitHealthy(ctx, infos[i]) })
	}
	wg.Wait()
	return errors.Join(append(failed, l.settle(ctx, infos, failed))...)
}

// Wipe takes the power from nodes, as Kill does, and gives them empty disks: at
// their next start they have to join anew.
func (l *Lab) Wipe(ctx context.Context, nodes ...string) error {
	return l.change(ctx, func(s *state) error {
		hit, err := s.pick("lab wipe", nodes)
		if err != nil {
			return err
		}
		if err := s.whole("lab wipe"); err != nil {
			return err
		}
		for _, n := range hit {
			n.Fresh = true
		}
		if err := s.powerLoss(hit); err != nil {
			return err
		}
		for _, n := range hit {
			if err := s.clear(n); err != nil { // it may have died by itself
				return err
			}
		}
		reached("wiping")
		return s.makeDisks(ctx, hit)
	})
}

// pick returns the named nodes, each once; one at least.
func (s *state) pick(op string, names []string) ([]*nodeState, error) {
	if len(names) == 0 {
		return nil, errs.E(errs.Invalid, op, s.Name, "name a node, as in n2")
	}
	var hit []*nodeState
	for _, name := range unique(names) {
		n, err := s.node(name)
		if err != nil {
			return nil, err
		}
		hit = append(hit, n)
	}
	return hit, nil
}
