package state

import (
	"fmt"

	"github.com/holdfast-storage/holdfast"
)

// Command is one change of the tables. Commands are passed as pointers
// (&CreateVolume{...}) and are not modified by Apply.
type Command interface {
	kind() commandKind
	code(c *coder)
	// apply changes t, which is the caller's own; on an error the caller
	// throws t away.
	apply(t *View) (Result, error)
}

// Result is what an applied command answers.
type Result struct {
	// Index is the log index at which the command was applied: a View of at
	// least this index shows its effect.
	Index uint64
	// Changed is false if the command found its effect already there.
	Changed bool
	// Epoch and ISRVersion are the volume's and the segment's after the
	// command, where it concerns one.
	Epoch      holdfast.Epoch
	ISRVersion holdfast.ISRVersion
	// Volume is the record after the command, where it concerns one: for
	// AttachBegin it holds the in-sync sets to fence. Shared, do not modify.
	Volume *Volume
}

// Apply applies one command at a log index and returns the View after it. v
// stays as it was. It never panics on a command that DecodeCommand returned. A
// refused command returns an error of a root kind, with a Reason where one
// fits, and a View that differs from v by its index only.
func (v *View) Apply(index uint64, cmd Command) (*View, Result, error) {
	next := *v
	next.index = index
	var res Result
	err := checkCluster(v, cmd)
	if err == nil {
		res, err = cmd.apply(&next)
	}
	if err != nil {
		same := *v
		same.index = index
		return &same, Result{Index: index}, err
	}
	res.Index = index
	return &next, res, nil
}

// checkCluster refuses everything before the bootstrap.
func checkCluster(v *View, cmd Command) error {
	if _, ok := cmd.(*InitCluster); !ok && v.cluster.ID.IsZero() {
		return holdfast.Errorf(holdfast.ErrUnavailable, "the cluster is not bootstrapped")
	}
	return nil
}

// commandKind is the number of a command in its encoding. Numbers are never
// reused.
type commandKind uint16

// The kinds of cluster level 1.
const (
	kindInitCluster   commandKind = 1
	kindRaiseLevel    commandKind = 2
	kindNodeJoin      commandKind = 3
	kindNodeUpdate    commandKind = 4
	kindNodeRemove    commandKind = 5
	kindSetMember     commandKind = 6
	kindDiskOpen      commandKind = 7
	kindDiskUpdate    commandKind = 8
	kindDiskFailed    commandKind = 9
	kindCreateVolume  commandKind = 10
	kindDeleteVolume  commandKind = 11
	kindReplicaGone   commandKind = 12
	kindAttachBegin   commandKind = 13
	kindActivate      commandKind = 14
	kindShrinkISR     commandKind = 15
	kindGrowISR       commandKind = 16
	kindDetach        commandKind = 17
	kindAddReplica    commandKind = 18
	kindRemoveReplica commandKind = 19
	kindStartSync     commandKind = 20
	kindSetFormat     commandKind = 21
	kindResizeVolume  commandKind = 22
	kindSetLabels     commandKind = 23
	kindRename        commandKind = 24
	kindForceRecover  commandKind = 25
	kindUpdateVolume  commandKind = 26
	kindSetDuty       commandKind = 27
	kindEndRepair     commandKind = 28
	kindDiskLeaving   commandKind = 29
	kindDiskRemove    commandKind = 30
)

// newCommand returns an empty command of a kind, nil if there is none.
func newCommand(k commandKind) Command {
	switch k {
	case kindInitCluster:
		return &InitCluster{}
	case kindRaiseLevel:
		return &RaiseLevel{}
	case kindNodeJoin:
		return &NodeJoin{}
	case kindNodeUpdate:
		return &NodeUpdate{}
	case kindNodeRemove:
		return &NodeRemove{}
	case kindSetMember:
		return &SetMember{}
	case kindDiskOpen:
		return &DiskOpen{}
	case kindDiskUpdate:
		return &DiskUpdate{}
	case kindDiskFailed:
		return &DiskFailed{}
	case kindCreateVolume:
		return &CreateVolume{}
	case kindDeleteVolume:
		return &DeleteVolume{}
	case kindReplicaGone:
		return &ReplicaGone{}
	case kindAttachBegin:
		return &AttachBegin{}
	case kindActivate:
		return &Activate{}
	case kindShrinkISR:
		return &ShrinkISR{}
	case kindGrowISR:
		return &GrowISR{}
	case kindDetach:
		return &Detach{}
	case kindAddReplica:
		return &AddReplica{}
	case kindRemoveReplica:
		return &RemoveReplica{}
	case kindStartSync:
		return &StartSync{}
	case kindSetFormat:
		return &SetFormat{}
	case kindResizeVolume:
		return &ResizeVolume{}
	case kindSetLabels:
		return &SetLabels{}
	case kindRename:
		return &Rename{}
	case kindForceRecover:
		return &ForceRecover{}
	case kindUpdateVolume:
		return &UpdateVolume{}
	case kindSetDuty:
		return &SetDuty{}
	case kindEndRepair:
		return &EndRepair{}
	case kindDiskLeaving:
		return &SetDiskLeaving{}
	case kindDiskRemove:
		return &DiskRemove{}
	}
	return nil
}

// Name returns a command's name for logs and metrics.
func Name(cmd Command) string {
	name := fmt.Sprintf("%T", cmd)
	return name[len("*state."):]
}
