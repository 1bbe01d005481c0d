package vice

import (
	"time"

	"github.com/unum-os/unum/internal/ids"
	"github.com/unum-os/unum/internal/lease"
	"github.com/unum-os/unum/internal/volume"
)

// Term is how long a session lasts after its last renewal was received, on the
// leader's clock, and is the same on all nodes. A client counts ClientTerm from
// when it sent the renewal, on its own, the same on all nodes: it is a tenth below
// Term, for clocks that run at different speeds (P5 assumes drift below 10 %).
const (
	Term       = 5 * time.Second
	ClientTerm = 4500 * time.Millisecond
	RenewEvery = time.Second // between two renewals of a session
)

// Methods of the leader, called by clients.
const (
	MethodOpen    = "vice.open"    // OpenRequest -> OpenReply
	MethodRenew   = "vice.renew"   // RenewRequest -> RenewReply
	MethodAcquire = "vice.acquire" // AcquireRequest -> AcquireReply
	MethodLookup  = "vice.lookup"  // LookupRequest -> LookupReply
	MethodReadDir = "vice.readdir" // ReadDirRequest -> ReadDirReply
	MethodExtents = "vice.extents" // ExtentsRequest -> ExtentsReply
	MethodXattrs  = "vice.xattrs"  // XattrsRequest -> XattrsReply
	MethodApply   = "vice.apply"   // ApplyRequest -> ApplyReply
	MethodRelease = "vice.release" // ReleaseRequest -> Empty
	MethodClosed  = "vice.closed"  // ClosedRequest -> Empty
	MethodLock    = "vice.lock"    // LockRequest -> LockReply
	MethodStat    = "vice.stat"    // StatRequest -> StatReply
	MethodWhere   = "vice.where"   // Caller -> WhereReply; any replica answers
)

// Methods of a client, called by the leader (the callbacks).
const (
	MethodRecall   = "venus.recall"   // RecallRequest -> RecallReply
	MethodTakeover = "venus.takeover" // TakeoverRequest -> TakeoverReply
)

// Mode is a lease's strength. A stronger one is greater.
type Mode = lease.Mode

// The modes.
const (
	None  Mode = 0
	Read       = lease.Read
	Write      = lease.Write
)

// Grant is a lease given. Mode None: no lease; what the reply says was true at
// some moment during the call and may be used once, not kept.
type Grant struct {
	Ino  ids.Inode `cbor:"1,keyasint"`
	Mode Mode      `cbor:"2,keyasint,omitempty"`
	Seq  uint64    `cbor:"3,keyasint,omitempty"` // grows from grant to grant within a term
}

// Caller is in every request of a client: which group, under which session, and
// the leader's term in which the client knows itself (from OpenReply or a
// takeover). A leader of another term refuses: a client that has dropped its
// leases for a new leader can get none from the old.
type Caller struct {
	Group   ids.Group   `cbor:"1,keyasint"`
	Session ids.Session `cbor:"2,keyasint,omitempty"`
	Term    uint64      `cbor:"16,keyasint,omitempty"`
}

// OpenRequest asks for a session. Nonce makes a repeated request the same one.
type OpenRequest struct {
	Caller
	Nonce uint64 `cbor:"3,keyasint"`
}

// OpenReply gives the session; it lasts ClientTerm from when the request left.
type OpenReply struct {
	Session ids.Session `cbor:"1,keyasint"`
	Term    uint64      `cbor:"2,keyasint"` // the leader's raft term
}

// RenewRequest prolongs a session.
type RenewRequest struct {
	Caller
}

// RenewReply confirms it. An error of class Stale says that the session is over.
type RenewReply struct {
	Term uint64 `cbor:"1,keyasint"`
}

// AcquireRequest asks for a lease on an inode and its attributes. Open says that
// the client opens the file: if no lease is given now, the leader remembers it as
// an opener.
type AcquireRequest struct {
	Caller
	Ino  ids.Inode `cbor:"3,keyasint"`
	Mode Mode      `cbor:"4,keyasint"`
	Open bool      `cbor:"5,keyasint,omitempty"`
}

// AcquireReply gives it. Noted: the leader remembers the client as an opener.
type AcquireReply struct {
	Grant Grant       `cbor:"1,keyasint"`
	Attr  volume.Attr `cbor:"2,keyasint"`
	Noted bool        `cbor:"3,keyasint,omitempty"`
}

// LookupRequest resolves one name.
type LookupRequest struct {
	Caller
	Parent ids.Inode `cbor:"3,keyasint"`
	Name   string    `cbor:"4,keyasint"`
}

// LookupReply: Ino zero means that there is no such name. Dir is the grant on
// the parent, Child on what was found.
type LookupReply struct {
	Ino     ids.Inode   `cbor:"1,keyasint,omitempty"`
	Attr    volume.Attr `cbor:"2,keyasint"`
	DirAttr volume.Attr `cbor:"3,keyasint"`
	Dir     Grant       `cbor:"4,keyasint"`
	Child   Grant       `cbor:"5,keyasint"`
}

// ReadDirRequest asks for entries after a name, in order of names.
type ReadDirRequest struct {
	Caller
	Dir   ids.Inode `cbor:"3,keyasint"`
	After string    `cbor:"4,keyasint,omitempty"`
	Limit int       `cbor:"5,keyasint,omitempty"`
}

