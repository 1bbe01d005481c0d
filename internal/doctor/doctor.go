// Package doctor says what a machine lacks to be a node, what then does not
// work, and what to type; and types what is safe.
//
// Words: a finding is the outcome of one check, good or bad. Its severity says
// what a bad one costs: needed (no node without it), wanted (something does not
// work), info (good to know). A fix is a command that changes the machine so
// that the finding becomes good, and harms nothing if it does not.
//
// Invariants: checks change nothing, leave nothing behind, and have an end. A
// fix is printed before it is run, exactly as it is run.
//
// On failure: what cannot be looked at is a finding that says so, never a good
// one.
package doctor

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strings"
	"time"

	"github.com/unum-os/unum/internal/errs"
)

// Severity says what a bad finding costs.
type Severity string

// The severities.
const (
	Needed Severity = "needed"
	Wanted Severity = "wanted"
	Info   Severity = "info"
)

// Finding is the outcome of a check.
type Finding struct {
	Code     string     `json:"code"` // a fixed word, for scripts
	Severity Severity   `json:"severity"`
	OK       bool       `json:"ok"`
	Text     string     `json:"text"`             // what was found
	Effect   string     `json:"effect,omitempty"` // what does not work; only if not OK
	Remedy   string     `json:"remedy,omitempty"` // what to type; only if not OK
	Fix      [][]string `json:"fix,omitempty"`    // commands that are safe to run; only if not OK
}

// Machine says what to look at.
type Machine struct {
	Dir    string // the node's data directory
	LogDir string
	Addr   string // the setting: host:port, or empty
	Port   int    // the port if Addr has none

	Pid    int   // of the daemon that runs here; 0: none
	Health error // why the daemon is not healthy; nil if it is, or none runs
	// DaemonAddr is where the daemon is reached by others, host:port.
	DaemonAddr string
	// Clocks are how far the clocks of other nodes are from this one's, at least,
	// by node. Nil if no daemon could be asked.
	Clocks map[string]time.Duration

	// TryJob starts something with the rights that a job is started with.
	TryJob func(ctx context.Context) error
	// Settings is what reading the settings gave.
	Settings error
}

// Examine runs all checks.
func (m *Machine) Examine(ctx context.Context) []Finding {
	var out []Finding
	for _, check := range []func(context.Context) []Finding{
		one(m.settings), one(m.root), one(m.kernel), one(m.fuse), one(m.passthrough), one(m.namespaces), one(m.cgroups), one(m.criu), m.clock,
		one(m.directory), m.disk, one(m.port), one(m.files), m.tools, one(m.daemon),
	} {
		for _, f := range check(ctx) {
			if f.OK {
				f.Effect, f.Remedy, f.Fix = "", "", nil
			} else if f.Remedy == "" && len(f.Fix) > 0 {
				f.Remedy = Words(f.Fix)
			}
			out = append(out, f)
		}
	}
	return out
}

func one(f func(context.Context) Finding) func(context.Context) []Finding {
	return func(ctx context.Context) []Finding { return []Finding{f(ctx)} }
}

// Good reports whether nothing that is needed is missing.
func Good(fs []Finding) bool {
	return !slices.ContainsFunc(fs, func(f Finding) bool { return !f.OK && f.Severity == Needed })
}

// Words are commands as one types them.
func Words(cmds [][]string) string {
	var lines []string
	for _, argv := range cmds {
		lines = append(lines, strings.Join(argv, " "))
	}
	return strings.Join(lines, " && ")
}

// fixTime bounds one fix: installing a package over a slow line takes minutes.
const fixTime = 10 * time.Minute

// Fix runs the fixes of bad findings, each once, and tells each before it is run
// and what it said if it failed. What has become of it says another Examine.
func Fix(ctx context.Context, fs []Finding, tell func(string)) error {
	var done []string
	for _, f := range fs {
		if f.OK || len(f.Fix) == 0 {
			continue
		}
		if os.Geteuid() != 0 {
			return errs.E(errs.Permission, "fix "+f.Code, "", "root is needed").WithRemedy("sudo unum doctor --fix")
		}
		for _, argv := range f.Fix {
			words := strings.Join(argv, " ")
			if slices.Contains(done, words) {
				continue
			}
			done = append(done, words)
			tell("running: " + words)
			if err := run(ctx, argv); err != nil {
				if ctx.Err() != nil {
					return context.Cause(ctx)
				}
				tell("failed: " + err.Error())
				break // what follows in this fix stands on it
			}
		}
	}
	return nil
}

func run(ctx context.Context, argv []string) error {
	ctx, cancel := context.WithTimeout(ctx, fixTime)
	defer cancel()
	cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
	cmd.Env = append(os.Environ(), "DEBIAN_FRONTEND=noninteractive")
	cmd.WaitDelay = 5 * time.Second // a child of it may hold the pipe
	out, err := cmd.CombinedOutput()
	if err != nil {
		out = bytes.TrimSpace(out)
		if i := bytes.LastIndexByte(out, '\n'); i >= 0 {
			out = out[i+1:]
		}
		return fmt.Errorf("%s: %w: %s", argv[0], err, out)
	}
	return nil
}
