package test

import (
	"context"
	endian "encoding/binary"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	fusefs "github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

const (
	// linClients do operations in each mount, one at a time each. Twelve in
	// three mounts keep a key contended and porcupine's search narrow.
	linClients = 4
	// linRegisters and linDirs are few, so that operations meet.
	linRegisters, linDirs = 2, 2
	// linNames are the names in each directory. A rename joins two of them, so
	// a directory is one history.
	linNames = 3
	// linEpoch is how long a set of files and directories is used. An operation
	// whose outcome is unknown stays possible to the end of its history, which
	// is why histories must have an end.
	linEpoch = 3 * time.Second
	// linTick: all clients begin at multiples of it, together in all mounts.
	linTick = 10 * time.Millisecond
)

// Kinds of operations. On registers: write, sync (write and fsync), read. On
// directory entries: the others. member is one name of a list, as the checker
// takes it; clients do not record it.
const (
	linWrite  = "write"
	linSync   = "sync"
	linRead   = "read"
	linCreate = "create"
	linUnlink = "unlink"
	linStat   = "stat"
	linRename = "rename"
	linList   = "list"
	linMember = "member"
)

// linOp is one operation as its client saw it. It is printed twice: before it
// begins, without Return, and after it has ended.
type linOp struct {
	Client int              `json:"c"` // unique in a run
	N      int              `json:"n"` // counts the client's operations
	Key    string           `json:"k"` // file or directory, below the root
	Kind   string           `json:"o"`
	Name   int              `json:"a,omitempty"` // the entry
	To     int              `json:"b,omitempty"` // the entry that a rename makes
	Value  uint64           `json:"v,omitempty"` // written or read, or the inode made or found
	Listed [linNames]uint64 `json:"l,omitzero"`  // the inodes that a list found, 0: no such name
	Errno  syscall.Errno    `json:"e,omitempty"`
	At     string           `json:"s,omitempty"` // the system call that failed
	Call   int64            `json:"t"`           // linNow
	Return int64            `json:"u,omitempty"`
}

// linNow is a clock that all mounts share: the nodes of a lab are on one kernel.
func linNow() int64 {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &ts); err != nil {
		panic(err)
	}
	return ts.Nano()
}

func init() { workers["linear"] = linWorker }

// linLoad is what one worker does.
type linLoad struct {
	root        string
	mount       int // number of the mount
	first       int // number of its first client
	from, until int64

	mu    sync.Mutex
	epoch int64 // whose directories are made
}

// linWorker does operations below -root until -until and prints each. With
// -cached it first mounts that directory at the root, with caches that nobody
// empties.
func linWorker(args []string) int {
	l := &linLoad{epoch: -1}
	f := flag.NewFlagSet("linear", flag.ExitOnError)
	f.StringVar(&l.root, "root", "", "directory")
	f.IntVar(&l.mount, "mount", 0, "number of the mount")
	f.IntVar(&l.first, "first", 0, "number of the first client")
	f.Int64Var(&l.from, "from", 0, "when epochs are counted from")
	f.Int64Var(&l.until, "until", 0, "when to end")
	cached := f.String("cached", "", "directory to mount")
	if err := f.Parse(args); err != nil {
		return 2
	}
	if *cached != "" {
		srv, err := linMount(*cached, l.root)
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		defer srv.Unmount()
	}
	var wg sync.WaitGroup
	for i := range linClients {
		wg.Go(func() { l.client(l.first + i) })
	}
	wg.Wait()
	return 0
}

