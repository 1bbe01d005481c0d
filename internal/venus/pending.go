package venus

import (
	"slices"

	"github.com/unum-os/unum/internal/volume"
)

// span is a range of bytes [lo, hi).
type span struct{ lo, hi uint64 }

// chunk is up to MaxBlock bytes of changed content of one file: the bytes from
// index*MaxBlock on, of which the spans are set.
type chunk struct {
	base  uint64
	buf   []byte
	spans []span // file offsets, sorted, not touching
}

// pending is what has been done to a file under its write lease and is not
// committed: first a truncation, then content, then attributes.
type pending struct {
	trunc  uint64 // least size it was cut to; noTrunc: none
	chunks map[uint64]*chunk
	bytes  int
	pieces int    // spans in all chunks
	grown  bool   // size or content changed
	set    uint32 // volume.SetMode and so on; the values are the inode's
}

const noTrunc = ^uint64(0)

func newPending() *pending { return &pending{trunc: noTrunc, chunks: map[uint64]*chunk{}} }

// empty reports whether nothing is pending.
func (p *pending) empty() bool {
	return p == nil || p.trunc == noTrunc && !p.grown && p.set == 0
}

// What the operations of one file, and one piece of content besides the bytes
// that travel inline, take in a log record at most: three operations with their
// attributes, and an extent that names a block.
const (
	fileCost  = 384 // bytes in a log record, at most, of the operations of one file
	pieceCost = 96  // bytes there of one piece of content, beside those that travel inline
)

// cost is an upper bound for p's share of a log record without its content.
func (p *pending) cost() int {
	if p.empty() {
		return 0
	}
	return fileCost + pieceCost*p.pieces
}

// write puts data at off.
func (p *pending) write(off uint64, data []byte) {
	p.grown = true
	for len(data) > 0 {
		i := off / volume.MaxBlock
		c := p.chunks[i]
		if c == nil {
			c = &chunk{base: i * volume.MaxBlock}
			p.chunks[i] = c
		}
		rel := off - c.base
		n := min(uint64(len(data)), volume.MaxBlock-rel)
		if need := int(rel + n); need > len(c.buf) {
			if need > cap(c.buf) {
				size := max(4096, cap(c.buf))
				for size < need {
					size *= 2
				}
				b := make([]byte, need, min(size, volume.MaxBlock))
				copy(b, c.buf)
				c.buf = b
			} else {
				c.buf = c.buf[:need]
			}
		}
		copy(c.buf[rel:], data[:n])
		spans := len(c.spans)
		p.bytes += c.add(span{off, off + n})
		p.pieces += len(c.spans) - spans
		off += n
		data = data[n:]
	}
}

// add marks s as set and returns by how many bytes the set grew.
func (c *chunk) add(s span) int {
	i := 0
	for i < len(c.spans) && c.spans[i].hi < s.lo {
		i++
	}
	j, covered := i, uint64(0)
	for j < len(c.spans) && c.spans[j].lo <= s.hi {
		covered += c.spans[j].hi - c.spans[j].lo
		s.lo, s.hi = min(s.lo, c.spans[j].lo), max(s.hi, c.spans[j].hi)
		j++
	}
	c.spans = slices.Replace(c.spans, i, j, s)
	return int(s.hi - s.lo - covered)
}

// truncate drops content from size on and remembers the cut.
func (p *pending) truncate(size uint64) {
	p.trunc = min(p.trunc, size)
	p.drop(size, noTrunc)
}

// drop forgets content within [lo, hi).
func (p *pending) drop(lo, hi uint64) {
	for i, c := range p.chunks {
		var keep []span
		for _, s := range c.spans {
			n := s.hi - s.lo
			if s.lo < lo {
				keep = append(keep, span{s.lo, min(s.hi, lo)})
				n -= min(s.hi, lo) - s.lo
			}
			if s.hi > hi {
				keep = append(keep, span{max(s.lo, hi), s.hi})
				n -= s.hi - max(s.lo, hi)
			}
			p.bytes -= int(n)
		}
		p.pieces += len(keep) - len(c.spans)
		if c.spans = keep; len(keep) == 0 {
			delete(p.chunks, i)
		}
	}
}

// patch is changed content, copied.
type patch struct {
	off  uint64
	data []byte
}

// patches appends copies of what is set within [off, end).
func (p *pending) patches(out []patch, off, end uint64) []patch {
	for i := off / volume.MaxBlock; i*volume.MaxBlock < end; i++ {
		c := p.chunks[i]
		if c == nil {
			continue
		}
		for _, s := range c.spans {
			lo, hi := max(s.lo, off), min(s.hi, end)
			if lo < hi {
				out = append(out, patch{lo, append([]byte(nil), c.buf[lo-c.base:hi-c.base]...)})
			}
		}
	}
	return out
}

// spans returns what is set, in order.
func (p *pending) spans() []span {
	var out []span
	for _, c := range p.chunks {
		out = append(out, c.spans...)
	}
	slices.SortFunc(out, func(a, b span) int {
		if a.lo < b.lo {
			return -1
		}
		return 1
	})
	return out
}

// merge puts newer over p: p becomes both.
func (p *pending) merge(newer *pending) {
	if newer.trunc != noTrunc {
		p.truncate(newer.trunc)
	}
	for _, c := range newer.chunks {
		for _, s := range c.spans {
			p.write(s.lo, c.buf[s.lo-c.base:s.hi-c.base])
		}
	}
	p.grown = p.grown || newer.grown
	p.set |= newer.set
}
