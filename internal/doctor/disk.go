package doctor

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"time"

	"golang.org/x/sys/unix"
)

// What a node needs of its disk: below the first it refuses writes at once (96
// MiB kept free for logs, and the ballast of 64), below the second soon.
const (
	needFree = 160 << 20 // bytes free without which no node can run: below, it refuses writes
	wantFree = 2 << 30   // bytes free that a node should have
)

// syncs is how many syncs are measured, and slowSync what is slow for one: every
// change of a name waits for one on two nodes.
const (
	syncs    = 20
	slowSync = 50 * time.Millisecond
	maxSync  = 10 * time.Second // how long all the measured syncs may take together
)

// memory and network are file systems on which nothing is durable, or not by
// this machine alone.
var (
	memory  = map[int64]string{unix.TMPFS_MAGIC: "tmpfs", unix.RAMFS_MAGIC: "ramfs"}
	network = map[int64]string{unix.NFS_SUPER_MAGIC: "nfs", unix.SMB_SUPER_MAGIC: "smb", 0xFF534D42: "cifs", unix.FUSE_SUPER_MAGIC: "fuse"}
	local   = map[int64]string{unix.EXT4_SUPER_MAGIC: "ext4", unix.XFS_SUPER_MAGIC: "xfs", unix.BTRFS_SUPER_MAGIC: "btrfs", unix.F2FS_SUPER_MAGIC: "f2fs",
		unix.OVERLAYFS_SUPER_MAGIC: "overlay", 0x2FC12FC1: "zfs"}
)

// disk looks at the file system of the data directory.
func (m *Machine) disk(ctx context.Context) []Finding {
	dir := existing(m.Dir)
	space := Finding{Code: "disk-space", Severity: Needed, Effect: "writes are refused with ENOSPC", Remedy: "make room, or name a directory on another disk: --dir"}
	kind := Finding{Code: "disk-type", Severity: Wanted}
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		space.Text = fmt.Sprintf("%s: %v", dir, err)
		return []Finding{space}
	}
	free := int64(st.Bavail) * st.Bsize
	space.OK, space.Text = free >= wantFree, fmt.Sprintf("%.1f GiB are free for %s", float64(free)/(1<<30), m.Dir)
	if !space.OK && free >= needFree {
		space.Severity, space.Effect = Wanted, "the disk is soon full; then writes are refused with ENOSPC"
	}
	typ := int64(st.Type)
	switch {
	case memory[typ] != "":
		kind.Text = memory[typ] + " below " + m.Dir
		kind.Effect, kind.Remedy = "what was acknowledged is lost when this machine loses power", "name a directory on a disk: --dir"
	case network[typ] != "":
		kind.Text = network[typ] + " below " + m.Dir
		kind.Effect, kind.Remedy = "syncs and locks may not hold what they promise, and the node stands still when its server does", "name a directory on a disk of this machine: --dir"
	default:
		name := local[typ]
		if name == "" {
			name = fmt.Sprintf("a file system of type %#x", typ)
		}
		kind.OK, kind.Text = true, name
	}
	return []Finding{space, kind, m.syncTime(ctx, dir)}
}

// syncTime measures what a sync of a small append takes.
func (m *Machine) syncTime(ctx context.Context, dir string) Finding {
	f := Finding{Code: "disk-sync", Severity: Wanted, Effect: "everything that is made durable waits so long, on all nodes that share a volume with this one",
		Remedy: "a disk with a write cache that survives power loss, or a faster one: --dir"}
	took, err := measure(ctx, dir)
	if err != nil {
		f.Text = fmt.Sprintf("how long a sync takes was not measured: %v", err)
		f.Effect, f.Severity = "", Info
		if errors.Is(err, os.ErrPermission) {
			f.Remedy = "sudo unum doctor"
		}
		return f
	}
	slices.Sort(took)
	median := took[len(took)/2]
	f.OK = median < slowSync
	f.Text = fmt.Sprintf("a sync of 4 KiB takes %v, at most %v (median and maximum of %d)", median.Round(10*time.Microsecond), took[len(took)-1].Round(10*time.Microsecond), len(took))
	return f
}

// measure appends to a file without a name, which is gone however this ends.
func measure(ctx context.Context, dir string) ([]time.Duration, error) {
	fd, err := unix.Open(dir, unix.O_TMPFILE|unix.O_WRONLY|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return nil, &os.PathError{Op: "write in", Path: dir, Err: err}
	}
	defer unix.Close(fd)
	var took []time.Duration
	buf := make([]byte, 4096)
	begin := time.Now()
	for range syncs {
		t := time.Now()
		if _, err := unix.Write(fd, buf); err != nil {
			return nil, err
		}
		if err := unix.Fdatasync(fd); err != nil {
			return nil, err
		}
		took = append(took, time.Since(t))
		if ctx.Err() != nil || time.Since(begin) > maxSync {
			break // what was measured says enough
		}
	}
	return took, ctx.Err()
}
