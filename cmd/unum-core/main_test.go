package main

import (
	"bytes"
	"context"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/spf13/cobra"
)

// walk calls f for every command that people can type.
func walk(c *cobra.Command, f func(*cobra.Command)) {
	f(c)
	for _, sub := range c.Commands() {
		if sub.Name() != "help" { // cobra's own
			walk(sub, f)
		}
	}
}

// path is what is typed after unum.
func path(c *cobra.Command) []string { return strings.Fields(c.CommandPath())[1:] }

// TestEveryCommandExplainsItself: each has a line, an example of its own, and -h,
// which ends well.
func TestEveryCommandExplainsItself(t *testing.T) {
	n := 0
	root := rootCommand()
	root.InitDefaultCompletionCmd()
	walk(root, func(c *cobra.Command) {
		name := c.CommandPath()
		n++
		if c.Short == "" || strings.HasSuffix(c.Short, ".") {
			t.Errorf("%s: short text %q", name, c.Short)
		}
		foreign := strings.Contains(name, " completion") // cobra's own, with examples in its text
		if !foreign && (c.Example == "" || !strings.Contains(c.Example, strings.Split(name, " ")[len(strings.Split(name, " "))-1])) {
			t.Errorf("%s: no example that shows it: %q", name, c.Example)
		}
		for line := range strings.Lines(c.Example) {
			if !strings.HasPrefix(line, "  ") && strings.TrimSpace(line) != "" {
				t.Errorf("%s: the example %q is not indented", name, line)
			}
		}
		if c.DisableFlagParsing {
			return // the light face's; test asks the binary
		}
		r := rootCommand()
		var out bytes.Buffer
		r.SetOut(&out)
		r.SetErr(&out)
		r.SetArgs(append(path(c), "-h"))
		if err := r.ExecuteContext(context.Background()); err != nil || !strings.Contains(out.String(), "Usage:") {
			t.Errorf("%s -h: %v, %.100q", name, err, out.String())
		}
	})
	if n < 25 {
		t.Errorf("only %d commands were seen", n)
	}
}

// TestUnknown: what is no command is refused with the nearest one, as code 125.
func TestUnknown(t *testing.T) {
	stderr := os.Stderr
	null, err := os.OpenFile(os.DevNull, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	for typed, want := range map[string]string{"statsu": "status", "nods": "nodes", "dwon": "down", "confg": "config", "vers": "version"} {
		r := rootCommand()
		r.SetOut(io.Discard)
		r.SetArgs([]string{typed})
		err := r.ExecuteContext(context.Background())
		if err == nil || !strings.Contains(err.Error(), `unknown command "`+typed+`"`) || !strings.Contains(err.Error(), "\t"+want+"\n") {
			t.Errorf("%s: %v", typed, err)
		}
		os.Stderr = null
		if n := code(context.Background(), err); n != 125 {
			t.Errorf("%s: code %d", typed, n)
		}
		os.Stderr = stderr
	}
}

// TestManual: every command has a page, with its flags, and the same bytes when
// it is written again.
func TestManual(t *testing.T) {
	t.Setenv("SOURCE_DATE_EPOCH", "1700000000")
	var dirs [2]string
	for i := range dirs {
		dirs[i] = t.TempDir()
		r := rootCommand()
		r.SetArgs([]string{"man", dirs[i]})
		if err := r.ExecuteContext(context.Background()); err != nil {
			t.Fatal(err)
		}
	}
	root := rootCommand()
	walk(root, func(c *cobra.Command) {
		if c.Hidden {
			return
		}
		name := strings.ReplaceAll(c.CommandPath(), " ", "-") + ".1"
		a, err := os.ReadFile(filepath.Join(dirs[0], name))
		if err != nil {
			t.Error(err)
			return
		}
		b, err := os.ReadFile(filepath.Join(dirs[1], name))
		if err != nil || !bytes.Equal(a, b) {
			t.Errorf("%s: two pages differ, %v", name, err)
		}
		if !bytes.Contains(a, []byte("Nov 2023")) {
			t.Errorf("%s does not bear the date of the source", name)
		}
	})
	b, err := os.ReadFile(filepath.Join(dirs[0], "unum-up.1"))
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"--detach", "--labels", "(default 127.0.0.1:7401)"} {
		if !strings.Contains(strings.ReplaceAll(string(b), `\-`, "-"), want) {
			t.Errorf("unum-up.1 does not say %q", want)
		}
	}
}

// TestCompletion: the shells are told of the commands and of flags.
func TestCompletion(t *testing.T) {
	for typed, want := range map[string][]string{"": {"up", "down", "config", "run", "lab"}, "up --lo": {"--log-level", "--log-format", "--log-file"}, "lab ": {"up", "kill"}} {
		r := rootCommand()
		var out bytes.Buffer
		r.SetOut(&out)
		r.SetErr(io.Discard)
		args := append([]string{cobra.ShellCompNoDescRequestCmd}, strings.Split(typed, " ")...)
		r.SetArgs(args)
		if err := r.ExecuteContext(context.Background()); err != nil {
			t.Fatal(err)
		}
		for _, w := range want {
			if !strings.Contains("\n"+out.String(), "\n"+w+"\n") {
				t.Errorf("%q does not offer %s: %q", typed, w, out.String())
			}
		}
	}
}
