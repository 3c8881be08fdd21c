package main

import (
	"cmp"
	"fmt"
	"io"
	"log/slog"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/jedib0t/go-pretty/v6/table"
	"github.com/lmittmann/tint"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	"github.com/holdfast-storage/holdfast"
	"github.com/holdfast-storage/holdfast/cmd/internal/api"
)

// show writes a result: as JSON if asked for, else by the given function.
func (c *cli) show(m proto.Message, plain func()) error {
	if c.json {
		return api.WriteJSON(c.out, m)
	}
	plain()
	return nil
}

// newTable returns a borderless table with a header.
func (c *cli) newTable(header ...any) table.Writer {
	t := table.NewWriter()
	t.SetOutputMirror(c.out)
	style := table.StyleDefault
	style.Options = table.OptionsNoBordersAndSeparators
	style.Box.PaddingLeft = ""
	style.Box.PaddingRight = "  "
	t.SetStyle(style)
	t.AppendHeader(header)
	return t
}

// field writes one "name: value" line of an inspect output.
func (c *cli) field(name string, format string, args ...any) {
	value := fmt.Sprintf(format, args...)
	if value != "" {
		fmt.Fprintf(c.out, "%-15s %s\n", name+":", value)
	}
}

func labels(m map[string]string) string {
	pairs := make([]string, 0, len(m))
	for k, v := range m {
		pairs = append(pairs, k+"="+v)
	}
	slices.Sort(pairs)
	return strings.Join(pairs, ",")
}

func size(n int64) string { return holdfast.FormatSize(n) }

func seconds(millis int64) string {
	return (time.Duration(millis) * time.Millisecond).Round(100 * time.Millisecond).String()
}

// newLogger logs as JSON, or in colour on a terminal. HOLDFAST_LOG is the
// level: debug, info (default), warn or error.
func newLogger(w io.Writer) (*slog.Logger, error) {
	var level slog.Level
	if text := cmp.Or(os.Getenv("HOLDFAST_LOG"), "info"); level.UnmarshalText([]byte(text)) != nil {
		return nil, holdfast.Errorf(holdfast.ErrInvalid, "HOLDFAST_LOG=%q is not a level", text).WithRemedy("use debug, info, warn or error")
	}
	if f, ok := w.(*os.File); ok && isTerminal(f) {
		return slog.New(tint.NewTextHandler(w, &tint.Options{Level: level, TimeFormat: time.TimeOnly})), nil
	}
	return slog.New(slog.NewJSONHandler(w, &slog.HandlerOptions{Level: level, ReplaceAttr: readable})), nil
}

// readable writes durations as 1.5s; slog's JSON has them as nanoseconds.
func readable(_ []string, a slog.Attr) slog.Attr {
	if a.Value.Kind() == slog.KindDuration {
		a.Value = slog.StringValue(a.Value.Duration().String())
	}
	return a
}

func isTerminal(f *os.File) bool {
	_, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
	return err == nil
}
