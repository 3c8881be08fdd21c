package badgerlog

import (
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"

	"github.com/dgraph-io/badger/v4"
	"github.com/dgraph-io/badger/v4/options"
	"github.com/hashicorp/raft"

	"github.com/holdfast-storage/holdfast"
)

// Sizes, all in bytes: small, since the log is short and every node pays them.
const (
	memTableSize  = 16 << 20
	memTables     = 2
	blockCache    = 16 << 20
	valueLogSize  = 64 << 20
	valueInLSM    = 1 << 20 // values up to this stay out of the value log
	levelZeroWait = 8       // tables at level 0 before writers wait; small, to keep files few

	// MaxEntry bounds the data of one log entry, so that it fits the LSM tree.
	MaxEntry = valueInLSM - 4096
)

// Options are the settings of Open.
type Options struct {
	// Dir is the database's directory; it is made if need be.
	Dir string
	// Logger receives badger's own words. Default: none.
	Logger *slog.Logger
	// OnFail is called once, with the first error of the database, from the
	// goroutine that met it. It must not block.
	OnFail func(error)
}

// Store is a raft log and stable store. Its methods may be called concurrently.
type Store struct {
	db     *badger.DB
	onFail func(error)

	mu          sync.Mutex // of the fields below
	first, last uint64     // indexes in the log, 0 when it is empty
	failed      error

	write sync.Mutex // held by the one writer, across I/O: nothing else waits for it
}

var (
	_ raft.LogStore    = (*Store)(nil)
	_ raft.StableStore = (*Store)(nil)
)

// settings are badger's options for a directory; a test looks at SyncWrites.
func settings(o Options) badger.Options {
	return badger.DefaultOptions(o.Dir).
		WithSyncWrites(true).
		WithMemTableSize(memTableSize).
		WithNumMemtables(memTables).
		WithBlockCacheSize(blockCache).
		WithValueLogFileSize(valueLogSize).
		WithValueThreshold(valueInLSM).
		WithNumCompactors(2). // the least badger takes
		WithNumLevelZeroTables(2).
		WithNumLevelZeroTablesStall(levelZeroWait).
		WithCompression(options.None).
		WithMetricsEnabled(false).
		WithDetectConflicts(false). // one writer
		WithLogger(badgerLogger{o.Logger})
}

// Open opens or makes the database.
func Open(o Options) (*Store, error) {
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	db, err := badger.Open(settings(o))
	if err != nil {
		kind := holdfast.ErrIO
		if strings.Contains(err.Error(), "Cannot acquire directory lock") {
			kind = holdfast.ErrRefused
		}
		return nil, holdfast.Errorf(kind, "open raft log %s: %w", o.Dir, err)
	}
	s := &Store{db: db, onFail: o.OnFail}
	if s.first, err = s.seek(0); err == nil {
		s.last, err = s.seekBack(^uint64(0))
	}
	if err != nil {
		db.Close()
		return nil, holdfast.Errorf(holdfast.ErrIO, "read raft log %s: %w", o.Dir, err)
	}
	return s, nil
}

// Close closes the database. Nothing else may be called after it.
func (s *Store) Close() error {
	s.write.Lock()
	defer s.write.Unlock()
	if err := s.db.Close(); err != nil {
		return holdfast.Errorf(holdfast.ErrIO, "close raft log: %w", err)
	}
	return nil
}

// FirstIndex returns the first index in the log, 0 if it is empty.
func (s *Store) FirstIndex() (uint64, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.first, s.failed
}

// LastIndex returns the last index in the log, 0 if it is empty.
func (s *Store) LastIndex() (uint64, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.last, s.failed
}

// GetLog reads an entry; raft.ErrLogNotFound if there is none.
func (s *Store) GetLog(index uint64, l *raft.Log) error {
	if err := s.failure(); err != nil {
		return err
	}
	err := s.db.View(func(txn *badger.Txn) error {
		item, err := txn.Get(logKey(index))
		if err != nil {
			return err
		}
		return item.Value(func(v []byte) error { return decodeLog(index, v, l) })
	})
	if errors.Is(err, badger.ErrKeyNotFound) {
		return raft.ErrLogNotFound
	}
	if err != nil {
		return s.fail(fmt.Errorf("read raft log entry %d: %w", index, err))
	}
	return nil
}

// StoreLog stores one entry.
func (s *Store) StoreLog(l *raft.Log) error { return s.StoreLogs([]*raft.Log{l}) }

// StoreLogs stores entries, in order; after a crash or an error a prefix of them
// may be there.
func (s *Store) StoreLogs(logs []*raft.Log) error {
	for _, l := range logs {
		if len(l.Data)+len(l.Extensions) > MaxEntry {
			return holdfast.Errorf(holdfast.ErrInvalid, "raft entry %d has %d bytes, more than %d", l.Index, len(l.Data)+len(l.Extensions), MaxEntry)
		}
	}
	if len(logs) == 0 {
		return s.failure()
	}
	s.write.Lock()
	defer s.write.Unlock()
	err := s.update(len(logs), func(i int) *badger.Entry {
		return badger.NewEntry(logKey(logs[i].Index), encodeLog(logs[i]))
	})
	if err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, l := range logs {
		if s.first == 0 || l.Index < s.first {
			s.first = l.Index
		}
		s.last = max(s.last, l.Index)
	}
	return nil
}

