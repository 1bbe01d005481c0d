package node

import (
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

// niceness of the daemon: it renews sessions and answers for the whole cluster
// within a second or so, beside commands that take all the processor time they
// can get. The commands get their callers' niceness back (package proc/shim).
const niceness = -10

// slack is by how much the kernel may be late with the daemon's timers, so that
// it wakes one thread for several of them. The usual 50 us cost more than what
// the timers are for: Go's scheduler sleeps in steps of 20 us, and a thread woken
// for nothing takes the processor from one that works. Nothing here needs a
// timer that is finer. Commands get the usual back (package proc/shim).
const slack = time.Millisecond

// favour gives every thread of this process precedence over commands, and
// coarse timers. Threads started later inherit both. Without the right to do so
// nothing changes.
func favour(log *slog.Logger) {
	eachThread(log, "priority not raised", func(tid int) error {
		return unix.Setpriority(unix.PRIO_PROCESS, tid, niceness)
	})
	eachThread(log, "timers not made coarse", func(tid int) error {
		return os.WriteFile(fmt.Sprintf("/proc/%d/timerslack_ns", tid), []byte(strconv.FormatInt(slack.Nanoseconds(), 10)), 0)
	})
	// With autogroups (sched(7)) niceness counts within one login session only,
	// and between these the group's own does.
	if err := os.WriteFile("/proc/self/autogroup", []byte(strconv.Itoa(niceness)), 0); err != nil {
		log.Debug("autogroup's priority not raised", "err", err)
	}
}

// eachThread does f to all threads, also to those that others start meanwhile.
func eachThread(log *slog.Logger, failed string, f func(tid int) error) {
	seen := map[int]bool{}
	for more := true; more; {
		more = false
		tasks, err := os.ReadDir("/proc/self/task")
		if err != nil {
			log.Debug(failed, "err", err)
			return
		}
		for _, t := range tasks {
			tid, err := strconv.Atoi(t.Name())
			if err != nil || seen[tid] {
				continue
			}
			seen[tid], more = true, true
			if err := f(tid); err != nil && !errors.Is(err, unix.ESRCH) && !errors.Is(err, fs.ErrNotExist) {
				log.Debug(failed, "err", err)
				return
			}
		}
	}
}
