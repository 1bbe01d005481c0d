package clock

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/unum-os/unum/internal/errs"
)

// Shifted is the machine's clock with an offset on each of its two, which may be
// stepped while it is in use.
type Shifted struct {
	mu         sync.Mutex   // over Set
	wall, boot atomic.Int64 // nanoseconds
}

// Now implements Clock.
func (s *Shifted) Now() Instant { return Real.Now().Add(time.Duration(s.boot.Load())) }

// Wall implements Clock.
func (s *Shifted) Wall() time.Time { return Real.Wall().Add(time.Duration(s.wall.Load())) }

// Set steps the clock: from now on it is off by wall and boot. boot may only
// grow, as while a machine sleeps; class Invalid otherwise, and nothing changes.
func (s *Shifted) Set(wall, boot time.Duration) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if was := time.Duration(s.boot.Load()); boot < was {
		return errs.E(errs.Invalid, "set clock", "", "the boot-time clock cannot go back from %v to %v", was, boot)
	}
	s.boot.Store(int64(boot))
	s.wall.Store(int64(wall))
	return nil
}

// maxShift bounds an offset: a thousand years would leave what dates can hold.
const maxShift = 100 * 365 * 24 * time.Hour

// ParseShift reads offsets as Follow finds them: "wall=+1h boot=+0s", either of
// which may be missing and is 0 then. Class Invalid.
func ParseShift(text string) (wall, boot time.Duration, err error) {
	for _, f := range strings.Fields(text) {
		name, val, _ := strings.Cut(f, "=")
		d, err := time.ParseDuration(val)
		switch {
		case err != nil || d < -maxShift || d > maxShift:
			return 0, 0, errs.E(errs.Invalid, "read clock", f, "want a duration, like +1h30m or -5s, of at most %v", maxShift)
		case name == "wall":
			wall = d
		case name == "boot" && d >= 0:
			boot = d
		default:
			return 0, 0, errs.E(errs.Invalid, "read clock", f, "want wall=DURATION or boot=DURATION, the latter not negative")
		}
	}
	return wall, boot, nil
}

// maxClockFile bounds the file, in bytes.
const maxClockFile = 4096

// Load sets the clock as the file says.
func (s *Shifted) Load(path string) error {
	text, err := readClock(path)
	if err != nil {
		return err
	}
	return s.load(path, text)
}

func (s *Shifted) load(path, text string) error {
	wall, boot, err := ParseShift(text)
	if err == nil {
		err = s.Set(wall, boot)
	}
	return errs.Wrap(err, "follow", path)
}

func readClock(path string) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", errs.Wrap(err, "follow", path)
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxClockFile))
	return string(b), errs.Wrap(err, "follow", path)
}

// Follow sets the clock as the file says, now and whenever what it says changes,
// until ctx ends. What cannot be read or means nothing is logged once and leaves
// the clock as it is. The file, which may come and go in a directory that stays,
// should be replaced by renaming. Class IO if the directory cannot be watched.
func (s *Shifted) Follow(ctx context.Context, path string, log *slog.Logger) error {
	// The kernel tells of changes: a clock that is looked at would be a good part
	// of what an idle daemon costs.
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		return errs.Wrap(err, "follow", path)
	}
	events := os.NewFile(uintptr(fd), "inotify")
	defer events.Close()
	if _, err := unix.InotifyAddWatch(fd, filepath.Dir(path), unix.IN_CLOSE_WRITE|unix.IN_MOVED_TO|unix.IN_MOVED_FROM|unix.IN_DELETE); err != nil {
		return errs.Wrap(err, "follow", path)
	}
	defer context.AfterFunc(ctx, func() { events.SetReadDeadline(time.Unix(1, 0)) })()
	buf := make([]byte, 16<<10) // more than the longest name takes
	said, first := "", true
	for {
		text, err := readClock(path)
		key := text
		if err != nil {
			key = fmt.Sprint("\x00", err)
		}
		if first || key != said {
			said, first = key, false
			if err == nil {
				err = s.load(path, text)
			}
			switch {
			case errors.Is(err, fs.ErrNotExist): // not yet, or no more
			case err != nil:
				log.Warn("clock not set", "err", err)
			default:
				log.Info("clock set", "wall", time.Duration(s.wall.Load()), "boot", time.Duration(s.boot.Load()))
			}
		}
		if _, err := events.Read(buf); err != nil {
			if ctx.Err() != nil {
				return nil
			}
			return errs.Wrap(err, "follow", path)
		}
	}
}

// Manual is a clock that stands still unless it is moved, for tests.
type Manual struct {
	mu   sync.Mutex
	now  Instant
	wall time.Time
}

// NewManual returns a clock that shows wall, and as boot time one hour.
func NewManual(wall time.Time) *Manual {
	return &Manual{now: Instant(time.Hour), wall: wall.Round(0)}
}

// Now implements Clock.
func (m *Manual) Now() Instant {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.now
}

// Wall implements Clock.
func (m *Manual) Wall() time.Time {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.wall
}

// Advance lets d pass on both.
func (m *Manual) Advance(d time.Duration) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.now, m.wall = m.now.Add(d), m.wall.Add(d)
}

// SetWall sets the time of day.
func (m *Manual) SetWall(t time.Time) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.wall = t.Round(0)
}
