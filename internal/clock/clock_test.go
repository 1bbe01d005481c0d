package clock

import (
	"context"
	"log/slog"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/unum-os/unum/internal/errs"
)

// near reports whether a duration is d, give or take what a busy machine takes.
func near(got, d time.Duration) bool { return (got - d).Abs() < 5*time.Minute }

func TestShifted(t *testing.T) {
	var s Shifted
	if !near(time.Until(s.Wall()), 0) || !near(s.Now().Sub(Real.Now()), 0) {
		t.Fatal("an offset from the beginning")
	}
	for _, c := range []struct {
		wall, boot time.Duration
		ok         bool
	}{{time.Hour, 0, true}, {-time.Hour, 0, true}, {0, 2 * time.Hour, true}, {time.Hour, time.Hour, false}, {0, 2 * time.Hour, true}} {
		err := s.Set(c.wall, c.boot)
		if (err == nil) != c.ok || !c.ok && !errs.Has(err, errs.Invalid) {
			t.Fatalf("%+v: %v", c, err)
		}
		if c.ok && (!near(s.Wall().Sub(time.Now().Round(0)), c.wall) || !near(s.Now().Sub(Real.Now()), c.boot)) {
			t.Errorf("%+v: %v %v", c, s.Wall(), s.Now())
		}
	}
	// A time of day that jumped is seen in differences, which a monotonic part
	// would hide.
	before := s.Wall()
	if err := s.Set(-3*time.Hour, 2*time.Hour); err != nil {
		t.Fatal(err)
	}
	if d := s.Wall().Sub(before); !near(d, -3*time.Hour) {
		t.Error(d)
	}
}

func TestProcess(t *testing.T) {
	var s Shifted
	Use(&s)
	defer Use(nil)
	if err := s.Set(time.Hour, 3*time.Hour); err != nil {
		t.Fatal(err)
	}
	if !near(Now().Sub(Real.Now()), 3*time.Hour) || !near(Wall().Sub(Real.Wall()), time.Hour) || !near(Machine(Now()).Sub(Real.Now()), 0) {
		t.Error(Now(), Wall(), Machine(Now()))
	}
	Use(nil)
	if !near(Now().Sub(Real.Now()), 0) || !near(Wall().Sub(Real.Wall()), 0) || Machine(5) != 5 {
		t.Error(Now(), Wall())
	}
}

func TestParseShift(t *testing.T) {
	for text, want := range map[string][2]time.Duration{"wall=+1h boot=+0s": {time.Hour, 0}, " boot=5s\n": {0, 5 * time.Second}, "": {},
		"wall=-90m": {-90 * time.Minute, 0}} {
		if w, b, err := ParseShift(text); err != nil || w != want[0] || b != want[1] {
			t.Errorf("%q: %v %v %v", text, w, b, err)
		}
	}
	for _, text := range []string{"wall", "wall=1", "boot=-1s", "noon=+1h", "wall=+1h x", "wall=2540400h"} {
		if _, _, err := ParseShift(text); !errs.Has(err, errs.Invalid) {
			t.Errorf("%q: %v", text, err)
		}
	}
}

func TestFollow(t *testing.T) {
	path := filepath.Join(t.TempDir(), "clock")
	write := func(text string) {
		if err := os.WriteFile(path+".new", []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(path+".new", path); err != nil {
			t.Fatal(err)
		}
	}
	var s Shifted
	if err := s.Load(path); !errs.Has(err, errs.NotFound) {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error)
	go func() { done <- s.Follow(ctx, path, slog.New(slog.DiscardHandler)) }()
	await := func(wall, boot time.Duration) {
		t.Helper()
		for end := time.Now().Add(30 * time.Second); ; time.Sleep(time.Millisecond) {
			if time.Duration(s.wall.Load()) == wall && time.Duration(s.boot.Load()) == boot {
				return
			}
			if time.Now().After(end) {
				t.Fatalf("never %v %v", wall, boot)
			}
		}
	}
	write("wall=+1h boot=+10s")
	await(time.Hour, 10*time.Second)
	write("wall=-1h boot=+10s")
	await(-time.Hour, 10*time.Second)
	write("nonsense")
	write("boot=+1m")
	await(0, time.Minute)
	cancel()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
}

func TestManual(t *testing.T) {
	at := time.Date(2030, 1, 2, 3, 4, 5, 0, time.UTC)
	m := NewManual(at)
	now := m.Now()
	m.Advance(time.Minute)
	if m.Wall() != at.Add(time.Minute) || m.Now().Sub(now) != time.Minute {
		t.Error(m.Wall(), m.Now())
	}
	m.SetWall(at)
	if m.Wall() != at || m.Now().Sub(now) != time.Minute {
		t.Error(m.Wall(), m.Now())
	}
}

func FuzzParseShift(f *testing.F) {
	for _, s := range []string{"", "wall=+1h boot=+0s", "boot=-1s", "wall=9999999h", "wall==1s", "wall=1s wall=2s"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		wall, boot, err := ParseShift(s)
		if err == nil && (wall > maxShift || wall < -maxShift || boot < 0 || boot > maxShift) {
			t.Fatal(wall, boot)
		}
		if err != nil && (wall != 0 || boot != 0) {
			t.Fatalf("%v and %v, %v", err, wall, boot)
		}
	})
}
