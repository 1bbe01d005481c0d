package record

import (
	"encoding/hex"
	"slices"

	"github.com/unum-os/unum/internal/errs"
	"github.com/unum-os/unum/internal/ids"
	"github.com/unum-os/unum/internal/principal"
)

// MaxAudit is how many acts the audit keeps, and as many refusals apart from
// them: who is refused often cannot wash out what was done.
const MaxAudit = 10_000

// Audit is one entry of the audit: an administrative act, or a refusal.
type Audit struct {
	Seq   uint64              `cbor:"1,keyasint"` // grows by one with each entry
	Time  int64               `cbor:"2,keyasint"` // cluster time of the command, ns
	Who   principal.Principal `cbor:"3,keyasint"`
	Door  ids.Node            `cbor:"4,keyasint,omitempty"` // which node refused; 0: the record judged
	What  string              `cbor:"5,keyasint"`
	On    string              `cbor:"6,keyasint,omitempty"`
	Err   uint8               `cbor:"7,keyasint,omitempty"` // an errs.Class; 0: it was done
	Why   string              `cbor:"8,keyasint,omitempty"`
	Count uint64              `cbor:"9,keyasint"`            // how often: a refusal that is the last one again is counted
	Last  int64               `cbor:"10,keyasint,omitempty"` // cluster time of the last of them
}

// Note tells the audit of a refusal at a node's door: a bad credential, a forged
// uid, a token for something else. The node that tells is the command's Who.
type Note struct {
	About principal.Principal `cbor:"1,keyasint"` // as claimed; zero: not even that
	What  string              `cbor:"2,keyasint"`
	On    string              `cbor:"3,keyasint,omitempty"`
	Err   uint8               `cbor:"4,keyasint"` // an errs.Class, not 0
	Why   string              `cbor:"5,keyasint,omitempty"`
}

const (
	actRing     = 0
	refusalRing = 1
)

// act describes a command for the audit; admin says that it is told of when it
// was done, too.
func (t *txn) act(c *Command, res *Result) (what, on string, admin bool) {
	switch {
	case c.Init != nil:
		return "found cluster", c.Init.Name, true
	case c.AddToken != nil:
		return "add token", brief(c.AddToken.ID[:]) + " for role " + c.AddToken.Role.String(), true
	case c.DropToken != nil:
		return "drop token", brief(c.DropToken[:]), true
	case c.AddMember != nil:
		on = c.AddMember.Hostname + " at " + c.AddMember.Addr
		if res.Node != 0 {
			on = res.Node.String() + ", " + on
		}
		return "join", on, true
	case c.UpdateMember != nil:
		u := c.UpdateMember
		if u.State != 0 {
			// A node that does not store may say the same of itself, again and again.
			return "make member " + u.State.String(), u.Node.String(), t.rights.stores || u.State == Left
		}
		return "change member", u.Node.String(), c.Who != principal.Of(u.Node)
	case c.PutUser != nil:
		return "put user", c.PutUser.Name, true
	case c.DropUser != "":
		return "drop user", c.DropUser, true
	case c.AddLogin != nil:
		return "add login", c.AddLogin.User, true
	case c.Login != nil:
		on = c.Login.Node.String()
		if res.User != nil {
			on = res.User.Name + " at " + on
		}
		return "login", on, true
	case c.Put != nil:
		return "put key", c.Put.Key, t.foreign(c.Put.Key)
	case c.Delete != nil:
		return "delete key", c.Delete.Key, t.foreign(c.Delete.Key)
	case len(c.Batch) > 0:
		return "put keys", c.Batch[0].Key, false
	case len(c.PutJobs) > 0:
		return "put jobs", "", false
	case c.GrantJobs != 0:
		return "grant jobs", "", false
	}
	return "note", "", false
}

// foreign reports whether the key is not the asker's own.
func (t *txn) foreign(key string) bool {
	uid, settings, ok := keySpace(key)
	return !ok || settings || uid != t.rights.who.UID
}

func brief(id []byte) string { return hex.EncodeToString(id[:4]) }

// denied reports whether the refusal is of a right.
func (r Refusal) denied() bool {
	return r.Err == uint8(errs.Permission) || r.Err == uint8(errs.Unauthorized)
}

// audit tells of a command what is to be told: administrative acts that changed
// something, their refusals, and whatever else was refused for want of a right.
func (t *txn) audit(c *Command, res *Result) {
	what, on, admin := t.act(c, res)
	e := Audit{Time: t.now, Who: c.Who, What: what, On: on}
	switch {
	case res.Refusal.denied() || admin && t.rights.stores && res.Refusal.refused():
		t.refusal(e, res.Refusal, 1)
	case admin && t.count.Revision != t.begun:
		t.add(actRing, e)
	}
	t.auditEach(e, len(c.Batch), func(i int) (string, Refusal, bool) {
		return c.Batch[i].Key, res.Keys[i].Refusal, t.foreign(c.Batch[i].Key)
	}, len(res.Keys))
	t.auditEach(e, len(c.PutJobs), func(i int) (string, Refusal, bool) {
		return "", res.Jobs[i], false
	}, len(res.Jobs))
}

