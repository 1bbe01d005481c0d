package identity

import (
	"bytes"
	"crypto/ed25519"
	"crypto/sha256"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/unum-os/unum/internal/disk"
	"github.com/unum-os/unum/internal/errs"
	"github.com/unum-os/unum/internal/ids"
)

func newCA(t testing.TB, cluster string) *CA {
	t.Helper()
	ca, err := NewCA(cluster)
	if err != nil {
		t.Fatal(err)
	}
	return ca
}

func node(t testing.TB, ca *CA, n ids.Node, now time.Time) (*Holder, *x509.Certificate) {
	t.Helper()
	key, csr, err := NewRequest()
	if err != nil {
		t.Fatal(err)
	}
	cert, err := ca.Sign(csr, n, RoleStore, now)
	if err != nil {
		t.Fatal(err)
	}
	h, err := NewHolder(ca.Trust(), cert, key)
	if err != nil {
		t.Fatal(err)
	}
	c, err := h.GetCertificate(nil)
	if err != nil {
		t.Fatal(err)
	}
	return h, c.Leaf
}

func TestVerify(t *testing.T) {
	ca, other, twin := newCA(t, "home"), newCA(t, "away"), newCA(t, "home")
	now := time.Now()
	_, good := node(t, ca, 7, now)
	for _, use := range []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth} {
		p, err := ca.Trust().Verify([]*x509.Certificate{good}, use, now)
		if err != nil || p != (Peer{7, RoleStore, sha256.Sum256(good.PublicKey.(ed25519.PublicKey)), good.NotAfter}) {
			t.Fatalf("%+v %v", p, err)
		}
	}
	if got := good.URIs[0].String(); got != "unum://home/node/7" {
		t.Fatal(got)
	}
	_, foreign := node(t, other, 7, now)
	_, twins := node(t, twin, 7, now)
	for what, c := range map[string]struct {
		chain []*x509.Certificate
		at    time.Time
	}{
		"none":                       {nil, now},
		"another cluster":            {[]*x509.Certificate{foreign}, now},
		"another with the same name": {[]*x509.Certificate{twins}, now},
		"smuggled authority":         {[]*x509.Certificate{twins, twin.Trust().cert}, now},
		"the authority itself":       {[]*x509.Certificate{ca.Trust().cert}, now},
		"expired":                    {[]*x509.Certificate{good}, now.Add(NodeValidity + time.Hour)},
		"not yet":                    {[]*x509.Certificate{good}, now.Add(-skew - time.Hour)},
	} {
		if _, err := ca.Trust().Verify(c.chain, x509.ExtKeyUsageClientAuth, c.at); !errs.Has(err, errs.Unauthorized) {
			t.Errorf("%s: %v", what, err)
		}
	}
}

func TestVerifyJoin(t *testing.T) {
	ca, other := newCA(t, "home"), newCA(t, "home")
	_, leaf := node(t, ca, 1, time.Now())
	chain := []*x509.Certificate{leaf, ca.Trust().cert}
	if tr, err := VerifyJoin(chain, ca.Trust().Fingerprint(), time.Now()); err != nil || tr.Cluster() != "home" {
		t.Fatal(err)
	}
	for _, role := range []Role{RoleClient, RoleWitness} { // who is trusted with nothing hears no secret
		_, csr, err := NewRequest()
		if err != nil {
			t.Fatal(err)
		}
		cert, err := ca.Sign(csr, 2, role, time.Now())
		if err != nil {
			t.Fatal(err)
		}
		der, err := parseCert(cert)
		if err != nil {
			t.Fatal(err)
		}
		leaf, err := x509.ParseCertificate(der)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := VerifyJoin([]*x509.Certificate{leaf, ca.Trust().cert}, ca.Trust().Fingerprint(), time.Now()); !errs.Has(err, errs.Unauthorized) {
			t.Errorf("a %s node: %v", role, err)
		}
	}
	_, forged := node(t, other, 1, time.Now())
	for what, c := range map[string][]*x509.Certificate{
		"other authority":        {forged, other.Trust().cert},
		"leaf of another":        {forged, ca.Trust().cert},
		"no authority":           {leaf},
		"authority in the place": {ca.Trust().cert, ca.Trust().cert},
	} {
		if _, err := VerifyJoin(c, ca.Trust().Fingerprint(), time.Now()); !errs.Has(err, errs.Unauthorized) {
			t.Errorf("%s: %v", what, err)
		}
	}
}

