package record

import (
	"bytes"
	"encoding/hex"
	"errors"
	"flag"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/cockroachdb/pebble/v2"
	"github.com/cockroachdb/pebble/v2/vfs"
	"pgregory.net/rapid"

	"github.com/unum-os/unum/internal/errs"
	"github.com/unum-os/unum/internal/ids"
	"github.com/unum-os/unum/internal/principal"
	"github.com/unum-os/unum/internal/wire"
)

var update = flag.Bool("update", false, "rewrite golden files")

type testSpace string

func (s testSpace) Key(parts ...[]byte) []byte {
	return append([]byte(s), bytes.Join(parts, nil)...)
}

const space = testSpace("G")

type fataler interface {
	Helper()
	Fatalf(string, ...any)
}

type quiet struct{}

func (quiet) Infof(string, ...any)      {}
func (quiet) Errorf(string, ...any)     {}
func (quiet) Fatalf(f string, a ...any) { panic(fmt.Sprintf(f, a...)) }

type replica struct {
	t     fataler
	db    *pebble.DB
	m     Machine
	index uint64
	seq   uint64
	root  ids.Node // whose root and whose system ask; 0: the first node's
	log   [][]byte
}

func openDB(t fataler) *pebble.DB {
	t.Helper()
	db, err := pebble.Open("", &pebble.Options{FS: vfs.NewMem(), Logger: quiet{}, FormatMajorVersion: pebble.FormatNewest})
	if err != nil {
		t.Fatalf("%v", err)
	}
	return db
}

func newReplica(t fataler) *replica { return &replica{t: t, db: openDB(t)} }

func founded(t fataler) *replica {
	r := newReplica(t)
	r.must(Command{Init: &Init{ClusterID: [16]byte{1}, Name: "home", CACert: []byte("cert"),
		Hostname: "alpha", Addr: "alpha:7400", Key: KeyHash{1}, Now: 100}})
	return r
}

func (r *replica) close() { r.db.Close() }

func (r *replica) view() View { return NewView(r.db, space) }

func (r *replica) raw(cmd []byte) *Result {
	r.t.Helper()
	r.index++
	r.log = append(r.log, cmd)
	b := r.db.NewIndexedBatch()
	res := r.m.ApplyTo(b, space, r.index, cmd)
	if err := b.Commit(pebble.NoSync); err != nil {
		r.t.Fatalf("%v", err)
	}
	r.m.Applied(r.index)
	return res
}

func (r *replica) apply(c Command) *Result {
	r.t.Helper()
	if c.Who == (principal.Principal{}) {
		c.Who = asker(&c, max(r.root, 1))
	}
	return r.raw(wire.MustMarshal(c))
}

// asker is who asks in tests where nothing else is said: node n itself for
// what nodes do, else its root.
func asker(c *Command, n ids.Node) principal.Principal {
	if c.AddMember != nil || c.GrantJobs != 0 || len(c.PutJobs) > 0 || c.Login != nil || c.Note != nil {
		return principal.Of(n)
	}
	return principal.Principal{Node: n}
}

// do gives the command the next sequence number of client 1.
func (r *replica) do(c Command) *Result {
	r.t.Helper()
	r.seq++
	c.Client, c.Seq, c.Acked = 1, r.seq, r.seq
	return r.apply(c)
}

func (r *replica) must(c Command) *Result {
	r.t.Helper()
	res := r.do(c)
	if err := res.Refusal.Error("test", ""); err != nil {
		r.t.Fatalf("%+v: %v", c, err)
	}
	for _, j := range res.Jobs {
		if err := j.Error("test", ""); err != nil {
			r.t.Fatalf("%+v: %v", c, err)
		}
	}
	return res
}

func (r *replica) refuse(c Command, want errs.Class, why string) {
	r.t.Helper()
	was := r.content()
	res := r.do(c)
	if errs.Class(res.Refusal.Err) != want || !strings.Contains(res.Refusal.Why, why) {
		r.t.Fatalf("%+v: got %+v, want %v, %q", c, res, want, why)
	}
	if r.content() != was {
		r.t.Fatalf("%+v was refused and changed the state", c)
	}
}

