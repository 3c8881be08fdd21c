package mount

import (
	"strings"

	"github.com/moby/sys/mountinfo"

	"github.com/holdfast-storage/holdfast"
)

// Entry is one mount of this process' mount namespace.
type Entry struct {
	Target       string
	Source       string
	FS           string
	Major, Minor int    // of the file system; for one on a block device, that device
	Options      string // of the mount
	SuperOptions string // of the file system
	Shared       bool   // mounts below it appear in peer namespaces
}

// ReadOnly says whether writes are refused, by the mount or (as after an error
// of the device) by the file system. Newer kernels leave an ext4 that refuses
// everything after an error "rw" and add a word of its own.
func (e Entry) ReadOnly() bool {
	for _, word := range []string{"ro", "emergency_ro", "shutdown"} {
		if hasWord(e.SuperOptions, word) {
			return true
		}
	}
	return hasWord(e.Options, "ro")
}

func hasWord(list, word string) bool {
	for w := range strings.SplitSeq(list, ",") {
		if w == word {
			return true
		}
	}
	return false
}

// Table returns the mounts of this process' mount namespace, in the order in
// which they were made: of several on one target the last is what is seen.
func Table() ([]Entry, error) {
	infos, err := mountinfo.GetMounts(nil)
	if err != nil {
		return nil, holdfast.Errorf(holdfast.ErrInternal, "read the mount table: %w", err)
	}
	entries := make([]Entry, 0, len(infos))
	for _, i := range infos {
		entries = append(entries, Entry{Target: i.Mountpoint, Source: i.Source, FS: i.FSType, Major: i.Major, Minor: i.Minor,
			Options: i.Options, SuperOptions: i.VFSOptions, Shared: strings.Contains(i.Optional, "shared:")})
	}
	return entries, nil
}

// At returns the mount that is seen at a target, if one is.
func At(target string) (Entry, bool, error) {
	entries, err := Table()
	if err != nil {
		return Entry{}, false, err
	}
	for i := len(entries) - 1; i >= 0; i-- {
		if entries[i].Target == target {
			return entries[i], true, nil
		}
	}
	return Entry{}, false, nil
}

// Covering returns the mount that a path lies on.
func Covering(path string) (Entry, error) {
	entries, err := Table()
	if err != nil {
		return Entry{}, err
	}
	best := -1
	for i, e := range entries {
		if e.Target != path && e.Target != "/" && !strings.HasPrefix(path, e.Target+"/") {
			continue
		}
		if best < 0 || len(e.Target) >= len(entries[best].Target) {
			best = i
		}
	}
	if best < 0 {
		return Entry{}, holdfast.Errorf(holdfast.ErrNotFound, "no mount covers %s", path)
	}
	return entries[best], nil
}
