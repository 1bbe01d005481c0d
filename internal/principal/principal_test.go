package principal

import (
	"bytes"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/unum-os/unum/internal/errs"
	"github.com/unum-os/unum/internal/identity"
	"github.com/unum-os/unum/internal/ids"
	"github.com/unum-os/unum/internal/wire"
)

var update = flag.Bool("update", false, "rewrite golden files")

var begin = time.Unix(1_800_000_000, 0)

// authority is the cluster of testdata.
func authority(t testing.TB) *identity.CA {
	t.Helper()
	read := func(name string) []byte {
		b, err := os.ReadFile("testdata/" + name)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	ca, err := identity.ParseCA(read("ca.pem"), read("ca.key"))
	if err != nil {
		t.Fatal(err)
	}
	return ca
}

func ana(t testing.TB) Credential {
	t.Helper()
	c, err := New("home", "ana", 1000, 100, []uint32{10, 20}, 3, begin, bytes.NewReader(bytes.Repeat([]byte{7}, 16)))
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func sign(t testing.TB, ca *identity.CA, c Credential) Proof {
	t.Helper()
	p, err := Sign(ca, c)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// forge signs whatever it is given, as Sign does not.
func forge(ca *identity.CA, dom string, body []byte) Proof {
	return wire.MustMarshal(signed{body, ca.SignBlob(dom, body)})
}

func TestProofIsGolden(t *testing.T) {
	if *update {
		if _, err := os.Stat("testdata/ca.pem"); err != nil {
			ca, err := identity.NewCA("home")
			if err != nil {
				t.Fatal(err)
			}
			os.WriteFile("testdata/ca.pem", ca.CertPEM(), 0o644)
			os.WriteFile("testdata/ca.key", ca.KeyPEM(), 0o644)
		}
	}
	got := []byte(hex.EncodeToString(sign(t, authority(t), ana(t))) + "\n")
	const file = "testdata/proof.golden"
	if *update {
		if err := os.WriteFile(file, got, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Fatalf("the format changed: got\n%s\nwant\n%s", got, want)
	}
	old, err := hex.DecodeString(strings.TrimSpace(string(want)))
	if err != nil {
		t.Fatal(err)
	}
	c, err := Verify(authority(t).Trust(), old, 3, begin)
	if err != nil || fmt.Sprintf("%#v", *c) != fmt.Sprintf("%#v", ana(t)) {
		t.Fatalf("%+v %v", c, err)
	}
	if p := c.Principal(); p != (Principal{Node: 3, UID: 1000, User: "ana"}) || p.String() != "ana (uid 1000) at n3" {
		t.Fatal(p)
	}
}

func TestVerify(t *testing.T) {
	ca := authority(t)
	trust := ca.Trust()
	other, err := identity.NewCA("away")
	if err != nil {
		t.Fatal(err)
	}
	twin, err := identity.NewCA("home")
	if err != nil {
		t.Fatal(err)
	}
	c := ana(t)
	good := sign(t, ca, c)
	away := c
	away.Cluster = "away"
	root, forever, loud := c, c, c
	root.UID = 0
	forever.Expires = forever.Issued + int64(365*24*time.Hour)
	forever.Renewable = forever.Expires
	loud.User = "Ana"
	flip := func(i int) Proof {
		p := slices.Clone(good)
		p[(i+len(p))%len(p)] ^= 1
		return p
	}
	// One more field, unknown here: another encoding of the same credential.
	var more map[int]any
	if err := wire.Unmarshal(wire.MustMarshal(c), &more); err != nil {
		t.Fatal(err)
	}
	more[99] = true
	var s signed
	if err := wire.Unmarshal(good, &s); err != nil {
		t.Fatal(err)
	}
	for _, v := range []struct {
		what string
		p    Proof
		node ids.Node
		at   time.Time
		want Reason
	}{
		{"good", good, 3, begin, ""},
		{"clock behind by a minute", good, 3, begin.Add(-Tolerance), ""},
		{"to the last", good, 3, begin.Add(Validity - 1), ""},
		{"clock behind by more", good, 3, begin.Add(-Tolerance - 1), NotYet},
		{"its end", good, 3, begin.Add(Validity), Expired},
		{"long after", good, 3, begin.Add(1000 * Validity), Expired},
		{"another node", good, 4, begin, OtherNode},
		{"another cluster", sign(t, other, away), 3, begin, OtherCluster},
		{"another cluster of the name", sign(t, twin, c), 3, begin, BadSignature},
		{"signature flipped", flip(-1), 3, begin, BadSignature},
		{"body flipped", flip(bytes.Index(good, []byte("ana"))), 3, begin, BadSignature},
		{"another purpose", forge(ca, "unum something", wire.MustMarshal(c)), 3, begin, BadSignature},
		{"signature cut", wire.MustMarshal(signed{s.Body, s.Signature[:32]}), 3, begin, BadSignature},
		{"no signature", wire.MustMarshal(signed{s.Body, nil}), 3, begin, BadSignature},
		{"empty", nil, 3, begin, Malformed},
		{"garbage", Proof("garbage"), 3, begin, Malformed},
		{"cut", good[:len(good)-1], 3, begin, Malformed},
		{"more after it", append(slices.Clone(good), 0), 3, begin, Malformed},
		{"too long", make(Proof, MaxProof+1), 3, begin, Malformed},
		{"no body", forge(ca, domain, nil), 3, begin, Malformed},
		{"uid 0", forge(ca, domain, wire.MustMarshal(root)), 3, begin, Malformed},
		{"for a year", forge(ca, domain, wire.MustMarshal(forever)), 3, begin, Malformed},
		{"no user's name", forge(ca, domain, wire.MustMarshal(loud)), 3, begin, Malformed},
		{"another encoding inside", forge(ca, domain, wire.MustMarshal(more)), 3, begin, Malformed},
		{"another encoding outside", wire.MustMarshal(map[int]any{1: s.Body, 2: s.Signature, 3: true}), 3, begin, Malformed},
	} {
		_, err := Verify(trust, v.p, v.node, v.at)
		if v.want == "" {
			if err != nil {
				t.Errorf("%s: %v", v.what, err)
			}
		} else if !errs.Has(err, errs.Unauthorized) || !errors.Is(err, v.want) {
			t.Errorf("%s: got %v, want %s", v.what, err, v.want)
		}
	}
}

func TestRenewal(t *testing.T) {
	ca := authority(t)
	c := ana(t)
	p := sign(t, ca, c)
	late := begin.Add(Renewal - time.Minute)
	if _, err := Verify(ca.Trust(), p, 3, late); !errors.Is(err, Expired) {
		t.Fatal(err)
	}
	if _, err := VerifyRenewal(ca.Trust(), p, 4, late); !errors.Is(err, OtherNode) {
		t.Fatal(err)
	}
	if _, err := VerifyRenewal(ca.Trust(), p, 3, begin.Add(Renewal)); !errors.Is(err, Expired) {
		t.Fatal(err)
	}
	old, err := VerifyRenewal(ca.Trust(), p, 3, late)
	if err != nil {
		t.Fatal(err)
	}
	n, err := old.Renewed(1000, 100, nil, late, rand.Reader)
	if err != nil || n.Expires != c.Renewable || n.Renewable != c.Renewable || n.Serial == c.Serial || n.Groups != nil {
		t.Fatalf("%+v %v", n, err)
	}
	if _, err := Verify(ca.Trust(), sign(t, ca, n), 3, late); err != nil {
		t.Fatal(err)
	}
	if _, err := old.Renewed(1001, 100, nil, late, rand.Reader); !errors.Is(err, OtherUser) {
		t.Fatal(err)
	}
	if _, err := old.Renewed(1000, 100, nil, begin.Add(Renewal), rand.Reader); !errors.Is(err, Expired) {
		t.Fatal(err)
	}
}

func TestSenselessCredentials(t *testing.T) {
	ca := authority(t)
	for what, change := range map[string]func(*Credential){
		"uid 0":            func(c *Credential) { c.UID = 0 },
		"no uid":           func(c *Credential) { c.UID = NoUID },
		"no node":          func(c *Credential) { c.Node = 0 },
		"no name":          func(c *Credential) { c.User = "" },
		"a path":           func(c *Credential) { c.User = "../ana" },
		"too many groups":  func(c *Credential) { c.Groups = make([]uint32, MaxGroups+1) },
		"ends before":      func(c *Credential) { c.Expires = c.Issued },
		"too long":         func(c *Credential) { c.Expires++ },
		"another cluster":  func(c *Credential) { c.Cluster = "away" },
		"renewable before": func(c *Credential) { c.Renewable = c.Expires - 1 },
	} {
		c := ana(t)
		change(&c)
		if _, err := Sign(ca, c); !errs.Has(err, errs.Invalid) {
			t.Errorf("%s: %v", what, err)
		}
	}
	c := ana(t)
	c.Groups = slices.Repeat([]uint32{NoUID - 1}, MaxGroups)
	c.User, c.UID, c.Node = strings.Repeat("a", MaxName), NoUID-1, 1<<63
	if p := sign(t, ca, c); len(p) > MaxProof {
		t.Errorf("the longest proof has %d bytes", len(p))
	}
}

// TestDoor: who is believed, and about what.
func TestDoor(t *testing.T) {
	ca := authority(t)
	p := sign(t, ca, ana(t))
	user := Principal{Node: 3, UID: 1000, User: "ana"}
	for i, v := range []struct {
		from    ids.Node
		trusted bool
		claim   Principal
		proof   Proof
		at      time.Time
		want    Reason
	}{
		{1, true, Principal{Node: 1, UID: 0}, nil, begin, ""},
		{1, true, user, nil, begin, ""}, // handed on
		{1, true, Of(3), nil, begin, ""},
		{1, true, Principal{}, nil, begin, Malformed},
		{1, true, Principal{Node: 1, UID: 5, System: true}, nil, begin, Malformed},
		{3, false, Of(3), nil, begin, ""},
		{3, false, Of(1), nil, begin, OtherNode},
		{3, false, user, p, begin, ""},
		{3, false, user, nil, begin, Missing},
		{3, false, Principal{Node: 3, UID: 0}, nil, begin, Missing},
		{3, false, Principal{Node: 3, UID: 0}, p, begin, OtherUser},
		{3, false, Principal{Node: 3, UID: 1001, User: "ana"}, p, begin, OtherUser},
		{3, false, Principal{Node: 3, UID: 1000, User: "bob"}, p, begin, OtherUser},
		{3, false, Principal{Node: 3, UID: 1000}, p, begin, OtherUser},
		{3, false, user, p, begin.Add(Validity), Expired},
		{4, false, user, p, begin, OtherNode},
		{4, false, Principal{Node: 4, UID: 1000, User: "ana"}, p, begin, OtherNode},
		{3, false, Principal{Node: 1, UID: 1000, User: "ana"}, p, begin, OtherNode},
	} {
		err := Believe(v.from, v.trusted, v.claim, v.proof, ca.Trust(), v.at)
		if v.want == "" && err != nil || v.want != "" && (!errors.Is(err, v.want) || !errs.Has(err, errs.Unauthorized)) {
			t.Errorf("%d: %v from n%d: got %v, want %q", i, v.claim, v.from, err, v.want)
		}
	}
}

func TestNoProofInLogs(t *testing.T) {
	c := ana(t)
	p := sign(t, authority(t), c)
	var out bytes.Buffer
	for _, h := range []slog.Handler{slog.NewTextHandler(&out, nil), slog.NewJSONHandler(&out, nil)} {
		slog.New(h).Info("x", "proof", p, "credential", c, "in", struct{ P Proof }{p})
	}
	fmt.Fprintf(&out, "%v %+v %#v %s %x %q %d %v\n", p, p, p, p, p, p, p, struct{ P Proof }{p})
	if b, err := json.Marshal(p); err != nil {
		t.Fatal(err)
	} else {
		out.Write(b)
	}
	tail := p[len(p)-8:]
	for _, leak := range []string{hex.EncodeToString(tail), string(tail), strings.Trim(fmt.Sprint([]byte(tail)), "[]"), hex.EncodeToString(c.Serial[:])} {
		if strings.Contains(out.String(), leak) {
			t.Errorf("the log has %q: %s", leak, out.String())
		}
	}
	if !strings.Contains(out.String(), "ana") || !strings.Contains(out.String(), hex.EncodeToString(c.Serial[:4])) {
		t.Errorf("the log does not say whose: %s", out.String())
	}
}

func FuzzVerify(f *testing.F) {
	ca := authority(f)
	good := sign(f, ca, ana(f))
	f.Add([]byte(good))
	f.Add([]byte(good[:40]))
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, b []byte) {
		c, err := Verify(ca.Trust(), b, 3, begin)
		if err == nil && !bytes.Equal(b, good) {
			t.Fatalf("a proof nobody gave: %+v", c)
		}
		if err != nil && !errs.Has(err, errs.Unauthorized) {
			t.Fatal(err)
		}
		// What is inside, signed by whoever has the key, must be read safely too.
		if c, err := Verify(ca.Trust(), forge(ca, domain, b), 3, begin); err == nil && !bytes.Equal(wire.MustMarshal(c), b) {
			t.Fatalf("%+v is not what was signed", c)
		}
	})
}
