package mount

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"github.com/holdfast-storage/holdfast"
)

const (
	// dataDir is the directory of a volume's file system that users see.
	dataDir = "data"
	// bareSource is the source name of the read-only tmpfs that keeps a bare
	// mountpoint from being written to, where it cannot be made immutable.
	bareSource = "holdfast-bare"
	// busyRetry is the pause between attempts to unmount what is in use: the
	// last user is often a process that is just ending.
	busyRetry = 100 * time.Millisecond
	// busyTries bounds those attempts: five seconds.
	busyTries = 50
)

// DataPath is what a user gets of a volume mounted at target.
func DataPath(target string) string { return filepath.Join(target, dataDir) }

// Mount mounts a block device at target, which PrepareTarget has made, and
// makes sure of the data directory. Mounted there already: nothing is done. The
// call waits for the device. It is not to be called concurrently for one target.
func Mount(device, target string, fs FileSystem, opts Options) error {
	major, minor, err := deviceNumber(device)
	if err != nil {
		return err
	}
	e, mounted, err := At(target)
	if err != nil {
		return err
	}
	switch {
	case mounted && e.Major == major && e.Minor == minor:
		return ensureData(target, opts)
	case mounted && e.Source != bareSource:
		return holdfast.Errorf(holdfast.ErrRefused, "something else is mounted at %s: %s from %s", target, e.FS, e.Source).
			WithRemedy("unmount it")
	}
	if err := unix.Mount(device, target, string(fs), opts.Flags, opts.Data); err != nil {
		kind := holdfast.ErrInternal
		switch {
		case errors.Is(err, unix.EIO), errors.Is(err, unix.ENXIO):
			kind = holdfast.ErrIO
		case errors.Is(err, unix.EUCLEAN), errors.Is(err, unix.EBADMSG):
			kind = holdfast.ErrIntegrity
		case errors.Is(err, unix.EINVAL):
			kind = holdfast.ErrInvalid // an option's value, or no such file system there
		case errors.Is(err, unix.EROFS):
			kind = holdfast.ErrRefused
		}
		return holdfast.Errorf(kind, "mount %s as %s at %s (options %q): %w", device, fs, target, opts.Data, err)
	}
	return ensureData(target, opts)
}

func ensureData(target string, opts Options) error {
	path := DataPath(target)
	st, err := os.Lstat(path)
	if errors.Is(err, os.ErrNotExist) && !opts.ReadOnly() {
		err = os.Mkdir(path, 0o755)
		if err == nil {
			return syncDir(target) // what users see must not vanish with a crash
		}
	}
	if errors.Is(err, os.ErrNotExist) && opts.ReadOnly() {
		return holdfast.Errorf(holdfast.ErrRefused, "the file system at %s is new, and mount_options=ro keeps it empty", target).
			WithRemedy("make a volume without ro, and say it where the volume is used: docker run -v VOLUME:/PATH:ro")
	}
	if err != nil {
		return holdfast.Errorf(holdfast.ErrIO, "make the data directory: %w", err)
	}
	if !st.IsDir() {
		return holdfast.Errorf(holdfast.ErrIntegrity, "%s is not a directory", path).WithRemedy("mount the volume's device elsewhere and look")
	}
	return nil
}

func syncDir(path string) error {
	d, err := os.Open(path)
	if err == nil {
		err = errors.Join(d.Sync(), d.Close())
	}
	if err != nil {
		return holdfast.Errorf(holdfast.ErrIO, "sync %s: %w", path, err)
	}
	return nil
}

// Unmount unmounts what Mount mounted at target; nothing mounted there is
// success. In use is tried again for up to five seconds and within ctx, then an
// ErrRefused. With force it is then unmounted lazily: it vanishes from the
// name space at once, from its users when they end. The call itself waits for
// the device, which must be served (or have failed).
func Unmount(ctx context.Context, target string, force bool) error {
	for try := 0; ; try++ {
		e, mounted, err := At(target)
		if err != nil || !mounted || e.Source == bareSource {
			return err
		}
		switch err := unix.Unmount(target, unix.UMOUNT_NOFOLLOW); {
		case err == nil, errors.Is(err, unix.EINVAL): // EINVAL: gone meanwhile; look again
			continue
		case !errors.Is(err, unix.EBUSY):
			return holdfast.Errorf(holdfast.ErrInternal, "unmount %s: %w", target, err)
		}
		if force {
			if err := unix.Unmount(target, unix.UMOUNT_NOFOLLOW|unix.MNT_DETACH); err != nil {
				return holdfast.Errorf(holdfast.ErrInternal, "detach %s: %w", target, err)
			}
			continue
		}
		if try == busyTries {
			return holdfast.Errorf(holdfast.ErrRefused, "%s is in use", target).WithRemedy("end the processes that have files open there")
		}
		select {
		case <-time.After(busyRetry):
		case <-ctx.Done():
			return holdfast.Errorf(holdfast.ErrRefused, "%s is in use", target).WithRemedy("end the processes that have files open there")
		}
	}
}

// SyncFS writes everything that is dirty in the file system mounted at target.
func SyncFS(target string) error {
	fd, err := unix.Open(target, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC|unix.O_NOFOLLOW, 0)
	if err != nil {
		return holdfast.Errorf(holdfast.ErrIO, "open %s: %w", target, err)
	}
	defer unix.Close(fd)
	if err := unix.Syncfs(fd); err != nil {
		return holdfast.Errorf(holdfast.ErrIO, "sync %s: %w", target, err)
	}
	return nil
}

func deviceNumber(device string) (major, minor int, err error) {
	var st unix.Stat_t
	if err := unix.Stat(device, &st); err != nil {
		return 0, 0, holdfast.Errorf(holdfast.ErrNotFound, "stat %s: %w", device, err)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFBLK {
		return 0, 0, holdfast.Errorf(holdfast.ErrInvalid, "%s is not a block device", device)
	}
	return int(unix.Major(st.Rdev)), int(unix.Minor(st.Rdev)), nil
}
