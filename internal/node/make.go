package node

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"net"

	"github.com/unum-os/unum/internal/disk"
	"github.com/unum-os/unum/internal/errs"
	"github.com/unum-os/unum/internal/group"
	"github.com/unum-os/unum/internal/identity"
	"github.com/unum-os/unum/internal/ids"
	"github.com/unum-os/unum/internal/principal"
	"github.com/unum-os/unum/internal/record"
	"github.com/unum-os/unum/internal/rpc"
	"github.com/unum-os/unum/internal/wire"
)

// Found makes this machine the first node of a new cluster. Until it returns nil
// there is no node in cfg.Dir, and it can be called again.
func Found(cfg Config) (err error) {
	if err := cfg.ready(); err != nil {
		return err
	}
	if was, err := cfg.has(fileNode); err != nil {
		return err
	} else if was {
		return errs.E(errs.Exists, "found a cluster", cfg.Dir, "there is a node already")
	}
	if kept, err := cfg.has(dirKept); err != nil {
		return err
	} else if kept {
		return errs.E(errs.Exists, "found a cluster", cfg.path(dirKept), "these are the blocks of a node of a cluster that is there still").
			WithRemedy("unum join ADDR TOKEN, or move them away")
	}
	addr, err := address(cfg.Addr, "")
	if err != nil {
		return err
	}
	lock, err := cfg.prepare()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, lock.Close()) }()
	var id [16]byte
	var key [32]byte
	rand.Read(id[:])
	rand.Read(key[:])
	cluster := hex.EncodeToString(id[:])
	ca, err := identity.NewCAAt(cluster, cfg.Clock.Wall())
	if err != nil {
		return err
	}
	nodeKey, csr, err := identity.NewRequest()
	if err != nil {
		return err
	}
	cert, err := ca.Sign(csr, 1, identity.RoleStore, cfg.Clock.Wall())
	if err != nil {
		return err
	}
	for _, f := range []struct {
		name string
		data []byte
	}{{fileCA, ca.CertPEM()}, {fileCAKey, ca.KeyPEM()}, {fileKey, nodeKey}, {fileCSR, csr}, {fileCert, cert}, {fileVolume, encodeKey(key)}} {
		if err := identity.Save(cfg.FS, cfg.path(f.name), f.data); err != nil {
			return err
		}
	}
	host, err := group.New(group.Config{Self: 1, Dir: cfg.path(dirGroups), Transport: noTransport{}, Log: cfg.Log, FS: cfg.FS})
	if err != nil {
		return err
	}
	for _, g := range []ids.Group{ids.RecordGroup, ids.RootGroup} {
		if err := host.Bootstrap(g, []ids.Node{1}); err != nil {
			host.Close()
			return err
		}
	}
	if err := host.Close(); err != nil {
		return err
	}
	return cfg.saveFile(nodeFile{Cluster: cluster, Node: 1, Role: record.RoleStore, Addr: addr, Founding: true})
}

// joinRequest is what a machine that wants to become a node says; or, with Renew,
// a node whose certificate has ended, which has no other way to be heard.
type joinRequest struct {
	Secret   [16]byte          `cbor:"1,keyasint"`
	CSR      []byte            `cbor:"2,keyasint"`
	Hostname string            `cbor:"3,keyasint"`
	Addr     string            `cbor:"4,keyasint"`
	Role     record.Role       `cbor:"5,keyasint,omitempty"` // 0: the token's
	Labels   map[string]string `cbor:"6,keyasint,omitempty"`
	Renew    ids.Node          `cbor:"7,keyasint,omitempty"` // a new certificate for this node; the key in CSR proves it
}

// joinReply makes it one.
type joinReply struct {
	Node      ids.Node            `cbor:"1,keyasint"`
	Cert      []byte              `cbor:"2,keyasint"`
	VolumeKey []byte              `cbor:"3,keyasint,omitempty"` // for a node that stores
	Peers     map[ids.Node]string `cbor:"4,keyasint"`           // those that store
	Role      record.Role         `cbor:"5,keyasint"`
}

