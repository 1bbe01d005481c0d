package record

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"maps"
	"os"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/cockroachdb/pebble/v2"
	"pgregory.net/rapid"

	"github.com/unum-os/unum/internal/errs"
	"github.com/unum-os/unum/internal/ids"
	"github.com/unum-os/unum/internal/principal"
	"github.com/unum-os/unum/internal/wire"
)

func at(rev uint64) *uint64 { return &rev }

func TestKeys(t *testing.T) {
	r := founded(t)
	defer r.close()
	ana := principal.Principal{Node: 1, UID: 1000}
	put := func(key, value string, expect *uint64) Command {
		return Command{Who: ana, Put: &Put{Key: key, Value: []byte(value), Expect: expect}}
	}
	del := func(key string, expect *uint64) Command {
		return Command{Who: ana, Delete: &Delete{Key: key, Expect: expect}}
	}
	a := "user/1000/a"
	first := r.must(put(a, "1", at(0)))
	if first.Mod != 2 || first.Revision != 2 {
		t.Fatalf("%+v", first)
	}
	if again := r.raw(r.log[len(r.log)-1]); again.Refusal.refused() || again.Mod != first.Mod || again.Index != first.Index {
		t.Fatalf("%+v", again)
	}
	r.refuse(put(a, "2", at(0)), errs.Exists, "since revision 2")
	r.refuse(put(a, "2", at(1)), errs.Stale, "revision 2, not 1")
	r.refuse(put("user/1000/none", "2", at(1)), errs.NotFound, "no key")
	r.refuse(del(a, at(7)), errs.Stale, "revision 2")
	r.refuse(del(a, at(0)), errs.Exists, "")
	r.refuse(del("user/1000/none", nil), errs.NotFound, "no key")
	if res := r.do(put(a, "2", at(9))); res.Mod != 2 {
		t.Fatalf("the refusal does not say which revision: %+v", res)
	}
	r.must(put(a, "2", at(2)))
	r.must(put(a, "3", nil))
	k, err := r.view().Get(a)
	if err != nil || string(k.Value) != "3" || k.Create != 2 || k.Mod != 4 || k.Version != 3 || k.Owner != 1000 || k.Key != a {
		t.Fatalf("%+v %v", k, err)
	}
	if res := r.must(del(a, at(4))); res.Mod != 0 || res.Revision != 5 {
		t.Fatalf("%+v", res)
	}
	if _, err := r.view().Get(a); !errs.Has(err, errs.NotFound) {
		t.Fatal(err)
	}
	r.must(put(a, "4", at(0)))
	if k, err := r.view().Get(a); err != nil || k.Create != 6 || k.Version != 1 {
		t.Fatalf("%+v %v", k, err)
	}
	for _, key := range []string{"user/1000/", "user/1000//a", "user/1000/../a", "user/1000/.", "user/1000/a b", "user/1000/\x00", "user/1000/\u00fc", "user/1000/a/", "/user/1000/a", "", "user/1000/a\n"} {
		r.refuse(put(key, "", nil), errs.Invalid, "key")
	}
	r.refuse(put("user/1000/"+strings.Repeat("a", MaxKey-9), "", nil), errs.TooLong, "513 bytes")
	r.must(put("user/1000/"+strings.Repeat("a", MaxKey-10), "", nil))
	r.refuse(put(a, strings.Repeat("a", MaxValue+1), nil), errs.TooLarge, "value")
	r.refuse(Command{Batch: make([]Put, MaxBatch+1)}, errs.TooLarge, "puts")
	for i := range 25 {
		r.must(put(fmt.Sprintf("user/1000/l/%02d", i), strings.Repeat("a", MaxValue), nil))
	}
	r.must(Command{Put: &Put{Key: "user/10000/x"}})
	list := func(prefix, from string, limit int) (out []string, more bool) {
		t.Helper()
		ks, more, err := r.view().List(prefix, from, limit)
		if err != nil {
			t.Fatal(err)
		}
		for _, k := range ks {
			out = append(out, strings.TrimPrefix(k.Key, "user/1000/"))
		}
		return out, more
	}
	for i, c := range []struct {
		prefix, from string
		limit        int
		want         string
		more         bool
	}{
		{"user/1000/l/", "", 2, "[l/00 l/01]", true},
		{"user/1000/l/", "user/1000/l/22", 10, "[l/23 l/24]", false},
		{"user/1000/l/", "user/1000/l/24", 10, "[]", false},
		{"user/1000/l/", "user/1000/m", 10, "[]", false},
		{"user/1000/l/", "user/1000/a", 1, "[l/00]", true},
		{"user/10000/", "", 10, "[user/10000/x]", false},
		{"settings/", "", 10, "[]", false},
		{"user/1000/l/", "", 0, "[]", true},
	} {
		if got, more := list(c.prefix, c.from, c.limit); fmt.Sprint(got) != c.want || more != c.more {
			t.Errorf("%d: %v %v", i, got, more)
		}
	}
	r.replay()
}

