package node

import (
	"context"
	"errors"
	"io/fs"
	"slices"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/unum-os/unum/internal/disk"
	"github.com/unum-os/unum/internal/errs"
	"github.com/unum-os/unum/internal/identity"
	"github.com/unum-os/unum/internal/ids"
	"github.com/unum-os/unum/internal/record"
	"github.com/unum-os/unum/internal/wire"
)

// The authority's private key is on the disks of the voters that store, and
// nowhere else: not in the record, whose log and snapshots reach more nodes. The
// leader gives it to a node before it makes it a voter; a node that has not been
// a voter for a while removes it.
const (
	methodEntrust   = "node.entrust"   // entrustment -> nothing; leader to a (future) voter
	methodAuthority = "node.authority" // nothing -> entrustment; a voter that lost its file
)

type entrustment struct {
	Key []byte `cbor:"1,keyasint"` // PEM
}

// keepKeyFor is how long a node that is no voter any more keeps the authority's
// key: longer than it may take from being entrusted to the vote.
const keepKeyFor = time.Minute

// loadAuthority returns the authority, its key held against its certificate.
func (n *Node) loadAuthority() (*identity.CA, error) {
	return n.keyFile.load(time.Now(), n.cfg.FS, n.cfg.path(fileCAKey), n.holder.Trust())
}

const (
	// keyReadEvery is how often the key's file is read though nothing says that it
	// has changed: a disk can forget without telling.
	keyReadEvery = time.Minute
	// keySettled is how long a file must have been as it is before its times say
	// that it is so still: two changes within one tick of the kernel's clock leave
	// the same times, and the clock may be set back a little meanwhile.
	keySettled = 2 * time.Second
)

// keyFile is the authority as it was read last, and from which file: reading and
// parsing it every second, and at every question, would cost more than all else
// that an idle node does.
type keyFile struct {
	mu sync.Mutex
	of stamp
	at time.Time
	ca *identity.CA // nil: it is to be read
}

// stamp is what changes when a file does, as far as a file system tells.
type stamp struct {
	dev, ino     uint64
	mode         uint32
	size         int64
	mtime, ctime unix.Timespec
}

// stampOf returns a file's stamp, and since when it has it; not ok if the file
// system knows none.
func stampOf(st fs.FileInfo) (s stamp, changed time.Time, ok bool) {
	x, ok := st.Sys().(*syscall.Stat_t)
	if !ok {
		return s, changed, false
	}
	changed = time.Unix(x.Ctim.Unix())
	return stamp{uint64(x.Dev), x.Ino, x.Mode, x.Size, unix.Timespec(x.Mtim), unix.Timespec(x.Ctim)}, changed, true
}

// load returns what the file has, from memory if it is the same as at the last
// reading, less than keyReadEvery ago. Errors are never from memory.
func (k *keyFile) load(now time.Time, d disk.FS, path string, trust *identity.Trust) (*identity.CA, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	st, err := d.Stat(path) // before reading: what changes then has another stamp at the next look
	if err != nil {
		k.ca = nil
		return nil, errs.Wrap(err, "load", path)
	}
	of, changed, ok := stampOf(st)
	if ago := now.Sub(k.at); ok && k.ca != nil && of == k.of && ago >= 0 && ago < keyReadEvery {
		return k.ca, nil
	}
	k.ca = nil
	key, err := identity.Load(d, path)
	if err != nil {
		return nil, err
	}
	ca, err := identity.ParseCA(trust.CertPEM(), key)
	if err == nil && ok && now.Sub(changed) > keySettled {
		k.ca, k.of, k.at = ca, of, now
	}
	return ca, err
}

// authority returns the cluster's authority, with which certificates are signed.
// Class Unavailable: this node does not hold it, or holds what is no use.
func (n *Node) authority() (*identity.CA, error) {
	ca, err := n.loadAuthority()
	switch {
	case err == nil:
		return ca, nil
	case errors.Is(err, fs.ErrNotExist):
		return nil, errs.E(errs.Unavailable, "sign", n.id.String(), "this node does not hold the cluster's authority: ask a voter")
	}
	return nil, errs.E(errs.Unavailable, "sign", n.id.String(), "the authority's key here is damaged: %s", firstLine(err)).
		WithRemedy("ask another voter; this one fetches the key again if another has it")
}

// keep stores the authority's key, if it is that of this cluster.
func (n *Node) keep(key []byte) error {
	if _, err := identity.ParseCA(n.holder.Trust().CertPEM(), key); err != nil {
		return err
	}
	return identity.Save(n.cfg.FS, n.cfg.path(fileCAKey), key)
}

// entrust gives the authority's key to a node that is to vote.
func (n *Node) entrust(ctx context.Context, to ids.Node) error {
	if to == n.id {
		return nil
	}
	ca, err := n.authority()
	if err != nil {
		return err
	}
	_, err = n.ep.Call(ctx, to, methodEntrust, entrustment{ca.KeyPEM()}, nil, nil)
	return err
}

