// Package errs is the one error type of Unum: what failed, on what, why, and
// what to do next. A class decides which errno a program sees; the text is for
// people. Classes cross the wire, texts do too, Go types do not.
package errs

import (
	"errors"
	"fmt"
	"syscall"
)

// Class says what kind of failure an error is. Choose by class, never by text.
type Class uint8

// The classes. Append only: the numbers are on the wire.
const (
	Unknown       Class = iota
	NotFound            // the name or thing does not exist
	Exists              // it exists already
	NotDir              // a directory was needed
	IsDir               // a directory was not
	NotEmpty            // the directory has entries
	Permission          // not allowed to this user
	Invalid             // malformed or senseless argument
	TooLong             // a name or a path is too long
	Loop                // too many symbolic links, or a directory into itself
	CrossVolume         // the two ends lie in different volumes
	NoSpace             // a disk is full
	Stale               // the session, term, or incarnation is over
	NoQuorum            // too few replicas answer
	NotLeader           // ask the group's leader
	Unavailable         // the peer is dead, silent, or not ready
	Timeout             // no answer in time
	Corrupt             // a checksum or a format does not hold
	Busy                // in use, or would block
	NotSupported        // not offered here
	NoData              // no such attribute
	IO                  // the operation cannot be completed; data may be lost
	Interrupted         // the caller gave up
	NotExecutable       // the command cannot be executed
	LockHeld            // a file lock is held by another
	TooLarge            // a value or file exceeds a limit
	Unauthorized        // a credential is wrong, expired, or missing
	Range               // the buffer is too small
	NameTooOld          // what a request presumed is no longer so: resolve again
	numClasses
)

// The status codes of gRPC that classes map to. The numbers are gRPC's own;
// they stand here because the light binary must not import it.
const (
	codeCanceled           = 1
	codeUnknown            = 2
	codeInvalidArgument    = 3
	codeDeadlineExceeded   = 4
	codeNotFound           = 5
	codeAlreadyExists      = 6
	codePermissionDenied   = 7
	codeResourceExhausted  = 8
	codeFailedPrecondition = 9
	codeAborted            = 10
	codeOutOfRange         = 11
	codeUnimplemented      = 12
	codeUnavailable        = 14
	codeDataLoss           = 15
	codeUnauthenticated    = 16
)

var table = [numClasses]struct {
	name  string
	errno syscall.Errno
	code  uint32
}{
	Unknown:       {"unknown", syscall.EIO, codeUnknown},
	NotFound:      {"not found", syscall.ENOENT, codeNotFound},
	Exists:        {"exists", syscall.EEXIST, codeAlreadyExists},
	NotDir:        {"not a directory", syscall.ENOTDIR, codeFailedPrecondition},
	IsDir:         {"is a directory", syscall.EISDIR, codeFailedPrecondition},
	NotEmpty:      {"directory not empty", syscall.ENOTEMPTY, codeFailedPrecondition},
	Permission:    {"not permitted", syscall.EPERM, codePermissionDenied},
	Invalid:       {"invalid", syscall.EINVAL, codeInvalidArgument},
	TooLong:       {"name too long", syscall.ENAMETOOLONG, codeInvalidArgument},
	Loop:          {"loop", syscall.ELOOP, codeFailedPrecondition},
	CrossVolume:   {"crosses volumes", syscall.EXDEV, codeFailedPrecondition},
	NoSpace:       {"no space", syscall.ENOSPC, codeResourceExhausted},
	Stale:         {"stale", syscall.ESTALE, codeAborted},
	NoQuorum:      {"no quorum", syscall.EIO, codeUnavailable},
	NotLeader:     {"not the leader", syscall.EIO, codeUnavailable},
	Unavailable:   {"unavailable", syscall.EIO, codeUnavailable},
	Timeout:       {"timed out", syscall.EIO, codeDeadlineExceeded},
	Corrupt:       {"corrupt", syscall.EIO, codeDataLoss},
	Busy:          {"busy", syscall.EBUSY, codeResourceExhausted},
	NotSupported:  {"not supported", syscall.EOPNOTSUPP, codeUnimplemented},
	NoData:        {"no such attribute", syscall.ENODATA, codeNotFound},
	IO:            {"input/output error", syscall.EIO, codeDataLoss},
	Interrupted:   {"interrupted", syscall.EINTR, codeCanceled},
	NotExecutable: {"not executable", syscall.EACCES, codeFailedPrecondition},
	LockHeld:      {"locked by another", syscall.EAGAIN, codeAborted},
	TooLarge:      {"too large", syscall.EFBIG, codeOutOfRange},
	Unauthorized:  {"not authorized", syscall.EACCES, codeUnauthenticated},
	Range:         {"buffer too small", syscall.ERANGE, codeOutOfRange},
	NameTooOld:    {"presumption out of date", syscall.EAGAIN, codeAborted},
}

