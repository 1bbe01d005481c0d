package disk

import (
	"bytes"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"sync"
	"syscall"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
)

// sector is what a disk writes as a whole, in bytes: a write that a power failure
// interrupts is torn there.
const sector = 512

// Mem is a disk in memory. The zero value is not for use; see NewMem.
type Mem struct {
	mu    sync.Mutex
	root  *inode
	locks map[string]bool
	usage vfs.DiskUsage
	fails uint64 // failed syncs so far: they choose what those wrote
}

// inode is a file, or (names not nil) a directory.
type inode struct {
	mode  fs.FileMode
	mtime time.Time

	data, synced []byte
	writes       []change // of data, since the last sync

	names, durable map[string]*inode
	renames        []naming // of names, since the last sync
}

// change is a change of a file: bytes at off, or (nil) a new size.
type change struct {
	off  int64
	data []byte
}

func (c change) apply(b []byte) []byte {
	end := c.off + int64(len(c.data))
	if c.data == nil && end < int64(len(b)) {
		return b[:end:end]
	}
	if grow := end - int64(len(b)); grow > 0 {
		b = append(b, make([]byte, grow)...)
	}
	copy(b[c.off:], c.data)
	return b
}

// naming is a change of a directory, in one step: from goes, and to is then ino.
type naming struct {
	from, to string // empty: none
	ino      *inode
}

func (n naming) apply(names map[string]*inode) {
	if n.from != "" {
		delete(names, n.from)
	}
	if n.to != "" {
		names[n.to] = n.ino
	}
}

// NewMem returns an empty disk of a TiB.
func NewMem() *Mem {
	m := &Mem{root: newDir(0o755), locks: map[string]bool{}}
	m.SetSize(1 << 40)
	return m
}

func newDir(mode fs.FileMode) *inode {
	return &inode{mode: mode | fs.ModeDir, names: map[string]*inode{}, durable: map[string]*inode{}}
}

// SetSize makes GetDiskUsage tell of a disk of that many bytes, all of them free.
// It bounds nothing: see Failing.
func (m *Mem) SetSize(bytes uint64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.usage = vfs.DiskUsage{AvailBytes: bytes, TotalBytes: bytes}
}

// Crash returns a copy as the next boot finds it after a power failure now.
// Locks are gone. With seed 0 nothing is left of what was not synced; otherwise
// the seed chooses, of the names of each directory the first so many, and of
// the writes to a file some, some not, and some torn: of their sectors any.
func (m *Mem) Crash(seed uint64) *Mem {
	m.mu.Lock()
	defer m.mu.Unlock()
	c := crash{done: map[*inode]*inode{}}
	if seed != 0 {
		c.rng = rand.New(rand.NewPCG(seed, 0xd15c))
	}
	return &Mem{root: c.copy(m.root), locks: map[string]bool{}, usage: m.usage}
}

// Clone returns a copy as a program finds it that is started after another was
// killed: with everything, but without locks.
func (m *Mem) Clone() *Mem {
	m.mu.Lock()
	defer m.mu.Unlock()
	c := crash{done: map[*inode]*inode{}, all: true}
	return &Mem{root: c.copy(m.root), locks: map[string]bool{}, usage: m.usage}
}

type crash struct {
	rng  *rand.Rand // nil: nothing but what was synced
	all  bool       // everything; then what was not synced stays so
	done map[*inode]*inode
}

// copy copies what survives of ino and below, always in the same order.
func (c *crash) copy(ino *inode) *inode {
	if n := c.done[ino]; n != nil {
		return n // it has several names
	}
	n := &inode{mode: ino.mode, mtime: ino.mtime}
	c.done[ino] = n
	if ino.names == nil {
		switch {
		case c.all:
			n.data, n.synced, n.writes = bytes.Clone(ino.data), bytes.Clone(ino.synced), slices.Clone(ino.writes)
		default:
			n.synced = bytes.Clone(ino.synced)
			for _, w := range ino.writes {
				n.synced = c.tear(w, n.synced)
			}
			n.data = bytes.Clone(n.synced)
		}
		return n
	}
	n.names, n.durable = map[string]*inode{}, map[string]*inode{}
	if c.all {
		c.fill(n.names, ino.names)
		c.fill(n.durable, ino.durable)
		for _, r := range ino.renames {
			if r.ino != nil {
				r.ino = c.copy(r.ino)
			}
			n.renames = append(n.renames, r)
		}
		return n
	}
	left := map[string]*inode{}
	for name, i := range ino.durable {
		left[name] = i
	}
	if c.rng != nil {
		for _, r := range ino.renames[:c.rng.IntN(len(ino.renames)+1)] {
			r.apply(left)
		}
	}
	c.fill(n.names, left)
	for name, i := range n.names {
		n.durable[name] = i
	}
	return n
}

