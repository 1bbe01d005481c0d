package volume

import (
	"fmt"
	"sort"

	"github.com/cockroachdb/pebble/v2"

	"github.com/unum-os/unum/internal/errs"
	"github.com/unum-os/unum/internal/ids"
	"github.com/unum-os/unum/internal/wire"
)

// Window is how far a command's Seq may run ahead of what is acknowledged: it
// bounds the results kept for a session.
const Window = 1 << 16

// maxTime bounds an operation's time, so that adding one to it cannot overflow.
const maxTime = 1 << 62

// Space names the keys of a group.
type Space interface {
	Key(parts ...[]byte) []byte
}

// Machine is the state machine of one volume's metadata. Its state is in the
// space that Apply is given; the value itself holds only the hooks, which are
// set before the group runs.
type Machine struct {
	// OnBlocks is told the blocks that a command has newly referenced, from
	// Apply, before the command's effects are committed. It must not block; the
	// slice is its own. Nil: nobody is told.
	OnBlocks func(names []BlockName)
	// OnApplied is called when everything up to index is visible to readers. It
	// must not block. Nil: nobody is told.
	OnApplied func(index uint64)
}

// Applied tells that everything up to index is visible to readers.
func (m *Machine) Applied(index uint64) {
	if m.OnApplied != nil {
		m.OnApplied(index)
	}
}

// ApplyTo does one command at index; b is an indexed batch, all reads and
// writes go through it. It always returns a *Results.
func (m *Machine) ApplyTo(b *pebble.Batch, space Space, index uint64, cmd []byte) *Results {
	t := &txn{store: store{r: b, w: b, prefix: space.Key()}, index: index, nodes: map[ids.Inode]*node{}}
	res := t.command(cmd)
	t.flush()
	if m.OnBlocks != nil && len(t.blocks) > 0 {
		m.OnBlocks(t.blocks)
	}
	return res
}

// DecodeCommand decodes and checks the form of a command: what its author can
// have got wrong without knowing the state. Errors have class Corrupt, TooLarge
// or Invalid.
func DecodeCommand(b []byte) (*Command, error) {
	if len(b) > MaxBatch {
		return nil, errs.E(errs.TooLarge, "command", "", "%d bytes, limit %d", len(b), MaxBatch)
	}
	var c Command
	if err := wire.Unmarshal(b, &c); err != nil {
		return nil, err
	}
	if len(c.Ops) > MaxOps {
		return nil, errs.E(errs.TooLarge, "command", "", "%d operations, limit %d", len(c.Ops), MaxOps)
	}
	kinds := 0
	for _, is := range []bool{c.Open != nil, c.End != 0, len(c.Ops) > 0, c.Barrier} {
		if is {
			kinds++
		}
	}
	switch {
	case kinds != 1:
		return nil, errs.E(errs.Invalid, "command", "", "%d of open, end, operations, barrier; want one", kinds)
	case c.Open != nil && c.Open.Node == 0:
		return nil, errs.E(errs.Invalid, "command", "", "session of no node")
	case len(c.Ops) > 0 && c.Acked > c.Seq:
		return nil, errs.E(errs.Invalid, "command", "", "sequence number %d, acknowledged %d", c.Seq, c.Acked)
	}
	return &c, nil
}

func refused(class errs.Class, format string, args ...any) *Results {
	return &Results{Err: uint8(class), Why: fmt.Sprintf(format, args...)}
}

func (t *txn) command(cmd []byte) *Results {
	c, err := DecodeCommand(cmd)
	var res *Results
	switch {
	case err != nil:
		res = refused(errs.ClassOf(err), "%v", err)
	case c.Open != nil:
		res = t.open(c.Open)
	case c.End != 0:
		res = t.end(c.End)
	case c.Barrier:
		res = &Results{}
	default:
		return t.batch(c)
	}
	res.Index = t.index
	return res
}

