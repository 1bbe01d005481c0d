package fusefs

import (
	"context"
	"maps"
	"slices"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/unum-os/unum/internal/clock"
	"github.com/unum-os/unum/internal/errs"
	"github.com/unum-os/unum/internal/ids"
	"github.com/unum-os/unum/internal/volume"
)

// maxMem is the longest file of a memTree.
const maxMem = 64 << 20

// memTree is a Tree in memory.
type memTree struct {
	valid time.Duration // of attributes; 0: none

	// hook, if set, is called without locks before each operation; an error is
	// the operation's. Under mu once the tree is mounted.
	hook func(ctx context.Context, op, name string, ino ids.Inode) error

	mu      sync.Mutex
	changed *sync.Cond // a lock was released
	nodes   map[ids.Inode]*memNode
	next    ids.Inode
	cookie  uint64
	handles map[uint64]ids.Inode
	fh      uint64

	replied map[ids.Inode]int // calls less Replied
	lookups map[ids.Inode]int // lookups less Forget
	writes  []WriteInfo
	direct  bool
}

type memNode struct {
	attr   volume.Attr
	data   []byte
	target string
	kids   map[string]*memKid
	xattrs map[string][]byte
	locks  []volume.Lock
	opens  int
}

type memKid struct {
	ino    ids.Inode
	cookie uint64
}

func newMemTree() *memTree {
	t := &memTree{
		nodes: map[ids.Inode]*memNode{}, next: ids.RootInode, handles: map[uint64]ids.Inode{},
		replied: map[ids.Inode]int{}, lookups: map[ids.Inode]int{},
	}
	t.changed = sync.NewCond(&t.mu)
	n := t.make(Caller{}, syscall.S_IFDIR|0o755)
	n.attr.Nlink, n.attr.Parent = 2, ids.RootInode
	return t
}

func (t *memTree) before(ctx context.Context, op, name string, ino ids.Inode) error {
	t.mu.Lock()
	hook := t.hook
	t.mu.Unlock()
	if hook != nil {
		return hook(ctx, op, name, ino)
	}
	return nil
}

func no(c errs.Class) error { return c.Err() }

func (t *memTree) make(c Caller, mode uint32) *memNode {
	now := time.Now().UnixNano()
	n := &memNode{attr: volume.Attr{Ino: t.next, Mode: mode, Nlink: 1, Uid: c.Uid, Gid: c.Gid, Atime: now, Mtime: now, Ctime: now, Btime: now}}
	if mode&syscall.S_IFMT == syscall.S_IFDIR {
		n.kids = map[string]*memKid{}
	}
	t.nodes[t.next] = n
	t.next++
	return n
}

func (n *memNode) touch(data bool) {
	n.attr.Ctime = max(time.Now().UnixNano(), n.attr.Ctime+1)
	if data {
		n.attr.Mtime = n.attr.Ctime
	}
	if n.kids != nil {
		n.attr.Size = uint64(len(n.kids))
	} else if n.attr.Mode&syscall.S_IFMT == syscall.S_IFREG {
		n.attr.Size = uint64(len(n.data))
		n.attr.Alloc = n.attr.Size
	}
}

func (t *memTree) entry(n *memNode) Entry {
	e := Entry{Attr: n.attr}
	if t.valid > 0 {
		e.Until = clock.Now().Add(t.valid)
	}
	return e
}

func (t *memTree) looked(n *memNode) Entry {
	t.lookups[n.attr.Ino]++
	t.replied[n.attr.Ino]++
	return t.entry(n)
}

func (t *memTree) drop(n *memNode) {
	if n.attr.Nlink == 0 && n.opens == 0 && t.lookups[n.attr.Ino] == 0 {
		delete(t.nodes, n.attr.Ino)
	}
}

func (t *memTree) dir(ino ids.Inode) (*memNode, error) {
	n := t.nodes[ino]
	if n == nil {
		return nil, no(errs.Stale)
	}
	if n.kids == nil {
		return nil, no(errs.NotDir)
	}
	return n, nil
}

func (t *memTree) Lookup(ctx context.Context, _ Caller, parent ids.Inode, name string) (Entry, error) {
	err := t.before(ctx, "lookup", name, parent)
	t.mu.Lock()
	defer t.mu.Unlock()
	d, derr := t.dir(parent)
	if err == nil {
		err = derr
	}
	if err == nil {
		if k := d.kids[name]; k != nil {
			return t.looked(t.nodes[k.ino]), nil
		}
		err = no(errs.NotFound)
	}
	t.replied[0]++
	return Entry{}, err
}

