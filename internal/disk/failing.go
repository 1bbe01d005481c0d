package disk

import (
	"fmt"
	"io"
	"os"
	"strings"
	"sync"

	"github.com/cockroachdb/pebble/v2/vfs"
)

// Kind is a set of kinds of operations.
type Kind uint

// The kinds. Changes are those after which a power failure may find something
// else.
const (
	OpWrite   Kind = 1 << iota // write, truncate, allocate
	OpSync                     // of files
	OpSyncDir                  // of directories
	OpCreate                   // also by opening, linking, locking
	OpRename
	OpRemove
	OpMkdir
	OpOpen // for reading, or of what exists; listings and looks at names too
	OpRead

	Changes = OpWrite | OpSync | OpSyncDir | OpCreate | OpRename | OpRemove | OpMkdir
)

var kindNames = []string{"write", "sync", "sync directory", "create", "rename", "remove", "mkdir", "open", "read"}

// String names the kinds.
func (k Kind) String() string {
	var out []string
	for i, n := range kindNames {
		if k&(1<<i) != 0 {
			out = append(out, n)
		}
	}
	return strings.Join(out, "|")
}

// Fault says what goes wrong.
type Fault struct {
	Kinds Kind   // the operations that count; 0: Changes
	At    int64  // the operation, counted from 1, from which it does; 0: none
	Once  bool   // that one only
	Err   error  // what it fails with, as syscall.EIO or syscall.ENOSPC; nil: it does not
	Do    func() // called once, before operation At
	// Spare, if set, leaves out operations that do not count and do not fail: the
	// engine ends the process when the sync of its directory fails.
	Spare func(k Kind, path string) bool
}

// Failing is an FS that counts operations, and of which some fail. A write that
// fails has written its first half; a sync that fails has lost part of what it
// was for; the others have done nothing.
type Failing struct {
	fs FS

	mu    sync.Mutex
	fault Fault
	count int64
	fired string // the first operation that the fault met
}

// NewFailing returns d with the fault f.
func NewFailing(d FS, f Fault) *Failing {
	w := &Failing{fs: d}
	w.Set(f)
	return w
}

