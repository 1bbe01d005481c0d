// Package volume is the replicated state machine of a volume's metadata: it
// turns the modification log's operations into inodes, names, extents, locks
// and sessions, and is the final judge of what each operation may do.
//
// # Words
//
// A command is one entry of the group's log: it opens a session, ends one, or
// does a batch of operations for one. An extent says where a range of a file is.
// An orphan is an inode without a name that sessions keep because they have it
// open; those sessions are its keepers. A presumption is what an operation's
// author believed of the name space; when it no longer holds the operation is
// refused with class NameTooOld.
//
// # Keys
//
// All keys begin with the group's prefix; numbers are eight bytes, big endian,
// so that keys sort as numbers do. CBOR values are structs with integer keys.
//
//	'c'                    counters: next inode, inodes, bytes (CBOR)
//	'i' ino                inode: Attr, target of a symlink, flags (CBOR)
//	'e' dir name           directory entry: inode u64, S_IFMT bits u32
//	'x' ino offset         Extent (CBOR); never a hole
//	'a' ino name           value of an extended attribute
//	's' session            open session (CBOR)
//	'd' session seq        Results of a command, until acknowledged (CBOR)
//	'o' ino session        keeper of an orphan
//	'p' session ino        the same, found from the session
//	'l' ino                []Lock, sorted (CBOR)
//	'm' session ino        this session holds locks on this inode
//
// The root directory exists in an empty space: it is written when it first
// changes.
//
// # Invariants
//
//   - Apply depends on the state, the index and the command alone: no clock, no
//     randomness, no order of a map. Equal logs give equal keys and values.
//   - A refused operation changes nothing, a refused command neither.
//   - The extents of a file do not overlap, end at or before its size, and
//     Attr.Alloc is the sum of their lengths; Stat's bytes are the sum of Alloc.
//   - Attr.Size of a directory is the number of its entries, Attr.Nlink is 2
//     plus its subdirectories, Attr.Parent the one directory that names it.
//   - An inode has a name or a keeper.
//   - Each operation that changes an inode adds one to its Version and moves its
//     Ctime forward. One that changes its data sets Mtime to that Ctime, so
//     Mtime moves forward too, unless a program had set it into the future.
//
// # Locks
//
// A Machine has no mutex: the group calls Apply from one goroutine. A View is as
// safe as its reader.
//
// # Failure
//
// A malformed command is refused by its Results. A state that cannot be read or
// decoded makes Apply panic with an error: a replica that cannot tell its state
// must stop, going on would make it differ from the others. Views return the
// same as errors of class Corrupt or IO.
package volume
