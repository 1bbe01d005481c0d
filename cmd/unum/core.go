package main

import (
	"embed"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/unum-os/unum/internal/control"
)

//go:embed all:core
var files embed.FS

const (
	coreFile = "core/unum-core"
	coreID   = "core/unum-core.id"
	// tokenPrefix is what every join token starts with (package identity, which
	// is too heavy to be used here).
	tokenPrefix = "unum1-"
)

// core becomes the core; it returns only when that failed.
//
// The core finds this file again by UNUM_EXE: it starts shims from it.
// UNUM_CORE, a path, takes the place of what is carried inside, for development.
func core() int {
	self, err := os.Executable()
	if err != nil {
		return fail("cannot find my own file: %v", err)
	}
	env := set(os.Environ(), "UNUM_EXE", self)
	if p := os.Getenv("UNUM_CORE"); p != "" {
		err := syscall.Exec(p, append([]string{"unum"}, os.Args[1:]...), env)
		return fail("cannot start the core %s: %v", p, err)
	}
	id, err := files.ReadFile(coreID)
	if err != nil {
		return fail("this binary was built without its core and can only run commands\ntry: make build")
	}
	env = set(env, control.ImageEnv, strings.TrimSpace(string(id)))
	// The daemon's own image is in memory already: to start it again costs
	// nothing, to unpack ours a tenth of a second.
	args, err := concealed(os.Args[1:])
	if err != nil {
		return fail("cannot hand the token on: %v", err)
	}
	if f, err := running(strings.TrimSpace(string(id))); err == nil {
		_ = execute(f, args, env) // else with our own
		f.Close()
	}
	f, err := unpack()
	if err != nil {
		return fail("cannot unpack the core: %v", err)
	}
	return fail("cannot start the core: %v", execute(f, args, env))
}

// concealed returns the arguments for the core without the token of a join: it
// goes by standard input, since any user can read arguments, and those of a
// daemon for as long as it lives.
func concealed(args []string) ([]string, error) {
	if len(args) == 0 || args[0] != "join" && args[0] != "witness" {
		return args, nil
	}
	i := slices.IndexFunc(args, func(a string) bool { return strings.HasPrefix(a, tokenPrefix) })
	if i < 0 {
		return args, nil
	}
	token := args[i] + "\n"
	if len(token) > 4096 { // of a pipe's capacity, and no token
		return nil, errors.New("it is too long")
	}
	var p [2]int
	if err := unix.Pipe(p[:]); err != nil {
		return nil, err
	}
	if _, err := unix.Write(p[1], []byte(token)); err != nil {
		return nil, err
	}
	if err := unix.Dup3(p[0], 0, 0); err != nil {
		return nil, err
	}
	unix.Close(p[0])
	unix.Close(p[1])
	args = slices.Clone(args)
	args[i] = "-"
	return args, nil
}

func fail(format string, args ...any) int {
	fmt.Fprintf(os.Stderr, "unum: "+format+"\n", args...)
	return 125
}

func set(env []string, key, val string) []string {
	out := env[:0:0]
	for _, e := range env {
		if !strings.HasPrefix(e, key+"=") {
			out = append(out, e)
		}
	}
	return append(out, key+"="+val)
}

// imageLimit is how long the daemon may take to give its image; then the own is
// unpacked.
const imageLimit = time.Second

// running asks the daemon for its image, if it is the same as ours. Only root's
// daemon, or one of the caller's own, is believed.
func running(id string) (*os.File, error) {
	return control.Image(control.Path(), id, imageLimit)
}

// imageSeals make a core in memory unchangeable for ever: a daemon gives its image to
// other users (package control). F_SEAL_WRITE is not among them: it is refused (EBUSY)
// while the kernel holds a page that was just written, and nobody has mapped the file
// for writing, which is all that F_SEAL_FUTURE_WRITE would leave.
const imageSeals = unix.F_SEAL_SEAL | unix.F_SEAL_SHRINK | unix.F_SEAL_GROW | unix.F_SEAL_FUTURE_WRITE

// unpack writes the core to memory and seals it.
func unpack() (*os.File, error) {
	src, err := files.Open(coreFile)
	if err != nil {
		return nil, err
	}
	defer src.Close()
	fd, err := unix.MemfdCreate("unum-core", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING|unix.MFD_EXEC)
	if errors.Is(err, unix.EINVAL) { // older than 6.3
		fd, err = unix.MemfdCreate("unum-core", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	}
	if err != nil {
		return nil, err
	}
	dst := os.NewFile(uintptr(fd), "core")
	if _, err := io.CopyBuffer(struct{ io.Writer }{dst}, struct{ io.Reader }{src}, make([]byte, 1<<20)); err != nil {
		return nil, err
	}
	_, err = unix.FcntlInt(uintptr(fd), unix.F_ADD_SEALS, imageSeals)
	return dst, err
}

// execute becomes the program in f.
func execute(f *os.File, args, env []string) error {
	err := syscall.Exec(fmt.Sprintf("/proc/self/fd/%d", f.Fd()), append([]string{"unum"}, args...), env)
	runtime.KeepAlive(f)
	return err
}
