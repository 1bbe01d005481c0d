package face

import (
	"os"

	"golang.org/x/sys/unix"

	"github.com/unum-os/unum/internal/proc/jobapi"
)

// kindOf says what a descriptor of the caller's is.
func kindOf(fd int) (kind uint8, st unix.Stat_t) {
	if unix.Fstat(fd, &st) != nil {
		return jobapi.Closed, st
	}
	if st.Mode&unix.S_IFMT == unix.S_IFCHR {
		if unix.Major(st.Rdev) == 1 && unix.Minor(st.Rdev) == 3 {
			return jobapi.Null, st
		}
		if isTTY(fd) {
			return jobapi.TTY, st
		}
	}
	return jobapi.Pipe, st
}

func isTTY(fd int) bool {
	_, err := unix.IoctlGetTermios(fd, unix.TCGETS)
	return err == nil
}

// kinds chooses the stream kinds of the command. It gets a terminal when the
// caller's input and output are one: with either of them redirected the other
// end of that pipe writes to, or reads from, the caller's terminal too, which
// therefore must keep its settings.
func kinds(want *bool) [3]uint8 {
	var k [3]uint8
	var st [3]unix.Stat_t
	for fd := range k {
		k[fd], st[fd] = kindOf(fd)
	}
	tty := k[0] == jobapi.TTY && k[1] == jobapi.TTY
	if want != nil {
		tty = *want
	}
	switch {
	case want != nil && tty:
		return [3]uint8{jobapi.TTY, jobapi.TTY, jobapi.TTY}
	case !tty:
		for fd := range k {
			if k[fd] == jobapi.TTY {
				k[fd] = jobapi.Pipe
			}
		}
	}
	if k[1] == jobapi.Pipe && k[2] == jobapi.Pipe && st[1].Dev == st[2].Dev && st[1].Ino == st[2].Ino && st[1].Rdev == st[2].Rdev {
		k[2] = jobapi.Same // one stream keeps the order of what is written to both
	}
	return k
}

// pipeSize is asked for each pipe to the daemon.
const pipeSize = 256 << 10

func pipe() (r, w int, err error) {
	var p [2]int
	if err := unix.Pipe2(p[:], unix.O_CLOEXEC); err != nil {
		return 0, 0, err
	}
	unix.FcntlInt(uintptr(p[0]), unix.F_SETPIPE_SZ, pipeSize)
	return p[0], p[1], nil
}

func isFIFO(fd int) bool {
	var st unix.Stat_t
	return unix.Fstat(fd, &st) == nil && st.Mode&unix.S_IFMT == unix.S_IFIFO
}

// pump copies from one descriptor to the other until the end of input (nil), or
// an error: of reading, or of writing, which it tells apart. Between two pipes
// nothing is copied. Not so with one: the kernel holds a pipe's lock while it
// waits for the other side then, and the daemon would wait with it.
func pump(w, r int) (rerr, werr error) {
	const chunk = 1 << 20
	for isFIFO(w) && isFIFO(r) {
		n, err := unix.Splice(r, nil, w, nil, chunk, unix.SPLICE_F_MOVE)
		switch {
		case err == unix.EINTR:
		case err == unix.EAGAIN:
			if err := ready(w, r); err != nil {
				return err, nil
			}
		case err == unix.EPIPE:
			return nil, err
		case err == unix.EINVAL || err == unix.ENOSYS:
			return copyThrough(w, r) // a pipe opened for append, or an old kernel
		case err != nil:
			return err, nil
		case n == 0:
			return nil, nil
		}
	}
	return copyThrough(w, r)
}

func copyThrough(w, r int) (rerr, werr error) {
	b := make([]byte, 64<<10)
	for {
		n, err := unix.Read(r, b)
		switch {
		case err == unix.EINTR:
			continue
		case err == unix.EAGAIN: // the caller's end was made not to block
			if err := wait(r, unix.POLLIN); err != nil {
				return err, nil
			}
			continue
		case err != nil:
			return err, nil
		case n <= 0:
			return nil, nil
		}
		for p := b[:n]; len(p) > 0; {
			n, err := unix.Write(w, p)
			switch {
			case err == unix.EINTR:
				continue
			case err == unix.EAGAIN:
				if err := wait(w, unix.POLLOUT); err != nil {
					return nil, err
				}
				continue
			case err != nil:
				return nil, err
			}
			p = p[n:]
		}
	}
}

func wait(fd int, events int16) error {
	for {
		_, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: events}}, -1)
		if err != unix.EINTR {
			return err
		}
	}
}

// ready waits until one of the pipes that said EAGAIN may say something else.
func ready(w, r int) error {
	if err := wait(r, unix.POLLIN); err != nil {
		return err
	}
	return wait(w, unix.POLLOUT)
}

// plumbing is the caller's side of a command's streams.
type plumbing struct {
	theirs  []*os.File // for the daemon
	in      int        // write end to the command's input, -1 if none
	out     [3]int     // read ends of its output, by descriptor; -1 if none
	ttyIn   int
	ttyOut  int
	outputs int
}

func lay(p *jobapi.Program) (*plumbing, error) {
	l := &plumbing{in: -1, out: [3]int{-1, -1, -1}, ttyIn: -1, ttyOut: -1}
	give := func(fd int) { l.theirs = append(l.theirs, os.NewFile(uintptr(fd), "stream")) }
	input := func(dst *int) error {
		r, w, err := pipe()
		if err == nil {
			*dst = w
			give(r)
		}
		return err
	}
	output := func(dst *int) error {
		r, w, err := pipe()
		if err == nil {
			*dst = r
			give(w)
			l.outputs++
		}
		return err
	}
	var err error
	for fd, k := range p.Stdio {
		switch {
		case k != jobapi.Pipe || err != nil:
		case fd == 0:
			err = input(&l.in)
		default:
			err = output(&l.out[fd])
		}
	}
	if p.NeedsTTY() && err == nil {
		if err = input(&l.ttyIn); err == nil {
			err = output(&l.ttyOut)
		}
	}
	return l, err
}

// handOver closes the daemon's ends here.
func (l *plumbing) handOver() {
	for _, f := range l.theirs {
		f.Close()
	}
	l.theirs = nil
}
