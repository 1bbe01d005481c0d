package sim

import (
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"slices"
	"strings"
	"sync/atomic"

	"github.com/cockroachdb/pebble/v2/vfs"
)

// dir is where a node keeps its databases.
const dir = "/d"

// disk is one node's disk in one life: a file system in memory that knows what
// was synced. It can end the life in the middle of a sync of the raft log.
type disk struct {
	vfs.FS
	mem    *vfs.MemFS
	rng    *rand.Rand
	armed  atomic.Int64 // syncs of the raft log until one is a power failure; 0: none
	image  *vfs.MemFS   // what that failure left
	atSync bool
	dead   atomic.Bool // it has happened
}

func newDisk(mem *vfs.MemFS, rng *rand.Rand) *disk { return &disk{FS: mem, mem: mem, rng: rng} }

// Create is part of vfs.FS.
func (d *disk) Create(name string, c vfs.DiskWriteCategory) (vfs.File, error) {
	f, err := d.FS.Create(name, c)
	if err == nil && strings.HasPrefix(name, dir+"/raftlog/") && strings.HasSuffix(name, ".log") {
		f = &logFile{f, d}
	}
	return f, err
}

// ReuseForWrite is part of vfs.FS. What a file held before would show after a
// crash as bytes whose number depends on the engine's background work.
func (d *disk) ReuseForWrite(oldname, newname string, c vfs.DiskWriteCategory) (vfs.File, error) {
	if err := d.FS.Remove(oldname); err != nil {
		return nil, err
	}
	return d.Create(newname, c)
}

// logFile is a part of the raft log. The engine syncs it on a goroutine of its
// own, for which the worker waits.
type logFile struct {
	vfs.File
	d *disk
}

func (f *logFile) Sync() error     { return f.d.sync(f.File.Sync) }
func (f *logFile) SyncData() error { return f.d.sync(f.File.SyncData) }

func (f *logFile) SyncTo(int64) (bool, error) { return true, f.d.sync(f.File.SyncData) }

func (d *disk) sync(do func() error) error {
	if d.armed.Load() == 0 || d.armed.Add(-1) > 0 {
		return do()
	}
	before := d.mem.CrashClone(vfs.CrashCloneCfg{})
	if err := do(); err != nil {
		return err
	}
	err := tear(before, d.mem.CrashClone(vfs.CrashCloneCfg{}), d.rng)
	d.image, d.atSync = before, true
	d.dead.Store(true)
	return err
}

// tear adds to the logs of before a part of what came after: a disk may have
// written some of what it was not yet told to keep.
func tear(before, after *vfs.MemFS, rng *rand.Rand) error {
	for _, db := range []string{dir + "/raftlog", dir + "/state"} {
		names, err := before.List(db)
		if err != nil {
			return err
		}
		slices.Sort(names)
		for _, n := range names {
			if !strings.HasSuffix(n, ".log") {
				continue
			}
			old, err := read(before, db+"/"+n)
			if err != nil {
				return err
			}
			all, err := read(after, db+"/"+n)
			if errors.Is(err, errGone) {
				continue // the engine needs it no more
			}
			if err != nil {
				return err
			}
			if len(all) <= len(old) || !slices.Equal(all[:len(old)], old) {
				continue
			}
			cut := len(old)
			switch rng.IntN(4) {
			case 0: // nothing
			case 1:
				cut = len(all)
			default:
				cut += rng.IntN(len(all) - len(old) + 1)
			}
			if err := write(before, db+"/"+n, all[:cut]); err != nil {
				return err
			}
		}
	}
	return nil
}

var errGone = errors.New("it is gone")

func read(fs *vfs.MemFS, name string) ([]byte, error) {
	f, err := fs.Open(name)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", errGone, err)
	}
	b, err := io.ReadAll(f)
	return b, errors.Join(err, f.Close())
}

func write(fs *vfs.MemFS, name string, b []byte) error {
	f, err := fs.OpenReadWrite(name, vfs.WriteCategoryUnspecified)
	if err != nil {
		return err
	}
	_, err = f.WriteAt(b, 0)
	return errors.Join(err, f.Sync(), f.Close())
}
