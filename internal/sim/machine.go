package sim

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc64"

	"github.com/cockroachdb/pebble/v2"

	"github.com/unum-os/unum/internal/group"
	"github.com/unum-os/unum/internal/ids"
	"github.com/unum-os/unum/internal/record"
)

// The groups of every node.
const (
	recordGroup   ids.Group = 1
	registerGroup ids.Group = 2
)

var groups = []ids.Group{recordGroup, registerGroup}

// kind says what an operation does to a register.
type kind uint8

const (
	opRead kind = iota
	opWrite
	opAdd // gives the old value
	opCas // gives 1 if it was done
)

// command is what a client asks of the registers. On the wire: client, seq,
// acked, key, a, b as 8 bytes each, the kind, padding.
type command struct {
	client, seq, key, a, b uint64
	kind                   kind
}

// commandBytes is the size of an encoded command without its padding.
const commandBytes = 5*8 + 1

func (c command) encode(padding int) []byte {
	out := make([]byte, 0, commandBytes+padding)
	for _, n := range []uint64{c.client, c.seq, c.key, c.a, c.b} {
		out = binary.BigEndian.AppendUint64(out, n)
	}
	return append(append(out, byte(c.kind)), make([]byte, padding)...)
}

func decodeCommand(b []byte) command {
	n := func(i int) uint64 { return binary.BigEndian.Uint64(b[8*i:]) }
	return command{n(0), n(1), n(2), n(3), n(4), kind(b[40])}
}

// registers is a machine of numbered registers, with what is needed to tell
// that each command had its effect once.
//
//	'x'             index of the last command, number of effects, digest of all
//	'r' key         a register
//	's' client      the client's last sequence number and its result
//	'e' client seq  index at which a command had its effect
type registers struct {
	n *node
}

var crcTable = crc64.MakeTable(crc64.ECMA)

func u64(list ...uint64) []byte {
	var b []byte
	for _, n := range list {
		b = binary.BigEndian.AppendUint64(b, n)
	}
	return b
}

func at(b []byte, i int) uint64 {
	if len(b) < 8*i+8 {
		return 0
	}
	return binary.BigEndian.Uint64(b[8*i:])
}

func load(r pebble.Reader, key []byte) []byte {
	v, c, err := r.Get(key)
	if errors.Is(err, pebble.ErrNotFound) {
		return nil
	}
	if err != nil {
		panic(err)
	}
	out := append([]byte{}, v...)
	if err := c.Close(); err != nil {
		panic(err)
	}
	return out
}

// Apply does one command and returns its result, a uint64.
func (m *registers) Apply(b *pebble.Batch, s group.Space, index uint64, cmd []byte) any {
	w := m.n.w
	w.check.applied(m.n, s.Group(), index, cmd)
	set := func(key, v []byte) {
		if err := b.Set(key, v, nil); err != nil {
			panic(err)
		}
	}
	x := load(b, s.Key([]byte("x")))
	if last := at(x, 0); index <= last {
		w.violated("%v applies entry %d of group %d to a state that has all up to %d", m.n.id, index, s.Group(), last)
	}
	c := decodeCommand(cmd)
	session := load(b, s.Key([]byte("s"), u64(c.client)))
	effects, digest := at(x, 1), at(x, 2)
	var result uint64
	switch last := at(session, 0); {
	case c.seq == last && w.cfg.Plant != plantForgetSession:
		result = at(session, 1)
	case c.seq < last:
		result = 0 // a late copy; nobody waits for it
	default:
		result = m.do(b, s, c, set)
		if mark := s.Key([]byte("e"), u64(c.client, c.seq)); load(b, mark) != nil {
			w.violated("command %d of client %d had its effect twice on %v, the second time at entry %d", c.seq, c.client, m.n.id, index)
		} else {
			set(mark, u64(index))
		}
		set(s.Key([]byte("s"), u64(c.client)), u64(c.seq, result))
		effects++
		digest = crc64.Update(digest, crcTable, cmd)
	}
	if w.cfg.Plant == plantNondeterministic && index%16 == 0 {
		digest += uint64(m.n.id)
	}
	set(s.Key([]byte("x")), u64(index, effects, digest))
	return result
}

func (m *registers) do(b *pebble.Batch, s group.Space, c command, set func(k, v []byte)) uint64 {
	key := s.Key([]byte("r"), u64(c.key))
	old := at(load(b, key), 0)
	switch c.kind {
	case opWrite:
		set(key, u64(c.a))
		return 0
	case opAdd:
		set(key, u64(old+c.a))
		return old
	case opCas:
		if old != c.a {
			return 0
		}
		set(key, u64(c.b))
		return 1
	}
	panic(fmt.Sprintf("command of kind %d", c.kind))
}

// Applied is part of group.Machine.
func (m *registers) Applied(uint64) {}

// recorder is the record's real machine, watched.
type recorder struct {
	record.Machine
	n *node
}

// Apply is part of group.Machine.
func (m *recorder) Apply(b *pebble.Batch, s group.Space, index uint64, cmd []byte) any {
	m.n.w.check.applied(m.n, s.Group(), index, cmd)
	return m.Machine.Apply(b, s, index, cmd)
}

// readRegister reads a register of the applied state.
func readRegister(g *group.Group, key uint64) (uint64, error) {
	v, _, err := g.Get([]byte("r"), u64(key))
	return at(v, 0), err
}
