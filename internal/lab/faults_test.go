package lab

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/unum-os/unum/internal/errs"
)

// hearUDP prints what it hears at addr, word by word, until it hears "end".
func hearUDP(addr string) {
	a, err := net.ResolveUDPAddr("udp", addr)
	if err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	c, err := net.ListenUDP("udp", a)
	if err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	rc, err := c.SyscallConn()
	if err == nil {
		err = rc.Control(func(fd uintptr) {
			err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 64<<20) // none is lost here
		})
	}
	if err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	w := bufio.NewWriter(os.Stdout)
	fmt.Println("listening")
	buf := make([]byte, 1500)
	for {
		n, err := c.Read(buf)
		if err != nil {
			os.Exit(1)
		}
		if string(buf[:n]) == "end" {
			w.Flush()
			os.Exit(0)
		}
		fmt.Fprintf(w, "%s\n", buf[:n])
	}
}

// sayUDP says word so many times.
func sayUDP(addr, word, times string) {
	c, err := net.Dial("udp", addr)
	if err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	n, _ := strconv.Atoi(times)
	for i := range n {
		_, _ = c.Write([]byte(word)) // refused when nobody listens any more
		if i%20 == 19 {
			time.Sleep(time.Millisecond)
		}
	}
	os.Exit(0)
}

// heard returns how often node at heard each word of those that others said to
// it: saying is "n1 word times". The end is said by node end, which at must hear.
func heard(t *testing.T, l *Lab, at, end string, saying ...string) map[string]int {
	t.Helper()
	exe, _ := os.Executable()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	p, err := l.ExecStart(at, ExecOptions{Argv: []string{exe, "__hear", at + ":9"}, Stdout: w})
	w.Close()
	if err != nil {
		t.Fatal(err)
	}
	sc := bufio.NewScanner(r)
	if sc.Scan(); sc.Text() != "listening" {
		t.Fatalf("%s does not listen: %q", at, sc.Text())
	}
	for _, s := range saying {
		f := strings.Fields(s)
		want(t, l, f[0], strings.Join([]string{exe, "__say", at + ":9", f[1], f[2]}, " "), "")
	}
	// What was said before is there before, as the network keeps the order.
	ended := make(chan struct{})
	words := map[string]int{}
	go func() {
		defer close(ended)
		for sc.Scan() {
			words[sc.Text()]++
		}
	}()
	for over := false; !over; {
		want(t, l, end, exe+" __say "+at+":9 end 1", "")
		select {
		case <-ended:
			over = true
		case <-time.After(10 * time.Millisecond):
		}
	}
	if code, err := p.Wait(); code != 0 || err != nil {
		t.Fatalf("listening on %s: code %d, %v", at, code, err)
	}
	return words
}

