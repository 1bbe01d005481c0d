package proc

import (
	"context"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/unum-os/unum/internal/errs"
	"github.com/unum-os/unum/internal/ids"
	"github.com/unum-os/unum/internal/wire"
)

func (r *rig) detach(args ...string) ids.Job {
	r.t.Helper()
	got := r.run(strings.NewReader("not for it"), append([]string{"run", "--detach"}, args...)...)
	n, err := strconv.Atoi(strings.TrimSuffix(got.out, "\n"))
	if got.code != 0 || err != nil || got.err != "" {
		r.t.Fatalf("%+v", got)
	}
	return ids.Job(n)
}

func (r *rig) wait(id ids.Job) JobRecord {
	r.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	j, err := r.home.Wait(ctx, id)
	if err != nil {
		r.t.Fatal(err)
	}
	return j
}

func TestDetached(t *testing.T) {
	r := newRig(t)
	id := r.detach("--name", "x", "sh", "-c", "cat; echo out; echo err >&2; exit 9")
	j := r.wait(id)
	if j.State != Exited || j.ExitCode() != 9 || j.Name != "x" || !j.Detached || j.End < j.Start {
		t.Errorf("%+v", j)
	}
	for f, want := range map[string]string{outFile: "out\n", errFile: "err\n"} {
		if b, err := os.ReadFile(r.mgrs[2].jobDir(id) + "/" + f); err != nil || string(b) != want {
			t.Errorf("%s: %q, %v", f, b, err)
		}
	}
	// One that cannot start says so at once, and leaves nothing.
	got := r.run(nil, "run", "--detach", "nosuch")
	if got.code != 127 || got.out != "" {
		t.Errorf("%+v", got)
	}
	if _, err := os.Stat(r.mgrs[2].jobDir(id + 1)); !os.IsNotExist(err) {
		t.Errorf("directory of a job that never was: %v", err)
	}
}

func TestDetachedKill(t *testing.T) {
	r := newRig(t)
	id := r.detach("sleep", "1000")
	call := func(uid uint32, sig int) error {
		_, err := r.f.get(1).Call(context.Background(), 2, methodKill, killReq{id, sig, uid}, nil, nil)
		return err
	}
	if err := call(1234, 15); err == nil {
		t.Error("another user may kill it")
	}
	if err := call(0, 15); err != nil {
		t.Error(err)
	}
	if j := r.wait(id); j.ExitCode() != 143 || j.State != Exited {
		t.Errorf("%+v", j)
	}
	if err := call(0, 15); err == nil {
		t.Error("an ended job can be killed")
	}
}

// TestAdopt: detached jobs outlive the daemon, and the next one knows them.
func TestAdopt(t *testing.T) {
	r := newRig(t)
	ends := r.detach("sh", "-c", "echo a; while [ ! -e "+r.dirs[2]+"/go ]; do sleep 0.02; done; echo b; exit 11")
	stays := r.detach("sleep", "1000")
	later := r.detach("sh", "-c", "trap 'exit 12' USR1; while :; do sleep 0.02; done")
	r.stop()
	os.WriteFile(r.dirs[2]+"/go", nil, 0o644)
	until(t, "exit file", func() bool { _, err := os.Stat(r.mgrs[2].jobDir(ends) + "/exit"); return err == nil })
	r.up()
	if j := r.wait(ends); j.ExitCode() != 11 || j.State != Exited {
		t.Errorf("%+v", j)
	}
	if b, _ := os.ReadFile(r.mgrs[2].jobDir(ends) + "/out"); string(b) != "a\nb\n" {
		t.Errorf("%q", b)
	}
	until(t, "two jobs taken over", func() bool { return len(r.mgrs[2].Jobs()) == 2 })
	for id, c := range map[ids.Job]struct{ sig, code int }{stays: {int(unix.SIGKILL), 137}, later: {int(unix.SIGUSR1), 12}} {
		if _, err := r.f.get(1).Call(context.Background(), 2, methodKill, killReq{id, c.sig, 0}, nil, nil); err != nil {
			t.Error(err)
		}
		if j := r.wait(id); j.ExitCode() != c.code || j.State != Exited {
			t.Errorf("job %d: %+v", id, j)
		}
	}
	until(t, "nothing left", func() bool { return len(r.mgrs[2].Jobs()) == 0 })
}