func (c *crash) fill(to, from map[string]*inode) {
	order := make([]string, 0, len(from))
	for name := range from {
		order = append(order, name)
	}
	slices.Sort(order)
	for _, name := range order {
		to[name] = c.copy(from[name])
	}
}

// tear returns b with what the seed lets of w reach the disk.
func (c *crash) tear(w change, b []byte) []byte {
	if c.rng == nil {
		return b
	}
	switch c.rng.IntN(3) {
	case 0: // lost
	case 1:
		b = w.apply(b)
	case 2:
		for at := 0; at < len(w.data); at += sector {
			if c.rng.IntN(2) == 0 {
				b = change{w.off + int64(at), w.data[at:min(at+sector, len(w.data))]}.apply(b)
			}
		}
	}
	return b
}

func pathErr(op, path string, err error) error { return &fs.PathError{Op: op, Path: path, Err: err} }

// find returns what is at path. mu is held.
func (m *Mem) find(op, path string) (*inode, error) {
	at := m.root
	for _, p := range parts(path) {
		if at.names == nil {
			return nil, pathErr(op, path, syscall.ENOTDIR)
		}
		if at = at.names[p]; at == nil {
			return nil, pathErr(op, path, syscall.ENOENT)
		}
	}
	return at, nil
}

// dir returns the directory of path, and path's name in it. mu is held.
func (m *Mem) dir(op, path string) (*inode, string, error) {
	ps := parts(path)
	if len(ps) == 0 {
		return nil, "", pathErr(op, path, syscall.EINVAL)
	}
	d, err := m.find(op, parent(path))
	if err == nil && d.names == nil {
		err = pathErr(op, path, syscall.ENOTDIR)
	}
	return d, ps[len(ps)-1], err
}

// name changes d. mu is held.
func (d *inode) name(n naming) {
	n.apply(d.names)
	d.renames = append(d.renames, n)
}

func (m *Mem) create(path string) (File, error) {
	d, name, err := m.dir("create", path)
	if err != nil {
		return nil, err
	}
	if old := d.names[name]; old != nil {
		if old.names != nil {
			return nil, pathErr("create", path, syscall.EISDIR)
		}
		d.name(naming{from: name})
	}
	ino := &inode{mode: 0o600, mtime: time.Now()}
	d.name(naming{to: name, ino: ino})
	return &memFile{m: m, ino: ino, path: path, write: true}, nil
}

// Create implements FS.
func (m *Mem) Create(path string, _ vfs.DiskWriteCategory) (File, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.create(path)
}

// Link implements FS.
func (m *Mem) Link(from, to string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	ino, err := m.find("link", from)
	if err != nil {
		return err
	}
	d, name, err := m.dir("link", to)
	if err != nil {
		return err
	}
	if d.names[name] != nil {
		return pathErr("link", to, syscall.EEXIST)
	}
	d.name(naming{to: name, ino: ino})
	return nil
}

// Open implements FS.
func (m *Mem) Open(path string, opts ...vfs.OpenOption) (File, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	ino, err := m.find("open", path)
	if err != nil {
		return nil, err
	}
	return &memFile{m: m, ino: ino, path: path}, nil
}

// OpenReadWrite implements FS.
func (m *Mem) OpenReadWrite(path string, _ vfs.DiskWriteCategory, _ ...vfs.OpenOption) (File, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	d, name, err := m.dir("open", path)
	if err != nil {
		return nil, err
	}
	ino := d.names[name]
	switch {
	case ino == nil:
		return m.create(path)
	case ino.names != nil:
		return nil, pathErr("open", path, syscall.EISDIR)
	}
	return &memFile{m: m, ino: ino, path: path, write: true}, nil
}

// OpenDir implements FS.
func (m *Mem) OpenDir(path string) (File, error) {
	f, err := m.Open(path)
	if err == nil && f.(*memFile).ino.names == nil {
		err = pathErr("open", path, syscall.ENOTDIR)
	}
	return f, err
}

// Remove implements FS.
func (m *Mem) Remove(path string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	d, name, err := m.dir("remove", path)
	if err != nil {
		return err
	}
	ino := d.names[name]
	switch {
	case ino == nil:
		return pathErr("remove", path, syscall.ENOENT)
	case len(ino.names) > 0:
		return pathErr("remove", path, syscall.ENOTEMPTY)
	}
	d.name(naming{from: name})
	return nil
}

