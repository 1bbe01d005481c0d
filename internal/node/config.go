package node

import (
	"encoding/json"
	"errors"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"syscall"

	settings "github.com/unum-os/unum/internal/config"
	"github.com/unum-os/unum/internal/errs"
	"github.com/unum-os/unum/internal/identity"
	"github.com/unum-os/unum/internal/ids"
	"github.com/unum-os/unum/internal/record"
	"github.com/unum-os/unum/internal/rpc"
)

// DefaultPort is where nodes listen for each other.
const DefaultPort = 7400

// Config is what a node is started with.
type Config struct {
	Dir      string            // the node's data: identity, metadata groups, blocks, job output
	Mount    string            // where the tree appears, /unum
	Socket   string            // the daemon's control socket
	Addr     string            // host:port that other nodes reach; empty: found out
	Hostname string            // shown to people
	Share    float64           // part of a machine shared with other nodes (a lab); 0: all of it
	Role     record.Role       // what Join asks to become; 0: what the token says
	Without  ids.Node          // the one other voter, gone for good: this node goes on alone; 0: nobody
	Labels   map[string]string // told to the record when the node is made
	Exe      string            // the light binary, whose shim starts jobs
	Metrics  string            // host:port for Prometheus; empty: none
	Settings []settings.Value  // what it was started with, to be shown
	Log      *slog.Logger
}

// disk is what a node remembers of itself; it is written last when a node is
// made, so that it exists only if everything else does.
type disk struct {
	Version  int               `json:"version"`
	Cluster  string            `json:"cluster"`
	Node     ids.Node          `json:"node"`
	Role     record.Role       `json:"role"`
	Addr     string            `json:"addr"`
	Founding bool              `json:"founding,omitempty"` // the record has yet to be written
	Peers    map[string]string `json:"peers,omitempty"`    // node -> address, as last known
}

const diskVersion = 2

// Formats are the versions of what this program keeps and speaks. A data
// directory of another version is refused; nodes that speak another protocol do
// not connect.
type Formats struct {
	Data     int      `json:"data_directory"`
	Protocol []string `json:"protocol"`
}

// FormatVersions returns them.
func FormatVersions() Formats { return Formats{diskVersion, rpc.Protocols()} }

func (c *Config) path(parts ...string) string {
	return filepath.Join(append([]string{c.Dir}, parts...)...)
}

// The files of a node's identity.
const (
	fileNode   = "node.json"
	fileCA     = "identity/ca.pem"
	fileCAKey  = "identity/ca.key" // the authority's, on voters that store
	fileCert   = "identity/node.pem"
	fileKey    = "identity/node.key"
	fileCSR    = "identity/node.csr"
	fileVolume = "identity/volume.key"
)

// Exists reports whether dir holds a node. What cannot be looked at is an error:
// that there is none must be certain before one is made in its place.
func Exists(dir string) (bool, error) { return there(filepath.Join(dir, fileNode)) }

func there(path string) (bool, error) {
	_, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	return err == nil, errs.Wrap(err, "look for a node", path)
}

func (c *Config) loadDisk() (disk, error) {
	var d disk
	b, err := identity.Load(c.path(fileNode))
	if err != nil {
		if errors.Is(err, os.ErrNotExist) {
			return d, errs.E(errs.NotFound, "start", c.Dir, "there is no node here").WithRemedy("unum up, or unum join ADDR TOKEN")
		}
		return d, errs.Wrap(err, "start", c.Dir)
	}
	if err := json.Unmarshal(b, &d); err != nil {
		return d, errs.E(errs.Corrupt, "start", c.path(fileNode), "%v", err)
	}
	if d.Version != diskVersion {
		return d, errs.E(errs.NotSupported, "start", c.path(fileNode), "written by another version of unum: format %d, this one reads %d", d.Version, diskVersion)
	}
	if d.Node == 0 || d.Cluster == "" || d.Role < record.RoleStore || d.Role > record.RoleWitness {
		return d, errs.E(errs.Corrupt, "start", c.path(fileNode), "it names no node")
	}
	return d, nil
}

