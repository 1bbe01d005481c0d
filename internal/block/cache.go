package block

import (
	"container/list"
	"sync"

	"github.com/unum-os/unum/internal/volume"
)

// cache holds verified blocks, the least recently used go first. Its slices are
// never changed.
type cache struct {
	max int64

	mu     sync.Mutex
	size   int64
	byName map[volume.BlockName]*list.Element
	recent list.List // of *cached, the latest first
}

type cached struct {
	name volume.BlockName
	data []byte
}

// cachedCost is what an entry costs beside its bytes, roughly.
const cachedCost = 200

func (c *cache) init(max int64) {
	c.max = max
	c.byName = map[volume.BlockName]*list.Element{}
}

func (c *cache) get(name volume.BlockName) ([]byte, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	e := c.byName[name]
	if e == nil {
		return nil, false
	}
	c.recent.MoveToFront(e)
	return e.Value.(*cached).data, true
}

func (c *cache) put(name volume.BlockName, data []byte) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.byName[name] != nil {
		return
	}
	c.byName[name] = c.recent.PushFront(&cached{name, data})
	c.size += int64(cap(data)) + cachedCost
	for c.size > c.max && c.recent.Len() > 0 {
		e := c.recent.Back()
		old := c.recent.Remove(e).(*cached)
		delete(c.byName, old.name)
		c.size -= int64(cap(old.data)) + cachedCost
	}
}
