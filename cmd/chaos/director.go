package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/holdfast-storage/holdfast"
	"github.com/holdfast-storage/holdfast/cmd/internal/api"
	"github.com/holdfast-storage/holdfast/cmd/internal/api/apipb"
	"github.com/holdfast-storage/holdfast/cmd/internal/history"
)

// The volume: small, so that whole copies are cheap; each region is hot once.
const (
	volumeName     = "v"
	volumeSize     = 64 << 20
	volumeBlocks   = volumeSize / holdfast.BlockSize
	volumeReplicas = 3 // each on another node; some nodes have none
)

// Limits on what must come by itself once the trouble is over. They are wide: the
// machine may be busy, and what is judged here is that it comes at all.
const (
	startLimit    = 90 * time.Second // a cluster of fresh nodes
	healLimit     = 90 * time.Second // every replica in sync, clients served
	takeoverLimit = 60 * time.Second // a holder is gone after 5 s
	answerLimit   = 60 * time.Second // of a request, when nothing is wrong
)

// director makes trouble by a schedule and watches what comes of it.
type director struct {
	seed  uint64
	kinds []fault // that may come
	power bool    // nodes have disks whose power can be cut
	nodes []*node
	net   *network
	load  *load
	watch *watch
	say   func(string, ...any)

	effects []string // of the present fault
	tally   []tallied

	mu         sync.Mutex
	violations []history.Violation
}

// tallied counts one kind of fault.
type tallied struct {
	name       string
	made, felt int
	pause      time.Duration // the longest without any answer
}

// schedule draws the kinds of faults: decks of the kinds given, each once. Round
// i of a seed is the same in every run.
func schedule(seed uint64, kinds []fault) func() fault {
	rng := rand.New(rand.NewPCG(seed, 0))
	var deck []fault
	return func() fault {
		if len(deck) == 0 {
			for _, i := range rng.Perm(len(kinds)) {
				deck = append(deck, kinds[i])
			}
		}
		next := deck[0]
		deck = deck[1:]
		return next
	}
}

// form starts the nodes, the volume and the load.
func (d *director) form(ctx context.Context) error {
	for i, n := range d.nodes {
		if err := d.net.add(ctx, n.number); err != nil {
			return err
		}
		if err := os.MkdirAll(n.medium(), 0o700); err != nil {
			return err
		}
		if d.power {
			s, err := newSupply(ctx, n.medium(), filepath.Join(n.dir, "boot_id"))
			if err != nil {
				return fmt.Errorf("a disk whose power can be cut: %w", err)
			}
			n.supply = s
		}
		if err := n.start(); err != nil {
			return err
		}
		if err := d.until(ctx, startLimit, n.name+" ready", func() bool {
			s, err := n.status(ctx)
			return err == nil && s.Ready && int(s.Nodes) > i
		}); err != nil {
			return err
		}
	}
	const voters = 3 // of three to five nodes
	if err := d.until(ctx, startLimit, fmt.Sprintf("%d voters", voters), func() bool {
		s, err := d.nodes[0].status(ctx)
		return err == nil && int(s.Voters) == voters && int(s.NodesUp) == len(d.nodes)
	}); err != nil {
		return err
	}
	err := d.nodes[0].call(ctx, startLimit, func(ctx context.Context, c *api.Client) error {
		_, err := c.CreateVolume(ctx, &apipb.CreateVolumeRequest{Name: volumeName, Options: map[string]string{
			"size": fmt.Sprintf("%dB", int64(volumeSize)), "replicas": fmt.Sprint(volumeReplicas),
		}})
		return err
	})
	if err != nil {
		return fmt.Errorf("create the volume: %w", err)
	}
	return d.nodes[0].attach(ctx, takeoverLimit, false)
}

// rounds makes trouble until the time is over.
func (d *director) rounds(ctx context.Context, until time.Time) error {
	next := schedule(d.seed, d.kinds)
	for round := 1; time.Now().Before(until); round++ {
		f := next()
		if err := d.healthy(ctx); err != nil {
			return fmt.Errorf("before round %d: %w", round, err)
		}
		d.say("round %d: %s", round, f.name)
		if err := d.round(ctx, f, rand.New(rand.NewPCG(d.seed, uint64(round)))); err != nil {
			return fmt.Errorf("round %d (%s): %w", round, f.name, err)
		}
	}
	return nil
}

// round makes one fault and counts it if it was felt.
func (d *director) round(ctx context.Context, f fault, rng *rand.Rand) error {
	d.effects = nil
	_, evictions, _ := d.watch.view()
	before := d.load.latest()
	d.load.rec.resetGap()
	err := f.make(ctx, d, rng)
	if err == nil {
		err = d.healthy(ctx)
	}
	if _, now, _ := d.watch.view(); now > evictions {
		d.seen("%d evicted", now-evictions)
	}
	if after := d.load.latest(); after != before {
		d.seen("epoch %d on %s after %d on %s", after.epoch, after.node.name, before.epoch, before.node.name)
	}
	gap := d.load.rec.longestGap()
	if gap >= stall {
		d.seen("no answer for %.1f s", gap.Seconds())
	}
	d.count(f.name, gap)
	return err
}

