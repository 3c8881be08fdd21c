package badgerlog

import (
	"bytes"
	"encoding/binary"
	"errors"
	"hash/crc32"
	"io/fs"
	"os"
	"path/filepath"
	"reflect"
	"testing"
	"time"

	"github.com/dgraph-io/badger/v4"
	"github.com/hashicorp/raft"

	"github.com/holdfast-storage/holdfast"
)

func open(t *testing.T, dir string) *Store {
	t.Helper()
	s, err := Open(Options{Dir: dir})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func fresh(t *testing.T) *Store {
	t.Helper()
	s := open(t, t.TempDir())
	t.Cleanup(func() { s.Close() })
	return s
}

func entry(i uint64) *raft.Log {
	return &raft.Log{Index: i, Term: 1 + i/10, Type: raft.LogCommand, Data: []byte{byte(i), byte(i >> 8), 'd'}}
}

func entries(lo, hi uint64) []*raft.Log {
	var l []*raft.Log
	for i := lo; i <= hi; i++ {
		l = append(l, entry(i))
	}
	return l
}

func wantRange(t *testing.T, s *Store, first, last uint64) {
	t.Helper()
	f, err := s.FirstIndex()
	if err != nil {
		t.Fatal(err)
	}
	l, err := s.LastIndex()
	if err != nil {
		t.Fatal(err)
	}
	if f != first || l != last {
		t.Fatalf("log: got [%d, %d], want [%d, %d]", f, l, first, last)
	}
}

func wantEntries(t *testing.T, s *Store, lo, hi uint64) {
	t.Helper()
	for i := lo; i <= hi; i++ {
		var got raft.Log
		if err := s.GetLog(i, &got); err != nil {
			t.Fatalf("entry %d: %v", i, err)
		}
		if want := *entry(i); !reflect.DeepEqual(got, want) {
			t.Fatalf("entry %d: got %+v, want %+v", i, got, want)
		}
	}
}

func wantNone(t *testing.T, s *Store, lo, hi uint64) {
	t.Helper()
	for i := lo; i <= hi; i++ {
		if err := s.GetLog(i, &raft.Log{}); !errors.Is(err, raft.ErrLogNotFound) {
			t.Fatalf("entry %d: got %v, want %v", i, err, raft.ErrLogNotFound)
		}
	}
}

func store(t *testing.T, s *Store, l []*raft.Log) {
	t.Helper()
	if err := s.StoreLogs(l); err != nil {
		t.Fatal(err)
	}
}

func TestSyncWritesIsOn(t *testing.T) {
	if !settings(Options{}).SyncWrites {
		t.Fatal("SyncWrites is off: votes and entries would be lost with the power")
	}
}

func TestEmptyLog(t *testing.T) {
	s := fresh(t)
	wantRange(t, s, 0, 0)
	wantNone(t, s, 0, 3)
	if err := s.DeleteRange(1, 100); err != nil {
		t.Fatal(err)
	}
	store(t, s, nil)
	wantRange(t, s, 0, 0)
}

func TestStoreAndGet(t *testing.T) {
	s := fresh(t)
	if err := s.StoreLog(entry(1)); err != nil {
		t.Fatal(err)
	}
	store(t, s, entries(2, 40))
	wantRange(t, s, 1, 40)
	wantEntries(t, s, 1, 40)
	wantNone(t, s, 41, 42)

	full := &raft.Log{Index: 41, Term: 9, Type: raft.LogConfiguration, Data: []byte("data"), Extensions: []byte("ext"), AppendedAt: time.Unix(1000, 7)}
	if err := s.StoreLog(full); err != nil {
		t.Fatal(err)
	}
	var got raft.Log
	if err := s.GetLog(41, &got); err != nil || !reflect.DeepEqual(&got, full) {
		t.Fatalf("got %+v (%v), want %+v", got, err, full)
	}
}

func TestOverwrite(t *testing.T) {
	s := fresh(t)
	store(t, s, entries(1, 5))
	other := &raft.Log{Index: 3, Term: 77, Data: []byte("other")}
	if err := s.StoreLog(other); err != nil {
		t.Fatal(err)
	}
	var got raft.Log
	if err := s.GetLog(3, &got); err != nil || got.Term != 77 {
		t.Fatalf("got %+v (%v), want term 77", got, err)
	}
	wantRange(t, s, 1, 5)
}

func TestDeleteRange(t *testing.T) {
	for _, c := range []struct {
		name        string
		lo, hi      uint64
		first, last uint64
	}{
		{"head", 1, 10, 11, 30},
		{"head beyond the start", 0, 1, 2, 30},
		{"tail", 21, 30, 1, 20},
		{"tail beyond the end", 21, ^uint64(0), 1, 20},
		{"all", 1, 30, 0, 0},
		{"nothing", 31, 40, 1, 30},
		{"turned around", 10, 5, 1, 30},
		{"middle", 10, 20, 1, 30},
	} {
		t.Run(c.name, func(t *testing.T) {
			dir := t.TempDir()
			s := open(t, dir)
			store(t, s, entries(1, 30))
			if err := s.DeleteRange(c.lo, c.hi); err != nil {
				t.Fatal(err)
			}
			for round := range 2 {
				wantRange(t, s, c.first, c.last)
				for i := uint64(1); i <= 30; i++ {
					if i >= c.lo && i <= c.hi {
						wantNone(t, s, i, i)
					} else {
						wantEntries(t, s, i, i)
					}
				}
				if err := s.Close(); err != nil {
					t.Fatal(err)
				}
				if round == 0 {
					s = open(t, dir)
				}
			}
		})
	}
}

func TestAGapAfterASnapshot(t *testing.T) {
	s := fresh(t)
	store(t, s, entries(1, 5))
	store(t, s, entries(1000, 1005))
	wantRange(t, s, 1, 1005)
	if err := s.DeleteRange(1, 999); err != nil {
		t.Fatal(err)
	}
	wantRange(t, s, 1000, 1005)
	wantEntries(t, s, 1000, 1005)
}

func TestDeleteThenStoreAgain(t *testing.T) {
	s := fresh(t)
	store(t, s, entries(1, 10))
	if err := s.DeleteRange(1, 10); err != nil {
		t.Fatal(err)
	}
	store(t, s, entries(500, 501))
	wantRange(t, s, 500, 501)
}

// TestLargeBatches stores and deletes more than one badger transaction holds.
func TestLargeBatches(t *testing.T) {
	s := fresh(t)
	big := entries(1, 12)
	for _, l := range big {
		l.Data = bytes.Repeat([]byte{byte(l.Index)}, MaxEntry)
	}
	store(t, s, big)
	for i := uint64(1); i <= 12; i++ {
		var got raft.Log
		if err := s.GetLog(i, &got); err != nil || !bytes.Equal(got.Data, big[i-1].Data) {
			t.Fatalf("entry %d: %d bytes, %v", i, len(got.Data), err)
		}
	}
	store(t, s, entries(13, 60000))
	wantRange(t, s, 1, 60000)
	if err := s.DeleteRange(1, 59990); err != nil {
		t.Fatal(err)
	}
	wantRange(t, s, 59991, 60000)
	wantEntries(t, s, 59991, 60000)

	huge := entry(60001)
	huge.Data = make([]byte, MaxEntry+1)
	if err := s.StoreLog(huge); !errors.Is(err, holdfast.ErrInvalid) {
		t.Fatalf("an entry over MaxEntry: got %v, want %v", err, holdfast.ErrInvalid)
	}
	wantRange(t, s, 59991, 60000)
}

func TestStableValues(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir)
	if v, err := s.Get([]byte("LastVoteCand")); err != nil || len(v) != 0 {
		t.Fatalf("unset: got %q, %v", v, err)
	}
	if v, err := s.GetUint64([]byte("CurrentTerm")); err != nil || v != 0 {
		t.Fatalf("unset: got %d, %v", v, err)
	}
	if err := s.Set([]byte("LastVoteCand"), []byte("node-1")); err != nil {
		t.Fatal(err)
	}
	if err := s.SetUint64([]byte("CurrentTerm"), 42); err != nil {
		t.Fatal(err)
	}
	if err := s.SetUint64([]byte("CurrentTerm"), 43); err != nil {
		t.Fatal(err)
	}
	s.Close()
	s = open(t, dir)
	defer s.Close()
	if v, err := s.Get([]byte("LastVoteCand")); err != nil || string(v) != "node-1" {
		t.Fatalf("got %q, %v, want node-1", v, err)
	}
	if v, err := s.GetUint64([]byte("CurrentTerm")); err != nil || v != 43 {
		t.Fatalf("got %d, %v, want 43", v, err)
	}
	wantRange(t, s, 0, 0) // stable keys are no log entries
}

