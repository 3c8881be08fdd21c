package vfs

import (
	"fmt"
	"io"
	iofs "io/fs"
	"maps"
	"math/rand/v2"
	"path/filepath"
	"sort"
	"strings"
	"sync"
	"syscall"
)

type page = [PageSize]byte

// Memory is a file system in memory. The zero value is not usable; see
// NewMemory. Directories exist as soon as they are named. It is safe for
// concurrent use.
type Memory struct {
	mu         sync.Mutex
	bootID     string
	names      map[string]*inode // as the running system sees them
	synced     map[string]*inode // what SyncDir made durable
	nextID     int
	faults     []*Fault
	rng        *rand.Rand // of the background writeback; nil for none
	limit      int64      // bytes that may be held; 0 for no limit
	held       int64
	before     func(op Op, path string)
	beforeRead func(path string)
	lost       int // pages not synced that the crash which made this took
}

// inode is one file. Pages are never changed in place, so that clones share them.
type inode struct {
	id      int
	kind    Kind
	size    int64
	cache   map[int64]*page // what reads see
	medium  map[int64]*page // what a crash leaves
	dirty   map[int64]bool  // pages of cache that a crash may lose
	given   map[int64]bool  // zero pages that Allocate gave space
	onDisk  int64           // the size a crash leaves at least
	locked  bool
	foreign bool // like a file on FUSE: KeepsPages is false
}

// NewMemory returns an empty file system. Its boot id is made of the seed.
func NewMemory(seed uint64) *Memory {
	return &Memory{
		bootID: bootIDOf(seed),
		names:  map[string]*inode{},
		synced: map[string]*inode{},
	}
}

func bootIDOf(seed uint64) string {
	r := rand.New(rand.NewPCG(seed, 0xb007))
	return fmt.Sprintf("%08x-0000-4000-8000-%012x", uint32(r.Uint64()), r.Uint64()&(1<<48-1))
}

// AddDevice makes a block device of a fixed size.
func (m *Memory) AddDevice(path string, size int64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	ino := m.newInode(KindBlockDevice)
	ino.size, ino.onDisk = size, size
	m.names[path], m.synced[path] = ino, ino
}

// Writeback lets the system write dirty pages back by itself, at moments drawn
// from the seed, so that a crash can keep any of a page's versions.
func (m *Memory) Writeback(seed uint64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.rng = rand.New(rand.NewPCG(seed, 0x3b))
}

// Limit makes writes that would hold more than n bytes in all files together
// fail with ENOSPC; 0 lifts it.
func (m *Memory) Limit(n int64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.limit = n
}

// Held returns the bytes that all files together hold; zero pages hold none.
func (m *Memory) Held() int64 {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.held
}

// Foreign makes a file like one on a network or FUSE file system.
func (m *Memory) Foreign(path string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if ino := m.names[path]; ino != nil {
		ino.foreign = true
	}
}

// FlipBit flips one bit of a file, in the page cache and on the medium.
func (m *Memory) FlipBit(path string, off int64, bit uint) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	ino := m.names[path]
	if ino == nil || off >= ino.size {
		return fmt.Errorf("flip a bit of %s at %d: %w", path, off, iofs.ErrNotExist)
	}
	for _, pages := range []map[int64]*page{ino.cache, ino.medium} {
		var p page
		if old := pages[off/PageSize]; old != nil {
			p = *old
		}
		p[off%PageSize] ^= 1 << (bit % 8)
		pages[off/PageSize] = &p
	}
	return nil
}

// Crash returns the file system as the machine finds it after losing power
// now, as the seed decides: of each page not yet synced the old or the new
// bytes, of one page the first sectors new and the others old; of each file
// not yet in a synced directory its presence or absence. The boot id is
// another. The original is unchanged. No faults are carried over.
func (m *Memory) Crash(seed uint64) *Memory {
	m.mu.Lock()
	defer m.mu.Unlock()
	rng := rand.New(rand.NewPCG(seed, 0xc7a5))
	c := NewMemory(rng.Uint64())
	c.nextID, c.limit = m.nextID, m.limit
	// Two of seven crashes lose all, one keeps all, the rest lose some.
	keep := []float64{0, 0, 0.2, 0.4, 0.6, 0.8, 1}[rng.IntN(7)]
	torn := false
	for _, name := range sortedKeys(m.names, m.synced) {
		ino := m.synced[name]
		if now := m.names[name]; now != ino && rng.Float64() < keep {
			ino = now
		}
		if ino == nil {
			continue
		}
		d := c.newInode(ino.kind)
		d.id, d.foreign = ino.id, ino.foreign
		for i, p := range ino.medium {
			d.cache[i] = p
		}
		d.size = ino.onDisk
		if ino.size != ino.onDisk && rng.Float64() < keep {
			d.size = ino.size
		}
		for _, i := range sortedPages(ino.dirty) {
			p := ino.cache[i]
			if p == nil {
				p = &page{}
			}
			switch {
			case rng.Float64() < keep:
				d.cache[i] = p
			case !torn && rng.IntN(4) == 0:
				torn = true
				c.lost++
				t := page{}
				if old := d.cache[i]; old != nil {
					t = *old
				}
				copy(t[:512*(1+rng.IntN(7))], p[:])
				d.cache[i] = &t
			default:
				c.lost++
			}
		}
		for i, p := range d.cache {
			if i*PageSize >= d.size {
				delete(d.cache, i)
				continue
			}
			d.medium[i] = p
			c.held += PageSize
		}
		d.onDisk = d.size
		c.names[name], c.synced[name] = d, d
	}
	return c
}

