package server

import (
	"cmp"
	"context"
	"slices"
	"time"

	"github.com/holdfast-storage/holdfast"
	"github.com/holdfast-storage/holdfast/cmd/internal/api/apipb"
	"github.com/holdfast-storage/holdfast/plugin"
)

// Volumes is what this node offers to a volume driver.
type Volumes struct{ s *Server }

var _ plugin.Volumes = Volumes{}

// Volumes returns the driver's side of the server.
func (s *Server) Volumes() Volumes { return Volumes{s} }

// Create implements plugin.Volumes.
func (v Volumes) Create(ctx context.Context, name string, opts map[string]string) error {
	_, _, err := v.s.create(ctx, name, opts)
	return err
}

// Remove implements plugin.Volumes.
func (v Volumes) Remove(ctx context.Context, name string) error {
	_, err := v.s.RemoveVolume(ctx, &apipb.VolumeRequest{Name: name})
	if holdfast.KindOf(err) == holdfast.ErrNotFound {
		return nil
	}
	return err
}

// Get implements plugin.Volumes: from the local view alone.
func (v Volumes) Get(name string) (plugin.Volume, error) {
	view := v.s.o.Cluster.View()
	vol, ok := view.VolumeByName(name)
	if !ok {
		return plugin.Volume{}, holdfast.Errorf(holdfast.ErrNotFound, "no volume %q", name)
	}
	return v.describe(v.s.volume(view, vol), vol.Created), nil
}

// List implements plugin.Volumes: from the local view alone.
func (v Volumes) List() ([]plugin.Volume, error) {
	view := v.s.o.Cluster.View()
	var list []plugin.Volume
	for vol := range view.Volumes() {
		list = append(list, v.describe(v.s.volume(view, vol), vol.Created))
	}
	slices.SortFunc(list, func(a, b plugin.Volume) int { return cmp.Compare(a.Name, b.Name) })
	return list, nil
}

func (v Volumes) describe(a *apipb.Volume, created int64) plugin.Volume {
	replicas := make([]map[string]any, 0, len(a.Replicas))
	for _, r := range a.Replicas {
		replicas = append(replicas, map[string]any{"node": r.Node, "state": r.State})
	}
	return plugin.Volume{
		Name: a.Name, Mountpoint: a.Mountpoint, CreatedAt: time.Unix(created, 0).UTC(),
		Status: map[string]any{
			"size": a.Size, "used": a.Used, "state": a.State, "node": a.Node, "epoch": a.Epoch,
			"replicas": replicas, "mounts": a.Mounts, "fs": a.Fs,
		},
	}
}

// Path implements plugin.Volumes.
func (v Volumes) Path(name string) string { return v.s.o.Attachments.Path(name) }

// Mount implements plugin.Volumes.
func (v Volumes) Mount(ctx context.Context, name, id string) (string, error) {
	return v.s.o.Attachments.Mount(ctx, name, id, nil)
}

// Unmount implements plugin.Volumes.
func (v Volumes) Unmount(ctx context.Context, name, id string) error {
	return v.s.o.Attachments.Unmount(ctx, name, id)
}