// client does operations: of those that begin together most are on one key.
//
// Each mount renames to a name of its own. Linux looks up both names, one after
// the other, and takes a rename for done if they lead to one inode. When another
// node does the same rename between these two, both are told that they did it;
// no file system behind FUSE is asked.
func (l *linLoad) client(id int) {
	rng := rand.New(rand.NewPCG(uint64(id), 1))
	for n := 0; ; {
		now := linNow()
		tick := now/int64(linTick) + 1
		time.Sleep(time.Duration(tick*int64(linTick) - now)) // the load's pace
		if tick*int64(linTick) >= l.until {
			return
		}
		aim := rand.New(rand.NewPCG(uint64(tick), 2)) // the same in all clients
		key, name := aim.IntN(linRegisters+linDirs), aim.IntN(linNames)
		if rng.IntN(4) == 0 {
			key, name = rng.IntN(linRegisters+linDirs), rng.IntN(linNames)
		}
		for range 1 + rng.IntN(2) {
			epoch := (linNow() - l.from) / int64(linEpoch)
			if err := l.prepare(epoch); err != nil {
				fmt.Fprintf(os.Stderr, "client %d: %v\n", id, err)
				break
			}
			n++
			op := linOp{Client: id, N: n}
			if key < linRegisters {
				op.Key = fmt.Sprintf("e%d/r%d", epoch, key)
				op.Kind = []string{linWrite, linWrite, linSync, linRead, linRead, linRead}[rng.IntN(6)]
				if op.Kind != linRead {
					op.Value = uint64(id+1)<<32 | uint64(n)
				}
			} else {
				op.Key = fmt.Sprintf("e%d/d%d", epoch, key-linRegisters)
				op.Kind = []string{linCreate, linCreate, linUnlink, linStat, linStat, linRename, linList}[rng.IntN(7)]
				op.Name = name
				if op.Kind == linRename {
					op.Name, op.To = (l.mount+1+rng.IntN(linNames-1))%linNames, l.mount
				}
			}
			l.do(&op)
		}
	}
}

// prepare makes an epoch's directories, which all mounts do.
func (l *linLoad) prepare(epoch int64) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if epoch <= l.epoch {
		return nil
	}
	for i := range linDirs {
		if err := os.MkdirAll(filepath.Join(l.root, fmt.Sprintf("e%d/d%d", epoch, i)), 0o755); err != nil {
			return err
		}
	}
	l.epoch = epoch
	return nil
}

// do does one operation, between two lines of output: a killed node's last one
// is known to have begun.
func (l *linLoad) do(op *linOp) {
	path := filepath.Join(l.root, op.Key)
	entry := func(i int) string { return filepath.Join(path, string(rune('a'+i))) }
	op.Call = linNow()
	op.print()
	op.Call = linNow()
	var err error
	switch op.Kind {
	case linWrite, linSync:
		err = linPut(path, op.Value, op.Kind == linSync)
	case linRead:
		op.Value, err = linGet(path)
	case linCreate:
		op.Value, err = linMake(entry(op.Name))
	case linUnlink:
		err = os.NewSyscallError("unlink", unix.Unlink(entry(op.Name)))
	case linStat:
		var st unix.Stat_t
		err = os.NewSyscallError("stat", unix.Stat(entry(op.Name), &st))
		op.Value = st.Ino
	case linRename:
		err = os.NewSyscallError("rename", unix.Rename(entry(op.Name), entry(op.To)))
	case linList:
		op.Listed, err = linEntries(path)
	}
	op.Return = linNow()
	if err != nil {
		e := err.(*os.SyscallError)
		op.At, op.Errno = e.Syscall, e.Err.(syscall.Errno)
	}
	op.print()
}

