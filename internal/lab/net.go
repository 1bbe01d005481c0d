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

func port(k int) string { return "p" + strconv.Itoa(k) }

// makeBridge makes the lab's bridge in the switch.
func (s *state) makeBridge(ctx context.Context) error {
	return s.inSwitch(ctx, "link add name br0 type bridge forward_delay 0 mcast_snooping 0\nlink set dev br0 up\n", "ip", "-batch", "-")
}

// plug connects the nodes' network namespaces to the bridge. Cuts in force are
// in force before the cable carries anything.
func (s *state) plug(ctx context.Context, nodes []*nodeState) error {
	var add, up strings.Builder
	for _, n := range nodes {
		m := s.mac(n.Index)
		// The port of an earlier life goes with its namespace, but a little later than its last process.
		_ = s.inSwitch(ctx, "", "ip", "link", "del", "dev", port(n.Index))
		fmt.Fprintf(&add, "link add name %s type veth peer name eth0 address %s netns %d\n", port(n.Index), macString(m), n.Proc.Pid)
		fmt.Fprintf(&up, "link set dev %s master br0 up\n", port(n.Index))
	}
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
		if s.Delays[n.Name] > 0 {
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
			if slices.Contains(c.A, n) && slices.Contains(c.B, o.Name) || slices.Contains(c.B, n) && slices.Contains(c.A, o.Name) {
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
	var batch strings.Builder
	for _, n := range nodes {
		from := s.blocked(n.Name)
		if len(from) == 0 {
			// Fails when there is no filter, which is what is wanted.
			_ = s.inSwitch(ctx, "", "tc", "qdisc", "del", "dev", port(n.Index), "clsact")
			continue
		}
		fmt.Fprintf(&batch, "qdisc replace dev %s clsact\n", port(n.Index))
		fmt.Fprintf(&batch, "filter replace dev %s egress pref 1 handle 1 protocol all bpf bytecode \"%s\" direct-action\n",
			port(n.Index), s.dropFrom(from))
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
	return l.change(ctx, func(s *state) error {
		if len(a) == 0 {
			return errs.E(errs.Invalid, "lab cut", s.Name, "name the nodes to cut off")
		}
		for _, n := range append(slices.Clone(a), b...) {
			if _, err := s.node(n); err != nil {
				return err
			}
		}
		if len(b) == 0 {
			for _, n := range s.Nodes {
				if !slices.Contains(a, n.Name) {
					b = append(b, n.Name)
				}
			}
		}
		for _, n := range a {
			if slices.Contains(b, n) {
				return errs.E(errs.Invalid, "lab cut", n, "it is on both sides of the cut")
			}
		}
		s.Cuts = append(s.Cuts, cut{A: a, B: b})
		return s.applyCuts(ctx, s.powered())
	})
}

// Heal ends all cuts and delays.
func (l *Lab) Heal(ctx context.Context) error {
	return l.change(ctx, func(s *state) error {
		s.Cuts = nil
		if err := s.applyCuts(ctx, s.powered()); err != nil {
			return err
		}
		for _, n := range s.Nodes {
			if s.Delays[n.Name] == 0 {
				continue
			}
			delete(s.Delays, n.Name)
			if n.On && n.Proc.alive() {
				if err := s.relay(ctx, n); err != nil {
					return err
				}
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