func TestReopen(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir)
	store(t, s, entries(7, 20))
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	s = open(t, dir)
	defer s.Close()
	wantRange(t, s, 7, 20)
	wantEntries(t, s, 7, 20)
}

func TestDirectoryInUse(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir)
	defer s.Close()
	if _, err := Open(Options{Dir: dir}); !errors.Is(err, holdfast.ErrRefused) {
		t.Fatalf("second open: got %v, want %v", err, holdfast.ErrRefused)
	}
}

// TestCrashClone copies the directory of an open store, as kill -9 would leave
// it, each time a write returned, and opens the copy.
func TestCrashClone(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir)
	defer s.Close()
	steps := []struct {
		do          func() error
		first, last uint64
		vote        uint64
	}{
		{func() error { return s.StoreLogs(entries(1, 1)) }, 1, 1, 0},
		{func() error { return s.SetUint64([]byte("vote"), 5) }, 1, 1, 5},
		{func() error { return s.StoreLogs(entries(2, 300)) }, 1, 300, 5},
		{func() error { return s.DeleteRange(250, 300) }, 1, 249, 5},
		{func() error { return s.DeleteRange(1, 100) }, 101, 249, 5},
		{func() error { return s.SetUint64([]byte("vote"), 6) }, 101, 249, 6},
	}
	for i, step := range steps {
		if err := step.do(); err != nil {
			t.Fatalf("step %d: %v", i, err)
		}
		clone := open(t, cloneDir(t, dir))
		wantRange(t, clone, step.first, step.last)
		wantEntries(t, clone, step.first, step.last)
		if v, err := clone.GetUint64([]byte("vote")); err != nil || v != step.vote {
			t.Fatalf("step %d: vote: got %d, %v, want %d", i, v, err, step.vote)
		}
		if err := clone.Close(); err != nil {
			t.Fatal(err)
		}
	}
}

