package principal

import (
	"bytes"
	"encoding/hex"
	"fmt"
	"io"
	"log/slog"
	"regexp"
	"slices"
	"time"

	"github.com/unum-os/unum/internal/errs"
	"github.com/unum-os/unum/internal/identity"
	"github.com/unum-os/unum/internal/ids"
	"github.com/unum-os/unum/internal/wire"
)

// Limits.
const (
	MaxName   = 32   // bytes of a user's name, as in passwd(5)
	MaxGroups = 256  // supplementary groups of a user
	MaxProof  = 4096 // bytes of a proof: a credential with as many groups takes 1.7 KiB
)

const (
	// Validity is how long a credential holds: as long as a user who was
	// disabled may go on where the record is not asked.
	Validity = time.Hour
	// Renewal is how long a credential can be exchanged for a newer one without
	// logging in again.
	Renewal = 30 * 24 * time.Hour
	// Tolerance is how far the clock of who verifies may be behind that of who
	// signed. At the end there is none: a credential that has ended is worth
	// nothing anywhere.
	Tolerance = time.Minute

	domain = "unum credential 1"
)

var nameForm = regexp.MustCompile(`^[a-z_][a-z0-9_.-]{0,31}$`)

// ValidName reports whether s can be a user's name: as in passwd(5), lower-case
// letters, digits and _ . -, at most 32, not beginning with a digit.
func ValidName(s string) bool { return nameForm.MatchString(s) }

// NoUID is the uid that means none.
const NoUID = 1<<32 - 1

// Credential says that a user may speak from one node for a time.
type Credential struct {
	Cluster string   `cbor:"1,keyasint"` // identity.Trust.Cluster
	User    string   `cbor:"2,keyasint"`
	UID     uint32   `cbor:"3,keyasint"` // never 0: root of a client node is nobody special
	GID     uint32   `cbor:"4,keyasint"`
	Groups  []uint32 `cbor:"5,keyasint,omitempty"` // supplementary
	Node    ids.Node `cbor:"6,keyasint"`           // the only one it may be shown by
	Issued  int64    `cbor:"7,keyasint"`           // ns since 1970, as the next two
	Expires int64    `cbor:"8,keyasint"`
	// Renewable is until when a newer one is given for it.
	Renewable int64    `cbor:"9,keyasint"`
	Serial    [16]byte `cbor:"10,keyasint"`
}

// New makes a credential of a user for a node, valid from now for Validity and
// renewable for Renewal. Its number comes from random: crypto/rand.Reader.
func New(cluster, user string, uid, gid uint32, groups []uint32, node ids.Node, now time.Time, random io.Reader) (Credential, error) {
	c := Credential{Cluster: cluster, User: user, UID: uid, GID: gid, Groups: slices.Clone(groups), Node: node,
		Issued: now.UnixNano(), Expires: now.Add(Validity).UnixNano(), Renewable: now.Add(Renewal).UnixNano()}
	if _, err := io.ReadFull(random, c.Serial[:]); err != nil {
		return Credential{}, errs.Wrap(err, "make credential", user)
	}
	return c, c.check()
}

// Renewed returns a newer credential for the same user and node, unsigned. It
// cannot be renewed for longer than c. Whoever calls has asked the record
// whether the user is still to have one, and for uid and groups as they are now.
// After the end of renewal the error is of class Unauthorized.
func (c *Credential) Renewed(uid, gid uint32, groups []uint32, now time.Time, random io.Reader) (Credential, error) {
	if now.UnixNano() >= c.Renewable {
		return Credential{}, refuse(Expired, c.User, "it could be renewed until %s", stamp(c.Renewable)).WithRemedy("unum login")
	}
	if uid != c.UID {
		return Credential{}, refuse(OtherUser, c.User, "its uid is %d now, the credential's is %d", uid, c.UID).WithRemedy("unum login")
	}
	n, err := New(c.Cluster, c.User, uid, gid, groups, c.Node, now, random)
	n.Renewable = c.Renewable
	n.Expires = min(n.Expires, n.Renewable)
	return n, err
}

// Principal returns who asks when c is shown.
func (c *Credential) Principal() Principal {
	return Principal{Node: c.Node, UID: c.UID, User: c.User}
}

// String says whose c is and when it ends, and the beginning of its number.
func (c Credential) String() string {
	return fmt.Sprintf("credential %s of %s (uid %d) at %v until %s", hex.EncodeToString(c.Serial[:4]), c.User, c.UID, c.Node, stamp(c.Expires))
}

// LogValue is String.
func (c Credential) LogValue() slog.Value { return slog.StringValue(c.String()) }

func stamp(ns int64) string { return time.Unix(0, ns).UTC().Format(time.RFC3339) }

