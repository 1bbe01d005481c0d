package internal

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

var (
	// places finds "`name` in `file.go`" and "`name` and `other` in `dir/file.go`".
	places = regexp.MustCompile("((?:`[^`]+`(?:, and |, | and | or ))*`[^`]+`) in `([A-Za-z0-9_/.-]+\\.go)`")
	quoted = regexp.MustCompile("`([^`]+)`")
	named  = regexp.MustCompile(`^[A-Za-z_][A-Za-z0-9_.]*$`)
	file   = regexp.MustCompile(`\.(go|proto|md|json|txt)$`)
)

// TestDocsNamePlaces: where a page says that something is in a file of the code,
// the file is there and declares it.
func TestDocsNamePlaces(t *testing.T) {
	byName := map[string][]string{} // contents of the Go files, by path and by base name
	err := filepath.WalkDir("..", func(path string, d os.DirEntry, err error) error {
		if err != nil || d.IsDir() || filepath.Ext(path) != ".go" {
			return err
		}
		b, err := os.ReadFile(path)
		rel, _ := filepath.Rel("..", path)
		for _, name := range slices.Compact([]string{rel, filepath.Base(path)}) {
			byName[name] = append(byName[name], string(b))
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	pages, _ := filepath.Glob("../docs/*.md")
	decisions, _ := filepath.Glob("../docs/decisions/*.md")
	checked := 0
	for _, page := range append(append(pages, decisions...), "../README.md", "../CONTRIBUTING.md", "../SECURITY.md") {
		b, err := os.ReadFile(page)
		if err != nil {
			t.Fatal(err)
		}
		text := strings.Join(strings.Fields(string(b)), " ") // lines are broken anywhere
		for _, m := range places.FindAllStringSubmatch(text, -1) {
			for _, q := range quoted.FindAllStringSubmatch(m[1], -1) {
				if !named.MatchString(q[1]) || file.MatchString(q[1]) {
					continue
				}
				checked++
				name := q[1][strings.LastIndex(q[1], ".")+1:]
				word := regexp.MustCompile(fmt.Sprintf(`(?m)^\s*(func (\([^)]*\) )?|type |const |var )?([A-Za-z0-9_]+, )*%s\b`, name))
				if name != q[1] { // it may be a call
					word = regexp.MustCompile(word.String() + `|\b` + regexp.QuoteMeta(q[1]) + `\b`)
				}
				if !slices.ContainsFunc(byName[m[2]], word.MatchString) {
					t.Errorf("%s: there is no %s in %s", strings.TrimPrefix(page, "../"), q[1], m[2])
				}
			}
		}
	}
	if checked < 100 {
		t.Errorf("%d places are named: the pages are not read as they are written", checked)
	}
	t.Logf("%d places", checked)
}
