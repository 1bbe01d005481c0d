// Package segment keeps the blocks of one storing node on its disk, in a log of
// segment files that are only appended to.
//
// Words. A block is a name of 32 bytes and at most MaxData bytes; the name
// stands for the bytes, so a block never changes and a second put of a name has
// nothing to do. A record is a block on disk: header, payload, padding. A
// segment is a file of records. It is active while it is appended to and sealed
// from then on. An index file lists the records of one segment and is only a
// short cut: without it the segment is read.
//
// On disk (little endian, all checksums CRC-32C):
//
//	0000000000000001.seg   header 4096 bytes (two copies, at 0 and 2048), then records on multiples of 64
//	0000000000000001.idx   name, offset, length, checksum of each record up to a covered length
//	lock                   held while the store is open
//
// A record's header names the offset it lies at, through a checksum salted with
// store, segment and offset, and tells how much of the segment was durable when
// it was written. A segment's header tells the final length of the one before.
//
// Invariants:
//   - The index in memory names durable records only; Put returns when its
//     record is synced, whoever wrote it.
//   - A segment is created when all of the one before is durable.
//   - Nothing below the durable length of a segment is ever written again.
//   - Get returns what was put, or an error.
//
// Puts that come together share one write and one sync: the first becomes the
// leader and commits for all that have queued; when it is done it hands the lead
// to the first of those who came since. There is no goroutine.
//
// Lock order: Store.mu, then files.mu. Neither is held over writes and syncs.
// The segment being appended to belongs to the leader alone.
//
// Failures. After a crash the records that were not acknowledged may be there or
// not: the torn end of the last segment is cut off, a torn piece between
// unacknowledged records is made a pad. Any other damage is kept as it is,
// reported by Damage with class Corrupt, file and offset, and the rest is served.
// A full disk gives class NoSpace and changes nothing. After any other failed
// write or sync the segment is closed at its durable length and the next put
// begins a new one, because what a disk has kept after a failed sync is unknown.
package segment
