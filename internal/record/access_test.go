package record

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/unum-os/unum/internal/errs"
	"github.com/unum-os/unum/internal/ids"
	"github.com/unum-os/unum/internal/principal"
	"github.com/unum-os/unum/internal/wire"
)

// people is a cluster with everybody in it: n1 and n3 store, n2 is a client, n4
// stored and is removed, n5 is a witness. Users: ana 1000, boss 2000 (Admin), gone 3000
// (Disabled); nobody is 4000.
func people(t fataler) *replica {
	r := founded(t)
	r.must(Command{AddToken: &Token{ID: TokenID{7}, Uses: 9, Role: RoleStore}})
	r.must(Command{AddToken: &Token{ID: TokenID{8}, Uses: 9, Role: RoleClient}})
	for i, role := range []Role{RoleClient, RoleStore, RoleStore, RoleWitness} {
		tok := TokenID{7}
		if role == RoleClient {
			tok = TokenID{8}
		}
		r.must(Command{AddMember: &AddMember{Token: tok, Role: role, Key: KeyHash{byte(i + 2)}, Hostname: "h", Addr: "h:1", Now: 1}})
	}
	for n := ids.Node(2); n <= 5; n++ {
		r.must(Command{UpdateMember: &UpdateMember{Node: n, State: Active}})
	}
	r.must(Command{UpdateMember: &UpdateMember{Node: 4, State: Removed}})
	r.must(Command{PutUser: &User{Name: "ana", UID: 1000, GID: 100}})
	r.must(Command{PutUser: &User{Name: "boss", UID: 2000, GID: 100, Admin: true}})
	r.must(Command{PutUser: &User{Name: "gone", UID: 3000, GID: 100, Admin: true}})
	r.must(Command{AddLogin: &LoginToken{ID: LoginID{5}, User: "ana", Expires: 100}})
	r.must(Command{AddLogin: &LoginToken{ID: LoginID{6}, User: "gone", Expires: 100}})
	r.must(Command{PutUser: &User{Name: "gone", UID: 3000, GID: 100, Admin: true, Disabled: true}})
	r.must(Command{GrantJobs: 100})
	r.must(Command{PutJobs: []Job{{ID: 1, Home: 1, Node: 1, State: JobRunning}}})
	r.must(Command{Who: principal.Of(3), PutJobs: []Job{{ID: 2, Home: 3, Node: 3, State: JobRunning}}})
	r.must(Command{Put: &Put{Key: "settings/a", Value: []byte("1")}})
	r.must(Command{Put: &Put{Key: "user/1000/a", Value: []byte("1")}})
	r.must(Command{Put: &Put{Key: "user/2000/a", Value: []byte("1")}})
	return r
}

var everybody = map[string]principal.Principal{
	"nobody":               {},
	"root of store":        {Node: 1},
	"root of other store":  {Node: 3},
	"root of client":       {Node: 2},
	"root by name":         {Node: 2, User: "root"},
	"root as boss":         {Node: 2, User: "boss"},
	"root of removed":      {Node: 4},
	"root of unknown":      {Node: 99},
	"ana of store":         {Node: 1, UID: 1000},
	"ana of client":        {Node: 2, UID: 1000, User: "ana"},
	"unproven ana":         {Node: 2, UID: 1000},
	"bob as ana":           {Node: 2, UID: 1000, User: "bob"},
	"boss of store":        {Node: 3, UID: 2000},
	"boss of client":       {Node: 2, UID: 2000, User: "boss"},
	"gone of store":        {Node: 1, UID: 3000},
	"gone of client":       {Node: 2, UID: 3000, User: "gone"},
	"4000 of store":        {Node: 1, UID: 4000},
	"4000 of client":       {Node: 2, UID: 4000, User: "new"},
	"no uid":               {Node: 1, UID: principal.NoUID},
	"store":                principal.Of(1),
	"other store":          principal.Of(3),
	"client":               principal.Of(2),
	"removed":              principal.Of(4),
	"witness":              principal.Of(5),
	"root of witness":      {Node: 5},
	"boss of witness":      {Node: 5, UID: 2000, User: "boss"},
	"unknown":              principal.Of(99),
	"store with a uid":     {Node: 1, UID: 5, System: true},
	"store with a name":    {Node: 1, User: "boss", System: true},
	"endless name":         {Node: 1, User: strings.Repeat("x", 300)},
	"system of no machine": {System: true},
}

