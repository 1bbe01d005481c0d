package lab

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/unum-os/unum/internal/errs"
)

// pointer is /run/unum-lab/NAME.json: where the lab is. It is the first thing
// made and the last removed.
type pointer struct {
	Dir     string
	MadeDir []string // directories made for Dir, outermost first
}

// procID names a process for good: pids are reused, start times with them not.
type procID struct {
	Pid   int
	Start uint64 // clock ticks since boot
}

type nodeState struct {
	Name  string
	Kind  Kind
	Index int
	Addr  netip.Addr
	Fresh bool // not healthy yet with the disk it has
	On    bool // power; what is meant, not what is so
	Ready bool // its init has made it a machine: only then does anything run on it
	Proc  procID
}

// cut keeps A and B from hearing each other; if OneWay, only B from hearing A.
type cut struct {
	A, B   []string
	OneWay bool `json:",omitempty"`
}

// state is state.json in the lab's directory.
type state struct {
	Version  int
	Name     string
	Dir      string
	Creator  procID
	Complete bool // Up has ended well
	DataDir  string
	Mount    string
	DiskSize int64
	Subnet   netip.Prefix
	Loops    []string // loop devices there were before the first of the labs that stand
	Switch   procID
	Nodes    []*nodeState
	Cuts     []cut
	Links    map[string]Link   `json:",omitempty"` // what is wrong with a node's cable
	Relays   map[string]procID `json:",omitempty"`
	Paused   map[string]string `json:",omitempty"` // pausedNode or pausedDaemon
	Clocks   map[string]Clock  `json:",omitempty"`
}

// stateVersion is the format of state.json; another is refused.
const stateVersion = 1

func pointerPath(name string) string { return filepath.Join(runBase, name+".json") }
func runDir(name string) string      { return filepath.Join(runBase, name) }
func sockPath(name, node string) string {
	return filepath.Join(runBase, name, node+".sock")
}

func noLab(name string) error {
	switch labs, _ := List(); len(labs) { // what cannot be listed is not offered
	case 0:
		return errs.E(errs.NotFound, "lab", name, "there is no such lab on this machine").WithRemedy("unum lab up --name %s", name)
	case 1:
		return errs.E(errs.NotFound, "lab", name, "there is no such lab on this machine; there is one called %s", labs[0]).
			WithRemedy("the same with --name %s, before the node's name", labs[0])
	default:
		return errs.E(errs.NotFound, "lab", name, "there is no such lab on this machine; there are %s", strings.Join(labs, ", ")).
			WithRemedy("the same with --name and one of these, before the node's name")
	}
}

// readPointer finds the lab called name, also when /run was emptied by a reboot
// or its maker died before writing the pointer.
func readPointer(name string) (pointer, error) {
	b, err := os.ReadFile(pointerPath(name))
	if err == nil {
		var p pointer
		if err := json.Unmarshal(b, &p); err != nil || p.Dir == "" {
			return pointer{}, errs.E(errs.Corrupt, "lab", pointerPath(name), "not a lab's pointer: %v", err)
		}
		return p, nil
	}
	if os.IsPermission(err) {
		return pointer{}, needsRoot("lab")
	}
	if !os.IsNotExist(err) {
		return pointer{}, errs.Wrap(err, "lab", name)
	}
	def := filepath.Join(defaultBase, name)
	for _, trace := range []string{def, runDir(name)} {
		if _, err := os.Stat(trace); err == nil {
			return pointer{Dir: def, MadeDir: []string{defaultBase, def}}, nil
		}
	}
	return pointer{}, noLab(name)
}

func readState(dir string) (*state, error) {
	b, err := os.ReadFile(filepath.Join(dir, "state.json"))
	if err != nil {
		if os.IsNotExist(err) {
			return nil, errs.E(errs.NotFound, "lab", dir, "the lab is half made: it has no state").WithRemedy("unum lab down")
		}
		if os.IsPermission(err) {
			return nil, needsRoot("lab")
		}
		return nil, errs.Wrap(err, "lab", dir)
	}
	var s state
	if err := json.Unmarshal(b, &s); err != nil {
		return nil, errs.E(errs.Corrupt, "lab", dir, "state.json: %v", err)
	}
	if s.Version != stateVersion {
		return nil, errs.E(errs.NotSupported, "lab", dir, "state.json has version %d, this program knows %d", s.Version, stateVersion)
	}
	return &s, nil
}

