package main

import (
	"bytes"
	"context"
	"errors"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/unum-os/unum/internal/errs"
	"github.com/unum-os/unum/internal/identity"
	"github.com/unum-os/unum/internal/node"
)

// joiner returns how to join at addr, from a directory of its own.
func joiner(t *testing.T, addr string) func(ctx context.Context) error {
	t.Helper()
	token, err := identity.NewToken([32]byte{1})
	if err != nil {
		t.Fatal(err)
	}
	c := node.Config{Dir: t.TempDir(), Addr: "127.0.0.1:7400", Hostname: "a"}
	return func(ctx context.Context) error { return node.Join(ctx, c, addr, token.String()) }
}

// TestKnock: who joins where nobody listens, or where nobody answers, is told
// that it is waited, and at the end what to look at; an interrupt ends it.
func TestKnock(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	mute := l.Addr().String()
	defer l.Close() // what it accepts is never answered
	gone, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	closed := gone.Addr().String()
	if err := gone.Close(); err != nil {
		t.Fatal(err)
	}
	for name, addr := range map[string]string{"nobody listens": closed, "nobody answers": mute} {
		t.Run(name, func(t *testing.T) {
			var out bytes.Buffer
			err := knock(context.Background(), &out, 700*time.Millisecond, 0, addr, joiner(t, addr))
			if !errs.Has(err, errs.Unavailable) && !errs.Has(err, errs.Timeout) {
				t.Fatalf("%v", err)
			}
			_, port, _ := net.SplitHostPort(addr)
			for _, want := range []string{addr, "try: ", "port " + port, "unum token", "unum status"} {
				if !strings.Contains(err.Error(), want) {
					t.Errorf("no %q in %q", want, err)
				}
			}
			if got := out.String(); strings.Count(got, "\n") != 1 || !strings.Contains(got, "waiting for "+addr) {
				t.Errorf("it said %q", got)
			}
			if strings.Count(err.Error(), "\ntry: ") != 1 {
				t.Errorf("%v", err)
			}
		})
		t.Run(name+", interrupted", func(t *testing.T) {
			ctx, cancel := context.WithCancel(context.Background())
			tries := 0
			try := joiner(t, addr)
			var out bytes.Buffer
			err := knock(ctx, &out, time.Hour, time.Hour, addr, func(ctx context.Context) error {
				tries++
				time.AfterFunc(0, cancel)
				err := try(ctx)
				<-ctx.Done() // an attempt may fail before
				return err
			})
			if err == nil || tries != 1 || out.Len() > 0 || errs.ClassOf(err) == errs.Timeout || strings.Contains(err.Error(), "try: ") {
				t.Errorf("%d tries, %q, %v", tries, out.String(), err)
			}
		})
	}
	t.Run("what has a remedy keeps it", func(t *testing.T) {
		for _, deep := range []bool{false, true} {
			var out bytes.Buffer
			err := knock(context.Background(), &out, 10*time.Millisecond, time.Hour, mute, func(context.Context) error {
				err := error(errs.E(errs.Timeout, "ask", "", "why").WithRemedy("that"))
				if deep {
					err = errs.Wrap(err, "join", mute)
				}
				return err
			})
			if !strings.HasSuffix(err.Error(), "\ntry: that") || strings.Count(err.Error(), "try: ") != 1 || out.Len() > 0 {
				t.Errorf("%q, %v", out.String(), err)
			}
		}
	})
	t.Run("one that is silent for long is asked again", func(t *testing.T) {
		tries := 0
		err := knock(context.Background(), nil, time.Minute, time.Hour, mute, func(context.Context) error {
			if tries++; tries < 3 {
				return errs.E(errs.Timeout, "join", mute, "no answer in time")
			}
			return nil
		})
		if err != nil || tries != 3 {
			t.Errorf("%d tries, %v", tries, err)
		}
	})
	t.Run("a refusal is no silence", func(t *testing.T) {
		want := errs.E(errs.Unauthorized, "join", mute, "no")
		if err := knock(context.Background(), nil, time.Minute, time.Hour, mute, func(context.Context) error { return want }); !errors.Is(err, want) {
			t.Error(err)
		}
	})
}
