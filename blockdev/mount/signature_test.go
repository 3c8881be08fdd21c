package mount

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/holdfast-storage/holdfast"
)

func image(t *testing.T, size int64) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "image")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := f.Truncate(size); err != nil {
		t.Fatal(err)
	}
	return path
}

func writeAt(t *testing.T, path string, off int64, b string) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteAt([]byte(b), off); err != nil {
		t.Fatal(err)
	}
}

func needPrograms(t *testing.T, programs ...string) {
	t.Helper()
	for _, p := range programs {
		if _, err := lookPath(p); err == nil {
			continue
		}
		if os.Getenv("CI") == "true" {
			t.Fatalf("needs %s", p)
		}
		t.Skipf("needs %s", p)
	}
}

// TestSignature looks at what lies on a disk, with the real programs.
func TestSignature(t *testing.T) {
	needPrograms(t, "blkid", "wipefs", "mkfs.ext4", "mkfs.xfs")
	const size = 320 << 20
	for _, c := range []struct {
		name  string
		make  func(path string)
		want  string // in the signature; "" for none
		blank string // in what speaks against blank; "" for nothing
	}{
		{"an empty one", func(string) {}, "", ""},
		{"an ext4 with a label", func(p string) { run(t, "mkfs.ext4", "-q", "-L", "mine", p) }, `ext4 labelled "mine"`, "ext4"},
		{"an xfs", func(p string) { run(t, "mkfs.xfs", "-q", p) }, "xfs", "xfs"},
		{"a partition table", func(p string) {
			writeAt(t, p, 446, "\x00\x00\x02\x00\x83\x00\x10\x00\x00\x08\x00\x00\x00\x08\x00\x00")
			writeAt(t, p, 510, "\x55\xaa")
		}, "partition table of type dos", "partition"},
		{"a physical volume", func(p string) {
			writeAt(t, p, 512, "LABELONE\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x20\x00\x00\x00LVM2 001")
		}, "LVM2", "LVM2"},
		{"bytes at the start", func(p string) { writeAt(t, p, 5000, "x") }, "", "byte 5000"},
		{"bytes at the end", func(p string) { writeAt(t, p, size-1, "x") }, "", "byte 335544319"},
		{"bytes in the middle alone", func(p string) { writeAt(t, p, size/2, "x") }, "", ""},
	} {
		path := image(t, size)
		c.make(path)
		what, err := Signature(t.Context(), path)
		if err != nil || !strings.Contains(what, c.want) || (c.want == "") != (what == "") {
			t.Errorf("%s: got signature %q, %v, want %q in it", c.name, what, err, c.want)
		}
		what, err = Tools{}.Blank(t.Context(), path)
		if err != nil || !strings.Contains(what, c.blank) || (c.blank == "") != (what == "") {
			t.Errorf("%s: got %q, %v against blank, want %q in it", c.name, what, err, c.blank)
		}
		err = Tools{}.Format(t.Context(), path, FormatOptions{FS: Ext4})
		if refused := errors.Is(err, holdfast.ErrRefused); refused != (c.blank != "") {
			t.Errorf("%s: mkfs: got %v, want refused %v", c.name, err, c.blank != "")
		}
	}
}

func run(t *testing.T, name string, args ...string) string {
	t.Helper()
	r, err := Exec(t.Context(), name, args...)
	if err != nil || r.Code != 0 {
		t.Fatalf("%s: exit %d, %v: %s", name, r.Code, err, r.said())
	}
	return r.Stdout
}

// TestSignatureKinds: whatever somebody may still want is told by its name. What
// needs a program that few machines have is skipped without it.
func TestSignatureKinds(t *testing.T) {
	needPrograms(t, "blkid", "wipefs")
	const size = 320 << 20
	for _, c := range []struct {
		name    string
		program string // that the test needs
		make    func(path string)
		want    string
	}{
		{"ext2", "mkfs.ext2", func(p string) { run(t, "mkfs.ext2", "-q", p) }, "a file system of type ext2"},
		{"ext3", "mkfs.ext3", func(p string) { run(t, "mkfs.ext3", "-q", p) }, "a file system of type ext3"},
		{"btrfs", "mkfs.btrfs", func(p string) { run(t, "mkfs.btrfs", "-q", p) }, "a file system of type btrfs"},
		{"vfat", "mkfs.vfat", func(p string) { run(t, "mkfs.vfat", p) }, "a file system of type vfat"},
		{"swap", "mkswap", func(p string) { run(t, "mkswap", p) }, "swap"},
		{"a dos partition table", "sfdisk", func(p string) { sfdisk(t, p, "label: dos\n,,83\n") }, "a partition table of type dos"},
		{"a gpt", "sfdisk", func(p string) { sfdisk(t, p, "label: gpt\n,,L\n") }, "a partition table of type gpt"},
		{"LUKS", "", func(p string) { writeAt(t, p, 0, "LUKS\xba\xbe\x00\x01") }, "crypto_LUKS"},
		{"md", "", func(p string) { // version 1.2, at 4 KiB: magic, major version, and where it lies itself
			writeAt(t, p, 4096, "\xfc\x4e\x2b\xa9\x01\x00\x00\x00")
			writeAt(t, p, 4096+144, "\x08\x00\x00\x00\x00\x00\x00\x00")
		}, "linux_raid_member"},
	} {
		if c.program != "" {
			if _, err := lookPath(c.program); err != nil {
				t.Logf("%s: %s is not installed", c.name, c.program)
				continue
			}
		}
		path := image(t, size)
		c.make(path)
		if what, err := Signature(t.Context(), path); err != nil || !strings.Contains(what, c.want) {
			t.Errorf("%s: got signature %q, %v, want %q in it", c.name, what, err, c.want)
		}
	}
}

