package record

import "github.com/unum-os/unum/internal/principal"

// How much a cache remembers of each kind. Nothing but time depends on it.
const (
	cachedKeys  = 8192 // keys remembered
	cachedOther = 4096 // remembered of each: clients, principals' rights, users' usages
)

// cache remembers what the last commands read or wrote, so that a small command
// does not read the database for what every command needs. It is that of one
// state: the one after the command at index. It never decides anything: a
// machine with an empty one comes to the same state.
type cache struct {
	index   uint64 // Counters.Index of the state
	clients map[clientID]client
	rights  map[principal.Principal]Rights
	uses    map[uint64]usage
	keys    map[string]*keyMeta
	history []uint64 // the keys of the history, in order; nil: not read yet
}

// keyMeta is a Key without its value.
type keyMeta struct {
	create, mod, version uint64
	size                 uint64 // of the value
}

// cacheOf takes the machine's cache for a command on the state after index. The
// machine has none until it is given back, so that a command that does not come
// to its end leaves nothing behind.
func (m *Machine) cacheOf(index uint64) *cache {
	c := m.cache
	m.cache = nil
	if c == nil || c.index != index {
		c = &cache{clients: map[clientID]client{}, rights: map[principal.Principal]Rights{}, uses: map[uint64]usage{}, keys: map[string]*keyMeta{}}
	}
	return c
}

// remember puts an entry into one of the cache's maps; a full one begins anew.
func remember[K comparable, V any](m map[K]V, limit int, k K, v V) {
	if len(m) >= limit {
		clear(m)
	}
	m[k] = v
}

// client returns what is known of a client.
func (t *txn) client(id clientID) (cl client, known bool) {
	if cl, known = t.cache.clients[id]; known {
		return cl, true
	}
	known = t.load(t.key(tagClient, uint64(id.node), id.number), &cl)
	return cl, known
}

// rightsOf is store.rights.
func (t *txn) rightsOf(who principal.Principal) (Rights, Refusal) {
	if r, ok := t.cache.rights[who]; ok {
		return r, done
	}
	r, no := t.store.rights(who)
	if !no.refused() {
		remember(t.cache.rights, cachedOther, who, r)
	}
	return r, no
}

// keyMeta returns what is known of a key, to be changed in place; all zero when
// there is none.
func (t *txn) keyMeta(key string, dbKey []byte) *keyMeta {
	m, ok := t.cache.keys[key]
	if !ok {
		var k Key
		t.load(dbKey, &k)
		m = &keyMeta{k.Create, k.Mod, k.Version, uint64(len(k.Value))}
		remember(t.cache.keys, cachedKeys, key, m)
	}
	return m
}

// history returns under which revisions events are kept, in order.
func (t *txn) history() []uint64 {
	if t.cache.history == nil {
		lo := t.key(tagHistory)
		t.scan(lo, after(lo), func(k, _ []byte) bool {
			t.cache.history = append(t.cache.history, number(k, 0))
			return true
		})
	}
	return t.cache.history
}
