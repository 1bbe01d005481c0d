package test

import (
	"bufio"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	be "encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"os"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/unum-os/unum/internal/identity"
	"github.com/unum-os/unum/internal/ids"
)

func init() {
	workers["noise"] = noiseWorker
	workers["probe"] = probeWorker
}

// The protocols a node offers.
var protocols = []string{"unum-rpc/1", "unum-bulk/1", "unum-cast/1", "unum-mux/1", "unum-join/1"}

// ports finds what a node listens on, from the kernel.
func (c *cluster) ports(node string) (tcp, udp []int) {
	c.t.Helper()
	read := func(files, state string) (ports []int) {
		seen := map[int]bool{}
		for line := range strings.SplitSeq(c.must(node, "cat "+files), "\n") {
			f := strings.Fields(line)
			if len(f) < 4 || !strings.Contains(f[1], ":") || state != "" && f[3] != state {
				continue
			}
			_, hex, _ := strings.Cut(f[1], ":")
			n, err := strconv.ParseInt(hex, 16, 32)
			if err == nil && !seen[int(n)] {
				seen[int(n)] = true
				ports = append(ports, int(n))
			}
		}
		return ports
	}
	return read("/proc/net/tcp /proc/net/tcp6", "0A"), read("/proc/net/udp /proc/net/udp6", "")
}

// sockets finds the Unix sockets on which programs of a node listen.
func (c *cluster) sockets(node string) (paths []string) {
	for line := range strings.SplitSeq(c.must(node, "cat /proc/net/unix"), "\n") {
		if f := strings.Fields(line); len(f) == 8 && f[3] == "00010000" {
			paths = append(paths, f[7])
		}
	}
	return paths
}

// noise sends random bytes to everything the daemon of n1 listens on, from
// another node and from its own, and holds connections open that say nothing.
// The daemon goes on serving, and afterwards has what it had.
func noise(t *testing.T, c *cluster) {
	tcp, udp := c.ports("n1")
	unixes := c.sockets("n1")
	if len(tcp) == 0 || len(unixes) == 0 {
		t.Fatalf("n1 listens on %v and %v: what is to be tested is not there", tcp, unixes)
	}
	first := strings.TrimSpace(c.must("n1", "hostname -I"))
	var targets []string
	for _, p := range tcp {
		targets = append(targets, fmt.Sprintf("tcp:%s:%d", first, p))
	}
	for _, p := range udp {
		targets = append(targets, fmt.Sprintf("udp:%s:%d", first, p))
	}
	before := c.usage("n1")
	var wg sync.WaitGroup
	for _, v := range []struct {
		node    string
		targets []string
	}{{"n2", targets}, {"n1", func() (u []string) {
		for _, p := range unixes {
			u = append(u, "unix:"+p)
		}
		for _, p := range tcp { // the metrics are for the node's own programs
			if p != 7400 {
				u = append(u, fmt.Sprintf("tcp:127.0.0.1:%d", p))
			}
		}
		return u
	}()}} {
		for _, target := range v.targets {
			cmd := c.worker(v.node, "noise", target)
			hold, err := cmd.StdinPipe()
			if err != nil {
				t.Fatal(err)
			}
			said, err := cmd.StdoutPipe()
			if err != nil {
				t.Fatal(err)
			}
			cmd.Stderr = os.Stderr
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			wg.Go(func() {
				defer cmd.Wait()
				defer hold.Close()
				r := bufio.NewReader(said)
				line, err := r.ReadString('\n')
				if err != nil || !strings.HasPrefix(line, "held ") {
					t.Errorf("noise for %s: %q, %v", target, line, err)
					return
				}
				// While its connections hang there, others are served.
				for _, script := range []string{
					"echo " + target + " > /unum/during && UNUM run --on n1 cat /unum/during",
					"UNUM status --healthy; cat /unum/during",
				} {
					for _, node := range []string{"n1", "n3"} {
						if r := c.run(node, script); r.code != 0 {
							t.Errorf("during %s (%s): %s on %s: %v", target, strings.TrimSpace(line), script, node, r)
						}
					}
				}
			})
		}
	}
	wg.Wait()
	var after usage
	until(t, "the descriptors are given back", 30*time.Second, func() bool {
		after = c.usage("n1")
		return after.fds <= before.fds+16 // a link or a job of its own life more
	})
	if grown := after.rss - before.rss; grown > 96<<10 {
		t.Errorf("the daemon has grown by %d MiB, to %d", grown>>10, after.rss>>10)
	}
	t.Logf("tcp %v, udp %v, unix %v; before %+v, after %+v", tcp, udp, unixes, before, after)
	if out, code := c.sh("n1", "grep -c -e panic -e 'broken invariant' /var/lib/unum-lab/"+c.name+"/logs/n1.log"); code == 0 {
		t.Errorf("the daemon's log tells of %s panics", strings.TrimSpace(out))
	}
	if st := c.must("n3", "UNUM nodes"); strings.Count(st, "\n") != 4 || strings.Count(st, " yes ") < 6 {
		t.Errorf("afterwards:\n%s", st)
	}
}

