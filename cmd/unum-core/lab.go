package main

import (
	"context"
	"errors"
	"os"
	"strconv"
	"strings"

	"github.com/unum-os/unum/internal/lab"
)

// labHooks say how a lab runs Unum.
func labHooks() lab.Hooks {
	exe := os.Getenv("UNUM_EXE")
	run := func(ctx context.Context, l *lab.Lab, n string, argv ...string) (string, error) {
		var out, errOut strings.Builder
		code, err := l.Exec(ctx, n, lab.ExecOptions{Argv: append([]string{exe}, argv...), Stdout: &out, Stderr: &errOut})
		if err != nil {
			return "", err
		}
		if code != 0 {
			return "", errors.New(strings.TrimSpace(strings.TrimPrefix(errOut.String(), "unum: ")))
		}
		return strings.TrimSpace(out.String()), nil
	}
	return lab.Hooks{
		Daemon: func(n lab.Node) []string {
			// The machine's settings are not those of the lab's nodes.
			common := []string{"--config", "", "--addr", n.Addr.String() + ":7400", "--dir", n.DataDir, "--mount", n.Mount, "--share", "0.34"}
			if !n.Fresh || n.First {
				return append([]string{exe, "up"}, common...)
			}
			how := map[lab.Kind][]string{lab.Store: {"join"}, lab.Client: {"join", "--client"}, lab.Witness: {"witness"}}[n.Kind]
			argv := append([]string{exe}, how...)
			return append(append(argv, n.Peer.String()+":7400", n.Token), common...)
		},
		Healthy: func(ctx context.Context, l *lab.Lab, n lab.Node) error {
			_, err := run(ctx, l, n.Name, "status", "--healthy")
			return err
		},
		Token: func(ctx context.Context, l *lab.Lab, from string) (string, error) {
			return run(ctx, l, from, "token", "--quiet", "--uses", strconv.Itoa(lab.MaxNodes), "--expires", "1h")
		},
	}
}
