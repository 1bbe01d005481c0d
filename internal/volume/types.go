package volume

import (
	"github.com/unum-os/unum/internal/ids"
)

// Limits of names and sizes.
const (
	MaxName    = 255       // bytes of one name
	MaxTarget  = 4095      // bytes of a symbolic link's target
	MaxFile    = 1 << 50   // bytes of one file
	MaxXattr   = 64 << 10  // bytes of one extended attribute's value
	MaxLink    = 65000     // hard links of one inode
	MaxBlock   = 1 << 20   // bytes of one block
	MaxInline  = 32 << 10  // bytes an extent may carry itself, inside the log
	MaxOps     = 4096      // operations in one batch
	MaxBatch   = 900 << 10 // bytes of one encoded command
	MaxListing = 1024      // entries in one page of a listing
)

// NoInode is no inode's number. An operation that presumes it for a name finds
// nothing there, or is refused with class NameTooOld.
const NoInode ids.Inode = 1<<64 - 1

// Attr is what stat shows, and the version by which caches and preconditions
// compare. Times are nanoseconds since 1970; they are data, never compared with
// a clock. Mode holds the S_IFMT bits too.
type Attr struct {
	Ino     ids.Inode `cbor:"1,keyasint"`
	Mode    uint32    `cbor:"2,keyasint"`
	Nlink   uint32    `cbor:"3,keyasint"`
	Uid     uint32    `cbor:"4,keyasint"`
	Gid     uint32    `cbor:"5,keyasint"`
	Rdev    uint32    `cbor:"6,keyasint,omitempty"`
	Size    uint64    `cbor:"7,keyasint"` // bytes; of a symlink: length of its target; of a directory: number of entries
	Alloc   uint64    `cbor:"8,keyasint"` // bytes covered by extents (st_blocks*512)
	Atime   int64     `cbor:"9,keyasint"`
	Mtime   int64     `cbor:"10,keyasint"` // strictly greater after each change of data
	Ctime   int64     `cbor:"11,keyasint"` // strictly greater after each change
	Btime   int64     `cbor:"12,keyasint"`
	Version uint64    `cbor:"13,keyasint"`           // one more at every change of anything of this inode
	Parent  ids.Inode `cbor:"14,keyasint,omitempty"` // of a directory: the directory it is in
}

// BlockName names a block for ever: the BLAKE3 hash of its bytes, keyed with
// its volume's key.
type BlockName [32]byte

// Extent says where Len bytes from Off of a file are. Exactly one of three:
// Data holds them; Block names the block that holds them from byte From on; or
// neither, which reads as zeros (a hole). Extents of a file never overlap.
// This is the format in the log and in the state; it is final.
type Extent struct {
	Off   uint64     `cbor:"1,keyasint"`
	Len   uint32     `cbor:"2,keyasint"`
	Data  []byte     `cbor:"3,keyasint,omitempty"`
	Block *BlockName `cbor:"4,keyasint,omitempty"`
	From  uint32     `cbor:"5,keyasint,omitempty"`
}

// Hole reports whether e reads as zeros.
func (e *Extent) Hole() bool { return e.Data == nil && e.Block == nil }

// Dirent is one entry of a directory.
type Dirent struct {
	Name string    `cbor:"1,keyasint"`
	Ino  ids.Inode `cbor:"2,keyasint"`
	Mode uint32    `cbor:"3,keyasint"` // S_IFMT bits only
}

// OpKind says what an operation does.
type OpKind uint8

// The operations of the log. The numbers are on disk: append only.
const (
	OpCreate      OpKind = 1 // file, directory, symlink, fifo, socket, device, O_TMPFILE
	OpUnlink      OpKind = 2 // a name that is not a directory
	OpRmdir       OpKind = 3
	OpRename      OpKind = 4
	OpLink        OpKind = 5
	OpSetAttr     OpKind = 6
	OpWrite       OpKind = 7 // put extents, move the size up, set mtime and ctime
	OpSetXattr    OpKind = 8
	OpRemoveXattr OpKind = 9
	OpDrop        OpKind = 10 // this session closed an unlinked inode for the last time
	OpPunch       OpKind = 11 // [Off, Off+Len) reads as zeros; the size stays
	OpSetLock     OpKind = 12 // take, change, or release a lock
)

// SetAttr's mask.
const (
	SetMode = 1 << iota
	SetUid
	SetGid
	SetSize
	SetAtime
	SetMtime
	SetCtime
	KillPriv // clear set-user-id, and set-group-id where group may execute
)

// Rename's flags, as in renameat2(2).
const (
	RenameNoReplace = 1
	RenameExchange  = 2
)

// Create's flags.
const (
	CreateTmpfile = 1 // no name: nlink 0, kept for the creating session (O_TMPFILE)
)

