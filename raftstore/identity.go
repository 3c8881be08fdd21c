package raftstore

import (
	"encoding/json"
	"errors"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/holdfast-storage/holdfast"
)

// identity says who a directory belongs to. It is a file of JSON in Dir.
type identity struct {
	// Version of the file. 1: the first.
	Version int                `json:"version"`
	Node    holdfast.NodeID    `json:"node"`
	Cluster holdfast.ClusterID `json:"cluster"` // zero until bootstrap or join
}

const (
	identityVersion = 1
	identityFile    = "identity.json"
)

// loadIdentity reads the identity of a directory, or makes one with the wanted
// node id (a fresh one if it is zero).
func loadIdentity(dir string, want holdfast.NodeID) (identity, error) {
	var id identity
	b, err := os.ReadFile(filepath.Join(dir, identityFile))
	if errors.Is(err, fs.ErrNotExist) {
		id = identity{Version: identityVersion, Node: want}
		if want.IsZero() {
			id.Node = holdfast.NewID[holdfast.NodeID]()
		}
		return id, saveIdentity(dir, id)
	}
	if err != nil {
		return id, holdfast.Errorf(holdfast.ErrIO, "read identity: %w", err)
	}
	if err := json.Unmarshal(b, &id); err != nil {
		return id, holdfast.Errorf(holdfast.ErrIntegrity, "read %s: %w", filepath.Join(dir, identityFile), err)
	}
	if id.Version != identityVersion {
		return id, holdfast.Errorf(holdfast.ErrUnsupported, "%s has version %d, this version reads %d", filepath.Join(dir, identityFile), id.Version, identityVersion).
			WithRemedy("run the version of holdfast that wrote it, or a later one")
	}
	if id.Node.IsZero() {
		return id, holdfast.Errorf(holdfast.ErrIntegrity, "%s names no node", filepath.Join(dir, identityFile))
	}
	if !want.IsZero() && want != id.Node {
		return id, holdfast.Errorf(holdfast.ErrRefused, "%s belongs to node %v, not %v", dir, id.Node, want)
	}
	return id, nil
}

// saveIdentity replaces the file; it is durable on return.
func saveIdentity(dir string, id identity) error {
	b, err := json.MarshalIndent(id, "", "  ")
	if err != nil {
		return holdfast.Errorf(holdfast.ErrInternal, "encode identity: %w", err)
	}
	path := filepath.Join(dir, identityFile)
	if err := writeSynced(path+".new", append(b, '\n')); err != nil {
		return holdfast.Errorf(holdfast.ErrIO, "write identity: %w", err)
	}
	if err := os.Rename(path+".new", path); err != nil {
		return holdfast.Errorf(holdfast.ErrIO, "write identity: %w", err)
	}
	if err := syncDir(dir); err != nil {
		return holdfast.Errorf(holdfast.ErrIO, "write identity: %w", err)
	}
	return nil
}

func writeSynced(path string, b []byte) error {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(b)
	return errors.Join(err, f.Sync(), f.Close())
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}
