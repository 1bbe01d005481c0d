package segment

import (
	"cmp"
	"crypto/rand"
	"errors"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/unum-os/unum/internal/disk"
	"github.com/unum-os/unum/internal/errs"
)

// found is a segment file as Open finds it.
type found struct {
	num    uint32
	file   disk.File
	size   int64
	header segmentHeader
	err    error // why there is no header
}

// recover locks the directory, finds out which store it is, reads what every
// segment holds, and makes the last one fit to be appended to. Nobody else has s.
func (s *Store) recover() error {
	if err := s.fs.MkdirAll(s.dir, 0o700); err != nil {
		return err
	}
	if err := disk.SyncDir(s.fs, filepath.Dir(s.dir)); err != nil {
		return err
	}
	lock, err := disk.Lock(s.fs, filepath.Join(s.dir, "lock"))
	if err != nil {
		return err
	}
	s.lock = lock
	segs, err := s.list()
	if err != nil {
		return err
	}
	defer func() {
		for _, f := range segs {
			if f.file != nil {
				f.file.Close()
			}
		}
	}()
	if segs, err = s.identify(segs); err != nil {
		return err
	}
	for len(segs) > 0 { // pass over a last file that a crash left half made
		t := segs[len(segs)-1]
		if t.err == nil {
			break
		}
		if err := s.use(t); err != nil {
			return errs.Wrap(err, "read", s.segmentPath(t.num))
		}
		if sc := s.scan(t, headerSize, t.size, true); len(sc.recs) > 0 || sc.unreadable {
			break
		}
		segs = segs[:len(segs)-1]
		if err := errors.Join(t.file.Close(), s.fs.Remove(s.segmentPath(t.num))); err != nil {
			return err
		}
	}
	for i, f := range segs {
		if i == len(segs)-1 {
			err = s.recoverTail(f)
		} else {
			err = s.recoverSealed(f, segs[i+1])
		}
		if err != nil {
			return err
		}
	}
	// Names made by an earlier process that did not live to sync them.
	if err := disk.SyncDir(s.fs, s.dir); err != nil {
		return err
	}
	s.stats.Segments = s.last
	return nil
}

// list opens the segment files, in order, and clears away what is half written.
func (s *Store) list() ([]*found, error) {
	names, err := s.fs.List(s.dir)
	if err != nil {
		return nil, err
	}
	var segs []*found
	for _, n := range names {
		if strings.HasSuffix(n, ".tmp") {
			if err := s.fs.Remove(filepath.Join(s.dir, n)); err != nil {
				return nil, err
			}
		}
		base, ok := strings.CutSuffix(n, ".seg")
		num, err := strconv.ParseUint(base, 16, 32)
		if ok && err == nil && num > 0 && len(base) == 16 {
			segs = append(segs, &found{num: uint32(num)})
		}
	}
	slices.SortFunc(segs, func(a, b *found) int { return cmp.Compare(a.num, b.num) })
	return segs, nil
}

// open opens f's file if it is not, and reads its header.
func (s *Store) open(f *found) error {
	var err error
	if f.file, err = disk.OpenReadWrite(s.fs, s.segmentPath(f.num)); err != nil {
		return err
	}
	if f.size, err = disk.Size(f.file); err != nil {
		return err
	}
	f.size = min(f.size, maxSegment)
	b := make([]byte, headerBytes)
	for _, at := range []int64{0, headerCopy} {
		if n, err := f.file.ReadAt(b, at); n < len(b) {
			f.err = errs.E(errs.Corrupt, "read segment header", "", "%w", err)
			continue
		}
		if f.header, f.err = decodeSegmentHeader(b); f.err == nil {
			if f.header.number == f.num {
				return nil
			}
			f.err = errs.E(errs.Corrupt, "read segment header", "", "it is segment %d", f.header.number)
		} else if errs.Has(f.err, errs.NotSupported) {
			return f.err
		}
	}
	return nil
}

// identify reads all headers and learns the store's id; a new store gets one.
func (s *Store) identify(segs []*found) ([]*found, error) {
	known := false
	for _, f := range segs {
		// Closed again below: there may be more files than may be open.
		if err := s.open(f); err != nil {
			return segs, errs.Wrap(err, "read", s.segmentPath(f.num))
		}
		switch {
		case f.err != nil:
		case !known:
			s.id, known = f.header.store, true
		case f.header.store != s.id:
			f.err = errs.E(errs.Corrupt, "read segment header", "", "it belongs to another store")
		}
		if err := f.file.Close(); err != nil {
			return segs, err
		}
		f.file = nil
	}
	for _, f := range segs {
		if known {
			break
		}
		if id, n, _, _, ok := s.readIndex(f.num); ok && n == f.num {
			s.id, known = id, true
		}
	}
	if !known {
		switch {
		case len(segs) == 1 && segs[0].num == 1: // a crash while the very first was made
			blank, err := s.blank(segs[0])
			if err != nil {
				return segs, err
			}
			if !blank {
				return segs, errs.E(errs.Corrupt, "read", s.segmentPath(1), "no header and no index tells which store it is")
			}
			if err := s.fs.Remove(s.segmentPath(1)); err != nil {
				return segs, err
			}
			segs = nil
		case len(segs) > 0:
			return segs, errs.E(errs.Corrupt, "read", s.dir, "none of %d segments tells which store it is", len(segs))
		}
		rand.Read(s.id[:])
	}
	return segs, nil
}

// blank reports whether f holds nothing after its header.
func (s *Store) blank(f *found) (bool, error) {
	file, err := s.fs.Open(s.segmentPath(f.num))
	if err != nil {
		return false, err
	}
	defer file.Close()
	w := window{file: file}
	for off := int64(headerSize); off < f.size; off += align {
		if !allZero(w.at(off, min(align, f.size-off))) {
			return false, nil
		}
	}
	return !w.failed, nil
}

