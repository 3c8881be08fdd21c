package server

import (
	"context"
	"io"
	"log/slog"
	"net"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"google.golang.org/grpc"

	"github.com/holdfast-storage/holdfast"
	"github.com/holdfast-storage/holdfast/blockdev/nbd"
	"github.com/holdfast-storage/holdfast/blockdev/vfs"
	"github.com/holdfast-storage/holdfast/cmd/internal/api"
	"github.com/holdfast-storage/holdfast/cmd/internal/api/apipb"
	"github.com/holdfast-storage/holdfast/cmd/internal/controller"
	"github.com/holdfast-storage/holdfast/cmd/internal/reconcile"
	"github.com/holdfast-storage/holdfast/raftstore/state"
	"github.com/holdfast-storage/holdfast/replication/serve"
)

// register is raft reduced to the real tables and commands. It counts what it applied.
type register struct {
	mu      sync.Mutex
	view    *state.View
	index   uint64
	applied int
	gone    map[holdfast.NodeID]bool
	refuses error // by everything that asks the leader
}

func (r *register) View() *state.View {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.view
}

func (r *register) Read(context.Context) (*state.View, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.view, r.refuses
}

func (r *register) Propose(_ context.Context, cmd state.Command) (state.Result, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.refuses != nil {
		return state.Result{}, r.refuses
	}
	r.index++
	next, res, err := r.view.Apply(r.index, cmd)
	r.view = next
	if err == nil {
		r.applied++
	}
	return res, err
}

func (r *register) Changed() <-chan struct{}       { return nil }
func (r *register) Gone(node holdfast.NodeID) bool { return r.gone[node] }
func (r *register) Liveness(_ context.Context, h state.Holder) (reconcile.Liveness, error) {
	return reconcile.Liveness{Gone: r.gone[h.Node], Alive: !r.gone[h.Node], Why: "test"}, nil
}

func (r *register) done() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.applied
}

// world is a server over real parts, asked through its real API: node n1 with a disk
// in memory, n2 that does not answer yet is not gone, n3 that is gone.
type world struct {
	reg    *register
	fs     *vfs.Memory
	client *api.Client
	server *Server
	o      Options
	disks  [4]holdfast.DiskID // of n1, n2 and n3, by their numbers
}

func newWorld(t *testing.T) *world {
	t.Helper()
	log := slog.New(slog.DiscardHandler)
	tab := &tables{t: t, view: &state.View{}}
	tab.must(&state.InitCluster{ID: holdfast.ClusterID{1}, Level: holdfast.Level1})
	for n := range byte(3) {
		tab.must(&state.NodeJoin{Node: state.Node{ID: holdfast.NodeID{n + 1}, Name: "n" + string('1'+rune(n)), Instance: holdfast.InstanceID{n + 1}, HasDisks: true,
			Version: "test", MaxLevel: holdfast.Level1, Addresses: state.Addresses{API: "127.0.0.1:1", Data: "127.0.0.1:2", Raft: "127.0.0.1:3"}}})
	}
	w := &world{fs: vfs.NewMemory(1), reg: &register{view: tab.view, index: tab.index, gone: map[holdfast.NodeID]bool{{3}: true}}}
	self, inst := holdfast.NodeID{1}, holdfast.InstanceID{1}
	srv, err := serve.New(serve.Options{Cluster: holdfast.ClusterID{1}, Node: self, Instance: inst, Level: holdfast.Level1, PromiseLength: 1})
	if err != nil {
		t.Fatal(err)
	}
	disks := reconcile.NewDisks(reconcile.DisksOptions{Cluster: w.reg, Serve: srv, FS: w.fs, ID: holdfast.ClusterID{1}, Node: self, Instance: inst, ScrubEvery: -1, Logger: log})
	spec := reconcile.DiskSpec{Path: "/own.img", Size: 256 << 20, WAL: 16 << 20}
	if err := disks.Prepare(t.Context(), spec, false); err != nil {
		t.Fatal(err)
	}
	if err := disks.Open(t.Context(), spec); err != nil {
		t.Fatal(err)
	}
	exports, err := nbd.NewServer(nbd.Options{})
	if err != nil {
		t.Fatal(err)
	}
	att, err := reconcile.New(t.Context(), reconcile.Options{Cluster: w.reg, ID: holdfast.ClusterID{1}, Node: self, Instance: inst, Serve: srv, NBD: exports,
		Socket: "/nbd.sock", Replaced: func(holdfast.NodeID) bool { return false }, Record: filepath.Join(t.TempDir(), "attachments.json"), Logger: log})
	if err != nil {
		t.Fatal(err)
	}
	w.server = New(nil)
	g := grpc.NewServer(w.server.Interceptors()...)
	w.server.Register(g)
	socket := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Go(func() { _ = g.Serve(l) })
	if w.client, err = api.Dial("unix://" + socket); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		w.client.Close()
		g.Stop()
		wg.Wait()
		att.Close(context.Background())
		exports.Close()
		srv.Close()
		disks.Close()
	})
	w.o = Options{Cluster: w.reg, Attachments: att, Disks: disks, Serve: srv, Node: self, Logger: log,
		Rebuilds: controller.New(controller.Options{Cluster: w.reg, Leads: func() bool { return false }, Self: self}),
		Leader:   func() (holdfast.NodeID, bool) { return self, true }}
	w.disks[1] = disks.List()[0].Stat.Disk
	for n := byte(2); n <= 3; n++ {
		w.disks[n] = holdfast.DiskID{0xd0, n}
		w.must(t, &state.DiskOpen{Disk: w.disks[n], Node: holdfast.NodeID{n}, Instance: holdfast.InstanceID{n}, OpenCount: 1, Pool: "ssd", Size: 1 << 40, Free: 1 << 40})
	}
	w.volume(t, "one", 1)
	w.volume(t, "three", 1, 2, 3)
	return w
}

