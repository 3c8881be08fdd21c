package node

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"

	"github.com/holdfast-storage/holdfast"
	"github.com/holdfast-storage/holdfast/blockdev/mount"
	"github.com/holdfast-storage/holdfast/blockdev/nbd"
	"github.com/holdfast-storage/holdfast/blockdev/vfs"
	"github.com/holdfast-storage/holdfast/cmd/internal/controller"
	"github.com/holdfast-storage/holdfast/cmd/internal/keeper"
	"github.com/holdfast-storage/holdfast/cmd/internal/observe"
	"github.com/holdfast-storage/holdfast/cmd/internal/reconcile"
	"github.com/holdfast-storage/holdfast/cmd/internal/server"
	"github.com/holdfast-storage/holdfast/plugin/docker"
	"github.com/holdfast-storage/holdfast/raftstore"
	"github.com/holdfast-storage/holdfast/raftstore/peer"
	"github.com/holdfast-storage/holdfast/raftstore/state"
	"github.com/holdfast-storage/holdfast/replication/serve"
)

// stopWithin bounds the end of a daemon after SIGTERM: 8 s by contract, less
// what the last closes take.
const stopWithin = 7 * time.Second

// pluginStopWithin bounds what of it goes to calls of the volume plugin: a
// Mount may wait for minutes.
const pluginStopWithin = 2 * time.Second

// node is a running daemon. Its parts are opened in the order of the fields
// and closed in the reverse.
type node struct {
	o        Options
	log      *slog.Logger
	instance holdfast.InstanceID
	lacks    []keeper.Lack
	off      []string // what else is for status to list

	dir *dataDir
	id  struct {
		Node    holdfast.NodeID
		Cluster holdfast.ClusterID
	}
	start atomic.Pointer[step] // nil once the node runs
	store *raftstore.Store
	peer  *peer.Peer
	meta  *cluster
	serve *serve.Server
	disks *reconcile.Disks
	nbd   *nbd.Server
	keep  *keeper.Client
	// counts are how often each volume is mounted here; nil without a keeper.
	counts *mount.Counts
	att    *reconcile.Attachments
	api    *server.Server

	rebuilds *controller.Controller
	space    *space

	listeners struct{ api, http, data, raft, nbd net.Listener }
	closers   []func(context.Context)
	wg        sync.WaitGroup
	failed    chan error
}

// Run runs a node until ctx ends, and then ends it within 8 s: attachments are
// flushed and left to the next run. Options must be valid.
func Run(ctx context.Context, o Options, log *slog.Logger) error {
	n := &node{o: o, log: log, instance: holdfast.NewID[holdfast.InstanceID](), failed: make(chan error, 16)}
	work, cancel := context.WithCancel(context.WithoutCancel(ctx))
	defer func() {
		bounded, done := context.WithTimeout(context.WithoutCancel(ctx), stopWithin)
		defer done()
		for i := len(n.closers) - 1; i >= 0; i-- {
			n.closers[i](bounded)
		}
		cancel()
		n.wg.Wait()
	}()
	for _, s := range []step{
		{do: n.openDataDir}, {do: n.listen}, {do: n.openStore}, {do: n.startPeer}, {do: n.joinCluster, asks: true, what: n.joining()},
		{do: n.announce, asks: true, what: "make itself known to the cluster"}, {do: n.openDisks, asks: true, what: "open its disks"},
		{do: n.reachKeeper, what: "reach the keeper"}, {do: n.startVolumes, what: "open what was attached here"}, {do: n.serveUsers}, {do: n.servePlugin},
	} {
		s.since = time.Now()
		n.start.Store(&s)
		// A start that waits for others ends with ctx too.
		if err := s.do(ctx); err != nil {
			if ctx.Err() != nil {
				return nil //nolint:nilerr // told to stop while starting: that is a stop
			}
			return err
		}
	}
	n.run(func() { n.watchSpace(work) })
	n.run(func() { n.disks.Run(work) })
	n.run(func() { n.disks.WatchSpace(work) })
	n.run(func() { n.att.Run(work) })
	log.Info("node runs", "name", o.Name, "node", n.id.Node, "cluster", n.id.Cluster, "address", o.Address, "version", o.Version)
	var err error
	select {
	case <-ctx.Done():
	case err = <-n.failed:
	case <-n.store.Fatal():
		err = fmt.Errorf("metadata: %w", n.store.Err())
	case <-n.keeperGone():
		err = holdfast.Errorf(holdfast.ErrUnavailable, "the keeper is gone")
	}
	cancel()
	return err
}

