package mount

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/holdfast-storage/holdfast"
)

// blankProbe is how much of either end of a device is read to call it blank.
// Every file system, partition table and database that we know of writes there.
const blankProbe = 4 << 20

// Tools are the programs this package needs, run by Run (nil means Exec).
type Tools struct{ Run Run }

func (t Tools) run(ctx context.Context, name string, args ...string) (Result, error) {
	if t.Run == nil {
		return Exec(ctx, name, args...)
	}
	return t.Run(ctx, name, args...)
}

// Signature is Tools.Signature with plain tools: what a disk or an image file
// is seen to hold, "" if nothing is known there.
func Signature(ctx context.Context, path string) (what string, err error) {
	return Tools{}.Signature(ctx, path)
}

// Signature says what the device or file at path is seen to hold: a file
// system, a partition table, a member of a RAID or of a volume group; "" if
// neither blkid nor wipefs knows anything there. It writes nothing.
func (t Tools) Signature(ctx context.Context, path string) (what string, err error) {
	if path == "" || path[0] != '/' {
		return "", holdfast.Errorf(holdfast.ErrInvalid, "%q is not an absolute path", path)
	}
	// blkid answers "nothing" to what it cannot read, so read it first.
	if err := readable(path); err != nil {
		return "", err
	}
	r, err := t.run(ctx, "blkid", "-p", "-o", "export", path)
	if err != nil {
		return "", err
	}
	switch r.Code {
	case 0:
		if what := describeBlkid(r.Stdout); what != "" {
			return what, nil
		}
	case 2: // nothing found
	case 8:
		return "several file systems or partition tables at once", nil
	default:
		return "", holdfast.Errorf(holdfast.ErrInternal, "blkid %s: exit %d: %s", path, r.Code, r.said())
	}
	if r, err = t.run(ctx, "wipefs", "-n", "-J", path); err != nil {
		return "", err
	}
	if r.Code != 0 {
		return "", holdfast.Errorf(holdfast.ErrInternal, "wipefs -n %s: exit %d: %s", path, r.Code, r.said())
	}
	return describeWipefs(r.Stdout)
}

// readable reads the first and the last bytes of a device or file.
func readable(path string) error {
	f, size, err := openSized(path)
	if err != nil {
		return err
	}
	defer f.Close()
	b := make([]byte, min(size, 4096))
	for _, off := range []int64{0, size - int64(len(b))} {
		if _, err := f.ReadAt(b, off); err != nil && !errors.Is(err, io.EOF) {
			return holdfast.Errorf(holdfast.ErrIO, "read %s: %w", path, err)
		}
	}
	return nil
}

func openSized(path string) (*os.File, int64, error) {
	f, err := os.Open(path)
	if err != nil {
		kind := holdfast.ErrIO
		if errors.Is(err, os.ErrNotExist) {
			kind = holdfast.ErrNotFound
		}
		return nil, 0, holdfast.Errorf(kind, "open %s: %w", path, err)
	}
	size, err := f.Seek(0, io.SeekEnd)
	if err != nil {
		f.Close()
		return nil, 0, holdfast.Errorf(holdfast.ErrIO, "size of %s: %w", path, err)
	}
	return f, size, nil
}

// describeBlkid reads `blkid -p -o export`: lines of KEY=VALUE.
func describeBlkid(out string) string {
	kv := make(map[string]string)
	for line := range strings.Lines(out) {
		if k, v, ok := strings.Cut(strings.TrimSpace(line), "="); ok {
			kv[k] = v
		}
	}
	label := ""
	if kv["LABEL"] != "" {
		label = fmt.Sprintf(" labelled %q", kv["LABEL"])
	}
	switch {
	case kv["TYPE"] != "" && kv["USAGE"] == "filesystem":
		return fmt.Sprintf("a file system of type %s%s", kv["TYPE"], label)
	case kv["TYPE"] != "":
		return fmt.Sprintf("%s%s", kv["TYPE"], label)
	case kv["PTTYPE"] != "":
		return fmt.Sprintf("a partition table of type %s", kv["PTTYPE"])
	}
	return ""
}

// describeWipefs reads `wipefs -n -J`, which prints nothing for nothing.
func describeWipefs(out string) (string, error) {
	if strings.TrimSpace(out) == "" {
		return "", nil
	}
	var list struct {
		Signatures []struct {
			Type   string `json:"type"`
			Offset string `json:"offset"`
		} `json:"signatures"`
	}
	if err := json.Unmarshal([]byte(out), &list); err != nil {
		return "", holdfast.Errorf(holdfast.ErrInternal, "wipefs printed no JSON: %w", err)
	}
	if len(list.Signatures) == 0 {
		return "", nil
	}
	s := list.Signatures[0]
	return fmt.Sprintf("a signature of %s at %s", s.Type, s.Offset), nil
}

// Blank says what speaks against path being blank: a signature, or bytes other
// than zero within 4 MiB of either end; "" if nothing does.
func (t Tools) Blank(ctx context.Context, path string) (what string, err error) {
	if what, err = t.Signature(ctx, path); what != "" || err != nil {
		return what, err
	}
	f, size, err := openSized(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	for _, from := range []int64{0, max(0, size-blankProbe)} {
		off, err := firstNonZero(f, from, min(from+blankProbe, size))
		if err != nil {
			return "", holdfast.Errorf(holdfast.ErrIO, "read %s: %w", path, err)
		}
		if off >= 0 {
			return fmt.Sprintf("data of an unknown kind at byte %d", off), nil
		}
	}
	return "", nil
}

// firstNonZero returns the offset of the first byte in [from, to) that is not
// zero, or -1.
func firstNonZero(r io.ReaderAt, from, to int64) (int64, error) {
	b := make([]byte, 256<<10)
	for off := from; off < to; {
		n, err := r.ReadAt(b[:min(int64(len(b)), to-off)], off)
		for i, c := range b[:n] {
			if c != 0 {
				return off + int64(i), nil
			}
		}
		off += int64(n)
		if errors.Is(err, io.EOF) {
			return -1, nil
		}
		if err != nil {
			return -1, err
		}
	}
	return -1, nil
}
