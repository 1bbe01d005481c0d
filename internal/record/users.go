package record

import (
	"time"

	"github.com/unum-os/unum/internal/errs"
	"github.com/unum-os/unum/internal/ids"
	"github.com/unum-os/unum/internal/principal"
)

// Limits of users.
const (
	MaxUsers  = 10_000 // users of the record
	MaxLogins = 1024   // login tokens at a time; that which ends soonest gives way
)

// User is a person, or a program that acts for nobody in particular. The uid is
// whom files, jobs and keys belong to, and stays.
type User struct {
	Name     string   `cbor:"1,keyasint"`
	UID      uint32   `cbor:"2,keyasint"` // never 0
	GID      uint32   `cbor:"3,keyasint"`
	Groups   []uint32 `cbor:"4,keyasint,omitempty"` // supplementary
	Admin    bool     `cbor:"5,keyasint,omitempty"`
	Disabled bool     `cbor:"6,keyasint,omitempty"` // may nothing, and gets no credential
}

// LoginID is the hash of a login token's secret.
type LoginID [32]byte

// LoginToken lets a user log in once, from any node.
type LoginToken struct {
	ID      LoginID `cbor:"1,keyasint"`
	User    string  `cbor:"2,keyasint"`
	Expires int64   `cbor:"3,keyasint"` // cluster time, ns
	// Spent is the node that has logged in with it, if one has. That node may say it
	// again, for LoginAgain, for it may not have heard the answer.
	Spent ids.Node `cbor:"4,keyasint,omitempty"`
}

// LoginAgain is for how long a spent login token counts for the node that has
// spent it: as long as somebody may try again who has had no answer.
const LoginAgain = 10 * time.Minute

// Login spends a login token. The node is that from which the user is to speak.
// The credential is signed by who proposed it, with Result.User.
type Login struct {
	ID   LoginID  `cbor:"1,keyasint"`
	Node ids.Node `cbor:"2,keyasint"`
	Now  int64    `cbor:"3,keyasint"` // cluster time, ns
}

func (s *store) nameKey(name string) []byte { return append(s.key(tagUserName), name...) }

// user returns a user by name, nil when there is none.
func (s *store) user(name string) *User {
	var uid uint64
	var u User
	if !s.load(s.nameKey(name), &uid) {
		return nil
	}
	if key := s.key(tagUser, uid); !s.load(key, &u) {
		fail(errs.Corrupt, key, errs.E(errs.NotFound, "", "", "user %s has a name only", name))
	}
	return &u
}

func checkUser(u *User) Refusal {
	switch {
	case !principal.ValidName(u.Name):
		return no(errs.Invalid, "a user's name is lower-case letters, digits and _ . -, at most %d, and begins with no digit", principal.MaxName)
	case u.UID == 0 || u.UID == principal.NoUID:
		return no(errs.Invalid, "uid %d is no user's of the cluster", u.UID)
	case u.GID == principal.NoUID:
		return no(errs.Invalid, "gid %d is no group", u.GID)
	case len(u.Groups) > principal.MaxGroups:
		return no(errs.TooLarge, "%d groups, limit %d", len(u.Groups), principal.MaxGroups)
	}
	for _, g := range u.Groups {
		if g == principal.NoUID {
			return no(errs.Invalid, "gid %d is no group", g)
		}
	}
	return done
}

func (t *txn) putUser(u User) Refusal {
	if r := checkUser(&u); r.refused() {
		return r
	}
	var other User
	switch was := t.user(u.Name); {
	case was != nil && was.UID != u.UID:
		return no(errs.Invalid, "%s has uid %d, which stays; drop the user and make another", u.Name, was.UID)
	case was != nil:
	case t.load(t.key(tagUser, uint64(u.UID)), &other):
		return no(errs.Exists, "uid %d is that of %s", u.UID, other.Name)
	case t.count.Users >= MaxUsers:
		return no(errs.NoSpace, "there are %d users, limit %d", t.count.Users, MaxUsers)
	default:
		t.count.Users++
		t.save(t.nameKey(u.Name), uint64(u.UID))
	}
	t.count.Revision++
	t.save(t.key(tagUser, uint64(u.UID)), u)
	t.event(KindUser, u.Name, false)
	return done
}

