package internal

import (
	"bytes"
	"flag"
	"fmt"
	"go/ast"
	"go/doc"
	"go/parser"
	"go/printer"
	"go/token"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

var update = flag.Bool("update", false, "write docs/limits.md anew")

const (
	limitsPage = "docs/limits.md"
	updateLine = "go test ./internal -run TestLimitsPage -update"
	module     = "github.com/unum-os/unum/"
)

// noLimits are numbers that look like limits and are codes: of messages, calls,
// flags, descriptors, keys, exits. A name that ends in * stands for all that begin so.
var noLimits = []string{
	"internal/errs.code*",
	"internal/fusefs.op*", "internal/fusefs.notify*", "internal/fusefs.Xattr*", "internal/fusefs.guardAbort", "internal/fusefs.guardExpired", "internal/fusefs.rootAlias",
	"internal/lab.labFailure", "internal/lab.shutdownNoLogFlush",
	"internal/principal.NoUID",
	"internal/proc.stream*", "internal/proc.log*", "internal/proc.codeTimeout", "internal/proc.ttyGroup", "internal/proc/early.sys*", "internal/proc/jobapi.Code*", "internal/proc/shim.linkFD",
	"internal/record.actRing", "internal/record.refusalRing", "internal/record.settingsUse",
	"internal/segment.flagPad", "internal/sim.*Key", "internal/sim.registerKeys",
	"internal/venus.noTrunc",
	"internal/volume.xattr*", "internal/volume.Rename*", "internal/volume.CreateTmpfile", "internal/volume.LockEnd",
	"internal/wire.major*",
}

// A limit is one row of the page.
type limit struct {
	pkg, file, name string
	value, what     string
	expr            ast.Expr
	imports         map[string]string // a file's, by name: of the module's packages only
}

// isNoLimit says whether noLimits has it, and notes which of them are of use.
func (l *limit) isNoLimit(used map[string]bool) bool {
	for _, n := range noLimits {
		if ok, _ := path.Match(strings.TrimPrefix(n, l.pkg+"."), l.name); ok && strings.HasPrefix(n, l.pkg+".") {
			used[n] = true
			return true
		}
	}
	return false
}

// TestLimitsPage keeps the page of all limits true: a limit is a constant or
// variable of a package whose value is a plain number or a
// duration, however composed, and whose type is not one of our own. Names that
// stand for codes are in noLimits; blocks with iota and numbers in hex are none.
func TestLimitsPage(t *testing.T) {
	limits := findLimits(t)
	var page bytes.Buffer
	page.WriteString(limitsHead)
	pkg := ""
	for _, l := range limits {
		if l.what == "" {
			t.Errorf("%s/%s: %s has no comment: say what it bounds, in which unit, and why so much", l.pkg, l.file, l.name)
		}
		if l.pkg != pkg {
			pkg = l.pkg
			fmt.Fprintf(&page, "\n## %s\n\n| name | value | file | what it is |\n|---|---|---|---|\n", pkg)
		}
		fmt.Fprintf(&page, "| `%s` | `%s` | %s | %s |\n", l.name, cell(l.value), l.file, cell(l.what))
	}
	if t.Failed() {
		return
	}
	if len(limits) < 200 {
		t.Fatalf("only %d limits found", len(limits))
	}
	where := filepath.Join("..", limitsPage)
	if *update {
		if err := os.WriteFile(where, page.Bytes(), 0o666); err != nil {
			t.Fatal(err)
		}
		return
	}
	have, err := os.ReadFile(where)
	if err != nil {
		t.Fatalf("%v\ntry: %s", err, updateLine)
	}
	if !bytes.Equal(have, page.Bytes()) {
		t.Errorf("%s is not what the code says%s\ntry: %s", limitsPage, firstDifference(have, page.Bytes()), updateLine)
	}
}

// firstDifference shows the first line in which two pages differ.
func firstDifference(have, want []byte) string {
	h, w := strings.Split(string(have), "\n"), strings.Split(string(want), "\n")
	for i := range min(len(h), len(w)) {
		if h[i] != w[i] {
			return fmt.Sprintf(", line %d:\n  page: %s\n  code: %s", i+1, h[i], w[i])
		}
	}
	return ", one ends early"
}

// cell makes a text fit a cell of a table.
func cell(s string) string {
	return strings.ReplaceAll(strings.Join(strings.Fields(s), " "), "|", "\\|")
}

// eachFile calls do for every file of code that is neither a test's nor generated.
func eachFile(t *testing.T, files *token.FileSet, do func(pkg, file string, f *ast.File)) {
	for _, root := range []string{"internal", "cmd"} {
		err := filepath.WalkDir(filepath.Join("..", root), func(p string, e fs.DirEntry, err error) error {
			if err != nil || !strings.HasSuffix(p, ".go") || strings.HasSuffix(p, "_test.go") || strings.Contains(p, "testdata") {
				return err
			}
			f, err := parser.ParseFile(files, p, nil, parser.ParseComments)
			if err != nil || ast.IsGenerated(f) {
				return err
			}
			p = strings.TrimPrefix(filepath.ToSlash(p), "../")
			do(path.Dir(p), path.Base(p), f)
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
}

// findLimits gives the limits of all code in the order of layers.
func findLimits(t *testing.T) []*limit {
	var all []*limit
	files := token.NewFileSet()
	eachFile(t, files, func(pkg, file string, f *ast.File) {
		all = append(all, numbersOf(files, pkg, file, f)...)
	})
	all = onlyLimits(t, all)
	rank := map[string]int{}
	for _, layer := range layers {
		for _, p := range layer {
			rank["internal/"+p] = len(rank)
		}
	}
	slices.SortStableFunc(all, func(a, b *limit) int {
		return 2*compareRank(rank, a.pkg, b.pkg) + strings.Compare(a.pkg, b.pkg)
	})
	return all
}

// compareRank compares two packages by their place in layers; what is not there,
// cmd, comes last, and a package below another with that.
func compareRank(rank map[string]int, a, b string) int {
	of := func(p string) int {
		for ; p != "."; p = path.Dir(p) {
			if r, ok := rank[p]; ok {
				return r
			}
		}
		return len(rank)
	}
	return max(-1, min(1, of(a)-of(b)))
}

// onlyLimits leaves out what is no limit: a name that stands for something else
// is one if that is.
func onlyLimits(t *testing.T, all []*limit) []*limit {
	used := map[string]bool{}
	all = slices.DeleteFunc(all, func(l *limit) bool { return l.isNoLimit(used) })
	for _, n := range noLimits {
		if !used[n] {
			t.Errorf("noLimits has %s, which there is not", n)
		}
	}
	for {
		known := map[string]bool{}
		for _, l := range all {
			known[l.pkg+"."+l.name] = true
		}
		n := len(all)
		all = slices.DeleteFunc(all, func(l *limit) bool { return !l.isNumber(l.expr, known) })
		if len(all) == n {
			return all
		}
	}
}

// numbersOf gives what in a file might be a limit.
func numbersOf(files *token.FileSet, pkg, file string, f *ast.File) []*limit {
	imports := map[string]string{}
	for _, i := range f.Imports {
		p := strings.Trim(i.Path.Value, `"`)
		name := path.Base(p)
		if i.Name != nil {
			name = i.Name.Name
		}
		if in, ok := strings.CutPrefix(p, module); ok {
			imports[name] = in
		}
	}
	var out []*limit
	for _, d := range f.Decls {
		g, ok := d.(*ast.GenDecl)
		if !ok || g.Tok == token.IMPORT || g.Tok == token.TYPE || counts(g) {
			continue
		}
		above := ""
		if g.Lparen.IsValid() {
			above = g.Doc.Text()
		}
		for _, s := range g.Specs {
			v := s.(*ast.ValueSpec)
			own := v.Doc.Text() + v.Comment.Text()
			if !g.Lparen.IsValid() {
				own = g.Doc.Text() + v.Comment.Text()
			}
			for i, name := range v.Names {
				if i >= len(v.Values) || !plain(v.Type) {
					continue
				}
				l := &limit{pkg: pkg, file: file, name: name.Name, expr: v.Values[i], imports: imports, what: sentence(own, name.Name)}
				if own == "" && regexp.MustCompile(`\b`+name.Name+`\b`).MatchString(above) {
					l.what = sentence(above, name.Name)
				}
				out = append(out, fieldsOf(files, f, l)...)
			}
			above += own
		}
	}
	return out
}

// fieldsOf gives a limit with its value, or, for a struct of its file, each of its
// fields, of which the struct's type says what it is.
func fieldsOf(files *token.FileSet, in *ast.File, l *limit) []*limit {
	lit, ok := l.expr.(*ast.CompositeLit)
	if !ok {
		var b bytes.Buffer
		printer.Fprint(&b, files, l.expr)
		l.value = value(b.String())
		return []*limit{l}
	}
	var out []*limit
	for _, e := range lit.Elts {
		if kv, ok := e.(*ast.KeyValueExpr); ok {
			if key, ok := kv.Key.(*ast.Ident); ok {
				f := *l
				f.name, f.expr = l.name+"."+key.Name, kv.Value
				f.what = fieldComment(in, lit.Type, key.Name)
				out = append(out, fieldsOf(files, in, &f)...)
			}
		}
	}
	return out
}

// fieldComment gives the comment of a field of a struct that is declared in the file.
func fieldComment(in *ast.File, typ ast.Expr, field string) (comment string) {
	name, ok := typ.(*ast.Ident)
	if !ok {
		return ""
	}
	ast.Inspect(in, func(n ast.Node) bool {
		t, ok := n.(*ast.TypeSpec)
		if !ok || t.Name.Name != name.Name {
			return true
		}
		if s, ok := t.Type.(*ast.StructType); ok {
			for _, f := range s.Fields.List {
				if slices.ContainsFunc(f.Names, func(n *ast.Ident) bool { return n.Name == field }) {
					comment = sentence(f.Doc.Text()+f.Comment.Text(), field)
				}
			}
		}
		return false
	})
	return comment
}

// value writes an expression the way people write times.
func value(s string) string {
	for unit, short := range map[string]string{"Hour": "h", "Minute": "min", "Second": "s", "Millisecond": "ms", "Microsecond": "us"} {
		s = regexp.MustCompile(`(\d) ?\* ?time\.`+unit+`\b`).ReplaceAllString(s, "$1 "+short)
		s = regexp.MustCompile(`\btime\.`+unit+`\b`).ReplaceAllString(s, "1 "+short)
	}
	return s
}

// counts says whether a block is an enumeration.
func counts(g *ast.GenDecl) bool {
	found := false
	ast.Inspect(g, func(n ast.Node) bool {
		if id, ok := n.(*ast.Ident); ok && id.Name == "iota" {
			found = true
		}
		return true
	})
	return found
}

// plain says whether a type is a number's and not one of our own: those are
// enumerations.
func plain(typ ast.Expr) bool {
	switch t := typ.(type) {
	case nil:
		return true
	case *ast.Ident:
		return strings.HasPrefix(t.Name, "int") || strings.HasPrefix(t.Name, "uint") || strings.HasPrefix(t.Name, "float")
	case *ast.SelectorExpr:
		return t.Sel.Name == "Duration"
	}
	return false
}

// isNumber says whether an expression is composed of numbers, durations, and
// limits that are known by package and name.
func (l *limit) isNumber(e ast.Expr, known map[string]bool) bool {
	switch e := e.(type) {
	case *ast.BasicLit:
		return e.Kind == token.FLOAT || e.Kind == token.INT && !strings.HasPrefix(e.Value, "0x")
	case *ast.ParenExpr:
		return l.isNumber(e.X, known)
	case *ast.UnaryExpr:
		return l.isNumber(e.X, known)
	case *ast.BinaryExpr:
		return l.isNumber(e.X, known) && l.isNumber(e.Y, known)
	case *ast.Ident:
		return known[l.pkg+"."+e.Name]
	case *ast.SelectorExpr:
		from, ok := e.X.(*ast.Ident)
		return ok && (from.Name == "time" || known[l.imports[from.Name]+"."+e.Sel.Name])
	case *ast.CallExpr: // a conversion
		return len(e.Args) == 1 && plain(e.Fun) && l.isNumber(e.Args[0], known)
	}
	return false
}

// sentence gives the first sentence of a comment that names it, else the first.
func sentence(comment, name string) string {
	first := new(doc.Package).Synopsis(comment)
	for rest := strings.Join(strings.Fields(comment), " "); rest != ""; {
		s := new(doc.Package).Synopsis(rest)
		if s == "" {
			break
		}
		if regexp.MustCompile(`\b` + name + `\b`).MatchString(s) {
			return s
		}
		rest = strings.TrimSpace(strings.TrimPrefix(rest, s))
	}
	return first
}

const limitsHead = `# Limits: every timeout, size, bound and version, and where it stands

Made from the code; do not edit: "` + updateLine + `" writes it anew, and the same without "-update", which is part
of "make test", fails where page and code differ, where one has no comment, and where a deadline has no name.

What a person may choose is no constant but a setting or a flag: the settings, with their defaults, are in docs/node.md,
"Settings", and in the function Default of internal/config/config.go ("unum config --example" prints them); the flags of a verb in its
file of cmd/unum-core, "--help" prints their defaults. Exit codes are in docs/commands.md, formats and their versions in docs/node.md.

A value is as written in the code: "<< 10", "<< 20" and "<< 30" make KiB, MiB and GiB where it counts bytes. Packages
are in the order of docs/architecture.md, files are those of the package. One name may stand in several packages and mean another
thing in each ("maxWait" is one of vice, for leases, and one of node, for changes), so search by what it does, too: "grep -n -i lease docs/limits.md".
What belongs together has one comment, and says the same in each line. Where a line names other limits, look at these before you change it.
Those of internal/record and internal/volume are part of a replicated machine: docs/record.md, "How to add a command", says what that means. Not here:
numbers of messages, flags, states and keys; and pauses of a fraction of a second between two looks, which stand where they are made.
`

// TestDeadlinesHaveNames sees to it that how long something may take is a limit
// with a name, which the page has.
func TestDeadlinesHaveNames(t *testing.T) {
	files, seen := token.NewFileSet(), 0
	eachFile(t, files, func(pkg, file string, f *ast.File) {
		ast.Inspect(f, func(n ast.Node) bool {
			c, ok := n.(*ast.CallExpr)
			if !ok || len(c.Args) == 0 {
				return true
			}
			switch called(c) {
			case "context.WithTimeout", "net.DialTimeout", "control.Image":
				seen++
				if bare(c.Args[len(c.Args)-1]) {
					t.Errorf("%s/%s: %s has a time without a name: make it a constant of the package and say why so long", pkg, file, called(c))
				}
			}
			return true
		})
	})
	if seen < 30 {
		t.Fatalf("only %d deadlines seen", seen)
	}
}

// called is the function of a call, with its package if it has one.
func called(c *ast.CallExpr) string {
	if s, ok := c.Fun.(*ast.SelectorExpr); ok {
		if x, ok := s.X.(*ast.Ident); ok {
			return x.Name + "." + s.Sel.Name
		}
	}
	return ""
}

// bare says whether a duration is written without any name but the unit's.
func bare(e ast.Expr) bool {
	return (&limit{}).isNumber(e, nil)
}
