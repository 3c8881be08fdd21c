package api

import (
	"context"
	"errors"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/holdfast-storage/holdfast"
	"github.com/holdfast-storage/holdfast/cmd/internal/api/apipb"
)

// Exit codes of the command line, a contract that scripts rely on.
const (
	ExitDone        = 0
	ExitFailed      = 1
	ExitUsage       = 2
	ExitNotFound    = 3
	ExitExists      = 4
	ExitRefused     = 5
	ExitUnavailable = 6
	ExitIntegrity   = 7
)

// meaning is one row of the table that gives an error kind its gRPC code and
// its exit code; its errno stands in blockdev.Errno.
type meaning struct {
	code codes.Code
	exit int
}

var meanings = map[holdfast.Kind]meaning{
	holdfast.ErrInternal:    {codes.Internal, ExitFailed},
	holdfast.ErrInvalid:     {codes.InvalidArgument, ExitUsage},
	holdfast.ErrUnsupported: {codes.Unimplemented, ExitUsage},
	holdfast.ErrNotFound:    {codes.NotFound, ExitNotFound},
	holdfast.ErrExists:      {codes.AlreadyExists, ExitExists},
	holdfast.ErrRefused:     {codes.FailedPrecondition, ExitRefused},
	holdfast.ErrUnavailable: {codes.Unavailable, ExitUnavailable},
	holdfast.ErrTimeout:     {codes.DeadlineExceeded, ExitUnavailable},
	holdfast.ErrFenced:      {codes.Aborted, ExitRefused},
	holdfast.ErrNoSpace:     {codes.ResourceExhausted, ExitRefused},
	holdfast.ErrIO:          {codes.Internal, ExitFailed},
	holdfast.ErrIntegrity:   {codes.DataLoss, ExitIntegrity},
}

// ExitCode returns the exit code of an error; nil is 0.
func ExitCode(err error) int {
	if err == nil {
		return ExitDone
	}
	return meanings[holdfast.KindOf(err)].exit
}

// ToStatus turns an error into what a gRPC handler returns: the code of its
// kind, with kind, message and remedy in the details.
func ToStatus(err error) error {
	if err == nil {
		return nil
	}
	if _, ok := status.FromError(err); ok {
		return err
	}
	if errors.Is(err, context.DeadlineExceeded) && holdfast.KindOf(err) == holdfast.ErrInternal {
		err = holdfast.Errorf(holdfast.ErrTimeout, "%w", err)
	}
	kind := holdfast.KindOf(err)
	st := status.New(meanings[kind].code, err.Error())
	detailed, detailErr := st.WithDetails(&apipb.ErrorDetail{Kind: string(kind), Message: holdfast.MessageOf(err), Remedy: holdfast.RemedyOf(err)})
	if detailErr != nil {
		return st.Err()
	}
	return detailed.Err()
}

// FromStatus is the inverse of ToStatus. What gRPC itself reports (no
// connection, deadline) becomes the kind of its code.
func FromStatus(err error) error {
	st, ok := status.FromError(err)
	if err == nil || !ok {
		return err
	}
	for _, d := range st.Details() {
		if d, ok := d.(*apipb.ErrorDetail); ok {
			if _, known := meanings[holdfast.Kind(d.Kind)]; known {
				return &holdfast.Error{Kind: holdfast.Kind(d.Kind), Message: d.Message, Remedy: d.Remedy}
			}
		}
	}
	kind := holdfast.ErrInternal
	switch st.Code() { //nolint:exhaustive // the rest is internal
	case codes.Unavailable, codes.Canceled:
		kind = holdfast.ErrUnavailable
	case codes.DeadlineExceeded:
		kind = holdfast.ErrTimeout
	case codes.Unimplemented:
		kind = holdfast.ErrUnsupported
	}
	return holdfast.Errorf(kind, "%s", st.Message())
}
