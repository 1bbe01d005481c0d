package sched

import (
	"math"
	"slices"

	"github.com/unum-os/unum/internal/errs"
	"github.com/unum-os/unum/internal/wire"
)

// Receipt encodes d with its inputs; equal decisions give equal bytes.
func (d Decision) Receipt() []byte { return wire.MustMarshal(d) }

// Decode reads a receipt. What is no receipt is of class Corrupt.
func Decode(receipt []byte) (Decision, error) {
	var d Decision
	if err := wire.Unmarshal(receipt, &d); err != nil {
		return Decision{}, errs.Wrap(err, "read receipt", "")
	}
	return d, nil
}

// Replay decides again from a receipt's inputs and returns that decision. If it
// differs from the receipt's the error is of class Corrupt.
func Replay(receipt []byte) (Decision, error) {
	was, err := Decode(receipt)
	if err != nil {
		return Decision{}, err
	}
	now := Decide(was.Inputs)
	if !same(was, now) {
		return now, errs.E(errs.Corrupt, "replay receipt", "", "it says %v before %v, its inputs give %v before %v",
			was.Chosen, was.RunnerUp, now.Chosen, now.RunnerUp)
	}
	return now, nil
}

// same reports whether two decisions are one. Prices may differ in the last
// digits, as exp and log do between kinds of processors.
func same(a, b Decision) bool {
	near := func(x, y float64) bool { return x == y || math.Abs(x-y) <= 1e-9*max(math.Abs(x), math.Abs(y)) }
	return a.Chosen == b.Chosen && a.RunnerUp == b.RunnerUp && a.Policy == b.Policy && a.Seed == b.Seed &&
		slices.EqualFunc(a.Candidates, b.Candidates, func(p, q Price) bool {
			return p.Node == q.Node && p.Refused == q.Refused && near(p.Total, q.Total) &&
				slices.EqualFunc(p.Prices, q.Prices, func(r, s ResourcePrice) bool {
					return r.Resource == s.Resource && near(r.Price, s.Price)
				})
		})
}
