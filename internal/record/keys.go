package record

import (
	"strings"

	"github.com/unum-os/unum/internal/errs"
	"github.com/unum-os/unum/internal/wire"
)

// Limits of keys.
const (
	MaxKey      = 512      // bytes of a key
	MaxValue    = 64 << 10 // bytes of a value
	MaxBatch    = 1000     // puts in one Batch
	MaxKeys     = 1000     // keys of a user, and settings
	MaxKeyBytes = 16 << 20 // bytes of keys and values of a user, and of settings
	maxListed   = 4 << 20  // bytes of keys and values that one List gives, and one more
)

// Put writes a key. Expect nil: whatever there is; else the revision at which
// the key must have been written last, 0: there must be none.
type Put struct {
	Key    string  `cbor:"1,keyasint"`
	Value  []byte  `cbor:"2,keyasint"`
	Expect *uint64 `cbor:"3,keyasint,omitempty"`
}

// Delete removes a key; Expect as in Put.
type Delete struct {
	Key    string  `cbor:"1,keyasint"`
	Expect *uint64 `cbor:"2,keyasint,omitempty"`
}

// KeyResult answers one Put of a Batch; Mod is as in Result. Only the first refusal
// of a Batch says why.
type KeyResult struct {
	Refusal Refusal `cbor:"1,keyasint,omitempty"`
	Mod     uint64  `cbor:"2,keyasint,omitempty"`
}

// Key is a key with its value, as the record keeps it.
type Key struct {
	Key     string `cbor:"-"` // its place says it
	Value   []byte `cbor:"1,keyasint"`
	Create  uint64 `cbor:"2,keyasint"`           // revision at which it came to be
	Mod     uint64 `cbor:"3,keyasint"`           // revision at which it was last written
	Version uint64 `cbor:"4,keyasint"`           // how often it was written since it came to be
	Owner   uint32 `cbor:"5,keyasint,omitempty"` // whose key space it is in; settings: 0
}

// append encodes the key as wire.Marshal does: no other struct is written so often.
func (k *Key) append(b []byte) []byte {
	n := 4
	if k.Owner != 0 {
		n++
	}
	b = wire.AppendMap(b, n)
	b = wire.AppendBytes(wire.AppendUint(b, 1), k.Value)
	b = wire.AppendUint(wire.AppendUint(b, 2), k.Create)
	b = wire.AppendUint(wire.AppendUint(b, 3), k.Mod)
	b = wire.AppendUint(wire.AppendUint(b, 4), k.Version)
	if k.Owner != 0 {
		b = wire.AppendUint(wire.AppendUint(b, 5), uint64(k.Owner))
	}
	return b
}

// usage is what the keys of one space take.
type usage struct {
	Keys  uint64 `cbor:"1,keyasint"`
	Bytes uint64 `cbor:"2,keyasint"`
}

// settingsUse is under which usage the settings are counted: no uid.
const settingsUse = 1 << 32

// inKeys says which bytes a key may have.
var inKeys = func() (in [256]bool) {
	for _, c := range []byte("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789/-_.~@:+=,%") {
		in[c] = true
	}
	return in
}()

// checkKey judges the form of a key: segments of printable characters, as in a
// path.
func checkKey(key string) Refusal {
	if len(key) > MaxKey {
		return no(errs.TooLong, "a key of %d bytes, limit %d", len(key), MaxKey)
	}
	for i := range len(key) {
		if !inKeys[key[i]] {
			return no(errs.Invalid, "key %q: letters, digits and / - _ . ~ @ : + = , %% only", shown(key))
		}
	}
	for seg := range strings.SplitSeq(key, "/") {
		if seg == "" || seg == "." || seg == ".." {
			return no(errs.Invalid, "key %q: no empty segment, no . and no ..", shown(key))
		}
	}
	return done
}

// shown cuts what a stranger sent to what a message bears.
func shown(s string) string {
	if len(s) > 80 {
		return s[:80] + "..."
	}
	return s
}

func (s *store) keyKey(key string) []byte { return s.appendKeyKey(nil, key) }

// appendKeyKey is keyKey in memory that is there.
func (s *store) appendKeyKey(b []byte, key string) []byte {
	return append(append(append(b, s.prefix...), tagKey), key...)
}

// useChange is what a command did to the usage of a space.
type useChange struct{ was, now usage }

// usage returns what a space takes, to be changed in place.
func (t *txn) usage(space uint64) *usage {
	if u := t.use[space]; u != nil {
		return &u.now
	}
	u, ok := t.cache.uses[space]
	if !ok {
		t.load(t.key(tagUsage, space), &u)
		remember(t.cache.uses, cachedOther, space, u)
	}
	if t.use == nil {
		t.use = map[uint64]*useChange{}
	}
	t.use[space] = &useChange{u, u}
	return &t.use[space].now
}

