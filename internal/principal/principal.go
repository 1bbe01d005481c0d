package principal

import (
	"fmt"
	"time"

	"github.com/unum-os/unum/internal/errs"
	"github.com/unum-os/unum/internal/identity"
	"github.com/unum-os/unum/internal/ids"
)

// Principal is who asks, and through which node. The zero value is nobody.
type Principal struct {
	Node ids.Node `cbor:"1,keyasint,omitempty"`
	UID  uint32   `cbor:"2,keyasint,omitempty"`
	// User is the user's name in the cluster, from a credential; for a user that
	// a storing node vouches for it may be empty or a local name, and counts for
	// nothing.
	User string `cbor:"3,keyasint,omitempty"`
	// System says that the node itself asks; UID and User are empty then.
	System bool `cbor:"4,keyasint,omitempty"`
}

// Of returns the system principal of a node.
func Of(n ids.Node) Principal { return Principal{Node: n, System: true} }

// String prints p for people: "n2 itself", "ana (uid 1000) at n3", "uid 1000 at n3".
func (p Principal) String() string {
	switch {
	case p.Node == 0:
		return "nobody"
	case p.System:
		return p.Node.String() + " itself"
	case p.User != "":
		return fmt.Sprintf("%s (uid %d) at %v", p.User, p.UID, p.Node)
	}
	return fmt.Sprintf("uid %d at %v", p.UID, p.Node)
}

// Valid reports whether p is somebody and says it in the one way there is.
func (p Principal) Valid() bool {
	return p.Node != 0 && len(p.User) <= MaxName && !(p.System && (p.UID != 0 || p.User != ""))
}

// Believe is the rule of the door: whether what the node from claims about who
// asks is to be believed. From is proven by its certificate; trusted says that
// it is a storing node of this cluster. A storing node is believed whatever it
// says: it vouches for its users, and hands on what it has checked itself.
// Another node may speak for itself, and for a user whose proof it shows.
// Errors are of class Unauthorized.
func Believe(from ids.Node, trusted bool, claim Principal, proof Proof, trust *identity.Trust, now time.Time) error {
	switch {
	case !claim.Valid():
		return refuse(Malformed, claim.String(), "the request says nobody asks")
	case trusted:
		return nil
	case claim.Node != from:
		return refuse(OtherNode, claim.String(), "%v may not speak for %v", from, claim.Node)
	case claim.System:
		return nil
	case len(proof) == 0:
		return refuse(Missing, claim.String(), "%v is not believed about its users", from).
			WithRemedy("unum login")
	}
	c, err := Verify(trust, proof, from, now)
	if err != nil {
		return err
	}
	if c.UID != claim.UID || c.User != claim.User {
		return refuse(OtherUser, claim.String(), "the credential is that of %s (uid %d)", c.User, c.UID)
	}
	return nil
}

// Reason says what is wrong with a proof.
type Reason string

// The reasons.
const (
	Missing      Reason = "no credential"
	Malformed    Reason = "malformed"
	BadSignature Reason = "wrong signature"
	OtherCluster Reason = "another cluster's"
	OtherNode    Reason = "another node's"
	OtherUser    Reason = "another user's"
	NotYet       Reason = "not yet valid"
	Expired      Reason = "expired"
)

// Error makes a Reason the cause of an error.
func (r Reason) Error() string { return string(r) }

// refuse makes an error in whose chain the reason is.
func refuse(r Reason, subject, format string, args ...any) *errs.Error {
	return errs.E(errs.Unauthorized, "prove", subject, "%w: %s", r, fmt.Sprintf(format, args...))
}
