package group

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"runtime"

	"github.com/cockroachdb/pebble/v2"
	"github.com/cockroachdb/pebble/v2/vfs"

	"github.com/unum-os/unum/internal/errs"
)

// Sizes of the databases: an idle node should stay under 50 MB in all, and both
// databases live in the Go heap.
const (
	cacheBytes    = 8 << 20  // bytes of blocks read, of both databases together
	memtableBytes = 16 << 20 // bytes of a memtable of each database, grown into; up to four may wait for their flush
	maxOpenFiles  = 256      // files that each database keeps open
)

// openDB opens or creates one database. fatal is told of errors after which the
// database can no longer be trusted.
func openDB(fsys vfs.FS, dir string, cache *pebble.Cache, log *slog.Logger, fatal func(error)) (*pebble.DB, *pebble.Options, error) {
	o := &pebble.Options{
		FS:                          fsys,
		Cache:                       cache,
		FormatMajorVersion:          pebble.FormatNewest,
		MemTableSize:                memtableBytes,
		MemTableStopWritesThreshold: 4,
		MaxOpenFiles:                maxOpenFiles,
		Logger:                      dbLogger{log, fatal},
		EventListener: &pebble.EventListener{
			// The engine would try its flush or compaction again at once, without end and
			// on a whole processor, while its log grows.
			BackgroundError: func(err error) { fatal(dbErr(err, "flush, compact or look after", dir)) },
			DataCorruption: func(i pebble.DataCorruptionInfo) {
				fatal(errs.E(errs.Corrupt, "read database", i.Path, "%v", i.Details))
			},
			WriteStallBegin: func(i pebble.WriteStallBeginInfo) { log.Warn("database writes stall", "reason", i.Reason) },
		},
	}
	o.EnsureDefaults()
	db, err := pebble.Open(dir, o)
	if err != nil {
		c := errs.Corrupt // what the engine itself cannot make sense of
		switch {
		case pebble.IsCorruptionError(err):
		case errs.ClassOf(err) == errs.LockHeld:
			c = errs.Busy
		case errs.ClassOf(err) != errs.Unknown && !errors.Is(err, fs.ErrNotExist):
			c = errs.ClassOf(err)
		}
		return nil, nil, &errs.Error{Op: "open database", Subject: dir, Class: c, Err: err}
	}
	return db, o, nil
}

// createDB makes an empty database, unless there is one, and gives it its name
// only when it is whole: a crash while the engine makes its first files may
// leave what it cannot open.
func createDB(fsys vfs.FS, dir string, cache *pebble.Cache, log *slog.Logger, fatal func(error)) error {
	if _, err := fsys.Stat(dir); !errors.Is(err, fs.ErrNotExist) {
		return errs.Wrap(err, "open", dir)
	}
	draft := dir + ".new"
	if err := fsys.RemoveAll(draft); err != nil {
		return errs.Wrap(err, "remove", draft)
	}
	db, _, err := openDB(fsys, draft, cache, log, fatal)
	if err != nil {
		return err
	}
	if err := db.Close(); err != nil {
		return dbErr(err, "create", draft)
	}
	if err := syncDir(fsys, draft); err != nil {
		return err
	}
	if err := fsys.Rename(draft, dir); err != nil {
		return errs.Wrap(err, "create", dir)
	}
	return syncDir(fsys, fsys.PathDir(dir))
}

// dbErr gives err of a database operation its class.
func dbErr(err error, op, subject string) error {
	if err == nil {
		return nil
	}
	c := errs.ClassOf(err)
	switch {
	case pebble.IsCorruptionError(err):
		c = errs.Corrupt
	case c == errs.Unknown:
		c = errs.IO
	}
	return &errs.Error{Op: op, Subject: subject, Class: c, Err: err}
}

// dbLogger keeps the engine quiet. Fatalf must not return: the engine goes on
// with half-made state if it does. It ends the calling goroutine, deferred
// calls included, and the host stops.
type dbLogger struct {
	log   *slog.Logger
	fatal func(error)
}

func (l dbLogger) Infof(f string, a ...any) { logf(l.log, slog.LevelDebug, f, a...) }

func (l dbLogger) Errorf(f string, a ...any) { logf(l.log, slog.LevelWarn, f, a...) }

func (l dbLogger) Fatalf(f string, a ...any) {
	err := fmt.Errorf(f, a...)
	for _, x := range a {
		if e, ok := x.(error); ok {
			err = e // it has the errno
		}
	}
	l.fatal(dbErr(err, "write", "database"))
	runtime.Goexit()
}

func logf(l *slog.Logger, level slog.Level, f string, a ...any) {
	if l.Enabled(context.Background(), level) {
		l.Log(context.Background(), level, fmt.Sprintf(f, a...))
	}
}

// raftLogger passes on raft's errors, and the rest for debugging; its panics are broken invariants, which
// the worker turns into the host's end.
type raftLogger struct{ log *slog.Logger }

func (l raftLogger) Debug(v ...any)            {}
func (l raftLogger) Debugf(f string, v ...any) {}
func (l raftLogger) Info(v ...any)             { l.Infof("%s", fmt.Sprint(v...)) }
func (l raftLogger) Infof(f string, v ...any)  { logf(l.log, slog.LevelDebug, f, v...) }
func (l raftLogger) Warning(v ...any)          { l.Warningf("%s", fmt.Sprint(v...)) }
func (l raftLogger) Warningf(f string, v ...any) {
	logf(l.log, slog.LevelDebug, f, v...) // elections and refused proposals: normal life
}
func (l raftLogger) Error(v ...any)            { l.Errorf("%s", fmt.Sprint(v...)) }
func (l raftLogger) Errorf(f string, v ...any) { logf(l.log, slog.LevelWarn, f, v...) }
func (l raftLogger) Fatal(v ...any)            { panic(fmt.Sprint(v...)) }
func (l raftLogger) Fatalf(f string, v ...any) { panic(fmt.Sprintf(f, v...)) }
func (l raftLogger) Panic(v ...any)            { panic(fmt.Sprint(v...)) }
func (l raftLogger) Panicf(f string, v ...any) { panic(fmt.Sprintf(f, v...)) }
