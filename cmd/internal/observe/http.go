package observe

import (
	"context"
	"log/slog"
	"net/http"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
)

const (
	// readyWait bounds what /readyz waits for raft; a probe asks again.
	readyWait = 3 * time.Second
	// maxScrapes bounds the scrapes at once: each reads every state.
	maxScrapes = 4
	// headerWait and idleWait bound what a client can hold open.
	headerWait = 5 * time.Second
	idleWait   = 2 * time.Minute
)

// Options of NewServer.
type Options struct {
	Sources Sources
	// Ready returns nil if a volume could be created now, else why not.
	Ready  func(context.Context) error
	Logger *slog.Logger
}

// NewServer returns the HTTP server of one node's port, not yet serving.
func NewServer(o Options) *http.Server {
	registry := prometheus.NewRegistry()
	registry.MustRegister(
		&collector{metrics: newMetrics(), s: o.Sources},
		collectors.NewGoCollector(),
		collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}),
	)
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(registry, promhttp.HandlerOpts{
		MaxRequestsInFlight: maxScrapes,
		ErrorLog:            slog.NewLogLogger(o.Logger.Handler(), slog.LevelWarn),
	}))
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) { say(w, http.StatusOK, "ok") })
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, r *http.Request) {
		ctx, cancel := context.WithTimeout(r.Context(), readyWait)
		defer cancel()
		if err := o.Ready(ctx); err != nil {
			say(w, http.StatusServiceUnavailable, err.Error())
			return
		}
		say(w, http.StatusOK, "ok")
	})
	return &http.Server{
		Handler:           mux,
		ReadHeaderTimeout: headerWait,
		IdleTimeout:       idleWait,
		MaxHeaderBytes:    16 << 10,
		ErrorLog:          slog.NewLogLogger(o.Logger.Handler(), slog.LevelDebug),
	}
}

func say(w http.ResponseWriter, code int, text string) {
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	w.WriteHeader(code)
	_, _ = w.Write([]byte(text + "\n")) // a client that left needs no answer
}
