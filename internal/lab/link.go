package lab

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"strconv"
	"strings"
	"sync/atomic"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/unum-os/unum/internal/errs"
)

// What is wrong with a node's cable is made by a relay process per such node,
// because many kernels have no netem. The node's port pK leaves the bridge; a tap
// dK takes its place; the relay carries frames between the two and loses, queues
// and holds them. Frames move with their offload header, so that large segments
// stay whole, except where frames are counted: with loss or a rate no frame is
// larger than the network's.

const (
	maxDelay  = time.Minute     // of a link, each way
	minRate   = 8_000           // bits a second of a link; less takes seconds for a frame
	maxRate   = 100_000_000_000 // bits a second of a link: more than a relay carries, so no limit at all
	relayHold = 8192            // frames held per direction; beyond it they are lost, as in a full router
	relayRoom = 64 << 20        // and bytes held, which large segments come to first
	maxFrame  = 96 << 10        // bytes of a frame: a 64 KiB segment with its headers
	vnetHdr   = 10              // bytes of struct virtio_net_hdr

	// A slow line's queue: what it sends in this time, but some frames at least.
	rateQueue       = 500 * time.Millisecond
	rateQueueFrames = 16   // frames that a slow line's queue holds at least
	fullFrame       = 1514 // bytes of a full frame of Ethernet
)

// Link is what is wrong with a node's cable, each way alike. The parts combine:
// a frame may be lost, else it waits for its turn at the rate, then is delayed.
type Link struct {
	Delay time.Duration `json:"delay_ns,omitempty"`
	Loss  float64       `json:"loss,omitempty"` // the part of all frames that is lost, below 1
	Seed  uint32        `json:"seed,omitempty"` // of the choice which are lost
	Rate  int64         `json:"rate_bits,omitempty"`
}

// framed reports whether frames count one by one.
func (k Link) framed() bool { return k.Loss > 0 || k.Rate > 0 }

// String returns the link's faults as people say them.
func (k Link) String() string {
	var parts []string
	if k.Delay > 0 {
		parts = append(parts, fmt.Sprintf("delay %v", k.Delay))
	}
	if k.Loss > 0 {
		parts = append(parts, fmt.Sprintf("loss %s%% (seed %d)", strconv.FormatFloat(100*k.Loss, 'g', 6, 64), k.Seed))
	}
	if k.Rate > 0 {
		parts = append(parts, "rate "+formatRate(k.Rate))
	}
	return strings.Join(parts, ", ")
}

func formatRate(bits int64) string {
	for _, u := range rateUnits {
		if bits%u.bits == 0 {
			return fmt.Sprintf("%d%s", bits/u.bits, u.name)
		}
	}
	return fmt.Sprint(bits) // not reached: a unit is one bit
}

// The units of rates, as tc has them; the largest first.
var rateUnits = []struct {
	name string
	bits int64
}{{"gbit", 1e9}, {"mbit", 1e6}, {"kbit", 1e3}, {"bit", 1}}

// Delay makes everything that node sends and everything sent to it take d longer,
// so a round trip takes 2d longer. 0 ends it; so does Heal.
func (l *Lab) Delay(ctx context.Context, node string, d time.Duration) error {
	if d < 0 || d > maxDelay {
		return errs.E(errs.Invalid, "lab delay", d.String(), "want 0 to %v", maxDelay)
	}
	return l.setLink(ctx, "lab delay", node, func(k *Link) { k.Delay = d })
}

// Loss loses the part p of the frames that node sends, and of those sent to it,
// chosen at random by seed; with seed 0 a new one is chosen. p is at least 0,
// which ends it, and less than 1; Heal ends it too.
func (l *Lab) Loss(ctx context.Context, node string, p float64, seed uint32) error {
	if !(p >= 0 && p < 1) {
		return errs.E(errs.Invalid, "lab loss", fmt.Sprintf("%g%%", 100*p), "want 0%% or more and less than 100%%").
			WithRemedy("unum lab cut --name %s %s, to lose all", l.name, node)
	}
	for seed == 0 {
		seed = rand.Uint32()
	}
	if p == 0 {
		seed = 0
	}
	return l.setLink(ctx, "lab loss", node, func(k *Link) { k.Loss, k.Seed = p, seed })
}

// Rate lets node send, and be sent, no more than so many bits a second. What is
// more waits in a queue of half a second, and is lost when that is full. 0 ends
// it; so does Heal.
func (l *Lab) Rate(ctx context.Context, node string, bits int64) error {
	if bits != 0 && (bits < minRate || bits > maxRate) {
		return errs.E(errs.Invalid, "lab rate", formatRate(bits), "want 0 or %s to %s", formatRate(minRate), formatRate(maxRate))
	}
	return l.setLink(ctx, "lab rate", node, func(k *Link) { k.Rate = bits })
}

