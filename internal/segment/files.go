package segment

import (
	"container/list"
	"sync"

	"github.com/unum-os/unum/internal/disk"
)

// files holds the open segment files: the active one, and at most max sealed
// ones that were read lately. Files in use may exceed that for a moment. Errors
// of closing mean nothing here: what was acknowledged is synced.
type files struct {
	open func(segment uint32) (disk.File, error)
	max  int

	mu     sync.Mutex
	byNum  map[uint32]*handle
	recent list.List // of *handle, the latest first; pinned ones are not in it
}

type handle struct {
	num  uint32
	file disk.File
	refs int
	at   *list.Element // nil: pinned, or dropped while in use
	gone bool          // close when refs is 0
}

func newFiles(max int, open func(uint32) (disk.File, error)) *files {
	return &files{open: open, max: max, byNum: map[uint32]*handle{}}
}

// pin gives files an open file that stays open until unpin.
func (c *files) pin(num uint32, f disk.File) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.byNum[num] = &handle{num: num, file: f}
}

// unpin makes a pinned file an ordinary one.
func (c *files) unpin(num uint32) {
	c.mu.Lock()
	defer c.mu.Unlock()
	h := c.byNum[num]
	h.at = c.recent.PushFront(h)
	c.trim()
}

// get returns the file of a segment, in use until put.
func (c *files) get(num uint32) (*handle, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	h := c.byNum[num]
	if h == nil {
		f, err := c.open(num)
		if err != nil {
			return nil, err
		}
		h = &handle{num: num, file: f, refs: 1}
		c.byNum[num] = h
		h.at = c.recent.PushFront(h)
		c.trim()
		return h, nil
	}
	h.refs++
	if h.at != nil {
		c.recent.MoveToFront(h.at)
	}
	return h, nil
}

func (c *files) put(h *handle) {
	c.mu.Lock()
	defer c.mu.Unlock()
	h.refs--
	if h.gone && h.refs == 0 {
		h.file.Close()
	}
}

// trim drops the oldest beyond max. mu is held.
func (c *files) trim() {
	for c.recent.Len() > c.max {
		c.drop(c.recent.Back().Value.(*handle))
	}
}

// drop forgets h and closes it now or after its last use. mu is held.
func (c *files) drop(h *handle) {
	if h.at != nil {
		c.recent.Remove(h.at)
		h.at = nil
	}
	delete(c.byNum, h.num)
	h.gone = true
	if h.refs == 0 {
		h.file.Close()
	}
}

func (c *files) close() {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, h := range c.byNum {
		c.drop(h)
	}
}
