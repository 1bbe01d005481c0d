package node

import (
	"context"
	"errors"
	"slices"
	"sync"
	"time"

	"github.com/unum-os/unum/internal/errs"
	"github.com/unum-os/unum/internal/ids"
	"github.com/unum-os/unum/internal/principal"
	"github.com/unum-os/unum/internal/record"
	"github.com/unum-os/unum/internal/wire"
)

// methodRead reads the record for a node that has none: readRequest, with a proof
// as the data -> readReply.
const methodRead = "record.read"

// readRequest asks for one of its parts.
type readRequest struct {
	Who   principal.Principal `cbor:"1,keyasint"`
	Stale bool                `cbor:"2,keyasint,omitempty"` // as this node knows it now
	Get   string              `cbor:"3,keyasint,omitempty"`
	List  *listQuery          `cbor:"4,keyasint,omitempty"`
	Users bool                `cbor:"5,keyasint,omitempty"`
	Audit *pageQuery          `cbor:"6,keyasint,omitempty"`
	// Changes are waited for until the deadline, and for maxWait.
	Changes *pageQuery `cbor:"7,keyasint,omitempty"`
}

type listQuery struct {
	Prefix string `cbor:"1,keyasint"`
	After  string `cbor:"2,keyasint,omitempty"`
	Limit  int    `cbor:"3,keyasint,omitempty"`
}

type pageQuery struct {
	After  uint64 `cbor:"1,keyasint,omitempty"`
	Limit  int    `cbor:"2,keyasint,omitempty"`
	Newest bool   `cbor:"3,keyasint,omitempty"` // beyond the limit the older ones are left out, not the newer
}

// readKey is a record.Key that says its name.
type readKey struct {
	Name string     `cbor:"1,keyasint"`
	Key  record.Key `cbor:"2,keyasint"`
}

type readReply struct {
	Revision uint64         `cbor:"1,keyasint"`
	Keys     []readKey      `cbor:"2,keyasint,omitempty"`
	More     bool           `cbor:"3,keyasint,omitempty"`
	Users    []record.User  `cbor:"4,keyasint,omitempty"`
	Audit    []record.Audit `cbor:"5,keyasint,omitempty"`
	Events   []record.Event `cbor:"6,keyasint,omitempty"`
}

const (
	// maxListed bounds the keys of one answer; View bounds their bytes besides.
	maxListed = 1000
	// maxEvents bounds the events of one answer.
	maxEvents = 1000
	// listedBytes is how many bytes of keys and values one answer has, at which it
	// ends.
	listedBytes = 2 << 20
	// maxWait is how long changes are waited for before an answer says that there
	// are none: it shows both ends that the other lives.
	maxWait = 5 * time.Second
)

// bell wakes all who wait for the next change.
type bell struct {
	mu sync.Mutex
	ch chan struct{}
}

// wait returns a channel that is closed by the next ring.
func (b *bell) wait() <-chan struct{} {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.ch == nil {
		b.ch = make(chan struct{})
	}
	return b.ch
}

func (b *bell) ring() {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.ch != nil {
		close(b.ch)
		b.ch = nil
	}
}

// read answers from this node's replica of the record, or has a node that stores
// answer.
func (n *Node) read(ctx context.Context, q readRequest, proof principal.Proof) (*readReply, error) {
	if n.disk.Role == record.RoleStore {
		return n.readFor(ctx, &q, n.id)
	}
	err := error(errs.E(errs.Unavailable, "read the record", "", "no storing node is known"))
	for _, p := range n.askFirst() {
		r := &readReply{}
		if _, err = n.ep.Call(ctx, p, methodRead, q, proof, r); err == nil {
			return r, nil
		}
		if c := errs.ClassOf(err); c != errs.Unavailable && c != errs.Timeout || ctx.Err() != nil {
			return nil, err
		}
	}
	return nil, err
}

func (n *Node) serveRead(ctx context.Context, from ids.Node, req, proof []byte) (any, []byte, error) {
	var q readRequest
	if err := wire.Unmarshal(req, &q); err != nil {
		return nil, nil, err
	}
	if _, err := n.believe(ctx, from, q.Who, proof, "read"); err != nil {
		return nil, nil, err
	}
	r, err := n.readFor(ctx, &q, from)
	return r, nil, err
}