// Lost returns how many pages that were not synced the crash that made this file
// system lost or tore.
func (m *Memory) Lost() int {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.lost
}

// Restart returns the file system as the next process finds it after this one
// was killed: nothing is lost, no lock is held, the boot id stays.
func (m *Memory) Restart() *Memory {
	m.mu.Lock()
	defer m.mu.Unlock()
	c := NewMemory(0)
	c.bootID, c.nextID, c.limit, c.held = m.bootID, m.nextID, m.limit, m.held
	clones := map[*inode]*inode{}
	clone := func(ino *inode) *inode {
		if d := clones[ino]; d != nil {
			return d
		}
		d := &inode{id: ino.id, kind: ino.kind, size: ino.size, onDisk: ino.onDisk, foreign: ino.foreign,
			cache: map[int64]*page{}, medium: map[int64]*page{}, dirty: map[int64]bool{}}
		for i, p := range ino.cache {
			d.cache[i] = p
		}
		for i, p := range ino.medium {
			d.medium[i] = p
		}
		for i := range ino.dirty {
			d.dirty[i] = true
		}
		d.given = maps.Clone(ino.given)
		clones[ino] = d
		return d
	}
	for name, ino := range m.names {
		c.names[name] = clone(ino)
	}
	for name, ino := range m.synced {
		c.synced[name] = clone(ino)
	}
	return c
}

// OpenFile implements FS.
func (m *Memory) OpenFile(path string, flags Flag) (File, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := m.fault(OpOpen, path); err != nil {
		return nil, err
	}
	ino := m.names[path]
	switch {
	case ino == nil && flags&Create == 0:
		return nil, &iofs.PathError{Op: "open", Path: path, Err: iofs.ErrNotExist}
	case ino == nil:
		ino = m.newInode(KindRegular)
		m.names[path] = ino
	case flags&Create != 0 && flags&Exclusive != 0:
		return nil, &iofs.PathError{Op: "open", Path: path, Err: iofs.ErrExist}
	}
	return &memFile{m: m, ino: ino, path: path}, nil
}

func (m *Memory) newInode(kind Kind) *inode {
	m.nextID++
	return &inode{id: m.nextID, kind: kind, cache: map[int64]*page{}, medium: map[int64]*page{}, dirty: map[int64]bool{}}
}

// Stat implements FS.
func (m *Memory) Stat(path string) (Stat, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if ino := m.names[path]; ino != nil {
		return ino.stat(), nil
	}
	for name := range m.names {
		if strings.HasPrefix(name, strings.TrimSuffix(path, "/")+"/") {
			return Stat{Kind: KindDirectory}, nil
		}
	}
	return Stat{}, &iofs.PathError{Op: "stat", Path: path, Err: iofs.ErrNotExist}
}

func (ino *inode) stat() Stat {
	return Stat{Kind: ino.kind, Size: ino.size, Identity: fmt.Sprintf("memory %d", ino.id), KeepsPages: !ino.foreign}
}

// Mkdir implements FS: directories need not be made.
func (m *Memory) Mkdir(string) error { return nil }

// ReadDir implements FS.
func (m *Memory) ReadDir(path string) ([]string, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	var names []string
	for name := range m.names {
		if filepath.Dir(name) == path {
			names = append(names, filepath.Base(name))
		}
	}
	sort.Strings(names)
	if names == nil {
		return nil, &iofs.PathError{Op: "readdir", Path: path, Err: iofs.ErrNotExist}
	}
	return names, nil
}

