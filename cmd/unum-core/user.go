package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/term"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/unum-os/unum/internal/control/api"
	"github.com/unum-os/unum/internal/errs"
	"github.com/unum-os/unum/internal/node"
)

// userJSON is a user as --json shows it.
type userJSON struct {
	Name     string   `json:"name"`
	UID      uint32   `json:"uid"`
	GID      uint32   `json:"gid"`
	Groups   []uint32 `json:"groups"`
	Admin    bool     `json:"admin"`
	Disabled bool     `json:"disabled"`
}

func toUserJSON(u *api.User) userJSON {
	return userJSON{u.Name, u.Uid, u.Gid, append([]uint32{}, u.Groups...), u.Admin, u.Disabled}
}

func userCommand() *cobra.Command {
	root := &cobra.Command{
		Use:   "user",
		Short: "The users whom the cluster knows on all nodes",
		Long: `On nodes that store, local users need nothing of this: the node vouches for their
uids. Client nodes are not believed about their users: there a user of the cluster
logs in (unum login) by a token that unum user invite prints.`,
		Example: "  unum user add ana --uid 1000\n  unum user invite ana\n  unum user list",
	}
	root.AddCommand(userList(), userAdd(), userSet(), userRemove(), userInvite())
	return root
}

func userList() *cobra.Command {
	var asJSON bool
	cmd := &cobra.Command{
		Use: "list", Short: "List the users", Args: cobra.NoArgs, Example: "  unum user list\n  unum user list --json",
		RunE: func(cmd *cobra.Command, _ []string) error {
			return asks(cmd, func(ctx context.Context, c *api.Client) error {
				r, err := c.Users.List(ctx, &api.ListUsersRequest{})
				if err != nil {
					return err
				}
				list := []userJSON{}
				w := tabwriter.NewWriter(os.Stdout, 2, 8, 2, ' ', 0)
				fmt.Fprintln(w, "USER\tUID\tGID\tGROUPS\tADMIN\tDISABLED")
				yes := map[bool]string{true: "yes", false: "no"}
				for _, u := range r.Users {
					list = append(list, toUserJSON(u))
					fmt.Fprintf(w, "%s\t%d\t%d\t%s\t%s\t%s\n", u.Name, u.Uid, u.Gid, fmt.Sprint(u.Groups), yes[u.Admin], yes[u.Disabled])
				}
				if asJSON {
					return printJSON(list)
				}
				return w.Flush()
			})
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "as JSON")
	return cmd
}

// userFlags are what can be said of a user.
func userFlags(cmd *cobra.Command, u *api.User, groups *[]uint) {
	f := cmd.Flags()
	f.Uint32Var(&u.Uid, "uid", 0, "the uid, the same on every node; never 0")
	f.Uint32Var(&u.Gid, "gid", 0, "the group (default: as the uid)")
	f.UintSliceVar(groups, "groups", nil, "further groups")
	f.BoolVar(&u.Admin, "admin", false, "may administer the cluster")
	f.BoolVar(&u.Disabled, "disabled", false, "may nothing, at once and everywhere")
}

func gids(list []uint) ([]uint32, error) {
	var out []uint32
	for _, g := range list {
		if g > 1<<32-2 {
			return nil, errs.E(errs.Invalid, "", "", "group %d: there is no such number", g)
		}
		out = append(out, uint32(g))
	}
	return out, nil
}

func userAdd() *cobra.Command {
	var u api.User
	var groups []uint
	cmd := &cobra.Command{
		Use: "add NAME", Short: "Make a user", Args: cobra.ExactArgs(1), Example: "  unum user add ana --uid 1000 --groups 27,100\n  unum user add ops --uid 900 --admin",
		RunE: func(cmd *cobra.Command, args []string) (err error) {
			if u.Uid == 0 {
				return errs.E(errs.Invalid, "add user", args[0], "--uid is needed, and is not 0")
			}
			if !cmd.Flags().Changed("gid") {
				u.Gid = u.Uid
			}
			u.Name = args[0]
			if u.Groups, err = gids(groups); err != nil {
				return err
			}
			return asks(cmd, func(ctx context.Context, c *api.Client) error {
				if old, err := findUser(ctx, c, u.Name); err != nil {
					return err
				} else if old != nil {
					return errs.E(errs.Exists, "add user", u.Name, "there is such a user, with uid %d", old.Uid).WithRemedy("unum user set %s", u.Name)
				}
				_, err := c.Users.Put(ctx, &api.PutUserRequest{User: &u})
				return err
			})
		},
	}
	userFlags(cmd, &u, &groups)
	return cmd
}

func findUser(ctx context.Context, c *api.Client, name string) (*api.User, error) {
	r, err := c.Users.List(ctx, &api.ListUsersRequest{})
	if err != nil {
		return nil, err
	}
	for _, u := range r.Users {
		if u.Name == name {
			return u, nil
		}
	}
	return nil, nil
}

func userSet() *cobra.Command {
	var u api.User
	var groups []uint
	cmd := &cobra.Command{
		Use: "set NAME", Short: "Change a user; what is not given stays", Args: cobra.ExactArgs(1), Example: "  unum user set ana --disabled\n  unum user set ana --disabled=false --admin",
		RunE: func(cmd *cobra.Command, args []string) error {
			return asks(cmd, func(ctx context.Context, c *api.Client) error {
				old, err := findUser(ctx, c, args[0])
				if err != nil {
					return err
				}
				if old == nil {
					return errs.E(errs.NotFound, "set user", args[0], "there is no such user").WithRemedy("unum user add %s --uid UID", args[0])
				}
				is := cmd.Flags().Changed
				if is("uid") {
					old.Uid = u.Uid
				}
				if is("gid") {
					old.Gid = u.Gid
				}
				if is("groups") {
					if old.Groups, err = gids(groups); err != nil {
						return err
					}
				}
				if is("admin") {
					old.Admin = u.Admin
				}
				if is("disabled") {
					old.Disabled = u.Disabled
				}
				_, err = c.Users.Put(ctx, &api.PutUserRequest{User: old})
				return err
			})
		},
	}
	userFlags(cmd, &u, &groups)
	return cmd
}

func userRemove() *cobra.Command {
	return &cobra.Command{
		Use: "rm NAME", Short: "Remove a user; the files and keys of the uid stay", Args: cobra.ExactArgs(1), Example: "  unum user rm ana",
		RunE: func(cmd *cobra.Command, args []string) error {
			return asks(cmd, func(ctx context.Context, c *api.Client) error {
				_, err := c.Users.Drop(ctx, &api.DropUserRequest{Name: args[0]})
				return err
			})
		},
	}
}

func userInvite() *cobra.Command {
	var life time.Duration
	cmd := &cobra.Command{
		Use: "invite NAME", Short: "Print a token by which a user logs in once from a client node", Args: cobra.ExactArgs(1),
		Long: `Print a token by which a user of the cluster (unum user add) logs in once from a
client node. On a storing node root and administrators may invite anybody, a user
himself. The invited gets the token by a way that others cannot read, and types on
the client node

  unum login

and then the token, which is read from the terminal or standard input. From then on
what his local user does there is done as the user of the cluster; unum whoami says
as whom. A client node is made by unum token --client here and unum join --client there.`,
		Example: "  unum user invite ana\n  unum user invite --expires 10m ana | ssh laptop unum login",
		RunE: func(cmd *cobra.Command, args []string) error {
			return asks(cmd, func(ctx context.Context, c *api.Client) error {
				r, err := c.Users.Invite(ctx, &api.InviteRequest{User: args[0], Lifetime: durationpb.New(life)})
				if err == nil {
					fmt.Println(r.Token)
				}
				return err
			})
		},
	}
	cmd.Flags().DurationVar(&life, "expires", node.InviteLife, "how long it is good")
	return cmd
}

func loginCommand() *cobra.Command {
	return &cobra.Command{
		Use: "login", Short: "Log in to the cluster from this client node", Args: cobra.NoArgs,
		Long: `Log in to the cluster from this client node. The token that unum user invite prints
on a storing node is read from standard input, never from the command line, where
others could read it. What this user does here is then done as the user of the
cluster; the daemon keeps the credential and renews it for 30 days.`,
		Example: "  unum login\n  unum login < token",
		RunE: func(cmd *cobra.Command, _ []string) error {
			var text string
			if fd := int(os.Stdin.Fd()); term.IsTerminal(fd) {
				fmt.Fprint(os.Stderr, "login token: ")
				b, err := term.ReadPassword(fd)
				fmt.Fprintln(os.Stderr)
				if err != nil {
					return errs.Wrap(err, "read the login token", "terminal")
				}
				text = string(b)
			} else {
				b, err := io.ReadAll(io.LimitReader(os.Stdin, maxTokenInput))
				if err != nil {
					return errs.Wrap(err, "read the login token", "standard input")
				}
				text = string(b)
			}
			return asks(cmd, func(ctx context.Context, c *api.Client) error {
				r, err := c.Users.Login(ctx, &api.LoginRequest{Token: text})
				if err == nil {
					fmt.Printf("logged in as %s (uid %d); renewed until %s\n", r.User.Name, r.User.Uid, r.Renewable.AsTime().Local().Format(time.DateTime))
				}
				return err
			})
		},
	}
}

func logoutCommand() *cobra.Command {
	return &cobra.Command{
		Use: "logout", Short: "Forget this user's login on this client node", Args: cobra.NoArgs, Example: "  unum logout",
		RunE: func(cmd *cobra.Command, _ []string) error {
			return asks(cmd, func(ctx context.Context, c *api.Client) error {
				_, err := c.Users.Logout(ctx, &api.LogoutRequest{})
				return err
			})
		},
	}
}

func whoamiCommand() *cobra.Command {
	var asJSON bool
	cmd := &cobra.Command{
		Use: "whoami", Short: "Say as whom the cluster knows you here", Args: cobra.NoArgs, Example: "  unum whoami\n  unum whoami --json",
		RunE: func(cmd *cobra.Command, _ []string) error {
			return asks(cmd, func(ctx context.Context, c *api.Client) error {
				r, err := c.Users.Whoami(ctx, &api.WhoamiRequest{})
				if err != nil {
					return err
				}
				if asJSON {
					out := map[string]any{"principal": r.Principal, "vouched": r.Vouched}
					if r.User != nil {
						out["user"] = toUserJSON(r.User)
					}
					if r.Expires != nil {
						out["expires"] = r.Expires.AsTime()
					}
					return printJSON(out)
				}
				fmt.Println(r.Principal)
				return nil
			})
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "as JSON")
	return cmd
}
