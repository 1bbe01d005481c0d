package node

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/unum-os/unum/internal/control"
	"github.com/unum-os/unum/internal/control/api"
	"github.com/unum-os/unum/internal/disk"
	"github.com/unum-os/unum/internal/errs"
	"github.com/unum-os/unum/internal/identity"
	"github.com/unum-os/unum/internal/ids"
	"github.com/unum-os/unum/internal/need"
	"github.com/unum-os/unum/internal/proc"
	"github.com/unum-os/unum/internal/record"
	"github.com/unum-os/unum/internal/rpc"
	"github.com/unum-os/unum/internal/wire"
)

// config is for a node in a directory of its own, at a free port.
func config(t testing.TB) Config {
	t.Helper()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(t.TempDir(), "data")
	return Config{Dir: dir, Mount: filepath.Join(dir, "mnt"), Socket: filepath.Join(dir, "sock"), Addr: need.Address(t),
		Hostname: "host", Exe: exe, Log: slog.New(slog.DiscardHandler)}
}

// start runs of a node what needs no root: all but the tree and the jobs. The
// function it returns stops it, and is called at the end of the test at last.
func start(t testing.TB, cfg Config, change ...func(*Node)) (*Node, func()) {
	t.Helper()
	n, err := Open(cfg)
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range change {
		f(n)
	}
	ctx, cancel := context.WithCancelCause(context.Background())
	n.end = cancel
	parts := slices.DeleteFunc(n.parts(), func(p part) bool { return p.name == "tree" || p.name == "manager" })
	ended := make(chan error, 1)
	go func() { ended <- n.run(ctx, cancel, parts) }()
	stop := sync.OnceFunc(func() {
		cancel(nil)
		if err := <-ended; err != nil {
			t.Errorf("%v: %v", n.id, err)
		}
	})
	t.Cleanup(stop)
	return n, stop
}

// asRoot returns the context of a request by root of a node.
func asRoot(ctx context.Context, _ *Node) context.Context { return asUser(ctx, uint32(os.Geteuid())) }

// asUser returns the context of a request by a process of that uid on a node.
func asUser(ctx context.Context, uid uint32) context.Context {
	return api.WithPeer(ctx, control.Cred{UID: uid, GID: uid})
}

func await(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(30 * time.Second); !ok(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("never: %s", what)
		}
	}
}

// settled waits until the node and, as it knows, n members are in the cluster.
func settled(t *testing.T, n *Node, members int) {
	t.Helper()
	await(t, fmt.Sprintf("%v knows %d members", n.id, members), func() bool {
		ms := n.current()
		return len(ms) == members && !slices.ContainsFunc(ms, func(m record.Member) bool { return m.State != record.Active })
	})
}

func founded(t *testing.T) (*Node, Config) {
	t.Helper()
	cfg := config(t)
	if err := Found(cfg); err != nil {
		t.Fatal(err)
	}
	n, _ := start(t, cfg)
	settled(t, n, 1)
	return n, cfg
}

// age gives the node in cfg.Dir a certificate that was signed then.
func age(t *testing.T, cfg Config, ca *identity.CA, id ids.Node, role identity.Role, then time.Time) {
	t.Helper()
	csr, err := identity.Load(disk.Real, cfg.path(fileCSR))
	if err != nil {
		t.Fatal(err)
	}
	cert, err := ca.Sign(csr, id, role, then)
	if err != nil {
		t.Fatal(err)
	}
	if err := identity.Save(disk.Real, cfg.path(fileCert), cert); err != nil {
		t.Fatal(err)
	}
}

