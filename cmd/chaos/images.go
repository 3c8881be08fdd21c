package main

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"os"

	"github.com/holdfast-storage/holdfast"
	"github.com/holdfast-storage/holdfast/blockdev/disk"
	"github.com/holdfast-storage/holdfast/blockdev/vfs"
	"github.com/holdfast-storage/holdfast/cmd/internal/history"
)

// imageOf names a copy of the node's disk image; its log is in a directory
// beside it.
func (n *node) imageOf(kind string) string {
	if kind == "" {
		return n.image()
	}
	return n.image() + "." + kind
}

// copyImage copies the disk of a node that is down.
func (n *node) copyImage(ctx context.Context, kind string) error {
	if err := n.removeImage(kind); err != nil {
		return err
	}
	for _, end := range []string{"", ".wal"} {
		if _, err := command(ctx, nil, "cp", "-r", "--sparse=always", n.image()+end, n.imageOf(kind)+end); err != nil {
			return err
		}
	}
	return n.syncMedium()
}

func (n *node) moveImage(from, to string) error {
	return errors.Join(os.Rename(n.imageOf(from), n.imageOf(to)), os.Rename(n.imageOf(from)+".wal", n.imageOf(to)+".wal"), n.syncMedium())
}

// syncMedium: what is done to images between two lives of the node is not to be
// lost with the power of a later fault.
func (n *node) syncMedium() error {
	if n.supply == nil {
		return nil
	}
	return n.supply.sync()
}

func (n *node) removeImage(kind string) error {
	return errors.Join(os.RemoveAll(n.imageOf(kind)), os.RemoveAll(n.imageOf(kind)+".wal"))
}

// readCopies reads the replicas on the disk of a node that has ended, and gives
// each block to see.
func readCopies(ctx context.Context, n *node, see func(block int64, p []byte)) ([]history.Copy, error) {
	d, err := disk.Open(ctx, vfs.OS{}, n.image(), disk.Options{})
	if err != nil {
		return nil, fmt.Errorf("open the disk of %s: %w", n.name, err)
	}
	defer d.Close()
	var copies []history.Copy
	for _, r := range d.Replicas() {
		st := r.Status()
		c := history.Copy{Node: n.name, Tail: uint64(st.Tail)}
		p := make([]byte, holdfast.BlockSize)
		for block := range st.Size / holdfast.BlockSize {
			if err := r.ReadAt(p, block*holdfast.BlockSize); err != nil {
				return nil, fmt.Errorf("read block %d on the disk of %s: %w", block, n.name, err)
			}
			c.Sums = append(c.Sums, sha256.Sum256(p))
			see(block, p)
		}
		copies = append(copies, c)
	}
	return copies, nil
}