func (op *linOp) print() {
	b, err := json.Marshal(op)
	if err == nil {
		_, err = os.Stdout.Write(append(b, '\n')) // in one piece: shorter than PIPE_BUF
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

// linOpen opens path, has f use it, and closes it. The first error counts.
func linOpen(path string, flags int, f func(fd int) error) error {
	fd, err := unix.Open(path, flags|unix.O_CLOEXEC, 0o644)
	if err != nil {
		return os.NewSyscallError("open", err)
	}
	err = f(fd)
	if e := unix.Close(fd); err == nil {
		err = os.NewSyscallError("close", e)
	}
	return err
}

func linPut(path string, v uint64, sync bool) error {
	return linOpen(path, unix.O_CREAT|unix.O_WRONLY, func(fd int) error {
		n, err := unix.Pwrite(fd, endian.LittleEndian.AppendUint64(nil, v), 0)
		if err == nil && n != 8 {
			err = unix.EMSGSIZE // 8 bytes are written as one
		}
		if err == nil && sync {
			return os.NewSyscallError("fsync", unix.Fsync(fd))
		}
		return os.NewSyscallError("pwrite", err)
	})
}

// linGet reads a register. One that was never written is 0: there is no file, or
// an empty one.
func linGet(path string) (v uint64, err error) {
	err = linOpen(path, unix.O_RDONLY, func(fd int) error {
		var b [8]byte
		n, err := unix.Pread(fd, b[:], 0)
		if err == nil && n != 0 && n != len(b) {
			err = unix.EMSGSIZE
		}
		v = endian.LittleEndian.Uint64(b[:])
		return os.NewSyscallError("pread", err)
	})
	if errors.Is(err, unix.ENOENT) && err.(*os.SyscallError).Syscall == "open" {
		err = nil
	}
	return v, err
}

// linMake makes a file that must not exist and returns its inode.
func linMake(path string) (ino uint64, err error) {
	err = linOpen(path, unix.O_CREAT|unix.O_EXCL|unix.O_WRONLY, func(fd int) error {
		var st unix.Stat_t
		err := unix.Fstat(fd, &st)
		ino = st.Ino
		return os.NewSyscallError("fstat", err)
	})
	return ino, err
}

// linEntries lists a directory.
func linEntries(path string) (found [linNames]uint64, err error) {
	err = linOpen(path, unix.O_RDONLY|unix.O_DIRECTORY, func(fd int) error {
		for buf := make([]byte, 4096); ; {
			n, err := unix.Getdents(fd, buf)
			if err != nil || n == 0 {
				return os.NewSyscallError("getdents", err)
			}
			for b := buf[:n]; len(b) > 0; b = b[endian.LittleEndian.Uint16(b[16:]):] {
				// struct linux_dirent64: inode 8, offset 8, length 2, type 1, name
				if i := int(b[19]) - 'a'; b[20] == 0 && i >= 0 && i < linNames {
					found[i] = endian.LittleEndian.Uint64(b)
				}
			}
		}
	})
	return found, err
}

// linLoopback is a file system over a directory that has the kernel keep what it
// has seen.
type linLoopback struct{ fusefs.LoopbackNode }

// linLoopbackFile has the kernel read and write by requests, not past us.
type linLoopbackFile struct{ *fusefs.LoopbackFile }

func (linLoopbackFile) PassthroughFd() (int, bool) { return 0, false }

func (n *linLoopback) WrapChild(context.Context, fusefs.InodeEmbedder) fusefs.InodeEmbedder {
	return &linLoopback{fusefs.LoopbackNode{RootData: n.RootData}}
}

func (n *linLoopback) Open(ctx context.Context, flags uint32) (fusefs.FileHandle, uint32, syscall.Errno) {
	fh, _, errno := n.LoopbackNode.Open(ctx, flags)
	if errno != 0 {
		return nil, 0, errno
	}
	return linLoopbackFile{fh.(*fusefs.LoopbackFile)}, fuse.FOPEN_KEEP_CACHE, 0
}

func (n *linLoopback) Create(ctx context.Context, name string, flags, mode uint32, out *fuse.EntryOut) (*fusefs.Inode, fusefs.FileHandle, uint32, syscall.Errno) {
	in, fh, _, errno := n.LoopbackNode.Create(ctx, name, flags, mode, out)
	if errno != 0 {
		return nil, nil, 0, errno
	}
	return in, linLoopbackFile{fh.(*fusefs.LoopbackFile)}, fuse.FOPEN_KEEP_CACHE, 0
}

func linMount(dir, at string) (*fuse.Server, error) {
	r := &fusefs.LoopbackRoot{Path: dir}
	root := &linLoopback{fusefs.LoopbackNode{RootData: r}}
	r.RootNode = root
	long := time.Minute
	srv, err := fusefs.Mount(at, root, &fusefs.Options{EntryTimeout: &long, AttrTimeout: &long, NegativeTimeout: &long,
		MountOptions: fuse.MountOptions{DirectMountStrict: true, ExplicitDataCacheControl: true, FsName: "cached", Name: "cached"}})
	if err != nil {
		return nil, &fs.PathError{Op: "mount", Path: at, Err: err}
	}
	return srv, nil
}