var (
	trusted = []string{"root of store", "root of other store", "boss of store"}
	admins  = append(slices.Clone(trusted), "boss of client")
	stores  = []string{"store", "other store"}
	systems = append(slices.Clone(stores), "client")
	users   = append(slices.Clone(admins), "ana of store", "ana of client", "4000 of store")
	anas    = append(slices.Clone(admins), "ana of store", "ana of client")
)

func names(ls ...[]string) []string { return slices.Concat(ls...) }

// TestWhoMayWhat asks everybody for everything. Who may not is refused by class,
// changes nothing, and stands in the audit.
func TestWhoMayWhat(t *testing.T) {
	r := people(t)
	defer r.close()
	was := r.content()
	update := func(u UpdateMember) Command { return Command{UpdateMember: &u} }
	job := func(j Job) Command { return Command{PutJobs: []Job{j}} }
	for what, c := range map[string]struct {
		Command
		may []string
	}{
		"add token":              {Command{AddToken: &Token{ID: TokenID{99}, Uses: 1, Role: RoleStore}}, trusted},
		"drop token":             {Command{DropToken: &TokenID{7}}, trusted},
		"join":                   {Command{AddMember: &AddMember{Token: TokenID{7}, Key: KeyHash{99}, Now: 1}}, stores},
		"move n1":                {update(UpdateMember{Node: 1, Addr: "x:1", Hostname: "x"}), names(trusted, []string{"store"})},
		"move n2":                {update(UpdateMember{Node: 2, Addr: "x:1", Hostname: "x"}), names(trusted, []string{"client"})},
		"label n1":               {update(UpdateMember{Node: 1, Labels: map[string]string{"a": "b"}}), trusted},
		"label n2":               {update(UpdateMember{Node: 2, Addr: "x:1", Labels: map[string]string{"a": "b"}}), trusted},
		"admit n2":               {update(UpdateMember{Node: 2, State: Active}), names(trusted, stores)},
		"n2 leaves":              {update(UpdateMember{Node: 2, State: Leaving}), names(trusted, systems)},
		"n5 leaves":              {update(UpdateMember{Node: 5, State: Leaving}), names(trusted, stores, []string{"witness"})},
		"remove n2":              {update(UpdateMember{Node: 2, State: Removed}), trusted},
		"remove n3":              {update(UpdateMember{Node: 3, State: Removed}), trusted},
		"grant":                  {Command{GrantJobs: 1}, stores},
		"job of n1":              {job(Job{ID: 10, Home: 1, Node: 3, State: JobRunning}), stores},
		"job of n2":              {job(Job{ID: 10, Home: 2, Node: 2, State: JobRunning}), nil},
		"job of n3":              {job(Job{ID: 10, Home: 3, Node: 2, State: JobRunning}), []string{"other store"}},
		"end of n1's job":        {job(Job{ID: 1, Home: 1, Node: 1, State: JobExited}), []string{"store"}},
		"n1's job taken over":    {job(Job{ID: 1, Incarnation: 9, Home: 2, Node: 2, State: JobRunning}), nil},
		"n1's job taken in":      {job(Job{ID: 1, Incarnation: 9, Home: 1, Node: 2, State: JobRunning}), []string{"store"}},
		"n3's job lost":          {job(Job{ID: 2, Home: 3, Node: 3, State: JobLost}), stores},
		"unheard of job lost":    {job(Job{ID: 50, Home: 9, Node: 9, State: JobLost}), nil},
		"put user":               {Command{PutUser: &User{Name: "eve", UID: 5000}}, trusted},
		"make oneself admin":     {Command{PutUser: &User{Name: "ana", UID: 1000, Admin: true}}, trusted},
		"drop user":              {Command{DropUser: "ana"}, trusted},
		"add login":              {Command{AddLogin: &LoginToken{ID: LoginID{77}, User: "ana", Expires: 5}}, names(trusted, []string{"ana of store"})},
		"login at n2":            {Command{Login: &Login{ID: LoginID{5}, Node: 2, Now: 1}}, stores},
		"login at n3":            {Command{Login: &Login{ID: LoginID{5}, Node: 3, Now: 1}}, stores},
		"put setting":            {Command{Put: &Put{Key: "settings/a"}}, admins},
		"delete setting":         {Command{Delete: &Delete{Key: "settings/a"}}, admins},
		"put ana's":              {Command{Put: &Put{Key: "user/1000/b/c"}}, anas},
		"delete ana's":           {Command{Delete: &Delete{Key: "user/1000/a"}}, anas},
		"batch of ana's":         {Command{Batch: []Put{{Key: "user/1000/a"}, {Key: "user/1000/b"}}}, anas},
		"put boss's":             {Command{Put: &Put{Key: "user/2000/b"}}, admins},
		"put root's":             {Command{Put: &Put{Key: "user/0/b"}}, admins},
		"put ana's, spelt oddly": {Command{Put: &Put{Key: "user/01000/b"}}, nil},
		"put user/1000":          {Command{Put: &Put{Key: "user/1000"}}, nil},
		"put elsewhere":          {Command{Put: &Put{Key: "a/b"}}, nil},
		"put no uid's":           {Command{Put: &Put{Key: "user/4294967295/b"}}, nil},
		"note":                   {Command{Note: &Note{What: "x", Err: 1}}, stores},
	} {
		for name, who := range everybody {
			c, may := c.Command, c.may
			c.Who, c.Client, c.Seq, c.Now = who, 1, r.seq+1, 12345
			b := r.db.NewIndexedBatch() // never committed: each command meets the same state
			var m Machine
			res := m.ApplyTo(b, space, r.index+1, wire.MustMarshal(c))
			refusals := append([]Refusal{res.Refusal}, res.Jobs...)
			for _, k := range res.Keys {
				refusals = append(refusals, k.Refusal)
			}
			is := fmt.Sprintf("%s by %s: %+v", what, name, res)
			if allowed := !slices.ContainsFunc(refusals, Refusal.refused); allowed != slices.Contains(may, name) {
				t.Errorf("%s; may: %q", is, may)
			} else if !allowed {
				if !slices.ContainsFunc(refusals, Refusal.denied) {
					t.Errorf("%s: not for want of a right", is)
				}
				if content(t, b) != was {
					t.Errorf("%s changed the state", is)
				}
				v := NewView(b, space)
				all, err := v.Audit(0, 1<<20)
				if err != nil || len(all) == 0 {
					t.Fatal(err)
				}
				e := all[len(all)-1]
				if e.Time != 12345 || e.Err == 0 || e.What == "" || e.Why == "" || e.Who.Node != who.Node || e.Who.UID != who.UID || e.Count != uint64(max(1, len(c.Batch)*min(1, len(res.Keys)))) {
					t.Errorf("%s: the audit has %+v", is, e)
				}
			}
			b.Close()
		}
	}
	for _, name := range []string{"client", "root of client", "boss of client", "witness", "removed"} { // who may is told that it is founded
		c := Command{Client: 9, Seq: 1, Who: everybody[name], Init: &Init{Name: "mine"}}
		if res := r.apply(c); !res.Denied() {
			t.Errorf("%s founds the cluster anew: %+v", name, res)
		}
	}
}

