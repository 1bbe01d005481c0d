package daemon

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/unum-os/unum/internal/errs"
)

// holderEnv makes this test binary a program that holds a pid file until
// SIGTERM; or, with "deaf ", one that does not hear it.
const holderEnv = "UNUM_TEST_HOLD"

func TestMain(m *testing.M) {
	if path, ok := os.LookupEnv(holderEnv); ok {
		path, deaf := strings.CutPrefix(path, "deaf ")
		sig := make(chan os.Signal, 1)
		signal.Notify(sig, syscall.SIGTERM)
		p, err := Lock(path)
		if err != nil {
			fmt.Println(err)
			os.Exit(3)
		}
		fmt.Println("held")
		for <-sig; deaf; <-sig {
		}
		if err := p.Release(); err != nil {
			fmt.Println(err)
			os.Exit(4)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// hold starts a holder and waits until it holds.
func hold(t *testing.T, path, how string) *exec.Cmd {
	t.Helper()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), holderEnv+"="+how+path)
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
	b := make([]byte, 5)
	if _, err := io.ReadFull(out, b); err != nil || string(b) != "held\n" {
		t.Fatalf("%q, %v", b, err)
	}
	return cmd
}

// TestPidFile: whoever holds it is known by the kernel's word; what a dead
// process left counts for nothing.
func TestPidFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "run", "x.pid")
	if _, runs, err := Running(path); runs || err != nil {
		t.Errorf("none: %v, %v", runs, err)
	}
	a := hold(t, path, "")
	if pid, runs, err := Running(path); pid != a.Process.Pid || !runs || err != nil {
		t.Errorf("%d, %v, %v; want %d", pid, runs, err, a.Process.Pid)
	}
	if b, err := os.ReadFile(path); err != nil || string(b) != fmt.Sprintln(a.Process.Pid) {
		t.Errorf("%q, %v", b, err)
	}
	_, err := Lock(path)
	if !errs.Has(err, errs.Busy) || !strings.Contains(err.Error(), fmt.Sprintf("process %d", a.Process.Pid)) {
		t.Errorf("%v", err)
	}
	a.Process.Kill()
	a.Wait()
	if _, err := os.Stat(path); err != nil {
		t.Fatalf("a killed process leaves its file: %v", err)
	}
	if pid, runs, err := Running(path); pid != 0 || runs || err != nil {
		t.Errorf("after death: %d, %v, %v", pid, runs, err)
	}
	p, err := Lock(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := p.Release(); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(path); !os.IsNotExist(err) {
		t.Errorf("it is still there: %v", err)
	}
}

// TestManyLock: of many at once one holds it, again and again.
func TestManyLock(t *testing.T) {
	path := filepath.Join(t.TempDir(), "x.pid")
	const n = 8
	for range 3 {
		var cmds []*exec.Cmd
		var outs []*bytes.Buffer
		for range n {
			cmd, out := exec.Command(os.Args[0]), &bytes.Buffer{}
			cmd.Env = append(os.Environ(), holderEnv+"="+path)
			cmd.Stdout = out
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			cmds, outs = append(cmds, cmd), append(outs, out)
		}
		// All but one end by themselves; which, is found by the kernel's word.
		ended := make(chan int, n)
		for i, c := range cmds {
			go func() { c.Wait(); ended <- i }()
		}
		refused := 0
		for range n - 1 {
			if i := <-ended; strings.Contains(outs[i].String(), "it runs already: process ") {
				refused++
			} else {
				t.Errorf("%q", outs[i].String())
			}
		}
		if refused != n-1 {
			t.Errorf("%d of %d were refused", refused, n)
		}
		if _, err := Stop(context.Background(), path, time.Minute, nil); err != nil {
			t.Error(err)
		}
		<-ended
	}
}

func TestStop(t *testing.T) {
	path := filepath.Join(t.TempDir(), "x.pid")
	if _, err := Stop(context.Background(), path, time.Minute, nil); !errs.Has(err, errs.NotFound) {
		t.Errorf("none: %v", err)
	}
	a := hold(t, path, "")
	if pid, err := Stop(context.Background(), path, time.Minute, nil); err != nil || pid != a.Process.Pid {
		t.Errorf("%d, %v", pid, err)
	}
	if err := a.Wait(); err != nil {
		t.Errorf("it did not end by itself: %v", err)
	}
	b := hold(t, path, "deaf ")
	if pid, err := Stop(context.Background(), path, 100*time.Millisecond, nil); !errs.Has(err, errs.Timeout) || pid != b.Process.Pid {
		t.Errorf("%d, %v", pid, err)
	}
	if pid, runs, _ := Running(path); !runs || pid != b.Process.Pid {
		t.Error("a process that does not end was killed")
	}
	ctx, cancel := context.WithCancelCause(context.Background())
	cancel(errs.Interrupted.Err())
	if _, err := Stop(ctx, path, time.Minute, nil); !errs.Has(err, errs.Interrupted) {
		t.Errorf("%v", err)
	}
}

