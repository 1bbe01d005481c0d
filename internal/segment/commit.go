package segment

import (
	"errors"
	"sync"
	"syscall"

	"github.com/unum-os/unum/internal/disk"
	"github.com/unum-os/unum/internal/errs"
)

const (
	// growth is how much disk space a segment takes at a time: most syncs then
	// find the file's size as it was, and a small disk is not filled by promises.
	growth = 4 << 20
	// maxQueued bounds the bytes waiting for the next commit; a put waits when
	// they are more. One put may exceed it.
	maxQueued = 16 << 20
	// writeSize is how much goes to the disk in one write.
	writeSize = 1 << 20
)

// Block is a name and its bytes.
type Block struct {
	Name Name
	Data []byte
}

// unit is what one put has to write.
type unit struct {
	recs []*pending
	lead chan struct{} // receives once if the unit's owner is to lead
	done chan struct{} // closed when err is final
	err  error
	size int64
}

// pending is a block on its way to the disk.
type pending struct {
	Block
	crc uint32
	at  entry
	err error
}

func (p *pending) span() int64 { return recordSize + padded(int64(len(p.Data))) }

// active is the segment being appended to.
type active struct {
	num     uint32
	file    disk.File
	size    int64 // all below is durable; the next record goes here
	alloc   int64 // the file's size: space taken
	recs    []placed
	damaged bool // no index file: the damage is to be seen at the next open too
	plain   bool // the file system cannot allocate
}

var writeBuffers = sync.Pool{New: func() any { b := make([]byte, 0, writeSize+recordSize+MaxData); return &b }}

// Put stores a block; when it returns nil the block is durable. data must not
// change until then. A block that is there already is not written again. It
// fails with class NoSpace when the disk is full up to the reserve, IO when it
// fails, TooLarge, or Unavailable when the store is closed; the store goes on
// after all of them.
func (s *Store) Put(name Name, data []byte) error {
	return s.PutBatch([]Block{{name, data}})
}

// PutBatch is Put for several blocks, with one sync where possible. When it
// fails some of them may have been stored.
func (s *Store) PutBatch(blocks []Block) error {
	u := &unit{lead: make(chan struct{}, 1), done: make(chan struct{})}
	for _, b := range blocks {
		if len(b.Data) > MaxData {
			return errs.E(errs.TooLarge, "put block", short(b.Name), "%d bytes, limit %d", len(b.Data), MaxData)
		}
		if !s.Has(b.Name) {
			u.recs = append(u.recs, &pending{Block: b, crc: checksum(b.Data)})
		}
	}
	if len(u.recs) == 0 {
		return nil
	}

	s.mu.Lock()
	for s.queued > maxQueued && !s.closed {
		s.changed.Wait()
	}
	if s.closed {
		s.mu.Unlock()
		return errs.E(errs.Unavailable, "put block", s.dir, "the store is closed")
	}
	var others []*unit // that are writing what we were asked to
	mine := u.recs[:0]
	for _, r := range u.recs {
		if _, ok := s.index[r.Name]; ok {
			continue
		}
		switch w := s.inflight[r.Name]; w {
		case nil:
			s.inflight[r.Name] = u
			u.size += r.span()
			mine = append(mine, r)
		case u:
		default:
			others = append(others, w)
		}
	}
	u.recs = mine
	if len(mine) > 0 {
		s.submit(u)
	} else {
		s.mu.Unlock()
		close(u.done)
	}
	err := u.err
	for _, w := range others {
		<-w.done
		if err == nil {
			err = w.err
		}
	}
	return err
}

// Sync returns when every block whose put began before it is durable or has
// failed; puts are durable when they return, so few need it.
func (s *Store) Sync() error {
	u := &unit{lead: make(chan struct{}, 1), done: make(chan struct{})}
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		return errs.E(errs.Unavailable, "sync", s.dir, "the store is closed")
	}
	s.submit(u)
	return u.err
}

// submit queues u and returns when it is done. mu is held at the call and not
// at the return.
func (s *Store) submit(u *unit) {
	s.queue = append(s.queue, u)
	s.queued += u.size
	follow := s.leading
	s.leading = true
	s.mu.Unlock()
	if follow {
		select {
		case <-u.done:
			return
		case <-u.lead:
		}
	}
	s.lead()
}

