package identity

import (
	"crypto/ed25519"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"net/url"
	"regexp"
	"time"

	"github.com/unum-os/unum/internal/errs"
	"github.com/unum-os/unum/internal/ids"
)

// Role says what a node is for.
type Role string

// The roles a certificate can carry.
const (
	RoleStore   Role = "store"   // keeps blocks, may vote
	RoleClient  Role = "client"  // uses the cluster, keeps nothing for others
	RoleWitness Role = "witness" // votes and keeps logs
)

const (
	// NodeValidity is how long a node certificate holds. A node that was put out is
	// refused by the record at once; the end of its certificate is for those who
	// have not heard of it. A shorter time would make clocks that are days apart a
	// failure of their own. A node that was off for longer renews with its key.
	NodeValidity = 7 * 24 * time.Hour
	// caValidity is how long the authority holds: longer than the hardware.
	caValidity = 30 * 365 * 24 * time.Hour
	// skew is how far a certificate's begin lies in the past, so that a machine
	// whose clock is behind accepts it all the same.
	skew = 24 * time.Hour
)

const (
	pemCert = "CERTIFICATE"
	pemKey  = "PRIVATE KEY"
	scheme  = "unum"
)

// A cluster's name is the host part of a URI.
var clusterName = regexp.MustCompile(`^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$`)

// CA is a cluster's authority with its private key.
type CA struct {
	trust *Trust
	key   ed25519.PrivateKey
}

// NewCA makes an authority for a new cluster. The name is lower-case letters,
// digits and dashes, at most 63.
func NewCA(cluster string) (*CA, error) { return NewCAAt(cluster, time.Now()) }

// NewCAAt is NewCA at another time than the machine's.
func NewCAAt(cluster string, now time.Time) (*CA, error) {
	if !clusterName.MatchString(cluster) {
		return nil, errs.E(errs.Invalid, "make authority", cluster, "a cluster's name is 1 to 63 lower-case letters, digits and dashes, with a letter or digit at both ends")
	}
	pub, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return nil, errs.Wrap(err, "make authority", cluster)
	}
	serial, err := newSerial()
	if err != nil {
		return nil, err
	}
	t := &x509.Certificate{
		SerialNumber:          serial,
		Subject:               pkix.Name{CommonName: "unum cluster " + cluster},
		URIs:                  []*url.URL{{Scheme: scheme, Host: cluster}},
		NotBefore:             now.Add(-skew),
		NotAfter:              now.Add(caValidity),
		IsCA:                  true,
		BasicConstraintsValid: true,
		MaxPathLenZero:        true,
		KeyUsage:              x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, t, t, pub, key)
	if err != nil {
		return nil, errs.Wrap(err, "make authority", cluster)
	}
	trust, err := newTrust(der)
	if err != nil {
		return nil, err
	}
	return &CA{trust: trust, key: key}, nil
}

// ParseCA reads what CertPEM and KeyPEM gave.
func ParseCA(certPEM, keyPEM []byte) (*CA, error) {
	t, err := ParseTrust(certPEM)
	if err != nil {
		return nil, err
	}
	key, err := parseKey(keyPEM)
	if err != nil {
		return nil, err
	}
	if !key.Public().(ed25519.PublicKey).Equal(t.cert.PublicKey) {
		return nil, errs.E(errs.Corrupt, "read authority", t.cluster, "the key is not the certificate's")
	}
	return &CA{trust: t, key: key}, nil
}

// Trust returns the public half.
func (c *CA) Trust() *Trust { return c.trust }

// CertPEM returns the authority's certificate.
func (c *CA) CertPEM() []byte { return c.trust.CertPEM() }

// KeyPEM returns the authority's private key.
func (c *CA) KeyPEM() []byte { return encodeKey(c.key) }

