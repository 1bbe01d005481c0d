package test

import (
	"strings"
	"testing"
	"time"
)

// TestHelp asks the binary for help: both its light face and its core have it,
// and nobody has to be root for it.
func TestHelp(t *testing.T) {
	c := &cluster{t: t, bin: builtBinary(t)}
	for _, v := range []struct {
		args string
		code int
		want string
	}{
		{"run -h", 0, "Usage: unum run"}, {"run --help", 0, "Usage: unum run"}, {"sh --help", 0, "Usage: unum sh"},
		{"-h", 0, "Usage:"}, {"up -h", 0, "--detach"}, {"lab up -h", 0, "--nodes"}, {"config --example", 0, "#mount = "}, {"version", 0, "built with go"},
		{"completion bash", 0, "complete"}, {"stauts", 125, "status"}, {"up --muont /x", 125, "muont"}, {"up --share 7", 125, "from 0 to 1"},
		{"up -d --wait 10", 125, "has no unit"}, {"up --labels failure-domian=r1", 125, "failure-domain"},
	} {
		out, errOut, code := c.unum(time.Minute, strings.Split(v.args, " ")...)
		if code != v.code || !strings.Contains(out+errOut, v.want) {
			t.Errorf("unum %s: code %d, want %d and %q: %s%s", v.args, code, v.code, v.want, out, errOut)
		}
	}
}
