package segment

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"path/filepath"
	"sync"
	"syscall"

	"github.com/unum-os/unum/internal/disk"
	"github.com/unum-os/unum/internal/errs"
)

// Config says where and how a store keeps its blocks. Zero fields take the
// defaults.
type Config struct {
	Dir         string
	SegmentSize int64   // bytes of a full segment; 64 MiB: an index of its own pays, and a lost one costs little to read
	Reserve     int64   // bytes of the file system left to others, so that the node's metadata can go on; 32 MiB; negative: none
	MaxOpen     int     // sealed segment files open at once; 64: the process may be limited to 256
	FS          disk.FS // the operating system's
	Log         *slog.Logger
}

// Store is an open block store. Its methods may be called concurrently.
type Store struct {
	dir     string
	size    int64
	reserve int64
	fs      disk.FS
	log     *slog.Logger
	lock    io.Closer
	id      storeID
	files   *files

	// The leader's: only the put that leads, or Open, or Close when nobody
	// leads, touches them.
	active  *active
	last    uint32 // number of the newest segment; 0: none yet
	lastLen uint32 // its final length, once it is not active

	mu       sync.RWMutex
	index    map[Name]entry
	inflight map[Name]*unit // being written
	queue    []*unit        // for the next leader
	queued   int64          // bytes in queue
	leading  bool
	closed   bool
	changed  sync.Cond // on mu: queue taken, or leading ended
	damage   []Damage
	stats    Stats
}

// entry is where a block lies.
type entry struct {
	segment uint32
	off     uint32 // of the record's header
	len     uint32
	crc     uint32 // of the payload
}

// Damage is a place on disk whose bytes are not what was written.
type Damage struct {
	File string
	Off  int64
	Err  error // class Corrupt, or IO if the disk did not give the bytes
}

// maxDamage bounds the list that Damage returns; Stats counts on.
const maxDamage = 1000

// Stats counts since Open, except Blocks, Bytes and Segments, which are totals.
type Stats struct {
	Blocks   int
	Bytes    int64 // of payloads of all blocks
	Segments uint32
	Puts     uint64 // blocks written
	Syncs    uint64 // of segments, for puts
	Damaged  uint64 // places found damaged
}

const (
	defaultSegment = 64 << 20 // bytes of a full segment, if Config does not say
	defaultReserve = 32 << 20 // bytes of the file system that are left to others, if Config does not say
	defaultOpen    = 64       // segments open for reading at a time, if Config does not say
)

// Open opens the store in cfg.Dir, or makes one. It fails with class Busy when
// another process has it open, Corrupt when nothing in the directory tells which
// store it is, NotSupported when a later program has written it, and IO or
// NoSpace when the disk fails; damage in it is no failure.
func Open(cfg Config) (*Store, error) {
	if cfg.SegmentSize == 0 {
		cfg.SegmentSize = defaultSegment
	}
	if cfg.SegmentSize < minSegment || cfg.SegmentSize > maxSegment {
		return nil, errs.E(errs.Invalid, "open block store", cfg.Dir, "segment size %d, want %d to %d", cfg.SegmentSize, minSegment, maxSegment)
	}
	if cfg.Reserve == 0 {
		cfg.Reserve = defaultReserve
	}
	if cfg.MaxOpen <= 0 {
		cfg.MaxOpen = defaultOpen
	}
	if cfg.FS == nil {
		cfg.FS = disk.Real
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	s := &Store{
		dir:      cfg.Dir,
		size:     cfg.SegmentSize,
		reserve:  max(cfg.Reserve, 0),
		fs:       cfg.FS,
		log:      cfg.Log,
		index:    map[Name]entry{},
		inflight: map[Name]*unit{},
	}
	s.changed.L = &s.mu
	s.files = newFiles(cfg.MaxOpen, func(n uint32) (disk.File, error) { return s.fs.Open(s.segmentPath(n)) })
	if err := s.recover(); err != nil {
		s.files.close()
		if s.lock != nil {
			err = errors.Join(err, s.lock.Close())
		}
		return nil, errs.Wrap(err, "open block store", cfg.Dir)
	}
	return s, nil
}

func (s *Store) segmentPath(n uint32) string {
	return filepath.Join(s.dir, fmt.Sprintf("%016x.seg", n))
}

func (s *Store) indexPath(n uint32) string {
	return filepath.Join(s.dir, fmt.Sprintf("%016x.idx", n))
}

// Close waits for the puts under way, writes the index of the active segment,
// and lets the directory go. Puts after it fail with class Unavailable, and so
// do gets.
func (s *Store) Close() error {
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		return nil
	}
	s.closed = true
	for s.leading {
		s.changed.Wait()
	}
	s.mu.Unlock()
	if a := s.active; a != nil {
		s.finish(a)
		s.active = nil
	}
	s.files.close()
	return errs.Wrap(s.lock.Close(), "close block store", s.dir)
}

