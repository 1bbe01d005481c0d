package wire

import (
	"bytes"
	"io"
	"testing"

	"github.com/unum-os/unum/internal/errs"
)

type sample struct {
	A uint64 `cbor:"1,keyasint,omitempty"`
	B []byte `cbor:"2,keyasint,omitempty"`
	S string `cbor:"3,keyasint,omitempty"`
}

func TestFrameRoundTrip(t *testing.T) {
	var buf bytes.Buffer
	h := MustMarshal(sample{A: 7, S: "na\xffme"})
	if err := WriteFrame(&buf, 3, h, []byte("body")); err != nil {
		t.Fatal(err)
	}
	f, err := ReadFrame(&buf, MaxFrame)
	if err != nil || f.Type != 3 || string(f.Body) != "body" {
		t.Fatalf("%+v %v", f, err)
	}
	var s sample
	if err := Unmarshal(f.Header, &s); err != nil || s.A != 7 || s.S != "na\xffme" {
		t.Fatalf("%+v %v", s, err)
	}
	if _, err := ReadFrame(&buf, MaxFrame); err != io.EOF {
		t.Fatalf("want EOF, got %v", err)
	}
}

func TestFrameLimits(t *testing.T) {
	if _, err := ReadFrame(bytes.NewReader([]byte{0xff, 0xff, 0xff, 0xff, 1, 0, 0, 0, 0}), MaxFrame); !errs.Has(err, errs.Corrupt) {
		t.Fatalf("oversized frame accepted: %v", err)
	}
	if _, err := ReadFrame(bytes.NewReader([]byte{0, 0, 0, 6, 1, 0, 0, 0, 9, 1}), MaxFrame); !errs.Has(err, errs.Corrupt) {
		t.Fatalf("header longer than frame accepted: %v", err)
	}
	if _, err := ReadFrame(bytes.NewReader([]byte{0, 0, 0, 60, 1, 0, 0, 0, 9, 1}), MaxFrame); err != io.ErrUnexpectedEOF {
		t.Fatalf("cut frame: %v", err)
	}
	if err := WriteFrame(io.Discard, 1, nil, make([]byte, MaxFrame)); !errs.Has(err, errs.TooLarge) {
		t.Fatalf("oversized frame sent: %v", err)
	}
}

func FuzzReadFrame(f *testing.F) {
	var buf bytes.Buffer
	WriteFrame(&buf, 1, MustMarshal(sample{A: 1, B: []byte("x")}), []byte("y"))
	f.Add(buf.Bytes())
	f.Fuzz(func(t *testing.T, b []byte) {
		fr, err := ReadFrame(bytes.NewReader(b), MaxFrame)
		if err != nil {
			return
		}
		var s sample
		if Unmarshal(fr.Header, &s) != nil {
			return
		}
		if _, err := Marshal(s); err != nil {
			t.Fatalf("decoded what cannot be encoded: %v", err)
		}
	})
}

func FuzzAppend(f *testing.F) {
	for i := range 65 {
		f.Add(uint64(1)<<i-1, []byte("x"))
		f.Add(uint64(1)<<i, make([]byte, i*5))
	}
	f.Fuzz(func(t *testing.T, n uint64, v []byte) {
		if v = v[:min(len(v), 300)]; len(v) == 0 {
			v = nil
		}
		for _, v := range [][]byte{v, bytes.Repeat(v, 300), {}} {
			want := MustMarshal(map[uint64]any{n: v})
			if got := AppendBytes(AppendUint(AppendMap([]byte{7}, 1), n), v); !bytes.Equal(got[1:], want) || got[0] != 7 {
				t.Fatalf("%d: %x, %d bytes: got %x want %x", n, v, len(v), got, want)
			}
		}
		for _, n := range []int{int(n % 30), int(n % 300)} {
			m := map[int]bool{}
			for i := range n {
				m[i] = true
			}
			if got, want := AppendMap(nil, n), MustMarshal(m); !bytes.HasPrefix(want, got) || len(want) != len(got)+2*n+max(0, n-24)+max(0, n-256) {
				t.Fatalf("%d pairs: got %x want %x", n, got, want)
			}
		}
	})
}
