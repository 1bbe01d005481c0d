package node

import (
	"log/slog"
	"os"
	"strconv"

	"golang.org/x/sys/unix"
)

// niceness of the daemon: it renews sessions and answers for the whole cluster
// within a second or so, beside commands that take all the processor time they
// can get. The commands get their callers' niceness back (package proc/shim).
const niceness = -10

// favour gives every thread of this process precedence over commands. Threads
// started later inherit it. Without the right to do so nothing changes.
func favour(log *slog.Logger) {
	seen := map[int]bool{}
	for more := true; more; { // a thread may start another while we look
		more = false
		tasks, err := os.ReadDir("/proc/self/task")
		if err != nil {
			log.Debug("priority not raised", "err", err)
			return
		}
		for _, t := range tasks {
			tid, err := strconv.Atoi(t.Name())
			if err != nil || seen[tid] {
				continue
			}
			seen[tid], more = true, true
			if err := unix.Setpriority(unix.PRIO_PROCESS, tid, niceness); err != nil && err != unix.ESRCH {
				log.Debug("priority not raised", "err", err)
				return
			}
		}
	}
	// With autogroups (sched(7)) niceness counts within one login session only,
	// and between these the group's own does.
	if err := os.WriteFile("/proc/self/autogroup", []byte(strconv.Itoa(niceness)), 0); err != nil {
		log.Debug("autogroup's priority not raised", "err", err)
	}
}
