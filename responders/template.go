package responders

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/go-json-experiment/json/jsontext"

	"stoop/param"
)

// template is JSON in whose texts placeholders such as ${alert.rule} stand. It is
// read as JSON first, and only then a value put in the place of each, as JSON
// again: so there is nothing that an alert could hold to get out of its place,
// and nothing in it is ever executed.
type template string

// maxBody bounds what one makes: an alert may stand in it several times.
const maxBody = 4 << 20

// UnmarshalText refuses what is no JSON, and placeholders of which nothing could
// come.
func (t *template) UnmarshalText(b []byte) error {
	_, err := template(b).render(func(path string) (jsontext.Value, error) { return nil, checkPath(path) })
	if err != nil {
		return err
	}
	*t = template(b)
	return nil
}

// render puts what lookup finds in the place of each placeholder; nil is null.
func (t template) render(lookup func(path string) (jsontext.Value, error)) ([]byte, error) {
	var out bytes.Buffer
	dec := jsontext.NewDecoder(strings.NewReader(string(t)))
	// What Falco wrote is passed on although it is not all as JSON should be.
	enc := jsontext.NewEncoder(&out, jsontext.AllowDuplicateNames(true), jsontext.AllowInvalidUTF8(true))
	for {
		in, n := dec.StackIndex(dec.StackDepth())
		tok, err := dec.ReadToken()
		switch {
		case errors.Is(err, io.EOF):
			if _, values := dec.StackIndex(0); values != 1 {
				return nil, errors.New("it has to be one JSON value")
			}
			return bytes.TrimSpace(out.Bytes()), nil
		case err != nil:
			return nil, fmt.Errorf("it is no JSON: %w", err)
		}
		isKey := in == '{' && n%2 == 0
		switch {
		case tok.Kind() != '"':
			err = enc.WriteToken(tok)
		case isKey && strings.Contains(tok.String(), "${"):
			return nil, fmt.Errorf("the key %s holds a placeholder: only a value may", param.Cut(tok.String()))
		case isKey:
			err = enc.WriteToken(tok)
		default:
			var v jsontext.Value
			if v, err = expand(tok.String(), lookup); err == nil {
				err = enc.WriteValue(v)
			}
		}
		if err != nil {
			return nil, err
		}
		if out.Len() > maxBody {
			return nil, fmt.Errorf("what comes of it has more than %s", param.Size(maxBody))
		}
	}
}

// expand is a text with its placeholders filled in: one that stands alone becomes
// whatever value it is, of others the text is taken.
func expand(s string, lookup func(string) (jsontext.Value, error)) (jsontext.Value, error) {
	var b strings.Builder
	whole := s
	for {
		before, rest, ok := strings.Cut(s, "${")
		if !ok {
			b.WriteString(s)
			return jsontext.AppendQuote(nil, b.String())
		}
		if dollar, escaped := strings.CutSuffix(before, "$"); escaped {
			b.WriteString(dollar + "${")
			s = rest
			continue
		}
		path, after, ok := strings.Cut(rest, "}")
		if !ok {
			return nil, fmt.Errorf("a placeholder begins in %s and does not end; $${ stands for ${ itself", param.Cut(whole))
		}
		v, err := lookup(path)
		if err != nil {
			return nil, err
		}
		if before == "" && after == "" && b.Len() == 0 {
			if v == nil {
				return jsontext.Value("null"), nil
			}
			return v, nil
		}
		b.WriteString(before)
		b.WriteString(plainText(v))
		if b.Len() > maxBody {
			return nil, fmt.Errorf("what comes of it has more than %s", param.Size(maxBody))
		}
		s = after
	}
}

// plainText is a value within a text.
func plainText(v jsontext.Value) string {
	var s string
	switch {
	case v == nil || v.Kind() == 'n':
		return ""
	case v.Kind() == '"' && json.Unmarshal(v, &s) == nil:
		return s
	}
	return strings.ToValidUTF8(string(v), "\uFFFD")
}

// checkPath refuses placeholders of which nothing could come.
func checkPath(path string) error {
	first, rest, more := strings.Cut(path, ".")
	var err error
	switch first {
	case "id", "time", "rule", "node", "cluster", "resumed":
		if more {
			err = fmt.Errorf("%q has no parts", first)
		}
	case "alert":
		if more && rest == "" {
			err = errors.New("a key is missing behind \"alert.\"")
		}
	case "fields":
		if rest == "" {
			err = errors.New("write fields. and the name of a field, such as ${fields.proc.name}")
		}
	case "target":
		keys := []string{"namespace", "pod", "uid", "container", "node", "pid", "pidStart", "host", "resource"}
		if more && !slices.Contains(keys, rest) {
			err = errors.New(param.Unknown("part of target", rest, keys))
		}
	case "found":
		if responder, key, ok := strings.Cut(rest, "."); more && (!ok || responder == "" || key == "") {
			err = errors.New("write found. with a responder and a key of what it found, such as ${found.capture-proc.evidence}")
		}
	default:
		err = errors.New(param.Unknown("name", first, []string{"id", "time", "rule", "alert", "fields", "target", "found", "node", "cluster", "resumed"}))
	}
	if err != nil {
		return fmt.Errorf("the placeholder %s: %w", param.Cut("${"+path+"}"), err)
	}
	return nil
}

// lookup is the value that a placeholder stands for.
func (n *notice) lookup(path string) (jsontext.Value, error) {
	first, rest, more := strings.Cut(path, ".")
	switch first {
	case "alert", "fields":
		if !more {
			return jsontext.Value(n.Alert), nil
		}
		key := rest
		if first == "fields" {
			key = "output_fields"
		}
		v := member(n.Alert, key)
		if first == "fields" {
			v = member(v, rest)
		}
		return jsontext.Value(v), nil
	case "found":
		if more {
			responder, key, _ := strings.Cut(rest, ".")
			for _, f := range slices.Backward(n.Found) {
				if s, ok := f.Found[key]; ok && f.Responder == responder {
					return marshal(s)
				}
			}
			return nil, nil
		}
	}
	all, err := marshal(n)
	if err != nil {
		return nil, err
	}
	v := member(json.RawMessage(all), first)
	if more {
		v = member(v, rest)
	}
	return jsontext.Value(v), nil
}

func marshal(v any) (jsontext.Value, error) {
	b, err := json.Marshal(v)
	return jsontext.Value(b), err
}

// member is one of an object's; nil if there is none.
func member(object json.RawMessage, key string) json.RawMessage {
	var m map[string]json.RawMessage
	if json.Unmarshal(object, &m) != nil {
		return nil
	}
	return m[key]
}