// auditEach tells of the parts of a command: each act, and the first refusal
// with how many there were. From a node that does not store, the acts of a command
// are told as the refusals are: a thousand must not cost it one command.
func (t *txn) auditEach(e Audit, n int, part func(int) (on string, r Refusal, admin bool), judged int) {
	var first Refusal
	var where, acted string
	var count, acts uint64
	for i := range min(n, judged) {
		on, r, admin := part(i)
		switch {
		case r.denied() || admin && t.rights.stores && r.refused():
			if count++; count == 1 {
				first, where = r, on
			}
		case admin && !r.refused():
			if t.rights.stores {
				e.On = on
				t.add(actRing, e)
			} else if acts++; acts == 1 {
				acted = on
			}
		}
	}
	if acts > 0 {
		told := e
		told.On, told.Count = acted, acts
		t.add(actRing, told)
	}
	if count > 0 {
		e.On = where
		t.refusal(e, first, count)
	}
}

// refusal adds a refusal, or counts it if it is the last one again.
func (t *txn) refusal(e Audit, r Refusal, count uint64) {
	e.Err, e.Why, e.Count = r.Err, short(r.Why), count
	var last Audit
	if n := t.count.Refusals; n > 0 {
		key := t.key(tagAudit, refusalRing, (n-1)%MaxAudit)
		if t.load(key, &last); same(&last, &e) {
			last.Count += count
			last.Last = e.Time
			t.save(key, last)
			return
		}
	}
	t.add(refusalRing, e)
}

func same(a, b *Audit) bool {
	return a.Who == b.Who && a.Door == b.Door && a.What == b.What && a.On == short(b.On) && a.Err == b.Err && a.Why == b.Why
}

func (t *txn) add(ring uint64, e Audit) {
	n := &t.count.Acts
	if ring == refusalRing {
		n = &t.count.Refusals
	}
	e.Seq = t.count.Acts + t.count.Refusals + 1
	e.Count = max(e.Count, 1)
	e.On = short(e.On)
	if !e.Who.Valid() {
		e.Who.User = shown(e.Who.User)
	}
	t.save(t.key(tagAudit, ring, *n%MaxAudit), e)
	*n++
}

// short cuts a text to what an entry keeps.
func short(s string) string {
	if len(s) > MaxText {
		return s[:MaxText]
	}
	return s
}

// takeNote adds what a node refused at its door.
func (t *txn) takeNote(n *Note) Refusal {
	switch {
	case len(n.What) > MaxText || len(n.On) > MaxText || len(n.Why) > MaxText || len(n.About.User) > MaxText:
		return no(errs.TooLarge, "a note's texts have at most %d bytes each", MaxText)
	case n.What == "" || n.Err == 0:
		return no(errs.Invalid, "a note says what was refused, and by which class")
	}
	t.refusal(Audit{Time: t.now, Who: n.About, Door: t.rights.who.Node, What: n.What, On: n.On}, Refusal{n.Err, n.Why}, 1)
	return done
}

// Audit returns the entries after a sequence number that are kept, in order, at
// most limit: the next ones. It does not ask who reads: Rights.Admin says.
func (v View) Audit(after uint64, limit int) ([]Audit, error) {
	all, err := v.audits(after)
	return all[:min(len(all), max(limit, 0))], err
}

// NewestAudit is like Audit, but leaves out the older ones where there are more
// than limit.
func (v View) NewestAudit(after uint64, limit int) ([]Audit, error) {
	all, err := v.audits(after)
	return all[len(all)-min(len(all), max(limit, 0)):], err
}

func (v View) audits(after uint64) (out []Audit, err error) {
	defer caught(&err)
	lo, hi := v.s.key(tagAudit), v.s.key(tagAudit+1)
	v.s.scan(lo, hi, func(k, val []byte) bool {
		var e Audit
		v.s.decode(k, val, &e)
		if e.Seq > after {
			out = append(out, e)
		}
		return true
	})
	slices.SortFunc(out, func(a, b Audit) int {
		if a.Seq < b.Seq {
			return -1
		}
		return 1
	})
	return out, nil
}

// time returns the command's cluster time.
func (c *Command) time() int64 {
	switch {
	case c.Now != 0:
	case c.Init != nil:
		return c.Init.Now
	case c.AddMember != nil:
		return c.AddMember.Now
	case c.Login != nil:
		return c.Login.Now
	}
	return c.Now
}
