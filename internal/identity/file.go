package identity

import (
	"errors"
	"io"
	"os"
	"path/filepath"

	"github.com/unum-os/unum/internal/errs"
)

// maxFile bounds a PEM file: a certificate and a key take less than 2 KiB.
const maxFile = 64 << 10

// Save writes data to path, readable by the owner only: after a crash the file
// is the old or the new one, and after success it is on the disk.
func Save(path string, data []byte) error {
	dir := filepath.Dir(path)
	f, err := os.CreateTemp(dir, ".new-*") // mode 0600
	if err != nil {
		return errs.Wrap(err, "save", path)
	}
	_, err = f.Write(data)
	if err == nil {
		err = f.Sync()
	}
	err = errors.Join(err, f.Close())
	if err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		return errs.Wrap(errors.Join(err, os.Remove(f.Name())), "save", path)
	}
	d, err := os.Open(dir)
	if err != nil {
		return errs.Wrap(err, "save", path)
	}
	return errs.Wrap(errors.Join(d.Sync(), d.Close()), "save", path)
}

// Load reads what Save wrote. A file that others can read is refused with class
// Permission.
func Load(path string) ([]byte, error) {
	f, err := os.Open(path)
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
