// Package block keeps the blocks of a volume on its storing nodes, and gives
// them to every node.
//
// Words. A block is at most volume.MaxBlock bytes that never change; its name is
// the BLAKE3 hash of them, keyed with the volume's key. A replica is a storing
// node of the volume. Need is how many replicas must have a block before it
// counts as durable: more than half of all, so that a majority of the metadata
// group and the holders of a block always meet. Repair is getting a copy that
// this node should have and has not.
//
// Client is a node's side: Put, Get, and on a storing node the handlers
// "block.put", "block.get" and "block.has", and repair.
//
// Invariants:
//   - Get returns bytes whose hash is the name, or an error.
//   - When Put returns nil, Need replicas have synced the block.
//   - Nothing is stored or sent whose hash is not its name.
//   - Memory is bounded: the cache by bytes, repair by names, copies still on
//     their way to slow replicas by bytes.
//
// Lock order: Client.mu, then tasks.mu; repair.mu and cache.mu alone. None is held
// over a call or the disk.
//
// Failures. A dead replica costs a put nothing once Need others have the block:
// it learns of the block from the metadata (Ensure, Walk) and fetches it. A peer
// that is silent costs a get 200 ms; one that sends wrong bytes is passed over
// and counted. A damaged local copy is forgotten, counted, and replaced from a
// good one by whoever notices: a get, a peer's get, or repair.
package block
