package node

import (
	"bytes"
	"context"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/unum-os/unum/internal/disk"
	"github.com/unum-os/unum/internal/errs"
	"github.com/unum-os/unum/internal/identity"
	"github.com/unum-os/unum/internal/ids"
	"github.com/unum-os/unum/internal/record"
)

// whole makes a node on a disk in memory that has been run and stopped, with two
// tokens in its record.
func whole(t *testing.T) (Config, *disk.Mem, []record.TokenID) {
	t.Helper()
	m := newDisk()
	cfg := onDisk(t, m)
	if err := Found(cfg); err != nil {
		t.Fatal(err)
	}
	toks, err := twoTokens(t, cfg, &atomic.Bool{})
	if err != nil {
		t.Fatal(err)
	}
	return cfg, m, toks
}

func readFile(t *testing.T, d disk.FS, path string) []byte {
	t.Helper()
	f, err := d.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	b, err := io.ReadAll(f)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func writeFile(t *testing.T, d disk.FS, path string, b []byte) {
	t.Helper()
	f, err := disk.Create(d, path)
	if err == nil {
		_, err = f.Write(b)
		err = errors.Join(err, f.Sync(), f.Close(), disk.SyncDir(d, filepath.Dir(path)))
	}
	if err != nil {
		t.Fatal(err)
	}
}

// refused checks that the node does not start, and that the sentence names the
// file and what to do.
func refused(t *testing.T, cfg Config, class errs.Class, name string, words ...string) {
	t.Helper()
	n, err := Open(cfg)
	if err == nil {
		t.Fatalf("%s: %v starts", name, n.id)
	}
	if !errs.Has(err, class) {
		t.Errorf("%s: class %v: %v", name, errs.ClassOf(err), err)
	}
	for _, w := range append(words, name, "\ntry: ") {
		if !strings.Contains(err.Error(), w) {
			t.Errorf("%s: %q is not in: %v", name, w, err)
		}
	}
}

// Each bit of node.json and of the identity: if it is another, the node does not
// start, and the error names the file; or the file says the same (an end of line, a
// bit of PEM that stands for nothing).
func TestFlippedBitInIdentity(t *testing.T) {
	cfg, m, _ := whole(t)
	same := 0
	for _, name := range []string{fileNode, fileCA, fileCert, fileKey, fileCSR, fileVolume} {
		b := readFile(t, m, cfg.path(name))
		step := 1
		if testing.Short() || len(b) > 400 {
			step = 5 // odd: all eight bits have their turn
		}
		for i := 0; i < 8*len(b); i += step {
			bad := bytes.Clone(b)
			bad[i/8] ^= 1 << (i % 8)
			writeFile(t, m, cfg.path(name), bad)
			d, err := cfg.loadFile()
			if err == nil {
				_, _, err = cfg.loadIdentity(d)
			}
			switch {
			case err == nil && (name == fileKey || samePEM(b, bad)): // it is the certificate's key still
				same++
			case err == nil:
				t.Fatalf("%s: bit %d of byte %d (%q) flipped: nobody notices", name, i%8, i/8, b[i/8])
			case !errs.Has(err, errs.Corrupt):
				t.Fatalf("%s: bit %d of byte %d: class %v: %v", name, i%8, i/8, errs.ClassOf(err), err)
			case !strings.Contains(err.Error(), name) || !strings.Contains(err.Error(), "\ntry: "):
				t.Fatalf("%s: %v", name, err)
			}
		}
		writeFile(t, m, cfg.path(name), b)
	}
	t.Logf("%d flips changed nothing that is said", same)
	opens(t, cfg, "as it was")
}

func samePEM(a, b []byte) bool {
	p, _ := pem.Decode(a)
	q, _ := pem.Decode(b)
	return p != nil && q != nil && p.Type == q.Type && bytes.Equal(p.Bytes, q.Bytes)
}

// A flipped bit anywhere in log or state: the node does not start, or stops when
// it meets it, and says so; or what was acknowledged is all there.
func TestFlippedBitInGroups(t *testing.T) {
	cfg, base, toks := whole(t)
	refused, stopped, harmless := 0, 0, 0
	for _, db := range []string{"raftlog", "state"} {
		names, err := base.List(cfg.path(dirGroups, db))
		if err != nil {
			t.Fatal(err)
		}
		for _, name := range names {
			path := cfg.path(dirGroups, db, name)
			b := readFile(t, base, path)
			n := 12
			if testing.Short() {
				n = 3
			}
			for i := range min(n, len(b)) {
				at := (len(b)*i + len(b)/2) / min(n, len(b))
				bad := bytes.Clone(b)
				bad[at] ^= 1 << (i % 8)
				m := base.Clone()
				writeFile(t, m, path, bad)
				c := cfg
				c.FS = m
				what := fmt.Sprintf("%s/%s, byte %d of %d", db, name, at, len(b))
				if n, err := Open(c); err != nil {
					refused++
					if !errs.Has(err, errs.Corrupt) || !strings.Contains(err.Error(), "--repair") {
						t.Errorf("%s: class %v: %v", what, errs.ClassOf(err), err)
					}
					continue
				} else {
					ctx, cancel := context.WithCancel(context.Background())
					cancel()
					if err := errors.Join(n.ep.Run(ctx), n.close()); err != nil {
						t.Fatalf("%s: %v", what, err)
					}
				}
				switch err := life(c, hasTokens(toks)); {
				case err == nil:
					harmless++
				case errs.Has(err, errs.Corrupt):
					stopped++
				default:
					t.Errorf("%s: class %v: %v", what, errs.ClassOf(err), err)
				}
			}
		}
	}
	t.Logf("%d refused, %d stopped, %d harmless", refused, stopped, harmless)
	if refused == 0 {
		t.Error("no damage was found")
	}
}

// What a directory may have become otherwise, each with its sentence.
func TestDirectoryIsRefused(t *testing.T) {
	cfg, base, _ := whole(t)
	other, theirs, _ := whole(t)
	edit := func(t *testing.T, d *disk.Mem, f func(*nodeFile)) {
		t.Helper()
		n, err := decodeNodeFile(readFile(t, d, cfg.path(fileNode)))
		if err != nil {
			t.Fatal(err)
		}
		f(&n)
		c := cfg
		c.FS = d
		if err := c.saveFile(n); err != nil {
			t.Fatal(err)
		}
	}
	type test struct {
		class  errs.Class
		name   string // that the sentence names
		words  []string
		damage func(t *testing.T, d *disk.Mem)
	}
	remove := func(name string) func(*testing.T, *disk.Mem) {
		return func(t *testing.T, d *disk.Mem) {
			if err := d.RemoveAll(cfg.path(name)); err != nil {
				t.Fatal(err)
			}
		}
	}
	tests := map[string]test{
		"node.json of another cluster": {errs.Corrupt, fileCA, []string{"two nodes"}, func(t *testing.T, d *disk.Mem) {
			writeFile(t, d, cfg.path(fileNode), readFile(t, theirs, other.path(fileNode)))
		}},
		"node.json of another node": {errs.Corrupt, fileCert, []string{"n7", "two nodes"}, func(t *testing.T, d *disk.Mem) {
			edit(t, d, func(n *nodeFile) { n.Node = 7 })
		}},
		"certificate of another cluster": {errs.Corrupt, fileCert, nil, func(t *testing.T, d *disk.Mem) {
			writeFile(t, d, cfg.path(fileCert), readFile(t, theirs, other.path(fileCert)))
		}},
		"key of another node": {errs.Corrupt, fileKey, nil, func(t *testing.T, d *disk.Mem) {
			writeFile(t, d, cfg.path(fileKey), readFile(t, theirs, other.path(fileKey)))
		}},
		"a later version": {errs.NotSupported, fileNode, []string{"format 4", "later version"}, func(t *testing.T, d *disk.Mem) {
			b := readFile(t, d, cfg.path(fileNode))
			n, err := decodeNodeFile(b)
			if err != nil {
				t.Fatal(err)
			}
			b = bytes.Replace(b, []byte(`"version": 3`), []byte(`"version": 4`), 1)
			writeFile(t, d, cfg.path(fileNode), resum(b, n.Sum))
		}},
		"databases gone": {errs.Corrupt, dirGroups, []string{"gone", "--repair"}, remove(dirGroups)},
		"log gone":       {errs.Corrupt, dirGroups, []string{"gone", "--repair"}, remove(dirGroups + "/raftlog")},
		"state gone":     {errs.Corrupt, dirGroups, []string{"gone", "--repair"}, remove(dirGroups + "/state")},
		"key gone":       {errs.Corrupt, fileKey, []string{"gone", "--repair"}, remove(fileKey)},
	}
	for name, x := range tests {
		t.Run(name, func(t *testing.T) {
			c, d := cfg, base.Clone()
			x.damage(t, d)
			c.FS = d
			refused(t, c, x.class, x.name, x.words...)
			if is, err := disk.Exists(d, c.path(dirGroups, "raftlog")); err != nil || is && name == "log gone" {
				t.Error("a database was made in the place of the lost one", err)
			}
		})
	}
	t.Run("half written", func(t *testing.T) {
		c, d := cfg, base.Clone()
		c.FS = d
		remove(fileNode)(t, d)
		refused(t, c, errs.NotFound, cfg.Dir, "there is no node")
		if err := Found(c); !errs.Has(err, errs.Corrupt) || !strings.Contains(err.Error(), "--repair") {
			t.Error(err)
		}
		remove(dirBlocks)(t, d) // never started: cleared and made again
		if err := Found(c); err != nil {
			t.Error(err)
		}
		opens(t, c, "made again")
	})
	t.Run("opened twice", func(t *testing.T) {
		for _, d := range []disk.FS{base.Clone(), disk.Real} {
			c := cfg
			c.FS = d
			if d == disk.Real {
				c.Dir = filepath.Join(t.TempDir(), "real")
				if err := Found(c); err != nil {
					t.Fatal(err)
				}
			}
			if err := life(c, func(context.Context, *Node) error {
				refused(t, c, errs.Busy, c.Dir, fmt.Sprintf("process %d", os.Getpid()), "stop that process")
				again := c
				again.Repair = true
				err := Join(context.Background(), again, "127.0.0.1:1", strangersToken(t))
				if !errs.Has(err, errs.Busy) {
					t.Errorf("repaired while it runs: %v", err)
				}
				return nil
			}); err != nil {
				t.Error(err)
			}
			opens(t, c, "afterwards")
		}
	})
}

func strangersToken(t *testing.T) string {
	t.Helper()
	tok, err := identity.NewToken([32]byte{1})
	if err != nil {
		t.Fatal(err)
	}
	return tok.String()
}

// resum puts the right checksum into a node.json that was changed.
func resum(b []byte, old string) []byte {
	blank := bytes.Replace(b, []byte(sumKey+old), []byte(sumKey+sumBlank), 1)
	return bytes.Replace(blank, []byte(sumKey+sumBlank), []byte(sumKey+sumOf(blank)), 1)
}

// What format 2 had is read: no sum, and a bare volume key.
func TestFormat2IsRead(t *testing.T) {
	cfg, m, toks := whole(t)
	b := readFile(t, m, cfg.path(fileNode))
	d, err := decodeNodeFile(b)
	if err != nil {
		t.Fatal(err)
	}
	b = bytes.Replace(b, []byte(fmt.Sprintf("  %s%s\",\n", sumKey, d.Sum)), nil, 1)
	b = bytes.Replace(b, []byte(`"version": 3`), []byte(`"version": 2`), 1)
	writeFile(t, m, cfg.path(fileNode), b)
	writeFile(t, m, cfg.path(fileVolume), readFile(t, m, cfg.path(fileVolume))[:32])
	if err := life(cfg, hasTokens(toks)); err != nil {
		t.Fatal(err)
	}
}

// A damaged node comes back as another one, with its blocks, through a token; a
// sound one, one of another cluster, and one without a token do not. For each k
// a crash at change k of that is brought to its end by saying it again.
func TestRepair(t *testing.T) {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	host, hcfg := founded(t)
	token := func() string {
		r, err := host.token(asRoot(ctx, host), 10, 0, 0) // said again after a crash, with another key
		if err != nil {
			t.Fatal(err)
		}
		return r
	}
	m := newDisk()
	m.SetSize(64 << 20) // room for a block beside the reserve
	cfg := onDisk(t, m)
	first := token()
	if err := Join(ctx, cfg, hcfg.Addr, first); err != nil {
		t.Fatal(err)
	}
	if err := life(cfg, func(ctx context.Context, n *Node) error {
		for n.known.Load() == nil || (*n.known.Load())[n.id].State != record.Active {
			if pause(ctx, 5*time.Millisecond); ctx.Err() != nil {
				return ctx.Err()
			}
		}
		return n.segs.Put([32]byte{5}, []byte("a block"))
	}); err != nil {
		t.Fatal(err)
	}
	cfg.Repair = true
	if err := Join(ctx, cfg, hcfg.Addr, token()); !errs.Has(err, errs.Invalid) || !strings.Contains(err.Error(), "nothing is damaged") {
		t.Fatalf("a sound node: %v", err)
	}
	log := cfg.path(dirGroups, "raftlog")
	names, err := m.List(log)
	if err != nil {
		t.Fatal(err)
	}
	for _, n := range names {
		if strings.HasPrefix(n, "MANIFEST") {
			writeFile(t, m, filepath.Join(log, n), []byte("damaged"))
		}
	}
	refused(t, cfg, errs.Corrupt, dirGroups, "unum join --repair")
	if err := Join(ctx, cfg, hcfg.Addr, strangersToken(t)); !errs.Has(err, errs.Exists) {
		t.Fatalf("by the token of another cluster: %v", err)
	}
	if is, err := cfg.has(fileNode); !is || err != nil {
		t.Fatal("refused, but not as it was", err)
	}
	// Its old key gets it nothing: only node.json and the logs are lost here.
	old := cfg
	old.FS, old.Repair = m.Clone(), false
	for _, name := range []string{fileNode, dirBlocks} {
		if err := old.FS.RemoveAll(cfg.path(name)); err != nil {
			t.Fatal(err)
		}
	}
	if err := Join(ctx, old, hcfg.Addr, first); !errs.Has(err, errs.Exists) || !strings.Contains(err.Error(), "n2, which is a member") {
		t.Fatalf("a wiped node asked for its id again: %v", err)
	}

	crashes := 0
	step := stride(5)
	seen := map[ids.Node]bool{1: true, 2: true}
	for k := int64(1); ; k += step {
		d := m.Clone()
		var after *disk.Mem
		c := cfg
		c.FS = disk.NewFailing(d, disk.Fault{At: k, Do: func() { after = d.Crash(uint64(k)) }})
		tok := token()
		if err := Join(ctx, c, hcfg.Addr, tok); err != nil {
			t.Fatalf("change %d: %v", k, err)
		}
		c.FS = d
		if after != nil {
			crashes++
			c.FS = after
			if is, err := c.has(fileNode); err != nil {
				t.Fatal(err)
			} else if _, err := c.loadFile(); !is || err == nil && c.findDamage() != nil {
				if err := Join(ctx, c, hcfg.Addr, tok); err != nil {
					t.Fatalf("change %d: said again: %v", k, err)
				}
			}
		}
		f, err := c.loadFile()
		if err != nil || seen[f.Node] {
			t.Fatalf("change %d: %v again, %v", k, f.Node, err)
		}
		seen[f.Node] = true
		n, err := Open(c)
		if err != nil {
			t.Fatalf("change %d: %v", k, err)
		}
		if b, err := n.segs.Get([32]byte{5}, nil); err != nil || string(b) != "a block" {
			t.Fatalf("change %d: the block: %q %v", k, b, err)
		}
		if is, err := c.has("damaged-1/" + fileNode); err != nil || !is {
			t.Fatalf("change %d: what was set aside is gone: %v", k, err)
		}
		done, stop := context.WithCancel(ctx)
		stop()
		if err := errors.Join(n.ep.Run(done), n.close()); err != nil {
			t.Fatal(err)
		}
		if after == nil {
			break
		}
	}
	t.Logf("%d crashes", crashes)
	if crashes < 8 {
		t.Error("too few")
	}
}
