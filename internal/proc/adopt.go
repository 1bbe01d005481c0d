package proc

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sort"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/unum-os/unum/internal/clock"
	"github.com/unum-os/unum/internal/errs"
	"github.com/unum-os/unum/internal/proc/shim"
	"github.com/unum-os/unum/internal/wire"
)

// meta is what a detached job's directory says about it.
type meta struct {
	Record JobRecord `cbor:"1,keyasint"`
	Shim   int       `cbor:"2,keyasint"` // pid
	Born   uint64    `cbor:"3,keyasint"` // its start time in clock ticks after boot: pids come again
	Boot   string    `cbor:"4,keyasint"` // the boot it ran in
	PGID   int       `cbor:"5,keyasint"` // the program's pid and process group, in the daemon's namespace; 0 unknown
	Since  uint64    `cbor:"6,keyasint"` // the program's start time
	// Until is when its time is up, a clock.Instant of Boot, and Limit that time in
	// nanoseconds; 0: none.
	Until int64 `cbor:"7,keyasint,omitempty"`
	Limit int64 `cbor:"8,keyasint,omitempty"`
}

// orphanTick is how often the record is asked again when it could not be read.
const orphanTick = time.Second

func bootID() string {
	b, _ := os.ReadFile("/proc/sys/kernel/random/boot_id")
	return strings.TrimSpace(string(b))
}

// born returns the start time of a process; 0 if there is none.
func born(pid int) uint64 {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0
	}
	s := string(b)
	f := strings.Fields(s[strings.LastIndexByte(s, ')')+1:])
	if len(f) < 20 {
		return 0
	}
	n, _ := strconv.ParseUint(f[19], 10, 64)
	return n
}

// writeMeta leaves in dir what a later life of the daemon needs. A job that is
// being started counts as running, its program not known yet.
func writeMeta(dir string, j *job) error {
	j.mu.Lock()
	mt := meta{Record: j.rec, Shim: j.proc.Pid, Born: born(j.proc.Pid), Boot: bootID(), Until: int64(j.until), Limit: j.l.Timeout}
	cgs, program := j.cg.pids(), j.program
	j.mu.Unlock()
	if mt.Record.State == 0 {
		mt.Record.State = Running
	}
	// The program's pid here is the one whose innermost number the shim told.
	for _, pid := range append(children(mt.Shim), cgs...) {
		if program != 0 && pid != mt.Shim && innerPid(pid) == program {
			mt.PGID, mt.Since = pid, born(pid)
			break
		}
	}
	return replaceFile(filepath.Join(dir, metaFile), wire.MustMarshal(mt))
}

func children(pid int) []int {
	var out []int
	ts, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", pid))
	for _, t := range ts {
		b, _ := os.ReadFile(t)
		for _, f := range strings.Fields(string(b)) {
			if n, err := strconv.Atoi(f); err == nil {
				out = append(out, n)
			}
		}
	}
	return out
}

// innerPid returns the number of pid in the innermost of its namespaces.
func innerPid(pid int) int {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0
	}
	for line := range strings.SplitSeq(string(b), "\n") {
		if v, ok := strings.CutPrefix(line, "NSpid:"); ok {
			f := strings.Fields(v)
			n, _ := strconv.Atoi(f[len(f)-1])
			return n
		}
	}
	return 0
}

