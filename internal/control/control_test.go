package control

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/unum-os/unum/internal/errs"
	"github.com/unum-os/unum/internal/need"
)

func serve(t *testing.T, setup func(*Server)) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "unum-control-")
	if err != nil {
		t.Fatal(err)
	}
	os.Chmod(dir, 0o755)
	path := filepath.Join(dir, "sock")
	s := New(Config{Path: path, Log: slog.New(slog.NewTextHandler(io.Discard, nil))})
	setup(s)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
		os.RemoveAll(dir)
	})
	for end := time.Now().Add(5 * time.Second); ; time.Sleep(time.Millisecond) {
		if c, err := net.Dial("unix", path); err == nil {
			c.Close()
			return path
		} else if time.Now().After(end) {
			t.Fatal(err)
		}
	}
}

func echo(ctx context.Context, c *Conn, req []byte) error { return c.Send(req) }

func dial(t *testing.T, path string) *Client {
	t.Helper()
	c, err := Dial(context.Background(), path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	c.SetDeadline(time.Now().Add(20 * time.Second))
	return c
}

func TestCall(t *testing.T) {
	path := serve(t, func(s *Server) {
		s.Handle("echo", echo)
		s.Handle("fail", func(context.Context, *Conn, []byte) error {
			return errs.E(errs.Busy, "open", "x", "it is full").WithRemedy("wait")
		})
	})
	c := dial(t, path)
	big := make([]byte, 5<<20)
	rand.Read(big)
	for _, b := range [][]byte{nil, []byte("x"), big} {
		got, err := c.Call(context.Background(), "echo", b)
		if err != nil || !bytes.Equal(got, b) {
			t.Errorf("%d bytes: %d, %v", len(b), len(got), err)
		}
	}
	_, err := c.Call(context.Background(), "fail", nil)
	var e *errs.Error
	if !errors.As(err, &e) || e.Class != errs.Busy || e.Remedy != "wait" || err.Error() != "open x: it is full\ntry: wait" {
		t.Errorf("%v", err)
	}
	if _, err := c.Call(context.Background(), "nosuch", nil); !errs.Has(err, errs.NotSupported) {
		t.Errorf("%v", err)
	}
	if got, err := c.Call(context.Background(), "echo", []byte("still")); err != nil || string(got) != "still" {
		t.Errorf("after errors: %q, %v", got, err)
	}
	if _, err := c.Call(context.Background(), "echo", make([]byte, MaxFrame)); !errs.Has(err, errs.TooLarge) {
		t.Errorf("too large: %v", err)
	}
}

func TestNoDaemon(t *testing.T) {
	for _, path := range []string{filepath.Join(t.TempDir(), "none"), "/proc/none/sock"} {
		_, err := Dial(context.Background(), path)
		if !errs.Has(err, errs.Unavailable) || !strings.Contains(err.Error(), "\ntry: unum up") || !strings.Contains(err.Error(), "unum join ADDR TOKEN") {
			t.Errorf("%v", err)
		}
	}
	// Left behind by a daemon that was killed: a new one takes the place.
	dir := t.TempDir()
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: dir + "/s"})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false)
	l.Close()
	if _, err := Dial(context.Background(), dir+"/s"); !errs.Has(err, errs.Unavailable) {
		t.Errorf("%v", err)
	}
	l, err = listen(dir + "/s")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if _, err := listen(dir + "/s"); !errs.Has(err, errs.Busy) {
		t.Errorf("second daemon: %v", err)
	}
}

func TestMessagesAndFiles(t *testing.T) {
	path := serve(t, func(s *Server) {
		s.Handle("upper", func(ctx context.Context, c *Conn, req []byte) error {
			fs := c.Files()
			if len(fs) != 1 {
				return errs.E(errs.Invalid, "", "", "%d files", len(fs))
			}
			defer fs[0].Close()
			for {
				b, err := c.Recv(ctx)
				if err != nil {
					return nil
				}
				fs[0].Write(b)
				if string(b) == "end" {
					return c.Send([]byte("bye"))
				}
			}
		})
	})
	c := dial(t, path)
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if err := c.Start("upper", []byte("x"), w); err != nil {
		t.Fatal(err)
	}
	w.Close()
	c.Send([]byte("a"))
	c.Send([]byte("end"))
	if b, _, err := c.Recv(); err != nil || string(b) != "bye" {
		t.Errorf("%q, %v", b, err)
	}
	if _, _, err := c.Recv(); err != io.EOF {
		t.Errorf("%v", err)
	}
	if b, err := io.ReadAll(r); err != nil || string(b) != "aend" {
		t.Errorf("%q, %v: the daemon must not keep the descriptor", b, err)
	}
}