func TestWhoMayRead(t *testing.T) {
	r := people(t)
	defer r.close()
	for key, may := range map[string][]string{
		"settings/a":   names(users, systems, []string{"witness"}),
		"settings/":    names(users, systems, []string{"witness"}),
		"settings":     names(admins, stores),
		"":             names(admins, stores),
		"user/":        names(admins, stores),
		"user/1":       names(admins, stores),
		"user/1000":    names(admins, stores),
		"user/1000/":   names(anas, stores),
		"user/1000/a":  names(anas, stores),
		"user/01000/a": names(admins, stores),
		"user/4000/a":  names(admins, stores, []string{"4000 of store"}),
		"user/0/a":     names(admins, stores),
	} {
		for name, who := range everybody {
			err := r.view().MayRead(who, key)
			if (err == nil) != slices.Contains(may, name) || err != nil && !errs.Has(err, errs.Permission) && !errs.Has(err, errs.Unauthorized) {
				t.Errorf("%s reads %q: %v", name, key, err)
			}
		}
	}
	// What is watched says no more than what may be read.
	for name, sees := range map[string]string{
		"ana of client":  "info member key:settings/a key:user/1000/a user:ana",
		"boss of client": "info member token key:settings/a key:user/1000/a key:user/2000/a user:ana user:boss user:gone login job grant",
		"client":         "info member key:settings/a",
		"ana of store":   "info member key:settings/a key:user/1000/a user:ana user:boss user:gone job grant",
		"root of store":  "info member token key:settings/a key:user/1000/a key:user/2000/a user:ana user:boss user:gone login job grant",
	} {
		rights, err := r.view().Rights(everybody[name])
		if err != nil {
			t.Fatal(err)
		}
		all, err := r.view().Changes(0, 1000)
		if err != nil {
			t.Fatal(err)
		}
		seen := map[string]bool{}
		for _, e := range all {
			if rights.MaySee(e) {
				s := e.Kind.String()
				if e.Kind == KindKey || e.Kind == KindUser {
					s += ":" + e.Key
				}
				seen[s] = true
			}
		}
		if got, want := slices.Sorted(maps.Keys(seen)), slices.Sorted(strings.FieldsSeq(sees)); !slices.Equal(got, want) {
			t.Errorf("%s sees %q, want %q", name, got, want)
		}
	}
}

