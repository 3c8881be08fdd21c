package state

import (
	"errors"

	"github.com/holdfast-storage/holdfast"
)

// EncodeResult writes a result for a forwarded command, at a cluster level.
func EncodeResult(r Result) ([]byte, error) {
	c := &coder{}
	r.code(c)
	if c.err != nil {
		return nil, holdfast.Errorf(holdfast.ErrInternal, "encode result: %w", c.err)
	}
	return c.buf, nil
}

// DecodeResult reads a result; damage is ErrIntegrity.
func DecodeResult(b []byte) (Result, error) {
	c := &coder{buf: b, decoding: true}
	var r Result
	r.code(c)
	if err := c.done(); err != nil {
		return Result{}, holdfast.Errorf(holdfast.ErrIntegrity, "decode result: %w", err)
	}
	return r, nil
}

func (r *Result) code(c *coder) {
	level := holdfast.Level1
	u32(c, &level)
	if level != holdfast.Level1 {
		c.fail(errors.New("it is of another cluster level"))
	}
	u64(c, &r.Index)
	c.bool(&r.Changed)
	u64(c, &r.Epoch)
	u64(c, &r.ISRVersion)
	has := r.Volume != nil
	c.bool(&has)
	if !has || c.err != nil {
		return
	}
	if c.decoding {
		r.Volume = &Volume{}
	}
	r.Volume.code(c)
}

// Failure is an error in the form in which it is forwarded between nodes.
type Failure struct {
	Kind    holdfast.Kind
	Reason  Reason // "" if none
	Message string
	Remedy  string
}

// FailureOf takes an error apart.
func FailureOf(err error) Failure {
	f := Failure{Kind: holdfast.KindOf(err), Message: holdfast.MessageOf(err), Remedy: holdfast.RemedyOf(err)}
	errors.As(err, &f.Reason)
	return f
}

// Err puts the error together again: kind, reason, message and remedy as they were.
func (f Failure) Err() error {
	e := &holdfast.Error{Kind: f.Kind, Message: f.Message, Remedy: f.Remedy}
	if f.Reason != "" {
		e.Cause = f.Reason
	}
	return e
}