// Op is one record of the modification log: an operation with what it presumes.
// Fields not used by its kind are zero.
type Op struct {
	Kind   OpKind    `cbor:"1,keyasint"`
	Ino    ids.Inode `cbor:"2,keyasint,omitempty"` // the file acted on; for names: the child presumed (0: not presumed)
	Parent ids.Inode `cbor:"3,keyasint,omitempty"` // the directory of Name
	Name   string    `cbor:"4,keyasint,omitempty"`

	// Rename: from (Parent, Name, Ino) to these. ToIno is the child presumed at
	// the destination (0: none there).
	ToParent ids.Inode `cbor:"5,keyasint,omitempty"`
	ToName   string    `cbor:"6,keyasint,omitempty"`
	ToIno    ids.Inode `cbor:"7,keyasint,omitempty"`
	Flags    uint32    `cbor:"8,keyasint,omitempty"`

	// Create, SetAttr
	Mask   uint32 `cbor:"9,keyasint,omitempty"`
	Mode   uint32 `cbor:"10,keyasint,omitempty"`
	Uid    uint32 `cbor:"11,keyasint,omitempty"`
	Gid    uint32 `cbor:"12,keyasint,omitempty"`
	Rdev   uint32 `cbor:"13,keyasint,omitempty"`
	Target string `cbor:"14,keyasint,omitempty"` // symlink
	Size   uint64 `cbor:"15,keyasint,omitempty"` // SetAttr: new size. Write: size is at least this afterwards
	Atime  int64  `cbor:"16,keyasint,omitempty"`
	Mtime  int64  `cbor:"17,keyasint,omitempty"`

	// Write, Punch
	Extents []Extent `cbor:"18,keyasint,omitempty"`
	Off     uint64   `cbor:"19,keyasint,omitempty"`
	Len     uint64   `cbor:"20,keyasint,omitempty"`

	// Xattr: Name is the attribute's name; Flags 1 create only, 2 replace only.
	Value []byte `cbor:"21,keyasint,omitempty"`

	// Time of the operation at its client; what it changes is stamped so.
	Time int64 `cbor:"22,keyasint,omitempty"`

	// Keep lists the sessions that have Ino (Unlink, Rmdir: the child; Rename:
	// the replaced child, ToIno) open: they keep it when its last name goes.
	Keep []ids.Session `cbor:"23,keyasint,omitempty"`

	// SetLock
	Lock *Lock `cbor:"24,keyasint,omitempty"`
}

// LockKind tells the two name spaces of locks apart.
type LockKind uint8

// The kinds.
const (
	LockPosix LockKind = 1 // fcntl and OFD: ranges
	LockFlock LockKind = 2 // flock: the whole file
)

// Lock is a range of a file held, or asked for, by an owner inside a session.
type Lock struct {
	Kind    LockKind    `cbor:"1,keyasint"`
	Session ids.Session `cbor:"2,keyasint,omitempty"` // filled in by apply
	Owner   uint64      `cbor:"3,keyasint"`           // the kernel's lock owner; unique within the session
	Start   uint64      `cbor:"4,keyasint"`
	End     uint64      `cbor:"5,keyasint"` // inclusive; 1<<63-1 to the end of the file
	Type    uint32      `cbor:"6,keyasint"` // F_RDLCK, F_WRLCK, F_UNLCK
	Pid     uint32      `cbor:"7,keyasint,omitempty"`
}

// Result is what one operation did. Err zero means it was done.
type Result struct {
	Err   uint8       `cbor:"1,keyasint,omitempty"` // an errs.Class
	Why   string      `cbor:"2,keyasint,omitempty"`
	Ino   ids.Inode   `cbor:"3,keyasint,omitempty"` // created, linked, removed (the child), renamed inode
	Attrs []Attr      `cbor:"4,keyasint,omitempty"` // all inodes touched that still exist, the one acted on first
	Gone  []ids.Inode `cbor:"5,keyasint,omitempty"` // inodes that ceased to exist
	Lock  *Lock       `cbor:"6,keyasint,omitempty"` // SetLock refused: the lock in the way
}

// Command is one entry of a volume's log. Exactly one of Open, End, Ops.
type Command struct {
	Open *OpenSession `cbor:"1,keyasint,omitempty"`
	End  ids.Session  `cbor:"2,keyasint,omitempty"`
	// Ops are done in order, all of them: a refused one changes nothing and does
	// not stop those after it. They are done exactly once by (Session, Seq); a
	// repeated command gets the first one's results. Results of sequence numbers
	// below Acked are forgotten. Sequence number 0 is for operations that may be
	// done twice (locks, OpDrop): they are not remembered.
	Session ids.Session `cbor:"3,keyasint,omitempty"`
	Seq     uint64      `cbor:"4,keyasint,omitempty"`
	Acked   uint64      `cbor:"5,keyasint,omitempty"`
	Ops     []Op        `cbor:"6,keyasint,omitempty"`
	Barrier bool        `cbor:"7,keyasint,omitempty"` // changes nothing; a new leader's first entry
}

// OpenSession opens a session for a node; the log index becomes its id. An open
// session of the same node ends first. Nonce makes a repeated open the same one.
type OpenSession struct {
	Node  ids.Node `cbor:"1,keyasint"`
	Nonce uint64   `cbor:"2,keyasint"`
}

// SessionInfo is one open session.
type SessionInfo struct {
	ID   ids.Session `cbor:"1,keyasint"`
	Node ids.Node    `cbor:"2,keyasint"`
}

// Results answers a Command.
type Results struct {
	Session ids.Session `cbor:"1,keyasint,omitempty"` // Open
	Err     uint8       `cbor:"2,keyasint,omitempty"` // the command as a whole was refused (Stale: its session has ended)
	Why     string      `cbor:"3,keyasint,omitempty"`
	Ops     []Result    `cbor:"4,keyasint,omitempty"`
	Index   uint64      `cbor:"5,keyasint,omitempty"` // log index at which it was applied
}