// RemoveAll implements FS.
func (m *Mem) RemoveAll(path string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	d, name, err := m.dir("remove", path)
	if os.IsNotExist(err) {
		return nil
	}
	if err != nil || d.names[name] == nil {
		return err
	}
	d.names[name].clear()
	d.name(naming{from: name})
	return nil
}

func (d *inode) clear() {
	order := make([]string, 0, len(d.names))
	for n := range d.names {
		order = append(order, n)
	}
	slices.Sort(order)
	for _, n := range order {
		d.names[n].clear()
		d.name(naming{from: n})
	}
}

// Rename implements FS. Within a directory it is one step; between two it is
// two, of which a crash may keep either.
func (m *Mem) Rename(from, to string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.rename(from, to)
}

func (m *Mem) rename(from, to string) error {
	a, old, err := m.dir("rename", from)
	if err != nil {
		return err
	}
	b, name, err := m.dir("rename", to)
	if err != nil {
		return err
	}
	ino := a.names[old]
	switch was := b.names[name]; {
	case ino == nil:
		return pathErr("rename", from, syscall.ENOENT)
	case was == ino:
		return nil
	case was != nil && was.names != nil && ino.names == nil:
		return pathErr("rename", to, syscall.EISDIR)
	case was != nil && len(was.names) > 0:
		return pathErr("rename", to, syscall.ENOTEMPTY)
	}
	if a == b {
		a.name(naming{from: old, to: name, ino: ino})
		return nil
	}
	b.name(naming{to: name, ino: ino})
	a.name(naming{from: old})
	return nil
}

// ReuseForWrite implements FS.
func (m *Mem) ReuseForWrite(from, to string, c vfs.DiskWriteCategory) (File, error) {
	if err := m.Rename(from, to); err != nil {
		return nil, err
	}
	return m.OpenReadWrite(to, c)
}

// MkdirAll implements FS.
func (m *Mem) MkdirAll(path string, perm os.FileMode) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	at := m.root
	for _, p := range parts(path) {
		next := at.names[p]
		if next == nil {
			next = newDir(perm.Perm())
			at.name(naming{to: p, ino: next})
		}
		if next.names == nil {
			return pathErr("mkdir", path, syscall.ENOTDIR)
		}
		at = next
	}
	return nil
}

// Lock implements FS.
func (m *Mem) Lock(path string) (io.Closer, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	key := filepath.Clean(path)
	if m.locks[key] {
		return nil, busy(path, strconv.Itoa(os.Getpid()))
	}
	d, name, err := m.dir("lock", path)
	if err != nil {
		return nil, err
	}
	if d.names[name] == nil {
		if _, err := m.create(path); err != nil {
			return nil, err
		}
	}
	m.locks[key] = true
	return &memLock{m: m, key: key}, nil
}

type memLock struct {
	m    *Mem
	key  string
	once sync.Once
}

func (l *memLock) Close() error {
	l.once.Do(func() {
		l.m.mu.Lock()
		delete(l.m.locks, l.key)
		l.m.mu.Unlock()
	})
	return nil
}

// List implements FS. The names are in order.
func (m *Mem) List(path string) ([]string, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	ino, err := m.find("list", path)
	if err != nil {
		return nil, err
	}
	if ino.names == nil {
		return nil, pathErr("list", path, syscall.ENOTDIR)
	}
	out := make([]string, 0, len(ino.names))
	for n := range ino.names {
		out = append(out, n)
	}
	slices.Sort(out)
	return out, nil
}

// Stat implements FS.
func (m *Mem) Stat(path string) (vfs.FileInfo, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	ino, err := m.find("stat", path)
	if err != nil {
		return nil, err
	}
	return ino.info(path), nil
}

func (i *inode) info(path string) vfs.FileInfo {
	return memInfo{name: filepath.Base(path), size: int64(len(i.data)), mode: i.mode, mtime: i.mtime}
}

// PathBase implements FS.
func (*Mem) PathBase(path string) string { return filepath.Base(path) }

// PathJoin implements FS.
func (*Mem) PathJoin(elem ...string) string { return filepath.Join(elem...) }

// PathDir implements FS.
func (*Mem) PathDir(path string) string { return filepath.Dir(path) }

// GetDiskUsage implements FS.
func (m *Mem) GetDiskUsage(string) (vfs.DiskUsage, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.usage, nil
}

// Unwrap implements FS.
func (*Mem) Unwrap() vfs.FS { return nil }

type memInfo struct {
	name  string
	size  int64
	mode  fs.FileMode
	mtime time.Time
}