func dump(t fataler, db pebble.Reader, but string) string {
	it, err := db.NewIter(nil)
	if err != nil {
		t.Fatalf("%v", err)
	}
	defer it.Close()
	var out strings.Builder
	for it.First(); it.Valid(); it.Next() {
		if k := it.Key(); strings.IndexByte(but, k[1]) < 0 {
			fmt.Fprintf(&out, "%c %s = %s\n", k[1], hex.EncodeToString(k[1:]), hex.EncodeToString(it.Value()))
		}
	}
	return out.String()
}

// content is the state without the clients' bookkeeping and the audit.
func (r *replica) content() string { return content(r.t, r.db) }

func content(t fataler, db pebble.Reader) string {
	var c Counters
	s := store{r: db, prefix: space.Key()}
	s.load(s.key(tagCounters), &c)
	c.Clients, c.Acts, c.Refusals, c.Index, c.Time = 0, 0, 0, 0, 0
	return dump(t, db, "orac") + fmt.Sprint(c)
}

func (r *replica) replay() {
	r.t.Helper()
	db := openDB(r.t)
	defer db.Close()
	b := db.NewIndexedBatch()
	for i, cmd := range r.log {
		var m Machine // knows nothing from before: what it remembers must not count
		m.ApplyTo(b, space, uint64(i+1), cmd)
		if i%5 == 4 || i == len(r.log)-1 {
			if err := b.Commit(pebble.NoSync); err != nil {
				r.t.Fatalf("%v", err)
			}
			b = db.NewIndexedBatch()
		}
	}
	if a, b := dump(r.t, r.db, ""), dump(r.t, db, ""); a != b {
		r.t.Fatalf("replicas differ\n%s\n---\n%s", a, b)
	}
}

func (r *replica) info() Info {
	r.t.Helper()
	i, err := r.view().Info()
	if err != nil {
		r.t.Fatalf("%v", err)
	}
	return i
}

func TestFounding(t *testing.T) {
	r := newReplica(t)
	defer r.close()
	if _, err := r.view().Info(); !errs.Has(err, errs.NotFound) {
		t.Fatal(err)
	}
	if res := r.do(Command{GrantJobs: 1}); errs.Class(res.Refusal.Err) != errs.Unavailable {
		t.Fatalf("%+v", res)
	}
	r = founded(t)
	defer r.close()
	r.refuse(Command{Init: &Init{Name: "other"}}, errs.Exists, "founded already")
	m, err := r.view().Member(1)
	if err != nil || m.Hostname != "alpha" || m.State != Active || m.Role != RoleStore || m.Joined != 1 || m.JoinedAt != 100 {
		t.Fatalf("%+v %v", m, err)
	}
	if i := r.info(); string(i.CACert) != "cert" || i.NextNode != 2 || i.NextJob != 1 || i.Revision != 1 {
		t.Fatalf("%+v", i)
	}
}

