package holdfast

import (
	"errors"
	"maps"
	"strings"
	"testing"
	"time"
)

func TestParseSize(t *testing.T) {
	for _, c := range []struct {
		in   string
		want int64
	}{
		{"10", 10 << 30}, {"10G", 10 << 30}, {"10g", 10 << 30}, {"10GiB", 10 << 30}, {"10 gb", 10 << 30},
		{"1.5T", 3 << 39}, {"512M", 512 << 20}, {"4096B", 4096}, {"4096b", 4096}, {"0.5", 1 << 29}, {"1k", 1024},
		{"0", 0}, {"9223372036854775807B", 1<<63 - 1},
	} {
		if got, err := ParseSize(c.in); err != nil || got != c.want {
			t.Errorf("ParseSize(%q) = %d, %v, want %d", c.in, got, err, c.want)
		}
	}
	for _, in := range []string{"", "G", "-1G", "1e30", "1e30G", "1.2.3G", "10X", "0.3B", "10GG", "99999999999999999999", "9223372036854775808B", strings.Repeat("9", 40), "1 0G", ".", "NaN", "inf", "1/3"} {
		if got, err := ParseSize(in); !errors.Is(err, ErrInvalid) {
			t.Errorf("ParseSize(%q) = %d, %v, want an invalid error", in, got, err)
		} else if !strings.Contains(err.Error(), in) {
			t.Errorf("ParseSize(%q): %q does not name the value", in, err)
		}
	}
}

func TestCheckVolumeSize(t *testing.T) {
	for _, ok := range []int64{MinVolumeSize, 1 << 30, MaxVolumeSize} {
		if err := CheckVolumeSize(ok, "x"); err != nil {
			t.Errorf("CheckVolumeSize(%d) = %v", ok, err)
		}
	}
	for _, bad := range []int64{0, -1, MinVolumeSize - BlockSize, MaxVolumeSize + BlockSize, 1<<30 + 1} {
		if err := CheckVolumeSize(bad, "x"); !errors.Is(err, ErrInvalid) {
			t.Errorf("CheckVolumeSize(%d) = %v, want invalid", bad, err)
		}
	}
	_, err := ParseOptions(map[string]string{"size": "1073741824"})
	if err == nil || !strings.Contains(err.Error(), "did you mean bytes? then write 1073741824B") {
		t.Errorf("a size in bytes without a unit: %v, want the hint", err)
	}
}

// The hint at bytes is only for a number without a unit.
func TestTooLargeSize(t *testing.T) {
	for text, hint := range map[string]bool{"99999999999999999999": true, "99999999999T": false, "99999999T": false, "99999999": true} {
		_, err := ParseOptions(map[string]string{"size": text})
		if !errors.Is(err, ErrInvalid) || RemedyOf(err) == "" || strings.Contains(err.Error(), "did you mean bytes") != hint {
			t.Errorf("size %s: %v, want a remedy, and the hint at bytes: %v", text, err, hint)
		}
	}
}

func TestFormatSize(t *testing.T) {
	for n, want := range map[int64]string{0: "0 B", 4096: "4 KiB", 10 << 30: "10 GiB", 3 << 39: "1.5 TiB", 1000: "1000 B"} {
		if got := FormatSize(n); got != want {
			t.Errorf("FormatSize(%d) = %q, want %q", n, got, want)
		}
	}
}

