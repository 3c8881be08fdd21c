package peer

import (
	"context"
	"errors"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	"github.com/holdfast-storage/holdfast"
	"github.com/holdfast-storage/holdfast/raftstore"
	"github.com/holdfast-storage/holdfast/raftstore/peer/peerpb"
	"github.com/holdfast-storage/holdfast/raftstore/state"
)

const (
	// retryFirst and retryMost pace the questions while no leader answers. A
	// change of leader or tables wakes earlier.
	retryFirst = 20 * time.Millisecond
	retryMost  = 500 * time.Millisecond
	// askTimeout bounds one question to a node that may be hung, where no raft
	// membership tells of a new leader. Longer waits just ask again.
	askTimeout = 5 * time.Second
	// settleTimeout bounds how long Propose waits for this node's own View to
	// show what was answered already.
	settleTimeout = 2 * time.Second
	// reconcileEvery is the pace of membership steps on the leader.
	reconcileEvery = 500 * time.Millisecond
	// stepTimeout bounds one membership step.
	stepTimeout = 10 * time.Second
)

// Options are the settings of New.
type Options struct {
	// Store is this node's copy of the metadata. The Peer does not close it.
	Store *raftstore.Store
	// Self is what this node says of itself; ID must be the store's.
	Self state.Node
	// Targets are addresses to ask while the tables name nobody yet: --join.
	// The store's contacts, saved in an earlier life, are asked too.
	Targets []string
	// Dialing are further gRPC dial options: credentials. Default: in clear.
	Dialing []grpc.DialOption
	// Clock. Default: BootTime.
	Clock Clock
	// Logger. Default: none.
	Logger *slog.Logger
}

// Peer is one node's part. Its methods may be called concurrently.
type Peer struct {
	store   *raftstore.Store
	log     *slog.Logger
	record  *record
	hearsay *hearsay
	conns   *conns
	watch   follower

	ctx    context.Context // the Peer's life: ends when Close begins
	cancel context.CancelFunc
	wg     sync.WaitGroup
	begun  atomic.Bool

	mu      sync.Mutex // of the fields below
	self    state.Node
	targets []string
	turn    int             // of nextTarget
	trouble error           // of the last question that nobody answered; nil once one was
	told    time.Time       // when the log said so
	beating map[string]bool // addresses with a heartbeat on its way
}