func TestJoining(t *testing.T) {
	r := founded(t)
	defer r.close()
	r.must(Command{AddToken: &Token{ID: TokenID{7}, Expires: 1000, Uses: 2, Role: RoleStore}})
	r.must(Command{AddToken: &Token{ID: TokenID{8}, Expires: 500, Uses: 1, Role: RoleClient}})
	r.refuse(Command{AddToken: &Token{ID: TokenID{8}, Uses: 1, Role: RoleClient}}, errs.Exists, "exists")
	r.refuse(Command{AddToken: &Token{ID: TokenID{9}, Role: RoleClient}}, errs.Invalid, "0 uses")
	join := func(token, key byte, now int64) Command {
		return Command{AddMember: &AddMember{Token: TokenID{token}, Key: KeyHash{key}, Hostname: fmt.Sprint("h", key), Addr: "a:1", Now: now}}
	}
	if n := r.must(join(7, 10, 999)).Node; n != 2 {
		t.Fatalf("node %d", n)
	}
	// Who only reads says the same, before and after.
	refuse := func(c Command, want errs.Class, why string) {
		t.Helper()
		if _, err := r.view().MayJoin(c.AddMember); !errs.Has(err, want) || !strings.Contains(err.Error(), why) {
			t.Fatalf("a reader: %v, want %q", err, why)
		}
		r.refuse(c, want, why)
	}
	for _, c := range []Command{join(7, 10, 9999), join(8, 12, 1)} { // the one again, the other for the first time
		if _, err := r.view().MayJoin(c.AddMember); err != nil {
			t.Fatal(err)
		}
	}
	refuse(join(9, 11, 1), errs.Unauthorized, "not one of this cluster")
	refuse(join(7, 11, 1000), errs.Unauthorized, "expired")
	c := join(8, 12, 1)
	c.AddMember.Role = RoleStore
	refuse(c, errs.Unauthorized, "role")
	if n := r.must(join(8, 12, 1)).Node; n != 3 {
		t.Fatalf("node %d", n)
	}
	refuse(join(8, 13, 1), errs.Unauthorized, "used up")
	if n := r.must(join(8, 12, 9999)).Node; n != 3 { // asked again, too late
		t.Fatalf("node %d", n)
	}
	m, err := r.view().Member(3)
	if err != nil || m.Role != RoleClient || m.State != Joining || m.Token != (TokenID{8}) {
		t.Fatalf("%+v %v", m, err)
	}
	tokens, err := r.view().Tokens()
	if err != nil || len(tokens) != 2 || tokens[0].Uses != 1 || tokens[1].Uses != 0 {
		t.Fatalf("%+v %v", tokens, err)
	}

	rev := r.info().Revision
	up := func(u UpdateMember) Command { return Command{UpdateMember: &u} }
	r.must(up(UpdateMember{Node: 3, State: Active}))
	r.must(up(UpdateMember{Node: 3, State: Active}))
	if got := r.info().Revision; got != rev+1 {
		t.Fatalf("revision %d after %d", got, rev)
	}
	r.must(up(UpdateMember{Node: 3, Addr: "b:2", Labels: map[string]string{"room": "attic"}}))
	r.refuse(up(UpdateMember{Node: 3, State: Joining}), errs.Invalid, "again")
	r.refuse(up(UpdateMember{Node: 9, State: Active}), errs.NotFound, "n9")
	r.must(up(UpdateMember{Node: 3, State: Removed}))
	r.must(up(UpdateMember{Node: 3, State: Removed}))
	r.refuse(up(UpdateMember{Node: 3, Addr: "c:3"}), errs.Stale, "removed")
	if m, err := r.view().Member(3); err != nil || m.Addr != "b:2" || m.Labels["room"] != "attic" || m.State.String() != "removed" {
		t.Fatalf("%+v %v", m, err)
	}
	// Its id does not come back, not even to the same machine.
	refuse(join(8, 12, 1), errs.Unauthorized, "used up")
	if n := r.must(join(7, 12, 1)).Node; n != 4 {
		t.Fatalf("node %d", n)
	}
	// n4 stores and may leave, and stay after all; whoever is then the last may not.
	r.must(up(UpdateMember{Node: 2, State: Removed}))
	r.must(up(UpdateMember{Node: 4, State: Active}))
	r.must(up(UpdateMember{Node: 4, State: Leaving}))
	r.refuse(up(UpdateMember{Node: 1, State: Leaving}), errs.Invalid, "last storing node")
	r.refuse(up(UpdateMember{Node: 1, State: Removed}), errs.Invalid, "last storing node")
	r.must(up(UpdateMember{Node: 4, State: Active}))
	r.refuse(up(UpdateMember{Node: 1, State: Left}), errs.Invalid, "leaves first")
	r.must(up(UpdateMember{Node: 1, State: Leaving}))
	r.refuse(up(UpdateMember{Node: 1, State: Joining}), errs.Invalid, "again")
	r.must(up(UpdateMember{Node: 1, State: Left}))
	r.root = 4
	r.refuse(up(UpdateMember{Node: 1, State: Active}), errs.Stale, "left")
	r.refuse(up(UpdateMember{Node: 4, State: Left}), errs.Invalid, "last storing node")
	r.must(Command{DropToken: &TokenID{7}})
	r.refuse(Command{DropToken: &TokenID{7}}, errs.NotFound, "no such token")
	if all, err := r.view().Members(); err != nil || len(all) != 4 {
		t.Fatalf("%+v %v", all, err)
	}
	for i := range MaxTokens + 10 {
		r.must(Command{AddToken: &Token{ID: TokenID{200, byte(i), byte(i >> 8)}, Expires: int64(10000 + i), Uses: 1, Role: RoleStore}})
	}
	if tokens, err := r.view().Tokens(); err != nil || len(tokens) != MaxTokens {
		t.Fatalf("%d tokens, %v", len(tokens), err)
	}
	r.replay()
}

