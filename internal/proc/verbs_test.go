package proc

import (
	"bytes"
	"context"
	"io"
	"os"
	"testing"
	"time"

	"github.com/unum-os/unum/internal/control"
	"github.com/unum-os/unum/internal/errs"
	"github.com/unum-os/unum/internal/ids"
	"github.com/unum-os/unum/internal/wire"
)

func (r *rig) ask(verb string, req, resp any) error {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	c, err := control.Dial(ctx, r.sock)
	if err != nil {
		return err
	}
	defer c.Close()
	b, err := c.Call(ctx, verb, wire.MustMarshal(req))
	if err != nil || resp == nil {
		return err
	}
	return wire.Unmarshal(b, resp)
}

func TestVerbs(t *testing.T) {
	r := newRig(t)
	id := r.detach("sh", "-c", "echo one; while [ ! -e "+r.dirs[2]+"/go ]; do sleep 0.02; done; echo two; exit 3")
	var ps PSResp
	if err := r.ask(VerbPS, PSReq{}, &ps); err != nil || len(ps.Jobs) != 1 || ps.Jobs[0].Record.Job != id || ps.Jobs[0].RSS == 0 || ps.Jobs[0].Record.State != Running {
		t.Errorf("%v, %+v", err, ps)
	}
	c, err := control.Dial(context.Background(), r.sock)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(20 * time.Second))
	c.Start(VerbLogs, wire.MustMarshal(LogsReq{Job: id, Follow: true}))
	var out bytes.Buffer
	next := func() error {
		b, _, err := c.Recv()
		var l Log
		if err == nil {
			err = wire.Unmarshal(b, &l)
			out.Write(l.Data)
		}
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
	var w WaitResp
	if err := r.ask(VerbWait, JobReq{Job: id}, &w); err != nil || w.Record.ExitCode() != 3 {
		t.Errorf("%v, %+v", err, w)
	}
	if err := r.ask(VerbPS, PSReq{}, &ps); err != nil || len(ps.Jobs) != 0 {
		t.Errorf("%v, %+v", err, ps)
	}
	ps = PSResp{}
	if err := r.ask(VerbPS, PSReq{All: true}, &ps); err != nil || len(ps.Jobs) != 1 {
		t.Errorf("%v, %+v", err, ps)
	}
	var why WhyResp
	if err := r.ask(VerbWhy, JobReq{Job: id}, &why); err != nil || why.Text != "receipt" {
		t.Errorf("%v, %+v", err, why)
	}
	if err := r.ask(VerbKill, KillReq{Job: id, Signal: 15}, nil); !errs.Has(err, errs.NotFound) {
		t.Errorf("%v", err)
	}
	if err := r.ask(VerbWait, JobReq{Job: 777}, nil); !errs.Has(err, errs.NotFound) {
		t.Errorf("%v", err)
	}
	// A node that does not answer is named, and the record stands in for it.
	r.f.down.Store(true)
	r.reg.Put(JobRecord{Job: 500, Incarnation: 1, Node: 2, State: Running})
	ps = PSResp{}
	if err := r.ask(VerbPS, PSReq{}, &ps); err != nil || len(ps.Jobs) != 1 || len(ps.Silent) != 1 || ps.Silent[0] != 2 {
		t.Errorf("%v, %+v", err, ps)
	}
}

func FuzzMessages(f *testing.F) {
	f.Add(wire.MustMarshal(toNode{Launch: &launch{Job: 1}}))
	f.Add(wire.MustMarshal(toHome{End: &ending{Code: 1}}))
	f.Add(wire.MustMarshal(meta{Record: JobRecord{Job: ids.Job(1)}}))
	f.Fuzz(func(t *testing.T, b []byte) {
		for _, m := range []any{new(toNode), new(toHome), new(ioHello), new(meta), new(logsReq)} {
			if wire.Unmarshal(b, m) == nil {
				if _, err := wire.Marshal(m); err != nil {
					t.Fatal(err)
				}
			}
		}
	})
}
