package holdfast

import (
	"cmp"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"
)

// The defaults of a volume's options.
const (
	DefaultVolumeSize = 10 << 30
	DefaultReplicas   = 3 // or the number of nodes with disks, when that is less
	MaxReplicas       = 7
	DefaultFileSystem = "ext4"
)

// The values of ReadPromises.
const (
	PromisesOn  = "on"
	PromisesOff = "off"
)

// The policies of OnQuorumLoss. The time after ErrorOnLoss is at least
// MinHoldTime, in which a silent replica is taken out where there is a quorum, and
// at most MaxHoldTime.
const (
	FreezeOnLoss = "freeze"
	ErrorOnLoss  = "error:"
	MinHoldTime  = 10 * time.Second
	MaxHoldTime  = 24 * time.Hour
)

// maxOptionLength bounds the text of one option value: nothing legitimate is
// longer, and it is kept in raft for ever.
const maxOptionLength = 4096

// VolumeOptions is what a user may ask of a volume. The same keys are used in
// docker --opt, compose driver_opts, CLI flags, inline volume names and JSON.
type VolumeOptions struct {
	Size     int64 // bytes; 0 means DefaultVolumeSize
	Replicas int   // full copies; 0 means min(DefaultReplicas, nodes with disks)
	// FileSystem is ext4 or xfs; it is made at the first mount.
	FileSystem string
	// MkfsOptions are extra words for mkfs.
	MkfsOptions string
	// MountOptions is the comma-separated list for mount(8) -o.
	MountOptions string
	// Labels are the user's own; they change nothing.
	Labels map[string]string
	// MinCopies is the number of in-sync copies below which writes hold; at most
	// Replicas.
	MinCopies int
	// OnQuorumLoss is what requests do that are held, by a missing quorum of raft or
	// by MinCopies: FreezeOnLoss, or ErrorOnLoss with a time after which they fail,
	// as in "error:30s".
	OnQuorumLoss string
	// ReadPromises is "on" or "off". Off, every read of a replicated volume is
	// confirmed by asking the other in-sync replicas: for hosts whose clocks may stand
	// still without telling, as in a paused virtual machine.
	ReadPromises string
	// SegmentSize is what of the volume is placed and replicated as one, in bytes: a
	// multiple of RegionSize.
	SegmentSize int64
	// Pool names the pool of disks that the volume is placed on; empty: any disk.
	Pool string
}

// optionAliases maps every accepted spelling, lower case with - turned to _,
// to the option's own name.
var optionAliases = map[string]string{
	"size": "size", "replicas": "replicas", "repl": "replicas", "ha": "replicas", "ha_level": "replicas",
	"replica_count": "replicas", "fs": "fs", "fstype": "fs", "filesystem": "fs",
	"mkfs": "mkfs", "fsopts": "mkfs", "mkfsoptions": "mkfs",
	"mount_options": "mount_options", "mountopts": "mount_options",
	"labels": "labels", "min_copies": "min_copies", "on_quorum_loss": "on_quorum_loss",
	"read_promises": "read_promises", "segment_size": "segment_size",
	"pool": "pool", "storagepool": "pool",
}

// laterOptions are the options whose feature is not in this version; they are
// refused by name rather than accepted and ignored.
var laterOptions = map[string]bool{
	"ec": true, "volumetype": true, "io_priority": true, "profile": true,
	"storagepolicy": true, "nodes": true, "zones": true, "racks": true, "sticky": true, "secure": true,
	"from": true, "parent": true, "snap_schedule": true, "shared": true,
	"ack": true, "iops": true, "bandwidth": true, "max_iops": true, "max_bandwidth": true,
}

// OptionKeys lists the options of this version by their own names, sorted.
func OptionKeys() []string {
	set := map[string]bool{}
	for _, name := range optionAliases {
		set[name] = true
	}
	return slices.Sorted(maps.Keys(set))
}

