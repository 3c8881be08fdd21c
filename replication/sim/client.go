package sim

import (
	"errors"
	"time"

	"github.com/holdfast-storage/holdfast"
	"github.com/holdfast-storage/holdfast/replication/coordinator"
)

type opKind uint8

const (
	opWrite opKind = iota + 1
	opRead
	opFlush
)

// depth is how many writes and flushes, and how many reads, a client keeps in
// flight: writes that are held do not keep it from reading.
const depth = 5

// client sends requests to an active writer until it ends.
func (wr *writer) client() {
	if !wr.active || wr.ended || wr.detaching {
		return
	}
	w := wr.node.w
	if w.healing {
		w.ctl.finalReads(wr)
		return
	}
	n := 1
	if w.chance(0.05) {
		n = depth
	}
	for ; n > 0; n-- {
		o := &op{wr: wr}
		switch p := w.rng.Float64(); {
		case p < w.rates.reads:
			o.kind = opRead
		case p < w.rates.reads+w.rates.flushes:
			o.kind = opFlush
		default:
			o.kind = opWrite
			o.fua = w.chance(0.05)
		}
		o.m.n = 1 + w.rng.Intn(3)
		o.m.first = w.rng.Intn(blocks - o.m.n + 1)
		if w.chance(0.5) {
			o.m.first, o.m.n = w.rng.Intn(2), 1 // a busy place
		}
		if w.focus >= 0 && o.kind == opWrite {
			o.m.n = 1 + w.rng.Intn(blocksPerChunk)
			o.m.first = w.focus*blocksPerChunk + w.rng.Intn(blocksPerChunk-o.m.n+1)
		}
		if o.kind == opRead && wr.reading < depth || o.kind != opRead && wr.writing < depth {
			wr.request(o)
		}
	}
	wr.node.after(w.between(time.Millisecond, w.rates.think), wr.client)
}

func (wr *writer) request(o *op) {
	w := wr.node.w
	w.ctl.ops++
	o.id = coordinator.OpID(w.ctl.ops)
	wr.pending[o.id] = o
	wr.count(o, 1)
	w.check.invoke(o)
	offset, length := int64(o.m.first)*holdfast.BlockSize, int64(o.m.n)*holdfast.BlockSize
	switch o.kind {
	case opWrite:
		kind := coordinator.OpWrite
		if o.m.v%7 == 0 {
			kind = coordinator.OpTrim // a model's trim is a write like any other
		}
		wr.step(coordinator.Write{ID: o.id, Kind: kind, Offset: offset, Length: length, FUA: o.fua})
	case opRead:
		wr.step(coordinator.Read{ID: o.id, Offset: offset, Length: length})
	case opFlush:
		wr.step(coordinator.Flush{ID: o.id})
	}
}

func (wr *writer) count(o *op, n int) {
	if o.kind == opRead {
		wr.reading += n
	} else {
		wr.writing += n
	}
}

func (wr *writer) complete(id coordinator.OpID, err error) {
	o := wr.pending[id]
	if o == nil {
		wr.node.w.check.fail("request %d was completed twice", id)
		return
	}
	delete(wr.pending, id)
	wr.count(o, -1)
	if err == nil {
		wr.node.w.check.done(o)
		wr.node.w.strike(0.01)
	}
	if o.kind == opRead && errors.Is(err, holdfast.ErrIntegrity) {
		wr.node.w.cover("read ends with EIO")
	}
	wr.node.w.ctl.completed(wr, o, err)
}
