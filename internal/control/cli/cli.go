// Package cli is what the verbs about jobs do on the command line: ask the
// daemon, print, and return an exit code.
//
// Every function returns 0 for success, 125 when Unum failed (after a sentence on
// errOut), or what its own comment says. sock is the daemon's socket, as
// control.Path returns it.
package cli

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os/user"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"
	"unicode"

	"golang.org/x/sys/unix"

	"github.com/unum-os/unum/internal/control/api"
	"github.com/unum-os/unum/internal/errs"
	"github.com/unum-os/unum/internal/ids"
	"github.com/unum-os/unum/internal/proc"
	"github.com/unum-os/unum/internal/proc/jobapi"
)

// askTimeout bounds the questions that are answered at once.
const askTimeout = 15 * time.Second

// Fail prints err as the failure of verb and returns 125.
func Fail(errOut io.Writer, verb string, err error) int {
	var e *errs.Error
	text := err.Error()
	if errors.As(err, &e) && e.Remedy != "" && !strings.Contains(text, "\ntry: ") {
		text += "\ntry: " + e.Remedy
	}
	fmt.Fprintf(errOut, "unum: %s: %s\n", verb, text)
	return jobapi.CodeFailed
}

// Ask dials the daemon for one question, which has its answer when f returns.
func Ask(ctx context.Context, sock string, f func(c *api.Client) error) error {
	c, err := api.Dial(ctx, sock)
	if err != nil {
		return err
	}
	defer c.Close()
	return f(c)
}

// Healthy returns nil if the node does all it is there for, and otherwise what is
// wrong with it.
func Healthy(ctx context.Context, sock string) error {
	return Ask(ctx, sock, func(c *api.Client) error {
		_, err := c.Node.Healthy(ctx, &api.HealthyRequest{})
		return err
	})
}

// ParseJob reads a job number, with or without a leading %.
func ParseJob(s string) (ids.Job, error) {
	n, err := strconv.ParseUint(strings.TrimPrefix(s, "%"), 10, 64)
	if err != nil || n == 0 {
		return 0, errs.E(errs.Invalid, "", "", "job %q: want a number, as unum ps shows them", s)
	}
	return ids.Job(n), nil
}

// row is a job as `unum ps --json` prints it.
type row struct {
	ID          uint64  `json:"id"`
	Node        string  `json:"node"`
	Home        string  `json:"home"`
	State       string  `json:"state"`
	Incarnation uint64  `json:"incarnation"`
	User        string  `json:"user"`
	Name        string  `json:"name,omitempty"`
	Command     string  `json:"command"`
	CPU         float64 `json:"cpu_seconds"`
	RSS         int64   `json:"rss_bytes"`
	Started     string  `json:"started"`
	Ended       string  `json:"ended,omitempty"`
	Detached    bool    `json:"detached"`
	ExitCode    *int    `json:"exit_code,omitempty"`
}

