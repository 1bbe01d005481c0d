// Package shim is process 1 of every job: it starts the program, reaps what the
// program leaves behind, passes signals on, and reports how it ended, once.
//
// Words: the manager is the node manager of package proc, which starts the shim
// in new PID, mount and IPC namespaces; the program is the command the user
// typed; the link is the socket between manager and shim (descriptor 3).
//
// The program is the shim's child, never process 1 itself, in a session and
// process group of its own; signals for the job go to that group. It starts with
// descriptors 0, 1, 2 and no other, an empty signal mask, and every signal at its
// default except those named as ignored: hangup and interrupt, where the caller had
// them ignored (the others the command line's own runtime cannot tell).
//
// When the program ends the shim ends, and with process 1 the kernel ends the
// namespace: nothing that a command leaves in the background outlives it. A
// detached job is the way to keep something running.
//
// Invariants: Exited is sent exactly once, after the program was reaped; an
// attached job never outlives its lease, whatever became of the daemon, since
// the shim itself watches the time (on the boot-time clock, so that a machine
// that slept wakes to find it over).
//
// On failure: what prevents the start is reported with the step and the errno; a
// manager that goes away ends an attached job at once, and leaves a detached one
// running, whose end is then found in its exit file.
package shim
