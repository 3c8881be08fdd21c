package mount

import (
	"context"
	"strings"

	"github.com/holdfast-storage/holdfast"
)

// FormatOptions of Tools.Format.
type FormatOptions struct {
	// FS is the kind of file system.
	FS FileSystem `json:"fs"`
	// Options are the user's further options of mkfs, as ParseMkfs takes them.
	Options string `json:"options,omitempty"`
	// Again says that an earlier mkfs of this volume was recorded as begun and
	// never as done, so that nothing was ever mounted: what lies there is its
	// remains, and the check for blankness is left out.
	Again bool `json:"again,omitempty"`
}

// Format makes a file system on a blank device. A device that holds anything is
// an ErrRefused that says what. When it returns nil the file system is written
// and flushed.
func (t Tools) Format(ctx context.Context, device string, opts FormatOptions) error {
	extra, err := ParseMkfs(opts.FS, opts.Options)
	if err != nil {
		return err
	}
	if !opts.Again {
		what, err := t.Blank(ctx, device)
		if err != nil {
			return err
		}
		if what != "" {
			return holdfast.Errorf(holdfast.ErrRefused, "%s is not blank: it holds %s", device, what).
				WithRemedy("a volume that was used raw is not formatted; make a new one")
		}
	}
	name, args := mkfsCommand(opts.FS, extra, device)
	r, err := t.run(ctx, name, args...)
	if err != nil {
		return err
	}
	if r.Code != 0 {
		// The options passed our own check, so most often the device is too
		// small for them, or it failed.
		return holdfast.Errorf(holdfast.ErrInvalid, "%s %s: exit %d: %s", name, device, r.Code, r.said())
	}
	return nil
}

// mkfsCommand is the whole command line: 4 KiB blocks and sectors, because that
// is what the volume replicates; no discard of a device that is blank; inode
// tables and journal left to be zeroed in the background.
func mkfsCommand(fs FileSystem, extra []string, device string) (string, []string) {
	if fs == XFS {
		args := []string{"-q", "-f", "-K", "-b", "size=4096", "-s", "size=4096"}
		return "mkfs.xfs", append(append(args, extra...), device)
	}
	// Of several -E mke2fs takes only the last: ours and the user's become one.
	extended := []string{"lazy_itable_init=1", "lazy_journal_init=1", "nodiscard"}
	args := []string{"-q", "-F", "-b", "4096"}
	for i := 0; i < len(extra); i += 2 { // every ext4 letter has a value
		if extra[i] == "-E" {
			extended = append(extended, extra[i+1])
			continue
		}
		args = append(args, extra[i], extra[i+1])
	}
	args = append(args, "-E", strings.Join(extended, ","))
	return "mkfs.ext4", append(args, device)
}

// Fsck makes a file system that is not mounted fit to be mounted, quickly.
// Replay of the journal after a crash is the kernel's business for xfs; for
// ext4, e2fsck -p replays it and repairs what is safe without asking.
// ErrIntegrity means that a person must look.
func (t Tools) Fsck(ctx context.Context, device string, fs FileSystem) error {
	if fs != Ext4 {
		return nil
	}
	r, err := t.run(ctx, "e2fsck", "-p", device)
	if err != nil {
		return err
	}
	const repaired, reboot = 1, 2 // bits of e2fsck's exit code that leave it mountable
	if r.Code&^(repaired|reboot) == 0 {
		return nil
	}
	if r.Code >= 8 { // operational error, usage, cancelled: nothing is known of the file system
		return holdfast.Errorf(holdfast.ErrIO, "e2fsck -p %s: exit %d: %s", device, r.Code, r.said())
	}
	return holdfast.Errorf(holdfast.ErrIntegrity, "e2fsck -p %s: exit %d: %s", device, r.Code, r.said()).
		WithRemedy("detach the volume from its node and run e2fsck by hand on its NBD export")
}

// Check reads a whole file system that is not mounted and whose journal is
// replayed (it was mounted since the last crash), and changes nothing. nil
// means clean, ErrIntegrity that it is not.
func (t Tools) Check(ctx context.Context, device string, fs FileSystem) error {
	name, args := "e2fsck", []string{"-f", "-n", device}
	if fs == XFS {
		name, args = "xfs_repair", []string{"-n", device}
	}
	r, err := t.run(ctx, name, args...)
	if err != nil {
		return err
	}
	if r.Code != 0 {
		return holdfast.Errorf(holdfast.ErrIntegrity, "%s %s: exit %d: %s", name, device, r.Code, r.said())
	}
	return nil
}