// start runs a shell script as the daemon; it is healthy when file exists.
func start(t *testing.T, script string, wait time.Duration, healthy func(context.Context) error) (int, string, error) {
	t.Helper()
	dir := t.TempDir()
	log := filepath.Join(dir, "log", "x.log")
	var told bytes.Buffer
	pid, err := Start(context.Background(), Spec{Argv: []string{"/bin/sh", "-c", script}, Env: append(os.Environ(), "DIR="+dir), Log: log, Wait: wait, Tell: &told,
		Healthy: func(ctx context.Context) error {
			if healthy != nil {
				return healthy(ctx)
			}
			_, err := os.Stat(filepath.Join(dir, "healthy"))
			return err
		}})
	if pid > 0 {
		t.Cleanup(func() { syscall.Kill(-pid, syscall.SIGKILL) }) // its session is its group
	}
	b, rerr := os.ReadFile(log)
	if rerr != nil {
		t.Error(rerr)
	}
	return pid, string(b), err
}

func TestStart(t *testing.T) {
	pid, log, err := start(t, `echo "in $(pwd)"; echo loud >&2; touch $DIR/healthy; exec sleep 1000`, time.Minute, nil)
	if err != nil || log != "in /\nloud\n" {
		t.Errorf("%v, log %q", err, log)
	}
	if sid, err := sessionOf(pid); err != nil || sid != pid {
		t.Errorf("session %d of %d, %v", sid, pid, err)
	}
	// It ends: its last words are said, and not all of them.
	_, log, err = start(t, `i=0; while [ $i -lt 2000 ]; do echo line $i; i=$((i+1)); done; exit 7`, time.Minute, nil)
	if !errs.Has(err, errs.Unavailable) || !strings.Contains(err.Error(), "exit status 7") || !strings.HasSuffix(err.Error(), "line 1998\n  line 1999") ||
		strings.Count(err.Error(), "\n") != tailLines+1 || !strings.HasSuffix(log, "line 1999\n") {
		t.Errorf("%v", err)
	}
	// It ends well, which is no better.
	if _, _, err = start(t, `exit 0`, time.Minute, nil); !errs.Has(err, errs.Unavailable) || strings.Contains(err.Error(), "last words") {
		t.Errorf("%v", err)
	}
	// It is not healthy in time, also where the question itself hangs: it goes on.
	for _, h := range []func(context.Context) error{
		func(context.Context) error { return errs.E(errs.NoQuorum, "", "", "no leader\nmore") },
		func(ctx context.Context) error { <-ctx.Done(); return ctx.Err() },
	} {
		pid, _, err = start(t, `exec sleep 1000`, 200*time.Millisecond, h)
		if !errs.Has(err, errs.Timeout) || pid == 0 || syscall.Kill(pid, 0) != nil {
			t.Errorf("%d, %v", pid, err)
		}
	}
	if _, err := Start(context.Background(), Spec{Argv: []string{"/none"}, Log: filepath.Join(t.TempDir(), "l")}); !errs.Has(err, errs.NotFound) {
		t.Errorf("%v", err)
	}
}

// TestStartInterrupted: whoever gives up leaves it running.
func TestStartInterrupted(t *testing.T) {
	ctx, cancel := context.WithCancelCause(context.Background())
	pid, err := Start(ctx, Spec{Argv: []string{"/bin/sleep", "1000"}, Log: filepath.Join(t.TempDir(), "l"), Wait: time.Minute,
		Healthy: func(context.Context) error { cancel(errs.Interrupted.Err()); return errors.New("not yet") }})
	if !errs.Has(err, errs.Interrupted) || pid == 0 || syscall.Kill(pid, 0) != nil {
		t.Errorf("%d, %v", pid, err)
	}
	if pid > 0 {
		syscall.Kill(pid, syscall.SIGKILL)
	}
}

func sessionOf(pid int) (int, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, err
	}
	var state string
	var ppid, pgrp, sid int
	_, err = fmt.Sscan(string(b[bytes.LastIndexByte(b, ')')+1:]), &state, &ppid, &pgrp, &sid)
	return sid, err
}

func TestNotify(t *testing.T) {
	path := filepath.Join(t.TempDir(), "notify")
	l, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	t.Setenv("NOTIFY_SOCKET", path)
	n := NewNotifier()
	if v, ok := os.LookupEnv("NOTIFY_SOCKET"); ok {
		t.Errorf("children would speak to %s", v)
	}
	if err := n.Tell("READY=1", "STATUS=well"); err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 100)
	k, err := l.Read(b)
	if err != nil || string(b[:k]) != "READY=1\nSTATUS=well" {
		t.Errorf("%q, %v", b[:k], err)
	}
	if err := NewNotifier().Tell("READY=1"); err != nil {
		t.Errorf("nobody to tell: %v", err)
	}
	l.Close()
	os.Remove(path)
	if err := n.Tell("READY=1"); err == nil {
		t.Error("a supervisor that is gone was told")
	}
}

func TestUnit(t *testing.T) {
	for text, want := range map[string]string{
		"0::/system.slice/unum.service\n":                               "unum.service",
		"12:pids:/x\n1:name=systemd:/system.slice/unum.service\n0::/\n": "unum.service",
		"0::/system.slice/unum-lab2.service/sub\n":                      "unum-lab2.service",
		"0::/system.slice/ssh.service\n":                                "",
		"0::/user.slice/user-0.slice/session-1.scope\n":                 "",
		"3:cpu:/unum.service\n":                                         "",
		"rubbish":                                                       "",
	} {
		if got := unit(text); got != want {
			t.Errorf("%q: %q, want %q", text, got, want)
		}
	}
}
