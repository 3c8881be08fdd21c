package controller

import (
	"bytes"
	"cmp"
	"slices"
	"time"

	"github.com/holdfast-storage/holdfast"
	"github.com/holdfast-storage/holdfast/raftstore/state"
)

const (
	// MaxRepairs is how many detached volumes one node repairs at a time: what it
	// sends comes from the disks that serve its users.
	MaxRepairs = 2
	// settle is how long a volume is detached before it is repaired: one that moves
	// from node to node is attached again at once, and would only be fenced twice.
	settle = 5 * time.Second
	// firstPause follows the first repair that got nothing done; it doubles up to
	// maxPause. There is no last one: what stood in the way may be gone tomorrow.
	firstPause = 10 * time.Second
	maxPause   = time.Hour
)

// pause is how long a detached volume is left alone before a repair, after so many
// tries.
func pause(tries uint32) time.Duration {
	if tries == 0 {
		return settle
	}
	return min(maxPause, firstPause<<min(tries-1, 16))
}

// volume is a volume with its segments as the planner sees them.
type volume struct {
	*state.Volume
	segments []*segment
	moved    bool // something is proposed for it: the next round sees how it stands
}

// worst is the fewest in-sync replicas that answer of a segment.
func (v *volume) worst() int {
	n := state.MaxReplicas + 1
	for _, s := range v.segments {
		n = min(n, s.reachable)
	}
	return n
}

// abandoned says whether the node that repairs a volume does not, by what is known
// of it: it is gone, or another process runs there now.
func (p *planner) abandoned(v *state.Volume) bool {
	n, ok := p.view.Node(v.Repair.Holder.Node)
	return !ok || n.Removed || n.Instance != v.Repair.Holder.Instance || p.s.Gone(n.ID)
}

// writes says whether somebody fills the replicas of a volume.
func (p *planner) writes(v *state.Volume) bool {
	return v.HasWriter() && (!v.UnderRepair() || !p.abandoned(v))
}

// repair has detached volumes repaired, those that are worst off first.
func (p *planner) repair(volumes []*volume) {
	for _, v := range volumes {
		if v.UnderRepair() && !p.abandoned(v.Volume) {
			p.repairs[v.Repair.Holder.Node]++
		}
	}
	slices.SortStableFunc(volumes, func(a, b *volume) int { return cmp.Compare(a.worst(), b.worst()) })
	for _, v := range volumes {
		if len(p.out) >= maxCommands {
			return
		}
		if v.Phase == state.PhaseDetached && !v.moved && !p.writes(v.Volume) {
			p.repairOne(v)
		}
	}
}

func (p *planner) repairOne(v *volume) {
	seg, targets := p.toFill(v)
	if len(targets) == 0 {
		if v.UnderRepair() {
			p.out = append(p.out, &state.EndRepair{Volume: v.ID, Epoch: v.Epoch, Since: p.s.Now})
		}
		return
	}
	if why := p.mustWait(v, targets); why != "" {
		p.block(seg, "%s", why)
		return
	}
	n, why := p.repairer(v)
	if n == nil {
		p.block(seg, "%s", why)
		return
	}
	p.repairs[n.ID]++
	for _, t := range targets {
		p.filling[t]++
	}
	p.out = append(p.out, &state.AttachBegin{Volume: v.ID, Node: n.ID, Instance: n.Instance, Expect: v.Epoch, Since: p.s.Now, Takeover: v.UnderRepair(), Maintenance: true})
}

// toFill returns the nodes with a replica that stays, is not in sync and could be,
// once for each, and the first segment with one.
func (p *planner) toFill(v *volume) (first holdfast.SegmentID, targets []holdfast.NodeID) {
	for _, s := range v.segments {
		for _, r := range s.good {
			if _, n := p.where(r); r.Role != holdfast.RoleInSync && !p.s.Gone(n.ID) {
				if len(targets) == 0 {
					first = s.id
				}
				targets = append(targets, n.ID)
			}
		}
	}
	return first, targets
}

