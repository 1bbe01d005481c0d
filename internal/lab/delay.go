package lab

import (
	"context"
	"fmt"
	"net"
	"os"
	"strconv"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/unum-os/unum/internal/errs"
)

// Delays are made by a relay process per delayed node, because many kernels have
// no netem. The node's port pK leaves the bridge; a tap dK takes its place; the
// relay carries frames between the two and holds each for the delay. Frames move
// with their offload header, so that large segments stay whole. Order is kept.

const (
	maxDelay  = time.Minute
	relayHold = 8192     // frames held per direction; beyond it they are lost, as in a full router
	maxFrame  = 96 << 10 // a 64 KiB segment with its headers
	vnetHdr   = 10       // struct virtio_net_hdr
)

// Delay makes everything that node sends and everything sent to it take d longer,
// so a round trip takes 2d longer. 0 ends it; so does Heal.
func (l *Lab) Delay(ctx context.Context, node string, d time.Duration) error {
	if d < 0 || d > maxDelay {
		return errs.E(errs.Invalid, "lab delay", d.String(), "want 0 to %v", maxDelay)
	}
	return l.change(ctx, func(s *state) error {
		n, err := s.node(node)
		if err != nil {
			return err
		}
		if s.Delays == nil {
			s.Delays = map[string]time.Duration{}
		}
		s.Delays[node] = d
		if d == 0 {
			delete(s.Delays, node)
		}
		if err := s.save(); err != nil {
			return err
		}
		if !n.On || !n.Proc.alive() {
			return nil // from the next start
		}
		return s.relay(ctx, n)
	})
}

// relay makes node's port as s.Delays says: behind a new relay, or on the bridge.
func (s *state) relay(ctx context.Context, n *nodeState) error {
	d := s.Delays[n.Name]
	if old, ok := s.Relays[n.Name]; ok {
		if old.alive() {
			_ = unix.Kill(old.Pid, unix.SIGKILL)
			if err := waitGone(old); err != nil {
				return err
			}
		}
		delete(s.Relays, n.Name)
	}
	if d == 0 {
		return s.inSwitch(ctx, "", "ip", "link", "set", "dev", port(n.Index), "master", "br0")
	}
	cg, err := makeCgroups(s.Name, switchMember)
	if err != nil {
		return err
	}
	b, err := s.spawn(initSpec{
		Lab: s.Name, Member: "delay-" + n.Name, Cgroups: cg, NetOf: s.Switch.Pid, Port: n.Index, Delay: d,
	}, 0, nil)
	if err != nil {
		return err
	}
	defer b.close()
	if s.Relays == nil {
		s.Relays = map[string]procID{}
	}
	s.Relays[n.Name] = b.proc
	if err := s.save(); err != nil {
		return err
	}
	return errs.Wrap(b.proceed(ctx), "lab delay", n.Name)
}

// enterNet puts the calling thread into the network namespace of process pid.
func enterNet(pid int) error {
	fd, err := unix.Open(fmt.Sprintf("/proc/%d/ns/net", pid), unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	return unix.Setns(fd, unix.CLONE_NEWNET)
}

// relayMain is what a relay process does.
func relayMain(spec initSpec) error {
	tap, err := openTap("d" + strconv.Itoa(spec.Port))
	if err != nil {
		return err
	}
	p := port(spec.Port)
	batch := fmt.Sprintf("link set dev %s nomaster\nlink set dev %s up\nlink set dev d%d master br0 up\n", p, p, spec.Port)
	if _, err := tool(context.Background(), batch, "ip", "-batch", "-"); err != nil {
		return err
	}
	sock, err := openPort(p)
	if err != nil {
		return err
	}
	waitGo()
	reply("ready")
	end := make(chan error, 2)
	go func() { end <- carry(sock, tap, spec.Delay) }()
	go func() { end <- carry(tap, sock, spec.Delay) }()
	return <-end
}

// openTap makes tap interface name with offload headers; it goes with the descriptor.
func openTap(name string) (int, error) {
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, fmt.Errorf("/dev/net/tun (modprobe tun?): %w", err)
	}
	ifr, err := unix.NewIfreq(name)
	if err != nil {
		return -1, err
	}
	ifr.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_VNET_HDR)
	if err := unix.IoctlIfreq(fd, unix.TUNSETIFF, ifr); err != nil {
		return -1, fmt.Errorf("make %s: %w", name, err)
	}
	if err := unix.IoctlSetInt(fd, unix.TUNSETOFFLOAD, unix.TUN_F_CSUM|unix.TUN_F_TSO4|unix.TUN_F_TSO6); err != nil {
		return -1, fmt.Errorf("offloads of %s: %w", name, err)
	}
	return fd, nil
}

// openPort opens a packet socket that has every frame coming in at interface name.
func openPort(name string) (int, error) {
	proto := int(htons(unix.ETH_P_ALL))
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0) // 0: nothing before it is bound
	if err != nil {
		return -1, err
	}
	for _, o := range []struct{ level, opt, val int }{
		{unix.SOL_PACKET, unix.PACKET_VNET_HDR, 1},
		{unix.SOL_PACKET, unix.PACKET_IGNORE_OUTGOING, 1},
		{unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 16 << 20}, // a burst must wait here, not be lost
		{unix.SOL_SOCKET, unix.SO_SNDBUFFORCE, 16 << 20},
	} {
		if err := unix.SetsockoptInt(fd, o.level, o.opt, o.val); err != nil {
			return -1, fmt.Errorf("packet socket: %w", err)
		}
	}
	ifi, err := net.InterfaceByName(name)
	if err != nil {
		return -1, err
	}
	return fd, unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: uint16(proto), Ifindex: ifi.Index})
}

func htons(v uint16) uint16 {
	b := [2]byte{byte(v >> 8), byte(v)}
	return *(*uint16)(unsafe.Pointer(&b))
}

type heldFrame struct {
	due  time.Time
	data []byte
}

// carry moves frames from one descriptor to another, each after d.
func carry(from, to int, d time.Duration) error {
	held := make(chan heldFrame, relayHold)
	go func() {
		for f := range held {
			time.Sleep(time.Until(f.due))
			_, _ = unix.Write(to, f.data) // an interface that is down loses frames
		}
	}()
	buf := make([]byte, maxFrame)
	for {
		n, err := unix.Read(from, buf)
		if err == unix.EINTR || err == unix.ENETDOWN {
			continue // down for now; gone for good is ENXIO or EBADFD
		}
		if err != nil {
			return os.NewSyscallError("read frame", err)
		}
		if n <= vnetHdr {
			continue
		}
		select {
		case held <- heldFrame{time.Now().Add(d), append([]byte(nil), buf[:n]...)}:
		default:
		}
	}
}
