package proc

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/unum-os/unum/internal/clock"
	"github.com/unum-os/unum/internal/errs"
	"github.com/unum-os/unum/internal/ids"
	"github.com/unum-os/unum/internal/proc/jobapi"
	"github.com/unum-os/unum/internal/proc/shim"
)

// startTimeout bounds the time from launch to the program's exec: a working
// directory on a silent file server must not hold the caller for ever.
const startTimeout = 20 * time.Second

// maxEarly bounds the signals that wait for the shim to have its spec.
const maxEarly = 64

// codeTimeout is the exit code of a job whose time was up, as timeout(1) has it.
const codeTimeout = 124

// killAfter is how long a job whose time is up has between TERM and KILL.
const killAfter = 2 * time.Second

// job is one job on the node that executes it.
type job struct {
	m    *Manager
	l    launch
	home ids.Node
	slot slotKey
	over chan struct{} // closed when the record is final

	mu      sync.Mutex // guards what follows
	rec     JobRecord
	link    *net.UnixConn // to the shim; nil for an adopted job, and until the shim has its spec
	early   []int         // signals that came before link
	proc    *os.Process   // the shim; nil before its start
	adopted *meta         // what is known of an adopted job; nil for others
	program int           // pid of the program, as the shim sees it
	cg      *cgroup
	lease   clock.Instant // end of an attached job's
	until   clock.Instant // when a detached job's time is up; 0: never
	why     *ending       // set by the one who kills it first
}

// serveJob runs one job for the home at the other end.
func (m *Manager) serveJob(ctx context.Context, from ids.Node, conn net.Conn) {
	defer conn.Close()
	t := &talk{Conn: conn}
	conn.SetReadDeadline(time.Now().Add(rendezvous))
	var first toNode
	if err := t.recv(&first); err != nil || first.Launch == nil {
		return
	}
	conn.SetReadDeadline(time.Time{})
	l := *first.Launch
	if len(l.Program.Argv) == 0 {
		t.send(toHome{Refused: refuse(errs.E(errs.Invalid, "", "", "no command"))})
		return
	}
	j := &job{m: m, l: l, home: from, slot: slotKey{from, l.Job, l.Incarnation}, over: make(chan struct{}), cg: &cgroup{}}
	j.rec = JobRecord{Job: l.Job, Incarnation: l.Incarnation, Home: from, Node: m.cfg.Self, UID: l.UID,
		Argv: l.Program.Argv, Cwd: l.Program.Cwd, Detached: l.Detach, Name: l.Name, Receipt: l.Receipt, Start: m.cfg.Clock.Wall().UnixNano()}
	if m.cfg.Accept != nil && !l.Pinned {
		if err := m.cfg.Accept(Demand{UID: l.UID, Argv: l.Program.Argv, Cwd: l.Program.Cwd}); err != nil {
			t.send(toHome{Refused: refuse(err)})
			return
		}
	}
	base, leave, err := m.enter(j)
	if err != nil {
		t.send(toHome{Refused: refuse(err)})
		return
	}
	if l.Detach {
		// It belongs to the manager, not to this connection.
		res := make(chan *ending, 1)
		go func() {
			defer leave()
			j.runDetached(base, res)
		}()
		if e := <-res; e != nil {
			t.send(toHome{End: e})
		} else {
			t.send(toHome{Started: true})
		}
		awaitClose(conn)
		return
	}
	defer leave()
	stop := context.AfterFunc(base, func() { conn.Close() })
	defer stop()
	j.runAttached(t)
}

// awaitClose waits, not for ever, until the peer has read and closed.
func awaitClose(conn net.Conn) {
	conn.SetReadDeadline(time.Now().Add(sendTimeout))
	io.Copy(io.Discard, conn)
}

