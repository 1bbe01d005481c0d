package node

import (
	"bytes"
	"context"
	"net"
	"testing"
	"time"

	"github.com/unum-os/unum/internal/identity"
	"github.com/unum-os/unum/internal/ids"
	"github.com/unum-os/unum/internal/record"
	"github.com/unum-os/unum/internal/wire"
)

// FuzzNodeFile reads node.json and the volume key from any bytes: what is taken
// names a node, and reads the same when it is written again.
func FuzzNodeFile(f *testing.F) {
	good, err := nodeFile{Cluster: "c", Node: 3, Role: record.RoleStore, Addr: "a:1", Peers: map[string]string{"n1": "b:1"}}.encode()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(good)
	f.Add(bytes.Replace(good, []byte(`"version": 3`), []byte(`"version": 4`), 1))
	f.Add([]byte(`{"version": 2, "cluster": "c", "node": "n1", "role": "store"}`))
	f.Add([]byte(`{"version": 3, "sum": ""}`))
	f.Add(encodeKey([32]byte{1}))
	f.Add(make([]byte, 32))
	f.Fuzz(func(t *testing.T, b []byte) {
		if key, err := decodeKey(b); err == nil && !bytes.Equal(encodeKey(key)[:32], b[:32]) {
			t.Fatal("another key")
		}
		d, err := decodeNodeFile(b)
		if err != nil {
			return
		}
		if d.Node == 0 || d.Cluster == "" || d.Role < record.RoleStore || d.Role > record.RoleWitness || d.Version > fileVersion {
			t.Fatalf("%+v is taken for a node", d)
		}
		again, err := d.encode()
		if err != nil {
			t.Fatal(err)
		}
		e, err := decodeNodeFile(again)
		if err != nil || e.Node != d.Node || e.Cluster != d.Cluster || e.Addr != d.Addr || len(e.Peers) != len(d.Peers) {
			t.Fatalf("%+v became %+v, %v", d, e, err)
		}
	})
}

// FuzzDoor gives a running node what strangers say at the door, and what peers
// ask: nothing is written into the record by what no token stands behind.
func FuzzDoor(f *testing.F) {
	cfg := config(f)
	if err := Found(cfg); err != nil {
		f.Fatal(err)
	}
	n, _ := start(f, cfg)
	await(f, "the node is a member", func() bool { return len(n.current()) == 1 && n.current()[0].State == record.Active })
	_, csr, err := identity.NewRequest()
	if err != nil {
		f.Fatal(err)
	}
	for _, q := range []any{joinRequest{CSR: csr, Hostname: "x", Addr: "y:1"}, joinRequest{CSR: csr, Renew: 1}, joinRequest{CSR: csr, Renew: 9},
		renewRequest{csr}, entrustment{[]byte("key")}, memberList{}, clockReply{1}} {
		f.Add(wire.MustMarshal(q))
	}
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, req []byte) {
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		defer cancel()
		before := n.rec.Status().Applied
		if b, err := n.serveDoor(ctx, &net.TCPAddr{}, req); err == nil {
			t.Fatalf("a stranger was given %q", b)
		}
		for _, h := range []func(context.Context, ids.Node, []byte, []byte) (any, []byte, error){n.serveRenew, n.serveEntrust, n.serveAuthority} {
			if r, _, err := h(ctx, 9, req, nil); err == nil && r != nil {
				t.Fatalf("a node that is no member was given %v", r)
			}
		}
		if after := n.rec.Status().Applied; after != before {
			t.Fatalf("%d entries were written", after-before)
		}
	})
}
