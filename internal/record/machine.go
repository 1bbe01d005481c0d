package record

import (
	"fmt"

	"github.com/cockroachdb/pebble/v2"

	"github.com/unum-os/unum/internal/errs"
	"github.com/unum-os/unum/internal/ids"
	"github.com/unum-os/unum/internal/wire"
)

// Space names the keys of a group.
type Space interface {
	Key(parts ...[]byte) []byte
}

// Machine is the state machine of the record. The value holds only the hook,
// which is set before the group runs, and what it needs to call it.
type Machine struct {
	// OnChange is called after changes became visible to readers, with the
	// revision; 0 when it is not known (after a snapshot was installed, or at
	// start). It must not block. Nil: nobody is told.
	OnChange func(revision uint64)

	applied  uint64 // index of the last command applied here
	revision uint64 // after it
	told     uint64 // revision last told
	cache    *cache
}

// Applied tells that everything up to index is visible to readers.
func (m *Machine) Applied(index uint64) {
	if m.OnChange == nil {
		return
	}
	if index > m.applied { // installed, not applied here
		m.told = 0
		m.OnChange(0)
		return
	}
	if m.revision != m.told {
		m.told = m.revision
		m.OnChange(m.revision)
	}
}

// ApplyTo does one command at index; b is an indexed batch, all reads and
// writes go through it. It always returns a *Result.
func (m *Machine) ApplyTo(b *pebble.Batch, space Space, index uint64, cmd []byte) *Result {
	t := &txn{store: store{r: b, w: b, prefix: space.Key()}, index: index}
	t.load(t.key(tagCounters), &t.count)
	was := t.count
	t.begun = was.Revision
	t.cache = m.cacheOf(was.Index)
	res := t.command(cmd)
	if t.count != was {
		t.save(t.key(tagCounters), t.count)
	}
	t.cache.index = t.count.Index
	m.cache, m.applied, m.revision = t.cache, index, t.count.Revision
	return res
}

// DecodeCommand decodes and checks the form of a command. Errors have class
// Corrupt, TooLarge or Invalid.
func DecodeCommand(b []byte) (*Command, error) {
	if len(b) > MaxCommand {
		return nil, errs.E(errs.TooLarge, "command", "", "%d bytes, limit %d", len(b), MaxCommand)
	}
	var c Command
	if err := wire.Unmarshal(b, &c); err != nil {
		return nil, err
	}
	kinds := 0
	for _, is := range []bool{
		c.Init != nil, c.AddToken != nil, c.DropToken != nil, c.AddMember != nil,
		c.UpdateMember != nil, c.GrantJobs != 0, len(c.PutJobs) > 0, c.Barrier,
		c.Put != nil, c.Delete != nil, len(c.Batch) > 0, c.PutUser != nil, c.DropUser != "",
		c.AddLogin != nil, c.Login != nil, c.Note != nil,
	} {
		if is {
			kinds++
		}
	}
	switch {
	case kinds != 1:
		return nil, errs.E(errs.Invalid, "command", "", "%d things asked for; want one", kinds)
	case !c.Barrier && (c.Client == 0 || c.Seq == 0 || c.Acked > c.Seq):
		return nil, errs.E(errs.Invalid, "command", "", "client %d, sequence number %d, acknowledged %d", c.Client, c.Seq, c.Acked)
	}
	return &c, nil
}

func no(class errs.Class, format string, args ...any) Refusal {
	return Refusal{Err: uint8(class), Why: fmt.Sprintf(format, args...)}
}

func (r Refusal) refused() bool { return r.Err != 0 }

// Error returns r as an error of its class; nil when nothing was refused.
func (r Refusal) Error(op, subject string) error {
	if r.Err == 0 {
		return nil
	}
	return errs.E(errs.Class(r.Err), op, subject, "%s", r.Why)
}

// done means the command was carried out.
var done Refusal

// client is what is known of a client of the record.
type client struct {
	Acked uint64 `cbor:"1,keyasint"` // results below are forgotten
	Last  uint64 `cbor:"2,keyasint"` // index of its last command
	Top   uint64 `cbor:"3,keyasint"` // greatest sequence number done; above it nothing need be looked for
}

// txn is the work on one command.
type txn struct {
	store
	index  uint64
	count  Counters
	begun  uint64 // revision before it
	rights Rights // of who asks
	now    int64  // cluster time
	events []Event
	use    map[uint64]*useChange
	cache  *cache
}

// set, save and delete are the store's; what is watched is noted on the way, so
// that no change can be forgotten.
func (t *txn) set(key, value []byte) {
	t.note(key, false)
	t.store.set(key, value)
}

func (t *txn) save(key []byte, v any) { t.set(key, wire.MustMarshal(v)) }

func (t *txn) delete(key []byte) {
	t.note(key, true)
	t.store.delete(key)
}

