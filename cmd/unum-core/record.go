package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"text/tabwriter"
	"time"
	"unicode/utf8"

	"github.com/spf13/cobra"

	"github.com/unum-os/unum/internal/control"
	"github.com/unum-os/unum/internal/control/api"
	"github.com/unum-os/unum/internal/control/cli"
	"github.com/unum-os/unum/internal/errs"
)

// recordTimeout bounds a question to the record: longer than an election.
const recordTimeout = 20 * time.Second

// maxValue bounds what is read as a value, in bytes; the record says it again.
const maxValue = 64 << 10

// asks runs f against the daemon, within recordTimeout.
func asks(cmd *cobra.Command, f func(ctx context.Context, c *api.Client) error) error {
	ctx, cancel := context.WithTimeout(cmd.Context(), recordTimeout)
	defer cancel()
	return cli.Ask(ctx, control.Path(), func(c *api.Client) error { return f(ctx, c) })
}

// keyJSON is a key as --json shows it. Value is there if it is text, Base64 if not.
type keyJSON struct {
	Key     string  `json:"key"`
	Value   *string `json:"value,omitempty"`
	Base64  []byte  `json:"value_base64,omitempty"`
	Create  uint64  `json:"create_revision"`
	Mod     uint64  `json:"mod_revision"`
	Version uint64  `json:"version"`
	Owner   uint32  `json:"owner_uid"`
}

func toKeyJSON(k *api.Key) keyJSON {
	j := keyJSON{Key: k.Key, Create: k.Create, Mod: k.Mod, Version: k.Version, Owner: k.Owner}
	if s := string(k.Value); utf8.ValidString(s) {
		j.Value = &s
	} else {
		j.Base64 = k.Value
	}
	return j
}

func recordCommand() *cobra.Command {
	root := &cobra.Command{
		Use:   "record",
		Short: "Read, write and watch keys of the cluster's replicated record",
		Long: `The cluster's record holds small values under keys, replicated and durable when
written: settings/NAME, which administrators write and all read, and
user/UID/..., which are that user's. A value has at most 64 KiB.`,
		Example: "  unum record put user/1000/colour blue\n  unum record get user/1000/colour\n  unum record watch --after 120",
	}
	root.AddCommand(recordGet(), recordPut(), recordRemove(), recordList(), recordWatch())
	return root
}