func (n *Node) serveEntrust(_ context.Context, _ ids.Node, req, _ []byte) (any, []byte, error) {
	var q entrustment
	if err := wire.Unmarshal(req, &q); err != nil {
		return nil, nil, err
	}
	if n.disk.Role != record.RoleStore {
		return nil, nil, errs.E(errs.Invalid, "keep the authority's key", n.id.String(), "it is a %s node", n.disk.Role)
	}
	n.entrusted.Store(time.Now().UnixNano()) // it is for a vote that is still to come
	return nil, nil, n.keep(q.Key)
}

func (n *Node) serveAuthority(_ context.Context, from ids.Node, _, _ []byte) (any, []byte, error) {
	if m := (*n.known.Load())[from]; m.Role != record.RoleStore || !slices.Contains(n.rec.Status().Voters, from) {
		return nil, nil, errs.E(errs.Unauthorized, "ask for the authority's key", from.String(), "it is no voter that stores")
	}
	ca, err := n.authority()
	if err != nil {
		return nil, nil, err
	}
	return entrustment{ca.KeyPEM()}, nil, nil
}

// guardian is what the steward remembers of the authority's key.
type guardian struct {
	given map[ids.Node]uint64 // in which term of ours
	since time.Time           // when this node was last a voter
}

// guardLimit bounds one look at who holds the authority's key, and its transfer.
const guardLimit = 5 * time.Second

// guard sees to it that the voters that store hold the authority's key, whole, and
// nobody else does for long.
func (n *Node) guard(ctx context.Context, g *guardian) {
	if n.disk.Role != record.RoleStore {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, guardLimit)
	defer cancel()
	st := n.rec.Status()
	_, err := n.loadAuthority()
	if !slices.Contains(st.Voters, n.id) {
		n.keyless.Store(nil)
		if !errors.Is(err, fs.ErrNotExist) {
			n.dropAuthority(ctx, g, st.Voters)
		}
		return
	}
	g.since = time.Now()
	if err != nil {
		// What others may read is not made private by writing it anew: a person must know.
		if !errs.Has(err, errs.Permission) {
			ferr := n.fetchAuthority(ctx, st.Voters)
			if ferr == nil {
				n.cfg.Log.Info("the authority's key is fetched", "because", firstLine(err))
				n.keyless.Store(nil)
				return
			}
			err = errors.Join(err, ferr)
		}
		if ctx.Err() == nil {
			n.keyless.Store(&err)
			n.cfg.Log.Warn("this voter does not hold the authority's key", "err", err)
		}
		return
	}
	n.keyless.Store(nil)
	if !n.rec.IsLeader() {
		clear(g.given)
		return
	}
	for _, v := range st.Voters {
		if m := (*n.known.Load())[v]; v == n.id || m.Role != record.RoleStore || g.given[v] == st.Term || !n.alive(v) {
			continue
		}
		if err := n.entrust(ctx, v); err != nil {
			n.cfg.Log.Debug("voter not entrusted yet", "member", v.String(), "err", err)
			continue
		}
		g.given[v] = st.Term
	}
}

// dropAuthority removes the key of a node that has not voted for a while. It is
// kept while it may be the only one that is whole, and by a node that leaves: with
// all else it removes that, too, in the end.
func (n *Node) dropAuthority(ctx context.Context, g *guardian, voters []ids.Node) {
	given := time.Unix(0, n.entrusted.Load())
	if n.disk.snapshot().Founding || time.Since(g.since) <= keepKeyFor || time.Since(given) <= keepKeyFor ||
		(*n.known.Load())[n.id].State == record.Leaving {
		return
	}
	if !n.signer(ctx, voters) {
		n.cfg.Log.Warn("the authority's key is not removed: no voter says that it has it")
		g.since = time.Now()
		return
	}
	err := n.cfg.FS.Remove(n.cfg.path(fileCAKey))
	if err == nil {
		err = disk.SyncDir(n.cfg.FS, n.cfg.path(dirIdentity))
	}
	if err != nil {
		n.cfg.Log.Warn("the authority's key is not removed yet", "err", err)
	}
}

// signer reports whether one of the voters, but this node, says that it can sign.
func (n *Node) signer(ctx context.Context, voters []ids.Node) bool {
	for _, v := range voters {
		var s Self
		if v == n.id || !n.alive(v) {
			continue
		}
		if _, err := n.ep.Call(ctx, v, methodSelf, nil, nil, &s); err == nil && s.Signs {
			return true
		}
	}
	return false
}

// fetchAuthority asks the others that store for the key, voters first: one that
// votes no more may have it still.
func (n *Node) fetchAuthority(ctx context.Context, voters []ids.Node) error {
	ask := slices.Clone(voters)
	for _, p := range n.holders() {
		if !slices.Contains(ask, p) {
			ask = append(ask, p)
		}
	}
	err := error(errs.E(errs.Unavailable, "ask for the authority's key", "", "no other storing node is alive"))
	for _, v := range ask {
		if v == n.id || !n.alive(v) || n.witness(v) {
			continue
		}
		var r entrustment
		if _, err = n.ep.Call(ctx, v, methodAuthority, nil, nil, &r); err == nil {
			return n.keep(r.Key)
		}
	}
	return err
}
