package node

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"io/fs"
	"sync"
	"sync/atomic"

	"github.com/unum-os/unum/internal/errs"
	"github.com/unum-os/unum/internal/identity"
	"github.com/unum-os/unum/internal/ids"
	"github.com/unum-os/unum/internal/record"
)

// nodeFile is what a node remembers of itself in node.json, which is written
// last when a node is made, so that it exists only if everything else does.
type nodeFile struct {
	Version  int               `json:"version"`
	Sum      string            `json:"sum,omitempty"` // CRC-32C of the file with sumBlank in this place
	Cluster  string            `json:"cluster"`
	Node     ids.Node          `json:"node"`
	Role     record.Role       `json:"role"`
	Addr     string            `json:"addr"`
	Founding bool              `json:"founding,omitempty"` // the record has yet to be written
	Peers    map[string]string `json:"peers,omitempty"`    // those that store -> address, as last known
	// Revision is, on a node without the record, that at which it said so.
	Revision uint64 `json:"revision,omitempty"`
}

// remembered is node.json of a running node. What it begins with stays as it is;
// the rest is read as a whole, and changed as a whole with the file.
type remembered struct {
	Cluster string
	Node    ids.Node
	Role    record.Role
	Addr    string

	changing sync.Mutex
	now      atomic.Pointer[nodeFile]
}

func remember(d nodeFile) *remembered {
	r := &remembered{Cluster: d.Cluster, Node: d.Node, Role: d.Role, Addr: d.Addr}
	r.now.Store(&d)
	return r
}

// snapshot returns what the file says now. Nobody changes the map in it.
func (r *remembered) snapshot() nodeFile { return *r.now.Load() }

// change has f change a copy, saves it, and makes it what is remembered.
func (r *remembered) change(c *Config, f func(*nodeFile)) error {
	r.changing.Lock()
	defer r.changing.Unlock()
	d := r.snapshot()
	f(&d)
	if err := c.saveFile(d); err != nil {
		return err
	}
	r.now.Store(&d)
	return nil
}

const (
	// fileVersion is the format of the whole data directory: whatever changes in it
	// so that an older daemon would take harm, adds one. Version 2 had no sum.
	fileVersion = 3
	sumBlank    = "--------"
	sumKey      = `"sum": "`
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

func sumOf(b []byte) string { return fmt.Sprintf("%08x", crc32.Checksum(b, castagnoli)) }

func (d nodeFile) encode() ([]byte, error) {
	d.Version, d.Sum = fileVersion, sumBlank
	b, err := json.MarshalIndent(d, "", "  ")
	if err != nil {
		return nil, err
	}
	b = append(b, '\n')
	return bytes.Replace(b, []byte(sumKey+sumBlank), []byte(sumKey+sumOf(b)), 1), nil
}

// decodeNodeFile reads node.json. Class Corrupt, or NotSupported if a later
// program has written it.
func decodeNodeFile(b []byte) (nodeFile, error) {
	var d nodeFile
	bad := func(f string, a ...any) (nodeFile, error) { return nodeFile{}, errs.E(errs.Corrupt, "", "", f, a...) }
	if err := json.Unmarshal(b, &d); err != nil {
		return bad("%v", err)
	}
	if d.Sum != "" || d.Version > 2 {
		blank := bytes.Replace(b, []byte(sumKey+d.Sum), []byte(sumKey+sumBlank), 1)
		if sum := sumOf(blank); sum != d.Sum {
			return bad("its checksum is %s, it says %q: it was damaged or changed", sum, d.Sum)
		}
	}
	switch {
	case d.Version > fileVersion:
		return d, errs.E(errs.NotSupported, "", "", "written by a later version of unum: format %d, this one knows %d", d.Version, fileVersion).
			WithRemedy("install the version of unum that was used here last (unum version says which this is), or a later one")
	case d.Version == 1:
		return d, errs.E(errs.NotSupported, "", "", "written by an earlier version of unum: format 1, this one knows 2 and %d", fileVersion).
			WithRemedy("start it with the version that was used here last, or remove the directory and join again")
	case d.Version < 1 || d.Node == 0 || d.Cluster == "" || d.Role < record.RoleStore || d.Role > record.RoleWitness:
		return bad("it names no node")
	}
	return d, nil
}

func (c *Config) loadFile() (nodeFile, error) {
	b, err := identity.Load(c.FS, c.path(fileNode))
	if errors.Is(err, fs.ErrNotExist) {
		return nodeFile{}, errs.E(errs.NotFound, "start", c.Dir, "there is no node here").WithRemedy("unum up makes a new cluster, unum join ADDR TOKEN joins one")
	}
	if err != nil {
		return nodeFile{}, errs.Wrap(err, "start", c.Dir)
	}
	d, err := decodeNodeFile(b)
	if err != nil {
		return d, c.damaged(fileNode, err)
	}
	return d, nil
}

func (c *Config) saveFile(d nodeFile) error {
	b, err := d.encode()
	if err != nil {
		return err
	}
	return identity.Save(c.FS, c.path(fileNode), b)
}

// A volume's key is kept with its checksum: no key is wrong by itself, and with a
// wrong one nothing that this node stores would be found.

func encodeKey(key [32]byte) []byte {
	return append(key[:], sumOf(key[:])...)
}

// decodeKey reads what encodeKey gave, or a bare key as format 2 had it.
func decodeKey(b []byte) (key [32]byte, err error) {
	switch len(b) {
	case 40:
		if want := sumOf(b[:32]); string(b[32:]) != want {
			return key, errs.E(errs.Corrupt, "", "", "its checksum is %s, it says %q", want, b[32:])
		}
	case 32:
	default:
		return key, errs.E(errs.Corrupt, "", "", "%d bytes, want 40", len(b))
	}
	copy(key[:], b)
	return key, nil
}
