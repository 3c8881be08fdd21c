package docker

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/holdfast-storage/holdfast"
)

// maxEngineAnswer bounds an answer of the Docker API that is read into memory: a
// host with thousands of containers stays well below it.
const maxEngineAnswer = 32 << 20

// Engine is a client of the Docker Engine API on a unix socket. It uses
// unversioned paths, so it works with every engine that has them. Its methods may
// be called concurrently. They must not be called while the engine waits for an
// answer of the driver (in Get, say): some of them make the engine ask the driver.
type Engine struct {
	socket string
	client *http.Client
}

// Container is a container that uses a volume.
type Container struct {
	ID    string // 64 hexadecimal digits
	Name  string // without the leading slash
	State string // created, running, paused, restarting, exited, dead
}

// NewEngine returns a client of the API at socket, usually /run/docker.sock. It
// does not connect.
func NewEngine(socket string) *Engine {
	dial := func(ctx context.Context, _, _ string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "unix", socket)
	}
	return &Engine{
		socket: socket,
		client: &http.Client{Transport: &http.Transport{
			DialContext:     dial,
			MaxIdleConns:    2,
			IdleConnTimeout: 10 * time.Second, // an engine that restarts is dialled anew
		}},
	}
}

// Close ends idle connections. Calls under way are ended by their contexts.
func (e *Engine) Close() { e.client.CloseIdleConnections() }

// Activate makes the engine look at every plugin socket, by listing its volumes,
// and reports whether it then knows the volume driver called name. The engine
// calls the driver's List during this. An engine that does not answer is
// ErrUnavailable.
func (e *Engine) Activate(ctx context.Context, name string) (bool, error) {
	if err := e.get(ctx, "/volumes", nil); err != nil {
		return false, err
	}
	var info struct{ Plugins struct{ Volume []string } }
	if err := e.get(ctx, "/info", &info); err != nil {
		return false, err
	}
	return slices.Contains(info.Plugins.Volume, name), nil
}

// Users returns the containers of this engine, running or not, that use a volume
// of the driver called driver, by the volume's name, each list in the order of the
// containers' names. A name with options counts as the volume it names.
func (e *Engine) Users(ctx context.Context, driver string) (map[string][]Container, error) {
	var all []struct {
		ID     string `json:"Id"`
		Names  []string
		State  string
		Mounts []struct{ Type, Name, Driver string }
	}
	if err := e.get(ctx, "/containers/json?all=1", &all); err != nil {
		return nil, err
	}
	users := map[string][]Container{}
	for _, c := range all {
		user := Container{ID: c.ID, State: c.State}
		if len(c.Names) > 0 {
			user.Name = strings.TrimPrefix(c.Names[0], "/")
		}
		for _, m := range c.Mounts {
			volume, _, err := ParseName(m.Name)
			if m.Type == "volume" && m.Driver == driver && err == nil && !slices.Contains(users[volume], user) {
				users[volume] = append(users[volume], user)
			}
		}
	}
	for _, list := range users {
		slices.SortFunc(list, func(a, b Container) int { return strings.Compare(a.Name, b.Name) })
	}
	return users, nil
}

// events are those after which Users may answer differently, and the engine's own,
// so that there is something to follow on an engine without containers.
const events = `/events?filters=%7B%22type%22%3A%5B%22daemon%22%2C%22container%22%5D%2C%22event%22%3A%5B` +
	`%22create%22%2C%22start%22%2C%22die%22%2C%22destroy%22%2C%22rename%22%2C%22pause%22%2C%22unpause%22%2C%22reload%22%5D%7D`

// Follow holds one stream of the engine's events until the engine ends, the
// connection breaks or ctx ends, and calls changed once the stream stands and after
// whatever may change what Users answers. changed must not wait.
func (e *Engine) Follow(ctx context.Context, changed func()) {
	answer, err := e.open(ctx, events)
	if err != nil {
		return // an engine that does not answer has ended
	}
	defer answer.Close()
	changed()
	for stream := json.NewDecoder(answer); stream.Decode(new(struct{})) == nil; {
		changed()
	}
}

// get reads the JSON answer to a GET of path into into, unless that is nil.
func (e *Engine) get(ctx context.Context, path string, into any) error {
	answer, err := e.open(ctx, path)
	if err != nil {
		return err
	}
	defer answer.Close()
	limited := &io.LimitedReader{R: answer, N: maxEngineAnswer}
	if into == nil {
		_, err = io.Copy(io.Discard, limited)
	} else {
		err = json.NewDecoder(limited).Decode(into)
	}
	switch {
	case limited.N <= 0:
		return holdfast.Errorf(holdfast.ErrUnavailable, "docker API at %s answers GET %s with more than %d bytes", e.socket, path, maxEngineAnswer)
	case err != nil:
		return holdfast.Errorf(holdfast.ErrUnavailable, "read the answer of docker API at %s to GET %s: %w", e.socket, path, err)
	}
	return nil
}

// open sends a GET and returns the body of a successful answer.
func (e *Engine) open(ctx context.Context, path string) (io.ReadCloser, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://docker"+path, nil)
	if err != nil {
		return nil, fmt.Errorf("make a request for %s: %w", path, err)
	}
	resp, err := e.client.Do(req)
	if err != nil {
		kind := holdfast.ErrUnavailable
		if errors.Is(err, context.DeadlineExceeded) {
			kind = holdfast.ErrTimeout
		}
		return nil, holdfast.Errorf(kind, "ask docker API at %s: %w", e.socket, err).
			WithRemedy("is the engine running and its socket readable here?")
	}
	if resp.StatusCode != http.StatusOK {
		text, _ := io.ReadAll(io.LimitReader(resp.Body, 1<<10))
		resp.Body.Close()
		return nil, holdfast.Errorf(holdfast.ErrUnavailable, "docker API at %s answers GET %s with %s: %s",
			e.socket, path, resp.Status, strings.TrimSpace(string(text)))
	}
	return resp.Body, nil
}
