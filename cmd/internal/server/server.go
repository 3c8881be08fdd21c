package server

import (
	"context"
	"errors"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"

	"github.com/holdfast-storage/holdfast"
	"github.com/holdfast-storage/holdfast/blockdev/mount"
	"github.com/holdfast-storage/holdfast/cmd/internal/api"
	"github.com/holdfast-storage/holdfast/cmd/internal/api/apipb"
	"github.com/holdfast-storage/holdfast/cmd/internal/controller"
	"github.com/holdfast-storage/holdfast/cmd/internal/reconcile"
	"github.com/holdfast-storage/holdfast/raftstore/state"
	"github.com/holdfast-storage/holdfast/replication/serve"
)

// Options are what the server answers from.
type Options struct {
	Cluster     reconcile.Cluster
	Attachments *reconcile.Attachments
	Disks       *reconcile.Disks
	Serve       *serve.Server
	Node        holdfast.NodeID
	Rebuilds    *controller.Controller
	// Leader names the raft leader, if one is known.
	Leader   func() (holdfast.NodeID, bool)
	Version  string
	Warnings []string // for status, the first line first
	Off      []string // what needs privilege and is missing
	Logger   *slog.Logger
}

// Server implements apipb.HoldfastServer, and plugin.Volumes by way of Volumes.
type Server struct {
	apipb.UnimplementedHoldfastServer
	ready chan struct{} // closed by Start; o is set before
	o     Options
	// starting says what a start waits for. May be nil.
	starting func() string
}

// New returns a server that refuses every call until Start, since peers must
// reach a node's listener before it has anything to tell its users. starting says
// then what the node waits for; nil, or an empty text: nothing is known.
func New(starting func() string) *Server {
	return &Server{ready: make(chan struct{}), starting: starting}
}

// Start gives the server what it answers from. Once.
func (s *Server) Start(o Options) {
	s.o = o
	close(s.ready)
}

// Register adds the service to a gRPC server made with Interceptors.
func (s *Server) Register(g *grpc.Server) { apipb.RegisterHoldfastServer(g, s) }

// Interceptors refuse calls of this service before Start, and give every error
// its kind's code and details.
func (s *Server) Interceptors() []grpc.ServerOption {
	started := func(method string) error {
		select {
		case <-s.ready:
			return nil
		default:
		}
		if !strings.HasPrefix(method, "/"+apipb.Holdfast_ServiceDesc.ServiceName+"/") {
			return nil
		}
		message := "this node is starting"
		if s.starting != nil {
			if waits := s.starting(); waits != "" {
				message += ": " + waits
			}
		}
		return holdfast.Errorf(holdfast.ErrUnavailable, "%s", message).WithRemedy("ask again, or wait with holdfast status --wait 60s")
	}
	return []grpc.ServerOption{
		grpc.ChainUnaryInterceptor(func(ctx context.Context, req any, info *grpc.UnaryServerInfo, handle grpc.UnaryHandler) (any, error) {
			if err := started(info.FullMethod); err != nil {
				return nil, api.ToStatus(err)
			}
			resp, err := handle(ctx, req)
			return resp, api.ToStatus(err)
		}),
		grpc.ChainStreamInterceptor(func(srv any, stream grpc.ServerStream, info *grpc.StreamServerInfo, handle grpc.StreamHandler) error {
			if err := started(info.FullMethod); err != nil {
				return api.ToStatus(err)
			}
			return api.ToStatus(handle(srv, stream))
		}),
	}
}

// forwardedKey marks a call that another node forwarded, so that none goes in a
// circle.
const forwardedKey = "holdfast-forwarded"

func forwarded(ctx context.Context) bool {
	md, ok := metadata.FromIncomingContext(ctx)
	return ok && len(md.Get(forwardedKey)) > 0
}