// readFor is readHere for somebody on from; refusals are told to the audit. Who
// reads here does not wait for that, as with what else is refused here.
func (n *Node) readFor(ctx context.Context, q *readRequest, from ids.Node) (*readReply, error) {
	r, err := n.readHere(ctx, q)
	if errs.Has(err, errs.Permission) || errs.Has(err, errs.Unauthorized) {
		if from == n.id {
			go n.refused(context.WithoutCancel(ctx), q.Who, "read", from, err)
			return nil, err
		}
		err = n.refused(ctx, q.Who, "read", from, err)
	}
	return r, err
}

// readHere answers from this node's replica. Who asks is proven; what may be
// read is the record's to say.
func (n *Node) readHere(ctx context.Context, q *readRequest) (_ *readReply, err error) {
	if !q.Stale && q.Changes == nil {
		if _, err := n.rec.ReadIndex(ctx); err != nil {
			return nil, unanswered(err)
		}
	}
	now, err := n.rec.View() // what is answered was true at one moment
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, now.Close()) }()
	v := record.NewView(now, now.Space)
	rights, err := v.Rights(q.Who)
	if err != nil {
		return nil, err
	}
	if q.Changes != nil {
		return n.changes(ctx, q)
	}
	r := &readReply{}
	if r.Revision, err = v.Revision(); err != nil {
		return nil, err
	}
	may := func(what string, ok bool) error {
		if ok {
			return nil
		}
		return errs.E(errs.Permission, "read", what, "%v may not", q.Who)
	}
	switch {
	case q.Get != "":
		if err := may(cut(q.Get, record.MaxText), rights.MayRead(q.Get)); err != nil {
			return nil, err
		}
		k, err := v.Get(q.Get)
		if err != nil {
			return nil, err
		}
		r.Keys = []readKey{{q.Get, k}}
	case q.List != nil:
		if err := may(cut(q.List.Prefix, record.MaxText), rights.MayRead(q.List.Prefix)); err != nil {
			return nil, err
		}
		limit := q.List.Limit
		if limit <= 0 || limit > maxListed {
			limit = maxListed
		}
		ks, more, err := v.List(q.List.Prefix, q.List.After, limit)
		if err != nil {
			return nil, err
		}
		size := 0
		for _, k := range ks { // what one message carries
			if size += len(k.Key) + len(k.Value) + 64; size > listedBytes && len(r.Keys) > 0 {
				more = true
				break
			}
			r.Keys = append(r.Keys, readKey{k.Key, k})
		}
		r.More = more
	case q.Users:
		if err := may("the users", !q.Who.System || rights.MayList()); err != nil {
			return nil, err
		}
		if r.Users, err = v.Users(); err != nil {
			return nil, err
		}
		r.Users = slices.DeleteFunc(r.Users, func(u record.User) bool { return !rights.MaySeeUser(&u) })
	case q.Audit != nil:
		if err := may("the audit", rights.Admin()); err != nil {
			return nil, err
		}
		limit := q.Audit.Limit
		if limit <= 0 || limit > maxEvents {
			limit = maxEvents
		}
		page := v.Audit
		if q.Audit.Newest {
			page = v.NewestAudit
		}
		if r.Audit, err = page(q.Audit.After, limit); err != nil {
			return nil, err
		}
	default:
		return nil, errs.E(errs.Invalid, "read the record", "", "nothing is asked for")
	}
	return r, nil
}

// changes waits until the record is past a revision, and returns what of the
// changes since who asks may see. Revision 0 asks where the record stands.
func (n *Node) changes(ctx context.Context, q *readRequest) (*readReply, error) {
	ctx, cancel := context.WithTimeout(ctx, maxWait)
	defer cancel()
	for {
		next := n.rung.wait() // before looking
		v := n.record.view()
		rights, err := v.Rights(q.Who) // they may end meanwhile
		if err != nil {
			return nil, err
		}
		now, err := v.Revision()
		if err != nil {
			return nil, err
		}
		if q.Changes.After == 0 {
			return &readReply{Revision: now}, nil
		}
		if now > q.Changes.After {
			events, err := v.Changes(q.Changes.After, maxEvents)
			if err != nil {
				return nil, err
			}
			r := &readReply{Revision: now}
			for _, e := range events {
				r.Revision = e.Revision
				if rights.MaySee(e) {
					r.Events = append(r.Events, e)
				}
			}
			return r, nil
		}
		select {
		case <-next:
		case <-ctx.Done():
			return &readReply{Revision: max(now, q.Changes.After)}, nil
		}
	}
}