// PS is `unum ps`: the jobs of the whole cluster, with all also the ended ones.
func PS(ctx context.Context, sock string, out, errOut io.Writer, asJSON, all bool) int {
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	var jobs []*api.Job
	var last *api.ListJobsResponse
	err := Ask(ctx, sock, func(c *api.Client) error {
		parts, err := c.Jobs.List(ctx, &api.ListJobsRequest{All: all})
		for err == nil {
			var p *api.ListJobsResponse
			if p, err = parts.Recv(); err == nil {
				jobs, last = append(jobs, p.Jobs...), p
			}
		}
		if err == io.EOF {
			err = nil
		}
		return err
	})
	if err != nil {
		return Fail(errOut, "ps", err)
	}
	names := map[uint32]string{}
	rows := make([]row, 0, len(jobs))
	for _, j := range jobs {
		r := proc.RecordOf(j)
		w := row{ID: uint64(r.Job), Node: r.Node.String(), Home: r.Home.String(), State: r.State.String(), Incarnation: uint64(r.Incarnation),
			User: userName(names, r.UID), Name: r.Name, Command: command(r.Argv), CPU: float64(r.CPU) / 1e9, RSS: j.RssBytes,
			Started: stamp(r.Start), Detached: r.Detached}
		if r.State.Finished() {
			code := r.ExitCode()
			w.ExitCode, w.Ended = &code, stamp(r.End)
		}
		rows = append(rows, w)
	}
	for _, n := range last.GetSilent() {
		fmt.Fprintf(errOut, "unum: ps: node %v does not answer: its running jobs are shown as the record knows them\n", ids.Node(n))
	}
	if p := last.GetRecordProblem(); p != "" {
		fmt.Fprintf(errOut, "unum: ps: the record cannot be read, ended and lost jobs are missing: %s\n", p)
	}
	if asJSON {
		e := json.NewEncoder(out)
		e.SetIndent("", "  ")
		if err := e.Encode(rows); err != nil {
			return Fail(errOut, "ps", err)
		}
		return 0
	}
	tw := tabwriter.NewWriter(out, 0, 8, 2, ' ', 0)
	fmt.Fprintln(tw, "ID\tNODE\tHOME\tSTATE\tUSER\tCPU\tRSS\tSTARTED\tCOMMAND")
	for i, w := range rows {
		fmt.Fprintf(tw, "%d\t%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\n", w.ID, w.Node, w.Home, w.State, w.User,
			cpuTime(w.CPU), size(w.RSS), since(jobs[i].Start.AsTime()), short(w.Command))
	}
	if err := tw.Flush(); err != nil {
		return Fail(errOut, "ps", err)
	}
	return 0
}

func userName(seen map[uint32]string, uid uint32) string {
	if n, ok := seen[uid]; ok {
		return n
	}
	n := strconv.FormatUint(uint64(uid), 10)
	if u, err := user.LookupId(n); err == nil {
		n = u.Username
	}
	seen[uid] = n
	return n
}

// command prints an argument vector on one line: what a shell would have to be
// given is quoted, control characters included.
func command(argv [][]byte) string {
	parts := make([]string, len(argv))
	for i, a := range argv {
		s := string(a)
		plain := s != ""
		for _, c := range s {
			if c == unicode.ReplacementChar || !unicode.IsPrint(c) || strings.ContainsRune(" \t\"'\\$`*?|&;<>(){}[]#~!", c) {
				plain = false
				break
			}
		}
		if !plain {
			s = strconv.Quote(s)
		}
		parts[i] = s
	}
	return strings.Join(parts, " ")
}

func short(s string) string {
	const most = 60 // leaves room for the other columns on a line of 132
	r := []rune(s)
	if len(r) <= most {
		return s
	}
	return string(r[:most-1]) + "…"
}

func stamp(ns int64) string {
	if ns == 0 {
		return ""
	}
	return time.Unix(0, ns).Format(time.RFC3339Nano)
}

func since(t time.Time) string {
	t = t.Local()
	if time.Since(t) < 20*time.Hour {
		return t.Format("15:04:05")
	}
	return t.Format("Jan 02 15:04")
}

func cpuTime(s float64) string {
	if s < 60 {
		return fmt.Sprintf("%.2fs", s)
	}
	return time.Duration(s * 1e9).Round(time.Second).String()
}

func size(n int64) string {
	const k = 1024
	switch {
	case n == 0:
		return "-"
	case n < k*k:
		return fmt.Sprintf("%dK", n/k)
	case n < k*k*k:
		return fmt.Sprintf("%.1fM", float64(n)/(k*k))
	}
	return fmt.Sprintf("%.1fG", float64(n)/(k*k*k))
}

// ParseSignal reads a signal: 9, KILL or SIGKILL.
func ParseSignal(s string) (int, error) {
	if n, err := strconv.Atoi(s); err == nil {
		if n < 0 || n > 64 {
			return 0, errs.E(errs.Invalid, "", "", "signal %d: want 0 to 64", n)
		}
		return n, nil
	}
	name := strings.ToUpper(s)
	if !strings.HasPrefix(name, "SIG") {
		name = "SIG" + name
	}
	if n := unix.SignalNum(name); n != 0 {
		return int(n), nil
	}
	return 0, errs.E(errs.Invalid, "", "", "no signal %q", s)
}

