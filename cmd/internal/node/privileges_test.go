package node

import (
	"slices"
	"testing"

	"github.com/holdfast-storage/holdfast/cmd/internal/keeper"
)

// What daemon and keeper both lack stands once, with the keeper's remedy.
func TestALackIsListedOnce(t *testing.T) {
	got := offOf([]keeper.Lack{{What: "memory", Remedy: "a"}, {What: keeper.LackOOM, Remedy: "b"}, {What: keeper.LackIOFlusher}, {What: keeper.LackOOM, Remedy: "c"}, {What: "loop", Remedy: "d"}})
	want := []string{"memory (a)", keeper.LackIOFlusher, keeper.LackOOM + " (c)", "loop (d)"}
	if !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
}
