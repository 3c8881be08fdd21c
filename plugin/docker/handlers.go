package docker

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"time"

	api "github.com/docker/go-plugins-helpers/volume"

	"github.com/holdfast-storage/holdfast"
	"github.com/holdfast-storage/holdfast/plugin"
)

const (
	contentType = "application/vnd.docker.plugins.v1.1+json"
	// maxRequest bounds a request's body: a name, an id and a few options.
	maxRequest = 1 << 20
)

// errNoAnswer marks a call whose connection is broken instead of answered.
var errNoAnswer = errors.New("no answer")

// routes are the endpoints of the v1 volume driver protocol.
func (s *Server) routes() http.Handler {
	mux := http.NewServeMux()
	// Activate and Capabilities say the same at any time; they never wait.
	mux.HandleFunc("/Plugin.Activate", func(w http.ResponseWriter, _ *http.Request) {
		answer(w, map[string][]string{"Implements": {"VolumeDriver"}})
	})
	mux.HandleFunc("/VolumeDriver.Capabilities", func(w http.ResponseWriter, _ *http.Request) {
		// Global: a volume created through one engine is there for all of them.
		answer(w, api.CapabilitiesResponse{Capabilities: api.Capability{Scope: "global"}})
	})
	long, short := s.options.longDeadline, s.options.shortDeadline
	endpoint(s, mux, "Create", long, s.create)
	endpoint(s, mux, "Remove", short, s.remove)
	endpoint(s, mux, "Get", short, s.get)
	endpoint(s, mux, "List", short, s.list)
	endpoint(s, mux, "Path", short, s.path)
	endpoint(s, mux, "Mount", long, s.mount)
	endpoint(s, mux, "Unmount", short, s.unmount)
	return mux
}

func (s *Server) create(ctx context.Context, req api.CreateRequest) (any, error) {
	name, inline, err := ParseName(req.Name)
	if err != nil {
		return nil, err
	}
	opts, err := mergeOptions(inline, req.Options)
	if err != nil {
		return nil, err
	}
	if err := s.refusal(); err != nil {
		return nil, err
	}
	return struct{}{}, s.options.Volumes.Create(ctx, name, opts)
}

func (s *Server) remove(ctx context.Context, req api.RemoveRequest) (any, error) {
	name, _, err := ParseName(req.Name)
	if err != nil {
		return nil, err
	}
	return struct{}{}, s.options.Volumes.Remove(ctx, name)
}

// get breaks the connection where it has no answer: the engine takes every answer
// but the volume as "no such volume" and forgets the volume's options and labels.
func (s *Server) get(_ context.Context, req api.GetRequest) (any, error) {
	if req.Name == "" {
		return nil, fmt.Errorf("%w: a Get without a name", errNoAnswer)
	}
	name, _, err := ParseName(req.Name)
	if err != nil {
		// Such a volume cannot exist; Create will say what is wrong with the name.
		return nil, err
	}
	volume, err := s.options.Volumes.Get(name)
	if err != nil {
		if errors.Is(err, holdfast.ErrNotFound) {
			return nil, err
		}
		return nil, fmt.Errorf("%w: %w", errNoAnswer, err)
	}
	volume = s.withUsers(volume)
	// The engine keeps its references by the name that it asked for.
	volume.Name = req.Name
	return api.GetResponse{Volume: wireVolume(volume)}, nil
}

func (s *Server) list(context.Context, struct{}) (any, error) {
	volumes, err := s.options.Volumes.List()
	if err != nil {
		return nil, fmt.Errorf("%w: %w", errNoAnswer, err)
	}
	wire := make([]*api.Volume, 0, len(volumes))
	for _, v := range volumes {
		wire = append(wire, wireVolume(s.withUsers(v)))
	}
	return api.ListResponse{Volumes: wire}, nil
}

func (s *Server) path(_ context.Context, req api.PathRequest) (any, error) {
	name, _, err := ParseName(req.Name)
	if err != nil {
		return nil, err
	}
	return api.PathResponse{Mountpoint: s.options.Volumes.Path(name)}, nil
}

func (s *Server) mount(ctx context.Context, req api.MountRequest) (any, error) {
	name, err := nameForUse(req.Name, req.ID)
	if err != nil {
		return nil, err
	}
	if err := s.refusal(); err != nil {
		return nil, err
	}
	path, err := s.options.Volumes.Mount(ctx, name, req.ID)
	if err != nil {
		return nil, err
	}
	if path == "" {
		return nil, holdfast.Errorf(holdfast.ErrInternal, "volume %q was mounted without a path", name)
	}
	return api.MountResponse{Mountpoint: path}, nil
}

func (s *Server) unmount(ctx context.Context, req api.UnmountRequest) (any, error) {
	name, err := nameForUse(req.Name, req.ID)
	if err != nil {
		return nil, err
	}
	return struct{}{}, s.options.Volumes.Unmount(ctx, name, req.ID)
}

