package lab

import (
	"context"
	"io"
	"os"
	"time"

	"github.com/unum-os/unum/internal/errs"
)

// logPoll is how often a followed log is looked at: soon enough for a person.
const logPoll = 50 * time.Millisecond

// Logs writes to w what node's init and daemon have written since the lab was
// made; with follow also what they go on to write, until ctx ends or the lab is
// gone.
func (l *Lab) Logs(ctx context.Context, node string, w io.Writer, follow bool) error {
	s, err := readState(l.dir)
	if err != nil {
		return err
	}
	if _, err := s.node(node); err != nil {
		return err
	}
	f, err := os.Open(l.LogPath(node))
	if err != nil {
		return errs.Wrap(err, "lab logs", node)
	}
	defer f.Close()
	tick := time.NewTicker(logPoll)
	defer tick.Stop()
	for {
		_, gone := os.Stat(l.LogPath(node)) // before the last look at what it holds
		if _, err := io.Copy(w, f); err != nil {
			return errs.Wrap(err, "lab logs", node)
		}
		if !follow || os.IsNotExist(gone) {
			return nil
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}