// use makes f's file open.
func (s *Store) use(f *found) (err error) {
	if f.file == nil {
		f.file, err = disk.OpenReadWrite(s.fs, s.segmentPath(f.num))
	}
	return err
}

// recoverSealed reads a segment that is not the last.
func (s *Store) recoverSealed(f, next *found) error {
	if f.err != nil {
		s.note(f.num, 0, f.err)
	}
	limit, exact := f.size, false
	if next.err == nil && next.header.prev == f.num {
		limit, exact = int64(next.header.prevLen), true
	}
	recs, covered, short := s.indexed(f.num, min(limit, f.size))
	whole := f.err == nil && !short
	if covered < limit {
		if err := s.use(f); err != nil {
			return errs.Wrap(err, "read", s.segmentPath(f.num))
		}
		sc := s.scan(f, covered, min(limit, f.size), false)
		recs = append(recs, sc.recs...)
		end := sc.end
		if exact && f.size < limit { // cut short
			sc.gaps = append(sc.gaps, gap{from: f.size, to: limit})
		} else if end < limit && (exact || !sc.zeros) {
			sc.gaps = append(sc.gaps, gap{from: end, to: limit})
		}
		for _, g := range sc.gaps {
			whole = false
			s.note(f.num, g.from, errs.E(errs.Corrupt, "read segment", s.segmentPath(f.num), "no records from byte %d to %d", g.from, g.to))
		}
		if err := f.file.Close(); err != nil {
			return err
		}
		f.file = nil
		if whole {
			if err := s.writeIndex(f.num, limit, recs); err != nil {
				s.log.Warn("segment index not written", "file", s.indexPath(f.num), "err", err)
			}
		}
	}
	s.adopt(f.num, recs)
	return nil
}

// recoverTail reads the last segment, cuts off what a crash has torn, makes the
// rest durable, and takes it as the active one. A segment in which something
// could not be read is left as it is, and closed.
func (s *Store) recoverTail(f *found) error {
	if err := s.use(f); err != nil {
		return errs.Wrap(err, "read", s.segmentPath(f.num))
	}
	if f.err != nil {
		s.note(f.num, 0, f.err)
	}
	recs, covered, short := s.indexed(f.num, f.size)
	sc := s.scan(f, covered, f.size, true)
	recs = append(recs, sc.recs...)
	a := &active{num: f.num, file: f.file, size: sc.end, alloc: f.size, recs: recs, damaged: f.err != nil || sc.unreadable}
	s.last = f.num
	s.adopt(f.num, recs)
	for _, g := range sc.gaps {
		if g.from < int64(sc.durable) || sc.unreadable {
			a.damaged = true
			s.note(f.num, g.from, errs.E(errs.Corrupt, "read segment", s.segmentPath(f.num), "no records from byte %d to %d", g.from, g.to))
			continue
		}
		// Nobody was told that this was written. Say so for later readers.
		pad := record{flags: flagPad, length: uint32(g.to - g.from - recordSize), durable: sc.durable}
		if _, err := f.file.WriteAt(appendRecord(nil, &pad, s.id, f.num, g.from), g.from); err != nil {
			return errs.Wrap(err, "pad", s.segmentPath(f.num))
		}
	}
	if sc.unreadable {
		if sc.end < f.size {
			s.note(f.num, sc.end, &errs.Error{Op: "read segment", Subject: s.segmentPath(f.num), Class: errs.IO, Err: sc.err})
		}
		a.size = f.size // what cannot be read may hold records
	} else if f.size > sc.end {
		if err := disk.Truncate(f.file, sc.end); err != nil {
			return errs.Wrap(err, "cut", s.segmentPath(f.num))
		}
		a.alloc = sc.end
	}
	// Read does not mean durable: the machine may have kept running.
	if err := disk.SyncData(f.file); err != nil {
		return errs.Wrap(err, "sync", s.segmentPath(f.num))
	}
	s.files.pin(f.num, f.file)
	f.file = nil
	s.active = a
	if short {
		s.note(f.num, f.size, errs.E(errs.Corrupt, "read segment", s.segmentPath(f.num), "it was longer once"))
		a.damaged = true
	}
	if f.err != nil || sc.unreadable || short {
		s.close(a)
	}
	return nil
}

// adopt enters a segment's records into the index; later ones win.
func (s *Store) adopt(num uint32, recs []placed) {
	for _, r := range recs {
		if old, ok := s.index[r.name]; ok {
			s.stats.Bytes -= int64(old.len)
		}
		s.index[r.name] = entry{segment: num, off: r.off, len: r.len, crc: r.crc}
		s.stats.Bytes += int64(r.len)
	}
}

// indexed returns the records below covered, from the index file if it is good.
// short says that it knew more of the segment than size, which is all there is.
func (s *Store) indexed(num uint32, size int64) (recs []placed, covered int64, short bool) {
	id, n, covered, recs, ok := s.readIndex(num)
	if !ok || id != s.id || n != num || covered < headerSize || covered%align != 0 {
		return nil, headerSize, false
	}
	if covered > size {
		return nil, headerSize, true
	}
	return recs, covered, false
}

func (s *Store) readIndex(num uint32) (id storeID, n uint32, covered int64, recs []placed, ok bool) {
	f, err := s.fs.Open(s.indexPath(num))
	if err != nil {
		return
	}
	defer f.Close()
	size, err := disk.Size(f)
	if err != nil || size > indexHeader+(maxSegment/recordSize)*indexEntry+4 {
		return
	}
	b := make([]byte, size)
	if got, _ := f.ReadAt(b, 0); got < len(b) {
		return
	}
	return decodeIndex(b)
}
