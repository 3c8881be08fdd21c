package docker

import (
	"context"
	"errors"
	"net"
	"net/http"
	"path/filepath"
	"slices"
	"sync/atomic"
	"testing"

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

func TestUsedBy(t *testing.T) {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /containers/json", text(`[
		{"Id":"c1","Names":["/web"],"State":"running","Mounts":[{"Type":"bind","Name":""},{"Type":"volume","Name":"data","Driver":"holdfast"}]},
		{"Id":"c2","Names":["/db"],"State":"exited","Mounts":[{"Type":"volume","Name":"size=1G,name=data","Driver":"holdfast"}]},
		{"Id":"c3","Names":["/other"],"State":"running","Mounts":[{"Type":"volume","Name":"data","Driver":"local"}]},
		{"Id":"c4","Names":["/more"],"State":"running","Mounts":[{"Type":"volume","Name":"data2","Driver":"holdfast"}]},
		{"Id":"c5","Names":[],"State":"dead","Mounts":null}]`))
	engine := NewEngine(fakeEngine(t, mux))
	defer engine.Close()

	got, err := engine.UsedBy(t.Context(), "holdfast", "data")
	want := []Container{{"c2", "db", "exited"}, {"c1", "web", "running"}}
	if err != nil || !slices.Equal(got, want) {
		t.Errorf("UsedBy data: got %v %v, want %v", got, err, want)
	}
	if got, err := engine.UsedBy(t.Context(), "holdfast", "none"); err != nil || got == nil || len(got) != 0 {
		t.Errorf("UsedBy none: got %v %v, want an empty slice", got, err)
	}
}

func TestEngineErrors(t *testing.T) {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /containers/json", text(`[{"Id":`))
	mux.HandleFunc("GET /volumes", func(w http.ResponseWriter, _ *http.Request) { http.Error(w, "on fire", 500) })
	engine := NewEngine(fakeEngine(t, mux))
	defer engine.Close()
	if got, err := engine.UsedBy(t.Context(), "holdfast", "data"); !errors.Is(err, holdfast.ErrUnavailable) {
		t.Errorf("UsedBy of half an answer: got %v %v, want ErrUnavailable", got, err)
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
