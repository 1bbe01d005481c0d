package face

import (
	"fmt"
	"os"
	"strings"
	"time"

	"github.com/unum-os/unum/internal/proc/jobapi"
)

const runUsage = `Usage: unum run [flags] [--] COMMAND [ARGUMENT...]

Run a command on the cluster as if it had been typed here: same input, output,
terminal, directory, environment, user, limits, signals and exit code. The node
is chosen by price; unum why JOB explains the choice.

Flags:
      --on NODE        run on this node (n2, or its host name)
      --not-on NODE    not on this one; may be repeated, or a list with commas
  -d, --detach         print the job's number and return; see unum logs, wait, kill
      --name NAME      a name shown in unum ps --json
      --timeout TIME   end the command after this time, as in 90s or 2h (code 124)
  -e, --env KEY=VALUE  set a variable of its environment; may be repeated
      --tty, --no-tty  give the command a terminal, or none, whatever the caller has
  -h, --help           this text

Exit code: the command's own; 128+n if signal n killed it; 125 if Unum failed,
126 if the command cannot be executed, 127 if it was not found.

Examples:
  unum run make -j8
  unum run --on n2 hostname
  id=$(unum run --detach ./simulate); unum logs -f $id
`

const shUsage = `Usage: unum sh [ARGUMENT...]

Run /bin/sh on the cluster with these arguments, so that programs which start
commands through a shell spread them over the nodes:

  unum sh -c 'uname -n; nproc'
  make -j8 SHELL="unum sh"
  parallel 'unum sh -c {}' < commands
`

// Usage is the help of the light face's verbs, run and sh.
func Usage(verb string) string {
	if verb == "sh" {
		return shUsage
	}
	return runUsage
}

type options struct {
	ask     jobapi.Ask
	env     []string
	tty     *bool
	shell   bool // keep the caller's output processing: others may be writing
	command []string
}

// parse reads the flags in front of the command. help is set when help was asked
// for.
func parse(args []string) (o options, help bool, err error) {
	yes, no := true, false
	for len(args) > 0 {
		a := args[0]
		if a == "--" {
			args = args[1:]
			break
		}
		if len(a) < 2 || a[0] != '-' {
			break
		}
		args = args[1:]
		flag, val, has := strings.Cut(a, "=")
		value := func() (string, error) {
			if has {
				return val, nil
			}
			if len(args) == 0 {
				return "", fmt.Errorf("%s needs a value", flag)
			}
			v := args[0]
			args = args[1:]
			return v, nil
		}
		switch flag {
		case "--on":
			o.ask.On, err = value()
		case "--not-on":
			var v string
			if v, err = value(); err == nil {
				for n := range strings.SplitSeq(v, ",") {
					o.ask.NotOn = append(o.ask.NotOn, n)
				}
			}
		case "--detach", "-d":
			o.ask.Detach = true
		case "--name":
			o.ask.Name, err = value()
		case "--timeout":
			var v string
			if v, err = value(); err == nil {
				var d time.Duration
				if d, err = time.ParseDuration(v); err != nil || d <= 0 {
					err = fmt.Errorf("--timeout %q: want a time as in 90s or 2h", v)
				}
				o.ask.Timeout = int64(d)
			}
		case "--env", "-e":
			var v string
			if v, err = value(); err == nil {
				if i := strings.IndexByte(v, '='); i < 1 {
					err = fmt.Errorf("--env %q: want KEY=VALUE", v)
				}
				o.env = append(o.env, v)
			}
		case "--tty":
			o.tty = &yes
		case "--no-tty":
			o.tty = &no
		case "--help", "-h":
			return o, true, nil
		default:
			err = fmt.Errorf("unknown flag %s", flag)
		}
		if err != nil {
			return o, false, err
		}
	}
	o.command = args
	if len(args) == 0 {
		return o, false, fmt.Errorf("no command")
	}
	return o, false, nil
}

// environment returns the process's, with sets on top.
func environment(sets []string) [][]byte {
	env := os.Environ()
	out := make([][]byte, 0, len(env)+len(sets))
next:
	for _, e := range env {
		k, _, _ := strings.Cut(e, "=")
		for _, s := range sets {
			if strings.HasPrefix(s, k+"=") {
				continue next
			}
		}
		out = append(out, []byte(e))
	}
	for i, s := range sets {
		k, _, _ := strings.Cut(s, "=")
		later := false
		for _, t := range sets[i+1:] {
			later = later || strings.HasPrefix(t, k+"=")
		}
		if !later {
			out = append(out, []byte(s))
		}
	}
	return out
}
