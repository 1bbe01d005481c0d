package node

import (
	"errors"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"path/filepath"
	"strconv"
	"syscall"
	"time"

	"github.com/unum-os/unum/internal/clock"
	settings "github.com/unum-os/unum/internal/config"
	"github.com/unum-os/unum/internal/disk"
	"github.com/unum-os/unum/internal/errs"
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
	Build    string            // what this program is: version and commit
	Log      *slog.Logger

	// Repair makes Join set a damaged node in Dir aside first.
	Repair bool
	// FS is the disk on which Dir lies, all of it but the output of jobs; nil: the
	// machine's.
	FS disk.FS
	// Clock gives the time of day by which certificates and tokens end and jobs
	// begin; nil: the machine's, or what ClockFile says.
	Clock clock.Clock
	// ClockFile, for a lab, holds the offsets of this process's clocks; see
	// clock.ParseShift. It may come and change while the node runs. Empty: none.
	ClockFile string

	shift *clock.Shifted // the Clock that follows ClockFile
	tick  time.Duration  // of the groups; tests are faster
}

// ready fills in what is not set.
func (c *Config) ready() error {
	if c.FS == nil {
		c.FS = disk.Real
	}
	if c.Clock != nil {
		return nil
	}
	c.Clock = clock.Real
	if c.ClockFile == "" {
		return nil
	}
	c.shift = &clock.Shifted{}
	c.Clock = c.shift
	err := c.shift.Load(c.ClockFile)
	if errors.Is(err, fs.ErrNotExist) { // it may come later
		err = nil
	}
	return err
}

// Formats are the versions of what this program keeps and speaks. A data
// directory of another version is refused; nodes that speak another protocol do
// not connect.
type Formats struct {
	Data     int      `json:"data_directory"`
	Protocol []string `json:"protocol"`
}

// FormatVersions returns them.
func FormatVersions() Formats { return Formats{fileVersion, rpc.Protocols()} }

func (c *Config) path(parts ...string) string {
	return filepath.Join(append([]string{c.Dir}, parts...)...)
}

// The files of a node, below its directory.
const (
	fileNode   = "node.json"
	fileLeft   = "node.left" // what node.json becomes when the node has left
	fileLock   = "lock"      // held by whoever works on the directory
	fileCA     = "identity/ca.pem"
	fileCAKey  = "identity/ca.key" // the authority's, on voters that store
	fileCert   = "identity/node.pem"
	fileKey    = "identity/node.key"
	fileCSR    = "identity/node.csr"
	fileVolume = "identity/volume.key"

	dirIdentity = "identity"
	dirGroups   = "groups"
	dirBlocks   = "blocks"
	dirKept     = "blocks.kept" // of a node that was set aside, for the next one here
)

// Exists reports whether dir holds a node. What cannot be looked at is an error:
// that there is none must be certain before one is made in its place.
func Exists(dir string) (bool, error) {
	c := Config{Dir: dir, FS: disk.Real}
	return c.has(fileNode)
}

func (c *Config) has(name string) (bool, error) {
	is, err := disk.Exists(c.FS, c.path(name))
	return is, errs.Wrap(err, "look for a node", c.path(name))
}

// RoleIn returns what the node in cfg.Dir is for; class NotFound if there is none.
func RoleIn(cfg Config) (record.Role, error) {
	if err := cfg.ready(); err != nil {
		return 0, err
	}
	d, err := cfg.loadFile()
	return d.Role, err
}

// lock takes the directory, which must exist, for this process alone.
func (c *Config) lock() (io.Closer, error) {
	l, err := disk.Lock(c.FS, c.path(fileLock))
	if errs.Has(err, errs.Busy) {
		return nil, &errs.Error{Op: "use the data directory", Subject: c.Dir, Class: errs.Busy, Err: err,
			Remedy: "stop that process, or give this node a directory of its own with --dir"}
	}
	return l, errs.Wrap(err, "use the data directory", c.Dir)
}

// prepare makes the data directory, takes it for this process, and removes what
// an unfinished attempt to make a node left in it. Only a node that was finished
// and started has blocks: where they are, all stays as it is. The caller lets go
// of the directory.
func (c *Config) prepare() (io.Closer, error) {
	const op = "make the data directory"
	if err := c.FS.MkdirAll(c.Dir, 0o711); err != nil { // programs reach their job's output below
		return nil, errs.Wrap(err, op, c.Dir)
	}
	if err := disk.Chmod(c.FS, c.Dir, 0o711); err != nil {
		return nil, errs.Wrap(err, op, c.Dir)
	}
	l, err := c.lock()
	if err != nil {
		return nil, err
	}
	if err := c.clear(); err != nil {
		return nil, errors.Join(err, l.Close())
	}
	return l, nil
}

func (c *Config) clear() error {
	if was, err := c.has(fileNode); err != nil {
		return err
	} else if was { // made by another process, just now
		return errs.E(errs.Exists, "make a node", c.Dir, "there is a node already").WithRemedy("unum up")
	}
	if left, err := c.has(fileLeft); err != nil {
		return err
	} else if left { // and was cut off while it forgot
		if err := c.sweep(); err != nil {
			return errs.Wrap(err, "forget the node that left", c.Dir)
		}
	}
	if was, err := c.has(dirBlocks); err != nil {
		return err
	} else if was {
		return errs.E(errs.Corrupt, "make a node", c.Dir, "there are blocks of a node, but no %s", fileNode).
			WithRemedy("bring %s back, or, if it is lost: %s", c.path(fileNode), remedyRepair)
	}
	if err := c.FS.MkdirAll(c.path(dirIdentity), 0o700); err != nil {
		return errs.Wrap(err, "make the data directory", c.Dir)
	}
	// An earlier attempt may have made the directory and those above without living
	// to sync them. Where none of ours can be, there is nothing to sync.
	for d := filepath.Clean(c.Dir); ; d = filepath.Dir(d) {
		err := disk.SyncDir(c.FS, d)
		if d != filepath.Clean(c.Dir) && (errs.Has(err, errs.Permission) || errs.Has(err, errs.Invalid)) {
			err = nil
		}
		if err != nil {
			return errs.Wrap(err, "make the data directory", d)
		}
		if d == filepath.Dir(d) {
			break
		}
	}
	return errs.Wrap(c.FS.RemoveAll(c.path(dirGroups)), "clear an unfinished node", c.path(dirGroups))
}

// withdraw removes what prepare and a refused Join left in the data directory,
// and the directory itself if dir is set and nothing else is in it.
func (c *Config) withdraw(dir bool) error {
	gone := []string{c.path(fileKey), c.path(fileCSR), c.path(dirIdentity), c.path(fileLock)}
	if dir {
		gone = append(gone, c.Dir)
	}
	var failed error
	for _, p := range gone {
		if err := c.FS.Remove(p); err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, syscall.ENOTEMPTY) {
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