func TestJobs(t *testing.T) {
	r := founded(t)
	defer r.close()
	if first := r.must(Command{GrantJobs: 100}).FirstJob; first != 1 {
		t.Fatalf("first job %d", first)
	}
	if first := r.must(Command{GrantJobs: 5000}).FirstJob; first != 101 {
		t.Fatalf("first job %d", first)
	}
	put := func(j Job) errs.Class {
		t.Helper()
		res := r.must2(Command{PutJobs: []Job{j}})
		return errs.Class(res.Jobs[0].Err)
	}
	job := Job{ID: 5, Incarnation: 1, Home: 1, Node: 2, Argv: [][]byte{[]byte("a\xff")}, Cwd: "/", State: JobRunning, Started: 3}
	with := func(inc ids.Incarnation, s JobState, code int32) Job {
		j := job
		j.Incarnation, j.State, j.ExitCode = inc, s, code
		return j
	}
	for i, c := range []struct {
		job  Job
		want errs.Class
	}{
		{with(1, JobRunning, 0), 0},
		{with(1, JobRunning, 0), 0},
		{with(2, JobRunning, 0), 0},
		{with(1, JobExited, 1), errs.Stale}, // an older life
		{with(2, JobLost, 0), 0},
		{with(2, JobRunning, 0), errs.Stale},
		{with(2, JobExited, 3), 0}, // it was seen to end after all
		{with(2, JobExited, 3), 0},
		{with(2, JobExited, 4), errs.Stale},
		{with(2, JobLost, 0), errs.Stale},
		{with(3, JobRunning, 0), errs.Stale}, // does not live again
		{Job{ID: 6000, Home: 1, State: JobRunning}, errs.Invalid},
		{Job{ID: 6}, errs.Invalid},
		{Job{ID: 6, Home: 1, State: JobRunning, Receipt: make([]byte, MaxReceipt+1)}, errs.TooLarge},
	} {
		if got := put(c.job); got != c.want {
			t.Fatalf("%d: %+v: got %v, want %v", i, c.job, got, c.want)
		}
	}
	j, err := r.view().Job(5)
	if err != nil || j.State != JobExited || j.ExitCode != 3 || string(j.Argv[0]) != "a\xff" || j.FinishedAt == 0 {
		t.Fatalf("%+v %v", j, err)
	}
	if i := r.info(); i.Unfinished != 0 || i.Finished != 1 {
		t.Fatalf("%+v", i)
	}
	put(Job{ID: 6, Home: 1, State: JobRunning})
	for id := ids.Job(200); id < 200+MaxFinished+50; {
		var jobs []Job
		for range 50 {
			jobs = append(jobs, Job{ID: id, Home: 1, State: JobKilled, Signal: 9})
			id++
		}
		r.must(Command{PutJobs: jobs})
	}
	all, err := r.view().Jobs()
	if err != nil || len(all) != MaxFinished+1 || all[0].ID != 6 || all[1].ID != 250 {
		t.Fatalf("%d jobs, %+v %v", len(all), all[:2], err)
	}
	if i := r.info(); i.Unfinished != 1 || i.Finished != MaxFinished {
		t.Fatalf("%+v", i)
	}
	if _, err := r.view().Job(5); !errs.Has(err, errs.NotFound) {
		t.Fatal(err)
	}
	r.replay()
}

// must2 is must for commands whose single jobs may be refused.
func (r *replica) must2(c Command) *Result {
	r.t.Helper()
	res := r.do(c)
	if res.Refusal.refused() {
		r.t.Fatalf("%+v: %+v", c, res)
	}
	return res
}

// TestJobsOnlyGoForward puts records of one job in any order: what the record
// says never goes back, and its counts hold.
func TestJobsOnlyGoForward(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		r := founded(rt)
		defer r.close()
		r.must(Command{GrantJobs: 4})
		last := map[ids.Job]Job{}
		for range rapid.IntRange(1, 30).Draw(rt, "puts") {
			j := Job{
				ID: ids.Job(rapid.IntRange(1, 3).Draw(rt, "job")), Incarnation: ids.Incarnation(rapid.IntRange(1, 3).Draw(rt, "incarnation")), Home: 1,
				State: JobState(rapid.IntRange(1, 4).Draw(rt, "state")), ExitCode: int32(rapid.IntRange(0, 1).Draw(rt, "code")),
			}
			r.must2(Command{PutJobs: []Job{j}})
			var unfinished, finished uint64
			all, err := r.view().Jobs()
			if err != nil {
				rt.Fatalf("%v", err)
			}
			for _, now := range all {
				was, known := last[now.ID]
				seen := was.State == JobExited || was.State == JobKilled
				if known && (now.Incarnation < was.Incarnation || seen && now.FinishedAt != was.FinishedAt ||
					now.Incarnation == was.Incarnation && was.State == JobLost && now.State == JobRunning) {
					rt.Fatalf("went from %+v to %+v", was, now)
				}
				last[now.ID] = now
				if now.State.Finished() {
					finished++
				} else {
					unfinished++
				}
			}
			if i := r.info(); i.Finished != finished || i.Unfinished != unfinished {
				rt.Fatalf("%+v, want %d and %d", i, finished, unfinished)
			}
			if n := strings.Count(r.content(), "f 66"); uint64(n) != finished {
				rt.Fatalf("%d keys of finished jobs, want %d", n, finished)
			}
		}
		r.replay()
	})
}