func (d *director) count(name string, pause time.Duration) {
	at := slices.IndexFunc(d.tally, func(t tallied) bool { return t.name == name })
	if at < 0 {
		at = len(d.tally)
		d.tally = append(d.tally, tallied{name: name})
	}
	t := &d.tally[at]
	t.made++
	if len(d.effects) > 0 {
		t.felt++
	}
	t.pause = max(t.pause, pause)
	d.say("  effects: %s", strings.Join(d.effects, "; "))
}

// seen notes an effect of the present fault.
func (d *director) seen(format string, args ...any) {
	d.effects = append(d.effects, fmt.Sprintf(format, args...))
}

func (d *director) step(format string, args ...any) { d.say("  "+format, args...) }

// violation notes a broken promise that the director itself saw.
func (d *director) violation(rule, format string, args ...any) error {
	v := history.Violation{Rule: rule, Block: -1, What: fmt.Sprintf(format, args...)}
	d.found(v)
	return errors.New(v.String())
}

// found notes a broken promise. May be called by anyone.
func (d *director) found(v history.Violation) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.violations = append(d.violations, v)
	d.say("VIOLATION %v", v)
}

// wait lets a time pass, which is part of the fault, unless the run ends.
func (d *director) wait(ctx context.Context, t time.Duration) {
	select {
	case <-time.After(t):
	case <-ctx.Done():
	}
}

// until polls what processes come to by themselves.
func (d *director) until(ctx context.Context, limit time.Duration, what string, cond func() bool) error {
	deadline := time.Now().Add(limit)
	for !cond() {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if time.Now().After(deadline) {
			return holdfast.Errorf(holdfast.ErrTimeout, "after %v still not: %s", limit, what)
		}
		d.wait(ctx, 100*time.Millisecond)
	}
	return nil
}

// whole reports whether the volume is attached and every replica in sync.
func (d *director) whole() bool {
	v, _, _ := d.watch.view()
	if v == nil {
		return false
	}
	for _, r := range v.Replicas {
		if r.State != "in-sync" {
			return false
		}
	}
	return len(v.Replicas) == int(v.ReplicaCount)
}

// healthy waits until all that was broken is whole: nodes up with a leader, the
// volume attached, its clients answered, its replicas in sync. A volume whose
// holder forgot it, because another was to have it, is attached again.
func (d *director) healthy(ctx context.Context) error {
	asked := time.Now()
	err := d.until(ctx, healLimit, "all nodes up, the volume whole and its clients served", func() bool {
		if v, _, _ := d.watch.view(); v == nil && time.Since(asked) > 10*time.Second {
			asked = time.Now()
			d.step("nobody holds the volume: %s is asked to", d.nodes[0].name)
			if err := d.nodes[0].attach(ctx, takeoverLimit, false); err != nil {
				d.step("attach: %v", err)
			}
		}
		s := d.load.latest()
		return d.up(ctx) && d.whole() && s != nil && s.alive()
	})
	if err != nil {
		return err
	}
	before := d.load.rec.answered()
	return d.until(ctx, healLimit, "clients are answered", func() bool {
		return d.load.rec.answered() > before+clientsPerSession
	})
}

func (d *director) up(ctx context.Context) bool {
	for _, n := range d.nodes {
		s, err := n.status(ctx)
		if err != nil || s.Leader == "" || int(s.NodesUp) != len(d.nodes) {
			return false
		}
	}
	return true
}

// holder is the node of the latest session.
func (d *director) holder() *node { return d.load.latest().node }

// replica draws a node that is not the holder and has a replica.
func (d *director) replica(rng *rand.Rand) *node {
	v, _, _ := d.watch.view()
	has := map[string]bool{}
	if v != nil {
		for _, r := range v.Replicas {
			has[r.Node] = true
		}
	}
	h, first := d.holder(), (*node)(nil)
	for _, i := range rng.Perm(len(d.nodes)) {
		if n := d.nodes[i]; n != h {
			if has[n.name] {
				return n
			}
			first = n
		}
	}
	return first
}

// other is the next node after n.
func (d *director) other(n *node) *node { return d.nodes[n.number%len(d.nodes)] }

func (d *director) leader(ctx context.Context) (*node, error) {
	for _, asked := range d.nodes {
		s, err := asked.status(ctx)
		if err != nil {
			continue
		}
		for _, n := range d.nodes {
			if n.name == s.Leader {
				return n, nil
			}
		}
	}
	return nil, holdfast.Errorf(holdfast.ErrUnavailable, "no node knows the raft leader")
}

