package replica

import (
	"errors"
	"slices"

	"github.com/holdfast-storage/holdfast"
)

// install takes one chunk of a copy under the conditions of R11.
func (c *Core) install(e Install) {
	if !c.admit(e.Conn, e.Epoch) || !c.st.Syncing || !c.sess.joined {
		c.do(Drop{Batch: e.Batch})
		return
	}
	floor := max(c.sess.joinAt, c.st.Checkpoint)
	if Mutant == "install_below_ckpt" {
		floor = c.sess.joinAt
	}
	if Mutant == "no_asof_floor" {
		floor = 0
	}
	if e.AsOf < floor || e.AsOf > c.commitGot && Mutant != "asof_any" {
		c.do(SendInstalled{Conn: e.Conn, Batch: e.Batch, AsOf: e.AsOf, Retry: true})
		c.do(Drop{Batch: e.Batch})
		return
	}
	c.other++
	c.installs = append(c.installs, installing{session: c.sess.number, batch: e.Batch, asOf: e.AsOf})
	c.do(LogInstall{Batch: e.Batch, AsOf: e.AsOf})
}

// takeOut removes what is under way as a batch.
func takeOut(list *[]installing, b Batch) (installing, bool) {
	i := slices.IndexFunc(*list, func(in installing) bool { return in.batch == b })
	if i < 0 {
		return installing{}, false
	}
	in := (*list)[i]
	*list = slices.Delete(*list, i, i+1)
	return in, true
}

func (c *Core) installed(e Installed) {
	in, ok := takeOut(&c.installs, e.Batch)
	if !ok {
		return
	}
	c.other--
	retry := errors.Is(e.Err, holdfast.ErrRefused) // the checkpoint moved meanwhile
	if e.Err != nil && !retry {
		c.fail(e.Err)
		return
	}
	if in.session != c.sess.number || c.sess.step != stepOpen {
		return
	}
	if !retry {
		c.sess.maxV = max(c.sess.maxV, in.asOf)
	}
	c.do(SendInstalled{Conn: c.sess.conn, Batch: in.batch, AsOf: in.asOf, Retry: retry})
}

func (c *Core) wholeDone(e WholeDone) {
	if !c.wholeBusy {
		return
	}
	c.wholeBusy = false
	c.other--
	if e.Err != nil {
		c.fail(e.Err)
		return
	}
	c.st.Syncing, c.st.Damaged, c.st.Lost = false, false, 0
	c.st.Held = 0
	c.st.Dur = max(c.st.Dur, c.wholeTail)
	if c.sess.step == stepOpen && c.sess.joined {
		c.do(SendWhole{Conn: c.sess.conn, Epoch: c.sess.epoch, Dur: c.st.Dur})
	}
}

func (c *Core) fetch(e Fetch) {
	if !c.admit(e.Conn, e.Epoch) || len(c.fetches) == maxWaiters {
		c.do(DropRead{Conn: e.Conn, ID: e.ID})
		return
	}
	if e.Chunks && e.To > c.st.Applied && Mutant != "list_before_applied" {
		c.fetches = append(c.fetches, fetching{conn: e.Conn, id: e.ID, need: e.To})
		return
	}
	c.do(LogFetch{Conn: e.Conn, ID: e.ID})
}

func (c *Core) appliedTo(e AppliedTo) {
	if c.rebasing {
		return // it may speak of the base before or after the rebase
	}
	c.st.Applied = max(c.st.Applied, e.Applied)
	c.st.Checkpoint = max(c.st.Checkpoint, e.Checkpoint)
	kept := c.fetches[:0]
	for _, f := range c.fetches {
		if f.need <= c.st.Applied {
			c.do(LogFetch{Conn: f.conn, ID: f.id})
		} else {
			kept = append(kept, f)
		}
	}
	c.fetches = kept
	// The log is never cut below what is applied: the start that covers it is enough.
	starts := c.st.EpochStarts
	n := 0
	for n+1 < len(starts) && starts[n+1].First <= c.st.Applied {
		n++
	}
	c.st.EpochStarts = append(starts[:0], starts[n:]...)
}