// batch does the operations of c, exactly once.
func (t *txn) batch(c *Command) *Results {
	s, ok := t.store.session(c.Session)
	if !ok {
		res := refused(errs.Stale, "session %d is over", c.Session)
		res.Index = t.index
		return res
	}
	var res Results
	if c.Seq == 0 { // not remembered: its operations may be done twice
		return t.run(c, &res)
	}
	key := t.key(tagDone, uint64(c.Session), c.Seq)
	if c.Seq >= s.Acked && t.load(key, &res) {
		return &res
	}
	acked := max(s.Acked, c.Acked)
	if c.Seq < acked || c.Seq-acked >= Window {
		var r *Results
		if c.Seq < acked {
			r = refused(errs.Stale, "command %d was answered and acknowledged", c.Seq)
		} else {
			r = refused(errs.Busy, "command %d is more than %d ahead of what is acknowledged, %d", c.Seq, Window, acked)
		}
		r.Index = t.index
		return r
	}
	if acked > s.Acked {
		t.clear(t.key(tagDone, uint64(c.Session), s.Acked), t.key(tagDone, uint64(c.Session), acked))
		s.Acked = acked
		t.save(t.key(tagSession, uint64(c.Session)), s)
	}
	t.save(key, t.run(c, &res))
	return &res
}

// run does the operations of c and puts their results into res.
func (t *txn) run(c *Command, res *Results) *Results {
	t.session = c.Session
	res.Index = t.index
	res.Ops = make([]Result, len(c.Ops))
	for i := range c.Ops {
		res.Ops[i] = t.do(&c.Ops[i])
	}
	return res
}

// open opens a session. Results.Ops holds one Result with the inodes that went
// with the node's older session, if any did.
func (t *txn) open(o *OpenSession) *Results {
	var old ids.Session
	var again bool
	for _, s := range t.sessions() {
		if s.Node != o.Node {
			continue
		}
		v, _ := t.store.session(s.ID)
		old, again = s.ID, v.Nonce == o.Nonce
	}
	if again {
		return &Results{Session: old}
	}
	res := &Results{}
	if old != 0 {
		res = t.end(old)
	}
	res.Session = ids.Session(t.index)
	t.save(t.key(tagSession, t.index), session{Node: o.Node, Nonce: o.Nonce})
	return res
}

// end ends a session with all it holds; ending one that is over is no error.
// Results.Ops holds one Result with the inodes that went with it, if any did.
func (t *txn) end(id ids.Session) *Results {
	res := &Results{}
	if _, ok := t.store.session(id); !ok {
		return res
	}
	t.begin(0)
	for _, ino := range t.inodesOf(tagKept, id) {
		t.dropKeeper(ino, id)
	}
	for _, ino := range t.inodesOf(tagLocked, id) {
		t.dropLocks(ino, id)
	}
	lo := t.key(tagDone, uint64(id))
	t.clear(lo, after(lo))
	t.delete(t.key(tagSession, uint64(id)))
	if len(t.gone) > 0 {
		res.Ops = []Result{{Gone: t.gone}}
	}
	return res
}

func (t *txn) inodesOf(tag byte, id ids.Session) []ids.Inode {
	var inos []ids.Inode
	lo := t.key(tag, uint64(id))
	t.scan(lo, after(lo), func(k, _ []byte) bool {
		inos = append(inos, ids.Inode(number(k, 1)))
		return true
	})
	return inos
}

func (s *store) sessions() []SessionInfo {
	var out []SessionInfo
	lo := s.key(tagSession)
	s.scan(lo, after(lo), func(k, v []byte) bool {
		var rec session
		s.decode(k, v, &rec)
		out = append(out, SessionInfo{ID: ids.Session(number(k, 0)), Node: rec.Node})
		return true
	})
	return out
}

// refusal is why an operation is not done; zero means it is.
type refusal struct {
	class errs.Class
	why   string
	lock  *Lock
}

func no(class errs.Class, format string, args ...any) refusal {
	return refusal{class: class, why: fmt.Sprintf(format, args...)}
}

func (r refusal) refused() bool { return r.class != 0 }

