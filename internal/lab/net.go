package lab

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/unum-os/unum/internal/errs"
)

// tool runs a program of the system with stdin and returns its output. It dies
// with this process, so that a killed lab verb leaves nobody behind.
func tool(ctx context.Context, stdin string, argv ...string) (string, error) {
	cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
	cmd.Stdin = strings.NewReader(stdin)
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL, Setpgid: true}
	var out, bad bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &bad
	if err := cmd.Run(); err != nil {
		if ctx.Err() != nil {
			return "", errs.E(errs.Interrupted, argv[0], "", "%w", context.Cause(ctx))
		}
		return "", errs.E(errs.IO, strings.Join(argv, " "), "", "%w: %s", err, strings.TrimSpace(bad.String()))
	}
	return out.String(), nil
}

// inSwitch runs a tool in the switch's network.
func (s *state) inSwitch(ctx context.Context, stdin string, argv ...string) error {
	if !s.Switch.alive() {
		return errs.E(errs.Unavailable, "lab", s.Name, "the lab's switch is gone").WithRemedy("unum lab down --name %s", s.Name)
	}
	_, err := tool(ctx, stdin, append([]string{"nsenter", "-t", strconv.Itoa(s.Switch.Pid), "-n", "--"}, argv...)...)
	return err
}

// inNet runs a tool in the node's network.
func (n *nodeState) inNet(ctx context.Context, stdin string, argv ...string) error {
	_, err := tool(ctx, stdin, append([]string{"nsenter", "-t", strconv.Itoa(n.Proc.Pid), "-n", "--"}, argv...)...)
	return err
}

func port(k int) string { return "p" + strconv.Itoa(k) }

// makeBridge makes the lab's bridge in the switch.
func (s *state) makeBridge(ctx context.Context) error {
	return s.inSwitch(ctx, "link add name br0 type bridge forward_delay 0 mcast_snooping 0\nlink set dev br0 up\n", "ip", "-batch", "-")
}

// plug connects the nodes' network namespaces to the bridge. Cuts in force are
// in force before the cable carries anything.
func (s *state) plug(ctx context.Context, nodes []*nodeState) error {
	var del, add, up strings.Builder
	for _, n := range nodes {
		m := s.mac(n.Index)
		fmt.Fprintf(&del, "link del dev %s\n", port(n.Index))
		fmt.Fprintf(&add, "link add name %s type veth peer name eth0 address %s netns %d\n", port(n.Index), macString(m), n.Proc.Pid)
		fmt.Fprintf(&up, "link set dev %s master br0 up\n", port(n.Index))
	}
	// The port of an earlier life goes with its namespace, but a little later than its last process.
	_ = s.inSwitch(ctx, del.String(), "ip", "-force", "-batch", "-")
	if err := s.inSwitch(ctx, add.String(), "ip", "-batch", "-"); err != nil {
		return err
	}
	if err := s.applyCuts(ctx, nodes); err != nil {
		return err
	}
	if err := s.inSwitch(ctx, up.String(), "ip", "-batch", "-"); err != nil {
		return err
	}
	for _, n := range nodes {
		if s.Links[n.Name] != (Link{}) {
			if err := s.relay(ctx, n); err != nil {
				return err
			}
		}
	}
	return nil
}

func macString(m [6]byte) string {
	return fmt.Sprintf("%02x:%02x:%02x:%02x:%02x:%02x", m[0], m[1], m[2], m[3], m[4], m[5])
}

// blocked returns from whom nothing reaches node n.
func (s *state) blocked(n string) []*nodeState {
	var from []*nodeState
	for _, o := range s.Nodes {
		for _, c := range s.Cuts {
			if slices.Contains(c.A, o.Name) && slices.Contains(c.B, n) ||
				!c.OneWay && slices.Contains(c.B, o.Name) && slices.Contains(c.A, n) {
				from = append(from, o)
				break
			}
		}
	}
	return from
}

// applyCuts makes the ports of nodes drop what must not reach them: a classic
// BPF filter at the port's way out looks at the sender's hardware address. It
// drops every protocol, silently, as a cut cable does; nft and iptables are not
// needed, and a node that reboots stays cut.
func (s *state) applyCuts(ctx context.Context, nodes []*nodeState) error {
	var clear, batch strings.Builder
	for _, n := range nodes {
		from := s.blocked(n.Name)
		if len(from) == 0 {
			fmt.Fprintf(&clear, "qdisc del dev %s clsact\n", port(n.Index))
			continue
		}
		fmt.Fprintf(&batch, "qdisc replace dev %s clsact\n", port(n.Index))
		fmt.Fprintf(&batch, "filter replace dev %s egress pref 1 handle 1 protocol all bpf bytecode \"%s\" direct-action\n",
			port(n.Index), s.dropFrom(from))
	}
	if clear.Len() > 0 {
		// Fails where there is no filter, which is what is wanted.
		_ = s.inSwitch(ctx, clear.String(), "tc", "-force", "-batch", "-")
	}
	if batch.Len() == 0 {
		return nil
	}
	return s.inSwitch(ctx, batch.String(), "tc", "-batch", "-")
}

