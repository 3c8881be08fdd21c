package holdfast

import (
	"errors"
	"fmt"
	"testing"
)

// A remedy is said once, and stands beside the message, however it was wrapped.
func TestRemedyOfWhatIsWrapped(t *testing.T) {
	const remedy = "use freeze, or error: and a time (as in error:30s)"
	inner := func() error { return Errorf(ErrInvalid, "unknown policy %q", "x").WithRemedy(remedy) }
	for _, c := range []struct {
		what            string
		err             error
		message, remedy string
	}{
		{"as it is", inner(), `unknown policy "x"`, remedy},
		{"without one", Errorf(ErrIO, "read: %w", errors.New("gone (for good)")), "read: gone (for good)", ""},
		{"wrapped by Errorf", Errorf(ErrInvalid, "option a: %w", inner()), `option a: unknown policy "x"`, remedy},
		{"wrapped twice", Errorf(ErrInvalid, "volume v: %w", Errorf(ErrInvalid, "option a: %w", inner())), `volume v: option a: unknown policy "x"`, remedy},
		{"wrapped by fmt", fmt.Errorf("volume v: %w", inner()), `volume v: unknown policy "x"`, remedy},
		{"wrapped by fmt, then by Errorf", Errorf(ErrInvalid, "node n: %w", fmt.Errorf("volume v: %w", inner())), `node n: volume v: unknown policy "x"`, remedy},
		{"in the middle", Errorf(ErrInvalid, "before %w, after", inner()), `before unknown policy "x", after`, remedy},
		{"joined", errors.Join(inner(), errors.New("more")), "unknown policy \"x\"\nmore", remedy},
		{"with another remedy", Errorf(ErrInvalid, "option a: %w", inner()).WithRemedy("ask"), `option a: unknown policy "x"`, "ask"},
		{"no Error at all", errors.New("plain (text)"), "plain (text)", ""},
	} {
		if got := MessageOf(c.err); got != c.message {
			t.Errorf("%s: the message is %q, want %q", c.what, got, c.message)
		}
		if got := RemedyOf(c.err); got != c.remedy {
			t.Errorf("%s: the remedy is %q, want %q", c.what, got, c.remedy)
		}
	}
	if got, want := Errorf(ErrInvalid, "option a: %w", inner()).Error(), `option a: unknown policy "x" (`+remedy+`)`; got != want {
		t.Errorf("the text is %q, want %q", got, want)
	}
	if err := Errorf(ErrIO, "write: %w", inner()); !errors.Is(err, ErrIO) || !errors.Is(err, ErrInvalid) {
		t.Errorf("%v is not of its own kind and its cause's", err)
	}
}