// lead commits what is queued, which includes the caller's own unit, and hands
// the lead on.
func (s *Store) lead() {
	s.mu.Lock()
	batch := s.queue
	s.queue, s.queued = nil, 0
	s.changed.Broadcast()
	s.mu.Unlock()

	syncs := s.commit(batch)

	s.mu.Lock()
	defer s.mu.Unlock()
	s.stats.Syncs += syncs
	s.stats.Segments = s.last
	for _, u := range batch {
		for _, r := range u.recs {
			delete(s.inflight, r.Name)
			if r.err != nil {
				u.err = r.err
				continue
			}
			s.index[r.Name] = r.at
			s.stats.Puts++
			s.stats.Bytes += int64(r.at.len)
		}
		close(u.done)
	}
	if len(s.queue) > 0 {
		s.queue[0].lead <- struct{}{}
		return
	}
	s.leading = false
	s.changed.Broadcast()
}

// commit writes the records of a batch and makes them durable, or sets their
// errors. The leader calls it.
func (s *Store) commit(batch []*unit) (syncs uint64) {
	var recs []*pending
	for _, u := range batch {
		recs = append(recs, u.recs...)
	}
	for len(recs) > 0 {
		if s.active != nil && !s.fits(s.active.size, recs[0]) {
			s.seal()
		}
		if s.active == nil {
			if err := s.create(recs[0].span()); err != nil {
				for _, r := range recs {
					r.err = errs.Wrap(err, "put block", short(r.Name))
				}
				return syncs
			}
		}
		n, end := 0, s.active.size
		for n < len(recs) && s.fits(end, recs[n]) {
			end += recs[n].span()
			n++
		}
		run := recs[:n]
		recs = recs[n:]
		syncs++
		if err := s.write(s.active, run, end); err != nil {
			for _, r := range run {
				r.err = errs.Wrap(err, "put block", short(r.Name))
			}
		}
	}
	return syncs
}

// fits reports whether r may go to off of a segment: any record may be the first.
func (s *Store) fits(off int64, r *pending) bool {
	return off+r.span() <= s.size || off == headerSize
}

// write appends run to a and syncs; end is where it will end. On failure the
// segment is as it was, or is closed.
func (s *Store) write(a *active, run []*pending, end int64) error {
	if err := s.grow(a, end); err != nil {
		return err // nothing was written
	}
	bp := writeBuffers.Get().(*[]byte)
	defer writeBuffers.Put(bp)
	buf, off := (*bp)[:0], a.size
	var zeros [align]byte
	for i, r := range run {
		at := off + int64(len(buf))
		r.at = entry{segment: a.num, off: uint32(at), len: uint32(len(r.Data)), crc: r.crc}
		h := record{name: r.Name, length: r.at.len, crc: r.crc, durable: uint32(a.size)}
		buf = appendRecord(buf, &h, s.id, a.num, at)
		buf = append(buf, r.Data...)
		buf = append(buf, zeros[:padded(int64(len(r.Data)))-int64(len(r.Data))]...)
		if len(buf) < writeSize && i < len(run)-1 {
			continue
		}
		if _, err := a.file.WriteAt(buf, off); err != nil {
			return s.failed(a, err)
		}
		off += int64(len(buf))
		buf = buf[:0]
	}
	if err := disk.SyncData(a.file); err != nil {
		return s.failed(a, err)
	}
	a.size = end
	a.alloc = max(a.alloc, end)
	for _, r := range run {
		a.recs = append(a.recs, placed{r.Name, r.at.off, r.at.len, r.at.crc})
	}
	return nil
}

// failed cleans up after a failed write or sync of a, and returns why.
func (s *Store) failed(a *active, why error) error {
	// What the page cache holds beyond the durable length may never reach the
	// disk: it must not be found again, not even by a restarted process.
	terr := disk.Truncate(a.file, a.size)
	if terr == nil {
		a.alloc = a.size
	}
	if full(why) && terr == nil {
		return noSpace(s.dir, why)
	}
	s.close(a)
	return errors.Join(&errs.Error{Op: "write", Subject: s.segmentPath(a.num), Class: errs.IO, Err: why}, terr)
}

// full reports whether err means that the disk is full.
func full(err error) bool {
	return errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT)
}

func noSpace(dir string, why error) error {
	return (&errs.Error{Op: "take disk space", Subject: dir, Class: errs.NoSpace, Err: why}).
		WithRemedy("free space on the file system of %s", dir)
}

