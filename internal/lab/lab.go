package lab

import (
	"context"
	"fmt"
	"io"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/unum-os/unum/internal/errs"
)

// Defaults, and why.
const (
	DefaultName     = "lab"
	DefaultNodes    = 3               // nodes that store: any one of them may die
	MaxNodes        = 200             // nodes of all kinds; one /24, and a filter of a cut holds no more than 255
	DefaultDiskSize = int64(4) << 30  // bytes of a node's disk; sparse: costs what is written
	minDiskSize     = int64(16) << 20 // bytes of a node's disk at least
	DefaultDataDir  = "/var/lib/unum"
	DefaultMount    = "/unum"
	defaultBase     = "/var/lib/unum-lab"
	runBase         = "/run/unum-lab"
	defaultTimeout  = 60 * time.Second      // for a node to be healthy: a cluster forms in a few seconds; a loaded machine takes longer
	healthPoll      = 50 * time.Millisecond // between two health checks; one execs a program: about 10 ms
	goneTimeout     = 15 * time.Second      // for killed processes and their mounts to be gone
	bootTimeout     = 20 * time.Second      // init's mounts; a journal replay is part of it
	tokenTimeout    = 20 * time.Second      // for one node to give a token; then the next is asked
)

// Kind says what a node is in its cluster.
type Kind string

// The kinds. A lab only counts them and tells the hooks.
const (
	Store   Kind = "store"   // holds data
	Witness Kind = "witness" // votes, holds none
	Client  Kind = "client"  // uses the cluster only
)

// Node is what a hook is told about a node.
type Node struct {
	Name    string // n1, n2, ...
	Kind    Kind
	Index   int        // 1, 2, ...
	Addr    netip.Addr // its address on the lab's network; the same for the lab's life
	DataDir string     // where its disk is mounted, in the node
	Mount   string     // where the tree is to be mounted, in the node
	First   bool       // it makes the cluster: no other node has anything on its disk
	Fresh   bool       // it was never healthy with this disk: make or join; otherwise go on from the disk
	Peer    netip.Addr // address of a node of the cluster, for those that join
	Token   string     // join token; set for fresh nodes other than the first
}

// Hooks are how a lab runs what it is a lab of. Healthy and Token may be nil.
type Hooks struct {
	// Daemon returns the command that is the node's daemon, run in the node as
	// root, with ClockEnv in its environment.
	Daemon func(n Node) []string
	// Healthy returns nil when the node is healthy. It is asked again until
	// then; each time with a context that ends after a few seconds.
	Healthy func(ctx context.Context, l *Lab, n Node) error
	// Token returns what joining nodes must show, as node from gives it; it may be
	// shown as often as the lab has nodes.
	Token func(ctx context.Context, l *Lab, from string) (string, error)
}

// Config describes a lab to be made. Zero values mean the defaults above.
type Config struct {
	Hooks
	Name     string
	Nodes    int    // that store
	Witness  bool   // one more, after these
	Clients  int    // and so many clients, last
	Dir      string // images, logs and state; default /var/lib/unum-lab/NAME
	DiskSize int64  // bytes per node; the image is sparse
	DataDir  string
	Mount    string
	Timeout  time.Duration // for the whole of Up
	Keep     bool          // leave what was made standing when Up fails
	Progress io.Writer     // one line per step; nil for none
}

// Lab is a handle on a lab that exists. It holds no resource; its methods may be
// called from several goroutines and processes at once.
type Lab struct {
	name  string
	dir   string
	hooks Hooks
}

// Name returns the lab's name.
func (l *Lab) Name() string { return l.name }

// Dir returns the directory that holds the lab's images, logs and state.
func (l *Lab) Dir() string { return l.dir }

// LogPath returns the file that has the output of node's init and daemon.
func (l *Lab) LogPath(node string) string { return filepath.Join(l.dir, "logs", node+".log") }

var nameRE = regexp.MustCompile(`^[a-z0-9][a-z0-9-]{0,31}$`)

func checkName(name string) error {
	if !nameRE.MatchString(name) {
		return errs.E(errs.Invalid, "lab", name, "a lab's name is 1 to 32 of a-z, 0-9 and -, as in lab2")
	}
	return nil
}

