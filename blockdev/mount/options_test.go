package mount

import (
	"errors"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/holdfast-storage/holdfast"
)

func TestParseFileSystem(t *testing.T) {
	for text, want := range map[string]FileSystem{"": Ext4, "ext4": Ext4, "EXT4": Ext4, "xfs": XFS} {
		if got, err := ParseFileSystem(text); got != want || err != nil {
			t.Errorf("%q: got %q, %v, want %s", text, got, err, want)
		}
	}
	for _, text := range []string{"btrfs", "ext4 ", "ext4;reboot", "../xfs"} {
		if _, err := ParseFileSystem(text); !errors.Is(err, holdfast.ErrInvalid) || holdfast.RemedyOf(err) == "" {
			t.Errorf("%q: got %v, want it refused with a remedy", text, err)
		}
	}
}

func TestParseOptions(t *testing.T) {
	for _, c := range []struct {
		fs    FileSystem
		text  string
		flags uintptr
		data  string
	}{
		{Ext4, "", unix.MS_NODEV, "errors=remount-ro"},
		{Ext4, "defaults", unix.MS_NODEV, "errors=remount-ro"},
		{Ext4, "errors=panic", unix.MS_NODEV, "errors=panic"},
		{Ext4, " noatime , discard,, ", unix.MS_NODEV | unix.MS_NOATIME, "discard,errors=remount-ro"},
		{Ext4, "ro,rw", unix.MS_NODEV, "errors=remount-ro"},
		{Ext4, "rw,ro", unix.MS_NODEV | unix.MS_RDONLY, "errors=remount-ro"},
		{Ext4, "commit=5,data=journal,nosuid,noexec", unix.MS_NODEV | unix.MS_NOSUID | unix.MS_NOEXEC, "commit=5,data=journal,errors=remount-ro"},
		{XFS, "", unix.MS_NODEV, "nouuid"},
		{XFS, "nouuid,logbsize=256k", unix.MS_NODEV, "nouuid,logbsize=256k"},
	} {
		got, err := ParseOptions(c.fs, c.text)
		if err != nil || got.Flags != c.flags || got.Data != c.data {
			t.Errorf("%s %q: got %#x %q, %v, want %#x %q", c.fs, c.text, got.Flags, got.Data, err, c.flags, c.data)
		}
	}
}

// TestOptionsRefused: nothing reaches mount(2) that would give up crash safety,
// name another device or file, or change how mount(2) works.
func TestOptionsRefused(t *testing.T) {
	for fs, texts := range map[FileSystem][]string{
		Ext4: {"nobarrier", "barrier=0", "noload", "norecovery", "data=writeback", "journal_path=/dev/sda", "journal_dev=0x800", "bind", "remount", "loop",
			"errors=continue", "dev", "commit", "commit=", "commit=5;reboot", "commit=$(reboot)", "stripe=/etc/passwd", "sb=8193", "abort", "dax", "nojournal_checksum,abort", "no such"},
		XFS:     {"norecovery", "logdev=/dev/sda", "rtdev=/dev/sda", "nobarrier", "sunit", "sunit=1,logdev=x", "user_xattr"},
		"btrfs": {""},
	} {
		for _, text := range texts {
			_, err := ParseOptions(fs, text)
			if !errors.Is(err, holdfast.ErrInvalid) {
				t.Errorf("%s %q: got %v, want it refused", fs, text, err)
			}
		}
	}
	_, err := ParseOptions(Ext4, "nobarrier")
	if err == nil || !strings.Contains(err.Error(), `"nobarrier"`) || !strings.Contains(holdfast.RemedyOf(err), "noatime") {
		t.Errorf("got %v, want the option named and the known ones listed", err)
	}
	if _, err := ParseOptions(Ext4, strings.Repeat("noatime,", 1000)); !errors.Is(err, holdfast.ErrInvalid) {
		t.Errorf("8000 bytes of options: got %v, want them refused", err)
	}
}