// Join makes this machine a node of the cluster whose node listens at addr. It
// can be repeated until it returns nil, and after that, when it has nothing left
// to do; a token is used up once. A cluster that refuses it (class Unauthorized)
// leaves cfg.Dir as it was.
func Join(ctx context.Context, cfg Config, addr, token string) (err error) {
	tok, err := identity.ParseToken(token)
	if err != nil {
		return err
	}
	if err := cfg.ready(); err != nil {
		return err
	}
	there, err := disk.Exists(cfg.FS, cfg.Dir)
	if err != nil {
		return errs.Wrap(err, "join", cfg.Dir)
	}
	if cfg.Repair && there {
		if err := cfg.replace(tok.Authority); err != nil {
			return err
		}
	}
	if was, err := cfg.has(fileNode); err != nil {
		return err
	} else if was {
		ca, err := identity.Load(cfg.FS, cfg.path(fileCA))
		if err != nil {
			return errs.Wrap(err, "join", cfg.Dir)
		}
		if trust, err := identity.ParseTrust(ca); err == nil && trust.Fingerprint() == tok.Authority {
			return nil
		}
		return errs.E(errs.Exists, "join", cfg.Dir, "there is a node of another cluster already").WithRemedy("unum up, or remove the directory first")
	}
	to, err := address(addr, "")
	if err != nil {
		return err
	}
	self, err := address(cfg.Addr, to)
	if err != nil {
		return err
	}
	lock, err := cfg.prepare()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, lock.Close()) }()
	// The key is kept before the token is spent: asked again with the same key,
	// the cluster gives the same node.
	key, kerr := identity.Load(cfg.FS, cfg.path(fileKey))
	csr, cerr := identity.Load(cfg.FS, cfg.path(fileCSR))
	if kerr != nil || cerr != nil {
		defer func() {
			if errs.Has(err, errs.Unauthorized) {
				err = errors.Join(err, cfg.withdraw(!there))
			}
		}()
		if key, csr, err = identity.NewRequest(); err != nil {
			return err
		}
		if err := identity.Save(cfg.FS, cfg.path(fileKey), key); err != nil {
			return err
		}
		if err := identity.Save(cfg.FS, cfg.path(fileCSR), csr); err != nil {
			return err
		}
	}
	q := joinRequest{Secret: tok.Secret, CSR: csr, Hostname: cfg.Hostname, Addr: self, Role: cfg.Role, Labels: cfg.Labels}
	b, trust, err := rpc.JoinAt(ctx, cfg.Clock, to, tok.Authority, wire.MustMarshal(q))
	if errs.Has(err, errs.Unauthorized) {
		return &errs.Error{Op: "join", Subject: addr, Class: errs.Unauthorized, Err: err, Remedy: "unum token on a machine of that cluster, for a new one"}
	}
	if err != nil {
		return err
	}
	var r joinReply
	if err := wire.Unmarshal(b, &r); err != nil {
		return err
	}
	if _, err := identity.NewHolder(trust, r.Cert, key); err != nil {
		return errs.Wrap(err, "join", addr)
	}
	type file struct {
		name string
		data []byte
	}
	files := []file{{fileCA, trust.CertPEM()}, {fileCert, r.Cert}}
	if r.Role == record.RoleStore {
		key, err := decodeKey(r.VolumeKey)
		if err != nil {
			return errs.Wrap(err, "join", addr)
		}
		files = append(files, file{fileVolume, encodeKey(key)})
	}
	for _, f := range files {
		if err := identity.Save(cfg.FS, cfg.path(f.name), f.data); err != nil {
			return err
		}
	}
	if r.Role != record.RoleClient {
		if err := joinGroups(cfg, r.Node, r.Role == record.RoleWitness); err != nil {
			return err
		}
	}
	d := nodeFile{Cluster: trust.Cluster(), Node: r.Node, Role: r.Role, Addr: self, Peers: map[string]string{}}
	for n, a := range r.Peers {
		d.Peers[n.String()] = a
	}
	return cfg.saveFile(d)
}

// joinGroups makes the empty replicas of a node that is to have some.
func joinGroups(cfg Config, self ids.Node, witness bool) error {
	host, err := group.New(group.Config{Self: self, Witness: witness, Dir: cfg.path(dirGroups), Transport: noTransport{}, Log: cfg.Log, FS: cfg.FS})
	if err != nil {
		return err
	}
	for _, g := range []ids.Group{ids.RecordGroup, ids.RootGroup} {
		if err := host.Join(g); err != nil {
			host.Close()
			return err
		}
	}
	return host.Close()
}

