// Package record is the replicated state machine of the cluster's own record:
// its name, its members, the tokens by which machines join, its users, keys with
// values, its jobs, and the audit; and who may change what of it.
//
// # Words
//
// A member is a machine that was given a node id. A token lets machines join; the
// record knows the hash of its secret only. Cluster time is the time of day that
// a command carries: the record itself reads no clock. The revision counts changes.
// Who asks is the principal of a command, proven at the door of the node that
// proposes it; what it may do is decided here, by Rights. The audit is the list
// of administrative acts and of refusals. The history is what changed at each of
// the last revisions.
//
// # Keys
//
// All keys begin with the group's prefix; numbers are eight bytes, big endian;
// values are CBOR structs with integer keys, but for events (appendEvents).
//
//	'i'                    Info: name and keys
//	'c'                    Counters
//	'n' node               Member
//	't' token              Token
//	'j' job                Job
//	'f' revision job       finished jobs in the order in which they finished
//	'o' node client        what is known of a client of the record
//	'r' node client seq    Result of a command, until acknowledged
//	'k' key                Key: what Put wrote
//	'q' uid, or 1<<32      usage of a user's keys, or of the settings
//	'p' uid                User
//	'w' name               the user's uid
//	'l' hash               LoginToken
//	'e' revision           events of one command, which brought the record to that revision
//	'a' ring slot          Audit; ring 0 has the acts, ring 1 the refusals
//	'u', 'v', 'd', 'h'     clients of before they belonged to nodes, events of before they
//	                       stood together; cleared
//
// # Invariants
//
//   - Apply depends on the state, the index and the command alone.
//   - A refused command changes nothing but its client's bookkeeping and the audit.
//   - Nobody asks for nothing: only the founding Init and Barrier need no principal.
//   - A client of the record is one node's, and what is kept of it takes up that
//     node's room only. Who may not do a command is not met as a client.
//   - Whatever is written of what is watched stands in the history.
//   - What a machine remembers from command to command saves time and decides
//     nothing.
//   - Node ids and job ids are given out once.
//   - A use of a token and the member it makes are one command.
//   - A job's record never goes back: not to an older incarnation, and not from
//     an end that was seen. "lost" is a presumption and yields to a seen end.
//   - Kept are all unfinished jobs and the last MaxFinished finished ones, the
//     last clients of each node, and so many results of each (StoreClients, Window,
//     OtherClients, OtherWindow).
//
// # Locks
//
// None: the group calls Apply from one goroutine. A View is as safe as its
// reader.
//
// # Failure
//
// A malformed command is refused by its Result. A state that cannot be read or
// decoded makes Apply panic with an error, for a replica that cannot tell its
// state must stop; Views return errors of class Corrupt or IO.
package record
