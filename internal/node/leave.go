package node

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/unum-os/unum/internal/disk"
	"github.com/unum-os/unum/internal/errs"
	"github.com/unum-os/unum/internal/identity"
	"github.com/unum-os/unum/internal/ids"
	"github.com/unum-os/unum/internal/record"
)

// errLeft ends a node that has left.
var errLeft = errors.New("this node leaves the cluster")

// lastLimit bounds what a leaving node does when its programs have ended, until it
// is told to the record what there is to tell.
const lastLimit = 20 * time.Second

// departing is the one leaving that is under way, whoever asked for it.
type departing struct {
	mu   sync.Mutex
	now  *departure // nil: none is
	said string
	news bell // rings when said has changed
}

// departure is one attempt.
type departure struct {
	waiters int
	over    bool // all who asked for it have given up: nobody joins it any more
	done    chan struct{}
	err     error // once done is closed
	cancel  context.CancelFunc
}

// join begins to leave, unless that has begun, and waits with the others. The last
// of them who gives up ends it.
func (d *departing) join(ctx context.Context, leave func(ctx context.Context, say func(string)) error, progress func(string)) error {
	d.mu.Lock()
	for d.now != nil && d.now.over { // it ends first
		a := d.now
		d.mu.Unlock()
		select {
		case <-a.done:
		case <-ctx.Done():
			return errs.E(errs.Interrupted, "leave the cluster", "", "interrupted before it began")
		}
		d.mu.Lock()
	}
	a := d.now
	if a == nil {
		lctx, cancel := context.WithCancel(context.WithoutCancel(ctx))
		a = &departure{done: make(chan struct{}), cancel: cancel}
		d.now, d.said = a, ""
		go func() {
			err := leave(lctx, d.say)
			d.mu.Lock()
			defer d.mu.Unlock()
			a.err, a.over = err, false
			if err != nil { // it may be tried again
				d.now = nil
			}
			cancel()
			close(a.done)
		}()
	}
	a.waiters++
	d.mu.Unlock()
	last := ""
	tell := func() {
		d.mu.Lock()
		said := d.said
		d.mu.Unlock()
		if said != last {
			progress(said)
			last = said
		}
	}
	for {
		next := d.news.wait() // before looking
		tell()
		select {
		case <-next:
			continue
		case <-a.done:
			tell()
			return a.err
		case <-ctx.Done():
		}
		d.mu.Lock()
		if a.waiters--; a.waiters > 0 {
			d.mu.Unlock()
			return errs.E(errs.Interrupted, "leave the cluster", "", "interrupted; somebody else has it leave all the same")
		}
		a.over = true
		a.cancel()
		d.mu.Unlock()
		<-a.done // it says how it ended: it may have been too late
		return a.err
	}
}

// underway reports whether one is, or has come to its end and the node stops.
func (d *departing) underway() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.now != nil
}

func (d *departing) say(text string) {
	d.mu.Lock()
	d.said = text
	d.mu.Unlock()
	d.news.ring()
}

// Leave takes this node out of the cluster in good order: it takes no more
// commands, waits until its own have ended, its votes are others' and the others
// have all that it has; then it ships what it holds, stops, and its directory is no
// node's any more. progress is told what is waited for, as often as that changes.
// It returns when the node begins to stop; Run says whether it has left. If all who
// asked for it give up before, the node stays, but for Leaving if it may not.
// Errors: Invalid for the last storing node.
func (n *Node) Leave(ctx context.Context, progress func(string)) error {
	return n.departing.join(ctx, n.leave, progress)
}

func (n *Node) leave(ctx context.Context, say func(string)) error {
	if err := n.setState(ctx, record.Leaving); err != nil {
		if ctx.Err() != nil { // it may have been done
			return n.stay(ctx, "to be heard")
		}
		if !errs.Has(err, errs.Unauthorized) {
			return err
		}
		// Nobody hears it. It may have left already, and been cut off before it had
		// forgotten: then the rest is done now.
		if was := n.askAtTheDoor(ctx); !errs.Has(was, errs.Stale) {
			return errors.Join(was, err)
		}
		say("it has left already: this node stops")
		n.gone.Store(true)
		n.end(errLeft)
		return nil
	}
	var due uint64
	for {
		why, err := n.holding(ctx, &due)
		switch {
		case err != nil && ctx.Err() == nil:
			why = "for an answer: " + firstLine(err)
		case err == nil && why == "":
			say("nothing is left to do: this node stops")
			n.goes.Store(true)
			n.end(errLeft)
			return nil
		}
		if ctx.Err() != nil {
			return n.stay(ctx, why)
		}
		say("waiting " + why)
		pause(ctx, 200*time.Millisecond)
	}
}

// stateLimit bounds the telling of the record that this node stays, or has left.
const stateLimit = 10 * time.Second

