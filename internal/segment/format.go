package segment

import (
	"encoding/binary"
	"hash/crc32"

	"github.com/unum-os/unum/internal/errs"
)

// Name names a block; the store takes it as given.
type Name = [32]byte

// MaxData bounds the bytes of one block.
const MaxData = 1 << 20

const (
	version     = 1    // format of segments and their indexes
	headerSize  = 4096 // bytes of a segment's header: a page, so that records begin on one
	headerCopy  = 2048 // where the header's second copy lies; a sector can be lost
	headerBytes = 64   // bytes of each copy of the header
	recordSize  = 64   // bytes of a record's header
	align       = 64   // records begin on multiples of it: a resync looks there only

	maxSegment = 1 << 30  // bytes of a segment at most: offsets are uint32
	minSegment = 64 << 10 // bytes of a full segment at least: smaller ones are all header; a larger record has a segment to itself

	segmentMagic = "UNUMSEG\n"
	indexMagic   = "UNUMIDX\n"
	recordMagic  = 0x43455255 // "UREC"

	flagPad = 1 // no block: a piece torn by a crash, to be passed over

	indexHeader = 48      // bytes of an index file before its entries
	indexEntry  = 32 + 12 // bytes of each: a block's name, and where it is
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

func checksum(b []byte) uint32 { return crc32.Checksum(b, castagnoli) }

// padded is n rounded up to the alignment.
func padded(n int64) int64 { return (n + align - 1) &^ (align - 1) }

type storeID [16]byte

// segmentHeader is the start of a segment file.
type segmentHeader struct {
	store   storeID
	number  uint32
	prev    uint32 // the segment before; 0: none
	prevLen uint32 // its final length
}

// appendSegmentHeader appends one copy, headerBytes long.
func appendSegmentHeader(b []byte, h segmentHeader) []byte {
	at := len(b)
	b = append(b, segmentMagic...)
	b = binary.LittleEndian.AppendUint32(b, version)
	b = binary.LittleEndian.AppendUint32(b, headerSize)
	b = append(b, h.store[:]...)
	b = binary.LittleEndian.AppendUint64(b, uint64(h.number))
	b = binary.LittleEndian.AppendUint64(b, uint64(h.prev))
	b = binary.LittleEndian.AppendUint32(b, h.prevLen)
	b = append(b, make([]byte, 8)...)
	return binary.LittleEndian.AppendUint32(b, checksum(b[at:]))
}

// decodeSegmentHeader reads one copy. Class Corrupt: not a header; NotSupported:
// of a later version.
func decodeSegmentHeader(b []byte) (segmentHeader, error) {
	var h segmentHeader
	if len(b) < headerBytes || string(b[:8]) != segmentMagic {
		return h, errs.E(errs.Corrupt, "read segment header", "", "no segment header")
	}
	b = b[:headerBytes]
	if got, want := checksum(b[:60]), binary.LittleEndian.Uint32(b[60:]); got != want {
		return h, errs.E(errs.Corrupt, "read segment header", "", "checksum %08x, want %08x", got, want)
	}
	if v := binary.LittleEndian.Uint32(b[8:]); v != version {
		return h, errs.E(errs.NotSupported, "read segment header", "", "format version %d, this program knows %d", v, version)
	}
	number, prev := binary.LittleEndian.Uint64(b[32:]), binary.LittleEndian.Uint64(b[40:])
	if binary.LittleEndian.Uint32(b[12:]) != headerSize || number == 0 || number > 1<<32-1 || prev >= number {
		return h, errs.E(errs.Corrupt, "read segment header", "", "senseless header of segment %d", number)
	}
	copy(h.store[:], b[16:])
	h.number, h.prev = uint32(number), uint32(prev)
	h.prevLen = binary.LittleEndian.Uint32(b[48:])
	return h, nil
}

// record is a record's header.
type record struct {
	flags   uint8
	name    Name
	length  uint32 // bytes of payload
	crc     uint32 // of the payload
	durable uint32 // bytes of the segment known durable when this was written
}

// span is the bytes the record takes in its segment.
func (r *record) span() int64 { return recordSize + padded(int64(r.length)) }

// salt is the start of the checksum of a record's header: the same bytes at
// another place, in another segment or inside a payload are no record.
func salt(id storeID, segment uint32, off int64) uint32 {
	var b [32]byte
	copy(b[:], id[:])
	binary.LittleEndian.PutUint64(b[16:], uint64(segment))
	binary.LittleEndian.PutUint64(b[24:], uint64(off))
	return checksum(b[:])
}

// appendRecord appends the header of a record that will lie at off.
func appendRecord(b []byte, r *record, id storeID, segment uint32, off int64) []byte {
	at := len(b)
	b = binary.LittleEndian.AppendUint32(b, recordMagic)
	b = append(b, version, r.flags, 0, 0)
	b = append(b, r.name[:]...)
	b = binary.LittleEndian.AppendUint32(b, r.length)
	b = binary.LittleEndian.AppendUint32(b, r.crc)
	b = binary.LittleEndian.AppendUint32(b, r.durable)
	b = append(b, make([]byte, 8)...)
	return binary.LittleEndian.AppendUint32(b, crc32.Update(salt(id, segment, off), castagnoli, b[at:]))
}

// decodeRecord reads the header of the record at off; false: there is none.
func decodeRecord(b []byte, id storeID, segment uint32, off int64) (record, bool) {
	var r record
	if len(b) < recordSize || binary.LittleEndian.Uint32(b) != recordMagic || b[4] != version {
		return r, false
	}
	b = b[:recordSize]
	if crc32.Update(salt(id, segment, off), castagnoli, b[:60]) != binary.LittleEndian.Uint32(b[60:]) {
		return r, false
	}
	r.flags = b[5]
	copy(r.name[:], b[8:])
	r.length = binary.LittleEndian.Uint32(b[40:])
	r.crc = binary.LittleEndian.Uint32(b[44:])
	r.durable = binary.LittleEndian.Uint32(b[48:])
	switch {
	case r.flags == 0 && r.length <= MaxData:
	case r.flags == flagPad && r.length < maxSegment:
	default:
		return r, false
	}
	return r, true
}

// placed is a block's record in a known segment.
type placed struct {
	name Name
	off  uint32 // of the header
	len  uint32
	crc  uint32
}

// encodeIndex is the index file of a segment: all records below covered.
func encodeIndex(id storeID, segment uint32, covered int64, recs []placed) []byte {
	b := make([]byte, 0, indexHeader+len(recs)*indexEntry+4)
	b = append(b, indexMagic...)
	b = binary.LittleEndian.AppendUint32(b, version)
	b = binary.LittleEndian.AppendUint32(b, uint32(len(recs)))
	b = append(b, id[:]...)
	b = binary.LittleEndian.AppendUint64(b, uint64(segment))
	b = binary.LittleEndian.AppendUint64(b, uint64(covered))
	for i := range recs {
		r := &recs[i]
		b = append(b, r.name[:]...)
		b = binary.LittleEndian.AppendUint32(b, r.off)
		b = binary.LittleEndian.AppendUint32(b, r.len)
		b = binary.LittleEndian.AppendUint32(b, r.crc)
	}
	return binary.LittleEndian.AppendUint32(b, checksum(b))
}

// decodeIndex reads an index file; anything wrong in it makes it worthless.
func decodeIndex(b []byte) (id storeID, segment uint32, covered int64, recs []placed, ok bool) {
	if len(b) < indexHeader+4 || string(b[:8]) != indexMagic || binary.LittleEndian.Uint32(b[8:]) != version {
		return
	}
	body := b[:len(b)-4]
	if checksum(body) != binary.LittleEndian.Uint32(b[len(b)-4:]) {
		return
	}
	n := uint64(binary.LittleEndian.Uint32(b[12:]))
	number, cov := binary.LittleEndian.Uint64(b[32:]), binary.LittleEndian.Uint64(b[40:])
	if uint64(len(body)) != indexHeader+n*indexEntry || number > 1<<32-1 || cov > maxSegment {
		return
	}
	copy(id[:], b[16:])
	recs = make([]placed, n)
	for i := range recs {
		e := body[indexHeader+i*indexEntry:]
		r := &recs[i]
		copy(r.name[:], e)
		r.off = binary.LittleEndian.Uint32(e[32:])
		r.len = binary.LittleEndian.Uint32(e[36:])
		r.crc = binary.LittleEndian.Uint32(e[40:])
		if r.len > MaxData || r.off < headerSize || uint64(r.off)+recordSize+uint64(r.len) > cov {
			return id, 0, 0, nil, false
		}
	}
	return id, uint32(number), int64(cov), recs, true
}
