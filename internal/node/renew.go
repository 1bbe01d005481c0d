package node

import (
	"cmp"
	"context"
	"crypto/sha256"
	"time"

	"github.com/unum-os/unum/internal/errs"
	"github.com/unum-os/unum/internal/identity"
	"github.com/unum-os/unum/internal/ids"
	"github.com/unum-os/unum/internal/record"
	"github.com/unum-os/unum/internal/rpc"
	"github.com/unum-os/unum/internal/wire"
)

// methodRenew gives the asking node a new certificate: renewRequest -> renewReply.
const methodRenew = "node.renew"

const (
	// renewBefore is how much of a certificate is left when its node asks for
	// the next: half, so that a node may be off for as long as the other half.
	renewBefore = identity.NodeValidity / 2
	// renewAgain is how often it asks when nobody could answer.
	renewAgain = 5 * time.Second
	// renewLimit bounds one attempt.
	renewLimit = 5 * time.Second
)

type renewRequest struct {
	CSR []byte `cbor:"1,keyasint"`
}

type renewReply struct {
	Cert []byte `cbor:"1,keyasint"` // PEM
}

// renewDue reports whether it is time to ask for the next certificate: little is
// left of this one, or it does not hold yet because the clock was set back.
func (n *Node) renewDue() bool {
	return n.holder.NotAfter().Sub(n.cfg.Clock.Wall()) < renewBefore || !n.certHolds()
}

// certHolds reports whether others take this node's certificate, if their clocks
// are right.
func (n *Node) certHolds() bool {
	now := n.cfg.Clock.Wall()
	return !now.After(n.holder.NotAfter()) && !now.Before(n.holder.NotBefore())
}

// renew exchanges this node's certificate for one that holds longer, with the
// key it has. This node is asked first: one that keeps the record signs for
// itself, also when its certificate has ended and no other would hear it.
func (n *Node) renew(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, renewLimit)
	defer cancel()
	csr, err := identity.Load(n.cfg.FS, n.cfg.path(fileCSR))
	if err != nil {
		return err
	}
	key, err := identity.Load(n.cfg.FS, n.cfg.path(fileKey))
	if err != nil {
		return err
	}
	var r renewReply
	if over := !n.certHolds(); over && n.disk.Role != record.RoleStore {
		r.Cert, err = n.renewAtTheDoor(ctx, csr)
	} else {
		for _, p := range n.askFirst() {
			if _, err = n.ep.Call(ctx, p, methodRenew, renewRequest{csr}, nil, &r); err == nil {
				break
			}
		}
		if err != nil && over {
			r.Cert, err = n.renewAtTheDoor(ctx, csr)
		}
	}
	if err != nil {
		return err
	}
	if _, err := identity.NewHolder(n.holder.Trust(), r.Cert, key); err != nil { // before the old one is gone
		return err
	}
	if err := identity.Save(n.cfg.FS, n.cfg.path(fileCert), r.Cert); err != nil {
		return err
	}
	if err := n.holder.Swap(r.Cert, key); err != nil {
		return err
	}
	n.cfg.Log.Info("certificate renewed", "ends", n.holder.NotAfter())
	return nil
}

// renewAtTheDoor asks as a machine without a certificate: nobody would hear this
// node by the one that has ended.
func (n *Node) renewAtTheDoor(ctx context.Context, csr []byte) ([]byte, error) {
	q := wire.MustMarshal(joinRequest{CSR: csr, Renew: n.id})
	err := error(errs.E(errs.Unavailable, "renew certificate", n.id.String(), "no other node is known"))
	var refused error // by one; another may know more
	for _, p := range n.askFirst() {
		addr, ok := n.resolve(p)
		if !ok || p == n.id {
			continue
		}
		var b []byte
		if b, _, err = rpc.JoinAt(ctx, n.cfg.Clock, addr, n.holder.Trust().Fingerprint(), q); errs.Has(err, errs.Stale) {
			return nil, err
		}
		if err != nil {
			if errs.Has(err, errs.Unauthorized) {
				refused = err
			}
			continue
		}
		var r joinReply
		if err = wire.Unmarshal(b, &r); err == nil {
			return r.Cert, nil
		}
	}
	return nil, cmp.Or(refused, err)
}

// serveRenew signs for a member the key with which it joined.
func (n *Node) serveRenew(_ context.Context, from ids.Node, req, _ []byte) (any, []byte, error) {
	var q renewRequest
	if err := wire.Unmarshal(req, &q); err != nil {
		return nil, nil, err
	}
	cert, err := n.renewal(from, q.CSR)
	return renewReply{cert}, nil, err
}

// renewal gives a member a certificate for the key with which it joined. What
// this replica knows is enough: a member's key and role never change.
func (n *Node) renewal(p ids.Node, csr []byte) ([]byte, error) {
	pub, err := identity.RequestKey(csr)
	if err != nil {
		return nil, err
	}
	m, err := n.record.view().Member(p)
	if err != nil {
		return nil, err
	}
	switch {
	case m.Key != sha256.Sum256(pub):
		return nil, errs.E(errs.Unauthorized, "renew certificate", p.String(), "it is no member with this key")
	case m.State == record.Left:
		return nil, errs.E(errs.Stale, "renew certificate", p.String(), "it has left the cluster").WithRemedy("unum leave, there, to make an end of it")
	case !m.State.Belongs():
		return nil, errs.E(errs.Unauthorized, "renew certificate", p.String(), "it has been removed from the cluster").
			WithRemedy("move its data directory away, and join with a new token")
	}
	ca, err := n.authority()
	if err != nil {
		return nil, err
	}
	return ca.Sign(csr, p, identity.Role(m.Role.String()), n.cfg.Clock.Wall())
}