// stay takes back that this node leaves, after it has waited in vain.
func (n *Node) stay(ctx context.Context, why string) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), stateLimit)
	defer cancel()
	if err := n.setState(ctx, record.Active); err != nil {
		return errs.Wrap(err, "stay in the cluster", n.id.String())
	}
	n.unseated.Store(nil)
	return errs.E(errs.Interrupted, "leave the cluster", n.id.String(), "interrupted while waiting %s; it stays", why)
}

// Remove puts a node out of the cluster that will never come back: it is refused
// from now on, its votes go to others, and what it alone had is lost. Errors:
// NotFound; Busy if it is alive and force is not set; Invalid for the last
// storing node; Permission if who asks is no administrator.
func (n *Node) Remove(ctx context.Context, p ids.Node, force bool) error {
	m, ok := (*n.known.Load())[p]
	switch {
	case !ok:
		return errs.E(errs.NotFound, "remove node", p.String(), "there is no such node").WithRemedy("unum nodes")
	case p == n.id:
		return errs.E(errs.Invalid, "remove node", p.String(), "it is this node").WithRemedy("unum leave")
	case m.State.Belongs() && n.alive(p) && !force:
		return errs.E(errs.Busy, "remove node", p.String(), "it is alive").
			WithRemedy("unum leave, on %s; or --force, and it never comes back", m.Hostname)
	}
	for _, g := range n.groups() { // the change that takes its vote away needs the others' majority of all
		st, live := g.Status(), 0
		for _, v := range st.Voters {
			if v != p && n.alive(v) {
				live++
			}
		}
		if m.State.Belongs() && slices.Contains(st.Voters, p) && live*2 <= len(st.Voters) {
			return errs.E(errs.NoQuorum, "remove node", p.String(), "without it %d of %d voters of group %d are alive: too few to take its vote away", live, len(st.Voters), g.ID()).
				WithRemedy("start the others; or, of two nodes, unum down, then unum up --without %v", p)
		}
	}
	_, err := n.tell(ctx, record.Command{UpdateMember: &record.UpdateMember{Node: p, State: record.Removed}})
	return err
}

// askAtTheDoor asks, as a machine without a certificate, whether this node is a
// member; class Stale: it has left.
func (n *Node) askAtTheDoor(ctx context.Context) error {
	csr, err := identity.Load(n.cfg.FS, n.cfg.path(fileCSR))
	if err == nil {
		_, err = n.renewAtTheDoor(ctx, csr)
	}
	return err
}

// setState tells the record of this node's own state.
func (n *Node) setState(ctx context.Context, s record.State) error {
	_, err := n.record.do(ctx, record.Command{UpdateMember: &record.UpdateMember{Node: n.id, State: s}})
	return err
}

// holding says what keeps this node from leaving; "" when nothing does. due is
// where it notes how far the others must have come, the first time that the groups
// are without it.
func (n *Node) holding(ctx context.Context, due *uint64) (string, error) {
	if n.disk.Role == record.RoleClient {
		return "", nil
	}
	leaders, selves, err := n.configs(ctx)
	if err != nil {
		return "", err
	}
	for _, g := range leaders {
		if g.Joint || g.seats(n.id) {
			*due = 0
			n.unseated.Store(nil)
			return fmt.Sprintf("until others have its place in group %d", g.Group), nil
		}
	}
	if n.disk.Role != record.RoleStore {
		return "", nil
	}
	// From here on this node takes no blocks, and who is refused asks the voters that
	// are now. Its own replica may never hear of them.
	voters := leaders[ids.RootGroup].Voters
	n.unseated.Store(&voters)
	if jobs := n.manager.Jobs(); len(jobs) > 0 {
		var list []string
		for _, j := range jobs {
			list = append(list, fmt.Sprint(j.Record.Job))
		}
		return fmt.Sprintf("for %d commands that run here (unum kill ends one): %s", len(jobs), strings.Join(list[:min(len(list), 10)], " ")), nil
	}
	if *due == 0 {
		// What this node had taken and is named up to here, others have before it goes.
		// What a writer that was held up names later is on a majority of the voters that
		// were: docs/blocks.md says when that is not enough.
		*due = max(leaders[ids.RootGroup].Applied, n.root.Status().Applied)
	}
	if why := n.missing(leaders, selves, *due); why != "" {
		return why, nil
	}
	return "", n.venus.Settle(ctx)
}

// seats reports whether a node has a place in the group: a vote, or a replica.
func (g *GroupStatus) seats(p ids.Node) bool {
	return slices.Contains(g.Voters, p) || slices.Contains(g.Learners, p)
}

