package config

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"strconv"
	"strings"

	"github.com/pelletier/go-toml/v2"
	"github.com/pelletier/go-toml/v2/unstable"

	"github.com/unum-os/unum/internal/errs"
)

// maxFile bounds the file, in bytes: it has a dozen lines and comments.
const maxFile = 1 << 20

// Load returns the settings: defaults, then the file, then the flags. Only the
// default file may be missing; the name "" means no file at all.
func Load(file string, flags *Flags) (*Loaded, error) {
	l := &Loaded{Settings: Default(), source: map[string]string{}}
	if file != "" {
		b, err := readFile(file)
		if file != DefaultFile || !errors.Is(err, fs.ErrNotExist) {
			if err != nil {
				return nil, errs.Wrap(err, "read the settings", file)
			}
			if err := l.parse(file, b); err != nil {
				return nil, errs.Wrap(err, "read the settings", "")
			}
		}
	}
	if flags != nil {
		for _, g := range flags.given {
			if err := l.put(g.key, g.text, "flag"); err != nil {
				return nil, err
			}
		}
	}
	return l, nil
}

func readFile(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		var pe *fs.PathError
		if errors.As(err, &pe) {
			err = pe.Err // the path is said once
		}
		return nil, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxFile+1))
	var pe *fs.PathError
	if errors.As(err, &pe) {
		err = pe.Err
	}
	if err == nil && len(b) > maxFile {
		err = errs.E(errs.TooLarge, "", "", "it has more than %v", Size(maxFile))
	}
	return b, err
}

// parse takes over what a file says.
func (l *Loaded) parse(file string, b []byte) error {
	at := func(line int) string { return file + ":" + strconv.Itoa(line) }
	var said map[string]any
	if err := toml.Unmarshal(b, &said); err != nil {
		var de *toml.DecodeError
		if errors.As(err, &de) {
			line, _ := de.Position()
			return errs.E(errs.Invalid, "", at(line), "%s", strings.TrimPrefix(de.Error(), "toml: "))
		}
		if _, _, werr := where(b); werr != nil { // the decoder does not say where
			return errs.E(errs.Invalid, "", file, "%v", werr)
		}
		return errs.E(errs.Invalid, "", file, "%s", strings.TrimPrefix(err.Error(), "toml: "))
	}
	// The decoder says what, the parser below says where.
	lines, order, err := where(b)
	if err != nil {
		return errs.E(errs.Invalid, "", file, "%v", err)
	}
	known := map[string]key{}
	var names []string
	for _, k := range keys() {
		known[k.name] = k
		names = append(names, k.name)
	}
	for _, name := range order {
		k, ok := known[name]
		if !ok {
			return errs.E(errs.Invalid, "", at(lines[name]), "no setting %q%s", name, meant(name, names)).
				WithRemedy("unum config --example shows all of them")
		}
		text, err := k.text(said[name])
		if err != nil {
			return errs.E(errs.Invalid, "", at(lines[name]), "%s: %v", name, err)
		}
		if err := l.put(k, text, at(lines[name])); err != nil {
			return err
		}
	}
	return nil
}

// text turns a value of the file into what a flag would be given.
func (k key) text(v any) (string, error) {
	switch v := v.(type) {
	case string:
		if k.kind == kindText {
			return v, nil
		}
	case int64:
		if k.kind == kindNumber {
			return strconv.FormatInt(v, 10), nil
		}
	case float64:
		if k.kind == kindNumber {
			return strconv.FormatFloat(v, 'g', -1, 64), nil
		}
	case []any:
		if k.kind != kindList {
			break
		}
		var parts []string
		for _, e := range v {
			s, ok := e.(string)
			if !ok || strings.Contains(s, ",") {
				return "", fmt.Errorf("want a list such as [\"a=b\", \"c=d\"]")
			}
			parts = append(parts, s)
		}
		return strings.Join(parts, ","), nil
	}
	return "", fmt.Errorf("want %s", [...]string{"a string, in quotes", "a number, without quotes", "a list of strings in brackets"}[k.kind])
}

// where returns the top-level names in their order, each with its line: tables
// count as names, since no setting is one.
func where(b []byte) (lines map[string]int, order []string, err error) {
	lines = map[string]int{}
	var p unstable.Parser
	p.Reset(b)
	inTable := false
	for p.NextExpression() {
		e := p.Expression()
		switch e.Kind {
		case unstable.Table, unstable.ArrayTable:
			inTable = true
		case unstable.KeyValue:
			if inTable {
				continue // under a name that is refused itself
			}
		default:
			continue
		}
		it := e.Key()
		if !it.Next() {
			continue
		}
		name, line := string(it.Node().Data), 1+bytes.Count(b[:it.Node().Raw.Offset], []byte{'\n'})
		if first, ok := lines[name]; ok {
			return nil, nil, fmt.Errorf("line %d: %s is said in line %d already", line, name, first)
		}
		lines[name] = line
		order = append(order, name)
	}
	return lines, order, p.Error()
}

// Example returns a file that says nothing: every setting with its default, as a
// comment.
func Example() string {
	var b strings.Builder
	b.WriteString("# Settings of this node. A flag of the same name goes over what is said here; what\n" +
		"# is not said has the default, shown here. Read when the node starts.\n" +
		"# `unum config` prints the values in force and where each came from.\n")
	d := Default()
	for _, k := range keys() {
		fmt.Fprintf(&b, "\n# %s\n#%s = %s\n", strings.ToUpper(k.help[:1])+k.help[1:]+".", k.name, k.literal(k.get(&d)))
	}
	return b.String()
}

// literal is a value as the file has it.
func (k key) literal(text string) string {
	switch k.kind {
	case kindNumber:
		return text
	case kindList:
		var parts []string
		for p := range strings.SplitSeq(text, ",") {
			if p != "" {
				parts = append(parts, strconv.Quote(p))
			}
		}
		return "[" + strings.Join(parts, ", ") + "]"
	}
	return strconv.Quote(text)
}
