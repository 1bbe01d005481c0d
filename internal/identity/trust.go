package identity

import (
	"bytes"
	"crypto/ed25519"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"strings"
	"sync/atomic"
	"time"

	"github.com/unum-os/unum/internal/errs"
	"github.com/unum-os/unum/internal/ids"
)

// Trust is the public half of a cluster's authority: what a node needs to know
// its peers. Immutable.
type Trust struct {
	cluster string
	cert    *x509.Certificate
	pool    *x509.CertPool
}

// Peer is what a certificate proves.
type Peer struct {
	Node  ids.Node
	Role  Role
	Key   [32]byte  // SHA-256 of its public key, which stays the node's for life
	Until time.Time // when the certificate ends
}

// ParseTrust reads the authority's certificate (PEM). It does not ask whether
// the authority is the right one; compare Fingerprint.
func ParseTrust(certPEM []byte) (*Trust, error) {
	der, err := parseCert(certPEM)
	if err != nil {
		return nil, err
	}
	return newTrust(der)
}

func newTrust(der []byte) (*Trust, error) {
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, errs.E(errs.Corrupt, "read authority", "", "%w", err)
	}
	if !cert.IsCA || len(cert.URIs) != 1 || cert.URIs[0].Scheme != scheme || cert.URIs[0].Path != "" || !clusterName.MatchString(cert.URIs[0].Host) {
		return nil, errs.E(errs.Corrupt, "read authority", "", "the certificate is not that of a cluster")
	}
	if err := cert.CheckSignatureFrom(cert); err != nil {
		return nil, errs.E(errs.Corrupt, "read authority", "", "%w", err)
	}
	pool := x509.NewCertPool()
	pool.AddCert(cert)
	return &Trust{cluster: cert.URIs[0].Host, cert: cert, pool: pool}, nil
}

// Cluster returns the cluster's name.
func (t *Trust) Cluster() string { return t.cluster }

// CertPEM returns the authority's certificate.
func (t *Trust) CertPEM() []byte {
	return pem.EncodeToMemory(&pem.Block{Type: pemCert, Bytes: t.cert.Raw})
}

// Fingerprint returns the SHA-256 of the authority's certificate (DER).
func (t *Trust) Fingerprint() [32]byte { return sha256.Sum256(t.cert.Raw) }

// Verify reports whom the chain that a peer showed (its own certificate first)
// proves at time now, for use as a client or as a server. The error's class is
// Unauthorized.
func (t *Trust) Verify(chain []*x509.Certificate, use x509.ExtKeyUsage, now time.Time) (Peer, error) {
	if len(chain) == 0 {
		return Peer{}, errs.E(errs.Unauthorized, "verify certificate", "", "none was shown")
	}
	leaf := chain[0]
	if _, err := leaf.Verify(x509.VerifyOptions{Roots: t.pool, CurrentTime: now, KeyUsages: []x509.ExtKeyUsage{use}}); err != nil {
		e := errs.E(errs.Unauthorized, "verify certificate", leaf.Subject.CommonName, "%w", err)
		if now.After(leaf.NotAfter) || now.Before(leaf.NotBefore) {
			e = e.WithRemedy("compare the clocks of both machines; a running node renews its certificate by itself, and says in its log if it cannot")
		}
		return Peer{}, e
	}
	return t.read(leaf)
}

// read takes the names out of a certificate whose signature holds.
func (t *Trust) read(leaf *x509.Certificate) (Peer, error) {
	bad := func(why string) error {
		return errs.E(errs.Unauthorized, "verify certificate", leaf.Subject.CommonName, "%s", why)
	}
	if len(leaf.URIs) != 1 || leaf.IsCA {
		return Peer{}, bad("not a node's")
	}
	num, ok := strings.CutPrefix(leaf.URIs[0].Path, "/node/")
	if !ok || leaf.URIs[0].Scheme != scheme {
		return Peer{}, bad("not a node's")
	}
	if leaf.URIs[0].Host != t.cluster {
		return Peer{}, bad("of cluster " + leaf.URIs[0].Host + ", not " + t.cluster)
	}
	n, err := ids.ParseNode("n" + num)
	if err != nil || len(leaf.Subject.OrganizationalUnit) != 1 {
		return Peer{}, bad("not a node's")
	}
	pub, ok := leaf.PublicKey.(ed25519.PublicKey)
	if !ok {
		return Peer{}, bad("its key is not of the kind that nodes have")
	}
	return Peer{Node: n, Role: Role(leaf.Subject.OrganizationalUnit[0]), Key: sha256.Sum256(pub), Until: leaf.NotAfter}, nil
}

// Holder is the certificate and key that a running node shows. Swap exchanges
// them: connections made before keep what they were made with. Safe for
// concurrent use.
type Holder struct {
	trust *Trust
	cur   atomic.Pointer[held]
}