func (c *Config) fill() error {
	if c.Name == "" {
		c.Name = DefaultName
	}
	if err := checkName(c.Name); err != nil {
		return err
	}
	if c.Nodes == 0 {
		c.Nodes = DefaultNodes
	}
	if c.Nodes < 1 || c.Nodes > MaxNodes {
		return errs.E(errs.Invalid, "lab up", c.Name, "%d nodes: want 1 to %d", c.Nodes, MaxNodes)
	}
	if c.Clients < 0 || c.Clients > MaxNodes || len(c.kinds()) > MaxNodes {
		return errs.E(errs.Invalid, "lab up", c.Name, "%d clients: want %d nodes of all kinds at most", c.Clients, MaxNodes)
	}
	if c.DiskSize == 0 {
		c.DiskSize = DefaultDiskSize
	}
	if c.DiskSize < minDiskSize {
		return errs.E(errs.Invalid, "lab up", c.Name, "a disk of %d bytes is too small for ext4 and its journal: want 16M or more", c.DiskSize)
	}
	if c.Dir == "" {
		c.Dir = filepath.Join(defaultBase, c.Name)
	}
	for _, p := range []*string{&c.DataDir, &c.Mount} {
		if *p == "" {
			*p = map[*string]string{&c.DataDir: DefaultDataDir, &c.Mount: DefaultMount}[p]
		}
		if !filepath.IsAbs(*p) || filepath.Clean(*p) == "/" {
			return errs.E(errs.Invalid, "lab up", *p, "want an absolute path other than /")
		}
		*p = filepath.Clean(*p)
	}
	abs, err := filepath.Abs(c.Dir)
	if err != nil {
		return errs.Wrap(err, "lab up", c.Dir)
	}
	c.Dir = abs
	if strings.HasPrefix(c.Dir+"/", runBase+"/") {
		return errs.E(errs.Invalid, "lab up", c.Dir, "this directory is for the labs' sockets; choose another")
	}
	if c.Timeout == 0 {
		c.Timeout = defaultTimeout
	}
	if c.Progress == nil {
		c.Progress = io.Discard
	}
	if c.Daemon == nil {
		return errs.E(errs.Invalid, "lab up", c.Name, "no daemon command given")
	}
	return nil
}

// kinds returns the kinds of n1, n2, ...
func (c *Config) kinds() []Kind {
	ks := slices.Repeat([]Kind{Store}, c.Nodes)
	if c.Witness {
		ks = append(ks, Witness)
	}
	return append(ks, slices.Repeat([]Kind{Client}, c.Clients)...)
}

// Open returns a handle on the lab called name, which may be half made. With no
// such lab the error is of class NotFound.
func Open(name string, hooks Hooks) (*Lab, error) {
	if name == "" {
		name = DefaultName
	}
	if err := checkName(name); err != nil {
		return nil, err
	}
	p, err := readPointer(name)
	if err != nil {
		return nil, err
	}
	return &Lab{name: name, dir: p.Dir, hooks: hooks}, nil
}

// List returns the names of all labs on this machine, whole or half made.
func List() ([]string, error) {
	seen := map[string]bool{}
	var names []string
	for _, base := range []string{runBase, defaultBase} {
		ents, err := os.ReadDir(base)
		if err != nil && !os.IsNotExist(err) {
			return nil, errs.Wrap(err, "lab: list", base)
		}
		for _, e := range ents {
			n := strings.TrimSuffix(e.Name(), ".json")
			if nameRE.MatchString(n) && !seen[n] {
				seen[n] = true
				names = append(names, n)
			}
		}
	}
	return names, nil
}

// node finds the node called name.
func (s *state) node(name string) (*nodeState, error) {
	k, err := strconv.Atoi(strings.TrimPrefix(name, "n"))
	if err != nil || !strings.HasPrefix(name, "n") || k < 1 || k > len(s.Nodes) || name != fmt.Sprintf("n%d", k) {
		return nil, errs.E(errs.NotFound, "lab", name, "lab %s has no such node; it has n1 to n%d", s.Name, len(s.Nodes))
	}
	return s.Nodes[k-1], nil
}

func (s *state) info(n *nodeState) Node {
	return Node{
		Name: n.Name, Kind: n.Kind, Index: n.Index, Addr: n.Addr, DataDir: s.DataDir, Mount: s.Mount,
		First: n.Kind == Store && s.founder() == n, Fresh: n.Fresh,
	}
}

// founder returns the node that is to make the cluster, nil when it was made: it
// lives on the disks of the nodes that were healthy once.
func (s *state) founder() *nodeState {
	for _, n := range s.Nodes {
		if !n.Fresh && n.Kind != Client {
			return nil
		}
	}
	return s.Nodes[0]
}

// invite gives what fresh nodes need to join, from the first node of the cluster
// that answers.
func (l *Lab) invite(ctx context.Context, s *state, nodes []Node) error {
	if !slices.ContainsFunc(nodes, func(n Node) bool { return n.Fresh && !n.First }) {
		return nil
	}
	var from *nodeState
	token, failed := "", error(nil)
	for _, n := range s.Nodes {
		if n.Fresh || n.Kind != Store || !n.On || !n.Proc.alive() || s.Paused[n.Name] != "" {
			continue
		}
		from, failed = n, nil
		if l.hooks.Token != nil {
			one, cancel := context.WithTimeout(ctx, tokenTimeout)
			token, failed = l.hooks.Token(one, l, n.Name)
			cancel()
		}
		if failed == nil || ctx.Err() != nil {
			break
		}
	}
	if from == nil {
		return errs.E(errs.Unavailable, "lab: join", s.Name, "no node of the cluster has power and goes, to give a token").
			WithRemedy("unum lab status --name %s", s.Name)
	}
	if failed != nil {
		return errs.Wrap(failed, "lab: token from", from.Name)
	}
	for i := range nodes {
		if nodes[i].Fresh && !nodes[i].First {
			nodes[i].Peer, nodes[i].Token = from.Addr, token
		}
	}
	return nil
}