// Remove implements FS.
func (m *Memory) Remove(path string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	ino := m.names[path]
	if ino == nil {
		return &iofs.PathError{Op: "remove", Path: path, Err: iofs.ErrNotExist}
	}
	m.held -= int64(len(ino.cache)+len(ino.given)) * PageSize
	delete(m.names, path)
	return nil
}

// SyncDir implements FS.
func (m *Memory) SyncDir(path string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := m.fault(OpSyncDir, path); err != nil {
		return err
	}
	for name := range m.synced {
		if filepath.Dir(name) == path && m.names[name] == nil {
			delete(m.synced, name)
		}
	}
	for name, ino := range m.names {
		if filepath.Dir(name) == path {
			m.synced[name] = ino
		}
	}
	return nil
}

// BootID implements FS.
func (m *Memory) BootID() (string, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.bootID, nil
}

// memFile is a handle.
type memFile struct {
	m      *Memory
	ino    *inode
	path   string
	holds  bool
	closed bool
}

func (f *memFile) check(op Op) error {
	if f.closed {
		return &iofs.PathError{Op: op.String(), Path: f.path, Err: iofs.ErrClosed}
	}
	return f.m.fault(op, f.path)
}

func (f *memFile) ReadAt(p []byte, off int64) (int, error) { return f.read(p, off, false) }

func (f *memFile) ReadDirectAt(p []byte, off int64) (int, error) {
	if off%PageSize != 0 || len(p)%PageSize != 0 {
		return 0, &iofs.PathError{Op: "direct read", Path: f.path, Err: syscall.EINVAL}
	}
	if f.m.beforeRead != nil {
		f.m.beforeRead(f.path)
	}
	return f.read(p, off, true)
}

func (f *memFile) read(p []byte, off int64, direct bool) (int, error) {
	f.m.mu.Lock()
	defer f.m.mu.Unlock()
	if err := f.check(OpRead); err != nil {
		return 0, err
	}
	n := 0
	for n < len(p) && off < f.ino.size {
		i, in := off/PageSize, off%PageSize
		pages := f.ino.cache
		if direct && !f.ino.dirty[i] { // a direct read has dirty pages written back first
			pages = f.ino.medium
		}
		end := min(PageSize-in, f.ino.size-off, int64(len(p)-n))
		if src := pages[i]; src != nil {
			copy(p[n:n+int(end)], src[in:])
		} else {
			clear(p[n : n+int(end)])
		}
		n += int(end)
		off += end
	}
	switch {
	case n == len(p):
		return n, nil
	case n == 0:
		return 0, io.EOF
	}
	return n, io.ErrUnexpectedEOF
}

func (f *memFile) WriteAt(p []byte, off int64) (int, error) {
	if err := f.WritevAt([][]byte{p}, off); err != nil {
		return 0, err
	}
	return len(p), nil
}

func (f *memFile) WritevAt(bufs [][]byte, off int64) error {
	if f.m.before != nil {
		f.m.before(OpWrite, f.path)
	}
	f.m.mu.Lock()
	defer f.m.mu.Unlock()
	if err := f.check(OpWrite); err != nil {
		return err
	}
	for _, b := range bufs {
		if f.ino.kind == KindBlockDevice && off+int64(len(b)) > f.ino.size {
			return &iofs.PathError{Op: "write", Path: f.path, Err: syscall.ENOSPC}
		}
		if err := f.write(b, off); err != nil {
			return err
		}
		off += int64(len(b))
	}
	return nil
}

func (f *memFile) write(b []byte, off int64) error {
	ino, m := f.ino, f.m
	for len(b) > 0 {
		i, in := off/PageSize, off%PageSize
		n := min(PageSize-in, int64(len(b)))
		p := &page{}
		old := ino.cache[i]
		if old != nil {
			*p = *old
		}
		copy(p[in:], b[:n])
		switch {
		case *p == page{}:
			p = nil
		case old == nil && !ino.given[i] && m.limit > 0 && m.held+PageSize > m.limit:
			return &iofs.PathError{Op: "write", Path: f.path, Err: syscall.ENOSPC}
		}
		m.setPage(ino, i, p)
		ino.size = max(ino.size, off+n)
		off += n
		b = b[n:]
	}
	return nil
}

// setPage puts a page into the cache; nil for zeroes.
func (m *Memory) setPage(ino *inode, i int64, p *page) {
	if m.rng != nil && ino.dirty[i] && m.rng.IntN(4) == 0 { // written back before it is overwritten
		store(ino.medium, i, ino.cache[i])
	}
	switch {
	case ino.cache[i] == nil && p != nil && ino.given[i]:
		delete(ino.given, i) // its space is the page's now
	case ino.cache[i] == nil && p != nil:
		m.held += PageSize
	case ino.cache[i] != nil && p == nil:
		m.held -= PageSize
	}
	store(ino.cache, i, p)
	ino.dirty[i] = true
}

