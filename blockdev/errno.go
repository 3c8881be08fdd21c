package blockdev

import (
	"context"
	"errors"
	"syscall"

	"github.com/holdfast-storage/holdfast"
)

// Errno returns the errno that tells a block client, over NBD or FUSE, what
// became of its request; 0 for nil. The kinds are those that a Device may
// return. What a client could retry elsewhere or later is told apart from what
// it got wrong: a fenced, removed or closing device is ESHUTDOWN, a device that
// cannot serve now or lost data is EIO.
func Errno(err error) syscall.Errno {
	if err == nil {
		return 0
	}
	var e *holdfast.Error
	var kind holdfast.Kind
	var errno syscall.Errno
	switch {
	case errors.As(err, &e):
		kind = e.Kind
	case errors.As(err, &kind):
	case errors.Is(err, context.Canceled):
		return syscall.ESHUTDOWN
	case errors.As(err, &errno) && errno != 0:
		return errno
	}
	switch kind {
	case holdfast.ErrInvalid:
		return syscall.EINVAL
	case holdfast.ErrNoSpace:
		return syscall.ENOSPC
	case holdfast.ErrFenced, holdfast.ErrNotFound:
		return syscall.ESHUTDOWN
	case holdfast.ErrRefused:
		return syscall.EPERM
	case holdfast.ErrUnsupported:
		return syscall.ENOTSUP
	default: // io, integrity, unavailable, timeout, internal
		return syscall.EIO
	}
}
