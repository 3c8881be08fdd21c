package state

import (
	"slices"
	"strings"

	"github.com/holdfast-storage/holdfast"
)

// InitCluster names the cluster; it is the first command of every log.
type InitCluster struct {
	ID    holdfast.ClusterID
	Level holdfast.ClusterLevel
}

func (*InitCluster) kind() commandKind { return kindInitCluster }

func (c *InitCluster) apply(t *View) (Result, error) {
	switch {
	case c.ID.IsZero():
		return Result{}, invalid("a cluster needs an id")
	case c.Level != holdfast.Level1:
		return Result{}, invalid("a cluster begins at level %d, not %d", holdfast.Level1, c.Level)
	case t.cluster.ID == c.ID:
		return Result{}, nil
	case !t.cluster.ID.IsZero():
		return Result{}, refuse(holdfast.ErrRefused, ReasonForeign, "this is cluster %v, not %v", t.cluster.ID, c.ID)
	}
	t.cluster = Cluster{ID: c.ID, Level: c.Level}
	return Result{Changed: true}, nil
}

// RaiseLevel raises the cluster level by one; there is no way back.
type RaiseLevel struct {
	To holdfast.ClusterLevel
}

func (*RaiseLevel) kind() commandKind { return kindRaiseLevel }

func (c *RaiseLevel) apply(t *View) (Result, error) {
	if t.cluster.Level == c.To {
		return Result{}, nil
	}
	if c.To != t.cluster.Level+1 {
		return Result{}, refuse(holdfast.ErrRefused, ReasonStaleRevision, "the cluster level is %d and rises one at a time, not to %d", t.cluster.Level, c.To)
	}
	for n := range t.Nodes() {
		if n.MaxLevel < c.To {
			return Result{}, holdfast.Errorf(holdfast.ErrRefused, "node %s (version %s) supports cluster level %d, not %d", n.Name, n.Version, n.MaxLevel, c.To).
				WithRemedy("upgrade or remove it first")
		}
	}
	t.cluster.Level = c.To
	return Result{Changed: true}, nil
}

// NodeJoin adds a node. Node.Kind, Revision and Removed are ignored: a new node
// is a watcher until SetMember.
type NodeJoin struct {
	Node Node
}

func (*NodeJoin) kind() commandKind { return kindNodeJoin }

func (c *NodeJoin) apply(t *View) (Result, error) {
	n := c.Node
	if err := n.validate(); err != nil {
		return Result{}, err
	}
	if have, ok := t.nodes.get(n.ID); ok {
		if have.Removed {
			return Result{}, removedNode(have)
		}
		n.Kind, n.Duty, n.Revision, n.Removed = have.Kind, have.Duty, have.Revision, false
		if n.equal(have) {
			return Result{}, nil
		}
		return Result{}, holdfast.Errorf(holdfast.ErrExists, "node %v is a member already, as %s", n.ID, have.Name)
	}
	if n.MaxLevel < t.cluster.Level {
		return Result{}, holdfast.Errorf(holdfast.ErrRefused, "node %s (version %s) supports cluster level %d, the cluster is at %d", n.Name, n.Version, n.MaxLevel, t.cluster.Level).
			WithRemedy("upgrade the node")
	}
	if other, ok := t.NodeByName(n.Name); ok {
		return Result{}, nodeNameTaken(other)
	}
	n.Kind, n.Duty, n.Revision, n.Removed = MemberWatcher, DutyServing, 1, false
	t.nodes = t.nodes.set(n.ID, &n)
	return Result{Changed: true}, nil
}

// NodeUpdate replaces what a node says of itself. Node.Revision is the revision
// it was read at (compared); Kind, Duty and Removed are ignored.
type NodeUpdate struct {
	Node Node
}

func (*NodeUpdate) kind() commandKind { return kindNodeUpdate }

