package lab

import (
	"os"
	"testing"
	"time"
)

// slow is a terminal that takes its time.
type slow struct{ n int }

func (s *slow) Write(b []byte) (int, error) {
	time.Sleep(drainTime)
	s.n += len(b)
	return len(b), nil
}

// TestRelay: what a command has written arrives whole at a slow reader, also when
// something it left behind keeps its output open.
func TestRelay(t *testing.T) {
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	defer w.Close()
	const size = 60 << 10 // what a pipe holds, and more than is copied at once
	if _, err := w.Write(make([]byte, size)); err != nil {
		t.Fatal(err)
	}
	p, s := &Process{}, &slow{}
	p.relay(s, r)
	r.SetReadDeadline(time.Now().Add(drainTime))
	select {
	case <-p.copies[0].done:
	case <-time.After(20 * time.Second):
		t.Fatal("waits for what will not come")
	}
	if s.n != size {
		t.Fatalf("%d bytes arrived", s.n)
	}
}
