package main

import (
	"bufio"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/unum-os/unum/internal/disk"
	"github.com/unum-os/unum/internal/identity"
	"github.com/unum-os/unum/internal/ids"
)

// three are the hosts of one measurement.
type three struct {
	dir, net string
	profile  string // directory
	only     *regexp.Regexp
	groups   int
	addrs    []string
	hosts    [3]*child
}

// child is a process of `cluster host`.
type child struct {
	cmd *exec.Cmd
	in  io.WriteCloser
	out *bufio.Scanner
	mu  sync.Mutex // one question at a time
}

func threeFlags(fs *flag.FlagSet) (*three, *int) {
	t := &three{}
	fs.StringVar(&t.dir, "dir", "", "an empty directory on the disk to be measured")
	fs.StringVar(&t.net, "net", "", "prefix of the network namespaces; node K has 10.88.0.K in PREFIXK")
	fs.IntVar(&t.groups, "groups", 2, "groups on each host")
	return t, fs.Int("rounds", 3, "how often all is measured")
}

// start makes an authority and starts the hosts.
func (t *three) start() error {
	ca, err := identity.NewCA("bench")
	if err != nil {
		return err
	}
	for k := 1; k <= 3; k++ {
		if t.net != "" {
			t.addrs = append(t.addrs, fmt.Sprintf("10.88.0.%d:7400", k))
		} else {
			t.addrs = append(t.addrs, fmt.Sprintf("127.0.0.1:740%d", k))
		}
		dir := filepath.Join(t.dir, fmt.Sprint(k))
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return err
		}
		key, csr, err := identity.NewRequest()
		if err != nil {
			return err
		}
		cert, err := ca.Sign(csr, ids.Node(k), identity.RoleStore, time.Now())
		if err != nil {
			return err
		}
		for name, b := range map[string][]byte{"ca.crt": ca.CertPEM(), "node.crt": cert, "node.key": key} {
			if err := identity.Save(disk.Real, filepath.Join(dir, name), b); err != nil {
				return err
			}
		}
	}
	for k := range t.hosts {
		if err := t.run(k); err != nil {
			return err
		}
	}
	_, err = t.leader()
	return err
}

// run starts host k.
func (t *three) run(k int) error {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	args := []string{self, "host", "-id", fmt.Sprint(k + 1), "-dir", filepath.Join(t.dir, fmt.Sprint(k+1)),
		"-addrs", strings.Join(t.addrs, ","), "-groups", fmt.Sprint(t.groups)}
	if t.net != "" { // ip replaces itself by the program, nice does too
		args = append([]string{"nice", "-n", "-10", "ip", "netns", "exec", fmt.Sprint(t.net, k+1)}, args...)
	}
	c := &child{cmd: exec.Command(args[0], args[1:]...)}
	c.cmd.Stderr = os.Stderr
	if c.in, err = c.cmd.StdinPipe(); err != nil {
		return err
	}
	out, err := c.cmd.StdoutPipe()
	if err != nil {
		return err
	}
	c.out = bufio.NewScanner(out)
	t.hosts[k] = c
	return c.cmd.Start()
}

func (t *three) stop() {
	for _, c := range t.hosts {
		if c != nil {
			c.in.Close()
			c.cmd.Wait()
		}
	}
}

// ask puts a question to host k.
func (t *three) ask(k int, q question) (answer, error) {
	c := t.hosts[k]
	c.mu.Lock()
	defer c.mu.Unlock()
	b, err := json.Marshal(q)
	if err != nil {
		return answer{}, err
	}
	if _, err := c.in.Write(append(b, '\n')); err != nil {
		return answer{}, err
	}
	if !c.out.Scan() {
		return answer{}, fmt.Errorf("host %d has ended", k+1)
	}
	var a answer
	if err := json.Unmarshal(c.out.Bytes(), &a); err != nil {
		return a, err
	}
	if a.Err != "" {
		return a, errors.New(a.Err)
	}
	return a, nil
}

// leader returns the host that leads all groups, as all see it; it makes one do so.
func (t *three) leader() (int, error) {
	for end := time.Now().Add(30 * time.Second); time.Now().Before(end); time.Sleep(100 * time.Millisecond) {
		seen := map[ids.Node]bool{}
		var first ids.Node
		for k := range t.hosts {
			a, err := t.ask(k, question{What: "status"})
			if err != nil {
				return 0, err
			}
			for _, l := range a.Leader {
				seen[l] = true
			}
			if k == 0 {
				first = a.Leader[0]
			}
		}
		if len(seen) == 1 && first != 0 {
			return int(first) - 1, nil
		}
		if !seen[0] { // several lead
			for k := range t.hosts {
				t.ask(k, question{What: "lead", To: first}) // it may have changed; the next turn sees it
			}
		}
	}
	return 0, errors.New("no host leads all groups")
}

