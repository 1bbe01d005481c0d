package sim

import (
	"log/slog"
	"math/rand/v2"
	"time"

	"github.com/cockroachdb/pebble/v2"
	"github.com/cockroachdb/pebble/v2/vfs"
	pb "go.etcd.io/raft/v3/raftpb"

	"github.com/unum-os/unum/internal/group"
	"github.com/unum-os/unum/internal/ids"
)

// node is one machine: a disk, and while it is up a host on it.
type node struct {
	w       *world
	id      ids.Node
	witness bool       // it votes and keeps the log only
	rest    *vfs.MemFS // the disk while the node is down
	life    int

	up          bool
	disk        *disk
	h           *group.Host
	st          *group.Stepper
	rate        float64              // length of its ticks
	slow        float64              // factor on the time its steps wait
	pausedUntil time.Time            // it is stopped until then
	back        time.Duration        // after a power failure it comes up again
	armedSend   int                  // messages until one is a power failure; 0: none
	due         group.Due            // scheduled
	terms       map[ids.Group]uint64 // last seen of each group, in any life
	courted     bool                 // two seek its vote: it is struck when it gives it

	had             map[ids.Group]bool // it was a member
	gone            bool               // for good: it was taken out of all groups
	member, leaving bool               // for package quorum
	seen            time.Time          // last, by some leader
}

func (n *node) isWitness() bool { return n != nil && n.witness }

func (n *node) group(g ids.Group) *group.Group { return n.h.Group(g) }

// boot starts a life on the disk; prepare makes replicas in the first one.
func (n *node) boot(prepare func(h *group.Host) error) {
	w := n.w
	n.life++
	n.disk = newDisk(n.rest, rand.New(rand.NewPCG(w.rng.Uint64(), 0)))
	n.slow, n.pausedUntil, n.armedSend, n.due = 1, time.Time{}, 0, group.Due{}
	h, err := group.New(group.Config{
		Self: n.id, Dir: dir, Transport: port{n, n.life}, LogBytes: w.logBytes, FS: n.disk,
		Witness: n.witness, IsWitness: func(id ids.Node) bool { return w.node(id).isWitness() },
		Rand: &source{w.rng}, Log: slog.New(slog.DiscardHandler),
		Hooks: &group.Hooks{
			Fault:     w.cfg.Plant.group(),
			Wrote:     func(g ids.Group, ents []*pb.Entry) { w.check.wrote(n, g, ents) },
			Committed: func(g ids.Group, term uint64, ents []*pb.Entry) { w.check.committed(n, g, term, ents) },
		},
	})
	if err != nil {
		w.violated("%v does not come up: %v", n.id, err)
		return
	}
	n.h = h
	if prepare != nil {
		err = prepare(h)
	}
	for _, g := range h.Groups() {
		if err != nil {
			break
		}
		var m group.Machine
		switch {
		case n.witness: // it has none
		case g == recordGroup:
			m = &recorder{n: n}
		default:
			m = &registers{n}
		}
		var gr *group.Group
		if gr, err = h.Open(g, m); err == nil {
			gr.Watch(func(st group.Status) { w.check.status(n, gr, st) })
		}
	}
	if err == nil {
		n.st, err = h.Stepper()
	}
	if err != nil {
		w.violated("%v does not come up: %v", n.id, err)
		return
	}
	n.up = true
	w.tracef("%v is up", n.id)
	n.plan()
	n.scheduleTick()
}

// source gives the host its random bytes.
type source struct{ rng *rand.Rand }

func (s *source) Read(b []byte) (int, error) {
	for i := range b {
		b[i] = byte(s.rng.Uint32())
	}
	return len(b), nil
}

// later runs f in this life, unless it ends before; a stopped node does it when
// it goes on.
func (n *node) later(d time.Duration, f func()) {
	life := n.life
	var run func()
	run = func() {
		if n.life != life || !n.up || n.putOff(run) {
			return
		}
		f()
	}
	n.w.at(d, run)
}

// putOff puts f off if the node is stopped.
func (n *node) putOff(f func()) bool {
	if d := n.pausedUntil.Sub(n.w.now); d > 0 {
		n.w.at(d, f)
		return true
	}
	return false
}

func (n *node) scheduleTick() {
	d := float64(group.DefaultTick) * n.rate * (1 + n.w.jitter*(n.w.rng.Float64()-0.5))
	n.later(time.Duration(d), func() {
		n.step("tick", n.st.Tick)
		n.scheduleTick()
	})
}

// plan schedules what the host has to do.
func (n *node) plan() {
	if !n.up {
		return
	}
	d := n.st.Due()
	one := func(due bool, scheduled *bool, what string, f func() error, wait time.Duration) {
		if !due || *scheduled {
			return
		}
		*scheduled = true
		x := n.w.rng.ExpFloat64()
		n.later(time.Duration(float64(wait)*x*n.slow), func() {
			*scheduled = false
			n.step(what, f)
		})
	}
	one(d.Work, &n.due.Work, "work", n.st.Work, 300*time.Microsecond)
	one(d.Apply, &n.due.Apply, "apply", n.st.Apply, 500*time.Microsecond)
	one(d.Trim, &n.due.Trim, "trim", n.st.Trim, 5*time.Millisecond)
	one(d.Ship, &n.due.Ship, "ship", n.st.Ship, time.Millisecond)
}

// step does one step of the host.
func (n *node) step(what string, f func() error) {
	if !n.up {
		return
	}
	n.w.tracef("%v %s", n.id, what)
	err := f()
	if n.dying() {
		if n.disk.atSync {
			n.w.stats.CrashesSyncing++
		}
		n.die("in the middle")
		return
	}
	if err != nil {
		n.w.violated("%v stopped: %v", n.id, err)
		return
	}
	n.w.poll(n)
	n.plan()
}

func (n *node) shipped(s *stream, err error) {
	n.step("shipped", func() error { n.st.Shipped(s.sender, err); return nil })
}

func (n *node) dying() bool { return n.disk.dead.Load() }

// loseMemory is the moment of a power failure: the disk keeps what was synced,
// and perhaps a part of the rest.
func (n *node) loseMemory() {
	image := n.disk.mem.CrashClone(vfs.CrashCloneCfg{})
	err := n.h.State().LogData(nil, pebble.Sync)
	if err == nil {
		err = tear(image, n.disk.mem.CrashClone(vfs.CrashCloneCfg{}), n.disk.rng)
	}
	if err != nil {
		panic(err) // the disk in memory has no reason to
	}
	n.disk.image = image
	n.disk.dead.Store(true)
}

// die ends the life; the disk is what loseMemory left.
func (n *node) die(why string) {
	w := n.w
	w.tracef("%v loses power %s", n.id, why)
	n.up = false
	n.rest = n.disk.image
	n.life++
	w.net.dropStreams(n)
	w.lost(n)
	n.release()
	life := n.life
	w.at(n.back, func() {
		if !n.up && !n.gone && n.life == life {
			n.boot(nil)
		}
	})
}

// release frees what a life holds in memory.
func (n *node) release() {
	if n.st != nil {
		_ = n.st.Stop() // it is dead
	}
	if n.h != nil {
		_ = n.h.Close() // into a disk that nobody reads
	}
	n.h, n.st = nil, nil
}

// crash is a power failure now.
func (n *node) crash() {
	if n.up {
		n.w.stats.Crashes++
		n.loseMemory()
		n.die("now")
	}
}
