package fusefs

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/unum-os/unum/internal/ids"
	"github.com/unum-os/unum/internal/need"
)

func TestForeignIoctl(t *testing.T) {
	_, dir := up(t, newMemTree(), nil)
	f, err := os.Create(filepath.Join(dir, "f"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for _, req := range []uint{unix.TCGETS, unix.FS_IOC_GETFLAGS, unix.BLKGETSIZE64, 0xdeadbeef} {
		if _, err := unix.IoctlGetInt(int(f.Fd()), req); err != unix.ENOTTY {
			t.Errorf("ioctl %#x: %v", req, err)
		}
	}
	if err := unix.IoctlFileClone(int(f.Fd()), int(f.Fd())); err != unix.EOPNOTSUPP && err != unix.ENOTTY {
		t.Errorf("clone: %v", err)
	}
}

func TestMappedWriteComesFromCache(t *testing.T) {
	for _, direct := range []bool{false, true} {
		t.Run(fmt.Sprint("direct=", direct), func(t *testing.T) {
			tree := newMemTree()
			tree.direct = direct
			m, dir := up(t, tree, nil)
			p := filepath.Join(dir, "f")
			if err := os.WriteFile(p, nil, 0o644); err != nil {
				t.Fatal(err)
			}
			if err := os.Truncate(p, 8192); err != nil {
				t.Fatal(err)
			}
			mem := newMapping(t, p)
			mem.do("store mapped")
			if s := mem.do("sync"); s != "done" {
				t.Fatal(s)
			}
			check := func(want string) {
				t.Helper()
				tree.mu.Lock()
				defer tree.mu.Unlock()
				if !bytes.HasPrefix(tree.nodes[2].data[4096:], []byte(want)) {
					t.Fatal("the stores did not arrive")
				}
				for _, w := range tree.writes {
					if !w.FromCache || w.Append {
						t.Fatalf("%+v", w)
					}
				}
			}
			check("mapped")
			// An invalidation has dirty pages written back, then drops them.
			mem.do("store second")
			if err := m.InvalidateInode(2, 0, 0); err != nil {
				t.Fatal(err)
			}
			check("second")
			tree.mu.Lock()
			copy(tree.nodes[2].data[4096:], "theirs")
			tree.mu.Unlock()
			if err := m.InvalidateInode(2, 0, 0); err != nil {
				t.Fatal(err)
			}
			if s := mem.do("load"); s != "theirs" {
				t.Fatalf("the mapping shows old data: %q", s)
			}
		})
	}
}

func TestAppendAndPrivileges(t *testing.T) {
	tree := newMemTree()
	_, dir := up(t, tree, nil)
	if err := os.Chmod(filepath.Dir(dir), 0o755); err != nil { // another user must get there
		t.Fatal(err)
	}
	p := filepath.Join(dir, "f")
	if err := os.WriteFile(p, []byte("one"), 0o644); err != nil {
		t.Fatal(err)
	}
	f, err := os.OpenFile(p, os.O_APPEND|os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteString("two"); err != nil {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	tree.mu.Lock()
	if w := tree.writes[len(tree.writes)-1]; !w.Append || w.FromCache || w.KillPriv {
		t.Errorf("append: %+v", w)
	}
	tree.mu.Unlock()
	mode := func() os.FileMode {
		t.Helper()
		fi, err := os.Stat(p)
		if err != nil {
			t.Fatal(err)
		}
		return fi.Mode()
	}
	for name, change := range map[string]func() error{
		"chown": func() error { return os.Chown(p, 1000, 1000) },
		"write": func() error {
			return asUser(func() error {
				f, err := os.OpenFile(p, os.O_WRONLY, 0)
				if err != nil {
					return err
				}
				_, err = f.WriteString("x")
				return errors.Join(err, f.Close())
			})
		},
		"open with O_TRUNC": func() error { return asUser(func() error { return os.WriteFile(p, nil, 0) }) },
		"truncate":          func() error { return asUser(func() error { return os.Truncate(p, 1) }) },
	} {
		if err := os.Chmod(p, os.ModeSetuid|os.ModeSetgid|0o777); err != nil {
			t.Fatal(err)
		}
		if mode()&(os.ModeSetuid|os.ModeSetgid) != os.ModeSetuid|os.ModeSetgid {
			t.Fatal("chmod did not set them")
		}
		if err := change(); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if m := mode(); m&(os.ModeSetuid|os.ModeSetgid) != 0 {
			t.Errorf("%s leaves %v", name, m)
		}
	}
}

// asUser calls f on a thread of user 12345, who has no capabilities.
func asUser(f func() error) error {
	done := make(chan error, 1)
	go func() {
		// The thread is not unlocked: it ends with the goroutine.
		lockThread()
		if _, _, e := syscall.RawSyscall(syscall.SYS_SETFSUID, 12345, 0, 0); e != 0 {
			done <- e
			return
		}
		hdr := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
		var data [2]unix.CapUserData
		if err := unix.Capset(&hdr, &data[0]); err != nil {
			done <- err
			return
		}
		done <- f()
	}()
	return <-done
}

func TestStat(t *testing.T) {
	tree := newMemTree()
	_, dir := up(t, tree, nil)
	p := filepath.Join(dir, "f")
	if err := os.WriteFile(p, make([]byte, 1000), 0o640); err != nil {
		t.Fatal(err)
	}
	old := time.Date(1931, 2, 3, 4, 5, 6, 789, time.UTC)
	if err := os.Chtimes(p, old, old); err != nil {
		t.Fatal(err)
	}
	if fi, err := os.Stat(p); err != nil || !fi.ModTime().Equal(old) {
		t.Fatalf("%v %v", fi, err)
	}
	var x unix.Statx_t
	if err := unix.Statx(unix.AT_FDCWD, p, 0, unix.STATX_BASIC_STATS|unix.STATX_BTIME, &x); err != nil {
		t.Fatal(err)
	}
	if x.Mask&unix.STATX_BTIME == 0 || time.Since(time.Unix(x.Btime.Sec, int64(x.Btime.Nsec))) > time.Minute {
		t.Errorf("birth time: %+v", x.Btime)
	}
	if x.Size != 1000 || x.Blocks != 2 || x.Blksize != blockSize || x.Mode != syscall.S_IFREG|0o640 || x.Ino != 2 {
		t.Errorf("%+v", x)
	}
	q := filepath.Join(dir, "dev")
	if err := unix.Mknod(q, syscall.S_IFCHR|0o600, int(unix.Mkdev(259, 70000))); err != nil {
		t.Fatal(err)
	}
	if err := unix.Statx(unix.AT_FDCWD, q, 0, unix.STATX_BASIC_STATS|unix.STATX_BTIME, &x); err != nil || x.Rdev_major != 259 || x.Rdev_minor != 70000 {
		t.Errorf("statx of a device: %v %d:%d", err, x.Rdev_major, x.Rdev_minor)
	}
	var st unix.Stat_t
	if err := unix.Stat(q, &st); err != nil || unix.Major(st.Rdev) != 259 || unix.Minor(st.Rdev) != 70000 {
		t.Errorf("stat of a device: %v %#x", err, st.Rdev)
	}
	var fs unix.Statfs_t
	if err := unix.Statfs(dir, &fs); err != nil || fs.Blocks != 1000 || fs.Bavail != 400 || fs.Bsize != 4096 || fs.Namelen != 255 {
		t.Errorf("%v %+v", err, fs)
	}
}

func TestListing(t *testing.T) {
	tree := newMemTree()
	_, dir := up(t, tree, nil)
	sub := filepath.Join(dir, "sub")
	if err := os.Mkdir(sub, 0o755); err != nil {
		t.Fatal(err)
	}
	const many = 3000
	for i := range many {
		tree.mu.Lock()
		n := tree.make(Caller{}, syscall.S_IFREG|0o644)
		tree.cookie++
		tree.nodes[2].kids[fmt.Sprintf("name-%d", i)] = &memKid{n.attr.Ino, tree.cookie}
		tree.mu.Unlock()
	}
	fd, err := unix.Open(sub, unix.O_RDONLY|unix.O_DIRECTORY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	seen := map[string]uint64{}
	buf := make([]byte, 4096)
	for {
		n, err := unix.Getdents(fd, buf)
		if err != nil {
			t.Fatal(err)
		}
		if n == 0 {
			break
		}
		for b := buf[:n]; len(b) > 0; {
			d := parseDirent(b)
			if _, twice := seen[d.name]; twice {
				t.Fatalf("%q shown twice", d.name)
			}
			seen[d.name] = d.ino
			b = b[d.size:]
		}
		// Removing what was shown must not hide what was not.
		if len(seen) > 100 && len(seen) < 200 {
			for name := range seen {
				if name != "." && name != ".." {
					_ = os.Remove(filepath.Join(sub, name))
				}
			}
		}
	}
	if len(seen) != many+2 || seen["."] != 2 || seen[".."] != 1 {
		t.Fatalf("%d names, . is %d, .. is %d", len(seen), seen["."], seen[".."])
	}
	settled(t, tree)
}

func TestXattrs(t *testing.T) {
	_, dir := up(t, newMemTree(), nil)
	p := filepath.Join(dir, "f")
	if err := os.WriteFile(p, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	if err := unix.Setxattr(p, "user.a", []byte("1"), unix.XATTR_CREATE); err != nil {
		t.Fatal(err)
	}
	if err := unix.Setxattr(p, "user.a", []byte("1"), unix.XATTR_CREATE); err != unix.EEXIST {
		t.Fatal(err)
	}
	big := bytes.Repeat([]byte("v"), 64<<10)
	if err := unix.Setxattr(p, "user.big", big, 0); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, len(big))
	if n, err := unix.Getxattr(p, "user.big", got); err != nil || !bytes.Equal(got[:n], big) {
		t.Fatal(n, err)
	}
	if _, err := unix.Getxattr(p, "user.big", got[:10]); err != unix.ERANGE {
		t.Fatal(err)
	}
	if n, err := unix.Listxattr(p, got); err != nil || string(got[:n]) != "user.a\x00user.big\x00" {
		t.Fatal(string(got[:n]), err)
	}
	if _, err := unix.Getxattr(p, "system.posix_acl_access", got); err != unix.EOPNOTSUPP {
		t.Fatal(err)
	}
	if err := unix.Setxattr(p, "system.posix_acl_access", []byte("x"), 0); err == nil {
		t.Fatal("pretends to store an access list")
	}
}

func TestNamesAreOrdinary(t *testing.T) {
	_, dir := up(t, newMemTree(), nil)
	for _, name := range []string{".go-fuse-epoll-hack", "@", "\xff\xfe", "a\nb"} {
		p := filepath.Join(dir, name)
		if err := os.WriteFile(p, []byte(name), 0o644); err != nil {
			t.Fatal(err)
		}
		if b, err := os.ReadFile(p); err != nil || string(b) != name {
			t.Fatalf("%q: %q %v", name, b, err)
		}
	}
}

func TestRenameFlags(t *testing.T) {
	_, dir := up(t, newMemTree(), nil)
	a, b := filepath.Join(dir, "a"), filepath.Join(dir, "b")
	for _, p := range []string{a, b} {
		if err := os.WriteFile(p, []byte(p), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if err := unix.Renameat2(unix.AT_FDCWD, a, unix.AT_FDCWD, b, unix.RENAME_NOREPLACE); err != unix.EEXIST {
		t.Fatal(err)
	}
	if err := unix.Renameat2(unix.AT_FDCWD, a, unix.AT_FDCWD, b, unix.RENAME_EXCHANGE); err != nil {
		t.Fatal(err)
	}
	if c, err := os.ReadFile(a); err != nil || string(c) != b {
		t.Fatal(string(c), err)
	}
	if err := unix.Renameat2(unix.AT_FDCWD, a, unix.AT_FDCWD, b, unix.RENAME_WHITEOUT); err != unix.EINVAL {
		t.Fatal(err)
	}
}

func TestLookupsBalance(t *testing.T) {
	tree := newMemTree()
	_, dir, end := start(t, tree, nil)
	for i := range 50 {
		p := filepath.Join(dir, fmt.Sprint(i))
		if err := os.WriteFile(p, nil, 0o644); err != nil {
			t.Fatal(err)
		}
		if _, err := os.Stat(p); err != nil {
			t.Fatal(err)
		}
		if i%2 == 0 {
			if err := os.Remove(p); err != nil {
				t.Fatal(err)
			}
		}
	}
	// Memory pressure makes the kernel forget; the end does not tell.
	if err := os.WriteFile("/proc/sys/vm/drop_caches", []byte("2"), 0); err != nil {
		need.Missing(t, "cannot make the kernel forget: %v", err)
	}
	for deadline := time.Now().Add(soon); ; time.Sleep(time.Millisecond) {
		tree.mu.Lock()
		left := map[ids.Inode]int{}
		for ino, n := range tree.lookups {
			if n != 0 {
				left[ino] = n
			}
		}
		tree.mu.Unlock()
		if len(left) == 0 {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("not forgotten: %v", left)
		}
	}
	if err := end(); err != nil {
		t.Fatal(err)
	}
}

func TestCopyFallsBack(t *testing.T) {
	_, dir := up(t, newMemTree(), nil)
	want := bytes.Repeat([]byte("0123456789abcdef"), 200_000)
	src, err := os.Create(filepath.Join(dir, "src"))
	if err != nil {
		t.Fatal(err)
	}
	defer src.Close()
	if _, err := src.Write(want); err != nil {
		t.Fatal(err)
	}
	dst, err := os.Create(filepath.Join(dir, "dst"))
	if err != nil {
		t.Fatal(err)
	}
	defer dst.Close()
	var off int64
	for off < int64(len(want)) {
		n, err := unix.CopyFileRange(int(src.Fd()), &off, int(dst.Fd()), nil, len(want), 0)
		if err != nil || n == 0 {
			t.Fatal(n, err)
		}
	}
	if got, err := os.ReadFile(dst.Name()); err != nil || !bytes.Equal(got, want) {
		t.Fatal(len(got), err)
	}
}