// saveUsage writes the usages that the command changed; their order does not
// show.
func (t *txn) saveUsage() {
	for space, u := range t.use {
		switch {
		case u.now == u.was:
			continue
		case u.now.Keys == 0:
			t.delete(t.key(tagUsage, space))
		default:
			t.save(t.key(tagUsage, space), u.now)
		}
		remember(t.cache.uses, cachedOther, space, u.now)
	}
}

// find judges who may write the key, and returns what is there, to be changed in
// place. Of the database's key the next find makes another.
func (t *txn) find(key string, expect *uint64) (dbKey []byte, was *keyMeta, space uint64, r Refusal) {
	if r := checkKey(key); r.refused() {
		return nil, &keyMeta{}, 0, r
	}
	if r := t.rights.mayWrite(key); r.refused() {
		return nil, &keyMeta{}, 0, r
	}
	uid, settings, _ := keySpace(key)
	if space = uint64(uid); settings {
		space = settingsUse
	}
	t.dbKey = t.appendKeyKey(t.dbKey[:0], key)
	dbKey = t.dbKey
	was = t.keyMeta(key, dbKey)
	switch {
	case expect == nil || *expect == was.mod:
	case *expect == 0:
		r = no(errs.Exists, "%s exists, since revision %d", key, was.create)
	case was.mod == 0:
		r = no(errs.NotFound, "there is no key %s", key)
	default:
		r = no(errs.Stale, "%s was written at revision %d, not %d", key, was.mod, *expect)
	}
	return dbKey, was, space, r
}

func (t *txn) put(p *Put) (mod uint64, r Refusal) {
	if len(p.Value) > MaxValue {
		return 0, no(errs.TooLarge, "a value of %d bytes, limit %d", len(p.Value), MaxValue)
	}
	dbKey, was, space, r := t.find(p.Key, p.Expect)
	if r.refused() {
		return was.mod, r
	}
	use := t.usage(space)
	now := *use
	if was.mod == 0 {
		now.Keys++
		now.Bytes += uint64(len(p.Key))
	}
	now.Bytes += uint64(len(p.Value)) - was.size
	if now.Keys > use.Keys && now.Keys > MaxKeys || now.Bytes > use.Bytes && now.Bytes > MaxKeyBytes {
		return was.mod, no(errs.NoSpace, "%s would make %d keys of %d bytes in all; limits %d and %d", p.Key, now.Keys, now.Bytes, MaxKeys, MaxKeyBytes)
	}
	*use = now
	t.count.Revision++
	k := keyMeta{create: was.create, mod: t.count.Revision, version: was.version + 1, size: uint64(len(p.Value))}
	if k.version == 1 {
		k.create = k.mod
	}
	owner := uint32(space) // 0 of the settings
	t.buf = (&Key{Value: p.Value, Create: k.create, Mod: k.mod, Version: k.version, Owner: owner}).append(t.buf[:0])
	t.set(dbKey, t.buf)
	*was = k
	return k.mod, done
}

func (t *txn) remove(d *Delete) (mod uint64, r Refusal) {
	dbKey, was, space, r := t.find(d.Key, d.Expect)
	if !r.refused() && was.mod == 0 {
		r = no(errs.NotFound, "there is no key %s", d.Key)
	}
	if r.refused() {
		return was.mod, r
	}
	use := t.usage(space)
	use.Keys--
	use.Bytes -= uint64(len(d.Key)) + was.size
	t.count.Revision++
	t.delete(dbKey)
	delete(t.cache.keys, d.Key)
	return 0, done
}

func (t *txn) batch(ps []Put) ([]KeyResult, Refusal) {
	if len(ps) > MaxBatch {
		return nil, no(errs.TooLarge, "%d puts, limit %d", len(ps), MaxBatch)
	}
	out := make([]KeyResult, len(ps))
	var told [2]bool
	for i := range ps {
		out[i].Mod, out[i].Refusal = t.put(&ps[i])
		out[i].Refusal.untold(&told)
	}
	return out, done
}

// Get returns a key; class NotFound if there is none. It does not ask who reads:
// MayRead does, as for List.
func (v View) Get(key string) (k Key, err error) {
	defer caught(&err)
	if !v.s.load(v.s.keyKey(key), &k) {
		return Key{}, errs.E(errs.NotFound, "key", shown(key), "there is no such key")
	}
	k.Key = key
	return k, nil
}

// List returns keys that begin with prefix and come after the key from, in
// order: at most limit, fewer when they are long. More says that there are more.
func (v View) List(prefix, from string, limit int) (out []Key, more bool, err error) {
	defer caught(&err)
	lo, hi := v.s.keyKey(prefix), after(v.s.keyKey(prefix))
	if from >= prefix && from != "" {
		lo = append(v.s.keyKey(from), 0)
	}
	if string(lo) >= string(hi) {
		return nil, false, nil
	}
	size := 0
	v.s.scan(lo, hi, func(key, val []byte) bool {
		if more = len(out) >= limit || size > maxListed; more {
			return false
		}
		k := Key{Key: string(key)}
		v.s.decode(key, val, &k)
		size += len(key) + len(val)
		out = append(out, k)
		return true
	})
	return out, more, nil
}
