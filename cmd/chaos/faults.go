package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"time"

	"github.com/holdfast-storage/holdfast"
)

// fault is one kind of trouble: it makes it, waits, and takes it away again. It
// returns what of its effects was seen; with none it does not count. An error
// ends the run: the trouble itself could not be made, or a promise was broken.
type fault struct {
	name string
	make func(ctx context.Context, d *director, rng *rand.Rand) error
	// power: it needs nodes whose power can be cut.
	power bool
}

// faults are all kinds. A schedule is a row of decks, each with every kind once.
var faults = []fault{
	{"kill a replica, back at once", killReplicaShortly, false},
	{"kill a replica, back late", killReplica, false},
	{"kill the holder, back at once", killHolderShortly, false},
	{"kill the holder, attach elsewhere", killHolder, false},
	{"kill the raft leader", killLeader, false},
	{"kill all nodes", killAll, false},
	{"stop a replica (SIGSTOP)", pauseReplica, false},
	{"stop the holder (SIGSTOP), attach elsewhere", pauseHolder, false},
	{"partition of a replica", partitionReplica, false},
	{"partition of the holder, attach elsewhere", partitionHolder, false},
	{"one-way partition of a replica", oneWayReplica, false},
	{"one-way partition of the holder", oneWayHolder, false},
	{"partition between holder and one replica", partitionPair, false},
	{"raft and heartbeats cut from a replica", raftOnly, false},
	{"replication cut from a replica", dataOnly, false},
	{"no raft quorum, replication whole", noQuorum, false},
	{"quorum of nodes killed", killQuorum, false},
	{"forced attach elsewhere", forcedAttach, false},
	{"detach and attach elsewhere", move, false},
	{"disk image rolled back", rollback, false},
	{"disk image cloned", clone, false},
	{"a replica stopped while the holder is killed", pauseAndKill, false},
	{"flapping network of a replica", flap, false},
	{"slow network of the holder", slowHolder, false},
	{"every node cut from every other", islands, false},
	{"the holder dies while a replica catches up", killDuringResync, false},
	{"the next holder dies while it takes over", killDuringTakeover, false},
	{"the disk of a replica hangs", hangReplica, true},
	{"the disk of the holder hangs", hangHolder, true},
	{"I/O errors on a replica's disk", failReplica, true},
	{"I/O errors on the holder's disk, attach elsewhere", failHolder, true},
	{"a replica loses power", powerReplica, true},
	{"the holder loses power, attach elsewhere", powerHolder, true},
	{"a replica is behind when the holder loses power", powerHolderBehind, true},
	{"all nodes lose power", powerAll, true},
	{"all nodes lose power but one that is killed", powerAllButOne, true},
}

// Times of faults. A member is suspected at 2 s and evicted at 5 s; a holder is
// gone after 5 s.
const (
	shortly = 1500 * time.Millisecond // below all limits
	stall   = time.Second             // without any answer: an effect that was seen
)

// between draws a time.
func between(rng *rand.Rand, from, to time.Duration) time.Duration {
	return from + time.Duration(rng.Int64N(int64(to-from)))
}

func long(rng *rand.Rand) time.Duration { return between(rng, 6*time.Second, 10*time.Second) }

// stopTime is around the limits, on both sides of them.
func stopTime(rng *rand.Rand) time.Duration { return between(rng, 3*time.Second, 8*time.Second) }

// hangTime is around the limits of a request's age, 10 s, too.
func hangTime(rng *rand.Rand) time.Duration { return between(rng, 3*time.Second, 20*time.Second) }

func killReplicaShortly(ctx context.Context, d *director, rng *rand.Rand) error {
	return d.killFor(ctx, between(rng, 0, shortly), d.replica(rng))
}

func killReplica(ctx context.Context, d *director, rng *rand.Rand) error {
	return d.killFor(ctx, long(rng), d.replica(rng))
}

func killHolderShortly(ctx context.Context, d *director, rng *rand.Rand) error {
	return d.killFor(ctx, between(rng, 0, shortly), d.holder())
}

func killHolder(ctx context.Context, d *director, rng *rand.Rand) error {
	h, next := d.holder(), d.replica(rng)
	d.kill(h)
	err := d.takeover(ctx, next, false)
	return errors.Join(err, d.restart(ctx, h))
}

func killLeader(ctx context.Context, d *director, rng *rand.Rand) error {
	leader, err := d.leader(ctx)
	if err != nil {
		return err
	}
	down := long(rng)
	d.kill(leader)
	other := d.other(leader)
	err = d.until(ctx, down, "another raft leader", func() bool {
		s, err := other.status(ctx)
		return err == nil && s.Leader != "" && s.Leader != leader.name
	})
	if err == nil {
		d.seen("%s leads raft after %s", "another node", leader.name)
	}
	d.wait(ctx, time.Second)
	return d.restart(ctx, leader)
}

