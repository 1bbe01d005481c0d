// Package disk is the way to the disk for every part that keeps a promise: the
// groups' databases, the block store, a node's identity and node.json.
//
// Words. FS is the file system interface of the storage engine, so that one
// object serves the engine and us. A change is an operation after which a power
// failure may find something else: write, truncation, allocation, sync, create,
// link, rename, remove, mkdir. What is synced is durable: the bytes of a file
// when the file is synced, a name when its directory is.
//
// Three implementations:
//   - Real: the operating system's. Files are for their owner only, whatever the
//     umask; a lock names the process that holds it.
//   - Mem: memory, which Crash copies as a power failure would leave it: without
//     what was not synced, or with a part of it, by a seed.
//   - Failing: another FS of which chosen operations fail, or are told of.
//
// Invariants: Mem and Crash are functions of the operations and the seed alone:
// the same give the same bytes. Names of one directory survive in the order in
// which they were made; nothing else that was not synced has an order.
//
// Lock order: Failing's mutex is never held over an operation. Mem has one mutex.
package disk
