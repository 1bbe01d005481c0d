package node

import (
	"errors"
	"fmt"
	"io/fs"

	"github.com/unum-os/unum/internal/disk"
	"github.com/unum-os/unum/internal/errs"
	"github.com/unum-os/unum/internal/group"
	"github.com/unum-os/unum/internal/identity"
	"github.com/unum-os/unum/internal/ids"
	"github.com/unum-os/unum/internal/record"
	"github.com/unum-os/unum/internal/volume"
)

// A node whose log, state or identity is damaged does not start: what its log
// has lost it may have promised to others, and a voter that forgets its promises
// can undo what was acknowledged. It comes back as another node, with a new id:
// Join with Repair sets aside what was damaged, keeps the blocks, which are known
// by their content, and joins.

const remedyRepair = "on another node of the cluster `unum token`, then here `unum join --repair ADDR TOKEN`: this machine becomes a new node, and keeps its blocks. " +
	"If there is no other node, bring the data directory back from a copy"

// dirAside is where a damaged node is being moved to; when it is there it gets a
// number.
const dirAside = "damaged"

// damaged makes err, about a file or directory of the node, the reason why it
// does not start. Errors that are no damage keep their class and their remedy.
func (c *Config) damaged(name string, err error) error {
	if err == nil {
		return nil
	}
	e := &errs.Error{Op: "start", Subject: c.path(name), Class: errs.ClassOf(err), Err: err}
	switch {
	case errors.Is(err, fs.ErrNotExist):
		e.Class, e.Err = errs.Corrupt, errors.New("it is gone, but the node is there")
	case e.Class == errs.Unauthorized, e.Class == errs.Invalid: // a signature that does not hold
		e.Class = errs.Corrupt
	}
	if e.Class == errs.Corrupt {
		e.Remedy = remedyRepair
	}
	return e
}

// foreign is the error of a directory whose parts come from different nodes.
func (c *Config) foreign(name, format string, a ...any) error {
	return errs.E(errs.Corrupt, "start", c.path(name), format, a...).
		WithRemedy("this directory is put together from those of two nodes: bring back what belongs here, or %s", remedyRepair)
}

// damagedBlocks is the error of a block store that cannot be opened.
func (c *Config) damagedBlocks(err error) error {
	e := &errs.Error{Op: "start", Subject: c.path(dirBlocks), Class: errs.ClassOf(err), Err: err}
	switch e.Class {
	case errs.Corrupt:
		e.Remedy = fmt.Sprintf("move %s away: this node then fetches its blocks from the others, if there are others that have them", c.path(dirBlocks))
	case errs.NotSupported:
		e.Remedy = "install the version of unum that was used here last, or a later one"
	}
	return e
}

// openHost opens the groups' host and both replicas with the machines. The
// databases must be there: an empty one in the place of one that is lost would
// know nothing of what was promised. If the configuration says so, this node
// becomes the only voter.
func (c *Config) openHost(hc group.Config, rec, root group.Machine) (h *group.Host, a, b *group.Group, err error) {
	for _, db := range []string{"raftlog", "state"} {
		name := dirGroups + "/" + db
		if is, err := c.has(name); err != nil {
			return nil, nil, nil, err
		} else if !is {
			return nil, nil, nil, c.damaged(name, fs.ErrNotExist)
		}
	}
	if h, err = group.New(hc); err != nil {
		return nil, nil, nil, c.damaged(dirGroups, err)
	}
	if c.Without != 0 {
		for _, g := range h.Groups() {
			if err := h.GoAlone(g, c.Without); err != nil {
				return nil, nil, nil, errors.Join(err, h.Close())
			}
		}
	}
	open := func(id ids.Group, m group.Machine) *group.Group {
		if err != nil {
			return nil
		}
		var g *group.Group
		if g, err = h.Open(id, m); errs.Has(err, errs.NotFound) {
			err = errs.E(errs.Corrupt, "open", fmt.Sprintf("group %d", id), "its replica is gone")
		}
		return g
	}
	a, b = open(ids.RecordGroup, rec), open(ids.RootGroup, root)
	if err != nil {
		return nil, nil, nil, c.damaged(dirGroups, errors.Join(err, h.Close()))
	}
	return h, a, b, nil
}

// findDamage reads all that a node needs to start, and returns the first damage
// (class Corrupt), or nil. Blocks are not looked at: a damaged one is fetched
// from the others while the node runs.
func (c *Config) findDamage() error {
	d, err := c.loadFile()
	if err != nil {
		return err
	}
	if _, _, err := c.loadIdentity(d); err != nil {
		return err
	}
	if d.Role == record.RoleClient { // it has no more
		return nil
	}
	var recm, volm group.Machine // a witness has none
	if d.Role != record.RoleWitness {
		recm, volm = &record.Machine{}, &volume.Machine{}
	}
	h, _, _, err := c.openHost(group.Config{Self: d.Node, Witness: d.Role == record.RoleWitness, Dir: c.path(dirGroups), Transport: noTransport{}, Log: c.Log, FS: c.FS}, recm, volm)
	if err != nil {
		return err
	}
	return c.damaged(dirGroups, errors.Join(readAll(h), h.Close()))
}

