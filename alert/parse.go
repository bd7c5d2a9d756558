package alert

import (
	"bytes"
	stdjson "encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"sync"
	"time"
	"unicode/utf8"

	"github.com/go-json-experiment/json/jsontext"
)

// ErrNoAlert is what [Parse]'s errors wrap: the line is no alert.
var ErrNoAlert = errors.New("no alert")

// Parse reads one line of Falco's output, JSON or plain text. Its error says
// what is wrong with the line and wraps [ErrNoAlert]; it never panics, and the
// line, of which it keeps no part, may hold anything.
func Parse(line []byte) (*Alert, error) {
	line = bytes.TrimSpace(line)
	if len(line) == 0 {
		return nil, fmt.Errorf("%w: the line is empty", ErrNoAlert)
	}
	if line[0] == '{' {
		return parseJSON(line)
	}
	return parseText(line, time.Now())
}

// decoders are kept between lines: at tens of thousands a second they are most
// of what parsing would allocate. A decoder reads a bytes.Buffer in place,
// without copying it.
var decoders = sync.Pool{New: func() any { return &decoder{words: map[string]string{}} }}

// decoder also remembers the short strings that most alerts have in common: the
// name of the rule, the tags, the host. Kept once, they are neither allocated
// for each alert nor looked at by the garbage collector for each that waits.
type decoder struct {
	jsontext.Decoder
	words map[string]string
}

// What is remembered: words of at most wordMost bytes, wordsMost of them.
const (
	wordMost  = 64
	wordsMost = 512
)

func decoderOf(raw []byte) *decoder {
	dec := decoders.Get().(*decoder)
	dec.Reset(bytes.NewBuffer(raw), jsontext.AllowInvalidUTF8(true))
	return dec
}

// word is the string that stands quoted in v, if it is short and plain.
func (dec *decoder) word(v jsontext.Value) (string, bool) {
	if len(v) < 2 || len(v) > wordMost+2 {
		return "", false
	}
	v = v[1 : len(v)-1]
	for _, c := range v {
		if c < ' ' || c > '~' || c == '\\' {
			return "", false
		}
	}
	if w, ok := dec.words[string(v)]; ok {
		return w, true
	}
	if len(dec.words) >= wordsMost {
		clear(dec.words)
	}
	w := string(v)
	dec.words[w] = w
	return w, true
}

type nothing struct{}

func (nothing) Read([]byte) (int, error) { return 0, io.EOF }

// release keeps the decoder for the next line, without the line that it read.
func release(dec *decoder) {
	dec.Reset(nothing{})
	decoders.Put(dec)
}

func parseJSON(line []byte) (*Alert, error) {
	raw := bytes.Clone(line)
	a := &Alert{ID: IDOf(raw), Raw: raw, Source: SourceSyscall}
	dec := decoderOf(raw)
	defer release(dec)
	hasPriority, err := a.decode(dec)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrNoAlert, err)
	}
	if rest := bytes.TrimSpace(raw[dec.InputOffset():]); len(rest) > 0 {
		return nil, fmt.Errorf("%w: %q stands behind the JSON object", ErrNoAlert, cut(string(rest), 40))
	}
	switch {
	case !hasPriority:
		return nil, fmt.Errorf(`%w: the JSON object has no "priority"`, ErrNoAlert)
	case a.Rule == "" && !a.Text:
		return nil, fmt.Errorf(`%w: the JSON object has no "rule"`, ErrNoAlert)
	}
	return a, nil
}

// decode reads the object's keys into a and reports whether there was a
// priority. Keys that an alert does not have (Falcosidekick adds some) are
// passed over.
func (a *Alert) decode(dec *decoder) (hasPriority bool, err error) {
	if _, err := dec.ReadToken(); err != nil { // the '{' that parseJSON saw
		return false, err
	}
	for dec.PeekKind() != '}' {
		key, err := dec.ReadValue()
		if err != nil {
			return false, err
		}
		switch name := keyName(key); name {
		case "rule":
			a.Rule, err = readWord(dec, name)
		case "output":
			a.Output, err = readString(dec, name)
		case "hostname":
			a.Hostname, err = readWord(dec, name)
		case "source":
			var s string
			if s, err = readWord(dec, name); s != "" && s != SourceSyscall {
				a.Source = s
			}
		case "time":
			var s string
			if s, err = readString(dec, name); err == nil {
				// What can't be read is left zero: such an alert is stored
				// and told, but too old to be acted on.
				if t, perr := time.Parse(time.RFC3339Nano, s); perr == nil {
					a.Time = t.UTC()
				}
			}
		case "priority":
			var s string
			if s, err = readWord(dec, name); err == nil && s != "" {
				a.Priority, err = ParsePriority(s)
				hasPriority = true
			}
		case "tags":
			a.Tags, err = readStrings(dec)
		case "output_fields":
			switch k := dec.PeekKind(); k {
			case '{':
				var v jsontext.Value
				if v, err = dec.ReadValue(); err == nil {
					end := dec.InputOffset()
					a.rawFields = a.Raw[end-int64(len(v)) : end : end]
				}
			case 'n':
				err = dec.SkipValue()
			default:
				err = wrongKind(dec, name, "an object")
			}
		case textKey:
			k := dec.PeekKind()
			a.Text = k == 't'
			if err = dec.SkipValue(); a.Text {
				a.Source = ""
			}
		default:
			err = dec.SkipValue()
		}
		if err != nil {
			return false, err
		}
	}
	_, err = dec.ReadToken()
	return hasPriority, err
}