func (n *node) run(f func()) { n.wg.Go(f) }

func (n *node) onClose(f func(context.Context)) { n.closers = append(n.closers, f) }

func (n *node) fail(what string, err error) {
	if err == nil {
		return
	}
	select {
	case n.failed <- fmt.Errorf("%s: %w", what, err):
	default: // the first says enough
	}
}

func (n *node) keeperGone() <-chan struct{} {
	if n.keep == nil {
		return nil
	}
	return n.keep.Done()
}

func (n *node) openDataDir(context.Context) error {
	n.lacks = takePrivileges()
	dir, err := openDataDir(n.o.DataDir)
	if err != nil {
		return err
	}
	n.dir = dir
	n.onClose(func(context.Context) { dir.Close() })
	_, err = os.Stat(dir.file("raft"))
	return n.needCluster(err == nil)
}

func (n *node) listen(context.Context) (err error) {
	open := func(to *net.Listener, flag, address string) error {
		l, err := listenTCP(flag, address, n.o.Listen)
		if err == nil {
			*to = l
			n.onClose(func(context.Context) { l.Close() })
		}
		return err
	}
	if err := open(&n.listeners.api, "--address", n.o.Address); err != nil {
		return err
	}
	if err := open(&n.listeners.data, "--data-address", n.o.DataAddress); err != nil {
		return err
	}
	if err := open(&n.listeners.raft, "--raft-address", n.o.RaftAddress); err != nil {
		return err
	}
	if n.o.NBDAddress != "" {
		return open(&n.listeners.nbd, "--nbd-address", n.o.NBDAddress)
	}
	return nil
}

func (n *node) openStore(context.Context) error {
	if err := n.dir.keepBallast(n.o.ballast); err != nil {
		return err
	}
	var err error
	if n.space, err = newSpace(n.o.DataDir, n.o.ballast); err != nil {
		return err
	}
	store, err := raftstore.Open(raftstore.Options{Dir: n.dir.file("raft"), Listener: n.listeners.raft, Address: n.o.RaftAddress, Logger: n.log})
	if err != nil {
		return fmt.Errorf("open metadata: %w", err)
	}
	n.store = store
	n.id.Node, n.id.Cluster = store.Node(), store.Cluster()
	n.onClose(func(context.Context) {
		if err := store.Close(); err != nil {
			n.log.Warn("close metadata", "err", err)
		}
	})
	return n.needCluster(n.store.HasCluster())
}

// needCluster decides what a node without a cluster does: one on loopback
// bootstraps itself, any other must be told.
func (n *node) needCluster(has bool) error {
	if has || n.o.Bootstrap || len(n.o.Join) > 0 {
		return nil
	}
	if host, _, _ := net.SplitHostPort(n.o.Address); !isLoopback(host) {
		return holdfast.Errorf(holdfast.ErrInvalid, "%s holds no cluster, and --address %s is not loopback", n.o.DataDir, n.o.Address).
			WithRemedy("give --bootstrap on the first node and --join HOST:PORT on the others")
	}
	n.o.Bootstrap = true
	return nil
}

// self is this node's record.
func (n *node) self() state.Node {
	return state.Node{
		ID: n.id.Node, Name: n.o.Name, Instance: n.instance, Labels: state.LabelsOf(n.o.Labels), HasDisks: !n.o.noDisks,
		Addresses: state.Addresses{API: n.o.Address, Data: n.o.DataAddress, Raft: n.o.RaftAddress},
		Version:   n.o.Version, MaxLevel: holdfast.Level1, Kind: state.MemberNonVoter,
	}
}

