package main

import (
	"context"
	"errors"
	"fmt"
	"hash/crc32"
	"sync"
	"time"
)

// writers is how many connections write at once. Each has one command under way at
// any time, so at the moment of death some are unanswered.
const writers = 4

// drainTime is how long after a host's death answers are still read: an
// acknowledgement may have left the host before it died.
const drainTime = 300 * time.Millisecond

// ledger is the client's memory of what it wrote: row by row, whether the database
// acknowledged it. It is kept outside of the hosts that can die.
type ledger struct {
	prefix string // of this ledger's keys, so that several can share a database

	mu         sync.Mutex
	next       int
	acked      []int // rows whose commit was acknowledged
	unanswered []int // rows that were sent and never answered
	lastAck    time.Time
	failed     error // the first refusal by the database; nothing may refuse
}

func newLedger(prefix string) *ledger { return &ledger{prefix: prefix} }

func (l *ledger) key(row int) string { return fmt.Sprintf("%s:%06d", l.prefix, row) }

// value is what row holds: it can be told from every other row's, and from a damaged
// copy of itself.
func (l *ledger) value(row int) string {
	text := fmt.Sprintf("%s row %d was committed; holdfast keeps it", l.prefix, row)
	return fmt.Sprintf("%s %08x", text, crc32.ChecksumIEEE([]byte(text)))
}

// rows returns how many were acknowledged so far, and the time of the last.
func (l *ledger) rows() (acked int, last time.Time) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.acked), l.lastAck
}

func (l *ledger) begin() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.next++
	return l.next
}

// end records how a row's command ended.
func (l *ledger) end(row int, err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	switch {
	case err == nil:
		l.acked = append(l.acked, row)
		l.lastAck = time.Now()
	case errors.Is(err, errReply):
		if l.failed == nil {
			l.failed = err
		}
	default:
		l.unanswered = append(l.unanswered, row)
	}
}

// writing is a set of connections that fill a ledger until they are stopped.
type writing struct {
	ledger  *ledger
	clients []*client
	stop    chan struct{}
	done    sync.WaitGroup
}

// startWriting connects to the database at address and writes rows, each acknowledged
// before the next on that connection, until stopped or the database is gone.
func startWriting(ctx context.Context, l *ledger, address string) (*writing, error) {
	w := &writing{ledger: l, stop: make(chan struct{})}
	for range writers {
		c, err := dial(ctx, address)
		if err != nil {
			for _, open := range w.clients {
				open.close()
			}
			return nil, fmt.Errorf("connect to the database: %w", err)
		}
		w.clients = append(w.clients, c)
	}
	for _, c := range w.clients {
		w.done.Go(func() { w.write(c) })
	}
	return w, nil
}

func (w *writing) write(c *client) {
	defer c.close()
	for {
		select {
		case <-w.stop:
			return
		default:
		}
		row := w.ledger.begin()
		reply, err := c.do("SET", w.ledger.key(row), w.ledger.value(row))
		if err == nil && reply != "OK" {
			err = fmt.Errorf("%w: SET is answered %q", errReply, reply)
		}
		w.ledger.end(row, err)
		if err != nil {
			return
		}
	}
}

// finish ends the writing after the commands under way: nothing is left unanswered by
// a database that lives. With ctx over it waits no longer.
func (w *writing) finish(ctx context.Context) {
	close(w.stop)
	defer context.AfterFunc(ctx, func() {
		for _, c := range w.clients {
			c.close()
		}
	})()
	w.done.Wait()
}

// hostDied ends the writing of a database whose host is dead: what has not been
// answered after drainTime never will be.
func (w *writing) hostDied() {
	close(w.stop)
	deadline := time.Now().Add(drainTime)
	for _, c := range w.clients {
		c.conn.SetReadDeadline(deadline) //nolint:errcheck // fails only if closed, and then the reader has ended
	}
	w.done.Wait()
}

// waitRows waits until rows are acknowledged. A writing that has ended by itself, or a
// refusal, is an error.
func (w *writing) waitRows(ctx context.Context, rows int) error {
	for {
		w.ledger.mu.Lock()
		acked, unanswered, failed := len(w.ledger.acked), len(w.ledger.unanswered), w.ledger.failed
		w.ledger.mu.Unlock()
		switch {
		case failed != nil:
			return failed
		case acked >= rows:
			return nil
		case unanswered > 0:
			return fmt.Errorf("the database went away after %d rows", acked)
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("wait for %d rows, %d acknowledged so far: %w", rows, acked, ctx.Err())
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// audit is what reading a whole ledger back found.
type audit struct {
	found int   // acknowledged rows that are there, with their value
	lost  []int // acknowledged rows that are not, or with another value
	extra int   // unanswered rows that are there: allowed
	wrong []int // unanswered rows that are there with another value
}

// auditBatch is how many reads are under way at once.
const auditBatch = 200

// check reads back every row of the ledger.
func (l *ledger) check(ctx context.Context, address string) (audit, error) {
	c, err := dial(ctx, address)
	if err != nil {
		return audit{}, fmt.Errorf("connect to the database: %w", err)
	}
	defer c.close()
	stop := context.AfterFunc(ctx, c.close)
	defer stop()
	l.mu.Lock()
	acked, unanswered := l.acked, l.unanswered
	l.mu.Unlock()
	var a audit
	err = l.read(c, acked, func(row int, there, right bool) {
		if right {
			a.found++
		} else {
			a.lost = append(a.lost, row)
		}
	})
	if err == nil {
		err = l.read(c, unanswered, func(row int, there, right bool) {
			switch {
			case right:
				a.extra++
			case there:
				a.wrong = append(a.wrong, row)
			}
		})
	}
	if err != nil {
		return audit{}, fmt.Errorf("read the rows back: %w", err)
	}
	return a, nil
}

func (l *ledger) read(c *client, rows []int, tell func(row int, there, right bool)) error {
	for len(rows) > 0 {
		batch := rows[:min(auditBatch, len(rows))]
		rows = rows[len(batch):]
		for _, row := range batch {
			if err := c.send("GET", l.key(row)); err != nil {
				return err
			}
		}
		for _, row := range batch {
			value, err := c.receive()
			if err != nil && !errors.Is(err, errNil) {
				return err
			}
			tell(row, err == nil, err == nil && value == l.value(row))
		}
	}
	return nil
}

// firstWrite tries to write to the databases that may come up at addresses until one
// acknowledges, and returns that one and when.
func firstWrite(ctx context.Context, addresses []string, key string) (string, time.Time, error) {
	var last error
	for {
		for _, address := range addresses {
			last = writeOnce(ctx, address, key)
			if last == nil {
				return address, time.Now(), nil
			}
		}
		select {
		case <-ctx.Done():
			return "", time.Time{}, fmt.Errorf("no database takes a write: %w (last: %w)", ctx.Err(), last)
		case <-time.After(50 * time.Millisecond):
		}
	}
}

func writeOnce(ctx context.Context, address, key string) error {
	c, err := dial(ctx, address)
	if err != nil {
		return err
	}
	defer c.close()
	stop := context.AfterFunc(ctx, c.close)
	defer stop()
	c.conn.SetDeadline(time.Now().Add(20 * time.Second)) //nolint:errcheck // an open connection takes any deadline
	_, err = c.do("SET", key, "1")
	return err
}
