package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/holdfast-storage/holdfast"
	"github.com/holdfast-storage/holdfast/blockdev/hostdev"
)

// supplySize is the medium of one node: its disk, room for two copies of it,
// metadata and ballast. What is not written takes no memory.
const supplySize = 2 << 30

// mountLimit bounds mounts and their ends; the file system's journal is replayed.
const mountLimit = 60 * time.Second

// supply is the medium of a node whose power can be cut: ext4 on a loop device on
// a cell. It belongs to the director.
type supply struct {
	cell  *cell
	point string // where it is mounted
	boot  string // the file that the node sees as its kernel's boot id
	live  *live
}

// live is what the kernel has of a supply while there is power.
type live struct {
	conn   *hostdev.Connection
	server *hostdev.Server
	loop   *hostdev.Loop
}

// newSupply makes the file system and mounts it.
func newSupply(ctx context.Context, point, boot string) (*supply, error) {
	s := &supply{cell: newCell(supplySize), point: point, boot: boot}
	if err := os.MkdirAll(point, 0o700); err != nil {
		return nil, err
	}
	if err := s.newBoot(); err != nil {
		return nil, err
	}
	if err := s.connect(ctx); err != nil {
		return nil, errors.Join(err, s.disconnect())
	}
	_, err := command(ctx, nil, "mkfs.ext4", "-q", "-F", "-E", "lazy_itable_init=0,lazy_journal_init=0,nodiscard", s.live.loop.Path())
	if err == nil {
		err = s.mount(ctx)
	}
	if err != nil {
		return nil, errors.Join(err, s.disconnect())
	}
	return s, nil
}

// shareMounts makes mounts below a directory, and their ends, seen in the mount
// namespaces made from this one.
func shareMounts(dir string) error {
	err := unix.Mount(dir, dir, "", unix.MS_BIND, "")
	if err == nil {
		err = unix.Mount("", dir, "", unix.MS_SHARED, "")
	}
	if err != nil {
		return fmt.Errorf("share mounts below %s: %w", dir, err)
	}
	return nil
}

// unshareMounts ends what shareMounts began.
func unshareMounts(dir string) error {
	if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil && !errors.Is(err, unix.EINVAL) {
		return fmt.Errorf("unmount %s: %w", dir, err)
	}
	return nil
}

// newBoot draws another boot id, as a start of the kernel does.
func (s *supply) newBoot() error {
	return os.WriteFile(s.boot, []byte(holdfast.NewID[holdfast.InstanceID]().String()+"\n"), 0o600)
}

// connect makes the kernel device.
func (s *supply) connect(ctx context.Context) (err error) {
	l := &live{}
	s.live = l
	if l.conn, err = hostdev.Connect(ctx); err != nil {
		return err
	}
	fd, err := l.conn.Dup()
	if err != nil {
		return err
	}
	if l.server, err = hostdev.Serve(s.cell, fd, l.conn.Params(), hostdev.Options{}); err != nil {
		return err
	}
	file, err := hostdev.OpenRoot(l.conn.Root())
	if err != nil {
		return err
	}
	defer file.Close()
	if l.loop, err = hostdev.ConfigureLoop(ctx, file, "holdfast chaos"); err != nil {
		return err
	}
	l.conn.Release()
	return nil
}

func (s *supply) mount(ctx context.Context) error {
	_, err := command(ctx, nil, "mount", "-t", "ext4", "-o", "errors=remount-ro", s.live.loop.Path(), s.point)
	return err
}

// disconnect takes away what the kernel has.
func (s *supply) disconnect() error {
	ctx, cancel := context.WithTimeout(context.Background(), mountLimit) // also after an interrupt
	defer cancel()
	l := s.live
	s.live = nil
	if l == nil {
		return nil
	}
	var err error
	if e := unix.Unmount(s.point, unix.MNT_DETACH); e != nil && !errors.Is(e, unix.EINVAL) {
		err = fmt.Errorf("unmount %s: %w", s.point, e)
	}
	if l.loop != nil {
		l.loop.Clear()
	}
	if l.server != nil {
		// Detached, the file system is written back and ends by itself, then the
		// loop device, then the connection. Without power that is at once.
		select {
		case <-l.server.Done():
		case <-ctx.Done():
			err = errors.Join(err, holdfast.Errorf(holdfast.ErrTimeout, "the device at %s did not end", s.point))
		}
		_ = l.conn.Abort()
		l.server.Close(ctx)
	}
	if l.conn != nil {
		l.conn.Close()
	}
	return err
}

// sync makes what was done to files, other than by the node, durable.
func (s *supply) sync() error {
	dir, err := os.Open(s.point)
	if err != nil {
		return err
	}
	defer dir.Close()
	if err := unix.Syncfs(int(dir.Fd())); err != nil {
		return fmt.Errorf("sync %s: %w", s.point, err)
	}
	return nil
}

// powerOff ends nodes as a power cut does, all at one moment: nothing of what
// they do once the power is gone reaches their disks or anybody else.
func powerOff(ctx context.Context, nodes ...*node) error {
	for _, n := range nodes {
		n.supply.cell.hang()
	}
	for _, n := range nodes {
		if err := n.condemn(); err != nil {
			return err
		}
	}
	var errs []error
	for _, n := range nodes {
		if n.net != nil {
			errs = append(errs, n.net.remove(ctx, n.number))
		}
	}
	for _, n := range nodes {
		n.supply.cell.fail() // a process that waits for its disk can die now
	}
	for _, n := range nodes {
		n.kill()
		errs = append(errs, n.supply.disconnect())
	}
	return errors.Join(errs...)
}

// replaceDisk gives a node whose disk failed, and which is down, the same disk
// again without errors. The kernel has not started anew; what it could not write
// is lost.
func (n *node) replaceDisk(ctx context.Context) error {
	if err := n.supply.disconnect(); err != nil {
		return err
	}
	n.supply.cell.resume()
	ctx, cancel := context.WithTimeout(ctx, mountLimit)
	defer cancel()
	if err := n.supply.connect(ctx); err != nil {
		return err
	}
	return n.supply.mount(ctx)
}

// powerOn gives a node's disk power again, with what was not synced lost in part.
func (n *node) powerOn(ctx context.Context, rng *rand.Rand) (unsynced, lost int, err error) {
	unsynced, lost = n.supply.cell.restore(rng)
	if err := n.supply.newBoot(); err != nil {
		return unsynced, lost, err
	}
	if n.net != nil {
		if err := n.net.add(ctx, n.number); err != nil {
			return unsynced, lost, err
		}
	}
	ctx, cancel := context.WithTimeout(ctx, mountLimit)
	defer cancel()
	if err := n.supply.connect(ctx); err != nil {
		return unsynced, lost, err
	}
	return unsynced, lost, n.supply.mount(ctx)
}
