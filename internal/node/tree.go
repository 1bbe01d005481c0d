package node

import (
	"context"
	"errors"
	"os"
	"slices"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/unum-os/unum/internal/clock"
	"github.com/unum-os/unum/internal/errs"
	"github.com/unum-os/unum/internal/volume"
)

// runMount mounts the tree once there is a session: no program sees it before.
func (n *Node) runMount(ctx context.Context) error {
	for !n.venus.Ready() {
		pause(ctx, 10*time.Millisecond)
		if ctx.Err() != nil {
			return nil
		}
	}
	// A daemon that was killed leaves its mount, which answers everything so.
	for _, err := os.Stat(n.cfg.Mount); errors.Is(err, syscall.ENOTCONN); _, err = os.Stat(n.cfg.Mount) {
		if err := unix.Unmount(n.cfg.Mount, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW); err != nil {
			return errs.Wrap(err, "take away the dead mount", n.cfg.Mount)
		}
		n.cfg.Log.Info("dead mount taken away", "dir", n.cfg.Mount)
	}
	if err := os.MkdirAll(n.cfg.Mount, 0o755); err != nil {
		return errs.Wrap(err, "mount", n.cfg.Mount)
	}
	rctx, over := context.WithCancel(ctx)
	var ready sync.WaitGroup
	ready.Go(func() {
		select {
		case <-n.mount.Ready():
			n.mounted.Store(true)
		case <-rctx.Done():
		}
	})
	defer n.mounted.Store(false)
	defer ready.Wait()
	defer over()
	return n.mount.Run(ctx)
}

// walkBlocks names every block of the root volume.
func (n *Node) walkBlocks(yield func(volume.BlockName) bool) error {
	snap := n.host.State().NewSnapshot()
	err := volume.NewView(snap, n.root.Space()).WalkBlocks(func(b volume.BlockName, _ uint32) bool { return yield(b) })
	return errors.Join(err, snap.Close())
}

// space returns the least free bytes among the storing nodes that are heard of.
func (n *Node) space() uint64 {
	least := ^uint64(0)
	if free, err := n.segs.Free(); err == nil {
		least = uint64(max(free, 0))
	}
	store := n.storing()
	for _, l := range n.loads.Snapshot(clock.Now()) {
		if slices.Contains(store, l.Node) && l.Node != n.id && l.DiskTotal > 0 {
			least = min(least, l.DiskTotal-min(l.DiskUsed, l.DiskTotal))
		}
	}
	return least
}
