package block

import (
	"context"
	"fmt"

	"github.com/unum-os/unum/internal/errs"
	"github.com/unum-os/unum/internal/ids"
	"github.com/unum-os/unum/internal/segment"
	"github.com/unum-os/unum/internal/volume"
	"github.com/unum-os/unum/internal/wire"
)

// The calls that storing nodes answer. The answers of MethodGet are big: node
// assembly sends its calls on rpc's bulk lane.
const (
	MethodPut = "block.put" // nameMsg and the block; the answer means: durable here
	MethodGet = "block.get" // nameMsg; the answer is the block
	MethodHas = "block.has" // names one after the other; the answer has a bit for each, lowest first
)

// maxHas bounds the names of one block.has.
const maxHas = 4096

// nameMsg asks for, or announces, one block.
type nameMsg struct {
	Name volume.BlockName `cbor:"1,keyasint"`
}

// short is enough of a name for a message.
func short(n volume.BlockName) string { return fmt.Sprintf("%x", n[:8]) }

// serve registers the handlers.
func (c *Client) serve() {
	c.cfg.RPC.Handle(MethodPut, c.servePut)
	c.cfg.RPC.Handle(MethodGet, c.serveGet)
	c.cfg.RPC.Handle(MethodHas, c.serveHas)
}

func (c *Client) servePut(_ context.Context, from ids.Node, req, data []byte) (any, []byte, error) {
	var m nameMsg
	if err := wire.Unmarshal(req, &m); err != nil {
		return nil, nil, err
	}
	return nil, nil, c.take(func() error { return c.store(m.Name, data, from) })
}

// take stores a block, unless this node takes none any more: then the writer must
// not count this copy. That is asked before, to write nothing, and again when it is
// durable, for a sync takes its time.
func (c *Client) take(store func() error) error {
	if err := c.takes(); err != nil {
		return err
	}
	if err := store(); err != nil {
		return err
	}
	return c.takes()
}

// takes refuses, with class Stale, what is to be kept by a node that keeps nothing
// any more. A writer that was held up, and knows the replicas as they were, would
// count a copy that is gone when the block is named.
func (c *Client) takes() error {
	if c.cfg.Leaving != nil && c.cfg.Leaving() {
		return errs.E(errs.Stale, "put block", "", "%v leaves, and others have its place among the storing nodes: it takes no blocks any more", c.cfg.Self)
	}
	return nil
}

// store puts data, which from sent as the block of that name, into the own store.
func (c *Client) store(name volume.BlockName, data []byte, from ids.Node) error {
	if len(data) > volume.MaxBlock {
		return errs.E(errs.TooLarge, "put block", short(name), "%d bytes, limit %d", len(data), volume.MaxBlock)
	}
	if NameOf(c.cfg.Key, data) != name {
		return errs.E(errs.Corrupt, "put block", short(name), "what %v sent has another hash", from)
	}
	return c.cfg.Local.Put(segment.Name(name), data)
}

func (c *Client) serveGet(_ context.Context, _ ids.Node, req, _ []byte) (any, []byte, error) {
	var m nameMsg
	if err := wire.Unmarshal(req, &m); err != nil {
		return nil, nil, err
	}
	data, err := c.local(m.Name)
	if err != nil {
		if !errs.Has(err, errs.NotFound) {
			c.want(m.Name, 0) // a peer asks for it, so it should be here
		}
		return nil, nil, err
	}
	return nil, data, nil
}

func (c *Client) serveHas(_ context.Context, _ ids.Node, _, data []byte) (any, []byte, error) {
	n := len(data) / len(volume.BlockName{})
	if n*len(volume.BlockName{}) != len(data) || n > maxHas {
		return nil, nil, errs.E(errs.Invalid, "ask for blocks", "", "%d bytes of names, at most %d names", len(data), maxHas)
	}
	bits := make([]byte, (n+7)/8)
	for i := range n {
		if c.cfg.Local.Has(segment.Name(data[i*len(segment.Name{}):])) {
			bits[i/8] |= 1 << (i % 8)
		}
	}
	return nil, bits, nil
}

// Has asks a storing node which of the blocks it has, at most 4096 at a time.
func (c *Client) Has(ctx context.Context, node ids.Node, names []volume.BlockName) ([]bool, error) {
	req := make([]byte, 0, len(names)*len(volume.BlockName{}))
	for _, n := range names {
		req = append(req, n[:]...)
	}
	ctx, cancel := context.WithTimeout(ctx, c.times.call)
	defer cancel()
	bits, err := c.cfg.RPC.Call(ctx, node, MethodHas, nil, req, nil)
	if err != nil {
		return nil, err
	}
	if len(bits) != (len(names)+7)/8 {
		return nil, errs.E(errs.Corrupt, "ask for blocks", node.String(), "%d bytes of answer for %d names", len(bits), len(names))
	}
	has := make([]bool, len(names))
	for i := range has {
		has[i] = bits[i/8]&(1<<(i%8)) != 0
	}
	return has, nil
}