func (w *world) must(t *testing.T, cmd state.Command) state.Result {
	t.Helper()
	res, err := w.reg.Propose(t.Context(), cmd)
	if err != nil {
		t.Fatalf("%s: %v", state.Name(cmd), err)
	}
	return res
}

// volume makes one with a replica on each of some nodes.
func (w *world) volume(t *testing.T, name string, nodes ...int) *state.Volume {
	t.Helper()
	var p state.SegmentPlacement
	for _, n := range nodes {
		p = append(p, state.ReplicaPlacement{Replica: holdfast.NewID[holdfast.ReplicaID](), Disk: w.disks[n]})
	}
	return w.must(t, &state.CreateVolume{Volume: holdfast.NewID[holdfast.VolumeID](), Name: name, Size: 1 << 30, Lineage: holdfast.NewID[holdfast.LineageID](),
		Options: state.VolumeOptions{Replicas: len(nodes), FS: "ext4", SegmentSize: 64 << 30, AckMode: holdfast.AckReceived, MinCopies: 1}, Placement: []state.SegmentPlacement{p}}).Volume
}

// call is one call of the API with what must come of it.
type call struct {
	name string
	do   func(context.Context, *api.Client) error
	kind holdfast.Kind
	says string
}

// refusals makes every call; each must fail with its kind, naming what was wrong, and
// change nothing.
func (w *world) refusals(t *testing.T, calls []call) {
	t.Helper()
	for _, c := range calls {
		before := w.reg.done()
		err := c.do(t.Context(), w.client)
		if holdfast.KindOf(err) != c.kind || err == nil || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%s: got %v (%v), want %v with %q", c.name, err, holdfast.KindOf(err), c.kind, c.says)
		}
		if n := w.reg.done() - before; n != 0 {
			t.Errorf("%s: refused, and %d commands were applied", c.name, n)
		}
	}
}

func create(name string, options ...string) func(context.Context, *api.Client) error {
	return func(ctx context.Context, c *api.Client) error {
		_, err := c.CreateVolume(ctx, &apipb.CreateVolumeRequest{Name: name, Options: pairs(options)})
		return err
	}
}

func update(name string, options ...string) func(context.Context, *api.Client) error {
	return func(ctx context.Context, c *api.Client) error {
		_, err := c.UpdateVolume(ctx, &apipb.UpdateVolumeRequest{Name: name, Options: pairs(options)})
		return err
	}
}

func pairs(options []string) map[string]string {
	m := map[string]string{}
	for _, o := range options {
		k, v, _ := strings.Cut(o, "=")
		m[k] = v
	}
	return m
}

func attach(req *apipb.AttachVolumeRequest) func(context.Context, *api.Client) error {
	return func(ctx context.Context, c *api.Client) error {
		stream, err := c.AttachVolume(ctx, req)
		for err == nil {
			_, err = stream.Recv()
		}
		if err == io.EOF { //nolint:errorlint // as grpc promises
			return nil
		}
		return api.FromStatus(err)
	}
}

