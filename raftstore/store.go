package raftstore

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/hashicorp/raft"

	"github.com/holdfast-storage/holdfast"
	"github.com/holdfast-storage/holdfast/raftstore/badgerlog"
	"github.com/holdfast-storage/holdfast/raftstore/state"
)

const (
	// MaxCommand bounds the encoding of one command, in bytes. Raft ships up to
	// 64 entries at once, and each must fit badgerlog.MaxEntry.
	MaxCommand = 512 << 10
	// maxProposals bounds the proposals in flight; more wait for a place.
	maxProposals = 256
	// logCache is the number of entries kept in memory for followers.
	logCache = 512
	// snapshotsKept: the newest, and one before it should it be damaged.
	snapshotsKept = 2
	// poolSize is the number of idle raft connections kept per member.
	poolSize = 3
)

// Store is one member's copy of the cluster's metadata. Its methods may be
// called concurrently.
type Store struct {
	opts   Options
	raft   *raft.Raft
	fsm    *fsm
	log    *badgerlog.Store
	timed  *timedLog
	stream *streamLayer
	trans  *raft.NetworkTransport

	ctx       context.Context // the member's life: ends when Close begins
	cancel    context.CancelFunc
	wg        sync.WaitGroup
	closing   sync.Once
	closeErr  error
	proposals chan struct{} // a token per proposal in flight
	fatal     chan struct{} // closed when err is set
	halted    chan struct{} // closed when raft has ended

	mu       sync.Mutex // of the fields below
	identity identity
	hints    map[holdfast.NodeID]string // raft addresses that nodes told of themselves
	err      error                      // what stopped the node
	lead     *leadership                // nil while this member is not the leader, ready or not
	moved    chan struct{}              // closed and replaced when the leader changes
	had      bool                       // raft state was found by Open, or made since
	isStuck  bool                       // a write of the log is older than the patience
	full     error                      // see Spare
	stuck    chan struct{}              // closed while isStuck
}

// leadership is one term of this member as leader. ready is closed when every
// entry of earlier terms is applied.
type leadership struct{ ready chan struct{} }

// NotLeader says that a call must go to the leader. It is the cause of an
// ErrUnavailable error.
type NotLeader struct {
	Leader holdfast.NodeID // zero if none is known
}

// Error says who the leader is.
func (e *NotLeader) Error() string {
	if e.Leader.IsZero() {
		return "no leader is known"
	}
	return "the leader is node " + e.Leader.String()
}

// Open opens the store in Options.Dir. A node that has a cluster takes part at
// once; another waits for Bootstrap, or for a leader that adds it.
func Open(o Options) (_ *Store, err error) {
	o.setDefaults()
	if err := o.validate(); err != nil {
		if o.Listener != nil {
			o.Listener.Close()
		}
		return nil, err
	}
	s := &Store{opts: o, proposals: make(chan struct{}, maxProposals), fatal: make(chan struct{}), halted: make(chan struct{}),
		hints: map[holdfast.NodeID]string{}, moved: make(chan struct{}), stuck: make(chan struct{})}
	s.ctx, s.cancel = context.WithCancel(context.Background())
	s.fsm = newFSM(s.die)
	defer func() {
		if err != nil {
			s.cancel()
			s.release()
			o.Listener.Close()
		}
	}()
	if err := os.MkdirAll(o.Dir, 0o700); err != nil {
		return nil, holdfast.Errorf(holdfast.ErrIO, "make raft directory: %w", err)
	}
	// The log comes first: it locks the directory.
	s.log, err = badgerlog.Open(badgerlog.Options{Dir: filepath.Join(o.Dir, "log"), Logger: o.Logger, OnFail: s.die})
	if err != nil {
		return nil, err
	}
	if s.identity, err = loadIdentity(o.Dir, o.Node); err != nil {
		return nil, err
	}
	if err := s.startRaft(); err != nil {
		return nil, err
	}
	s.wg.Add(3)
	go s.followLeader()
	go s.followLeadership()
	go s.watchDisk()
	return s, nil
}

