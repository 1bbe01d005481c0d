// Package rpc carries calls, casts and streams between the nodes of a cluster
// over mutual TLS, one listening port a node.
//
// Words. A call is a request with one answer. A cast is a message without one:
// it may be lost, but casts of one node to another are handled one at a time, in
// the order sent. A stream is a connection for bytes, with half close. An
// Endpoint is a node's end of all of them. A link is one TLS connection; the
// node that dialled sends its calls there, the other answers them. Between two
// nodes there are up to four links in each direction, called lanes, made when
// first used: small calls, bulk calls (so that blocks do not delay small calls),
// casts, and streams (multiplexed by yamux). ALPN says which lane a connection
// is; one more protocol, join, is for machines that have no certificate yet.
//
// Invariants. Nothing is read from a peer that has shown no certificate of the
// cluster's authority for an allowed node, except one bounded frame on join
// connections. A link's reader never waits for a handler, so that pings are
// answered as long as the process runs. Every queue has a bound: the sender of
// a call waits for room until its deadline, a cast that finds no room is
// refused, a peer that has more calls in hand than a correct one can is
// answered with class Busy. A call has a deadline always; it travels with the
// call as a duration and ends the handler's context.
//
// Failure. A peer that is silent for two seconds although asked is dead: its
// links are closed and their calls fail with class Unavailable. The next call
// dials again, at most once a second for a peer that does not answer; while a
// peer is known to be away, calls to it fail at once or nearly so. Whether a
// call that failed with Unavailable or Timeout was carried out is unknown. A
// stream that ends without its writer having said so gives io.ErrUnexpectedEOF.
//
// Locks. lane.mu comes before queue.mu and Endpoint.smu; all others are leaves.
// None is held over I/O, save rawConn.mu over the writes it orders (closing the
// connection ends them), nor while foreign code runs.
package rpc
