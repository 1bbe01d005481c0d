package proc

import (
	"context"
	"net"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"github.com/unum-os/unum/internal/errs"
	"github.com/unum-os/unum/internal/ids"
	"github.com/unum-os/unum/internal/wire"
)

// waitPoll is how long one job.wait call is held open; callers ask again.
const waitPoll = 10 * time.Second

// handleKill signals a job for its owner or root. The home vouches for the uid.
func (m *Manager) handleKill(ctx context.Context, from ids.Node, req, data []byte) (any, []byte, error) {
	var r killReq
	if err := wire.Unmarshal(req, &r); err != nil {
		return nil, nil, err
	}
	j, ended, known := m.find(r.Job)
	switch {
	case !known:
		return nil, nil, errs.E(errs.NotFound, "", "", "no job %d on node %v", r.Job, m.cfg.Self)
	case j == nil:
		return nil, nil, errs.E(errs.NotFound, "", "", "job %d has ended (%v)", r.Job, ended.State)
	case r.UID != 0 && r.UID != j.record().UID:
		return nil, nil, errs.E(errs.Permission, "", "", "job %d belongs to another user", r.Job)
	case r.Signal < 0 || r.Signal > 64:
		return nil, nil, errs.E(errs.Invalid, "", "", "signal %d", r.Signal)
	}
	if r.Signal == 0 {
		return nil, nil, nil
	}
	return nil, nil, j.signal(r.Signal)
}

// handleWait answers when the job has ended, or after waitPoll.
func (m *Manager) handleWait(ctx context.Context, from ids.Node, req, data []byte) (any, []byte, error) {
	var r waitReq
	if err := wire.Unmarshal(req, &r); err != nil {
		return nil, nil, err
	}
	j, ended, known := m.find(r.Job)
	if j == nil {
		return waitResp{Known: known, Record: ended}, nil, nil
	}
	t := time.NewTimer(waitPoll)
	defer t.Stop()
	select {
	case <-j.over:
	case <-t.C:
	case <-ctx.Done():
	}
	return waitResp{Known: true, Record: j.record()}, nil, nil
}

// serveLogs sends what a detached job has written, and what it goes on writing.
func (m *Manager) serveLogs(ctx context.Context, from ids.Node, conn net.Conn) {
	defer conn.Close()
	t := &talk{Conn: conn}
	conn.SetReadDeadline(time.Now().Add(rendezvous))
	var r logsReq
	if err := t.recv(&r); err != nil {
		return
	}
	conn.SetReadDeadline(time.Time{})
	if err := m.logs(ctx, conn, r); err != nil {
		wire.WriteFrame(conn, logBad, wire.MustMarshal(refuse(err)), nil)
		return
	}
	wire.WriteFrame(conn, logEnd, nil, nil)
}

func (m *Manager) logs(ctx context.Context, conn net.Conn, r logsReq) error {
	// The one who follows says nothing more: an end of his direction is his
	// going away.
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	go func() {
		var b [1]byte
		conn.Read(b[:])
		cancel()
	}()
	meta, err := readMeta(m.jobDir(r.Job))
	if err != nil {
		if j, _, known := m.find(r.Job); known || j != nil {
			return errs.E(errs.NotFound, "", "", "job %d was not detached: its output went to its caller", r.Job)
		}
		return errs.E(errs.NotFound, "", "", "node %v has no output of job %d", m.cfg.Self, r.Job)
	}
	if r.UID != 0 && r.UID != meta.Record.UID {
		return errs.E(errs.Permission, "", "", "job %d belongs to another user", r.Job)
	}
	var files [2]*os.File
	for i, name := range []string{outFile, errFile} {
		f, err := os.Open(filepath.Join(m.jobDir(r.Job), name))
		if err != nil {
			return errs.Wrap(err, "", "")
		}
		defer f.Close()
		files[i] = f
	}
	buf := make([]byte, copyBuf)
	watch, err := newWatch(files[0].Name(), files[1].Name())
	if err != nil {
		return errs.Wrap(err, "follow", "")
	}
	defer watch.Close()
	stop := context.AfterFunc(ctx, func() { watch.Close() })
	defer stop()
	for {
		var over <-chan struct{}
		ended := true
		if j, _, _ := m.find(r.Job); j != nil {
			over, ended = j.over, false
			select {
			case <-over:
				ended = true
			default:
			}
		}
		for i, f := range files {
			for {
				n, err := f.Read(buf)
				if n > 0 {
					if err := wire.WriteFrame(conn, byte(logOut+i), nil, buf[:n]); err != nil {
						return nil
					}
				}
				if n == 0 || err != nil {
					break
				}
			}
		}
		if ended || !r.Follow || ctx.Err() != nil {
			return nil
		}
		watch.wait(over)
	}
}

// watch tells when files change.
type watch struct{ f *os.File }

func newWatch(paths ...string) (*watch, error) {
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		return nil, err
	}
	w := &watch{os.NewFile(uintptr(fd), "inotify")}
	for _, p := range paths {
		if _, err := unix.InotifyAddWatch(fd, p, unix.IN_MODIFY); err != nil {
			w.Close()
			return nil, err
		}
	}
	return w, nil
}

func (w *watch) Close() error { return w.f.Close() }

// wait returns after a change, when over is closed, or when w is closed.
func (w *watch) wait(over <-chan struct{}) {
	done := make(chan struct{})
	go func() {
		select {
		case <-over:
			w.f.SetReadDeadline(time.Unix(1, 0))
		case <-done:
		}
	}()
	var b [4096]byte
	w.f.Read(b[:])
	close(done)
}
