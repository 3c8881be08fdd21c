package docker

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/http"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/holdfast-storage/holdfast"
	"github.com/holdfast-storage/holdfast/plugin"
)

// The engine waits two minutes for Create and Mount and one for the rest (moby,
// volume/drivers/proxy.go). Every call is answered before that, with room for a
// busy host; later answers would be lost and leave the engine's view wrong.
const (
	longDeadline  = 100 * time.Second // Create, Mount
	shortDeadline = 50 * time.Second  // all others
)

// cutShortGrace is how long Close waits for the answers of calls whose context it
// has ended: they return soon after, by the contract of Volumes.
const cutShortGrace = 2 * time.Second

// maxCallsPerEndpoint bounds the calls of one endpoint that run at once; further
// ones wait their turn within their deadline. Each endpoint has its own bound, so
// that mounts that wait for a dead node never keep an Unmount or a Get waiting.
const maxCallsPerEndpoint = 64

// Options configure a Server.
type Options struct {
	// Socket is the path of the plugin socket, as in
	// /run/docker/plugins/holdfast.sock; the base name without .sock is the
	// driver's name. At most 107 bytes.
	Socket string
	// Volumes does the work. It must be ready to answer when Serve is called.
	Volumes plugin.Volumes
	// DockerSocket is the path of Docker's own API, as in /run/docker.sock, for
	// self-activation and to know which containers use a volume; empty means none,
	// and then Swarm places no task with a volume here until somebody uses one.
	DockerSocket string
	// Logger receives what happens; nil means nowhere.
	Logger *slog.Logger

	longDeadline  time.Duration // for tests; zero means the constants above
	shortDeadline time.Duration
}

// Validate says what is wrong with the options, as ErrInvalid, or nil.
func (o Options) Validate() error {
	if o.Volumes == nil {
		return holdfast.Errorf(holdfast.ErrInvalid, "the plugin socket has no volumes to serve")
	}
	return nil
}

// Server serves one plugin socket. Its methods may be called concurrently.
type Server struct {
	options  Options
	log      *slog.Logger
	socket   *plugSocket
	http     *http.Server
	calls    context.Context // ends when calls under way are cut short
	cutShort context.CancelFunc
	work     sync.WaitGroup // accept loop, self-activation and calls

	users atomic.Pointer[map[string][]Container] // as the engine last said; nil: it does not answer

	mu       sync.Mutex
	stopping string // why new use is refused; empty while it is not
	closed   bool   // Close was called
	ended    bool   // no further call begins
}

// Serve takes the socket's lock, makes the socket and answers on it until Close.
// It is ErrRefused while another process holds the lock, ErrInvalid for bad
// options. On return the socket is being served.
func Serve(options Options) (*Server, error) {
	if err := options.Validate(); err != nil {
		return nil, err
	}
	s := &Server{options: options, log: options.Logger}
	if s.log == nil {
		s.log = slog.New(slog.DiscardHandler)
	}
	if s.options.longDeadline == 0 {
		s.options.longDeadline = longDeadline
	}
	if s.options.shortDeadline == 0 {
		s.options.shortDeadline = shortDeadline
	}
	socket, err := openSocket(options.Socket)
	if err != nil {
		return nil, err
	}
	s.socket = socket
	// The server owns its calls: they end with Close, not with the caller of Serve
	// nor with the engine's connection.
	s.calls, s.cutShort = context.WithCancel(context.Background())
	s.http = &http.Server{
		Handler:           s.counted(s.routes()),
		ReadHeaderTimeout: 10 * time.Second, // an engine writes its header at once
		MaxHeaderBytes:    16 << 10,
		// No idle timeout: an engine that writes into a connection as it is closed
		// repeats the call without its body.
		ErrorLog: slog.NewLogLogger(s.log.Handler(), slog.LevelDebug),
	}
	s.work.Go(func() {
		if err := s.http.Serve(socket); !errors.Is(err, http.ErrServerClosed) {
			s.log.Error("plugin socket ended", "socket", options.Socket, "error", err)
		}
	})
	if options.DockerSocket != "" {
		s.work.Go(s.stayActivated)
	}
	s.log.Info("plugin socket served", "driver", s.Driver(), "socket", options.Socket)
	return s, nil
}

// Driver returns the name under which the engine knows the driver.
func (s *Server) Driver() string {
	return strings.TrimSuffix(filepath.Base(s.options.Socket), ".sock")
}

// RefuseNew makes Create and Mount fail from now on, saying why, while Unmount and
// all else are served on. It is for the time between SIGTERM and the last
// unmount: containers that stop still need their Unmount, or unsynced data is lost.
func (s *Server) RefuseNew(why string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.stopping = why
}

