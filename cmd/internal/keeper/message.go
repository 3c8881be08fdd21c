package keeper

import (
	"encoding/json"
	"time"

	"github.com/holdfast-storage/holdfast"
	"github.com/holdfast-storage/holdfast/blockdev/hostdev"
	"github.com/holdfast-storage/holdfast/blockdev/mount"
)

const (
	// version is the version of the conversation. 1: the first. A keeper keeps
	// answering every version that was released, since it may be older or newer
	// than the daemon it starts.
	version = 1
	// maxMessage bounds one packet; a socket's default buffer takes it whole.
	maxMessage = 64 << 10
	// devicesPerPage bounds the devices in one answer, so that it fits a packet.
	devicesPerPage = 32
	// maxRequests bounds the requests that one connection has in work.
	maxRequests = 64
	// maxDevices bounds the devices of one keeper.
	maxDevices = 1024
	// defaultTimeout is for calls whose context has no deadline, maxTimeout for
	// all: mkfs of a huge volume or fsck after a crash take minutes.
	defaultTimeout = 2 * time.Minute
	maxTimeout     = 30 * time.Minute
)

type verb string

// The daemon's requests. The keeper hands those that need a file system or a
// loop device on to its mounter, which knows the others below as well.
const (
	verbDevices    verb = "devices"
	verbOpen       verb = "open"
	verbLoop       verb = "loop"
	verbProbe      verb = "probe"
	verbFormat     verb = "format"
	verbFsck       verb = "fsck"
	verbMount      verb = "mount"
	verbUnmount    verb = "unmount"
	verbClose      verb = "close"
	verbAbort      verb = "abort"
	verbRemovePath verb = "remove-path"

	verbState verb = "state" // of one volume's loop device and mount
	verbSync  verb = "sync"  // syncfs of one volume's mount
	verbLook  verb = "look"  // at what this host lacks
)

// hello is the first message in either direction between daemon and keeper.
type hello struct {
	Version   int                 `json:"version"`
	Instance  holdfast.InstanceID `json:"instance"`
	Error     *wireError          `json:"error,omitempty"`     // from the keeper: refused
	Namespace uint64              `json:"namespace,omitempty"` // from the keeper: the mount namespace that has the volumes, 0 if there can be none
	Mounts    string              `json:"mounts,omitempty"`    // from the keeper: where mounts are
	Lacks     []Lack              `json:"lacks,omitempty"`     // from the keeper
}

type request struct {
	ID        uint64               `json:"id"`
	Verb      verb                 `json:"verb"`
	TimeoutMS int64                `json:"timeout_ms"`
	Volume    holdfast.VolumeID    `json:"volume"`
	Name      string               `json:"name,omitempty"`
	Page      int                  `json:"page,omitempty"`
	Spec      *DeviceSpec          `json:"spec,omitempty"`
	Format    *mount.FormatOptions `json:"format,omitempty"`
	Mount     *MountOptions        `json:"mount,omitempty"`
	FS        mount.FileSystem     `json:"fs,omitempty"`
	Force     bool                 `json:"force,omitempty"`
	Container bool                 `json:"container,omitempty"` // with look: the keeper is PID 1
}

func (r request) timeout() time.Duration {
	return time.Duration(min(max(r.TimeoutMS, 0), maxTimeout.Milliseconds())) * time.Millisecond
}

type response struct {
	ID      uint64         `json:"id"`
	Error   *wireError     `json:"error,omitempty"`
	Text    string         `json:"text,omitempty"`
	Devices []Device       `json:"devices,omitempty"`
	More    bool           `json:"more,omitempty"`
	Params  hostdev.Params `json:"params"`
	Resend  bool           `json:"resend,omitempty"`
	State   *state         `json:"state,omitempty"`
	Lacks   []Lack         `json:"lacks,omitempty"`

	Namespace uint64 `json:"namespace,omitempty"` // with Lacks: the mounter's mount namespace
}

// state is a volume's loop device and mount, as the mounter sees them.
type state struct {
	Loop     string           `json:"loop,omitempty"` // /dev/loopN
	Mounted  bool             `json:"mounted,omitempty"`
	FS       mount.FileSystem `json:"fs,omitempty"`
	ReadOnly bool             `json:"read_only,omitempty"`
}

type wireError struct {
	Kind    holdfast.Kind `json:"kind"`
	Message string        `json:"message"`
	Remedy  string        `json:"remedy,omitempty"`
}

const maxErrorText = 4 << 10

func toWire(err error) *wireError {
	if err == nil {
		return nil
	}
	w := &wireError{Kind: holdfast.KindOf(err), Message: holdfast.MessageOf(err), Remedy: holdfast.RemedyOf(err)}
	w.Message = w.Message[:min(len(w.Message), maxErrorText)]
	w.Remedy = w.Remedy[:min(len(w.Remedy), maxErrorText)]
	return w
}

func (w *wireError) err() error {
	if w == nil {
		return nil
	}
	return &holdfast.Error{Kind: w.Kind, Message: w.Message, Remedy: w.Remedy}
}

func encode(v any) ([]byte, error) {
	b, err := json.Marshal(v)
	if err != nil {
		return nil, holdfast.Errorf(holdfast.ErrInternal, "encode a keeper message: %w", err)
	}
	if len(b) > maxMessage {
		return nil, holdfast.Errorf(holdfast.ErrInvalid, "keeper message of %d bytes; at most %d are taken", len(b), maxMessage)
	}
	return b, nil
}

func decode(b []byte, v any) error {
	if err := json.Unmarshal(b, v); err != nil {
		return holdfast.Errorf(holdfast.ErrInvalid, "read a keeper message: %w", err)
	}
	return nil
}
