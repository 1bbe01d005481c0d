// Package control is the daemon's unix socket: it carries requests of local
// programs to the node's daemon, and the answers back.
//
// Two protocols live there. HTTP/2, which a connection's first byte tells apart, is
// handed to whoever serves it: package control/api, with all that people and
// programs ask. The rest are frames, for what needs passed descriptors and a fast
// start: running a command, and the daemon's own program image. This package must
// stay light: `unum run` imports it.
//
// Words: a verb names what is asked; a request is one verb with its argument
// bytes and, for some verbs, open descriptors; an answer is a sequence of
// messages ended by success or by one error. The argument and the messages are
// opaque here.
//
// Who asks is what the kernel says (SO_PEERCRED, SO_PEERGROUPS at connect time),
// never what the request says. The socket is open to every user.
//
// On the wire a frame is
//
//	[length u32, big endian, of all that follows][type u8][payload]
//
// and descriptors ride on the first byte of the frame they belong to.
//
// Invariants: a frame above MaxFrame (a client's message: above 64 KiB), an unknown
// type, or more than MaxFiles descriptors closes the connection before memory is
// taken for it; so do descriptors with a client's message, and a second request
// while one is served; descriptors
// nobody took are closed when the request ends. Of either protocol, connections
// are bounded in all and per user, and one that says nothing is closed.
//
// Lock order: Server.mu and Conn.mu are leaves.
//
// On failure: no daemon behind the path is an error of class Unavailable that
// says what to type; a daemon that goes away in the middle is Unavailable too. A
// client that goes away cancels the context of its request.
package control