// Close removes the socket's path, waits until the calls under way are answered
// or ctx ends, cuts short those that are left, waits for them, and gives up the
// lock. No goroutine is left on return. Closing again is a no-op.
func (s *Server) Close(ctx context.Context) error {
	s.mu.Lock()
	again := s.closed
	s.closed = true
	s.mu.Unlock()
	if again {
		return nil
	}
	removed := s.socket.remove()
	err := s.http.Shutdown(ctx) // closes the listener; waits for answers
	s.cutShort()
	if err != nil {
		// What was cut short is answered in a moment; only then is the connection
		// broken, so that the engine does not repeat the call without its body.
		grace, cancel := context.WithTimeout(context.Background(), cutShortGrace)
		err = s.http.Shutdown(grace)
		cancel()
	}
	if err != nil {
		err = s.http.Close()
	}
	s.mu.Lock()
	s.ended = true
	s.mu.Unlock()
	s.work.Wait()
	s.log.Info("plugin socket closed", "socket", s.options.Socket)
	return errors.Join(removed, err, s.socket.release())
}

// counted makes Close wait for the requests under way, and refuses those that come
// when it already waits.
func (s *Server) counted(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		s.mu.Lock()
		ended := s.ended
		if !ended {
			s.work.Add(1)
		}
		s.mu.Unlock()
		if ended {
			panic(http.ErrAbortHandler) // break the connection; see reply
		}
		defer s.work.Done()
		next.ServeHTTP(w, r)
	})
}

// The pauses between attempts to activate the driver. An engine may start much
// later than the node; asking costs it almost nothing.
const (
	firstActivatePause = 250 * time.Millisecond
	maxActivatePause   = 15 * time.Second
	activateDeadline   = 60 * time.Second // the engine asks every driver for its volumes
)

// stayActivated makes the engine activate the driver now and after each of its
// restarts, and keeps what it says of users, until the server is closed.
func (s *Server) stayActivated() {
	engine := NewEngine(s.options.DockerSocket)
	defer engine.Close()
	changed := make(chan struct{}, 1) // holds one: ask again
	var asking sync.WaitGroup
	asking.Go(func() { s.keepUsers(engine, changed) })
	defer asking.Wait()
	for s.calls.Err() == nil {
		if s.activate(engine) {
			engine.Follow(s.calls, func() {
				select {
				case changed <- struct{}{}:
				default:
				}
			})
			s.users.Store(nil)
		}
	}
}

const (
	// usersPause is the least time between two questions for the users of volumes:
	// a host that starts many containers at once must not be asked for each.
	usersPause = 200 * time.Millisecond
	// usersDeadline bounds one such question; a busy engine answers the next.
	usersDeadline = 10 * time.Second
)

// keepUsers asks the engine who uses what whenever that may have changed. Get and
// List are answered from the last answer: asking meanwhile could wait for an engine
// that itself waits for them.
func (s *Server) keepUsers(engine *Engine, changed <-chan struct{}) {
	for {
		select {
		case <-changed:
		case <-s.calls.Done():
			return
		}
		ctx, cancel := context.WithTimeout(s.calls, usersDeadline)
		users, err := engine.Users(ctx, s.Driver())
		cancel()
		if err != nil {
			s.log.Debug("users of volumes not known", "error", err)
			s.users.Store(nil)
		} else {
			s.users.Store(&users)
		}
		select {
		case <-time.After(usersPause):
		case <-s.calls.Done():
			return
		}
	}
}

// withUsers adds what the engine of this host said of a volume's containers to its
// status; nothing while the engine says nothing.
func (s *Server) withUsers(v plugin.Volume) plugin.Volume {
	users := s.users.Load()
	if users == nil {
		return v
	}
	containers := make([]map[string]any, 0, len((*users)[v.Name]))
	for _, c := range (*users)[v.Name] {
		containers = append(containers, map[string]any{"id": c.ID, "name": c.Name, "state": c.State})
	}
	status := maps.Clone(v.Status)
	if status == nil {
		status = map[string]any{}
	}
	status["containers"] = containers
	v.Status = status
	return v
}

// activate repeats the attempt until the engine knows the driver; false means that
// the server was closed first.
func (s *Server) activate(engine *Engine) bool {
	pause := firstActivatePause
	for {
		ctx, cancel := context.WithTimeout(s.calls, activateDeadline)
		known, err := engine.Activate(ctx, s.Driver())
		cancel()
		if known {
			s.log.Info("driver activated", "driver", s.Driver())
			return true
		}
		if err == nil {
			err = fmt.Errorf("docker API at %s does not list the driver", s.options.DockerSocket)
		}
		s.log.Debug("driver not activated yet", "driver", s.Driver(), "error", err, "again_in", pause)
		select {
		case <-s.calls.Done():
			return false
		case <-time.After(pause):
		}
		pause = min(2*pause, maxActivatePause)
	}
}