func (i memInfo) Name() string           { return i.name }
func (i memInfo) Size() int64            { return i.size }
func (i memInfo) Mode() fs.FileMode      { return i.mode }
func (i memInfo) ModTime() time.Time     { return i.mtime }
func (i memInfo) IsDir() bool            { return i.mode.IsDir() }
func (i memInfo) Sys() any               { return nil }
func (i memInfo) DeviceID() vfs.DeviceID { return vfs.DeviceID{} }

// memFile is an open file of a Mem.
type memFile struct {
	m     *Mem
	ino   *inode
	path  string
	pos   int64
	write bool
}

func (f *memFile) Close() error { return nil }

func (f *memFile) Read(b []byte) (int, error) {
	f.m.mu.Lock()
	defer f.m.mu.Unlock()
	n, err := f.read(b, f.pos)
	f.pos += int64(n)
	if n > 0 {
		err = nil
	}
	return n, err
}

func (f *memFile) ReadAt(b []byte, off int64) (int, error) {
	f.m.mu.Lock()
	defer f.m.mu.Unlock()
	return f.read(b, off)
}

func (f *memFile) read(b []byte, off int64) (int, error) {
	switch {
	case f.ino.names != nil:
		return 0, pathErr("read", f.path, syscall.EISDIR)
	case len(b) == 0:
		return 0, nil
	case off >= int64(len(f.ino.data)):
		return 0, io.EOF
	}
	n := copy(b, f.ino.data[off:])
	if n < len(b) {
		return n, io.EOF
	}
	return n, nil
}

func (f *memFile) Write(b []byte) (int, error) {
	f.m.mu.Lock()
	defer f.m.mu.Unlock()
	err := f.change(change{f.pos, b})
	if err == nil {
		f.pos += int64(len(b))
		return len(b), nil
	}
	return 0, err
}

func (f *memFile) WriteAt(b []byte, off int64) (int, error) {
	f.m.mu.Lock()
	defer f.m.mu.Unlock()
	if err := f.change(change{off, b}); err != nil {
		return 0, err
	}
	return len(b), nil
}

// change makes one change of the file. mu is held.
func (f *memFile) change(c change) error {
	if !f.write {
		return pathErr("write", f.path, syscall.EBADF)
	}
	if c.data != nil {
		if len(c.data) == 0 {
			return nil
		}
		c.data = bytes.Clone(c.data)
	}
	f.ino.data = c.apply(f.ino.data)
	f.ino.writes = append(f.ino.writes, c)
	f.ino.mtime = time.Now()
	return nil
}

// Truncate is for the function of that name.
func (f *memFile) Truncate(size int64) error {
	f.m.mu.Lock()
	defer f.m.mu.Unlock()
	return f.change(change{off: size})
}

// Allocate is for the function of that name.
func (f *memFile) Allocate(_, to int64) error {
	f.m.mu.Lock()
	defer f.m.mu.Unlock()
	if to <= int64(len(f.ino.data)) {
		return nil
	}
	return f.change(change{off: to})
}

// Preallocate takes space without moving the end: nothing to see.
func (f *memFile) Preallocate(_, _ int64) error { return nil }

func (f *memFile) Stat() (vfs.FileInfo, error) {
	f.m.mu.Lock()
	defer f.m.mu.Unlock()
	return f.ino.info(f.path), nil
}

func (f *memFile) Sync() error {
	f.m.mu.Lock()
	defer f.m.mu.Unlock()
	i := f.ino
	if i.names != nil {
		for _, r := range i.renames {
			r.apply(i.durable)
		}
		i.renames = nil
		return nil
	}
	for _, w := range i.writes {
		i.synced = w.apply(i.synced)
	}
	i.writes = nil
	return nil
}

// failSync is what a sync does that fails: some of what was written has reached
// the disk, and the rest counts as written all the same, so that no later sync
// brings it there.
func (f *memFile) failSync() {
	f.m.mu.Lock()
	defer f.m.mu.Unlock()
	f.m.fails++
	c := crash{rng: rand.New(rand.NewPCG(f.m.fails, 1))}
	for _, w := range f.ino.writes {
		f.ino.synced = c.tear(w, f.ino.synced)
	}
	f.ino.writes = nil
}

func (f *memFile) SyncData() error            { return f.Sync() }
func (f *memFile) SyncTo(int64) (bool, error) { return false, nil } // it may begin the sync, and promises nothing
func (f *memFile) Prefetch(_, _ int64) error  { return nil }
func (f *memFile) Fd() uintptr                { return vfs.InvalidFd }