type held struct {
	cert *tls.Certificate
	peer Peer
}

// NewHolder checks that certificate and key belong together and to trust. An
// expired certificate is accepted here, peers will refuse it.
func NewHolder(trust *Trust, certPEM, keyPEM []byte) (*Holder, error) {
	h := &Holder{trust: trust}
	if err := h.Swap(certPEM, keyPEM); err != nil {
		return nil, err
	}
	return h, nil
}

// Swap exchanges certificate and key for newer ones of the same node.
func (h *Holder) Swap(certPEM, keyPEM []byte) error {
	der, err := parseCert(certPEM)
	if err != nil {
		return err
	}
	key, err := parseKey(keyPEM)
	if err != nil {
		return err
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		return errs.E(errs.Corrupt, "read certificate", "", "%w", err)
	}
	if err := leaf.CheckSignatureFrom(h.trust.cert); err != nil {
		return errs.E(errs.Unauthorized, "read certificate", leaf.Subject.CommonName, "%w", err)
	}
	if !key.Public().(ed25519.PublicKey).Equal(leaf.PublicKey) {
		return errs.E(errs.Corrupt, "read certificate", leaf.Subject.CommonName, "the key is not the certificate's")
	}
	p, err := h.trust.read(leaf)
	if err != nil {
		return err
	}
	if old := h.cur.Load(); old != nil && old.peer.Node != p.Node {
		return errs.E(errs.Invalid, "swap certificate", p.Node.String(), "this node is %v", old.peer.Node)
	}
	h.cur.Store(&held{cert: &tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key, Leaf: leaf}, peer: p})
	return nil
}

// Trust returns the authority the certificate comes from.
func (h *Holder) Trust() *Trust { return h.trust }

// Node returns whose certificate it is.
func (h *Holder) Node() ids.Node { return h.cur.Load().peer.Node }

// NotAfter returns when the certificate ends to hold.
func (h *Holder) NotAfter() time.Time { return h.cur.Load().cert.Leaf.NotAfter }

// Holds reports whether the certificate is for that public key.
func (h *Holder) Holds(pub []byte) bool {
	have, ok := h.cur.Load().cert.Leaf.PublicKey.(ed25519.PublicKey)
	return ok && bytes.Equal(have, pub)
}

// NotBefore returns when the certificate begins to hold.
func (h *Holder) NotBefore() time.Time { return h.cur.Load().cert.Leaf.NotBefore }

// GetCertificate is for tls.Config, on the server's side.
func (h *Holder) GetCertificate(*tls.ClientHelloInfo) (*tls.Certificate, error) {
	return h.cur.Load().cert, nil
}

// GetClientCertificate is for tls.Config, on the client's side.
func (h *Holder) GetClientCertificate(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
	return h.cur.Load().cert, nil
}

// GetChain is GetCertificate for those who do not know the authority yet: the
// authority's certificate follows the node's.
func (h *Holder) GetChain(*tls.ClientHelloInfo) (*tls.Certificate, error) {
	c := *h.cur.Load().cert
	c.Certificate = [][]byte{c.Certificate[0], h.trust.cert.Raw}
	return &c, nil
}

// VerifyJoin checks, on a joining machine, the chain that a server showed: it
// must end in the authority with the fingerprint and hold for a node of it.
func VerifyJoin(chain []*x509.Certificate, fingerprint [32]byte, now time.Time) (*Trust, error) {
	if len(chain) < 2 {
		return nil, errs.E(errs.Unauthorized, "verify certificate", "", "the server showed no authority")
	}
	der := chain[len(chain)-1].Raw
	if sum := sha256.Sum256(der); !bytes.Equal(sum[:], fingerprint[:]) {
		return nil, errs.E(errs.Unauthorized, "verify certificate", chain[0].Subject.CommonName, "the server belongs to another cluster than the token").
			WithRemedy("check the address, or make a new token on the cluster you want to join")
	}
	t, err := newTrust(der)
	if err != nil {
		return nil, err
	}
	p, err := t.Verify(chain, x509.ExtKeyUsageServerAuth, now)
	if err == nil && p.Role != RoleStore { // others are not trusted with a token's secret
		err = errs.E(errs.Unauthorized, "verify certificate", p.Node.String(), "it is a %s node", p.Role).
			WithRemedy("join at the address of a node that stores")
	}
	if err != nil {
		return nil, err
	}
	return t, nil
}

func parseCert(p []byte) ([]byte, error) {
	b, _ := pem.Decode(p)
	if b == nil || b.Type != pemCert {
		return nil, errs.E(errs.Corrupt, "read certificate", "", "no PEM block %q", pemCert)
	}
	return b.Bytes, nil
}
