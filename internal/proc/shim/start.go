package shim

import (
	"bytes"
	"errors"
	"os"
	"strings"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/unum-os/unum/internal/proc/jobapi"
)

// defaultPath is where a command is looked for when the environment has no PATH,
// as in the C library.
const defaultPath = "/bin:/usr/bin"

// usualSlack is by how many ns the kernel may be late with a program's timers, as
// it has it after boot.
const usualSlack = 50_000

// child is everything the new process needs, made ready before the fork: after
// it no memory may be taken and no lock touched.
type child struct {
	tty     int // descriptor that becomes the controlling terminal, or -1
	closed  [3]bool
	ignored [64]bool
	limits  []limit
	nice    int
	umask   int
	groups  []uint32
	uid     int
	gid     int
	cwd     *byte    // nil: the parent's, which nobody can reach any more
	paths   []*byte  // candidates, in order
	argv    **byte   // NULL-terminated
	shArgv  []**byte // the same run by /bin/sh, for a script without #!, one per path
	sh      *byte
	env     **byte
	report  int // write end of the pipe that tells a failure
}

type limit struct {
	resource int
	want     unix.Rlimit
	less     unix.Rlimit // what can be had without the right to raise limits
}

// start starts the program and returns its pid.
func start(sp *Spec) (pid int, failed *Failed) {
	p := &sp.Program
	bad := func(step Step, err error) (int, *Failed) {
		return 0, &Failed{Step: step, Errno: int(errno(err)), Text: err.Error()}
	}
	c := &child{tty: -1, nice: p.Nice, umask: p.Umask & 0o777, groups: sp.Groups, uid: int(sp.UID), gid: int(sp.GID)}
	for fd, kind := range p.Stdio {
		c.closed[fd] = kind == jobapi.Closed
		if kind == jobapi.TTY && c.tty < 0 {
			c.tty = fd
		}
	}
	for _, n := range p.Ignored {
		if n > 0 && n < 64 {
			c.ignored[n] = true
		}
	}
	for _, l := range p.Rlimits {
		var have unix.Rlimit
		if unix.Prlimit(0, l.Resource, nil, &have) != nil {
			continue
		}
		c.limits = append(c.limits, limit{l.Resource, unix.Rlimit{Cur: l.Cur, Max: l.Max},
			unix.Rlimit{Cur: min(l.Cur, have.Max), Max: min(l.Max, have.Max)}})
	}
	cwd := string(p.Cwd)
	if p.CwdGone {
		dir, err := os.MkdirTemp("/tmp", "unum-gone-")
		if err != nil {
			return bad(StepChdir, err)
		}
		// It is entered and removed before the program exists, which must not
		// find it there; this thread's working directory is the program's.
		err = errors.Join(os.Chown(dir, c.uid, c.gid), unix.Chdir(dir), os.Remove(dir))
		if err != nil {
			return bad(StepChdir, err)
		}
	}
	var err error
	if !p.CwdGone {
		if c.cwd, err = syscall.BytePtrFromString(cwd); err != nil {
			return bad(StepChdir, err)
		}
	}
	paths := lookup(p)
	for _, path := range paths {
		b, err := syscall.BytePtrFromString(path)
		if err != nil {
			return bad(StepExec, err)
		}
		c.paths = append(c.paths, b)
		args := append([][]byte{[]byte("sh"), []byte(path)}, p.Argv[1:]...)
		v, err := vector(args)
		if err != nil {
			return bad(StepExec, err)
		}
		c.shArgv = append(c.shArgv, v)
	}
	c.sh, _ = syscall.BytePtrFromString("/bin/sh")
	if c.argv, err = vector(p.Argv); err != nil {
		return bad(StepExec, err)
	}
	if c.env, err = vector(p.Env); err != nil {
		return bad(StepExec, err)
	}
	var pipe [2]int
	if err := unix.Pipe2(pipe[:], unix.O_CLOEXEC); err != nil {
		return bad(StepSetup, err)
	}
	defer unix.Close(pipe[0])
	c.report = pipe[1]

	pid, err = fork(c)
	unix.Close(pipe[1])
	if err != nil {
		return bad(StepSetup, err)
	}
	var b [2]byte
	n, err := 0, error(unix.EINTR)
	for err == unix.EINTR {
		n, err = unix.Read(pipe[0], b[:])
	}
	if n != len(b) {
		return pid, nil // the pipe went with exec
	}
	var ws syscall.WaitStatus
	for {
		if _, err := syscall.Wait4(pid, &ws, 0, nil); err != unix.EINTR {
			break
		}
	}
	f := &Failed{Step: Step(b[0]), Errno: int(b[1])}
	if f.Step == StepExec && f.Errno == int(unix.EACCES) {
		for _, path := range paths {
			if !strings.HasPrefix(path, "/") {
				path = cwd + "/" + path
			}
			if st, err := os.Stat(path); err == nil {
				f.IsDir = st.IsDir()
				break
			}
		}
	}
	return 0, f
}

