package disk

import (
	"errors"
	"io"
	"io/fs"
	"os"
	"strconv"
	"strings"

	"github.com/cockroachdb/pebble/v2/vfs"
	"golang.org/x/sys/unix"
)

// Real is the operating system's file system.
var Real FS = real{vfs.Default}

// real is the engine's file system but for the modes of new files, which the
// daemon's umask (0, for the sake of the tree) would leave open to all, and for
// locks, which the engine's takes by fcntl: closing any descriptor of the file
// lets go of such a one, and nothing tells who has it.
type real struct{ vfs.FS }

// Create implements FS.
func (r real) Create(name string, c vfs.DiskWriteCategory) (File, error) {
	for {
		f, err := os.OpenFile(name, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
		switch {
		case err == nil:
			if err := f.Close(); err != nil {
				return nil, err
			}
			return r.FS.OpenReadWrite(name, c)
		case !errors.Is(err, fs.ErrExist):
			return nil, err
		}
		if err := os.Remove(name); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, err
		}
	}
}

// OpenReadWrite implements FS.
func (r real) OpenReadWrite(name string, c vfs.DiskWriteCategory, opts ...vfs.OpenOption) (File, error) {
	f, err := os.OpenFile(name, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	if err := f.Close(); err != nil {
		return nil, err
	}
	return r.FS.OpenReadWrite(name, c, opts...)
}

// ReuseForWrite implements FS.
func (r real) ReuseForWrite(from, to string, c vfs.DiskWriteCategory) (File, error) {
	if err := r.Rename(from, to); err != nil {
		return nil, err
	}
	return r.OpenReadWrite(to, c)
}

// Lock implements FS. The file holds the number of the process that locked it
// last; it means something while it is locked.
func (real) Lock(path string) (io.Closer, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		if errors.Is(err, unix.EWOULDBLOCK) {
			err = busy(path, holder(f))
		}
		return nil, errors.Join(err, f.Close())
	}
	// Who held it may have removed it since it was opened: then this locks nothing.
	if mine, err := f.Stat(); err != nil {
		return nil, errors.Join(err, f.Close())
	} else if there, err := os.Stat(path); err != nil || !os.SameFile(mine, there) {
		return nil, errors.Join(busy(path, ""), f.Close())
	}
	// Only a message needs it: a full disk must not keep a node from starting.
	if err := f.Truncate(0); err == nil {
		_, _ = f.WriteString(strconv.Itoa(os.Getpid()) + "\n")
	}
	return f, nil
}

func holder(f *os.File) string {
	b, err := io.ReadAll(io.LimitReader(f, 20))
	pid := strings.TrimSpace(string(b))
	if _, nerr := strconv.ParseUint(pid, 10, 31); err != nil || nerr != nil {
		return ""
	}
	return pid
}