// setLink changes what is wrong with node's cable.
func (l *Lab) setLink(ctx context.Context, op, node string, f func(*Link)) error {
	return l.change(ctx, func(s *state) error {
		n, err := s.node(node)
		if err != nil {
			return err
		}
		was := s.Links[node]
		k := was
		f(&k)
		if k == was {
			return nil
		}
		if s.Links == nil {
			s.Links = map[string]Link{}
		}
		s.Links[node] = k
		if k == (Link{}) {
			delete(s.Links, node)
		}
		if err := s.save(); err != nil {
			return err
		}
		if !n.On || !n.Proc.alive() {
			return nil // from the next start
		}
		if err := s.relay(ctx, n); err != nil {
			// As it was, as far as that can be: the state is what is in force.
			if s.Links[node] = was; was == (Link{}) {
				delete(s.Links, node)
			}
			_ = s.relay(ctx, n)
			return errs.Wrap(errors.Join(err, s.save()), op, node)
		}
		return nil
	})
}

// relay makes node's port as s.Links says: behind a new relay, or on the bridge.
func (s *state) relay(ctx context.Context, n *nodeState) error {
	k := s.Links[n.Name]
	if old, ok := s.Relays[n.Name]; ok {
		if old.alive() {
			_ = unix.Kill(old.Pid, unix.SIGKILL)
			if err := waitGone(old); err != nil {
				return err
			}
		}
		delete(s.Relays, n.Name)
	}
	segs := "65535" // the kernel's own default
	if k.framed() {
		segs = "1"
	}
	if err := n.inNet(ctx, "", "ip", "link", "set", "dev", "eth0", "gso_max_segs", segs); err != nil {
		return err
	}
	if k == (Link{}) {
		return s.inSwitch(ctx, "", "ip", "link", "set", "dev", port(n.Index), "master", "br0")
	}
	cg, err := makeCgroups(s.Name, switchMember)
	if err != nil {
		return err
	}
	b, err := s.spawn(initSpec{
		Lab: s.Name, Member: "link-" + n.Name, Cgroups: cg, NetOf: s.Switch.Pid, Port: n.Index, Link: k,
	}, 0, nil)
	if err != nil {
		return err
	}
	defer b.close()
	reached("relay")
	if s.Relays == nil {
		s.Relays = map[string]procID{}
	}
	s.Relays[n.Name] = b.proc
	if err := s.save(); err != nil {
		return err
	}
	return b.proceed(ctx)
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
	tap, err := openTap("d"+strconv.Itoa(spec.Port), !spec.Link.framed())
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
	for i, ends := range [][2]int{{sock, tap}, {tap, sock}} {
		p := pipe{Link: spec.Link, rng: rand.New(rand.NewPCG(uint64(spec.Link.Seed), uint64(i)))}
		go func() { end <- p.carry(ends[0], ends[1]) }()
	}
	return <-end
}

// openTap makes tap interface name with offload headers, for large segments or
// not; it goes with the descriptor.
func openTap(name string, large bool) (int, error) {
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, fmt.Errorf("/dev/net/tun: %w; try: %s", err, deviceRemedy(err, "tun"))
	}
	ifr, err := unix.NewIfreq(name)
	if err != nil {
		return -1, err
	}
	ifr.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_VNET_HDR)
	if err := unix.IoctlIfreq(fd, unix.TUNSETIFF, ifr); err != nil {
		return -1, fmt.Errorf("make %s: %w", name, err)
	}
	offload := unix.TUN_F_CSUM
	if large {
		offload |= unix.TUN_F_TSO4 | unix.TUN_F_TSO6
	}
	if err := unix.IoctlSetInt(fd, unix.TUNSETOFFLOAD, offload); err != nil {
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

// pipe is one direction of a relay.
type pipe struct {
	Link
	rng  *rand.Rand
	free time.Time    // when the line has sent all that was taken
	room atomic.Int64 // bytes held
}

// take says when a frame of size bytes that came at now has passed, or that it is
// lost.
func (p *pipe) take(now time.Time, size int) (due time.Time, ok bool) {
	if p.Loss > 0 && p.rng.Float64() < p.Loss {
		return now, false
	}
	due = now
	if p.Rate > 0 {
		start := p.free
		if start.Before(now) {
			start = now
		}
		if start.Sub(now) > max(rateQueue, rateQueueFrames*p.takes(fullFrame)) {
			return now, false
		}
		p.free = start.Add(p.takes(size))
		due = p.free
	}
	return due.Add(p.Delay), true
}

// takes returns how long the line sends size bytes.
func (p *pipe) takes(size int) time.Duration {
	return time.Duration(int64(size) * 8 * int64(time.Second) / p.Rate)
}

type heldFrame struct {
	due  time.Time
	data []byte
}

// carry moves frames from one descriptor to the other, in order.
func (p *pipe) carry(from, to int) error {
	held := make(chan heldFrame, relayHold)
	go func() {
		for f := range held {
			time.Sleep(time.Until(f.due))
			_, _ = unix.Write(to, f.data) // an interface that is down loses frames
			p.room.Add(-int64(len(f.data)))
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
		due, ok := p.take(time.Now(), n-vnetHdr)
		if !ok || p.room.Load() > relayRoom {
			continue
		}
		select {
		case held <- heldFrame{due, append([]byte(nil), buf[:n]...)}:
			p.room.Add(int64(n))
		default:
		}
	}
}