func killAll(ctx context.Context, d *director, rng *rand.Rand) error {
	return d.killFor(ctx, between(rng, 0, 3*time.Second), d.nodes...)
}

func killQuorum(ctx context.Context, d *director, rng *rand.Rand) error {
	h := d.holder()
	var victims []*node
	for _, i := range rng.Perm(len(d.nodes)) {
		if n := d.nodes[i]; n != h && len(victims) < len(d.nodes)/2+1 {
			victims = append(victims, n)
		}
	}
	return d.killFor(ctx, long(rng), victims...)
}

func pauseReplica(ctx context.Context, d *director, rng *rand.Rand) error {
	return d.pauseFor(ctx, stopTime(rng), d.replica(rng))
}

func pauseHolder(ctx context.Context, d *director, rng *rand.Rand) error {
	h, next := d.holder(), d.replica(rng)
	if err := h.pause(); err != nil {
		return err
	}
	d.step("%s stopped", h.name)
	err := d.takeover(ctx, next, false)
	d.wait(ctx, between(rng, 0, 2*time.Second))
	d.step("%s goes on", h.name)
	return errors.Join(err, h.resume())
}

func pauseAndKill(ctx context.Context, d *director, rng *rand.Rand) error {
	h, slow := d.holder(), d.replica(rng)
	if err := slow.pause(); err != nil {
		return err
	}
	d.step("%s stopped", slow.name)
	d.wait(ctx, between(rng, 0, 4*time.Second)) // before or after its eviction
	d.kill(h)
	d.wait(ctx, between(rng, 0, 2*time.Second))
	if err := slow.resume(); err != nil {
		return err
	}
	d.step("%s goes on", slow.name)
	err := d.takeover(ctx, d.other(h), false)
	return errors.Join(err, d.restart(ctx, h))
}

func partitionReplica(ctx context.Context, d *director, rng *rand.Rand) error {
	return d.cutFor(ctx, long(rng), d.replica(rng), cut{in: true, out: true})
}

func partitionHolder(ctx context.Context, d *director, rng *rand.Rand) error {
	h, next := d.holder(), d.replica(rng)
	if err := d.cut(ctx, h, cut{in: true, out: true}); err != nil {
		return err
	}
	err := d.takeover(ctx, next, false)
	d.wait(ctx, between(rng, 0, 4*time.Second)) // the old one goes on asking for a while
	return errors.Join(err, d.mend(ctx, h))
}

func oneWayReplica(ctx context.Context, d *director, rng *rand.Rand) error {
	deaf := rng.IntN(2) == 0
	return d.cutFor(ctx, long(rng), d.replica(rng), cut{in: deaf, out: !deaf})
}

func oneWayHolder(ctx context.Context, d *director, rng *rand.Rand) error {
	deaf := rng.IntN(2) == 0
	return d.cutFor(ctx, long(rng), d.holder(), cut{in: deaf, out: !deaf})
}

func partitionPair(ctx context.Context, d *director, rng *rand.Rand) error {
	return d.cutFor(ctx, long(rng), d.replica(rng), cut{in: true, out: true, peer: d.holder().number})
}

func raftOnly(ctx context.Context, d *director, rng *rand.Rand) error {
	return d.cutFor(ctx, long(rng), d.replica(rng), cut{in: true, out: true, ports: []int{portAPI, portRaft}})
}

func dataOnly(ctx context.Context, d *director, rng *rand.Rand) error {
	return d.cutFor(ctx, long(rng), d.replica(rng), cut{in: true, out: true, ports: []int{portData}})
}

// noQuorum takes raft from everybody and leaves replication whole: I/O goes on.
func noQuorum(ctx context.Context, d *director, rng *rand.Rand) error {
	for _, n := range d.nodes {
		if err := d.cut(ctx, n, cut{in: true, out: true, ports: []int{portAPI, portRaft}}); err != nil {
			return err
		}
	}
	before := 0
	lost := d.until(ctx, long(rng), "no raft leader", func() bool {
		for _, n := range d.nodes {
			if s, err := n.status(ctx); err == nil && s.Leader != "" {
				return false
			}
		}
		before = d.load.rec.answered()
		return true
	})
	if lost == nil {
		d.wait(ctx, 3*time.Second)
		d.seen("no node knew a raft leader; %d requests were answered meanwhile", d.load.rec.answered()-before)
	}
	var errs []error
	for _, n := range d.nodes {
		errs = append(errs, d.mend(ctx, n))
	}
	return errors.Join(errs...)
}

func forcedAttach(ctx context.Context, d *director, rng *rand.Rand) error {
	return d.takeover(ctx, d.replica(rng), true)
}

