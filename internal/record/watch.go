package record

import (
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

// change is what of an Event its slot keeps.
type change struct {
	_    struct{} `cbor:",toarray"`
	Kind Kind
	Gone bool
	Key  []byte
}

// slot is where the changes of one revision are kept, until the one MaxHistory
// revisions later takes its place: a ring costs one write for each revision,
// and no search for what is too old.
type slot struct {
	_        struct{} `cbor:",toarray"`
	Revision uint64
	Changes  []change
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

// saveEvents writes the slots of the command's revisions.
func (t *txn) saveEvents() {
	var s slot
	for i, e := range t.events {
		s.Revision = e.Revision
		s.Changes = append(s.Changes, change{Kind: e.Kind, Gone: e.Gone, Key: []byte(e.Key)})
		if i+1 == len(t.events) || t.events[i+1].Revision != e.Revision {
			t.save(t.key(tagHistory, e.Revision%MaxHistory), s)
			s.Changes = s.Changes[:0]
		}
	}
	if n := len(t.events); n > 0 { // whoever writes what is watched makes a revision
		t.count.Revision = max(t.count.Revision, t.events[n-1].Revision)
	}
}

// Changes returns what changed after a revision, in order: whole revisions, as
// many as have limit events in all, and one more. Nothing means that nothing
// has changed since. Class Stale means that the changes next after the revision
// are not kept any more; the error names the oldest revision kept, and who
// follows reads everything anew and goes on after the revision it was read at.
func (v View) Changes(after uint64, limit int) (out []Event, err error) {
	defer caught(&err)
	now, err := v.Revision()
	if err != nil {
		return nil, err
	}
	for rev := after + 1; rev <= now && len(out) < max(limit, 1); rev++ {
		var s slot
		if !v.s.load(v.s.key(tagHistory, rev%MaxHistory), &s) || s.Revision != rev {
			if len(out) > 0 { // overtaken while reading
				return out, nil
			}
			return nil, errs.E(errs.Stale, "follow changes", "after revision "+strconv.FormatUint(after, 10),
				"compacted: the oldest revision kept is %d", v.oldest(now))
		}
		for _, c := range s.Changes {
			out = append(out, Event{Revision: rev, Kind: c.Kind, Key: string(c.Key), Gone: c.Gone})
		}
	}
	return out, nil
}

// oldest returns the oldest revision of which the changes are kept, now+1 if of
// none.
func (v View) oldest(now uint64) uint64 {
	rev := now + 1
	for rev > 1 && rev+MaxHistory > now+1 {
		var s slot
		if !v.s.load(v.s.key(tagHistory, (rev-1)%MaxHistory), &s) || s.Revision != rev-1 {
			break
		}
		rev--
	}
	return rev
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