func TestMkfsCommand(t *testing.T) {
	for _, c := range []struct {
		fs   FileSystem
		text string
		want string
	}{
		{Ext4, "", "mkfs.ext4 -q -F -b 4096 -E lazy_itable_init=1,lazy_journal_init=1,nodiscard DEV"},
		{Ext4, "-m 0 -L data", "mkfs.ext4 -q -F -b 4096 -m 0 -L data -E lazy_itable_init=1,lazy_journal_init=1,nodiscard DEV"},
		{Ext4, "-Estride=4 -b 4096", "mkfs.ext4 -q -F -b 4096 -E lazy_itable_init=1,lazy_journal_init=1,nodiscard,stride=4 DEV"},
		{Ext4, "-O ^has_journal,extents -J size=8", "mkfs.ext4 -q -F -b 4096 -O ^has_journal,extents -J size=8 -E lazy_itable_init=1,lazy_journal_init=1,nodiscard DEV"},
		{XFS, "", "mkfs.xfs -q -f -K -b size=4096 -s size=4096 DEV"},
		{XFS, "-m reflink=0 -s size=4096 -K -l size=16m", "mkfs.xfs -q -f -K -b size=4096 -s size=4096 -m reflink=0 -K -l size=16m DEV"},
	} {
		extra, err := ParseMkfs(c.fs, c.text)
		if err != nil {
			t.Errorf("%s %q: %v", c.fs, c.text, err)
			continue
		}
		name, args := mkfsCommand(c.fs, extra, "DEV")
		if got := strings.Join(append([]string{name}, args...), " "); got != c.want {
			t.Errorf("%s %q:\n got %s\nwant %s", c.fs, c.text, got, c.want)
		}
	}
}

func TestMkfsRefused(t *testing.T) {
	for fs, texts := range map[FileSystem][]string{
		Ext4: {"/dev/sda", "-b 1024", "-F", "-n", "-S", "-c", "-l /etc/passwd", "-d /etc", "-J device=/dev/sda", "-E offset=4096", "-E discard", "-E stride=4;reboot",
			"-m", "-L a/b", "-O `reboot`", "-m -F", "-E", "--help", "-m 0 /dev/sda", "-z undo.file"},
		XFS:     {"-s size=512", "-b size=1024", "-d file,name=/etc/passwd", "-d name=/dev/sda", "-l logdev=/dev/sda", "-r rtdev=/dev/sda", "-p /etc/passwd", "-N", "-f", "-c options=/etc/passwd"},
		"btrfs": {""},
	} {
		for _, text := range texts {
			if args, err := ParseMkfs(fs, text); !errors.Is(err, holdfast.ErrInvalid) {
				t.Errorf("%s %q: got %q, %v, want it refused", fs, text, args, err)
			}
		}
	}
	if _, err := ParseMkfs(Ext4, strings.Repeat("-m 0 ", 1000)); !errors.Is(err, holdfast.ErrInvalid) {
		t.Errorf("5000 bytes of options: got %v, want them refused", err)
	}
}

// FuzzOptions: whatever passes has no character with a meaning beyond itself,
// and no word but those of the allow-list.
func FuzzOptions(f *testing.F) {
	f.Add("noatime,commit=5")
	f.Add("-m 0 -E stride=4")
	f.Fuzz(func(t *testing.T, text string) {
		for _, fs := range []FileSystem{Ext4, XFS} {
			if o, err := ParseOptions(fs, text); err == nil {
				for word := range strings.SplitSeq(o.Data, ",") {
					key, value, ok := strings.Cut(word, "=")
					known := slices.Contains(mountData[fs], word) || ok && value != "" && slices.Contains(mountData[fs], key+"=")
					if word != "" && !known || strings.ContainsAny(word, " \t\n\\'\"`$;&|<>()/*?#") {
						t.Errorf("%q became %q", text, o.Data)
					}
				}
			}
			args, err := ParseMkfs(fs, text)
			if err != nil {
				continue
			}
			for i, a := range args {
				if strings.ContainsAny(a, " \t\n\\'\"`$;&|<>()/*?#") || a == "" {
					t.Errorf("%q became %q", text, args)
				}
				if fs == Ext4 && (i%2 == 0) != (a[0] == '-') {
					t.Errorf("%q became %q: letters and values do not alternate", text, args)
				}
			}
		}
	})
}

func TestCheckVolume(t *testing.T) {
	for _, c := range []struct{ fs, mkfs, options, says string }{
		{"", "", "", ""},
		{"ext4", "-m 1", "noatime,rw", ""},
		{"xfs", "-m crc=1", "ro,rw", ""},
		{"btrfs", "", "", "ext4 or xfs"},
		{"", "-m crc=1", "", "option mkfs: "},
		{"xfs", "-T news", "", `option mkfs: mkfs option "-T"`},
		{"", "", "data=writeback", `option mount_options: mount option "data=writeback"`},
		{"xfs", "", "noatime,ro", "docker run -v VOLUME:/PATH:ro"},
	} {
		err := CheckVolume(c.fs, c.mkfs, c.options)
		switch {
		case c.says == "" && err != nil:
			t.Errorf("CheckVolume(%q, %q, %q) = %v", c.fs, c.mkfs, c.options, err)
		case c.says != "" && (!errors.Is(err, holdfast.ErrInvalid) || !strings.Contains(err.Error(), c.says)):
			t.Errorf("CheckVolume(%q, %q, %q) = %v, want invalid saying %q", c.fs, c.mkfs, c.options, err, c.says)
		}
	}
}