// TestClientGone: the context of a request ends with its client.
func TestClientGone(t *testing.T) {
	started, ended := make(chan struct{}), make(chan struct{})
	path := serve(t, func(s *Server) {
		s.Handle("hang", func(ctx context.Context, c *Conn, req []byte) error {
			close(started)
			<-ctx.Done()
			close(ended)
			return nil
		})
	})
	c := dial(t, path)
	c.Start("hang", nil)
	<-started
	c.Close()
	select {
	case <-ended:
	case <-time.After(10 * time.Second):
		t.Error("the request outlived its client")
	}
}

func TestPeer(t *testing.T) {
	need.Root(t, "to be another user")
	var mu sync.Mutex
	var seen []Cred
	path := serve(t, func(s *Server) {
		s.Handle("who", func(ctx context.Context, c *Conn, req []byte) error {
			mu.Lock()
			defer mu.Unlock()
			seen = append(seen, c.Peer)
			return c.Send(nil)
		})
	})
	script := `import socket,os,sys
os.setgroups([7,8]); os.setgid(6); os.setuid(1234)
s=socket.socket(socket.AF_UNIX); s.connect(sys.argv[1])
def ask(v):
    body=b'\xa2\x01'+bytes([0x60+len(v)])+v+b'\x02\x40'
    s.sendall((len(body)+1).to_bytes(4,'big')+b'R'+body)
    while True:
        n=int.from_bytes(s.recv(4,socket.MSG_WAITALL),'big'); f=s.recv(n,socket.MSG_WAITALL)
        if f[:1] in b'DE': return f
print(ask(b'who')[:1].decode())`
	need.Program(t, "python3")
	out, err := exec.Command("python3", "-c", script, path).CombinedOutput()
	if err != nil || string(out) != "D\n" {
		t.Errorf("another user's request: %q, %v", out, err)
	}
	mu.Lock()
	defer mu.Unlock()
	if len(seen) != 1 || seen[0].UID != 1234 || seen[0].GID != 6 || len(seen[0].Groups) != 2 || seen[0].Groups[0] != 7 || seen[0].Groups[1] != 8 || seen[0].PID == 0 {
		t.Errorf("%+v", seen)
	}
}

// TestGarbage: what is no request closes the connection and harms nobody else.
func TestGarbage(t *testing.T) {
	path := serve(t, func(s *Server) { s.Handle("echo", echo) })
	send := func(b []byte, fds ...int) {
		c, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: path})
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		if len(fds) > 0 {
			c.WriteMsgUnix(b, unix.UnixRights(fds...), nil)
		} else {
			c.Write(b)
		}
		c.CloseWrite()
		c.SetReadDeadline(time.Now().Add(10 * time.Second))
		if _, err := io.Copy(io.Discard, c); errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("%x: not closed", b[:min(len(b), 16)])
		}
	}
	frame := func(typ byte, n uint32, b []byte) []byte {
		h := binary.BigEndian.AppendUint32(nil, n)
		return append(append(h, typ), b...)
	}
	send(frame('R', 0, nil))
	send(frame('R', 0xffffffff, nil))
	send(frame('R', MaxFrame+1, []byte("x")))
	send(frame('R', MaxFrame, []byte("x")))
	send(frame('?', 2, []byte("x")))
	send(frame('R', 5, []byte("xxxx")))
	send(frame('D', 1, nil))
	send(frame('M', 1, nil))
	for range 200 {
		b := make([]byte, 300)
		rand.Read(b)
		send(b)
	}
	fds := make([]int, 50)
	for i := range fds {
		fds[i] = 0
	}
	count := func() int { es, _ := os.ReadDir("/proc/self/fd"); return len(es) }
	before := count()
	for range 20 {
		send(frame('R', 5, []byte("xxxx")), fds...)
		send(frame('M', 5, []byte("xxxx")), fds[:4]...)
	}
	for end := time.Now().Add(10 * time.Second); count() > before; time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("%d descriptors before, %d after", before, count())
		}
	}
	c := dial(t, path)
	if got, err := c.Call(context.Background(), "echo", []byte("x")); err != nil || string(got) != "x" {
		t.Errorf("%q, %v", got, err)
	}
}