// Has reports whether the block is in the store, durable. Its bytes have not
// been looked at.
func (s *Store) Has(name Name) bool {
	s.mu.RLock()
	defer s.mu.RUnlock()
	_, ok := s.index[name]
	return ok
}

// Get returns the block's bytes, in buf if they fit into its capacity, else in a
// new slice; the caller owns them. They are as they were put: the checksum was
// verified. It fails with class NotFound, with Corrupt or IO when the copy is
// damaged (the store has forgotten the block then: a put will write it anew), or
// with that of the failure to open the file.
func (s *Store) Get(name Name, buf []byte) ([]byte, error) {
	s.mu.RLock()
	e, ok := s.index[name]
	closed := s.closed
	s.mu.RUnlock()
	switch {
	case closed:
		return nil, errs.E(errs.Unavailable, "get block", s.dir, "the store is closed")
	case !ok:
		return nil, errs.E(errs.NotFound, "get block", short(name), "not in the store")
	}
	h, err := s.files.get(e.segment)
	if errors.Is(err, syscall.ENOENT) {
		return nil, s.bad(name, e, errs.E(errs.Corrupt, "get block", short(name), "its segment is gone"))
	} else if err != nil {
		return nil, errs.Wrap(err, "get block", short(name))
	}
	if cap(buf) < int(e.len) {
		buf = make([]byte, e.len)
	}
	buf = buf[:e.len]
	n, err := h.file.ReadAt(buf, int64(e.off)+recordSize)
	s.files.put(h)
	switch {
	case n == len(buf):
	case errors.Is(err, io.EOF) || err == nil:
		return nil, s.bad(name, e, errs.E(errs.Corrupt, "get block", short(name), "the segment ends at byte %d of %d", n, e.len))
	default:
		return nil, s.bad(name, e, &errs.Error{Op: "get block", Subject: short(name), Class: errs.IO, Err: err})
	}
	if got := checksum(buf); got != e.crc {
		return nil, s.bad(name, e, errs.E(errs.Corrupt, "get block", short(name), "checksum %08x, want %08x", got, e.crc))
	}
	return buf, nil
}

// Forget makes the store hold the block no more, so that a put writes it anew:
// for a caller that knows better than the checksum. Until then the old copy may
// come back when the store is opened again.
func (s *Store) Forget(name Name) {
	s.mu.RLock()
	e, ok := s.index[name]
	s.mu.RUnlock()
	if ok {
		s.bad(name, e, errs.E(errs.Corrupt, "forget block", short(name), "not what its name says"))
	}
}

// bad notes that the copy of name at e is damaged, forgets it, and returns err.
func (s *Store) bad(name Name, e entry, err *errs.Error) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.index[name] == e { // else a good one has been put since
		delete(s.index, name)
		s.stats.Bytes -= int64(e.len)
		s.note(e.segment, int64(e.off), err)
	}
	return err
}

// note adds to the list of damage. mu is held, or nobody else has s yet.
func (s *Store) note(segment uint32, off int64, err error) {
	s.stats.Damaged++
	d := Damage{File: s.segmentPath(segment), Off: off, Err: err}
	if len(s.damage) < maxDamage {
		s.damage = append(s.damage, d)
	}
	s.log.Error("block store damaged", "file", d.File, "offset", d.Off, "err", err)
}

// Damage returns the places found damaged since Open, at most 1000.
func (s *Store) Damage() []Damage {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return append([]Damage(nil), s.damage...)
}

// Stats returns the counts.
func (s *Store) Stats() Stats {
	s.mu.RLock()
	defer s.mu.RUnlock()
	st := s.stats
	st.Blocks = len(s.index)
	return st
}

// Free returns the bytes that may still be put before the reserve is touched.
func (s *Store) Free() (int64, error) {
	n, err := s.free()
	if err != nil {
		return 0, errs.Wrap(err, "free space", s.dir)
	}
	return max(n-s.reserve, 0), nil
}

// free returns the bytes that the file system still has for us.
func (s *Store) free() (int64, error) {
	u, err := s.fs.GetDiskUsage(s.dir)
	return int64(min(u.AvailBytes, 1<<62)), err
}

// short is enough of a name for a message.
func short(n Name) string { return fmt.Sprintf("%x", n[:8]) }
