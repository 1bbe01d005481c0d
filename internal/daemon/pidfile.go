// Package daemon starts a program in the background, says whether it runs, and
// stops it; and tells a supervisor how it is.
//
// Words: the pid file is locked by the process that runs, for as long as it
// lives. What is written in it is for people; who holds the lock, the kernel
// says.
//
// Invariants: a pid that this package returns is that of the process that held
// the lock when it was asked, never one read from a file that a dead process
// left. Every wait has an end, and says what it waits for.
//
// On failure: a process that ends before it is healthy is an error with the last
// lines of its log.
package daemon

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/unum-os/unum/internal/errs"
)

// PidFile is a pid file that this process holds.
type PidFile struct {
	f *os.File
}

// Lock makes the pid file and holds it until Release, or the end of the process.
// Held by another, it is an error of class Busy that names the other's pid.
//
// The lock is of the kind that belongs to the process (the kernel then knows the
// pid): opening and closing the file elsewhere in this process would give it up.
func Lock(path string) (*PidFile, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return nil, errs.Wrap(err, "make the pid file", path)
	}
	for {
		f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW, 0o644)
		if err != nil {
			return nil, errs.Wrap(err, "make the pid file", path)
		}
		l := unix.Flock_t{Type: unix.F_WRLCK}
		if err := unix.FcntlFlock(f.Fd(), unix.F_SETLK, &l); err != nil {
			f.Close()
			if !errors.Is(err, unix.EAGAIN) && !errors.Is(err, unix.EACCES) {
				return nil, errs.Wrap(err, "lock the pid file", path)
			}
			pid, runs, err := Running(path)
			if err != nil {
				return nil, err
			}
			if !runs {
				continue // it has ended between the two looks
			}
			return nil, busy(pid)
		}
		// Its last holder may have removed it after we opened it.
		if same(f, path) {
			if err := f.Truncate(0); err != nil {
				return nil, errors.Join(errs.Wrap(err, "write the pid file", path), f.Close())
			}
			if _, err := fmt.Fprintln(f, os.Getpid()); err != nil {
				return nil, errors.Join(errs.Wrap(err, "write the pid file", path), f.Close())
			}
			return &PidFile{f}, nil
		}
		f.Close()
	}
}

func busy(pid int) error {
	who := "a daemon of this machine that cannot be seen from here"
	if pid > 0 {
		who = fmt.Sprintf("process %d", pid)
	}
	return errs.E(errs.Busy, "start the node", "", "it runs already: %s", who).WithRemedy("unum status, or unum down to stop it")
}

func same(f *os.File, path string) bool {
	a, err := f.Stat()
	if err != nil {
		return false
	}
	b, err := os.Lstat(path)
	return err == nil && os.SameFile(a, b)
}

// Release removes the file and gives up the lock.
func (p *PidFile) Release() error {
	return errors.Join(os.Remove(p.f.Name()), p.f.Close())
}

// Running returns the pid of the process that holds the pid file; 0 if it is in
// a pid namespace that cannot be seen from here. No file, or one that nobody
// holds, means that none runs.
func Running(path string) (pid int, runs bool, err error) {
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return 0, false, nil
	}
	if err != nil {
		return 0, false, errs.Wrap(err, "look for the daemon", "")
	}
	defer f.Close()
	l := unix.Flock_t{Type: unix.F_WRLCK, Whence: io.SeekStart}
	if err := unix.FcntlFlock(f.Fd(), unix.F_GETLK, &l); err != nil {
		return 0, false, errs.Wrap(err, "look for the daemon", path)
	}
	if l.Type == unix.F_UNLCK {
		return 0, false, nil
	}
	return int(l.Pid), true, nil
}
