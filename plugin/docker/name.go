package docker

import (
	"maps"
	"strings"

	"github.com/holdfast-storage/holdfast"
)

// ParseName reads a volume name as the user typed it at `docker run -v` or
// `docker volume create`. A plain name is returned as it is, without options. A
// name with `=` or `,` in it carries options, `size=10G,replicas=3,name=data`,
// and must have a `name` key; a key without a value means true. Keys are
// returned in lower case with `_` for `-`; what they mean is the option parser's
// business, as is what a plain name may look like. Errors are ErrInvalid.
func ParseName(typed string) (name string, opts map[string]string, err error) {
	if typed == "" {
		return "", nil, holdfast.Errorf(holdfast.ErrInvalid, "the volume name is empty").
			WithRemedy("the engine repeats a broken call without its body; try again")
	}
	if !strings.ContainsAny(typed, "=,") {
		return typed, nil, nil
	}
	opts = make(map[string]string)
	for field := range strings.SplitSeq(typed, ",") {
		key, value, found := strings.Cut(strings.TrimSpace(field), "=")
		key, value = normalKey(key), strings.TrimSpace(value)
		if !found {
			value = "true"
		}
		if key == "" {
			return "", nil, holdfast.Errorf(holdfast.ErrInvalid, "volume name %q has an option without a key", typed).
				WithRemedy("write it like size=10G,replicas=3,name=data")
		}
		if _, twice := opts[key]; twice {
			return "", nil, holdfast.Errorf(holdfast.ErrInvalid, "volume name %q gives %s twice", typed, key)
		}
		opts[key] = value
	}
	name = opts["name"]
	delete(opts, "name")
	if name == "" {
		return "", nil, holdfast.Errorf(holdfast.ErrInvalid, "volume name %q carries options but no name", typed).
			WithRemedy("add name=..., as in size=10G,replicas=3,name=data")
	}
	return name, opts, nil
}

// mergeOptions joins the options of an inline name with those given by --opt. The
// same key in both with different values is ErrInvalid: neither can be preferred
// without surprising somebody.
func mergeOptions(inline, given map[string]string) (map[string]string, error) {
	if len(inline) == 0 {
		return given, nil
	}
	merged := maps.Clone(inline)
	for key, value := range given {
		k := normalKey(key)
		if other, both := inline[k]; both && other != value {
			return nil, holdfast.Errorf(holdfast.ErrInvalid, "option %s is %q in the volume name and %q in --opt", k, other, value).
				WithRemedy("give it once")
		}
		merged[k] = value
	}
	return merged, nil
}

// normalKey is the form in which keys are compared: case does not matter and `-`
// equals `_`.
func normalKey(key string) string {
	return strings.ReplaceAll(strings.ToLower(strings.TrimSpace(key)), "-", "_")
}
