package record

import (
	"encoding/binary"
	"encoding/hex"
	"strconv"

	"github.com/unum-os/unum/internal/errs"
	"github.com/unum-os/unum/internal/ids"
)

// MaxHistory is how many revisions the record can tell the changes of: some
// seconds of the busiest cluster, days of a quiet one. Who is further behind
// reads everything anew.
const MaxHistory = 10_000

// Kind says what changed. The numbers are on disk.
type Kind uint8

// The kinds, and what Event.Key then is.
const (
	KindInfo   Kind = 1 // the cluster was founded: nothing
	KindMember Kind = 2 // node: n2
	KindToken  Kind = 3 // hash of the secret, in hex
	KindKey    Kind = 4 // the key
	KindUser   Kind = 5 // name
	KindLogin  Kind = 6 // hash of the secret, in hex
	KindJob    Kind = 7 // id
	KindGrant  Kind = 8 // job ids were given out: the first
)

// String returns the kind's word.
func (k Kind) String() string {
	return word(int(k), "", "info", "member", "token", "key", "user", "login", "job", "grant")
}

// Event is one change of the record. What is there now has to be read: an event
// of the past says that something changed, not what it was.
type Event struct {
	Revision uint64 `cbor:"1,keyasint"`
	Kind     Kind   `cbor:"2,keyasint"`
	Key      string `cbor:"3,keyasint,omitempty"`
	Gone     bool   `cbor:"4,keyasint,omitempty"` // removed by this change
}

// note makes an event of a write of what is watched.
func (t *txn) note(key []byte, gone bool) {
	rest := key[len(t.prefix)+1:]
	switch key[len(t.prefix)] {
	case tagInfo:
		t.event(KindInfo, "", gone)
	case tagUser: // dropUser and putUser make the event: they know the name
		clear(t.cache.rights)
	case tagMember:
		clear(t.cache.rights)
		t.event(KindMember, ids.Node(number(rest, 0)).String(), gone)
	case tagToken:
		t.event(KindToken, hex.EncodeToString(rest), gone)
	case tagKey:
		t.event(KindKey, string(rest), gone)
	case tagLogin:
		t.event(KindLogin, hex.EncodeToString(rest), gone)
	case tagJob:
		t.event(KindJob, strconv.FormatUint(number(rest, 0), 10), gone)
	}
}

// event notes a change. It belongs to the revision that the command has reached,
// and to one of the command's own in any case.
func (t *txn) event(kind Kind, key string, gone bool) {
	rev := max(t.count.Revision, t.begun+1)
	for i := len(t.events) - 1; i >= 0 && t.events[i].Revision == rev; i-- {
		if e := &t.events[i]; e.Kind == kind && e.Key == key {
			e.Gone = gone
			return
		}
	}
	t.events = append(t.events, Event{Revision: rev, Kind: kind, Key: key, Gone: gone})
}

// saveEvents writes the command's events under one key, that of its last
// revision, and drops those that are told no more.
func (t *txn) saveEvents() {
	if len(t.events) == 0 {
		return
	}
	kept := t.history()
	last := t.events[len(t.events)-1].Revision
	t.count.Revision = max(t.count.Revision, last) // whoever writes what is watched makes a revision
	t.buf = appendEvents(t.buf[:0], t.events)
	t.set(t.key(tagHistory, last), t.buf)
	for len(kept) > 0 && kept[0] < oldestTold(last) {
		t.delete(t.key(tagHistory, kept[0]))
		kept = kept[1:]
	}
	t.cache.history = append(kept, last)
}

// appendEvents encodes the events of one command. Of each there are how many
// revisions before the last of them it was, its kind, whether something is gone,
// and the key behind its length.
func appendEvents(b []byte, events []Event) []byte {
	last := events[len(events)-1].Revision
	for _, e := range events {
		b = binary.AppendUvarint(b, last-e.Revision)
		gone := byte(0)
		if e.Gone {
			gone = 1
		}
		b = append(b, byte(e.Kind), gone)
		b = binary.AppendUvarint(b, uint64(len(e.Key)))
		b = append(b, e.Key...)
	}
	return b
}

// decodeEvents calls fn with the events of one command, the last of which is of
// revision last, until it returns false.
func decodeEvents(last uint64, b []byte, fn func(Event) bool) error {
	bad := func() error {
		return errs.E(errs.Corrupt, "decode", "", "events to revision %d: %d bytes are left", last, len(b))
	}
	var rev uint64
	for len(b) > 0 {
		back, n := binary.Uvarint(b)
		if n <= 0 || back >= last || len(b) < n+2 || b[n+1] > 1 {
			return bad()
		}
		e := Event{Revision: last - back, Kind: Kind(b[n]), Gone: b[n+1] == 1}
		if rev != 0 && e.Revision != rev && e.Revision != rev+1 {
			return bad()
		}
		rev = e.Revision
		b = b[n+2:]
		size, n := binary.Uvarint(b)
		if n <= 0 || size > uint64(len(b)-n) {
			return bad()
		}
		e.Key = string(b[n:][:size])
		b = b[n:][size:]
		if !fn(e) {
			return nil
		}
	}
	if rev == 0 || rev != last {
		return bad()
	}
	return nil
}

// oldestTold returns the oldest revision whose changes are told when now is the
// last one.
func oldestTold(now uint64) uint64 { return max(now, MaxHistory) - MaxHistory + 1 }

// historyFrom calls fn with the events from a revision on, in order, until it
// returns false. The first may be of an earlier one: a command's go together.
func (s *store) historyFrom(rev uint64, fn func(Event) bool) {
	s.scan(s.key(tagHistory, rev), after(s.key(tagHistory)), func(k, v []byte) bool {
		more := true
		err := decodeEvents(number(k, 0), v, func(e Event) bool {
			more = fn(e)
			return more
		})
		if err != nil {
			fail(errs.Corrupt, k, err)
		}
		return more
	})
}

// Changes returns what changed after a revision, in order: whole revisions, as
// many as have limit events in all, and one more. Nothing means that nothing
// has changed since. Class Stale means that the changes next after the revision
// are not kept any more; the error names the oldest revision kept, and who
// follows reads everything anew and goes on after the revision it was read at.
func (v View) Changes(after uint64, limit int) (out []Event, err error) {
	defer caught(&err)
	now, err := v.Revision()
	if err != nil || after >= now {
		return nil, err
	}
	if after+1 >= oldestTold(now) {
		last := after
		v.s.historyFrom(after+1, func(e Event) bool {
			switch {
			case e.Revision <= after:
				return true
			case e.Revision > now || e.Revision > last+1: // written meanwhile; dropped meanwhile
				return false
			case e.Revision > last && len(out) >= max(limit, 1):
				return false
			}
			last = e.Revision
			out = append(out, e)
			return true
		})
	}
	if len(out) == 0 {
		return nil, errs.E(errs.Stale, "follow changes", "after revision "+strconv.FormatUint(after, 10),
			"compacted: the oldest revision kept is %d", v.oldest(now))
	}
	return out, nil
}

// oldest returns the oldest revision of which the changes are kept, now+1 if of
// none.
func (v View) oldest(now uint64) uint64 {
	oldest := now + 1
	v.s.historyFrom(oldestTold(now), func(e Event) bool {
		oldest = min(oldest, max(e.Revision, oldestTold(now)))
		return false
	})
	return oldest
}

// Oldest returns the oldest revision of which the changes are kept; one more
// than the revision if none are.
func (v View) Oldest() (rev uint64, err error) {
	defer caught(&err)
	now, err := v.Revision()
	if err != nil {
		return 0, err
	}
	return v.oldest(now), nil
}
