package mount

import (
	"fmt"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/holdfast-storage/holdfast"
)

// CheckVolume refuses what no mount of a volume could work with: the options fs, mkfs
// and mount_options as a user gives them. Errors are ErrInvalid and name the option.
func CheckVolume(fs, mkfs, mountOptions string) error {
	kind, err := ParseFileSystem(fs)
	if err != nil {
		return err
	}
	if _, err := ParseMkfs(kind, mkfs); err != nil {
		return holdfast.Errorf(holdfast.ErrInvalid, "option mkfs: %w", err)
	}
	o, err := ParseOptions(kind, mountOptions)
	if err != nil {
		return holdfast.Errorf(holdfast.ErrInvalid, "option mount_options: %w", err)
	}
	if o.ReadOnly() {
		return holdfast.Errorf(holdfast.ErrInvalid, "option mount_options: with ro nobody could ever write to the volume").
			WithRemedy("leave ro out, and say it where the volume is used: docker run -v VOLUME:/PATH:ro")
	}
	return nil
}

// FileSystem is a kind of file system that holdfast makes and mounts.
type FileSystem string

// The file systems.
const (
	Ext4 FileSystem = "ext4"
	XFS  FileSystem = "xfs"
)

// ParseFileSystem reads the value of the option fs; "" is ext4.
func ParseFileSystem(text string) (FileSystem, error) {
	switch fs := FileSystem(strings.ToLower(text)); fs {
	case "":
		return Ext4, nil
	case Ext4, XFS:
		return fs, nil
	}
	return "", holdfast.Errorf(holdfast.ErrInvalid, "fs=%s is not a file system that holdfast makes", text).WithRemedy("use ext4 or xfs")
}

const (
	// maxOptionText bounds the text of mkfs and mount options; mount(2) takes
	// one page.
	maxOptionText = 2048
	// optionCharacters are those that a value may have: none that a shell, a
	// list or a path would treat specially.
	optionCharacters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.:^+-%"
)

// mountFlags are the options that mount(2) takes as flags: those set and those
// cleared.
var mountFlags = map[string]struct{ set, clear uintptr }{
	"defaults": {}, "rw": {clear: unix.MS_RDONLY}, "ro": {set: unix.MS_RDONLY},
	"suid": {clear: unix.MS_NOSUID}, "nosuid": {set: unix.MS_NOSUID},
	"nodev": {set: unix.MS_NODEV},
	"exec":  {clear: unix.MS_NOEXEC}, "noexec": {set: unix.MS_NOEXEC},
	"async": {clear: unix.MS_SYNCHRONOUS}, "sync": {set: unix.MS_SYNCHRONOUS}, "dirsync": {set: unix.MS_DIRSYNC},
	"atime": {clear: unix.MS_NOATIME}, "noatime": {set: unix.MS_NOATIME}, "nodiratime": {set: unix.MS_NODIRATIME},
	"relatime": {set: unix.MS_RELATIME}, "strictatime": {set: unix.MS_STRICTATIME}, "lazytime": {set: unix.MS_LAZYTIME},
	"nosymfollow": {set: unix.MS_NOSYMFOLLOW},
}

// mountData are the options that the file system itself takes. What would give
// up crash safety (nobarrier, norecovery, noload, data=writeback) or name
// another device (logdev, journal_path) is not among them.
var mountData = map[FileSystem][]string{
	Ext4: {"acl", "noacl", "user_xattr", "auto_da_alloc", "commit=", "data=ordered", "data=journal", "delalloc", "nodelalloc", "dioread_lock", "dioread_nolock",
		"discard", "nodiscard", "errors=remount-ro", "errors=panic", "grpquota", "init_itable", "init_itable=", "noinit_itable", "inode_readahead_blks=",
		"journal_checksum", "max_batch_time=", "max_dir_size_kb=", "mb_optimize_scan=", "min_batch_time=", "noquota", "prjquota", "quota", "stripe=", "usrquota"},
	XFS: {"allocsize=", "discard", "nodiscard", "filestreams", "gquota", "grpquota", "inode32", "inode64", "largeio", "nolargeio", "logbsize=", "logbufs=",
		"noalign", "noquota", "nouuid", "pquota", "prjquota", "quota", "sunit=", "swalloc", "swidth=", "uquota", "usrquota", "wsync"},
}

// Options are mount options as mount(2) takes them.
type Options struct {
	Flags uintptr
	Data  string
}

// ReadOnly says whether the mount is to refuse writes.
func (o Options) ReadOnly() bool { return o.Flags&unix.MS_RDONLY != 0 }

// ParseOptions reads the comma-separated option mount_options of a volume. An
// option that is not on the allow-list is an ErrInvalid that names it.
func ParseOptions(fs FileSystem, text string) (Options, error) {
	allowed, ok := mountData[fs]
	if !ok {
		return Options{}, holdfast.Errorf(holdfast.ErrInvalid, "%q is not a file system that holdfast mounts", fs).WithRemedy("use ext4 or xfs")
	}
	if len(text) > maxOptionText {
		return Options{}, holdfast.Errorf(holdfast.ErrInvalid, "mount options of %d bytes; at most %d are taken", len(text), maxOptionText)
	}
	o := Options{Flags: unix.MS_NODEV}
	var data []string
	for word := range strings.SplitSeq(text, ",") {
		word = strings.TrimSpace(word)
		if word == "" {
			continue
		}
		if f, ok := mountFlags[word]; ok {
			o.Flags = o.Flags&^f.clear | f.set
			continue
		}
		key, value, valued := strings.Cut(word, "=")
		asWord := slices.Contains(allowed, word) && (!valued || value != "")
		if !asWord && (value == "" || !slices.Contains(allowed, key+"=")) {
			return Options{}, holdfast.Errorf(holdfast.ErrInvalid, "mount option %q is not taken for %s", word, fs).
				WithRemedy("known: %s", strings.Join(knownOptions(fs), " "))
		}
		if err := plainWord("mount option", value); err != nil {
			return Options{}, err
		}
		data = append(data, word)
	}
	if fs == XFS && !slices.Contains(data, "nouuid") {
		// The cluster lets one node write at a time. What the UUID check would
		// refuse is a dead mount of this same volume, which only a container's
		// end removes.
		data = append(data, "nouuid")
	}
	if fs == Ext4 && !slices.ContainsFunc(data, func(w string) bool { return strings.HasPrefix(w, "errors=") }) {
		data = append(data, "errors=remount-ro") // mke2fs would have it go on
	}
	o.Data = strings.Join(data, ",")
	return o, nil
}