func (t *txn) command(cmd []byte) *Result {
	c, err := DecodeCommand(cmd)
	if err != nil {
		return t.refuse(no(errs.ClassOf(err), "%v", err))
	}
	if c.Barrier {
		return t.refuse(done)
	}
	cl, known := t.client(c.Client)
	res := &Result{}
	key := t.key(tagDone, c.Client, c.Seq)
	if known && c.Seq >= cl.Acked && c.Seq <= cl.Top && t.load(key, res) {
		return res
	}
	acked := max(cl.Acked, c.Acked)
	switch {
	case c.Seq < acked:
		return t.refuse(no(errs.Stale, "command %d was answered and acknowledged", c.Seq))
	case c.Seq-acked >= Window:
		return t.refuse(no(errs.Busy, "command %d is more than %d ahead of what is acknowledged, %d", c.Seq, Window, acked))
	}
	t.meet(c, cl, known, acked)
	t.do(c, res)
	t.settle()
	res.Revision, res.Index = t.count.Revision, t.index
	t.save(key, *res)
	return res
}

func (t *txn) refuse(r Refusal) *Result {
	return &Result{Refusal: r, Revision: t.count.Revision, Index: t.index}
}

// meet notes that a client has spoken, and forgets the one that has not for
// longest when they are too many.
func (t *txn) meet(c *Command, cl client, known bool, acked uint64) {
	id := c.Client
	t.count.Index = t.index
	if known {
		t.delete(t.key(tagClientAt, cl.Last, id))
		// Its results lie within a window; deleted unread, a scan would cost more
		// than all the rest of a small command.
		for seq := cl.Acked; seq < min(acked, cl.Acked+Window); seq++ {
			t.delete(t.key(tagDone, id, seq))
		}
	} else if t.count.Clients++; t.count.Clients > MaxClients {
		lo := t.key(tagClientAt)
		t.scan(lo, after(lo), func(k, _ []byte) bool {
			t.forget(number(k, 0), number(k, 1))
			return false
		})
	}
	cl = client{Acked: acked, Last: t.index, Top: max(cl.Top, c.Seq)}
	t.save(t.key(tagClient, id), cl)
	remember(t.cache.clients, cachedOther, id, cl)
	t.set(t.key(tagClientAt, t.index, id), nil)
}

func (t *txn) forget(last, id uint64) {
	t.delete(t.key(tagClientAt, last, id))
	t.delete(t.key(tagClient, id))
	delete(t.cache.clients, id)
	lo := t.key(tagDone, id)
	t.clear(lo, after(lo))
	t.count.Clients--
}

// do carries out a command that was not done before, if who asks may, and tells
// the audit.
func (t *txn) do(c *Command, res *Result) {
	if c.Init == nil && t.count.NextNode == 0 {
		res.Refusal = no(errs.Unavailable, "the cluster is not founded yet")
		return
	}
	t.now = c.time()
	if c.Init == nil {
		t.rights, res.Refusal = t.rightsOf(c.Who)
		if !res.Refusal.refused() {
			res.Refusal = t.may(c)
		}
	}
	if !res.Refusal.refused() {
		t.carryOut(c, res)
	}
	t.audit(c, res)
}

func (t *txn) carryOut(c *Command, res *Result) {
	switch {
	case c.Init != nil:
		res.Node, res.Refusal = t.init(c.Init)
	case c.AddToken != nil:
		res.Refusal = t.addToken(*c.AddToken)
	case c.DropToken != nil:
		res.Refusal = t.dropToken(*c.DropToken)
	case c.AddMember != nil:
		res.Node, res.Refusal = t.addMember(c.AddMember)
	case c.UpdateMember != nil:
		res.Refusal = t.updateMember(c.UpdateMember)
	case c.GrantJobs != 0:
		res.FirstJob, res.Refusal = t.grantJobs(c.GrantJobs)
	case len(c.PutJobs) > 0:
		res.Jobs, res.Refusal = t.putJobs(c.PutJobs)
	case c.Put != nil:
		res.Mod, res.Refusal = t.put(c.Put)
	case c.Delete != nil:
		res.Mod, res.Refusal = t.remove(c.Delete)
	case len(c.Batch) > 0:
		res.Keys, res.Refusal = t.batch(c.Batch)
	case c.PutUser != nil:
		res.Refusal = t.putUser(*c.PutUser)
	case c.DropUser != "":
		res.Refusal = t.dropUser(c.DropUser)
	case c.AddLogin != nil:
		res.Refusal = t.addLogin(*c.AddLogin)
	case c.Login != nil:
		res.User, res.Refusal = t.login(c.Login)
	case c.Note != nil:
		res.Refusal = t.takeNote(c.Note)
	}
}

// settle writes what the command gathered.
func (t *txn) settle() {
	t.saveUsage()
	t.saveEvents()
}

// member returns a member, nil when there is none.
func (s *store) member(id ids.Node) *Member {
	var m Member
	if !s.load(s.key(tagMember, uint64(id)), &m) {
		return nil
	}
	return &m
}

func (s *store) members() []Member {
	var out []Member
	lo := s.key(tagMember)
	s.scan(lo, after(lo), func(k, v []byte) bool {
		var m Member
		s.decode(k, v, &m)
		out = append(out, m)
		return true
	})
	return out
}

func (s *store) tokenKey(id TokenID) []byte { return append(s.key(tagToken), id[:]...) }

func (s *store) tokens() []Token {
	var out []Token
	lo := s.key(tagToken)
	s.scan(lo, after(lo), func(k, v []byte) bool {
		var t Token
		s.decode(k, v, &t)
		out = append(out, t)
		return true
	})
	return out
}
