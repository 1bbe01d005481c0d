package proc

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"sort"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/unum-os/unum/internal/clock"
	"github.com/unum-os/unum/internal/errs"
	"github.com/unum-os/unum/internal/ids"
)

// ManagerConfig is what NewManager needs.
type ManagerConfig struct {
	Self     ids.Node
	RPC      RPC
	Registry Registry
	Log      *slog.Logger
	// Dir is the node's data directory; detached jobs keep their output in
	// Dir/jobs/ID.
	Dir string
	// Exe is the light binary, whose shim starts programs. It is opened once by
	// NewManager: replacing the file later changes nothing for this daemon.
	Exe string
	// Cgroup is the path of the node's control group below each hierarchy's root,
	// as in "unum/n2".
	Cgroup string
	// Accept decides by this node's own fresh numbers whether a job may start
	// here: nil, or an error of class Busy. Nil accepts all.
	Accept func(Demand) error
	// Socket, when set, becomes UNUM_SOCKET of the programs started here.
	Socket string
	// Settle makes safe what programs here have written to the tree. It comes
	// before another node is told that a command has ended well or ill: whoever
	// knows the exit code can rely on the files. Nil: there is no tree.
	Settle func(ctx context.Context) error
	// Clock gives the times of jobs; nil: the machine's.
	Clock clock.Clock
}

// maxJobs bounds the jobs of one node: each costs a shim and some ten
// descriptors.
const maxJobs = 1500

// keepEnded is how many ended jobs a node remembers for those who wait, beyond
// what the record keeps.
const keepEnded = 1000

// rendezvous is how long an input or output stream waits for its job, and the
// first message of a stream for its sender.
const rendezvous = 10 * time.Second

// Manager is the node manager.
type Manager struct {
	cfg   ManagerConfig
	count *counts
	exe   int // O_PATH descriptor of the light binary
	cg    *cgroups

	ready chan *vessel // shims started ahead of their jobs

	mu    sync.Mutex // guards what follows
	jobs  map[ids.Job]*job
	ended map[ids.Job]JobRecord
	last  []ids.Job // the keys of ended, oldest first
	slots map[slotKey]*slot
	base  context.Context // of Run; nil before and after
	wg    sync.WaitGroup  // jobs; Add under mu, before Run has base taken away
}

// slotKey names a job's streams by who opened them too: a home cannot speak for
// another's job.
type slotKey struct {
	from ids.Node
	job  ids.Job
	inc  ids.Incarnation
}

// slot is where a job and its streams meet; whichever comes first makes it.
type slot struct{ conns [numStreams]chan net.Conn }

// NewManager returns a manager and registers its handlers; Run starts it.
func NewManager(cfg ManagerConfig) (*Manager, error) {
	if cfg.Clock == nil {
		cfg.Clock = clock.Real
	}
	fd, err := unix.Open(cfg.Exe, unix.O_PATH|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, errs.Wrap(err, "open the program that starts jobs", cfg.Exe)
	}
	// High, out of the way of the low numbers a child is given.
	high, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 64)
	unix.Close(fd)
	if err != nil {
		return nil, errs.Wrap(err, "open the program that starts jobs", cfg.Exe)
	}
	m := &Manager{cfg: cfg, count: newCounts(), exe: high, cg: &cgroups{}, ready: make(chan *vessel), jobs: map[ids.Job]*job{}, ended: map[ids.Job]JobRecord{}, slots: map[slotKey]*slot{}}
	cfg.RPC.HandleStream(streamJob, m.serveJob)
	cfg.RPC.HandleStream(streamIO, m.serveIO)
	cfg.RPC.HandleStream(streamLogs, m.serveLogs)
	cfg.RPC.Handle(methodList, m.handleList)
	cfg.RPC.Handle(methodKill, m.handleKill)
	cfg.RPC.Handle(methodWait, m.handleWait)
	return m, nil
}

// Run adopts the detached jobs of an earlier life, then serves until ctx ends.
// It returns when attached jobs have been killed and everything it started has
// ended; detached jobs run on.
func (m *Manager) Run(ctx context.Context) error {
	defer unix.Close(m.exe)
	if m.cfg.Cgroup != "" {
		cg, err := openCgroups(m.cfg.Cgroup)
		if err != nil {
			m.cfg.Log.Warn("some control groups cannot be used", "err", err)
		}
		m.cg = cg
		defer cg.close()
	}
	if err := os.MkdirAll(m.jobsDir(), 0o711); err != nil {
		return errs.Wrap(err, "make job directory", m.jobsDir())
	}
	m.adoptAll(ctx)
	m.cg.sweep()
	began := m.cfg.Clock.Wall().UnixNano()
	m.mu.Lock()
	m.base = ctx
	m.mu.Unlock()
	var ahead sync.WaitGroup
	ahead.Add(1)
	go func() {
		defer ahead.Done()
		m.orphans(ctx, began)
	}()
	for range startAhead {
		ahead.Add(1)
		go func() {
			defer ahead.Done()
			m.startAhead(ctx)
		}()
	}
	<-ctx.Done()
	m.mu.Lock()
	m.base = nil
	m.mu.Unlock()
	m.wg.Wait()
	ahead.Wait()
	return nil
}

func (m *Manager) jobsDir() string { return filepath.Join(m.cfg.Dir, "jobs") }

