package identity

import (
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/hex"
	"fmt"
	"log/slog"
	"strings"

	"github.com/unum-os/unum/internal/errs"
)

// A token is printed as
//
//	unum1-<84 characters>
//
// The digit is the version. The bytes are the secret (16) and the SHA-256 of the
// authority's certificate (32); EncodeLine says how they are written.
const (
	tokenPrefix = "unum1-"
	tokenBytes  = 16 + 32 // bytes of a join token: its secret, and the authority's fingerprint
)

// Token invites a machine into a cluster.
type Token struct {
	Secret [16]byte // 128 random bits; said only to a server with Authority's chain
	// Authority is the fingerprint of the cluster's authority (Trust.Fingerprint).
	Authority [32]byte
}

// NewToken makes a token for the cluster of the authority with the fingerprint.
func NewToken(authority [32]byte) (Token, error) {
	t := Token{Authority: authority}
	if _, err := rand.Read(t.Secret[:]); err != nil {
		return Token{}, errs.Wrap(err, "make token", "")
	}
	return t, nil
}

// String returns the line that people copy. It contains the secret.
func (t Token) String() string {
	return EncodeLine(tokenPrefix, append(append(make([]byte, 0, tokenBytes), t.Secret[:]...), t.Authority[:]...))
}

// GoString and LogValue keep the secret out of logs.
func (t Token) GoString() string {
	id := t.ID()
	return "identity.Token(id " + hex.EncodeToString(id[:4]) + ")"
}

// LogValue keeps the secret out of logs.
func (t Token) LogValue() slog.Value { return slog.StringValue(t.GoString()) }

// ParseToken reads what String printed, as DecodeLine does. Errors are of class
// Invalid.
func ParseToken(s string) (Token, error) {
	b, err := DecodeLine(tokenPrefix, s, tokenBytes)
	if err == nil {
		return Token{Secret: [16]byte(b), Authority: [32]byte(b[16:])}, nil
	}
	e := &errs.Error{Op: "read token", Class: errs.Invalid, Err: err, Remedy: "copy the whole line"}
	if len(s) > maxLine {
		return Token{}, e
	}
	if s = trimLine(s); !strings.HasPrefix(s, tokenPrefix) {
		e.Err, e.Remedy = fmt.Errorf("a token begins with %s", tokenPrefix), "unum token on a machine of the cluster"
		if v, _, ok := strings.Cut(s, "-"); ok && strings.HasPrefix(v, "unum") && strings.Trim(v[4:], "0123456789") == "" && len(v) > 4 {
			e.Err, e.Remedy = fmt.Errorf("version %s, this program knows version 1", v[4:]), "install the version of unum that the cluster runs"
		}
	}
	return Token{}, e
}

// ID returns the hash by which the record knows the token.
func (t Token) ID() [32]byte { return SecretID(t.Secret) }

// SecretID returns the ID of the token with the secret.
func SecretID(secret [16]byte) [32]byte {
	return sha256.Sum256(append([]byte("unum token id\x00"), secret[:]...))
}

// SameID compares two IDs in constant time.
func SameID(a, b [32]byte) bool { return subtle.ConstantTimeCompare(a[:], b[:]) == 1 }
