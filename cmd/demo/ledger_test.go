package main

import (
	"context"
	"errors"
	"slices"
	"strings"
	"testing"
)

// written fills a ledger with at least rows acknowledged rows.
func written(t *testing.T, f *fakeRedis, rows int) (*ledger, *writing) {
	t.Helper()
	l := newLedger("test")
	w, err := startWriting(t.Context(), l, f.address)
	if err != nil {
		t.Fatal(err)
	}
	if err := w.waitRows(t.Context(), rows); err != nil {
		t.Fatal(err)
	}
	return l, w
}

func TestNothingLost(t *testing.T) {
	f := startFake(t)
	l, w := written(t, f, 500)
	w.finish(t.Context())
	acked, last := l.rows()
	if acked < 500 || last.IsZero() || len(l.unanswered) != 0 {
		t.Fatalf("ledger: got %d acknowledged, last %v, unanswered %v, want 500 or more and none", acked, last, l.unanswered)
	}
	a, err := l.check(t.Context(), f.address)
	if err != nil || a.found != acked || len(a.lost)+len(a.wrong)+a.extra != 0 {
		t.Errorf("check: got %+v %v, want %d found and nothing else", a, err, acked)
	}
}

// TestLossIsSeen: a row that is gone, one that holds another row's value and one that
// was damaged are all lost.
func TestLossIsSeen(t *testing.T) {
	f := startFake(t)
	l, w := written(t, f, 450)
	w.finish(t.Context())
	f.set(func() {
		delete(f.values, l.key(1))
		f.values[l.key(250)] = l.value(251)
		f.values[l.key(449)] = strings.Replace(l.value(449), "committed", "forgotten", 1)
	})
	a, err := l.check(t.Context(), f.address)
	slices.Sort(a.lost)
	if acked, _ := l.rows(); err != nil || !slices.Equal(a.lost, []int{1, 250, 449}) || a.found != acked-3 {
		t.Errorf("check: got %+v %v, want rows 1, 250 and 449 lost of %d", a, err, acked)
	}
}

// TestUnanswered: what is under way when the host dies is not acknowledged, may be
// there, and must not be there with another value.
func TestUnanswered(t *testing.T) {
	f := startFake(t)
	l, w := written(t, f, 100)
	f.set(func() { f.mute = true })
	for under := 0; under < writers; { // until every writer waits for an answer
		f.set(func() { under = f.muted })
	}
	w.hostDied()
	if len(l.unanswered) != writers {
		t.Fatalf("unanswered: got %v, want one for each of %d writers", l.unanswered, writers)
	}
	acked, _ := l.rows()
	if acked+writers != l.next {
		t.Errorf("rows: got %d acknowledged and %d unanswered of %d", acked, writers, l.next)
	}
	f.set(func() {
		f.mute = false
		f.values[l.key(l.unanswered[0])] = l.value(l.unanswered[0])
		f.values[l.key(l.unanswered[1])] = "torn"
	})
	a, err := l.check(t.Context(), f.address)
	if err != nil || a.found != acked || a.extra != 1 || !slices.Equal(a.wrong, l.unanswered[1:2]) || len(a.lost) != 0 {
		t.Errorf("check: got %+v %v, want %d found, 1 extra, row %d wrong", a, err, acked, l.unanswered[1])
	}
}

// TestRefusal: a database that refuses a write is no host that died.
func TestRefusal(t *testing.T) {
	f := startFake(t)
	f.refuse = "MISCONF cannot write"
	l := newLedger("test")
	w, err := startWriting(t.Context(), l, f.address)
	if err != nil {
		t.Fatal(err)
	}
	if err := w.waitRows(t.Context(), 1); !errors.Is(err, errReply) || !strings.Contains(err.Error(), "MISCONF") {
		t.Errorf("waitRows: got %v, want the refusal", err)
	}
	w.finish(t.Context())
	if acked, _ := l.rows(); acked != 0 {
		t.Errorf("acknowledged: got %d, want 0", acked)
	}
}

func TestDatabaseGoesAwayTooEarly(t *testing.T) {
	f := startFake(t)
	_, w := written(t, f, 10)
	f.cut()
	if err := w.waitRows(t.Context(), 1<<30); err == nil || !strings.Contains(err.Error(), "went away") {
		t.Errorf("waitRows: got %v, want that the database went away", err)
	}
	w.hostDied()
}

func TestFirstWrite(t *testing.T) {
	dead, alive := startFake(t), startFake(t)
	dead.refuse = "LOADING the dataset"
	where, at, err := firstWrite(t.Context(), []string{dead.address, alive.address}, "k")
	if err != nil || where != alive.address || at.IsZero() {
		t.Errorf("firstWrite: got %s %v %v, want %s", where, at, err, alive.address)
	}
	over, cancel := context.WithCancel(t.Context())
	cancel()
	if _, _, err := firstWrite(over, []string{dead.address}, "k"); !errors.Is(err, context.Canceled) {
		t.Errorf("firstWrite without time: got %v, want that it was cancelled", err)
	}
}

func TestValuesDiffer(t *testing.T) {
	a, b := newLedger("a"), newLedger("b")
	if a.value(1) == a.value(2) || a.value(1) == b.value(1) || a.key(1) == b.key(1) {
		t.Errorf("rows are not told apart: %q %q %q", a.value(1), a.value(2), b.value(1))
	}
}