// A certificate that ends soon is exchanged by the running node; one that has
// ended while the node was off is, too.
func TestCertificateIsRenewed(t *testing.T) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	const day = 24 * time.Hour
	fresh := func(n *Node) func() bool {
		return func() bool { return time.Until(n.holder.NotAfter()) > identity.NodeValidity-day }
	}
	cfg1 := config(t)
	if err := Found(cfg1); err != nil {
		t.Fatal(err)
	}
	var pems [2][]byte
	for i, f := range []string{fileCA, fileCAKey} {
		b, err := identity.Load(disk.Real, cfg1.path(f))
		if err != nil {
			t.Fatal(err)
		}
		pems[i] = b
	}
	ca, err := identity.ParseCA(pems[0], pems[1])
	if err != nil {
		t.Fatal(err)
	}
	age(t, cfg1, ca, 1, identity.RoleStore, time.Now().Add(day-identity.NodeValidity))
	n1, stop1 := start(t, cfg1)
	settled(t, n1, 1)
	await(t, "a certificate with a day left is renewed", fresh(n1))
	stop1()
	n1, _ = start(t, cfg1) // as it is on the disk
	if !fresh(n1)() {
		t.Fatalf("the disk has one that ends at %v", n1.holder.NotAfter())
	}

	tok, err := n1.token(asRoot(ctx, n1), 0, 0, 0)
	if err != nil {
		t.Fatal(err)
	}
	cfg2 := config(t)
	if err := Join(ctx, cfg2, cfg1.Addr, tok); err != nil {
		t.Fatal(err)
	}
	n2, stop2 := start(t, cfg2)
	settled(t, n2, 2)
	stop2()
	age(t, cfg2, ca, 2, identity.RoleStore, time.Now().Add(-day-identity.NodeValidity))
	n2, _ = start(t, cfg2)
	await(t, "a certificate that has ended is renewed", fresh(n2))
	await(t, "others accept it", func() bool {
		_, err := n2.ep.Call(ctx, 1, methodSelf, struct{}{}, nil, nil)
		return err == nil
	})

	// What a node is given by another: its own name only, for its own key only.
	csr, err := identity.Load(disk.Real, cfg2.path(fileCSR))
	if err != nil {
		t.Fatal(err)
	}
	key, err := identity.Load(disk.Real, cfg2.path(fileKey))
	if err != nil {
		t.Fatal(err)
	}
	var r renewReply
	if _, err := n2.ep.Call(ctx, 1, methodRenew, renewRequest{csr}, nil, &r); err != nil {
		t.Fatal(err)
	}
	if h, err := identity.NewHolder(ca.Trust(), r.Cert, key); err != nil || h.Node() != 2 {
		t.Fatal(h, err)
	}
	_, strange, err := identity.NewRequest()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := n2.ep.Call(ctx, 1, methodRenew, renewRequest{strange}, nil, &r); !errs.Has(err, errs.Unauthorized) {
		t.Fatalf("another key: %v", err)
	}
}

// A node that was given another address keeps it when later starts say none; the
// first one's labels are in the record as any other's.
func TestAddressIsKept(t *testing.T) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	cfg := config(t)
	cfg.Labels = map[string]string{"place": "attic"}
	if err := Found(cfg); err != nil {
		t.Fatal(err)
	}
	told := func(addr, want string) {
		t.Helper()
		c := cfg
		c.Addr = addr
		n, stop := start(t, c)
		defer stop()
		if n.disk.Addr != want {
			t.Errorf("it is at %s, want %s", n.disk.Addr, want)
		}
		await(t, "the record has its address", func() bool {
			_, err := n.record.info(ctx)
			m := (*n.known.Load())[n.id]
			return err == nil && m.Addr == want && m.Labels["place"] == "attic"
		})
	}
	told("", cfg.Addr)
	moved := config(t).Addr
	told(moved, moved)
	told("", moved)
}

// TestOneOfTwoMoves: of two nodes one comes back at another address. Without it
// there is no majority, and nobody could be told by the record where it is.
func TestOneOfTwoMoves(t *testing.T) {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	n1, _ := founded(t)
	n2, cfg2, stop2 := join(t, ctx, n1, record.RoleStore)
	for _, n := range []*Node{n1, n2} {
		voters(t, n, 1, 2)
	}
	stop2()
	cfg2.Addr = need.Address(t)
	n2, _ = start(t, cfg2)
	for _, n := range []*Node{n1, n2} {
		await(t, "the record has its address", func() bool { return (*n.known.Load())[n2.id].Addr == cfg2.Addr })
	}
	if _, err := n1.token(asRoot(ctx, n1), 0, 0, 0); err != nil {
		t.Error(err)
	}
}

