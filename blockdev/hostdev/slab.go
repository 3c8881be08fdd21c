package hostdev

import (
	"sync"

	"golang.org/x/sys/unix"

	"github.com/holdfast-storage/holdfast"
)

const (
	pageSize = 4096
	// smallPayload is what most requests fit in; a payload up to this size is
	// moved out of the reader's large slab, so that the large ones stay few.
	smallPayload = 64 << 10
	largePayload = maxWrite

	// readySmall and readyLarge slabs (beside each reader's own) are there from
	// the start, so that a device makes progress when memory is short: memory may
	// be short because of what this very device has yet to write.
	readySmall = 16
	readyLarge = 2

	// maxSmallSlabs bounds the small requests in flight per device: the loop
	// device's queue (128) and what the file systems' helpers add.
	maxSmallSlabs = 192
	// maxLargeSlabs bounds the large requests in flight per device, and with
	// them the locked memory: 32 MiB.
	maxLargeSlabs = 32
)

// slab is one request's memory as the kernel sees it: one page for the header,
// which ends where the payload begins, then the payload on a page boundary. So
// one read(2) takes a whole WRITE and one write(2) answers a whole READ, both
// with aligned data.
//
//	0        page-80  page-16   page                        page+payload
//	| unused | request header -> | payload ..................|
//	                 | reply  -> |
//
// The memory is mapped, populated and locked, never Go heap: were a page absent
// when a SIGKILL comes, the kernel's copy would stop short and the application
// would get EIO, although the next daemon could have served it.
type slab struct {
	mem  []byte
	home *slabs
}

// request returns the bytes to read a request into.
func (s *slab) request() []byte { return s.mem[pageSize-requestHead:] }

// head returns the request's header and fixed arguments.
func (s *slab) head() []byte { return s.mem[pageSize-requestHead : pageSize] }

// payload returns n bytes of payload.
func (s *slab) payload(n int) []byte { return s.mem[pageSize : pageSize+n] }

// reply returns the bytes to write for a reply with n bytes of payload.
func (s *slab) reply(n int) []byte { return s.mem[pageSize-outHeaderSize : pageSize+n] }

func (s *slab) free() { s.home.put(s) }

// slabs is a pool of slabs of one size. It grows on demand to its limit and
// keeps what it has until close.
type slabs struct {
	size  int
	limit int
	idle  chan *slab

	mu       sync.Mutex
	made     []*slab
	unlocked bool // some memory could not be locked
}

// newSlabs makes a pool; fill makes its first slabs.
func newSlabs(payload, limit int) *slabs {
	return &slabs{size: pageSize + payload, limit: limit, idle: make(chan *slab, limit)}
}

// fill makes n slabs ready.
func (p *slabs) fill(n int) error {
	for range n {
		s, err := p.grow()
		if err != nil {
			return err
		}
		if s != nil {
			s.free()
		}
	}
	return nil
}

// get returns a slab, waiting for one when the limit is reached; nil once stop
// is closed.
func (p *slabs) get(stop <-chan struct{}) (*slab, error) {
	select {
	case s := <-p.idle:
		return s, nil
	default:
	}
	if s, err := p.grow(); s != nil || err != nil {
		return s, err
	}
	select {
	case s := <-p.idle:
		return s, nil
	case <-stop:
		return nil, nil
	}
}

func (p *slabs) grow() (*slab, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.made) == p.limit {
		return nil, nil
	}
	mem, locked, err := lockedMemory(p.size)
	if err != nil {
		if len(p.made) > 0 {
			return nil, nil // short of memory: make do with what there is
		}
		return nil, err
	}
	p.unlocked = p.unlocked || !locked
	s := &slab{mem: mem, home: p}
	p.made = append(p.made, s)
	return s, nil
}

func (p *slabs) put(s *slab) { p.idle <- s }

// close unmaps every slab. None may be in use.
func (p *slabs) close() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, s := range p.made {
		_ = unix.Munmap(s.mem)
		s.mem = nil
	}
	p.made = nil
}

func (p *slabs) anyUnlocked() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.unlocked
}

// lockedMemory maps n bytes, populated and, where the process may, locked.
func lockedMemory(n int) (mem []byte, locked bool, err error) {
	const flags = unix.MAP_PRIVATE | unix.MAP_ANONYMOUS | unix.MAP_POPULATE
	const prot = unix.PROT_READ | unix.PROT_WRITE
	if mem, err = unix.Mmap(-1, 0, n, prot, flags|unix.MAP_LOCKED); err == nil {
		return mem, true, nil
	}
	if mem, err = unix.Mmap(-1, 0, n, prot, flags); err != nil {
		return nil, false, holdfast.Errorf(holdfast.ErrInternal, "map %d bytes for requests: %w", n, err)
	}
	return mem, false, nil
}
