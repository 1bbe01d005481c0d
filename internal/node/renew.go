package node

import (
	"context"
	"crypto/sha256"
	"time"

	"github.com/unum-os/unum/internal/errs"
	"github.com/unum-os/unum/internal/identity"
	"github.com/unum-os/unum/internal/ids"
	"github.com/unum-os/unum/internal/record"
	"github.com/unum-os/unum/internal/wire"
)

// methodRenew gives the asking node a new certificate: renewRequest -> renewReply.
const methodRenew = "node.renew"

const (
	// renewBefore is how much of a certificate is left when its node asks for
	// the next: half, so that a node may be off for as long as the other half.
	renewBefore = identity.NodeValidity / 2
	// renewAgain is how often it asks when nobody could answer.
	renewAgain = time.Minute
	// renewLimit bounds one attempt.
	renewLimit = 5 * time.Second
)

type renewRequest struct {
	CSR []byte `cbor:"1,keyasint"`
}

type renewReply struct {
	Cert []byte `cbor:"1,keyasint"` // PEM
}

// renew exchanges this node's certificate for one that holds longer, with the
// key it has. This node is asked first: one that keeps the record signs for
// itself, also when its certificate has ended and no other would hear it.
func (n *Node) renew(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, renewLimit)
	defer cancel()
	csr, err := identity.Load(n.cfg.path(fileCSR))
	if err != nil {
		return err
	}
	key, err := identity.Load(n.cfg.path(fileKey))
	if err != nil {
		return err
	}
	var r renewReply
	for _, p := range n.askFirst() {
		if _, err = n.ep.Call(ctx, p, methodRenew, renewRequest{csr}, nil, &r); err == nil {
			break
		}
	}
	if err != nil {
		return err
	}
	if _, err := identity.NewHolder(n.holder.Trust(), r.Cert, key); err != nil { // before the old one is gone
		return err
	}
	if err := identity.Save(n.cfg.path(fileCert), r.Cert); err != nil {
		return err
	}
	if err := n.holder.Swap(r.Cert, key); err != nil {
		return err
	}
	n.cfg.Log.Info("certificate renewed", "ends", n.holder.NotAfter())
	return nil
}

// serveRenew signs for a member the key with which it joined. What this replica
// knows is enough: neither the authority nor a member's key ever changes.
func (n *Node) serveRenew(_ context.Context, from ids.Node, req, _ []byte) (any, []byte, error) {
	var q renewRequest
	if err := wire.Unmarshal(req, &q); err != nil {
		return nil, nil, err
	}
	pub, err := identity.RequestKey(q.CSR)
	if err != nil {
		return nil, nil, err
	}
	m, err := n.record.view().Member(from)
	if err != nil {
		return nil, nil, err
	}
	if m.State != record.Joining && m.State != record.Active || m.Key != sha256.Sum256(pub) {
		return nil, nil, errs.E(errs.Unauthorized, "renew certificate", from.String(), "it is no member with this key")
	}
	info, err := n.record.view().Info()
	if err != nil {
		return nil, nil, err
	}
	ca, err := identity.ParseCA(info.CACert, info.CAKey)
	if err != nil {
		return nil, nil, err
	}
	role := identity.RoleStore
	if m.Role == record.RoleClient {
		role = identity.RoleClient
	}
	cert, err := ca.Sign(q.CSR, from, role, time.Now())
	return renewReply{cert}, nil, err
}