// startPeer serves peers, and users once there is something to tell them, on
// --address and the control sockets.
func (n *node) startPeer(ctx context.Context) error {
	targets := slices.Clone(n.o.Join)
	_ = n.dir.loadJSON("peers.json", &targets) // where the others were last: --join may name none that still lives
	p, err := peer.New(peer.Options{Store: n.store, Self: n.self(), Targets: targets, Logger: n.log})
	if err != nil {
		return err
	}
	n.peer, n.meta, n.api = p, newCluster(p, n.id.Node), server.New(n.starting)
	follow, stop := context.WithCancel(context.WithoutCancel(ctx))
	n.run(func() { n.meta.run(follow) })
	n.onClose(func(context.Context) { stop() })
	g := grpc.NewServer(n.api.Interceptors()...)
	p.Register(g)
	n.api.Register(g)
	grpcListener, httpListener := observe.Split(n.listeners.api)
	n.listeners.http = httpListener
	listeners := []net.Listener{grpcListener}
	sockets := []string{n.dir.file("control.sock")}
	if n.o.RunDir != "" {
		sockets = append(sockets, filepath.Join(n.o.RunDir, "control.sock"))
	}
	for i, path := range sockets {
		l, err := listenUnix(path, 0o660)
		switch {
		case err == nil:
			listeners = append(listeners, l)
		case i == 0:
			return err
		default:
			n.off = append(n.off, fmt.Sprintf("no %s (%v)", path, err))
		}
	}
	for _, l := range listeners {
		n.run(func() { n.fail("serve the API", ignoreClosed(g.Serve(l))) })
	}
	n.onClose(func(context.Context) { g.Stop() })
	p.Start()
	n.onClose(func(context.Context) {
		if err := n.dir.saveJSON("peers.json", p.KnownAddresses()); err != nil {
			n.log.Warn("record the peers", "err", err)
		}
		if err := p.Close(); err != nil {
			n.log.Warn("close peer", "err", err)
		}
	})
	return nil
}

// joinCluster makes this node part of a cluster, once.
func (n *node) joinCluster(ctx context.Context) error {
	if !n.id.Cluster.IsZero() {
		return n.peer.SameCluster(ctx, n.o.Join)
	}
	var err error
	if n.o.Bootstrap {
		err = n.peer.Bootstrap(ctx, holdfast.NewID[holdfast.ClusterID]())
	} else {
		err = n.peer.Join(ctx, n.o.Join)
	}
	n.id.Cluster = n.store.Cluster()
	return err
}

func (n *node) announce(ctx context.Context) error { return n.peer.Announce(ctx, n.self()) }

func (n *node) openDisks(ctx context.Context) error {
	srv, err := serve.New(serve.Options{Cluster: n.id.Cluster, Node: n.id.Node, Instance: n.instance, Level: n.store.View().Cluster().Level, Logger: n.log})
	if err != nil {
		return err
	}
	n.serve = srv
	n.disks = reconcile.NewDisks(reconcile.DisksOptions{Cluster: n.meta, Serve: srv, FS: vfs.OS{}, ID: n.id.Cluster, Node: n.id.Node, Instance: n.instance,
		Probe: func(path string) (string, error) { return mount.Signature(context.WithoutCancel(ctx), path) }, InUse: mount.InUse, Class: class,
		Save: func(list []reconcile.DiskSpec) error { return n.dir.saveJSON("disks.json", list) }, None: n.o.noDisks, MayGrow: n.space.grow, HostFill: hostFill, HostRoom: n.space.room, Logger: n.log})
	n.onClose(func(context.Context) {
		err := srv.Close()
		if err := errors.Join(err, n.disks.Close()); err != nil {
			n.log.Warn("close disks", "err", err)
		}
	})
	n.run(func() { n.fail("serve replicas", srv.Serve(n.listeners.data)) })
	known, fresh, err := n.diskSpecs()
	if err != nil {
		return err
	}
	for _, d := range fresh {
		// Elsewhere a directory that is missing may be a file system that is not mounted.
		if dir := filepath.Dir(d.Path); n.dir.holds(dir) {
			if err := os.MkdirAll(dir, 0o755); err != nil {
				return fmt.Errorf("disk %s: %w", d.Path, err)
			}
		}
		if has(n.o.disks, d.Path) { // one that no flag names has the size that it was given at its first try
			if err := n.disks.Check(d); err != nil {
				return fmt.Errorf("--disk: %w", err)
			}
		}
		if err := n.disks.Prepare(ctx, d, false); err != nil {
			return err
		}
		if err := n.disks.Open(ctx, d); err != nil {
			return err
		}
	}
	if err := n.disks.Know(append(known, fresh...)); err != nil {
		return err
	}
	for _, d := range known {
		if err := n.openKnown(ctx, d); err != nil {
			return err
		}
	}
	return nil
}

