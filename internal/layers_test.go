// Package internal holds the parts; its test holds them to their layers.
package internal

import (
	"os/exec"
	"strings"
	"testing"
)

// layers are the packages from the bottom up, as in docs/architecture.md; those
// of one line may import each other.
var layers = [][]string{
	{"ids", "errs", "health", "wire", "clock", "disk", "metric", "need"},
	{"lease", "sched", "quorum"},
	{"identity"},
	{"principal"},
	{"rpc"},
	{"member"},
	{"group"},
	{"volume", "record"},
	{"segment", "block"},
	{"vice"},
	{"control"},
	{"control/api"},
	{"fusefs"},
	{"venus"},
	{"load", "proc"},
	{"control/cli"},
	{"config", "daemon", "doctor"},
	{"node"},
	{"lab"},
	{"sim"},
}

// part returns the name under which a package stands in layers.
func part(rank map[string]int, name string) string {
	if _, ok := rank[name]; ok {
		return name
	}
	top, _, _ := strings.Cut(name, "/")
	return top
}

// TestLayers keeps the diagram true, and the rules pure.
func TestLayers(t *testing.T) {
	const prefix = "github.com/unum-os/unum/internal/"
	rank := map[string]int{}
	for i, l := range layers {
		for _, p := range l {
			rank[p] = i
		}
	}
	out, err := exec.Command("go", "list", "-f", `{{.ImportPath}} {{join .Imports " "}}`, "./...").Output()
	if err != nil {
		t.Fatal(err)
	}
	seen := 0
	for _, line := range strings.Split(strings.TrimSpace(string(out)), "\n") {
		f := strings.Fields(line)
		name, ok := strings.CutPrefix(f[0], prefix)
		if !ok {
			continue
		}
		top := part(rank, name)
		r, known := rank[top]
		if !known {
			t.Errorf("package %s is not in docs/architecture.md's layers", name)
			continue
		}
		seen++
		for _, imp := range f[1:] {
			if dep, ok := strings.CutPrefix(imp, prefix); ok {
				dep = part(rank, dep)
				if dep != top && rank[dep] > r {
					t.Errorf("%s imports %s, which is above it", name, dep)
				}
			}
			if top == "lease" || top == "sched" || top == "quorum" {
				switch imp {
				case "net", "os", "math/rand", "math/rand/v2", "sync":
					t.Errorf("%s holds rules only and must not import %s", name, imp)
				}
			}
		}
	}
	if seen < len(rank) {
		t.Fatalf("only %d packages seen", seen)
	}
}

// TestLightFace keeps the binary that people start thousands of times light
// (decision 0008): what the core is made of must not get into it.
func TestLightFace(t *testing.T) {
	out, err := exec.Command("go", "list", "-deps", "github.com/unum-os/unum/cmd/unum").Output()
	if err != nil {
		t.Fatal(err)
	}
	deps := strings.Fields(string(out))
	if len(deps) < 50 {
		t.Fatalf("only %d packages seen", len(deps))
	}
	for _, d := range deps {
		for _, heavy := range []string{"google.golang.org/", "github.com/cockroachdb/", "go.etcd.io/", "github.com/spf13/", "github.com/prometheus/", "crypto/tls", "net/http"} {
			if strings.HasPrefix(d, heavy) {
				t.Errorf("cmd/unum comes to import %s", d)
			}
		}
	}
}