// ask drops a call's answer.
func ask[Q, A any](f func(*api.Client) func(context.Context, Q, ...grpc.CallOption) (A, error), q Q) func(context.Context, *api.Client) error {
	return func(ctx context.Context, c *api.Client) error {
		_, err := f(c)(ctx, q)
		return err
	}
}

func (w *world) addDisk(req *apipb.AddDiskRequest) func(context.Context, *api.Client) error {
	return func(ctx context.Context, c *api.Client) error {
		_, err := c.AddDisk(ctx, req)
		return err
	}
}

// TestBadVolumeCalls: names, sizes and options that cannot be.
func TestBadVolumeCalls(t *testing.T) {
	w := newWorld(t)
	w.server.Start(w.o)
	long := strings.Repeat("x", 129)
	type volumeCall = func(context.Context, *apipb.VolumeRequest, ...grpc.CallOption) (*apipb.Volume, error)
	calls := []call{
		{"create without a name", create(""), holdfast.ErrInvalid, "name"},
		{"create with a slash", create("a/b"), holdfast.ErrInvalid, `"a/b"`},
		{"create with a long name", create(long), holdfast.ErrInvalid, "128"},
		{"create with an unknown option", create("v", "colour=red"), holdfast.ErrInvalid, `"colour"`},
		{"create with an option twice", create("v", "size=1G", "SIZE=2G"), holdfast.ErrInvalid, "the same option"},
		{"create with a later option", create("v", "ec=4+2"), holdfast.ErrUnsupported, "not in this version"},
		{"create of 0 bytes", create("v", "size=0"), holdfast.ErrInvalid, "0"},
		{"create of no size", create("v", "size="), holdfast.ErrInvalid, "size"},
		{"create below 0", create("v", "size=-1G"), holdfast.ErrInvalid, "-1G"},
		{"create beyond numbers", create("v", "size=99999999999E"), holdfast.ErrInvalid, "99999999999E"},
		{"create with no replica", create("v", "replicas=0"), holdfast.ErrInvalid, "replicas"},
		{"create with more replicas than are ever", create("v", "replicas=8"), holdfast.ErrInvalid, "replicas"},
		{"create with more replicas than nodes", create("v", "replicas=4"), holdfast.ErrRefused, "there are 3"},
		{"create with more min_copies than replicas", create("v", "replicas=2", "min_copies=3"), holdfast.ErrInvalid, "min_copies=3"},
		{"create with an unknown file system", create("v", "fs=ntfs"), holdfast.ErrInvalid, "ntfs"},
		{"create with an unknown policy", create("v", "on_quorum_loss=panic"), holdfast.ErrInvalid, "panic"},
		{"create in no pool", create("v", "pool=tape"), holdfast.ErrRefused, "no disk is of pool tape"},
		{"create in a pool of too few", create("v", "pool=ssd", "replicas=3"), holdfast.ErrRefused, "of pool ssd; there are 2"},
		{"create again", create("one", "size=1G", "replicas=1"), holdfast.ErrExists, "one"},
		{"create again otherwise", create("one", "size=2G"), holdfast.ErrExists, "another size"},

		{"update nothing", update("one"), holdfast.ErrInvalid, "nothing to change"},
		{"update of none", update("none", "replicas=2"), holdfast.ErrNotFound, `"none"`},
		{"update what stays", update("one", "fs=xfs"), holdfast.ErrInvalid, "fs cannot be changed"},
		{"update what is unknown", update("one", "colour=red"), holdfast.ErrInvalid, `"colour"`},
		{"update to no replica", update("one", "replicas=0"), holdfast.ErrInvalid, "replicas"},
		{"update to more replicas than nodes", update("one", "replicas=5"), holdfast.ErrRefused, "there are 3"},
		{"update to more min_copies than replicas", update("one", "min_copies=2"), holdfast.ErrInvalid, "min_copies=2"},

		{"attach none", attach(&apipb.AttachVolumeRequest{Name: "none", Nbd: true}), holdfast.ErrNotFound, `"none"`},
		{"attach without a name", attach(&apipb.AttachVolumeRequest{Nbd: true}), holdfast.ErrNotFound, `""`},
		{"attach without devices", attach(&apipb.AttachVolumeRequest{Name: "one"}), holdfast.ErrRefused, "--nbd"},
		{"detach none", ask(func(c *api.Client) func(context.Context, *apipb.DetachVolumeRequest, ...grpc.CallOption) (*apipb.DetachVolumeResponse, error) {
			return c.DetachVolume
		}, &apipb.DetachVolumeRequest{Name: "none"}), holdfast.ErrNotFound, `"none"`},
		{"inspect none", ask(func(c *api.Client) volumeCall { return c.InspectVolume }, &apipb.VolumeRequest{Name: "none"}), holdfast.ErrNotFound, `"none"`},
		{"remove none", ask(func(c *api.Client) func(context.Context, *apipb.VolumeRequest, ...grpc.CallOption) (*apipb.RemoveVolumeResponse, error) {
			return c.RemoveVolume
		}, &apipb.VolumeRequest{Name: "none"}), holdfast.ErrNotFound, `"none"`},
		{"explain none", ask(func(c *api.Client) func(context.Context, *apipb.VolumeRequest, ...grpc.CallOption) (*apipb.Explanation, error) {
			return c.ExplainVolume
		}, &apipb.VolumeRequest{Name: "none"}), holdfast.ErrNotFound, `"none"`},
	}
	for _, c := range []struct {
		name string
		req  *apipb.SalvageRequest
		kind holdfast.Kind
		says string
	}{
		{"salvage none", &apipb.SalvageRequest{Name: "none"}, holdfast.ErrNotFound, `"none"`},
		{"salvage from nowhere", &apipb.SalvageRequest{Name: "three", Replicas: []string{"n9"}}, holdfast.ErrNotFound, `"n9"`},
		{"salvage from one that does not answer", &apipb.SalvageRequest{Name: "three", Replicas: []string{"n3"}, AcceptLoss: true}, holdfast.ErrRefused, "does not answer"},
		{"salvage and drop at once", &apipb.SalvageRequest{Name: "three", Replicas: []string{"n1"}, DropOrphans: true}, holdfast.ErrInvalid, "drop"},
	} {
		calls = append(calls, call{c.name, ask(func(c *api.Client) func(context.Context, *apipb.SalvageRequest, ...grpc.CallOption) (*apipb.Salvage, error) {
			return c.SalvageVolume
		}, c.req), c.kind, c.says})
	}
	w.refusals(t, calls)
	if n := len(volumeNames(w.reg.View())); n != 2 {
		t.Errorf("%d volumes, want the 2 that there were", n)
	}
}

