package identity

import (
	"errors"
	"io"
	"path/filepath"
	"sync"

	"github.com/unum-os/unum/internal/disk"
	"github.com/unum-os/unum/internal/errs"
)

// maxFile bounds a PEM file: a certificate and a key take less than 2 KiB.
const maxFile = 64 << 10

var saving sync.Mutex // over drafts, which are few and small

// Save writes data to path, readable by the owner only: after a crash the file
// is the old or the new one, and after success it is on the disk. It uses the name
// with .new beside it. Concurrent calls wait for each other.
func Save(d disk.FS, path string, data []byte) error {
	saving.Lock()
	defer saving.Unlock()
	draft := path + ".new"
	f, err := disk.Create(d, draft)
	if err != nil {
		return errs.Wrap(err, "save", path)
	}
	_, err = f.Write(data)
	if err == nil {
		err = f.Sync()
	}
	err = errors.Join(err, f.Close())
	if err == nil {
		err = d.Rename(draft, path)
	}
	if err != nil {
		return errs.Wrap(errors.Join(err, d.Remove(draft)), "save", path)
	}
	return errs.Wrap(disk.SyncDir(d, filepath.Dir(path)), "save", path)
}

// Load reads what Save wrote. A file that others can read is refused with class
// Permission.
func Load(d disk.FS, path string) ([]byte, error) {
	f, err := d.Open(path)
	if err != nil {
		return nil, errs.Wrap(err, "load", path)
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return nil, errs.Wrap(err, "load", path)
	}
	if st.Mode().Perm()&0o077 != 0 {
		return nil, errs.E(errs.Permission, "load", path, "others may read it (mode %04o)", st.Mode().Perm()).
			WithRemedy("chmod 600 %s, and if others use this machine, join again under a new identity", path)
	}
	b, err := io.ReadAll(io.LimitReader(f, maxFile+1))
	if err != nil {
		return nil, errs.Wrap(err, "load", path)
	}
	if len(b) > maxFile {
		return nil, errs.E(errs.TooLarge, "load", path, "more than %d bytes", maxFile)
	}
	return b, nil
}
