// Package config holds the settings of a node: what they are called, what they
// are if nobody says otherwise, and where each value came from.
//
// Words: a setting has one name, the same as flag and in the file. Its source is
// the default, a line of the file, or the flag; the flag goes over the file, the
// file over the default.
//
// Invariants: settings are fixed once a node has started. A name that is no
// setting is refused with its line and the nearest name that is one; a duration
// or a size without a unit is refused too.
//
// On failure: every error is of class Invalid (or what reading the file gave)
// and names the file and the line.
package config

import (
	"fmt"
	"log/slog"
	"net"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/unum-os/unum/internal/errs"
)

// DefaultFile is read if no other file is named; it need not exist.
const DefaultFile = "/etc/unum/unum.toml"

// Settings are all settings of a node.
type Settings struct {
	Dir       string
	Mount     string
	Addr      string  // host:port; empty: found out
	Share     float64 // 0 to 1; 0: all of the machine
	LogLevel  slog.Level
	LogFormat string // text or json
	Metrics   string // host:port; empty: none
	Labels    Labels
}

// Default returns the settings of a node of which nobody has said anything.
func Default() Settings {
	return Settings{
		Dir:       "/var/lib/unum", // where the FHS puts the state of a daemon
		Mount:     "/unum",         // one short name, the same on every node
		Addr:      "",              // most machines have one address; the port is 7400, node.DefaultPort
		Share:     0,               // most nodes have their machine for themselves
		LogLevel:  slog.LevelInfo,  // state changes, a few lines an hour; debug has a line for each operation
		LogFormat: "text",          // people read it first
		// The port beside 7400. On this machine only: metrics tell strangers what
		// runs here, and nobody has to prove who he is to read them.
		Metrics: "127.0.0.1:7401",
		Labels:  nil, // nothing is known of place and owner
	}
}

// kind says how a setting is written in the file.
type kind int

const (
	kindText   kind = iota // a string
	kindNumber             // a number without a unit
	kindList               // an array of strings
)

// key is one setting by name.
type key struct {
	name, value, help string // value: what stands for it in help texts
	kind              kind
	get               func(*Settings) string
	set               func(*Settings, string) error
}

func keys() []key {
	return []key{
		{"dir", "DIR", "the node's data", kindText,
			func(s *Settings) string { return s.Dir },
			func(s *Settings, v string) error { return setPath(&s.Dir, v) }},
		{"mount", "DIR", "where the tree appears", kindText,
			func(s *Settings) string { return s.Mount },
			func(s *Settings, v string) error { return setPath(&s.Mount, v) }},
		{"addr", "HOST:PORT", "where other nodes reach this one; found out if empty, with port 7400", kindText,
			func(s *Settings) string { return s.Addr },
			func(s *Settings, v string) error { return setAddr(&s.Addr, v, true) }},
		{"share", "PART", "this node's part, 0 to 1, of a machine that several nodes share; 0: all of it", kindNumber,
			func(s *Settings) string { return strconv.FormatFloat(s.Share, 'g', -1, 64) },
			func(s *Settings, v string) error { return setShare(&s.Share, v) }},
		{"log-level", "LEVEL", "what is logged: debug, info, warn or error", kindText,
			func(s *Settings) string { return strings.ToLower(s.LogLevel.String()) },
			func(s *Settings, v string) error { return setLevel(&s.LogLevel, v) }},
		{"log-format", "FORMAT", "how it is logged: text or json", kindText,
			func(s *Settings) string { return s.LogFormat },
			func(s *Settings, v string) error { return setOneOf(&s.LogFormat, v, "text", "json") }},
		{"metrics", "HOST:PORT", "where Prometheus finds this node's metrics; none if empty", kindText,
			func(s *Settings) string { return s.Metrics },
			func(s *Settings, v string) error { return setAddr(&s.Metrics, v, false) }},
		{"labels", "KEY=VALUE,...", "what is true of this node: " + strings.Join(labelKeys, ", "), kindList,
			func(s *Settings) string { return s.Labels.String() },
			func(s *Settings, v string) (err error) { s.Labels, err = ParseLabels(v); return err }},
	}
}

func setPath(p *string, v string) error {
	if !filepath.IsAbs(v) {
		return fmt.Errorf("%q is not an absolute path", v)
	}
	*p = filepath.Clean(v)
	return nil
}

// setAddr takes host:port; where short is set, a host alone too.
func setAddr(p *string, v string, short bool) error {
	if v != "" {
		_, port, err := net.SplitHostPort(v)
		if err != nil && short && !strings.Contains(v, ":") {
			port, err = "1", nil
		}
		if n, perr := strconv.Atoi(port); err != nil || perr != nil || n < 0 || n > 65535 {
			return fmt.Errorf("%q is not host:port", v)
		}
	}
	*p = v
	return nil
}

func setShare(p *float64, v string) error {
	f, err := strconv.ParseFloat(v, 64)
	if err != nil || !(f >= 0 && f <= 1) {
		return fmt.Errorf("%q is not a number from 0 to 1", v)
	}
	*p = f
	return nil
}

func setLevel(p *slog.Level, v string) error {
	var name string
	if err := setOneOf(&name, v, "debug", "info", "warn", "error"); err != nil {
		return err
	}
	return p.UnmarshalText([]byte(name))
}

func setOneOf(p *string, v string, words ...string) error {
	if !slices.Contains(words, v) {
		return fmt.Errorf("%q is none of %s", v, strings.Join(words, ", "))
	}
	*p = v
	return nil
}

// Value is a setting in force.
type Value struct {
	Name   string `json:"name" cbor:"1,keyasint"`
	Value  string `json:"value" cbor:"2,keyasint"`
	Source string `json:"source" cbor:"3,keyasint"` // "default", "flag", or FILE:LINE
}

// Loaded are settings and where they came from.
type Loaded struct {
	Settings
	source map[string]string
}

// Values lists all settings, in one order always.
func (l *Loaded) Values() []Value {
	var vs []Value
	for _, k := range keys() {
		from := l.source[k.name]
		if from == "" {
			from = "default"
		}
		vs = append(vs, Value{k.name, k.get(&l.Settings), from})
	}
	return vs
}

// put sets a value from a source.
func (l *Loaded) put(k key, text, source string) error {
	if err := k.set(&l.Settings, text); err != nil {
		return errs.E(errs.Invalid, "", source, "%s: %v", k.name, err)
	}
	l.source[k.name] = source
	return nil
}

// nearest returns what of words is most like w, "" if nothing is.
func nearest(w string, words []string) string {
	best, at := "", len(w)/2+1 // more than half of it wrong is another word
	for _, c := range words {
		if d := distance(w, c); d < at || strings.HasPrefix(c, w) && w != "" && best == "" {
			best, at = c, min(d, at)
		}
	}
	return best
}

// distance counts the letters to change, add or remove to make b of a.
func distance(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diag := row[0]
		row[0] = i + 1
		for j := range len(b) {
			next := diag
			if a[i] != b[j] {
				next = 1 + min(diag, row[j], row[j+1])
			}
			diag, row[j+1] = row[j+1], next
		}
	}
	return row[len(b)]
}

// meant adds the nearest known name to a refusal.
func meant(w string, words []string) string {
	if n := nearest(w, words); n != "" {
		return fmt.Sprintf("; did you mean %s?", n)
	}
	return "; there are " + strings.Join(words, ", ")
}