func TestUsers(t *testing.T) {
	r := people(t)
	defer r.close()
	put := func(u User) Command { return Command{PutUser: &u} }
	r.refuse(put(User{Name: "ann", UID: 1000}), errs.Exists, "that of ana")
	r.refuse(put(User{Name: "ana", UID: 1001}), errs.Invalid, "uid 1000, which stays")
	r.refuse(put(User{Name: "root", UID: 0}), errs.Invalid, "uid 0")
	r.refuse(put(User{Name: "none", UID: principal.NoUID}), errs.Invalid, "uid")
	r.refuse(put(User{Name: "Ana", UID: 6}), errs.Invalid, "name")
	r.refuse(put(User{Name: "a/b", UID: 6}), errs.Invalid, "name")
	r.refuse(put(User{Name: "x", UID: 6, Groups: make([]uint32, principal.MaxGroups+1)}), errs.TooLarge, "groups")
	r.refuse(Command{DropUser: "eve"}, errs.NotFound, "eve")
	r.must(put(User{Name: "ana", UID: 1000, GID: 7, Groups: []uint32{8}}))
	if u, err := r.view().User("ana"); err != nil || u.GID != 7 || len(u.Groups) != 1 {
		t.Fatalf("%+v %v", u, err)
	}

	add := func(id byte, user string, end int64) Command {
		return Command{AddLogin: &LoginToken{ID: LoginID{id}, User: user, Expires: end}}
	}
	r.refuse(add(9, "eve", 5), errs.NotFound, "eve")
	r.refuse(add(9, "gone", 5), errs.Permission, "disabled")
	r.refuse(add(9, "ana", 0), errs.Invalid, "end")
	r.refuse(add(5, "ana", 5), errs.Exists, "exists")
	login := func(id byte, n ids.Node, now int64) Command {
		return Command{Login: &Login{ID: LoginID{id}, Node: n, Now: now}}
	}
	r.refuse(login(5, 2, 100), errs.Unauthorized, "expired")
	r.refuse(login(5, 4, 1), errs.Unauthorized, "no member")
	r.refuse(login(6, 2, 1), errs.Unauthorized, "disabled")
	r.refuse(login(99, 2, 1), errs.Unauthorized, "not one of this cluster")
	first := r.must(login(5, 2, 99))
	if u := first.User; u == nil || u.Name != "ana" || u.GID != 7 {
		t.Fatalf("%+v", first)
	}
	if again := r.raw(r.log[len(r.log)-1]); again.User == nil || again.User.Name != "ana" || again.Index != first.Index { // its answer was lost
		t.Fatalf("%+v", again)
	}
	if again := r.must(login(5, 2, 99)); again.User == nil || again.User.Name != "ana" || again.Revision != first.Revision { // by another attempt
		t.Fatalf("%+v", again)
	}
	r.refuse(login(5, 1, 99), errs.Unauthorized, "was used") // another node
	r.refuse(login(5, 2, 100), errs.Unauthorized, "was used")
	const long = int64(1000 * time.Hour)
	r.must(add(11, "ana", long))
	r.must(login(11, 2, 1000))
	r.must(login(11, 2, 999+int64(LoginAgain)))
	r.refuse(login(11, 2, 1000+int64(LoginAgain)), errs.Unauthorized, "was used") // who has it in his history has nothing
	r.must(add(12, "ana", long-1))

	r.must(add(10, "ana", 100))
	r.must(Command{DropUser: "ana"})
	r.refuse(login(10, 2, 1), errs.Unauthorized, "not one of this cluster") // gone with her
	r.must(put(User{Name: "bob", UID: 1000}))
	if err := r.view().MayRead(everybody["ana of client"], "user/1000/a"); !errs.Has(err, errs.Unauthorized) {
		t.Fatalf("an old credential acts for the uid's next user: %v", err)
	}
	if err := r.view().MayRead(everybody["bob as ana"], "user/1000/a"); err != nil { // as files do
		t.Fatal(err)
	}
	if us, err := r.view().Users(); err != nil || len(us) != 3 || us[0].Name != "bob" || r.info().Users != 3 {
		t.Fatalf("%+v %v", us, err)
	}
	for i := range MaxLogins + 5 {
		r.must(Command{AddLogin: &LoginToken{ID: LoginID{1, byte(i), byte(i >> 8)}, User: "bob", Expires: int64(1000 + i)}})
	}
	if ls, err := r.view().Logins(); err != nil || len(ls) != MaxLogins || slices.ContainsFunc(ls, func(l LoginToken) bool { return l.Expires < 1005 }) {
		t.Fatalf("%d login tokens, %v", len(ls), err)
	}
	r.replay()
}

