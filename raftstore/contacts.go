package raftstore

import (
	"bufio"
	"bytes"
	"errors"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/holdfast-storage/holdfast"
)

// The contacts are addresses at which other nodes were reachable, one per line:
// what a node asks after a restart, while it has no tables and nobody has found
// it at its own, perhaps new, address. They are hints, right or wrong.
const (
	contactsFile = "contacts"
	// maxContacts bounds the file: a few that are alive are enough.
	maxContacts = 64
)

// SaveContacts replaces the contacts.
func (s *Store) SaveContacts(addresses []string) error {
	var b bytes.Buffer
	for i, a := range addresses {
		if i == maxContacts {
			break
		}
		b.WriteString(a + "\n")
	}
	path := filepath.Join(s.opts.Dir, contactsFile)
	err := writeSynced(path+".new", b.Bytes())
	if err == nil {
		err = os.Rename(path+".new", path)
	}
	if err != nil {
		return holdfast.Errorf(holdfast.ErrIO, "save contacts: %w", err)
	}
	return nil
}

// Contacts returns what SaveContacts saved last, in this life or an earlier one.
func (s *Store) Contacts() ([]string, error) {
	b, err := os.ReadFile(filepath.Join(s.opts.Dir, contactsFile))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, holdfast.Errorf(holdfast.ErrIO, "read contacts: %w", err)
	}
	var out []string
	for lines := bufio.NewScanner(bytes.NewReader(b)); lines.Scan() && len(out) < maxContacts; {
		if lines.Text() != "" {
			out = append(out, lines.Text())
		}
	}
	return out, nil
}
