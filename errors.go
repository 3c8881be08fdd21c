package holdfast

import (
	"errors"
	"fmt"
	"strings"
)

// Kind classifies an error for callers; branch with errors.Is on these, never
// on text. One table (cmd/internal/api) maps kinds to gRPC codes, errno and
// exit codes.
type Kind string

// Error returns the kind's name, so that a Kind can be a target of errors.Is.
func (k Kind) Error() string { return string(k) }

// The kinds.
const (
	// ErrInternal is a defect or an unexpected failure of the system below.
	ErrInternal Kind = "internal"
	// ErrInvalid is input that can never be right: the caller must change it.
	ErrInvalid Kind = "invalid"
	// ErrUnsupported is an option or verb whose feature is not in this version.
	ErrUnsupported Kind = "unsupported"
	// ErrNotFound is a thing that does not exist.
	ErrNotFound Kind = "not_found"
	// ErrExists is a name that is taken.
	ErrExists Kind = "exists"
	// ErrRefused is a request that is refused to protect data: in use, last
	// copy, not blank, held by a live node.
	ErrRefused Kind = "refused"
	// ErrUnavailable is a request that cannot be served now and may be later:
	// no quorum, no in-sync replica, no leader.
	ErrUnavailable Kind = "unavailable"
	// ErrTimeout is a wait that reached its deadline.
	ErrTimeout Kind = "timeout"
	// ErrFenced is an attachment whose right to write was taken by a higher epoch.
	ErrFenced Kind = "fenced"
	// ErrNoSpace is a disk or pool that is full.
	ErrNoSpace Kind = "no_space"
	// ErrIO is a device that failed a read, a write or a sync.
	ErrIO Kind = "io"
	// ErrIntegrity is data that does not match its checksum, or metadata that
	// contradicts itself.
	ErrIntegrity Kind = "integrity"
)

// Error is an error for people: a kind, what was wrong with which value, and
// what to do about it.
type Error struct {
	Kind    Kind
	Message string
	Remedy  string // what to do; may be empty
	Cause   error  // may be nil
}

// Errorf makes an Error of a kind. %w in the format sets its cause, whose remedy is
// taken over: it stands beside the message, once.
func Errorf(kind Kind, format string, args ...any) *Error {
	err := fmt.Errorf(format, args...)
	cause := errors.Unwrap(err)
	return &Error{Kind: kind, Message: MessageOf(err), Remedy: RemedyOf(cause), Cause: cause}
}

// WithRemedy returns the error with a remedy set, in place of one that it took over.
func (e *Error) WithRemedy(format string, args ...any) *Error {
	e.Remedy = fmt.Sprintf(format, args...)
	return e
}

// Error returns the message, followed by the remedy in parentheses if there is one.
func (e *Error) Error() string {
	if e.Remedy == "" {
		return e.Message
	}
	return e.Message + " (" + e.Remedy + ")"
}

// Is matches the error's own kind.
func (e *Error) Is(target error) bool {
	k, ok := target.(Kind)
	return ok && k == e.Kind
}

// Unwrap returns the cause.
func (e *Error) Unwrap() error { return e.Cause }

// KindOf returns the kind of the outermost Error or Kind in err's chain,
// ErrInternal if there is none, and "" for nil.
func KindOf(err error) Kind {
	if err == nil {
		return ""
	}
	var e *Error
	if errors.As(err, &e) {
		return e.Kind
	}
	var k Kind
	if errors.As(err, &k) {
		return k
	}
	return ErrInternal
}

// RemedyOf returns the remedy of the outermost Error in err's chain, or "".
func RemedyOf(err error) string {
	var e *Error
	if errors.As(err, &e) {
		return e.Remedy
	}
	return ""
}

// MessageOf returns an error's text without what RemedyOf returns, for where the two
// travel or are shown apart.
func MessageOf(err error) string {
	var e *Error
	if !errors.As(err, &e) || e.Remedy == "" {
		return err.Error()
	}
	// What wraps e holds its text.
	before, after, found := strings.Cut(err.Error(), e.Error())
	if !found {
		return err.Error()
	}
	return before + e.Message + after
}
