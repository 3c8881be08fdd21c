package reconcile

import (
	"bytes"
	"context"
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/holdfast-storage/holdfast"
	"github.com/holdfast-storage/holdfast/blockdev/vfs"
	"github.com/holdfast-storage/holdfast/raftstore/state"
)

// await waits for a change of the register until cond holds.
func await(t *testing.T, r *register, what string, cond func() bool) {
	t.Helper()
	deadline := time.After(20 * time.Second)
	for {
		changed := r.Changed()
		if cond() {
			return
		}
		select {
		case <-changed:
		case <-time.After(10 * time.Millisecond): // what does not show in the register
		case <-deadline:
			t.Fatalf("still not: %s", what)
		}
	}
}

func one(t *testing.T) (*register, *fakeNode) {
	t.Helper()
	reg := newRegister(t)
	n := run(t, reg, holdfast.NewID[holdfast.NodeID](), vfs.NewMemory(1), t.TempDir())
	t.Cleanup(func() { n.end(t) })
	return reg, n
}

func TestAttachWritesAndSurvivesARestart(t *testing.T) {
	reg := newRegister(t)
	fs, dir, id := vfs.NewMemory(1), t.TempDir(), holdfast.NewID[holdfast.NodeID]()
	n := run(t, reg, id, fs, dir)
	v := n.create(t, "data")
	held, err := n.att.Attach(t.Context(), "data", AttachOptions{NBD: true})
	if err != nil {
		t.Fatal(err)
	}
	if want := "nbd+unix:///data?socket=%2Fx%2Fnbd.sock"; held.URI != want || held.Epoch != 1 || !held.Active {
		t.Errorf("attached %+v, want the URI %s in epoch 1", held, want)
	}
	again, err := n.att.Attach(t.Context(), v.ID.String(), AttachOptions{NBD: true})
	if err != nil || again.URI != held.URI || again.Epoch != 1 {
		t.Errorf("attach again: %+v, %v", again, err)
	}
	dev, _ := n.att.Device(v.ID)
	block := bytes.Repeat([]byte("held fast"), 1000)[:8192]
	if err := dev.WriteAt(t.Context(), block, 4096, false); err != nil {
		t.Fatal(err)
	}
	n.end(t)

	n = run(t, reg, id, fs, dir)
	await(t, reg, "attached again after the restart", func() bool { h, ok := n.att.Get(v.ID); return ok && h.Active && h.URI == held.URI })
	after, _ := reg.View().Volume(v.ID)
	if after.Epoch != 2 || after.Phase != state.PhaseAttached {
		t.Errorf("epoch %d, phase %s; want 2, attached", after.Epoch, after.Phase)
	}
	dev, _ = n.att.Device(v.ID)
	got := make([]byte, len(block))
	if err := dev.ReadAt(t.Context(), got, 4096); err != nil || !bytes.Equal(got, block) {
		t.Errorf("read after the restart: %v, equal %v", err, bytes.Equal(got, block))
	}
	if err := n.att.Detach(t.Context(), v.ID, false); err != nil {
		t.Fatal(err)
	}
	if after, _ = reg.View().Volume(v.ID); after.Phase != state.PhaseDetached {
		t.Errorf("phase %s after detach", after.Phase)
	}
	n.end(t)

	n = run(t, reg, id, fs, dir)
	defer n.end(t)
	if _, ok := n.att.Get(v.ID); ok {
		t.Error("a detached volume was attached again by a restart")
	}
}