// TestTokenLife: a join token is not good for ever, nor by mistake for no time.
func TestTokenLife(t *testing.T) {
	n, _ := founded(t)
	for life, ok := range map[time.Duration]bool{time.Hour: true, maxTokenLife: true, maxTokenLife + 1: false, math.MaxInt64: false} {
		_, err := n.token(asRoot(t.Context(), n), 0, life, 0)
		if ok && err != nil || !ok && !errs.Has(err, errs.Invalid) {
			t.Errorf("for %v: %v", life, err)
		}
	}
	toks, err := n.record.view().Tokens()
	if err != nil || len(toks) != 2 {
		t.Errorf("the record has %d tokens, want 2 (%v)", len(toks), err)
	}
}

// Who has no token gets nothing into the record's log.
func TestStrangersWriteNothing(t *testing.T) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	n, cfg := founded(t)
	ask := func(secret [16]byte, role record.Role, host string) error {
		_, csr, err := identity.NewRequest()
		if err != nil {
			t.Fatal(err)
		}
		q := joinRequest{Secret: secret, CSR: csr, Hostname: host, Addr: "127.0.0.1:1", Role: role}
		_, _, err = rpc.Join(ctx, cfg.Addr, n.holder.Trust().Fingerprint(), wire.MustMarshal(q))
		return err
	}
	// One token is used up, one has expired, one is for another role, one is good.
	invite := func(life time.Duration, role record.Role) (identity.Token, string) {
		t.Helper()
		text, err := n.token(asRoot(ctx, n), 1, life, role)
		if err != nil {
			t.Fatal(err)
		}
		tok, err := identity.ParseToken(text)
		if err != nil {
			t.Fatal(err)
		}
		return tok, text
	}
	used, text := invite(time.Hour, record.RoleClient)
	ccfg := config(t)
	ccfg.Role = record.RoleClient
	if err := Join(ctx, ccfg, cfg.Addr, text); err != nil {
		t.Fatal(err)
	}
	await(t, "it is admitted", func() bool { return (*n.known.Load())[2].State == record.Active })
	old, _ := invite(time.Nanosecond, record.RoleStore)
	other, _ := invite(time.Hour, record.RoleClient)
	type attempt struct {
		secret [16]byte
		role   record.Role
		host   string
		class  errs.Class
		why    string
	}
	proposed := func() uint64 { // by this node; an election adds entries too
		n.record.mu.Lock()
		defer n.record.mu.Unlock()
		return n.record.seq
	}
	wrote := func(times int, list func(i int) []attempt) (entries uint64, took time.Duration) {
		before, began := proposed(), time.Now()
		for i := range times {
			for _, c := range list(i) {
				if err := ask(c.secret, c.role, c.host); !errs.Has(err, c.class) || !strings.Contains(err.Error(), c.why) {
					t.Fatalf("%v, want %q", err, c.why)
				}
			}
		}
		return proposed() - before, time.Since(began)
	}
	if entries, _ := wrote(20, func(i int) []attempt {
		return []attempt{
			{[16]byte{byte(i)}, 0, "x", errs.Unauthorized, "not one of this cluster"},
			{other.Secret, 0, strings.Repeat("x", record.MaxText+1), errs.TooLarge, "host name"},
		}
	}); entries != 0 {
		t.Errorf("strangers wrote %d entries", entries)
	}
	// Who has had a token is told to the audit, and not without end.
	entries, took := wrote(refusalsAtOnce, func(int) []attempt {
		return []attempt{
			{used.Secret, 0, "x", errs.Unauthorized, "used up"},
			{old.Secret, 0, "x", errs.Unauthorized, "has expired"},
			{other.Secret, record.RoleStore, "x", errs.Unauthorized, "is for role client"},
		}
	})
	if most := refusalsAtOnce + uint64(refusalsPer*took.Seconds()) + 1; entries < 3 || entries > most {
		t.Errorf("who has had a token wrote %d entries, want 3 to %d", entries, most)
	}
	if !n.knocks.tell(n.id, time.Now()) {
		t.Error("what this node's own are refused is not told any more")
	}
	// The same with a token gets in; the reply can be had again.
	tok, err := n.token(asRoot(ctx, n), 0, 0, 0)
	if err != nil {
		t.Fatal(err)
	}
	cfg2 := config(t)
	for range 2 {
		if err := Join(ctx, cfg2, cfg.Addr, tok); err != nil {
			t.Fatal(err)
		}
		if err := os.Remove(cfg2.path(fileNode)); err != nil { // as though it had been cut off before
			t.Fatal(err)
		}
	}
	if ms := n.current(); len(ms) != 3 {
		t.Errorf("members: %+v", ms)
	}
}