func volumeNames(v *state.View) (names []string) {
	for vol := range v.Volumes() {
		names = append(names, vol.Name)
	}
	return names
}

// TestBadNodeAndDiskCalls: what does not exist, does not answer, or would lose data.
func TestBadNodeAndDiskCalls(t *testing.T) {
	w := newWorld(t)
	w.server.Start(w.o)
	duty := func(node, duty string) func(context.Context, *api.Client) error {
		return ask(func(c *api.Client) func(context.Context, *apipb.NodeDutyRequest, ...grpc.CallOption) (*apipb.Node, error) {
			return c.SetNodeDuty
		}, &apipb.NodeDutyRequest{Name: node, Duty: duty})
	}
	rm := func(node string, force bool) func(context.Context, *api.Client) error {
		return ask(func(c *api.Client) func(context.Context, *apipb.NodeRequest, ...grpc.CallOption) (*apipb.RemoveNodeResponse, error) {
			return c.RemoveNode
		}, &apipb.NodeRequest{Name: node, Force: force})
	}
	scrub := func(id string, rate int64) func(context.Context, *api.Client) error {
		return ask(func(c *api.Client) func(context.Context, *apipb.ScrubDiskRequest, ...grpc.CallOption) (*apipb.Disk, error) {
			return c.ScrubDisk
		}, &apipb.ScrubDiskRequest{Id: id, Rate: rate})
	}
	rmDisk := func(id string) func(context.Context, *api.Client) error {
		return ask(func(c *api.Client) func(context.Context, *apipb.RemoveDiskRequest, ...grpc.CallOption) (*apipb.Disk, error) {
			return c.RemoveDisk
		}, &apipb.RemoveDiskRequest{Id: id})
	}
	own, silent, gone := w.disks[1].String(), w.disks[2].String(), w.disks[3].String()
	w.refusals(t, []call{
		{"inspect no node", ask(func(c *api.Client) func(context.Context, *apipb.NodeRequest, ...grpc.CallOption) (*apipb.Node, error) {
			return c.InspectNode
		}, &apipb.NodeRequest{Name: "n9"}), holdfast.ErrNotFound, `"n9"`},
		{"what if none were down", ask(func(c *api.Client) func(context.Context, *apipb.NodeRequest, ...grpc.CallOption) (*apipb.Impact, error) {
			return c.WhatIfDown
		}, &apipb.NodeRequest{Name: ""}), holdfast.ErrNotFound, `""`},
		{"a duty of no node", duty("n9", "draining"), holdfast.ErrNotFound, `"n9"`},
		{"no duty", duty("n2", ""), holdfast.ErrInvalid, `""`},
		{"an unknown duty", duty("n2", "asleep"), holdfast.ErrInvalid, `"asleep"`},
		{"drain what has nowhere to go", duty("n2", "draining"), holdfast.ErrRefused, "volume three has 3 replicas"},
		{"remove no node", rm("n9", true), holdfast.ErrNotFound, `"n9"`},
		{"remove itself", rm("n1", true), holdfast.ErrRefused, "cannot remove itself"},
		{"remove one that is up", rm("n2", false), holdfast.ErrRefused, "is up"},
		{"remove one with a replica", rm("n3", false), holdfast.ErrRefused, "a replica of volume three"},

		{"list the disks of no node", ask(func(c *api.Client) func(context.Context, *apipb.ListDisksRequest, ...grpc.CallOption) (*apipb.ListDisksResponse, error) {
			return c.ListDisks
		}, &apipb.ListDisksRequest{Node: "n9"}), holdfast.ErrNotFound, `"n9"`},
		{"inspect no disk", ask(func(c *api.Client) func(context.Context, *apipb.DiskRequest, ...grpc.CallOption) (*apipb.Disk, error) {
			return c.InspectDisk
		}, &apipb.DiskRequest{Id: "ffff"}), holdfast.ErrNotFound, `"ffff"`},
		{"inspect the beginning of two", ask(func(c *api.Client) func(context.Context, *apipb.DiskRequest, ...grpc.CallOption) (*apipb.Disk, error) {
			return c.InspectDisk
		}, &apipb.DiskRequest{Id: silent[:2]}), holdfast.ErrNotFound, silent[:2]},
		{"add nothing", w.addDisk(&apipb.AddDiskRequest{}), holdfast.ErrInvalid, "no path"},
		{"add a relative path", w.addDisk(&apipb.AddDiskRequest{Spec: "a.img,size=1G"}), holdfast.ErrInvalid, "not absolute"},
		{"add with an unknown word", w.addDisk(&apipb.AddDiskRequest{Spec: "/a.img,colour=red"}), holdfast.ErrInvalid, `"colour=red"`},
		{"add without a size", w.addDisk(&apipb.AddDiskRequest{Spec: "/a.img"}), holdfast.ErrInvalid, "no size says"},
		{"add in no directory", w.addDisk(&apipb.AddDiskRequest{Spec: "/none/a.img,size=1G"}), holdfast.ErrNotFound, "no directory /none"},
		{"add with too small a log", w.addDisk(&apipb.AddDiskRequest{Spec: "/a.img,size=1G,wal=1M"}), holdfast.ErrInvalid, "16 MiB"},
		{"add too small a disk", w.addDisk(&apipb.AddDiskRequest{Spec: "/a.img,size=1M"}), holdfast.ErrInvalid, "64 MiB"},
		{"add what is open", w.addDisk(&apipb.AddDiskRequest{Spec: "/own.img", Force: true}), holdfast.ErrExists, "/own.img"},
		{"add to no node", w.addDisk(&apipb.AddDiskRequest{Node: "n9", Spec: "/a.img,size=1G"}), holdfast.ErrNotFound, `"n9"`},
		{"add to one that is gone", w.addDisk(&apipb.AddDiskRequest{Node: "n3", Spec: "/a.img,size=1G"}), holdfast.ErrUnavailable, "n3"},
		{"add to one that does not answer", w.addDisk(&apipb.AddDiskRequest{Node: "n2", Spec: "/a.img,size=1G"}), holdfast.ErrUnavailable, "127.0.0.1:1"},
		{"remove no disk", rmDisk("ffff"), holdfast.ErrNotFound, `"ffff"`},
		{"remove a disk whose replicas have nowhere to go", rmDisk(own), holdfast.ErrRefused, "nowhere to go"},
		{"scrub no disk", scrub("ffff", 0), holdfast.ErrNotFound, `"ffff"`},
		{"scrub backwards", scrub(own, -1), holdfast.ErrInvalid, "-1"},
		{"scrub at a snail's pace", scrub(own, 7), holdfast.ErrInvalid, "7"},
		{"scrub where nobody is", scrub(gone, 0), holdfast.ErrUnavailable, "n3"},
	})
	if _, err := w.fs.Stat("/a.img"); err == nil {
		t.Error("a disk that was refused was made all the same")
	}
}

