package reconcile

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"net/url"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/holdfast-storage/holdfast"
	"github.com/holdfast-storage/holdfast/blockdev"
	"github.com/holdfast-storage/holdfast/blockdev/nbd"
	"github.com/holdfast-storage/holdfast/cmd/internal/durable"
	"github.com/holdfast-storage/holdfast/raftstore/state"
	"github.com/holdfast-storage/holdfast/replication/attachment"
	"github.com/holdfast-storage/holdfast/replication/coordinator"
	"github.com/holdfast-storage/holdfast/replication/serve"
)

// Options are what Attachments works with.
type Options struct {
	Cluster  Cluster
	ID       holdfast.ClusterID
	Node     holdfast.NodeID
	Instance holdfast.InstanceID
	Serve    *serve.Server
	NBD      *nbd.Server
	Socket   string // of the NBD server, for URIs
	// Devices makes kernel devices and mounts; nil: this node has none.
	Devices Devices
	// Replaced says whether a node is gone and its replicas are made anew elsewhere:
	// a repair need not wait for it. Nil: none is.
	Replaced func(node holdfast.NodeID) bool
	// RepairPatience is after how long without progress a repair is given back; 0
	// is two minutes.
	RepairPatience time.Duration
	// Record is the file that remembers what is attached here, so that it is
	// attached again after a restart.
	Record string
	Logger *slog.Logger
}

// Attachments are the volumes that this node holds.
type Attachments struct {
	o        Options
	memory   *attachment.Memory
	throttle *attachment.Throttle
	ctx      context.Context // of everything that runs until Close
	cancel   context.CancelFunc
	wg       sync.WaitGroup

	left map[holdfast.VolumeID]use // what the record said at New: what to attach again

	recordMu sync.Mutex // orders the writes of the record; taken before mu

	mu   sync.Mutex
	held map[holdfast.VolumeID]*held // also what somebody asks for or waits for; see release
	uses map[holdfast.VolumeID]use   // what is in the record
	// repairs are the detached volumes that this process repairs, or has until raft
	// knows that it does not.
	repairs map[holdfast.VolumeID]*repair
}

// use is how a volume is used here; it outlives the process.
type use struct {
	NBD    bool `json:"nbd"`
	Device bool `json:"device"`
	// Base and Next bound the epochs that only this node was given since its
	// kernel device was made: Next is asked for before it is had.
	Base holdfast.Epoch `json:"base"`
	Next holdfast.Epoch `json:"next"`
}

// held is one volume that this node holds, or is about to.
type held struct {
	// turn is held by who attaches, detaches, mounts or unmounts: one at a
	// time for each volume. A channel, since it is held across I/O.
	turn chan struct{}
	// asking counts who has the turn or will want it. Attachments.mu guards it.
	asking int

	mu      sync.Mutex
	name    string
	att     *attachment.Attachment
	epoch   holdfast.Epoch
	session holdfast.SessionID
	uri     string
	device  string
	waiting string // what an attach in progress waits for
}

// Held says what this node holds of a volume.
type Held struct {
	Epoch   holdfast.Epoch
	Session holdfast.SessionID
	URI     string
	Device  string
	Clients int
	Waiting string
	Active  bool
	Status  attachment.Status
}

// New reads the record of what was attached, and ends kernel devices that are
// not in it. Run attaches the rest again.
func New(ctx context.Context, o Options) (*Attachments, error) {
	a := &Attachments{o: o, memory: attachment.NewMemory(0), throttle: attachment.NewThrottle(), held: map[holdfast.VolumeID]*held{}, repairs: map[holdfast.VolumeID]*repair{}}
	a.ctx, a.cancel = context.WithCancel(context.Background()) //nolint:gosec // cancelled by Close
	var err error
	if a.uses, err = readRecord(o.Record); err != nil {
		return nil, err
	}
	a.left = maps.Clone(a.uses)
	if o.Devices != nil {
		o.Devices.Sweep(ctx, func(id holdfast.VolumeID) bool { return a.left[id].Device })
	}
	return a, nil
}