func TestExactlyOnce(t *testing.T) {
	r := founded(t)
	defer r.close()
	grant := func(client, seq, acked uint64) *Result {
		return r.apply(Command{Client: client, Seq: seq, Acked: acked, GrantJobs: 10})
	}
	first := grant(5, 1, 0)
	if again := grant(5, 1, 0); !bytes.Equal(wire.MustMarshal(again), wire.MustMarshal(first)) || r.info().NextJob != 11 {
		t.Fatalf("%+v, want %+v", again, first)
	}
	if grant(6, 1, 0).FirstJob != 11 || grant(5, 3, 3).FirstJob != 21 {
		t.Fatal("other commands")
	}
	if res := grant(5, 1, 0); errs.Class(res.Refusal.Err) != errs.Stale {
		t.Fatalf("%+v", res)
	}
	if res := grant(5, 3+Window, 0); errs.Class(res.Refusal.Err) != errs.Busy {
		t.Fatalf("%+v", res)
	}
	r.replay()
}

// TestClientsAreTheirNodes: a number is that of the node that speaks. A client
// node that has heard of another's is not shown its answers, cannot have its
// commands taken for repeats, and takes up room of its own only.
func TestClientsAreTheirNodes(t *testing.T) {
	r := people(t)
	defer r.close()
	put := func(who string, client, seq uint64, key string) *Result {
		return r.apply(Command{Who: everybody[who], Client: client, Seq: seq, Acked: seq - min(seq-1, 8), Put: &Put{Key: key}})
	}
	secret := Command{Client: 77, Seq: 1, Who: principal.Of(1), Login: &Login{ID: LoginID{5}, Node: 2, Now: 1}}
	answer := r.apply(secret)
	if answer.User == nil {
		t.Fatalf("%+v", answer)
	}
	for _, who := range []string{"client", "ana of client", "unproven ana", "root of removed", "nobody", "witness", "other store"} {
		c := secret
		c.Who = everybody[who]
		if who == "other store" { // it may have n2 log in again, for its answer may be lost; not another
			c.Login = &Login{ID: LoginID{5}, Node: 3, Now: 1}
		}
		if who == "nobody" {
			if res := r.raw(wire.MustMarshal(c)); res.User != nil || errs.Class(res.Refusal.Err) != errs.Unauthorized {
				t.Errorf("nobody got %+v", res)
			}
		} else if res := r.apply(c); res.User != nil || !res.Refusal.refused() {
			t.Errorf("%s got %+v", who, res)
		}
	}
	for seq := range uint64(20) { // whatever it says of the number
		if res := put("ana of client", 77, seq+1, "user/1000/x"); res.Refusal.refused() {
			t.Fatalf("%+v", res)
		}
	}
	if again := r.apply(secret); !bytes.Equal(wire.MustMarshal(again), wire.MustMarshal(answer)) {
		t.Fatalf("%+v, was %+v", again, answer)
	}
	if res := put("root of store", 77, 2, "settings/b"); res.Refusal.refused() || res.Mod != r.info().Revision {
		t.Fatalf("taken for a repeat: %+v", res)
	}

	// Only so many of each node are kept, the longest silent go.
	of := func(node ids.Node) (n, results int) {
		for tag, count := range map[byte]*int{tagClient: &n, tagResult: &results} {
			s := store{r: r.db, prefix: space.Key()}
			lo := s.key(tag, uint64(node))
			s.scan(lo, after(lo), func([]byte, []byte) bool { *count++; return true })
		}
		return n, results
	}
	n1, results1 := of(1)
	for c := range uint64(3 * OtherClients) {
		put("ana of client", 1000+c, 1, "user/1000/x")
		put("boss of client", 77, 21+c, "user/1000/x") // this one is never silent
	}
	if n, results := of(2); n != OtherClients || results > OtherClients+8 {
		t.Errorf("n2 has %d clients with %d results", n, results)
	}
	if n, results := of(1); n != n1 || results != results1 {
		t.Errorf("n1 has %d clients with %d results, had %d with %d", n, results, n1, results1)
	}
	again := put("boss of client", 77, 20+3*OtherClients, "user/1000/x")
	if last := r.log[len(r.log)-1]; !bytes.Equal(wire.MustMarshal(r.raw(last)), wire.MustMarshal(again)) || again.Index >= r.index-1 {
		t.Errorf("the client that speaks was forgotten: %+v", again)
	}
	for c := range uint64(StoreClients + 5) {
		put("other store", 2000+c, 1, "settings/c") // refused: the node itself is no administrator
		put("root of other store", 3000+c, 1, "settings/c")
	}
	if n, _ := of(3); n != StoreClients {
		t.Errorf("n3 has %d clients", n)
	}
	ahead := Command{Who: everybody["ana of client"], Client: 77, Seq: 500 + OtherWindow, Acked: 500, Put: &Put{Key: "user/1000/x"}}
	if res := r.apply(ahead); errs.Class(res.Refusal.Err) != errs.Busy {
		t.Errorf("%+v", res)
	}
	// Who may not is not met.
	if n, _ := of(4); n != 0 {
		t.Errorf("a removed node has %d clients", n)
	}
	if n, _ := of(5); n != 0 {
		t.Errorf("a witness that was refused has %d clients", n)
	}
	total := 0
	for n := range ids.Node(10) {
		m, _ := of(n)
		total += m
	}
	if i := r.info(); i.Clients != uint64(total) {
		t.Errorf("%d clients counted, %d there", i.Clients, total)
	}
	r.must(Command{UpdateMember: &UpdateMember{Node: 2, State: Removed}})
	if n, results := of(2); n+results != 0 {
		t.Errorf("a node that was put out has %d clients with %d results", n, results)
	}
	r.replay()
}