func (s *Store) startRaft() error {
	o := s.opts
	logger := raftLogger{o.Logger, "raft"}
	snaps, err := raft.NewFileSnapshotStoreWithLogger(o.Dir, snapshotsKept, logger)
	if err != nil {
		return holdfast.Errorf(holdfast.ErrIO, "open raft snapshots: %w", err)
	}
	s.timed = &timedLog{Store: s.log}
	cached, err := raft.NewLogCache(logCache, s.timed)
	if err != nil {
		return holdfast.Errorf(holdfast.ErrInternal, "open raft log cache: %w", err)
	}
	if s.had, err = raft.HasExistingState(cached, s.timed, snaps); err != nil {
		return fmt.Errorf("read raft state: %w", err)
	}
	s.stream = &streamLayer{listener: o.Listener, address: o.Address, node: s.identity.Node, cluster: s.Cluster,
		resolve: s.addressOf, dial: o.Dial, log: o.Logger, ctx: s.ctx, cancel: s.cancel}
	s.stream.start()
	s.trans = raft.NewNetworkTransportWithConfig(&raft.NetworkTransportConfig{
		Stream: s.stream, MaxPool: poolSize, Timeout: o.Timings.Connect, Logger: logger})
	conf := raft.DefaultConfig()
	conf.LocalID = raft.ServerID(s.identity.Node.String())
	conf.HeartbeatTimeout = o.Timings.Heartbeat
	conf.ElectionTimeout = o.Timings.Election
	conf.LeaderLeaseTimeout = o.Timings.Lease
	conf.SnapshotInterval = o.Timings.SnapshotInterval
	conf.SnapshotThreshold = o.Timings.SnapshotEntries
	conf.TrailingLogs = o.Timings.TrailingEntries
	conf.ShutdownOnRemove = false // the node decides what it does when it is removed
	conf.PreVoteDisabled = false
	conf.NoLegacyTelemetry = true
	conf.Logger = logger
	r, err := raft.NewRaft(conf, s.fsm, cached, s.timed, snaps, &quietTransport{s.trans, s.isStuckNow})
	if err != nil {
		return holdfast.Errorf(kindOr(err, holdfast.ErrInternal), "start raft in %s: %w", o.Dir, err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.raft = r
	return s.err // raft may have met an entry it cannot apply already
}

// kindOr returns err's kind, or another where it has none of its own.
func kindOr(err error, other holdfast.Kind) holdfast.Kind {
	var e *holdfast.Error
	if errors.As(err, &e) {
		return e.Kind
	}
	return other
}

// Close stops the member and waits for all it started. Called again it does
// nothing and answers the same.
func (s *Store) Close() error {
	s.closing.Do(func() {
		s.cancel()
		s.closeErr = s.release()
		s.wg.Wait()
	})
	return s.closeErr
}

// release ends what startRaft made, as far as it came.
func (s *Store) release() error {
	var errs []error
	if s.raft != nil {
		errs = append(errs, s.raft.Shutdown().Error())
	}
	close(s.halted)
	if s.trans != nil {
		s.trans.CloseStreams()
		errs = append(errs, s.trans.Close())
	} else if s.stream != nil {
		errs = append(errs, s.stream.Close())
	}
	if s.log != nil {
		errs = append(errs, s.log.Close())
	}
	return errors.Join(errs...)
}

// Node is this member's id.
func (s *Store) Node() holdfast.NodeID {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.identity.Node
}

// Cluster is the cluster that this member belongs to, zero before Bootstrap and Adopt.
func (s *Store) Cluster() holdfast.ClusterID {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.identity.Cluster
}

// Address is the raft address that other members dial.
func (s *Store) Address() string { return s.opts.Address }

// HasCluster reports whether the member belongs to a cluster: it was
// bootstrapped, or it adopted one to join it.
func (s *Store) HasCluster() bool { return !s.Cluster().IsZero() }

// Adopt makes the member belong to a cluster that it is about to join: from here
// on it accepts that cluster's raft connections and no other's. Durable on return.
func (s *Store) Adopt(cluster holdfast.ClusterID) error {
	s.mu.Lock()
	unfinished := s.had && s.identity.Cluster.IsZero()
	s.mu.Unlock()
	if unfinished {
		return holdfast.Errorf(holdfast.ErrRefused, "%s holds a bootstrap that did not end", s.opts.Dir).
			WithRemedy("bootstrap again, or start with an empty data directory to join")
	}
	return s.adopt(cluster)
}

func (s *Store) adopt(cluster holdfast.ClusterID) error {
	s.mu.Lock()
	id := s.identity
	s.mu.Unlock()
	if id.Cluster == cluster {
		return nil
	}
	if !id.Cluster.IsZero() {
		return holdfast.Errorf(holdfast.ErrRefused, "this data directory belongs to cluster %v, not %v", id.Cluster, cluster)
	}
	id.Cluster = cluster
	if err := saveIdentity(s.opts.Dir, id); err != nil {
		return err
	}
	s.mu.Lock()
	s.identity = id
	s.mu.Unlock()
	return nil
}

// Bootstrap makes a new cluster with this member as its only voter, and returns
// when its tables have begun. Called again, also after a crash in the middle, it
// goes on from where it was.
func (s *Store) Bootstrap(ctx context.Context, cluster holdfast.ClusterID) error {
	if own := s.Cluster(); !own.IsZero() && own != cluster {
		return s.adopt(cluster) // refuses
	}
	s.mu.Lock()
	had := s.had
	s.had = true
	s.mu.Unlock()
	if !had {
		conf := raft.Configuration{Servers: []raft.Server{{Suffrage: raft.Voter,
			ID: raft.ServerID(s.Node().String()), Address: memberAddress(s.Node(), s.opts.Address)}}}
		if err := s.raft.BootstrapCluster(conf).Error(); err != nil && !errors.Is(err, raft.ErrCantBootstrap) {
			return holdfast.Errorf(holdfast.ErrInternal, "bootstrap raft: %w", err)
		}
	}
	// Raft first: a directory that names a cluster and has no raft state is one
	// that joins, and waits for a leader for ever.
	if err := s.adopt(cluster); err != nil {
		return err
	}
	for s.View().Cluster().ID != cluster {
		moved, changed := s.LeaderChanged(), s.Changed()
		if s.IsLeader() {
			_, err := s.Propose(ctx, &state.InitCluster{ID: cluster, Level: holdfast.Level1})
			if err != nil && (!errors.Is(err, holdfast.ErrUnavailable) || s.ctx.Err() != nil) {
				return err
			}
			if err == nil {
				continue // the View shows it
			}
		}
		select {
		case <-moved:
		case <-changed:
		case <-s.fatal:
			return s.Err()
		case <-s.ctx.Done():
			return closed()
		case <-ctx.Done():
			return holdfast.Errorf(holdfast.ErrTimeout, "bootstrap: %w", ctx.Err())
		}
	}
	return nil
}

// View returns the tables as this member knows them now.
func (s *Store) View() *state.View { return s.fsm.view.Load() }

// Changed returns a channel that is closed at the next change of View. Take it
// before View, so that no change is missed; many changes may close it once.
func (s *Store) Changed() <-chan struct{} { return s.fsm.next() }

// WaitIndex waits until View has reached an index.
func (s *Store) WaitIndex(ctx context.Context, index uint64) error {
	return s.await(ctx, fmt.Sprintf("metadata index %d", index), func(v *state.View) bool { return v.Index() >= index })
}

func (s *Store) await(ctx context.Context, what string, done func(*state.View) bool) error {
	for {
		changed := s.Changed()
		if done(s.View()) {
			return nil
		}
		select {
		case <-changed:
		case <-s.fatal:
			return s.Err()
		case <-s.ctx.Done():
			return closed()
		case <-ctx.Done():
			return holdfast.Errorf(holdfast.ErrTimeout, "wait for %s: %w", what, ctx.Err())
		}
	}
}

// Fatal is closed when the member cannot go on: the process must end. Err says why.
func (s *Store) Fatal() <-chan struct{} { return s.fatal }

// Err is what stopped the member, nil while it runs.
func (s *Store) Err() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.err
}

// die stops the member for good. It is called from raft's own goroutines and
// must not wait for them.
func (s *Store) die(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.err != nil {
		return
	}
	s.err = err
	close(s.fatal)
	s.opts.Logger.Error("metadata store stops", "error", err)
	if s.raft != nil && s.ctx.Err() == nil {
		s.raft.Shutdown() // does not wait
	}
}

// LearnAddress notes the raft address that a node told of itself. It is
// preferred over the recorded one, which cannot be changed without a quorum.
func (s *Store) LearnAddress(node holdfast.NodeID, address string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, known := s.hints[node]; known || len(s.hints) < 4*MaxMembers {
		s.hints[node] = address
	}
}

// addressOf is the newest raft address known of a node.
func (s *Store) addressOf(node holdfast.NodeID, recorded string) string {
	s.mu.Lock()
	hint := s.hints[node]
	s.mu.Unlock()
	if hint != "" {
		return hint
	}
	if n, ok := s.View().Node(node); ok && !n.Removed {
		return n.Addresses.Raft
	}
	return recorded
}

// Leader returns the leader that this member knows of. A member whose log is
// stuck does not know itself for it.
func (s *Store) Leader() (holdfast.NodeID, bool) {
	_, id := s.raft.LeaderWithID()
	node, err := holdfast.ParseID[holdfast.NodeID](string(id))
	if err == nil && node == s.Node() && s.isStuckNow() {
		return holdfast.NodeID{}, false
	}
	return node, err == nil
}

// IsLeader reports whether this member leads and has applied all that came
// before it led.
func (s *Store) IsLeader() bool {
	_, ok := s.leading()
	return ok
}

// leading returns this member's leadership if it is ready.
func (s *Store) leading() (*leadership, bool) {
	s.mu.Lock()
	l := s.lead
	if s.isStuck {
		l = nil
	}
	s.mu.Unlock()
	if l == nil {
		return nil, false
	}
	select {
	case <-l.ready:
		return l, s.Err() == nil
	default:
		return l, false
	}
}

// LeaderChanged returns a channel that is closed when the leader that this member
// knows of changes, or when it becomes ready to lead or stops. Take it before
// Leader and IsLeader.
func (s *Store) LeaderChanged() <-chan struct{} {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.moved
}

// leaderMoved wakes who waits for LeaderChanged. s.mu is held.
func (s *Store) leaderMoved() {
	close(s.moved)
	s.moved = make(chan struct{})
}

// followLeader turns raft's observations into LeaderChanged.
func (s *Store) followLeader() {
	defer s.wg.Done()
	seen := make(chan raft.Observation, 1)
	observer := raft.NewObserver(seen, false, func(o *raft.Observation) bool {
		_, ok := o.Data.(raft.LeaderObservation)
		return ok
	})
	s.raft.RegisterObserver(observer)
	defer s.raft.DeregisterObserver(observer)
	for {
		select {
		case <-seen:
			s.mu.Lock()
			s.leaderMoved()
			s.mu.Unlock()
		case <-s.ctx.Done():
			return
		}
	}
}

// followLeadership begins and ends this member's leaderships.
func (s *Store) followLeadership() {
	defer s.wg.Done()
	for {
		select {
		case led := <-s.raft.LeaderCh():
			s.mu.Lock()
			s.lead = nil
			var l *leadership
			if led {
				l = &leadership{ready: make(chan struct{})}
				s.lead = l
			}
			s.leaderMoved()
			s.mu.Unlock()
			if led {
				s.beginLeadership(l)
			}
		case <-s.ctx.Done():
			return
		}
	}
}

// beginLeadership applies what earlier leaders committed, then begins the tables
// of a new cluster.
func (s *Store) beginLeadership(l *leadership) {
	for {
		err := s.wait(s.ctx, s.raft.Barrier(0), nil)
		if err == nil {
			break
		}
		if !errors.Is(err, errStuck) || !s.leadsAgain() {
			return // not the leader any more: the next word of LeaderCh says so
		}
	}
	close(l.ready)
	s.mu.Lock()
	s.leaderMoved()
	s.mu.Unlock()
	s.opts.Logger.Info("leading the metadata", "node", s.Node().String(), "index", s.View().Index())
	if s.View().Cluster().ID.IsZero() && s.HasCluster() {
		ctx, cancel := context.WithTimeout(s.ctx, 10*s.opts.Timings.Election)
		defer cancel()
		if _, err := s.Propose(ctx, &state.InitCluster{ID: s.Cluster(), Level: holdfast.Level1}); err != nil {
			s.opts.Logger.Warn("the new cluster's first command failed", "error", err)
		}
	}
}

// Propose applies a command, at the leader: elsewhere it is ErrUnavailable with a
// NotLeader as its cause. ErrUnavailable and ErrTimeout leave open whether the
// command was or will be applied; ErrNoSpace is of Refuses; any other error is the
// command's own answer.
func (s *Store) Propose(ctx context.Context, cmd state.Command) (state.Result, error) {
	if err := s.Err(); err != nil {
		return state.Result{}, err
	}
	if l, _ := s.leading(); l == nil {
		return state.Result{}, s.elsewhere()
	}
	level := max(s.View().Cluster().Level, holdfast.Level1)
	b, err := state.EncodeCommand(level, cmd)
	if err != nil {
		return state.Result{}, err
	}
	if len(b) > MaxCommand {
		return state.Result{}, holdfast.Errorf(holdfast.ErrInvalid, "%s takes %d bytes, more than %d", state.Name(cmd), len(b), MaxCommand)
	}
	stuck, _ := s.stuckNow()
	select {
	case s.proposals <- struct{}{}:
	case <-stuck:
		return state.Result{}, s.stuckError()
	case <-ctx.Done():
		return state.Result{}, timedOut(ctx, cmd)
	case <-s.ctx.Done():
		return state.Result{}, closed()
	}
	future := s.raft.Apply(b, 0)
	err = s.wait(ctx, future, func() { <-s.proposals })
	if err != nil {
		if ctx.Err() != nil {
			return state.Result{}, timedOut(ctx, cmd)
		}
		return state.Result{}, s.raftError(state.Name(cmd), err)
	}
	a, ok := future.Response().(answer)
	if !ok {
		return state.Result{}, holdfast.Errorf(holdfast.ErrInternal, "%s was answered with %T", state.Name(cmd), future.Response())
	}
	return a.res, a.err
}

// wait waits for a raft future, the context, a stuck log or the member's end; after runs
// once the future is done. The goroutine is not waited for by Close: raft forgets
// futures that are on their way to the FSM when it shuts down, and those never
// answer. It holds nothing but the future.
func (s *Store) wait(ctx context.Context, f raft.Future, after func()) error {
	done := make(chan error, 1)
	go func() {
		err := f.Error()
		if after != nil {
			after()
		}
		done <- err
	}()
	stuck, _ := s.stuckNow()
	select {
	case err := <-done:
		return err
	case <-stuck:
		return s.stuckError()
	case <-ctx.Done():
		return ctx.Err()
	case <-s.fatal:
		return s.Err()
	case <-s.halted:
		return raft.ErrRaftShutdown
	}
}

// ReadIndex returns an index such that a View of at least that index shows every
// command whose Propose returned, anywhere, before the call. Leader only.
func (s *Store) ReadIndex(ctx context.Context) (uint64, error) {
	// What this leader answered it has applied before; what earlier leaders
	// answered is applied when the leadership is ready. VerifyLeader then shows
	// that no later leader had answered anything when the call began.
	l, err := s.awaitReady(ctx)
	if err != nil {
		return 0, err
	}
	index := s.View().Index()
	if err := s.wait(ctx, s.raft.VerifyLeader(), nil); err != nil {
		if ctx.Err() != nil {
			return 0, holdfast.Errorf(holdfast.ErrTimeout, "verify the leader: %w", ctx.Err())
		}
		return 0, s.raftError("read index", err)
	}
	if now, ok := s.leading(); !ok || now != l {
		return 0, s.notLeader()
	}
	return index, nil
}

// awaitReady waits until this member, if it leads, is ready to.
func (s *Store) awaitReady(ctx context.Context) (*leadership, error) {
	l, ready := s.leading()
	for l != nil && !ready {
		moved := s.LeaderChanged()
		if l, ready = s.leading(); l == nil || ready {
			break
		}
		select {
		case <-moved:
			l, ready = s.leading()
		case <-s.fatal:
			return nil, s.Err()
		case <-s.ctx.Done():
			return nil, closed()
		case <-ctx.Done():
			return nil, holdfast.Errorf(holdfast.ErrTimeout, "wait for the leader to be ready: %w", ctx.Err())
		}
	}
	if l == nil {
		return nil, s.elsewhere()
	}
	return l, nil
}

// StepDown hands the leadership to another voter, if this member has it.
func (s *Store) StepDown(ctx context.Context) error {
	if l, _ := s.leading(); l == nil {
		return nil
	}
	if err := s.wait(ctx, s.raft.LeadershipTransfer(), nil); err != nil {
		return holdfast.Errorf(holdfast.ErrUnavailable, "hand over the leadership: %w", err)
	}
	return nil
}

// Snapshot writes a snapshot now, if anything changed since the last.
func (s *Store) Snapshot(ctx context.Context) error {
	err := s.wait(ctx, s.raft.Snapshot(), nil)
	if err != nil && !errors.Is(err, raft.ErrNothingNewToSnapshot) {
		return holdfast.Errorf(kindOr(err, holdfast.ErrInternal), "write a metadata snapshot: %w", err)
	}
	return nil
}

// LastContact is how long ago this member heard of the leader; zero on the leader.
func (s *Store) LastContact() time.Duration {
	if s.raft.State() == raft.Leader {
		return 0
	}
	return time.Since(s.raft.LastContact())
}

// elsewhere is notLeader for what has not begun, where nobody else might lead either.
func (s *Store) elsewhere() error {
	if err := s.Refuses(); err != nil {
		return err
	}
	return s.notLeader()
}

func (s *Store) notLeader() error {
	leader, _ := s.Leader()
	if leader == s.Node() {
		leader = holdfast.NodeID{} // it was until now
	}
	e := &NotLeader{Leader: leader}
	return &holdfast.Error{Kind: holdfast.ErrUnavailable, Message: "this node does not lead the metadata: " + e.Error(), Cause: e}
}

// raftError gives an error of raft a kind. The result of what was asked is
// unknown for all of them.
func (s *Store) raftError(what string, err error) error {
	switch {
	case s.Err() != nil:
		return s.Err()
	case holdfast.KindOf(err) == holdfast.ErrUnavailable:
		return err
	case errors.Is(err, raft.ErrNotLeader), errors.Is(err, raft.ErrLeadershipLost), errors.Is(err, raft.ErrLeadershipTransferInProgress):
		return s.notLeader()
	case errors.Is(err, raft.ErrRaftShutdown):
		return closed()
	}
	return holdfast.Errorf(holdfast.ErrUnavailable, "%s: %w", what, err)
}

func closed() error {
	return holdfast.Errorf(holdfast.ErrUnavailable, "the metadata store is closed")
}

func timedOut(ctx context.Context, cmd state.Command) error {
	return holdfast.Errorf(holdfast.ErrTimeout, "propose %s: %w", state.Name(cmd), ctx.Err())
}
