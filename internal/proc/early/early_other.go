//go:build !amd64 && !arm64

package early

const sysPrlimit64 = 0

func raw(trap, a1, a2, a3, a4 uintptr) uintptr { return 1 }