// runAttached runs the job to its end and tells the home how it ended. The
// home's silence, or the end of t, kills it.
func (j *job) runAttached(t *talk) {
	s := j.m.slot(j.slot)
	defer j.m.dropSlot(j.slot, s)
	lease := clock.Now().Add(leaseTerm)
	io, err := j.makeIO()
	if err != nil {
		t.send(toHome{End: j.notStarted(err.Error(), jobapi.CodeFailed)})
		awaitClose(t.Conn)
		return
	}
	defer io.close()
	j.mu.Lock()
	j.lease = lease
	j.mu.Unlock()
	// The lease is held, and the home heard, from here on: a start may take long.
	var wg sync.WaitGroup // everything below ends with the job
	finished := make(chan struct{})
	wg.Add(2)
	go func() {
		defer wg.Done()
		j.holdLease(t, io, finished)
	}()
	go func() {
		defer wg.Done()
		for {
			var msg toNode
			if err := t.recv(&msg); err != nil {
				j.kill(&ending{State: Killed, Signal: int(unix.SIGKILL), Text: "its caller went away"})
				io.abort() // what is still in flight has nobody to go to
				return
			}
			j.obey(msg, io)
		}
	}()

	if e := j.start(io, lease, nil); e != nil {
		close(finished)
		t.send(toHome{End: e})
		t.SetReadDeadline(time.Now().Add(sendTimeout)) // it reads the end and closes
		wg.Wait()
		return
	}
	io.release()
	j.m.cfg.Registry.Put(j.record())
	t.send(toHome{Started: true})
	dead := make(chan struct{})
	outputs := io.serve(t, s, dead, &wg)

	e := j.await(j.l.Timeout)
	close(dead)
	// Everything written has to reach the home, however slowly it reads: the
	// streams end by themselves, or with the home.
	<-outputs
	close(finished)
	t.send(toHome{End: e})
	t.SetReadDeadline(time.Now().Add(sendTimeout)) // it reads the end and closes
	wg.Wait()
}

// holdLease asks the home for more time until finished, and ends the job when
// none came.
func (j *job) holdLease(t *talk, io *jobIO, finished <-chan struct{}) {
	tick := time.NewTicker(leaseBeat)
	defer tick.Stop()
	for {
		now := clock.Now()
		j.mu.Lock()
		over := now >= j.lease
		j.mu.Unlock()
		if over || t.send(toHome{Time: int64(now)}) != nil {
			j.kill(&ending{State: Killed, Signal: int(unix.SIGKILL), Text: fmt.Sprintf("its home was silent for %v", leaseTerm)})
			io.abort()
			t.Conn.Close()
			return
		}
		select {
		case <-tick.C:
		case <-finished:
			return
		}
	}
}

// deadline is the end of a lease as the shim, which reads the machine's clock,
// understands it; 0 is none.
func deadline(lease clock.Instant) int64 {
	if lease == 0 {
		return 0
	}
	return int64(clock.Machine(lease))
}

// obey does what a message of the home says.
func (j *job) obey(msg toNode, io *jobIO) {
	switch {
	case msg.Echo != 0:
		now, until := clock.Now(), clock.Instant(msg.Echo).Add(leaseTerm)
		if clock.Instant(msg.Echo) > now {
			return // not a time this clock has shown
		}
		j.mu.Lock()
		j.lease = max(j.lease, until)
		j.mu.Unlock()
		j.tell(shim.ToShim{Deadline: deadline(until)})
	case msg.Signal != 0:
		j.signal(msg.Signal)
	case msg.Window != nil:
		io.resize(msg.Window)
	case msg.Gone != 0:
		io.readerGone(int(msg.Gone))
	}
}

// runDetached runs the job to its end; res hears nil when it has started, else
// why not.
func (j *job) runDetached(ctx context.Context, res chan<- *ending) {
	dir := j.m.jobDir(j.l.Job)
	io, d, err := j.makeFiles(dir)
	if err != nil {
		res <- j.notStarted(err.Error(), jobapi.CodeFailed)
		return
	}
	defer d.Close()
	defer io.close()
	if e := j.start(io, 0, d); e != nil {
		os.RemoveAll(dir)
		res <- e
		return
	}
	io.release()
	if j.l.Timeout > 0 {
		j.mu.Lock()
		j.until = clock.Now().Add(time.Duration(j.l.Timeout))
		j.mu.Unlock()
	}
	j.note(dir)
	j.m.cfg.Registry.Put(j.record())
	res <- nil
	done := make(chan struct{})
	go func() {
		defer close(done)
		if j.await(j.l.Timeout) != nil {
			if err := writeMeta(dir, j); err != nil {
				j.m.cfg.Log.Warn("the end of a job cannot be noted in its directory", "job", j.l.Job, "err", err)
			}
		}
	}()
	select {
	case <-done:
	case <-ctx.Done(): // the daemon ends, the job does not
		j.detachFrom()
		<-done
	}
}