func sfdisk(t *testing.T, path, table string) {
	t.Helper()
	run(t, "sh", "-c", "printf '"+table+"' | sfdisk -q "+path)
}

func TestSignatureErrors(t *testing.T) {
	if _, err := Signature(t.Context(), filepath.Join(t.TempDir(), "none")); !errors.Is(err, holdfast.ErrNotFound) {
		t.Errorf("no such file: got %v, want not found", err)
	}
	for _, path := range []string{"", "image", "-n"} {
		if _, err := Signature(t.Context(), path); !errors.Is(err, holdfast.ErrInvalid) {
			t.Errorf("path %q: got %v, want it refused", path, err)
		}
	}
}

// TestProbesThatFail: what cannot be looked at is never taken for blank.
func TestProbesThatFail(t *testing.T) {
	path := image(t, 1<<20)
	for name, r := range map[string]Run{
		"blkid fails":             script(map[string]Result{"blkid": {Code: 4, Stderr: "bad"}}),
		"blkid is torn":           script(map[string]Result{"blkid": {Code: 127}}),
		"wipefs fails":            script(map[string]Result{"blkid": {Code: 2}, "wipefs": {Code: 1}}),
		"wipefs speaks otherwise": script(map[string]Result{"blkid": {Code: 2}, "wipefs": {Stdout: "{"}}),
		"blkid is not there": func(context.Context, string, ...string) (Result, error) {
			return Result{}, holdfast.Errorf(holdfast.ErrUnsupported, "not installed")
		},
	} {
		if what, err := (Tools{Run: r}).Blank(t.Context(), path); err == nil {
			t.Errorf("%s: got %q and no error", name, what)
		}
		if err := (Tools{Run: r}).Format(t.Context(), path, FormatOptions{FS: Ext4}); err == nil {
			t.Errorf("%s: mkfs ran", name)
		}
	}
	for name, r := range map[string]Run{
		"ambivalent":  script(map[string]Result{"blkid": {Code: 8}}),
		"only wipefs": script(map[string]Result{"blkid": {Code: 2}, "wipefs": {Stdout: `{"signatures":[{"type":"zfs_member","offset":"0x1"}]}`}}),
	} {
		if what, err := (Tools{Run: r}).Signature(t.Context(), path); what == "" || err != nil {
			t.Errorf("%s: got %q, %v, want something found", name, what, err)
		}
	}
}

// script is a Run that answers from a table and fails for any other program.
func script(answers map[string]Result) Run {
	return func(_ context.Context, name string, _ ...string) (Result, error) {
		r, ok := answers[name]
		if !ok {
			return Result{}, holdfast.Errorf(holdfast.ErrInternal, "%s was run", name)
		}
		return r, nil
	}
}

func TestFsckCodes(t *testing.T) {
	for code, want := range map[int]holdfast.Kind{0: "", 1: "", 2: "", 3: "", 4: holdfast.ErrIntegrity, 5: holdfast.ErrIntegrity, 8: holdfast.ErrIO, 12: holdfast.ErrIO, 16: holdfast.ErrIO, 32: holdfast.ErrIO} {
		tools := Tools{Run: script(map[string]Result{"e2fsck": {Code: code}})}
		if got := holdfast.KindOf(tools.Fsck(t.Context(), "/dev/x", Ext4)); got != want {
			t.Errorf("e2fsck exit %d: got %q, want %q", code, got, want)
		}
	}
	if err := (Tools{Run: script(nil)}).Fsck(t.Context(), "/dev/x", XFS); err != nil {
		t.Errorf("xfs: got %v, want nothing to be run", err)
	}
}

func TestExec(t *testing.T) {
	r, err := Exec(t.Context(), "sh", "-c", "echo out; echo err >&2; exit 3")
	if err != nil || r.Code != 3 || r.Stdout != "out\n" || r.Stderr != "err\n" || r.said() != "err" {
		t.Errorf("got %+v, %v", r, err)
	}
	if _, err := Exec(t.Context(), "no-such-program-here"); !errors.Is(err, holdfast.ErrUnsupported) || holdfast.RemedyOf(err) == "" {
		t.Errorf("no such program: got %v, want unsupported with a remedy", err)
	}
	if r, err := Exec(t.Context(), "sh", "-c", "yes | head -c 1000000"); err != nil || len(r.Stdout) != maxOutput {
		t.Errorf("much output: got %d bytes, %v, want %d", len(r.Stdout), err, maxOutput)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := Exec(ctx, "sh", "-c", "exec sleep 100"); !errors.Is(err, holdfast.ErrTimeout) {
		t.Errorf("past its time: got %v, want a timeout", err)
	}
	if _, err := Exec(t.Context(), "sh", "-c", "kill -9 $$"); err == nil {
		t.Error("killed: got no error")
	}
}
