package coordinator

// mayLeave says whether a member that is to go (its volume has more copies than
// asked for, or its node is drained) can be taken out of the in-sync set now: so
// many others that stay are in sync and healthy as the volume demands. It goes the
// way of every eviction, through raft first (R2).
func (c *Core) mayLeave(m *member) bool {
	if !m.Leaving || !m.inISR || !m.inAckset {
		return false
	}
	staying := 0
	for _, o := range c.members {
		if o != m && !o.Leaving && o.inISR && o.inAckset && o.streaming() && !o.suspect && !o.evicting && !o.hard {
			staying++
		}
	}
	return staying >= max(1, c.opt.MinCopies)
}
