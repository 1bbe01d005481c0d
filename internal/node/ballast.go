package node

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/unum-os/unum/internal/errs"
)

// ballast is a file that keeps some of the disk from whoever else writes to it.
// When they have filled it, it gives way piece by piece to what must be written
// whatever happens: the groups' logs, which end the daemon when they cannot be.
// New data is refused long before (see space), so that only changes of metadata
// use it. When there is room again it is filled again.
type ballast struct {
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

// openBallast makes the ballast in dir, as large as there is room for. Without
// one a node can do all its work: a failure is said, and it is tried again.
func openBallast(dir, path string, log *slog.Logger) *ballast {
	b := &ballast{path: path, log: log, size: ballastSize}
	var fs unix.Statfs_t
	if err := unix.Statfs(dir, &fs); err == nil { // else fill has its say
		b.size = min(b.size, int64(fs.Blocks)*int64(fs.Bsize)/ballastPieces)
	}
	if st, err := os.Stat(path); err == nil {
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
	if err := os.Truncate(b.path, b.have); err != nil {
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
	f, err := os.OpenFile(b.path, os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		if errors.Is(err, unix.ENOSPC) {
			return nil
		}
		return errs.Wrap(err, "keep a reserve for logs", b.path)
	}
	defer f.Close() // nothing is written to it
	var fs unix.Statfs_t
	if err := unix.Fstatfs(int(f.Fd()), &fs); err != nil || int64(fs.Bavail)*int64(fs.Bsize) < 4*b.size {
		return errs.Wrap(err, "look at the disk of", b.path)
	}
	err = unix.EINTR
	for err == unix.EINTR {
		err = unix.Fallocate(int(f.Fd()), 0, 0, b.size)
	}
	switch {
	case err == nil:
		b.have = b.size
	case errors.Is(err, unix.ENOTSUP), errors.Is(err, unix.ENOSPC): // no file system for it, or others were quicker
		b.have = 0
		return errs.Wrap(f.Truncate(0), "keep a reserve for logs", b.path)
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