// DeleteRange deletes the entries from lo to hi, both included. Raft deletes at
// the head (after a snapshot) or at the tail (entries of a deposed leader); a
// crash in the middle leaves what is further from that end.
func (s *Store) DeleteRange(lo, hi uint64) error {
	s.write.Lock()
	defer s.write.Unlock()
	s.mu.Lock()
	first, last := s.first, s.last
	s.mu.Unlock()
	lo, hi = max(lo, first), min(hi, last)
	if first == 0 || lo > hi {
		return s.failure()
	}
	count := int(hi - lo + 1)
	err := s.update(count, func(i int) *badger.Entry {
		if hi == last {
			return &badger.Entry{Key: logKey(hi - uint64(i))}
		}
		return &badger.Entry{Key: logKey(lo + uint64(i))}
	})
	if err != nil {
		return err
	}
	newFirst, newLast := first, last
	if lo == first {
		newFirst, err = s.seek(hi + 1)
	}
	if err == nil && hi == last {
		newLast, err = s.seekBack(lo - 1)
	}
	if err != nil {
		return s.fail(fmt.Errorf("read raft log: %w", err))
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if newFirst == 0 || newLast == 0 {
		newFirst, newLast = 0, 0
	}
	s.first, s.last = newFirst, newLast
	return nil
}

// Set stores a stable value.
func (s *Store) Set(k, v []byte) error {
	s.write.Lock()
	defer s.write.Unlock()
	return s.update(1, func(int) *badger.Entry { return badger.NewEntry(stableKey(k), sealed(v)) })
}

// Get reads a stable value, empty if it was never set.
func (s *Store) Get(k []byte) ([]byte, error) {
	if err := s.failure(); err != nil {
		return nil, err
	}
	var out []byte
	err := s.db.View(func(txn *badger.Txn) error {
		item, err := txn.Get(stableKey(k))
		if err != nil {
			return err
		}
		return item.Value(func(v []byte) error {
			out, err = unseal(v)
			return err
		})
	})
	if errors.Is(err, badger.ErrKeyNotFound) {
		return nil, nil
	}
	if err != nil {
		return nil, s.fail(fmt.Errorf("read raft value %q: %w", k, err))
	}
	return out, nil
}

// SetUint64 stores a stable number.
func (s *Store) SetUint64(k []byte, v uint64) error {
	return s.Set(k, binary.LittleEndian.AppendUint64(nil, v))
}

// GetUint64 reads a stable number, 0 if it was never set.
func (s *Store) GetUint64(k []byte) (uint64, error) {
	b, err := s.Get(k)
	if err != nil || len(b) == 0 {
		return 0, err
	}
	if len(b) != 8 {
		return 0, s.fail(holdfast.Errorf(holdfast.ErrIntegrity, "raft value %q has %d bytes, not 8", k, len(b)))
	}
	return binary.LittleEndian.Uint64(b), nil
}

// update writes n entries in order, in as few synced transactions as badger's
// limits allow. An entry without a value is a deletion. s.write is held.
func (s *Store) update(n int, entry func(i int) *badger.Entry) error {
	if err := s.failure(); err != nil {
		return err
	}
	txn := s.db.NewTransaction(true)
	defer func() { txn.Discard() }()
	put := func(e *badger.Entry) error {
		if e.Value == nil {
			return txn.Delete(e.Key)
		}
		return txn.SetEntry(e)
	}
	for i := range n {
		err := put(entry(i))
		if errors.Is(err, badger.ErrTxnTooBig) {
			if err = txn.Commit(); err == nil {
				txn = s.db.NewTransaction(true)
				err = put(entry(i))
			}
		}
		if err != nil {
			return s.fail(fmt.Errorf("write raft log: %w", err))
		}
	}
	if err := txn.Commit(); err != nil {
		return s.fail(fmt.Errorf("write raft log: %w", err))
	}
	return nil
}

// seek returns the lowest index from from on, 0 if there is none.
func (s *Store) seek(from uint64) (uint64, error) {
	return s.iterate(badger.IteratorOptions{Prefix: []byte{logPrefix}}, logKey(from))
}

// seekBack returns the highest index up to from, 0 if there is none.
func (s *Store) seekBack(from uint64) (uint64, error) {
	return s.iterate(badger.IteratorOptions{Prefix: []byte{logPrefix}, Reverse: true}, logKey(from))
}

func (s *Store) iterate(o badger.IteratorOptions, from []byte) (index uint64, err error) {
	err = s.db.View(func(txn *badger.Txn) error {
		it := txn.NewIterator(o)
		defer it.Close()
		it.Seek(from)
		if !it.Valid() {
			return nil
		}
		index, err = indexOf(it.Item().Key())
		return err
	})
	return index, err
}

// failure returns the error that ended the store's life, nil while it lives.
func (s *Store) failure() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.failed
}

// fail ends the store's life with its first error, and returns that.
func (s *Store) fail(err error) error {
	kind := holdfast.ErrIO
	if errors.Is(err, holdfast.ErrIntegrity) {
		kind = holdfast.ErrIntegrity
	}
	s.mu.Lock()
	again := s.failed != nil
	if !again {
		s.failed = holdfast.Errorf(kind, "raft log: %w", err)
	}
	err = s.failed
	s.mu.Unlock()
	if !again && s.onFail != nil {
		s.onFail(err)
	}
	return err
}

// badgerLogger hands badger's words to slog; what badger calls info is our debug.
type badgerLogger struct{ log *slog.Logger }

func text(format string, args []any) slog.Attr {
	return slog.String("text", strings.TrimSpace(fmt.Sprintf(format, args...)))
}

func (b badgerLogger) Errorf(f string, a ...any)   { b.log.Error("badger", text(f, a)) }
func (b badgerLogger) Warningf(f string, a ...any) { b.log.Warn("badger", text(f, a)) }
func (b badgerLogger) Infof(f string, a ...any)    { b.log.Debug("badger", text(f, a)) }
func (b badgerLogger) Debugf(f string, a ...any)   { b.log.Debug("badger", text(f, a)) }