// A node is not made over another of which only node.json cannot be read.
func TestNoNodeOverBlocks(t *testing.T) {
	cfg := config(t)
	if err := Found(cfg); err != nil {
		t.Fatal(err)
	}
	n, stop := start(t, cfg)
	settled(t, n, 1)
	stop()
	kept := filepath.Join(cfg.Dir, "groups", "kept")
	if err := os.WriteFile(kept, []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(cfg.path(fileNode), cfg.path("away")); err != nil {
		t.Fatal(err)
	}
	tok, err := identity.NewToken([32]byte{1})
	if err != nil {
		t.Fatal(err)
	}
	for what, err := range map[string]error{"found": Found(cfg), "join": Join(context.Background(), cfg, "127.0.0.1:1", tok.String())} {
		if !errs.Has(err, errs.Corrupt) || !strings.Contains(err.Error(), "try: ") {
			t.Errorf("%s: %v", what, err)
		}
	}
	for _, f := range []string{kept, cfg.path("blocks", "lock")} {
		if _, err := os.Stat(f); err != nil {
			t.Error(err)
		}
	}
	if err := os.Rename(cfg.path("away"), cfg.path(fileNode)); err != nil {
		t.Fatal(err)
	}
	n, _ = start(t, cfg)
	settled(t, n, 1)

	// What cannot be looked at is not nothing.
	loop := filepath.Join(t.TempDir(), "loop")
	if err := os.Symlink(loop, loop); err != nil {
		t.Fatal(err)
	}
	cfg.Dir = loop
	if is, err := Exists(loop); is || !errs.Has(err, errs.Loop) {
		t.Errorf("%v %v", is, err)
	}
	if err := Found(cfg); !errs.Has(err, errs.Loop) {
		t.Error(err)
	}
}

// What a job says of itself may be longer than the record keeps: the record
// hears of its end all the same, and so of the others'.
func TestLongJobsAreTold(t *testing.T) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	n, _ := founded(t)
	long := strings.Repeat("\u00fc", 200)
	var rs []proc.JobRecord
	for range 40 { // more than fit one command as they are
		id, err := n.jobs.NewID(ctx)
		if err != nil {
			t.Fatal(err)
		}
		rs = append(rs, proc.JobRecord{Job: id, Incarnation: 1, Home: 1, Node: 1, State: proc.Exited, Code: 3, Start: 1, End: 2,
			Argv: [][]byte{[]byte("echo"), bytes.Repeat([]byte("x"), 120<<10), []byte("y")}, Cwd: bytes.Repeat([]byte("/d"), record.MaxPath),
			Name: long, Text: long, Receipt: make([]byte, record.MaxReceipt+1)})
	}
	for i := range rs {
		n.jobs.Put(rs[i])
	}
	for i := range rs {
		var j record.Job
		await(t, "the record has heard of all jobs", func() (ok bool) {
			var err error
			j, err = n.record.view().Job(rs[i].Job)
			return err == nil
		})
		size := 0
		for _, a := range j.Argv {
			size += len(a) + 1
		}
		if j.State != record.JobExited || j.ExitCode != 3 || len(j.Argv) != 2 || string(j.Argv[0]) != "echo" || size != argvTold ||
			!strings.HasPrefix(long, j.Text) || len(j.Text) != record.MaxText-1 || j.Name != j.Text || len(j.Cwd) != record.MaxPath {
			t.Fatalf("job %d: %v, argv %d words, %d bytes; text %d, name %d, directory %d", j.ID, j.State, len(j.Argv), size, len(j.Text), len(j.Name), len(j.Cwd))
		}
	}
}

// TestRolesAreTheAPIs: the numbers of roles are the same there.
func TestRolesAreTheAPIs(t *testing.T) {
	for n, name := range api.Role_name {
		if r := record.Role(n).String(); n != 0 && !strings.EqualFold(r, name) {
			t.Errorf("role %d is %s here, %s there", n, r, name)
		}
	}
	if next := record.Role(len(api.Role_name)).String(); next != "unknown" {
		t.Errorf("the API lacks the role %s", next)
	}
}