// done means the operation was carried out.
var done refusal

// do carries one operation out. Each case checks everything first and changes
// the state only when nothing can refuse it any more.
func (t *txn) do(op *Op) Result {
	t.begin(op.Time)
	var ino ids.Inode
	r := no(errs.Invalid, "operation %d is not known", op.Kind)
	if op.Time > maxTime || op.Time < -maxTime {
		r = no(errs.Invalid, "time %d", op.Time)
	} else {
		switch op.Kind {
		case OpCreate:
			ino, r = t.create(op)
		case OpUnlink:
			ino, r = t.unlink(op, false)
		case OpRmdir:
			ino, r = t.unlink(op, true)
		case OpRename:
			ino, r = t.rename(op)
		case OpLink:
			ino, r = t.link(op)
		case OpSetAttr:
			ino, r = op.Ino, t.setAttr(op)
		case OpWrite:
			ino, r = op.Ino, t.write(op)
		case OpSetXattr:
			ino, r = op.Ino, t.setXattr(op)
		case OpRemoveXattr:
			ino, r = op.Ino, t.removeXattr(op)
		case OpDrop:
			ino, r = op.Ino, t.drop(op)
		case OpPunch:
			ino, r = op.Ino, t.punch(op)
		case OpSetLock:
			ino, r = op.Ino, t.setLock(op)
		}
	}
	if r.refused() {
		return Result{Err: uint8(r.class), Why: r.why, Lock: r.lock}
	}
	return Result{Ino: ino, Attrs: t.attrs(), Gone: t.gone}
}

// node is an inode during a command.
type node struct {
	inode
	op    int  // the operation that last touched it
	dirty bool // differs from the state
	gone  bool // does not exist
}

func (n *node) isDir() bool { return n.Attr.Mode&sIFMT == sIFDIR }
func (n *node) isReg() bool { return n.Attr.Mode&sIFMT == sIFREG }

// txn is the work on one command: inodes and counters are held here and written
// at its end, the rest goes to the batch at once.
type txn struct {
	store
	index   uint64
	session ids.Session
	nodes   map[ids.Inode]*node // never ranged over
	order   []*node             // nodes in the order in which they became dirty
	count   *counters
	blocks  []BlockName

	// of the operation under way
	op      int
	time    int64
	touched []*node
	gone    []ids.Inode
}

func (t *txn) begin(time int64) {
	t.op++
	t.time, t.touched, t.gone = time, nil, nil
}

// node returns an inode that exists, or nil.
func (t *txn) node(ino ids.Inode) *node {
	n, ok := t.nodes[ino]
	if !ok {
		rec, found := t.store.inode(ino)
		n = &node{inode: rec, gone: !found}
		t.nodes[ino] = n
	}
	if n.gone {
		return nil
	}
	return n
}

// dir returns a directory in which names may be changed.
func (t *txn) dir(ino ids.Inode) (*node, refusal) {
	n := t.node(ino)
	switch {
	case n == nil || n.isDir() && n.Attr.Nlink == 0:
		return nil, no(errs.NotFound, "directory %d is gone", ino)
	case !n.isDir():
		return nil, no(errs.NotDir, "inode %d is not a directory", ino)
	}
	return n, done
}

// file returns a regular file.
func (t *txn) file(ino ids.Inode) (*node, refusal) {
	n := t.node(ino)
	switch {
	case n == nil:
		return nil, no(errs.NotFound, "inode %d is gone", ino)
	case n.isDir():
		return nil, no(errs.IsDir, "inode %d is a directory", ino)
	case !n.isReg():
		return nil, no(errs.Invalid, "inode %d is not a regular file", ino)
	}
	return n, done
}

// show puts n among the attributes of the result.
func (t *txn) show(n *node) bool {
	if n.op == t.op {
		return false
	}
	n.op = t.op
	t.touched = append(t.touched, n)
	return true
}

// change marks n as changed by this operation.
func (t *txn) change(n *node) {
	if !t.show(n) {
		return
	}
	n.Attr.Version++
	n.Attr.Ctime = max(n.Attr.Ctime+1, t.time)
	t.soil(n)
}