// start starts the shim and through it the program. It returns nil, or how the
// attempt ended; nothing is left running then. lease 0 means none.
func (j *job) start(io *jobIO, lease clock.Instant, dir *os.File) *ending {
	began := time.Now()
	v, err := j.m.vessel()
	if err != nil {
		return j.notStarted("cannot start the shim: "+err.Error(), jobapi.CodeFailed)
	}
	spec := shim.Spec{Program: j.l.Program, UID: j.l.UID, GID: j.l.GID, Groups: j.l.Groups, Deadline: deadline(lease)}
	spec.Program.Env = j.environment()
	files := io.child[:]
	if dir != nil {
		files = append(files[:3:3], dir)
	}
	j.mu.Lock()
	j.proc, j.cg = v.proc, v.cg
	gone := j.why
	j.mu.Unlock()
	if gone != nil {
		v.proc.Kill()
	}
	if dir != nil {
		// A daemon that is killed from here on leaves a job that the next one finds;
		// a shim that has no spec yet ends with its link.
		j.note(dir.Name())
	}
	var from shim.FromShim
	v.link.SetDeadline(time.Now().Add(startTimeout))
	err = shim.Give(v.link, &spec, files)
	j.connect(v.link)
	if err == nil {
		err = shim.Read(v.link, &from)
	}
	v.link.SetDeadline(time.Time{})
	switch {
	case err == nil && from.Started != 0:
		j.m.count.starts.Observe(time.Since(began).Seconds())
		j.mu.Lock()
		j.rec.State, j.program = Running, from.Started
		j.mu.Unlock()
		return nil
	case err == nil && from.Failed != nil:
		j.reap()
		text, code := j.sentence(from.Failed)
		return j.notStarted(text, code)
	}
	v.proc.Kill()
	j.reap()
	j.mu.Lock()
	why := j.why
	j.mu.Unlock()
	if why != nil {
		return why
	}
	return j.notStarted(fmt.Sprintf("the program could not be started on node %v: %v", j.m.cfg.Self, err), jobapi.CodeFailed)
}

// note leaves in the job's directory what the next daemon must know.
func (j *job) note(dir string) {
	if err := writeMeta(dir, j); err != nil {
		j.m.cfg.Log.Warn("a restart of the daemon will not find this job again", "job", j.l.Job, "err", err)
	}
}

// connect opens the link to signals and renewals, now that the spec has gone over
// it, and sends what came before.
func (j *job) connect(link *net.UnixConn) {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.link = link
	if j.lease != 0 {
		shim.Write(link, shim.ToShim{Deadline: deadline(j.lease)}) // a broken link shows in the answer to the spec
	}
	for _, sig := range j.early {
		shim.Write(link, shim.ToShim{Signal: sig})
	}
	j.early = nil
}

// environment is the caller's, without what is true on its node only, and with
// the job's own names.
func (j *job) environment() [][]byte {
	drop := []string{"UNUM_JOB", "UNUM_NODE", "UNUM_SOCKET"}
	if j.home != j.m.cfg.Self {
		// Sockets and devices of the home; a display with a host name in it is
		// true anywhere.
		drop = append(drop, "SSH_AUTH_SOCK", "SSH_TTY", "TMUX", "STY", "DBUS_SESSION_BUS_ADDRESS", "WAYLAND_DISPLAY")
	}
	var out [][]byte
	for _, e := range j.l.Program.Env {
		k, v, _ := strings.Cut(string(e), "=")
		skip := j.home != j.m.cfg.Self && k == "DISPLAY" && (strings.HasPrefix(v, ":") || strings.HasPrefix(v, "unix:"))
		for _, d := range drop {
			skip = skip || k == d
		}
		if !skip {
			out = append(out, e)
		}
	}
	out = append(out, fmt.Appendf(nil, "UNUM_JOB=%d", j.l.Job), fmt.Appendf(nil, "UNUM_NODE=%v", j.m.cfg.Self))
	if j.m.cfg.Socket != "" {
		out = append(out, []byte("UNUM_SOCKET="+j.m.cfg.Socket))
	}
	return out
}