func TestAttachRespectsTheHolder(t *testing.T) {
	reg, n := one(t)
	v := n.create(t, "data")
	other := state.Node{ID: holdfast.NewID[holdfast.NodeID](), Name: "other", Instance: holdfast.NewID[holdfast.InstanceID](), MaxLevel: 1, Version: "test",
		Kind: state.MemberVoter, Addresses: state.Addresses{API: "127.0.0.1:4", Data: "127.0.0.1:5", Raft: "127.0.0.1:6"}}
	reg.must(t, &state.NodeJoin{Node: other})
	reg.must(t, &state.AttachBegin{Volume: v.ID, Node: other.ID, Instance: other.Instance, Session: holdfast.NewID[holdfast.SessionID]()})

	reg.alive[other.ID] = true
	_, err := n.att.Attach(t.Context(), "data", AttachOptions{NBD: true})
	if !errors.Is(err, holdfast.ErrRefused) || !strings.Contains(err.Error(), "other") || !strings.Contains(err.Error(), "--force") {
		t.Errorf("attach of a volume held by a live node: %v", err)
	}

	reg.alive[other.ID] = false
	// The leader holds a takeover back until the holder is gone.
	reg.refuse = func(cmd state.Command) error {
		if c, ok := cmd.(*state.AttachBegin); ok && c.Takeover && !reg.gone[other.ID] {
			return holdfast.Errorf(holdfast.ErrUnavailable, "node other is not gone yet")
		}
		return nil
	}
	var told []string
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	_, err = n.att.Attach(ctx, "data", AttachOptions{NBD: true, Waiting: func(s string) { told = append(told, s) }})
	if !errors.Is(err, holdfast.ErrTimeout) || len(told) == 0 || !strings.Contains(told[0], "other") {
		t.Errorf("attach while the holder is silent: %v, told %q", err, told)
	}
	reg.mu.Lock()
	reg.gone[other.ID] = true
	reg.mu.Unlock()
	held, err := n.att.Attach(t.Context(), "data", AttachOptions{NBD: true})
	if err != nil || held.Epoch != 2 {
		t.Errorf("takeover: epoch %d, %v; want 2", held.Epoch, err)
	}
}

// TestAttachEndsAnOldSession: the volume was taken over and given back, and this
// node's session has not noticed. Nobody gets that session again.
func TestAttachEndsAnOldSession(t *testing.T) {
	reg, n := one(t)
	v := n.create(t, "data")
	old, err := n.att.Attach(t.Context(), "data", AttachOptions{NBD: true})
	if err != nil || old.Epoch != 1 {
		t.Fatalf("attach: %+v, %v", old, err)
	}
	dev, _ := n.att.Device(v.ID)
	other := state.Node{ID: holdfast.NewID[holdfast.NodeID](), Name: "other", Instance: holdfast.NewID[holdfast.InstanceID](), MaxLevel: 1, Version: "test",
		Kind: state.MemberVoter, Addresses: state.Addresses{API: "127.0.0.1:4", Data: "127.0.0.1:5", Raft: "127.0.0.1:6"}}
	reg.must(t, &state.NodeJoin{Node: other})
	reg.must(t, &state.AttachBegin{Volume: v.ID, Node: other.ID, Instance: other.Instance, Expect: 1, Session: holdfast.NewID[holdfast.SessionID](), Force: true})
	reg.must(t, &state.Detach{Volume: v.ID, Epoch: 2})
	held, err := n.att.Attach(t.Context(), "data", AttachOptions{NBD: true})
	if err != nil || held.Epoch != 3 || !held.Active {
		t.Errorf("attach again: epoch %d, active %v, %v; want 3, true", held.Epoch, held.Active, err)
	}
	if err := dev.WriteAt(t.Context(), make([]byte, 4096), 0, false); !errors.Is(err, holdfast.ErrFenced) {
		t.Errorf("a write in the old session: got %v, want %v", err, holdfast.ErrFenced)
	}
}