func TestAudit(t *testing.T) {
	r := people(t)
	defer r.close()
	last := func() Audit {
		t.Helper()
		all, err := r.view().Audit(0, 1<<20)
		if err != nil {
			t.Fatal(err)
		}
		for i, e := range all {
			if i > 0 && (e.Seq <= all[i-1].Seq || len(all) < MaxAudit && e.Seq != all[i-1].Seq+1) {
				t.Fatalf("entry %d after %d", e.Seq, all[i-1].Seq)
			}
		}
		return all[len(all)-1]
	}
	r.must(Command{Now: 50, Who: everybody["boss of store"], PutUser: &User{Name: "eve", UID: 5}})
	if e := last(); e.What != "put user" || e.On != "eve" || e.Err != 0 || e.Time != 50 || e.Who != everybody["boss of store"] || e.Count != 1 {
		t.Fatalf("%+v", e)
	}
	was := last()
	r.must(Command{UpdateMember: &UpdateMember{Node: 2, State: Active}})            // is so already
	r.must(Command{Who: everybody["ana of client"], Put: &Put{Key: "user/1000/z"}}) // no administrative act
	r.must(Command{GrantJobs: 1})
	r.must(Command{Who: principal.Of(2), UpdateMember: &UpdateMember{Node: 2, Addr: "new:1"}})
	r.refuse(Command{Who: everybody["ana of client"], Delete: &Delete{Key: "user/1000/none"}}, errs.NotFound, "no key")
	if e := last(); e != was {
		t.Fatalf("%+v", e)
	}
	r.refuse(Command{DropUser: "none"}, errs.NotFound, "") // an administrator's, that was refused
	if e := last(); e.What != "drop user" || e.On != "none" || errs.Class(e.Err) != errs.NotFound || e.Door != 0 {
		t.Fatalf("%+v", e)
	}
	// The same refusal again and again is one entry.
	forged := Command{Now: 60, Put: &Put{Key: "user/2000/a"}, Who: everybody["ana of client"]}
	r.refuse(forged, errs.Permission, "may not")
	seq := last().Seq
	for range 5 {
		forged.Now++
		r.refuse(forged, errs.Permission, "may not")
	}
	if e := last(); e.Seq != seq || e.Count != 6 || e.Time != 60 || e.Last != 65 || e.On != "user/2000/a" {
		t.Fatalf("%+v", e)
	}
	r.must2(Command{Now: 70, Who: everybody["boss of store"], Batch: []Put{{Key: "settings/x"}, {Key: "user/1000/x"}, {Key: "user/2000/x"}, {Key: "nowhere"}, {Key: "a b"}}})
	all, err := r.view().Audit(seq, 10)
	if err != nil || len(all) != 3 || all[0].On != "settings/x" || all[1].On != "user/1000/x" || all[2].On != "nowhere" || all[2].Count != 2 {
		t.Fatalf("%+v %v", all, err)
	}
	note := &Note{About: principal.Principal{Node: 2, UID: 0}, What: "propose", On: "n2", Err: uint8(errs.Unauthorized), Why: "no credential"}
	r.must(Command{Now: 80, Who: principal.Of(3), Note: note})
	if e := last(); e.Door != 3 || e.Who != note.About || e.Why != note.Why || e.Time != 80 {
		t.Fatalf("%+v", e)
	}
	r.refuse(Command{Note: &Note{What: "x"}}, errs.Invalid, "")
	r.refuse(Command{Note: &Note{What: strings.Repeat("x", MaxText+1), Err: 1}}, errs.TooLarge, "")

	// Refusals without end leave the acts as they are.
	acts := func() (n int) {
		all, err := r.view().Audit(0, 1<<20)
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range all {
			if e.Err == 0 {
				n++
			}
		}
		if len(all)-n > MaxAudit || n > MaxAudit {
			t.Fatalf("%d acts, %d refusals", n, len(all)-n)
		}
		return n
	}
	n := acts()
	for i := range MaxAudit + 10 {
		r.do(Command{Who: everybody["ana of client"], Put: &Put{Key: fmt.Sprintf("user/2000/%d", i)}})
	}
	if got := acts(); got != n {
		t.Fatalf("%d acts of %d are left", got, n)
	}
	if e := last(); e.On != fmt.Sprintf("user/2000/%d", MaxAudit+9) {
		t.Fatalf("%+v", e)
	}
	if tail, err := r.view().NewestAudit(0, 3); err != nil || len(tail) != 3 || tail[0].Seq != last().Seq-2 || tail[2] != last() {
		t.Fatalf("the newest three: %+v, %v", tail, err)
	}
	if tail, err := r.view().NewestAudit(0, -1); err != nil || len(tail) != 0 {
		t.Fatalf("the newest none: %+v, %v", tail, err)
	}
	if all, err := r.view().NewestAudit(last().Seq-2, 10); err != nil || len(all) != 2 || all[0].Seq != last().Seq-1 {
		t.Fatalf("the newest after one: %+v, %v", all, err)
	}
	if all, err := r.view().Audit(last().Seq-3, 2); err != nil || len(all) != 2 || all[1].Seq != last().Seq-1 {
		t.Fatalf("%+v %v", all, err)
	}
	for i := range MaxAudit + 10 {
		r.must(Command{Put: &Put{Key: "settings/a", Value: []byte{byte(i)}}})
	}
	if got := acts(); got != MaxAudit {
		t.Fatalf("%d acts", got)
	}
	r.replay()
}