// TestRefusalsOfPartsAreShort: a command of many refused parts does not make the
// record keep as many sentences.
func TestRefusalsOfPartsAreShort(t *testing.T) {
	r := people(t)
	defer r.close()
	ps := make([]Put, MaxBatch)
	for i := range ps {
		ps[i].Key = fmt.Sprintf("user/2000/%s%d", strings.Repeat("x", 400), i)
	}
	ps[0].Key = "user/1000/mine"
	res := r.must2(Command{Who: everybody["ana of client"], Batch: ps})
	if b := wire.MustMarshal(res); len(b) > 16*MaxBatch {
		t.Errorf("a result of %d bytes", len(b))
	}
	if k := res.Keys; k[0].Refusal.refused() || k[1].Refusal.Why == "" || k[2].Refusal != (Refusal{Err: uint8(errs.Permission)}) || k[MaxBatch-1].Refusal.Err == 0 {
		t.Errorf("%+v", k[:3])
	}
	if err := res.Keys[2].Refusal.Error("put", "x"); !errs.Has(err, errs.Permission) || err.Error() != "put x: not permitted" {
		t.Error(err)
	}
	js := make([]Job, MaxPut)
	if res = r.must2(Command{PutJobs: js}); res.Jobs[0].Why == "" || res.Jobs[1] != (Refusal{Err: uint8(errs.Invalid)}) {
		t.Errorf("%+v", res.Jobs[:2])
	}
}

func TestChangesAreTold(t *testing.T) {
	r := founded(t)
	defer r.close()
	var told []uint64
	r.m.OnChange = func(rev uint64) { told = append(told, rev) }
	r.must(Command{GrantJobs: 1})
	r.refuse(Command{DropToken: &TokenID{}}, errs.NotFound, "")
	r.must(Command{GrantJobs: 1})
	r.m.Applied(r.index + 100) // a snapshot was installed
	if fmt.Sprint(told) != "[2 3 0]" {
		t.Fatalf("told %v", told)
	}
}

