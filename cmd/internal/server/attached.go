package server

import (
	"cmp"
	"context"
	"fmt"
	"slices"

	"github.com/holdfast-storage/holdfast/cmd/internal/api"
	"github.com/holdfast-storage/holdfast/cmd/internal/api/apipb"
	"github.com/holdfast-storage/holdfast/raftstore/state"
)

// nodeWithAttached describes a node with the volumes that it holds. Who uses them it is
// asked itself; of one that does not answer the rest is told.
func (s *Server) nodeWithAttached(ctx context.Context, view *state.View, n *state.Node) *apipb.Node {
	out := s.node(view, n)
	for v := range view.Volumes() {
		if v.Phase != state.PhaseDetached && v.Holder.Node == n.ID {
			out.Attached = append(out.Attached, &apipb.NodeAttachment{Volume: v.Name})
		}
	}
	slices.SortFunc(out.Attached, func(a, b *apipb.NodeAttachment) int { return cmp.Compare(a.Volume, b.Volume) })
	if n.ID == s.o.Node {
		s.addUsers(view, out.Attached)
	} else if len(out.Attached) > 0 {
		s.askUsers(ctx, n, out.Attached)
	}
	for _, a := range out.Attached {
		a.Remedy = toLeave(a)
	}
	return out
}

// addUsers says who uses volumes that are attached here.
func (s *Server) addUsers(view *state.View, attached []*apipb.NodeAttachment) {
	for _, a := range attached {
		v, ok := view.VolumeByName(a.Volume)
		if !ok {
			continue
		}
		held, _ := s.o.Attachments.Get(v.ID)
		a.Told, a.Mounts, a.Clients, a.Device = true, int32(len(s.o.Attachments.Users(v.Name))), int32(held.Clients), held.Device
	}
}

// askUsers asks a node who uses the volumes that it holds.
func (s *Server) askUsers(ctx context.Context, n *state.Node, attached []*apipb.NodeAttachment) {
	ctx, cancel := context.WithTimeout(ctx, askOthers)
	defer cancel()
	_, _ = s.nodeCall(ctx, n.ID, func(ctx context.Context, c *api.Client) error {
		told, err := c.InspectNode(ctx, &apipb.NodeRequest{Name: n.ID.String()})
		if err != nil {
			return err
		}
		of := map[string]*apipb.NodeAttachment{}
		for _, a := range told.Attached {
			of[a.Volume] = a
		}
		for _, a := range attached {
			if from := of[a.Volume]; from != nil {
				a.Told, a.Mounts, a.Clients, a.Device = from.Told, from.Mounts, from.Clients, from.Device
			}
		}
		return nil
	}) // who does not answer says nothing
}

// toLeave says what to do for a volume to leave the node that holds it.
func toLeave(a *apipb.NodeAttachment) string {
	const stop = "docker stop the containers that docker ps --filter volume=%s shows there"
	const detach = "holdfast volume detach %s"
	switch {
	case a.Mounts > 0 && a.Clients > 0:
		return fmt.Sprintf(stop+", end the NBD clients, then "+detach, a.Volume, a.Volume)
	case a.Mounts > 0:
		return fmt.Sprintf(stop, a.Volume)
	case a.Clients > 0:
		return fmt.Sprintf("end the NBD clients, then "+detach, a.Volume)
	case !a.Told:
		return fmt.Sprintf(stop+", if any, then "+detach, a.Volume, a.Volume)
	}
	return fmt.Sprintf(detach, a.Volume)
}