func TestKeyQuotas(t *testing.T) {
	r := founded(t)
	defer r.close()
	ana, bob := principal.Principal{Node: 1, UID: 1000}, principal.Principal{Node: 1, UID: 1001}
	var ps []Put
	for i := range MaxKeys {
		ps = append(ps, Put{Key: fmt.Sprintf("user/1000/%d", i)})
	}
	r.must(Command{Who: ana, Batch: ps})
	more := Command{Who: ana, Put: &Put{Key: "user/1000/more"}}
	r.refuse(more, errs.NoSpace, "1001 keys")
	more.Who = principal.Principal{Node: 1} // an administrator writes into the same quota
	r.refuse(more, errs.NoSpace, "1001 keys")
	r.must(Command{Who: bob, Put: &Put{Key: "user/1001/x"}})
	r.must(Command{Who: ana, Put: &Put{Key: "user/1000/7", Value: []byte("over what exists")}})
	r.must(Command{Who: ana, Delete: &Delete{Key: "user/1000/7"}})
	r.must(Command{Who: ana, Put: more.Put})

	big := make([]byte, MaxValue)
	n := 0
	for ; ; n++ {
		res := r.do(Command{Who: bob, Put: &Put{Key: fmt.Sprintf("user/1001/%d", n), Value: big}})
		if res.Refusal.refused() {
			if errs.Class(res.Refusal.Err) != errs.NoSpace {
				t.Fatalf("%+v", res)
			}
			break
		}
	}
	if n != 255 { // 256 values and their keys are more than 16 MiB
		t.Fatalf("%d values of 64 KiB", n)
	}
	r.must(Command{Who: bob, Put: &Put{Key: "user/1001/0", Value: []byte("less")}})
	r.must(Command{Who: bob, Put: &Put{Key: "user/1001/255", Value: make([]byte, MaxValue-100)}})
	r.replay()
}

// watched returns what of the state is watched, by event.
func watched(t fataler, db pebble.Reader) map[Event]string {
	out := map[Event]string{}
	it, err := db.NewIter(nil)
	if err != nil {
		t.Fatalf("%v", err)
	}
	defer it.Close()
	for it.First(); it.Valid(); it.Next() {
		k := it.Key()
		rest := k[2:]
		var e Event
		switch k[1] {
		case tagInfo:
			e = Event{Kind: KindInfo}
		case tagMember:
			e = Event{Kind: KindMember, Key: fmt.Sprint("n", binary.BigEndian.Uint64(rest))}
		case tagToken:
			e = Event{Kind: KindToken, Key: hex.EncodeToString(rest)}
		case tagKey:
			e = Event{Kind: KindKey, Key: string(rest)}
		case tagUserName:
			s := store{r: db, prefix: space.Key()}
			u := s.user(string(rest))
			out[Event{Kind: KindUser, Key: string(rest)}] = fmt.Sprintf("%+v", *u)
			continue
		case tagLogin:
			e = Event{Kind: KindLogin, Key: hex.EncodeToString(rest)}
		case tagJob:
			e = Event{Kind: KindJob, Key: fmt.Sprint(binary.BigEndian.Uint64(rest))}
		default:
			continue
		}
		out[e] = string(it.Value())
	}
	return out
}

