package state

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"hash/crc32"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"github.com/holdfast-storage/holdfast"
)

// fill sets every field of a record to something that is not zero, so that a
// field the codec forgets shows.
func fill(t testing.TB, v reflect.Value, n *uint64) {
	t.Helper()
	*n++
	switch v.Kind() {
	case reflect.Bool:
		v.SetBool(true)
	case reflect.Int, reflect.Int64:
		v.SetInt(int64(*n))
	case reflect.Uint8:
		v.SetUint(1)
	case reflect.Uint32, reflect.Uint64:
		v.SetUint(*n)
	case reflect.String:
		switch v.Interface().(type) {
		case holdfast.ReplicaRole:
			v.SetString(string(holdfast.RoleStale))
		case holdfast.DiskState:
			v.SetString(string(holdfast.DiskFailed))
		case holdfast.FormatState:
			v.SetString(string(holdfast.FormatDone))
		case holdfast.AckMode:
			v.SetString(string(holdfast.AckDurable))
		case Phase:
			v.SetString(string(PhaseAttached))
		case MemberKind:
			v.SetString(string(MemberVoter))
		case NodeDuty:
			v.SetString(string(DutyDraining))
		default:
			v.SetString("text" + string(rune('a'+*n%26)))
		}
	case reflect.Array:
		for i := range v.Len() {
			v.Index(i).SetUint((*n + uint64(i)) % 251)
		}
	case reflect.Slice:
		v.Set(reflect.MakeSlice(v.Type(), 2, 2))
		for i := range 2 {
			fill(t, v.Index(i), n)
		}
	case reflect.Struct:
		for i := range v.NumField() {
			fill(t, v.Field(i), n)
		}
	case reflect.Pointer:
		v.Set(reflect.New(v.Type().Elem()))
		fill(t, v.Elem(), n)
	default:
		t.Fatalf("fill: %v", v.Kind())
	}
}

// kinds yields every kind of command.
func kinds() []commandKind {
	var all []commandKind
	for k := commandKind(0); k < 200; k++ {
		if newCommand(k) != nil {
			all = append(all, k)
		}
	}
	return all
}

// golden returns one command of each kind with every field set, encoded.
func golden(t testing.TB) map[string][]byte {
	out := map[string][]byte{}
	for _, k := range kinds() {
		cmd := newCommand(k)
		n := uint64(k)
		fill(t, reflect.ValueOf(cmd).Elem(), &n)
		b, err := EncodeCommand(holdfast.Level1, cmd)
		if err != nil {
			t.Fatalf("%s: %v", Name(cmd), err)
		}
		out[Name(cmd)] = b
	}
	return out
}

func TestEveryFieldOfEveryCommandIsWritten(t *testing.T) {
	if got := len(kinds()); got != 30 {
		t.Fatalf("%d kinds of commands, want 30", got)
	}
	for _, k := range kinds() {
		cmd := newCommand(k)
		if cmd.kind() != k {
			t.Fatalf("%s says kind %d, stands at %d", Name(cmd), cmd.kind(), k)
		}
		n := uint64(k)
		fill(t, reflect.ValueOf(cmd).Elem(), &n)
		b, err := EncodeCommand(holdfast.Level1, cmd)
		if err != nil {
			t.Fatalf("%s: %v", Name(cmd), err)
		}
		back, err := DecodeCommand(b)
		if err != nil {
			t.Fatalf("%s: %v", Name(cmd), err)
		}
		if !reflect.DeepEqual(cmd, back) {
			t.Fatalf("got %+v, want %+v", back, cmd)
		}
		for cut := range b {
			if _, err := DecodeCommand(b[:cut]); err == nil {
				t.Fatalf("%s cut to %d of %d bytes was read", Name(cmd), cut, len(b))
			}
		}
		if _, err := DecodeCommand(append(bytes.Clone(b), 0)); !errors.Is(err, holdfast.ErrIntegrity) {
			t.Fatalf("%s with a byte left over: got %v", Name(cmd), err)
		}
	}
}

func TestEveryFieldOfTheResultIsWritten(t *testing.T) {
	var r Result
	n := uint64(9)
	fill(t, reflect.ValueOf(&r).Elem(), &n)
	b, err := EncodeResult(r)
	if err != nil {
		t.Fatal(err)
	}
	back, err := DecodeResult(b)
	if err != nil || !reflect.DeepEqual(r, back) {
		t.Fatalf("got %+v (%v), want %+v", back, err, r)
	}
	for cut := range b {
		if _, err := DecodeResult(b[:cut]); err == nil {
			t.Fatalf("cut to %d of %d bytes it was read", cut, len(b))
		}
	}
}