func TestBadCommands(t *testing.T) {
	r := founded(t)
	defer r.close()
	for _, c := range []struct {
		what string
		cmd  []byte
		want errs.Class
	}{
		{"nothing", nil, errs.Corrupt},
		{"garbage", []byte{0xff}, errs.Corrupt},
		{"empty", wire.MustMarshal(Command{Client: 1, Seq: 99}), errs.Invalid},
		{"two things", wire.MustMarshal(Command{Client: 1, Seq: 99, GrantJobs: 1, DropToken: &TokenID{}}), errs.Invalid},
		{"no client", wire.MustMarshal(Command{Seq: 99, GrantJobs: 1}), errs.Invalid},
		{"no sequence", wire.MustMarshal(Command{Client: 1, GrantJobs: 1}), errs.Invalid},
		{"too long", make([]byte, MaxCommand+1), errs.TooLarge},
	} {
		was := dump(t, r.db, "")
		if res := r.raw(c.cmd); errs.Class(res.Refusal.Err) != c.want {
			t.Errorf("%s: %+v, want %v", c.what, res, c.want)
		}
		if dump(t, r.db, "") != was {
			t.Errorf("%s changed the state", c.what)
		}
	}
	if res := r.apply(Command{Barrier: true}); res.Refusal.Err != 0 || res.Revision != 1 {
		t.Fatalf("%+v", res)
	}
	r.refuse(Command{GrantJobs: MaxGrant + 1}, errs.TooLarge, "job ids")
	r.refuse(Command{PutJobs: make([]Job, MaxPut+1)}, errs.TooLarge, "jobs")
	r.refuse(Command{AddMember: &AddMember{Hostname: strings.Repeat("h", MaxText+1)}}, errs.TooLarge, "host name")
}

func TestDamagedStateIsAnError(t *testing.T) {
	r := founded(t)
	defer r.close()
	s := store{prefix: space.Key()}
	if err := r.db.Set(s.key(tagMember, 1), []byte{0xff}, nil); err != nil {
		t.Fatal(err)
	}
	if _, err := r.view().Members(); !errs.Has(err, errs.Corrupt) {
		t.Fatal(err)
	}
	defer func() {
		if err, ok := recover().(error); !ok || !errors.Is(err, errs.Corrupt.Err()) {
			t.Fatalf("Apply went on over a damaged state: %v", err)
		}
	}()
	r.do(Command{UpdateMember: &UpdateMember{Node: 1, Addr: "x"}})
}

func story(t fataler) *replica {
	r := founded(t)
	r.must(Command{AddToken: &Token{ID: TokenID{7}, Expires: 1000, Uses: 2, Role: RoleStore}})
	r.must(Command{AddMember: &AddMember{Token: TokenID{7}, Key: KeyHash{2}, Hostname: "beta", Addr: "beta:7400", Labels: map[string]string{"b": "2", "a": "1"}, Now: 200}})
	r.must(Command{UpdateMember: &UpdateMember{Node: 2, State: Active}})
	r.must(Command{GrantJobs: 64})
	r.must(Command{PutJobs: []Job{
		{ID: 1, Incarnation: 1, Home: 1, Node: 2, User: "ana", Uid: 1000, Argv: [][]byte{[]byte("make"), []byte("-j8")}, Cwd: "/unum", State: JobRunning, Started: 5, Receipt: []byte{1}},
		{ID: 2, Incarnation: 1, Home: 1, Node: 2, Argv: [][]byte{[]byte("true")}, Cwd: "/", State: JobExited, ExitCode: 1, Detached: true, Started: 5, Ended: 6, Name: "t"},
	}})
	ana := principal.Principal{Node: 1, UID: 1000}
	r.must(Command{Now: 300, PutUser: &User{Name: "ana", UID: 1000, GID: 100, Groups: []uint32{10, 20}}})
	r.must(Command{Now: 301, PutUser: &User{Name: "old", UID: 1001, GID: 100, Admin: true, Disabled: true}})
	r.must(Command{Now: 302, DropUser: "old"})
	r.must(Command{Now: 303, AddLogin: &LoginToken{ID: LoginID{5}, User: "ana", Expires: 1000}})
	r.must(Command{Now: 304, AddLogin: &LoginToken{ID: LoginID{6}, User: "ana", Expires: 1000}})
	r.must(Command{Now: 305, Login: &Login{ID: LoginID{5}, Node: 2, Now: 305}})
	r.must(Command{Now: 306, Put: &Put{Key: "settings/colour", Value: []byte("red")}})
	r.must(Command{Now: 307, Who: ana, Put: &Put{Key: "user/1000/a", Value: []byte("1"), Expect: new(uint64)}})
	r.must(Command{Now: 308, Who: ana, Batch: []Put{{Key: "user/1000/a", Value: []byte("2")}, {Key: "user/1000/b/c", Value: []byte("3")}}})
	r.must(Command{Now: 309, Who: ana, Delete: &Delete{Key: "user/1000/b/c"}})
	r.do(Command{Now: 310, Who: ana, Put: &Put{Key: "settings/colour", Value: []byte("blue")}})
	r.must(Command{Now: 311, Note: &Note{About: principal.Principal{Node: 9}, What: "propose", On: "n9", Err: uint8(errs.Unauthorized), Why: "forged"}})
	return r
}