func knownOptions(fs FileSystem) []string {
	var known []string
	for k := range mountFlags {
		known = append(known, k)
	}
	known = append(known, mountData[fs]...)
	slices.Sort(known)
	return known
}

// plainWord refuses a value with any unusual character.
func plainWord(what, value string) error {
	if i := strings.IndexFunc(value, func(r rune) bool { return !strings.ContainsRune(optionCharacters, r) }); i >= 0 {
		return holdfast.Errorf(holdfast.ErrInvalid, "%s value %q has a character that is not taken", what, value)
	}
	return nil
}

// mkfsLetters are the options of mkfs that users may give: for each letter the
// sub-options that are taken ("*" for one plain value, "" for none).
var mkfsLetters = map[FileSystem]map[string]string{
	Ext4: {
		"-E": "stride stripe_width stripe-width packed_meta_blocks root_owner num_backup_sb hash_seed lazy_itable_init lazy_journal_init resize",
		"-O": "*", "-I": "*", "-i": "*", "-N": "*", "-m": "*", "-L": "*", "-T": "*", "-U": "*", "-g": "*", "-G": "*", "-e": "*", "-J": "size", "-b": "4096",
	},
	XFS: {
		"-d": "agcount agsize sunit swidth su sw noalign", "-i": "maxpct size perblock attr projid32bit sparse exchange nrext64",
		"-l": "size version sunit su lazy-count", "-n": "size version ftype", "-m": "crc finobt inobtcount uuid rmapbt reflink bigtime",
		"-L": "*", "-K": "", "-b": "size", "-s": "size",
	},
}

// ParseMkfs reads the option mkfs of a volume, words as on a command line, into
// arguments for mkfs. Only letters and sub-options of an allow-list are taken:
// none names a device or a file, none changes the block size, which is 4096.
func ParseMkfs(fs FileSystem, text string) ([]string, error) {
	letters, ok := mkfsLetters[fs]
	if !ok {
		return nil, holdfast.Errorf(holdfast.ErrInvalid, "%q is not a file system that holdfast makes", fs).WithRemedy("use ext4 or xfs")
	}
	if len(text) > maxOptionText {
		return nil, holdfast.Errorf(holdfast.ErrInvalid, "mkfs options of %d bytes; at most %d are taken", len(text), maxOptionText)
	}
	words := strings.Fields(text)
	var args []string
	for i := 0; i < len(words); i++ {
		letter, value := words[i], ""
		if len(letter) > 2 && letter[0] == '-' {
			letter, value = letter[:2], letter[2:]
		}
		takes, ok := letters[letter]
		if !ok {
			return nil, holdfast.Errorf(holdfast.ErrInvalid, "mkfs option %q is not taken for %s", words[i], fs).
				WithRemedy("known: %s", strings.Join(sortedKeys(letters), " "))
		}
		if takes == "" {
			args = append(args, letter)
			continue
		}
		if value == "" {
			if i++; i == len(words) {
				return nil, holdfast.Errorf(holdfast.ErrInvalid, "mkfs option %s needs a value", letter)
			}
			value = words[i]
		}
		if err := checkMkfsValue(fs, letter, takes, value); err != nil {
			return nil, err
		}
		if letter == "-b" || letter == "-s" {
			continue // checked; ours says the same
		}
		args = append(args, letter, value)
	}
	return args, nil
}

// checkMkfsValue checks one value: a comma-separated list of words, or of
// sub-options with plain values.
func checkMkfsValue(fs FileSystem, letter, takes, value string) error {
	if letter == "-b" || letter == "-s" {
		if strings.TrimPrefix(value, "size=") != fmt.Sprint(holdfast.BlockSize) {
			return holdfast.Errorf(holdfast.ErrInvalid, "mkfs option %s %s: blocks and sectors are %d bytes", letter, value, holdfast.BlockSize)
		}
		return nil
	}
	for part := range strings.SplitSeq(value, ",") {
		key, sub, _ := strings.Cut(part, "=")
		if takes == "*" {
			key, sub = "", part
		}
		if strings.HasPrefix(part, "-") {
			return holdfast.Errorf(holdfast.ErrInvalid, "mkfs option %s needs a value, got %q", letter, part)
		}
		if takes != "*" && !slices.Contains(strings.Fields(takes), key) {
			return holdfast.Errorf(holdfast.ErrInvalid, "mkfs option %s %s is not taken for %s", letter, part, fs).
				WithRemedy("known: %s", takes)
		}
		if err := plainWord("mkfs option "+letter, sub); err != nil {
			return err
		}
	}
	return nil
}

func sortedKeys(m map[string]string) []string {
	var keys []string
	for k := range m {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	return keys
}