// noiseWorker makes the noise at one target, then holds silent connections until
// its input ends. It says "held N" when it does.
func noiseWorker(args []string) int {
	network, addr, _ := strings.Cut(args[0], ":")
	sizes := []int{0, 1, 3, 4, 5, 6, 64, 1000, 4096, 70_000, 1 << 20}
	dial := func() (net.Conn, error) { return net.DialTimeout(network, addr, 5*time.Second) }
	blow := func(c net.Conn, b []byte) {
		defer c.Close()
		c.SetDeadline(time.Now().Add(500 * time.Millisecond)) // some are held until a time-out of the daemon's; that is not waited for
		c.Write(b)
		if w, ok := c.(interface{ CloseWrite() error }); ok && len(b)%2 == 0 {
			w.CloseWrite()
		}
		io.Copy(io.Discard, io.LimitReader(c, 1<<20))
	}
	var wg sync.WaitGroup
	each := func(f func(b []byte)) {
		for _, n := range sizes {
			b := make([]byte, n)
			rand.Read(b)
			wg.Go(func() { f(b) })
		}
		wg.Wait()
	}
	shapes := [][]byte{
		nil,
		{0xff, 0xff, 0xff, 0xff},               // the longest length there is
		{0, 0, 0, 9, 'R'},                      // a request of the control socket
		{0, 0x7f, 0xff, 0xff, 'R'},             // and its largest
		{0, 0, 0, 0},                           // nothing
		{22, 3, 1, 0xff, 0xff},                 // a TLS record
		{22, 3, 1, 0, 200, 1, 0, 0, 196, 3, 3}, // a TLS hello
		[]byte("GET / HTTP/1.1\r\nHost: unum\r\n\r\n"), // a browser that lost its way
		[]byte("SSH-2.0-OpenSSH_9.2p1 Debian-2\r\n"),   // and a shell
		[]byte("PRI * HTTP"),                           // half the preface of HTTP/2
		[]byte("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"),     // all of it
		[]byte("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00\xff\xff\xff\x01\x04\x00\x00\x00\x01"), // and a header list of 16 MiB
		be.BigEndian.AppendUint64(nil, 1<<63|0xffff), // a length of 64 bits
		be.LittleEndian.AppendUint64(nil, 1<<31),     // and the other way round
	}
	for _, shape := range shapes {
		each(func(b []byte) {
			if c, err := dial(); err == nil {
				blow(c, append(append([]byte(nil), shape...), b...))
			}
		})
	}
	if network == "tcp" {
		own := selfSigned()
		for _, proto := range append([]string{"", "h2"}, protocols...) {
			conf := &tls.Config{InsecureSkipVerify: true, Certificates: []tls.Certificate{own}}
			if proto != "" {
				conf.NextProtos = []string{proto}
			}
			for _, shape := range shapes {
				each(func(b []byte) {
					c, err := dial()
					if err != nil {
						return
					}
					c.SetDeadline(time.Now().Add(500 * time.Millisecond))
					t := tls.Client(c, conf)
					if t.Handshake() != nil {
						c.Close()
						return
					}
					blow(t, append(append([]byte(nil), shape...), b...))
				})
				if proto != "unum-join/1" {
					break // nothing is read from them
				}
			}
		}
	}
	if network == "unix" {
		descriptors(addr)
	}
	var held []net.Conn
	for i := range 400 {
		c, err := dial()
		if err != nil {
			continue // refused: that is one way to survive
		}
		switch i % 4 {
		case 0, 2:
			c.Write([]byte{22}) // one byte of a hello that does not come
		case 1:
			c.Write([]byte{'P'}) // and of a preface
		}
		held = append(held, c)
	}
	fmt.Println("held", len(held))
	io.Copy(io.Discard, os.Stdin)
	for _, c := range held {
		c.Close()
	}
	return 0
}

