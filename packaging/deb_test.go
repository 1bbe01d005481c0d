// Package packaging tests the Debian package: it is installed, used, upgraded,
// removed and purged on a copy of this machine's files, which stay as they are.
package packaging

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/unum-os/unum/internal/need"
)

// first is the package that the tests share.
var first struct {
	sync.Once
	path string
}

func TestMain(m *testing.M) {
	dir, err := os.MkdirTemp("", "unum-deb-")
	if err != nil {
		panic(err)
	}
	first.path = dir
	code := m.Run()
	os.RemoveAll(dir)
	os.Exit(code)
}

// shared builds it.
func shared(t *testing.T) string {
	t.Helper()
	first.Do(func() { first.path = build(t, first.path) })
	if !strings.HasSuffix(first.path, ".deb") {
		t.Skip("the package was not built; another test says why")
	}
	return first.path
}

// build makes the package of bin/unum in a directory.
func build(t *testing.T, dir string) string {
	t.Helper()
	need.Program(t, "dpkg-deb")
	if _, err := os.Stat("../bin/unum"); err != nil {
		t.Fatalf("%v: make build first", err)
	}
	cmd := exec.CommandContext(t.Context(), "./build-deb", dir)
	var errOut bytes.Buffer
	cmd.Stderr = &errOut
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%v: %s", err, errOut.String())
	}
	return strings.TrimSpace(string(out))
}

// TestReproducible: built twice, at different times, the bytes are the same.
func TestReproducible(t *testing.T) {
	var sums [2][32]byte
	for i, deb := range []string{shared(t), build(t, t.TempDir())} {
		b, err := os.ReadFile(deb)
		if err != nil {
			t.Fatal(err)
		}
		sums[i] = sha256.Sum256(b)
	}
	if sums[0] != sums[1] {
		t.Error("two builds differ")
	}
}

// TestUnitFile lets systemd judge the unit.
func TestUnitFile(t *testing.T) {
	need.Program(t, "systemd-analyze")
	b, err := os.ReadFile("unum.service")
	if err != nil {
		t.Fatal(err)
	}
	// It looks for the program and the manual too, which are not installed here.
	text := strings.ReplaceAll(string(b), "/usr/bin/unum", "/bin/true")
	text = strings.ReplaceAll(text, "Documentation=man:unum(1) man:unum-up(1)\n", "")
	if text == string(b) {
		t.Fatal("the unit does not start /usr/bin/unum")
	}
	p := filepath.Join(t.TempDir(), "unum.service")
	if err := os.WriteFile(p, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command("systemd-analyze", "verify", p).CombinedOutput(); err != nil || strings.Contains(string(out), "unum") {
		t.Errorf("%v: %s", err, out)
	}
}

// prologue makes the copy: an overlay over this machine's files, in namespaces
// of this test's own. What is written is in $W/up, in memory.
const prologue = `set -euo pipefail
mount -t tmpfs -o mode=755 none "$W"
mkdir "$W/up" "$W/work" "$W/root"
mount -t overlay -o "lowerdir=/,upperdir=$W/up,workdir=$W/work" none "$W/root" || exit 77
R=$W/root
mount -t proc none "$R/proc"
for d in run dev tmp; do mount -t tmpfs -o mode=755 none "$R/$d"; done
for d in null:1:3 zero:1:5 random:1:8 urandom:1:9 fuse:10:229; do
  IFS=:; set -- $d; unset IFS
  mknod -m 666 "$R/dev/$1" c "$2" "$3"
done
cp "$DEB" "$R/run/unum.deb"
ip link set lo up
export DEBIAN_FRONTEND=noninteractive HOME=/ PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
at() { chroot "$R" "$@"; }
# What is not as it was before: files that came or went, and new directories.
# dpkg's own memory, its log, and caches that others make of what is installed
# are no part of a package.
changed() {
  (cd "$W/up" && find . -mindepth 1 ! -type d -print -o -type d ! -exec test -d '/{}' \; -print) | sed 's/^\.//' |
    { grep -v -e '^/var/lib/dpkg/' -e '^/var/log/dpkg.log$' -e '^/var/cache/' -e '^/etc/ld.so.cache$' || true; } | sort
}
die() { echo "FAILED: $*"; exit 1; }
`

// run runs a script in the copy.
func run(t *testing.T, deb, script string) string {
	t.Helper()
	need.Root(t, "for a copy of this machine's files")
	if err := exec.Command("dpkg", "-s", "unum").Run(); err == nil {
		need.Missing(t, "the package is installed on this machine")
	}
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, "/bin/bash", "-c", prologue+script)
	cmd.Env = append(os.Environ(), "W="+t.TempDir(), "DEB="+deb)
	cmd.Dir = "/"
	// Its process namespace ends with it, and all that was started in it.
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWPID | syscall.CLONE_NEWNET | syscall.CLONE_NEWIPC, Unshareflags: syscall.CLONE_NEWNS}
	out, err := cmd.CombinedOutput()
	var ee *exec.ExitError
	if errors.As(err, &ee) && ee.ExitCode() == 77 {
		need.Missing(t, "needs overlayfs: %s", out)
	}
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	return string(out)
}

