package node

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strconv"
	"sync"
	"time"

	"github.com/unum-os/unum/internal/control"
	"github.com/unum-os/unum/internal/disk"
	"github.com/unum-os/unum/internal/errs"
	"github.com/unum-os/unum/internal/identity"
	"github.com/unum-os/unum/internal/ids"
	"github.com/unum-os/unum/internal/principal"
	"github.com/unum-os/unum/internal/record"
	"github.com/unum-os/unum/internal/wire"
)

// How users of a client node prove who they are: an invitation, spent once, gives
// a credential, which the client node keeps and exchanges for newer ones.
const (
	methodLogin   = "node.login"   // loginRequest -> loginReply; a voter that stores signs
	methodRelogin = "node.relogin" // nothing, with a proof as the data -> loginReply
)

type loginRequest struct {
	Secret principal.Invite `cbor:"1,keyasint"`
}

type loginReply struct {
	Proof principal.Proof `cbor:"1,keyasint"`
}

// dirLogins holds the proofs of a client node's users, by local uid.
const dirLogins = "logins"

// login is what a local user of a client node speaks by.
type login struct {
	proof principal.Proof
	cred  *principal.Credential
	tried time.Time // when a newer one was last asked for
}

// logins are those of a client node, by local uid.
type logins struct {
	changing sync.Mutex // held while by and the file change together; before mu
	mu       sync.Mutex
	by       map[uint32]*login
}

func (l *logins) of(uid uint32) *login {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.by[uid]
}

func (l *logins) set(uid uint32, x *login) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.by == nil {
		l.by = map[uint32]*login{}
	}
	if x == nil {
		delete(l.by, uid)
	} else {
		l.by[uid] = x
	}
}

// replace puts x in the place of was, if that is still there, and reports whether
// it was.
func (l *logins) replace(uid uint32, was, x *login) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.by[uid] != was {
		return false
	}
	l.by[uid] = x
	return true
}

func (l *logins) all() map[uint32]*login {
	l.mu.Lock()
	defer l.mu.Unlock()
	out := map[uint32]*login{}
	for uid, x := range l.by {
		out[uid] = x
	}
	return out
}

// localUID is the uid of a local process; whoever runs the daemon is its root.
func (n *Node) localUID(c control.Cred) uint32 {
	if int(c.UID) == os.Geteuid() {
		return 0
	}
	return c.UID
}

func (n *Node) loginPath(uid uint32) string {
	return n.cfg.path(dirLogins, strconv.FormatUint(uint64(uid), 10))
}

// loadLogins reads what users of this client node spoke by before it stopped.
func (n *Node) loadLogins() error {
	names, err := n.cfg.FS.List(n.cfg.path(dirLogins))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return errs.Wrap(err, "load logins", n.cfg.path(dirLogins))
	}
	for _, name := range names {
		uid, err := strconv.ParseUint(name, 10, 32)
		if err != nil {
			continue // half written
		}
		p, err := identity.Load(n.cfg.FS, n.loginPath(uint32(uid)))
		if err != nil {
			return err
		}
		c, err := principal.VerifyRenewal(n.holder.Trust(), p, n.id, n.cfg.Clock.Wall())
		if err != nil {
			n.cfg.Log.Info("a login has ended", "uid", uid, "err", firstLine(err))
			continue
		}
		n.logins.set(uint32(uid), &login{proof: p, cred: c})
	}
	return nil
}

// acceptLogin keeps a proof that a local user speaks by from now on. If it is the
// newer one of was, the user must not have logged out meanwhile, nor in anew: class
// Stale.
func (n *Node) acceptLogin(uid uint32, p principal.Proof, was *login) (*login, error) {
	c, err := principal.Verify(n.holder.Trust(), p, n.id, n.cfg.Clock.Wall())
	if err != nil {
		return nil, err
	}
	n.logins.changing.Lock()
	defer n.logins.changing.Unlock()
	if was != nil && n.logins.of(uid) != was {
		return nil, errs.E(errs.Stale, "keep login", c.String(), "uid %d speaks by it no more", uid)
	}
	if err := n.cfg.FS.MkdirAll(n.cfg.path(dirLogins), 0o700); err != nil {
		return nil, errs.Wrap(err, "keep login", n.cfg.path(dirLogins))
	}
	if err := identity.Save(n.cfg.FS, n.loginPath(uid), p); err != nil {
		return nil, err
	}
	l := &login{proof: p, cred: c}
	n.logins.set(uid, l)
	return l, nil
}

// askSigner asks the nodes that store until one answers: some cannot sign.
func (n *Node) askSigner(ctx context.Context, method string, req any, proof []byte) (principal.Proof, error) {
	err := error(errs.E(errs.Unavailable, "", "", "no storing node is known"))
	for _, p := range n.askFirst() {
		var r loginReply
		if _, err = n.ep.Call(ctx, p, method, req, proof, &r); err == nil {
			return r.Proof, nil
		}
		if c := errs.ClassOf(err); c != errs.Unavailable && c != errs.Timeout {
			return nil, err
		}
	}
	return nil, err
}

// login spends an invitation: the local user speaks as its user from now on.
func (n *Node) login(ctx context.Context, uid uint32, text string) (*login, error) {
	v, err := principal.ParseInvite(text)
	if err != nil {
		return nil, err
	}
	if n.disk.Role != record.RoleClient {
		return nil, errs.E(errs.Invalid, "log in", n.id.String(), "it is a %s node: its users need not log in", n.disk.Role)
	}
	p, err := n.askSigner(ctx, methodLogin, loginRequest{v}, nil)
	if err != nil {
		return nil, err
	}
	return n.acceptLogin(uid, p, nil)
}