func (m *Manager) jobDir(id ids.Job) string {
	return filepath.Join(m.jobsDir(), fmt.Sprint(uint64(id)))
}

// NodeDead tells the record that the unfinished jobs of n are lost. To say so
// again changes nothing; a node that was only cut off says later how they ended.
func (m *Manager) NodeDead(ctx context.Context, n ids.Node) error {
	rs, err := m.cfg.Registry.List(ctx)
	if err != nil {
		return errs.Wrap(err, "mark jobs lost", n.String())
	}
	for _, r := range rs {
		if r.Node == n && !r.State.Finished() {
			r.State, r.End = Lost, m.cfg.Clock.Wall().UnixNano()
			r.Text = fmt.Sprintf("node %v died", n)
			m.cfg.Registry.Put(r)
		}
	}
	return nil
}

// Jobs returns the jobs running here, by id.
func (m *Manager) Jobs() []JobInfo {
	m.mu.Lock()
	js := make([]*job, 0, len(m.jobs))
	for _, j := range m.jobs {
		js = append(js, j)
	}
	m.mu.Unlock()
	out := make([]JobInfo, 0, len(js))
	for _, j := range js {
		out = append(out, j.info())
	}
	sort.Slice(out, func(a, b int) bool { return out[a].Record.Job < out[b].Record.Job })
	return out
}

// enter makes room for a job. The function it returns gives it back.
func (m *Manager) enter(j *job) (ctx context.Context, leave func(), err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.base == nil {
		return nil, nil, errs.E(errs.Unavailable, "", "", "node %v is not ready for jobs", m.cfg.Self)
	}
	leave, err = m.admitLocked(j)
	return m.base, leave, err
}

// admitLocked is enter, while there is no base yet too.
func (m *Manager) admitLocked(j *job) (leave func(), err error) {
	switch {
	case len(m.jobs) >= maxJobs:
		return nil, errs.E(errs.Busy, "", "", "node %v runs %d jobs, its limit", m.cfg.Self, maxJobs)
	case m.jobs[j.rec.Job] != nil:
		return nil, errs.E(errs.Exists, "", "", "job %d already runs on %v", j.rec.Job, m.cfg.Self)
	}
	m.jobs[j.rec.Job] = j
	m.wg.Add(1)
	return func() {
		r := j.record()
		m.mu.Lock()
		delete(m.jobs, r.Job)
		if r.State.Finished() {
			m.rememberLocked(r)
		}
		m.mu.Unlock()
		m.wg.Done()
	}, nil
}

func (m *Manager) rememberLocked(r JobRecord) {
	m.ended[r.Job] = r
	m.last = append(m.last, r.Job)
	if len(m.last) > keepEnded {
		delete(m.ended, m.last[0])
		m.last = m.last[1:]
	}
}

// find returns a running job, or what is remembered of an ended one.
func (m *Manager) find(id ids.Job) (*job, JobRecord, bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if j := m.jobs[id]; j != nil {
		return j, JobRecord{}, true
	}
	r, ok := m.ended[id]
	return nil, r, ok
}

func (m *Manager) slot(k slotKey) *slot {
	m.mu.Lock()
	defer m.mu.Unlock()
	s := m.slots[k]
	if s == nil {
		s = &slot{}
		for i := range s.conns {
			s.conns[i] = make(chan net.Conn, 1)
		}
		m.slots[k] = s
	}
	return s
}

// dropSlot ends the rendezvous; streams nobody took are closed.
func (m *Manager) dropSlot(k slotKey, s *slot) {
	m.mu.Lock()
	if m.slots[k] == s {
		delete(m.slots, k)
	}
	m.mu.Unlock()
	for _, c := range s.conns {
		select {
		case conn := <-c:
			conn.Close()
		default:
		}
	}
}

// handed is a stream's connection in the hands of a job: the handler it came to
// waits for its end.
type handed struct {
	net.Conn
	once sync.Once
	done chan struct{}
}

func (h *handed) Close() error {
	err := h.Conn.Close()
	h.once.Do(func() { close(h.done) })
	return err
}

func (h *handed) CloseWrite() error { closeWrite(h.Conn); return nil }

// serveIO takes an input or output stream to its job.
func (m *Manager) serveIO(ctx context.Context, from ids.Node, conn net.Conn) {
	t := &talk{Conn: conn}
	conn.SetReadDeadline(time.Now().Add(rendezvous))
	var hello ioHello
	if err := t.recv(&hello); err != nil || hello.Stream >= numStreams {
		conn.Close()
		return
	}
	conn.SetReadDeadline(time.Time{})
	k := slotKey{from, hello.Job, hello.Incarnation}
	s := m.slot(k)
	h := &handed{Conn: conn, done: make(chan struct{})}
	select {
	case s.conns[hello.Stream] <- h:
	default:
		conn.Close() // the same stream twice
		return
	}
	timer := time.NewTimer(rendezvous)
	defer timer.Stop()
	for {
		select {
		case <-h.done:
			return
		case <-ctx.Done():
			h.Close()
			return
		case <-timer.C:
			// No job took it: none came, or it was refused or over.
			if j, _, _ := m.find(hello.Job); j == nil {
				m.dropSlot(k, s)
			}
		}
	}
}

func (m *Manager) handleList(ctx context.Context, from ids.Node, req, data []byte) (any, []byte, error) {
	return listResp{Jobs: m.Jobs()}, nil, nil
}