// New makes a Peer. Register it with a server and Start it.
func New(o Options) (*Peer, error) {
	if o.Store == nil || o.Self.ID != o.Store.Node() || o.Self.Instance.IsZero() {
		return nil, holdfast.Errorf(holdfast.ErrInvalid, "a peer needs a store and the record of its node, with an instance")
	}
	if o.Clock == nil {
		o.Clock = BootTime
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	if o.Dialing == nil {
		o.Dialing = []grpc.DialOption{grpc.WithTransportCredentials(insecure.NewCredentials())}
	}
	p := &Peer{store: o.Store, log: o.Logger, record: newRecord(o.Clock), hearsay: newHearsay(o.Clock), conns: newConns(o.Dialing),
		self: o.Self, targets: slices.Clone(o.Targets), beating: map[string]bool{}}
	contacts, err := o.Store.Contacts()
	if err != nil {
		return nil, err
	}
	p.addTargets(contacts)
	p.watch.changed = make(chan struct{})
	p.ctx, p.cancel = context.WithCancel(context.Background())
	return p, nil
}

// Register adds the service to a server, before it serves.
func (p *Peer) Register(s grpc.ServiceRegistrar) { peerpb.RegisterPeerServer(s, server{p: p}) }

// Start begins heartbeats, the record, membership steps and the watch.
func (p *Peer) Start() {
	if p.begun.Swap(true) {
		return
	}
	p.wg.Add(5)
	go p.beat()
	go p.look()
	go p.reconcile()
	go p.mirror()
	go p.follow()
}

// Close stops the Peer and waits for what it started. Calls on it end.
func (p *Peer) Close() error {
	p.cancel()
	p.conns.close()
	p.wg.Wait()
	return nil
}

// View returns the tables as this node knows them now: its own raft copy, or
// what it follows.
func (p *Peer) View() *state.View {
	v := p.store.View()
	if w := p.watch.view.Load(); w != nil && w.Index() > v.Index() {
		return w
	}
	return v
}

// Changed returns a channel that is closed at the next change of View. Take it
// before View.
func (p *Peer) Changed() <-chan struct{} { return p.watch.next() }

// Gone reports whether a holder is gone by this node's own record.
func (p *Peer) Gone(h state.Holder) bool { return p.record.gone(h) }

// Alive returns what this node's record knows of a node.
func (p *Peer) Alive(node holdfast.NodeID) Alive { return p.record.of(node) }

// SaidGone reports whether the voters that answer this node's heartbeats call a
// node gone. It is what a node that is no voter knows.
func (p *Peer) SaidGone(node holdfast.NodeID) bool { return p.hearsay.gone(node) }

// LivenessChanged returns a channel that is closed when a node goes, comes back
// or shows a new instance.
func (p *Peer) LivenessChanged() <-chan struct{} { return p.record.next() }

// Self returns what this node says of itself.
func (p *Peer) Self() state.Node {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.self
}

// Bootstrap makes a new cluster with this node as its first member.
func (p *Peer) Bootstrap(ctx context.Context, cluster holdfast.ClusterID) error {
	if err := p.store.Bootstrap(ctx, cluster); err != nil {
		return err
	}
	return p.Announce(ctx, p.Self())
}

// Join makes this node a node of the cluster that one of the addresses belongs
// to, and returns when its record stands. The leader makes it a raft member by
// and by. Joining the own cluster again is an Announce.
func (p *Peer) Join(ctx context.Context, targets []string) error {
	p.addTargets(targets)
	cluster, err := p.discover(ctx, targets)
	if err != nil {
		return err
	}
	if own := p.store.Cluster(); !own.IsZero() && own != cluster {
		return holdfast.Errorf(holdfast.ErrRefused, "this node belongs to cluster %v, and %v to cluster %v", own, targets, cluster)
	}
	self := p.Self()
	if err := p.announce(ctx, cluster, self); err != nil {
		return err
	}
	// From here on the node beats, and the leader, hearing that, adds it to raft.
	return p.store.Adopt(cluster)
}

// sameClusterWait bounds what SameCluster waits for answers.
const sameClusterWait = time.Second

// SameCluster is ErrRefused if one of the addresses belongs to another cluster than
// this node, which has one. Who does not answer within a moment may be of either.
func (p *Peer) SameCluster(ctx context.Context, targets []string) error {
	ctx, cancel := context.WithTimeout(ctx, sameClusterWait)
	defer cancel()
	own := p.store.Cluster()
	answers := make(chan error, len(targets))
	for _, address := range targets {
		go func() {
			h, err := p.hello(ctx, address)
			var cluster holdfast.ClusterID
			if err != nil || len(h.GetCluster()) != len(cluster) || own == holdfast.ClusterID(h.GetCluster()) {
				answers <- nil
				return
			}
			answers <- holdfast.Errorf(holdfast.ErrRefused, "this node belongs to cluster %v, and %s to cluster %v", own, address, holdfast.ClusterID(h.GetCluster())).
				WithRemedy("join a node of its own cluster, or give an empty data directory")
		}()
	}
	var errs []error
	for range targets {
		errs = append(errs, <-answers)
	}
	return errors.Join(errs...)
}

// discover asks the targets for their cluster until one answers.
func (p *Peer) discover(ctx context.Context, targets []string) (holdfast.ClusterID, error) {
	wait := retryFirst
	since := time.Now()
	var last error
	for {
		for _, address := range targets {
			h, err := p.hello(ctx, address)
			if err != nil {
				last = err
				continue
			}
			var cluster holdfast.ClusterID
			if len(h.GetCluster()) != len(cluster) {
				last = holdfast.Errorf(holdfast.ErrUnavailable, "the node at %s has no cluster yet", address)
				continue
			}
			copy(cluster[:], h.GetCluster())
			p.unanswered("", since, nil)
			return cluster, nil
		}
		p.unanswered("join "+joinText(targets), since, last)
		if err := p.pause(ctx, &wait); err != nil {
			return holdfast.ClusterID{}, p.gaveUp(ctx, "join "+joinText(targets), last)
		}
	}
}

func (p *Peer) hello(ctx context.Context, address string) (*peerpb.HelloReply, error) {
	conn, err := p.conns.to(address)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	h, err := peerpb.NewPeerClient(conn).Hello(ctx, &peerpb.HelloRequest{})
	if err != nil {
		return nil, callError("ask "+address, err)
	}
	return h, nil
}

// Announce tells the cluster what this node says of itself, new instance
// included, and returns when it stands in the tables. Node.Revision is not looked at.
func (p *Peer) Announce(ctx context.Context, node state.Node) error {
	p.mu.Lock()
	p.self = node
	p.mu.Unlock()
	return p.announce(ctx, p.store.Cluster(), node)
}

func (p *Peer) announce(ctx context.Context, cluster holdfast.ClusterID, node state.Node) error {
	cmd := &state.NodeJoin{Node: node}
	b, err := state.EncodeCommand(holdfast.Level1, cmd)
	if err != nil {
		return err
	}
	wait := retryFirst
	for {
		_, err = p.atLeader(ctx, "announce the node",
			func(ctx context.Context) (state.Result, error) { return p.announceHere(ctx, node) },
			func(ctx context.Context, client peerpb.PeerClient) (*peerpb.CommandReply, error) {
				return client.Join(ctx, &peerpb.CommandRequest{Cluster: cluster[:], From: node.ID[:], Command: b})
			})
		if !errors.Is(err, holdfast.ErrNoSpace) {
			return err
		}
		// It passes by itself, and a node that starts can wait.
		p.log.Warn("the node cannot be announced yet", "error", err)
		if p.pause(ctx, &wait) != nil {
			return err
		}
	}
}

// announceHere is Announce at the leader.
func (p *Peer) announceHere(ctx context.Context, node state.Node) (state.Result, error) {
	for {
		if _, err := p.store.ReadIndex(ctx); err != nil {
			return state.Result{}, err
		}
		have, ok := p.store.View().Node(node.ID)
		if !ok {
			return p.store.Propose(ctx, &state.NodeJoin{Node: node})
		}
		node.Revision = have.Revision
		res, err := p.store.Propose(ctx, &state.NodeUpdate{Node: node})
		if !errors.Is(err, state.ReasonStaleRevision) {
			return res, err
		}
	}
}

// Propose applies a command, here if this node leads and else at the leader, and
// returns its answer. While no leader answers it asks again until ctx ends
// (ErrTimeout; whether the command was applied is then not known), but for one that
// decides alone and has no space to (ErrNoSpace; nothing was done). This node's
// View shows the command's effect, unless it lags by seconds. An AttachBegin with
// Takeover waits for the holder to be gone or to detach.
func (p *Peer) Propose(ctx context.Context, cmd state.Command) (state.Result, error) {
	b, err := state.EncodeCommand(max(p.View().Cluster().Level, holdfast.Level1), cmd)
	if err != nil {
		return state.Result{}, err
	}
	cluster, self := p.store.Cluster(), p.store.Node()
	res, err := p.atLeader(ctx, "propose "+state.Name(cmd),
		func(ctx context.Context) (state.Result, error) { return p.proposeHere(ctx, cmd) },
		func(ctx context.Context, client peerpb.PeerClient) (*peerpb.CommandReply, error) {
			return client.Forward(ctx, &peerpb.CommandRequest{Cluster: cluster[:], From: self[:], Command: b})
		})
	if err == nil {
		p.settle(ctx, res.Index)
	}
	return res, err
}

// settle waits a while for this node's View to show an index.
func (p *Peer) settle(ctx context.Context, index uint64) {
	ctx, cancel := context.WithTimeout(ctx, settleTimeout)
	defer cancel()
	// A lagging View is no failure of a command that is done.
	_ = p.waitIndex(ctx, index)
}

func (p *Peer) waitIndex(ctx context.Context, index uint64) error {
	for {
		changed, own := p.Changed(), p.store.Changed()
		if p.View().Index() >= index {
			return nil
		}
		select {
		case <-changed:
		case <-own:
		case <-p.store.Fatal():
			return p.store.Err()
		case <-p.ctx.Done():
			return errClosed()
		case <-ctx.Done():
			return holdfast.Errorf(holdfast.ErrTimeout, "wait for metadata index %d: %w", index, ctx.Err())
		}
	}
}

// proposeHere is Propose at the leader.
func (p *Peer) proposeHere(ctx context.Context, cmd state.Command) (state.Result, error) {
	if a, ok := cmd.(*state.AttachBegin); ok && a.Takeover && !a.Force {
		if err := p.awaitGone(ctx, a); err != nil {
			return state.Result{}, err
		}
	}
	return p.store.Propose(ctx, cmd)
}

// awaitGone waits until nothing speaks against a takeover: the holder is gone by
// the leader's own record, or has detached. What the tables refuse anyway goes
// on to be refused.
func (p *Peer) awaitGone(ctx context.Context, a *state.AttachBegin) error {
	for {
		changed, lives, leads := p.store.Changed(), p.record.next(), p.store.LeaderChanged()
		if !p.store.IsLeader() {
			return errMoved
		}
		vol, ok := p.store.View().Volume(a.Volume)
		if !ok || vol.Deleted || vol.Epoch != a.Expect || vol.Phase == state.PhaseDetached || vol.Holder.Node == a.Node {
			return nil
		}
		node, ok := p.store.View().Node(vol.Holder.Node)
		if !ok || node.Removed || node.Instance != vol.Holder.Instance || p.record.gone(vol.Holder) {
			return nil
		}
		select {
		case <-changed:
		case <-lives:
		case <-leads:
		case <-p.store.Fatal():
			return p.store.Err()
		case <-p.ctx.Done():
			return errClosed()
		case <-ctx.Done():
			e := holdfast.Errorf(holdfast.ErrTimeout, "volume %s is held by node %s, which is alive", vol.Name, node.Name)
			e.Cause = state.ReasonHeld
			return e
		}
	}
}

// Read returns a View that shows every command that was answered, anywhere,
// before the call. It asks the leader, until ctx ends.
func (p *Peer) Read(ctx context.Context) (*state.View, error) {
	cluster, self := p.store.Cluster(), p.store.Node()
	res, err := p.atLeader(ctx, "read the metadata",
		func(ctx context.Context) (state.Result, error) {
			index, err := p.store.ReadIndex(ctx)
			return state.Result{Index: index}, err
		},
		func(ctx context.Context, client peerpb.PeerClient) (*peerpb.CommandReply, error) {
			r, err := client.ReadIndex(ctx, &peerpb.ReadIndexRequest{Cluster: cluster[:], From: self[:]})
			if err != nil {
				return nil, err
			}
			b, err := state.EncodeResult(state.Result{Index: r.GetIndex()})
			return &peerpb.CommandReply{Result: b, Failure: r.GetFailure(), Redirect: r.GetRedirect()}, err
		})
	if err != nil {
		return nil, err
	}
	if err := p.waitIndex(ctx, res.Index); err != nil {
		return nil, err
	}
	return p.View(), nil
}

// errMoved is the answer of a node that led until a moment ago.
var errMoved = &holdfast.Error{Kind: holdfast.ErrUnavailable, Message: "the leadership moved", Cause: &raftstore.NotLeader{}}

func errClosed() error { return holdfast.Errorf(holdfast.ErrUnavailable, "the peer is closed") }

// atLeader does something at the leader: here, or there through a client. It
// asks again while no leader answers.
func (p *Peer) atLeader(ctx context.Context, what string,
	here func(context.Context) (state.Result, error),
	there func(context.Context, peerpb.PeerClient) (*peerpb.CommandReply, error),
) (state.Result, error) {
	wait := retryFirst
	var last error
	var told string // the address that the last redirect named
	asked := false  // it may have been done without an answer
	since := time.Now()
	for {
		if err := p.store.Err(); err != nil {
			return state.Result{}, err
		}
		var res state.Result
		err, before := p.store.Refuses(), asked
		address, self := p.leaderAddress(told)
		told = ""
		switch {
		case err != nil: // there is nobody else to ask
		case self:
			asked = true
			res, err = here(ctx)
		case address == "":
			err = holdfast.Errorf(holdfast.ErrUnavailable, "no leader is known")
		default:
			asked = true
			res, told, err = p.askThere(ctx, address, there)
		}
		var not *raftstore.NotLeader
		switch {
		case err == nil:
			p.unanswered("", since, nil)
			return res, nil
		case before && errors.Is(err, holdfast.ErrNoSpace): // this time nothing was done
			return state.Result{}, &holdfast.Error{Kind: holdfast.ErrUnavailable, Message: what + ": it is not known whether it was done: " + holdfast.MessageOf(err), Remedy: holdfast.RemedyOf(err)}
		case errors.As(err, &not), errors.Is(err, errAskAgain), holdfast.KindOf(err) == holdfast.ErrUnavailable && ctx.Err() == nil:
			last = err
		default:
			return state.Result{}, err
		}
		if told != "" && told != address {
			continue // the redirect leads on
		}
		p.unanswered(what, since, last)
		if err := p.pause(ctx, &wait); err != nil {
			return state.Result{}, p.gaveUp(ctx, what, last)
		}
	}
}

// errAskAgain marks an answer that did not come: a connection that broke, a node
// that is silent.
var errAskAgain = errors.New("no answer")

// askThere asks the node at an address. told is the address that it names instead.
func (p *Peer) askThere(ctx context.Context, address string, there func(context.Context, peerpb.PeerClient) (*peerpb.CommandReply, error)) (
	res state.Result, told string, err error) {
	conn, err := p.conns.to(address)
	if err != nil {
		return res, "", err
	}
	ask, cancel := context.WithCancel(ctx)
	defer cancel()
	stop := p.cancelWhenMoved(cancel)
	r, err := there(ask, peerpb.NewPeerClient(conn))
	stop()
	if err != nil {
		if c := status.Code(err); ctx.Err() == nil && (c == codes.Unavailable || c == codes.Canceled || c == codes.DeadlineExceeded) {
			return res, "", &holdfast.Error{Kind: holdfast.ErrUnavailable, Message: "ask " + address + ": " + err.Error(), Cause: errAskAgain}
		}
		return res, "", callError("ask "+address, err)
	}
	if r.GetRedirect() != nil {
		return res, r.GetRedirect().GetAddress(), errMoved
	}
	if f := r.GetFailure(); f != nil {
		return res, "", failureError(f)
	}
	res, err = state.DecodeResult(r.GetResult())
	return res, "", err
}

// cancelWhenMoved cancels a question when it cannot be answered any more: raft
// says that the leader changed. A node without raft asks anew after askTimeout.
func (p *Peer) cancelWhenMoved(cancel context.CancelFunc) (stop func()) {
	done := make(chan struct{})
	moved := p.store.LeaderChanged()
	var late <-chan time.Time
	if _, ok := p.store.Leader(); !ok {
		late = time.After(askTimeout)
	}
	var wg sync.WaitGroup
	wg.Add(1)
	go func() {
		defer wg.Done()
		select {
		case <-moved:
			cancel()
		case <-late:
			cancel()
		case <-p.ctx.Done():
			cancel()
		case <-done:
		}
	}()
	return func() { close(done); wg.Wait() }
}

// leaderAddress is where to ask: self if this node leads; else what a redirect
// told, what raft knows, or any node in turn.
func (p *Peer) leaderAddress(told string) (address string, self bool) {
	if leader, ok := p.store.Leader(); ok {
		if leader == p.store.Node() {
			return "", true
		}
		if told == "" {
			if n, ok := p.View().Node(leader); ok {
				return n.Addresses.API, false
			}
		}
	}
	if told != "" {
		return told, false
	}
	return p.nextTarget(), false
}

// nextTarget takes turns among the known addresses: those of the tables, and
// what was given or saved.
func (p *Peer) nextTarget() string {
	known := p.KnownAddresses()
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, t := range p.targets {
		if !slices.Contains(known, t) {
			known = append(known, t)
		}
	}
	if len(known) == 0 {
		return ""
	}
	p.turn++
	return known[p.turn%len(known)]
}

// KnownAddresses are the API addresses of the other nodes in the tables.
func (p *Peer) KnownAddresses() []string {
	var out []string
	for n := range p.View().Nodes() {
		if n.ID != p.store.Node() {
			out = append(out, n.Addresses.API)
		}
	}
	return out
}

func (p *Peer) addTargets(targets []string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, t := range targets {
		if !slices.Contains(p.targets, t) {
			p.targets = append(p.targets, t)
		}
	}
}

// pause waits before the next question: until the leader or the tables change,
// or a little longer each time.
func (p *Peer) pause(ctx context.Context, wait *time.Duration) error {
	timer := time.NewTimer(*wait)
	defer timer.Stop()
	moved := p.store.LeaderChanged()
	select {
	case <-timer.C:
	case <-moved:
	case <-p.store.Fatal():
		return p.store.Err()
	case <-p.ctx.Done():
		return errClosed()
	case <-ctx.Done():
		return ctx.Err()
	}
	*wait = min(2**wait, retryMost)
	return nil
}

// gaveUp is the error of a question that nobody answered.
func (p *Peer) gaveUp(ctx context.Context, what string, last error) error {
	switch {
	case p.store.Err() != nil:
		return p.store.Err()
	case p.ctx.Err() != nil:
		return errClosed()
	case last == nil:
		return holdfast.Errorf(holdfast.ErrTimeout, "%s: %w", what, ctx.Err())
	}
	return &holdfast.Error{Kind: holdfast.ErrTimeout, Message: what + ": " + holdfast.MessageOf(last), Remedy: holdfast.RemedyOf(last), Cause: ctx.Err()}
}

// Trouble is why the last question to the cluster has no answer yet and is asked
// again; nil if the last one was answered.
func (p *Peer) Trouble() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.trouble
}