// mustWait says what a repair waits for, "" if for nothing.
func (p *planner) mustWait(v *volume, targets []holdfast.NodeID) string {
	if !v.Clean() {
		return "somebody to attach the volume, who then repairs it: it was salvaged, or not detached in order"
	}
	for _, s := range v.segments {
		if s.reachable == 0 {
			return "a node with an in-sync replica: none answers"
		}
		// A writer starts without a member that is silent, and leaves it behind as
		// stale, although it holds all there is. That is right only for one whose
		// replica is to be replaced anyway.
		for _, r := range s.seg.Replicas {
			if _, n := p.where(r); r.Role == holdfast.RoleInSync && n != nil && !n.Removed && p.s.Gone(n.ID) && !replaced(n, p.s.Lost) {
				return "node " + n.Name + ", which is gone, to come back with its in-sync replica, or to be given up"
			}
		}
	}
	if left := p.s.Paused(v.Volume); left > 0 {
		if v.Repair.Tries == 0 {
			return "its repair, which begins in " + left.Round(time.Second).String()
		}
		return p.left(v) + "; the next try is in " + left.Round(time.Second).String() + ", or attach the volume"
	}
	for _, t := range targets {
		if p.filling[t] >= MaxRebuilds {
			return "node " + p.name(t) + ", which is filling " + count(MaxRebuilds, "other replica")
		}
	}
	return ""
}

// replaced says whether the replicas of a node that is gone are made anew elsewhere.
func replaced(n *state.Node, lost func(holdfast.NodeID) bool) bool {
	return n.Duty == state.DutyDraining || n.Duty != state.DutyMaintenance && lost(n.ID)
}

// left says how the last repair ended.
func (p *planner) left(v *volume) string {
	why := v.Repair.Why
	if v.UnderRepair() {
		why = "node " + p.name(v.Repair.Holder.Node) + ", which repaired it, is gone or was started anew"
	}
	return count(int(v.Repair.Tries), "repair") + " did not bring it into sync, the last one: " + why
}

// repairer chooses the node that repairs: one with an in-sync replica of it, with
// the fewest repairs, then with the most of its segments. Each try after one that
// failed goes to the next of those that are as good.
func (p *planner) repairer(v *volume) (*state.Node, string) {
	type candidate struct {
		*state.Node
		has int
	}
	var all []candidate
	for _, s := range v.segments {
		for _, r := range s.seg.Replicas {
			d, n := p.where(r)
			if r.Role != holdfast.RoleInSync || n == nil || n.Removed || d.State != holdfast.DiskOK || p.s.Gone(n.ID) || n.Duty == state.DutyMaintenance {
				continue
			}
			if i := slices.IndexFunc(all, func(c candidate) bool { return c.ID == n.ID }); i >= 0 {
				all[i].has++
			} else {
				all = append(all, candidate{n, 1})
			}
		}
	}
	if len(all) == 0 {
		return nil, "the end of the maintenance of every node that could repair it"
	}
	order := func(a, b candidate) int {
		return cmp.Or(cmp.Compare(p.repairs[a.ID], p.repairs[b.ID]), cmp.Compare(b.has, a.has))
	}
	slices.SortFunc(all, func(a, b candidate) int { return cmp.Or(order(a, b), bytes.Compare(a.ID[:], b.ID[:])) })
	if p.repairs[all[0].ID] >= MaxRepairs {
		return nil, "the nodes that could repair it, which are repairing " + count(MaxRepairs, "other volume") + " each"
	}
	same := 1
	for same < len(all) && order(all[0], all[same]) == 0 {
		same++
	}
	return all[int(v.Repair.Tries)%same].Node, ""
}

func (p *planner) name(id holdfast.NodeID) string {
	if n, ok := p.view.Node(id); ok {
		return n.Name
	}
	return id.String()
}
