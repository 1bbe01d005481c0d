package segment

import (
	"encoding/binary"
	"errors"
	"io"

	"github.com/unum-os/unum/internal/disk"
)

// gap is a range in which no record could be read.
type gap struct{ from, to int64 }

// scanned is what scan found.
type scanned struct {
	recs       []placed
	end        int64  // of the last record, or where it began
	gaps       []gap  // before end
	durable    uint32 // greatest durable length a record tells
	zeros      bool   // nothing but zeros from end on
	unreadable bool   // the disk failed to give some bytes
	err        error  // its error
}

// scan reads the records of f from from to to. With verify it reads payloads
// too, and a record whose payload is wrong is none. After a place that is no
// record it goes on at the next one whose header and payload are right.
func (s *Store) scan(f *found, from, to int64, verify bool) scanned {
	sc := scanned{end: from}
	w := window{file: f.file}
	off, bad := from, int64(-1)
	for off+recordSize <= to {
		r, ok := decodeRecord(w.at(off, recordSize), s.id, f.num, off)
		ok = ok && off+r.span() <= to
		if ok && (verify || bad >= 0) && r.flags&flagPad == 0 {
			p := w.at(off+recordSize, int64(r.length))
			ok = int64(len(p)) == int64(r.length) && checksum(p) == r.crc
		}
		if !ok {
			if bad < 0 {
				bad = off
			}
			off += align
			if w.lost > off { // that many bytes cannot be read: not one by one
				off = w.lost
			}
			continue
		}
		if bad >= 0 {
			sc.gaps = append(sc.gaps, gap{bad, off})
			bad = -1
		}
		if r.flags&flagPad == 0 {
			sc.recs = append(sc.recs, placed{r.name, uint32(off), r.length, r.crc})
		}
		sc.durable = max(sc.durable, r.durable)
		off += r.span()
		sc.end = off
	}
	sc.zeros = true
	for off := sc.end; off < to && sc.zeros; off += align {
		sc.zeros = allZero(w.at(off, min(align, to-off)))
	}
	sc.unreadable, sc.err = w.failed, w.err
	return sc
}

func allZero(b []byte) bool {
	for len(b) >= 8 {
		if binary.LittleEndian.Uint64(b) != 0 {
			return false
		}
		b = b[8:]
	}
	for _, c := range b {
		if c != 0 {
			return false
		}
	}
	return true
}

// window reads a file forward in large pieces.
type window struct {
	file   disk.File
	buf    []byte
	off    int64 // of buf
	failed bool
	err    error
	lost   int64 // end of the page that could not be read last
}

const (
	windowSize = 256 << 10 // bytes of a segment read at a time
	pageSize   = 4096      // bytes after which reading goes on where the disk fails
)

// at returns n bytes from off, fewer at the end of the file or where the disk
// fails; they are valid until the next call.
func (w *window) at(off, n int64) []byte {
	if off < w.off || off+n > w.off+int64(len(w.buf)) {
		size := max(n, windowSize)
		if int64(cap(w.buf)) < size {
			w.buf = make([]byte, size)
		}
		got, err := w.file.ReadAt(w.buf[:size], off)
		if err != nil && !errors.Is(err, io.EOF) && int64(got) < n {
			// The fault may lie beyond what is needed.
			got, err = w.file.ReadAt(w.buf[:n], off)
			if err != nil && !errors.Is(err, io.EOF) {
				w.failed, w.err = true, err
				w.lost = (off + int64(got) + pageSize) / pageSize * pageSize
			}
		}
		w.buf, w.off = w.buf[:got], off
	}
	b := w.buf[off-w.off:]
	return b[:min(n, int64(len(b)))]
}
