package blockdev

import (
	"context"
	"errors"
	"fmt"
	"syscall"
	"testing"

	"github.com/holdfast-storage/holdfast"
)

func TestErrno(t *testing.T) {
	for _, c := range []struct {
		err  error
		want syscall.Errno
	}{
		{nil, 0},
		{holdfast.ErrInvalid, syscall.EINVAL},
		{holdfast.Errorf(holdfast.ErrInvalid, "x"), syscall.EINVAL},
		{fmt.Errorf("write block 3: %w", holdfast.Errorf(holdfast.ErrNoSpace, "disk full")), syscall.ENOSPC},
		{holdfast.ErrFenced, syscall.ESHUTDOWN},
		{holdfast.ErrNotFound, syscall.ESHUTDOWN},
		{holdfast.ErrRefused, syscall.EPERM},
		{holdfast.ErrUnsupported, syscall.ENOTSUP},
		{holdfast.ErrIO, syscall.EIO},
		{holdfast.ErrIntegrity, syscall.EIO},
		{holdfast.ErrUnavailable, syscall.EIO},
		{holdfast.ErrTimeout, syscall.EIO},
		{holdfast.ErrInternal, syscall.EIO},
		{context.Canceled, syscall.ESHUTDOWN},
		{context.DeadlineExceeded, syscall.EIO},
		{errors.New("something"), syscall.EIO},
		{fmt.Errorf("pwrite: %w", syscall.ENOSPC), syscall.ENOSPC},
		// The kind that a layer chose wins over the errno below it.
		{holdfast.Errorf(holdfast.ErrIO, "pwrite: %w", syscall.ENOMEM), syscall.EIO},
	} {
		if got := Errno(c.err); got != c.want {
			t.Errorf("Errno(%v) = %v, want %v", c.err, got, c.want)
		}
	}
}
