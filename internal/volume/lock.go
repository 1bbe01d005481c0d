package volume

import (
	"cmp"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/unum-os/unum/internal/errs"
	"github.com/unum-os/unum/internal/ids"
)

// LockEnd is the End of a lock that reaches to the end of the file, however far
// that moves.
const LockEnd = 1<<63 - 1

// MaxLocks bounds the locks of one inode: they are one record.
const MaxLocks = 4096

// sameOwner reports whether a and b never conflict.
func sameOwner(a, b *Lock) bool {
	return a.Kind == b.Kind && a.Session == b.Session && a.Owner == b.Owner
}

func overlap(a, b *Lock) bool { return a.Start <= b.End && b.Start <= a.End }

// conflict returns the first of locks that is in want's way.
func conflict(locks []Lock, want *Lock) *Lock {
	for i := range locks {
		l := &locks[i]
		if l.Kind == want.Kind && !sameOwner(l, want) && overlap(l, want) &&
			(l.Type == unix.F_WRLCK || want.Type == unix.F_WRLCK) {
			return l
		}
	}
	return nil
}

// relock returns locks after want's owner has changed its range to want's type,
// sorted. Ranges of one owner and type that touch become one.
func relock(locks []Lock, want Lock) []Lock {
	out := make([]Lock, 0, len(locks)+2)
	for _, l := range locks {
		switch {
		case !sameOwner(&l, &want):
			out = append(out, l)
		case l.Type == want.Type && l.Start <= want.End+1 && want.Start <= l.End+1:
			want.Start, want.End = min(want.Start, l.Start), max(want.End, l.End)
		case !overlap(&l, &want):
			out = append(out, l)
		default:
			if l.Start < want.Start {
				left := l
				left.End = want.Start - 1
				out = append(out, left)
			}
			if l.End > want.End {
				right := l
				right.Start = want.End + 1
				out = append(out, right)
			}
		}
	}
	if want.Type != unix.F_UNLCK {
		out = append(out, want)
	}
	slices.SortFunc(out, func(a, b Lock) int {
		return cmp.Or(cmp.Compare(a.Kind, b.Kind), cmp.Compare(a.Session, b.Session),
			cmp.Compare(a.Owner, b.Owner), cmp.Compare(a.Start, b.Start))
	})
	return out
}

// checkLock judges a lock's form and gives an flock its range.
func checkLock(l *Lock) refusal {
	switch {
	case l == nil:
		return no(errs.Invalid, "no lock given")
	case l.Kind != LockPosix && l.Kind != LockFlock:
		return no(errs.Invalid, "lock of kind %d", l.Kind)
	case l.Type != unix.F_RDLCK && l.Type != unix.F_WRLCK && l.Type != unix.F_UNLCK:
		return no(errs.Invalid, "lock of type %d", l.Type)
	}
	if l.Kind == LockFlock {
		l.Start, l.End = 0, LockEnd
	}
	if l.Start > l.End || l.End > LockEnd {
		return no(errs.Invalid, "lock from %d to %d", l.Start, l.End)
	}
	return done
}

func (s *store) locks(ino ids.Inode) []Lock {
	var locks []Lock
	s.load(s.key(tagLocks, uint64(ino)), &locks)
	return locks
}

// saveLocks replaces the locks of ino, and keeps the way to them from their
// sessions.
func (t *txn) saveLocks(ino ids.Inode, locks []Lock) {
	var held ids.Session
	for _, l := range t.locks(ino) {
		if l.Session != held {
			held = l.Session
			t.delete(t.key(tagLocked, uint64(held), uint64(ino)))
		}
	}
	key := t.key(tagLocks, uint64(ino))
	if len(locks) == 0 {
		if held != 0 {
			t.delete(key)
		}
		return
	}
	t.save(key, locks)
	held = 0
	for _, l := range locks {
		if l.Session != held {
			held = l.Session
			t.set(t.key(tagLocked, uint64(held), uint64(ino)), nil)
		}
	}
}

func (t *txn) setLock(op *Op) refusal {
	if r := checkLock(op.Lock); r.refused() {
		return r
	}
	want := *op.Lock
	want.Session = t.session
	locks := t.locks(op.Ino)
	if want.Type != unix.F_UNLCK {
		if t.node(op.Ino) == nil {
			return no(errs.NotFound, "inode %d is gone", op.Ino)
		}
		if l := conflict(locks, &want); l != nil {
			r := no(errs.LockHeld, "session %d holds it", l.Session)
			held := *l
			r.lock = &held
			return r
		}
	}
	now := relock(locks, want)
	if len(now) > MaxLocks && want.Type != unix.F_UNLCK {
		return no(errs.TooLarge, "inode %d has %d locks already", op.Ino, len(locks))
	}
	if !slices.Equal(locks, now) {
		t.saveLocks(op.Ino, now)
	}
	return done
}

// dropLocks takes all locks of a session from ino.
func (t *txn) dropLocks(ino ids.Inode, id ids.Session) {
	locks := t.locks(ino)
	left := slices.DeleteFunc(slices.Clone(locks), func(l Lock) bool { return l.Session == id })
	t.saveLocks(ino, left)
}