// ReadDirReply gives them. The directory's version tells whether pages of one
// listing belong together.
type ReadDirReply struct {
	Entries []volume.Dirent `cbor:"1,keyasint,omitempty"`
	More    bool            `cbor:"2,keyasint,omitempty"`
	Attr    volume.Attr     `cbor:"3,keyasint"`
	Dir     Grant           `cbor:"4,keyasint"`
}

// ExtentsRequest asks for a file's extents from an offset on.
type ExtentsRequest struct {
	Caller
	Ino  ids.Inode `cbor:"3,keyasint"`
	From uint64    `cbor:"4,keyasint,omitempty"`
}

// ExtentsReply gives them, or a symbolic link's target.
type ExtentsReply struct {
	Extents []volume.Extent `cbor:"1,keyasint,omitempty"`
	More    bool            `cbor:"2,keyasint,omitempty"`
	Target  string          `cbor:"3,keyasint,omitempty"`
}

// XattrsRequest asks for all extended attributes of an inode.
type XattrsRequest struct {
	Caller
	Ino ids.Inode `cbor:"3,keyasint"`
}

// XattrsReply gives them, sorted by name.
type XattrsReply struct {
	Names  []string `cbor:"1,keyasint,omitempty"`
	Values [][]byte `cbor:"2,keyasint,omitempty"`
}

// Held is a lease as its holder gives it up. Open: the holder has the file open.
type Held struct {
	Ino  ids.Inode `cbor:"1,keyasint"`
	Seq  uint64    `cbor:"2,keyasint"`
	Open bool      `cbor:"3,keyasint,omitempty"`
}

// ApplyRequest asks for operations to be done, in order, once by (session, Seq).
// Relinquish lists leases of the client's own that it has stopped using.
type ApplyRequest struct {
	Caller
	Seq        uint64      `cbor:"3,keyasint"`
	Acked      uint64      `cbor:"4,keyasint"`
	Ops        []volume.Op `cbor:"5,keyasint"`
	Relinquish []Held      `cbor:"6,keyasint,omitempty"`
	Want       []ids.Inode `cbor:"7,keyasint,omitempty"` // directories on which a read lease is wanted afterwards
	Open       bool        `cbor:"8,keyasint,omitempty"` // what is created is kept for the client until Acked passes Seq: it opens it
}

// ApplyReply gives the results, and leases: on what was created (write), and on
// what was wanted, where nobody is in the way.
type ApplyReply struct {
	Results []volume.Result `cbor:"1,keyasint"`
	Grants  []Grant         `cbor:"2,keyasint,omitempty"`
	Attrs   []volume.Attr   `cbor:"3,keyasint,omitempty"` // of what is granted, as it is under the grant
}

// ReleaseRequest gives idle leases back.
type ReleaseRequest struct {
	Caller
	Leases []Held `cbor:"3,keyasint"`
}

// ClosedRequest says that the client has closed files for the last time that the
// leader remembered it had open.
type ClosedRequest struct {
	Caller
	Inos  []ids.Inode `cbor:"3,keyasint"`
	Acked uint64      `cbor:"4,keyasint,omitempty"` // as in ApplyRequest
}

// LockRequest takes, changes or releases a lock (or, with Test, asks who is in
// the way). Wait: answer when it is held, or when the caller's deadline is over.
type LockRequest struct {
	Caller
	Ino  ids.Inode   `cbor:"3,keyasint"`
	Lock volume.Lock `cbor:"4,keyasint"`
	Wait bool        `cbor:"5,keyasint,omitempty"`
	Test bool        `cbor:"6,keyasint,omitempty"`
}

// LockReply: nil Conflict means held (or, for Test, free).
type LockReply struct {
	Conflict *volume.Lock `cbor:"1,keyasint,omitempty"`
}

// StatRequest asks for the volume's totals.
type StatRequest struct {
	Caller
}

// StatReply gives them.
type StatReply struct {
	Inodes uint64 `cbor:"1,keyasint"`
	Bytes  uint64 `cbor:"2,keyasint"`
}

// WhereReply says who leads the group, as far as the asked node knows (0: unknown).
type WhereReply struct {
	Leader ids.Node `cbor:"1,keyasint,omitempty"`
}

// RecallRequest asks a client to give up a lease.
type RecallRequest struct {
	Caller
	Ino ids.Inode `cbor:"4,keyasint"`
	Seq uint64    `cbor:"5,keyasint"`
}

// RecallReply says that it is given up: the kernel's caches are empty, changes
// are committed.
type RecallReply struct {
	Open bool `cbor:"1,keyasint,omitempty"`
}

// TakeoverRequest comes from a new leader: it knows the session and none of its
// leases, and gives nothing to anybody before the client has named them all.
type TakeoverRequest struct {
	Caller
}

// Reclaimed is a lease that a client holds when a new leader takes over.
type Reclaimed struct {
	Ino  ids.Inode `cbor:"1,keyasint"`
	Mode Mode      `cbor:"2,keyasint"`
}

// TakeoverReply lists the leases that the client holds and goes on holding, and
// the inodes it has open. Unknown: the client has no such session.
type TakeoverReply struct {
	Open    []ids.Inode `cbor:"1,keyasint,omitempty"`
	Unknown bool        `cbor:"2,keyasint,omitempty"`
	Held    []Reclaimed `cbor:"3,keyasint,omitempty"`
}

// Empty is a reply with nothing to say.
type Empty struct{}