// follower is a watcher that checks after each command that the changes told
// are those that happened, and that nothing else was touched.
type follower struct {
	r    *replica
	rev  uint64
	seen map[Event]string
}

func (f *follower) check() {
	f.r.t.Helper()
	changes, err := f.r.view().Changes(f.rev, 1<<20)
	if err != nil {
		f.r.t.Fatalf("%v", err)
	}
	now := watched(f.r.t, f.r.db)
	told := map[Event]bool{} // and whether it is gone since
	for i, e := range changes {
		if i == 0 && e.Revision <= f.rev || i > 0 && e.Revision < changes[i-1].Revision {
			f.r.t.Fatalf("%+v is out of order in %+v", e, changes)
		}
		told[Event{Kind: e.Kind, Key: e.Key}] = e.Gone
	}
	if n := len(changes); n > 0 {
		f.rev = changes[n-1].Revision
	}
	for id, gone := range told {
		if _, exists := now[id]; id.Kind != KindGrant && exists == gone {
			f.r.t.Fatalf("told of %v %q, gone %v; exists %v", id.Kind, id.Key, gone, exists)
		}
	}
	for id, v := range now {
		if _, is := told[id]; f.seen[id] != v && !is {
			f.r.t.Fatalf("%v %q changed and nobody was told", id.Kind, id.Key)
		}
	}
	for id := range f.seen {
		_, exists := now[id]
		if _, is := told[id]; !exists && !is {
			f.r.t.Fatalf("%v %q went and nobody was told", id.Kind, id.Key)
		}
	}
	if f.rev != f.r.info().Revision {
		f.r.t.Fatalf("told up to revision %d of %d", f.rev, f.r.info().Revision)
	}
	f.seen = now
}