// check says what is senseless in c, with class Invalid.
func (c *Credential) check() error {
	why := ""
	switch {
	case c.Cluster == "" || len(c.Cluster) > 63:
		why = "no cluster"
	case !ValidName(c.User):
		why = "no user's name: lower-case letters, digits and _ . -, at most 32"
	case c.UID == 0 || c.UID == NoUID:
		why = fmt.Sprintf("uid %d is no user's of the cluster", c.UID)
	case c.GID == NoUID || len(c.Groups) > MaxGroups || slices.Contains(c.Groups, NoUID):
		why = fmt.Sprintf("group %d, %d more groups; limit %d", c.GID, len(c.Groups), MaxGroups)
	case c.Node == 0:
		why = "no node"
	case c.Issued <= 0 || c.Issued >= c.Expires || c.Expires > c.Renewable || c.Expires-c.Issued > int64(Validity) || c.Renewable-c.Issued > int64(Renewal):
		why = "its times are out of order or too far apart"
	default:
		return nil
	}
	return errs.E(errs.Invalid, "make credential", c.User, "%s", why)
}

// Proof is a signed credential as it travels: whoever has it, on the node it is
// bound to, can speak as the user.
type Proof []byte

// String keeps the bytes out of logs.
func (p Proof) String() string { return fmt.Sprintf("proof of %d bytes", len(p)) }

// GoString keeps the bytes out of logs.
func (p Proof) GoString() string { return p.String() }

// Format keeps the bytes out of logs, whatever the verb.
func (p Proof) Format(s fmt.State, _ rune) { io.WriteString(s, p.String()) }

// LogValue keeps the bytes out of logs.
func (p Proof) LogValue() slog.Value { return slog.StringValue(p.String()) }

// MarshalJSON keeps the bytes out of logs and listings.
func (p Proof) MarshalJSON() ([]byte, error) { return []byte(`"` + p.String() + `"`), nil }

// signed is the encoding of a Proof. Body is the credential's encoding.
type signed struct {
	Body      []byte `cbor:"1,keyasint"`
	Signature []byte `cbor:"2,keyasint"`
}

// Sign makes a proof of c with the authority's key. Whoever calls has decided
// that the user is to have it. Errors are of class Invalid.
func Sign(ca *identity.CA, c Credential) (Proof, error) {
	if err := c.check(); err != nil {
		return nil, err
	}
	if c.Cluster != ca.Trust().Cluster() {
		return nil, errs.E(errs.Invalid, "make credential", c.User, "for cluster %s by the authority of %s", c.Cluster, ca.Trust().Cluster())
	}
	body := wire.MustMarshal(c)
	return wire.MustMarshal(signed{body, ca.SignBlob(domain, body)}), nil
}

// Verify returns what a proof shown by node proves at time now. Errors are of
// class Unauthorized, with a Reason in their chain.
func Verify(trust *identity.Trust, p Proof, node ids.Node, now time.Time) (*Credential, error) {
	c, err := open(trust, p)
	if err != nil {
		return nil, err
	}
	t := now.UnixNano()
	switch {
	case c.Node != node:
		return nil, refuse(OtherNode, c.User, "the credential is bound to %v, %v shows it", c.Node, node).WithRemedy("unum login")
	case t < c.Issued-int64(Tolerance):
		return nil, refuse(NotYet, c.User, "the credential begins %s, it is %s", stamp(c.Issued), stamp(t)).
			WithRemedy("compare the clocks of the nodes")
	case t >= c.Expires:
		return nil, refuse(Expired, c.User, "the credential ended %s, it is %s", stamp(c.Expires), stamp(t)).
			WithRemedy("unum login")
	}
	return c, nil
}

// VerifyRenewal is Verify for who gives newer credentials: an ended one counts
// as long as it can be renewed.
func VerifyRenewal(trust *identity.Trust, p Proof, node ids.Node, now time.Time) (*Credential, error) {
	c, err := open(trust, p)
	if err != nil {
		return nil, err
	}
	if t := now.UnixNano(); t >= c.Expires && t < c.Renewable && c.Node == node {
		return c, nil
	}
	return Verify(trust, p, node, now)
}

// open checks all of a proof that depends on neither node nor time.
func open(trust *identity.Trust, p Proof) (*Credential, error) {
	bad := func(format string, args ...any) error { return refuse(Malformed, "", format, args...) }
	if len(p) > MaxProof {
		return nil, bad("%d bytes, limit %d", len(p), MaxProof)
	}
	var s signed
	if err := wire.Unmarshal(p, &s); err != nil {
		return nil, bad("%v", err)
	}
	if !bytes.Equal(wire.MustMarshal(s), p) {
		return nil, bad("not in its one encoding")
	}
	var c Credential
	if err := wire.Unmarshal(s.Body, &c); err != nil {
		return nil, bad("%v", err)
	}
	// Read before the signature is: another cluster's credential is told from a
	// forged one. Nothing but the name of the cluster is believed of it.
	if c.Cluster != trust.Cluster() {
		if c.check() != nil {
			return nil, bad("the credential makes no sense")
		}
		return nil, refuse(OtherCluster, "", "of cluster %s, this is %s", c.Cluster, trust.Cluster())
	}
	if trust.VerifyBlob(domain, s.Body, s.Signature) != nil {
		return nil, refuse(BadSignature, "", "this cluster's authority has not signed it")
	}
	if err := c.check(); err != nil {
		return nil, bad("%v", err)
	}
	if !bytes.Equal(wire.MustMarshal(c), s.Body) {
		return nil, bad("not in its one encoding")
	}
	return &c, nil
}
