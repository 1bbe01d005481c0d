package metric

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// serve runs a server at addr until the test ends.
func serve(t *testing.T, addr string, change func(*Server)) *Server {
	t.Helper()
	reg := prometheus.NewRegistry()
	var n atomic.Uint64
	n.Store(7)
	reg.MustRegister(Counter("unum_test_things_total", "Things.", &n))
	s := NewServer(addr, reg, slog.New(slog.DiscardHandler))
	s.again = 10 * time.Millisecond
	if change != nil {
		change(s)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
		if s.Addr() != nil {
			t.Error("it says that it listens yet")
		}
	})
	return s
}

func await(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(30 * time.Second); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("never: %s", what)
		}
	}
}

func up(t *testing.T, s *Server) string {
	t.Helper()
	await(t, "it listens", func() bool { return s.Addr() != nil })
	return s.Addr().String()
}

// The endpoint answers one question and no other.
func TestServer(t *testing.T) {
	addr := up(t, serve(t, "127.0.0.1:0", nil))
	for _, c := range []struct {
		method, path string
		body         io.Reader
		code         int
	}{
		{"GET", "/metrics", nil, 200}, {"HEAD", "/metrics", nil, 200},
		{"POST", "/metrics", strings.NewReader("x"), 405}, {"PUT", "/metrics", nil, 405}, {"DELETE", "/metrics", nil, 405},
		{"GET", "/", nil, 404}, {"GET", "/debug/pprof/", nil, 404}, {"GET", "/metrics/x", nil, 404},
	} {
		q, err := http.NewRequest(c.method, "http://"+addr+c.path, c.body)
		if err != nil {
			t.Fatal(err)
		}
		r, err := http.DefaultClient.Do(q)
		if err != nil {
			t.Fatal(err)
		}
		b, err := io.ReadAll(r.Body)
		r.Body.Close()
		if err != nil || r.StatusCode != c.code {
			t.Errorf("%s %s: %s %v, want %d", c.method, c.path, r.Status, err, c.code)
		}
		if c.code == 200 && c.method == "GET" && !strings.Contains(string(b), "unum_test_things_total 7\n") {
			t.Errorf("%s", b)
		}
	}
	q, err := http.NewRequest("GET", "http://"+addr+"/metrics", nil)
	if err != nil {
		t.Fatal(err)
	}
	q.Header.Set("X-Long", strings.Repeat("x", 64<<10))
	r, err := http.DefaultClient.Do(q)
	if err != nil {
		t.Fatal(err)
	}
	r.Body.Close()
	if r.StatusCode != http.StatusRequestHeaderFieldsTooLarge {
		t.Errorf("a header of 64 KiB: %s", r.Status)
	}
}

// Who says nothing, or nonsense, is sent away.
func TestSilentAndSenseless(t *testing.T) {
	addr := up(t, serve(t, "127.0.0.1:0", func(s *Server) {
		s.http.ReadHeaderTimeout, s.http.ReadTimeout = 50*time.Millisecond, 50*time.Millisecond
	}))
	for _, say := range []string{"", "GET /met", "\x16\x03\x01\x02\x00\x01\x00\x01\xfc", "\x00\xff\x00\xff\r\n\r\n", "GET /metrics HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\nab"} {
		c, err := net.Dial("tcp", addr)
		if err != nil {
			t.Fatal(err)
		}
		fmt.Fprint(c, say)
		c.SetReadDeadline(time.Now().Add(30 * time.Second))
		if _, err := io.Copy(io.Discard, c); err != nil {
			if ne, ok := err.(net.Error); ok && ne.Timeout() {
				t.Errorf("%q holds its connection", say)
			}
		}
		c.Close()
	}
}

// Beyond the limit connections wait, and get their turn when others end.
func TestConnectionsAreBounded(t *testing.T) {
	addr := up(t, serve(t, "127.0.0.1:0", nil))
	ask := func(c net.Conn) error {
		if _, err := fmt.Fprint(c, "GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n"); err != nil {
			return err
		}
		r, err := http.ReadResponse(bufio.NewReader(c), nil)
		if err != nil {
			return err
		}
		_, err = io.Copy(io.Discard, r.Body)
		return err
	}
	var held []net.Conn
	for range maxConns {
		c, err := net.Dial("tcp", addr)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		if err := ask(c); err != nil {
			t.Fatal(err)
		}
		held = append(held, c)
	}
	late, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	defer late.Close()
	got := make(chan error, 1)
	go func() { got <- ask(late) }()
	// While the others are kept alive it is not served; they still are.
	for range 3 {
		for _, c := range held {
			if err := ask(c); err != nil {
				t.Fatal(err)
			}
		}
		select {
		case err := <-got:
			t.Fatalf("one more than %d was served (%v)", maxConns, err)
		default:
		}
	}
	held[0].Close()
	if err := <-got; err != nil {
		t.Fatal(err)
	}
}

// An address that is taken is no failure; it is said, and tried again.
func TestAddressTaken(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := serve(t, l.Addr().String(), nil)
	await(t, "it says why", func() bool { return s.Err() != nil && strings.Contains(s.Err().Error(), "address already in use") })
	if s.Addr() != nil {
		t.Error("it says that it listens")
	}
	l.Close()
	up(t, s)
	if s.Err() != nil {
		t.Error(s.Err())
	}
}

func TestOff(t *testing.T) {
	s := serve(t, "", nil)
	if s.Err() != nil || s.Addr() != nil {
		t.Error(s.Err(), s.Addr())
	}
}

// Names and shapes are what Prometheus takes.
func TestShapes(t *testing.T) {
	reg := prometheus.NewRegistry()
	each := func(yield func(string, float64)) { yield("a", 1); yield("b", 2) }
	h := Durations("unum_test_work_seconds", "Work.")
	h.Observe(0.003)
	reg.MustRegister(Counters("unum_test_x_total", "X.", "kind", each), Gauges("unum_test_y", "Y.", "kind", each), h,
		CounterFunc("unum_test_z_total", "Z.", func() float64 { return 3 }), Gauge("unum_test_w", "W.", func() float64 { return 4 }))
	fs, err := reg.Gather()
	if err != nil || len(fs) != 5 {
		t.Fatal(len(fs), err)
	}
	for _, f := range fs {
		want := map[string]int{"unum_test_x_total": 2, "unum_test_y": 2}[f.GetName()]
		if want != 0 && len(f.Metric) != want {
			t.Errorf("%s has %d", f.GetName(), len(f.Metric))
		}
	}
	work := fs[1]
	if top := work.Metric[0].GetHistogram().GetBucket(); work.GetName() != "unum_test_work_seconds" || len(top) == 0 || top[len(top)-1].GetUpperBound() < 30 {
		t.Errorf("%v", work)
	}
}
