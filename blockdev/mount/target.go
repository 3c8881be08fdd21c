package mount

import (
	"errors"
	"os"

	"golang.org/x/sys/unix"

	"github.com/holdfast-storage/holdfast"
)

// immutableFlag is FS_IMMUTABLE_FL of linux/fs.h.
const immutableFlag = 0x10

// PrepareTarget makes sure of a mountpoint that cannot be written to while
// nothing is mounted on it: an empty directory with the immutable flag or,
// where the file system has no such flag, under an empty read-only tmpfs. (A
// container started by an engine that found no mount would otherwise write into
// the host's own disk, and its data would vanish under the next mount. Modes do
// not help: root writes anyway.) A target with a volume on it is left as it is.
func PrepareTarget(target string) error {
	_, mounted, err := At(target)
	if err != nil || mounted {
		return err
	}
	if err := os.MkdirAll(target, 0o755); err != nil {
		return holdfast.Errorf(holdfast.ErrIO, "make the mountpoint: %w", err)
	}
	switch immutable, err := isImmutable(target); {
	case err == nil && immutable:
		return nil
	case err != nil && !noSuchFlag(err):
		return holdfast.Errorf(holdfast.ErrIO, "look at the flags of %s: %w", target, err)
	}
	names, err := os.ReadDir(target)
	if err != nil {
		return holdfast.Errorf(holdfast.ErrIO, "read the mountpoint: %w", err)
	}
	if len(names) > 0 {
		return holdfast.Errorf(holdfast.ErrRefused, "the mountpoint %s holds files of its own, %q among them", target, names[0].Name()).
			WithRemedy("move them away; a volume mounted there would hide them")
	}
	err = setImmutable(target, true)
	if err == nil {
		return nil
	}
	if !noSuchFlag(err) && !errors.Is(err, unix.EPERM) {
		return holdfast.Errorf(holdfast.ErrIO, "make %s immutable: %w", target, err)
	}
	const flags = unix.MS_RDONLY | unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC
	if err := unix.Mount(bareSource, target, "tmpfs", flags, "size=4k,nr_inodes=1,mode=000"); err != nil {
		return holdfast.Errorf(holdfast.ErrInternal, "guard the mountpoint %s: %w", target, err)
	}
	return nil
}

// RemoveTarget takes a bare mountpoint away; one that is not there is success,
// one with a volume on it an ErrRefused.
func RemoveTarget(target string) error {
	e, mounted, err := At(target)
	if err != nil {
		return err
	}
	if mounted && e.Source != bareSource {
		return holdfast.Errorf(holdfast.ErrRefused, "a volume is mounted at %s", target).WithRemedy("unmount it first")
	}
	if mounted {
		if err := unix.Unmount(target, unix.UMOUNT_NOFOLLOW|unix.MNT_DETACH); err != nil {
			return holdfast.Errorf(holdfast.ErrInternal, "unmount the guard of %s: %w", target, err)
		}
	}
	if immutable, err := isImmutable(target); err == nil && immutable {
		if err := setImmutable(target, false); err != nil {
			return holdfast.Errorf(holdfast.ErrIO, "make %s removable: %w", target, err)
		}
	}
	if err := unix.Rmdir(target); err != nil && !errors.Is(err, unix.ENOENT) {
		return holdfast.Errorf(holdfast.ErrIO, "remove the mountpoint %s: %w", target, err)
	}
	return nil
}

// noSuchFlag says whether an error means that this file system has no flags.
func noSuchFlag(err error) bool {
	return errors.Is(err, unix.ENOTTY) || errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.ENOSYS) || errors.Is(err, unix.EINVAL)
}

func isImmutable(path string) (bool, error) {
	var flags uint32
	err := withDir(path, func(fd int) (err error) {
		flags, err = unix.IoctlGetUint32(fd, unix.FS_IOC_GETFLAGS)
		return err
	})
	return flags&immutableFlag != 0, err
}

func setImmutable(path string, on bool) error {
	return withDir(path, func(fd int) error {
		flags, err := unix.IoctlGetUint32(fd, unix.FS_IOC_GETFLAGS)
		if err != nil {
			return err
		}
		flags &^= immutableFlag
		if on {
			flags |= immutableFlag
		}
		return unix.IoctlSetPointerInt(fd, unix.FS_IOC_SETFLAGS, int(flags))
	})
}

func withDir(path string, do func(fd int) error) error {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC|unix.O_NOFOLLOW, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	return do(fd)
}