func flap(ctx context.Context, d *director, rng *rand.Rand) error {
	n := d.replica(rng)
	for range 5 {
		if err := d.cutFor(ctx, between(rng, 300*time.Millisecond, 3*time.Second), n, cut{in: true, out: true}); err != nil {
			return err
		}
		d.wait(ctx, between(rng, 0, 2*time.Second))
	}
	return nil
}

// slowHolder gives the holder less than its clients write.
func slowHolder(ctx context.Context, d *director, rng *rand.Rand) error {
	const rate, look = "1mbit", 2 * time.Second
	h := d.holder()
	pace := func() float64 {
		before := d.load.rec.answered()
		d.wait(ctx, look)
		return float64(d.load.rec.answered()-before) / look.Seconds()
	}
	usual := pace()
	if err := d.net.slow(ctx, h.number, rate); err != nil {
		return err
	}
	d.step("%s sends %s", h.name, rate)
	d.wait(ctx, long(rng))
	if now := pace(); now < usual/2 {
		d.seen("%.0f answers/s, %.0f before", now, usual)
	}
	return d.net.slow(ctx, h.number, "")
}

func islands(ctx context.Context, d *director, rng *rand.Rand) error {
	for _, n := range d.nodes {
		if err := d.cut(ctx, n, cut{in: true, out: true}); err != nil {
			return err
		}
	}
	d.wait(ctx, long(rng))
	var errs []error
	for _, n := range d.nodes {
		errs = append(errs, d.mend(ctx, n))
	}
	return errors.Join(errs...)
}

func killDuringResync(ctx context.Context, d *director, rng *rand.Rand) error {
	h, behind := d.holder(), d.replica(rng)
	if err := d.killFor(ctx, long(rng), behind); err != nil {
		return err
	}
	d.wait(ctx, between(rng, 0, time.Second))
	if !d.whole() {
		d.seen("%s was not in sync yet", behind.name)
	}
	d.kill(h)
	err := d.takeover(ctx, d.other(h), false)
	return errors.Join(err, d.restart(ctx, h))
}

// killDuringTakeover kills whoever takes over, somewhere between its wait for the
// dead holder and its first writes. Nobody asks again: a node that was asked once
// attaches when it starts.
func killDuringTakeover(ctx context.Context, d *director, rng *rand.Rand) error {
	h, next := d.holder(), d.replica(rng)
	d.kill(h)
	asked := make(chan error, 1)
	go func() { asked <- next.attach(ctx, takeoverLimit, false) }()
	d.wait(ctx, between(rng, 3500*time.Millisecond, 6500*time.Millisecond))
	d.kill(next)
	if err := <-asked; err == nil {
		d.step("%s had taken over", next.name)
	}
	return d.startAll(ctx, h, next)
}

func hangReplica(ctx context.Context, d *director, rng *rand.Rand) error {
	return d.hangFor(ctx, hangTime(rng), d.replica(rng))
}

func hangHolder(ctx context.Context, d *director, rng *rand.Rand) error {
	return d.hangFor(ctx, hangTime(rng), d.holder())
}

func failReplica(ctx context.Context, d *director, rng *rand.Rand) error {
	n := d.replica(rng)
	d.step("%s has I/O errors", n.name)
	n.supply.cell.fail()
	d.wait(ctx, between(rng, 0, 8*time.Second))
	return d.repair(ctx, n)
}

func failHolder(ctx context.Context, d *director, rng *rand.Rand) error {
	h, next := d.holder(), d.replica(rng)
	d.step("%s has I/O errors", h.name)
	h.supply.cell.fail()
	d.wait(ctx, between(rng, 0, 4*time.Second))
	h.kill() // its metadata is on the same disk: it cannot go on
	err := d.takeover(ctx, next, false)
	return errors.Join(err, d.repair(ctx, h))
}

// move is what an operator does: nothing is lost, nobody sees an error.
func move(ctx context.Context, d *director, rng *rand.Rand) error {
	s, next := d.load.latest(), d.replica(rng)
	if err := s.stop(answerLimit); err != nil {
		return err
	}
	if err := next.detach(ctx, takeoverLimit); err != nil {
		return fmt.Errorf("detach: %w", err)
	}
	d.step("detached from %s", s.node.name)
	return d.takeover(ctx, next, false)
}

func powerReplica(ctx context.Context, d *director, rng *rand.Rand) error {
	return d.powerFor(ctx, rng, between(rng, 0, 8*time.Second), d.replica(rng))
}

func powerHolder(ctx context.Context, d *director, rng *rand.Rand) error {
	h, next := d.holder(), d.replica(rng)
	if err := powerOff(ctx, h); err != nil {
		return err
	}
	d.step("%s has no power", h.name)
	err := d.takeover(ctx, next, false)
	return errors.Join(err, d.powerUp(ctx, rng, h))
}

