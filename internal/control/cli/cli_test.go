package cli

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/unum-os/unum/internal/control"
	"github.com/unum-os/unum/internal/control/api"
	"github.com/unum-os/unum/internal/errs"
)

// jobs is a daemon that has these answers.
type jobs struct {
	api.UnimplementedJobsServer
	list  []*api.ListJobsResponse
	kills chan *api.KillRequest
	ends  map[uint64]*api.Job
}

func (j *jobs) List(_ *api.ListJobsRequest, out grpc.ServerStreamingServer[api.ListJobsResponse]) error {
	for _, p := range j.list {
		if err := out.Send(p); err != nil {
			return err
		}
	}
	return nil
}

func (j *jobs) Kill(_ context.Context, req *api.KillRequest) (*api.KillResponse, error) {
	j.kills <- req
	if req.Job == 9 {
		return nil, errs.E(errs.NotFound, "", "", "no job 9").WithRemedy("unum ps")
	}
	return &api.KillResponse{}, nil
}

func (j *jobs) Wait(_ context.Context, req *api.WaitRequest) (*api.WaitResponse, error) {
	return &api.WaitResponse{Job: j.ends[req.Job]}, nil
}

func (j *jobs) Logs(_ *api.LogsRequest, out grpc.ServerStreamingServer[api.LogsResponse]) error {
	return errors.Join(out.Send(&api.LogsResponse{Fd: 1, Data: []byte("out")}), out.Send(&api.LogsResponse{Fd: 2, Data: []byte("err")}))
}

func (j *jobs) Why(context.Context, *api.WhyRequest) (*api.WhyResponse, error) {
	return &api.WhyResponse{Text: "because\n"}, nil
}

func serve(t *testing.T, j *jobs) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "unum-cli-")
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "s")
	s := control.New(control.Config{Path: path, Log: slog.New(slog.NewTextHandler(io.Discard, nil))})
	calls := api.NewServer(0)
	s.HandleHTTP2(calls.Serve)
	api.RegisterJobsServer(calls, j)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	t.Cleanup(func() { cancel(); <-done; os.RemoveAll(dir) })
	for end := time.Now().Add(5 * time.Second); ; time.Sleep(time.Millisecond) {
		if c, err := control.Dial(ctx, path); err == nil {
			c.Close()
			return path
		} else if time.Now().After(end) {
			t.Fatal(err)
		}
	}
}

func TestPS(t *testing.T) {
	start := time.Date(2024, 5, 6, 7, 8, 9, 0, time.Local)
	path := serve(t, &jobs{list: []*api.ListJobsResponse{
		{Jobs: []*api.Job{{Id: 7, Incarnation: 1, Home: 1, Node: 2, Argv: [][]byte{[]byte("make"), []byte("-j8"), []byte("a b")}, State: api.Job_RUNNING,
			Start: timestamppb.New(start), Cpu: durationpb.New(1500 * time.Millisecond), RssBytes: 3 << 20}}},
		{Jobs: []*api.Job{{Id: 8, Incarnation: 1, Home: 1, Node: 3, Uid: 4294967, Argv: [][]byte{[]byte("x\x1b[2J\xff")}, State: api.Job_EXITED, Code: 3,
			Start: timestamppb.New(start), End: timestamppb.New(start.Add(5))}}, Silent: []uint64{4}},
	}})
	var out, errOut bytes.Buffer
	if code := PS(context.Background(), path, &out, &errOut, false, true); code != 0 {
		t.Error(code)
	}
	want := `ID  NODE  HOME  STATE    USER     CPU    RSS   STARTED       COMMAND
7   n2    n1    running  root     1.50s  3.0M  May 06 07:08  make -j8 "a b"
8   n3    n1    exited   4294967  0.00s  -     May 06 07:08  "x\x1b[2J\xff"
`
	if out.String() != want {
		t.Errorf("got\n%swant\n%s", out.String(), want)
	}
	if !strings.Contains(errOut.String(), "node n4 does not answer") {
		t.Errorf("%q", errOut.String())
	}
	out.Reset()
	PS(context.Background(), path, &out, &errOut, true, true)
	var rows []map[string]any
	if err := json.Unmarshal(out.Bytes(), &rows); err != nil || len(rows) != 2 {
		t.Fatalf("%v: %s", err, out.String())
	}
	for _, k := range []string{"id", "node", "home", "state", "incarnation", "user", "command", "cpu_seconds", "rss_bytes", "started"} {
		if _, ok := rows[0][k]; !ok {
			t.Errorf("no %s in %v", k, rows[0])
		}
	}
	if rows[0]["id"] != 7.0 || rows[0]["cpu_seconds"] != 1.5 || rows[1]["exit_code"] != 3.0 {
		t.Errorf("%v", rows)
	}
}

func TestVerbs(t *testing.T) {
	j := &jobs{kills: make(chan *api.KillRequest, 8), ends: map[uint64]*api.Job{
		1: {State: api.Job_EXITED, Code: 4}, 2: {State: api.Job_EXITED, Signal: 15},
		3: {State: api.Job_LOST, Text: "node n2 died"}, 4: {State: api.Job_KILLED, Signal: 9, Text: "its home was silent"},
	}}
	path := serve(t, j)
	ctx := context.Background()
	var out, errOut bytes.Buffer
	check := func(name string, code, want int, wantOut, wantErr string) {
		t.Helper()
		if code != want || out.String() != wantOut || errOut.String() != wantErr {
			t.Errorf("%s: code %d, %q, %q", name, code, out.String(), errOut.String())
		}
		out.Reset()
		errOut.Reset()
	}
	check("kill", Kill(ctx, path, &errOut, "usr1", []string{"%5"}), 0, "", "")
	if killed := <-j.kills; killed.Job != 5 || killed.Signal != 10 {
		t.Errorf("%+v", killed)
	}
	check("kill none", Kill(ctx, path, &errOut, "9", []string{"9"}), 1, "", "unum: kill: no job 9\ntry: unum ps\n")
	check("kill what", Kill(ctx, path, &errOut, "NOSUCH", []string{"5"}), 125, "", "unum: kill: no signal \"NOSUCH\"\n")
	check("wait 1", Wait(ctx, path, &errOut, "1"), 4, "", "")
	check("wait 2", Wait(ctx, path, &errOut, "2"), 143, "", "")
	check("wait 3", Wait(ctx, path, &errOut, "3"), 125, "", "unum: wait: job 3 is lost: node n2 died\n")
	check("wait 4", Wait(ctx, path, &errOut, "4"), 125, "", "unum: wait: job 4 was ended by Unum: its home was silent\n")
	check("wait x", Wait(ctx, path, &errOut, "x"), 125, "", "unum: wait: job \"x\": want a number, as unum ps shows them\n")
	check("logs", Logs(ctx, path, &out, &errOut, true, "1"), 0, "out", "err")
	check("why", Why(ctx, path, &out, &errOut, false, "1"), 0, "because\n", "")
	code := PS(ctx, "/nonexistent/s", &out, &errOut, false, false)
	check("no daemon", code, 125, "", "unum: ps: no daemon is running on this machine (socket /nonexistent/s)\ntry: "+control.RemedyStart+"\n")
}
