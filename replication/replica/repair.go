package replica

import (
	"errors"

	"github.com/holdfast-storage/holdfast"
)

// repair takes blocks for bad ones. Where they come as a whole chunk, this copy
// counts as filled up to AsOf: so it must have all of that logged, and nothing
// may be cut of it later (R11: at most commit). A copy that is being filled gets
// its chunks by INSTALL.
func (c *Core) repair(e Repair) {
	if !c.admit(e.Conn, e.Epoch) {
		c.do(Drop{Batch: e.Batch})
		return
	}
	late := e.AsOf > min(c.commitGot, c.st.Tail)
	if Mutant == "repair_without_asof" {
		late = false
	}
	if late || c.st.Syncing || c.st.Damaged {
		c.do(SendRepaired{Conn: e.Conn, Batch: e.Batch, AsOf: e.AsOf, Retry: true})
		c.do(Drop{Batch: e.Batch})
		return
	}
	c.other++
	c.repairs = append(c.repairs, installing{session: c.sess.number, batch: e.Batch, asOf: e.AsOf})
	c.do(LogRepair{Batch: e.Batch, AsOf: e.AsOf})
}

func (c *Core) repaired(e Repaired) {
	r, ok := takeOut(&c.repairs, e.Batch)
	if !ok {
		return
	}
	c.other--
	retry := errors.Is(e.Err, holdfast.ErrRefused) || errors.Is(e.Err, holdfast.ErrIntegrity)
	if e.Err != nil && !retry {
		c.fail(e.Err)
		return
	}
	if r.session == c.sess.number && c.sess.step == stepOpen {
		c.do(SendRepaired{Conn: c.sess.conn, Batch: r.batch, AsOf: r.asOf, Retry: retry})
	}
}
