package docker

import (
	"errors"
	"maps"
	"strings"
	"testing"

	"github.com/holdfast-storage/holdfast"
)

func TestParseName(t *testing.T) {
	for _, c := range []struct {
		typed, name string
		opts        map[string]string
		wrong       string // part of the error; empty means none
	}{
		{typed: "data", name: "data"},
		{typed: "a.b_c-1", name: "a.b_c-1"},
		{typed: "size=10G,replicas=3,name=data", name: "data", opts: map[string]string{"size": "10G", "replicas": "3"}},
		{typed: "name=data", name: "data", opts: map[string]string{}},
		{typed: "secure,name=data", name: "data", opts: map[string]string{"secure": "true"}},
		{typed: " Size = 1G , IO-Priority=high,NAME=data", name: "data", opts: map[string]string{"size": "1G", "io_priority": "high"}},
		{typed: "label.team=a=b,name=d", name: "d", opts: map[string]string{"label.team": "a=b"}},
		{typed: "", wrong: "empty"},
		{typed: "size=10G", wrong: "no name"},
		{typed: "name=,size=1G", wrong: "no name"},
		{typed: ",name=data", wrong: "without a key"},
		{typed: "=x,name=data", wrong: "without a key"},
		{typed: "size=1G,SIZE=2G,name=data", wrong: "size twice"},
	} {
		name, opts, err := ParseName(c.typed)
		if c.wrong != "" {
			if err == nil || !strings.Contains(err.Error(), c.wrong) || !errors.Is(err, holdfast.ErrInvalid) {
				t.Errorf("ParseName(%q): got error %v, want an ErrInvalid that says %q", c.typed, err, c.wrong)
			}
			continue
		}
		if err != nil || name != c.name || !maps.Equal(opts, c.opts) {
			t.Errorf("ParseName(%q): got %q %v %v, want %q %v", c.typed, name, opts, err, c.name, c.opts)
		}
	}
}

func TestMergeOptions(t *testing.T) {
	for _, c := range []struct{ inline, given, want map[string]string }{
		{nil, map[string]string{"Size": "1G"}, map[string]string{"Size": "1G"}},
		{map[string]string{"size": "1G"}, nil, map[string]string{"size": "1G"}},
		{map[string]string{"size": "1G"}, map[string]string{"Replicas": "3"}, map[string]string{"size": "1G", "replicas": "3"}},
		{map[string]string{"size": "1G"}, map[string]string{"SIZE": "1G"}, map[string]string{"size": "1G"}},
	} {
		got, err := mergeOptions(c.inline, c.given)
		if err != nil || !maps.Equal(got, c.want) {
			t.Errorf("mergeOptions(%v, %v): got %v %v, want %v", c.inline, c.given, got, err, c.want)
		}
	}
	if got, err := mergeOptions(map[string]string{"size": "1G"}, map[string]string{"Size": "2G"}); !errors.Is(err, holdfast.ErrInvalid) {
		t.Errorf("two sizes: got %v %v, want ErrInvalid", got, err)
	}
}

func FuzzParseName(f *testing.F) {
	for _, seed := range []string{"data", "size=10G,name=x", "a,,b", "name==,=", "\x00=\xff,name=n"} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, typed string) {
		name, _, err := ParseName(typed)
		if (err == nil) != (name != "") {
			t.Fatalf("ParseName(%q): got name %q with error %v", typed, name, err)
		}
		if err == nil && strings.ContainsRune(name, ',') {
			t.Fatalf("ParseName(%q): got name %q with a comma in it", typed, name)
		}
	})
}