// TestModel does what it likes to keys, users, logins, tokens, members and jobs:
// keys are as in a map, their usage is their sum, and the changes told are those
// that happened; replicas that remember nothing come to the same state.
func TestModel(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		r := people(rt)
		defer r.close()
		f := &follower{r: r}
		f.check()
		model := map[string]Key{}
		for _, p := range []string{"settings/", "user/"} {
			ks, _, err := r.view().List(p, "", 100)
			if err != nil {
				rt.Fatalf("%v", err)
			}
			for _, k := range ks {
				model[k.Key] = k
			}
		}
		keys := []string{"settings/a", "settings/b", "user/1000/a", "user/1000/b/c", "user/2000/a", "nowhere", "user/1000/"}
		who := func() principal.Principal {
			return everybody[rapid.SampledFrom([]string{"root of store", "ana of client", "boss of store", "client"}).Draw(rt, "who")]
		}
		key := func() string { return rapid.SampledFrom(keys).Draw(rt, "key") }
		value := func() []byte { return bytes.Repeat([]byte("v"), rapid.IntRange(0, 3).Draw(rt, "size")) }
		expect := func(k string) *uint64 {
			switch rapid.IntRange(0, 3).Draw(rt, "expect") {
			case 0:
				return at(model[k].Mod)
			case 1:
				return at(uint64(rapid.IntRange(0, 60).Draw(rt, "rev")))
			}
			return nil
		}
		allowed := func(who principal.Principal, k string) bool {
			switch {
			case k == "nowhere" || k == "user/1000/" || who.System:
				return false
			case who.UID != 1000:
				return true
			}
			return strings.HasPrefix(k, "user/1000/")
		}
		rev := r.info().Revision
		put := func(w principal.Principal, p Put) uint64 {
			was := model[p.Key]
			if !allowed(w, p.Key) || p.Expect != nil && *p.Expect != was.Mod {
				return 0
			}
			rev++
			k := Key{Key: p.Key, Value: p.Value, Create: was.Create, Mod: rev, Version: was.Version + 1, Owner: was.Owner}
			if was.Mod == 0 {
				k.Create = rev
				fmt.Sscanf(p.Key, "user/%d/", &k.Owner)
			}
			model[p.Key] = k
			return rev
		}
		for range rapid.IntRange(1, 25).Draw(rt, "commands") {
			w := who()
			switch rapid.IntRange(0, 9).Draw(rt, "what") {
			case 0, 1, 2:
				p := Put{Key: key(), Value: value()}
				p.Expect = expect(p.Key)
				res, want := r.do(Command{Who: w, Put: &p}), put(w, p)
				if (want != 0) == res.Refusal.refused() || want != 0 && res.Mod != want {
					rt.Fatalf("%v puts %+v: %+v, want %d", w, p, res, want)
				}
			case 3, 4:
				d := Delete{Key: key()}
				d.Expect = expect(d.Key)
				was := model[d.Key]
				ok := allowed(w, d.Key) && was.Mod != 0 && (d.Expect == nil || *d.Expect == was.Mod)
				if res := r.do(Command{Who: w, Delete: &d}); ok == res.Refusal.refused() {
					rt.Fatalf("%v deletes %+v: %+v", w, d, res)
				}
				if ok {
					rev++
					delete(model, d.Key)
				}
			case 5, 6:
				var ps []Put
				for range rapid.IntRange(1, 6).Draw(rt, "puts") {
					p := Put{Key: key(), Value: value()}
					p.Expect = expect(p.Key)
					ps = append(ps, p)
				}
				res := r.do(Command{Who: w, Batch: ps})
				if len(res.Keys) != len(ps) {
					rt.Fatalf("%+v", res)
				}
				for i, p := range ps {
					if want := put(w, p); (want != 0) == res.Keys[i].Refusal.refused() || want != 0 && res.Keys[i].Mod != want {
						rt.Fatalf("%v puts %+v: %+v, want %d", w, p, res.Keys[i], want)
					}
				}
			case 7:
				r.do(Command{Who: w, PutUser: &User{Name: rapid.SampledFrom([]string{"ana", "eve", "new"}).Draw(rt, "name"), UID: rapid.SampledFrom([]uint32{1000, 5, 6}).Draw(rt, "uid")}})
			case 8:
				r.do(rapid.SampledFrom([]Command{
					{DropUser: "eve"}, {DropUser: "new"},
					{AddLogin: &LoginToken{ID: LoginID{1}, User: "eve", Expires: 5}},
					{Login: &Login{ID: LoginID{1}, Node: 2, Now: 1}},
					{AddToken: &Token{ID: TokenID{1}, Uses: 1, Role: RoleStore}},
					{DropToken: &TokenID{1}},
					{AddMember: &AddMember{Token: TokenID{1}, Key: KeyHash{77}, Hostname: "h", Addr: "a"}},
				}).Draw(rt, "other"))
			case 9:
				j := Job{ID: ids.Job(rapid.IntRange(1, 4).Draw(rt, "job")), Home: 1, Node: 1, State: JobState(rapid.IntRange(1, 4).Draw(rt, "state"))}
				r.do(Command{PutJobs: []Job{j, j}})
			}
			rev = r.info().Revision
			f.check()
		}
		var got []Key
		for from := ""; ; { // in pages
			ks, more, err := r.view().List("", from, 2)
			if err != nil {
				rt.Fatalf("%v", err)
			}
			if got = append(got, ks...); !more {
				break
			}
			from = ks[len(ks)-1].Key
		}
		uses := map[string]usage{}
		for i, name := range slices.Sorted(maps.Keys(model)) {
			want := model[name]
			if i >= len(got) || fmt.Sprintf("%+v", got[i]) != fmt.Sprintf("%+v", want) {
				rt.Fatalf("got %+v, want %+v", got, want)
			}
			u := uint64(want.Owner)
			if strings.HasPrefix(name, "settings/") {
				u = settingsUse
			}
			k := hex.EncodeToString(binary.BigEndian.AppendUint64(nil, u))
			uses[k] = usage{uses[k].Keys + 1, uses[k].Bytes + uint64(len(name)+len(want.Value))}
		}
		if len(got) != len(model) {
			rt.Fatalf("%d keys, want %d", len(got), len(model))
		}
		s := store{r: r.db, prefix: space.Key()}
		s.scan(s.key(tagUsage), after(s.key(tagUsage)), func(k, v []byte) bool {
			var u usage
			s.decode(k, v, &u)
			if name := hex.EncodeToString(k); uses[name] != u {
				rt.Fatalf("usage %s is %+v, want %+v", name, u, uses[name])
			} else {
				delete(uses, name)
			}
			return true
		})
		if len(uses) != 0 {
			rt.Fatalf("usage %v is not counted", uses)
		}
		r.replay()
	})
}

