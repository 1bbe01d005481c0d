// Package fusefs shows a Tree to the kernel as a mounted file system.
//
// # Words
//
// A Mount is one connection to the kernel through /dev/fuse. A request is a
// message of the kernel that wants a reply; a notification is a message to the
// kernel that nobody asked for. A worker is a goroutine that reads a request,
// has it decoded and carried out, and writes the reply; while it waits in read
// it is idle. A promise is the time for which the kernel may use attributes
// without asking.
//
// # Invariants
//
//   - Some worker is idle, or about to be, as long as the connection lives:
//     the one that takes the last place starts another before it handles its
//     request. A handler may therefore block as long as it likes.
//   - FORGET, INTERRUPT, the end of a handle or lock, and pages written back
//     never wait behind other requests: they do not count against MaxRequests,
//     nor do waits for locks, which may last for ever.
//   - The kernel never caches names, present or absent (entry time-out 0), and
//     never attributes beyond the promise. A reply that took long to get out
//     (the process was stopped, the machine slept) is followed by an
//     invalidation of what it said.
//   - The kernel holds no dirty data but pages of shared mappings: its
//     write-back cache is off, write(2) is a Write.
//   - Node ids are inode numbers and generations are zero.
//
// # Signals
//
// A signal to a waiting program sends INTERRUPT. Waits for locks end at once,
// and so does everything if the program is being killed. Other calls are given
// Config.Patience to finish first: programs are not prepared for stat or open
// to fail because a child ended or a timer ran off.
//
// # Locks
//
// Mount.mu is a leaf. No lock is held over a call of the Tree, over a reply or
// over a notification.
//
// # Failure
//
// If the process dies, the kernel ends the connection: calls of programs that
// wait for an answer end with ECONNABORTED, later ones with ENOTCONN. It cannot
// if a thread of the process waits for the mount itself; then the guard does it,
// if there is one (Config.Guard). Abort does it on purpose. If someone else
// unmounts, Run returns an error. Handles still open when the connection ends
// get no Release, and lookups no Forget.
//
// The process must have a umask of 0, which the node sets for the whole process
// when it starts: it concerns nothing here but what the Tree creates on local
// disks.
package fusefs
