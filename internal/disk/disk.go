package disk

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/cockroachdb/pebble/v2/vfs"
	"golang.org/x/sys/unix"

	"github.com/unum-os/unum/internal/errs"
)

// FS is the disk. It is an alias, so that what the storage engine has for its
// file systems works on ours. Errors carry the errno.
type FS = vfs.FS

// File is an open file or directory of an FS.
type File = vfs.File

// Truncate sets the size of a file that is open for writing. Files of Real, Mem
// and Failing can do it; others give class NotSupported.
func Truncate(f File, size int64) error {
	if t, ok := f.(interface{ Truncate(int64) error }); ok {
		return t.Truncate(size)
	}
	return errs.E(errs.NotSupported, "truncate", "", "not on a %T", f)
}

// Allocate takes disk space for the bytes from from to to, which read as zeros
// where there was nothing, and moves the end of the file to to if it lies before:
// a later sync of what is written there need not move it. Class NotSupported
// where the file system cannot.
func Allocate(f File, from, to int64) error {
	if a, ok := f.(interface{ Allocate(from, to int64) error }); ok {
		return a.Allocate(from, to)
	}
	fd := f.Fd()
	if fd == vfs.InvalidFd {
		return errs.E(errs.NotSupported, "allocate", "", "not on a %T", f)
	}
	for {
		err := unix.Fallocate(int(fd), 0, from, to-from)
		switch {
		case err == nil:
			return nil
		case err != unix.EINTR:
			return pathErr("fallocate", fmt.Sprintf("bytes %d to %d", from, to), err)
		}
	}
}

// Create makes a new, empty file, readable by its owner only. One that has the
// name loses it.
func Create(d FS, path string) (File, error) { return d.Create(path, vfs.WriteCategoryUnspecified) }

// OpenReadWrite opens a file for reading and writing. Unlike the method of the
// same name it makes none: it fails with fs.ErrNotExist.
func OpenReadWrite(d FS, path string) (File, error) {
	if _, err := d.Stat(path); err != nil {
		return nil, err
	}
	return d.OpenReadWrite(path, vfs.WriteCategoryUnspecified)
}

// Size returns a file's size in bytes.
func Size(f File) (int64, error) {
	st, err := f.Stat()
	if err != nil {
		return 0, err
	}
	return st.Size(), nil
}

// SyncData makes a file's bytes durable, and what is needed to find them there.
func SyncData(f File) error {
	for {
		if err := f.SyncData(); !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}

// Chmod sets the mode of a directory that MkdirAll may have found or the umask
// has changed. It is for other programs' eyes: disks in memory have none.
func Chmod(d FS, path string, mode fs.FileMode) error {
	if _, ok := vfs.Root(d).(real); ok {
		return os.Chmod(path, mode)
	}
	return nil
}

// SyncDir makes the names in dir durable.
func SyncDir(d FS, dir string) error {
	f, err := d.OpenDir(dir)
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}

// Exists reports whether there is something at path. What cannot be looked at is
// an error: that there is nothing must be certain.
func Exists(d FS, path string) (bool, error) {
	_, err := d.Stat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	return err == nil, err
}

// Lock takes the lock file path, which it makes, until the closer is closed or
// the process ends. Class Busy: another has it, and the error says which process.
func Lock(d FS, path string) (io.Closer, error) { return d.Lock(path) }

// busy is the error of a lock that process pid holds; empty if that is unknown.
func busy(path, pid string) error {
	if pid == "" {
		return errs.E(errs.Busy, "lock", path, "in use by another process")
	}
	return errs.E(errs.Busy, "lock", path, "in use by process %s", pid)
}

// parent returns the directory that holds path's name.
func parent(path string) string { return filepath.Dir(filepath.Clean(path)) }

// parts returns the names on the way to path.
func parts(path string) []string {
	return strings.FieldsFunc(filepath.Clean("/"+path), func(r rune) bool { return r == '/' })
}
