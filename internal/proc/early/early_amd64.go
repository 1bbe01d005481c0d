package early

const sysPrlimit64 = 302

// raw makes a system call of four arguments and returns what the kernel did.
//
//go:noescape
func raw(trap, a1, a2, a3, a4 uintptr) uintptr