func cloneDir(t *testing.T, dir string) string {
	t.Helper()
	to := t.TempDir()
	err := filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		if err != nil || e.IsDir() || e.Name() == "LOCK" {
			return err
		}
		b, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		return os.WriteFile(filepath.Join(to, e.Name()), b, 0o600)
	})
	if err != nil {
		t.Fatal(err)
	}
	return to
}

// TestDamageIsFinal writes a flipped bit under an entry's key: reading it is an
// integrity error, it is reported once, and the store takes nothing any more.
func TestDamageIsFinal(t *testing.T) {
	for _, c := range []struct {
		name string
		harm func([]byte) []byte
		kind holdfast.Kind
	}{
		{"flipped bit", func(b []byte) []byte { b[12] ^= 4; return b }, holdfast.ErrIntegrity},
		{"short", func(b []byte) []byte { return b[:3] }, holdfast.ErrIntegrity},
		{"cut", func(b []byte) []byte { return sealed(b[1:10]) }, holdfast.ErrIntegrity},
		{"misplaced", func([]byte) []byte { return encodeLog(entry(4)) }, holdfast.ErrIntegrity},
		{"extensions beyond the end", func([]byte) []byte {
			b := encodeLog(entry(3))
			b = b[1 : len(b)-4]
			b[25] = 200
			return sealed(b)
		}, holdfast.ErrIntegrity},
	} {
		t.Run(c.name, func(t *testing.T) {
			reported := 0
			s, err := Open(Options{Dir: t.TempDir(), OnFail: func(error) { reported++ }})
			if err != nil {
				t.Fatal(err)
			}
			defer s.Close()
			store(t, s, entries(1, 5))
			err = s.db.Update(func(txn *badger.Txn) error { return txn.Set(logKey(3), c.harm(encodeLog(entry(3)))) })
			if err != nil {
				t.Fatal(err)
			}
			if err := s.GetLog(3, &raft.Log{}); !errors.Is(err, c.kind) {
				t.Fatalf("read: got %v, want %v", err, c.kind)
			}
			if err := s.StoreLog(entry(6)); !errors.Is(err, c.kind) {
				t.Fatalf("store after damage: got %v, want %v", err, c.kind)
			}
			if err := s.SetUint64([]byte("vote"), 1); !errors.Is(err, c.kind) {
				t.Fatalf("set after damage: got %v, want %v", err, c.kind)
			}
			if reported != 1 {
				t.Fatalf("reported %d times, want once", reported)
			}
		})
	}
}

func TestLaterFormatIsRefused(t *testing.T) {
	b := sealed([]byte("x"))
	b[0] = formatVersion + 1
	// The checksum covers the version, so make it anew.
	b = append(b[:2], sealedSum(b[:2])...)
	if _, err := unseal(b); !errors.Is(err, holdfast.ErrUnsupported) {
		t.Fatalf("got %v, want %v", err, holdfast.ErrUnsupported)
	}
}

func sealedSum(b []byte) []byte {
	return binary.LittleEndian.AppendUint32(nil, crc32.Checksum(b, castagnoli))
}
