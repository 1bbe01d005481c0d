package member

import (
	"encoding/binary"
	"net"
	"net/netip"
	"strconv"

	"github.com/unum-os/unum/internal/ids"
)

// port is part of every made-up address; it means nothing.
const port = 7400

// prefix begins every made-up address: a private IPv6 prefix ("unum" in hex);
// the node's number follows.
var prefix = [8]byte{0xfd, 0x75, 0x6e, 0x75, 0x6d}

func ipOf(n ids.Node) net.IP {
	b := make(net.IP, net.IPv6len)
	copy(b, prefix[:])
	binary.BigEndian.PutUint64(b[8:], uint64(n))
	return b
}

func nodeOfIP(ip net.IP) (ids.Node, bool) {
	b := ip.To16()
	if b == nil || [8]byte(b[:8]) != prefix {
		return 0, false
	}
	n := ids.Node(binary.BigEndian.Uint64(b[8:]))
	return n, n != 0
}

func hostPort(n ids.Node) string { return net.JoinHostPort(ipOf(n).String(), strconv.Itoa(port)) }

func nodeOf(hostPort string) (ids.Node, bool) {
	ap, err := netip.ParseAddrPort(hostPort)
	if err != nil {
		return 0, false
	}
	return nodeOfIP(ap.Addr().AsSlice())
}

// addr is a node as a net.Addr.
type addr ids.Node

func (a addr) Network() string { return "unum" }
func (a addr) String() string  { return hostPort(ids.Node(a)) }