// rows collects the rounds' results under their names, in order.
type rows struct {
	names []string
	got   map[string][]result
}

func (r *rows) add(name string, x result) {
	if r.got == nil {
		r.got = map[string][]result{}
	}
	if r.got[name] == nil {
		r.names = append(r.names, name)
	}
	r.got[name] = append(r.got[name], x)
}

// median returns the median of a figure over the rounds, the least and the most.
func (r *rows) median(name string, of func(result) float64) (m, lo, hi float64) {
	var v []float64
	for _, x := range r.got[name] {
		v = append(v, of(x))
	}
	if len(v) == 0 {
		return
	}
	slices.Sort(v)
	return v[len(v)/2], v[0], v[len(v)-1]
}

func p50(r result) float64  { return r.P50 }
func p99(r result) float64  { return r.P99 }
func rate(r result) float64 { return r.Rate }
func used(r result) float64 { return r.CPU }

func (r *rows) print() {
	fmt.Println("| median of the rounds (least to most) | p50, us | p99, us | a second | processor us each, on all |")
	fmt.Println("|---|---|---|---|---|")
	for _, n := range r.names {
		cell := func(of func(result) float64) string {
			m, lo, hi := r.median(n, of)
			if m == 0 {
				return "" // not measured
			}
			return fmt.Sprintf("%s (%s to %s)", short(m), short(lo), short(hi))
		}
		fmt.Printf("| %s | %s | %s | %s | %s |\n", n, cell(p50), cell(p99), cell(rate), cell(used))
	}
}

func hostsVerb(fs *flag.FlagSet) func() error {
	t, rounds := threeFlags(fs)
	d := fs.Duration("time", 3*time.Second, "for each figure")
	only := fs.String("only", "", "regular expression for the rows wanted, besides the baselines")
	fs.StringVar(&t.profile, "profile", "", "directory for processor profiles, with -rounds 1")
	return func() (err error) {
		if t.only, err = regexp.Compile(*only); err != nil {
			return err
		}
		defer t.stop()
		if err := t.start(); err != nil {
			return err
		}
		var r rows
		for range *rounds {
			if err := t.round(&r, *d); err != nil {
				return err
			}
		}
		r.print()
		disk, _, _ := r.median(rowDisk, p50)
		trip, _, _ := r.median(rowTrip, p50)
		one, _, _ := r.median(rowOne, p50)
		fmt.Printf("one proposal: %.2f of 3 syncs and a round trip (%.0f us)\n", one/(3*disk+trip), 3*disk+trip)
		return nil
	}
}

// Names of rows that others are compared with.
const (
	rowDisk = "4 KiB append and fdatasync, one process"
	rowTrip = "200 B there and back over TCP"
	rowOne  = "one proposal of 200 B"
)

func (t *three) round(r *rows, d time.Duration) error {
	l, err := t.leader()
	if err != nil {
		return err
	}
	f := (l + 1) % 3
	to := ids.Node(f + 1)
	for i, x := range []struct {
		name string
		at   int
		q    question
	}{
		{rowDisk, l, question{What: "disk", N: 2000}},
		{rowTrip, l, question{What: "rtt", N: 5000, To: to}},
		{"a call over TLS with an empty answer", l, question{What: "call", Workers: 1, To: to}},
		{rowOne, l, question{What: "propose", Workers: 1}},
		{"256 proposers of 200 B", l, question{What: "propose", Workers: 256}},
		{"record, 1,000 puts in a batch, 1 in flight", l, question{What: "batch", Workers: 1}},
		{"record, 1,000 puts in a batch, 8 in flight", l, question{What: "batch", Workers: 8}},
		{"read barrier at the leader", l, question{What: "read", Workers: 1}},
		{"read barrier at a follower", f, question{What: "read", Workers: 1}},
		{"64 readers at the leader", l, question{What: "read", Workers: 64}},
		{"64 readers at a follower", f, question{What: "read", Workers: 64}},
	} {
		if i > 1 && !t.only.MatchString(x.name) {
			continue
		}
		x.q.Time = d
		if err := t.profiles(len(r.names)); err != nil {
			return err
		}
		before, err := t.cpu()
		if err != nil {
			return err
		}
		a, err := t.ask(x.at, x.q)
		if err != nil {
			return fmt.Errorf("%s: %w", x.name, err)
		}
		after, err := t.cpu()
		if err != nil {
			return err
		}
		if ops := a.Result.Rate * x.q.Time.Seconds(); ops > 0 {
			a.Result.CPU = float64((after-before)/time.Microsecond) / ops
		}
		if err := t.profiles(len(r.names)); err != nil {
			return err
		}
		r.add(x.name, a.Result)
	}
	// All disks at once, as a proposal has them: two of three.
	var wg sync.WaitGroup
	var got [2]answer
	var bad [2]error
	for i, k := range []int{l, f} {
		wg.Go(func() { got[i], bad[i] = t.ask(k, question{What: "disk", N: 1000}) })
	}
	wg.Wait()
	if err := errors.Join(bad[:]...); err != nil {
		return err
	}
	r.add("4 KiB append and fdatasync, two processes at once", got[0].Result)
	return nil
}

