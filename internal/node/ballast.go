package node

import (
	"context"
	"errors"
	"log/slog"
	"path/filepath"
	"sync"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"

	"github.com/unum-os/unum/internal/disk"
	"github.com/unum-os/unum/internal/errs"
)

// ballast is a file that keeps some of the disk from whoever else writes to it.
// When they have filled it, it gives way piece by piece to what must be written
// whatever happens: the groups' logs, which end the daemon when they cannot be.
// New data is refused long before (see space), so that only changes of metadata
// use it. When there is room again it is filled again.
type ballast struct {
	fs   disk.FS
	path string
	size int64 // wanted, bytes
	log  *slog.Logger

	mu   sync.Mutex
	have int64 // bytes it keeps now
}

const (
	fileBallast = "ballast"
	// ballastSize is room for some hundred thousand changes; a small disk gives a
	// sixteenth of itself.
	ballastSize = 64 << 20
	// ballastPieces is how many times it gives way: little enough each time that
	// a program which goes on filling the disk does not get it all.
	ballastPieces = 16
	// ballastTick is how often there is looked for room to fill it again.
	ballastTick = 5 * time.Second
)

// openBallast makes the ballast, as large as there is room for. Without one a
// node can do all its work: a failure is said, and it is tried again.
func openBallast(fs disk.FS, path string, log *slog.Logger) *ballast {
	b := &ballast{fs: fs, path: path, log: log, size: ballastSize}
	if u, err := fs.GetDiskUsage(filepath.Dir(path)); err == nil { // else fill has its say
		b.size = min(b.size, int64(min(u.TotalBytes, 1<<62))/ballastPieces)
	}
	if st, err := fs.Stat(path); err == nil {
		b.have = min(st.Size(), b.size)
	}
	b.refill()
	return b
}

// give gives up a piece.
func (b *ballast) give() {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.have == 0 {
		return
	}
	b.have = max(b.have-b.size/ballastPieces, 0)
	f, err := disk.OpenReadWrite(b.fs, b.path)
	if err == nil {
		err = errors.Join(disk.Truncate(f, b.have), f.Close())
	}
	if err != nil {
		b.log.Error("the reserve for logs is not given up", "path", b.path, "err", err)
		return
	}
	b.log.Warn("the disk is full: the reserve for logs is in use", "left_bytes", b.have)
}

// fill makes it whole if much more than that is free.
func (b *ballast) fill() error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.have == b.size {
		return nil
	}
	u, err := b.fs.GetDiskUsage(filepath.Dir(b.path))
	if err != nil || int64(min(u.AvailBytes, 1<<62)) < 4*b.size {
		return errs.Wrap(err, "look at the disk of", b.path)
	}
	f, err := b.fs.OpenReadWrite(b.path, vfs.WriteCategoryUnspecified)
	if err != nil {
		if errs.Has(err, errs.NoSpace) {
			return nil
		}
		return errs.Wrap(err, "keep a reserve for logs", b.path)
	}
	defer f.Close() // nothing is written to it
	err = disk.Allocate(f, 0, b.size)
	switch {
	case err == nil:
		b.have = b.size
	case errs.Has(err, errs.NotSupported), errs.Has(err, errs.NoSpace): // no file system for it, or others were quicker
		b.have = 0
		return errs.Wrap(disk.Truncate(f, 0), "keep a reserve for logs", b.path)
	default:
		return errs.Wrap(err, "keep a reserve for logs", b.path)
	}
	return nil
}

// run fills it again when it can, until ctx ends.
func (b *ballast) run(ctx context.Context) error {
	for {
		pause(ctx, ballastTick)
		if ctx.Err() != nil {
			return nil
		}
		b.refill()
	}
}

// refill fills it again if it can, and says so if that fails.
func (b *ballast) refill() {
	if err := b.fill(); err != nil {
		b.log.Warn("no reserve for logs", "err", err)
	}
}
