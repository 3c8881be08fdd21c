package e2e

import (
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// proxied is a cluster whose replication and raft go through proxies.
type proxied struct {
	*cluster
	data, raft map[*node]*proxy
}

func startProxied(t *testing.T, n int) *proxied {
	t.Helper()
	c := &proxied{data: map[*node]*proxy{}, raft: map[*node]*proxy{}}
	c.cluster = startEach(t, n, func(nd *node) []string {
		_, port, err := net.SplitHostPort(nd.address)
		if err != nil {
			t.Fatal(err)
		}
		first, err := strconv.Atoi(port)
		if err != nil {
			t.Fatal(err)
		}
		c.data[nd], c.raft[nd] = newProxy(t, first+1), newProxy(t, first+2)
		return []string{"--listen", "127.0.0.1", "--data-address", c.data[nd].address, "--raft-address", c.raft[nd].address}
	})
	return c
}

// setRaft lets raft's messages through or not, and waits until every node noticed.
func (c *proxied) setRaft(t *testing.T, ok bool) {
	t.Helper()
	for _, p := range c.raft {
		p.reach(ok)
	}
	want := "holdfast_raft_leader_known 0\n"
	if ok {
		want = "holdfast_raft_leader_known 1\n"
	}
	for _, n := range c.nodes {
		if n.cmd != nil {
			eventually(t, time.Minute, n.name+" says "+want, func() bool { return strings.Contains(metrics(t, n), want) })
		}
	}
}

// metrics is what a node tells a monitor.
func metrics(t *testing.T, n *node) string {
	t.Helper()
	resp, err := http.Get("http://" + n.address + "/metrics")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return string(body)
}

// evictions counts what a node's log says of members put out.
func evictions(t *testing.T, n *node) int {
	t.Helper()
	raw, err := os.ReadFile(filepath.Join(n.dir, "log"))
	if err != nil {
		t.Fatal(err)
	}
	return strings.Count(string(raw), `"msg":"evict`)
}

// user is a client with one request at a time: it writes and reads back, and
// notes how long it waited at the most.
type user struct {
	uri    string
	blocks int
	held   map[int][]uint64 // what a block may hold: more than one value after a write without an answer
	rng    *rand.Rand
	value  uint64
	stop   chan struct{}
	reset  chan struct{}
	done   chan struct{}

	mu      sync.Mutex
	answers int
	resets  int
	longest time.Duration
	began   time.Time // of the request that waits; zero if none does
	err     error     // why it ended
}

// newUser starts a client of a volume that was never written.
func newUser(uri string, size int64, seed uint64) *user {
	u := prepareUser(size, seed)
	u.uri = uri
	u.start()
	return u
}

func prepareUser(size int64, seed uint64) *user {
	return &user{blocks: int(size / blockSize), held: map[int][]uint64{}, rng: rand.New(rand.NewPCG(seed, 2)), reset: make(chan struct{})}
}

// start begins, or begins again after an error.
func (u *user) start() {
	u.stop, u.done = make(chan struct{}), make(chan struct{})
	u.err = nil
	go func() {
		defer close(u.done)
		err := u.run()
		u.mu.Lock()
		u.err = err
		u.mu.Unlock()
	}()
}

func (u *user) run() error {
	conn, err := dialNBD(u.uri)
	if err != nil {
		return err
	}
	defer func() { conn.Close() }()
	for n := 0; ; n++ {
		select {
		case <-u.stop:
			return nil
		case <-u.reset:
			// In the middle of a write: it may have been done or not.
			block := u.rng.IntN(u.blocks)
			if err := conn.writeBlock(1, block, u.next(block)); err != nil {
				return err
			}
			conn.Close()
			if conn, err = dialNBD(u.uri); err != nil {
				return fmt.Errorf("dial again: %w", err)
			}
			u.mu.Lock()
			u.resets++
			u.mu.Unlock()
			continue
		default:
		}
		if err := u.once(conn, n); err != nil {
			return err
		}
	}
}

// next is a new value for a block, which it may hold from now on.
func (u *user) next(block int) uint64 {
	u.value++
	if u.held[block] == nil {
		u.held[block] = []uint64{0}
	}
	u.held[block] = append(u.held[block], u.value)
	return u.value
}

// once writes a block, and reads back another one each fourth time.
func (u *user) once(conn *nbdConn, n int) error {
	block := u.rng.IntN(u.blocks)
	u.mu.Lock()
	u.began = time.Now()
	u.mu.Unlock()
	defer func() {
		u.mu.Lock()
		u.longest = max(u.longest, time.Since(u.began))
		u.began = time.Time{}
		u.answers++
		u.mu.Unlock()
	}()
	if n%4 == 3 {
		return u.check(conn, block)
	}
	value := u.next(block)
	if err := conn.writeBlock(1, block, value); err != nil {
		return err
	}
	_, errno, err := conn.reply()
	if err != nil {
		return err
	}
	if errno != 0 {
		return fmt.Errorf("write of block %d: %w", block, syscall.Errno(errno))
	}
	u.held[block] = []uint64{value}
	return nil
}

// check reads a block, which must hold one of its values and keeps that one.
func (u *user) check(conn *nbdConn, block int) error {
	got, err := conn.readBlock(block)
	if err != nil {
		return fmt.Errorf("read of block %d: %w", block, err)
	}
	may := u.held[block]
	if may == nil {
		may = []uint64{0}
	}
	for _, v := range may {
		if v == got {
			u.held[block] = []uint64{got}
			return nil
		}
	}
	return fmt.Errorf("block %d holds %#x, want one of %#x", block, got, may)
}

// finish stops the client; it must not have met an error.
func (u *user) finish(t *testing.T) {
	t.Helper()
	close(u.stop)
	<-u.done
	if u.err != nil {
		t.Fatalf("the client of %s: %v", u.uri, u.err)
	}
}

// look is how many requests were answered, and the longest wait, the present one
// included.
func (u *user) look() (answers int, longest time.Duration) {
	u.mu.Lock()
	defer u.mu.Unlock()
	longest = u.longest
	if !u.began.IsZero() {
		longest = max(longest, time.Since(u.began))
	}
	return u.answers, longest
}

// works waits for so many more answers.
func (u *user) works(t *testing.T, n int, when string) {
	t.Helper()
	from, _ := u.look()
	eventually(t, 30*time.Second, fmt.Sprintf("%d more requests of the client of %s %s", n, u.uri, when), func() bool {
		select {
		case <-u.done:
			t.Fatalf("the client of %s %s ended: %v", u.uri, when, u.err)
		default:
		}
		got, _ := u.look()
		return got >= from+n
	})
}

// waiting is how long the present request has waited.
func (u *user) waiting() time.Duration {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.began.IsZero() {
		return 0
	}
	return time.Since(u.began)
}

// checkAll reads every block that was written.
func (u *user) checkAll(t *testing.T) {
	t.Helper()
	conn, err := dialNBD(u.uri)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	for block := range u.held {
		if err := u.check(conn, block); err != nil {
			t.Fatal(err)
		}
	}
}

const (
	// flatWait is what a request may take while no member fails: a reset connection
	// is dialled again at once, and nobody is suspected before 2 s.
	flatWait = 2 * time.Second
	// holdTime is what on_quorum_loss=error of one volume says.
	holdTime = 15 * time.Second
)

// TestRunFlat takes raft away and lets clients work on, while their connections
// and those between nodes are reset: no error, nobody waits, and when raft is back
// everything is as it was. Then a member dies while raft is away: requests are
// held, or fail after the time that on_quorum_loss gives. HOLDFAST_SOAK=1 keeps raft
// away for an hour.
func TestRunFlat(t *testing.T) {
	whole(t)
	c := startProxied(t, 3)
	away := 45 * time.Second
	if os.Getenv("HOLDFAST_SOAK") != "" {
		away = time.Hour
	}
	holder, dead := c.nodes[0], c.nodes[2]
	holder.must("volume", "create", "freezes", "--size", "64M", "--replicas", "3")
	holder.must("volume", "create", "errors", "--size", "64M", "--replicas", "3", "--on-quorum-loss", "error:"+holdTime.String())
	freezes, errors := newUser(holder.attach("freezes"), 64<<20, 1), newUser(holder.attach("errors"), 64<<20, 2)
	users := []*user{freezes, errors}
	before := []volume{holder.inspect("freezes"), holder.inspect("errors")}
	asBefore := func() bool {
		for i, name := range []string{"freezes", "errors"} {
			v := holder.inspect(name)
			if !v.whole() || v.Epoch != before[i].Epoch || v.Session != before[i].Session || v.Node != before[i].Node {
				return false
			}
		}
		return true
	}
	eventually(t, 30*time.Second, "both volumes whole", asBefore)

	c.setRaft(t, false)
	gone, broken := time.Now(), 0
	for time.Since(gone) < away {
		for _, p := range c.data {
			broken += p.reset()
		}
		for _, u := range users {
			select {
			case u.reset <- struct{}{}:
			case <-u.done:
				t.Fatalf("%v after raft went away a client ended: %v", time.Since(gone), u.err)
			case <-time.After(20 * time.Second):
				t.Fatalf("%v after raft went away a request waits", time.Since(gone))
			}
			u.works(t, 100, "without raft")
		}
		time.Sleep(2 * time.Second) // of work between two resets
	}
	if m := metrics(t, holder); !strings.Contains(m, "holdfast_raft_leader_known 0\n") {
		t.Error("there was a raft leader all along")
	}
	if broken == 0 || freezes.resets == 0 {
		t.Errorf("%d connections between nodes and %d of a client were reset, want some", broken, freezes.resets)
	}
	for _, u := range users {
		n, longest := u.look()
		t.Logf("%v without raft: %d requests, the longest %v; %d resets of the client, %d of connections between nodes", away, n, longest, u.resets, broken)
		if longest > flatWait {
			t.Errorf("a request took %v without raft, want %v at most", longest, flatWait)
		}
	}
	c.setRaft(t, true)
	eventually(t, 30*time.Second, "both volumes as they were", asBefore)
	if n := evictions(t, holder); n != 0 {
		t.Errorf("%d evictions, want none", n)
	}

	c.setRaft(t, false)
	dead.kill()
	died := time.Now()
	select {
	case <-errors.done:
	case <-time.After(4 * holdTime):
		t.Fatalf("no error %v after a member died without raft, on_quorum_loss says %v", time.Since(died), holdTime)
	}
	took := time.Since(died)
	t.Logf("error %v after the death: %v", took, errors.err)
	if errors.err == nil || took < holdTime || took > 2*holdTime {
		t.Errorf("error %v after %v, want one after %v", errors.err, took, holdTime)
	}
	if w := freezes.waiting(); w < holdTime/2 {
		t.Errorf("the other volume's client waits for %v, want it to be held since the death", w)
	}
	n, _ := freezes.look()
	time.Sleep(3 * time.Second) // in which nothing may happen
	if m, _ := freezes.look(); m != n || freezes.err != nil {
		t.Errorf("%d requests of the other volume were answered while a member is dead and raft away; %v", m-n, freezes.err)
	}

	c.setRaft(t, true)
	freezes.works(t, 100, "once its held request was answered")
	errors.start()
	errors.works(t, 100, "which had an error")
	dead.start()
	eventually(t, time.Minute, "every replica in sync again, in the same session", asBefore)
	for _, u := range users {
		u.finish(t)
		u.checkAll(t)
	}
}

// TestWriterStops stops the holder's process for longer than it takes to put a
// silent member out. When it wakes it must not take its own silence for that of
// the others: nobody is put out, clients go on.
func TestWriterStops(t *testing.T) {
	whole(t)
	c := start(t, 3)
	c.nodes[0].must("volume", "create", "v", "--size", "64M", "--replicas", "3")
	leader := c.leader()
	if leader == nil {
		t.Fatal("no raft leader")
	}
	u := prepareUser(64<<20, 3)
	for _, holder := range []*node{leader, c.other(leader)} {
		u.uri = holder.attach("v")
		eventually(t, 30*time.Second, "every replica in sync", func() bool { return holder.inspect("v").whole() })
		before := evictions(t, holder)
		u.longest = 0
		u.start()
		u.works(t, 100, "before")
		epoch := holder.inspect("v").Epoch
		if err := holder.cmd.Process.Signal(syscall.SIGSTOP); err != nil {
			t.Fatal(err)
		}
		time.Sleep(6 * time.Second) // the fault itself: eviction is after 5 s
		if err := holder.cmd.Process.Signal(syscall.SIGCONT); err != nil {
			t.Fatal(err)
		}
		u.works(t, 1000, "after the holder woke")
		_, longest := u.look()
		if longest < 5*time.Second {
			t.Errorf("the longest request took %v: the holder was not stopped", longest)
		}
		// What would put a member out takes 5 s more.
		time.Sleep(6 * time.Second)
		if got := evictions(t, holder) - before; got != 0 {
			t.Errorf("%s woke and put %d members out", holder.name, got)
		}
		if v := holder.inspect("v"); !v.whole() || v.Epoch != epoch {
			t.Errorf("after the holder woke: %+v, want epoch %d and every replica in sync", v, epoch)
		}
		t.Logf("%s (raft leader: %v) stopped for 6 s: nobody put out, longest request %v", holder.name, holder == leader, longest)
		u.finish(t)
		u.checkAll(t)
		holder.must("volume", "detach", "v")
	}
}