func store(pages map[int64]*page, i int64, p *page) {
	if p == nil {
		delete(pages, i)
	} else {
		pages[i] = p
	}
}

func (f *memFile) Sync() error {
	if f.m.before != nil {
		f.m.before(OpSync, f.path)
	}
	f.m.mu.Lock()
	defer f.m.mu.Unlock()
	if err := f.check(OpSync); err != nil {
		// As Linux does: the pages are clean now, and not on the medium.
		clear(f.ino.dirty)
		return err
	}
	for i := range f.ino.dirty {
		store(f.ino.medium, i, f.ino.cache[i])
	}
	clear(f.ino.dirty)
	f.ino.onDisk = f.ino.size
	return nil
}

func (f *memFile) Truncate(size int64) error {
	f.m.mu.Lock()
	defer f.m.mu.Unlock()
	if err := f.check(OpWrite); err != nil {
		return err
	}
	if f.ino.kind == KindBlockDevice {
		return &iofs.PathError{Op: "truncate", Path: f.path, Err: syscall.EINVAL}
	}
	for i := range f.ino.cache {
		if i*PageSize >= size {
			f.m.setPage(f.ino, i, nil)
		}
	}
	f.ino.size = size
	return nil
}

func (f *memFile) Size() (int64, error) {
	f.m.mu.Lock()
	defer f.m.mu.Unlock()
	return f.ino.size, nil
}

func (f *memFile) Allocate(off, n int64) error {
	f.m.mu.Lock()
	defer f.m.mu.Unlock()
	if err := f.check(OpAllocate); err != nil {
		return err
	}
	if f.ino.kind == KindBlockDevice {
		return nil
	}
	for i := off / PageSize; i*PageSize < off+n; i++ {
		if f.ino.cache[i] != nil || f.ino.given[i] {
			continue
		}
		if f.m.limit > 0 && f.m.held+PageSize > f.m.limit {
			return &iofs.PathError{Op: "allocate", Path: f.path, Err: syscall.ENOSPC}
		}
		if f.ino.given == nil {
			f.ino.given = map[int64]bool{}
		}
		f.ino.given[i] = true
		f.m.held += PageSize
	}
	return nil
}

func (f *memFile) PunchHole(off, n int64) error {
	f.m.mu.Lock()
	defer f.m.mu.Unlock()
	if err := f.check(OpPunch); err != nil {
		return err
	}
	if off%PageSize != 0 || n%PageSize != 0 {
		return &iofs.PathError{Op: "punch hole", Path: f.path, Err: syscall.EINVAL}
	}
	for i := off / PageSize; i < (off+n)/PageSize; i++ {
		if f.ino.cache[i] != nil || f.ino.dirty[i] {
			f.m.setPage(f.ino, i, nil)
		}
		if f.ino.given[i] {
			delete(f.ino.given, i)
			f.m.held -= PageSize
		}
	}
	return nil
}

func (f *memFile) DropCache() error    { return nil }
func (f *memFile) AdviseRandom() error { return nil }

func (f *memFile) NoCopyOnWrite() error { return nil }

func (f *memFile) Lock() error {
	f.m.mu.Lock()
	defer f.m.mu.Unlock()
	if f.ino.locked && !f.holds {
		return &iofs.PathError{Op: "flock", Path: f.path, Err: ErrLocked}
	}
	f.ino.locked, f.holds = true, true
	return nil
}

func (f *memFile) Stat() (Stat, error) {
	f.m.mu.Lock()
	defer f.m.mu.Unlock()
	return f.ino.stat(), nil
}

func (f *memFile) Close() error {
	f.m.mu.Lock()
	defer f.m.mu.Unlock()
	if f.closed {
		return &iofs.PathError{Op: "close", Path: f.path, Err: iofs.ErrClosed}
	}
	f.closed = true
	if f.holds {
		f.ino.locked = false
	}
	return nil
}

func sortedKeys(maps ...map[string]*inode) []string {
	seen := map[string]bool{}
	var keys []string
	for _, m := range maps {
		for k := range m {
			if !seen[k] {
				seen[k] = true
				keys = append(keys, k)
			}
		}
	}
	sort.Strings(keys)
	return keys
}

func sortedPages(m map[int64]bool) []int64 {
	keys := make([]int64, 0, len(m))
	for k := range m {
		keys = append(keys, k)
	}
	sort.Slice(keys, func(i, j int) bool { return keys[i] < keys[j] })
	return keys
}
