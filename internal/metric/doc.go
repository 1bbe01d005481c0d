// Package metric is how a node shows what it counts: the shapes that all parts
// use, and the HTTP endpoint where Prometheus reads them.
//
// Each part counts for itself, in its metrics.go, mostly with atomics or in
// numbers that it has anyway, which are read when somebody asks. Its Collectors
// are registered on a registry of the node's own: several nodes live in one test
// process. Names are unum_<part>_<thing>_<unit>; labels come from small fixed
// sets, never from a path, a user or a job. docs/metrics.md lists all of them.
//
// Invariants. The endpoint answers GET /metrics and nothing else; what it shows
// is no secret; a client can neither hold it for long nor have many connections.
//
// Failure. If the address cannot be listened on, the endpoint tries again until
// it can; meanwhile Err says why, which the node shows as a condition.
package metric
