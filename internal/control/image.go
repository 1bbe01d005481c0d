package control

import (
	"context"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/unum-os/unum/internal/errs"
)

// ImageEnv is the environment variable that tells the daemon the fingerprint of
// the program it is.
const ImageEnv = "UNUM_CORE_ID"

const verbImage = "image"

// HandleImage lets command lines of the same build start the core from the
// daemon's own program image instead of unpacking theirs.
func (s *Server) HandleImage() {
	id := os.Getenv(ImageEnv)
	s.Handle(verbImage, func(ctx context.Context, c *Conn, req []byte) error {
		if id == "" || id != string(req) {
			return errs.E(errs.NotFound, "", "", "the daemon is another build")
		}
		f, err := os.Open("/proc/self/exe")
		if err != nil {
			return errs.Wrap(err, "open my own image", "")
		}
		defer f.Close()
		return c.Send(nil, f)
	})
}

// Image asks the daemon behind path for its program image of fingerprint id. A
// daemon of neither root's nor the caller's own is not believed.
func Image(path, id string, timeout time.Duration) (*os.File, error) {
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	defer cancel()
	c, err := Dial(ctx, path)
	if err != nil {
		return nil, err
	}
	defer c.Close()
	peer, err := peerCred(c.c)
	if err != nil {
		return nil, err
	}
	if peer.UID != 0 && int(peer.UID) != unix.Geteuid() {
		return nil, errs.E(errs.Permission, "", "", "the daemon belongs to another user")
	}
	c.SetDeadline(time.Now().Add(timeout))
	if err := c.Start(verbImage, []byte(id)); err != nil {
		return nil, err
	}
	_, files, err := c.Recv()
	if err != nil {
		return nil, err
	}
	if len(files) != 1 {
		closeAll(files)
		return nil, errs.E(errs.Corrupt, "", "", "the daemon's answer is malformed")
	}
	return files[0], nil
}
