package daemon

import (
	"net"
	"os"
	"strings"

	"github.com/unum-os/unum/internal/errs"
)

// Notifier tells the supervisor how the service is, in systemd's protocol: lines
// KEY=VALUE in datagrams to the socket named by NOTIFY_SOCKET. The zero Notifier
// tells nobody.
type Notifier struct{ addr string }

// NewNotifier takes the socket from the environment, and out of it: what this
// process starts must not speak for it.
func NewNotifier() Notifier {
	n := Notifier{os.Getenv("NOTIFY_SOCKET")}
	os.Unsetenv("NOTIFY_SOCKET")
	return n
}

// Tell sends lines such as READY=1, STOPPING=1, or STATUS=words.
func (n Notifier) Tell(lines ...string) error {
	if n.addr == "" {
		return nil
	}
	// A name that begins with @ is in the abstract namespace, for net too.
	c, err := net.DialUnix("unixgram", nil, &net.UnixAddr{Name: n.addr, Net: "unixgram"})
	if err != nil {
		return errs.Wrap(err, "tell the supervisor", n.addr)
	}
	defer c.Close()
	_, err = c.Write([]byte(strings.Join(lines, "\n")))
	return errs.Wrap(err, "tell the supervisor", n.addr)
}