// holderCall runs call against the node that holds a volume, if that is another
// live one and this call was not forwarded itself. done is false if the caller
// must answer from here.
func (s *Server) holderCall(ctx context.Context, v *state.Volume, call func(context.Context, *api.Client) error) (done bool, err error) {
	if v.Phase == state.PhaseDetached {
		return false, nil
	}
	return s.nodeCall(ctx, v.Holder.Node, call)
}

// nodeCall is holderCall for a node.
func (s *Server) nodeCall(ctx context.Context, node holdfast.NodeID, call func(context.Context, *api.Client) error) (done bool, err error) {
	if node == s.o.Node || forwarded(ctx) {
		return false, nil
	}
	n, ok := s.o.Cluster.View().Node(node)
	if !ok || n.Removed || s.o.Cluster.Gone(n.ID) {
		return false, nil
	}
	client, err := api.Dial(n.Addresses.API)
	if err != nil {
		return false, err
	}
	defer client.Close()
	return true, call(metadata.AppendToOutgoingContext(ctx, forwardedKey, "1"), client)
}

// CreateVolume implements apipb.HoldfastServer.
func (s *Server) CreateVolume(ctx context.Context, req *apipb.CreateVolumeRequest) (*apipb.Volume, error) {
	v, created, err := s.create(ctx, req.Name, req.Options)
	if err != nil {
		return nil, err
	}
	if !created {
		return nil, holdfast.Errorf(holdfast.ErrExists, "volume %s exists", req.Name).WithRemedy("choose another name, or see holdfast volume inspect %s", req.Name)
	}
	return s.volume(s.o.Cluster.View(), v), nil
}

// create makes a volume, or finds one of the same name and the same options.
// One with other options is ErrExists.
func (s *Server) create(ctx context.Context, name string, raw map[string]string) (v *state.Volume, created bool, err error) {
	if err := holdfast.CheckVolumeName(name); err != nil {
		return nil, false, err
	}
	given, err := holdfast.ParseOptions(raw)
	if err != nil {
		return nil, false, err
	}
	if err := mount.CheckVolume(given.FileSystem, given.MkfsOptions, given.MountOptions); err != nil {
		return nil, false, err
	}
	for {
		view, err := s.o.Cluster.Read(ctx)
		if err != nil {
			return nil, false, err
		}
		if have, ok := view.VolumeByName(name); ok {
			if diff := differs(have, given); diff != "" {
				return nil, false, holdfast.Errorf(holdfast.ErrExists, "volume %s exists with another %s", name, diff).WithRemedy("choose another name, or see holdfast volume inspect %s", name)
			}
			return have, false, nil
		}
		cmd, err := s.plan(view, name, given)
		if err != nil {
			return nil, false, err
		}
		res, err := s.o.Cluster.Propose(ctx, cmd)
		switch {
		case errors.Is(err, holdfast.ErrExists), errors.Is(err, state.ReasonStaleRevision):
			continue // another create came between
		case err != nil:
			return nil, false, err
		}
		s.o.Logger.Info("volume created", "volume", name, "size", cmd.Size, "replicas", cmd.Options.Replicas)
		return res.Volume, true, nil
	}
}

