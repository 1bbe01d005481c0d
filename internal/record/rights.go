package record

import (
	"strconv"
	"strings"

	"github.com/unum-os/unum/internal/errs"
	"github.com/unum-os/unum/internal/principal"
)

// Rights is what a principal may do, as the record knows it: the only place
// where that is decided.
type Rights struct {
	who    principal.Principal
	admin  bool
	stores bool // the node does
	votes  bool // and nothing else: a witness
}

// Admin reports whether the principal is an administrator: root of a storing
// node, or a user of the record with Admin.
func (r Rights) Admin() bool { return r.admin }

// admits reports whether the principal may say who belongs to the cluster and who
// he is there: an administrator on a storing node. On any other his credential is
// in the hands of that node's root, who must not become more by it, nor for longer
// than it lasts.
func (r Rights) admits() bool { return r.admin && r.stores }

// clients and window are how many clients the principal's node may have in the
// record, and how many unacknowledged results each.
func (r Rights) clients() uint64 {
	if r.stores {
		return StoreClients
	}
	return OtherClients
}

func (r Rights) window() uint64 {
	if r.stores {
		return Window
	}
	return OtherWindow
}

// rights finds out what who may do. Refused with class Unauthorized is who is
// nobody: no member's, a user of a node that may not vouch and not of the
// record, or a disabled one.
func (s *store) rights(who principal.Principal) (Rights, Refusal) {
	if !who.Valid() || who.UID == principal.NoUID {
		return Rights{}, no(errs.Unauthorized, "the request does not say who asks")
	}
	m := s.member(who.Node)
	switch {
	case m == nil:
		return Rights{}, no(errs.Unauthorized, "%v is no member", who.Node)
	case !m.State.Belongs():
		return Rights{}, no(errs.Unauthorized, "%v is no member any more", who.Node)
	}
	r := Rights{who: who, stores: m.Role == RoleStore, votes: m.Role == RoleWitness}
	if who.System {
		return r, done
	}
	var u User
	known := s.load(s.key(tagUser, uint64(who.UID)), &u)
	switch {
	case r.votes:
		return Rights{}, no(errs.Unauthorized, "%v is a %s, it has no users", who.Node, m.Role)
	case !r.stores && (!known || u.Name != who.User): // uid 0 is never known
		return Rights{}, no(errs.Unauthorized, "%v is no user of the cluster", who)
	case known && u.Disabled:
		return Rights{}, no(errs.Unauthorized, "user %s is disabled", u.Name)
	}
	r.admin = known && u.Admin || r.stores && who.UID == 0
	return r, done
}

// may judges a command as a whole; keys and jobs are judged one by one.
func (t *txn) may(c *Command) Refusal {
	r := t.rights
	ok, need := true, ""
	switch {
	case c.AddToken != nil, c.DropToken != nil, c.PutUser != nil, c.DropUser != "":
		ok, need = r.admits(), "an administrator on a storing node"
	case c.AddLogin != nil: // not from a client node: a credential must not prolong itself
		u := t.user(c.AddLogin.User)
		self := u != nil && r.stores && !r.who.System && u.UID == r.who.UID
		ok, need = r.admits() || self, "an administrator, or the user, on a storing node"
	case c.Init != nil, c.AddMember != nil, c.Login != nil, c.Note != nil, c.GrantJobs != 0, len(c.PutJobs) > 0:
		ok, need = r.who.System && r.stores || c.Init != nil && r.admits(), "a storing node"
	case c.UpdateMember != nil:
		ok, need = t.mayUpdate(c.UpdateMember), "an administrator on a storing node"
	}
	if !ok {
		return no(errs.Permission, "%v may not: it takes %s", r.who, need)
	}
	return done
}

// mayUpdate: a node tells where it is, and that it goes or stays after all;
// storing nodes bring the members through their lives, but put nobody out.
func (t *txn) mayUpdate(c *UpdateMember) bool {
	r := t.rights
	switch {
	case r.admits():
		return true
	case !r.who.System || c.State == Removed || c.Labels != nil:
		return false
	case r.who.Node != c.Node:
		return r.stores && c.Hostname == "" && c.Addr == ""
	case r.stores || c.State != Active: // the same again changes nothing
		return true
	}
	m := t.member(c.Node)
	return m != nil && m.State == Leaving
}

// mayPutJob: of the storing nodes, a job's home and the one that runs it speak
// about it; all say that it is lost.
func (t *txn) mayPutJob(j *Job, known bool) Refusal {
	me := t.rights.who.Node
	if j.Home != me && j.Node != me && !(known && j.State == JobLost) {
		return no(errs.Permission, "job %d is not %v's to speak about", j.ID, me)
	}
	return done
}

// keySpace says whose a key, or all keys that begin with it, are: settings, or
// those of a uid.
func keySpace(key string) (uid uint32, settings, ok bool) {
	if strings.HasPrefix(key, "settings/") {
		return 0, true, true
	}
	rest, ok := strings.CutPrefix(key, "user/")
	num, _, slash := strings.Cut(rest, "/")
	n, err := strconv.ParseUint(num, 10, 32)
	if !ok || !slash || err != nil || n == principal.NoUID || len(num) > 1 && num[0] == '0' { // one way to write it
		return 0, false, false
	}
	return uint32(n), false, true
}

// mayWrite judges the writing of a key of a space.
func (r Rights) mayWrite(key string) Refusal {
	uid, settings, ok := keySpace(key)
	switch {
	case !ok:
		return no(errs.Permission, "there are keys settings/NAME and user/UID/...; not %q", shown(key))
	case r.admin || !settings && !r.who.System && uid == r.who.UID:
		return done
	}
	return no(errs.Permission, "%v may not write %s", r.who, key)
}

// MayRead reports whether the principal may read the key, or all keys that begin
// with it: settings all may, users' keys that user, administrators and storing
// nodes.
func (r Rights) MayRead(key string) bool {
	if r.admin || r.who.System && r.stores {
		return true
	}
	uid, settings, ok := keySpace(key)
	return ok && (settings || !r.who.System && uid == r.who.UID)
}

// MaySee reports whether the principal may learn of the change.
func (r Rights) MaySee(e Event) bool {
	switch e.Kind {
	case KindKey:
		return r.MayRead(e.Key)
	case KindToken, KindLogin:
		return r.admin || r.who.System && r.stores
	case KindUser:
		return r.MayList() || !r.who.System && e.Key == r.who.User
	case KindJob, KindGrant:
		return r.admin || r.stores
	}
	return true
}

// MayList reports whether the principal may know all users: administrators and
// whoever is on a storing node may, as all may read /etc/passwd there.
func (r Rights) MayList() bool { return r.admin || r.stores }

// MaySeeUser reports whether the principal may know of the user: who may not list
// them knows himself.
func (r Rights) MaySeeUser(u *User) bool {
	return r.MayList() || !r.who.System && u.UID == r.who.UID
}

// Rights finds out what a principal may do. Errors of class Unauthorized mean
// that who is nobody here.
func (v View) Rights(who principal.Principal) (r Rights, err error) {
	defer caught(&err)
	r, no := v.s.rights(who)
	return r, no.Error("", who.String())
}

// MayRead returns nil if who may read the key, or all keys that begin with it;
// else an error of class Permission or Unauthorized.
func (v View) MayRead(who principal.Principal, key string) error {
	r, err := v.Rights(who)
	if err == nil && !r.MayRead(key) {
		return errs.E(errs.Permission, "read", shown(key), "%v may not", who)
	}
	return err
}