// TestOrphansKeepANode: nothing is made in the place of an abandoned replica, so its
// node can be emptied or removed only once somebody gave that up; the answer says how.
func TestOrphansKeepANode(t *testing.T) {
	w := newWorld(t)
	w.server.Start(w.o)
	rm := func(ctx context.Context, c *api.Client) error {
		_, err := c.RemoveNode(ctx, &apipb.NodeRequest{Name: "n3", Force: true})
		return err
	}
	three, _ := w.reg.View().VolumeByName("three")
	w.must(t, &state.DeleteVolume{Volume: three.ID})
	v := w.volume(t, "left", 1, 3)
	w.must(t, &state.ForceRecover{Volume: v.ID, Lineage: holdfast.NewID[holdfast.LineageID](), Since: 1,
		Choices: []state.SalvageChoice{{Replica: v.Segments[0].Replicas[0].ID}}})
	w.refusals(t, []call{
		{"remove it", rm, holdfast.ErrRefused, "node n3 has an abandoned replica of volume left, and those are not moved (holdfast volume salvage left goes back to it, or deletes it with --drop-orphans)"},
		{"drain it", func(ctx context.Context, c *api.Client) error {
			_, err := c.SetNodeDuty(ctx, &apipb.NodeDutyRequest{Name: "n3", Duty: "draining"})
			return err
		}, holdfast.ErrRefused, "abandoned replica of volume left"},
	})
	// As --drop-orphans does.
	id := holdfast.SegmentID{Volume: v.ID}
	_, seg, _ := w.reg.View().Segment(id)
	w.must(t, &state.RemoveReplica{Segment: id, LayoutVersion: seg.LayoutVersion, Replica: v.Segments[0].Replicas[1].ID})
	if err := rm(t.Context(), w.client); err != nil {
		t.Errorf("without orphans: %v", err)
	}
	if n, ok := w.reg.View().Node(holdfast.NodeID{3}); !ok || !n.Removed {
		t.Errorf("the node is not removed: %+v", n)
	}
}

