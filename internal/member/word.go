package member

import (
	"maps"
	"slices"
	"time"

	"github.com/hashicorp/memberlist"

	"github.com/unum-os/unum/internal/errs"
	"github.com/unum-os/unum/internal/ids"
	"github.com/unum-os/unum/internal/wire"
)

const (
	// MaxPayload bounds a broadcast: several fit a gossip packet.
	MaxPayload = 8 << 10
	// packetSize is how much gossip goes into one cast.
	packetSize = 48 << 10
	// maxWords bounds the words taken from one peer's state.
	maxWords = 1 << 16
	// maxStrange bounds the topics on which words of nodes not known to be alive are
	// kept: there are few such nodes for the moment it takes to hear of them.
	maxStrange = 256
	// direct is the size of a cluster up to which a word's author reaches all others
	// itself, at the next tick (memberlist's GossipNodes, and itself): nobody
	// passes it on. Whoever missed it hears the next, or the exchange of states.
	direct = 4
	// forgetAfter is how long the words of a node that is not alive are kept.
	forgetAfter = time.Minute
)

// word is a node's latest broadcast of a kind.
type word struct {
	Node    ids.Node `cbor:"1,keyasint"`
	Kind    byte     `cbor:"2,keyasint"`
	Seq     uint64   `cbor:"3,keyasint"` // grows with each word of the node
	Payload []byte   `cbor:"4,keyasint,omitempty"`

	heard time.Time
}

type topic struct {
	node ids.Node
	kind byte
}

func (w *word) topic() topic { return topic{w.Node, w.Kind} }

// rumour is a word on its way through memberlist's queue.
type rumour struct {
	topic topic
	msg   []byte
}

func (r *rumour) Invalidates(o memberlist.Broadcast) bool {
	other, ok := o.(*rumour)
	return ok && other.topic == r.topic
}

// Name makes the queue find an older word on the same topic.
func (r *rumour) Name() string    { return r.topic.node.String() + "/" + string(rune(r.topic.kind)) }
func (r *rumour) Message() []byte { return r.msg }
func (r *rumour) Finished()       {}

// Broadcast tells all nodes payload, this node's latest word of a kind, in place
// of an earlier one. It reaches those that are alive within a few tenths of a
// second, those that come later when they come. payload is not to be changed
// afterwards; more than MaxPayload bytes are refused with class TooLarge.
func (m *Members) Broadcast(kind byte, payload []byte) error {
	if len(payload) > MaxPayload {
		return errs.E(errs.TooLarge, "broadcast", "", "%d bytes, limit %d", len(payload), MaxPayload)
	}
	m.mu.Lock()
	m.seq++
	w := &word{Node: m.cfg.Self, Kind: kind, Seq: m.seq, Payload: payload, heard: time.Now()}
	m.words[w.topic()] = w
	m.mu.Unlock()
	m.spread(w)
	return nil
}

// OnBroadcast makes f be told other nodes' words of a kind; if several come in
// quick succession, perhaps the latest only. To be called before Run.
func (m *Members) OnBroadcast(kind byte, f func(from ids.Node, payload []byte)) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.onWord = maps.Clone(m.onWord) // tell may be reading the old one
	m.onWord[kind] = append(slices.Clip(m.onWord[kind]), f)
}

func (m *Members) spread(w *word) {
	m.queue.QueueBroadcast(&rumour{topic: w.topic(), msg: wire.MustMarshal(w)})
}

// hear takes a word from a peer: if it is news, it is told here and passed on.
func (m *Members) hear(w *word) {
	if w.Node == 0 || len(w.Payload) > MaxPayload {
		return
	}
	w.heard = time.Now()
	m.mu.Lock()
	old := m.words[w.topic()]
	if w.Node == m.cfg.Self {
		// News about us from others is a word from before a restart: the latest one
		// must beat it.
		var again *word
		if old == nil {
			m.seq = max(m.seq, w.Seq)
		} else if w.Seq > old.Seq {
			m.seq = max(m.seq, w.Seq) + 1
			again = &word{Node: w.Node, Kind: w.Kind, Seq: m.seq, Payload: old.Payload, heard: w.heard}
			m.words[w.topic()] = again
		}
		m.mu.Unlock()
		if again != nil {
			m.spread(again)
		}
		return
	}
	if old != nil && old.Seq >= w.Seq {
		m.mu.Unlock()
		return
	}
	if _, alive := m.alive[w.Node]; !alive && old == nil && m.strangeLocked() >= maxStrange {
		m.mu.Unlock()
		return
	}
	m.words[w.topic()] = w
	m.news[w.topic()] = struct{}{}
	few := len(m.alive) <= direct
	m.mu.Unlock()
	m.stir()
	if !few {
		m.spread(w)
	}
}

// strangeLocked counts the topics of nodes not known to be alive.
func (m *Members) strangeLocked() int {
	n := 0
	for t := range m.words {
		if _, alive := m.alive[t.node]; !alive {
			n++
		}
	}
	return n
}

// delegate is what memberlist asks and tells about user data.
type delegate struct{ m *Members }

func (d delegate) NodeMeta(int) []byte { return d.m.cfg.Meta }

func (d delegate) NotifyMsg(b []byte) {
	var w word
	if err := wire.Unmarshal(b, &w); err != nil {
		d.m.cfg.Log.Warn("malformed broadcast dropped", "err", err)
		return
	}
	w.Payload = append([]byte(nil), w.Payload...)
	d.m.hear(&w)
}

func (d delegate) GetBroadcasts(overhead, limit int) [][]byte {
	return d.m.queue.GetBroadcasts(overhead, limit)
}

// LocalState is all words of nodes that live, for a node that exchanges state
// with this one.
func (d delegate) LocalState(bool) []byte {
	m := d.m
	m.mu.Lock()
	ws := make([]*word, 0, len(m.words))
	for t, w := range m.words {
		switch _, alive := m.alive[t.node]; {
		case alive || t.node == m.cfg.Self:
			ws = append(ws, w)
		case time.Since(w.heard) > forgetAfter:
			delete(m.words, t)
		}
	}
	m.mu.Unlock()
	return wire.MustMarshal(ws)
}

func (d delegate) MergeRemoteState(b []byte, _ bool) {
	var ws []word
	if err := wire.Unmarshal(b, &ws); err != nil || len(ws) > maxWords {
		d.m.cfg.Log.Warn("malformed state dropped", "words", len(ws), "err", err)
		return
	}
	for i := range ws {
		d.m.hear(&ws[i])
	}
}