// plan turns options into the command that makes the volume.
func (s *Server) plan(view *state.View, name string, given holdfast.VolumeOptions) (*state.CreateVolume, error) {
	if nodesWithDisks(view, "") == 0 {
		return nil, holdfast.Errorf(holdfast.ErrUnavailable, "no node has a disk").WithRemedy("start a node with --disk")
	}
	nodes, of := nodesWithDisks(view, given.Pool), ""
	if given.Pool != "" {
		of = " of pool " + given.Pool
	}
	o := given.WithDefaults(nodes)
	if nodes == 0 {
		return nil, holdfast.Errorf(holdfast.ErrRefused, "no disk is%s", of).WithRemedy("the pools are %s; see holdfast disk ls", strings.Join(pools(view), ", "))
	}
	if o.Replicas > nodes {
		return nil, holdfast.Errorf(holdfast.ErrRefused, "%d replicas need as many nodes with disks%s; there are %d", o.Replicas, of, nodes).WithRemedy("ask for at most %d, or add nodes", nodes)
	}
	if o.MinCopies > o.Replicas {
		return nil, holdfast.Errorf(holdfast.ErrInvalid, "min_copies=%d is more than the volume's %d replicas", o.MinCopies, o.Replicas).WithRemedy("ask for more replicas, or fewer min_copies")
	}
	hold, err := holdfast.HoldTime(o.OnQuorumLoss)
	if err != nil {
		return nil, err
	}
	options := state.VolumeOptions{Replicas: o.Replicas, FS: o.FileSystem, Mkfs: o.MkfsOptions, MountOptions: o.MountOptions,
		SegmentSize: o.SegmentSize, AckMode: holdfast.AckReceived, MinCopies: o.MinCopies, FailHeldAfter: int64(hold.Seconds()), PingsOnly: o.ReadPromises == holdfast.PromisesOff, Pool: o.Pool}
	placement, err := state.Place(view, state.PlaceRequest{Size: o.Size, SegmentSize: options.SegmentSize, Replicas: o.Replicas, Pool: o.Pool,
		Avoid: s.goneNodes(view), NewReplica: holdfast.NewID[holdfast.ReplicaID]})
	if err != nil {
		return nil, err
	}
	return &state.CreateVolume{Volume: holdfast.NewID[holdfast.VolumeID](), Name: name, Size: o.Size, Options: options,
		Labels: state.LabelsOf(o.Labels), Lineage: holdfast.NewID[holdfast.LineageID](), Created: time.Now().Unix(), Placement: placement}, nil
}

func (s *Server) goneNodes(view *state.View) []holdfast.NodeID {
	var gone []holdfast.NodeID
	for n := range view.Nodes() {
		if n.ID != s.o.Node && s.o.Cluster.Gone(n.ID) {
			gone = append(gone, n.ID)
		}
	}
	return gone
}

// nodesWithDisks counts the nodes with a usable disk of a pool, "" for any.
func nodesWithDisks(view *state.View, pool string) int {
	nodes := map[holdfast.NodeID]bool{}
	for d := range view.Disks() {
		if n, ok := view.Node(d.Node); ok && !n.Removed && d.Usable() && (pool == "" || pool == d.Pool) {
			nodes[d.Node] = true
		}
	}
	return len(nodes)
}

// pools are the names of all pools, sorted.
func pools(view *state.View) []string {
	names := map[string]bool{}
	for d := range view.Disks() {
		if d.Pool != "" {
			names[d.Pool] = true
		}
	}
	return slices.Sorted(maps.Keys(names))
}

// differs names an option that was given and is not what the volume has.
func differs(v *state.Volume, given holdfast.VolumeOptions) string {
	switch {
	case given.Size != 0 && given.Size != v.Size:
		return "size"
	case given.Replicas != 0 && given.Replicas != v.Options.Replicas:
		return "number of replicas"
	case given.FileSystem != "" && given.FileSystem != v.Options.FS:
		return "file system"
	case given.MkfsOptions != "" && given.MkfsOptions != v.Options.Mkfs:
		return "mkfs option"
	case given.MinCopies != 0 && given.MinCopies != v.Options.MinCopies:
		return "min_copies"
	case given.OnQuorumLoss != "" && given.OnQuorumLoss != holdfast.HoldPolicy(time.Duration(v.Options.FailHeldAfter)*time.Second):
		return "on_quorum_loss"
	case given.ReadPromises != "" && (given.ReadPromises == holdfast.PromisesOff) != v.Options.PingsOnly:
		return "read_promises"
	case given.SegmentSize != 0 && given.SegmentSize != v.Options.SegmentSize:
		return "segment_size"
	case given.Pool != "" && given.Pool != v.Options.Pool:
		return "pool"
	case given.MountOptions != "" && given.MountOptions != v.Options.MountOptions:
		return "mount option"
	}
	for k, want := range given.Labels {
		if v.Labels.Get(k) != want {
			return "label " + k
		}
	}
	return ""
}