func TestAuthorityRoundTrip(t *testing.T) {
	ca := newCA(t, "home")
	back, err := ParseCA(ca.CertPEM(), ca.KeyPEM())
	if err != nil {
		t.Fatal(err)
	}
	_, leaf := node(t, back, 3, time.Now())
	if _, err := ca.Trust().Verify([]*x509.Certificate{leaf}, x509.ExtKeyUsageClientAuth, time.Now()); err != nil {
		t.Fatal(err)
	}
	if _, err := ParseCA(ca.CertPEM(), newCA(t, "home").KeyPEM()); !errs.Has(err, errs.Corrupt) {
		t.Fatalf("foreign key: %v", err)
	}
	for _, name := range []string{"", "Home", "a_b", "-a", "a-", strings.Repeat("a", 64), "a/b"} {
		if _, err := NewCA(name); !errs.Has(err, errs.Invalid) {
			t.Errorf("name %q accepted: %v", name, err)
		}
	}
}

func TestHolderSwap(t *testing.T) {
	ca := newCA(t, "home")
	h, first := node(t, ca, 3, time.Now())
	key, csr, _ := NewRequest()
	renewed, err := ca.Sign(csr, 3, RoleStore, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	if err := h.Swap(renewed, key); err != nil {
		t.Fatal(err)
	}
	if c, _ := h.GetClientCertificate(nil); c.Leaf.Equal(first) {
		t.Fatal("still the old one")
	}
	other, err := ca.Sign(csr, 4, RoleStore, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	if err := h.Swap(other, key); !errs.Has(err, errs.Invalid) {
		t.Fatalf("became another node: %v", err)
	}
	strange, _, _ := NewRequest()
	if err := h.Swap(renewed, strange); !errs.Has(err, errs.Corrupt) {
		t.Fatalf("foreign key: %v", err)
	}
	if h.Node() != 3 {
		t.Fatal(h.Node())
	}
}

func TestSignRefuses(t *testing.T) {
	ca := newCA(t, "home")
	_, csr, _ := NewRequest()
	csr[len(csr)-1] ^= 1
	if _, err := ca.Sign(csr, 1, RoleStore, time.Now()); !errs.Has(err, errs.Unauthorized) {
		t.Errorf("broken proof: %v", err)
	}
	if _, err := ca.Sign([]byte("x"), 1, RoleStore, time.Now()); !errs.Has(err, errs.Invalid) {
		t.Errorf("garbage: %v", err)
	}
}

func TestToken(t *testing.T) {
	fp := newCA(t, "home").Trust().Fingerprint()
	tok, err := NewToken(fp)
	if err != nil {
		t.Fatal(err)
	}
	s := tok.String()
	for _, typed := range []string{s, " " + strings.ToUpper(s) + "\n", s[:40] + "\n  " + s[40:], strings.ReplaceAll(s[6:], "0", "o")} {
		if !strings.Contains(strings.ToLower(typed), "unum1-") {
			typed = "unum1-" + typed
		}
		got, err := ParseToken(typed)
		if err != nil || got != tok || !SameID(got.ID(), tok.ID()) {
			t.Fatalf("%q: %v", typed, err)
		}
	}
	if strings.Contains(fmt.Sprintf("%#v", tok), s[6:20]) || tok.LogValue().String() != tok.GoString() {
		t.Fatal("the secret shows")
	}
	typo := []byte(s)
	for i := len("unum1-"); i < len(s); i++ { // every single mistyped character is found
		typo[i] = "0123456789"[i%10]
		if typo[i] != s[i] {
			if _, err := ParseToken(string(typo)); !errs.Has(err, errs.Invalid) || !strings.Contains(err.Error(), "mistyped") {
				t.Fatalf("at %d: %v", i, err)
			}
		}
		typo[i] = s[i]
	}
	for in, want := range map[string]string{
		"":                      "begins with",
		"hello":                 "begins with",
		s[:50]:                  "copy the whole line",
		"unum2-" + s[6:]:        "version 2",
		s[:len(s)-1] + "u":      "mistyped",
		s[:len(s)-1] + "\u00e4": "characters",
	} {
		if _, err := ParseToken(in); !errs.Has(err, errs.Invalid) || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v", in, err)
		}
	}
}

func FuzzParseToken(f *testing.F) {
	tok, _ := NewToken([32]byte{1})
	f.Add(tok.String())
	f.Fuzz(func(t *testing.T, s string) {
		if tok, err := ParseToken(s); err == nil {
			if back, err := ParseToken(tok.String()); err != nil || back != tok {
				t.Fatalf("%q does not come back: %v", s, err)
			}
		}
	})
}

func FuzzParseTrust(f *testing.F) {
	f.Add(newCA(f, "home").Trust().cert.Raw)
	f.Fuzz(func(t *testing.T, der []byte) {
		tr, err := ParseTrust(pem.EncodeToMemory(&pem.Block{Type: pemCert, Bytes: der}))
		if err == nil && tr.Cluster() == "" {
			t.Fatal("an authority of nothing")
		}
	})
}

func FuzzRequestKey(f *testing.F) {
	_, csr, _ := NewRequest()
	f.Add(csr)
	f.Fuzz(func(t *testing.T, csr []byte) {
		if k, err := RequestKey(csr); err == nil && len(k) != 32 {
			t.Fatalf("key of %d bytes", len(k))
		}
	})
}

func TestSaveLoad(t *testing.T) {
	path := filepath.Join(t.TempDir(), "node.key")
	for _, want := range []string{"one", "two"} {
		if err := Save(disk.Real, path, []byte(want)); err != nil {
			t.Fatal(err)
		}
		if got, err := Load(disk.Real, path); err != nil || !bytes.Equal(got, []byte(want)) {
			t.Fatalf("%q %v", got, err)
		}
	}
	if es, _ := os.ReadDir(filepath.Dir(path)); len(es) != 1 {
		t.Fatalf("%d files", len(es))
	}
	if err := os.Chmod(path, 0o640); err != nil {
		t.Fatal(err)
	}
	if _, err := Load(disk.Real, path); !errs.Has(err, errs.Permission) {
		t.Fatalf("readable by others: %v", err)
	}
	if _, err := Load(disk.Real, path+"x"); !errs.Has(err, errs.NotFound) {
		t.Fatalf("missing: %v", err)
	}
	if err := Save(disk.Real, filepath.Join(path, "x"), nil); err == nil {
		t.Fatal("saved below a file")
	}
}

// Wherever saving is cut off or fails, the file is the old or the new one, and
// the new one if that was acknowledged.
func TestSaveIsAllOrNothing(t *testing.T) {
	old, young := bytes.Repeat([]byte("a"), 3000), bytes.Repeat([]byte("b"), 2000)
	for k := int64(1); ; k++ {
		for seed := range uint64(8) {
			for _, fail := range []error{nil, syscall.EIO, syscall.ENOSPC} {
				m := disk.NewMem()
				if err := Save(m, "/f", old); err != nil {
					t.Fatal(err)
				}
				var after *disk.Mem
				w := disk.NewFailing(m, disk.Fault{At: k, Err: fail, Do: func() { after = m.Crash(seed) }})
				err := Save(w, "/f", young)
				if w.Fired() == "" {
					if k < 5 {
						t.Fatalf("only %d changes", k)
					}
					return
				}
				if fail != nil && errs.ClassOf(err) != errs.ClassOf(fail) {
					t.Fatalf("%s: %v", w.Fired(), err)
				}
				if fail != nil { // the machine went on
					after = m.Crash(seed)
				}
				got, lerr := Load(after, "/f")
				if lerr != nil || !bytes.Equal(got, old) && !bytes.Equal(got, young) {
					t.Fatalf("%s, seed %d, %v: %d bytes, %v", w.Fired(), seed, fail, len(got), lerr)
				}
				if err := Save(after, "/f", young); err != nil {
					t.Fatal(err)
				}
				if got, err := Load(after.Crash(seed), "/f"); err != nil || !bytes.Equal(got, young) {
					t.Fatalf("%s: said again: %d bytes, %v", w.Fired(), len(got), err)
				}
			}
		}
	}
}

// FuzzParseCA reads an authority and a node's certificate from any files.
func FuzzParseCA(f *testing.F) {
	ca, err := NewCA("test")
	if err != nil {
		f.Fatal(err)
	}
	key, csr, err := NewRequest()
	if err != nil {
		f.Fatal(err)
	}
	cert, err := ca.Sign(csr, 1, RoleStore, time.Now())
	if err != nil {
		f.Fatal(err)
	}
	f.Add(ca.CertPEM(), ca.KeyPEM())
	f.Add(cert, key)
	f.Add(cert, ca.KeyPEM())
	f.Add([]byte("-----BEGIN"), []byte{})
	f.Fuzz(func(t *testing.T, certPEM, keyPEM []byte) {
		if got, err := ParseCA(certPEM, keyPEM); err == nil && got.Trust().Fingerprint() != ca.Trust().Fingerprint() {
			if _, err := got.Sign(csr, 2, RoleStore, time.Now()); err != nil {
				t.Fatalf("an authority that cannot sign: %v", err)
			}
		}
		if h, err := NewHolder(ca.Trust(), certPEM, keyPEM); err == nil && h.Node() != 1 {
			t.Fatalf("node %v by a certificate that nobody signed", h.Node())
		}
	})
}