// openKnown opens a disk of an earlier start. One that worked before and does not
// now must not keep the others and the volumes of this node from serving.
func (n *node) openKnown(ctx context.Context, d reconcile.DiskSpec) error {
	if d.Removed {
		if has(n.o.disks, d.Path) {
			n.off = append(n.off, fmt.Sprintf("disk %s was removed: --disk does not open it again (holdfast disk add does)", d.Path))
		}
		return nil
	}
	for _, given := range n.o.disks {
		if given.Path != d.Path {
			continue
		}
		if err := n.disks.Check(given); errors.Is(err, holdfast.ErrRefused) {
			n.log.Warn("the size of a known disk is not what --disk says", "path", d.Path, "err", err)
			n.off = append(n.off, fmt.Sprintf("the size of --disk: %v", err))
		}
	}
	err := n.disks.Open(ctx, d)
	if err == nil || ctx.Err() != nil {
		return err
	}
	if errors.Is(err, state.ReasonRemoved) { // this node did not live to let it go
		n.log.Info("a removed disk is let go", "path", d.Path)
		if err = n.disks.Retire(d.Path); err == nil {
			return nil
		}
	}
	n.log.Error("a known disk is out", "path", d.Path, "err", err)
	n.off = append(n.off, fmt.Sprintf("disk %s is out: %v", d.Path, err))
	return nil
}

func (n *node) reachKeeper(ctx context.Context) error {
	if keeper.Under() == "" || keeper.Under() == keeper.Off {
		n.off = append(n.off, "no kernel devices and mounts: this daemon runs without a keeper (as root, `holdfast serve` starts one)")
		if n.o.PluginSocket != nil && *n.o.PluginSocket != "" {
			n.off = append(n.off, fmt.Sprintf("no Docker volume plugin at %s: it needs kernel devices and mounts, and so a keeper", *n.o.PluginSocket))
		}
		return nil
	}
	// A daemon that ends once the keeper knows it is started again: what a restart does
	// not mend is found before.
	if err := reconcile.CheckRecord(n.dir.file(recordFile)); err != nil {
		return err
	}
	var err error
	if n.counts, err = mount.OpenCounts(n.dir.file("mounts.json")); err != nil {
		return err
	}
	client, err := keeper.Dial(ctx, n.o.DataDir, keeper.DialOptions{Instance: n.instance, Logger: n.log})
	if err != nil {
		return err
	}
	n.keep = client
	n.onClose(func(context.Context) { client.Close() })
	n.lacks = append(n.lacks, client.Lacks()...)
	return nil
}

// recordFile remembers, in the data directory, what is attached here.
const recordFile = "attachments.json"

