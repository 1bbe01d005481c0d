package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"

	"github.com/unum-os/unum/internal/config"
	"github.com/unum-os/unum/internal/daemon"
	"github.com/unum-os/unum/internal/doctor"
	"github.com/unum-os/unum/internal/ids"
	"github.com/unum-os/unum/internal/node"
)

// examine looks at this machine as a node with the settings in file.
func examine(ctx context.Context, file string) []doctor.Finding {
	m := doctor.Machine{LogDir: filepath.Dir(defaultLog), Port: node.DefaultPort, TryJob: tryJob}
	l, err := config.Load(file, nil)
	if err != nil {
		m.Settings = err
		d := config.Default()
		l = &config.Loaded{Settings: d}
	}
	m.Dir, m.Addr = l.Dir, l.Addr
	pid, runs, err := daemon.Running(pidPath())
	switch {
	case err != nil:
		m.Health = err
	case runs:
		m.Pid = pid
		askDaemon(ctx, &m)
	}
	return m.Examine(ctx)
}

// askDaemon takes over what the daemon says of itself and the others.
func askDaemon(ctx context.Context, m *doctor.Machine) {
	t0 := time.Now()
	st, err := getStatus(ctx)
	t1 := time.Now()
	if err != nil {
		m.Health = err
		return
	}
	if st.Problem != "" {
		m.Health = fmt.Errorf("%s", st.Problem)
	}
	m.DaemonAddr = st.Addr
	m.Clocks = map[string]time.Duration{}
	for _, p := range st.Members {
		if p.Self == nil || p.Id == st.Node {
			continue
		}
		// It answered between t0 and t1: what is outside of that is off for certain.
		at, off := p.Self.Clock.AsTime(), time.Duration(0)
		if at.Before(t0) {
			off = at.Sub(t0)
		} else if at.After(t1) {
			off = at.Sub(t1)
		}
		m.Clocks[ids.Node(p.Id).String()] = off
	}
}

func doctorCommand() *cobra.Command {
	var asJSON, fix bool
	var file string
	cmd := &cobra.Command{
		Use:   "doctor",
		Short: "Say what this machine lacks, what then does not work, and what to type",
		Long: `Say what this machine lacks, what then does not work, and what to type. What is
needed, no node runs without; what is wanted, something does not work without.

With --fix, what is safe is done: the FUSE module is loaded, control groups are
mounted, Debian packages of the lab are installed, directories are made. Each
command is printed before it is run; then everything is looked at again.

Exit code 1 if something needed is missing, or the daemon that runs here is not
healthy; else 0.`,
		Example: "  unum doctor\n  unum doctor --json\n  sudo unum doctor --fix",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			fs := examine(cmd.Context(), file)
			if fix {
				if err := doctor.Fix(cmd.Context(), fs, func(s string) { fmt.Fprintln(os.Stderr, s) }); err != nil {
					return err
				}
				fs = examine(cmd.Context(), file)
			}
			if asJSON {
				if err := printJSON(fs); err != nil {
					return err
				}
			} else {
				printFindings(fs)
			}
			if !doctor.Good(fs) {
				return coded(1)
			}
			return nil
		},
	}
	fileFlag(cmd, &file)
	cmd.Flags().BoolVar(&asJSON, "json", false, "as JSON")
	cmd.Flags().BoolVar(&fix, "fix", false, "do what is safe, and say what remains")
	return cmd
}

func printFindings(fs []doctor.Finding) {
	fixable := false
	for _, f := range fs {
		if f.OK {
			fmt.Printf("ok      %s: %s\n", f.Code, f.Text)
			continue
		}
		fmt.Printf("%-6s  %s: %s\n", f.Severity, f.Code, f.Text)
		if f.Effect != "" {
			fmt.Printf("        then: %s\n", f.Effect)
		}
		if f.Remedy != "" {
			fmt.Printf("        try: %s\n", f.Remedy)
		}
		fixable = fixable || len(f.Fix) > 0
	}
	if fixable {
		fmt.Println("unum doctor --fix does what is safe of this")
	}
}