// finishFounding writes the cluster's record, once this node leads its group.
func (n *Node) finishFounding(ctx context.Context) error {
	csr, err := identity.Load(n.cfg.FS, n.cfg.path(fileCSR))
	if err != nil {
		return err
	}
	pub, err := identity.RequestKey(csr)
	if err != nil {
		return err
	}
	id, err := hex.DecodeString(n.disk.Cluster)
	if err != nil || len(id) != 16 {
		return errs.E(errs.Corrupt, "found", n.cfg.path(fileNode), "cluster id %q", n.disk.Cluster)
	}
	init := record.Init{Name: "unum", CACert: n.holder.Trust().CertPEM(),
		Hostname: n.cfg.Hostname, Addr: n.disk.Addr, Labels: n.cfg.Labels, Key: sha256.Sum256(pub), Now: n.cfg.Clock.Wall().UnixNano()}
	copy(init.ClusterID[:], id)
	if _, err := n.record.do(ctx, record.Command{Init: &init}); err != nil && !errs.Has(err, errs.Exists) {
		return err
	}
	return n.disk.change(&n.cfg, func(d *nodeFile) { d.Founding = false })
}

// serveDoor answers machines that have no certificate, or none that holds: by
// itself if it can sign, else through a voter.
func (n *Node) serveDoor(ctx context.Context, _ net.Addr, req []byte) ([]byte, error) {
	var q joinRequest
	if err := wire.Unmarshal(req, &q); err != nil {
		return nil, err
	}
	if _, err := identity.RequestKey(q.CSR); err != nil {
		return nil, err
	}
	r, err := n.join(ctx, &q)
	if err == nil {
		return wire.Marshal(r)
	}
	if !errs.Has(err, errs.Unavailable) {
		return nil, err
	}
	err = error(errs.E(errs.Unavailable, "", "", "no node that could sign answers"))
	for _, p := range n.askFirst() {
		if p == n.id {
			continue
		}
		var r joinReply
		if _, err = n.ep.Call(ctx, p, methodJoin, q, nil, &r); err == nil {
			return wire.Marshal(r)
		}
		if !errs.Has(err, errs.Unavailable) && !errs.Has(err, errs.Timeout) {
			return nil, err
		}
	}
	return nil, err
}

// join gives a machine with a good token a node id and a certificate. Class
// Unavailable: this node cannot sign.
func (n *Node) join(ctx context.Context, q *joinRequest) (*joinReply, error) {
	pub, err := identity.RequestKey(q.CSR)
	if err != nil {
		return nil, err
	}
	ca, err := n.authority()
	if err != nil {
		return nil, err
	}
	if q.Renew != 0 {
		cert, err := n.renewal(q.Renew, q.CSR)
		return &joinReply{Node: q.Renew, Cert: cert}, err
	}
	if _, err := n.record.info(ctx); err != nil { // this replica knows the newest tokens, then
		return nil, err
	}
	add := record.AddMember{Token: record.TokenID(identity.SecretID(q.Secret)), Key: sha256.Sum256(pub),
		Hostname: q.Hostname, Addr: q.Addr, Role: q.Role, Labels: q.Labels, Now: n.cfg.Clock.Wall().UnixNano()}
	if given, err := n.record.view().MayJoin(&add); err != nil {
		if given && errs.Has(err, errs.Unauthorized) { // by somebody who has, or had, a token; whoever guesses writes nothing
			err = n.refused(ctx, principal.Of(n.id), "join", anyStranger, err)
		}
		return nil, err
	}
	r, err := n.record.do(ctx, record.Command{AddMember: &add})
	if err != nil {
		return nil, err
	}
	if _, err := n.record.info(ctx); err != nil { // this replica has heard of it, then
		return nil, err
	}
	ms, err := n.record.view().Members()
	if err != nil {
		return nil, err
	}
	reply := &joinReply{Node: r.Node, Peers: map[ids.Node]string{}}
	for _, m := range ms {
		switch {
		case m.ID == r.Node && m.State != record.Joining && m.Role != record.RoleClient:
			// Who asks again has lost the answer, or all it had. A member with replicas
			// has promised to keep their logs: with an empty disk it must not be that
			// member. A client node keeps none, and is admitted before it has its answer.
			return nil, errs.E(errs.Exists, "join", q.Hostname, "this machine's key is that of %v, which is a member", r.Node).
				WithRemedy("remove %s from its data directory there, and join with a new token", dirIdentity)
		case m.ID == r.Node:
			reply.Role = m.Role
		case m.State.Belongs() && m.Role == record.RoleStore:
			reply.Peers[m.ID] = m.Addr
		}
	}
	if reply.Role == record.RoleStore {
		reply.VolumeKey = n.volumeKey[:]
	}
	reply.Cert, err = ca.Sign(q.CSR, r.Node, identity.Role(reply.Role.String()), n.cfg.Clock.Wall())
	return reply, err
}