func TestParseOptions(t *testing.T) {
	o, err := ParseOptions(map[string]string{"Size": "2G", "HA-Level": "2", "FSTYPE": "xfs", "mkfsOptions": "-m crc=1",
		"mountopts": "noatime", "label.Team": "db", "labels": "a=b,c=d", "min-copies": "2", "on_quorum_loss": "Error:90s", "Read-Promises": "Off", "segment_size": "256M", "StoragePool": "ssd"})
	if err != nil {
		t.Fatal(err)
	}
	if o.Size != 2<<30 || o.Replicas != 2 || o.FileSystem != "xfs" || o.MkfsOptions != "-m crc=1" || o.MountOptions != "noatime" || o.MinCopies != 2 || o.ReadPromises != "off" || o.SegmentSize != 256<<20 || o.Pool != "ssd" || o.OnQuorumLoss != "error:1m30s" {
		t.Errorf("got %+v", o)
	}
	if want := map[string]string{"Team": "db", "a": "b", "c": "d"}; !maps.Equal(o.Labels, want) {
		t.Errorf("labels %v, want %v", o.Labels, want)
	}
	for _, c := range []struct {
		in   map[string]string
		kind Kind
		says string
	}{
		{map[string]string{"size": "0"}, ErrInvalid, "smallest volume"},
		{map[string]string{"size": "0"}, ErrInvalid, "option size: 0 (0 bytes)"},
		{map[string]string{"Size": "x"}, ErrInvalid, `option Size: "x"`},
		{map[string]string{"segment_size": "x"}, ErrInvalid, `option segment_size: "x"`},
		{map[string]string{"pool": "a b"}, ErrInvalid, `"a b" is not a pool name`},
		{map[string]string{"pool": ""}, ErrInvalid, "pool name"},
		{map[string]string{"size": "1e30"}, ErrInvalid, "1e30"},
		{map[string]string{"sise": "1G"}, ErrInvalid, "the options are fs, labels"},
		{map[string]string{"replicas": "0"}, ErrInvalid, "from 1 to 7"},
		{map[string]string{"replicas": "x"}, ErrInvalid, `"x"`},
		{map[string]string{"replicas": "2", "repl": "3"}, ErrInvalid, "same option"},
		{map[string]string{"fs": "btrfs"}, ErrInvalid, "ext4 or xfs"},
		{map[string]string{"ec": "2+1"}, ErrUnsupported, "not in this version"},
		{map[string]string{"shared": ""}, ErrUnsupported, "not in this version"},
		{map[string]string{"read_promises": "maybe"}, ErrInvalid, "on or off"},
		{map[string]string{"segment_size": "100K"}, ErrInvalid, "1 MiB"},
		{map[string]string{"segment_size": "1.5M"}, ErrInvalid, "1 MiB"},
		{map[string]string{"min_copies": "0"}, ErrInvalid, "from 1 to 7"},
		{map[string]string{"min_copies": "8"}, ErrInvalid, "from 1 to 7"},
		{map[string]string{"on_quorum_loss": "error"}, ErrInvalid, "error:30s"},
		{map[string]string{"on_quorum_loss": "error:"}, ErrInvalid, "error:30s"},
		{map[string]string{"on_quorum_loss": "error:9s"}, ErrInvalid, "10s to 24h"},
		{map[string]string{"on_quorum_loss": "error:25h"}, ErrInvalid, "10s to 24h"},
		{map[string]string{"on_quorum_loss": "error:10.5s"}, ErrInvalid, "whole seconds"},
		{map[string]string{"on_quorum_loss": "error:-30s"}, ErrInvalid, "10s to 24h"},
		{map[string]string{"on_quorum_loss": "panic"}, ErrInvalid, "freeze"},
		{map[string]string{"label.": "x"}, ErrInvalid, "no name"},
		{map[string]string{"mkfs": strings.Repeat("x", 5000)}, ErrInvalid, "5000 bytes"},
	} {
		_, err := ParseOptions(c.in)
		if !errors.Is(err, c.kind) || !strings.Contains(err.Error(), c.says) || strings.Count(err.Error(), RemedyOf(err)) != 1 && RemedyOf(err) != "" {
			t.Errorf("ParseOptions(%v) = %v, want %s saying %q", c.in, err, c.kind, c.says)
		}
	}
}

func TestWithDefaults(t *testing.T) {
	for nodes, want := range map[int]int{0: 1, 1: 1, 2: 2, 3: 3, 9: 3} {
		o := VolumeOptions{}.WithDefaults(nodes)
		if o.Replicas != want || o.Size != DefaultVolumeSize || o.FileSystem != "ext4" || o.MinCopies != 1 || o.OnQuorumLoss != "freeze" {
			t.Errorf("defaults with %d nodes: %+v, want %d replicas", nodes, o, want)
		}
	}
	if o := (VolumeOptions{Size: 1 << 30, Replicas: 2}).WithDefaults(1); o.Size != 1<<30 || o.Replicas != 2 {
		t.Errorf("defaults replaced what was given: %+v", o)
	}
}

