package hostdev

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/holdfast-storage/holdfast"
)

const (
	loopMajor = 7
	// maxLoopTries bounds the race for free loop numbers with other users of
	// this kernel (other hosts in containers among them).
	maxLoopTries = 64
)

// Loop is a loop device, held open by its maker.
type Loop struct {
	file *os.File
	path string
	num  int
}

// ConfigureLoop puts a free loop device on the file: direct I/O, cleared by
// itself when its last user is gone, logical blocks of
// holdfast.LogicalBlockSize. The file may be closed afterwards. If the file is
// served over FUSE, its server must run. Busy numbers are tried over, within
// ctx and maxLoopTries.
func ConfigureLoop(ctx context.Context, file *os.File, name string) (*Loop, error) {
	loop, err := configureLoop(ctx, file, name, unix.LO_FLAGS_DIRECT_IO|unix.LO_FLAGS_AUTOCLEAR)
	if err != nil {
		return nil, err
	}
	if err := loop.checkDirectIO(); err != nil {
		loop.Clear()
		return nil, err
	}
	return loop, nil
}

func configureLoop(ctx context.Context, file *os.File, name string, flags uint32) (*Loop, error) {
	control, err := os.OpenFile("/dev/loop-control", os.O_RDWR, 0)
	if err != nil {
		return nil, holdfast.Errorf(holdfast.ErrUnsupported, "open /dev/loop-control: %w", err).
			WithRemedy("load the loop module; in a container, run it --privileged or with -v /dev:/dev")
	}
	defer control.Close()
	config := &unix.LoopConfig{Fd: uint32(file.Fd()), Size: holdfast.LogicalBlockSize}
	config.Info.Flags = flags
	copy(config.Info.File_name[:len(config.Info.File_name)-1], name)
	for range maxLoopTries {
		if err := ctx.Err(); err != nil {
			return nil, holdfast.Errorf(holdfast.ErrTimeout, "configure a loop device: %w", err)
		}
		num, err := unix.IoctlRetInt(int(control.Fd()), unix.LOOP_CTL_GET_FREE)
		if err != nil {
			return nil, holdfast.Errorf(holdfast.ErrInternal, "get a free loop device: %w", err)
		}
		loop, err := tryLoop(num, config)
		if err == nil {
			return loop, nil
		}
		if !errors.Is(err, unix.EBUSY) && !errors.Is(err, unix.ENXIO) {
			return nil, err
		}
	}
	return nil, holdfast.Errorf(holdfast.ErrUnavailable, "no free loop device after %d tries", maxLoopTries)
}

func tryLoop(num int, config *unix.LoopConfig) (*Loop, error) {
	path := fmt.Sprintf("/dev/loop%d", num)
	f, err := openLoop(path, num)
	if err != nil {
		return nil, holdfast.Errorf(holdfast.ErrInternal, "open %s: %w", path, err)
	}
	if err := unix.IoctlLoopConfigure(int(f.Fd()), config); err != nil {
		f.Close()
		if errors.Is(err, unix.EBUSY) {
			return nil, unix.EBUSY // somebody was faster
		}
		e := holdfast.Errorf(holdfast.ErrInternal, "configure %s: %w", path, err)
		if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOTTY) {
			e = holdfast.Errorf(holdfast.ErrUnsupported, "configure %s: %w", path, err).WithRemedy("kernel devices need Linux 5.8 or later")
		}
		return nil, e
	}
	return &Loop{file: f, path: path, num: num}, nil
}

// openLoop opens a loop device, making its node where this /dev has none (the
// kernel makes nodes only in its own devtmpfs).
func openLoop(path string, num int) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if !errors.Is(err, os.ErrNotExist) {
		return f, err
	}
	dev := int(unix.Mkdev(loopMajor, uint32(num)))
	if err := unix.Mknod(path, unix.S_IFBLK|0o660, dev); err != nil && !errors.Is(err, unix.EEXIST) {
		return nil, fmt.Errorf("make the node: %w", err)
	}
	return os.OpenFile(path, os.O_RDWR, 0)
}

// checkDirectIO makes sure that the kernel took direct I/O: without it, the
// file's page cache would hold the data twice, and a flush would not mean what
// it says after a takeover.
func (l *Loop) checkDirectIO() error {
	b, err := os.ReadFile(fmt.Sprintf("/sys/block/loop%d/loop/dio", l.num))
	if err != nil {
		return nil //nolint:nilerr // no sysfs here: trust LOOP_CONFIGURE
	}
	if strings.TrimSpace(string(b)) == "1" {
		return nil
	}
	if info, err := unix.IoctlLoopGetStatus64(int(l.file.Fd())); err == nil && info.Flags&unix.LO_FLAGS_DIRECT_IO != 0 {
		return nil
	}
	return holdfast.Errorf(holdfast.ErrUnsupported, "%s refused direct I/O", l.path)
}

// Path returns /dev/loopN.
func (l *Loop) Path() string { return l.path }

// Number returns N of /dev/loopN; its device number is (7, N).
func (l *Loop) Number() int { return l.num }

// InUse says whether a file system or another exclusive user holds the device,
// in whatever mount namespace.
func (l *Loop) InUse() (bool, error) {
	fd, err := unix.Open(l.path, unix.O_RDONLY|unix.O_EXCL|unix.O_CLOEXEC, 0)
	if errors.Is(err, unix.EBUSY) {
		return true, nil
	}
	if err != nil {
		return false, holdfast.Errorf(holdfast.ErrInternal, "open %s alone: %w", l.path, err)
	}
	_ = unix.Close(fd)
	return false, nil
}

// Sync writes the device's own dirty pages (of programs that wrote to it past a
// file system, such as mkfs) and flushes it. It waits for the device.
func (l *Loop) Sync() error {
	if err := l.file.Sync(); err != nil {
		return holdfast.Errorf(holdfast.ErrIO, "sync %s: %w", l.path, err)
	}
	return nil
}

// Clear takes the device off its file, at once if nobody else has it open, else
// when the last user goes; and closes it. It may be called more than once.
func (l *Loop) Clear() {
	_ = unix.IoctlSetInt(int(l.file.Fd()), unix.LOOP_CLR_FD, 0)
	_ = l.file.Close()
}
