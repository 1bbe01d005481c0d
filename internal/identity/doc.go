// Package identity says who is who in a cluster: its own certificate authority,
// the certificates of its nodes, and the tokens that invite a new one.
//
// Words. The authority (CA) is a self-signed key pair made once with the
// cluster; its public half is the Trust that every node holds, its private half
// stays with the record's replicas. A node certificate binds a key to the URI
// unum://<cluster>/node/<number>; it is renewed long before it ends. A request (CSR) asks for one; it is made, like
// the key in it, on the node that joins. A Holder is the certificate a running
// node shows, exchangeable at any time. A token is a line of text that lets one
// machine join: it holds a secret and the fingerprint of the authority, so that
// the joining machine knows whom it speaks to before it says the secret.
//
// Keys are Ed25519: of the two kinds crypto/tls handles without big tables it
// verifies and signs faster (on the reference machine 75 us and 38 us against
// 101 us and 46 us for ECDSA P-256), its signatures need no randomness, and no
// foreign software has to accept our certificates.
//
// Invariants. A private key never leaves the machine it was made on, except the
// authority's, which goes from replica to replica over mutual TLS. The secret of
// a token is never stored: the record knows its hash (Token.ID). A certificate
// counts only if it chains to the cluster's authority and names the cluster.
//
// Locks: none. On failure every function returns an errs error: Unauthorized
// for a certificate that does not hold, Invalid for a text that is no token,
// Corrupt for bytes that are no key.
package identity
