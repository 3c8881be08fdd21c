package api

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/holdfast-storage/holdfast"
	"github.com/holdfast-storage/holdfast/cmd/internal/api/apipb"
)

func TestErrorsTravel(t *testing.T) {
	for kind := range meanings {
		sent := holdfast.Errorf(kind, "volume %q is odd", "x").WithRemedy("look")
		got := FromStatus(ToStatus(sent))
		if !errors.Is(got, kind) || got.Error() != sent.Error() || holdfast.RemedyOf(got) != "look" {
			t.Errorf("%s came back as %v (%s)", kind, got, holdfast.KindOf(got))
		}
		if ExitCode(got) != ExitCode(sent) || ExitCode(got) == 0 {
			t.Errorf("%s: exit %d", kind, ExitCode(got))
		}
	}
	wrapped := fmt.Errorf("attach: %w", holdfast.Errorf(holdfast.ErrRefused, "in use").WithRemedy("detach"))
	if got := FromStatus(ToStatus(wrapped)); !errors.Is(got, holdfast.ErrRefused) || !strings.Contains(got.Error(), "attach: in use") {
		t.Errorf("a wrapped error came back as %v", got)
	}
	if ToStatus(nil) != nil || FromStatus(nil) != nil || ExitCode(nil) != 0 {
		t.Error("no error must stay no error")
	}
	if got := FromStatus(status.Error(codes.Unavailable, "connection refused")); ExitCode(got) != ExitUnavailable {
		t.Errorf("a lost connection exits %d, want %d", ExitCode(got), ExitUnavailable)
	}
}

func TestWriteJSON(t *testing.T) {
	var b bytes.Buffer
	v := &apipb.Volume{Name: `a"b`, Size: 1 << 60, Labels: map[string]string{"z": "1", "a": "2"}, Replicas: []*apipb.Replica{{Node: "n1", Tail: 1<<63 + 1}}}
	if err := WriteJSON(&b, v); err != nil {
		t.Fatal(err)
	}
	dec := json.NewDecoder(&b)
	dec.UseNumber()
	var got map[string]any
	if err := dec.Decode(&got); err != nil {
		t.Fatal(err)
	}
	if got["name"] != `a"b` || got["size"] != json.Number("1152921504606846976") || got["bytes_to_sync"] != nil {
		t.Errorf("got %v", got)
	}
	replica := got["replicas"].([]any)[0].(map[string]any)
	if replica["tail"] != json.Number("9223372036854775809") || replica["bytes_to_sync"] != json.Number("0") {
		t.Errorf("got %v, want the exact tail and every field present", replica)
	}
	if used, is := got["used"]; !is || used != nil {
		t.Errorf("used, which nobody told: got %v, %v, want null", used, is)
	}
	b.Reset()
	v.Used = new(int64)
	if err := WriteJSON(&b, v); err != nil || !strings.Contains(b.String(), `"used": 0,`) {
		t.Errorf("used of nothing: %v in %s", err, b.String())
	}
	b.Reset()
	if err := WriteErrorJSON(&b, holdfast.Errorf(holdfast.ErrNotFound, "no volume x").WithRemedy("create it")); err != nil || strings.TrimSpace(b.String()) != `{"error":{"kind":"not_found","message":"no volume x","remedy":"create it"}}` {
		t.Errorf("got %s, %v", b.String(), err)
	}
}

func TestDialRefusesBadAddresses(t *testing.T) {
	for _, bad := range []string{"unix://relative", "nowhere", "host:", "127.0.0.1:99999", "127.0.0.1:0", "127.0.0.1:x", "unix:///" + strings.Repeat("x", 200)} {
		if _, err := Dial(bad); !errors.Is(err, holdfast.ErrInvalid) {
			t.Errorf("Dial(%q) = %v, want invalid", bad, err)
		}
	}
}