// sentence says why a program was not started, in the words of a shell where a
// shell has words for it.
func (j *job) sentence(f *shim.Failed) (string, int) {
	en := syscall.Errno(f.Errno)
	name := string(j.l.Program.Argv[0])
	switch f.Step {
	case shim.StepChdir:
		return fmt.Sprintf("cannot enter the working directory %s on node %v: %s", j.l.Program.Cwd, j.m.cfg.Self, Errno(en)), jobapi.CodeFailed
	case shim.StepExec:
		switch {
		case en == unix.ENOENT && !strings.Contains(name, "/"):
			return name + ": command not found", jobapi.CodeNotFound
		case en == unix.ENOENT:
			return name + ": No such file or directory", jobapi.CodeNotFound
		case f.IsDir:
			return name + ": Is a directory", jobapi.CodeNotExecutable
		}
		return name + ": " + Errno(en), jobapi.CodeNotExecutable
	case shim.StepIdentity:
		return fmt.Sprintf("cannot become user %d on node %v: %s", j.l.UID, j.m.cfg.Self, Errno(en)), jobapi.CodeFailed
	case shim.StepTerminal:
		return fmt.Sprintf("cannot give the command its terminal on node %v: %s", j.m.cfg.Self, Errno(en)), jobapi.CodeFailed
	}
	return fmt.Sprintf("cannot prepare the command on node %v: %s", j.m.cfg.Self, f.Text), jobapi.CodeFailed
}

// Errno returns the words the C library has for en, with a capital as there.
func Errno(en syscall.Errno) string {
	s := en.Error()
	return strings.ToUpper(s[:1]) + s[1:]
}

func (j *job) notStarted(text string, code int) *ending {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.m.count.failed.Add(1)
	j.rec.State, j.rec.Code, j.rec.End, j.rec.Text = Exited, code, j.m.cfg.Clock.Wall().UnixNano(), text
	select {
	case <-j.over:
	default:
		close(j.over)
	}
	return &ending{Code: code, Text: text}
}

// await waits for the program's end and for the end of its namespace, and makes
// the record final. limit is in nanoseconds, 0 for none.
func (j *job) await(limit int64) *ending {
	if limit > 0 {
		t := time.AfterFunc(time.Duration(limit), func() { j.expire(time.Duration(limit)) })
		defer t.Stop()
	}
	var m shim.FromShim
	err := shim.Read(j.link, &m)
	if err != nil && j.record().Detached && errors.Is(err, os.ErrDeadlineExceeded) {
		return nil // the daemon ends before the job
	}
	j.reap()
	unsafe := j.secure()
	j.mu.Lock()
	defer j.mu.Unlock()
	e := j.why
	switch {
	case err == nil && m.Exited != nil:
		if e == nil || e.Code != codeTimeout {
			e = &ending{State: Exited, Code: m.Exited.Code, Signal: m.Exited.Signal}
		}
		j.rec.CPU = m.Exited.CPU
		if unsafe != nil {
			e = &ending{State: Exited, Code: jobapi.CodeFailed, Text: fmt.Sprintf("the command ended with code %d on node %v, but what it wrote may be lost: %v", e.Code, j.m.cfg.Self, unsafe)}
		}
	case e == nil:
		// The shim ended without a word: its lease was over, or someone killed it.
		e = &ending{State: Killed, Signal: int(unix.SIGKILL), Text: fmt.Sprintf("the job was killed on node %v: its home was silent for %v", j.m.cfg.Self, leaseTerm)}
		if j.rec.Detached {
			e.Text = fmt.Sprintf("the job was killed on node %v", j.m.cfg.Self)
		}
	}
	j.finish(e)
	return e
}

// secure makes safe what the job wrote, if its end is told to another node.
func (j *job) secure() error {
	if j.m.cfg.Settle == nil || j.home == j.m.cfg.Self && !j.record().Detached {
		return nil
	}
	ctx, cancel := context.WithTimeout(context.Background(), settleTimeout)
	defer cancel()
	return j.m.cfg.Settle(ctx)
}

