package plugin

import (
	"context"
	"time"
)

// Volume is what one node can say of one volume from what it knows locally.
type Volume struct {
	// Name is the volume's name in the cluster.
	Name string
	// Mountpoint is the host path where this node has the volume's files
	// mounted; empty while it is not mounted here.
	Mountpoint string
	// CreatedAt is when the volume was created; zero if the node does not know.
	CreatedAt time.Time
	// Status is shown to people as it is: size and used in bytes, state, node,
	// epoch, replicas with node and state, the ids of mounts. A driver adds the
	// containers that use the volume.
	// Values are strings, integers, booleans, and slices and maps of those, so
	// that they encode as JSON.
	Status map[string]any
}

// Volumes is what one node offers to a volume driver.
//
// All methods may be called concurrently, also for one volume. Every method is
// idempotent, because orchestrators repeat calls whose answer they lost: a
// repeated call returns what the first one returned. Errors are of the root
// package's kinds and are shown to people as they are.
//
// Create, Remove, Mount and Unmount may wait for a quorum, a peer or a file
// system; they return soon after ctx ends, and leave a state from which the same
// call can be made again. Get, List and Path are answered from local state
// within milliseconds and never wait: an orchestrator asks them all the time,
// and may forget a volume that it is told is not there.
type Volumes interface {
	// Create makes a volume. On return the cluster knows it durably. Keys of
	// opts are as the user typed them; an unknown key or an impossible value is
	// ErrInvalid. A volume of that name with the same options is success, one
	// with other options is ErrExists.
	Create(ctx context.Context, name string, opts map[string]string) error

	// Remove deletes a volume and its data. It is ErrRefused while the volume
	// is mounted or attached anywhere. A volume that does not exist is success.
	Remove(ctx context.Context, name string) error

	// Get describes a volume. Its only error is ErrNotFound, and that only when
	// the node knows that the volume does not exist; lack of a quorum is no
	// error, the last known state is the answer.
	Get(name string) (Volume, error)

	// List describes every volume that the node knows of, in the order of their
	// names. Lack of a quorum is no error.
	List() ([]Volume, error)

	// Path returns the host path where this node has the volume mounted, or ""
	// while it has not.
	Path(name string) string

	// Mount makes the volume's files appear on this node and returns the host
	// path. id names the user of the mount (Docker: one per container). Users of
	// one volume share one mount; it stands until the last id is unmounted. The
	// set of ids survives a restart of the node. A repeated id counts once.
	//
	// On return the file system is mounted from a live attachment. Mount waits
	// until ctx ends where waiting can help (the last holder's node is dead, no
	// quorum yet) and fails at once where it cannot: ErrNotFound, ErrRefused
	// when a live node holds the volume. It never returns the path of a bare
	// directory.
	Mount(ctx context.Context, name, id string) (path string, err error)

	// Unmount ends the use by id. When the last id leaves, the file system is
	// flushed and unmounted and the attachment ends; on return all that was
	// written through the mount is durable. An id, or a volume, that is not
	// there is success. The use has ended even if ctx ends first or the call
	// fails: orchestrators do not repeat an Unmount, so the node goes on by
	// itself until the volume is unmounted.
	Unmount(ctx context.Context, name, id string) error
}