// nameForUse reads the name of a Mount or Unmount and refuses one without an id,
// which could never be counted.
func nameForUse(typed, id string) (string, error) {
	name, _, err := ParseName(typed)
	if err == nil && id == "" {
		err = holdfast.Errorf(holdfast.ErrInvalid, "the use of volume %q has no id", name)
	}
	return name, err
}

// refusal is the error of new use while the node stops.
func (s *Server) refusal() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.stopping == "" {
		return nil
	}
	return holdfast.Errorf(holdfast.ErrUnavailable, "this node takes no new use of volumes: %s", s.stopping)
}

// outcome is what a call came to.
type outcome struct {
	value any
	err   error
}

// endpoint serves one call of the protocol: body to request, request to call
// within its deadline, outcome to answer.
func endpoint[request any](s *Server, mux *http.ServeMux, call string, deadline time.Duration, do func(context.Context, request) (any, error)) {
	slots := make(chan struct{}, maxCallsPerEndpoint)
	mux.HandleFunc("/VolumeDriver."+call, func(w http.ResponseWriter, r *http.Request) {
		var req request
		body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxRequest))
		switch {
		case err != nil:
			err = holdfast.Errorf(holdfast.ErrInvalid, "read the request: %w", err)
		case len(body) == 0 && call == "List": // older engines send no body with it
		case len(body) == 0:
			err = holdfast.Errorf(holdfast.ErrInvalid, "the request has no body").
				WithRemedy("the engine repeats a broken call without its body; try again")
		default:
			if err = json.Unmarshal(body, &req); err != nil {
				err = holdfast.Errorf(holdfast.ErrInvalid, "the request is not what this call takes: %w", err)
			}
		}
		if err != nil && call == "Get" {
			err = fmt.Errorf("%w: %w", errNoAnswer, err) // see get
		}
		result := outcome{err: err}
		if err == nil {
			result = s.run(call, slots, deadline, func(ctx context.Context) outcome {
				value, err := do(ctx, req)
				return outcome{value, err}
			})
		}
		s.reply(w, call, result)
	})
}

// run makes one call, in its turn, and returns when it is done or its deadline is
// over, whichever is first. A call that ignores its context goes on, and keeps its
// slot, so that there are never more than the bound; Close waits for it.
func (s *Server) run(call string, slots chan struct{}, deadline time.Duration, do func(context.Context) outcome) outcome {
	ctx, cancel := context.WithTimeout(s.calls, deadline)
	late := outcome{err: holdfast.Errorf(holdfast.ErrTimeout, "no result within %v", deadline).
		WithRemedy("see `holdfast volume explain`; the call can be repeated")}
	if call == "Get" || call == "List" {
		late.err = fmt.Errorf("%w: %w", errNoAnswer, late.err)
	}
	select {
	case slots <- struct{}{}:
	case <-ctx.Done():
		cancel()
		return late
	}
	done := make(chan outcome, 1)
	s.work.Go(func() {
		defer cancel()
		defer func() { <-slots }()
		done <- do(ctx)
	})
	select {
	case result := <-done:
		return result
	case <-ctx.Done():
	}
	// A call that keeps to its context has a better error than "late".
	select {
	case result := <-done:
		return result
	case <-time.After(min(deadline/10, lateGrace)):
		return late
	}
}

// lateGrace is how long a call may take to notice that its context ended. With it
// every answer is still seconds ahead of the engine's own limit.
const lateGrace = 3 * time.Second

// reply writes the outcome. Errors travel to the person who typed the command and
// are logged here, where they leave the program.
func (s *Server) reply(w http.ResponseWriter, call string, result outcome) {
	if result.err == nil {
		answer(w, result.value)
		return
	}
	if errors.Is(result.err, errNoAnswer) {
		s.log.Error("plugin call left without an answer", "call", call, "error", result.err)
		panic(http.ErrAbortHandler) // net/http's way to break the connection
	}
	s.log.Warn("plugin call refused", "call", call, "kind", holdfast.KindOf(result.err), "error", result.err)
	w.Header().Set("Content-Type", contentType)
	w.WriteHeader(http.StatusInternalServerError)
	_ = json.NewEncoder(w).Encode(api.ErrorResponse{Err: result.err.Error()})
}

// answer writes a success. An engine that is gone will ask again.
func answer(w http.ResponseWriter, value any) {
	w.Header().Set("Content-Type", contentType)
	_ = json.NewEncoder(w).Encode(value)
}

func wireVolume(v plugin.Volume) *api.Volume {
	wire := &api.Volume{Name: v.Name, Mountpoint: v.Mountpoint, Status: v.Status}
	if !v.CreatedAt.IsZero() {
		wire.CreatedAt = v.CreatedAt.UTC().Format(time.RFC3339)
	}
	return wire
}
