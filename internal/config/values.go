package config

import (
	"fmt"
	"maps"
	"math"
	"slices"
	"strconv"
	"strings"
	"time"
)

// labelKeys are what can be said of a node. They are few and fixed: one that is
// misspelt would be believed to be missing.
var labelKeys = []string{"owner", "place", "trust", "failure-domain"}

// maxLabel bounds a label's value in bytes: it is a name, and all nodes keep it.
const maxLabel = 128

// Labels are what is said of a node, by key.
type Labels map[string]string

// ParseLabels reads "owner=ana,place=attic"; nothing between commas is nothing.
func ParseLabels(text string) (Labels, error) {
	ls := Labels{}
	for part := range strings.SplitSeq(text, ",") {
		if part = strings.TrimSpace(part); part == "" {
			continue
		}
		k, v, ok := strings.Cut(part, "=")
		k, v = strings.TrimSpace(k), strings.TrimSpace(v)
		switch {
		case !ok || k == "" || v == "":
			return nil, fmt.Errorf("%q is not key=value", part)
		case !slices.Contains(labelKeys, k):
			return nil, fmt.Errorf("no label %q%s", k, meant(k, labelKeys))
		case ls[k] != "":
			return nil, fmt.Errorf("label %s is given twice", k)
		case len(v) > maxLabel || strings.ContainsFunc(v, func(r rune) bool { return r < ' ' || r == 0x7f }):
			return nil, fmt.Errorf("label %s: want at most %d bytes of printable text", k, maxLabel)
		}
		ls[k] = v
	}
	if len(ls) == 0 {
		return nil, nil
	}
	return ls, nil
}

// String is what ParseLabels reads, in the order of the keys.
func (l Labels) String() string {
	var parts []string
	for _, k := range slices.Sorted(maps.Keys(l)) {
		parts = append(parts, k+"="+l[k])
	}
	return strings.Join(parts, ",")
}

// Duration is a time span that is always written with its unit. It is a flag's
// value too.
type Duration time.Duration

// String prints it so that Set reads it.
func (d Duration) String() string { return time.Duration(d).String() }

// Type is its name in help texts.
func (d Duration) Type() string { return "TIME" }

// Set reads "10s" or "1h30m". A number alone is refused: of what?
func (d *Duration) Set(text string) error {
	v, err := time.ParseDuration(text)
	if _, bare := strconv.ParseFloat(text, 64); bare == nil {
		return fmt.Errorf("%q has no unit; write for instance %ss", text, text)
	}
	if err != nil || v < 0 {
		return fmt.Errorf("%q is not a duration such as 10s or 1h30m", text)
	}
	*d = Duration(v)
	return nil
}

// Size is a number of bytes that is always written with its unit. It is a flag's
// value too.
type Size int64

// units of sizes: powers of 1024 only, since MB means two things.
var units = []string{"B", "KiB", "MiB", "GiB", "TiB"}

// String prints the largest unit that leaves no fraction.
func (s Size) String() string {
	n, u := int64(s), 0
	for n != 0 && n%1024 == 0 && u < len(units)-1 {
		n, u = n/1024, u+1
	}
	return strconv.FormatInt(n, 10) + units[u]
}

// Type is its name in help texts.
func (s Size) Type() string { return "SIZE" }

// Set reads "64MiB" or "1.5GiB".
func (s *Size) Set(text string) error {
	i := strings.IndexFunc(text, func(r rune) bool { return r != '.' && (r < '0' || r > '9') })
	if i < 0 {
		if text == "" {
			return fmt.Errorf("a size is wanted, such as 64MiB")
		}
		return fmt.Errorf("%q has no unit; write for instance %sMiB", text, text)
	}
	n, err := strconv.ParseFloat(text[:i], 64)
	u := slices.Index(units, strings.TrimSpace(text[i:]))
	if err != nil || u < 0 {
		return fmt.Errorf("%q is not a size such as 64MiB (units: %s)", text, strings.Join(units, ", "))
	}
	b := n * float64(int64(1)<<(10*u))
	if b >= math.MaxInt64 || b != math.Trunc(b) {
		return fmt.Errorf("%q is not a whole number of bytes that fits in 63 bits", text)
	}
	*s = Size(b)
	return nil
}