// cpu returns what all hosts have used.
func (t *three) cpu() (sum time.Duration, err error) {
	for k := range t.hosts {
		a, err := t.ask(k, question{What: "usage"})
		if err != nil {
			return 0, err
		}
		sum += a.Usage.CPU
	}
	return sum, nil
}

// profiles has all hosts begin or end to write where their processor time goes,
// if that is wanted.
func (t *three) profiles(row int) error {
	if t.profile == "" {
		return nil
	}
	for k := range t.hosts {
		if _, err := t.ask(k, question{What: "profile", File: filepath.Join(t.profile, fmt.Sprintf("%d-n%d.pprof", row, k+1))}); err != nil {
			return err
		}
	}
	return nil
}

func idleVerb(fs *flag.FlagSet) func() error {
	t, rounds := threeFlags(fs)
	d := fs.Duration("time", 30*time.Second, "how long")
	return func() error {
		defer t.stop()
		if err := t.start(); err != nil {
			return err
		}
		for range *rounds {
			l, err := t.leader()
			if err != nil {
				return err
			}
			var was, is [3]answer
			look := func(a *[3]answer) error {
				for k := range t.hosts {
					if a[k], err = t.ask(k, question{What: "usage"}); err != nil {
						return err
					}
				}
				return nil
			}
			if err := look(&was); err != nil {
				return err
			}
			time.Sleep(*d) // the measurement itself
			if err := look(&is); err != nil {
				return err
			}
			for k := range t.hosts {
				role := "follower"
				if k == l {
					role = "leader"
				}
				fmt.Printf("%d groups, %s: %s\n", t.groups, role, is[k].Usage.since(was[k].Usage))
			}
		}
		return nil
	}
}

// deathVerb takes the leader's line away, kills it, and asks when another one
// has acknowledged something. Connections do not end by it: nothing answers.
func deathVerb(fs *flag.FlagSet) func() error {
	t, rounds := threeFlags(fs)
	return func() error {
		if t.net == "" {
			return errors.New("-net is needed: a line that can be cut")
		}
		defer t.stop()
		if err := t.start(); err != nil {
			return err
		}
		var took []time.Duration
		begin := time.Now()
		for range *rounds {
			gap, err := t.die()
			if err != nil {
				return err
			}
			fmt.Printf("%.2f ", gap.Seconds())
			took = append(took, gap)
		}
		s := summary(took, time.Since(begin))
		fmt.Printf("\nnext acknowledgement after the leader's death, %d rounds: p50 %.2f s, most %.2f s\n", s.Ops, s.P50/1e6, s.Max/1e6)
		return nil
	}
}

func (t *three) die() (time.Duration, error) {
	l, err := t.leader()
	if err != nil {
		return 0, err
	}
	if _, err := t.ask(l, question{What: "propose", Workers: 1, Time: 200 * time.Millisecond}); err != nil {
		return 0, err
	}
	line := func(state string) error {
		return exec.Command("ip", "-n", fmt.Sprint(t.net, l+1), "link", "set", "e0", state).Run()
	}
	if err := line("down"); err != nil {
		return 0, err
	}
	begin := time.Now()
	if err := t.hosts[l].cmd.Process.Kill(); err != nil {
		return 0, err
	}
	first := make(chan error, 2)
	for k := range t.hosts {
		if k != l {
			go func() {
				_, err := t.ask(k, question{What: "gap", Time: 5 * time.Second})
				first <- err
			}()
		}
	}
	err = <-first
	took := time.Since(begin)
	t.hosts[l].cmd.Wait()
	if err != nil {
		return 0, err
	}
	if err := line("up"); err != nil {
		return 0, err
	}
	<-first // that which does not lead gives up
	return took, t.run(l)
}

// short prints three digits, or all that stand before the point.
func short(v float64) string {
	if v >= 100 {
		return fmt.Sprintf("%.0f", v)
	}
	return fmt.Sprintf("%.3g", v)
}