// changeData is change, and its data or entries changed.
func (t *txn) changeData(n *node) {
	t.change(n)
	n.Attr.Mtime = n.Attr.Ctime
}

func (t *txn) soil(n *node) {
	if !n.dirty {
		n.dirty = true
		t.order = append(t.order, n)
	}
}

// attrs returns what the operation touched and still exists.
func (t *txn) attrs() []Attr {
	out := make([]Attr, 0, len(t.touched))
	for _, n := range t.touched {
		if !n.gone {
			out = append(out, n.Attr)
		}
	}
	return out
}

// counts returns the counters for change.
func (t *txn) counts() *counters {
	if t.count == nil {
		c := t.store.counters()
		t.count = &c
	}
	return t.count
}

// alloc moves the bytes that n's extents cover.
func (t *txn) alloc(n *node, by int64) {
	if by != 0 {
		n.Attr.Alloc = uint64(int64(n.Attr.Alloc) + by)
		c := t.counts()
		c.Bytes = uint64(int64(c.Bytes) + by)
	}
}

// flush writes what the command changed.
func (t *txn) flush() {
	for _, n := range t.order {
		if key := t.key(tagInode, uint64(n.Attr.Ino)); n.gone {
			t.delete(key)
		} else {
			t.save(key, n.inode)
		}
	}
	if t.count != nil {
		t.save(t.key(tagCounters), *t.count)
	}
}

// remove makes an inode without names and keepers cease to exist.
func (t *txn) remove(n *node) {
	ino := uint64(n.Attr.Ino)
	if n.Attr.Alloc > 0 {
		lo := t.key(tagExtent, ino)
		t.clear(lo, after(lo))
		t.alloc(n, -int64(n.Attr.Alloc))
	}
	if n.Xattrs > 0 {
		lo := t.key(tagXattr, ino)
		t.clear(lo, after(lo))
	}
	t.saveLocks(n.Attr.Ino, nil)
	t.counts().Inodes--
	n.gone = true
	t.soil(n)
	t.gone = append(t.gone, n.Attr.Ino)
}

// orphan deals with n, whose last name went: the sessions of keep that are open
// keep it; without any it ceases to exist.
func (t *txn) orphan(n *node, keep []ids.Session) {
	keep = append([]ids.Session(nil), keep...)
	sort.Slice(keep, func(i, j int) bool { return keep[i] < keep[j] })
	kept := false
	for i, id := range keep {
		if i > 0 && keep[i-1] == id {
			continue
		}
		if _, open := t.store.session(id); open {
			t.set(t.key(tagKeeper, uint64(n.Attr.Ino), uint64(id)), nil)
			t.set(t.key(tagKept, uint64(id), uint64(n.Attr.Ino)), nil)
			kept = true
		}
	}
	if !kept {
		t.remove(n)
	}
}

func (t *txn) keepers(ino ids.Inode) []ids.Session {
	var out []ids.Session
	lo := t.key(tagKeeper, uint64(ino))
	t.scan(lo, after(lo), func(k, _ []byte) bool {
		out = append(out, ids.Session(number(k, 1)))
		return true
	})
	return out
}

// dropKeeper makes session id keep ino no longer.
func (t *txn) dropKeeper(ino ids.Inode, id ids.Session) {
	t.delete(t.key(tagKeeper, uint64(ino), uint64(id)))
	t.delete(t.key(tagKept, uint64(id), uint64(ino)))
	if n := t.node(ino); n != nil && n.Attr.Nlink == 0 && len(t.keepers(ino)) == 0 {
		t.remove(n)
	}
}

// drop is OpDrop: it succeeds also when the session keeps nothing there.
func (t *txn) drop(op *Op) refusal {
	if _, kept := t.get(t.key(tagKeeper, uint64(op.Ino), uint64(t.session))); kept {
		t.dropKeeper(op.Ino, t.session)
	}
	return done
}
