package reconcile

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/holdfast-storage/holdfast"
	"github.com/holdfast-storage/holdfast/blockdev"
	"github.com/holdfast-storage/holdfast/blockdev/nbd"
	"github.com/holdfast-storage/holdfast/blockdev/vfs"
	"github.com/holdfast-storage/holdfast/raftstore/state"
	"github.com/holdfast-storage/holdfast/replication/serve"
)

// register is raft reduced to one register: the real tables and commands, no
// log and no peers.
type register struct {
	mu      sync.Mutex
	view    *state.View
	index   uint64
	changed chan struct{}
	gone    map[holdfast.NodeID]bool
	alive   map[holdfast.NodeID]bool
	lost    map[holdfast.NodeID]bool
	// refuse, if set, is asked before a command is applied.
	refuse func(state.Command) error
}

func newRegister(t *testing.T) *register {
	t.Helper()
	r := &register{view: &state.View{}, changed: make(chan struct{}), gone: map[holdfast.NodeID]bool{}, alive: map[holdfast.NodeID]bool{}, lost: map[holdfast.NodeID]bool{}}
	r.must(t, &state.InitCluster{ID: holdfast.NewID[holdfast.ClusterID](), Level: holdfast.Level1})
	return r
}

func (r *register) View() *state.View {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.view
}

func (r *register) Read(context.Context) (*state.View, error) { return r.View(), nil }

func (r *register) Propose(_ context.Context, cmd state.Command) (state.Result, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.refuse != nil {
		if err := r.refuse(cmd); err != nil {
			return state.Result{}, err
		}
	}
	r.index++
	next, res, err := r.view.Apply(r.index, cmd)
	r.view = next
	close(r.changed)
	r.changed = make(chan struct{})
	return res, err
}

func (r *register) Changed() <-chan struct{} {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.changed
}

func (r *register) Liveness(_ context.Context, h state.Holder) (Liveness, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return Liveness{Gone: r.gone[h.Node], Alive: r.alive[h.Node], Why: "silent for 1 s of 5 s"}, nil
}

func (r *register) Gone(n holdfast.NodeID) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.gone[n]
}

func (r *register) replaced(n holdfast.NodeID) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.lost[n]
}

func (r *register) setRefuse(refuse func(state.Command) error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.refuse = refuse
}

// setGone changes what is heard of a node.
func (r *register) setGone(n holdfast.NodeID, gone bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.gone[n] = gone
	close(r.changed)
	r.changed = make(chan struct{})
}

func (r *register) must(t *testing.T, cmd state.Command) state.Result {
	t.Helper()
	res, err := r.Propose(context.Background(), cmd)
	if err != nil {
		t.Fatalf("%T: %v", cmd, err)
	}
	return res
}

// fakeNode is one run of one node over a file system in memory.
type fakeNode struct {
	reg     *register
	id      holdfast.NodeID
	inst    holdfast.InstanceID
	fs      *vfs.Memory
	dir     string
	serve   *serve.Server
	disks   *Disks
	nbd     *nbd.Server
	att     *Attachments
	devices *fakeDevices
	data    net.Listener
	served  sync.WaitGroup // ends with serve
	stop    context.CancelFunc
	wg      sync.WaitGroup
}

// run starts a node: a new instance over what earlier ones left.
func run(t *testing.T, reg *register, id holdfast.NodeID, fs *vfs.Memory, dir string) *fakeNode {
	t.Helper()
	n := &fakeNode{reg: reg, id: id, inst: holdfast.NewID[holdfast.InstanceID](), fs: fs, dir: dir, devices: newFakeDevices()}
	var err error
	if n.data, err = net.Listen("tcp", "127.0.0.1:0"); err != nil {
		t.Fatal(err)
	}
	rec := state.Node{ID: id, Name: "node-" + id.String()[:4], Instance: n.inst, HasDisks: true, Version: "test", MaxLevel: holdfast.Level1,
		Kind: state.MemberVoter, Addresses: state.Addresses{API: "127.0.0.1:1", Data: n.data.Addr().String(), Raft: "127.0.0.1:3"}}
	if have, ok := reg.View().Node(id); ok {
		rec.Revision, rec.Kind = have.Revision, have.Kind
		reg.must(t, &state.NodeUpdate{Node: rec})
	} else {
		reg.must(t, &state.NodeJoin{Node: rec})
	}
	log := slog.New(slog.DiscardHandler)
	cluster := reg.View().Cluster()
	if n.serve, err = serve.New(serve.Options{Cluster: cluster.ID, Node: id, Instance: n.inst, Level: cluster.Level, PromiseLength: 1}); err != nil {
		t.Fatal(err)
	}
	n.disks = NewDisks(DisksOptions{Cluster: reg, Serve: n.serve, FS: fs, ID: cluster.ID, Node: id, Instance: n.inst, ScrubEvery: -1, Logger: log})
	if err := n.disks.Prepare(t.Context(), DiskSpec{Path: "/disk.img", Size: 256 << 20, WAL: 16 << 20}, false); err != nil {
		t.Fatal(err)
	}
	if err := n.disks.Open(t.Context(), DiskSpec{Path: "/disk.img"}); err != nil {
		t.Fatal(err)
	}
	if n.nbd, err = nbd.NewServer(nbd.Options{}); err != nil {
		t.Fatal(err)
	}
	n.att, err = New(t.Context(), Options{Cluster: reg, ID: cluster.ID, Node: id, Instance: n.inst, Serve: n.serve, NBD: n.nbd, Socket: "/x/nbd.sock",
		Devices: n.devices, Replaced: reg.replaced, RepairPatience: time.Second, Record: filepath.Join(dir, "attachments.json"), Logger: log})
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(context.Background())
	n.stop = stop
	n.wg.Go(func() { n.disks.Run(ctx) })
	n.served.Go(func() { _ = n.serve.Serve(n.data) })
	n.wg.Go(func() { n.att.Run(ctx) })
	return n
}