func recordGet() *cobra.Command {
	var asJSON, stale bool
	cmd := &cobra.Command{
		Use: "get KEY", Short: "Print the value of a key", Args: cobra.ExactArgs(1),
		Example: "  unum record get user/1000/colour\n  unum record get --json settings/motd",
		RunE: func(cmd *cobra.Command, args []string) error {
			return asks(cmd, func(ctx context.Context, c *api.Client) error {
				r, err := c.Record.Get(ctx, &api.GetRequest{Key: args[0], Stale: stale})
				if err != nil {
					return err
				}
				if asJSON {
					return printJSON(toKeyJSON(r.Key))
				}
				_, err = os.Stdout.Write(r.Key.Value)
				return err
			})
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "as JSON, with revisions")
	cmd.Flags().BoolVar(&stale, "stale", false, "as this node knows it now, without asking the others")
	return cmd
}

// expectFlag adds --expect and returns what it was set to, nil if it was not.
func expectFlag(cmd *cobra.Command) func() *uint64 {
	var rev uint64
	cmd.Flags().Uint64Var(&rev, "expect", 0, "only if the key was written last at this revision; 0: only if there is none")
	return func() *uint64 {
		if cmd.Flags().Changed("expect") {
			return &rev
		}
		return nil
	}
}

func recordPut() *cobra.Command {
	var expect func() *uint64
	cmd := &cobra.Command{
		Use: "put KEY VALUE", Short: "Write a key; VALUE may be -, then it is read from standard input", Args: cobra.ExactArgs(2),
		Long:    "Write a key. VALUE may be -, then it is read from standard input. Prints the revision\nat which it was written.",
		Example: "  unum record put user/1000/colour blue\n  unum record put --expect 0 user/1000/lock mine\n  unum record put settings/motd - < motd",
		RunE: func(cmd *cobra.Command, args []string) error {
			value := []byte(args[1])
			if args[1] == "-" {
				var err error
				if value, err = io.ReadAll(io.LimitReader(os.Stdin, maxValue+1)); err != nil {
					return errs.Wrap(err, "read the value", "standard input")
				}
			}
			return asks(cmd, func(ctx context.Context, c *api.Client) error {
				r, err := c.Record.Put(ctx, &api.PutRequest{Key: args[0], Value: value, Expect: expect()})
				if err == nil {
					fmt.Println(r.Mod)
				}
				return err
			})
		},
	}
	expect = expectFlag(cmd)
	return cmd
}

func recordRemove() *cobra.Command {
	var expect func() *uint64
	cmd := &cobra.Command{
		Use: "rm KEY", Short: "Remove a key", Args: cobra.ExactArgs(1),
		Example: "  unum record rm user/1000/colour\n  unum record rm --expect 121 user/1000/lock",
		RunE: func(cmd *cobra.Command, args []string) error {
			return asks(cmd, func(ctx context.Context, c *api.Client) error {
				_, err := c.Record.Delete(ctx, &api.DeleteRequest{Key: args[0], Expect: expect()})
				return err
			})
		},
	}
	expect = expectFlag(cmd)
	return cmd
}

func recordList() *cobra.Command {
	var asJSON bool
	cmd := &cobra.Command{
		Use: "list PREFIX", Short: "List the keys that begin with a prefix", Args: cobra.ExactArgs(1),
		Example: "  unum record list user/1000/\n  unum record list --json settings/",
		RunE: func(cmd *cobra.Command, args []string) error {
			return asks(cmd, func(ctx context.Context, c *api.Client) error {
				list := []keyJSON{}
				w := tabwriter.NewWriter(os.Stdout, 2, 8, 2, ' ', 0)
				fmt.Fprintln(w, "KEY\tBYTES\tREVISION\tVERSION\tUID")
				for after := ""; ; {
					r, err := c.Record.List(ctx, &api.ListRequest{Prefix: args[0], After: after})
					if err != nil {
						return err
					}
					for _, k := range r.Keys {
						list = append(list, toKeyJSON(k))
						fmt.Fprintf(w, "%s\t%d\t%d\t%d\t%d\n", k.Key, len(k.Value), k.Mod, k.Version, k.Owner)
						after = k.Key
					}
					if !r.More || len(r.Keys) == 0 {
						break
					}
				}
				if asJSON {
					return printJSON(list)
				}
				return w.Flush()
			})
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "as JSON, with values")
	return cmd
}

func recordWatch() *cobra.Command {
	var after uint64
	var prefix string
	var kinds []string
	var asJSON bool
	cmd := &cobra.Command{
		Use: "watch", Short: "Print changes of the record as they happen", Args: cobra.NoArgs,
		Long: `Print changes of the record as they happen, a line each: revision, kind, what. With
--after it begins with the changes after that revision, so that one who was
interrupted misses none; the record keeps the last 10,000. Ends by Ctrl-C.`,
		Example: "  unum record watch\n  unum record watch --after 120 --prefix settings/\n  unum record watch --json --kinds member,user",
		RunE: func(cmd *cobra.Command, _ []string) error {
			ctx := cmd.Context()
			return cli.Ask(ctx, control.Path(), func(c *api.Client) error {
				s, err := c.Record.Watch(ctx, &api.WatchRequest{After: after, Prefix: prefix, Kinds: kinds})
				enc := json.NewEncoder(os.Stdout)
				for err == nil {
					var m *api.WatchResponse
					if m, err = s.Recv(); err != nil {
						break
					}
					for _, e := range m.Events {
						if asJSON {
							err = enc.Encode(map[string]any{"revision": m.Revision, "kind": e.Kind, "subject": e.Subject, "removed": e.Removed})
						} else {
							gone := ""
							if e.Removed {
								gone = " removed"
							}
							_, err = fmt.Printf("%d %s %s%s\n", m.Revision, e.Kind, e.Subject, gone)
						}
					}
				}
				if errors.Is(err, io.EOF) {
					return errs.E(errs.Unavailable, "watch", "", "the daemon has ended")
				}
				return err
			})
		},
	}
	cmd.Flags().Uint64Var(&after, "after", 0, "begin with the changes after this revision (0: from now on)")
	cmd.Flags().StringVar(&prefix, "prefix", "", "only keys that begin with it")
	cmd.Flags().StringSliceVar(&kinds, "kinds", nil, "only these: member, token, key, user, job")
	cmd.Flags().BoolVar(&asJSON, "json", false, "as JSON, a line each")
	return cmd
}

func auditCommand() *cobra.Command {
	var after uint64
	var limit uint32
	var asJSON bool
	type entry struct {
		Seq     uint64    `json:"seq"`
		Time    time.Time `json:"time"`
		Who     string    `json:"who"`
		What    string    `json:"what"`
		On      string    `json:"on"`
		Outcome string    `json:"outcome"`
		Times   uint64    `json:"times"`
		Door    string    `json:"refused_by,omitempty"`
	}
	cmd := &cobra.Command{
		Use: "audit", Short: "Show who did, or tried, what to the cluster", Args: cobra.NoArgs,
		Long: `Show administrative acts and refusals: who, what, on what, and what came of it. The
newest 1000 are shown, or as many as --limit says, the oldest of them first. To go on
where you stopped, name the last SEQ you have seen: --after shows the next ones after
it, and --after 0 begins with the oldest. The record keeps the last 10,000 acts and
the last 10,000 refusals. For administrators.`,
		Example: "  unum audit\n  unum audit --limit 20\n  unum audit --after 200 --json",
		RunE: func(cmd *cobra.Command, _ []string) error {
			return asks(cmd, func(ctx context.Context, c *api.Client) error {
				r, err := c.Record.Audit(ctx, &api.AuditRequest{After: after, Limit: limit, Newest: !cmd.Flags().Changed("after")})
				if err != nil {
					return err
				}
				list := []entry{}
				for _, e := range r.Entries {
					x := entry{Seq: e.Seq, Time: e.Time.AsTime(), Who: e.Who, What: e.What, On: e.Subject, Outcome: e.Outcome, Times: e.Times}
					if e.Door != 0 {
						x.Door = fmt.Sprintf("n%d", e.Door)
					}
					if x.Outcome == "" {
						x.Outcome = "done"
					}
					list = append(list, x)
				}
				if asJSON {
					return printJSON(list)
				}
				w := tabwriter.NewWriter(os.Stdout, 2, 8, 2, ' ', 0)
				fmt.Fprintln(w, "SEQ\tTIME\tWHO\tWHAT\tON\tTIMES\tOUTCOME")
				for _, e := range list {
					fmt.Fprintf(w, "%d\t%s\t%s\t%s\t%s\t%d\t%s\n", e.Seq, e.Time.Local().Format(time.DateTime), e.Who, e.What, e.On, e.Times, e.Outcome)
				}
				return w.Flush()
			})
		},
	}
	cmd.Flags().Uint64Var(&after, "after", 0, "go on after this entry, 0: begin with the oldest; without it the newest are shown")
	cmd.Flags().Uint32Var(&limit, "limit", 0, "so many at most (0, or more than 1000: 1000)")
	cmd.Flags().BoolVar(&asJSON, "json", false, "as JSON")
	return cmd
}