// keyName is the name that stands quoted in key; "" for one that no alert has,
// so that nothing need be allocated.
func keyName(key jsontext.Value) string {
	if bytes.IndexByte(key, '\\') >= 0 {
		name, err := jsontext.AppendUnquote(nil, key)
		if err != nil {
			return ""
		}
		key = slices.Concat(jsontext.Value{'"'}, name, jsontext.Value{'"'})
	}
	switch string(key) {
	case `"rule"`:
		return "rule"
	case `"output"`:
		return "output"
	case `"hostname"`:
		return "hostname"
	case `"source"`:
		return "source"
	case `"time"`:
		return "time"
	case `"priority"`:
		return "priority"
	case `"tags"`:
		return "tags"
	case `"output_fields"`:
		return "output_fields"
	case `"` + textKey + `"`:
		return textKey
	}
	return ""
}

func wrongKind(dec *decoder, key, want string) error {
	k := dec.PeekKind()
	if err := dec.SkipValue(); err != nil {
		return err
	}
	return fmt.Errorf("%q is %s, where %s is expected", key, kindName(k), want)
}

func kindName(k jsontext.Kind) string {
	switch k {
	case 'n':
		return "null"
	case 't', 'f':
		return "a boolean"
	case '"':
		return "a string"
	case '0':
		return "a number"
	case '{':
		return "an object"
	case '[':
		return "an array"
	}
	return "not JSON"
}

// readString reads a string, or null as "".
func readString(dec *decoder, key string) (string, error) {
	switch dec.PeekKind() {
	case '"':
		t, err := dec.ReadToken()
		if err != nil {
			return "", err
		}
		return t.String(), nil
	case 'n':
		return "", dec.SkipValue()
	}
	return "", wrongKind(dec, key, "a string")
}

// readWord is readString for what is the same in many alerts.
func readWord(dec *decoder, key string) (string, error) {
	if dec.PeekKind() != '"' {
		return readString(dec, key)
	}
	v, err := dec.ReadValue()
	if err != nil {
		return "", err
	}
	if w, ok := dec.word(v); ok {
		return w, nil
	}
	s, err := jsontext.AppendUnquote(nil, v)
	if err != nil && !utf8.Valid(v) {
		err = nil // bytes that are no text stand as U+FFFD
	}
	return string(s), err
}

func readStrings(dec *decoder) ([]string, error) {
	switch dec.PeekKind() {
	case 'n':
		return nil, dec.SkipValue()
	case '[':
	default:
		return nil, wrongKind(dec, "tags", "an array")
	}
	if _, err := dec.ReadToken(); err != nil {
		return nil, err
	}
	out := make([]string, 0, 4)
	for dec.PeekKind() != ']' {
		s, err := readWord(dec, "tags")
		if err != nil {
			return nil, err
		}
		out = append(out, s)
	}
	_, err := dec.ReadToken()
	return out, err
}

// decodeFields decodes what parseJSON found valid. It is on every alert's way to
// the rules, and three times as fast as encoding/json.
func decodeFields(raw []byte) map[string]any {
	if len(raw) == 0 {
		return nil
	}
	dec := decoderOf(raw)
	defer release(dec)
	v, err := decodeValue(dec)
	if err != nil {
		return nil
	}
	m, _ := v.(map[string]any)
	return m
}

