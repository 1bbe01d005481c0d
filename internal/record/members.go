package record

import (
	"github.com/unum-os/unum/internal/errs"
	"github.com/unum-os/unum/internal/ids"
)

func (t *txn) init(c *Init) (ids.Node, Refusal) {
	switch {
	case t.count.NextNode != 0:
		return 0, no(errs.Exists, "the cluster is founded already")
	case len(c.Name) > MaxText || c.Name == "":
		return 0, no(errs.Invalid, "cluster name of %d bytes, want 1 to %d", len(c.Name), MaxText)
	case len(c.CACert) > MaxPEM:
		return 0, no(errs.TooLarge, "certificate of %d bytes, limit %d", len(c.CACert), MaxPEM)
	}
	if r := checkMember(c.Hostname, c.Addr, c.Labels); r.refused() {
		return 0, r
	}
	t.save(t.key(tagInfo), Info{
		ClusterID: c.ClusterID, Name: c.Name, Created: c.Now,
		CACert: c.CACert,
	})
	t.count.NextNode, t.count.NextJob = 1, 1
	return t.join(Member{
		Hostname: c.Hostname, Addr: c.Addr, Role: RoleStore, State: Active,
		Labels: c.Labels, JoinedAt: c.Now, Key: c.Key,
	}), done
}

func checkMember(host, addr string, labels map[string]string) Refusal {
	if len(host) > MaxText || len(addr) > MaxText {
		return no(errs.TooLarge, "host name of %d bytes, address of %d, limit %d", len(host), len(addr), MaxText)
	}
	if len(labels) > MaxLabels {
		return no(errs.TooLarge, "%d labels, limit %d", len(labels), MaxLabels)
	}
	for k, v := range labels { // the order does not show in the answer
		if k == "" || len(k) > MaxText || len(v) > MaxText {
			return no(errs.Invalid, "a label's name has 1 to %d bytes, its value at most as many", MaxText)
		}
	}
	return done
}

// join gives m the next id and keeps it.
func (t *txn) join(m Member) ids.Node {
	t.count.Revision++
	m.ID, m.Joined = t.count.NextNode, t.count.Revision
	t.count.NextNode++
	t.save(t.key(tagMember, uint64(m.ID)), m)
	return m.ID
}

func (t *txn) addToken(k Token) Refusal {
	if k.Uses == 0 || k.Role < RoleStore || k.Role > RoleWitness {
		return no(errs.Invalid, "token for %d uses and role %d", k.Uses, k.Role)
	}
	key := t.tokenKey(k.ID)
	if _, exists := t.get(key); exists {
		return no(errs.Exists, "the token exists already")
	}
	if all := t.tokens(); len(all) >= MaxTokens {
		first := -1 // the one whose end is nearest goes, unless it has none
		for i, x := range all {
			if x.Uses == 0 {
				first = i
				break
			}
			if x.Expires != 0 && (first < 0 || x.Expires < all[first].Expires) {
				first = i
			}
		}
		if first < 0 {
			return no(errs.NoSpace, "%d tokens exist already", len(all))
		}
		t.delete(t.tokenKey(all[first].ID))
	}
	t.count.Revision++
	t.save(key, k)
	return done
}

func (t *txn) dropToken(id TokenID) Refusal {
	key := t.tokenKey(id)
	if _, exists := t.get(key); !exists {
		return no(errs.NotFound, "no such token")
	}
	t.count.Revision++
	t.delete(key)
	return done
}

// admission judges a request to join: the member that asked so before, or the token
// by which it may become one.
func (s *store) admission(c *AddMember) (was ids.Node, k Token, r Refusal) {
	if r := checkMember(c.Hostname, c.Addr, c.Labels); r.refused() {
		return 0, k, r
	}
	for _, m := range s.members() {
		if m.Key == c.Key && m.Token == c.Token && m.State <= Active {
			return m.ID, k, done
		}
	}
	switch {
	case !s.load(s.tokenKey(c.Token), &k):
		r = no(errs.Unauthorized, "the token is not one of this cluster")
	case k.Expires != 0 && c.Now >= k.Expires:
		r = no(errs.Unauthorized, "the token has expired")
	case k.Uses == 0:
		r = no(errs.Unauthorized, "the token is used up")
	case c.Role > RoleWitness || c.Role != 0 && c.Role != k.Role && k.Role != RoleStore:
		r = no(errs.Unauthorized, "the token is for role %s, not %s", k.Role, c.Role)
	}
	return 0, k, r
}

// MayJoin says why the command would be refused as the record is now; nil: it
// would not be, and is to be proposed. Who asks may be anybody, and as often as he
// likes: he must not get as far as a proposal. It reports whether his token is one
// that the cluster gave and still has.
func (v View) MayJoin(c *AddMember) (given bool, err error) {
	defer caught(&err)
	_, k, r := v.s.admission(c)
	return k.ID == c.Token, r.Error("", "")
}

func (t *txn) addMember(c *AddMember) (ids.Node, Refusal) {
	was, k, r := t.admission(c)
	if was != 0 || r.refused() {
		return was, r
	}
	role := c.Role
	if role == 0 {
		role = k.Role
	}
	k.Uses-- // a used-up token stays until it expires, to be named as such
	t.save(t.tokenKey(c.Token), k)
	return t.join(Member{
		Hostname: c.Hostname, Addr: c.Addr, Role: role, State: Joining,
		Labels: c.Labels, JoinedAt: c.Now, Key: c.Key, Token: c.Token,
	}), done
}

func (t *txn) updateMember(c *UpdateMember) Refusal {
	if r := checkMember(c.Hostname, c.Addr, c.Labels); r.refused() {
		return r
	}
	m := t.member(c.Node)
	switch {
	case m == nil:
		return no(errs.NotFound, "no member %s", c.Node)
	case c.State > Removed:
		return no(errs.Invalid, "state %d", c.State)
	case !m.State.Belongs() && (c.State != m.State || c.Hostname != "" || c.Addr != "" || c.Labels != nil):
		return no(errs.Stale, "%s has %s", c.Node, map[State]string{Left: "left", Removed: "been removed"}[m.State])
	case c.State == Active && m.State == Leaving: // it stays after all
	case c.State != 0 && c.State < m.State:
		return no(errs.Invalid, "%s is %s, it cannot become %s again", c.Node, m.State, c.State)
	case c.State > Active && m.Role == RoleStore && !t.othersStore(m.ID):
		return no(errs.Invalid, "%s is the last storing node", c.Node)
	case c.State == Left && m.State != Left && m.State != Leaving: // the others have nothing of what it kept
		return no(errs.Invalid, "%s is %s: it leaves first, and has left then", c.Node, m.State)
	}
	was := *m
	if c.Hostname != "" {
		m.Hostname = c.Hostname
	}
	if c.Addr != "" {
		m.Addr = c.Addr
	}
	if c.State != 0 {
		m.State = c.State
	}
	if c.Labels != nil {
		m.Labels = c.Labels
	} else if was.Hostname == m.Hostname && was.Addr == m.Addr && was.State == m.State {
		return done // nothing new: readers need not look again
	}
	t.count.Revision++
	t.save(t.key(tagMember, uint64(m.ID)), *m)
	if m.State == Removed && m.ID != t.rights.who.Node { // it is not answered any more; who removes himself is, once
		t.forgetNode(m.ID)
	}
	return done
}

// othersStore reports whether a member other than id stores and stays.
func (t *txn) othersStore(id ids.Node) bool {
	for _, m := range t.members() {
		if m.ID != id && m.Role == RoleStore && (m.State == Joining || m.State == Active) {
			return true
		}
	}
	return false
}