// Kill is `unum kill [-s SIG] JOB...`: it signals each job's process group. Its
// code is 1 when at least one could not be signalled.
func Kill(ctx context.Context, sock string, errOut io.Writer, signal string, jobs []string) int {
	sig, err := ParseSignal(signal)
	if err != nil {
		return Fail(errOut, "kill", err)
	}
	code := 0
	for _, s := range jobs {
		id, err := ParseJob(s)
		if err == nil {
			c, cancel := context.WithTimeout(ctx, askTimeout)
			err = Ask(c, sock, func(a *api.Client) error {
				_, err := a.Jobs.Kill(c, &api.KillRequest{Job: uint64(id), Signal: int32(sig)})
				return err
			})
			cancel()
		}
		if err != nil {
			if n := Fail(errOut, "kill", err); errs.Has(err, errs.Unavailable) {
				return n
			}
			code = 1
		}
	}
	return code
}

// Wait is `unum wait JOB`: its code is the job's, 125 with a sentence for a job
// that was lost.
func Wait(ctx context.Context, sock string, errOut io.Writer, job string) int {
	id, err := ParseJob(job)
	if err != nil {
		return Fail(errOut, "wait", err)
	}
	var w *api.WaitResponse
	if err := Ask(ctx, sock, func(c *api.Client) (err error) {
		w, err = c.Jobs.Wait(ctx, &api.WaitRequest{Job: uint64(id)})
		return err
	}); err != nil {
		return Fail(errOut, "wait", err)
	}
	r := proc.RecordOf(w.Job)
	switch {
	case r.State == proc.Lost:
		fmt.Fprintf(errOut, "unum: wait: job %d is lost: %s\n", id, r.Text)
	case r.State == proc.Killed && r.Text != "":
		fmt.Fprintf(errOut, "unum: wait: job %d was ended by Unum: %s\n", id, r.Text)
	}
	return r.ExitCode()
}

// Logs is `unum logs [-f] JOB`: the job's stdout to out and its stderr to errOut;
// with follow until it ends. When ctx ends it returns 125 without a word: the
// caller knows which signal it was.
func Logs(ctx context.Context, sock string, out, errOut io.Writer, follow bool, job string) int {
	id, err := ParseJob(job)
	if err != nil {
		return Fail(errOut, "logs", err)
	}
	err = Ask(ctx, sock, func(c *api.Client) error {
		pieces, err := c.Jobs.Logs(ctx, &api.LogsRequest{Job: uint64(id), Follow: follow})
		if err != nil {
			return err
		}
		for {
			p, err := pieces.Recv()
			if err == io.EOF {
				return nil
			}
			if err != nil {
				return err
			}
			w := out
			if p.Fd == 2 {
				w = errOut
			}
			if _, err := w.Write(p.Data); err != nil {
				return err
			}
		}
	})
	switch {
	case err == nil:
		return 0
	case ctx.Err() != nil:
		return jobapi.CodeFailed
	}
	return Fail(errOut, "logs", err)
}

// Why is `unum why JOB`: why it runs where it runs, in prices.
func Why(ctx context.Context, sock string, out, errOut io.Writer, asJSON bool, job string) int {
	id, err := ParseJob(job)
	if err != nil {
		return Fail(errOut, "why", err)
	}
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	var w *api.WhyResponse
	if err := Ask(ctx, sock, func(c *api.Client) (err error) {
		w, err = c.Jobs.Why(ctx, &api.WhyRequest{Job: uint64(id), Json: asJSON})
		return err
	}); err != nil {
		return Fail(errOut, "why", err)
	}
	if _, err := io.WriteString(out, w.Text); err != nil {
		return Fail(errOut, "why", err)
	}
	return 0
}
