package principal

import (
	"fmt"
	"strings"
	"testing"

	"github.com/unum-os/unum/internal/errs"
)

func TestInvite(t *testing.T) {
	v := NewInvite()
	text := v.Text()
	for _, s := range []string{text, strings.ToUpper(text), " " + text[:20] + "\n" + text[20:] + "\n"} {
		if got, err := ParseInvite(s); err != nil || got != v {
			t.Fatalf("%q: %v", s, err)
		}
	}
	last := "0"
	if strings.HasSuffix(text, last) {
		last = "1"
	}
	for _, s := range []string{"", "unum1-abc", text[:len(text)-1], text + "0", text[:len(text)-1] + last, strings.Repeat("0", 5000)} {
		if _, err := ParseInvite(s); !errs.Has(err, errs.Invalid) {
			t.Errorf("%.40q: %v", s, err)
		}
	}
	secret := text[len(invitePrefix) : len(invitePrefix)+10]
	for _, s := range []string{fmt.Sprint(v), fmt.Sprintf("%v %+v %#v %s", v, v, v, v)} {
		if strings.Contains(s, secret) {
			t.Errorf("the secret shows: %s", s)
		}
	}
	if NewInvite() == v || v.ID() == (Invite{}).ID() {
		t.Error("not a secret of its own")
	}
}

func FuzzParseInvite(f *testing.F) {
	f.Add(NewInvite().Text())
	f.Fuzz(func(t *testing.T, s string) {
		v, err := ParseInvite(s)
		if err != nil {
			return
		}
		if again, err := ParseInvite(v.Text()); err != nil || again != v {
			t.Fatalf("%q: %v", s, err)
		}
	})
}