// CheckRecord says what keeps New from reading a record, before anything is started
// that would start again and again.
func CheckRecord(path string) error {
	_, err := readRecord(path)
	return err
}

// readRecord reads what was attached; a file that is not there is nothing.
func readRecord(path string) (map[holdfast.VolumeID]use, error) {
	uses := map[holdfast.VolumeID]use{}
	raw, err := os.ReadFile(path)
	if errors.Is(err, os.ErrNotExist) {
		return uses, nil
	}
	if err != nil {
		return nil, holdfast.Errorf(holdfast.ErrIO, "read what was attached: %w", err)
	}
	if err = json.Unmarshal(raw, &uses); err == nil && uses == nil {
		err = errors.New("it holds null")
	}
	if err != nil {
		return nil, holdfast.Errorf(holdfast.ErrIntegrity, "the record of what was attached, %s, is not readable: %.40q: %w", path, raw, err).
			WithRemedy("move the file away; volumes are then not attached again by themselves, and nothing of their data is lost")
	}
	return uses, nil
}

// remember writes the record: what is in it is attached again after a restart.
func (a *Attachments) remember(id holdfast.VolumeID, change func(*use)) error {
	a.recordMu.Lock()
	defer a.recordMu.Unlock()
	a.mu.Lock()
	u := a.uses[id]
	change(&u)
	if !u.NBD && !u.Device {
		delete(a.uses, id)
	} else {
		a.uses[id] = u
	}
	raw, err := json.Marshal(a.uses)
	a.mu.Unlock()
	if err == nil {
		err = durable.WriteFile(a.o.Record, raw)
	}
	if err != nil {
		return holdfast.Errorf(holdfast.ErrIO, "record what is attached: %w", err)
	}
	return nil
}

func (a *Attachments) used(id holdfast.VolumeID) use {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.uses[id]
}

// enter takes a volume's turn; leave gives it back.
func (a *Attachments) enter(ctx context.Context, id holdfast.VolumeID) (*held, error) {
	a.mu.Lock()
	h := a.held[id]
	if h == nil {
		h = &held{turn: make(chan struct{}, 1)}
		a.held[id] = h
	}
	h.asking++
	a.mu.Unlock()
	select {
	case h.turn <- struct{}{}:
		return h, nil
	case <-ctx.Done():
		a.release(id, h)
		return nil, holdfast.Errorf(holdfast.ErrTimeout, "another request for this volume is in progress on this node: %w", ctx.Err())
	}
}

func (a *Attachments) leave(id holdfast.VolumeID, h *held) {
	<-h.turn
	a.release(id, h)
}

// release ends an interest in a volume's turn, and forgets a volume of which nothing is
// held any more. While somebody waits for the turn it stays: there is one for each volume.
func (a *Attachments) release(id holdfast.VolumeID, h *held) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if h.asking--; h.asking == 0 && h.idle() {
		delete(a.held, id)
	}
}

func (h *held) idle() bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.att == nil && h.uri == "" && h.device == "" && h.waiting == ""
}

// Find returns the live volume of a name or an id from a view that is as new as
// the question.
func (a *Attachments) Find(ctx context.Context, name string) (*state.Volume, error) {
	view := a.o.Cluster.View()
	v, ok := lookup(view, name)
	if ok {
		return v, nil
	}
	view, err := a.o.Cluster.Read(ctx)
	if err != nil {
		return nil, fmt.Errorf("look up volume %q: %w", name, err)
	}
	if v, ok = lookup(view, name); !ok {
		return nil, holdfast.Errorf(holdfast.ErrNotFound, "no volume %q", name).WithRemedy("see holdfast volume ls")
	}
	return v, nil
}

func lookup(view *state.View, name string) (*state.Volume, bool) {
	if v, ok := view.VolumeByName(name); ok {
		return v, true
	}
	if id, err := holdfast.ParseID[holdfast.VolumeID](name); err == nil {
		if v, ok := view.Volume(id); ok && !v.Deleted {
			return v, true
		}
	}
	return nil, false
}

