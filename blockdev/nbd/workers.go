package nbd

import "sync"

// maxIdleWorkers bounds the goroutines kept for the next requests: as many as
// one deep queue keeps busy. More are started when needed (at most the
// requests in flight, which are bounded) and end when done.
const maxIdleWorkers = 256

// workers runs requests, each on a goroutine of its own while it lasts. Kept
// goroutines have grown their stacks to what the device's call chain needs,
// which is most of the cost of a new one.
type workers struct {
	mu     sync.Mutex
	idle   []chan *op // the last to go idle is the first to be used: its stack is warm
	closed bool
	wg     sync.WaitGroup
}

// run hands the request to an idle worker or a new one; it does not wait.
func (w *workers) run(o *op) {
	w.mu.Lock()
	if n := len(w.idle); n > 0 {
		ch := w.idle[n-1]
		w.idle = w.idle[:n-1]
		w.mu.Unlock()
		ch <- o
		return
	}
	w.wg.Add(1)
	w.mu.Unlock()
	go w.work(make(chan *op, 1), o)
}

func (w *workers) work(ch chan *op, o *op) {
	defer w.wg.Done()
	for o != nil {
		o.execute()
		w.mu.Lock()
		if w.closed || len(w.idle) >= maxIdleWorkers {
			w.mu.Unlock()
			return
		}
		w.idle = append(w.idle, ch)
		w.mu.Unlock()
		o = <-ch
	}
}

// close ends the workers and waits for them. No request runs and none comes.
func (w *workers) close() {
	w.mu.Lock()
	w.closed = true
	for _, ch := range w.idle {
		close(ch)
	}
	w.idle = nil
	w.mu.Unlock()
	w.wg.Wait()
}
