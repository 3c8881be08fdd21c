package raftstore

import (
	"io"
	"log"
	"log/slog"

	"github.com/hashicorp/go-hclog"
)

// raftLogger hands raft's words to slog, one level milder: what raft calls an
// error, a peer that does not answer, is a warning here, and what it calls info
// is for debugging.
type raftLogger struct {
	log  *slog.Logger
	name string
}

var _ hclog.Logger = raftLogger{}

func (l raftLogger) say(level slog.Level, text string, args []any) {
	attrs := append([]any{"text", text}, args...)
	switch level {
	case slog.LevelWarn:
		l.log.Warn("raft", attrs...)
	case slog.LevelInfo:
		l.log.Info("raft", attrs...)
	default:
		l.log.Debug("raft", attrs...)
	}
}

func (l raftLogger) Log(level hclog.Level, text string, args ...any) {
	switch {
	case level >= hclog.Error:
		l.Error(text, args...)
	case level == hclog.Warn:
		l.Warn(text, args...)
	default:
		l.Debug(text, args...)
	}
}

func (l raftLogger) Trace(string, ...any)           {}
func (l raftLogger) Debug(text string, args ...any) { l.say(slog.LevelDebug, text, args) }
func (l raftLogger) Info(text string, args ...any)  { l.say(slog.LevelDebug, text, args) }
func (l raftLogger) Warn(text string, args ...any)  { l.say(slog.LevelInfo, text, args) }
func (l raftLogger) Error(text string, args ...any) { l.say(slog.LevelWarn, text, args) }

func (l raftLogger) IsTrace() bool { return false }
func (l raftLogger) IsDebug() bool { return true }
func (l raftLogger) IsInfo() bool  { return true }
func (l raftLogger) IsWarn() bool  { return true }
func (l raftLogger) IsError() bool { return true }

func (l raftLogger) ImpliedArgs() []any { return nil }
func (l raftLogger) With(args ...any) hclog.Logger {
	return raftLogger{l.log.With(args...), l.name}
}
func (l raftLogger) Name() string                     { return l.name }
func (l raftLogger) Named(n string) hclog.Logger      { return raftLogger{l.log, l.name + "." + n} }
func (l raftLogger) ResetNamed(n string) hclog.Logger { return raftLogger{l.log, n} }
func (l raftLogger) SetLevel(hclog.Level)             {}
func (l raftLogger) GetLevel() hclog.Level            { return hclog.Debug }
func (l raftLogger) StandardWriter(*hclog.StandardLoggerOptions) io.Writer {
	return lineWriter{l}
}
func (l raftLogger) StandardLogger(*hclog.StandardLoggerOptions) *log.Logger {
	return log.New(lineWriter{l}, "", 0)
}

type lineWriter struct{ l raftLogger }

func (w lineWriter) Write(b []byte) (int, error) {
	w.l.Debug(string(b))
	return len(b), nil
}