// TestPackage: installed, it works; an upgrade leaves a running node alone; a
// removal stops it; after a purge no file of it is left but the node's data.
func TestPackage(t *testing.T) {
	out := run(t, shared(t), `
at dpkg --no-triggers -i /run/unum.deb || die install
changed > "$W/installed"
for f in /usr/bin/unum /lib/systemd/system/unum.service /etc/unum/unum.toml /usr/share/man/man1/unum-up.1.gz /usr/share/doc/unum/copyright \
  /usr/share/bash-completion/completions/unum /usr/share/zsh/vendor-completions/_unum /usr/share/fish/vendor_completions.d/unum.fish; do
  [ -f "$R$f" ] || die "no $f"
done
[ ! -e "$R/run/unum" ] && [ ! -e "$R/etc/systemd/system/multi-user.target.wants/unum.service" ] || die "it was started or enabled"
at dpkg --verify unum | grep . && die "files differ from what the package says"
at unum version || die version
at unum config | grep '^mount  */unum  *default$' || die config
bash -n "$R/usr/share/bash-completion/completions/unum" || die completion
! at unum down || die "down where nothing runs"

# A node, and an edited file of settings: an upgrade touches neither.
echo 'labels = ["place=attic"]' >> "$R/etc/unum/unum.toml"
at unum up -d || { cat "$R/var/log/unum/unum.log"; die up; }
pid=$(cat "$R/run/unum/unum.pid")
echo precious > "$R/unum/file"; sync "$R/unum/file"
at dpkg --no-triggers -i /run/unum.deb || die upgrade
kill -0 "$pid" && at unum status --healthy || die "the upgrade stopped the node"
at unum config | grep 'place=attic  */etc/unum/unum.toml:' || die "the settings were not kept"

at dpkg --no-triggers -r unum || die remove
! kill -0 "$pid" 2>/dev/null || die "the removal left the node running"
[ ! -e "$R/usr/bin/unum" ] && [ -e "$R/etc/unum/unum.toml" ] && [ -e "$R/var/lib/unum/node.json" ] || die "the removal took too much or too little"

# Purged with systemd there, as a chroot sees it, and the unit enabled.
at dpkg --no-triggers -i /run/unum.deb || die "install again"
if at systemctl --version >/dev/null 2>&1; then
  mkdir -p "$R/run/systemd/system"
  at systemctl enable unum || die enable
  [ -h "$R/etc/systemd/system/multi-user.target.wants/unum.service" ] || die "not enabled"
fi
at dpkg --no-triggers -P unum | tee "$W/purged" || die purge
grep -q 'the data of this node is kept in /var/lib/unum' "$W/purged" || die "it does not say what it keeps"
[ -e "$R/var/lib/unum/node.json" ] || die "the purge took the data"
[ -d /var/lib/unum ] && rm -rf "$R"/var/lib/unum/* || rm -rf "$R/var/lib/unum"
[ -d /unum ] || rmdir "$R/unum"
changed > "$W/left"
echo "installed: $(wc -l < "$W/installed") files"
if [ -s "$W/left" ]; then cat "$W/left"; die "left behind"; fi
`)
	if !strings.Contains(out, "installed: ") {
		t.Errorf("it did not come to its end: %s", out)
	}
	t.Log(out)
}
