package identity

import (
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/base32"
	"encoding/hex"
	"log/slog"
	"strings"

	"github.com/unum-os/unum/internal/errs"
)

// A token is printed as
//
//	unum1-<84 characters>
//
// The digit is the version. The characters are base 32 in Crockford's alphabet
// (no i, l, o, u) of secret (16 bytes), SHA-256 of the authority's certificate
// (32) and the first 4 bytes of the SHA-256 of all that goes before, so that a
// typing error is told from a refused token.
const (
	tokenPrefix  = "unum1-"
	tokenBytes   = 16 + 32 + 4
	tokenLetters = (tokenBytes*8 + 4) / 5
)

var crockford = base32.NewEncoding("0123456789abcdefghjkmnpqrstvwxyz").WithPadding(base32.NoPadding)

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
	b := append(append(make([]byte, 0, tokenBytes), t.Secret[:]...), t.Authority[:]...)
	sum := tokenSum(b)
	return tokenPrefix + crockford.EncodeToString(append(b, sum[:]...))
}

// GoString and LogValue keep the secret out of logs.
func (t Token) GoString() string {
	id := t.ID()
	return "identity.Token(id " + hex.EncodeToString(id[:4]) + ")"
}

// LogValue keeps the secret out of logs.
func (t Token) LogValue() slog.Value { return slog.StringValue(t.GoString()) }

// ParseToken reads what String printed; case, spaces and line breaks do not
// matter. Errors are of class Invalid.
func ParseToken(s string) (Token, error) {
	bad := func(format string, args ...any) (Token, error) {
		return Token{}, errs.E(errs.Invalid, "read token", "", format, args...).WithRemedy("copy the whole line")
	}
	s = strings.ToLower(strings.Join(strings.Fields(s), ""))
	rest, ok := strings.CutPrefix(s, tokenPrefix)
	if !ok {
		if v, _, isToken := strings.Cut(s, "-"); isToken && strings.HasPrefix(v, "unum") && strings.Trim(v[4:], "0123456789") == "" && len(v) > 4 {
			return Token{}, errs.E(errs.Invalid, "read token", "", "version %s, this program knows version 1", v[4:]).
				WithRemedy("install the version of unum that the cluster runs")
		}
		return Token{}, errs.E(errs.Invalid, "read token", "", "a token begins with %s", tokenPrefix).
			WithRemedy("unum token on a machine of the cluster")
	}
	if len(rest) != tokenLetters {
		return Token{}, errs.E(errs.Invalid, "read token", "", "%d characters after %s, want %d", len(rest), tokenPrefix, tokenLetters).
			WithRemedy("copy the whole line")
	}
	rest = strings.NewReplacer("i", "1", "l", "1", "o", "0").Replace(rest)
	b, err := crockford.DecodeString(rest)
	if err != nil || crockford.EncodeToString(b) != rest {
		return bad("a character is mistyped: tokens consist of digits and letters without u")
	}
	sum := tokenSum(b[:48])
	if string(sum[:]) != string(b[48:]) {
		return bad("the checksum does not hold: a character is mistyped")
	}
	var t Token
	copy(t.Secret[:], b)
	copy(t.Authority[:], b[16:])
	return t, nil
}

// ID returns the hash by which the record knows the token.
func (t Token) ID() [32]byte { return SecretID(t.Secret) }

// SecretID returns the ID of the token with the secret.
func SecretID(secret [16]byte) [32]byte {
	return sha256.Sum256(append([]byte("unum token id\x00"), secret[:]...))
}

// SameID compares two IDs in constant time.
func SameID(a, b [32]byte) bool { return subtle.ConstantTimeCompare(a[:], b[:]) == 1 }

func tokenSum(b []byte) [4]byte {
	h := sha256.Sum256(append([]byte(tokenPrefix), b...))
	return [4]byte(h[:4])
}