// descriptors sends the daemon descriptors nobody asked for.
func descriptors(path string) {
	null, err := os.Open(os.DevNull)
	if err != nil {
		return
	}
	defer null.Close()
	for n := range 64 {
		c, err := net.Dial("unix", path)
		if err != nil {
			continue
		}
		fds := make([]int, n)
		for i := range fds {
			fds[i] = int(null.Fd())
		}
		c.(*net.UnixConn).WriteMsgUnix([]byte{0, 0, 0, 9, 'R', 1, 2, 3}, unix.UnixRights(fds...), nil)
		c.Close()
	}
}

// selfSigned is a certificate that nobody has vouched for.
func selfSigned() tls.Certificate {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		panic(err)
	}
	t := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, t, t, key.Public(), key)
	if err != nil {
		panic(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

// stranger: nodes of another cluster and forged certificates are refused, on
// every protocol, and change nothing.
func stranger(t *testing.T, c *cluster) {
	first := strings.TrimSpace(c.must("n1", "hostname -I"))
	was := c.must("n1", "UNUM nodes --json | grep '\"id\"'")
	for _, proto := range protocols[:4] {
		for who, want := range map[string]string{"member": "accepted\n", "forged": "refused\n", "self-signed": "refused\n", "nobody": "refused\n"} {
			cmd := c.worker("n2", "probe", first+":7400", proto, who)
			cmd.Stderr = os.Stderr
			out, err := cmd.Output()
			if string(out) != want {
				t.Errorf("%s on %s: %q, %v, want %q", who, proto, out, err, want)
			}
		}
	}
	// A whole node of another cluster that takes n1 for its peer.
	s := c.second("n3", "stranger", 7701)
	d := s.launch("up")
	d.healthy()
	if code := d.stop(syscall.SIGTERM); code != 0 {
		t.Fatalf("stopped by SIGTERM: code %d: %s", code, d.out)
	}
	c.must("n3", fmt.Sprintf(`sed -i '/"sum"/d; s/"version": 3/"version": 2/; s/"addr"/"peers": {"n2": "%s:7400"}, "addr"/' %s/node.json`, first, s.dir()))
	d = s.launch("up")
	until(t, "it is refused", 30*time.Second, func() bool { return strings.Contains(d.out.String(), "no other node answers") || d.out.ended() })
	if !strings.Contains(d.out.String(), "refused this node") && !strings.Contains(d.out.String(), "verify certificate") {
		t.Errorf("it was not told why: %s", d.out)
	}
	if now := c.must("n1", "UNUM nodes --json | grep '\"id\"'"); now != was {
		t.Errorf("the members were %s, are %s", was, now)
	}
	d.stop(syscall.SIGTERM)
	s.gone(t)
	s.erase()
}

// probeWorker tries to become a peer and prints whether it was accepted: a node
// says hello to those it takes.
func probeWorker(args []string) int {
	addr, proto, who := args[0], args[1], args[2]
	conf := &tls.Config{InsecureSkipVerify: true, NextProtos: []string{proto}}
	cert, err := tls.LoadX509KeyPair("/var/lib/unum/identity/node.pem", "/var/lib/unum/identity/node.key")
	if err != nil {
		fmt.Println(err)
		return 1
	}
	switch who {
	case "member":
		conf.Certificates = []tls.Certificate{cert}
	case "self-signed":
		conf.Certificates = []tls.Certificate{selfSigned()}
	case "forged":
		// All names are right, the authority's too. The signature is not.
		b, err := os.ReadFile("/var/lib/unum/identity/ca.pem")
		if err == nil {
			conf.Certificates, err = forge(b)
		}
		if err != nil {
			fmt.Println(err)
			return 1
		}
	}
	c, err := tls.DialWithDialer(&net.Dialer{Timeout: 10 * time.Second}, "tcp", addr, conf)
	if err == nil {
		defer c.Close()
		c.SetDeadline(time.Now().Add(10 * time.Second))
		_, err = io.ReadFull(c, make([]byte, 8))
	}
	var late net.Error
	switch {
	case err == nil:
		fmt.Println("accepted")
	case errors.As(err, &late) && late.Timeout():
		fmt.Println("no answer")
	default:
		fmt.Println("refused")
	}
	return 0
}

func forge(real []byte) ([]tls.Certificate, error) {
	trust, err := identity.ParseTrust(real)
	if err != nil {
		return nil, err
	}
	ca, err := identity.NewCA(trust.Cluster())
	if err != nil {
		return nil, err
	}
	key, csr, err := identity.NewRequest()
	if err != nil {
		return nil, err
	}
	cert, err := ca.Sign(csr, ids.Node(2), identity.RoleStore, time.Now())
	if err != nil {
		return nil, err
	}
	pair, err := tls.X509KeyPair(append(cert, ca.CertPEM()...), key)
	return []tls.Certificate{pair}, err
}