// TestOldPrincipals: a command of before there were principals founds a cluster
// and does nothing else.
func TestOldPrincipals(t *testing.T) {
	r := newReplica(t)
	defer r.close()
	if res := r.raw(wire.MustMarshal(Command{Client: 1, Seq: 1, Init: &Init{Name: "home"}})); res.Refusal.refused() {
		t.Fatalf("%+v", res)
	}
	if res := r.raw(wire.MustMarshal(Command{Client: 1, Seq: 2, GrantJobs: 1})); errs.Class(res.Refusal.Err) != errs.Unauthorized {
		t.Fatalf("%+v", res)
	}
	if _, err := r.view().Rights(principal.Principal{}); !errors.Is(err, errs.Unauthorized.Err()) {
		t.Fatal(err)
	}
}

// TestRightsEndAtOnce: what a machine remembers of who may what, and of keys,
// ends with what it was read from.
func TestRightsEndAtOnce(t *testing.T) {
	r := people(t)
	defer r.close()
	ana := Command{Who: everybody["ana of client"], Put: &Put{Key: "user/1000/a"}}
	r.must(ana)
	r.must(Command{PutUser: &User{Name: "ana", UID: 1000, Disabled: true}})
	r.refuse(ana, errs.Unauthorized, "disabled")
	r.must(Command{PutUser: &User{Name: "ana", UID: 1000}})
	r.must(ana)
	other := people(t) // a snapshot of another history is installed under the machine
	defer other.close()
	other.must(Command{PutUser: &User{Name: "ana", UID: 1000, Disabled: true}})
	m := r.m
	r.m, r.db, other.db, r.index, r.seq = m, other.db, r.db, other.index, other.seq
	r.refuse(ana, errs.Unauthorized, "disabled")
	r.must(Command{PutUser: &User{Name: "ana", UID: 1000}})
	r.must(ana)
	r.must(Command{UpdateMember: &UpdateMember{Node: 2, State: Removed}})
	r.refuse(ana, errs.Unauthorized, "no member any more")
}