func (t *memTree) Forget(ino ids.Inode, n uint64) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.lookups[ino] -= int(n)
	if n := t.nodes[ino]; n != nil {
		t.drop(n)
	}
}

func (t *memTree) node(ctx context.Context, op string, ino ids.Inode) (*memNode, error) {
	if err := t.before(ctx, op, "", ino); err != nil {
		return nil, err
	}
	t.mu.Lock()
	n := t.nodes[ino]
	t.mu.Unlock()
	if n == nil {
		return nil, no(errs.Stale)
	}
	return n, nil
}

func (t *memTree) began(ino ids.Inode) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.replied[ino]++
}

func (t *memTree) GetAttr(ctx context.Context, ino ids.Inode) (Entry, error) {
	t.began(ino)
	n, err := t.node(ctx, "getattr", ino)
	if err != nil {
		return Entry{}, err
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.entry(n), nil
}

func (t *memTree) SetAttr(ctx context.Context, _ Caller, ino ids.Inode, _ uint64, s SetAttr) (Entry, error) {
	t.began(ino)
	n, err := t.node(ctx, "setattr", ino)
	if err != nil {
		return Entry{}, err
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if s.Mask&volume.SetSize != 0 && s.Size > maxMem {
		return Entry{}, no(errs.TooLarge)
	}
	if s.Mask&volume.SetMode != 0 {
		n.attr.Mode = n.attr.Mode&syscall.S_IFMT | s.Mode
	}
	if s.Mask&volume.KillPriv != 0 {
		n.kill()
	}
	if s.Mask&volume.SetUid != 0 {
		n.attr.Uid = s.Uid
	}
	if s.Mask&volume.SetGid != 0 {
		n.attr.Gid = s.Gid
	}
	if s.Mask&volume.SetSize != 0 {
		n.resize(int(s.Size))
	}
	n.touch(s.Mask&volume.SetSize != 0)
	if s.Mask&volume.SetAtime != 0 {
		n.attr.Atime = s.Atime
	}
	if s.Mask&volume.SetMtime != 0 {
		n.attr.Mtime = s.Mtime
	}
	return t.entry(n), nil
}

func (n *memNode) kill() {
	if n.kids != nil {
		return
	}
	n.attr.Mode &^= syscall.S_ISUID
	if n.attr.Mode&0o10 != 0 {
		n.attr.Mode &^= syscall.S_ISGID
	}
}

func (n *memNode) resize(size int) {
	if size <= len(n.data) {
		n.data = n.data[:size:size]
	} else {
		n.data = append(n.data, make([]byte, size-len(n.data))...)
	}
}

// add makes a name for the node that mk returns; t.mu is held after it.
func (t *memTree) add(ctx context.Context, op string, parent ids.Inode, name string, mk func() *memNode) (Entry, error) {
	err := t.before(ctx, op, name, parent)
	t.mu.Lock()
	defer t.mu.Unlock()
	d, derr := t.dir(parent)
	switch {
	case err != nil:
	case derr != nil:
		err = derr
	case len(name) > volume.MaxName:
		err = no(errs.TooLong)
	case d.attr.Nlink == 0:
		err = no(errs.NotFound)
	case d.kids[name] != nil:
		err = no(errs.Exists)
	}
	if err != nil {
		t.replied[0]++
		return Entry{}, err
	}
	n := mk()
	t.cookie++
	d.kids[name] = &memKid{n.attr.Ino, t.cookie}
	if n.kids != nil {
		n.attr.Parent = parent
		d.attr.Nlink++
	}
	d.touch(true)
	return t.looked(n), nil
}

func (t *memTree) Create(ctx context.Context, c Caller, parent ids.Inode, name string, mode, flags uint32) (Entry, Opened, error) {
	e, err := t.add(ctx, "create", parent, name, func() *memNode { return t.make(c, syscall.S_IFREG|mode) })
	if err != nil {
		return e, Opened{}, err
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	return e, t.handle(e.Attr.Ino), nil
}

func (t *memTree) handle(ino ids.Inode) Opened {
	t.fh++
	t.handles[t.fh] = ino
	t.nodes[ino].opens++
	return Opened{Handle: t.fh, Direct: t.direct, KeepCache: true}
}

func (t *memTree) Mknod(ctx context.Context, c Caller, parent ids.Inode, name string, mode, rdev uint32) (Entry, error) {
	return t.add(ctx, "mknod", parent, name, func() *memNode {
		n := t.make(c, mode)
		n.attr.Rdev = rdev
		return n
	})
}

func (t *memTree) Mkdir(ctx context.Context, c Caller, parent ids.Inode, name string, mode uint32) (Entry, error) {
	return t.add(ctx, "mkdir", parent, name, func() *memNode {
		n := t.make(c, syscall.S_IFDIR|mode)
		n.attr.Nlink = 2
		return n
	})
}

func (t *memTree) Symlink(ctx context.Context, c Caller, parent ids.Inode, name, target string) (Entry, error) {
	return t.add(ctx, "symlink", parent, name, func() *memNode {
		n := t.make(c, syscall.S_IFLNK|0o777)
		n.target, n.attr.Size = target, uint64(len(target))
		return n
	})
}

func (t *memTree) Link(ctx context.Context, _ Caller, ino, parent ids.Inode, name string) (Entry, error) {
	if _, err := t.node(ctx, "linked", ino); err != nil {
		t.began(ino)
		return Entry{}, err
	}
	e, err := t.add(ctx, "link", parent, name, func() *memNode {
		n := t.nodes[ino]
		n.attr.Nlink++
		n.touch(false)
		return n
	})
	if err != nil { // Replied comes for ino
		t.mu.Lock()
		defer t.mu.Unlock()
		t.replied[0]--
		t.replied[ino]++
	}
	return e, err
}

func (t *memTree) Tmpfile(ctx context.Context, c Caller, _ ids.Inode, mode, _ uint32) (Entry, Opened, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	n := t.make(c, syscall.S_IFREG|mode)
	n.attr.Nlink = 0
	return t.looked(n), t.handle(n.attr.Ino), nil
}

func (t *memTree) Unlink(ctx context.Context, _ Caller, parent ids.Inode, name string) error {
	return t.remove(ctx, "unlink", parent, name, false)
}

func (t *memTree) Rmdir(ctx context.Context, _ Caller, parent ids.Inode, name string) error {
	return t.remove(ctx, "rmdir", parent, name, true)
}

func (t *memTree) remove(ctx context.Context, op string, parent ids.Inode, name string, isDir bool) error {
	if err := t.before(ctx, op, name, parent); err != nil {
		return err
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	d, err := t.dir(parent)
	if err != nil {
		return err
	}
	k := d.kids[name]
	if k == nil {
		return no(errs.NotFound)
	}
	return t.unname(d, name, t.nodes[k.ino], isDir)
}

// unname takes a name away.
func (t *memTree) unname(d *memNode, name string, n *memNode, isDir bool) error {
	switch {
	case isDir && n.kids == nil:
		return no(errs.NotDir)
	case !isDir && n.kids != nil:
		return no(errs.IsDir)
	case len(n.kids) > 0:
		return no(errs.NotEmpty)
	}
	delete(d.kids, name)
	n.attr.Nlink--
	if isDir {
		n.attr.Nlink = 0
		d.attr.Nlink--
	}
	n.touch(false)
	d.touch(true)
	t.drop(n)
	return nil
}

func (t *memTree) Rename(ctx context.Context, _ Caller, parent ids.Inode, name string, newParent ids.Inode, newName string, flags uint32) error {
	if err := t.before(ctx, "rename", name, parent); err != nil {
		return err
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	from, err := t.dir(parent)
	if err != nil {
		return err
	}
	to, err := t.dir(newParent)
	if err != nil {
		return err
	}
	k, old := from.kids[name], to.kids[newName]
	if k == nil {
		return no(errs.NotFound)
	}
	n := t.nodes[k.ino]
	if flags == volume.RenameExchange {
		if old == nil {
			return no(errs.NotFound)
		}
		k.ino, old.ino = old.ino, k.ino
		return nil
	}
	if old != nil {
		if flags == volume.RenameNoReplace {
			return no(errs.Exists)
		}
		if old.ino == k.ino {
			return nil
		}
		if err := t.unname(to, newName, t.nodes[old.ino], n.kids != nil); err != nil {
			return err
		}
	}
	delete(from.kids, name)
	t.cookie++
	to.kids[newName] = &memKid{k.ino, t.cookie}
	if n.kids != nil {
		n.attr.Parent = newParent
		from.attr.Nlink--
		to.attr.Nlink++
	}
	n.touch(false)
	from.touch(true)
	to.touch(true)
	return nil
}

func (t *memTree) Readlink(ctx context.Context, ino ids.Inode) (string, error) {
	n, err := t.node(ctx, "readlink", ino)
	if err != nil {
		return "", err
	}
	return n.target, nil
}

func (t *memTree) Open(ctx context.Context, _ Caller, ino ids.Inode, flags uint32, killPriv bool) (Opened, error) {
	t.began(ino)
	n, err := t.node(ctx, "open", ino)
	if err != nil {
		return Opened{}, err
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if flags&syscall.O_TRUNC != 0 {
		n.resize(0)
		n.touch(true)
		if killPriv {
			n.kill()
		}
	}
	return t.handle(ino), nil
}

func (t *memTree) Read(ctx context.Context, ino ids.Inode, _, off uint64, buf []byte) (int, error) {
	t.began(ino)
	n, err := t.node(ctx, "read", ino)
	if err != nil {
		return 0, err
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if off >= uint64(len(n.data)) {
		return 0, nil
	}
	return copy(buf, n.data[off:]), nil
}

func (t *memTree) Write(ctx context.Context, ino ids.Inode, _, off uint64, data []byte, w WriteInfo) (int, error) {
	t.began(ino)
	n, err := t.node(ctx, "write", ino)
	if err != nil {
		return 0, err
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if off > maxMem {
		return 0, no(errs.TooLarge)
	}
	t.writes = append(t.writes, w)
	if w.Append {
		off = uint64(len(n.data))
	}
	if end := int(off) + len(data); end > len(n.data) {
		n.resize(end)
	}
	if w.KillPriv {
		n.kill()
	}
	copy(n.data[off:], data)
	n.touch(true)
	return len(data), nil
}

func (t *memTree) Flush(ctx context.Context, ino ids.Inode, _, owner uint64) error {
	n, err := t.node(ctx, "flush", ino)
	if err == nil {
		t.unlock(n, volume.LockPosix, owner)
	}
	return err
}

func (t *memTree) unlock(n *memNode, kind volume.LockKind, owner uint64) {
	t.mu.Lock()
	defer t.mu.Unlock()
	n.locks = slices.DeleteFunc(n.locks, func(l volume.Lock) bool { return l.Kind == kind && l.Owner == owner })
	t.changed.Broadcast()
}

func (t *memTree) Fsync(ctx context.Context, ino ids.Inode, _ uint64, _ bool) error {
	_, err := t.node(ctx, "fsync", ino)
	return err
}

func (t *memTree) Release(ino ids.Inode, handle, owner uint64, unlock bool) {
	n, err := t.node(context.Background(), "release", ino)
	if err != nil {
		return
	}
	if unlock {
		t.unlock(n, volume.LockFlock, owner)
	}
	t.ReleaseDir(ino, handle)
}

func (t *memTree) Fallocate(ctx context.Context, ino ids.Inode, _, off, length uint64, mode uint32) error {
	n, err := t.node(ctx, "fallocate", ino)
	if err != nil {
		return err
	}
	if mode&^unix.FALLOC_FL_KEEP_SIZE != 0 {
		return no(errs.NotSupported)
	}
	if off > maxMem || length > maxMem {
		return no(errs.TooLarge)
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if mode == 0 && int(off+length) > len(n.data) {
		n.resize(int(off + length))
		n.touch(true)
	}
	return nil
}

func (t *memTree) Seek(ctx context.Context, ino ids.Inode, _, off uint64, whence uint32) (uint64, error) {
	n, err := t.node(ctx, "seek", ino)
	if err != nil {
		return 0, err
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if off >= uint64(len(n.data)) {
		return 0, syscall.ENXIO
	}
	if whence == unix.SEEK_HOLE {
		return uint64(len(n.data)), nil
	}
	return off, nil
}

func (t *memTree) OpenDir(ctx context.Context, _ Caller, ino ids.Inode) (Opened, error) {
	if _, err := t.node(ctx, "opendir", ino); err != nil {
		return Opened{}, err
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	o := t.handle(ino)
	o.KeepCache = false
	return o, nil
}

func (t *memTree) ReadDir(ctx context.Context, ino ids.Inode, _, cookie uint64, plus bool, emit func(volume.Dirent, uint64, *Entry) bool) error {
	t.began(ino)
	n, err := t.node(ctx, "readdir", ino)
	if err != nil {
		return err
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	names := slices.SortedFunc(maps.Keys(n.kids), func(a, b string) int { return int(n.kids[a].cookie) - int(n.kids[b].cookie) })
	for _, name := range names {
		k := n.kids[name]
		if k.cookie <= cookie {
			continue
		}
		e := t.entry(t.nodes[k.ino])
		if !emit(volume.Dirent{Name: name, Ino: k.ino, Mode: e.Attr.Mode & syscall.S_IFMT}, k.cookie, &e) {
			break
		}
		if plus {
			t.lookups[k.ino]++
			t.replied[k.ino]++
		}
	}
	return nil
}

func (t *memTree) FsyncDir(ctx context.Context, ino ids.Inode, _ uint64, _ bool) error {
	_, err := t.node(ctx, "fsyncdir", ino)
	return err
}

func (t *memTree) ReleaseDir(ino ids.Inode, handle uint64) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.handles[handle] != ino {
		panic("released a handle that was not open")
	}
	delete(t.handles, handle)
	n := t.nodes[ino]
	n.opens--
	t.drop(n)
}

func (t *memTree) StatFS(context.Context) (StatFS, error) {
	return StatFS{Blocks: 1000, Free: 500, Avail: 400, Files: 100, FilesFree: 50, BlockSize: 4096, NameLen: 255}, nil
}

func (t *memTree) GetXattr(ctx context.Context, _ Caller, ino ids.Inode, name string) ([]byte, error) {
	n, err := t.node(ctx, "getxattr", ino)
	if err != nil {
		return nil, err
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	v, ok := n.xattrs[name]
	if !ok {
		return nil, no(errs.NoData)
	}
	return v, nil
}

func (t *memTree) SetXattr(ctx context.Context, _ Caller, ino ids.Inode, name string, value []byte, flags uint32) error {
	n, err := t.node(ctx, "setxattr", ino)
	if err != nil {
		return err
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	_, have := n.xattrs[name]
	if flags == XattrCreate && have {
		return no(errs.Exists)
	}
	if flags == XattrReplace && !have {
		return no(errs.NoData)
	}
	if n.xattrs == nil {
		n.xattrs = map[string][]byte{}
	}
	n.xattrs[name] = slices.Clone(value)
	return nil
}

func (t *memTree) ListXattr(ctx context.Context, _ Caller, ino ids.Inode) ([]string, error) {
	n, err := t.node(ctx, "listxattr", ino)
	if err != nil {
		return nil, err
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	return slices.Sorted(maps.Keys(n.xattrs)), nil
}

func (t *memTree) RemoveXattr(ctx context.Context, _ Caller, ino ids.Inode, name string) error {
	n, err := t.node(ctx, "removexattr", ino)
	if err != nil {
		return err
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if _, ok := n.xattrs[name]; !ok {
		return no(errs.NoData)
	}
	delete(n.xattrs, name)
	return nil
}

func (n *memNode) conflict(l volume.Lock) *volume.Lock {
	for i, o := range n.locks {
		if o.Kind == l.Kind && o.Owner != l.Owner && o.Start <= l.End && l.Start <= o.End && (o.Type == syscall.F_WRLCK || l.Type == syscall.F_WRLCK) {
			return &n.locks[i]
		}
	}
	return nil
}

func (t *memTree) GetLock(ctx context.Context, ino ids.Inode, l volume.Lock) (volume.Lock, error) {
	n, err := t.node(ctx, "getlk", ino)
	if err != nil {
		return l, err
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if o := n.conflict(l); o != nil {
		return *o, nil
	}
	l.Type = syscall.F_UNLCK
	return l, nil
}

// SetLock treats overlapping locks of one owner as one.
func (t *memTree) SetLock(ctx context.Context, ino ids.Inode, l volume.Lock, wait bool) error {
	n, err := t.node(ctx, "setlk", ino)
	if err != nil {
		return err
	}
	stop := context.AfterFunc(ctx, func() {
		t.mu.Lock()
		defer t.mu.Unlock()
		t.changed.Broadcast()
	})
	defer stop()
	t.mu.Lock()
	defer t.mu.Unlock()
	for l.Type != syscall.F_UNLCK && n.conflict(l) != nil {
		if !wait {
			return no(errs.LockHeld)
		}
		if ctx.Err() != nil {
			return no(errs.Interrupted)
		}
		t.changed.Wait()
	}
	n.locks = slices.DeleteFunc(n.locks, func(o volume.Lock) bool {
		return o.Kind == l.Kind && o.Owner == l.Owner && o.Start <= l.End && l.Start <= o.End
	})
	if l.Type != syscall.F_UNLCK {
		n.locks = append(n.locks, l)
	}
	t.changed.Broadcast()
	return nil
}

func (t *memTree) Replied(_ Op, ino ids.Inode) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.replied[ino]--; t.replied[ino] == 0 {
		delete(t.replied, ino)
	}
}

// owed returns how many calls have had no Replied, and whether some had two.
func (t *memTree) owed() (n int, twice bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, v := range t.replied {
		n += max(v, 0)
		twice = twice || v < 0
	}
	return n, twice
}
