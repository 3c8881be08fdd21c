package node

import (
	"context"
	"os"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/holdfast-storage/holdfast"
	"github.com/holdfast-storage/holdfast/cmd/internal/reconcile"
)

// The metadata's store maps its files: on a file system that is full a write to them
// is a SIGBUS. So the file system of the data directory is watched, in units of the
// ballast (protocol, section 5):
//
//	below 2    images on it take no more space: what needs a new chunk is refused
//	           (so too on any other file system of which 97 % are in use)
//	below 1/2  this node does not lead raft
//	full       the ballast's own space is given back, until there is room again

// spaceEvery is how often it is looked at: with the ballast there is room for what is
// written meanwhile.
const spaceEvery = time.Second

// space is what was last found free.
type space struct {
	path    string
	ballast int64
	device  uint64       // of the file system
	free    atomic.Int64 // beyond the ballast
	given   atomic.Bool  // the ballast's space was given back
}

// newSpace looks once.
func newSpace(path string, ballast int64) (*space, error) {
	s := &space{path: path, ballast: ballast}
	info, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	s.device = deviceOf(info)
	return s, s.look()
}

func deviceOf(info os.FileInfo) uint64 {
	if st, ok := info.Sys().(*syscall.Stat_t); ok {
		return st.Dev
	}
	return 0
}

// unlimited is what a file system is taken to have that does not say what it has.
const unlimited = 1 << 62

func (s *space) look() error {
	var st unix.Statfs_t
	if err := unix.Statfs(s.path, &st); err != nil {
		return err
	}
	free := int64(unlimited)
	if st.Blocks > 0 {
		free = int64(st.Bavail) * st.Bsize
	}
	if s.given.Load() {
		free -= s.ballast
	}
	s.free.Store(free)
	return nil
}

// grow says why a disk at path may take no more space, or nil: of this very moment,
// for a disk can take much in a second.
func (s *space) grow(path string, ahead bool) error {
	if err := s.look(); err != nil {
		return err
	}
	if free := s.free.Load(); free < 2*s.ballast && s.holds(path) {
		return s.low(free, "twice")
	}
	mark := float64(reconcile.MarkRefuse)
	if ahead {
		mark = reconcile.MarkCredit
	}
	if f, ok := hostFill(path); ok && f*100 >= mark {
		return holdfast.Errorf(holdfast.ErrNoSpace, "%d %% of the file system of %s are in use", int(f*100), path).WithRemedy("make room there")
	}
	return nil
}

// hostFill is how full the file system is that an image is on, 0 to 1, as df counts
// it; false of a device, which has all its space, and of what cannot be asked.
func hostFill(path string) (float64, bool) {
	_, used, avail, ok := askHost(path)
	return float64(used) / float64(max(1, used+avail)), ok
}

// askHost asks for the file system that an image is on, in bytes.
func askHost(path string) (info os.FileInfo, used, avail int64, ok bool) {
	info, err := os.Stat(path)
	if err != nil || !info.Mode().IsRegular() {
		return nil, 0, 0, false
	}
	var st unix.Statfs_t
	if err := unix.Statfs(path, &st); err != nil || st.Blocks < st.Bfree {
		return nil, 0, 0, false
	}
	used, avail = int64(st.Blocks-st.Bfree)*st.Bsize, int64(st.Bavail)*st.Bsize
	return info, used, avail, used+avail > 0
}

// room is what the file system of an image has left for it until grow refuses.
func (s *space) room(path string) (reconcile.HostRoom, bool) {
	info, used, avail, ok := askHost(path)
	if !ok {
		return reconcile.HostRoom{}, false
	}
	left := avail - (used+avail)/100*(100-reconcile.MarkRefuse)
	if deviceOf(info) == s.device {
		if s.given.Load() {
			avail -= s.ballast
		}
		left = min(left, avail-2*s.ballast)
	}
	room := reconcile.HostRoom{FS: deviceOf(info), Left: max(0, left)}
	if st, ok := info.Sys().(*syscall.Stat_t); ok {
		room.Has = st.Blocks * 512 // stat(2): whatever the file system's blocks are
	}
	return room, true
}

// lead says why this node is not to lead, or nil.
func (s *space) lead() error {
	if free := s.free.Load(); free < s.ballast/2 {
		return s.low(free, "half of")
	}
	return nil
}

func (s *space) low(free int64, share string) error {
	return holdfast.Errorf(holdfast.ErrNoSpace, "the file system of %s has %s free, less than %s the ballast of %s",
		s.path, holdfast.FormatSize(max(0, free)), share, holdfast.FormatSize(s.ballast)).WithRemedy("make room there")
}

// holds says whether a file's bytes are of this file system. A device has its own.
func (s *space) holds(path string) bool {
	info, err := os.Stat(path)
	return err == nil && info.Mode().IsRegular() && deviceOf(info) == s.device
}

// watchSpace looks until ctx ends, and gives the ballast back while nothing else is
// left.
func (n *node) watchSpace(ctx context.Context) {
	tick := time.NewTicker(spaceEvery)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
		if err := n.space.look(); err != nil {
			n.log.Warn("free space of the data directory", "err", err)
			continue
		}
		n.store.Spare(n.space.lead())
		switch free := n.space.free.Load(); {
		case !n.space.given.Load() && free < n.o.ballast/8:
			n.log.Error("the data directory's file system is full: the ballast's space is given back", "path", n.o.DataDir, "free", free)
			if err := os.Truncate(n.dir.file("ballast"), 0); err != nil {
				n.log.Warn("give the ballast back", "err", err)
				continue
			}
			n.space.given.Store(true)
		case n.space.given.Load() && free > 2*n.o.ballast:
			if err := n.dir.keepBallast(n.o.ballast); err != nil {
				n.log.Warn("take the ballast again", "err", err)
				continue
			}
			n.log.Info("the data directory's file system has room again: the ballast is back", "path", n.o.DataDir)
			n.space.given.Store(false)
		}
	}
}