func TestMountFormatsOnceAndCountsUsers(t *testing.T) {
	reg, n := one(t)
	v := n.create(t, "data")
	for _, user := range []string{"a", "b", "a"} {
		if path, err := n.att.Mount(t.Context(), "data", user, nil); err != nil || path != "/mounts/data" {
			t.Fatalf("mount for %s: %q, %v", user, path, err)
		}
	}
	if got, want := n.devices.done(), []string{"open", "format ext4 again=false", "mount", "mount", "mount"}; !slices.Equal(got, want) {
		t.Errorf("did %q, want %q", got, want)
	}
	if rec, _ := reg.View().Volume(v.ID); rec.Format != holdfast.FormatDone {
		t.Errorf("format state %s", rec.Format)
	}
	if err := n.att.Detach(t.Context(), v.ID, false); !errors.Is(err, holdfast.ErrRefused) {
		t.Errorf("detach of a mounted volume: %v, want refused", err)
	}
	if err := n.att.Unmount(t.Context(), "data", "a"); err != nil {
		t.Fatal(err)
	}
	if rec, _ := reg.View().Volume(v.ID); rec.Phase != state.PhaseAttached {
		t.Errorf("phase %s while b uses it", rec.Phase)
	}
	for range 2 {
		if err := n.att.Unmount(t.Context(), "data", "b"); err != nil {
			t.Fatal(err)
		}
	}
	if rec, _ := reg.View().Volume(v.ID); rec.Phase != state.PhaseDetached || n.att.Path("data") != "" {
		t.Errorf("phase %s, path %q after the last unmount", rec.Phase, n.att.Path("data"))
	}
	if _, err := n.att.Mount(t.Context(), "data", "c", nil); err != nil {
		t.Fatal(err)
	}
	if got := n.devices.done(); slices.Contains(got[5:], "format ext4 again=false") {
		t.Errorf("formatted again: %q", got)
	}
	if err := n.att.Unmount(t.Context(), "nowhere", "x"); err != nil {
		t.Errorf("unmount of a volume that is not there: %v", err)
	}
}

func TestMountThatFailsLeavesNothingAttached(t *testing.T) {
	reg, n := one(t)
	v := n.create(t, "data")
	n.devices.fail["format ext4 again=false"] = holdfast.Errorf(holdfast.ErrIO, "mkfs: no")
	if _, err := n.att.Mount(t.Context(), "data", "a", nil); !errors.Is(err, holdfast.ErrIO) {
		t.Fatalf("mount: %v, want the error of mkfs", err)
	}
	rec, _ := reg.View().Volume(v.ID)
	if rec.Phase != state.PhaseDetached || rec.Format != holdfast.FormatDoing {
		t.Errorf("phase %s, format %s; want detached, formatting", rec.Phase, rec.Format)
	}
	// It was never mounted, so mkfs may run again, and says so.
	if _, err := n.att.Mount(t.Context(), "data", "a", nil); err != nil {
		t.Fatal(err)
	}
	if got := n.devices.done(); !slices.Contains(got, "format ext4 again=true") {
		t.Errorf("did %q, want a format that knows it was begun before", got)
	}
	if _, err := n.att.Mount(t.Context(), "nowhere", "a", nil); !errors.Is(err, holdfast.ErrNotFound) {
		t.Errorf("mount of no volume: %v", err)
	}
}

func TestDeletedVolumesLeaveTheDisk(t *testing.T) {
	reg, n := one(t)
	v := n.create(t, "data")
	replica := v.Segments[0].Replicas[0].ID
	await(t, reg, "the replica is on the disk", func() bool { _, ok := n.serve.Replica(replica); return ok })
	reg.must(t, &state.DeleteVolume{Volume: v.ID})
	await(t, reg, "raft knows the replica is gone", func() bool { p, ok := reg.View().Replica(replica); return ok && p.Gone })
	if _, ok := n.serve.Replica(replica); ok {
		t.Error("the replica is still on the disk")
	}
}

func TestADeviceGoesOnOnlyIfNobodyElseHeldTheVolume(t *testing.T) {
	me, other := holdfast.NewID[holdfast.NodeID](), holdfast.NewID[holdfast.NodeID]()
	a := &Attachments{o: Options{Node: me}}
	for _, c := range []struct {
		what  string
		phase state.Phase
		node  holdfast.NodeID
		epoch holdfast.Epoch
		u     use
		want  bool
	}{
		{"our own last epoch", state.PhaseAttached, me, 5, use{Base: 3, Next: 5}, true},
		{"the epoch whose answer was lost", state.PhaseAttaching, me, 5, use{Base: 5, Next: 5}, true},
		{"it was not applied, the one before is ours", state.PhaseAttached, me, 4, use{Base: 3, Next: 5}, true},
		{"another node holds it", state.PhaseAttached, other, 5, use{Base: 3, Next: 5}, false},
		{"another node held it in between", state.PhaseAttached, me, 7, use{Base: 3, Next: 5}, false},
		{"it was detached", state.PhaseDetached, holdfast.NodeID{}, 5, use{Base: 3, Next: 5}, false},
		{"no record", state.PhaseAttached, me, 5, use{}, false},
	} {
		v := &state.Volume{Epoch: c.epoch, Phase: c.phase, Holder: state.Holder{Node: c.node}}
		if got := a.continues(v, c.u); got != c.want {
			t.Errorf("%s: %v, want %v", c.what, got, c.want)
		}
	}
}

