package identity

import (
	"crypto/sha256"
	"encoding/base32"
	"strings"

	"github.com/unum-os/unum/internal/errs"
)

// What people copy, tokens of all kinds, is a prefix and, in Crockford's alphabet
// of base 32 (no i, l, o, u), the bytes and the first 4 of the SHA-256 of prefix and
// bytes, so that a typing error is told from a refused token.
var crockford = base32.NewEncoding("0123456789abcdefghjkmnpqrstvwxyz").WithPadding(base32.NoPadding)

const (
	lineSum = 4 // bytes of a token's checksum
	// maxLine bounds what is looked at, with the spaces that a mail may have put in.
	maxLine = 4096
)

func sumLine(prefix string, b []byte) []byte {
	h := sha256.Sum256(append([]byte(prefix), b...))
	return h[:lineSum]
}

// EncodeLine returns the line that people copy for b.
func EncodeLine(prefix string, b []byte) string {
	return prefix + crockford.EncodeToString(append(b[:len(b):len(b)], sumLine(prefix, b)...))
}

// trimLine returns a copied line in its one spelling, but for mistaken letters.
func trimLine(s string) string { return strings.ToLower(strings.Join(strings.Fields(s), "")) }

// DecodeLine reads what EncodeLine gave for size bytes; case, spaces and line
// breaks do not matter, nor which of two letters that look alike was read. Errors
// are of class Invalid and say no more than why.
func DecodeLine(prefix, s string, size int) ([]byte, error) {
	bad := func(format string, args ...any) ([]byte, error) {
		return nil, errs.E(errs.Invalid, "", "", format, args...)
	}
	if len(s) > maxLine {
		return bad("it is too long")
	}
	rest, ok := strings.CutPrefix(trimLine(s), prefix)
	if !ok {
		return bad("it begins with %s", prefix)
	}
	if want := crockford.EncodedLen(size + lineSum); len(rest) != want {
		return bad("%d characters after %s, want %d", len(rest), prefix, want)
	}
	rest = strings.NewReplacer("i", "1", "l", "1", "o", "0").Replace(rest)
	b, err := crockford.DecodeString(rest)
	if err != nil || crockford.EncodeToString(b) != rest {
		return bad("a character is mistyped: there are digits, and letters without u")
	}
	if string(b[size:]) != string(sumLine(prefix, b[:size])) {
		return bad("the checksum does not hold: a character is mistyped")
	}
	return b[:size], nil
}