// finish makes the record final and tells it. j.mu is held.
func (j *job) finish(e *ending) {
	j.rec.State, j.rec.Code, j.rec.Signal, j.rec.Text, j.rec.End = e.State, e.Code, e.Signal, e.Text, j.m.cfg.Clock.Wall().UnixNano()
	close(j.over)
	j.m.count.ended(e.State)
	r := j.rec
	j.m.cfg.Registry.Put(r)
}

// reap waits for the shim, and with it for its namespace, and removes what the
// job had here.
func (j *job) reap() {
	if _, err := j.proc.Wait(); err != nil {
		j.m.cfg.Log.Warn("shim cannot be waited for", "job", j.l.Job, "err", err)
	}
	j.mu.Lock()
	if cpu := j.cg.cpu(); cpu > 0 && j.rec.CPU == 0 {
		j.rec.CPU = int64(cpu)
	}
	j.mu.Unlock()
	if err := j.cg.remove(); err != nil {
		j.m.cfg.Log.Warn("control group cannot be removed", "job", j.l.Job, "err", err)
	}
	j.link.Close()
}

// kill ends the job and everything in it at once. The first reason given stays.
func (j *job) kill(why *ending) {
	j.mu.Lock()
	defer j.mu.Unlock()
	if j.why == nil {
		j.why = why
	}
	if j.proc != nil {
		j.proc.Kill() // process 1: the namespace goes with it
	}
}

// expire is what happens when the job's time is up: it may end in good order for
// two seconds, as under timeout -k 2.
func (j *job) expire(limit time.Duration) {
	j.mu.Lock()
	if j.why == nil {
		j.why = &ending{State: Killed, Code: codeTimeout, Text: fmt.Sprintf("the time limit of %v is over", limit)}
	}
	j.mu.Unlock()
	j.signal(int(unix.SIGTERM))
	j.signal(int(unix.SIGCONT)) // a stopped one hears it too
	t := time.NewTimer(killAfter)
	defer t.Stop()
	select {
	case <-j.over:
	case <-t.C:
		j.kill(nil)
	}
}

// signal sends sig to the program's process group.
func (j *job) signal(sig int) error {
	if j.adopted != nil {
		return j.adopted.signal(sig)
	}
	return j.tell(shim.ToShim{Signal: sig})
}

func (j *job) tell(m shim.ToShim) error {
	j.mu.Lock()
	defer j.mu.Unlock()
	if j.link == nil {
		if m.Signal != 0 && len(j.early) < maxEarly {
			j.early = append(j.early, m.Signal)
		}
		return nil
	}
	j.link.SetWriteDeadline(time.Now().Add(sendTimeout))
	if err := shim.Write(j.link, m); err != nil {
		return errs.E(errs.NotFound, "", "", "job %d has ended", j.l.Job)
	}
	return nil
}

// detachFrom lets go of a detached job at the daemon's end.
func (j *job) detachFrom() { j.link.SetReadDeadline(time.Unix(1, 0)) }

func (j *job) record() JobRecord {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.rec
}

func (j *job) info() JobInfo {
	j.mu.Lock()
	i, cg, p := JobInfo{Record: j.rec}, j.cg, j.proc
	j.mu.Unlock()
	i.CPU = i.Record.CPU
	if p != nil && !i.Record.State.Finished() {
		i.CPU, i.RSS = int64(cg.cpu()), cg.rss(p.Pid)
	}
	return i
}

// outFile and errFile hold the output of a detached job, in its directory.
const (
	outFile  = "out"
	errFile  = "err"
	metaFile = "job"
)

// makeFiles makes the directory of a detached job and its output files.
func (j *job) makeFiles(dir string) (*jobIO, *os.File, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, nil, err
	}
	io := &jobIO{}
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		return nil, nil, err
	}
	io.child[0] = null
	for i, name := range []string{outFile, errFile} {
		if io.child[i+1], err = os.OpenFile(filepath.Join(dir, name), os.O_CREATE|os.O_WRONLY|os.O_APPEND|os.O_TRUNC, 0o600); err != nil {
			io.close()
			return nil, nil, err
		}
	}
	j.l.Program.Stdio = [3]uint8{jobapi.Null, jobapi.Pipe, jobapi.Pipe}
	d, err := os.Open(dir)
	if err != nil {
		io.close()
		return nil, nil, err
	}
	return io, d, nil
}
