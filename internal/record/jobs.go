package record

import (
	"bytes"
	"strconv"

	"github.com/unum-os/unum/internal/errs"
	"github.com/unum-os/unum/internal/ids"
	"github.com/unum-os/unum/internal/wire"
)

func (t *txn) grantJobs(n uint32) (ids.Job, Refusal) {
	if n > MaxGrant {
		return 0, no(errs.TooLarge, "%d job ids, limit %d", n, MaxGrant)
	}
	t.count.Revision++
	first := t.count.NextJob
	t.count.NextJob += ids.Job(n)
	t.event(KindGrant, strconv.FormatUint(uint64(first), 10), false)
	return first, done
}

func (t *txn) putJobs(jobs []Job) ([]Refusal, Refusal) {
	if len(jobs) > MaxPut {
		return nil, no(errs.TooLarge, "%d jobs, limit %d", len(jobs), MaxPut)
	}
	out := make([]Refusal, len(jobs))
	var told [2]bool
	for i := range jobs {
		out[i] = t.putJob(jobs[i])
		out[i].untold(&told)
	}
	return out, done
}

func (t *txn) checkJob(j *Job) Refusal {
	argv := 0
	for _, a := range j.Argv {
		argv += len(a) + 1
	}
	switch {
	case j.ID == 0 || j.ID >= t.count.NextJob:
		return no(errs.Invalid, "job id %d was never given out", j.ID)
	case j.State < JobRunning || j.State > JobLost:
		return no(errs.Invalid, "job state %d", j.State)
	case argv > MaxArgv || len(j.Cwd) > MaxPath || len(j.Receipt) > MaxReceipt || len(j.User) > MaxText || len(j.Name) > MaxText || len(j.Text) > MaxText:
		return no(errs.TooLarge, "job %d: argv of %d bytes, directory of %d, receipt of %d, user of %d, name of %d, text of %d; limits %d, %d, %d, and %d for each of the rest",
			j.ID, argv, len(j.Cwd), len(j.Receipt), len(j.User), len(j.Name), len(j.Text), MaxArgv, MaxPath, MaxReceipt, MaxText)
	}
	return done
}

func (t *txn) putJob(j Job) Refusal {
	if r := t.checkJob(&j); r.refused() {
		return r
	}
	var was Job
	key := t.key(tagJob, uint64(j.ID))
	old, known := t.get(key)
	if known {
		t.decode(key, old, &was)
	}
	if r := t.mayPutJob(&j, known); r.refused() {
		return r
	}
	if known {
		switch {
		case j.Incarnation < was.Incarnation:
			return no(errs.Stale, "job %d has had incarnation %d, this is %d", j.ID, was.Incarnation, j.Incarnation)
		case j.Incarnation == was.Incarnation && was.State.Finished():
			j.FinishedAt = was.FinishedAt
			if bytes.Equal(wire.MustMarshal(j), old) {
				return done // told twice
			}
			if was.State != JobLost || !j.State.Finished() || j.State == JobLost {
				return no(errs.Stale, "job %d is %s already", j.ID, was.State)
			}
		case j.Incarnation > was.Incarnation && (was.State == JobExited || was.State == JobKilled):
			return no(errs.Stale, "job %d is %s, it does not live again", j.ID, was.State)
		}
	}
	if !j.State.Finished() && (!known || was.State.Finished()) && t.count.Unfinished >= MaxUnfinished {
		return no(errs.NoSpace, "%d jobs are unfinished", t.count.Unfinished)
	}

	if known {
		t.uncount(&was)
	}
	t.count.Revision++
	j.FinishedAt = 0
	if j.State.Finished() {
		j.FinishedAt = t.count.Revision
		t.count.Finished++
		t.set(t.key(tagFinished, j.FinishedAt, uint64(j.ID)), nil)
	} else {
		t.count.Unfinished++
	}
	t.save(key, j)
	if t.count.Finished > MaxFinished {
		t.dropOldest()
	}
	return done
}

// uncount takes a job out of the counts and of the order of the finished.
func (t *txn) uncount(j *Job) {
	if j.State.Finished() {
		t.count.Finished--
		t.delete(t.key(tagFinished, j.FinishedAt, uint64(j.ID)))
	} else {
		t.count.Unfinished--
	}
}

func (t *txn) dropOldest() {
	lo := t.key(tagFinished)
	t.scan(lo, after(lo), func(k, _ []byte) bool {
		t.delete(t.key(tagJob, number(k, 1)))
		t.delete(append(lo[:len(t.prefix)+1:len(t.prefix)+1], k...))
		t.count.Finished--
		return false
	})
}