// TestGoldenBytes compares with the bytes of the first version of level 1: the
// logs of released versions are made of them. UPDATE_GOLDEN=1 writes them anew,
// which is right only before a release.
func TestGoldenBytes(t *testing.T) {
	path := filepath.Join("testdata", "level1.txt")
	var b strings.Builder
	all := golden(t)
	for _, k := range kinds() {
		name := Name(newCommand(k))
		b.WriteString(name + " " + hex.EncodeToString(all[name]) + "\n")
	}
	a := newAttached(t)
	a.must(&ShrinkISR{Segment: a.seg, Epoch: 1, ISRVersion: 2, Replica: a.r[0], Commit: 3})
	snap, err := EncodeSnapshot(a.view)
	if err != nil {
		t.Fatal(err)
	}
	b.WriteString("snapshot " + hex.EncodeToString(snap) + "\n")
	if os.Getenv("UPDATE_GOLDEN") != "" {
		if err := os.MkdirAll("testdata", 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(b.String()), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	got, lines := strings.Split(b.String(), "\n"), strings.Split(string(want), "\n")
	if len(got) != len(lines) {
		t.Fatalf("%d encodings, %d golden ones", len(got), len(lines))
	}
	for i := range got {
		if got[i] != lines[i] {
			t.Fatalf("the format changed:\n got %s\nwant %s", got[i], lines[i])
		}
	}
}

func TestLaterVersionsAreRefused(t *testing.T) {
	later := golden(t)["Rename"]
	binary.LittleEndian.PutUint32(later, 2)
	if _, err := DecodeCommand(later); !errors.Is(err, holdfast.ErrUnsupported) {
		t.Fatalf("level 2: got %v, want %v", err, holdfast.ErrUnsupported)
	}
	unknown := golden(t)["Rename"]
	binary.LittleEndian.PutUint32(unknown[4:], 4711)
	if _, err := DecodeCommand(unknown); !errors.Is(err, holdfast.ErrUnsupported) {
		t.Fatalf("kind 4711: got %v, want %v", err, holdfast.ErrUnsupported)
	}
	if _, err := EncodeCommand(2, &Rename{}); !errors.Is(err, holdfast.ErrUnsupported) {
		t.Fatalf("encode at level 2: got %v, want %v", err, holdfast.ErrUnsupported)
	}
	snap, err := EncodeSnapshot(newAttached(t).view)
	if err != nil {
		t.Fatal(err)
	}
	binary.LittleEndian.PutUint32(snap[8:], 2)
	if _, err := DecodeSnapshot(resealed(snap)); !errors.Is(err, holdfast.ErrUnsupported) {
		t.Fatalf("snapshot of level 2: got %v, want %v", err, holdfast.ErrUnsupported)
	}
}

// resealed gives a changed snapshot a valid checksum.
func resealed(b []byte) []byte {
	b = bytes.Clone(b)
	binary.LittleEndian.PutUint32(b[len(b)-4:], crc32.Checksum(b[:len(b)-4], castagnoli))
	return b
}

// TestNoFlippedBitIsRead flips each bit of a snapshot.
func TestNoFlippedBitIsRead(t *testing.T) {
	snap, err := EncodeSnapshot(newAttached(t).view)
	if err != nil {
		t.Fatal(err)
	}
	for i := range snap {
		for bit := range 8 {
			bad := bytes.Clone(snap)
			bad[i] ^= 1 << bit
			if _, err := DecodeSnapshot(bad); err == nil {
				t.Fatalf("byte %d bit %d flipped, and it was read", i, bit)
			}
		}
	}
	for cut := range snap {
		if _, err := DecodeSnapshot(snap[:cut]); !errors.Is(err, holdfast.ErrIntegrity) {
			t.Fatalf("cut to %d bytes: got %v", cut, err)
		}
	}
}

// TestContradictingTablesAreRefused reads snapshots whose checksum is right and
// whose tables cannot be.
func TestContradictingTablesAreRefused(t *testing.T) {
	for name, harm := range map[string]func(a *attached){
		"no in-sync replica": func(a *attached) {
			v := a.volume().clone()
			for i := range v.Segments[0].Replicas {
				v.Segments[0].Replicas[i].Role = holdfast.RoleStale
			}
			a.view.putVolume(v)
		},
		"a segment missing": func(a *attached) {
			v := a.volume().clone()
			v.Size = 1 << 40
			a.view.putVolume(v)
		},
		"history out of order": func(a *attached) {
			v := a.volume().clone()
			v.Segments[0].History = []EpochStart{{Epoch: 1}, {Epoch: 1}}
			a.view.putVolume(v)
		},
		"history of the future": func(a *attached) {
			v := a.volume().clone()
			v.Segments[0].History = []EpochStart{{Epoch: 9}}
			a.view.putVolume(v)
		},
		"a replica unregistered": func(a *attached) { a.view.replicas = a.view.replicas.remove(a.r[0]) },
		"a replica gone":         func(a *attached) { a.view.putReplica(a.r[0], a.seg, true) },
		"a replica of nothing": func(a *attached) {
			a.view.putReplica(newID[holdfast.ReplicaID](a.world), holdfast.SegmentID{Volume: a.vol, Index: 9}, false)
		},
		"under repair and attached": func(a *attached) {
			v := a.volume().clone()
			v.Repair.Holder = Holder{a.nodes[0], a.instances[0]}
			a.view.putVolume(v)
		},
		"an unknown disk": func(a *attached) { a.view.disks = a.view.disks.remove(a.segment().Replicas[0].Disk) },
		"an unknown node": func(a *attached) { a.view.nodes = a.view.nodes.remove(a.nodes[0]) },
		"one name twice": func(a *attached) {
			v := a.volume().clone()
			v.ID = newID[holdfast.VolumeID](a.world)
			v.Deleted = false
			for i := range v.Segments[0].Replicas {
				r := &v.Segments[0].Replicas[i]
				r.ID = newID[holdfast.ReplicaID](a.world)
				a.view.putReplica(r.ID, holdfast.SegmentID{Volume: v.ID}, false)
			}
			a.view.volumes = a.view.volumes.set(v.ID, v)
		},
	} {
		t.Run(name, func(t *testing.T) {
			a := newAttached(t)
			view := *a.view
			a.view = &view
			harm(a)
			snap, err := EncodeSnapshot(a.view)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := DecodeSnapshot(snap); !errors.Is(err, holdfast.ErrIntegrity) {
				t.Fatalf("got %v, want %v", err, holdfast.ErrIntegrity)
			}
		})
	}
}

func TestFailuresTravel(t *testing.T) {
	a := newAttached(t)
	for _, cmd := range []Command{a.begin(1, 1), a.takeover(1, 0), &Rename{Volume: newID[holdfast.VolumeID](a.world)}} {
		_, err := a.apply(cmd)
		back := FailureOf(err).Err()
		if back.Error() != err.Error() || holdfast.KindOf(back) != holdfast.KindOf(err) || holdfast.RemedyOf(back) != holdfast.RemedyOf(err) {
			t.Fatalf("got %v, want %v", back, err)
		}
		var want, got Reason
		if errors.As(err, &want) != errors.As(back, &got) || got != want {
			t.Fatalf("reason: got %q, want %q", got, want)
		}
	}
}

func FuzzDecodeCommand(f *testing.F) {
	for _, b := range golden(f) {
		f.Add(b)
	}
	a := newAttached(f)
	f.Fuzz(func(t *testing.T, b []byte) {
		cmd, err := DecodeCommand(b)
		if err != nil {
			return
		}
		back, err := EncodeCommand(holdfast.Level1, cmd)
		if err != nil || !bytes.Equal(b, back) {
			t.Fatalf("%s has two encodings (%v):\n%x\n%x", Name(cmd), err, b, back)
		}
		// Total: no decoded command panics, and what it leaves is sound.
		next, _, _ := a.view.Apply(a.index+1, cmd)
		if err := next.check(); err != nil {
			t.Fatalf("after %s: %v", Name(cmd), err)
		}
		if next, _, err := (&View{}).Apply(1, cmd); err == nil {
			if err := next.check(); err != nil {
				t.Fatalf("after %s on nothing: %v", Name(cmd), err)
			}
		}
	})
}

func FuzzDecodeSnapshot(f *testing.F) {
	snap, err := EncodeSnapshot(newAttached(f).view)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(snap)
	empty, _ := EncodeSnapshot(&View{})
	f.Add(empty)
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) >= snapshotHeader+4 { // let the fuzzer past length and checksum
			b = bytes.Clone(b)
			binary.LittleEndian.PutUint64(b[snapshotHeader-8:], uint64(len(b)-snapshotHeader-4))
			b = resealed(b)
		}
		v, err := DecodeSnapshot(b)
		if err != nil {
			return
		}
		back, err := EncodeSnapshot(v)
		if err != nil || !bytes.Equal(b, back) {
			t.Fatalf("a View with two encodings (%v)", err)
		}
	})
}

func FuzzDecodeResult(f *testing.F) {
	a := newAttached(f)
	b, _ := EncodeResult(Result{Index: 3, Volume: a.volume()})
	f.Add(b)
	f.Fuzz(func(t *testing.T, b []byte) {
		r, err := DecodeResult(b)
		if err != nil {
			return
		}
		if back, err := EncodeResult(r); err != nil || !bytes.Equal(b, back) {
			t.Fatalf("a result with two encodings (%v)", err)
		}
	})
}
