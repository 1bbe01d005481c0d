package venus

import (
	"sort"

	"github.com/unum-os/unum/internal/volume"
)

// extents is a file's committed content map: sorted, not overlapping.
type extents []volume.Extent

// from returns the index of the first extent that ends after off.
func (x extents) from(off uint64) int {
	return sort.Search(len(x), func(i int) bool { return x[i].Off+uint64(x[i].Len) > off })
}

// cutExtent returns the part of e within [lo, hi), which must overlap it.
func cutExtent(e volume.Extent, lo, hi uint64) volume.Extent {
	end := e.Off + uint64(e.Len)
	lo, hi = max(lo, e.Off), min(hi, end)
	d := uint32(lo - e.Off)
	e.Len = uint32(hi - lo)
	if e.Data != nil {
		e.Data = e.Data[d : d+e.Len]
	} else {
		e.From += d
	}
	e.Off = lo
	return e
}

// without returns x with [lo, hi) removed.
func (x extents) without(lo, hi uint64) extents {
	i := x.from(lo)
	if lo >= hi || i == len(x) || x[i].Off >= hi {
		return x
	}
	j := i
	for j < len(x) && x[j].Off < hi {
		j++
	}
	var mid extents
	if e := x[i]; e.Off < lo {
		mid = append(mid, cutExtent(e, e.Off, lo))
	}
	if e := x[j-1]; e.Off+uint64(e.Len) > hi {
		mid = append(mid, cutExtent(e, hi, e.Off+uint64(e.Len)))
	}
	out := make(extents, 0, len(x)-(j-i)+len(mid))
	return append(append(append(out, x[:i]...), mid...), x[j:]...)
}

// with returns x with e put over what it overlaps.
func (x extents) with(e volume.Extent) extents {
	end := e.Off + uint64(e.Len)
	if n := len(x); n == 0 || x[n-1].Off+uint64(x[n-1].Len) <= e.Off {
		return append(x, e)
	}
	x = x.without(e.Off, end)
	i := x.from(e.Off)
	x = append(x, volume.Extent{})
	copy(x[i+1:], x[i:])
	x[i] = e
	return x
}
