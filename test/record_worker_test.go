package test

import (
	"context"
	endian "encoding/binary"
	"encoding/hex"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"sync"
	"time"

	"github.com/unum-os/unum/internal/control"
	"github.com/unum-os/unum/internal/control/api"
	"github.com/unum-os/unum/internal/errs"
	"github.com/unum-os/unum/internal/ids"
)

const (
	// recClients ask the daemon of each node, one operation at a time each.
	// Twenty on five nodes keep a key contended and porcupine's search narrow.
	recClients = 4
	// recKeys are few, so that operations meet.
	recKeys = 3
	// recEpoch is how long a set of keys is used. An operation whose outcome is
	// unknown stays possible to the end of its history, which is why histories
	// must have an end; but faults are to fall into the middle of them.
	recEpoch = 8 * time.Second
	// recThink is the longest pause of a client between two operations.
	recThink = 60 * time.Millisecond
	// recPatience is the longest that a client waits for an answer, recHaste the
	// shortest: after it the outcome is unknown and the client goes on.
	recHaste, recPatience = time.Second, 8 * time.Second
	// recLook is the time between two looks at the cluster.
	recLook = 250 * time.Millisecond
)

// Kinds of operations on a key of the record.
const (
	recGet    = "get"
	recPut    = "put"
	recDelete = "delete"
)

// recOp is one operation on the record as its client saw it. It is printed twice:
// before it begins, without Return, and after it has ended.
type recOp struct {
	Client  int        `json:"c"` // unique in a run
	N       int        `json:"n"` // counts the client's operations
	Key     string     `json:"k"`
	Kind    string     `json:"o"`
	Value   uint64     `json:"v,omitempty"` // written or read
	Expect  *uint64    `json:"x,omitempty"` // the revision that must be there, 0: none
	Mod     uint64     `json:"m,omitempty"` // revision written or read; a read of 0: there is no such key
	Version uint64     `json:"w,omitempty"` // read
	Rev     uint64     `json:"r,omitempty"` // of the record, with a read or a delete
	Class   errs.Class `json:"e,omitempty"` // of the error
	Text    string     `json:"s,omitempty"` // of the error
	Call    int64      `json:"t"`           // linNow
	Return  int64      `json:"u,omitempty"`
}

// recSight is what a node's daemon says of itself.
type recSight struct {
	Node   uint64 `json:"n"`
	Leader uint64 `json:"l"` // of the record's group, 0: it knows none
	Term   uint64 `json:"t"`
	Began  int64  `json:"b"` // linNow when it was asked
}

// recLine is a line of a worker's output.
type recLine struct {
	Op    *recOp    `json:"op,omitempty"`
	Sight *recSight `json:"sight,omitempty"`
	File  *recOp    `json:"file,omitempty"` // a write of a file, when it has ended
}

