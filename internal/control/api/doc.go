// Package api is the control API: what local programs ask of the node's daemon
// over gRPC, as unum.proto says, on the socket of package control.
//
// Words: a service is a set of methods; Failure is how an errs.Error travels; the
// peer is the process at the other end, by the kernel's word.
//
// A part of the daemon implements a service and registers it with Server, which
// control hands the connections that begin with HTTP/2's preface. Who asks is
// Peer(ctx). The table access says who may call what; a method that is not in it
// does not exist.
//
// Invariants: a request above MaxRequest, a header list above 16 KiB, or more than
// 32 calls at a time end the call or the connection before memory is taken for
// them; a connection without a call, and a call without its first message, are
// closed after ten seconds; strings are valid UTF-8 (Text makes them so).
//
// Lock order: Client.mu is a leaf; Server has none.
//
// On failure: every error is an errs.Error at both ends, with class, text and
// remedy. When the daemon stops, calls end with class Unavailable, and handlers
// by their contexts.
package api
