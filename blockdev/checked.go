package blockdev

import "context"

// Checked returns a Device that refuses every request that leaves [0, Size())
// with ErrInvalid before dev sees it, and answers requests of zero length
// itself. Implementations wrap themselves in it so that the check is written,
// and tested, once.
func Checked(dev Device) Device {
	if c, ok := dev.(checked); ok {
		return c
	}
	return checked{dev}
}

type checked struct{ Device }

func (c checked) ReadAt(ctx context.Context, p []byte, off int64) error {
	if done, err := c.check(off, int64(len(p))); done {
		return err
	}
	return c.Device.ReadAt(ctx, p, off)
}

func (c checked) WriteAt(ctx context.Context, p []byte, off int64, fua bool) error {
	if done, err := c.check(off, int64(len(p))); done {
		return err
	}
	return c.Device.WriteAt(ctx, p, off, fua)
}

func (c checked) Trim(ctx context.Context, off, n int64, fua bool) error {
	if done, err := c.check(off, n); done {
		return err
	}
	return c.Device.Trim(ctx, off, n, fua)
}

func (c checked) WriteZeroes(ctx context.Context, off, n int64, noHole, fua bool) error {
	if done, err := c.check(off, n); done {
		return err
	}
	return c.Device.WriteZeroes(ctx, off, n, noHole, fua)
}

// check reports whether the request is answered already, and how.
func (c checked) check(off, n int64) (done bool, err error) {
	if err := (Range{Off: off, Len: n}).Check(c.Size()); err != nil {
		return true, err
	}
	return n == 0, nil
}
