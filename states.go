package holdfast

// ReplicaRole is what raft says a replica is. Only an in-sync replica may
// serve or be a recovery source.
type ReplicaRole string

// The roles of a replica.
const (
	RoleSyncing  ReplicaRole = "syncing"  // being filled; never promoted
	RoleInSync   ReplicaRole = "in-sync"  // member of the in-sync set
	RoleStale    ReplicaRole = "stale"    // was in sync once, missed writes
	RoleOrphan   ReplicaRole = "orphan"   // of a lineage that salvage abandoned
	RoleDeleting ReplicaRole = "deleting" // to be removed from its disk
)

// DiskState is what raft says of a pooled disk.
type DiskState string

// The states of a disk.
const (
	DiskOK     DiskState = "ok"
	DiskFailed DiskState = "failed" // an I/O error was seen; never intact again
)

// VolumeState is what a user is told of a volume.
type VolumeState string

// The states of a volume.
const (
	VolumePending     VolumeState = "pending"     // created, not yet placed
	VolumeDetached    VolumeState = "detached"    // no writer
	VolumeAttached    VolumeState = "attached"    // served, every replica in sync
	VolumeDegraded    VolumeState = "degraded"    // served with fewer replicas than asked for
	VolumeUnavailable VolumeState = "unavailable" // cannot be served now
)

// FormatState is what raft knows of a volume's file system. FormatDoing is
// recorded before mkfs runs: found again, the device was never mounted and may
// be formatted again. FormatDone is never left.
type FormatState string

// The format states.
const (
	FormatNone  FormatState = "none"
	FormatDoing FormatState = "formatting"
	FormatDone  FormatState = "formatted"
)

// AckMode says when a write is acknowledged.
type AckMode string

// The ack modes.
const (
	// AckReceived acknowledges once every in-sync replica has written the
	// record into its operating system's memory (never only the daemon's).
	AckReceived AckMode = "received"
	// AckDurable acknowledges once every in-sync replica has synced it.
	AckDurable AckMode = "durable"
)
