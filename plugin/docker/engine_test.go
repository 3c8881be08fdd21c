package docker

import (
	"context"
	"errors"
	"net"
	"net/http"
	"path/filepath"
	"reflect"
	"sync/atomic"
	"testing"
	"time"

	api "github.com/docker/go-plugins-helpers/volume"

	"github.com/holdfast-storage/holdfast"
)

// fakeEngine answers the few calls of Docker's API that Engine makes.
func fakeEngine(t *testing.T, handler http.Handler) (socket string) {
	t.Helper()
	socket = filepath.Join(t.TempDir(), "docker.sock")
	listener, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	server := &http.Server{Handler: handler}
	go server.Serve(listener)
	t.Cleanup(func() { server.Close() })
	return socket
}

func text(s string) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) { w.Write([]byte(s)) }
}

func TestUsers(t *testing.T) {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /containers/json", text(`[
		{"Id":"c1","Names":["/web"],"State":"running","Mounts":[{"Type":"bind","Name":""},{"Type":"volume","Name":"data","Driver":"holdfast"}]},
		{"Id":"c2","Names":["/db"],"State":"exited","Mounts":[{"Type":"volume","Name":"size=1G,name=data","Driver":"holdfast"}]},
		{"Id":"c3","Names":["/other"],"State":"running","Mounts":[{"Type":"volume","Name":"data","Driver":"local"}]},
		{"Id":"c4","Names":["/more"],"State":"running","Mounts":[{"Type":"volume","Name":"data2","Driver":"holdfast"},{"Type":"volume","Name":"data2","Driver":"holdfast"}]},
		{"Id":"c6","Names":["/bad"],"State":"running","Mounts":[{"Type":"volume","Name":"=,=","Driver":"holdfast"}]},
		{"Id":"c5","Names":[],"State":"dead","Mounts":null}]`))
	engine := NewEngine(fakeEngine(t, mux))
	defer engine.Close()

	got, err := engine.Users(t.Context(), "holdfast")
	want := map[string][]Container{"data": {{"c2", "db", "exited"}, {"c1", "web", "running"}}, "data2": {{"c4", "more", "running"}}}
	if err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("Users: got %v %v, want %v", got, err, want)
	}
}

func TestEngineErrors(t *testing.T) {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /containers/json", text(`[{"Id":`))
	mux.HandleFunc("GET /volumes", func(w http.ResponseWriter, _ *http.Request) { http.Error(w, "on fire", 500) })
	engine := NewEngine(fakeEngine(t, mux))
	defer engine.Close()
	if got, err := engine.Users(t.Context(), "holdfast"); !errors.Is(err, holdfast.ErrUnavailable) {
		t.Errorf("Users of half an answer: got %v %v, want ErrUnavailable", got, err)
	}
	if got, err := engine.Activate(t.Context(), "holdfast"); !errors.Is(err, holdfast.ErrUnavailable) {
		t.Errorf("Activate with a 500: got %v %v, want ErrUnavailable", got, err)
	}
	absent := NewEngine(filepath.Join(t.TempDir(), "absent.sock"))
	if got, err := absent.Activate(t.Context(), "holdfast"); !errors.Is(err, holdfast.ErrUnavailable) {
		t.Errorf("Activate of no engine: got %v %v, want ErrUnavailable", got, err)
	}
}

// TestStaysActivated: an engine that learns of the driver late, and one that comes
// back after a restart, are both made to activate it.
func TestStaysActivated(t *testing.T) {
	activated := make(chan struct{}, 8)
	endOfEngine := make(chan struct{})
	var asked atomic.Int32
	mux := http.NewServeMux()
	mux.HandleFunc("GET /volumes", func(w http.ResponseWriter, _ *http.Request) { asked.Add(1) })
	mux.HandleFunc("GET /info", func(w http.ResponseWriter, _ *http.Request) {
		if asked.Load() == 1 { // the first time it looked too early
			w.Write([]byte(`{"Plugins":{"Volume":["local"]}}`))
			return
		}
		w.Write([]byte(`{"Plugins":{"Volume":["local","hf"]}}`))
		activated <- struct{}{}
	})
	mux.HandleFunc("GET /events", func(w http.ResponseWriter, r *http.Request) {
		w.(http.Flusher).Flush()
		select {
		case <-endOfEngine:
		case <-r.Context().Done():
		}
	})
	s, _ := serve(t, Options{DockerSocket: fakeEngine(t, mux)})
	<-activated
	if got := asked.Load(); got != 2 {
		t.Errorf("GET /volumes until activated: got %d, want 2", got)
	}
	endOfEngine <- struct{}{}
	<-activated
	if err := s.Close(context.Background()); err != nil { // ends the stream that waits
		t.Errorf("Close: %v", err)
	}
}

// TestUsersInStatus: a volume's status names its containers, follows the engine's
// events, and says nothing of them once the engine is gone.
func TestUsersInStatus(t *testing.T) {
	var containers atomic.Value
	containers.Store(`[]`)
	event, end := make(chan string), make(chan struct{})
	mux := http.NewServeMux()
	mux.HandleFunc("GET /volumes", text(`{}`))
	mux.HandleFunc("GET /info", text(`{"Plugins":{"Volume":["hf"]}}`))
	mux.HandleFunc("GET /containers/json", func(w http.ResponseWriter, _ *http.Request) { w.Write([]byte(containers.Load().(string))) })
	mux.HandleFunc("GET /events", func(w http.ResponseWriter, r *http.Request) {
		w.(http.Flusher).Flush()
		for {
			select {
			case e := <-event:
				w.Write([]byte(e))
				w.(http.Flusher).Flush()
			case <-end:
				return
			case <-r.Context().Done():
				return
			}
		}
	})
	fake := newFake(t.TempDir())
	s, _ := serve(t, Options{DockerSocket: fakeEngine(t, mux), Volumes: fake})
	if err := fake.Create(t.Context(), "data", nil); err != nil {
		t.Fatal(err)
	}
	status := func() any {
		got, err := s.get(t.Context(), api.GetRequest{Name: "data"})
		if err != nil {
			t.Fatal(err)
		}
		return got.(api.GetResponse).Volume.Status["containers"]
	}
	until := func(want any) {
		t.Helper()
		for end := time.Now().Add(10 * time.Second); !reflect.DeepEqual(status(), want); time.Sleep(5 * time.Millisecond) {
			if time.Now().After(end) {
				t.Fatalf("containers in the status: got %v, want %v", status(), want)
			}
		}
	}
	until([]map[string]any{})
	containers.Store(`[{"Id":"c1","Names":["/web"],"State":"running","Mounts":[{"Type":"volume","Name":"data","Driver":"hf"}]}]`)
	event <- `{"Type":"container","Action":"start"}`
	until([]map[string]any{{"id": "c1", "name": "web", "state": "running"}})
	containers.Store(`no answer`)
	event <- `{"Type":"container","Action":"die"}`
	until(nil)
	containers.Store(`[]`)
	end <- struct{}{} // the engine restarts
	until([]map[string]any{})
}