func (c *NodeUpdate) apply(t *View) (Result, error) {
	n := c.Node
	if err := n.validate(); err != nil {
		return Result{}, err
	}
	have, err := t.liveNode(n.ID)
	if err != nil {
		return Result{}, err
	}
	asked := n.Revision
	n.Kind, n.Duty, n.Revision, n.Removed = have.Kind, have.Duty, have.Revision, false
	if n.equal(have) {
		return Result{}, nil
	}
	if asked != have.Revision {
		return Result{}, refuse(holdfast.ErrRefused, ReasonStaleRevision, "node %s is at revision %d, not %d", have.Name, have.Revision, asked)
	}
	if n.MaxLevel < t.cluster.Level {
		return Result{}, holdfast.Errorf(holdfast.ErrRefused, "node %s (version %s) supports cluster level %d, the cluster is at %d", n.Name, n.Version, n.MaxLevel, t.cluster.Level).
			WithRemedy("there is no way back after cluster finalize-upgrade; use the newer version")
	}
	if other, ok := t.NodeByName(n.Name); ok && other.ID != n.ID {
		return Result{}, nodeNameTaken(other)
	}
	n.Revision++
	t.nodes = t.nodes.set(n.ID, &n)
	return Result{Changed: true}, nil
}

// NodeRemove removes a node for ever. It is refused while the node holds a
// volume, or one of its disks a replica that is not being deleted: those that are
// go with it, for their disks will not be asked again.
type NodeRemove struct {
	Node holdfast.NodeID
}

func (*NodeRemove) kind() commandKind { return kindNodeRemove }

func (c *NodeRemove) apply(t *View) (Result, error) {
	have, ok := t.nodes.get(c.Node)
	if !ok {
		return Result{}, notFound("node", c.Node)
	}
	if have.Removed {
		return Result{}, nil
	}
	var deleting []holdfast.ReplicaID
	for vol := range t.volumes.all() {
		if vol.Phase != PhaseDetached && vol.Holder.Node == c.Node {
			return Result{}, holdfast.Errorf(holdfast.ErrRefused, "node %s holds volume %s", have.Name, vol.Name).
				WithRemedy("detach it, or attach it elsewhere")
		}
		for i := range vol.Segments {
			for _, r := range vol.Segments[i].Replicas {
				d, ok := t.disks.get(r.Disk)
				switch {
				case !ok || d.Node != c.Node:
				case r.Role == holdfast.RoleDeleting:
					deleting = append(deleting, r.ID)
				default:
					return Result{}, holdfast.Errorf(holdfast.ErrRefused, "node %s has a replica of volume %s on disk %v", have.Name, vol.Name, r.Disk).
						WithRemedy("drain the node first")
				}
			}
		}
	}
	for vol := range t.volumes.all() {
		if vol.Repair.Holder.Node == c.Node && vol.UnderRepair() { // another node goes on
			v := vol.clone()
			v.Repair.Holder, v.Repair.Why = Holder{}, "node "+have.Name+" was removed"
			t.putVolume(v)
		}
	}
	for _, id := range deleting {
		if _, err := (&ReplicaGone{Replica: id}).apply(t); err != nil {
			return Result{}, err
		}
	}
	n := *have
	n.Removed = true
	n.Revision++
	t.nodes = t.nodes.set(n.ID, &n)
	return Result{Changed: true}, nil
}

// SetMember records a node's part in raft, after the raft configuration was
// changed. From is compared.
type SetMember struct {
	Node     holdfast.NodeID
	From, To MemberKind
}

func (*SetMember) kind() commandKind { return kindSetMember }

func (c *SetMember) apply(t *View) (Result, error) {
	have, err := t.liveNode(c.Node)
	if err != nil {
		return Result{}, err
	}
	if have.Kind == c.To {
		return Result{}, nil
	}
	if have.Kind != c.From {
		return Result{}, refuse(holdfast.ErrRefused, ReasonStaleRevision, "node %s is a %s, not a %s", have.Name, have.Kind, c.From)
	}
	if !slices.Contains(memberKinds, c.To) {
		return Result{}, invalid("%q is not a member kind", c.To)
	}
	n := *have
	n.Kind = c.To
	n.Revision++
	t.nodes = t.nodes.set(n.ID, &n)
	return Result{Changed: true}, nil
}

// SetDuty changes what is expected of a node. From is compared.
type SetDuty struct {
	Node     holdfast.NodeID
	From, To NodeDuty
}

func (*SetDuty) kind() commandKind { return kindSetDuty }

