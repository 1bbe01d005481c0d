package record

import (
	"fmt"
	"slices"

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
	switch {
	case r.Err == 0:
		return nil
	case r.Why == "": // one of many: see untold
		return errs.E(errs.Class(r.Err), op, subject, "%s", errs.Class(r.Err))
	}
	return errs.E(errs.Class(r.Err), op, subject, "%s", r.Why)
}

// untold takes the text from a refusal of a part of a command when another part's
// said is told: each has its class, and a command of a thousand refusals is not
// kept as a thousand sentences. Of those for want of a right one keeps its own,
// for the audit.
func (r *Refusal) untold(told *[2]bool) {
	if !r.refused() {
		return
	}
	said := &told[0]
	if r.denied() {
		said = &told[1]
	}
	if *said {
		r.Why = ""
	}
	*said = true
}

// Denied reports whether anything of the command was refused for want of a right;
// that stands in the audit.
func (res *Result) Denied() bool {
	return res.Refusal.denied() || slices.ContainsFunc(res.Jobs, Refusal.denied) ||
		slices.ContainsFunc(res.Keys, func(k KeyResult) bool { return k.Refusal.denied() })
}

// done means the command was carried out.
var done Refusal

// client is what is known of a client of the record.
type client struct {
	Acked uint64 `cbor:"1,keyasint"` // results below are forgotten
	Last  uint64 `cbor:"2,keyasint"` // index of its last command
	Top   uint64 `cbor:"3,keyasint"` // greatest sequence number done; above it nothing need be looked for
}

// clientID names a client: a number means nothing but beside the node that was
// proven to use it. So no node can see, disturb or use up another's.
type clientID struct {
	node   ids.Node
	number uint64
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
	dbKey  []byte // see find
	buf    []byte // for encoding: what is set was copied
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
	// What was answered is answered again before rights are asked for: who has lost
	// them since, maybe by this very command, must learn that it was done. It tells
	// nobody anything new, for it is that node's own.
	id := clientID{c.Who.Node, c.Client}
	cl, known := t.client(id)
	res := &Result{}
	key := t.key(tagResult, uint64(id.node), id.number, c.Seq)
	if known && c.Seq >= cl.Acked && c.Seq <= cl.Top && t.load(key, res) {
		return res
	}
	acked := max(cl.Acked, c.Acked)
	if c.Seq < acked {
		return t.refuse(no(errs.Stale, "command %d was answered and acknowledged", c.Seq))
	}
	if c.Init == nil && t.count.NextNode == 0 {
		return t.refuse(no(errs.Unavailable, "the cluster is not founded yet"))
	}
	// Who may not is not met: nobody takes up room by asking for what he must not
	// have. Such a command changes the audit only, so it is judged anew each time.
	if res.Refusal = t.admit(c); res.Refusal.refused() {
		t.count.Index = t.index
		t.audit(c, res)
		res.Revision, res.Index = t.count.Revision, t.index
		return res
	}
	if ahead := t.rights.window(); c.Seq-acked >= ahead {
		return t.refuse(no(errs.Busy, "command %d is more than %d ahead of what is acknowledged, %d", c.Seq, ahead, acked))
	}
	t.meet(c, id, cl, known, acked)
	t.carryOut(c, res)
	t.audit(c, res)
	t.settle()
	res.Revision, res.Index = t.count.Revision, t.index
	t.save(key, *res)
	return res
}

func (t *txn) refuse(r Refusal) *Result {
	return &Result{Refusal: r, Revision: t.count.Revision, Index: t.index}
}

// meet notes that a client has spoken. One that is new takes the place of the
// one of its node that has not for longest, when that node has as many as it may.
func (t *txn) meet(c *Command, id clientID, cl client, known bool, acked uint64) {
	t.count.Index = t.index
	if known {
		// Its results lie within a window; deleted unread, a scan would cost more
		// than all the rest of a small command.
		for seq := cl.Acked; seq < min(acked, cl.Acked+t.rights.window()); seq++ {
			t.delete(t.key(tagResult, uint64(id.node), id.number, seq))
		}
	} else {
		t.makeRoom(id.node)
		t.count.Clients++
	}
	cl = client{Acked: acked, Last: t.index, Top: max(cl.Top, c.Seq)}
	t.save(t.key(tagClient, uint64(id.node), id.number), cl)
	remember(t.cache.clients, cachedOther, id, cl)
}

// makeRoom forgets clients of a node until it may have one more; the longest
// silent first. It finds them by looking at all of the node's: they are few, and
// a new one comes with a daemon's start.
func (t *txn) makeRoom(node ids.Node) {
	t.dropOld()
	for {
		var n, oldest, last uint64
		lo := t.key(tagClient, uint64(node))
		t.scan(lo, after(lo), func(k, v []byte) bool {
			var cl client
			t.decode(k, v, &cl)
			if n++; n == 1 || cl.Last < last {
				oldest, last = number(k, 1), cl.Last
			}
			return true
		})
		if n < t.rights.clients() {
			return
		}
		t.forget(clientID{node, oldest})
	}
}

func (t *txn) forget(id clientID) {
	t.delete(t.key(tagClient, uint64(id.node), id.number))
	delete(t.cache.clients, id)
	lo := t.key(tagResult, uint64(id.node), id.number)
	t.clear(lo, after(lo))
	t.count.Clients--
}

// forgetNode forgets all clients of a node that was put out.
func (t *txn) forgetNode(node ids.Node) {
	lo := t.key(tagClient, uint64(node))
	t.scan(lo, after(lo), func(k, _ []byte) bool {
		t.forget(clientID{node, number(k, 1)})
		return true
	})
}

// dropOld clears what was kept of clients when they belonged to nobody, and of the
// changes when each revision had a key. A daemon takes another number with each
// start, so none of those clients speaks again; who follows the changes is told that
// they are compacted.
func (t *txn) dropOld() {
	if t.dropAll(tagOldClientAt) {
		t.dropAll(tagOldClient)
		t.dropAll(tagOldResult)
		t.count.Clients = 0
	}
	t.dropAll(tagOldHistory)
}

// dropAll clears a family of keys, and reports whether there was one.
func (t *txn) dropAll(tag byte) (some bool) {
	lo := t.key(tag)
	t.scan(lo, after(lo), func([]byte, []byte) bool { some = true; return false })
	if some {
		if err := t.w.DeleteRange(lo, after(lo), nil); err != nil {
			fail(errs.IO, lo, err)
		}
	}
	return some
}

// admit finds out who asks and whether he may, and the time of the command.
func (t *txn) admit(c *Command) (r Refusal) {
	t.now = c.time()
	if t.count.NextNode == 0 { // Init: who founds the cluster is asked for nothing
		t.rights = Rights{stores: true}
		t.setClock()
		return done
	}
	t.rights, r = t.rightsOf(c.Who)
	t.setClock()
	if !r.refused() {
		r = t.may(c)
	}
	return r
}

// setClock takes the time from a storing node as it says it, and keeps that of
// others near it: what they say is for the audit only, which they must not be
// able to put out of order.
func (t *txn) setClock() {
	switch {
	case t.rights.stores && t.now > 0:
		t.count.Time = t.now
	case !t.rights.stores && t.count.Time != 0:
		t.now = max(t.count.Time-MaxApart, min(t.now, t.count.Time+MaxApart))
	}
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
