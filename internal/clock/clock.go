// Package clock tells how much time has passed, suspension included, and what
// time of day it is.
//
// Leases live on durations, never on times of day (P5). The source is
// CLOCK_BOOTTIME, which goes on while the machine sleeps: a laptop that slept
// an hour wakes with its leases over. The time of day decides only what is
// written down for other days and machines: whether a certificate or a token
// still holds, and when a job began. Timers use neither, but Go's own clock.
//
// A Clock is the seam: Real; Shifted, which a lab steps while the daemon runs;
// Manual, for tests. The functions Now and Wall read the process's clock, which
// is Real unless Use has said otherwise.
package clock

import (
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// Instant is a point of the machine's boot-time clock, in nanoseconds. Instants
// of different machines cannot be compared.
type Instant int64

// Clock tells both times. Safe for concurrent use.
type Clock interface {
	// Now reads the boot-time clock, which never goes back.
	Now() Instant
	// Wall reads the time of day, which jumps both ways. It has no monotonic part:
	// differences are those of times of day.
	Wall() time.Time
}

// Real is the machine's clock.
var Real Clock = real{}

type real struct{}

func (real) Now() Instant {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts); err != nil {
		panic("clock: CLOCK_BOOTTIME: " + err.Error()) // exists since Linux 2.6.39
	}
	return Instant(ts.Nano())
}

func (real) Wall() time.Time { return time.Now().Round(0) }

var process atomic.Pointer[Shifted] // nil: Real

// Use makes s the process's clock, for a daemon that is alone in its process.
func Use(s *Shifted) { process.Store(s) }

// Now reads the boot-time clock of the process.
func Now() Instant {
	if s := process.Load(); s != nil {
		return s.Now()
	}
	return Real.Now()
}

// Wall reads the process's time of day.
func Wall() time.Time {
	if s := process.Load(); s != nil {
		return s.Wall()
	}
	return Real.Wall()
}

// Machine returns the machine's instant at which the process's clock shows i, for
// other processes and for the kernel, which know nothing of the shift.
func Machine(i Instant) Instant {
	if s := process.Load(); s != nil {
		return i.Add(-time.Duration(s.boot.Load()))
	}
	return i
}

// Add returns i moved by d.
func (i Instant) Add(d time.Duration) Instant { return i + Instant(d) }

// Sub returns the time from j to i.
func (i Instant) Sub(j Instant) time.Duration { return time.Duration(i - j) }

// Before reports whether i comes before j.
func (i Instant) Before(j Instant) bool { return i < j }