// settleSeat has a node that takes no blocks, or is marked as leaving while nobody
// has it leave, learn from the groups' leaders whether it has a place: that it stays
// may be decided long after it has given up saying so, and that others have its
// place while it was off. Who stays gets a replica at once, so a place says that
// too. Its own replica may never hear of any of it.
func (n *Node) settleSeat(ctx context.Context) {
	was := n.unseated.Load()
	if n.disk.Role != record.RoleStore || was == nil && (*n.known.Load())[n.id].State != record.Leaving || n.departing.underway() {
		return
	}
	leaders, _, err := n.configs(ctx)
	if err != nil {
		n.cfg.Log.Debug("it is not known whether this node has its place", "err", err)
		return
	}
	voters := leaders[ids.RootGroup].Voters
	now := &voters
	for _, g := range leaders {
		if g.seats(n.id) {
			now = nil
		}
	}
	n.unseated.CompareAndSwap(was, now) // a leaving that has begun meanwhile knows better
}

// missing says what the other voters lack of what this node has: the entries up to
// due, the blocks that those name, and the authority's key.
func (n *Node) missing(leaders map[ids.Group]GroupStatus, selves map[ids.Node]Self, due uint64) string {
	for _, v := range leaders[ids.RootGroup].Voters {
		if n.witness(v) {
			continue
		}
		s, ok := selves[v]
		applied := uint64(0)
		for _, g := range s.Groups {
			if g.Group == ids.RootGroup {
				applied = g.Applied
			}
		}
		switch {
		case !ok:
			return fmt.Sprintf("for %v, which does not answer, to have every block", v)
		case applied < due:
			return fmt.Sprintf("for %v to have every file (it lacks %d entries)", v, due-applied)
		case !s.Whole:
			return fmt.Sprintf("for %v to have every block (%d are missing)", v, s.Missing)
		}
	}
	if _, err := n.loadAuthority(); err != nil {
		return "" // it takes none away
	}
	for _, v := range leaders[ids.RecordGroup].Voters {
		if selves[v].Signs {
			return ""
		}
	}
	return "until a voter that stays holds the authority's key"
}

// leftovers is, on a node that leaves, between the end of all that makes work and
// that of what carries it out: it ships the last writes and tells the record of the
// last jobs, as others no longer can.
func (n *Node) leftovers(ctx context.Context) error {
	<-ctx.Done()
	if !n.goes.Load() {
		return nil
	}
	lctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), n.lastLimit)
	defer cancel()
	for {
		err := n.venus.Settle(lctx)
		if len(n.jobs.out.List()) > 0 {
			err = errors.Join(err, n.jobs.out.Run(ctx)) // ctx is over: one attempt
		}
		if left := len(n.jobs.out.List()); left > 0 {
			err = errors.Join(err, errs.E(errs.Unavailable, "tell the record", "", "it has not heard of the end of %d commands", left))
		}
		if err == nil {
			return nil
		}
		if lctx.Err() != nil {
			n.stays = errs.E(errs.ClassOf(err), "leave the cluster", n.id.String(), "not all that it holds has reached the others: %w", err).
				WithRemedy("unum up, and unum leave again")
			return nil
		}
		pause(lctx, 100*time.Millisecond)
	}
}

// farewell tells the record, as the last thing a leaving node does, that it has
// left.
func (n *Node) farewell(ctx context.Context) error {
	<-ctx.Done()
	if !n.goes.Load() || n.stays != nil {
		return nil
	}
	sctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), stateLimit)
	defer cancel()
	if err := n.setState(sctx, record.Left); err != nil {
		n.stays = errs.E(errs.ClassOf(err), "leave the cluster", n.id.String(), "the cluster does not know that it has left: %w", err).
			WithRemedy("unum up, and unum leave again")
		return nil
	}
	n.gone.Store(true)
	return nil
}

// forget removes what made the directory a node's. What it kept is on other
// nodes: leaving has waited for that. If the first step fails, it is a node's
// still, whole, which can forget again; after it, it is none's.
func (c *Config) forget() error {
	err := c.FS.Rename(c.path(fileNode), c.path(fileLeft))
	if err == nil {
		err = disk.SyncDir(c.FS, c.Dir)
	}
	if err == nil {
		err = c.sweep()
	}
	if err == nil {
		err = errors.Join(c.FS.RemoveAll(c.path(fileLock)), disk.SyncDir(c.FS, c.Dir))
	}
	return errs.Wrap(err, "forget the node", c.Dir)
}

// sweep removes what a node that has left kept, and at the end what says so. What
// is cut off before is done by clear, when the directory is to be a node's again.
func (c *Config) sweep() error {
	var failed error
	for _, p := range []string{dirBlocks, dirIdentity, dirGroups, dirLogins, fileBallast} {
		failed = errors.Join(failed, c.FS.RemoveAll(c.path(p)))
	}
	if failed = errors.Join(failed, disk.SyncDir(c.FS, c.Dir)); failed != nil {
		return failed
	}
	return c.FS.RemoveAll(c.path(fileLeft))
}

func firstLine(err error) string {
	s, _, _ := strings.Cut(err.Error(), "\n")
	return s
}
