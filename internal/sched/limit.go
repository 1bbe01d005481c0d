package sched

import (
	"math"
	"time"
)

// LimitHalfLife is the time in which the largest load seen is half forgotten. A
// limit that never fell would leave the CPU's price flat after one burst, and
// memory alone would decide; with 30 s a burst of 16 jobs per CPU is forgotten
// in two minutes.
const LimitHalfLife = 30 * time.Second

// Limit follows the largest load per CPU seen of late on any node. The zero
// value has seen none.
type Limit struct{ max float64 }

// Observe lets dt pass and then takes note of a load.
func (l *Limit) Observe(perCPU float64, dt time.Duration) {
	if dt > 0 {
		l.max *= math.Exp2(-float64(dt) / float64(LimitHalfLife))
	}
	if perCPU > l.max && !math.IsInf(perCPU, 0) {
		l.max = perCPU
	}
}

// Value returns L: the smallest power of two, 1 at the least, over the largest
// load.
func (l Limit) Value() float64 { return powerOver(l.max) }

func powerOver(x float64) float64 {
	p := 1.0
	for p <= x && p < 1<<30 {
		p *= 2
	}
	return p
}