// String returns the class's words.
func (c Class) String() string {
	if c >= numClasses {
		return fmt.Sprintf("class %d", uint8(c))
	}
	return table[c].name
}

// Errno returns the errno a program sees for the class.
func (c Class) Errno() syscall.Errno {
	if c >= numClasses {
		return syscall.EIO
	}
	return table[c].errno
}

// Code returns the status code of gRPC that stands for the class. Several classes
// share one: whoever has the class goes by that.
func (c Class) Code() uint32 {
	if c >= numClasses {
		return codeUnknown
	}
	return table[c].code
}

// Error is the error type: Op failed on Subject because of Err; Remedy, if any,
// says what to type next.
type Error struct {
	Op      string
	Subject string
	Class   Class
	Err     error
	Remedy  string
}

// E makes an error of class c; format and args say why.
func E(c Class, op, subject, format string, args ...any) *Error {
	return &Error{Op: op, Subject: subject, Class: c, Err: fmt.Errorf(format, args...)}
}

// Wrap adds what was being done to err and keeps its class. Nil stays nil.
func Wrap(err error, op, subject string) error {
	if err == nil {
		return nil
	}
	return &Error{Op: op, Subject: subject, Class: ClassOf(err), Err: err}
}

// WithRemedy returns e with the remedy set.
func (e *Error) WithRemedy(format string, args ...any) *Error {
	e.Remedy = fmt.Sprintf(format, args...)
	return e
}

// Error prints "op subject: why", and the remedy on a line of its own.
func (e *Error) Error() string {
	s := e.Op
	if e.Subject != "" {
		if s != "" {
			s += " "
		}
		s += e.Subject
	}
	if e.Err != nil {
		if s != "" {
			s += ": "
		}
		s += e.Err.Error()
	} else if s == "" {
		s = e.Class.String()
	} else {
		s += ": " + e.Class.String()
	}
	if e.Remedy != "" {
		s += "\ntry: " + e.Remedy
	}
	return s
}

// Unwrap returns the cause.
func (e *Error) Unwrap() error { return e.Err }

// Is makes errors.Is(err, errs.Class) work through Class's own error value.
func (e *Error) Is(target error) bool {
	c, ok := target.(classError)
	return ok && Class(c) == e.Class
}

type classError Class

func (c classError) Error() string { return Class(c).String() }

// Err returns an error value that stands for the class with nothing said.
func (c Class) Err() error { return classError(c) }

// ClassOf returns the class of the outermost classified error in err's chain:
// an *Error, a bare class, an errno, or Unknown. Nil has no class: Unknown.
func ClassOf(err error) Class {
	for e := err; e != nil; e = errors.Unwrap(e) {
		switch v := e.(type) {
		case *Error:
			if v.Class != Unknown {
				return v.Class
			}
		case classError:
			return Class(v)
		case syscall.Errno:
			return FromErrno(v)
		case interface{ Unwrap() []error }:
			for _, x := range v.Unwrap() {
				if c := ClassOf(x); c != Unknown {
					return c
				}
			}
		}
	}
	return Unknown
}

// Has reports whether err is of class c.
func Has(err error, c Class) bool { return err != nil && ClassOf(err) == c }

// Errno returns the errno a program sees for err; 0 for nil.
func Errno(err error) syscall.Errno {
	if err == nil {
		return 0
	}
	var en syscall.Errno
	if c := ClassOf(err); c != Unknown {
		return c.Errno()
	}
	if errors.As(err, &en) {
		return en
	}
	return syscall.EIO
}

// FromErrno returns the class that stands for en.
func FromErrno(en syscall.Errno) Class {
	switch en {
	case syscall.EACCES:
		return Permission
	case syscall.ETIMEDOUT:
		return Timeout
	case syscall.ECONNREFUSED, syscall.EHOSTUNREACH, syscall.ENETUNREACH, syscall.ECONNRESET, syscall.EPIPE:
		return Unavailable
	case syscall.EIO:
		return IO
	}
	for c := Class(1); c < numClasses; c++ {
		if table[c].errno == en {
			return c
		}
	}
	return Unknown
}