func (d *director) kill(n *node) {
	n.kill()
	d.step("%s killed", n.name)
}

// restart starts a node that was killed, and sees it open its disk again.
func (d *director) restart(ctx context.Context, n *node) error {
	return d.startAll(ctx, n)
}

// killFor kills nodes and starts them again after a time.
func (d *director) killFor(ctx context.Context, down time.Duration, victims ...*node) error {
	for _, n := range victims {
		d.kill(n)
	}
	d.wait(ctx, down)
	return d.startAll(ctx, victims...)
}

// powerFor cuts the power of nodes for a time.
func (d *director) powerFor(ctx context.Context, rng *rand.Rand, dark time.Duration, victims ...*node) error {
	if err := powerOff(ctx, victims...); err != nil {
		return err
	}
	for _, n := range victims {
		d.step("%s has no power", n.name)
	}
	d.wait(ctx, dark)
	return d.powerUp(ctx, rng, victims...)
}

// powerUp gives nodes power again and starts them.
func (d *director) powerUp(ctx context.Context, rng *rand.Rand, victims ...*node) error {
	for _, n := range victims {
		unsynced, lost, err := n.powerOn(ctx, rng)
		if err != nil {
			return fmt.Errorf("power for %s: %w", n.name, err)
		}
		if lost > 0 {
			d.seen("%s lost %d of %d unsynced pages", n.name, lost, unsynced)
		}
	}
	return d.startAll(ctx, victims...)
}

// startAll starts nodes that are down, and sees them open their disks again.
func (d *director) startAll(ctx context.Context, victims ...*node) error {
	errs := make([]error, len(victims))
	marks := make([]int, len(victims))
	for i, n := range victims { // all first: one alone may wait for the others
		marks[i] = n.log.count()
		errs[i] = n.start()
		d.step("%s started", n.name)
	}
	if err := errors.Join(errs...); err != nil {
		return err
	}
	for i, n := range victims {
		if err := d.until(ctx, healLimit, n.name+" runs again", func() bool {
			for _, e := range n.log.since(marks[i]) {
				if e.Msg == "node runs" {
					return true
				}
			}
			return false
		}); err != nil {
			return err
		}
		d.seen("%s died and recovered its disk", n.name)
	}
	return nil
}

func (d *director) pauseFor(ctx context.Context, t time.Duration, n *node) error {
	if err := n.pause(); err != nil {
		return err
	}
	d.step("%s stopped for %.1f s", n.name, t.Seconds())
	d.wait(ctx, t)
	return n.resume()
}

// hangFor lets a node's disk answer nothing for a time.
func (d *director) hangFor(ctx context.Context, t time.Duration, n *node) error {
	d.step("the disk of %s hangs for %.1f s", n.name, t.Seconds())
	n.supply.cell.hang()
	d.wait(ctx, t)
	n.supply.cell.resume()
	return nil
}

// repair replaces a disk with I/O errors and starts its node again.
func (d *director) repair(ctx context.Context, n *node) error {
	if !n.answers() {
		d.seen("%s ended by itself", n.name)
	}
	d.kill(n)
	if err := n.replaceDisk(ctx); err != nil {
		return fmt.Errorf("another disk for %s: %w", n.name, err)
	}
	return d.startAll(ctx, n)
}

func (d *director) cut(ctx context.Context, n *node, c cut) error {
	d.step("%s cut: %+v", n.name, c)
	return d.net.cut(ctx, n.number, c)
}

// mend ends what is cut of a node, and counts what was lost by it.
func (d *director) mend(ctx context.Context, n *node) error {
	dropped, err := d.net.dropped(ctx, n.number)
	if err != nil {
		return err
	}
	if dropped > 0 {
		d.seen("%d packets of %s lost", dropped, n.name)
	}
	d.step("%s mended", n.name)
	return d.net.heal(ctx, n.number)
}

func (d *director) cutFor(ctx context.Context, t time.Duration, n *node, c cut) error {
	if err := d.cut(ctx, n, c); err != nil {
		return err
	}
	d.wait(ctx, t)
	return d.mend(ctx, n)
}

// takeover attaches the volume on another node.
func (d *director) takeover(ctx context.Context, next *node, force bool) error {
	started := time.Now()
	for {
		err := next.attach(ctx, takeoverLimit, force)
		if err == nil {
			d.step("%s holds the volume, %.1f s after it was asked to", next.name, time.Since(started).Seconds())
			return nil
		}
		// A holder that went silent a moment ago counts as alive for a while.
		if !errors.Is(err, holdfast.ErrRefused) || time.Since(started) > takeoverLimit {
			return fmt.Errorf("attach on %s: %w", next.name, err)
		}
		d.wait(ctx, 500*time.Millisecond)
	}
}