// Set replaces the fault, and counts from 0 again.
func (w *Failing) Set(f Fault) {
	if f.Kinds == 0 {
		f.Kinds = Changes
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.fault, w.count, w.fired = f, 0, ""
}

// Count returns the operations that counted so far.
func (w *Failing) Count() int64 {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.count
}

// Fired returns the first operation that the fault met, or nothing.
func (w *Failing) Fired() string {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.fired
}

// op counts an operation and returns the error with which it fails.
func (w *Failing) op(k Kind, path string) error {
	w.mu.Lock()
	f := w.fault
	if k&f.Kinds == 0 || f.Spare != nil && f.Spare(k, path) {
		w.mu.Unlock()
		return nil
	}
	w.count++
	n := w.count
	if n == f.At {
		w.fired = fmt.Sprintf("%v %s", k, path)
	}
	w.mu.Unlock()
	if n == f.At && f.Do != nil {
		f.Do()
	}
	if f.Err == nil || f.At == 0 || n < f.At || f.Once && n > f.At {
		return nil
	}
	return pathErr(k.String(), path, f.Err)
}

func (w *Failing) wrap(f File, path string, err error) (File, error) {
	if err != nil {
		return nil, err
	}
	return &failingFile{File: f, w: w, path: path}, nil
}

// Create implements FS.
func (w *Failing) Create(path string, c vfs.DiskWriteCategory) (File, error) {
	if err := w.op(OpCreate, path); err != nil {
		return nil, err
	}
	f, err := w.fs.Create(path, c)
	return w.wrap(f, path, err)
}

// Link implements FS.
func (w *Failing) Link(from, to string) error {
	if err := w.op(OpCreate, to); err != nil {
		return err
	}
	return w.fs.Link(from, to)
}

// Open implements FS.
func (w *Failing) Open(path string, opts ...vfs.OpenOption) (File, error) {
	if err := w.op(OpOpen, path); err != nil {
		return nil, err
	}
	f, err := w.fs.Open(path)
	if f, err = w.wrap(f, path, err); err == nil {
		for _, o := range opts {
			o.Apply(f)
		}
	}
	return f, err
}

// OpenReadWrite implements FS.
func (w *Failing) OpenReadWrite(path string, c vfs.DiskWriteCategory, opts ...vfs.OpenOption) (File, error) {
	k := OpOpen
	if _, err := w.fs.Stat(path); err != nil { // it will be made
		k = OpCreate
	}
	if err := w.op(k, path); err != nil {
		return nil, err
	}
	f, err := w.fs.OpenReadWrite(path, c, opts...)
	return w.wrap(f, path, err)
}

// OpenDir implements FS.
func (w *Failing) OpenDir(path string) (File, error) {
	if err := w.op(OpOpen, path); err != nil {
		return nil, err
	}
	f, err := w.fs.OpenDir(path)
	if err != nil {
		return nil, err
	}
	return &failingFile{File: f, w: w, path: path, dir: true}, nil
}

// Remove implements FS.
func (w *Failing) Remove(path string) error {
	if err := w.op(OpRemove, path); err != nil {
		return err
	}
	return w.fs.Remove(path)
}

// RemoveAll implements FS.
func (w *Failing) RemoveAll(path string) error {
	if err := w.op(OpRemove, path); err != nil {
		return err
	}
	return w.fs.RemoveAll(path)
}

// Rename implements FS.
func (w *Failing) Rename(from, to string) error {
	if err := w.op(OpRename, to); err != nil {
		return err
	}
	return w.fs.Rename(from, to)
}

// ReuseForWrite implements FS.
func (w *Failing) ReuseForWrite(from, to string, c vfs.DiskWriteCategory) (File, error) {
	if err := w.op(OpRename, to); err != nil {
		return nil, err
	}
	f, err := w.fs.ReuseForWrite(from, to, c)
	return w.wrap(f, to, err)
}

// MkdirAll implements FS.
func (w *Failing) MkdirAll(path string, perm os.FileMode) error {
	if err := w.op(OpMkdir, path); err != nil {
		return err
	}
	return w.fs.MkdirAll(path, perm)
}

// Lock implements FS.
func (w *Failing) Lock(path string) (io.Closer, error) {
	if err := w.op(OpCreate, path); err != nil {
		return nil, err
	}
	return w.fs.Lock(path)
}

// List implements FS.
func (w *Failing) List(path string) ([]string, error) {
	if err := w.op(OpOpen, path); err != nil {
		return nil, err
	}
	return w.fs.List(path)
}

// Stat implements FS.
func (w *Failing) Stat(path string) (vfs.FileInfo, error) {
	if err := w.op(OpOpen, path); err != nil {
		return nil, err
	}
	return w.fs.Stat(path)
}

// PathBase implements FS.
func (w *Failing) PathBase(path string) string { return w.fs.PathBase(path) }

// PathJoin implements FS.
func (w *Failing) PathJoin(elem ...string) string { return w.fs.PathJoin(elem...) }

// PathDir implements FS.
func (w *Failing) PathDir(path string) string { return w.fs.PathDir(path) }

// GetDiskUsage implements FS.
func (w *Failing) GetDiskUsage(path string) (vfs.DiskUsage, error) { return w.fs.GetDiskUsage(path) }

// Unwrap implements FS.
func (w *Failing) Unwrap() vfs.FS { return w.fs }

type failingFile struct {
	File
	w    *Failing
	path string
	dir  bool
}

func (f *failingFile) Read(b []byte) (int, error) {
	if err := f.w.op(OpRead, f.path); err != nil {
		return 0, err
	}
	return f.File.Read(b)
}

func (f *failingFile) ReadAt(b []byte, off int64) (int, error) {
	if err := f.w.op(OpRead, f.path); err != nil {
		return 0, err
	}
	return f.File.ReadAt(b, off)
}

func (f *failingFile) Write(b []byte) (int, error) {
	if err := f.w.op(OpWrite, f.path); err != nil {
		n, _ := f.File.Write(b[:len(b)/2])
		return n, err
	}
	return f.File.Write(b)
}

func (f *failingFile) WriteAt(b []byte, off int64) (int, error) {
	if err := f.w.op(OpWrite, f.path); err != nil {
		n, _ := f.File.WriteAt(b[:len(b)/2], off)
		return n, err
	}
	return f.File.WriteAt(b, off)
}

// Truncate is for the function of that name.
func (f *failingFile) Truncate(size int64) error {
	if err := f.w.op(OpWrite, f.path); err != nil {
		return err
	}
	return Truncate(f.File, size)
}

// Allocate is for the function of that name.
func (f *failingFile) Allocate(from, to int64) error {
	if err := f.w.op(OpWrite, f.path); err != nil {
		return err
	}
	return Allocate(f.File, from, to)
}

func (f *failingFile) Preallocate(off, n int64) error {
	if err := f.w.op(OpWrite, f.path); err != nil {
		return err
	}
	return f.File.Preallocate(off, n)
}

// sync fails the way that a disk does, or returns nil.
func (f *failingFile) sync() error {
	k := OpSync
	if f.dir {
		k = OpSyncDir
	}
	err := f.w.op(k, f.path)
	if m, ok := f.File.(interface{ failSync() }); ok && err != nil {
		m.failSync()
	}
	return err
}

func (f *failingFile) Sync() error {
	if err := f.sync(); err != nil {
		return err
	}
	return f.File.Sync()
}

func (f *failingFile) SyncData() error {
	if err := f.sync(); err != nil {
		return err
	}
	return f.File.SyncData()
}

func (f *failingFile) SyncTo(n int64) (bool, error) {
	if err := f.sync(); err != nil {
		return false, err
	}
	return f.File.SyncTo(n)
}
