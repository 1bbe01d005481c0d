package main

import (
	"embed"
	"errors"
	"fmt"
	"io"
	"os"
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
	if fd, err := running(strings.TrimSpace(string(id))); err == nil {
		err = execute(fd, env)
		unix.Close(fd)
		if err == nil {
			return 0 // not reached
		}
	}
	fd, err := unpack()
	if err != nil {
		return fail("cannot unpack the core: %v", err)
	}
	return fail("cannot start the core: %v", execute(fd, env))
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

// running asks the daemon for its image, if it is the same as ours. Only root's
// daemon, or one of the caller's own, is believed.
func running(id string) (int, error) {
	f, err := control.Image(control.Path(), id, time.Second)
	if err != nil {
		return -1, err
	}
	return int(f.Fd()), nil
}

// unpack writes the core to memory and seals it.
func unpack() (int, error) {
	src, err := files.Open(coreFile)
	if err != nil {
		return -1, err
	}
	defer src.Close()
	fd, err := unix.MemfdCreate("unum-core", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING|unix.MFD_EXEC)
	if errors.Is(err, unix.EINVAL) { // older than 6.3
		fd, err = unix.MemfdCreate("unum-core", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	}
	if err != nil {
		return -1, err
	}
	dst := os.NewFile(uintptr(fd), "core")
	if _, err := io.CopyBuffer(struct{ io.Writer }{dst}, struct{ io.Reader }{src}, make([]byte, 1<<20)); err != nil {
		return -1, err
	}
	_, err = unix.FcntlInt(uintptr(fd), unix.F_ADD_SEALS, unix.F_SEAL_SEAL|unix.F_SEAL_SHRINK|unix.F_SEAL_GROW|unix.F_SEAL_WRITE)
	keep = dst
	return fd, err
}

// keep holds the core's file until it is executed.
var keep *os.File

// execute becomes the program in fd.
func execute(fd int, env []string) error {
	return syscall.Exec(fmt.Sprintf("/proc/self/fd/%d", fd), append([]string{"unum"}, os.Args[1:]...), env)
}