// RoleIn returns what the node in cfg.Dir is for; class NotFound if there is none.
func RoleIn(cfg Config) (record.Role, error) {
	d, err := cfg.loadDisk()
	return d.Role, err
}

func (c *Config) saveDisk(d disk) error {
	d.Version = diskVersion
	b, err := json.MarshalIndent(d, "", "  ")
	if err != nil {
		return err
	}
	return identity.Save(c.path(fileNode), append(b, '\n'))
}

// prepare makes the data directory and removes what an unfinished attempt to
// make a node left in it. Only a node that was finished and started has blocks:
// where they are, all stays as it is.
func (c *Config) prepare() error {
	if was, err := there(c.path("blocks")); err != nil {
		return err
	} else if was {
		return errs.E(errs.Corrupt, "make a node", c.Dir, "there are blocks of a node, but no %s", fileNode).
			WithRemedy("bring %s back; if nothing that this node kept is needed, remove the directory", c.path(fileNode))
	}
	var above []string // directories that get an entry
	for d := filepath.Clean(c.Dir); ; d = above[len(above)-1] {
		was, err := there(d)
		if err != nil {
			return err
		}
		if was && len(above) > 0 {
			break
		}
		above = append(above, filepath.Dir(d))
	}
	if err := os.MkdirAll(c.path("identity"), 0o700); err != nil {
		return errs.Wrap(err, "make the data directory", c.Dir)
	}
	if err := os.Chmod(c.Dir, 0o711); err != nil { // programs reach their job's output below
		return errs.Wrap(err, "make the data directory", c.Dir)
	}
	for _, d := range above {
		if err := syncDir(d); err != nil {
			return errs.Wrap(err, "make the data directory", d)
		}
	}
	return errs.Wrap(os.RemoveAll(c.path("groups")), "clear an unfinished node", c.path("groups"))
}

func syncDir(path string) error {
	d, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// withdraw removes what prepare and a refused Join left in the data directory,
// and the directory itself if dir is set and nothing else is in it.
func (c *Config) withdraw(dir bool) error {
	gone := []string{c.path(fileKey), c.path(fileCSR), c.path("identity")}
	if dir {
		gone = append(gone, c.Dir)
	}
	var failed error
	for _, p := range gone {
		if err := os.Remove(p); err != nil && !errors.Is(err, os.ErrNotExist) && !errors.Is(err, syscall.ENOTEMPTY) {
			failed = errors.Join(failed, err)
		}
	}
	return failed
}

// address completes an address: the host by which to is reached, and the port.
func address(addr, to string) (string, error) {
	if addr != "" {
		host, port, err := net.SplitHostPort(addr)
		if err != nil {
			host, port = addr, strconv.Itoa(DefaultPort)
		}
		if n, err := strconv.Atoi(port); host == "" || err != nil || n <= 0 || n > 65535 {
			return "", errs.E(errs.Invalid, "address", addr, "want host:port")
		}
		return net.JoinHostPort(host, port), nil
	}
	port := strconv.Itoa(DefaultPort)
	if to != "" { // by the way to the other node; nothing is sent
		if c, err := net.Dial("udp", to); err == nil {
			defer c.Close()
			host, _, err := net.SplitHostPort(c.LocalAddr().String())
			if err == nil {
				return net.JoinHostPort(host, port), nil
			}
		}
	}
	as, err := net.InterfaceAddrs()
	if err != nil {
		return "", errs.Wrap(err, "find this machine's address", "")
	}
	for _, a := range as {
		if ip, ok := a.(*net.IPNet); ok && ip.IP.IsGlobalUnicast() && ip.IP.To4() != nil {
			return net.JoinHostPort(ip.IP.String(), port), nil
		}
	}
	return net.JoinHostPort("127.0.0.1", port), nil
}

// listenAddr is where to listen for an advertised address: on that port of all
// interfaces.
func listenAddr(addr string) string {
	_, port, err := net.SplitHostPort(addr)
	if err != nil {
		return addr
	}
	return ":" + port
}
