package proc

import (
	"bytes"
	"context"
	"io"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/unum-os/unum/internal/control/api"
	"github.com/unum-os/unum/internal/errs"
	"github.com/unum-os/unum/internal/ids"
	"github.com/unum-os/unum/internal/proc/shim"
	"github.com/unum-os/unum/internal/wire"
)

// client is a client of the rig's home.
func (r *rig) client() *api.Client {
	r.t.Helper()
	c, err := api.Dial(context.Background(), r.sock)
	if err != nil {
		r.t.Fatal(err)
	}
	r.t.Cleanup(func() { c.Close() })
	return c
}

func (r *rig) kill(id ids.Job, sig int32) error {
	_, err := r.client().Jobs.Kill(r.ctx(), &api.KillRequest{Job: uint64(id), Signal: sig})
	return err
}

// ctx bounds a question, so that a test ends.
func (r *rig) ctx() context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	r.t.Cleanup(cancel)
	return ctx
}

func (r *rig) list(all bool) (jobs []*api.Job, last *api.ListJobsResponse, parts int) {
	r.t.Helper()
	l, err := r.client().Jobs.List(r.ctx(), &api.ListJobsRequest{All: all})
	for err == nil {
		var p *api.ListJobsResponse
		if p, err = l.Recv(); err == nil {
			jobs, last = append(jobs, p.Jobs...), p
			parts++
		}
	}
	if err != io.EOF {
		r.t.Fatal(err)
	}
	return jobs, last, parts
}

func TestVerbs(t *testing.T) {
	r := newRig(t)
	id := r.detach("sh", "-c", "echo one; while [ ! -e "+r.dirs[2]+"/go ]; do sleep 0.02; done; echo two; exit 3")
	if jobs, _, _ := r.list(false); len(jobs) != 1 || jobs[0].Id != uint64(id) || jobs[0].RssBytes == 0 || jobs[0].State != api.Job_RUNNING || jobs[0].End != nil {
		t.Errorf("%+v", jobs)
	}
	c := r.client()
	logs, err := c.Jobs.Logs(r.ctx(), &api.LogsRequest{Job: uint64(id), Follow: true})
	if err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	next := func() error {
		p, err := logs.Recv()
		out.Write(p.GetData())
		return err
	}
	if err := next(); err != nil || out.String() != "one\n" {
		t.Errorf("%v, %q", err, out.String())
	}
	os.WriteFile(r.dirs[2]+"/go", nil, 0o644)
	for err == nil {
		err = next()
	}
	if err != io.EOF || out.String() != "one\ntwo\n" {
		t.Errorf("%v, %q", err, out.String())
	}
	w, err := c.Jobs.Wait(r.ctx(), &api.WaitRequest{Job: uint64(id)})
	if err != nil {
		t.Fatal(err)
	}
	if rec := RecordOf(w.Job); rec.ExitCode() != 3 || rec.Job != id || rec.Start == 0 || rec.End < rec.Start {
		t.Errorf("%+v", rec)
	}
	if jobs, _, _ := r.list(false); len(jobs) != 0 {
		t.Errorf("%+v", jobs)
	}
	if jobs, _, _ := r.list(true); len(jobs) != 1 || jobs[0].End == nil {
		t.Errorf("%+v", jobs)
	}
	if why, err := c.Jobs.Why(r.ctx(), &api.WhyRequest{Job: uint64(id)}); err != nil || why.Text != "receipt" {
		t.Errorf("%v, %+v", err, why)
	}
	if err := r.kill(id, 15); !errs.Has(err, errs.NotFound) {
		t.Errorf("%v", err)
	}
	if err := r.kill(id, 65); !errs.Has(err, errs.Invalid) {
		t.Errorf("%v", err)
	}
	if _, err := c.Jobs.Wait(r.ctx(), &api.WaitRequest{Job: 777}); !errs.Has(err, errs.NotFound) {
		t.Errorf("%v", err)
	}
	// A node that does not answer is named, and the record stands in for it.
	r.f.down.Store(true)
	r.reg.Put(JobRecord{Job: 500, Incarnation: 1, Node: 2, State: Running})
	if jobs, last, _ := r.list(false); len(jobs) != 1 || len(last.Silent) != 1 || last.Silent[0] != 2 {
		t.Errorf("%+v, %+v", jobs, last)
	}
}

// TestLongList: a list that exceeds a message comes in parts, whatever the jobs
// are called.
func TestLongList(t *testing.T) {
	r := newRig(t)
	const n = 30
	for i := range n {
		r.reg.Put(JobRecord{Job: ids.Job(1000 + i), Incarnation: 1, Node: 2, State: Exited, Name: "\xff", Text: "\xfe",
			Argv: [][]byte{bytes.Repeat([]byte{0xff}, 300<<10)}})
	}
	jobs, _, parts := r.list(true)
	if len(jobs) != n || parts < 2 {
		t.Errorf("%d jobs in %d parts", len(jobs), parts)
	}
	for _, j := range jobs {
		if len(j.Argv) != 1 || len(j.Argv[0]) != 300<<10 || j.Name != "\uFFFD" {
			t.Fatalf("job %d: %q", j.Id, j.Name)
		}
	}
}

// TestStatesAreTheAPIs: the numbers of states are the same there.
func TestStatesAreTheAPIs(t *testing.T) {
	for n, name := range api.Job_State_name {
		if s := State(n).String(); n != 0 && !strings.EqualFold(s, name) || n == 0 && s != "unknown" {
			t.Errorf("state %d is %s here, %s there", n, s, name)
		}
	}
	if len(api.Job_State_name) != 1+int(Killed) || State(Killed+1).String() != "unknown" {
		t.Error("a state is missing there, or this test is behind")
	}
}

func FuzzMessages(f *testing.F) {
	f.Add(wire.MustMarshal(toNode{Launch: &launch{Job: 1}}))
	f.Add(wire.MustMarshal(toHome{End: &ending{Code: 1}}))
	f.Add(wire.MustMarshal(meta{Record: JobRecord{Job: ids.Job(1)}}))
	f.Fuzz(func(t *testing.T, b []byte) {
		for _, m := range []any{new(toNode), new(toHome), new(ioHello), new(meta), new(logsReq), new(shim.Spec), new(shim.ToShim), new(shim.Exited)} {
			if wire.Unmarshal(b, m) == nil {
				if _, err := wire.Marshal(m); err != nil {
					t.Fatal(err)
				}
			}
		}
	})
}
