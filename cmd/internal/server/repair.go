package server

import (
	"context"
	"fmt"
	"time"

	"github.com/holdfast-storage/holdfast"
	"github.com/holdfast-storage/holdfast/cmd/internal/api"
	"github.com/holdfast-storage/holdfast/cmd/internal/api/apipb"
	"github.com/holdfast-storage/holdfast/cmd/internal/reconcile"
	"github.com/holdfast-storage/holdfast/raftstore/state"
)

// writer is the node that knows most of a volume: its holder, or the one that
// repairs it; zero if there is neither.
func writer(v *state.Volume) holdfast.NodeID {
	if v.UnderRepair() {
		return v.Repair.Holder.Node
	}
	return v.Holder.Node
}

// writerCall is holderCall, to the node that repairs if there is one.
func (s *Server) writerCall(ctx context.Context, v *state.Volume, call func(context.Context, *api.Client) error) (done bool, err error) {
	if !v.HasWriter() {
		return false, nil
	}
	return s.nodeCall(ctx, writer(v), call)
}

// repairing is how the repair of a volume stands, if it runs here.
func (s *Server) repairing(v *state.Volume) (reconcile.Repairing, bool) {
	r, ok := s.o.Attachments.Repair(v.ID)
	return r, ok && v.UnderRepair() && r.Epoch == v.Epoch
}

// repair is what there is to tell of a volume's repair, nil if nothing is.
func (s *Server) repair(v *state.Volume) *apipb.Repair {
	if v.Repair == (state.Repair{}) {
		return nil
	}
	out := &apipb.Repair{Tries: v.Repair.Tries, Why: v.Repair.Why}
	if v.Repair.Since > 0 {
		out.SinceMillis = max(0, time.Since(time.Unix(v.Repair.Since, 0)).Milliseconds())
	}
	if v.UnderRepair() {
		out.Node = s.nodeName(v.Repair.Holder.Node)
	}
	if r, ok := s.repairing(v); ok {
		out.WaitsFor = "its replicas to be filled"
		for _, seg := range r.Status.Segments {
			for _, w := range seg.Waits {
				out.WaitsFor = w.For
			}
		}
	}
	return out
}

// repairLine says it in words.
func repairLine(r *apipb.Repair) string {
	if r == nil {
		return ""
	}
	long := (time.Duration(r.SinceMillis) * time.Millisecond).Round(time.Second)
	line := fmt.Sprintf("repair: none runs, for %v", long)
	if r.Node != "" {
		line = fmt.Sprintf("repair: node %s fills its replicas, for %v", r.Node, long)
	}
	if r.WaitsFor != "" {
		line += "; it waits for " + r.WaitsFor
	}
	if r.Tries > 1 || r.Node == "" {
		line += fmt.Sprintf("; tries so far: %d", r.Tries)
	}
	if r.Why != "" {
		line += "; the last one ended: " + r.Why
	}
	return line
}
