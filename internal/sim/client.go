package sim

import (
	"errors"
	"fmt"
	"strconv"
	"time"

	"github.com/anishathalye/porcupine"

	"github.com/unum-os/unum/internal/errs"
	"github.com/unum-os/unum/internal/group"
	"github.com/unum-os/unum/internal/ids"
	"github.com/unum-os/unum/internal/principal"
	"github.com/unum-os/unum/internal/record"
	"github.com/unum-os/unum/internal/wire"
)

// Keys below registerKeys are registers of the machine; these two stand for the
// record's.
const (
	registerKeys = 4
	jobsKey      = 100 // job ids given out: grants add, and tell where they begin
	labelKey     = 101 // a label of member 1
)

// client does one operation after the other and repeats each until it is
// answered. A repeated command has the sequence number of the first attempt, a
// repeated read asks anew.
type client struct {
	w    *world
	id   uint64
	g    ids.Group
	seq  uint64
	busy bool
	op   command
	data []byte // the command encoded; nil for a read
	call int64

	attempt int // counts; what belongs to an earlier one is void
	p       *group.Pending
	at      *node
	hint    ids.Node // who is said to lead
}

// patience: attempts of an operation are given up after a while and made elsewhere.
const patience = 700 * time.Millisecond

func (c *client) soon(d time.Duration, f func()) {
	n := c.attempt
	c.w.at(time.Duration(float64(d)*c.w.rng.ExpFloat64()), func() {
		if c.attempt == n {
			f()
		}
	})
}

// next begins another operation, if there are to be more.
func (c *client) next() {
	w := c.w
	c.busy = false
	c.attempt++
	if w.quiet {
		return
	}
	c.soon(w.think, func() { c.begin(c.draw()) })
}

// draw chooses an operation.
func (c *client) draw() command {
	r := c.w.rng
	op := command{client: c.id, key: uint64(r.IntN(registerKeys)), kind: opRead}
	if c.g == recordGroup {
		op.key = jobsKey + uint64(r.IntN(2))
	}
	x := r.IntN(100)
	switch {
	case x < 45:
	case op.key == jobsKey:
		op.kind, op.a = opAdd, 1+uint64(r.IntN(5))
	case op.key == labelKey || x < 75:
		op.kind, op.a = opWrite, c.w.unique()
	case x < 88:
		op.kind, op.a = opAdd, 1+uint64(r.IntN(1000))
	default:
		op.kind, op.a, op.b = opCas, c.w.lastRead[op.key], c.w.unique()
	}
	return op
}

func (c *client) begin(op command) {
	w := c.w
	c.busy, c.op, c.data, c.call = true, op, nil, w.stamp()
	if op.kind != opRead {
		c.seq++
		c.op.seq = c.seq
		c.data = c.encode()
	}
	w.tracef("client %d begins %+v", c.id, c.op)
	c.try()
}

func (c *client) encode() []byte {
	if c.g == registerGroup {
		padding := 0
		if c.w.rng.IntN(2) == 0 {
			padding = c.w.rng.IntN(400)
		}
		return c.op.encode(padding)
	}
	cmd := record.Command{Client: c.id, Seq: c.op.seq, Acked: c.op.seq}
	if c.op.key == jobsKey {
		cmd.Who = principal.Of(1)
		cmd.GrantJobs = uint32(c.op.a)
	} else {
		cmd.Who = principal.Principal{Node: 1, User: "root"} // an administrator
		cmd.UpdateMember = &record.UpdateMember{Node: 1, Labels: map[string]string{"v": strconv.FormatUint(c.op.a, 10)}}
	}
	return wire.MustMarshal(cmd)
}

// try makes an attempt at some node.
func (c *client) try() {
	w := c.w
	c.attempt++
	c.p, c.at = nil, nil
	n := w.nodes[w.rng.IntN(len(w.nodes))]
	if h := w.node(c.hint); h != nil && c.data != nil && w.rng.IntN(4) > 0 {
		n = h
	}
	c.hint = 0
	if !n.up || n.pausedUntil.After(w.now) {
		c.soon(50*time.Millisecond, c.try)
		return
	}
	w.stats.Attempts++
	g := n.group(c.g)
	if c.data != nil {
		c.p = n.st.Propose(g, c.data)
	} else {
		c.p = n.st.ReadIndex(g)
	}
	c.at = n
	w.tracef("client %d asks %v", c.id, n.id)
	n.plan()
	attempt := c.attempt
	w.at(patience, func() {
		if c.attempt == attempt && c.p != nil {
			w.tracef("client %d gives up at %v", c.id, n.id)
			c.p.GiveUp()
			c.unknown()
		}
	})
	c.poll()
}

