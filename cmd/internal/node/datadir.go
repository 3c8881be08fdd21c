package node

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/holdfast-storage/holdfast"
	"github.com/holdfast-storage/holdfast/cmd/internal/durable"
)

// dataDir is a data directory that this process alone uses.
type dataDir struct {
	path string
	lock *os.File
}

// openDataDir makes the directory if need be and locks it; a directory in use
// is ErrRefused.
func openDataDir(path string) (*dataDir, error) {
	if err := os.MkdirAll(path, 0o711); err != nil {
		return nil, holdfast.Errorf(holdfast.ErrInvalid, "--data-dir %s: %w", path, err)
	}
	lock, err := os.OpenFile(filepath.Join(path, "lock"), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, holdfast.Errorf(holdfast.ErrInvalid, "--data-dir %s: %w", path, err)
	}
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		lock.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			return nil, holdfast.Errorf(holdfast.ErrRefused, "data directory %s is in use by another process", path).WithRemedy("stop the other daemon, or give another --data-dir")
		}
		return nil, fmt.Errorf("lock data directory %s: %w", path, err)
	}
	return &dataDir{path: path, lock: lock}, nil
}

func (d *dataDir) file(names ...string) string {
	return filepath.Join(append([]string{d.path}, names...)...)
}

// holds says whether a path is the data directory or below it.
func (d *dataDir) holds(path string) bool {
	rel, err := filepath.Rel(d.path, path)
	return err == nil && filepath.IsLocal(rel)
}

// saveJSON replaces a small file of the data directory: whole or not at all,
// and on disk when it returns.
func (d *dataDir) saveJSON(name string, v any) error {
	raw, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		return fmt.Errorf("encode %s: %w", name, err)
	}
	return durable.WriteFile(d.file(name), append(raw, '\n'))
}

// loadJSON reads a small file of the data directory; one that is not there is
// os.ErrNotExist.
func (d *dataDir) loadJSON(name string, v any) error {
	raw, err := os.ReadFile(d.file(name))
	if err == nil {
		err = json.Unmarshal(raw, v)
	}
	return err
}

// keepBallast makes a file of n bytes whose space can be given back when the
// file system of the metadata runs full: badger maps its files, and a full
// file system would be a SIGBUS.
func (d *dataDir) keepBallast(n int64) error {
	f, err := os.OpenFile(d.file("ballast"), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return fmt.Errorf("open ballast: %w", err)
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return fmt.Errorf("stat ballast: %w", err)
	}
	if info.Size() > n {
		return f.Truncate(n)
	}
	err = unix.Fallocate(int(f.Fd()), 0, 0, n)
	for errors.Is(err, unix.EINTR) { // the scheduler's own signals end it on some file systems
		err = unix.Fallocate(int(f.Fd()), 0, 0, n)
	}
	if err != nil {
		if errors.Is(err, unix.EOPNOTSUPP) {
			return nil // this file system cannot reserve: the watermarks still hold
		}
		_ = os.Remove(f.Name()) // nothing half done
		return holdfast.Errorf(holdfast.ErrRefused, "reserve %s of ballast in %s: %w", holdfast.FormatSize(n), d.path, err).WithRemedy("free space there, or give a smaller --ballast")
	}
	return nil
}

// freeBytes is what an unprivileged user may still write to the file system
// that holds path.
func freeBytes(path string) (int64, error) {
	var s unix.Statfs_t
	if err := unix.Statfs(path, &s); err != nil {
		return 0, fmt.Errorf("statfs %s: %w", path, err)
	}
	return int64(s.Bavail) * s.Bsize, nil
}

func (d *dataDir) Close() error { return d.lock.Close() }
