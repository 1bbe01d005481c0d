package rpc

import (
	"bufio"
	"net"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// rawConn is the connection under TLS. It reads ahead, so that small TLS records
// do not cost a system call each; after hold it keeps what is written until
// flush, for the same reason; and it remembers when the peer was last heard.
type rawConn struct {
	net.Conn
	r     *bufio.Reader
	count *counts      // of the endpoint
	heard atomic.Int64 // when bytes last came, nanoseconds after base

	mu   sync.Mutex // over w and held; held over writes to Conn, which close ends
	w    *bufio.Writer
	held bool
}

// base is the zero of heard: a monotonic clock, which stands still while the
// machine sleeps, as the peers' patience does not concern it then.
var base = time.Now()

func mono() int64 { return int64(time.Since(base)) }

func newRawConn(c net.Conn, buffer int, n *counts) *rawConn {
	r := &rawConn{Conn: c, count: n, r: bufio.NewReaderSize(c, buffer), w: bufio.NewWriterSize(c, buffer)}
	r.heard.Store(mono())
	return r
}

func (c *rawConn) Read(p []byte) (int, error) {
	n, err := c.r.Read(p)
	if n > 0 {
		c.heard.Store(mono())
		c.count.heard.Add(uint64(n))
	}
	return n, err
}

func (c *rawConn) Write(p []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	n, err := c.w.Write(p)
	c.count.sent.Add(uint64(n))
	if err == nil && !c.held {
		err = c.w.Flush()
	}
	return n, err
}

// hold makes writes wait for flush.
func (c *rawConn) hold() {
	c.mu.Lock()
	c.held = true
	c.mu.Unlock()
}

func (c *rawConn) flush() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.w.Flush()
}

// silence is how long nothing has come.
func (c *rawConn) silence() time.Duration { return time.Duration(mono() - c.heard.Load()) }

// excuse makes the silence so far count for nothing.
func (c *rawConn) excuse() { c.heard.Store(mono()) }

// progressing reports whether the peer's kernel is taking what we sent: on a slow
// network an answer to a ping waits behind megabytes.
func (c *rawConn) progressing() bool {
	sc, ok := c.Conn.(syscall.Conn)
	if !ok {
		return false
	}
	rc, err := sc.SyscallConn()
	if err != nil {
		return false
	}
	busy := false
	err = rc.Control(func(fd uintptr) {
		queued, err := unix.IoctlGetInt(int(fd), unix.SIOCOUTQ)
		if err != nil || queued == 0 {
			return
		}
		info, err := unix.GetsockoptTCPInfo(int(fd), unix.IPPROTO_TCP, unix.TCP_INFO)
		busy = err == nil && info.Last_ack_recv < 1000 // milliseconds
	})
	return err == nil && busy
}
