package main

import (
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/cobra/doc"

	"github.com/unum-os/unum/internal/errs"
	"github.com/unum-os/unum/internal/node"
)

// release is what the Makefile says of the source; see scripts/version.
var release string

// version is what was built: what the Makefile said, or what the go command
// knows of the source.
func version() string {
	if release != "" {
		return release
	}
	bi, ok := debug.ReadBuildInfo()
	if !ok {
		return "unknown"
	}
	v := bi.Main.Version
	for _, s := range bi.Settings {
		if s.Key == "vcs.revision" && !strings.Contains(v, s.Value[:min(12, len(s.Value))]) {
			v += " " + s.Value
		}
	}
	return v
}

func versionCommand() *cobra.Command {
	var asJSON bool
	cmd := &cobra.Command{
		Use:     "version",
		Short:   "Print the version of this program and of what it keeps and speaks",
		Example: "  unum version\n  unum version --json",
		Args:    cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			f := node.FormatVersions()
			platform := runtime.GOOS + "/" + runtime.GOARCH
			if asJSON {
				return printJSON(map[string]any{"version": version(), "go": runtime.Version(), "platform": platform, "formats": f})
			}
			fmt.Printf("unum %s\nbuilt with %s for %s\ndata directory: format %d\nbetween nodes: %s\n",
				version(), runtime.Version(), platform, f.Data, strings.Join(f.Protocol, ", "))
			return nil
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "as JSON")
	return cmd
}

// manCommand writes the manual, for packages.
func manCommand() *cobra.Command {
	return &cobra.Command{
		Use:     "man DIR",
		Short:   "Write the manual pages into a directory",
		Long:    "Write the manual pages into a directory, which must exist. With SOURCE_DATE_EPOCH in\nthe environment they bear that date.",
		Example: "  unum man /usr/local/share/man/man1",
		Hidden:  true,
		Args:    cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			date := time.Now()
			if e := os.Getenv("SOURCE_DATE_EPOCH"); e != "" {
				n, err := strconv.ParseInt(e, 10, 64)
				if err != nil {
					return errs.E(errs.Invalid, "write the manual", "SOURCE_DATE_EPOCH", "%q is no number of seconds", e)
				}
				date = time.Unix(n, 0)
			}
			date = date.UTC()
			root := cmd.Root()
			root.DisableAutoGenTag = true // it would bear the day of the build
			root.InitDefaultCompletionCmd()
			head := &doc.GenManHeader{Section: "1", Date: &date, Source: "unum " + version(), Manual: "Unum"}
			err := doc.GenManTree(root, head, filepath.Clean(args[0]))
			return errs.Wrap(err, "write the manual", args[0])
		},
	}
}
