package record

import (
	"github.com/cockroachdb/pebble/v2"

	"github.com/unum-os/unum/internal/errs"
	"github.com/unum-os/unum/internal/ids"
)

// View reads the record. It is as current, as consistent and as safe for
// concurrent use as its reader. Errors are of class NotFound, or Corrupt and IO
// when the state cannot be read.
type View struct{ s store }

// NewView returns a view of space through r, which the caller closes.
func NewView(r pebble.Reader, space Space) View {
	return View{store{r: r, prefix: space.Key()}}
}

// Info returns the cluster's identity and counters; class NotFound before it is
// founded.
func (v View) Info() (info Info, err error) {
	defer caught(&err)
	if !v.s.load(v.s.key(tagInfo), &info) {
		return Info{}, errs.E(errs.NotFound, "read record", "", "the cluster is not founded yet")
	}
	v.s.load(v.s.key(tagCounters), &info.Counters)
	return info, nil
}

// Revision returns how many commands have changed something.
func (v View) Revision() (n uint64, err error) {
	defer caught(&err)
	var c Counters
	v.s.load(v.s.key(tagCounters), &c)
	return c.Revision, nil
}

// Members returns all members there ever were, by id.
func (v View) Members() (out []Member, err error) {
	defer caught(&err)
	return v.s.members(), nil
}

// Member returns one member.
func (v View) Member(id ids.Node) (m Member, err error) {
	defer caught(&err)
	p := v.s.member(id)
	if p == nil {
		return Member{}, errs.E(errs.NotFound, "member", id.String(), "not in the record")
	}
	return *p, nil
}

// Jobs returns the jobs that are kept, by id.
func (v View) Jobs() (out []Job, err error) {
	defer caught(&err)
	lo := v.s.key(tagJob)
	v.s.scan(lo, after(lo), func(k, val []byte) bool {
		var j Job
		v.s.decode(k, val, &j)
		out = append(out, j)
		return true
	})
	return out, nil
}

// Job returns one job.
func (v View) Job(id ids.Job) (j Job, err error) {
	defer caught(&err)
	if !v.s.load(v.s.key(tagJob, uint64(id)), &j) {
		return Job{}, errs.E(errs.NotFound, "job", "", "no job %d in the record", id)
	}
	return j, nil
}

// Tokens returns the tokens that exist, expired and used-up ones included.
func (v View) Tokens() (out []Token, err error) {
	defer caught(&err)
	return v.s.tokens(), nil
}