// TestHoard: a client cannot make the daemon keep more for it than one request and
// some small messages.
func TestHoard(t *testing.T) {
	path := serve(t, func(s *Server) {
		s.Handle("hang", func(ctx context.Context, c *Conn, req []byte) error {
			<-ctx.Done()
			return nil
		})
	})
	for what, send := range map[string]func(c *Client) error{
		"a big message":     func(c *Client) error { return c.Send(make([]byte, maxMessage)) },
		"files on messages": func(c *Client) error { return writeFrame(c.c, frameMessage, nil, []*os.File{os.Stdin}) },
		"a second request":  func(c *Client) error { return c.Start("hang", make([]byte, 1<<20)) },
	} {
		c := dial(t, path)
		if err := c.Start("hang", nil); err != nil {
			t.Fatal(err)
		}
		if err := c.Send(make([]byte, maxMessage-1)); err != nil {
			t.Fatal(err)
		}
		send(c) // the daemon may have closed by then
		_, _, err := c.Recv()
		if err == io.EOF { // the request's end came before the connection's
			_, _, err = c.Recv()
		}
		if !errs.Has(err, errs.Unavailable) {
			t.Errorf("%s: %v", what, err)
		}
	}
}

func TestImage(t *testing.T) {
	t.Setenv(ImageEnv, "build-1")
	path := serve(t, func(s *Server) { s.HandleImage() })
	f, err := Image(path, "build-1", 5*time.Second)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	a, err1 := f.Stat()
	b, err2 := os.Stat("/proc/self/exe")
	if err1 != nil || err2 != nil || !os.SameFile(a, b) {
		t.Error("not the daemon's image")
	}
	if _, err := Image(path, "build-2", 5*time.Second); !errs.Has(err, errs.NotFound) {
		t.Errorf("another build: %v", err)
	}
}

func FuzzFrame(f *testing.F) {
	f.Add([]byte("\x00\x00\x00\x02Rx"))
	f.Add([]byte("\xff\xff\xff\xffR"))
	f.Add([]byte("\x00\x00\x00\x0aR\xa2\x01\x61x\x02\x40"))
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) > 1<<16 {
			return // more than a socket takes at once
		}
		fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		a, c := os.NewFile(uintptr(fds[0]), ""), os.NewFile(uintptr(fds[1]), "")
		a.Write(b)
		a.Close()
		nc, err := net.FileConn(c)
		c.Close()
		if err != nil {
			t.Fatal(err)
		}
		defer nc.Close()
		for {
			_, p, files, err := readFrame(nc.(*net.UnixConn), MaxFrame)
			if err != nil {
				return
			}
			if len(p) > len(b) || len(files) != 0 {
				t.Fatalf("%d bytes, %d files from %d bytes", len(p), len(files), len(b))
			}
			decodeFailure(p)
		}
	})
}

func FuzzRefusal(f *testing.F) {
	e := encodeFailure(errs.E(errs.Busy, "", "", "full"))
	whole := append(binary.BigEndian.AppendUint32(nil, uint32(len(e)+1)), frameError)
	whole = append(whole, e...)
	if err := Refusal(whole); !errs.Has(err, errs.Busy) || err.Error() != "full" {
		f.Errorf("%v", err)
	}
	if err := Refusal([]byte{0, 0, 6, 4, 0, 0, 0, 0, 0}); err != nil {
		f.Errorf("settings of HTTP/2: %v", err)
	}
	f.Add(whole)
	f.Add(whole[:7])
	f.Fuzz(func(t *testing.T, b []byte) {
		if err := Refusal(b); err != nil && (len(b) < 5 || b[4] != frameError) {
			t.Fatal(err)
		}
	})
}