// ParseOptions reads options given as key and value. Keys are case-insensitive
// and "-" equals "_"; an empty value means true, which no option of this
// version takes. Keys label.NAME and labels (a=b,c=d) set labels. Two spellings
// of one option are an error. Every error is ErrInvalid or ErrUnsupported and
// names the key, the value and what would be right; nothing is defaulted here.
func ParseOptions(in map[string]string) (VolumeOptions, error) {
	var o VolumeOptions
	seen := map[string]string{}
	for _, key := range slices.Sorted(maps.Keys(in)) {
		value := in[key]
		if len(value) > maxOptionLength {
			return VolumeOptions{}, Errorf(ErrInvalid, "option %s: the value has %d bytes, more than %d", key, len(value), maxOptionLength)
		}
		plain := strings.ReplaceAll(strings.ToLower(key), "-", "_")
		if strings.HasPrefix(plain, "label.") {
			if err := o.addLabel(key[len("label."):], value); err != nil {
				return VolumeOptions{}, err
			}
			continue
		}
		name, ok := optionAliases[plain]
		if !ok {
			if laterOptions[plain] {
				return VolumeOptions{}, Errorf(ErrUnsupported, "option %s is not in this version", key).WithRemedy("leave it out; the options are %s", strings.Join(OptionKeys(), ", "))
			}
			return VolumeOptions{}, Errorf(ErrInvalid, "unknown option %q", key).WithRemedy("the options are %s", strings.Join(OptionKeys(), ", "))
		}
		if other, twice := seen[name]; twice {
			return VolumeOptions{}, Errorf(ErrInvalid, "options %s and %s are the same option", other, key).WithRemedy("give it once")
		}
		seen[name] = key
		if err := o.set(name, key, value); err != nil {
			return VolumeOptions{}, err
		}
	}
	return o, nil
}

func (o *VolumeOptions) set(name, key, value string) error {
	value = strings.TrimSpace(value)
	var err error
	switch name {
	case "size":
		if o.Size, err = ParseSize(value); err == nil {
			err = CheckVolumeSize(o.Size, value)
		}
		if err != nil {
			err = Errorf(ErrInvalid, "option %s: %w", key, err)
		}
	case "replicas":
		o.Replicas, err = parseCount(key, value, 1, MaxReplicas)
	case "min_copies":
		o.MinCopies, err = parseCount(key, value, 1, MaxReplicas)
	case "fs":
		o.FileSystem = strings.ToLower(value)
		if o.FileSystem != "ext4" && o.FileSystem != "xfs" {
			err = Errorf(ErrInvalid, "option %s: unknown file system %q", key, value).WithRemedy("use ext4 or xfs")
		}
	case "mkfs":
		o.MkfsOptions = value
	case "mount_options":
		o.MountOptions = value
	case "on_quorum_loss":
		var hold time.Duration
		if hold, err = HoldTime(strings.ToLower(value)); err != nil {
			err = Errorf(ErrInvalid, "option %s: %w", key, err)
		}
		o.OnQuorumLoss = HoldPolicy(hold)
	case "read_promises":
		switch strings.ToLower(value) {
		case "on", "true", "yes", "1", "":
			o.ReadPromises = PromisesOn
		case "off", "false", "no", "0":
			o.ReadPromises = PromisesOff
		default:
			err = Errorf(ErrInvalid, "option %s: %q is neither on nor off", key, value).WithRemedy("use on or off")
		}
	case "segment_size":
		if o.SegmentSize, err = ParseSize(value); err == nil && (o.SegmentSize < RegionSize || o.SegmentSize%RegionSize != 0) {
			err = Errorf(ErrInvalid, "%s (%d bytes) is not a multiple of 1 MiB", value, o.SegmentSize).WithRemedy("use for example 64G; a size without a unit is GiB")
		}
		if err != nil {
			err = Errorf(ErrInvalid, "option %s: %w", key, err)
		}
	case "pool":
		o.Pool = value
		if err = CheckPoolName(value); err != nil {
			err = Errorf(ErrInvalid, "option %s: %w", key, err)
		}
	case "labels":
		for _, pair := range strings.Split(value, ",") {
			k, v, _ := strings.Cut(pair, "=")
			if err = o.addLabel(k, v); err != nil {
				break
			}
		}
	}
	return err
}

// HoldTime reads an OnQuorumLoss policy: how long requests are held before they
// fail, 0 for ever.
func HoldTime(policy string) (time.Duration, error) {
	if policy == FreezeOnLoss {
		return 0, nil
	}
	after, ok := strings.CutPrefix(policy, ErrorOnLoss)
	d, err := time.ParseDuration(after)
	switch {
	case !ok || err != nil:
		return 0, Errorf(ErrInvalid, "unknown policy %q", policy).WithRemedy("use %s, or %s and a time as in %s30s", FreezeOnLoss, ErrorOnLoss, ErrorOnLoss)
	case d < MinHoldTime || d > MaxHoldTime || d%time.Second != 0:
		return 0, Errorf(ErrInvalid, "%q: the time must be of whole seconds, %v to %v", policy, MinHoldTime, MaxHoldTime).
			WithRemedy("a silent replica is taken out within %v where there is a quorum", MinHoldTime)
	}
	return d, nil
}

