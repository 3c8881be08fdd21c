package keeper

import (
	"path/filepath"
	"strings"

	"github.com/holdfast-storage/holdfast"
	"github.com/holdfast-storage/holdfast/blockdev/hostdev"
	"github.com/holdfast-storage/holdfast/blockdev/mount"
)

// maxNameLength is a volume name's.
const maxNameLength = 128

// DeviceSpec says which device the daemon wants.
type DeviceSpec struct {
	// Volume is the device's key.
	Volume holdfast.VolumeID `json:"volume"`
	// Name is the volume's name; it becomes the mountpoint's.
	Name string `json:"name"`
	// Size in bytes, a multiple of the block size.
	Size int64 `json:"size"`
	// Session decides whether a device that a dead daemon left goes on.
	Session holdfast.SessionID `json:"session"`
	// Epoch is kept for those who look; the keeper draws no conclusion from it.
	Epoch holdfast.Epoch `json:"epoch"`
}

func (s DeviceSpec) validate() error {
	if s.Volume.IsZero() || s.Session.IsZero() {
		return holdfast.Errorf(holdfast.ErrInvalid, "a device needs a volume id and a session id")
	}
	if s.Size <= 0 || s.Size%holdfast.BlockSize != 0 {
		return holdfast.Errorf(holdfast.ErrInvalid, "a device of %d bytes; sizes are multiples of %d", s.Size, holdfast.BlockSize)
	}
	return validName(s.Name)
}

// validName accepts what may stand as one path component.
func validName(name string) error {
	ok := name != "" && len(name) <= maxNameLength && name[0] != '.' && name[0] != '-'
	for _, c := range []byte(name) {
		ok = ok && (c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || strings.IndexByte("_.-", c) >= 0)
	}
	if !ok {
		return holdfast.Errorf(holdfast.ErrInvalid, "%q is not a volume name", name).
			WithRemedy("names have 1 to 128 letters, digits, _ . - and begin with a letter or digit")
	}
	return nil
}

// Device is a device as the keeper holds it.
type Device struct {
	DeviceSpec
	// Params are what INIT settled with the kernel.
	Params hostdev.Params `json:"params"`
	// Lent says that a living daemon has the descriptor; Orphaned that the one
	// that had it is dead, so that the device waits to be taken over or aborted.
	Lent     bool `json:"lent"`
	Orphaned bool `json:"orphaned"`
	// Ended says that the connection is over: all that is left is to Abort.
	Ended bool `json:"ended"`
	// Connection is the number under /sys/fs/fuse/connections.
	Connection uint64 `json:"connection"`
	// Loop is /dev/loopN, "" before ConfigureLoop.
	Loop string `json:"loop,omitempty"`
	// MountPath is what Mount answered, "" while not mounted; FS the kind.
	MountPath string           `json:"mount_path,omitempty"`
	FS        mount.FileSystem `json:"fs,omitempty"`
	// ReadOnly says that it refuses writes, as a file system does after an error.
	ReadOnly bool `json:"read_only,omitempty"`
	// Busy names the call that is in work, "" for none.
	Busy string `json:"busy,omitempty"`
}

// MountOptions of Client.Mount.
type MountOptions struct {
	// FS is the kind of file system, as it was made.
	FS mount.FileSystem `json:"fs"`
	// Options are the user's, comma-separated, as mount.ParseOptions takes them.
	Options string `json:"options,omitempty"`
}

// FormatOptions of Client.Format.
type FormatOptions = mount.FormatOptions

// UnmountOptions of Client.Unmount.
type UnmountOptions struct {
	// Force makes the file system vanish from its mountpoint although it is in
	// use; its users keep it until they end.
	Force bool
}

// Lack is something that this host does not give, and what to do about it.
type Lack struct {
	What   string `json:"what"`
	Remedy string `json:"remedy,omitempty"`
}

// SocketPath is where the keeper of a data directory listens.
func SocketPath(dataDir string) string { return filepath.Join(dataDir, "keeper.sock") }

func mountsDir(dataDir string) string { return filepath.Join(dataDir, "mounts") }

// MountPath is what Mount answers for a volume: the directory that users get.
func MountPath(dataDir, name string) string {
	return mount.DataPath(filepath.Join(mountsDir(dataDir), name))
}