// needsRoot is what everybody else hears.
func needsRoot(op string) error {
	return errs.E(errs.Permission, op, "", "namespaces, loop devices and mounts need root, and you are user %d", os.Geteuid()).
		WithRemedy("sudo %s", strings.Join(append([]string{"unum"}, os.Args[1:]...), " "))
}

func (s *state) save() error { return writeJSON(filepath.Join(s.Dir, "state.json"), s) }

// writeJSON replaces path at once. Nothing is synced: a lab does not outlive the
// machine's own power loss, only its programs' deaths.
func writeJSON(path string, v any) error {
	b, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		return errs.Wrap(err, "lab: write", path)
	}
	tmp := path + ".new"
	if err := os.WriteFile(tmp, append(b, '\n'), 0o600); err != nil {
		return errs.Wrap(err, "lab: write", path)
	}
	return errs.Wrap(os.Rename(tmp, path), "lab: write", path)
}

// lockDir takes an exclusive flock on directory path, making it if needed, and
// returns what releases it. It waits until ctx ends.
func lockDir(ctx context.Context, path string) (unlock func(), err error) {
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		if err := makeAll(path, 0o700); err != nil {
			return nil, errs.Wrap(err, "lab: lock", path)
		}
		f, err := os.Open(path)
		if err != nil {
			if os.IsNotExist(err) {
				continue // removed by a down that ended just now
			}
			return nil, errs.Wrap(err, "lab: lock", path)
		}
		err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			var a, b unix.Stat_t
			if unix.Fstat(int(f.Fd()), &a) == nil && unix.Stat(path, &b) == nil && a.Ino == b.Ino && a.Dev == b.Dev {
				return func() { f.Close() }, nil
			}
			f.Close()
			continue
		}
		f.Close()
		if !errors.Is(err, unix.EWOULDBLOCK) && !errors.Is(err, unix.EINTR) {
			return nil, errs.Wrap(err, "lab: lock", path)
		}
		select {
		case <-ctx.Done():
			return nil, errs.E(errs.Busy, "lab: lock", filepath.Base(path), "another lab verb is at work on it")
		case <-tick.C:
		}
	}
}

// change runs f on the lab's state under its lock and saves the state when f
// says so by returning nil.
func (l *Lab) change(ctx context.Context, f func(s *state) error) error {
	if _, err := readPointer(l.name); err != nil {
		return err
	}
	unlock, err := lockDir(ctx, runDir(l.name))
	if err != nil {
		return err
	}
	defer unlock()
	s, err := readState(l.dir)
	if err != nil {
		return err
	}
	if err := f(s); err != nil {
		return err
	}
	return s.save()
}

// mkdirs makes path and its missing parents and tells record of those it is about
// to make, outermost first, before it makes them. A parent that goes meanwhile is
// made, and told, too.
func mkdirs(path string, record func(made []string) error) error {
	var told []string
	for try := 1; ; try++ {
		missing, err := missingDirs(path)
		if err != nil || len(missing) == 0 {
			return err
		}
		if len(missing) > len(told) { // all are above path: the longer list has the others in it
			told = missing
			if err := record(told); err != nil {
				return err
			}
		}
		for _, p := range missing {
			if err = os.Mkdir(p, 0o755); err != nil && !os.IsExist(err) {
				break
			}
		}
		if err != nil && (try == parentTries || !os.IsExist(err) && !os.IsNotExist(err)) {
			return errs.Wrap(err, "lab up", path)
		}
	}
}

// missingDirs lists path and its parents that are not there, outermost first.
func missingDirs(path string) (missing []string, err error) {
	for p := path; ; p = filepath.Dir(p) {
		fi, err := os.Stat(p)
		switch {
		case os.IsNotExist(err):
			missing = append(missing, p)
		case err != nil:
			return nil, errs.Wrap(err, "lab up", p)
		case !fi.IsDir():
			return nil, errs.E(errs.NotDir, "lab up", p, "a directory is needed here")
		default:
			slices.Reverse(missing)
			return missing, nil
		}
	}
}

// parentTries is how often a directory is tried to be made whose parent goes at the
// same moment, because it was made for the last other lab, which goes down.
const parentTries = 10_000

// makeAll is os.MkdirAll beside other labs that remove parents which have become empty.
func makeAll(path string, mode os.FileMode) error {
	for try := 1; ; try++ {
		if err := os.MkdirAll(path, mode); !os.IsNotExist(err) || try == parentTries {
			return err
		}
	}
}

// Mount points are shared by labs: who came first made them, who goes last
// removes them. The list of those made is a file per directory.
func madeList() string { return filepath.Join(runBase, ".made") }