// dropUser takes a user out with all ways to log in. Keys, files and jobs of the
// uid stay, as they do in Unix.
func (t *txn) dropUser(name string) Refusal {
	u := t.user(name)
	if u == nil {
		return no(errs.NotFound, "no user %s", shown(name))
	}
	t.count.Revision++
	t.count.Users--
	t.delete(t.nameKey(name))
	t.delete(t.key(tagUser, uint64(u.UID)))
	t.event(KindUser, name, true)
	for _, l := range t.logins() {
		if l.User == name {
			t.delete(t.loginKey(l.ID))
		}
	}
	return done
}

func (s *store) loginKey(id LoginID) []byte { return append(s.key(tagLogin), id[:]...) }

func (s *store) logins() []LoginToken {
	var out []LoginToken
	lo := s.key(tagLogin)
	s.scan(lo, after(lo), func(k, v []byte) bool {
		var l LoginToken
		s.decode(k, v, &l)
		out = append(out, l)
		return true
	})
	return out
}

func (t *txn) addLogin(l LoginToken) Refusal {
	u := t.user(l.User)
	switch {
	case u == nil:
		return no(errs.NotFound, "no user %s", shown(l.User))
	case u.Disabled:
		return no(errs.Permission, "user %s is disabled", u.Name)
	case l.Expires <= 0:
		return no(errs.Invalid, "a login token needs an end")
	}
	key := t.loginKey(l.ID)
	if _, exists := t.get(key); exists {
		return no(errs.Exists, "the login token exists already")
	}
	t.count.Revision++
	if all := t.logins(); len(all) >= MaxLogins {
		first := 0
		for i := range all { // spent ones go before others
			if was, is := all[first].Spent != 0, all[i].Spent != 0; was != is && is || was == is && all[i].Expires < all[first].Expires {
				first = i
			}
		}
		t.delete(t.loginKey(all[first].ID))
	}
	t.save(key, l)
	return done
}

func (t *txn) login(c *Login) (*User, Refusal) {
	m := t.member(c.Node)
	var l LoginToken
	switch {
	case m == nil || !m.State.Belongs():
		return nil, no(errs.Unauthorized, "%v is no member", c.Node)
	case !t.load(t.loginKey(c.ID), &l), l.Spent != 0 && (l.Spent != c.Node || c.Now >= l.Expires):
		return nil, no(errs.Unauthorized, "the login token is not one of this cluster, or was used")
	case c.Now >= l.Expires:
		return nil, no(errs.Unauthorized, "the login token of %s has expired", l.User)
	}
	u := t.user(l.User)
	switch {
	case u == nil: // cannot be: tokens go with the user
		return nil, no(errs.Unauthorized, "no user %s", l.User)
	case u.Disabled:
		return nil, no(errs.Unauthorized, "user %s is disabled", u.Name)
	}
	if l.Spent == 0 {
		t.count.Revision++
		l.Spent, l.Expires = c.Node, min(l.Expires, c.Now+int64(LoginAgain))
		t.save(t.loginKey(c.ID), l)
	}
	return u, done
}

// Users returns all users, by uid.
func (v View) Users() (out []User, err error) {
	defer caught(&err)
	lo := v.s.key(tagUser)
	v.s.scan(lo, after(lo), func(k, val []byte) bool {
		var u User
		v.s.decode(k, val, &u)
		out = append(out, u)
		return true
	})
	return out, nil
}

// User returns one user by name; class NotFound if there is none.
func (v View) User(name string) (u User, err error) {
	defer caught(&err)
	p := v.s.user(name)
	if p == nil {
		return User{}, errs.E(errs.NotFound, "user", shown(name), "not in the record")
	}
	return *p, nil
}

// Login returns the login token that has the hash; class NotFound if there is none.
func (v View) Login(id LoginID) (l LoginToken, err error) {
	defer caught(&err)
	if !v.s.load(v.s.loginKey(id), &l) {
		return l, errs.E(errs.NotFound, "login token", "", "not in the record")
	}
	return l, nil
}

// Logins returns the login tokens that exist, expired and spent ones included.
func (v View) Logins() (out []LoginToken, err error) {
	defer caught(&err)
	return v.s.logins(), nil
}