func TestNodeDead(t *testing.T) {
	r := newRig(t)
	r.reg.Put(JobRecord{Job: 90, Incarnation: 1, Node: 7, State: Running, Detached: true})
	r.reg.Put(JobRecord{Job: 91, Incarnation: 1, Node: 7, State: Exited, Code: 3})
	if err := r.mgrs[1].NodeDead(context.Background(), 7); err != nil {
		t.Fatal(err)
	}
	if j := r.wait(90); j.State != Lost || j.ExitCode() != 125 {
		t.Errorf("%+v", j)
	}
	if j := r.wait(91); j.State != Exited || j.ExitCode() != 3 {
		t.Errorf("%+v", j)
	}
}

// TestAdoptTimeout: the time limit of a detached job outlives the daemon too.
func TestAdoptTimeout(t *testing.T) {
	r := newRig(t)
	id := r.detach("--timeout", "2s", "sleep", "1000")
	r.stop()
	r.up()
	if j := r.wait(id); j.State != Killed || j.ExitCode() != codeTimeout {
		t.Errorf("%+v", j)
	}
	until(t, "nothing left", func() bool { return len(r.mgrs[2].Jobs()) == 0 })
}

// TestOrphans: when nobody saw a daemon die, it says itself after its return what
// it no longer has.
func TestOrphans(t *testing.T) {
	r := newRig(t)
	id := r.detach("sleep", "1000")
	r.stop()
	old := JobRecord{Job: 90, Incarnation: 1, Home: 1, Node: 2, State: Running, Start: 1}
	theirs, ended := old, old
	theirs.Job, theirs.Node = 91, 7
	ended.Job, ended.State, ended.Code = 92, Exited, 3
	for _, j := range []JobRecord{old, theirs, ended} {
		r.reg.Put(j)
	}
	r.up()
	if j := r.wait(90); j.State != Lost || j.ExitCode() != 125 || !strings.Contains(j.Text, "the daemon of node n2 was restarted") {
		t.Errorf("%+v", j)
	}
	for n, want := range map[ids.Job]State{91: Running, 92: Exited, id: Running} {
		if j, err := r.reg.Get(context.Background(), n); err != nil || j.State != want {
			t.Errorf("%+v, %v", j, err)
		}
	}
	if err := r.kill(id, 9); err != nil {
		t.Error(err)
	}
	r.wait(id)
}

// TestLostButAlive: a job whose node was only cut off can be waited for and
// killed, whatever the record believes.
func TestLostButAlive(t *testing.T) {
	r := newRig(t)
	id := r.detach("sleep", "1000")
	if err := r.mgrs[1].NodeDead(context.Background(), 2); err != nil {
		t.Fatal(err)
	}
	if j, err := r.reg.Get(context.Background(), id); err != nil || j.State != Lost {
		t.Fatalf("%+v, %v", j, err)
	}
	waited := make(chan JobRecord, 1)
	go func() {
		ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
		defer cancel()
		j, _ := r.home.Wait(ctx, id)
		waited <- j
	}()
	if err := r.kill(id, 15); err != nil {
		t.Error(err)
	}
	if j := <-waited; j.State != Exited || j.ExitCode() != 143 {
		t.Errorf("%+v", j)
	}
	if err := r.kill(id, 15); !errs.Has(err, errs.NotFound) {
		t.Errorf("%v", err)
	}
	// One that nobody has any more is lost, at once.
	r.reg.Put(JobRecord{Job: 500, Incarnation: 1, Node: 2, State: Lost})
	if j := r.wait(500); j.State != Lost {
		t.Errorf("%+v", j)
	}
}

// TestOldOutput: the output of ended jobs goes when there are too many of them.
func TestOldOutput(t *testing.T) {
	r := newRig(t)
	r.stop()
	const more = 3
	for i := range keepEnded + more {
		dir := r.mgrs[2].jobDir(ids.Job(i + 1))
		if err := os.MkdirAll(dir, 0o700); err != nil {
			t.Fatal(err)
		}
		mt := meta{Record: JobRecord{Job: ids.Job(i + 1), Incarnation: 1, Node: 2, State: Exited, End: int64(i + 1)}}
		if err := os.WriteFile(dir+"/"+metaFile, wire.MustMarshal(mt), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	r.up()
	es, err := os.ReadDir(r.mgrs[2].jobsDir())
	if err != nil || len(es) != keepEnded {
		t.Errorf("%d directories, %v", len(es), err)
	}
	if _, err := os.Stat(r.mgrs[2].jobDir(more)); !os.IsNotExist(err) {
		t.Errorf("the oldest: %v", err)
	}
}