func TestWhatWasWrittenIsNeverFormattedOver(t *testing.T) {
	reg, n := one(t)
	v := n.create(t, "raw")
	if _, err := n.att.Attach(t.Context(), "raw", AttachOptions{NBD: true}); err != nil {
		t.Fatal(err)
	}
	dev, _ := n.att.Device(v.ID)
	if err := dev.WriteAt(t.Context(), make([]byte, 4096), 32<<20, false); err != nil {
		t.Fatal(err)
	}
	for range 2 { // the second time must not take the first's refusal for a format that was begun
		if _, err := n.att.Mount(t.Context(), "raw", "a", nil); !errors.Is(err, holdfast.ErrRefused) || !strings.Contains(err.Error(), "without a file system") {
			t.Fatalf("mount of a volume that was written raw: %v, want refused", err)
		}
	}
	if rec, _ := reg.View().Volume(v.ID); rec.Format != holdfast.FormatNone || rec.Phase != state.PhaseAttached {
		t.Errorf("format %s, phase %s; want none, and the NBD attachment kept", rec.Format, rec.Phase)
	}

	n.create(t, "found")
	n.devices.holds = "an xfs file system"
	if _, err := n.att.Mount(t.Context(), "found", "a", nil); !errors.Is(err, holdfast.ErrRefused) || !strings.Contains(err.Error(), "xfs") {
		t.Errorf("mount of a volume that holds something: %v, want refused", err)
	}
	for _, call := range n.devices.done() {
		if strings.HasPrefix(call, "format") {
			t.Errorf("did %q", call)
		}
	}

	n.devices.holds = ""
	n.create(t, "half")
	n.devices.fail["format ext4 again=false"] = holdfast.Errorf(holdfast.ErrIO, "mkfs: no")
	if _, err := n.att.Mount(t.Context(), "half", "a", nil); !errors.Is(err, holdfast.ErrIO) {
		t.Fatal(err)
	}
	if _, err := n.att.Attach(t.Context(), "half", AttachOptions{NBD: true}); !errors.Is(err, holdfast.ErrRefused) {
		t.Errorf("an NBD export of a volume whose formatting was begun: %v, want refused", err)
	}
}

func TestDetachEndsWhatAFailedAttachLeft(t *testing.T) {
	reg, n := one(t)
	v := n.create(t, "data")
	n.devices.fail["open"] = holdfast.Errorf(holdfast.ErrIO, "no loop device")
	if _, err := n.att.Attach(t.Context(), "data", AttachOptions{NBD: true, Device: true}); !errors.Is(err, holdfast.ErrIO) {
		t.Fatalf("attach: %v, want the device's error", err)
	}
	delete(n.devices.fail, "open")
	// The export is there already; asking again must not trip over it.
	if held, err := n.att.Attach(t.Context(), "data", AttachOptions{NBD: true, Device: true}); err != nil || held.URI == "" || held.Device == "" {
		t.Fatalf("attach again: %+v, %v", held, err)
	}
	if err := n.att.Detach(t.Context(), v.ID, false); err != nil {
		t.Fatal(err)
	}
	// Raft gave this process an epoch, and the attach got no further.
	rec, _ := reg.View().Volume(v.ID)
	reg.must(t, &state.AttachBegin{Volume: v.ID, Node: n.id, Instance: n.inst, Expect: rec.Epoch, Session: holdfast.NewID[holdfast.SessionID]()})
	if err := n.att.Detach(t.Context(), v.ID, false); err != nil {
		t.Fatal(err)
	}
	if rec, _ := reg.View().Volume(v.ID); rec.Phase != state.PhaseDetached {
		t.Errorf("phase %s after detach answered", rec.Phase)
	}
}
