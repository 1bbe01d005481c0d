// Package wire encodes what Unum sends and stores: CBOR (RFC 8949) structs with
// small integer keys inside length-prefixed frames.
//
// A frame is
//
//	[length u32, big endian, of all that follows][type u8][header length u32][header][body]
//
// The header is one CBOR item, the body is raw bytes (a block, a piece of a
// stream) that are never copied through the codec. Every length is checked
// against a limit before memory is taken for it; decoding is strict: unknown
// fields are ignored (a newer peer may send them), everything malformed is
// refused with class Corrupt.
package wire

import (
	"bufio"
	"encoding/binary"
	"io"
	"math"

	"github.com/fxamacker/cbor/v2"

	"github.com/unum-os/unum/internal/errs"
)

// MaxFrame bounds a frame: a block of 1 MiB and its header, with room.
const MaxFrame = 4 << 20

// Bounds of what a message decodes to, against those that are small and expand.
const (
	maxNesting = 16      // levels of a message
	maxArray   = 1 << 20 // elements of an array of a message
	maxPairs   = 1 << 16 // pairs of a map of a message
)

var (
	enc cbor.EncMode
	dec cbor.DecMode
)

func init() {
	var err error
	if enc, err = cbor.CoreDetEncOptions().EncMode(); err != nil {
		panic(err)
	}
	dec, err = cbor.DecOptions{
		MaxNestedLevels:  maxNesting,
		MaxArrayElements: maxArray,
		MaxMapPairs:      maxPairs,
		IndefLength:      cbor.IndefLengthForbidden,
		TagsMd:           cbor.TagsForbidden,
		DupMapKey:        cbor.DupMapKeyEnforcedAPF,
		UTF8:             cbor.UTF8DecodeInvalid, // file names are bytes
	}.DecMode()
	if err != nil {
		panic(err)
	}
}

// Marshal encodes v deterministically: equal values give equal bytes.
func Marshal(v any) ([]byte, error) { return enc.Marshal(v) }

// MustMarshal is Marshal for types of our own, which always encode.
func MustMarshal(v any) []byte {
	b, err := enc.Marshal(v)
	if err != nil {
		panic(err)
	}
	return b
}

// Heads of CBOR items.
const (
	majorUint  = 0 << 5
	majorBytes = 2 << 5
	majorMap   = 5 << 5
	null       = 0xf6
)

// AppendUint, AppendBytes and AppendMap append what Marshal gives for a number, for
// bytes, and the head of what it gives for a map of n pairs; for a struct that is
// encoded more often than reflection can bear. A test holds it against Marshal.
func AppendUint(b []byte, n uint64) []byte { return appendHead(b, majorUint, n) }

// AppendBytes appends bytes: see AppendUint.
func AppendBytes(b, v []byte) []byte {
	if v == nil {
		return append(b, null)
	}
	return append(appendHead(b, majorBytes, uint64(len(v))), v...)
}

// AppendMap appends a map's head: see AppendUint.
func AppendMap(b []byte, n int) []byte { return appendHead(b, majorMap, uint64(n)) }

func appendHead(b []byte, major byte, n uint64) []byte {
	switch {
	case n < 24:
		return append(b, major|byte(n))
	case n <= math.MaxUint8:
		return append(b, major|24, byte(n))
	case n <= math.MaxUint16:
		return binary.BigEndian.AppendUint16(append(b, major|25), uint16(n))
	case n <= math.MaxUint32:
		return binary.BigEndian.AppendUint32(append(b, major|26), uint32(n))
	}
	return binary.BigEndian.AppendUint64(append(b, major|27), n)
}

// Unmarshal decodes one item into v and refuses anything after it.
func Unmarshal(b []byte, v any) error {
	if err := dec.Unmarshal(b, v); err != nil {
		return &errs.Error{Op: "decode", Class: errs.Corrupt, Err: err}
	}
	return nil
}

// Frame is one frame read from a connection. Header and Body are owned by the
// receiver.
type Frame struct {
	Type   byte
	Header []byte
	Body   []byte
}

// prefix is what stands before a frame's header, in bytes: the length of all, the
// type, the length of the header.
const prefix = 4 + 1 + 4

// WriteFrame writes one frame. It flushes nothing.
func WriteFrame(w io.Writer, typ byte, header, body []byte) error {
	n := 5 + len(header) + len(body)
	if n > MaxFrame {
		return errs.E(errs.TooLarge, "send frame", "", "%d bytes, limit %d", n, MaxFrame)
	}
	var p [prefix]byte
	binary.BigEndian.PutUint32(p[:], uint32(n))
	p[4] = typ
	binary.BigEndian.PutUint32(p[5:], uint32(len(header)))
	if bw, ok := w.(*bufio.Writer); ok {
		bw.Write(p[:])
		bw.Write(header)
		_, err := bw.Write(body)
		return err
	}
	b := make([]byte, 0, prefix+len(header)+len(body))
	b = append(append(append(b, p[:]...), header...), body...)
	_, err := w.Write(b)
	return err
}

// ReadFrame reads one frame of at most max bytes. io.EOF means the connection
// ended between frames.
func ReadFrame(r io.Reader, max int) (Frame, error) {
	var p [prefix]byte
	if _, err := io.ReadFull(r, p[:1]); err != nil {
		return Frame{}, err
	}
	if _, err := io.ReadFull(r, p[1:]); err != nil {
		return Frame{}, cut(err)
	}
	n, h := binary.BigEndian.Uint32(p[:]), binary.BigEndian.Uint32(p[5:])
	if n < 5 || uint64(n) > uint64(max) || h > n-5 {
		return Frame{}, errs.E(errs.Corrupt, "read frame", "", "length %d, header %d, limit %d", n, h, max)
	}
	b := make([]byte, n-5)
	if _, err := io.ReadFull(r, b); err != nil {
		return Frame{}, cut(err)
	}
	return Frame{Type: p[4], Header: b[:h:h], Body: b[h:]}, nil
}

func cut(err error) error {
	if err == io.EOF {
		return io.ErrUnexpectedEOF
	}
	return err
}
