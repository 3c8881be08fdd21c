package keeper

import (
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/holdfast-storage/holdfast"
	"github.com/holdfast-storage/holdfast/blockdev/mount"
)

// maxDetachRounds bounds the rounds over the mount table: mounts may lie on
// each other, and a private namespace gets no new ones.
const maxDetachRounds = 16

const loopMajor = 7

// isolate makes sure that this process pins no file system that it serves: its
// mount namespace is not the keeper's, nothing propagates between the two, and
// the copies of mounted volumes in it are detached.
func isolate(keepers uint64, mounts string, log *slog.Logger) error {
	own, err := mountNamespace()
	if err != nil {
		return err
	}
	if own == keepers {
		return holdfast.Errorf(holdfast.ErrRefused, "this process shares the keeper's mount namespace; it would mount onto itself").
			WithRemedy("let the keeper start it")
	}
	if err := unix.Mount("none", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return holdfast.Errorf(holdfast.ErrInternal, "make the mount namespace private: %w", err)
	}
	for range maxDetachRounds {
		left, err := detachVolumes(mounts, log)
		if left == 0 || err != nil {
			return err
		}
	}
	return holdfast.Errorf(holdfast.ErrInternal, "volumes are still mounted below %s after %d rounds", mounts, maxDetachRounds)
}

// detachVolumes detaches, from this namespace alone, every mount below the
// keeper's directory of mounts, every other mount of the same loop devices (a
// user may have bound one elsewhere), and what belongs to other containers of a
// plain host, whose removal would otherwise wait for this process' end. It
// returns how many it found.
func detachVolumes(mounts string, log *slog.Logger) (found int, err error) {
	entries, err := mount.Table()
	if err != nil {
		return 0, err
	}
	ours := make(map[int]bool)
	for _, e := range entries {
		if e.Major == loopMajor && strings.HasPrefix(e.Target, mounts+"/") {
			ours[e.Minor] = true
		}
	}
	for i := len(entries) - 1; i >= 0; i-- {
		e := entries[i]
		volume := strings.HasPrefix(e.Target, mounts+"/") || e.Major == loopMajor && ours[e.Minor]
		containers := (e.FS == "overlay" || e.FS == "nsfs") && e.Target != "/" && !strings.HasPrefix(mounts, e.Target+"/")
		if !volume && !containers {
			continue
		}
		found++
		if err := unix.Unmount(e.Target, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW); err != nil && !errors.Is(err, unix.EINVAL) {
			return found, holdfast.Errorf(holdfast.ErrInternal, "detach the copy of %s: %w", e.Target, err)
		}
		log.Debug("mount detached from a private namespace", slog.String("path", e.Target))
	}
	return found, nil
}

// mountNamespace returns the number of this process' mount namespace.
func mountNamespace() (uint64, error) {
	var st unix.Stat_t
	if err := unix.Stat("/proc/self/ns/mnt", &st); err != nil {
		return 0, holdfast.Errorf(holdfast.ErrInternal, "look at the mount namespace: %w", err)
	}
	return st.Ino, nil
}

// environment is set for the daemon to the path of its keeper's socket.
const environment = "HOLDFAST_KEEPER"

// lockVariable is set for the daemon to the descriptor of the keeper's lock,
// which the daemon only has to keep open.
const lockVariable = "HOLDFAST_KEEPER_LOCK_FD"

// keepLock keeps the keeper's lock from programs that this daemon executes:
// they may outlive it.
func keepLock() {
	if fd, err := strconv.Atoi(os.Getenv(lockVariable)); err == nil {
		unix.CloseOnExec(fd)
	}
}

// Under returns the path of the keeper's socket if a keeper started this
// process, else "".
func Under() string { return os.Getenv(environment) }

// Off is the value of the variable with which serve runs without a keeper.
const Off = "off"

// CheckUnder refuses a value of the variable that no keeper sets: somebody typed it.
func CheckUnder() error {
	if v := Under(); v != "" && v != Off && !filepath.IsAbs(v) {
		return holdfast.Errorf(holdfast.ErrInvalid, "%s=%q is neither %s nor empty", environment, v, Off).
			WithRemedy("set it to %s to run without a keeper, else unset it", Off)
	}
	return nil
}