// findField decodes one of the fields, without the others.
func findField(raw []byte, name string) any {
	if len(raw) == 0 {
		return nil
	}
	dec := decoderOf(raw)
	defer release(dec)
	if _, err := dec.ReadToken(); err != nil {
		return nil
	}
	for dec.PeekKind() == '"' {
		key, err := dec.ReadValue()
		if err != nil {
			return nil
		}
		if !isName(key, name) {
			if dec.SkipValue() != nil {
				return nil
			}
			continue
		}
		v, err := decodeValue(dec)
		if err != nil {
			return nil
		}
		return v
	}
	return nil
}

// isName reports whether key is name, quoted.
func isName(key jsontext.Value, name string) bool {
	if bytes.IndexByte(key, '\\') < 0 && utf8.Valid(key) {
		return len(key) == len(name)+2 && string(key[1:len(key)-1]) == name
	}
	plain, _ := jsontext.AppendUnquote(nil, key)
	return string(plain) == name
}

func decodeValue(dec *decoder) (any, error) {
	t, err := dec.ReadToken()
	if err != nil {
		return nil, err
	}
	switch t.Kind() {
	case '"':
		return t.String(), nil
	case '0':
		return stdjson.Number(t.String()), nil
	case 't', 'f':
		return t.Bool(), nil
	case '[':
		list := []any{}
		for dec.PeekKind() != ']' {
			v, err := decodeValue(dec)
			if err != nil {
				return nil, err
			}
			list = append(list, v)
		}
		_, err := dec.ReadToken()
		return list, err
	case '{':
		m := make(map[string]any, 24)
		for dec.PeekKind() != '}' {
			key, err := dec.ReadToken()
			if err != nil {
				return nil, err
			}
			name := key.String() // before the next token takes its place
			if m[name], err = decodeValue(dec); err != nil {
				return nil, err
			}
		}
		_, err := dec.ReadToken()
		return m, err
	}
	return nil, nil
}

// textKey marks the JSON that stands for a plain-text line.
const textKey = "text"

// parseText reads "HH:MM:SS.nnnnnnnnn: Priority message", or the same with a
// whole date in place of the time. A bare time is local and has no date: it is
// the latest moment of that time of day that is not after now, or only by as
// much as clocks differ.
func parseText(line []byte, now time.Time) (*Alert, error) {
	if !utf8.Valid(line) {
		line = bytes.ToValidUTF8(line, []byte("\uFFFD"))
	}
	s := string(line)
	stamp, rest, ok := strings.Cut(s, ": ")
	if !ok {
		return nil, fmt.Errorf("%w: neither a JSON object nor a plain-text alert (time, colon, priority, message)", ErrNoAlert)
	}
	t, err := textTime(stamp, now)
	if err != nil {
		return nil, fmt.Errorf("%w: neither a JSON object nor a plain-text alert: %w", ErrNoAlert, err)
	}
	word, message, ok := strings.Cut(rest, " ")
	if !ok {
		return nil, fmt.Errorf("%w: the plain-text line has no message", ErrNoAlert)
	}
	p, err := ParsePriority(word)
	if err != nil {
		return nil, fmt.Errorf("%w: plain text: %w", ErrNoAlert, err)
	}
	a := &Alert{ID: IDOf(line), Priority: p, Time: t, Output: message, Text: true}
	a.Raw, err = stdjson.Marshal(struct {
		Output   string    `json:"output"`
		Priority string    `json:"priority"`
		Text     bool      `json:"text"`
		Time     time.Time `json:"time"`
	}{message, p.lower(), true, t})
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrNoAlert, err)
	}
	return a, nil
}

func textTime(s string, now time.Time) (time.Time, error) {
	if t, err := time.Parse(time.RFC3339Nano, s); err == nil {
		return t.UTC(), nil
	}
	if t, err := time.Parse("2006-01-02T15:04:05.999999999-0700", s); err == nil { // Falco's time_format_iso_8601
		return t.UTC(), nil
	}
	clock, err := time.Parse("15:04:05.999999999", s)
	if err != nil {
		return time.Time{}, fmt.Errorf("%q is no time", cut(s, 40))
	}
	y, m, d := now.Date()
	t := time.Date(y, m, d, clock.Hour(), clock.Minute(), clock.Second(), clock.Nanosecond(), now.Location())
	if t.After(now.Add(time.Minute)) {
		t = t.AddDate(0, 0, -1)
	}
	return t.UTC(), nil
}

// cut shortens s to at most n bytes for a message to a person.
func cut(s string, n int) string {
	if len(s) <= n {
		return s
	}
	for n > 0 && !utf8.RuneStart(s[n]) {
		n--
	}
	return s[:n] + "…"
}
