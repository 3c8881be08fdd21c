// Package reconcile brings this node to what the metadata says: its disks hold
// the replicas that raft placed on them (Disks), and the volumes it holds are
// attached, exported and mounted (Attachments).
//
// Desired state, not commands: each part watches the metadata and acts on the
// difference. What a user asks of this node, attach, detach, mount, unmount,
// goes through Attachments too, one at a time for each volume.
package reconcile