// readAll reads the whole state, whose checksums are looked at on the way; the
// logs were read when they were opened.
func readAll(h *group.Host) error {
	it, err := h.State().NewIter(nil)
	if err != nil {
		return err
	}
	for ok := it.First(); ok; ok = it.Next() {
		if _, err := it.ValueAndErr(); err != nil {
			return errors.Join(errs.E(errs.Corrupt, "read", "state", "%v", err), it.Close())
		}
	}
	if err := it.Error(); err != nil {
		return errors.Join(errs.E(errs.Corrupt, "read", "state", "%v", err), it.Close())
	}
	return it.Close()
}

// replace sets a damaged node aside for one of the cluster with that authority.
func (c *Config) replace(authority [32]byte) (err error) {
	lock, err := c.lock()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, lock.Close()) }()
	return c.setAside(authority)
}

// setAside moves a damaged node out of the way, so that another can be made in
// its place: node.json first, without which there is no node here. What a crash
// interrupted is brought to its end. Nothing of the old identity may stay: its
// key would get the old id.
func (c *Config) setAside(authority [32]byte) error {
	var there [3]bool
	for i, name := range []string{fileNode, dirAside, dirBlocks} { // blocks alone: node.json is lost
		var err error
		if there[i], err = c.has(name); err != nil {
			return err
		}
	}
	node, begun, blocks := there[0], there[1], there[2]
	if !node && !begun && !blocks {
		return nil
	}
	if node && !begun {
		if err := c.mayReplace(authority); err != nil {
			return err
		}
	}
	if err := c.aside(); err != nil {
		return errs.Wrap(err, "set the damaged node aside", c.Dir)
	}
	return nil
}

func (c *Config) aside() error {
	if err := c.FS.MkdirAll(c.path(dirAside), 0o700); err != nil {
		return err
	}
	if err := disk.SyncDir(c.FS, c.Dir); err != nil {
		return err
	}
	for _, name := range []string{fileNode, dirIdentity, dirGroups} {
		if err := c.move(name, dirAside+"/"+name); err != nil {
			return err
		}
	}
	to := dirKept
	if kept, err := c.has(dirKept); err != nil {
		return err
	} else if kept { // from before: these are for a person to look at
		to = dirAside + "/" + dirBlocks
	}
	if err := c.move(dirBlocks, to); err != nil {
		return err
	}
	for i := 1; ; i++ {
		to := fmt.Sprintf("%s-%d", dirAside, i)
		if is, err := c.has(to); err != nil {
			return err
		} else if is {
			continue
		}
		if err := c.FS.Rename(c.path(dirAside), c.path(to)); err != nil {
			return err
		}
		c.Log.Warn("the damaged node was set aside", "dir", c.path(to))
		return disk.SyncDir(c.FS, c.Dir)
	}
}

// takeKept gives the blocks of the node that was here before to this one.
func (c *Config) takeKept() error {
	kept, err := c.has(dirKept)
	if err != nil || !kept {
		return err
	}
	if is, err := c.has(dirBlocks); err != nil || is {
		return err
	}
	if err := c.FS.Rename(c.path(dirKept), c.path(dirBlocks)); err != nil {
		return errs.Wrap(err, "take over blocks", c.path(dirKept))
	}
	return errs.Wrap(disk.SyncDir(c.FS, c.Dir), "take over blocks", c.Dir)
}

func (c *Config) move(from, to string) error {
	is, err := c.has(from)
	if err != nil || !is {
		return err
	}
	moved, err := c.has(to)
	if err != nil {
		return err
	}
	if moved { // a crash has kept both names
		err = c.FS.RemoveAll(c.path(from))
	} else {
		err = c.FS.Rename(c.path(from), c.path(to))
	}
	if err == nil {
		err = disk.SyncDir(c.FS, c.path(dirAside))
	}
	if err == nil {
		err = disk.SyncDir(c.FS, c.Dir)
	}
	return err
}

// mayReplace reports, as an error, why the node here is not to be replaced by one
// of the cluster with that authority.
func (c *Config) mayReplace(authority [32]byte) error {
	if b, err := identity.Load(c.FS, c.path(fileCA)); err == nil {
		if t, err := identity.ParseTrust(b); err == nil && t.Fingerprint() != authority {
			return errs.E(errs.Exists, "repair", c.Dir, "it is a node of another cluster than the token's").
				WithRemedy("make the token on a node of cluster %s", t.Cluster())
		}
	}
	err := c.findDamage()
	switch {
	case err == nil:
		return errs.E(errs.Invalid, "repair", c.Dir, "nothing is damaged").WithRemedy("unum up")
	case errs.Has(err, errs.Corrupt):
		c.Log.Warn("the node is damaged", "err", err)
		return nil
	}
	return err
}