// TestFollowingEverything: the story of the golden file, and the bounds that
// make jobs and tokens go, are told as changes.
func TestFollowingEverything(t *testing.T) {
	r := story(t)
	defer r.close()
	f := &follower{r: r}
	f.check()
	for i := range MaxTokens + 2 {
		r.must(Command{AddToken: &Token{ID: TokenID{200, byte(i), byte(i >> 8)}, Expires: int64(10000 + i), Uses: 1, Role: RoleStore}})
	}
	f.check()
	r.must(Command{GrantJobs: 2 * MaxFinished})
	for id := ids.Job(100); id < 100+MaxFinished+5; id += 5 {
		var jobs []Job
		for i := range ids.Job(5) {
			jobs = append(jobs, Job{ID: id + i, Home: 1, State: JobExited})
		}
		r.must(Command{PutJobs: jobs})
	}
	f.check()
}

func TestCompactedChanges(t *testing.T) {
	r := founded(t)
	defer r.close()
	ana := principal.Principal{Node: 1, UID: 1000}
	var ps []Put
	for i := range MaxBatch {
		ps = append(ps, Put{Key: fmt.Sprintf("user/1000/%d", i)})
	}
	for range MaxHistory / MaxBatch {
		r.must(Command{Who: ana, Batch: ps})
	}
	now := r.info().Revision // MaxHistory+1: the founding is not kept
	if first, err := r.view().Oldest(); err != nil || first != 2 {
		t.Fatalf("oldest %d, %v", first, err)
	}
	if _, err := r.view().Changes(0, 10); !errs.Has(err, errs.Stale) || !strings.Contains(err.Error(), "compacted: the oldest revision kept is 2") {
		t.Fatal(err)
	}
	var rev uint64 = 1
	n := 0
	for rev < now { // resumed every 77 events
		es, err := r.view().Changes(rev, 77)
		if err != nil || len(es) == 0 || len(es) > 77 {
			t.Fatalf("%d events after %d, %v", len(es), rev, err)
		}
		for _, e := range es {
			if e.Revision != rev+1 || e.Key != fmt.Sprintf("user/1000/%d", n%MaxBatch) {
				t.Fatalf("%+v after %d", e, rev)
			}
			rev = e.Revision
			n++
		}
	}
	if n != MaxHistory {
		t.Fatalf("%d events", n)
	}
	for _, after := range []uint64{now, now + 5, 1 << 63} {
		if es, err := r.view().Changes(after, 10); err != nil || es != nil {
			t.Fatalf("%v %v", es, err)
		}
	}
	r.must(Command{GrantJobs: 1})
	if _, err := r.view().Changes(1, 10); !errs.Has(err, errs.Stale) || !strings.Contains(err.Error(), "is 3") {
		t.Fatal(err)
	}
	if es, err := r.view().Changes(now, 10); err != nil || len(es) != 1 || es[0].Kind != KindGrant {
		t.Fatalf("%v %v", es, err)
	}
	// Of a command all events stay until the last is too old.
	kept := func() (n int) {
		s := r.view().s
		lo := s.key(tagHistory)
		s.scan(lo, after(lo), func([]byte, []byte) bool { n++; return true })
		return n
	}
	if n := kept(); n != MaxHistory/MaxBatch+1 {
		t.Fatalf("%d commands' events are kept", n)
	}
	for i := range MaxBatch - 1 {
		if n := kept(); n != MaxHistory/MaxBatch+1+i {
			t.Fatalf("%d commands' events are kept after %d more", n, i)
		}
		r.must(Command{GrantJobs: 1})
	}
	if n := kept(); n != MaxHistory/MaxBatch-1+MaxBatch {
		t.Fatalf("%d commands' events are kept when the first are too old", n)
	}
	r.replay()
}

