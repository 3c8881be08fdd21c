package nbd

import (
	"context"
	"sort"
	"sync"
	"time"

	"github.com/holdfast-storage/holdfast"
	"github.com/holdfast-storage/holdfast/blockdev"
)

// Export is a device under a name.
type Export struct {
	// Name is what clients ask for; 1 to 4096 bytes, or empty for what a
	// client gets that asks for no name.
	Name string
	// Description is shown to clients that list exports; it may be empty.
	Description string
	// Device is served until RemoveExport has returned; the server does not
	// close it.
	Device blockdev.Device
	// ReadOnly refuses everything that would change the device.
	ReadOnly bool
}

// Client is a connection in transmission.
type Client struct {
	// Name tells who it is: HOST:PORT, or "pid N uid N" on a unix socket.
	Name string
	// Since is when it entered transmission.
	Since time.Time
}

// export is an Export at work.
type export struct {
	Export
	dev blockdev.Device // Export.Device, checked

	// entry is held by the one connection that is entering (entry.go).
	entry chan struct{}

	mu      sync.Mutex
	removed bool
	conns   map[*conn]struct{} // in transmission
}

// AddExport makes a device available to connections from now on. A name that
// is taken is ErrExists.
func (s *Server) AddExport(e Export) error {
	if len(e.Name) > maxName || len(e.Description) > maxName {
		return holdfast.Errorf(holdfast.ErrInvalid, "an export name of %d and a description of %d bytes exceed %d", len(e.Name), len(e.Description), maxName)
	}
	if e.Device == nil {
		return holdfast.Errorf(holdfast.ErrInvalid, "export %q has no device", e.Name)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return errClosed()
	}
	if _, taken := s.exports[e.Name]; taken {
		return holdfast.Errorf(holdfast.ErrExists, "export %q exists", e.Name)
	}
	s.exports[e.Name] = &export{
		Export: e,
		dev:    blockdev.Checked(e.Device),
		entry:  make(chan struct{}, 1),
		conns:  make(map[*conn]struct{}),
	}
	return nil
}

// RemoveExport takes an export away; once it has returned nil, no request
// reaches the device any more and the name is free. Without force it is
// ErrRefused while a client is in transmission. With force the clients'
// connections are closed and their requests cancelled, and it waits until each
// has returned from the device; if ctx ends first it returns ErrTimeout, the
// export is gone but its device still busy. A name without export is
// ErrNotFound.
func (s *Server) RemoveExport(ctx context.Context, name string, force bool) error {
	e := s.export(name)
	if e == nil {
		return holdfast.Errorf(holdfast.ErrNotFound, "no export %q", name)
	}
	e.mu.Lock()
	if n := len(e.conns); n > 0 && !force {
		e.mu.Unlock()
		return holdfast.Errorf(holdfast.ErrRefused, "export %q has %d open connections", name, n).
			WithRemedy("disconnect its clients, or force")
	}
	e.removed = true
	conns := make([]*conn, 0, len(e.conns))
	for c := range e.conns {
		conns = append(conns, c)
	}
	e.mu.Unlock()

	s.mu.Lock()
	if s.exports[name] == e {
		delete(s.exports, name)
	}
	s.mu.Unlock()
	for _, c := range conns {
		c.abort()
	}
	for _, c := range conns {
		select {
		case <-c.done:
		case <-ctx.Done():
			return holdfast.Errorf(holdfast.ErrTimeout, "export %q: wait for the requests of %s: %w", name, c.client.Name, ctx.Err())
		}
	}
	return nil
}

// Clients returns the connections of an export that are in transmission,
// oldest first; none if there is no such export.
func (s *Server) Clients(name string) []Client {
	e := s.export(name)
	if e == nil {
		return nil
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	clients := make([]Client, 0, len(e.conns))
	for c := range e.conns {
		clients = append(clients, c.client)
	}
	sort.Slice(clients, func(i, j int) bool {
		if !clients[i].Since.Equal(clients[j].Since) {
			return clients[i].Since.Before(clients[j].Since)
		}
		return clients[i].Name < clients[j].Name
	})
	return clients
}

// Exports returns the names of all exports, sorted.
func (s *Server) Exports() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	names := make([]string, 0, len(s.exports))
	for name := range s.exports {
		names = append(names, name)
	}
	sort.Strings(names)
	return names
}

// export returns the export of that name, or nil.
func (s *Server) export(name string) *export {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.exports[name]
}

// transmissionFlags are what the export offers. A client that negotiated
// structured replies may ask for reads in one chunk; every read is.
func (e *export) transmissionFlags(structured bool) uint16 {
	flags := transHasFlags | transSendFlush | transSendFUA | transCanMultiConn
	if e.ReadOnly {
		flags |= transReadOnly
	} else {
		flags |= transSendTrim | transSendWriteZeroes
	}
	if structured {
		flags |= transSendDF
	}
	return flags
}

// blockSizes are the least, the preferred and the largest request. proto.md
// wants the size of the export to be a multiple of the least.
func (e *export) blockSizes() (least, preferred, most uint32) {
	least = minBlock
	if e.dev.Size()%minBlock != 0 {
		least = 1
	}
	return least, preferredBlock, maxPayload
}