// logout forgets what a local user speaks by.
func (n *Node) logout(uid uint32) error {
	l := n.logins.of(uid)
	if l == nil {
		return errs.E(errs.NotFound, "log out", fmt.Sprintf("uid %d", uid), "nobody has logged in")
	}
	return n.endLogin(uid, nil)
}

// endLogin forgets, on the disk first, what a local user speaks by; if only is
// given, only if it is that.
func (n *Node) endLogin(uid uint32, only *login) error {
	n.logins.changing.Lock()
	defer n.logins.changing.Unlock()
	if only != nil && n.logins.of(uid) != only {
		return nil
	}
	err := n.cfg.FS.Remove(n.loginPath(uid))
	if err == nil {
		err = disk.SyncDir(n.cfg.FS, n.cfg.path(dirLogins))
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return errs.Wrap(err, "log out", n.loginPath(uid))
	}
	n.logins.set(uid, nil)
	return nil
}

// keepLogins renews credentials for as long as ctx lasts. It waits for answers of
// others, as the steward must not.
func (n *Node) keepLogins(ctx context.Context) error {
	for ctx.Err() == nil {
		n.renewLogins(ctx)
		pause(ctx, stewardTick)
	}
	return nil
}

// renewLogins exchanges credentials of which less than half is left.
func (n *Node) renewLogins(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, renewLimit) // for all together
	defer cancel()
	if !n.certHolds() { // nobody would hear this node: that refusal is no word about its users
		return
	}
	for uid, l := range n.logins.all() {
		left := time.Duration(l.cred.Expires - n.cfg.Clock.Wall().UnixNano())
		if left > principal.Validity/2 || l.cred.Expires == l.cred.Renewable || time.Since(l.tried) < renewAgain {
			continue
		}
		trying := &login{proof: l.proof, cred: l.cred, tried: time.Now()}
		if !n.logins.replace(uid, l, trying) {
			continue
		}
		l = trying
		p, err := n.askSigner(ctx, methodRelogin, nil, l.proof)
		switch {
		case err == nil:
			_, err = n.acceptLogin(uid, p, l)
		case errs.Has(err, errs.Unauthorized) || errs.Has(err, errs.NotFound): // for good
			err = errors.Join(err, n.endLogin(uid, l))
		}
		if err != nil && ctx.Err() == nil && !errs.Has(err, errs.Stale) {
			n.cfg.Log.Warn("a credential is not renewed", "of", l.cred.String(), "err", firstLine(err))
		}
	}
}

// serveLogin spends an invitation for a user of the node that asks.
func (n *Node) serveLogin(ctx context.Context, from ids.Node, req, _ []byte) (any, []byte, error) {
	var q loginRequest
	if err := wire.Unmarshal(req, &q); err != nil {
		return nil, nil, err
	}
	ca, err := n.authority()
	if err != nil {
		return nil, nil, err
	}
	if err := n.invitation(ctx, q.Secret.ID(), from); err != nil {
		return nil, nil, err
	}
	settle, err := n.knocks.propose(from, len(req), time.Now())
	if err != nil {
		return nil, nil, err
	}
	now := n.cfg.Clock.Wall()
	res, err := n.record.do(ctx, record.Command{Login: &record.Login{ID: q.Secret.ID(), Node: from, Now: now.UnixNano()}})
	settle(res != nil && res.Denied() || err != nil && ctx.Err() != nil)
	if err != nil {
		return nil, nil, err // it is in the audit already
	}
	u := res.User
	c, err := principal.New(n.disk.Cluster, u.Name, u.UID, u.GID, u.Groups, from, now, rand.Reader)
	if err != nil {
		return nil, nil, err
	}
	p, err := principal.Sign(ca, c)
	return loginReply{p}, nil, err
}

// invitation looks whether there is one, and not spent by another node: whoever
// guesses gets no proposal.
func (n *Node) invitation(ctx context.Context, id record.LoginID, from ids.Node) error {
	if _, err := n.rec.ReadIndex(ctx); err != nil {
		return err
	}
	l, err := n.record.view().Login(id)
	if err == nil && l.Spent != 0 && l.Spent != from || errs.Has(err, errs.NotFound) {
		return n.refused(ctx, principal.Of(from), "log in", from, errs.E(errs.Unauthorized, "log in", "", "the login token is not one of this cluster, or was used"))
	}
	return err
}

// serveRelogin gives a newer credential for one that still counts.
func (n *Node) serveRelogin(ctx context.Context, from ids.Node, _, proof []byte) (any, []byte, error) {
	ca, err := n.authority()
	if err != nil {
		return nil, nil, err
	}
	now := n.cfg.Clock.Wall()
	c, err := principal.VerifyRenewal(n.holder.Trust(), proof, from, now)
	if err != nil {
		return nil, nil, n.refused(ctx, principal.Of(from), "renew a credential", from, err)
	}
	if _, err := n.rec.ReadIndex(ctx); err != nil {
		return nil, nil, err
	}
	u, err := n.record.view().User(c.User)
	if err == nil && u.Disabled {
		err = errs.E(errs.Unauthorized, "renew a credential", c.User, "the user is disabled")
	}
	if err != nil {
		return nil, nil, n.refused(ctx, c.Principal(), "renew a credential", from, err)
	}
	newer, err := c.Renewed(u.UID, u.GID, u.Groups, now, rand.Reader)
	if err != nil {
		return nil, nil, err
	}
	p, err := principal.Sign(ca, newer)
	return loginReply{p}, nil, err
}