// replaceFile replaces a file, safe from a loss of power when it returns.
func replaceFile(path string, b []byte) error {
	tmp := path + ".new"
	f, err := os.OpenFile(tmp, os.O_CREATE|os.O_WRONLY|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(b)
	if err == nil {
		err = f.Sync()
	}
	if err := errors.Join(err, f.Close()); err != nil {
		return err
	}
	if err := os.Rename(tmp, path); err != nil {
		return err
	}
	d, err := os.Open(filepath.Dir(path))
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

func readMeta(dir string) (meta, error) {
	var mt meta
	b, err := os.ReadFile(filepath.Join(dir, metaFile))
	if err != nil {
		return mt, err
	}
	return mt, wire.Unmarshal(b, &mt)
}

// adoptAll takes over the detached jobs an earlier daemon left, and tells the
// record of those that ended in between. Of those that have ended it keeps the
// last keepEnded with their output.
func (m *Manager) adoptAll(ctx context.Context) {
	es, err := os.ReadDir(m.jobsDir())
	if err != nil {
		m.cfg.Log.Warn("jobs of an earlier life cannot be listed", "err", err)
		return
	}
	var ended []JobRecord
	for _, e := range es {
		mt, err := readMeta(filepath.Join(m.jobsDir(), e.Name()))
		if err != nil {
			continue
		}
		if mt.Record.State.Finished() {
			ended = append(ended, mt.Record)
			continue
		}
		if mt.PGID == 0 {
			mt.PGID = eldest(children(mt.Shim))
			mt.Since = born(mt.PGID)
		}
		j := &job{m: m, l: launch{Job: mt.Record.Job, Incarnation: mt.Record.Incarnation, Detach: true, Timeout: mt.Limit}, until: clock.Instant(mt.Until), home: mt.Record.Home,
			rec: mt.Record, adopted: &mt, cg: m.cg.find(groupName(mt.Shim)), over: make(chan struct{})}
		fd, alive := -1, false
		if mt.Boot == bootID() && born(mt.Shim) == mt.Born && mt.Born != 0 {
			fd, err = unix.PidfdOpen(mt.Shim, 0)
			alive = err == nil && born(mt.Shim) == mt.Born
		}
		if !alive {
			if fd >= 0 {
				unix.Close(fd)
			}
			j.settle(mt)
			m.remember(j.rec)
			ended = append(ended, j.rec)
			continue
		}
		p, err := os.FindProcess(mt.Shim)
		if err != nil {
			unix.Close(fd)
			continue
		}
		j.proc = p
		m.mu.Lock()
		leave, err := m.admitLocked(j)
		m.mu.Unlock()
		if err != nil {
			unix.Close(fd)
			m.cfg.Log.Warn("job of an earlier life cannot be taken over", "job", mt.Record.Job, "err", err)
			continue
		}
		go func() {
			defer leave()
			defer unix.Close(fd)
			if j.until != 0 {
				t := time.AfterFunc(j.until.Sub(clock.Now()), func() { j.expire(time.Duration(j.l.Timeout)) })
				defer t.Stop()
			}
			if awaitPidfd(ctx, fd) {
				j.settle(mt)
			}
		}()
	}
	sort.Slice(ended, func(a, b int) bool { return ended[a].End > ended[b].End })
	for _, r := range ended[min(len(ended), keepEnded):] {
		if err := os.RemoveAll(m.jobDir(r.Job)); err != nil {
			m.cfg.Log.Warn("output of an ended job cannot be removed", "job", r.Job, "err", err)
		}
	}
}

// eldest returns the process that started first; 0 if there is none. Of the
// shim's children it is the program: others were left to it later.
func eldest(pids []int) int {
	best, since := 0, uint64(0)
	for _, pid := range pids {
		if b := born(pid); b != 0 && (best == 0 || b < since) {
			best, since = pid, b
		}
	}
	return best
}

// orphans tells the record that jobs of an earlier life of this daemon, begun
// before the time given (Unix nanoseconds) and not taken over, are lost: nobody
// else may be left to see it. It returns when the record could be asked, or ctx
// has ended.
func (m *Manager) orphans(ctx context.Context, began int64) {
	t := time.NewTicker(orphanTick)
	defer t.Stop()
	for {
		rs, err := m.cfg.Registry.List(ctx)
		if err == nil {
			for _, r := range rs {
				_, _, known := m.find(r.Job)
				if r.Node != m.cfg.Self || r.State.Finished() || r.Start >= began || known {
					continue
				}
				r.State, r.End = Lost, m.cfg.Clock.Wall().UnixNano()
				r.Text = fmt.Sprintf("the daemon of node %v was restarted", m.cfg.Self)
				m.cfg.Registry.Put(r)
			}
			return
		}
		m.cfg.Log.Debug("jobs of an earlier life cannot be asked for", "err", err)
		select {
		case <-t.C:
		case <-ctx.Done():
			return
		}
	}
}

// signal sends sig to the program's process group. The shim would do it, but its
// link went with the earlier daemon.
func (mt *meta) signal(sig int) error {
	if mt.PGID <= 1 || born(mt.PGID) != mt.Since || mt.Since == 0 {
		return errs.E(errs.NotFound, "", "", "the first process of job %d has ended", mt.Record.Job)
	}
	if sig == int(unix.SIGTSTP) {
		sig = int(unix.SIGSTOP)
	}
	if err := unix.Kill(-mt.PGID, syscall.Signal(sig)); err != nil && err != unix.ESRCH {
		return errs.Wrap(err, "signal", fmt.Sprintf("job %d", mt.Record.Job))
	}
	return nil
}

// awaitPidfd waits for the end of a process that is not a child; false if ctx
// ended first.
func awaitPidfd(ctx context.Context, fd int) bool {
	for ctx.Err() == nil {
		// Bounded, so that the end of ctx is seen.
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 500)
		if err != nil && err != unix.EINTR {
			return true
		}
		if n > 0 {
			return true
		}
	}
	return false
}

// settle makes the record of an adopted job final, from what its shim left.
func (j *job) settle(mt meta) {
	dir := j.m.jobDir(mt.Record.Job)
	e := &ending{State: Lost, Text: fmt.Sprintf("node %v went down while it ran", j.m.cfg.Self)}
	if mt.Boot == bootID() {
		e = &ending{State: Killed, Signal: int(unix.SIGKILL), Text: fmt.Sprintf("the job was killed on node %v", j.m.cfg.Self)}
	}
	if b, err := os.ReadFile(filepath.Join(dir, shim.ExitFile)); err == nil {
		var x shim.Exited
		if wire.Unmarshal(b, &x) == nil {
			e = &ending{State: Exited, Code: x.Code, Signal: x.Signal}
		}
	}
	if j.proc != nil {
		j.proc.Wait() // a child only if this process itself let it go before
	}
	if err := j.cg.remove(); err != nil {
		j.m.cfg.Log.Warn("control group cannot be removed", "job", j.l.Job, "err", err)
	}
	j.mu.Lock()
	if j.why != nil && j.why.Code == codeTimeout {
		e = j.why
	}
	j.finish(e)
	mt.Record = j.rec
	j.mu.Unlock()
	replaceFile(filepath.Join(dir, metaFile), wire.MustMarshal(mt))
}

// remember keeps an ended job for those who wait for it.
func (m *Manager) remember(r JobRecord) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.rememberLocked(r)
}