// TestHistoryWithAHole: what another program has left out is not passed over.
func TestHistoryWithAHole(t *testing.T) {
	r := founded(t)
	defer r.close()
	var ps []Put
	for i := range 4 {
		ps = append(ps, Put{Key: fmt.Sprintf("settings/%d", i)})
	}
	for range 3 {
		r.must(Command{Batch: ps}) // revisions 2 to 5, 6 to 9, 10 to 13
	}
	s := store{prefix: space.Key()}
	if err := r.db.Delete(s.key(tagHistory, 9), nil); err != nil {
		t.Fatal(err)
	}
	if es, err := r.view().Changes(3, 100); err != nil || len(es) != 2 || es[1].Revision != 5 {
		t.Fatalf("%v %v", es, err)
	}
	for _, rev := range []uint64{5, 7} {
		if es, err := r.view().Changes(rev, 100); !errs.Has(err, errs.Stale) {
			t.Fatalf("%v %v", es, err)
		}
	}
	if es, err := r.view().Changes(9, 1); err != nil || len(es) != 1 || es[0].Revision != 10 {
		t.Fatalf("%v %v", es, err)
	}
}

// FuzzEvents decodes anything; what was understood is the same when encoded again.
func FuzzEvents(f *testing.F) {
	f.Add(uint64(9), appendEvents(nil, []Event{{7, KindKey, "a", false}, {7, KindUser, "", true}, {8, KindJob, strings.Repeat("7", 300), false}, {9, KindInfo, "", false}}))
	f.Add(uint64(3), []byte{0, 1, 0, 0})
	f.Add(uint64(3), []byte{5, 1, 0, 0})
	f.Add(uint64(3), []byte{0, 1, 0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 1})
	f.Fuzz(func(t *testing.T, last uint64, b []byte) {
		var events []Event
		if decodeEvents(last, b, func(e Event) bool { events = append(events, e); return true }) != nil {
			return
		}
		if len(events) == 0 {
			t.Fatalf("%x is nothing", b)
		}
		again := appendEvents(nil, events)
		var same []Event
		if err := decodeEvents(last, again, func(e Event) bool { same = append(same, e); return true }); err != nil || !slices.Equal(events, same) {
			t.Fatalf("%+v, again %+v: %v", events, same, err)
		}
	})
}

// TestKeysAreEncodedAsEverything: Key.append gives what the codec gives.
func TestKeysAreEncodedAsEverything(t *testing.T) {
	if n := reflect.TypeFor[Key]().NumField(); n != 6 {
		t.Fatalf("a Key has %d fields: is the new one encoded?", n)
	}
	rapid.Check(t, func(rt *rapid.T) {
		number := func(name string) uint64 {
			return rapid.Uint64().Draw(rt, name) >> rapid.IntRange(0, 63).Draw(rt, "less of "+name)
		}
		k := Key{Create: number("create"), Mod: number("mod"), Version: number("version"), Owner: uint32(number("owner"))}
		if size := rapid.SampledFrom([]int{-1, 0, 1, 23, 24, 255, 256, MaxValue}).Draw(rt, "size"); size >= 0 {
			k.Value = bytes.Repeat([]byte("v"), size)
		}
		if got, want := k.append([]byte("x")), wire.MustMarshal(k); !bytes.Equal(got[1:], want) {
			rt.Fatalf("%+v: got %x want %x", k, got, want)
		}
	})
}

