package main

import (
	"bytes"
	"context"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/unum-os/unum/internal/errs"
	"github.com/unum-os/unum/internal/record"
)

// TestGaveUp: who gave a leaving up hears where the node stands when the daemon has
// made an end of it, and not what was so before it began; who was too late waits as
// long as he would have.
func TestGaveUp(t *testing.T) {
	type look struct {
		state     record.State
		departing bool
		err       error
	}
	gone := errs.E(errs.Unavailable, "ask", "", "no daemon runs")
	left := errors.New("it has left")
	for name, x := range map[string]struct {
		looks []look // the last again and again
		want  string
		err   error
	}{
		"it stays":                          {[]look{{record.Active, false, nil}}, "this node stays", errs.Interrupted.Err()},
		"not marked yet, and then it stays": {[]look{{record.Active, true, nil}, {record.Leaving, true, nil}, {record.Active, false, nil}}, "this node stays", errs.Interrupted.Err()},
		"not marked yet, and then marked":   {[]look{{record.Active, true, nil}, {record.Leaving, true, nil}}, "is marked as leaving still", errs.Interrupted.Err()},
		"the telling was in vain":           {[]look{{record.Leaving, true, nil}, {record.Leaving, false, nil}}, "is marked as leaving still", errs.Interrupted.Err()},
		"too late":                          {[]look{{record.Active, true, nil}, {0, false, gone}}, "interrupted too late", left},
	} {
		t.Run(name, func(t *testing.T) {
			i, limit := 0, time.Second
			var out bytes.Buffer
			err := gaveUp(context.Background(), &out, limit, func(context.Context) (string, bool, error) {
				l := x.looks[min(i, len(x.looks)-1)]
				i++
				return l.state.String(), l.departing, l.err
			}, func(ctx context.Context) error {
				if _, bounded := ctx.Deadline(); bounded {
					t.Error("the end is waited for no longer than it is looked whether the node stays")
				}
				return left
			})
			if !errors.Is(err, x.err) || !strings.Contains(out.String(), x.want) || i < len(x.looks) {
				t.Errorf("after %d looks: %q, %v", i, out.String(), err)
			}
		})
	}
}
