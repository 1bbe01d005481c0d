package identity

import (
	"crypto/ed25519"

	"github.com/unum-os/unum/internal/errs"
)

// blobMessage is what is signed for a blob: a beginning that no certificate has
// (those begin with 0x30), the domain with its length, the blob. So a signature
// given for one purpose holds for no other.
func blobMessage(domain string, blob []byte) []byte {
	if domain == "" || len(domain) > 255 {
		panic("identity: a domain has 1 to 255 bytes: " + domain) // domains are constants
	}
	m := append(make([]byte, 0, 20+len(domain)+len(blob)), "unum signed blob\x00"...)
	m = append(append(m, byte(len(domain))), domain...)
	return append(m, blob...)
}

// SignBlob signs bytes that are no certificate, 64 bytes of Ed25519. The domain
// says what they are; it is a constant of who signs.
func (c *CA) SignBlob(domain string, blob []byte) []byte {
	return ed25519.Sign(c.key, blobMessage(domain, blob))
}

// VerifyBlob reports with an error of class Unauthorized that sig is not what
// SignBlob of this cluster's authority gave for domain and blob.
func (t *Trust) VerifyBlob(domain string, blob, sig []byte) error {
	pub, ok := t.cert.PublicKey.(ed25519.PublicKey)
	if !ok || len(sig) != ed25519.SignatureSize || !ed25519.Verify(pub, blobMessage(domain, blob), sig) {
		return errs.E(errs.Unauthorized, "verify "+domain, "", "the signature is not that of this cluster's authority")
	}
	return nil
}
