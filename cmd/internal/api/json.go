package api

import (
	"bytes"
	"encoding/json"
	"io"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"

	"github.com/holdfast-storage/holdfast"
)

// WriteJSON writes a message as one indented JSON object: fields by their
// names in the .proto file, every field present, null where an optional one is not
// set, numbers as numbers (protojson would write 64-bit ones as strings).
func WriteJSON(w io.Writer, m proto.Message) error {
	var compact, out bytes.Buffer
	if err := appendMessage(&compact, m.ProtoReflect()); err != nil {
		return err
	}
	if err := json.Indent(&out, compact.Bytes(), "", "  "); err != nil {
		return err
	}
	out.WriteByte('\n')
	_, err := w.Write(out.Bytes())
	return err
}

// WriteErrorJSON writes {"error":{"kind","message","remedy"}}.
func WriteErrorJSON(w io.Writer, err error) error {
	type body struct {
		Kind    string `json:"kind"`
		Message string `json:"message"`
		Remedy  string `json:"remedy"`
	}
	return json.NewEncoder(w).Encode(map[string]body{"error": {string(holdfast.KindOf(err)), holdfast.MessageOf(err), holdfast.RemedyOf(err)}})
}

func appendMessage(b *bytes.Buffer, m protoreflect.Message) error {
	b.WriteByte('{')
	fields := m.Descriptor().Fields()
	for i := range fields.Len() {
		if i > 0 {
			b.WriteByte(',')
		}
		field := fields.Get(i)
		appendText(b, string(field.Name()))
		b.WriteByte(':')
		if err := appendField(b, field, m); err != nil {
			return err
		}
	}
	b.WriteByte('}')
	return nil
}

func appendField(b *bytes.Buffer, field protoreflect.FieldDescriptor, m protoreflect.Message) error {
	value := m.Get(field)
	switch {
	case field.IsList():
		b.WriteByte('[')
		for i := range value.List().Len() {
			if i > 0 {
				b.WriteByte(',')
			}
			if err := appendValue(b, field, value.List().Get(i)); err != nil {
				return err
			}
		}
		b.WriteByte(']')
		return nil
	case field.IsMap():
		// The API's maps are all of text to text; encoding/json sorts the keys.
		plain := map[string]string{}
		value.Map().Range(func(k protoreflect.MapKey, v protoreflect.Value) bool {
			plain[k.String()] = v.String()
			return true
		})
		return appendAny(b, plain)
	case field.HasPresence() && !m.Has(field): // a message, or a number that is not known
		b.WriteString("null")
		return nil
	}
	return appendValue(b, field, value)
}

func appendValue(b *bytes.Buffer, field protoreflect.FieldDescriptor, v protoreflect.Value) error {
	if field.Message() != nil {
		return appendMessage(b, v.Message())
	}
	return appendAny(b, v.Interface())
}

func appendText(b *bytes.Buffer, s string) { _ = appendAny(b, s) } // a string always encodes

func appendAny(b *bytes.Buffer, v any) error {
	text, err := json.Marshal(v)
	b.Write(text)
	return err
}
