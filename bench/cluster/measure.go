package main

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// result is what a load came to. Times are in microseconds.
type result struct {
	Ops  int     `json:"ops"`
	Rate float64 `json:"rate"` // a second
	P50  float64 `json:"p50"`
	P99  float64 `json:"p99"`
	Max  float64 `json:"max"`
	CPU  float64 `json:"cpu,omitempty"` // of all hosts, for one operation
}

func summary(took []time.Duration, all time.Duration) result {
	if len(took) == 0 {
		return result{}
	}
	slices.Sort(took)
	us := func(q float64) float64 {
		return float64(took[min(len(took)-1, int(q*float64(len(took))))]) / float64(time.Microsecond)
	}
	return result{Ops: len(took), Rate: float64(len(took)) / all.Seconds(), P50: us(0.5), P99: us(0.99), Max: us(1)}
}

// load has workers call f over and over for a time. f gets the worker's number
// and how often it was called by it. The first error ends everything.
func load(workers int, d time.Duration, f func(ctx context.Context, worker, i int) error) (result, error) {
	ctx, cancel := context.WithCancelCause(context.Background())
	defer cancel(nil)
	var mu sync.Mutex
	var all []time.Duration
	var wg sync.WaitGroup
	begin := time.Now()
	for w := range workers {
		wg.Go(func() {
			var took []time.Duration
			for i := 0; ctx.Err() == nil; i++ {
				a := time.Now()
				if a.Sub(begin) > d {
					break
				}
				if err := f(ctx, w, i); err != nil {
					cancel(err)
					return
				}
				took = append(took, time.Since(a))
			}
			mu.Lock()
			all = append(all, took...)
			mu.Unlock()
		})
	}
	wg.Wait()
	return summary(all, time.Since(begin)), context.Cause(ctx)
}

// syncs appends 4 KiB and syncs it, n times.
func syncs(dir string, n int) (result, error) {
	f, err := os.CreateTemp(dir, "syncs")
	if err != nil {
		return result{}, err
	}
	defer os.Remove(f.Name())
	defer f.Close()
	block := make([]byte, 4096)
	var took []time.Duration
	begin := time.Now()
	for range n {
		a := time.Now()
		if _, err := f.Write(block); err != nil {
			return result{}, err
		}
		if err := unix.Fdatasync(int(f.Fd())); err != nil {
			return result{}, err
		}
		took = append(took, time.Since(a))
	}
	return summary(took, time.Since(begin)), nil
}

func echo(addr string) error {
	l, err := net.Listen("tcp", addr)
	if err != nil {
		return err
	}
	for {
		c, err := l.Accept()
		if err != nil {
			return err
		}
		go func() {
			defer c.Close()
			io.Copy(c, c)
		}()
	}
}

// trips sends 200 bytes to an echo and waits for them, n times.
func trips(to string, n int) (result, error) {
	c, err := net.DialTimeout("tcp", to, 5*time.Second)
	if err != nil {
		return result{}, err
	}
	defer c.Close()
	b := make([]byte, 200)
	var took []time.Duration
	begin := time.Now()
	for range n {
		a := time.Now()
		if _, err := c.Write(b); err != nil {
			return result{}, err
		}
		if _, err := io.ReadFull(c, b); err != nil {
			return result{}, err
		}
		took = append(took, time.Since(a))
	}
	return summary(took, time.Since(begin)), nil
}

// usage is what a process has used since its start. Threads that have ended are
// not in it: a Go program keeps its threads.
type usage struct {
	Pid   int
	At    time.Time
	CPU   time.Duration
	Wakes int // how often a thread got a processor
	RSS   int // KiB
	Own   int // KiB of it that no file backs
}

func usageOf(pid int) (usage, error) {
	u := usage{Pid: pid, At: time.Now()}
	tasks, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/schedstat", pid))
	if err != nil || len(tasks) == 0 {
		return u, fmt.Errorf("no process %d", pid)
	}
	for _, t := range tasks {
		b, err := os.ReadFile(t)
		if err != nil {
			continue // it has ended
		}
		f := strings.Fields(string(b))
		ns, _ := strconv.ParseInt(f[0], 10, 64)
		n, _ := strconv.Atoi(f[2])
		u.CPU += time.Duration(ns)
		u.Wakes += n
	}
	f, err := os.Open(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return u, err
	}
	defer f.Close()
	for s := bufio.NewScanner(f); s.Scan(); {
		w := strings.Fields(s.Text())
		if len(w) < 2 {
			continue
		}
		switch w[0] {
		case "VmRSS:":
			u.RSS, _ = strconv.Atoi(w[1])
		case "RssAnon:":
			u.Own, _ = strconv.Atoi(w[1])
		}
	}
	return u, nil
}

// since tells what was used since an earlier look.
func (u usage) since(was usage) string {
	s := u.At.Sub(was.At).Seconds()
	return fmt.Sprintf("processor %.2f %% of a core, %.0f times a second; resident %.1f MiB, %.1f of it not of files",
		100*(u.CPU-was.CPU).Seconds()/s, float64(u.Wakes-was.Wakes)/s, float64(u.RSS)/1024, float64(u.Own)/1024)
}