// AttachOptions say how to attach.
type AttachOptions struct {
	NBD    bool // an NBD export
	Device bool // a kernel device
	Force  bool // fence a live holder
	// Waiting is told what an attach waits for, when that changes. May be nil.
	Waiting func(string)
}

// Attach makes this node the holder of a volume, until ctx ends. What is
// attached already is returned as it is, with the export or device that was
// asked for added.
func (a *Attachments) Attach(ctx context.Context, name string, o AttachOptions) (Held, error) {
	v, err := a.Find(ctx, name)
	if err != nil {
		return Held{}, err
	}
	if o.Device && a.o.Devices == nil {
		return Held{}, holdfast.Errorf(holdfast.ErrRefused, "this node has no kernel devices").WithRemedy("attach with --nbd, or run the node as root; see holdfast status")
	}
	ctx, cancel := a.bound(ctx)
	defer cancel()
	h, err := a.enter(ctx, v.ID)
	if err != nil {
		return Held{}, err
	}
	defer a.leave(v.ID, h)
	if o.NBD && v.Format == holdfast.FormatDoing {
		return Held{}, holdfast.Errorf(holdfast.ErrRefused, "the file system of volume %s was begun and is not finished; the next mount makes it anew", v.Name).
			WithRemedy("mount the volume once, or remove it: what was written over NBD now would be formatted over")
	}
	return a.attach(ctx, h, v.ID, o)
}

// bound makes a context that ends with the Attachments too.
func (a *Attachments) bound(ctx context.Context) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancel(ctx)
	stop := context.AfterFunc(a.ctx, cancel)
	return ctx, func() { stop(); cancel() }
}

// attach does it; the caller has the turn.
func (a *Attachments) attach(ctx context.Context, h *held, id holdfast.VolumeID, o AttachOptions) (Held, error) {
	a.endOld(ctx, h, id)
	a.bury(h, id)
	if h.active() == nil {
		if err := a.begin(ctx, h, id, o); err != nil {
			return Held{}, err
		}
	}
	if err := a.expose(ctx, h, id, o); err != nil {
		return Held{}, err
	}
	return a.info(h), nil
}

// endOldWait bounds what an attach waits to hear whether its session is over: one
// that runs while raft has no quorum is handed out as it is.
const endOldWait = 2 * time.Second

// endOld ends a session whose epoch raft knows to be over: it may not have noticed
// yet, and must not be handed out again. Without a quorum nothing is known to be over.
func (a *Attachments) endOld(ctx context.Context, h *held, id holdfast.VolumeID) {
	att, epoch := h.activeIn()
	if att == nil {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, endOldWait)
	defer cancel()
	view, err := a.o.Cluster.Read(ctx)
	if err != nil {
		return
	}
	if v, ok := view.Volume(id); ok && v.Epoch > epoch {
		a.endOver(att, v, epoch)
	}
}

// endOver ends a session of an epoch that is over.
func (a *Attachments) endOver(att *attachment.Attachment, v *state.Volume, epoch holdfast.Epoch) {
	a.o.Logger.Warn("a session that was taken over is ended", "volume", v.Name, "epoch", uint64(epoch), "now", uint64(v.Epoch))
	att.Close()
}

// active returns the running attachment, nil if there is none.
func (h *held) active() *attachment.Attachment {
	att, _ := h.activeIn()
	return att
}

