package main

import (
	"bufio"
	"context"
	"flag"
	"fmt"
	"os"
	"sync"
	"time"

	"github.com/unum-os/unum/internal/control"
	"github.com/unum-os/unum/internal/control/api"
)

func key(w, i int) string { return fmt.Sprintf("user/0/bench/%d", (w+i*256)%900) }

func dial(socket string) (*api.Client, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	return api.Dial(ctx, socket)
}

// productVerb loads a daemon as its own CLI would: each goroutine has a call
// under way, all over a few connections.
func productVerb(fs *flag.FlagSet) func() error {
	socket := fs.String("socket", control.DefaultPath, "of the daemon")
	d := fs.Duration("time", 3*time.Second, "for each figure")
	rounds := fs.Int("rounds", 3, "how often")
	return func() error {
		var cs []*api.Client
		for range 4 {
			c, err := dial(*socket)
			if err != nil {
				return err
			}
			defer c.Close()
			cs = append(cs, c)
		}
		value := make([]byte, 64)
		put := func(ctx context.Context, w, i int) error {
			_, err := cs[w%len(cs)].Record.Put(ctx, &api.PutRequest{Key: key(w, i), Value: value})
			return err
		}
		get := func(ctx context.Context, w, i int) error {
			_, err := cs[w%len(cs)].Record.Get(ctx, &api.GetRequest{Key: key(0, 0)})
			return err
		}
		var r rows
		for range *rounds {
			for _, x := range []struct {
				name string
				n    int
				f    func(context.Context, int, int) error
			}{{"Record.Put, 1 at a time", 1, put}, {"Record.Put, 256 at a time", 256, put}, {"Record.Get, 1 at a time", 1, get}, {"Record.Get, 64 at a time", 64, get}} {
				got, err := load(x.n, *d, x.f)
				if err != nil {
					return fmt.Errorf("%s: %w", x.name, err)
				}
				r.add(x.name, got)
			}
		}
		r.print()
		return nil
	}
}

func leaderVerb(fs *flag.FlagSet) func() error {
	socket := fs.String("socket", control.DefaultPath, "of the daemon")
	return func() error {
		c, err := dial(*socket)
		if err != nil {
			return err
		}
		defer c.Close()
		st, err := c.Node.Status(context.Background(), &api.StatusRequest{})
		if err != nil {
			return err
		}
		for _, m := range st.Members {
			if m.Id == st.Node && m.Self != nil && len(m.Self.Groups) > 0 && m.Self.Groups[0].Leader != 0 {
				fmt.Printf("n%d\n", m.Self.Groups[0].Leader)
				return nil
			}
		}
		return fmt.Errorf("nobody leads the record, says %s", *socket)
	}
}

// gapVerb begins a Put every 10 ms, whatever became of those before, and says
// "ready" once 20 are acknowledged. After a line on its standard input it waits
// for one that was begun later, and prints the longest time in which none was
// acknowledged, and how long the slowest one took.
func gapVerb(fs *flag.FlagSet) func() error {
	socket := fs.String("socket", control.DefaultPath, "of the daemon")
	return func() error {
		c, err := dial(*socket)
		if err != nil {
			return err
		}
		defer c.Close()
		g := &gap{c: c, room: make(chan struct{}, 1000), ready: make(chan struct{}), over: make(chan struct{})}
		go func() {
			bufio.NewReader(os.Stdin).ReadString('\n')
			g.mu.Lock()
			g.told = time.Now()
			g.mu.Unlock()
		}()
		go g.write()
		<-g.ready
		fmt.Println("ready")
		select {
		case <-g.over:
		case <-time.After(60 * time.Second):
			return fmt.Errorf("nothing is acknowledged for a minute")
		}
		g.mu.Lock()
		defer g.mu.Unlock()
		fmt.Printf("%.3f %.3f\n", g.longest.Seconds(), g.slowest.Seconds())
		return nil
	}
}

type gap struct {
	c     *api.Client
	room  chan struct{}
	ready chan struct{} // closed when there was enough
	over  chan struct{} // closed when all is seen

	mu               sync.Mutex
	n                int
	last, told       time.Time
	longest, slowest time.Duration
}

func (g *gap) write() {
	for i := 0; ; i++ {
		g.room <- struct{}{}
		go func() {
			g.put(i)
			<-g.room
		}()
		time.Sleep(10 * time.Millisecond) // the load is given, not as fast as can be
	}
}

func (g *gap) put(i int) {
	ctx, cancel := context.WithTimeout(context.Background(), 15*time.Second)
	defer cancel()
	begin := time.Now()
	_, err := g.c.Record.Put(ctx, &api.PutRequest{Key: key(i, 0), Value: []byte("x")})
	now := time.Now()
	g.mu.Lock()
	defer g.mu.Unlock()
	select {
	case <-g.over:
		return
	default:
	}
	if g.n >= 20 {
		g.slowest = max(g.slowest, now.Sub(begin))
	}
	if err != nil {
		return
	}
	if g.n++; g.n == 20 {
		close(g.ready)
	} else if g.n > 20 {
		g.longest = max(g.longest, now.Sub(g.last))
	}
	g.last = now
	if !g.told.IsZero() && begin.After(g.told) {
		close(g.over)
	}
}