// TestTimeOfOthers: what a node that does not store says of the time is taken
// from it as far as it is near what storing nodes said last.
func TestTimeOfOthers(t *testing.T) {
	r := people(t)
	defer r.close()
	now := 10 * MaxApart
	r.must(Command{Now: now, Put: &Put{Key: "settings/a"}})
	refused := func(who string, said int64) int64 {
		t.Helper()
		r.refuse(Command{Now: said, Who: everybody[who], Put: &Put{Key: fmt.Sprintf("settings/%d", r.seq)}}, errs.Permission, "")
		all, err := r.view().Audit(0, 1<<20)
		if err != nil {
			t.Fatal(err)
		}
		return all[len(all)-1].Time
	}
	for _, c := range []struct {
		who        string
		said, want int64
	}{
		{"ana of client", now + 7, now + 7},
		{"ana of client", 1 << 62, now + MaxApart},
		{"client", now + MaxApart + 1, now + MaxApart}, // not from where the last one got
		{"witness", -5, now - MaxApart},
		{"client", 0, now - MaxApart},
		{"ana of store", now + 2*MaxApart, now + 2*MaxApart},
		{"client", now, now + MaxApart},
		{"store", 5, 5}, // a clock was set right: the others' are held against that
		{"client", now, 5 + MaxApart},
	} {
		if got := refused(c.who, c.said); got != c.want {
			t.Errorf("%s said %d: the audit has %d, want %d", c.who, c.said, got, c.want)
		}
	}
	if res := r.raw(wire.MustMarshal(Command{Client: 1, Seq: 9999, Now: 1 << 62, DropUser: "x"})); !res.Denied() || r.info().Time != 5 {
		t.Errorf("%+v %d", res, r.info().Time)
	}
}

// What a client node may do without an administrator, again and again, is no act,
// and what is refused for another reason than a right is no refusal of the audit.
func TestAuditIsNotFilledFromAside(t *testing.T) {
	r := people(t)
	defer r.close()
	before := r.info()
	for range 10 {
		for _, s := range []State{Leaving, Active} {
			if res := r.do(Command{Who: principal.Of(2), UpdateMember: &UpdateMember{Node: 2, State: s}}); res.Refusal.refused() {
				t.Fatal(res.Refusal)
			}
		}
	}
	ana := principal.Principal{Node: 2, UID: 1000, User: "ana"}
	for i := range 10 {
		if res := r.do(Command{Who: ana, Put: &Put{Key: fmt.Sprintf("!%d", i)}}); res.Denied() || !res.Refusal.refused() {
			t.Fatal(res.Refusal)
		}
	}
	if after := r.info(); after.Acts != before.Acts || after.Refusals != before.Refusals {
		t.Errorf("acts %d to %d, refusals %d to %d", before.Acts, after.Acts, before.Refusals, after.Refusals)
	}
	c := Command{Who: everybody["boss of client"]}
	for range MaxBatch {
		c.Batch = append(c.Batch, Put{Key: "settings/a"})
	}
	r.do(c)
	if after := r.info(); after.Acts != before.Acts+1 {
		t.Errorf("one command from a client node made %d acts", after.Acts-before.Acts)
	}
	// The first refusal of a command says why, and so does the first for want of a right.
	none := uint64(1)
	r.do(Command{Who: ana, Batch: []Put{{Key: "user/1000/none", Expect: &none}, {Key: "user/2000/x"}}})
	es, err := r.view().Audit(0, 1<<20)
	if err != nil {
		t.Fatal(err)
	}
	if e := es[len(es)-1]; e.Err == 0 || e.Why == "" || e.On != "user/2000/x" {
		t.Errorf("%+v", e)
	}
}