// Sign answers a request (DER, as NewRequest made it) with a certificate (PEM)
// for node n, valid from a day before now until NodeValidity after it. Whoever
// calls has decided that the asker may be n: nothing in the request is believed
// except the proof that the asker has the key.
func (c *CA) Sign(csr []byte, n ids.Node, role Role, now time.Time) ([]byte, error) {
	if n == 0 || (role != RoleStore && role != RoleClient && role != RoleWitness) {
		return nil, errs.E(errs.Invalid, "sign certificate", n.String(), "no such node or role %q", role)
	}
	pub, err := requestKey(csr)
	if err != nil {
		return nil, err
	}
	serial, err := newSerial()
	if err != nil {
		return nil, err
	}
	t := &x509.Certificate{
		SerialNumber:          serial,
		Subject:               pkix.Name{CommonName: n.String(), OrganizationalUnit: []string{string(role)}},
		URIs:                  []*url.URL{nodeURI(c.trust.cluster, n)},
		NotBefore:             now.Add(-skew),
		NotAfter:              now.Add(NodeValidity),
		BasicConstraintsValid: true,
		KeyUsage:              x509.KeyUsageDigitalSignature,
		ExtKeyUsage:           []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, t, c.trust.cert, pub, c.key)
	if err != nil {
		return nil, errs.Wrap(err, "sign certificate", n.String())
	}
	return pem.EncodeToMemory(&pem.Block{Type: pemCert, Bytes: der}), nil
}

// NewRequest makes a fresh key and a request for a certificate over it. The key
// stays where it was made; the request travels.
func NewRequest() (keyPEM, csr []byte, err error) {
	_, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return nil, nil, errs.Wrap(err, "make key", "")
	}
	csr, err = x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	if err != nil {
		return nil, nil, errs.Wrap(err, "make certificate request", "")
	}
	return encodeKey(key), csr, nil
}

// RequestKey checks a request and returns the public key it proves, 32 bytes.
func RequestKey(csr []byte) ([]byte, error) { return requestKey(csr) }

func requestKey(csr []byte) (ed25519.PublicKey, error) {
	r, err := x509.ParseCertificateRequest(csr)
	if err != nil {
		return nil, errs.E(errs.Invalid, "read certificate request", "", "%w", err)
	}
	pub, ok := r.PublicKey.(ed25519.PublicKey)
	if !ok {
		return nil, errs.E(errs.Invalid, "read certificate request", "", "key of kind %v, want Ed25519", r.PublicKeyAlgorithm)
	}
	if err := r.CheckSignature(); err != nil {
		return nil, errs.E(errs.Unauthorized, "read certificate request", "", "%w", err)
	}
	return pub, nil
}

func nodeURI(cluster string, n ids.Node) *url.URL {
	return &url.URL{Scheme: scheme, Host: cluster, Path: "/node/" + n.String()[1:]}
}

func newSerial() (*big.Int, error) {
	n, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 127))
	if err != nil {
		return nil, errs.Wrap(err, "make serial number", "")
	}
	return n, nil
}

func encodeKey(k ed25519.PrivateKey) []byte {
	der, err := x509.MarshalPKCS8PrivateKey(k)
	if err != nil {
		panic("identity: an Ed25519 key does not encode: " + err.Error()) // fails for unknown key types only
	}
	return pem.EncodeToMemory(&pem.Block{Type: pemKey, Bytes: der})
}

func parseKey(p []byte) (ed25519.PrivateKey, error) {
	b, _ := pem.Decode(p)
	if b == nil || b.Type != pemKey {
		return nil, errs.E(errs.Corrupt, "read key", "", "no PEM block %q", pemKey)
	}
	k, err := x509.ParsePKCS8PrivateKey(b.Bytes)
	if err != nil {
		return nil, errs.E(errs.Corrupt, "read key", "", "%w", err)
	}
	ed, ok := k.(ed25519.PrivateKey)
	if !ok {
		return nil, errs.E(errs.Corrupt, "read key", "", "a %T, want Ed25519", k)
	}
	return ed, nil
}
