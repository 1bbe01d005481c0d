package lab

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/unum-os/unum/internal/errs"
)

const (
	ext4Shutdown       = 0x8004587d // EXT4_IOC_SHUTDOWN, _IOR('X', 125, __u32)
	shutdownNoLogFlush = 2          // EXT4_GOING_FLAGS_NOLOGFLUSH: as if the power failed
)

func (s *state) image(node string) string { return filepath.Join(s.Dir, node, "disk.img") }

// makeDisk makes node's sparse image and a file system in it. Tables are
// initialised lazily and the journal is small: both are time before first use.
func (s *state) makeDisk(ctx context.Context, node string) error {
	// Under another name until it is whole: an image that is there can be mounted.
	img := s.image(node) + ".new"
	if err := os.MkdirAll(filepath.Dir(img), 0o755); err != nil {
		return errs.Wrap(err, "lab: make disk", img)
	}
	f, err := os.OpenFile(img, os.O_RDWR|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return errs.Wrap(err, "lab: make disk", img)
	}
	err = errors.Join(f.Truncate(s.DiskSize), f.Close())
	if err != nil {
		return errs.Wrap(err, "lab: make disk", img)
	}
	journal := min(max(s.DiskSize>>20/64, 4), 32) // MiB; ext4 wants 1024 blocks at least
	_, err = tool(ctx, "", "mkfs.ext4", "-q", "-F", "-b", "4096", "-m", "0", "-J", fmt.Sprintf("size=%d", journal),
		"-E", "lazy_itable_init=1,lazy_journal_init=1,nodiscard", img)
	if err == nil {
		err = os.Rename(img, s.image(node))
	}
	return errs.Wrap(err, "lab: make disk of", node)
}