// lookup returns the paths to try for the command, as execvp does.
func lookup(p *jobapi.Program) []string {
	name := string(p.Argv[0])
	if strings.Contains(name, "/") {
		return []string{name}
	}
	if name == "" {
		return nil
	}
	path := defaultPath
	for _, e := range p.Env {
		if v, ok := bytes.CutPrefix(e, []byte("PATH=")); ok {
			path = string(v)
			break
		}
	}
	var out []string
	for dir := range strings.SplitSeq(path, ":") {
		if dir == "" {
			dir = "."
		}
		out = append(out, dir+"/"+name)
	}
	return out
}

// vector makes a NULL-terminated array of C strings.
func vector(ss [][]byte) (**byte, error) {
	v := make([]*byte, len(ss)+1)
	for i, s := range ss {
		p, err := syscall.BytePtrFromString(string(s))
		if err != nil {
			return nil, err
		}
		v[i] = p
	}
	return &v[0], nil
}

// sigset is the kernel's signal set.
type sigset uint64

// fork makes the child. All signals are blocked meanwhile: in the child the
// runtime's handlers would find no runtime.
func fork(c *child) (int, error) {
	syscall.ForkLock.Lock()
	defer syscall.ForkLock.Unlock()
	all, old := ^sigset(0), sigset(0)
	unix.RawSyscall6(unix.SYS_RT_SIGPROCMASK, unix.SIG_SETMASK, uintptr(unsafe.Pointer(&all)), uintptr(unsafe.Pointer(&old)), 8, 0, 0)
	pid, en := clone(c)
	unix.RawSyscall6(unix.SYS_RT_SIGPROCMASK, unix.SIG_SETMASK, uintptr(unsafe.Pointer(&old)), 0, 8, 0, 0)
	if en != 0 {
		return 0, en
	}
	return int(pid), nil
}

//go:noinline
//go:norace
//go:nosplit
func clone(c *child) (pid uintptr, en syscall.Errno) {
	pid, _, en = syscall.RawSyscall6(syscall.SYS_CLONE, uintptr(syscall.SIGCHLD), 0, 0, 0, 0, 0)
	if en != 0 || pid != 0 {
		return pid, en
	}
	become(c)
	return 0, 0 // not reached
}

// sigaction is the kernel's struct sigaction, large enough on every architecture.
type sigaction struct {
	handler  uintptr
	flags    uint64
	restorer uintptr
	mask     uint64
}

