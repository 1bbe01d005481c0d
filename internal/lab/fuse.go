package lab

import (
	"bufio"
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/unum-os/unum/internal/fusefs"
)

// abortMounts ends the FUSE connections of the mount namespaces that processes
// are in, where they are not this process's too. A killed process whose thread
// waits for an answer of its own mount does not die before.
func abortMounts(pids []int) {
	ours := fuseMinors("/proc/self/mountinfo")
	for _, pid := range pids {
		tasks, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/mountinfo", pid)) // the pattern is good
		for _, t := range tasks {
			for minor := range fuseMinors(t) {
				if !ours[minor] {
					_ = fusefs.AbortConnection(minor) // it may be over
				}
			}
		}
	}
}

// fuseMinors returns the device numbers of the FUSE mounts in a mountinfo file
// (proc_pid_mountinfo(5)); none if it cannot be read.
func fuseMinors(mountinfo string) map[uint32]bool {
	minors := map[uint32]bool{}
	b, err := os.ReadFile(mountinfo)
	if err != nil {
		return minors
	}
	for s := bufio.NewScanner(bytes.NewReader(b)); s.Scan(); {
		left, right, ok := strings.Cut(s.Text(), " - ")
		l := strings.Fields(left)
		if !ok || len(l) < 3 || right != "fuse" && !strings.HasPrefix(right, "fuse ") && !strings.HasPrefix(right, "fuse.") {
			continue
		}
		_, minor, _ := strings.Cut(l[2], ":")
		if n, err := strconv.ParseUint(minor, 10, 32); err == nil {
			minors[uint32(n)] = true
		}
	}
	return minors
}