func (c *SetDuty) apply(t *View) (Result, error) {
	have, err := t.liveNode(c.Node)
	if err != nil {
		return Result{}, err
	}
	switch {
	case !slices.Contains(duties, c.To):
		return Result{}, invalid("%q is not a duty of a node", c.To)
	case have.Duty == c.To:
		return Result{}, nil
	case have.Duty != c.From:
		return Result{}, refuse(holdfast.ErrRefused, ReasonStaleRevision, "node %s is %s, not %s", have.Name, have.Duty, c.From)
	}
	n := *have
	n.Duty = c.To
	n.Revision++
	t.nodes = t.nodes.set(n.ID, &n)
	return Result{Changed: true}, nil
}

func (t *View) liveNode(id holdfast.NodeID) (*Node, error) {
	n, ok := t.nodes.get(id)
	if !ok {
		return nil, notFound("node", id)
	}
	if n.Removed {
		return nil, removedNode(n)
	}
	return n, nil
}

func removedNode(n *Node) error {
	e := holdfast.Errorf(holdfast.ErrRefused, "node %v (%s) was removed from the cluster", n.ID, n.Name).
		WithRemedy("an id is never taken again: start the node with an empty data directory")
	e.Cause = ReasonRemoved
	return e
}

func nodeNameTaken(n *Node) error {
	return holdfast.Errorf(holdfast.ErrExists, "a node named %s is a member already, with id %v", n.Name, n.ID).
		WithRemedy("choose another --name, or remove the old node")
}

func (n *Node) validate() error {
	if n.ID.IsZero() || n.Instance.IsZero() {
		return invalid("a node needs an id and an instance")
	}
	if err := checkName("node", n.Name); err != nil {
		return err
	}
	for _, a := range []string{n.Addresses.API, n.Addresses.Data, n.Addresses.Raft, n.Version} {
		if len(a) > MaxTextLength {
			return invalid("an address or version of node %s has %d bytes, more than %d", n.Name, len(a), MaxTextLength)
		}
	}
	if n.Addresses.API == "" || n.Addresses.Raft == "" {
		return invalid("node %s needs an address and a raft address", n.Name)
	}
	return n.Labels.validate()
}

// equal compares everything but nothing's identity.
func (n *Node) equal(o *Node) bool {
	a, b := *n, *o
	a.Labels, b.Labels = nil, nil
	return nodeFields(a) == nodeFields(b) && slices.Equal(n.Labels, o.Labels)
}

// nodeFields is Node without its slice, so that == compares it.
func nodeFields(n Node) any {
	return struct {
		id       holdfast.NodeID
		name     string
		addr     Addresses
		instance holdfast.InstanceID
		disks    bool
		version  string
		level    holdfast.ClusterLevel
		kind     MemberKind
		duty     NodeDuty
		revision uint64
		removed  bool
	}{n.ID, n.Name, n.Addresses, n.Instance, n.HasDisks, n.Version, n.MaxLevel, n.Kind, n.Duty, n.Revision, n.Removed}
}

func (l Labels) validate() error {
	if len(l) > MaxLabels {
		return invalid("%d labels, more than %d", len(l), MaxLabels)
	}
	for i, e := range l {
		if e.Key == "" || len(e.Key) > MaxNameLength {
			return invalid("label key %q must have 1 to %d bytes", e.Key, MaxNameLength)
		}
		if len(e.Value) > MaxTextLength {
			return invalid("label %s has %d bytes, more than %d", e.Key, len(e.Value), MaxTextLength)
		}
		if i > 0 && strings.Compare(l[i-1].Key, e.Key) >= 0 {
			return invalid("labels are not sorted at %q", e.Key)
		}
	}
	return nil
}

// checkName checks [A-Za-z0-9][A-Za-z0-9_.-]{0,127}.
func checkName(what, name string) error {
	ok := name != "" && len(name) <= MaxNameLength
	for i := 0; ok && i < len(name); i++ {
		c := name[i]
		alnum := 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || '0' <= c && c <= '9'
		ok = alnum || i > 0 && (c == '_' || c == '.' || c == '-')
	}
	if !ok {
		return holdfast.Errorf(holdfast.ErrInvalid, "%q is not a %s name", name, what).
			WithRemedy("use 1 to %d letters, digits, '_', '.' or '-', the first a letter or digit", MaxNameLength)
	}
	return nil
}