func (l recLine) print() {
	b, err := json.Marshal(l)
	if err == nil {
		_, err = os.Stdout.Write(append(b, '\n')) // in one piece: shorter than PIPE_BUF
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func init() {
	workers["record"] = recWorker
	workers["record-read"] = recReadWorker
	workers["record-digest"] = recDigestWorker
}

// recDaemon is a connection to the node's daemon that is made anew when the
// daemon is. It is for one goroutine.
type recDaemon struct{ c *api.Client }

// ask has f ask the daemon for at most limit.
func (d *recDaemon) ask(limit time.Duration, f func(ctx context.Context, c *api.Client) error) error {
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	if d.c == nil {
		c, err := api.Dial(ctx, control.DefaultPath)
		if err != nil {
			return err
		}
		d.c = c
	}
	err := f(ctx, d.c)
	if errs.Has(err, errs.Unavailable) { // perhaps it was the daemon that went away
		d.c.Close()
		d.c = nil
	}
	return err
}

// recLoad is what one worker does.
type recLoad struct {
	first int // number of its first client
	from  int64
	root  string // of the keys
	stale bool
	stop  chan struct{}
}

// recWorker does operations until its standard input ends, prints each, and what
// the daemon says of itself. With -stale it reads what the node knows and calls
// that the truth, which it is not.
func recWorker(args []string) int {
	l := &recLoad{stop: make(chan struct{})}
	f := flag.NewFlagSet("record", flag.ExitOnError)
	f.IntVar(&l.first, "first", 0, "number of the first client")
	f.Int64Var(&l.from, "from", 0, "when epochs are counted from")
	f.StringVar(&l.root, "keys", "", "what the names of all keys begin with")
	f.BoolVar(&l.stale, "stale", false, "read what the node knows")
	if err := f.Parse(args); err != nil {
		return 2
	}
	go func() {
		io.Copy(io.Discard, os.Stdin)
		close(l.stop)
	}()
	var wg sync.WaitGroup
	for i := range recClients {
		wg.Go(func() { l.client(l.first + i) })
	}
	wg.Go(l.look)
	wg.Wait()
	return 0
}

// pause waits, and reports whether the worker goes on.
func (l *recLoad) pause(d time.Duration) bool {
	select {
	case <-l.stop:
		return false
	case <-time.After(d):
		return true
	}
}

// key returns the name of key i at this time. Users' keys and settings are bounded
// apart, and the keys of a long run are many.
func (l *recLoad) key(i int) string {
	space := "user/0/"
	if i == 0 {
		space = "settings/"
	}
	return fmt.Sprintf("%s%s/e%d/k%d", space, l.root, (linNow()-l.from)/int64(recEpoch), i)
}

func (l *recLoad) client(id int) {
	rng := rand.New(rand.NewPCG(uint64(id), 3))
	var d recDaemon
	seen := map[string]uint64{} // by key: the revision that this client saw last
	for n := 1; l.pause(time.Duration(rng.Int64N(int64(recThink)))); n++ {
		op := recOp{Client: id, N: n, Key: l.key(rng.IntN(recKeys)), Kind: recGet}
		switch p := rng.IntN(20); {
		case p < 6:
			op.Kind = recPut
		case p < 10: // compare and put
			op.Kind = recPut
			mod := seen[op.Key]
			op.Expect = &mod
		case p == 10:
			op.Kind = recDelete
			if mod := seen[op.Key]; mod != 0 && rng.IntN(2) == 0 {
				op.Expect = &mod
			}
		}
		if op.Kind == recPut {
			op.Value = uint64(id+1)<<32 | uint64(n)
		}
		limit := recHaste + time.Duration(rng.Int64N(int64(recPatience-recHaste)))
		op.do(&d, limit, l.stale)
		if op.Class == errs.Unknown && op.Kind != recDelete {
			seen[op.Key] = op.Mod
		}
		// Where there is no daemon, answers come at once.
		if !op.ended() && !l.pause(recThink) {
			return
		}
	}
}

// do does one operation, between two lines of output: a killed node's last one
// is known to have begun.
func (op *recOp) do(d *recDaemon, limit time.Duration, stale bool) {
	op.Call = linNow()
	recLine{Op: op}.print()
	op.Call = linNow()
	err := d.ask(limit, func(ctx context.Context, c *api.Client) error {
		switch op.Kind {
		case recPut:
			r, err := c.Record.Put(ctx, &api.PutRequest{Key: op.Key, Value: endian.LittleEndian.AppendUint64(nil, op.Value), Expect: op.Expect})
			op.Mod = r.GetMod()
			return err
		case recDelete:
			r, err := c.Record.Delete(ctx, &api.DeleteRequest{Key: op.Key, Expect: op.Expect})
			op.Rev = r.GetRevision()
			return err
		}
		r, err := c.Record.Get(ctx, &api.GetRequest{Key: op.Key, Stale: stale})
		op.Rev = r.GetRevision()
		if k := r.GetKey(); k != nil {
			op.Mod, op.Version = k.Mod, k.Version
			if len(k.Value) != 8 {
				return errs.E(errs.Corrupt, "get", op.Key, "%d bytes", len(k.Value))
			}
			op.Value = endian.LittleEndian.Uint64(k.Value)
		}
		return err
	})
	op.Return = linNow()
	if op.Kind == recGet && errs.Has(err, errs.NotFound) {
		err = nil // which is an answer
	}
	if err != nil {
		op.Class, op.Text = errs.ClassOf(err), err.Error()
		if op.Class == errs.Unknown {
			op.Class = errs.IO
		}
		op.Text = op.Text[:min(len(op.Text), 200)]
	}
	recLine{Op: op}.print()
}

// look tells again and again what the daemon says of itself.
func (l *recLoad) look() {
	var d recDaemon
	for l.pause(recLook) {
		began := linNow()
		_ = d.ask(3*time.Second, func(ctx context.Context, c *api.Client) error {
			st, err := c.Node.Status(ctx, &api.StatusRequest{})
			if err != nil {
				return err
			}
			for _, m := range st.Members {
				for _, g := range m.Self.GetGroups() {
					if m.Id == st.Node && ids.Group(g.Id) == ids.RecordGroup {
						recLine{Sight: &recSight{Node: st.Node, Leader: g.Leader, Term: g.Term, Began: began}}.print()
					}
				}
			}
			return nil
		})
	}
}

// recReadWorker reads the keys that are listed on its standard input, in JSON,
// and prints what it reads, once each.
func recReadWorker(args []string) int {
	var keys []string
	f := flag.NewFlagSet("record-read", flag.ExitOnError)
	first := f.Int("first", 0, "number of the client")
	if err := f.Parse(args); err != nil {
		return 2
	}
	if err := json.NewDecoder(os.Stdin).Decode(&keys); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	var d recDaemon
	n := 0
	for _, k := range keys {
		for end := time.Now().Add(time.Minute); ; {
			n++
			op := recOp{Client: *first, N: n, Key: k, Kind: recGet}
			op.do(&d, recPatience, false)
			if op.ended() {
				break
			}
			if time.Now().After(end) {
				fmt.Fprintf(os.Stderr, "%s cannot be read: %s\n", k, op.Text)
				return 1
			}
			time.Sleep(recThink) // where there is no daemon, answers come at once
		}
	}
	return 0
}

// recDigest is a node's replicas: by group, its index and the hash of its state.
type recDigest map[ids.Group]recSum

type recSum struct {
	Index uint64
	Sum   string
}

// recDigestWorker prints the digests of this node's replicas.
func recDigestWorker([]string) int {
	var d recDaemon
	out := recDigest{}
	err := d.ask(time.Minute, func(ctx context.Context, c *api.Client) error {
		for _, g := range []ids.Group{ids.RecordGroup, ids.RootGroup} {
			r, err := c.Node.Digest(ctx, &api.DigestRequest{Group: uint64(g)})
			if err != nil {
				return err
			}
			out[g] = recSum{r.Index, hex.EncodeToString(r.Sum)}
		}
		return nil
	})
	if err == nil {
		err = json.NewEncoder(os.Stdout).Encode(out)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}