// end stops the node as SIGTERM does.
func (n *fakeNode) end(t *testing.T) {
	t.Helper()
	n.stop()
	n.wg.Wait()
	n.att.Close(context.Background())
	n.nbd.Close()
	if err := errors.Join(n.serve.Close(), n.disks.Close()); err != nil {
		t.Errorf("end: %v", err)
	}
	n.served.Wait()
}

// create makes a volume of one replica on this node.
func (n *fakeNode) create(t *testing.T, name string) *state.Volume {
	t.Helper()
	place, err := state.Place(n.reg.View(), state.PlaceRequest{Size: 64 << 20, SegmentSize: 1 << 30, Replicas: 1, NewReplica: holdfast.NewID[holdfast.ReplicaID]})
	if err != nil {
		t.Fatal(err)
	}
	return n.reg.must(t, &state.CreateVolume{Volume: holdfast.NewID[holdfast.VolumeID](), Name: name, Size: 64 << 20,
		Options: state.VolumeOptions{Replicas: 1, FS: "ext4", SegmentSize: 1 << 30, AckMode: holdfast.AckReceived, MinCopies: 1},
		Lineage: holdfast.NewID[holdfast.LineageID](), Placement: place}).Volume
}

// fakeDevices records what is asked of the kernel.
type fakeDevices struct {
	mu      sync.Mutex
	calls   []string
	users   map[string][]string
	mounted map[string]string
	specs   map[holdfast.VolumeID]DeviceSpec
	fail    map[string]error // by verb
	holds   string           // what Probe finds
}

func newFakeDevices() *fakeDevices {
	return &fakeDevices{users: map[string][]string{}, mounted: map[string]string{}, specs: map[holdfast.VolumeID]DeviceSpec{}, fail: map[string]error{}}
}

func (f *fakeDevices) did(verb string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.calls = append(f.calls, verb)
	return f.fail[verb]
}

func (f *fakeDevices) done() []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Clone(f.calls)
}

func (f *fakeDevices) Open(_ context.Context, _ blockdev.Device, spec DeviceSpec) (string, error) {
	f.mu.Lock()
	f.specs[spec.Volume] = spec
	f.mu.Unlock()
	return "/dev/loop7", f.did("open")
}

func (f *fakeDevices) Probe(context.Context, holdfast.VolumeID) (string, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.holds, nil
}

func (f *fakeDevices) Format(_ context.Context, _ holdfast.VolumeID, fs, _ string, again bool) error {
	return f.did(fmt.Sprintf("format %s again=%v", fs, again))
}

func (f *fakeDevices) Mount(_ context.Context, id holdfast.VolumeID, _, _ string) (string, error) {
	err := f.did("mount")
	if err == nil {
		f.mu.Lock()
		f.mounted[f.specs[id].Name] = "/mounts/" + f.specs[id].Name
		f.mu.Unlock()
	}
	return "/mounts/" + f.specs[id].Name, err
}

func (f *fakeDevices) Path(name string) string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.mounted[name]
}

func (f *fakeDevices) Hold(name, user string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if !slices.Contains(f.users[name], user) {
		f.users[name] = append(f.users[name], user)
	}
	return nil
}

func (f *fakeDevices) Drop(name, user string) (bool, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.users[name] = slices.DeleteFunc(f.users[name], func(u string) bool { return u == user })
	return len(f.users[name]) == 0, nil
}

func (f *fakeDevices) Users(name string) []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Clone(f.users[name])
}

func (f *fakeDevices) Close(_ context.Context, _ holdfast.VolumeID, name string, _ bool) error {
	err := f.did("close")
	if err == nil {
		f.mu.Lock()
		delete(f.mounted, name)
		f.mu.Unlock()
	}
	return err
}

func (f *fakeDevices) Abort(context.Context, holdfast.VolumeID) error { return f.did("abort") }
func (f *fakeDevices) Release(context.Context)                        {}
func (f *fakeDevices) Sweep(context.Context, func(holdfast.VolumeID) bool) {
}