// TestRefusesWhileTheLeaderDoes: when the only node that decides has no space to, what
// changes something is refused with that, and no disk is formatted.
func TestRefusesWhileTheLeaderDoes(t *testing.T) {
	w := newWorld(t)
	w.server.Start(w.o)
	why := holdfast.Errorf(holdfast.ErrNoSpace, "node n1 takes no changes of the metadata: 8 MiB free").WithRemedy("make room there")
	w.reg.mu.Lock()
	w.reg.refuses = why
	w.reg.mu.Unlock()
	w.refusals(t, []call{
		{"create", create("v"), holdfast.ErrNoSpace, "8 MiB free"},
		{"update", update("one", "replicas=2"), holdfast.ErrNoSpace, "8 MiB free"},
		{"attach", attach(&apipb.AttachVolumeRequest{Name: "one", Nbd: true}), holdfast.ErrNoSpace, "8 MiB free"},
		{"add a disk", w.addDisk(&apipb.AddDiskRequest{Spec: "/a.img,size=256M,wal=16M"}), holdfast.ErrNoSpace, "8 MiB free"},
	})
	if _, err := w.fs.Stat("/a.img"); err == nil {
		t.Error("the disk was made")
	}
	s, err := w.client.Status(t.Context(), &apipb.StatusRequest{})
	if err != nil || s.Ready || s.Reason != "node n1 takes no changes of the metadata: 8 MiB free (make room there)" {
		t.Errorf("status: %v, %v", s, err)
	}
}

// TestBeforeTheStart: a node that has nothing to tell yet says so.
func TestBeforeTheStart(t *testing.T) {
	w := newWorld(t)
	w.refusals(t, []call{
		{"create", create("v"), holdfast.ErrUnavailable, "is starting"},
		{"attach", attach(&apipb.AttachVolumeRequest{Name: "one", Nbd: true}), holdfast.ErrUnavailable, "is starting"},
	})
}
