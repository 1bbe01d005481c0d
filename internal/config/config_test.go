package config

import (
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/unum-os/unum/internal/errs"
)

func write(t *testing.T, text string) string {
	t.Helper()
	p := filepath.Join(t.TempDir(), "unum.toml")
	if err := os.WriteFile(p, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	return p
}

// TestOrder: the flag goes over the file, the file over the default, and each
// value says where it came from.
func TestOrder(t *testing.T) {
	p := write(t, "# mine\nmount = \"/tree\"\nshare = 0.5\n\nlog-level = \"debug\"\nlabels = [\"place=attic\", \"owner=ana\"]\nmetrics = \"\"\n")
	fl := &Flags{}
	for _, f := range fl.List() {
		if f.Name() == "mount" {
			if err := f.Set("/first"); err != nil {
				t.Fatal(err)
			}
			if err := f.Set("/flag"); err != nil { // the last holds
				t.Fatal(err)
			}
		}
	}
	l, err := Load(p, fl)
	if err != nil {
		t.Fatal(err)
	}
	if l.Mount != "/flag" || l.Share != 0.5 || l.LogLevel != slog.LevelDebug || l.Metrics != "" || l.Labels["place"] != "attic" || l.Dir != Default().Dir {
		t.Errorf("%+v", l.Settings)
	}
	got := ""
	for _, v := range l.Values() {
		got += v.Name + "=" + v.Value + " " + strings.Replace(v.Source, p, "FILE", 1) + "\n"
	}
	want := `dir=/var/lib/unum default
mount=/flag flag
addr= default
share=0.5 FILE:3
log-level=debug FILE:5
log-format=text default
metrics= FILE:7
labels=owner=ana,place=attic FILE:6
`
	if got != want {
		t.Errorf("got\n%swant\n%s", got, want)
	}
	if a := strings.Join(fl.Args(), " "); a != "--mount /flag" {
		t.Errorf("args %q", a)
	}
}

// TestRefused: what is wrong in a file is named with its line, and what was
// probably meant.
func TestRefused(t *testing.T) {
	for text, want := range map[string]string{
		"dir = \"/a\"\n\nmuont = \"/b\"\n":                      `FILE:3: no setting "muont"; did you mean mount?`,
		"x = 1\n":                                               `FILE:1: no setting "x"; there are dir, mount,`,
		"log_level = \"info\"":                                  `did you mean log-level?`,
		"[node]\ndir = \"/a\"\n":                                `FILE:1: no setting "node"`,
		"mount.point = \"/a\"\n":                                `FILE:1: mount: want a string, in quotes`,
		"dir = \"/a\"\ndir = \"/b\"\n":                          `FILE: line 2: dir is said in line 1 already`,
		"\n\ndir = /a\n":                                        `FILE:3`,
		"dir = 5\n":                                             `FILE:1: dir: want a string`,
		"dir = \"data\"\n":                                      `"data" is not an absolute path`,
		"\nshare = \"0.5\"\n":                                   `FILE:2: share: want a number`,
		"share = 1.5\n":                                         `"1.5" is not a number from 0 to 1`,
		"share = nan\n":                                         `is not a number from 0 to 1`,
		"log-format = \"yaml\"\n":                               `"yaml" is none of text, json`,
		"log-level = \"INFO+2\"\n":                              `is none of debug, info, warn, error`,
		"metrics = \"7401\"\n":                                  `"7401" is not host:port`,
		"addr = \"alpha:70000\"\n":                              `is not host:port`,
		"labels = \"owner=ana\"\n":                              `want a list of strings`,
		"labels = [\"owner\"]\n":                                `"owner" is not key=value`,
		"labels = [\"failure-domian=r1\"]\n":                    `did you mean failure-domain?`,
		"labels = [\"owner=a\", \"owner=b\"]\n":                 `label owner is given twice`,
		"labels = [\"owner=a,place=b\"]\n":                      `want a list such as`,
		"labels = [\"owner=" + strings.Repeat("x", 200) + "\"]": `FILE:1`,
		strings.Repeat("#", maxFile+1):                          `it has more than 1MiB`,
	} {
		p := write(t, text)
		_, err := Load(p, nil)
		if err == nil || !strings.Contains(strings.ReplaceAll(err.Error(), p, "FILE"), want) {
			t.Errorf("%.40q: %v, want %q", text, err, want)
		} else if !errs.Has(err, errs.Invalid) && !errs.Has(err, errs.TooLarge) {
			t.Errorf("%.40q: class %v", text, errs.ClassOf(err))
		}
	}
}

// TestMissingFile: only the default file may be missing, and "" is none.
func TestMissingFile(t *testing.T) {
	none := filepath.Join(t.TempDir(), "none.toml")
	if _, err := Load(none, nil); !errs.Has(err, errs.NotFound) {
		t.Errorf("%v", err)
	}
	if _, err := Load("", nil); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(DefaultFile); os.IsNotExist(err) {
		if l, err := Load(DefaultFile, nil); err != nil || l.Mount != "/unum" {
			t.Errorf("%v", err)
		}
	}
	dir := t.TempDir()
	if _, err := Load(dir, nil); err == nil || strings.Count(err.Error(), dir) != 1 {
		t.Errorf("%v", err)
	}
}

// TestExample: the example changes nothing, and with its comment marks taken away
// it says all defaults.
func TestExample(t *testing.T) {
	ex := Example()
	l, err := Load(write(t, ex), nil)
	if err != nil {
		t.Fatal(err)
	}
	for _, v := range l.Values() {
		if v.Source != "default" {
			t.Errorf("%+v", v)
		}
	}
	var said strings.Builder
	for line := range strings.Lines(ex) {
		if strings.HasPrefix(line, "#") && !strings.HasPrefix(line, "# ") {
			line = line[1:]
		}
		said.WriteString(line)
	}
	m, err := Load(write(t, said.String()), nil)
	if err != nil {
		t.Fatal(err)
	}
	for i, v := range m.Values() {
		if v.Source == "default" || v.Value != l.Values()[i].Value {
			t.Errorf("%+v, default %q", v, l.Values()[i].Value)
		}
	}
}

func TestUnits(t *testing.T) {
	for text, want := range map[string]Size{"0B": 0, "1B": 1, "64MiB": 64 << 20, "1.5GiB": 3 << 29, "2 KiB": 2048, "7TiB": 7 << 40} {
		var s, again Size
		if err := s.Set(text); err != nil || s != want {
			t.Errorf("%s: %d, %v", text, s, err)
		}
		if err := again.Set(s.String()); err != nil || again != s {
			t.Errorf("%s, printed %v: %d, %v", text, s, again, err)
		}
	}
	for _, text := range []string{"", "64", "64MB", "64M", "MiB", "-1MiB", "0.3B", "9999999TiB", "1..5GiB", "1e3B"} {
		var s Size
		if err := s.Set(text); err == nil {
			t.Errorf("%q was taken as %v", text, s)
		}
	}
	var d Duration
	if err := d.Set("1m30s"); err != nil || time.Duration(d) != 90*time.Second {
		t.Errorf("%v, %v", d, err)
	}
	for _, text := range []string{"", "10", "0", "-1s", "10 seconds"} {
		if err := d.Set(text); err == nil {
			t.Errorf("%q was taken as %v", text, d)
		}
	}
	if err := d.Set("10"); err == nil || !strings.Contains(err.Error(), "10s") {
		t.Errorf("%v", err)
	}
}

// TestFlagsAreTheSettings: every flag refuses what the file refuses.
func TestFlagsAreTheSettings(t *testing.T) {
	fl := &Flags{}
	bad := map[string]string{"dir": "", "mount": "", "addr": "a:b", "share": "2", "log-level": "loud", "log-format": "xml", "metrics": "x", "labels": "a=b"}
	for _, f := range fl.List() {
		b, ok := bad[f.Name()]
		if !ok {
			t.Errorf("no bad value known for %s", f.Name())
		} else if err := f.Set(b); err == nil {
			t.Errorf("%s took %q", f.Name(), b)
		}
		if f.Help() == "" || f.Type() == "" {
			t.Errorf("%s explains nothing", f.Name())
		}
	}
	if len(fl.Args()) != 0 {
		t.Errorf("what was refused was kept: %v", fl.Args())
	}
	wd, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	if err := fl.List()[0].Set("data"); err != nil || fl.Args()[1] != filepath.Join(wd, "data") {
		t.Errorf("%v, %v", fl.Args(), err)
	}
}

func FuzzParse(f *testing.F) {
	for _, s := range []string{"", Example(), "dir=\"/a\"", "[a]\nb=1", "labels=[\"owner=x\"]", "a.b.c=1", "'x'=2", "share=1e400"} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		l := &Loaded{Settings: Default(), source: map[string]string{}}
		if err := l.parse("f", b); err != nil {
			if !errs.Has(err, errs.Invalid) {
				t.Errorf("class %v: %v", errs.ClassOf(err), err)
			}
			return
		}
		for _, v := range l.Values() { // what was taken is taken again
			if v.Value != "" && v.Source != "default" {
				for _, k := range keys() {
					if k.name == v.Name {
						if err := k.set(&Settings{}, v.Value); err != nil {
							t.Error(err)
						}
					}
				}
			}
		}
	})
}