func (n *node) startVolumes(ctx context.Context) error {
	srv, err := nbd.NewServer(nbd.Options{Logger: n.log})
	if err != nil {
		return err
	}
	n.nbd = srv
	// Before anything is served: a start that fails below must end too.
	n.onClose(func(ctx context.Context) {
		if err := srv.Shutdown(ctx); err != nil {
			n.log.Warn("end NBD", "err", err)
		}
		if n.att != nil {
			n.att.Close(ctx)
		}
	})
	socket := n.dir.file("nbd.sock")
	l, err := nbd.ListenUnix(socket)
	if err != nil {
		return err
	}
	n.run(func() { n.fail("serve NBD", srv.Serve(context.WithoutCancel(ctx), l)) })
	if n.listeners.nbd != nil {
		n.run(func() { n.fail("serve NBD", srv.Serve(context.WithoutCancel(ctx), n.listeners.nbd)) })
	}
	var devices reconcile.Devices
	if n.keep != nil {
		if devices, err = reconcile.NewKernel(ctx, n.keep, n.counts, n.log); err != nil {
			return err
		}
	}
	n.rebuilds = controller.New(controller.Options{Cluster: n.meta, Leads: n.store.IsLeader, Self: n.id.Node, Grace: n.o.RebuildAfter, Logger: n.log})
	n.att, err = reconcile.New(ctx, reconcile.Options{Cluster: n.meta, ID: n.id.Cluster, Node: n.id.Node, Instance: n.instance,
		Serve: n.serve, NBD: srv, Socket: socket, Devices: devices, Replaced: n.rebuilds.Replaced, Record: n.dir.file(recordFile), Logger: n.log})
	return err
}

// serveUsers lets the API answer.
func (n *node) serveUsers(ctx context.Context) error {
	warnings := []string{}
	if host, _, _ := net.SplitHostPort(n.o.Address); n.o.Insecure && !isLoopback(host) {
		warnings = append(warnings, "--insecure: this node listens in clear on "+n.o.Address)
	}
	ctx, stop := context.WithCancel(context.WithoutCancel(ctx))
	n.run(func() { n.rebuilds.Run(ctx) })
	n.onClose(func(context.Context) { stop() })
	n.api.Start(server.Options{Cluster: n.meta, Attachments: n.att, Disks: n.disks, Serve: n.serve, Node: n.id.Node, Rebuilds: n.rebuilds,
		Leader: n.store.Leader, Version: n.o.Version, Warnings: warnings, Off: append(offOf(n.lacks), n.off...), Logger: n.log})
	n.serveObservers()
	return nil
}

// serveObservers answers monitoring on the API's port.
func (n *node) serveObservers() {
	watch := observe.NewServer(observe.Options{Logger: n.log, Ready: n.api.Ready, Sources: observe.Sources{
		Version: n.o.Version, Commit: n.o.Commit, Node: n.id.Node, View: n.meta.View, Gone: n.meta.Gone, Raft: n.store,
		Disks: n.disks.List, Replicas: n.serve.Replicas, Held: n.att.All, Memory: n.att.Memory, Throttle: n.att.Throttle}})
	n.run(func() {
		if err := watch.Serve(n.listeners.http); !errors.Is(err, http.ErrServerClosed) {
			n.fail("serve monitoring", ignoreClosed(err))
		}
	})
	n.onClose(func(context.Context) { watch.Close() })
}

func (n *node) servePlugin(context.Context) error {
	path := "/run/docker/plugins/holdfast.sock"
	if n.o.PluginSocket != nil {
		path = *n.o.PluginSocket
	} else if !writable("/run/docker") {
		path = ""
	}
	if path == "" || n.keep == nil {
		return nil
	}
	srv, err := docker.Serve(docker.Options{Socket: path, Volumes: n.api.Volumes(), DockerSocket: n.o.DockerSocket, Logger: n.log})
	if err != nil {
		return err
	}
	n.onClose(func(ctx context.Context) {
		// Most of the time there is belongs to flushing what was acknowledged.
		srv.RefuseNew("the node is being stopped")
		ctx, done := context.WithTimeout(ctx, pluginStopWithin)
		defer done()
		srv.Close(ctx)
	})
	return nil
}

func ignoreClosed(err error) error {
	if errors.Is(err, net.ErrClosed) || errors.Is(err, grpc.ErrServerStopped) {
		return nil
	}
	return err
}