// HoldPolicy writes what HoldTime reads.
func HoldPolicy(d time.Duration) string {
	if d == 0 {
		return FreezeOnLoss
	}
	return ErrorOnLoss + d.String()
}

func (o *VolumeOptions) addLabel(key, value string) error {
	key = strings.TrimSpace(key)
	if key == "" {
		return Errorf(ErrInvalid, "a label has no name").WithRemedy("write label.NAME=VALUE or labels=NAME=VALUE,NAME=VALUE")
	}
	if _, twice := o.Labels[key]; twice {
		return Errorf(ErrInvalid, "label %q is given twice", key)
	}
	if o.Labels == nil {
		o.Labels = map[string]string{}
	}
	o.Labels[key] = value
	return nil
}

func parseCount(key, value string, least, most int) (int, error) {
	n, err := strconv.Atoi(value)
	if err != nil || n < least || n > most {
		return 0, Errorf(ErrInvalid, "option %s: %q is not a number from %d to %d", key, value, least, most)
	}
	return n, nil
}

// WithDefaults fills what was not given; nodesWithDisks bounds the default
// number of replicas.
func (o VolumeOptions) WithDefaults(nodesWithDisks int) VolumeOptions {
	o.Size = cmp.Or(o.Size, DefaultVolumeSize)
	o.Replicas = cmp.Or(o.Replicas, max(1, min(DefaultReplicas, nodesWithDisks)))
	o.FileSystem = cmp.Or(o.FileSystem, DefaultFileSystem)
	o.MinCopies = cmp.Or(o.MinCopies, 1)
	o.OnQuorumLoss = cmp.Or(o.OnQuorumLoss, FreezeOnLoss)
	o.ReadPromises = cmp.Or(o.ReadPromises, PromisesOn)
	o.SegmentSize = cmp.Or(o.SegmentSize, DefaultSegmentSize)
	return o
}

// ParseInlineName splits a volume name with options in it, as users of volume
// drivers type it: "size=10G,replicas=3,name=data" is the volume data. A name
// without "=" is returned as it is, with no options. The name itself is
// checked by CheckVolumeName.
func ParseInlineName(s string) (name string, options map[string]string, err error) {
	if !strings.Contains(s, "=") {
		return s, nil, CheckVolumeName(s)
	}
	options = map[string]string{}
	for _, pair := range strings.Split(s, ",") {
		k, v, _ := strings.Cut(pair, "=")
		k = strings.TrimSpace(k)
		if strings.EqualFold(k, "name") {
			if name != "" {
				return "", nil, Errorf(ErrInvalid, "volume name %q names two volumes", s)
			}
			name = strings.TrimSpace(v)
			continue
		}
		if _, twice := options[k]; twice {
			return "", nil, Errorf(ErrInvalid, "volume name %q gives the option %s twice", s, k)
		}
		options[k] = v
	}
	if name == "" {
		return "", nil, Errorf(ErrInvalid, "volume name %q has options but no name=", s).WithRemedy("write for example size=10G,replicas=3,name=data")
	}
	return name, options, CheckVolumeName(name)
}

// CheckVolumeName accepts [A-Za-z0-9][A-Za-z0-9_.-]{0,127}.
func CheckVolumeName(name string) error { return checkName("volume", name) }

// CheckPoolName accepts what CheckVolumeName does.
func CheckPoolName(name string) error { return checkName("pool", name) }

func checkName(what, name string) error {
	ok := len(name) >= 1 && len(name) <= 128
	for i := 0; ok && i < len(name); i++ {
		c := name[i]
		letter := c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9'
		ok = letter || i > 0 && (c == '_' || c == '.' || c == '-')
	}
	if !ok {
		return Errorf(ErrInvalid, "%q is not a %s name", name, what).WithRemedy("use 1 to 128 letters, digits, _ . and -, starting with a letter or digit")
	}
	return nil
}
