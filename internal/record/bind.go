package record

import (
	"github.com/cockroachdb/pebble/v2"

	"github.com/unum-os/unum/internal/group"
)

var _ group.Machine = (*Machine)(nil)

// Apply is ApplyTo for package group; it returns a *Result.
func (m *Machine) Apply(b *pebble.Batch, space group.Space, index uint64, cmd []byte) any {
	return m.ApplyTo(b, space, index, cmd)
}