// RemoveVolume implements apipb.HoldfastServer.
func (s *Server) RemoveVolume(ctx context.Context, req *apipb.VolumeRequest) (*apipb.RemoveVolumeResponse, error) {
	if _, err := s.o.Cluster.Read(ctx); err != nil { // the name may be another volume's by now
		return nil, err
	}
	v, err := s.o.Attachments.Find(ctx, req.Name)
	if err != nil {
		return nil, err
	}
	if _, err := s.o.Cluster.Propose(ctx, &state.DeleteVolume{Volume: v.ID}); err != nil {
		if errors.Is(err, state.ReasonHeld) {
			return nil, holdfast.Errorf(holdfast.ErrRefused, "%w", err).WithRemedy("detach it first: holdfast volume detach %s", v.Name)
		}
		return nil, err
	}
	s.o.Logger.Info("volume removed", "volume", v.Name)
	return &apipb.RemoveVolumeResponse{Id: v.ID.String()}, nil
}

// AttachVolume implements apipb.HoldfastServer.
func (s *Server) AttachVolume(req *apipb.AttachVolumeRequest, stream grpc.ServerStreamingServer[apipb.AttachProgress]) error {
	ctx, cancel := context.WithTimeout(stream.Context(), max(time.Duration(req.WaitMillis)*time.Millisecond, minAttachWait))
	defer cancel()
	held, err := s.o.Attachments.Attach(ctx, req.Name, reconcile.AttachOptions{NBD: req.Nbd, Device: !req.Nbd, Force: req.Force,
		Waiting: func(what string) { _ = stream.Send(&apipb.AttachProgress{Waiting: what}) }}) // a lost client shows in the context
	if err != nil {
		return err
	}
	name := req.Name
	if v, err := s.o.Attachments.Find(ctx, req.Name); err == nil {
		name = v.Name
	}
	return stream.Send(&apipb.AttachProgress{Attachment: &apipb.Attachment{
		Volume: name, Node: s.nodeName(s.o.Node), Epoch: uint64(held.Epoch), Device: held.Device, Uri: held.URI,
	}})
}

// minAttachWait is what an attach that meets no obstacle takes at most: fences
// wait one promise length on nodes that have just started.
const minAttachWait = 10 * time.Second

// DetachVolume implements apipb.HoldfastServer.
func (s *Server) DetachVolume(ctx context.Context, req *apipb.DetachVolumeRequest) (*apipb.DetachVolumeResponse, error) {
	if _, err := s.o.Cluster.Read(ctx); err != nil { // the local view may not yet show an attach
		return nil, err
	}
	v, err := s.o.Attachments.Find(ctx, req.Name)
	if err != nil {
		return nil, err
	}
	var resp *apipb.DetachVolumeResponse
	done, err := s.holderCall(ctx, v, func(ctx context.Context, c *api.Client) (err error) {
		resp, err = c.DetachVolume(ctx, req)
		return err
	})
	if done || err != nil {
		return resp, err
	}
	if v.Phase == state.PhaseDetached {
		return &apipb.DetachVolumeResponse{}, nil
	}
	if v.Holder.Node != s.o.Node {
		return nil, holdfast.Errorf(holdfast.ErrUnavailable, "volume %s is held by node %s, which does not answer", v.Name, s.nodeName(v.Holder.Node)).
			WithRemedy("attach it on another node: that takes it over once the node is gone")
	}
	if err := s.o.Attachments.Detach(ctx, v.ID, req.Force); err != nil {
		return nil, err
	}
	return &apipb.DetachVolumeResponse{Node: s.nodeName(s.o.Node)}, nil
}

func (s *Server) nodeName(id holdfast.NodeID) string {
	if n, ok := s.o.Cluster.View().Node(id); ok {
		return n.Name
	}
	return id.String()
}