// attachLoop puts image on a free loop device that frees itself when its last
// user (our descriptor, then the mount) is gone.
func attachLoop(image string) (dev *os.File, err error) {
	back, err := os.OpenFile(image, os.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	defer back.Close()
	ctl, err := os.OpenFile("/dev/loop-control", os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	defer ctl.Close()
	for range 1000 { // each failed round means another process took a device
		n, err := unix.IoctlRetInt(int(ctl.Fd()), unix.LOOP_CTL_GET_FREE) // adds one when none is free
		if err != nil {
			return nil, fmt.Errorf("no free loop device: %w", err)
		}
		path := fmt.Sprintf("/dev/loop%d", n)
		dev, err := os.OpenFile(path, os.O_RDWR, 0)
		if os.IsNotExist(err) {
			// Either another lab's down has just removed it, or /dev is not a devtmpfs.
			if _, err := os.Stat(fmt.Sprintf("/sys/block/loop%d", n)); err == nil {
				if err := unix.Mknod(path, unix.S_IFBLK|0o660, int(unix.Mkdev(7, uint32(n)))); err != nil && err != unix.EEXIST {
					return nil, fmt.Errorf("make %s: %w", path, err)
				}
			}
			continue
		}
		if errors.Is(err, unix.ENXIO) {
			continue
		}
		if err != nil {
			return nil, err
		}
		cfg := unix.LoopConfig{Fd: uint32(back.Fd())}
		cfg.Info.Flags = unix.LO_FLAGS_AUTOCLEAR
		copy(cfg.Info.File_name[:len(cfg.Info.File_name)-1], image)
		err = unix.IoctlLoopConfigure(int(dev.Fd()), &cfg)
		if err == nil {
			return dev, nil
		}
		dev.Close()
		if err != unix.EBUSY && err != unix.ENXIO {
			return nil, fmt.Errorf("attach %s to %s: %w", image, path, err)
		}
	}
	return nil, fmt.Errorf("attach %s: every free loop device was taken by others", image)
}

// loopsBelow returns the loop devices whose backing file is below dir.
func loopsBelow(dir string) ([]string, error) {
	files, err := filepath.Glob("/sys/block/loop*/loop/backing_file")
	if err != nil {
		return nil, err
	}
	var devs []string
	for _, f := range files {
		b, err := os.ReadFile(f)
		if err != nil {
			continue // detached meanwhile
		}
		if strings.HasPrefix(string(b), strings.TrimSuffix(dir, "/")+"/") {
			devs = append(devs, "/dev/"+strings.Split(f, "/")[3])
		}
	}
	return devs, nil
}

// loopDevices lists the loop devices of this machine, used or not.
func loopDevices() []string {
	names, _ := filepath.Glob("/sys/block/loop*") // the pattern is right
	for i, n := range names {
		names[i] = "/dev/" + filepath.Base(n)
	}
	return names
}

// loopsBefore returns the loop devices that were there before any of the labs
// that stand: those a lab leaves when it is the last. Asked before lab name has any.
func loopsBefore(name string) []string {
	devs := loopDevices() // first: a lab that begins meanwhile has its state written by the time it adds one
	labs, err := List()
	if err != nil {
		return devs // then devices may stay; none is taken from anybody
	}
	for _, n := range labs {
		if n == name {
			continue
		}
		if p, err := readPointer(n); err == nil {
			if s, err := readState(p.Dir); err == nil && len(s.Loops) > 0 {
				devs = slices.DeleteFunc(devs, func(d string) bool { return !slices.Contains(s.Loops, d) })
			}
		}
	}
	return devs
}

// dropLoops removes the loop devices that nobody uses and that were not there
// before. A kernel comes with some (eight, often); more are added by asking for a
// free one, and would stay: also those that an init asked for and did not live to
// take. Who just now got one and has not opened it yet asks again (attachLoop).
func dropLoops(before []string) {
	ctl, err := os.OpenFile("/dev/loop-control", os.O_RDWR, 0)
	if err != nil {
		return // then no lab was made since
	}
	defer ctl.Close()
	for _, d := range loopDevices() {
		n, err := strconv.Atoi(strings.TrimPrefix(d, "/dev/loop"))
		if err == nil && !slices.Contains(before, d) {
			_ = unix.IoctlSetInt(int(ctl.Fd()), unix.LOOP_CTL_REMOVE, n) // busy: it is used
		}
	}
}

// waitLoops returns when no loop device is backed by a file below dir.
func waitLoops(dir string) error {
	deadline := time.Now().Add(goneTimeout)
	for {
		devs, err := loopsBelow(dir)
		if err != nil || len(devs) == 0 {
			return errs.Wrap(err, "lab", dir)
		}
		if time.Now().After(deadline) {
			return errs.E(errs.Busy, "lab", dir, "still in use through %s", strings.Join(devs, ", ")).
				WithRemedy("losetup -l; find who has it mounted (grep %s /proc/*/mountinfo), unmount it, then say the verb again", devs[0])
		}
		time.Sleep(2 * time.Millisecond)
	}
}

// cutDiskPower makes node's disk forget what it has not written and refuse all
// else, as a disk without power does.
func (s *state) cutDiskPower(n *nodeState) error {
	if !n.Ready {
		return nil // nothing has run on it yet; its disk may not be mounted
	}
	path := fmt.Sprintf("/proc/%d/root%s", n.Proc.Pid, s.DataDir)
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		if !n.Proc.alive() {
			return nil // it died by itself just now, and its disk with it
		}
		return errs.Wrap(err, "lab kill: disk of", n.Name)
	}
	defer unix.Close(fd)
	var st unix.Statfs_t
	if err := unix.Fstatfs(fd, &st); err != nil {
		return errs.Wrap(err, "lab kill: disk of", n.Name)
	}
	var dirSt, rootSt unix.Stat_t
	if err := errors.Join(unix.Fstat(fd, &dirSt), unix.Stat("/", &rootSt)); err != nil {
		return errs.Wrap(err, "lab kill: disk of", n.Name)
	}
	// Never the machine's own disk: 7 is the loop devices' major number.
	if st.Type != unix.EXT4_SUPER_MAGIC || unix.Major(dirSt.Dev) != 7 || dirSt.Dev == rootSt.Dev {
		return errs.E(errs.Invalid, "lab kill", n.Name, "%s is not the node's own disk any more", s.DataDir)
	}
	flag := uint32(shutdownNoLogFlush)
	if _, _, e := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), ext4Shutdown, uintptr(unsafe.Pointer(&flag))); e != 0 {
		return errs.Wrap(e, "lab kill: shut down the disk of", n.Name)
	}
	return nil
}
