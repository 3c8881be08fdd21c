package main

import (
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/holdfast-storage/holdfast/cmd/internal/lab"
)

// The databases: stock Redis, told to answer a write only when it is on its disk.
var redis = []string{"redis-server", "--dir", "/data", "--appendonly", "yes", "--appendfsync", "always", "--save", "", "--protected-mode", "no"}

const (
	containerPort = "6379"
	swarmPort     = "6380"
)

// rowsAway is how many rows are written while a host is away, for it to catch up with.
const rowsAway = 300

// containerForm: the database's container dies with its host, and somebody starts the
// same container on another. With several rounds the host that went on dies next.
func (d *demo) containerForm(ctx context.Context) error {
	d.story.chapter("A database on a volume, and its host dies")
	holder := d.lab.Hosts[0]
	if _, err := d.docker(ctx, holder, "volume", "create", "-d", driver, "-o", "size=1G", "-o", "replicas=3", "data"); err != nil {
		return err
	}
	container := append([]string{"run", "-d", "--name", "db", "-p", containerPort + ":6379",
		"--mount", "type=volume,volume-driver=" + driver + ",source=data,target=/data", d.images.App}, redis...)
	if _, err := d.docker(ctx, holder, container...); err != nil {
		return err
	}
	for round := 1; round <= d.options.rounds; round++ {
		f := &form{Form: "container", RowsLost: []int{}}
		if round > 1 {
			f.Form = fmt.Sprintf("container-%d", round)
			d.story.chapter(fmt.Sprintf("Round %d: the next host dies", round))
		}
		d.report.Forms = append(d.report.Forms, f)
		next := d.lab.Hosts[(slices.Index(d.lab.Hosts, holder)+1)%len(d.lab.Hosts)]
		if err := d.move(ctx, holder, next, container, f); err != nil || d.options.breakage != "" {
			return err
		}
		// The container that died with the host is still known to its engine.
		if _, err := d.docker(ctx, holder, "rm", "-f", "db"); err != nil {
			return err
		}
		holder = next
	}
	if _, err := d.docker(ctx, holder, "rm", "-f", "db"); err != nil {
		return err
	}
	_, err := d.docker(ctx, holder, "volume", "rm", "data")
	return err
}

// move is one round: rows are written at a host, it dies, the container goes on at
// another, every row is there, and the dead one comes back.
func (d *demo) move(ctx context.Context, from, to *lab.Host, container []string, f *form) error {
	rows, killed, err := d.writeAndKill(ctx, from, containerPort, f)
	if err != nil {
		return err
	}
	move, cancel := context.WithDeadline(ctx, killed.Add(moveDeadline))
	defer cancel()
	if _, err := d.docker(move, to, container...); err != nil {
		return fmt.Errorf("the database does not start on %s: %w", to.Name, err)
	}
	address := to.Address + ":" + containerPort
	_, first, err := firstWrite(move, []string{address}, "first-write")
	if err != nil {
		return err
	}
	f.HostAfter, f.SecondsToFirstWrite = to.Name, first.Sub(killed).Seconds()
	d.story.line("the same container runs on %s: first write %.1f s after the death of %s", to.Name, f.SecondsToFirstWrite, from.Name)
	if err := d.verify(ctx, rows, address, f); err != nil || d.options.breakage != "" {
		return err
	}
	return d.comeBack(ctx, from, to, address, f)
}

// writeAndKill writes to the database on a host until there is enough to lose, and
// kills the host while writing.
func (d *demo) writeAndKill(ctx context.Context, h *lab.Host, port string, f *form) (*ledger, time.Time, error) {
	address := h.Address + ":" + port
	up, cancel := context.WithTimeout(ctx, writeDeadline)
	defer cancel()
	if _, _, err := firstWrite(up, []string{address}, "up"); err != nil {
		return nil, time.Time{}, err
	}
	d.story.line("redis on %s takes writes, and answers when they are on its disk (appendfsync always)", h.Name)
	rows := newLedger(f.Form)
	w, err := startWriting(up, rows, address)
	if err != nil {
		return nil, time.Time{}, err
	}
	d.story.line("a client outside of the three hosts writes rows and remembers what is acknowledged")
	if err := w.waitRows(up, minRows+minRows/5); err != nil {
		w.hostDied()
		return nil, time.Time{}, err
	}
	killed, err := d.killWhileWriting(ctx, w, h, f)
	return rows, killed, err
}

