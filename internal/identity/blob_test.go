package identity

import (
	"testing"

	"github.com/unum-os/unum/internal/errs"
)

func TestBlobSignatures(t *testing.T) {
	ca, err := NewCA("home")
	if err != nil {
		t.Fatal(err)
	}
	other, err := NewCA("home")
	if err != nil {
		t.Fatal(err)
	}
	blob := []byte("bytes")
	sig := ca.SignBlob("a", blob)
	if err := ca.Trust().VerifyBlob("a", blob, sig); err != nil {
		t.Fatal(err)
	}
	for what, err := range map[string]error{
		"another domain":    ca.Trust().VerifyBlob("b", blob, sig),
		"shifted domain":    ca.Trust().VerifyBlob("ab", blob[1:], sig),
		"another blob":      ca.Trust().VerifyBlob("a", blob[:4], sig),
		"another authority": other.Trust().VerifyBlob("a", blob, sig),
		"no signature":      ca.Trust().VerifyBlob("a", blob, nil),
		"cut":               ca.Trust().VerifyBlob("a", blob, sig[:63]),
	} {
		if !errs.Has(err, errs.Unauthorized) {
			t.Errorf("%s: %v", what, err)
		}
	}
}
