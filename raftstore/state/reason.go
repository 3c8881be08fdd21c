package state

import (
	"github.com/holdfast-storage/holdfast"
)

// Reason says which rule refused a command. It is the Cause of the refusing
// error: errors.Is(err, state.ReasonStaleISR). It survives forwarding.
type Reason string

// Error returns the reason's name.
func (r Reason) Error() string { return string(r) }

// The reasons.
const (
	// ReasonStaleEpoch: the epoch is over; the writer that names it is fenced (ErrFenced).
	ReasonStaleEpoch Reason = "STALE_EPOCH"
	// ReasonStaleISR: the in-sync-set version moved on; read again (ErrRefused).
	ReasonStaleISR Reason = "STALE_ISR_VERSION"
	// ReasonStaleRevision: another compared value moved on; read again (ErrRefused).
	ReasonStaleRevision Reason = "STALE_REVISION"
	// ReasonStaleInstance: a newer process of the node took over (ErrFenced).
	ReasonStaleInstance Reason = "STALE_INSTANCE"
	// ReasonHeld: the volume has a holder that is not known to be gone (ErrRefused).
	ReasonHeld Reason = "HELD"
	// ReasonLastInSync: the in-sync set would become empty (ErrRefused).
	ReasonLastInSync Reason = "LAST_IN_SYNC_REPLICA"
	// ReasonReplicaRegression: S is below what raft knows was committed (ErrIntegrity).
	ReasonReplicaRegression Reason = "REPLICA_REGRESSION"
	// ReasonMetadataRegression: a replica or writer knows a later epoch than raft (ErrIntegrity).
	ReasonMetadataRegression Reason = "METADATA_REGRESSION"
	// ReasonRemoved: the id was removed and is never taken again (ErrRefused).
	ReasonRemoved Reason = "REMOVED"
	// ReasonRolledBack: the disk shows an open count that raft has already seen (ErrRefused).
	ReasonRolledBack Reason = "DISK_ROLLED_BACK"
	// ReasonForeign: the disk or node belongs to another cluster or node (ErrRefused).
	ReasonForeign Reason = "FOREIGN"
)

// refuse makes a refusal of a kind and a reason.
func refuse(kind holdfast.Kind, reason Reason, format string, args ...any) error {
	e := holdfast.Errorf(kind, format, args...)
	e.Cause = reason
	return e
}

// invalid is a command that can never be right.
func invalid(format string, args ...any) error {
	return holdfast.Errorf(holdfast.ErrInvalid, format, args...)
}

func notFound(what string, id any) error {
	return holdfast.Errorf(holdfast.ErrNotFound, "no %s %v", what, id)
}