func makeShared(ctx context.Context, path string) error {
	unlock, err := lockDir(ctx, runBase)
	if err != nil {
		return err
	}
	defer unlock()
	return mkdirs(path, func(made []string) error {
		return appendMade(made)
	})
}

func appendMade(made []string) error {
	old, err := readMade()
	if err != nil {
		return err
	}
	return writeJSON(madeList(), append(old, made...))
}

func readMade() ([]string, error) {
	b, err := os.ReadFile(madeList())
	if os.IsNotExist(err) {
		return nil, nil
	}
	if err != nil {
		return nil, errs.Wrap(err, "lab", madeList())
	}
	var m []string
	if err := json.Unmarshal(b, &m); err != nil {
		return nil, errs.E(errs.Corrupt, "lab", madeList(), "%v", err)
	}
	return m, nil
}

// dropShared removes shared directories when no lab but name is left.
func dropShared(ctx context.Context, name string) error {
	unlock, err := lockDir(ctx, runBase)
	if err != nil {
		return err
	}
	defer unlock()
	labs, err := List()
	if err != nil {
		return err
	}
	for _, n := range labs {
		if n != name {
			return nil
		}
	}
	made, err := readMade()
	if err != nil {
		return err
	}
	if err := removeEmpty(made); err != nil {
		return err
	}
	for _, p := range []string{madeList(), madeList() + ".new"} {
		if err := os.Remove(p); err != nil && !os.IsNotExist(err) {
			return errs.Wrap(err, "lab down", p)
		}
	}
	return nil
}

// freeSubnet picks a /24 of 10.0.0.0/8 that neither an interface of this machine
// nor another lab uses. The lab's network is closed, so this is for the eye of
// whoever reads addresses, and for a later door to the outside.
func freeSubnet(name string) (netip.Prefix, error) {
	var used []netip.Prefix
	addrs, err := net.InterfaceAddrs()
	if err != nil {
		return netip.Prefix{}, errs.Wrap(err, "lab up", "interfaces")
	}
	for _, a := range addrs {
		if p, err := netip.ParsePrefix(a.String()); err == nil {
			used = append(used, p.Masked())
		}
	}
	labs, err := List()
	if err != nil {
		return netip.Prefix{}, err
	}
	for _, n := range labs {
		if n == name {
			continue
		}
		if p, err := readPointer(n); err == nil {
			if s, err := readState(p.Dir); err == nil {
				used = append(used, s.Subnet)
			}
		}
	}
	for b := 77; b < 200; b++ {
		for c := range 256 {
			p := netip.MustParsePrefix(fmt.Sprintf("10.%d.%d.0/24", b, c))
			free := true
			for _, u := range used {
				free = free && !u.Overlaps(p)
			}
			if free {
				return p, nil
			}
		}
	}
	return netip.Prefix{}, errs.E(errs.NoSpace, "lab up", name, "no free subnet left in 10.77.0.0 to 10.199.255.255")
}

// addr returns the k-th address of the lab's subnet.
func (s *state) addr(k int) netip.Addr {
	b := s.Subnet.Addr().As4()
	b[3] = byte(k)
	return netip.AddrFrom4(b)
}

// mac returns the hardware address of node k: locally administered, made of its
// address, so that it is the same after every boot.
func (s *state) mac(k int) [6]byte {
	a := s.addr(k).As4()
	return [6]byte{0x02, 0x75, a[0], a[1], a[2], a[3]}
}

// statFields returns the fields of /proc/PID/stat after the command's name.
func statFields(pid int) ([]string, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return nil, err
	}
	str := string(b)
	i := strings.LastIndexByte(str, ')')
	f := strings.Fields(str[i+1:])
	if i < 0 || len(f) < 20 {
		return nil, fmt.Errorf("/proc/%d/stat: not as expected", pid)
	}
	return f, nil
}

func identify(pid int) (procID, error) {
	f, err := statFields(pid)
	if err != nil {
		return procID{}, err
	}
	var start uint64
	if _, err := fmt.Sscan(f[19], &start); err != nil {
		return procID{}, err
	}
	return procID{Pid: pid, Start: start}, nil
}

// alive reports whether p still runs. A zombie without threads has no namespace,
// no memory and no file left: it counts as gone.
func (p procID) alive() bool {
	if p.Pid <= 0 {
		return false
	}
	f, err := statFields(p.Pid)
	if err != nil || f[0] == "X" || f[19] != fmt.Sprint(p.Start) {
		return false
	}
	return f[0] != "Z" || f[17] != "1" && f[17] != "0" // the first thread may be dead before the others
}