func TestParseInlineName(t *testing.T) {
	name, options, err := ParseInlineName("size=10G,replicas=3,name=data")
	if err != nil || name != "data" || !maps.Equal(options, map[string]string{"size": "10G", "replicas": "3"}) {
		t.Errorf("got %q %v %v", name, options, err)
	}
	if name, options, err = ParseInlineName("plain-1"); err != nil || name != "plain-1" || len(options) != 0 {
		t.Errorf("got %q %v %v", name, options, err)
	}
	for _, bad := range []string{"", "-x", "a/b", "..", "size=10G", "name=a,name=b", "name=", "size=1,size=2,name=a", strings.Repeat("x", 129), "a b"} {
		if _, _, err := ParseInlineName(bad); !errors.Is(err, ErrInvalid) {
			t.Errorf("ParseInlineName(%q) = %v, want invalid", bad, err)
		}
	}
}

func FuzzParseOptions(f *testing.F) {
	f.Add("size", "10G")
	f.Add("labels", "a=b")
	f.Fuzz(func(t *testing.T, k, v string) {
		o, err := ParseOptions(map[string]string{k: v})
		if err == nil && o.Size != 0 && CheckVolumeSize(o.Size, v) != nil {
			t.Errorf("accepted size %d", o.Size)
		}
		if err != nil && KindOf(err) == ErrInternal {
			t.Errorf("bad input must be the caller's error, got %v", err)
		}
	})
}

func TestIDs(t *testing.T) {
	id := NewID[VolumeID]()
	back, err := ParseID[VolumeID](id.String())
	if err != nil || back != id || id.IsZero() || id == NewID[VolumeID]() {
		t.Errorf("id %v came back as %v, %v", id, back, err)
	}
	if s := id.String(); s[14] != '4' {
		t.Errorf("%s is not a version 4 UUID", s)
	}
	for _, bad := range []string{"", "x", id.String() + "0", strings.Replace(id.String(), "-", "0", 1), strings.Replace(id.String(), id.String()[:1], "g", 1)} {
		if _, err := ParseID[VolumeID](bad); !errors.Is(err, ErrInvalid) {
			t.Errorf("ParseID(%q) = %v, want invalid", bad, err)
		}
	}
}

func TestErrors(t *testing.T) {
	cause := Errorf(ErrIO, "disk gone")
	err := error(Errorf(ErrUnavailable, "read segment: %w", cause).WithRemedy("wait"))
	if !errors.Is(err, ErrUnavailable) || !errors.Is(err, ErrIO) || errors.Is(err, ErrRefused) {
		t.Errorf("kinds of %v are wrong", err)
	}
	if KindOf(err) != ErrUnavailable || RemedyOf(err) != "wait" || err.Error() != "read segment: disk gone (wait)" {
		t.Errorf("got %v %q %q", KindOf(err), RemedyOf(err), err)
	}
	if KindOf(nil) != "" || KindOf(errors.New("x")) != ErrInternal || KindOf(ErrFenced) != ErrFenced {
		t.Error("KindOf of nil, a foreign error or a bare kind is wrong")
	}
}

// TestHoldPolicy: what HoldPolicy writes, HoldTime reads.
func TestHoldPolicy(t *testing.T) {
	for _, d := range []time.Duration{0, MinHoldTime, 90 * time.Second, time.Hour, MaxHoldTime} {
		policy := HoldPolicy(d)
		if got, err := HoldTime(policy); err != nil || got != d {
			t.Errorf("%q: got %v %v, want %v", policy, got, err, d)
		}
		if o, err := ParseOptions(map[string]string{"on_quorum_loss": policy}); err != nil || o.OnQuorumLoss != policy {
			t.Errorf("option %q: got %q %v", policy, o.OnQuorumLoss, err)
		}
	}
}
