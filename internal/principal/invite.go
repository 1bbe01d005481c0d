package principal

import (
	"crypto/rand"
	"crypto/sha256"
	"encoding/base32"
	"log/slog"
	"strings"

	"github.com/unum-os/unum/internal/errs"
)

// An invitation is printed as
//
//	unumlogin1-<32 characters>
//
// in Crockford's alphabet of base 32: 16 secret bytes and the first 4 of the
// SHA-256 of them, so that a typing error is told from a refused one.
const invitePrefix = "unumlogin1-"

var crockford = base32.NewEncoding("0123456789abcdefghjkmnpqrstvwxyz").WithPadding(base32.NoPadding)

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
	return invitePrefix + crockford.EncodeToString(append(v[:], inviteSum(v)...))
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

// ParseInvite reads what Text gave; case, spaces and line breaks do not matter.
// Errors are of class Invalid.
func ParseInvite(s string) (Invite, error) {
	bad := func(why string) (Invite, error) {
		return Invite{}, errs.E(errs.Invalid, "read login token", "", "%s", why).WithRemedy("unum user invite, on a storing node, and copy the whole line")
	}
	if len(s) > 4096 {
		return bad("it is too long")
	}
	rest, ok := strings.CutPrefix(strings.ToLower(strings.Join(strings.Fields(s), "")), invitePrefix)
	if !ok {
		return bad("it begins with " + invitePrefix)
	}
	rest = strings.NewReplacer("i", "1", "l", "1", "o", "0").Replace(rest)
	b, err := crockford.DecodeString(rest)
	if err != nil || len(b) != 20 || crockford.EncodeToString(b) != rest {
		return bad("a character is mistyped or missing")
	}
	v := Invite(b[:16])
	if string(b[16:]) != string(inviteSum(v)) {
		return bad("the checksum does not hold: a character is mistyped")
	}
	return v, nil
}

func inviteSum(v Invite) []byte {
	h := sha256.Sum256(append([]byte(invitePrefix), v[:]...))
	return h[:4]
}
