package principal

import (
	"crypto/rand"
	"crypto/sha256"
	"log/slog"

	"github.com/unum-os/unum/internal/errs"
	"github.com/unum-os/unum/internal/identity"
)

// An invitation is printed as
//
//	unumlogin1-<32 characters>
//
// which are 16 secret bytes as identity.EncodeLine writes them.
const invitePrefix = "unumlogin1-"

// Invite is a secret by which a user logs in once from a client node.
type Invite [16]byte

// NewInvite makes one.
func NewInvite() Invite {
	var v Invite
	rand.Read(v[:]) // never fails
	return v
}

// Text returns the line that people copy. It is the secret.
func (v Invite) Text() string {
	return identity.EncodeLine(invitePrefix, v[:])
}

// String keeps the secret out of logs.
func (v Invite) String() string { return "login token" }

// GoString keeps the secret out of logs.
func (v Invite) GoString() string { return v.String() }

// LogValue keeps the secret out of logs.
func (v Invite) LogValue() slog.Value { return slog.StringValue(v.String()) }

// ID returns the hash by which the record knows it.
func (v Invite) ID() [32]byte {
	return sha256.Sum256(append([]byte("unum login id\x00"), v[:]...))
}

// ParseInvite reads what Text gave, as identity.DecodeLine does. Errors are of
// class Invalid.
func ParseInvite(s string) (v Invite, err error) {
	b, err := identity.DecodeLine(invitePrefix, s, len(v))
	if err != nil {
		return v, &errs.Error{Op: "read login token", Class: errs.Invalid, Err: err, Remedy: "unum user invite, on a storing node, and copy the whole line"}
	}
	return Invite(b), nil
}
