package face

import (
	"sync"

	"golang.org/x/sys/unix"

	"github.com/unum-os/unum/internal/proc/jobapi"
)

// terminal is the caller's, while a command has the use of it.
type terminal struct {
	fd       int
	keepOut  bool
	original unix.Termios

	mu  sync.Mutex
	raw bool
}

func openTerminal(fd int, keepOut bool) (*terminal, error) {
	t, err := unix.IoctlGetTermios(fd, unix.TCGETS)
	if err != nil {
		return nil, err
	}
	return &terminal{fd: fd, keepOut: keepOut, original: *t}, nil
}

func (t *terminal) foreground() bool {
	pg, err := unix.IoctlGetInt(t.fd, unix.TIOCGPGRP)
	return err == nil && pg == unix.Getpgrp()
}

// enter switches to raw mode if the caller's process group has the terminal.
func (t *terminal) enter() bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.raw || !t.foreground() {
		return t.raw
	}
	r := t.original
	r.Iflag &^= unix.IGNBRK | unix.BRKINT | unix.PARMRK | unix.ISTRIP | unix.INLCR | unix.IGNCR | unix.ICRNL | unix.IXON
	r.Lflag &^= unix.ECHO | unix.ECHONL | unix.ICANON | unix.ISIG | unix.IEXTEN
	if !t.keepOut {
		r.Oflag &^= unix.OPOST
	}
	r.Cc[unix.VMIN], r.Cc[unix.VTIME] = 1, 0
	t.raw = unix.IoctlSetTermios(t.fd, unix.TCSETSW, &r) == nil
	return t.raw
}

// leave puts the settings back.
func (t *terminal) leave() {
	t.mu.Lock()
	defer t.mu.Unlock()
	if !t.raw {
		return
	}
	t.raw = false
	if t.foreground() { // in the background it is someone else's now
		unix.IoctlSetTermios(t.fd, unix.TCSETSW, &t.original)
	}
}

func (t *terminal) window() *jobapi.Window {
	w, err := unix.IoctlGetWinsize(t.fd, unix.TIOCGWINSZ)
	if err != nil {
		return nil
	}
	return &jobapi.Window{Rows: w.Row, Cols: w.Col, X: w.Xpixel, Y: w.Ypixel}
}

func (t *terminal) settings() *jobapi.Termios {
	o := &t.original
	return &jobapi.Termios{Iflag: o.Iflag, Oflag: o.Oflag, Cflag: o.Cflag, Lflag: o.Lflag, Cc: o.Cc[:], Ispeed: o.Ispeed, Ospeed: o.Ospeed}
}
