package mount

import (
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"sync"

	"github.com/holdfast-storage/holdfast"
)

const (
	// countsVersion is the version of the file of counts. 1: the first.
	countsVersion = 1
	// maxHolders bounds the ids per volume: containers of one host that share
	// one volume.
	maxHolders = 4096
	// maxCountsFile bounds the file that is read back.
	maxCountsFile = 64 << 20
)

// Counts remembers which mount ids (one per container) use which volume. It
// survives restarts: every change is on disk before the call returns. Safe for
// concurrent use.
//
// The file is JSON: {"version":1,"volumes":{NAME:[ID,...]}}.
type Counts struct {
	path string

	mu      sync.Mutex // also orders the writes of the file
	volumes map[string][]string
}

type countsFile struct {
	Version int                 `json:"version"`
	Volumes map[string][]string `json:"volumes"`
}

// OpenCounts reads the counts at path; a file that is not there is empty. A
// file that cannot be understood is an ErrIntegrity.
func OpenCounts(path string) (*Counts, error) {
	c := &Counts{path: path, volumes: make(map[string][]string)}
	st, err := os.Stat(path)
	if errors.Is(err, os.ErrNotExist) {
		return c, nil
	}
	if err == nil && st.Size() > maxCountsFile {
		return nil, holdfast.Errorf(holdfast.ErrIntegrity, "%s has %d bytes; counts never do", path, st.Size())
	}
	var b []byte
	if err == nil {
		b, err = os.ReadFile(path)
	}
	if err != nil {
		return nil, holdfast.Errorf(holdfast.ErrIO, "read the mount counts: %w", err)
	}
	var f countsFile
	if err := json.Unmarshal(b, &f); err != nil {
		return nil, holdfast.Errorf(holdfast.ErrIntegrity, "read the mount counts %s: %w", path, err).
			WithRemedy("remove the file once no container on this host uses a volume")
	}
	if f.Version != countsVersion {
		return nil, holdfast.Errorf(holdfast.ErrUnsupported, "the mount counts %s have version %d; this program reads %d", path, f.Version, countsVersion).
			WithRemedy("run the version of holdfast that wrote it, or a later one")
	}
	for volume, ids := range f.Volumes {
		if len(ids) > 0 {
			c.volumes[volume] = ids
		}
	}
	return c, nil
}

// Add records that id uses the volume. first says that nobody did before. An id
// that is recorded already is success.
func (c *Counts) Add(volume, id string) (first bool, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	ids := c.volumes[volume]
	if slices.Contains(ids, id) {
		return false, nil
	}
	if len(ids) >= maxHolders {
		return false, holdfast.Errorf(holdfast.ErrRefused, "volume %s is in use %d times on this node", volume, len(ids))
	}
	return len(ids) == 0, c.change(volume, append(slices.Clone(ids), id))
}

// Remove records that id uses the volume no more. last says that nobody does
// now, also when nobody did before: so a repeated Remove of the last id finds
// the unmount to do that the first may not have finished.
func (c *Counts) Remove(volume, id string) (last bool, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	ids := c.volumes[volume]
	i := slices.Index(ids, id)
	if i < 0 {
		return len(ids) == 0, nil
	}
	left := slices.Delete(slices.Clone(ids), i, i+1)
	return len(left) == 0, c.change(volume, left)
}

// Holders returns the ids that use the volume.
func (c *Counts) Holders(volume string) []string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return slices.Clone(c.volumes[volume])
}

// Volumes returns the volumes in use, sorted.
func (c *Counts) Volumes() []string {
	c.mu.Lock()
	defer c.mu.Unlock()
	var names []string
	for v := range c.volumes {
		names = append(names, v)
	}
	slices.Sort(names)
	return names
}

// Reconcile forgets the users of every volume that is not mounted: their
// containers ended with the mount, or have a dead one. It returns the volumes
// that it forgot.
func (c *Counts) Reconcile(mounted func(volume string) bool) (forgotten []string, err error) {
	for _, v := range c.Volumes() {
		if mounted(v) {
			continue
		}
		c.mu.Lock()
		err := c.change(v, nil)
		c.mu.Unlock()
		if err != nil {
			return forgotten, err
		}
		forgotten = append(forgotten, v)
	}
	return forgotten, nil
}

// change replaces one volume's ids, on disk first. The lock is held across the
// write: the file has one writer, and nothing waits here but other changes.
func (c *Counts) change(volume string, ids []string) error {
	next := make(map[string][]string, len(c.volumes)+1)
	for v, list := range c.volumes {
		next[v] = list
	}
	next[volume] = ids
	if len(ids) == 0 {
		delete(next, volume)
	}
	b, err := json.Marshal(countsFile{Version: countsVersion, Volumes: next})
	if err == nil {
		err = replaceFile(c.path, b)
	}
	if err != nil {
		return holdfast.Errorf(holdfast.ErrIO, "write the mount counts: %w", err)
	}
	c.volumes = next
	return nil
}

// replaceFile puts b in the place of the file at path, whole or not at all,
// durable on return.
func replaceFile(path string, b []byte) error {
	temporary := path + ".new"
	f, err := os.OpenFile(temporary, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(b)
	if err = errors.Join(err, f.Sync(), f.Close()); err != nil {
		return err
	}
	if err := os.Rename(temporary, path); err != nil {
		return err
	}
	return syncDir(filepath.Dir(path))
}