func TestLayoutIsGolden(t *testing.T) {
	r := story(t)
	defer r.close()
	const file = "testdata/layout.golden"
	got := []byte(dump(t, r.db, ""))
	if *update {
		if err := os.WriteFile(file, got, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Fatalf("the state's format changed: got\n%s\nwant\n%s", got, want)
	}
	r.replay()
}

func FuzzCommand(f *testing.F) {
	r := story(f)
	for _, cmd := range r.log {
		f.Add(cmd)
	}
	f.Cleanup(r.close)
	f.Fuzz(func(t *testing.T, cmd []byte) {
		b := r.db.NewIndexedBatch() // never committed: each input meets the same state
		defer b.Close()
		var m Machine
		res := m.ApplyTo(b, space, r.index+1, cmd)
		if _, err := wire.Marshal(res); err != nil {
			t.Fatalf("a result that cannot be encoded: %v", err)
		}
		if c, err := DecodeCommand(cmd); err == nil {
			if _, err := DecodeCommand(wire.MustMarshal(c)); err != nil {
				t.Fatalf("encoded again it is refused: %v", err)
			}
		} else if res.Refusal.Err == 0 {
			t.Fatalf("%v, and was done", err)
		}
	})
}

// FuzzState puts any value, or any key, into the state: whoever reads it gets an
// error of class Corrupt or what is there.
func FuzzState(f *testing.F) {
	r := story(f)
	f.Cleanup(r.close)
	it, err := r.db.NewIter(nil)
	if err != nil {
		f.Fatal(err)
	}
	prefix := space.Key()
	for ok := it.First(); ok; ok = it.Next() {
		if k, ok := bytes.CutPrefix(it.Key(), prefix); ok {
			f.Add(bytes.Clone(k), bytes.Clone(it.Value()))
			f.Add(bytes.Clone(k[:len(k)-1]), bytes.Clone(it.Value()))
			f.Add(bytes.Clone(k), []byte{0xff})
		}
	}
	if err := it.Close(); err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, key, value []byte) {
		b := r.db.NewIndexedBatch()
		defer b.Close()
		if err := b.Set(append(slices.Clone(prefix), key...), value, nil); err != nil {
			t.Fatal(err)
		}
		v := NewView(b, space)
		reads := map[string]func() error{
			"info":     func() error { _, err := v.Info(); return err },
			"revision": func() error { _, err := v.Revision(); return err },
			"members":  func() error { _, err := v.Members(); return err },
			"member":   func() error { _, err := v.Member(1); return err },
			"jobs":     func() error { _, err := v.Jobs(); return err },
			"job":      func() error { _, err := v.Job(1); return err },
			"tokens":   func() error { _, err := v.Tokens(); return err },
			"users":    func() error { _, err := v.Users(); return err },
			"user":     func() error { _, err := v.User("ana"); return err },
			"logins":   func() error { _, err := v.Logins(); return err },
			"key":      func() error { _, err := v.Get("settings/colour"); return err },
			"keys":     func() error { _, _, err := v.List("user/1000/", "", 100); return err },
			"changes":  func() error { _, err := v.Changes(0, 100); return err },
			"oldest":   func() error { _, err := v.Oldest(); return err },
			"audit":    func() error { _, err := v.Audit(0, 100); return err },
			"rights":   func() error { _, err := v.Rights(principal.Principal{Node: 1, UID: 1000}); return err },
		}
		for name, read := range reads {
			switch err := read(); errs.ClassOf(err) {
			case errs.Corrupt, errs.NotFound, errs.Unauthorized, errs.Stale:
			default:
				if err != nil {
					t.Fatalf("%s: class %v: %v", name, errs.ClassOf(err), err)
				}
			}
		}
	})
}