// dropFrom returns the filter in tc's notation: load bytes 8 to 11 of the frame,
// the last four of the source address, which are the node's IP address; compare.
func (s *state) dropFrom(from []*nodeState) string {
	const (
		loadWord, jumpEq, ret = unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, unix.BPF_RET | unix.BPF_K
		pass, drop            = 0xffffffff, 2 // TC_ACT_UNSPEC, TC_ACT_SHOT
	)
	n := len(from)
	ins := []string{fmt.Sprintf("%d 0 0 8", loadWord)}
	for i, o := range from {
		a := o.Addr.As4()
		ins = append(ins, fmt.Sprintf("%d %d 0 %d", jumpEq, n-i, binary.BigEndian.Uint32(a[:])))
	}
	ins = append(ins, fmt.Sprintf("%d 0 0 %d", ret, uint32(pass)), fmt.Sprintf("%d 0 0 %d", ret, drop))
	return strconv.Itoa(len(ins)) + "," + strings.Join(ins, ",")
}

// Cut drops all traffic between the nodes of a and those of b, both ways, until
// Heal; several cuts add up. An empty b means all nodes not in a. TCP
// connections across it are not reset: they fall silent.
func (l *Lab) Cut(ctx context.Context, a, b []string) error {
	return l.cut(ctx, cut{A: a, B: b})
}

// CutOneWay drops what the nodes of from send to those of to, until Heal; what
// these send still arrives. An empty to means all nodes not in from.
func (l *Lab) CutOneWay(ctx context.Context, from, to []string) error {
	return l.cut(ctx, cut{A: from, B: to, OneWay: true})
}

func (l *Lab) cut(ctx context.Context, c cut) error {
	return l.change(ctx, func(s *state) error {
		if len(c.A) == 0 {
			return errs.E(errs.Invalid, "lab cut", s.Name, "name the nodes to cut off")
		}
		rest := len(c.B) == 0
		for _, set := range []*[]string{&c.A, &c.B} {
			*set = unique(*set)
			for _, n := range *set {
				if _, err := s.node(n); err != nil {
					return err
				}
			}
		}
		for _, n := range s.Nodes {
			if rest && !slices.Contains(c.A, n.Name) {
				c.B = append(c.B, n.Name)
			}
		}
		if len(c.B) == 0 {
			return errs.E(errs.Invalid, "lab cut", strings.Join(c.A, ","), "the lab has no other node to cut them off from")
		}
		for _, n := range c.A {
			if slices.Contains(c.B, n) {
				return errs.E(errs.Invalid, "lab cut", n, "it is on both sides of the cut")
			}
		}
		if slices.ContainsFunc(s.Cuts, func(o cut) bool {
			return o.OneWay == c.OneWay && slices.Equal(o.A, c.A) && slices.Equal(o.B, c.B)
		}) {
			return nil
		}
		s.Cuts = append(s.Cuts, c)
		return s.applyCuts(ctx, s.powered())
	})
}

// unique returns names without repetitions, in their order.
func unique(names []string) []string {
	var out []string
	for _, n := range names {
		if !slices.Contains(out, n) {
			out = append(out, n)
		}
	}
	return out
}

// Heal ends what is wrong with the network: all cuts, delays, losses and rates, or
// those of the named nodes.
func (l *Lab) Heal(ctx context.Context, nodes ...string) error {
	return l.change(ctx, func(s *state) error {
		for _, name := range nodes {
			if _, err := s.node(name); err != nil {
				return err
			}
		}
		healed := func(name string) bool { return len(nodes) == 0 || slices.Contains(nodes, name) }
		var left []cut
		for _, c := range s.Cuts {
			c.A, c.B = slices.DeleteFunc(c.A, healed), slices.DeleteFunc(c.B, healed)
			if len(c.A) > 0 && len(c.B) > 0 {
				left = append(left, c)
			}
		}
		s.Cuts = left
		var mended []*nodeState
		for _, n := range s.Nodes {
			if _, ok := s.Links[n.Name]; ok && healed(n.Name) {
				delete(s.Links, n.Name)
				if n.On && n.Proc.alive() {
					mended = append(mended, n)
				}
			}
		}
		if err := s.save(); err != nil {
			return err
		}
		if err := s.applyCuts(ctx, s.powered()); err != nil {
			return err
		}
		for _, n := range mended {
			if err := s.relay(ctx, n); err != nil {
				return errs.Wrap(err, "lab heal", n.Name)
			}
		}
		return nil
	})
}

// powered returns the nodes that run.
func (s *state) powered() []*nodeState {
	var on []*nodeState
	for _, n := range s.Nodes {
		if n.On && n.Proc.alive() {
			on = append(on, n)
		}
	}
	return on
}