// A question that nobody answers is logged once it is tellAfter old, and the next line
// about any is tellEvery later.
const (
	tellAfter = time.Second
	tellEvery = 10 * time.Second
)

// unanswered remembers and tells why a question is asked again; nil: one was answered.
func (p *Peer) unanswered(what string, since time.Time, err error) {
	now := time.Now()
	p.mu.Lock()
	p.trouble = err
	tell := err != nil && now.Sub(since) >= tellAfter && now.Sub(p.told) >= tellEvery
	if tell {
		p.told = now
	}
	p.mu.Unlock()
	if tell {
		p.log.Warn("the cluster does not answer; asking again", "question", what, "waited", now.Sub(since).Round(time.Second).String(), "error", err)
	}
}

func joinText(targets []string) string {
	if len(targets) == 1 {
		return targets[0]
	}
	return "one of " + strings.Join(targets, ", ")
}

// callError gives a gRPC error a kind.
func callError(what string, err error) error {
	kind := holdfast.ErrInternal
	switch status.Code(err) {
	case codes.Unavailable, codes.Canceled:
		kind = holdfast.ErrUnavailable
	case codes.DeadlineExceeded:
		kind = holdfast.ErrTimeout
	case codes.Unimplemented:
		kind = holdfast.ErrUnsupported
	}
	return &holdfast.Error{Kind: kind, Message: what + ": " + status.Convert(err).Message(), Cause: err}
}