// grow takes disk space for a up to end, and some more if there is enough.
func (s *Store) grow(a *active, end int64) error {
	if end <= a.alloc {
		return nil
	}
	free, err := s.room(end - a.alloc)
	if err != nil || a.plain {
		return err
	}
	to := min((end+growth-1)/growth*growth, max(s.size, end))
	if free < to-a.alloc {
		to = end
	}
	err = disk.Allocate(a.file, a.alloc, to)
	if full(err) && to > end {
		to = end
		err = disk.Allocate(a.file, a.alloc, to)
	}
	switch {
	case err == nil:
		a.alloc = to
		return nil
	case errs.Has(err, errs.NotSupported) || errors.Is(err, syscall.ENOSYS):
		a.plain = true
		return nil
	default:
		return s.failed(a, err) // part of the range may have been taken
	}
}

// room returns how much may be written, at least n bytes, or class NoSpace.
func (s *Store) room(n int64) (int64, error) {
	free, err := s.free()
	if err != nil {
		return 0, err
	}
	if free-s.reserve < n {
		return 0, noSpace(s.dir, errs.E(errs.NoSpace, "", "", "%d bytes free, %d are kept in reserve", free, s.reserve))
	}
	return free - s.reserve, nil
}

// create begins the next segment, for a first record that takes n bytes.
func (s *Store) create(n int64) error {
	if _, err := s.room(headerSize + n); err != nil {
		return err
	}
	num := s.last + 1
	if num == 0 {
		return errs.E(errs.NoSpace, "create segment", s.dir, "no numbers left")
	}
	path := s.segmentPath(num)
	f, err := disk.Create(s.fs, path)
	if err != nil {
		return s.uncreated(path, nil, err)
	}
	h := appendSegmentHeader(make([]byte, 0, headerSize), segmentHeader{store: s.id, number: num, prev: s.last, prevLen: s.lastLen})
	page := make([]byte, headerSize)
	copy(page, h)
	copy(page[headerCopy:], h)
	if _, err := f.WriteAt(page, 0); err != nil {
		return s.uncreated(path, f, err)
	}
	if err := disk.SyncData(f); err != nil {
		return s.uncreated(path, f, err)
	}
	if err := disk.SyncDir(s.fs, s.dir); err != nil {
		return s.uncreated(path, f, err)
	}
	s.active = &active{num: num, file: f, size: headerSize, alloc: headerSize}
	s.last = num
	s.files.pin(num, f)
	return nil
}

// uncreated takes a half-made segment back; if that fails too, the next one
// takes its number and Open passes it over.
func (s *Store) uncreated(path string, f disk.File, why error) error {
	class := errs.IO
	if full(why) {
		return errors.Join(noSpace(s.dir, why), s.undo(path, f))
	}
	return errors.Join(&errs.Error{Op: "create segment", Subject: path, Class: class, Err: why}, s.undo(path, f))
}

func (s *Store) undo(path string, f disk.File) error {
	if f == nil {
		return nil
	}
	return errors.Join(f.Close(), s.fs.Remove(path))
}

// seal ends the active segment.
func (s *Store) seal() {
	a := s.active
	s.finish(a)
	s.close(a)
}

// close takes a's place in the chain: whatever is beyond its durable length is
// not part of it.
func (s *Store) close(a *active) {
	s.lastLen = uint32(a.size)
	s.active = nil
	s.files.unpin(a.num)
}

// finish gives back the space a does not use and writes its index file. It is
// all convenience: failures are logged and cost a scan, or space.
func (s *Store) finish(a *active) {
	if a.alloc > a.size {
		if err := disk.Truncate(a.file, a.size); err != nil {
			s.log.Warn("segment not trimmed", "file", s.segmentPath(a.num), "err", err)
		} else {
			a.alloc = a.size
		}
	}
	if !a.damaged {
		if err := s.writeIndex(a.num, a.size, a.recs); err != nil {
			s.log.Warn("segment index not written", "file", s.indexPath(a.num), "err", err)
		}
	}
}

// writeIndex writes a segment's index file. It is not synced: a torn one is
// known by its checksum.
func (s *Store) writeIndex(num uint32, covered int64, recs []placed) error {
	path := s.indexPath(num)
	f, err := disk.Create(s.fs, path+".tmp")
	if err != nil {
		return err
	}
	_, err = f.WriteAt(encodeIndex(s.id, num, covered, recs), 0)
	if err = errors.Join(err, f.Close()); err != nil {
		return errors.Join(err, s.fs.Remove(path+".tmp"))
	}
	return s.fs.Rename(path+".tmp", path)
}