// powerHolderBehind leaves an in-sync replica without the last writes, which then
// are with the third alone: none of them may have been acknowledged, or all that
// was is there.
func powerHolderBehind(ctx context.Context, d *director, rng *rand.Rand) error {
	h, behind := d.holder(), d.replica(rng)
	if err := d.cut(ctx, behind, cut{in: true, out: true}); err != nil {
		return err
	}
	d.wait(ctx, between(rng, time.Second, 4*time.Second)) // not long enough to be evicted
	if err := powerOff(ctx, h); err != nil {
		return err
	}
	d.step("%s has no power", h.name)
	if err := d.mend(ctx, behind); err != nil {
		return err
	}
	err := d.takeover(ctx, d.other(h), false)
	return errors.Join(err, d.powerUp(ctx, rng, h))
}

// powerAll is the one fault after which acknowledged writes may be lost: those
// that were not flushed.
func powerAll(ctx context.Context, d *director, rng *rand.Rand) error {
	d.watch.allLostPower()
	return d.powerFor(ctx, rng, between(rng, 0, 2*time.Second), d.nodes...)
}

// powerAllButOne leaves one in-sync replica its memory: nothing may be lost.
func powerAllButOne(ctx context.Context, d *director, rng *rand.Rand) error {
	lucky := d.replica(rng)
	var dark []*node
	for _, n := range d.nodes {
		if n != lucky {
			dark = append(dark, n)
		}
	}
	if err := powerOff(ctx, dark...); err != nil {
		return err
	}
	d.step("all but %s have no power", lucky.name)
	d.kill(lucky)
	if err := lucky.start(); err != nil {
		return err
	}
	d.wait(ctx, between(rng, 0, 2*time.Second))
	return d.powerUp(ctx, rng, dark...)
}

// rollback puts an old image under a node: raft must refuse the disk. Then the
// true one comes back.
func rollback(ctx context.Context, d *director, rng *rand.Rand) error {
	n := d.replica(rng)
	d.kill(n)
	if err := n.copyImage(ctx, "old"); err != nil {
		return err
	}
	if err := d.restart(ctx, n); err != nil {
		return err
	}
	if err := d.until(ctx, healLimit, n.name+" in sync again", d.whole); err != nil {
		return err
	}
	d.wait(ctx, between(rng, 500*time.Millisecond, 3*time.Second)) // some writes that the old image lacks
	d.kill(n)
	if err := errors.Join(n.moveImage("", "new"), n.moveImage("old", "")); err != nil {
		return err
	}
	mark := n.log.count()
	if err := n.start(); err != nil {
		return err
	}
	d.step("%s started with its disk of before", n.name)
	refused := func() bool {
		for _, e := range n.log.since(mark) {
			if e.Msg == "a known disk is out" && strings.Contains(e.Err, "open") {
				return true
			}
		}
		return false
	}
	if err := d.until(ctx, healLimit, "the old disk refused", refused); err != nil {
		return d.violation("k", "%s was started with a disk image from before its last openings, and did not refuse it: %v", n.name, err)
	}
	d.seen("%s refused the old image", n.name)
	d.wait(ctx, between(rng, 0, 3*time.Second))
	d.kill(n)
	if err := errors.Join(n.removeImage(""), n.moveImage("new", "")); err != nil {
		return err
	}
	return d.restart(ctx, n)
}

// clone gives a copy of one node's disk to another: it must refuse to start.
func clone(ctx context.Context, d *director, rng *rand.Rand) error {
	n := d.replica(rng)
	thief := n
	for thief == n {
		thief = d.nodes[rng.IntN(len(d.nodes))]
	}
	d.kill(n)
	if err := n.copyImage(ctx, "clone"); err != nil {
		return err
	}
	if err := d.restart(ctx, n); err != nil {
		return err
	}
	if err := d.until(ctx, healLimit, n.name+" in sync again", d.whole); err != nil {
		return err
	}
	d.kill(thief)
	mark := thief.log.count()
	if err := thief.start("--disk", n.imageOf("clone")); err != nil {
		return err
	}
	limited, cancel := context.WithTimeout(ctx, healLimit)
	code, err := thief.exit(limited)
	cancel()
	if err != nil {
		return d.violation("k", "%s was given a copy of the disk of %s and did not refuse it", thief.name, n.name)
	}
	const exitRefused = 5
	said := ""
	for _, e := range thief.log.since(mark) {
		said = e.Msg
	}
	if code != exitRefused {
		return holdfast.Errorf(holdfast.ErrInternal, "%s with a copy of the disk of %s ended with %d, want %d: %s", thief.name, n.name, code, exitRefused, said)
	}
	d.seen("%s refused the clone of %s", thief.name, n.name)
	return errors.Join(n.removeImage("clone"), n.syncMedium(), d.restart(ctx, thief))
}
