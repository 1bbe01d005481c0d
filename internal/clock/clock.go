// Package clock tells how much time has passed, suspension included.
//
// Leases live on durations, never on times of day (P5). The source is
// CLOCK_BOOTTIME, which goes on while the machine sleeps: a laptop that slept
// an hour wakes with its leases over.
package clock

import (
	"time"

	"golang.org/x/sys/unix"
)

// Instant is a point of the machine's boot-time clock, in nanoseconds. Instants
// of different machines cannot be compared.
type Instant int64

// Now reads the clock.
func Now() Instant {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts); err != nil {
		panic("clock: CLOCK_BOOTTIME: " + err.Error()) // exists since Linux 2.6.39
	}
	return Instant(ts.Nano())
}

// Add returns i moved by d.
func (i Instant) Add(d time.Duration) Instant { return i + Instant(d) }

// Sub returns the time from j to i.
func (i Instant) Sub(j Instant) time.Duration { return time.Duration(i - j) }

// Before reports whether i comes before j.
func (i Instant) Before(j Instant) bool { return i < j }
