// Package early reads the limit of open files as it was when the process began.
//
// The Go runtime raises its own soft limit in package syscall's init, and tells
// nobody what it was before; a command must start with the caller's. Packages
// are initialized in the order of their import paths, those they import first:
// this one imports nothing, so that it comes before syscall, and therefore has
// its own way into the kernel.
package early

import "unsafe"

// Nofile is the soft and the hard limit; both 0 if they could not be read, as on
// an architecture without prlimit here.
var Nofile = func() (l struct{ Cur, Max uint64 }) {
	const nofile = 7
	if sysPrlimit64 == 0 || raw(sysPrlimit64, 0, nofile, 0, uintptr(unsafe.Pointer(&l))) != 0 {
		l.Cur, l.Max = 0, 0
	}
	return l
}()