// activeIn is active, with the attachment's epoch. h may be nil.
func (h *held) activeIn() (*attachment.Attachment, holdfast.Epoch) {
	if h == nil {
		return nil, 0
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.att == nil || h.att.Err() != nil {
		return nil, 0
	}
	return h.att, h.epoch
}

func (h *held) wait(o AttachOptions, what string) {
	h.mu.Lock()
	same := h.waiting == what
	h.waiting = what
	h.mu.Unlock()
	if !same && what != "" && o.Waiting != nil {
		o.Waiting(what)
	}
}

// begin gets the epoch from raft and takes the replicas over; when the in-sync
// set changed meanwhile, once more in a new epoch.
func (a *Attachments) begin(ctx context.Context, h *held, id holdfast.VolumeID, o AttachOptions) error {
	defer h.wait(o, "")
	for {
		err := a.beginOnce(ctx, h, id, o)
		if !errors.Is(err, holdfast.ErrUnavailable) || ctx.Err() != nil {
			return err
		}
		a.o.Logger.Info("attach begins again", "volume", id, "err", err)
		select {
		case <-time.After(retryEvery):
		case <-ctx.Done():
			return err
		}
	}
}

func (a *Attachments) beginOnce(ctx context.Context, h *held, id holdfast.VolumeID, o AttachOptions) error {
	res, before, err := a.claim(ctx, h, id, o)
	if err != nil {
		return err
	}
	v := res.Volume
	att, err := attachment.New(a.attachmentOptions(v, before))
	if err != nil {
		return fmt.Errorf("attach volume %s: %w", v.Name, err)
	}
	h.mu.Lock()
	h.name, h.att, h.epoch, h.session = v.Name, att, v.Epoch, v.Session
	h.mu.Unlock()
	if err := a.whileWaiting(ctx, h, o, att); err != nil {
		att.Close()
		h.mu.Lock()
		h.att = nil
		h.mu.Unlock()
		return holdfast.Errorf(cmp.Or(holdfast.KindOf(err), holdfast.ErrTimeout), "attach volume %s: %w", v.Name, err)
	}
	if after, ok := a.o.Cluster.View().Volume(id); ok && after.Epoch == v.Epoch && !after.Session.IsZero() {
		h.mu.Lock()
		h.session = after.Session
		h.mu.Unlock()
	}
	a.o.Logger.Info("volume attached", "volume", v.Name, "epoch", uint64(v.Epoch), "continuous", att.Continuous())
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.ctx.Err() != nil { // Close no longer waits for new ones
		return holdfast.Errorf(holdfast.ErrUnavailable, "attach volume %s: this node is being stopped", v.Name)
	}
	h.asking++
	a.wg.Go(func() { a.watchEnd(h, id, att) })
	return nil
}

// whileWaiting runs att.Attach and tells what it waits for meanwhile.
func (a *Attachments) whileWaiting(ctx context.Context, h *held, o AttachOptions, att *attachment.Attachment) error {
	done := make(chan error, 1)
	go func() { done <- att.Attach(ctx) }()
	tick := time.NewTicker(500 * time.Millisecond)
	defer tick.Stop()
	for {
		select {
		case err := <-done:
			if err != nil {
				if waits := waitsOf(att.Status()); waits != "" {
					return fmt.Errorf("%w; it waited for %s", err, waits)
				}
			}
			return err
		case <-tick.C:
			h.wait(o, waitsOf(att.Status()))
		}
	}
}

func waitsOf(s attachment.Status) string {
	for _, seg := range s.Segments {
		for _, w := range seg.Waits {
			return w.For
		}
	}
	return ""
}

func (a *Attachments) attachmentOptions(v *state.Volume, before *state.Volume) attachment.Options {
	o := attachment.Options{
		Cluster: a.o.ID, Node: a.o.Node, Instance: a.o.Instance, Level: a.o.Cluster.View().Cluster().Level,
		Volume: v.ID, Size: v.Size, SegmentSize: v.Options.SegmentSize,
		Ack: v.Options.AckMode, Policy: policy(v), PingsOnly: v.Options.PingsOnly,
		Epoch: v.Epoch, Session: v.Session, Detached: before.Phase == state.PhaseDetached,
		Meta: meta{a.o.Cluster}, Dial: a.dial, Gone: a.o.Cluster.Gone, Local: a.o.Serve, Memory: a.memory,
		Throttle: a.throttle, Disk: func(id holdfast.ReplicaID) holdfast.DiskID { return a.diskOf(v.ID, id) },
		Logger: a.o.Logger.With("name", v.Name),
	}
	for i := range v.Segments {
		s := &v.Segments[i]
		seg := attachment.Segment{ISRVersion: s.ISRVersion, Replicas: a.replicas(s), Floor: s.Floor(), End: s.End, Salvaged: s.Salvaged,
			HistoryPruned: len(s.History) >= state.MaxHistory}
		for _, e := range s.History {
			seg.History = append(seg.History, coordinator.Start{Epoch: e.Epoch, S: e.Start})
		}
		o.Detached = o.Detached && s.Clean
		o.Segments = append(o.Segments, seg)
	}
	return o
}

// diskOf is the disk that raft has for a replica of a volume.
func (a *Attachments) diskOf(volume holdfast.VolumeID, id holdfast.ReplicaID) holdfast.DiskID {
	v, ok := a.o.Cluster.View().Volume(volume)
	if !ok {
		return holdfast.DiskID{}
	}
	for i := range v.Segments {
		for _, r := range v.Segments[i].Replicas {
			if r.ID == id {
				return r.Disk
			}
		}
	}
	return holdfast.DiskID{}
}

// policy is what the volume's options say of missing copies.
func policy(v *state.Volume) attachment.Policy {
	return attachment.Policy{Copies: v.Options.Replicas, MinCopies: v.Options.MinCopies, FailHeldAfter: time.Duration(v.Options.FailHeldAfter) * time.Second}
}

// replicas translates raft's list; a copy whose disk raft does not know has no
// node to be reached at and is left out.
func (a *Attachments) replicas(s *state.Segment) []coordinator.Replica {
	view := a.o.Cluster.View()
	list := make([]coordinator.Replica, 0, len(s.Replicas))
	for _, r := range s.Replicas {
		if d, ok := view.Disk(r.Disk); ok {
			list = append(list, coordinator.Replica{ID: r.ID, Node: d.Node, Role: r.Role, Lineage: r.Lineage, Leaving: r.Leaving})
		}
	}
	return list
}

func (a *Attachments) dial(ctx context.Context, node holdfast.NodeID) (net.Conn, error) {
	n, ok := a.o.Cluster.View().Node(node)
	if !ok || n.Removed {
		return nil, holdfast.Errorf(holdfast.ErrNotFound, "node %v is not of this cluster", node)
	}
	var d net.Dialer
	return d.DialContext(ctx, "tcp", n.Addresses.Data)
}

// expose adds the export or the device that was asked for.
func (a *Attachments) expose(ctx context.Context, h *held, id holdfast.VolumeID, o AttachOptions) error {
	h.mu.Lock()
	att, name, uri, device := h.att, h.name, h.uri, h.device
	session, epoch := h.session, h.epoch
	h.mu.Unlock()
	if o.NBD && uri == "" {
		if err := a.remember(id, func(u *use) { u.NBD = true }); err != nil {
			return err
		}
		if err := a.o.NBD.AddExport(nbd.Export{Name: name, Device: att}); err != nil {
			return fmt.Errorf("export volume %s: %w", name, err)
		}
		h.mu.Lock()
		h.uri = "nbd+unix:///" + url.PathEscape(name) + "?socket=" + url.QueryEscape(a.o.Socket)
		h.mu.Unlock()
	}
	if o.Device && device == "" {
		if err := a.remember(id, func(u *use) { u.Device = true }); err != nil {
			return err
		}
		path, err := a.o.Devices.Open(ctx, att, DeviceSpec{Volume: id, Name: name, Size: att.Size(), Session: session, Epoch: epoch, Base: a.used(id).Base, Continuous: att.Continuous()})
		if err != nil {
			return fmt.Errorf("kernel device of volume %s: %w", name, err)
		}
		h.mu.Lock()
		h.device = path
		h.mu.Unlock()
	}
	return nil
}

// watchEnd buries an attachment once its session is over, unless whoever had
// the turn did.
func (a *Attachments) watchEnd(h *held, id holdfast.VolumeID, att *attachment.Attachment) {
	defer a.release(id, h)
	select {
	case <-att.Done():
	case <-a.ctx.Done():
		return
	}
	select {
	case h.turn <- struct{}{}:
	case <-a.ctx.Done():
		return
	}
	defer func() { <-h.turn }()
	h.mu.Lock()
	ours := h.att == att
	h.mu.Unlock()
	if ours && a.bury(h, id) {
		if err := a.remember(id, func(u *use) { *u = use{} }); err != nil {
			a.o.Logger.Warn("forget the attachment", "volume", id, "err", err)
		}
	}
}

// bury takes the export and the device of a session that is over away: clients
// see errors, and never another session's data. The caller has the turn. It
// reports whether there was such a session.
func (a *Attachments) bury(h *held, id holdfast.VolumeID) bool {
	h.mu.Lock()
	att, name, uri, device := h.att, h.name, h.uri, h.device
	over := att != nil && att.Err() != nil
	if over {
		h.att, h.uri, h.device = nil, "", ""
	}
	h.mu.Unlock()
	if !over {
		return false
	}
	a.o.Logger.Warn("attachment ended", "volume", name, "err", att.Err())
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	if uri != "" {
		_ = a.o.NBD.RemoveExport(ctx, name, true) // forced: it can only have been removed already
	}
	if device != "" {
		if err := a.o.Devices.Abort(ctx, id); err != nil {
			a.o.Logger.Warn("abort the device", "volume", name, "err", err)
		}
	}
	att.Close()
	return true
}

// Detach ends this node's attachment cleanly. It is ErrRefused while clients or
// mounts are open, unless forced. What is not attached here is no error.
func (a *Attachments) Detach(ctx context.Context, id holdfast.VolumeID, force bool) error {
	ctx, cancel := a.bound(ctx)
	defer cancel()
	h, err := a.enter(ctx, id)
	if err != nil {
		return err
	}
	defer a.leave(id, h)
	return a.detach(ctx, h, id, force)
}

func (a *Attachments) detach(ctx context.Context, h *held, id holdfast.VolumeID, force bool) error {
	a.bury(h, id)
	view, err := a.o.Cluster.Read(ctx)
	if err != nil {
		return err
	}
	v, ok := view.Volume(id)
	if users := a.Users(volumeName(v)); len(users) > 0 && !force {
		return holdfast.Errorf(holdfast.ErrRefused, "volume %s is mounted on this node by %d container(s)", v.Name, len(users)).WithRemedy("stop them, or detach with --force: they see I/O errors")
	}
	if h.active() == nil {
		if !ok || v.Deleted || v.Phase == state.PhaseDetached || v.Holder.Node != a.o.Node {
			return a.forget(ctx, id)
		}
		// Raft says that this node holds it, after a restart or an attach that
		// failed: it is taken up again in order to be ended cleanly.
		u := a.used(id)
		if _, err := a.attach(ctx, h, id, AttachOptions{NBD: u.NBD, Device: u.Device}); err != nil {
			return err
		}
	}
	h.mu.Lock()
	att, name, uri, device := h.att, h.name, h.uri, h.device
	h.mu.Unlock()
	if uri != "" {
		if err := a.o.NBD.RemoveExport(ctx, name, force); err != nil && !errors.Is(err, holdfast.ErrNotFound) {
			return err
		}
		h.mu.Lock()
		h.uri = ""
		h.mu.Unlock()
	}
	if device != "" {
		if err := a.closeDevice(ctx, h, id, force); err != nil {
			return err
		}
	}
	if err := a.remember(id, func(u *use) { *u = use{} }); err != nil {
		return err
	}
	err = att.Detach(ctx)
	h.mu.Lock()
	h.att = nil // also when it failed: it takes no more requests, and the next detach takes the volume up again
	h.mu.Unlock()
	att.Close()
	if err != nil {
		return fmt.Errorf("detach volume %s: %w", name, err)
	}
	a.o.Logger.Info("volume detached", "volume", name)
	return nil
}

// forget ends what is left here of a volume that another node holds, or nobody.
func (a *Attachments) forget(ctx context.Context, id holdfast.VolumeID) error {
	if a.o.Devices != nil && a.used(id).Device {
		if err := a.o.Devices.Abort(ctx, id); err != nil {
			return err
		}
	}
	return a.remember(id, func(u *use) { *u = use{} })
}

func volumeName(v *state.Volume) string {
	if v == nil {
		return ""
	}
	return v.Name
}

// closeDevice unmounts and ends the kernel device, and keeps the attachment.
func (a *Attachments) closeDevice(ctx context.Context, h *held, id holdfast.VolumeID, force bool) error {
	h.mu.Lock()
	name := h.name
	h.mu.Unlock()
	if err := a.o.Devices.Close(ctx, id, name, force); err != nil {
		return fmt.Errorf("close the device of volume %s: %w", name, err)
	}
	h.mu.Lock()
	h.device = ""
	h.mu.Unlock()
	return a.remember(id, func(u *use) { u.Device = false })
}

// Get says what this node holds of a volume; false if nothing.
func (a *Attachments) Get(id holdfast.VolumeID) (Held, bool) {
	a.mu.Lock()
	h := a.held[id]
	a.mu.Unlock()
	if h == nil {
		return Held{}, false
	}
	info := a.info(h)
	return info, info.Active || info.Waiting != ""
}

func (a *Attachments) info(h *held) Held {
	h.mu.Lock()
	defer h.mu.Unlock()
	info := Held{Epoch: h.epoch, Session: h.session, URI: h.uri, Device: h.device, Waiting: h.waiting}
	if h.att != nil {
		info.Status = h.att.Status()
		info.Active = h.att.Err() == nil && info.Status.Active
	}
	if h.uri != "" {
		info.Clients = len(a.o.NBD.Clients(h.name))
	}
	return info
}

// Device returns the running device of a volume, for tests and tools.
func (a *Attachments) Device(id holdfast.VolumeID) (blockdev.Device, bool) {
	a.mu.Lock()
	h := a.held[id]
	a.mu.Unlock()
	if h == nil {
		return nil, false
	}
	att := h.active()
	return att, att != nil
}

// List returns the volumes that are attached here, by id.
func (a *Attachments) List() []holdfast.VolumeID {
	return a.ids(func(h *held) bool { return h.active() != nil })
}

func (a *Attachments) ids(wanted func(*held) bool) []holdfast.VolumeID {
	a.mu.Lock()
	defer a.mu.Unlock()
	var ids []holdfast.VolumeID
	for id, h := range a.held {
		if wanted(h) {
			ids = append(ids, id)
		}
	}
	slices.SortFunc(ids, func(x, y holdfast.VolumeID) int { return cmp.Compare(x.String(), y.String()) })
	return ids
}

// HeldVolume is one volume that this node holds, or is about to.
type HeldVolume struct {
	Volume holdfast.VolumeID
	Held
}

// All says what this node holds of every volume, in the order of their ids.
func (a *Attachments) All() []HeldVolume {
	var all []HeldVolume
	for _, id := range a.ids(func(*held) bool { return true }) {
		if info, ok := a.Get(id); ok {
			all = append(all, HeldVolume{id, info})
		}
	}
	return all
}

// Memory returns the payload that all attachments keep for replay, and its bound.
func (a *Attachments) Memory() (used, limit int64) { return a.memory.Used() }

// Throttle says how members are brought back here, and what clients notice of it.
func (a *Attachments) Throttle() attachment.ThrottleStatus { return a.throttle.Status() }

// Close ends every attachment as a restart does: what was acknowledged is
// flushed, devices stay with the keeper, raft is not told, and the next start
// attaches again.
func (a *Attachments) Close(ctx context.Context) {
	a.mu.Lock()
	a.cancel()
	all := make([]*held, 0, len(a.held))
	for _, h := range a.held {
		all = append(all, h)
	}
	a.mu.Unlock()
	var wg sync.WaitGroup
	for _, h := range all {
		wg.Go(func() {
			if att := h.active(); att != nil {
				if err := att.Flush(ctx); err != nil {
					a.o.Logger.Warn("flush before the end", "volume", h.name, "err", err)
				}
			}
		})
	}
	wg.Wait()
	if a.o.Devices != nil {
		a.o.Devices.Release(ctx)
	}
	for _, h := range all {
		h.mu.Lock()
		att := h.att
		h.mu.Unlock()
		if att != nil {
			att.Close()
		}
	}
	a.wg.Wait()
}