// oldState reads a state that an earlier version kept.
func oldState(t *testing.T, file string) *replica {
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	r := newReplica(t)
	t.Cleanup(r.close)
	for line := range strings.Lines(string(b)) {
		f := strings.Fields(line)
		k, err := hex.DecodeString(f[1])
		if err != nil {
			t.Fatal(err)
		}
		var v []byte
		if len(f) > 3 {
			if v, err = hex.DecodeString(f[3]); err != nil {
				t.Fatal(err)
			}
		}
		if err := r.db.Set(space.Key(k), v, nil); err != nil {
			t.Fatal(err)
		}
	}
	return r
}

// TestOldLayoutsAreCleared: what was kept of clients before they belonged to
// nodes, and of the changes when each revision had a key, goes when the first new
// client comes, and nothing else does.
func TestOldLayoutsAreCleared(t *testing.T) {
	for file, gone := range map[string]string{"testdata/layout-2.golden": "uvdh", "testdata/layout-3.golden": "h"} {
		r := oldState(t, file)
		old := func() (n int) {
			for line := range strings.Lines(dump(t, r.db, "")) {
				if strings.IndexByte(gone, line[0]) >= 0 {
					n++
				}
			}
			return n
		}
		if old() == 0 {
			t.Fatalf("%s has nothing to be cleared", file)
		}
		was, clients := dump(t, r.db, gone+"orc"), r.info().Clients
		if gone == "uvdh" {
			clients = 0
		}
		rev := r.info().Revision
		r.index, r.seq = 100, 100
		c := Command{Client: 2, Seq: 1, UpdateMember: &UpdateMember{Node: 2, State: Active}} // is so already
		if res := r.apply(c); res.Refusal.refused() {
			t.Fatalf("%+v", res)
		}
		if n := old(); n != 0 {
			t.Errorf("%s: %d keys are still there", file, n)
		}
		if now := dump(t, r.db, "orc"); now != was {
			t.Errorf("%s: the rest is\n%s\nwas\n%s", file, now, was)
		}
		if n := r.info().Clients; n != clients+1 {
			t.Errorf("%s: %d clients, before %d", file, n, clients)
		}
		if _, err := r.view().Changes(rev-1, 10); !errs.Has(err, errs.Stale) {
			t.Errorf("%s: changes of before: %v", file, err)
		}
		r.must(Command{Put: &Put{Key: "settings/a"}})
		if es, err := r.view().Changes(rev, 10); err != nil || len(es) != 1 || es[0].Key != "settings/a" {
			t.Errorf("%s: %+v %v", file, es, err)
		}
	}
}

// TestOldStateIsRead: the state of before there were principals, keys, users,
// audit and history is read, and goes on.
func TestOldStateIsRead(t *testing.T) {
	r := oldState(t, "testdata/layout-1.golden")
	r.index, r.seq = 6, 6
	i := r.info()
	ms, err := r.view().Members()
	if err != nil || i.Name != "home" || len(ms) != 2 || i.Revision != 7 {
		t.Fatalf("%+v %+v %v", i, ms, err)
	}
	if rev, err := r.view().Oldest(); err != nil || rev != 8 {
		t.Fatalf("oldest %d, %v", rev, err)
	}
	if _, err := r.view().Changes(6, 10); !errs.Has(err, errs.Stale) {
		t.Fatal(err)
	}
	r.must(Command{Who: principal.Of(2), GrantJobs: 5})
	r.must(Command{Put: &Put{Key: "settings/a"}})
	if es, err := r.view().Changes(7, 10); err != nil || len(es) != 2 || es[1].Key != "settings/a" {
		t.Fatalf("%+v %v", es, err)
	}
}