func TestOneWayCut(t *testing.T) {
	t.Parallel()
	l := upLab(t, "o", 3)
	ctx := t.Context()
	check := func(what string, want2, want1 map[string]bool) {
		t.Helper()
		h2 := heard(t, l, "n2", "n3", "n1 n1 20", "n3 n3 20")
		h1 := heard(t, l, "n1", "n3", "n2 n2 20", "n3 n3 20")
		for n, w := range want2 {
			if (h2[n] > 0) != w {
				t.Errorf("%s: n2 hears %s: %v, want %v", what, n, h2[n] > 0, w)
			}
		}
		for n, w := range want1 {
			if (h1[n] > 0) != w {
				t.Errorf("%s: n1 hears %s: %v, want %v", what, n, h1[n] > 0, w)
			}
		}
	}
	must(t, l.CutOneWay(ctx, []string{"n1"}, []string{"n2"}))
	check("n1 -> n2 cut", map[string]bool{"n1": false, "n3": true}, map[string]bool{"n2": true, "n3": true})
	must(t, l.Delay(ctx, "n2", time.Millisecond)) // a relay before the port changes nothing
	check("n1 -> n2 cut, delayed", map[string]bool{"n1": false, "n3": true}, map[string]bool{"n2": true, "n3": true})
	must(t, l.CutOneWay(ctx, []string{"n1"}, []string{"n2"})) // once more is no more
	must(t, l.Cut(ctx, []string{"n2"}, []string{"n3"}))
	st, err := l.Status(ctx)
	must(t, err)
	if len(st.Cuts) != 1 || len(st.OneWayCuts) != 1 || st.OneWayCuts[0][0][0] != "n1" || st.Links["n2"].Delay != time.Millisecond || st.Delays["n2"] != time.Millisecond {
		t.Errorf("status: %+v", st)
	}
	must(t, l.Heal(ctx, "n3"))
	check("n3 healed", map[string]bool{"n1": false, "n3": true}, map[string]bool{"n2": true})
	must(t, l.Heal(ctx, "n2"))
	check("n2 healed", map[string]bool{"n1": true, "n3": true}, map[string]bool{"n2": true})
	if st, err = l.Status(ctx); err != nil || len(st.Cuts)+len(st.OneWayCuts)+len(st.Links) > 0 {
		t.Errorf("status after heal: %+v, %v", st, err)
	}
	for what, err := range map[string]error{
		"itself": l.Cut(ctx, []string{"n1"}, []string{"n1", "n2"}), "all": l.CutOneWay(ctx, []string{"n1", "n2", "n3"}, nil), "none": l.Cut(ctx, nil, nil),
	} {
		if !errs.Has(err, errs.Invalid) {
			t.Errorf("cut from %s: %v", what, err)
		}
	}
	if err := l.Heal(ctx, "n4"); !errs.Has(err, errs.NotFound) {
		t.Errorf("heal of a node that is not: %v", err)
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func TestLossAndRate(t *testing.T) {
	t.Parallel()
	l := upLab(t, "lr", 2)
	ctx := t.Context()
	// The part that is lost, each way. Of 2,000 the sixth sigma is 6 %.
	const said = 2000
	must(t, l.Loss(ctx, "n2", 0.3, 7))
	for _, ends := range [][2]string{{"n1", "n2"}, {"n2", "n1"}} {
		h := heard(t, l, ends[1], ends[0], fmt.Sprintf("%s x %d", ends[0], said))
		if lost := 1 - float64(h["x"])/said; lost < 0.22 || lost > 0.38 {
			t.Errorf("%s to %s: lost %.3f, want 0.3", ends[0], ends[1], lost)
		}
	}
	st, err := l.Status(ctx)
	must(t, err)
	if k := st.Links["n2"]; k.Loss != 0.3 || k.Seed != 7 {
		t.Errorf("status: %+v", k)
	}
	// All at once, after a reboot too: whole, in order, and as slow as it must be.
	must(t, l.Loss(ctx, "n2", 0.001, 7))
	must(t, l.Delay(ctx, "n2", 2*time.Millisecond))
	must(t, l.Rate(ctx, "n2", 80_000_000))
	must(t, l.Kill(ctx, "n2"))
	must(t, l.Start(ctx, "n2"))
	exe, _ := os.Executable()
	for _, pair := range [][2]string{{"n1", "n2"}, {"n2", "n1"}} {
		want(t, l, pair[0], exe+" __blob "+pair[0]+":8", "listening")
		began := time.Now()
		want(t, l, pair[1], exe+" __dial "+pair[0]+":8 60s | cksum", blobSum(t))
		if d := time.Since(began); d < 2*time.Second {
			t.Errorf("20 MiB at 80 Mbit/s took %v", d)
		}
	}
	// No large segment on the line: the loss of one would be that of 40 frames.
	s, err := readState(l.dir)
	must(t, err)
	dev, err := tool(ctx, "", "nsenter", "-t", strconv.Itoa(s.Switch.Pid), "-n", "cat", "/proc/net/dev")
	must(t, err)
	for _, line := range strings.Split(dev, "\n") {
		var in, inFrames, out, outFrames, x int
		if n, _ := fmt.Sscanf(strings.TrimSpace(line), "p2: %d %d %d %d %d %d %d %d %d %d", &in, &inFrames, &x, &x, &x, &x, &x, &x, &out, &outFrames); n == 10 {
			if in < 20<<20 || out < 20<<20 || in > 1514*inFrames || out > 1514*outFrames {
				t.Errorf("frames larger than the network's: %s", line)
			}
		}
	}
	must(t, l.Rate(ctx, "n2", 0))
	must(t, l.Loss(ctx, "n2", 0, 0))
	must(t, l.Delay(ctx, "n2", 0))
	if h := heard(t, l, "n2", "n1", "n1 x 500"); h["x"] != 500 {
		t.Errorf("all ended: %d of 500 arrived", h["x"])
	}
	if s, err := readState(l.dir); err != nil || len(s.Relays)+len(s.Links) > 0 {
		t.Errorf("relays: %v, links: %v, %v", s.Relays, s.Links, err)
	}
	for what, err := range map[string]error{
		"loss of all": l.Loss(ctx, "n2", 1, 0), "negative loss": l.Loss(ctx, "n2", -0.1, 0), "no rate": l.Rate(ctx, "n2", 1),
		"absurd rate": l.Rate(ctx, "n2", 1<<60), "absurd delay": l.Delay(ctx, "n2", time.Hour), "negative delay": l.Delay(ctx, "n2", -1),
	} {
		if !errs.Has(err, errs.Invalid) {
			t.Errorf("%s: %v", what, err)
		}
	}
	if err := l.Rate(ctx, "n3", 0); !errs.Has(err, errs.NotFound) {
		t.Errorf("rate of a node that is not: %v", err)
	}
}

// TestPipe: what is lost, and when the rest has passed.
func TestPipe(t *testing.T) {
	now := time.Unix(1000, 0)
	p := pipe{Link: Link{Rate: 1_000_000, Delay: time.Millisecond}}
	for i := 1; i <= 3; i++ { // 125 bytes take a millisecond
		if due, ok := p.take(now, 125); !ok || due.Sub(now) != time.Duration(i+1)*time.Millisecond {
			t.Errorf("frame %d: %v, %v", i, due.Sub(now), ok)
		}
	}
	passed := 3
	for {
		if _, ok := p.take(now, 125); !ok {
			break
		}
		passed++
	}
	if passed != 501 { // half a second's worth, and the one that is being sent
		t.Errorf("the queue took %d", passed)
	}
	if due, ok := p.take(now.Add(time.Second), 125); !ok || due.Sub(now) != time.Second+2*time.Millisecond {
		t.Errorf("after it drained: %v, %v", due.Sub(now), ok)
	}
	lost := func(seed uint64) (pattern []bool) {
		p := pipe{Link: Link{Loss: 0.5}, rng: rand.New(rand.NewPCG(seed, 0))}
		for range 1000 {
			_, ok := p.take(now, 100)
			pattern = append(pattern, ok)
		}
		return pattern
	}
	if !slices.Equal(lost(1), lost(1)) || slices.Equal(lost(1), lost(2)) {
		t.Error("the same seed must lose the same, another one others")
	}
}

func TestPause(t *testing.T) {
	t.Parallel()
	l := upLab(t, "p", 2)
	ctx := t.Context()
	exe, _ := os.Executable()
	for _, daemonOnly := range []bool{true, false} {
		p, err := l.ExecStart("n2", ExecOptions{Argv: []string{"sh", "-c", "while :; do :; done"}})
		must(t, err)
		must(t, l.Pause(ctx, "n2", daemonOnly))
		if out, _ := run(t, l, "n1", "timeout 0.5 "+exe+" __dial n2:7"); out == "n2" {
			t.Errorf("daemonOnly %v: a paused daemon answers", daemonOnly)
		}
		stat, _ := run(t, l, "n2", fmt.Sprintf("cut -d')' -f2 /proc/%d/stat | cut -c2", p.Pid()))
		if stopped := stat == "T"; stopped == daemonOnly {
			t.Errorf("daemonOnly %v: another program is in state %s", daemonOnly, stat)
		}
		st, err := l.Status(ctx)
		must(t, err)
		if what := map[bool]string{true: "daemon", false: "node"}[daemonOnly]; st.Paused["n2"] != what || st.Nodes[1].Healthy {
			t.Errorf("daemonOnly %v: status %+v", daemonOnly, st)
		}
		must(t, l.Pause(ctx, "n2", true)) // no less paused by that
		must(t, l.Resume(ctx, "n2"))
		if !reaches(t, l, "n1", "n2") {
			t.Errorf("daemonOnly %v: a daemon that goes on does not answer", daemonOnly)
		}
		must(t, l.Resume(ctx, "n2"))
		must(t, p.Signal(unix.SIGKILL))
		if _, err := p.Wait(); err != nil {
			t.Error(err)
		}
	}
	must(t, l.Pause(ctx, "n2", false))
	must(t, l.Kill(ctx, "n2"))
	if err := l.Pause(ctx, "n2", true); !errs.Has(err, errs.Unavailable) {
		t.Errorf("pause without power: %v", err)
	}
	if err := l.Resume(ctx, "n2"); !errs.Has(err, errs.Unavailable) {
		t.Errorf("resume without power: %v", err)
	}
	must(t, l.Start(ctx, "n2"))
	if st, err := l.Status(ctx); err != nil || !st.Nodes[1].Healthy || len(st.Paused) > 0 {
		t.Errorf("paused, killed and started: %+v, %v", st, err)
	}
}

func TestClock(t *testing.T) {
	l := upLab(t, "t", 2)
	ctx := t.Context()
	// As the daemon finds it.
	file := func(want string) {
		t.Helper()
		out, _ := run(t, l, "n2", `cat "$(tr '\0' '\n' < /proc/$(pgrep -f __serve | head -1)/environ | sed -n 's/^`+ClockEnv+`=//p')"`)
		if out != want {
			t.Errorf("the clock file has %q, want %q", out, want)
		}
	}
	file("wall=+0s boot=+0s")
	must(t, l.Clock(ctx, "n2", Clock{Wall: -time.Hour, Boot: 30 * time.Second}))
	file("wall=-1h0m0s boot=+30s")
	if err := l.Clock(ctx, "n2", Clock{}); !errs.Has(err, errs.Invalid) {
		t.Errorf("time since boot going back: %v", err)
	}
	for _, c := range []Clock{{Wall: maxSkew + 1}, {Wall: -maxSkew - 1}, {Boot: -1}, {Boot: maxSkew + 1}} {
		if err := l.Clock(ctx, "n2", c); !errs.Has(err, errs.Invalid) {
			t.Errorf("%v: %v", c, err)
		}
	}
	if st, err := l.Status(ctx); err != nil || st.Clocks["n2"] != (Clock{-time.Hour, 30 * time.Second}) {
		t.Errorf("status: %+v, %v", st, err)
	}
	must(t, l.Kill(ctx, "n2"))
	must(t, l.Start(ctx, "n2"))
	file("wall=-1h0m0s boot=+0s")
	must(t, l.Clock(ctx, "n2", Clock{}))
	file("wall=+0s boot=+0s")
	if st, err := l.Status(ctx); err != nil || len(st.Clocks) > 0 {
		t.Errorf("status: %+v, %v", st, err)
	}
}

func TestLogs(t *testing.T) {
	l := upLab(t, "log", 1)
	say := func(word string) { want(t, l, "n1", "echo "+word+" >> "+l.LogPath("n1"), "") }
	say("one")
	var out bytes.Buffer
	must(t, l.Logs(t.Context(), "n1", &out, false))
	if !strings.HasSuffix(out.String(), "one\n") {
		t.Errorf("%q", out.String())
	}
	r, w, err := os.Pipe()
	must(t, err)
	defer r.Close()
	ended := make(chan error, 1)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	go func() {
		ended <- l.Logs(ctx, "n1", w, true)
		w.Close()
	}()
	sc := bufio.NewScanner(r)
	say("two")
	for sc.Scan() && sc.Text() != "two" {
	}
	if sc.Text() != "two" {
		t.Error("what is written later does not come")
	}
	cancel()
	if err := <-ended; err != context.Canceled {
		t.Errorf("cancelled: %v", err)
	}
	go func() { ended <- l.Logs(t.Context(), "n1", &out, true) }()
	must(t, l.Down(t.Context()))
	if err := <-ended; err != nil && !errs.Has(err, errs.NotFound) { // it may have been down before it began
		t.Errorf("the lab went: %v", err)
	}
	if err := l.Logs(t.Context(), "n1", &out, false); !errs.Has(err, errs.NotFound) {
		t.Errorf("logs of no lab: %v", err)
	}
}

func TestParseFaults(t *testing.T) {
	for s, want := range map[string]float64{"30%": 0.3, "0": 0, "0%": 0, "0.5%": 0.005} {
		if p, err := parsePercent(s); err != nil || p != want {
			t.Errorf("%s: %v, %v", s, p, err)
		}
	}
	for _, s := range []string{"", "%", "30", "x%", "30%%"} {
		if p, err := parsePercent(s); err == nil {
			t.Errorf("%q is %v", s, p)
		}
	}
	for s, want := range map[string]int64{"1mbit": 1e6, "0": 0, "1.5Gbit": 15e8, "500kbit": 5e5, "9600bit": 9600} {
		if r, err := parseRate(s); err != nil || r != want {
			t.Errorf("%s: %v, %v", s, r, err)
		}
	}
	for _, s := range []string{"", "1", "mbit", "-1mbit", "1bit", "1e30gbit", "NaNmbit", "infmbit", "1mbps", "1 mbit"} {
		if r, err := parseRate(s); err == nil {
			t.Errorf("%q is %v", s, r)
		}
	}
	for bits, want := range map[int64]string{1e6: "1mbit", 1500e3: "1500kbit", 1e9: "1gbit", 9601: "9601bit"} {
		if got := formatRate(bits); got != want {
			t.Errorf("%d: %s", bits, got)
		}
	}
}