// become turns the child into the program. It runs after fork in a process with
// one thread and no usable runtime: raw system calls only.
//
//go:norace
//go:nosplit
func become(c *child) {
	var (
		en   syscall.Errno
		step = StepIdentity
		act  sigaction
		tell [2]byte
		worn syscall.Errno
		i    int
	)
	for i = 1; i < 65; i++ {
		act.handler = 0 // SIG_DFL
		if i < 64 && c.ignored[i] {
			act.handler = 1 // SIG_IGN
		}
		syscall.RawSyscall6(syscall.SYS_RT_SIGACTION, uintptr(i), uintptr(unsafe.Pointer(&act)), 0, 8, 0, 0)
	}
	if _, _, en = syscall.RawSyscall(syscall.SYS_SETSID, 0, 0, 0); en != 0 {
		goto failed
	}
	if c.tty >= 0 {
		step = StepTerminal
		if _, _, en = syscall.RawSyscall(syscall.SYS_IOCTL, uintptr(c.tty), syscall.TIOCSCTTY, 0); en != 0 {
			goto failed
		}
	}
	step = StepIdentity
	for i = range c.limits {
		if _, _, en = syscall.RawSyscall6(syscall.SYS_PRLIMIT64, 0, uintptr(c.limits[i].resource), uintptr(unsafe.Pointer(&c.limits[i].want)), 0, 0, 0); en != 0 {
			syscall.RawSyscall6(syscall.SYS_PRLIMIT64, 0, uintptr(c.limits[i].resource), uintptr(unsafe.Pointer(&c.limits[i].less)), 0, 0, 0)
		}
	}
	// A lower nice value than this node may give is not worth failing for.
	syscall.RawSyscall(syscall.SYS_SETPRIORITY, 0, 0, uintptr(c.nice))
	// The daemon's timers are coarse (package node); this thread has that from it.
	syscall.RawSyscall(syscall.SYS_PRCTL, unix.PR_SET_TIMERSLACK, usualSlack, 0)
	syscall.RawSyscall(syscall.SYS_UMASK, uintptr(c.umask), 0, 0)
	if _, _, en = syscall.RawSyscall(syscall.SYS_SETGROUPS, uintptr(len(c.groups)), uintptr(unsafe.Pointer(unsafe.SliceData(c.groups))), 0); en != 0 {
		goto failed
	}
	if _, _, en = syscall.RawSyscall(syscall.SYS_SETRESGID, uintptr(c.gid), uintptr(c.gid), uintptr(c.gid)); en != 0 {
		goto failed
	}
	if _, _, en = syscall.RawSyscall(syscall.SYS_SETRESUID, uintptr(c.uid), uintptr(c.uid), uintptr(c.uid)); en != 0 {
		goto failed
	}
	// As the user: a directory closed to him stays closed.
	step = StepChdir
	if c.cwd != nil {
		if _, _, en = syscall.RawSyscall(syscall.SYS_CHDIR, uintptr(unsafe.Pointer(c.cwd)), 0, 0); en != 0 {
			goto failed
		}
	}
	for i = 0; i < 3; i++ {
		if c.closed[i] {
			syscall.RawSyscall(syscall.SYS_CLOSE, uintptr(i), 0, 0)
		}
	}
	step = StepExec
	act.mask = 0
	syscall.RawSyscall6(syscall.SYS_RT_SIGPROCMASK, 2 /* SIG_SETMASK */, uintptr(unsafe.Pointer(&act.mask)), 0, 8, 0, 0)
	en = syscall.ENOENT
	for i = range c.paths {
		_, _, en = syscall.RawSyscall(syscall.SYS_EXECVE, uintptr(unsafe.Pointer(c.paths[i])), uintptr(unsafe.Pointer(c.argv)), uintptr(unsafe.Pointer(c.env)))
		if en == syscall.ENOEXEC { // a script without #!: the shell reads it, as execvp would have it
			_, _, en = syscall.RawSyscall(syscall.SYS_EXECVE, uintptr(unsafe.Pointer(c.sh)), uintptr(unsafe.Pointer(c.shArgv[i])), uintptr(unsafe.Pointer(c.env)))
		}
		if en == syscall.EACCES {
			worn = en // remembered: there may be another further on
		} else if en != syscall.ENOENT && en != syscall.ENOTDIR && en != syscall.ESTALE && en != syscall.ENODEV && en != syscall.ETIMEDOUT {
			break
		}
	}
	if worn != 0 && (en == syscall.ENOENT || en == syscall.ENOTDIR) {
		en = worn
	}
failed:
	tell[0], tell[1] = byte(step), byte(en)
	syscall.RawSyscall(syscall.SYS_WRITE, uintptr(c.report), uintptr(unsafe.Pointer(&tell[0])), 2)
	for {
		syscall.RawSyscall(syscall.SYS_EXIT_GROUP, 127, 0, 0)
	}
}