// poll looks whether the attempt has an outcome.
func (c *client) poll() {
	if c.p == nil {
		return
	}
	w := c.w
	result, index, ok, err := c.p.Poll()
	if !ok {
		return
	}
	c.p = nil
	if err != nil {
		w.tracef("client %d: %v", c.id, err)
		var nl *group.NotLeaderError
		switch {
		case errors.As(err, &nl):
			c.hint = nl.Leader
			c.soon(20*time.Millisecond, c.try)
		case errs.Has(err, errs.Busy), errs.Has(err, errs.Unavailable):
			c.soon(50*time.Millisecond, c.try)
		default:
			c.unknown()
		}
		return
	}
	if c.data == nil {
		v, err := c.read()
		if err != nil {
			w.violated("%v cannot read its state: %v", c.at.id, err)
		}
		c.done(outcome{v, true})
		return
	}
	w.acked[mark{c.id, c.op.seq}] = c.g
	switch r := result.(type) {
	case nil: // a planted bug: the answer came before the result
		c.done(outcome{})
	case uint64:
		c.done(outcome{r, true})
	case *record.Result:
		if r.Refusal != (record.Refusal{}) {
			w.violated("the record refuses %+v at entry %d: %v", c.op, index, r.Refusal.Why)
		}
		if c.op.kind == opWrite {
			c.done(outcome{0, true})
			return
		}
		c.done(outcome{uint64(r.FirstJob) - 1, true})
	}
}

// read reads the applied state where the barrier was asked for.
func (c *client) read() (uint64, error) {
	g := c.at.group(c.g)
	if c.g == registerGroup {
		return readRegister(g, c.op.key)
	}
	v := record.NewView(c.at.h.State(), g.Space())
	if c.op.key == jobsKey {
		info, err := v.Info()
		return uint64(info.NextJob) - 1, err
	}
	m, err := v.Member(1)
	if err != nil || m.Labels["v"] == "" {
		return 0, err
	}
	return strconv.ParseUint(m.Labels["v"], 10, 64)
}

func (c *client) done(o outcome) {
	w := c.w
	w.tracef("client %d: %+v is %d", c.id, c.op, o.value)
	w.stats.Ops++
	if c.op.kind == opRead {
		w.lastRead[c.op.key] = o.value
	}
	w.history = append(w.history, porcupine.Operation{ClientId: int(c.id), Input: c.op, Call: c.call, Output: o, Return: w.stamp()})
	c.next()
}

// unknown is an attempt without an answer.
func (c *client) unknown() {
	w := c.w
	c.p = nil
	c.attempt++
	w.stats.Unknown++
	founding := c.id == 1 && c.op.seq == 1                             // all others need it
	if c.data != nil && !w.quiet && w.rng.IntN(50) == 0 && !founding { // it may still happen, at any time
		w.tracef("client %d abandons %+v", c.id, c.op)
		w.stats.Abandoned++
		w.history = append(w.history, porcupine.Operation{ClientId: int(c.id), Input: c.op, Call: c.call, Output: outcome{}, Return: forever})
		c.next()
		return
	}
	c.soon(20*time.Millisecond, c.try)
}

// mark names a command.
type mark struct{ client, seq uint64 }

// poll asks all clients that wait for n.
func (w *world) poll(n *node) {
	for _, c := range w.clients {
		if c.at == n {
			c.poll()
		}
	}
}

// lost tells the clients that n is dead.
func (w *world) lost(n *node) {
	for _, c := range w.clients {
		if c.at == n && c.p != nil {
			c.unknown()
		}
	}
}

// found makes the record's first command, which the others need.
func (w *world) found() {
	c := &client{w: w, id: 1, g: recordGroup, busy: true, call: 0, seq: 1, op: command{client: 1, seq: 1, kind: opWrite, key: labelKey}}
	c.data = wire.MustMarshal(record.Command{Client: 1, Seq: 1, Init: &record.Init{Name: "sim", Hostname: "h", Addr: "a:1", Labels: map[string]string{"v": "0"}}})
	w.clients = append(w.clients, c)
	c.try()
}

func (c *client) String() string { return fmt.Sprintf("client %d: %+v", c.id, c.op) }
