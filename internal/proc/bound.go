package proc

import (
	"fmt"
	"os"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/unum-os/unum/internal/control"
	"github.com/unum-os/unum/internal/proc/jobapi"
)

// bound takes from a program what its caller, who is not root, could not have
// given it here: the shim sets limits and niceness as root, and the request says
// what it likes. What the kernel does not tell of the caller is left out.
func bound(p *jobapi.Program, caller control.Cred) {
	var hard []uint64
	nice := 0
	if caller.PID > 0 && owner(caller.PID) == int64(caller.UID) {
		hard = hardLimits(caller.PID)
		if pr, err := unix.Getpriority(unix.PRIO_PROCESS, caller.PID); err == nil {
			nice = 20 - pr // the system call's way of saying it
		}
	}
	p.Nice = max(p.Nice, nice)
	asked := p.Rlimits
	p.Rlimits = nil
	for _, l := range asked {
		if l.Resource >= 0 && l.Resource < len(hard) {
			l.Max = min(l.Max, hard[l.Resource])
			l.Cur = min(l.Cur, l.Max)
			p.Rlimits = append(p.Rlimits, l)
		}
	}
}

// owner returns the user a process belongs to, -1 if there is none: the number
// may be another's by now.
func owner(pid int) int64 {
	st, err := os.Stat(fmt.Sprintf("/proc/%d", pid))
	if err != nil {
		return -1
	}
	return int64(st.Sys().(*syscall.Stat_t).Uid)
}

// hardLimits returns the hard limits of a process by resource, none if they
// cannot be read. prlimit would need a capability that not every root has.
func hardLimits(pid int) []uint64 {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/limits", pid))
	if err != nil {
		return nil
	}
	// The kernel prints a head and a line for each resource, in their order, with
	// columns of fixed width.
	const at, width = 47, 20
	lines := strings.Split(strings.TrimSuffix(string(b), "\n"), "\n")
	var out []uint64
	for _, line := range lines[1:] {
		if len(line) < at+width {
			return nil
		}
		n := uint64(unix.RLIM_INFINITY)
		if s := strings.TrimSpace(line[at : at+width]); s != "unlimited" {
			if n, err = strconv.ParseUint(s, 10, 64); err != nil {
				return nil
			}
		}
		out = append(out, n)
	}
	return out
}
