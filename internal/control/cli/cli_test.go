package cli

import (
	"bytes"
	"context"
	"encoding/json"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/unum-os/unum/internal/control"
	"github.com/unum-os/unum/internal/errs"
	"github.com/unum-os/unum/internal/ids"
	"github.com/unum-os/unum/internal/proc"
	"github.com/unum-os/unum/internal/wire"
)

func serve(t *testing.T, setup func(*control.Server)) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "unum-cli-")
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "s")
	s := control.New(control.Config{Path: path, Log: slog.New(slog.NewTextHandler(io.Discard, nil))})
	setup(s)
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
	jobs := []proc.JobInfo{
		{Record: proc.JobRecord{Job: 7, Incarnation: 1, Home: 1, Node: 2, Argv: [][]byte{[]byte("make"), []byte("-j8"), []byte("a b")}, State: proc.Running, Start: start.UnixNano()}, CPU: 1500e6, RSS: 3 << 20},
		{Record: proc.JobRecord{Job: 8, Incarnation: 1, Home: 1, Node: 3, UID: 4294967, Argv: [][]byte{[]byte("x\x1b[2J\xff")}, State: proc.Exited, Code: 3, Start: start.UnixNano(), End: start.UnixNano() + 5}},
	}
	path := serve(t, func(s *control.Server) {
		s.Handle(proc.VerbPS, func(ctx context.Context, c *control.Conn, req []byte) error {
			return c.Send(wire.MustMarshal(proc.PSResp{Jobs: jobs, Silent: []ids.Node{4}}))
		})
	})
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
	kills := make(chan proc.KillReq, 8)
	path := serve(t, func(s *control.Server) {
		s.Handle(proc.VerbKill, func(ctx context.Context, c *control.Conn, req []byte) error {
			var killed proc.KillReq
			if err := wire.Unmarshal(req, &killed); err != nil {
				return err
			}
			kills <- killed
			if killed.Job == 9 {
				return errs.E(errs.NotFound, "", "", "no job 9").WithRemedy("unum ps")
			}
			return nil
		})
		s.Handle(proc.VerbWait, func(ctx context.Context, c *control.Conn, req []byte) error {
			var r proc.JobReq
			if err := wire.Unmarshal(req, &r); err != nil {
				return err
			}
			rec := map[ids.Job]proc.JobRecord{
				1: {State: proc.Exited, Code: 4}, 2: {State: proc.Exited, Signal: 15},
				3: {State: proc.Lost, Text: "node n2 died"}, 4: {State: proc.Killed, Signal: 9, Text: "its home was silent"},
			}[r.Job]
			return c.Send(wire.MustMarshal(proc.WaitResp{Record: rec}))
		})
		s.Handle(proc.VerbLogs, func(ctx context.Context, c *control.Conn, req []byte) error {
			c.Send(wire.MustMarshal(proc.Log{FD: 1, Data: []byte("out")}))
			return c.Send(wire.MustMarshal(proc.Log{FD: 2, Data: []byte("err")}))
		})
		s.Handle(proc.VerbWhy, func(ctx context.Context, c *control.Conn, req []byte) error {
			return c.Send(wire.MustMarshal(proc.WhyResp{Text: "because\n"}))
		})
	})
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
	if killed := <-kills; killed.Job != 5 || killed.Signal != 10 {
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
	check("no daemon", code, 125, "", "unum: ps: no daemon is running on this machine (socket /nonexistent/s)\ntry: unum up\n")
}