// comeBack starts a killed host again, with rows written meanwhile, and waits until it
// has caught up.
func (d *demo) comeBack(ctx context.Context, dead, alive *lab.Host, address string, f *form) error {
	d.story.chapter("The host comes back")
	away := newLedger(f.Form + "-away")
	write, cancel := context.WithTimeout(ctx, writeDeadline)
	defer cancel()
	w, err := startWriting(write, away, address)
	if err != nil {
		return err
	}
	err = w.waitRows(write, rowsAway)
	w.finish(write)
	if err != nil {
		return err
	}
	f.RowsWhileHostWasAway, _ = away.rows()
	status, err := alive.InspectVolume(ctx, "data")
	if err != nil {
		return err
	}
	d.story.line("%d more rows while %s is away; the volume is %v", f.RowsWhileHostWasAway, dead.Name, status)
	d.story.line("starting %s again (its engine asks 15 s each for the volume and the container it knew)", dead.Name)
	started := time.Now()
	if err := dead.Start(ctx); err != nil {
		return err
	}
	wait, cancel := context.WithTimeout(ctx, inSyncDeadline)
	defer cancel()
	if status, err = alive.WaitWhole(wait, "data", 3); err != nil {
		return err
	}
	f.SecondsToInSync = time.Since(started).Seconds()
	d.story.command(alive.Name, "holdfast", "volume", "inspect", "data", "--json")
	d.story.line("the volume is whole again, %.1f s after the start of %s: %v", f.SecondsToInSync, dead.Name, status)
	a, err := away.check(ctx, address)
	if err != nil {
		return err
	}
	if len(a.lost) > 0 {
		return fmt.Errorf("%w: %d of %d that were written while %s was away", errLost, len(a.lost), f.RowsWhileHostWasAway, dead.Name)
	}
	return nil
}

// swarmForm: the database is a service, and Swarm starts it elsewhere.
func (d *demo) swarmForm(ctx context.Context) error {
	d.story.chapter("The same with Docker Swarm")
	f := &form{Form: "swarm", RowsLost: []int{}}
	d.report.Forms = append(d.report.Forms, f)
	first := d.lab.Hosts[0]

	if err := d.lab.StartSwarm(ctx); err != nil {
		return err
	}
	d.story.line("the hosts are one Swarm (docker swarm update --dispatcher-heartbeat 1s)")
	if err := d.lab.WaitDriver(ctx, driver); err != nil {
		return err
	}
	d.story.line("Swarm knows that each of them has the volume driver")
	service := append([]string{"service", "create", "--detach", "--no-resolve-image", "--name", "shop",
		"--mount", "type=volume,volume-driver=" + driver + ",source=shop,target=/data,volume-opt=size=1G,volume-opt=replicas=3",
		"--publish", "mode=host,published=" + swarmPort + ",target=6379", d.images.App}, redis...)
	if _, err := d.docker(ctx, first, service...); err != nil {
		return err
	}
	victim, err := d.taskHost(ctx, first)
	if err != nil {
		return err
	}
	d.story.line("Swarm started it on %s", victim.Name)
	rows, killed, err := d.writeAndKill(ctx, victim, swarmPort, f)
	if err != nil {
		return err
	}

	var addresses []string
	var survivors []*lab.Host
	for _, h := range d.lab.Hosts {
		if h != victim {
			survivors = append(survivors, h)
			addresses = append(addresses, h.Address+":"+swarmPort)
		}
	}
	move, cancel := context.WithDeadline(ctx, killed.Add(moveDeadline))
	defer cancel()
	address, at, err := firstWrite(move, addresses, "first-write")
	if err != nil {
		tasks, _ := survivors[0].Docker(ctx, "service", "ps", "--no-trunc", "shop")
		return fmt.Errorf("%w\n%s", err, tasks)
	}
	f.SecondsToFirstWrite = at.Sub(killed).Seconds()
	for i, h := range survivors {
		if addresses[i] == address {
			f.HostAfter = h.Name
		}
	}
	d.story.line("Swarm started it on %s: first write %.1f s after the death of %s", f.HostAfter, f.SecondsToFirstWrite, victim.Name)
	return d.verify(ctx, rows, address, f)
}

// taskHost waits until the service runs, and says where.
func (d *demo) taskHost(ctx context.Context, via *lab.Host) (*lab.Host, error) {
	ctx, cancel := context.WithTimeout(ctx, writeDeadline)
	defer cancel()
	for {
		h, err := d.lab.TaskHost(ctx, via, "shop")
		if err != nil || h != nil {
			return h, err
		}
		select {
		case <-ctx.Done():
			tasks, _ := via.Docker(context.WithoutCancel(ctx), "service", "ps", "--no-trunc", "shop")
			return nil, fmt.Errorf("the service does not start: %w\n%s", ctx.Err(), tasks)
		case <-time.After(200 * time.Millisecond):
		}
	}
}
