// Package alert is what Falco says: one line of its output as an [Alert], its
// [Priority], and the [Target] that it names.
//
// It is the first stop on an alert's way and knows none of the others: the pipe
// parses a line here, the broker stores it under [Alert.Subject], the rules
// match it and the responders act on its target.
//
// Nothing in an alert is to be trusted: whoever runs a process chooses its
// name, its arguments and its files, and so most of what Falco writes.
package alert

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// SourceSyscall is what an alert without a source counts as: Falco writes the
// key since 0.30, and before that it had no other source of note.
const SourceSyscall = "syscall"

// SourceAudit marks an event of Kubernetes' audit log, as Falco's plugins k8saudit and
// those for the clouds have it.
const SourceAudit = "k8s_audit"

// SourceInternal marks what Falco says of itself (event drops, metrics). It
// never starts a harmful step.
const SourceInternal = "internal"

// Alert is one alert of Falco's.
type Alert struct {
	ID       string    // 32 hexadecimal digits: the hash of the line as Falco wrote it
	Rule     string    // "" in plain text, which does not say it
	Priority Priority  //
	Source   string    // "syscall" where Falco left it out, "" in plain text
	Tags     []string  //
	Hostname string    // "" before Falco 0.33
	Time     time.Time // UTC; zero where the line has none that can be read
	Output   string    //
	Text     bool      // the line was plain text, which whoever runs a process can forge
	Raw      []byte    // the JSON object: as Falco wrote it, or made from a plain-text line

	rawFields []byte
	asked     atomic.Int32 // for single fields
	once      sync.Once
	fields    atomic.Pointer[map[string]any]
}

// Fields are the alert's output_fields: string, bool, [json.Number] (exact: no
// digit of evt.time is lost), nil, or a slice or map of these. The map is
// shared by all callers and must not be changed.
func (a *Alert) Fields() map[string]any {
	a.once.Do(func() { m := decodeFields(a.rawFields); a.fields.Store(&m) })
	return *a.fields.Load()
}

// fewFields is how many single fields are looked for one by one, which is what
// a rule's where mostly asks of an alert that it then does not match.
const fewFields = 3

// Value is one of [Alert.Fields], nil where it is not there or null.
func (a *Alert) Value(name string) any {
	if m := a.fields.Load(); m != nil {
		return (*m)[name]
	}
	if a.asked.Add(1) > fewFields {
		return a.Fields()[name]
	}
	return findField(a.rawFields, name)
}

// Field is one of the alert's fields as text, and whether it is there at all.
// null, "" and "<NA>" are how Falco says that a value is missing, and count as
// not there.
func (a *Alert) Field(name string) (string, bool) {
	var s string
	switch v := a.Value(name).(type) {
	case string:
		s = v
	case json.Number:
		s = v.String()
	case bool:
		s = "false"
		if v {
			s = "true"
		}
	}
	if s == "" || s == "<NA>" {
		return "", false
	}
	return s, true
}

// Subject is the NATS subject that the alert is published on:
// falco.<priority>.<rule>, the rule in lower case with every run of characters
// outside a-z0-9 as one "_".
func (a *Alert) Subject() string {
	return "falco." + a.Priority.lower() + "." + ruleToken(a)
}

// UnparsedSubject is where a line goes that is no alert.
const UnparsedSubject = "falco.unparsed"

func ruleToken(a *Alert) string {
	if a.Rule == "" {
		return "_text"
	}
	var b strings.Builder
	b.Grow(len(a.Rule))
	gap := false
	for i := range len(a.Rule) {
		c := a.Rule[i]
		switch {
		case c >= 'A' && c <= 'Z':
			c += 'a' - 'A'
			fallthrough
		case c >= 'a' && c <= 'z', c >= '0' && c <= '9':
			if gap && b.Len() > 0 {
				b.WriteByte('_')
			}
			gap = false
			b.WriteByte(c)
		default:
			gap = true
		}
		if b.Len() >= maxRuleToken {
			break
		}
	}
	if b.Len() == 0 {
		sum := sha256.Sum256([]byte(a.Rule))
		return "rule_" + hex.EncodeToString(sum[:4])
	}
	return b.String()
}

// maxRuleToken bounds the subject: NATS takes a control line of 4 KiB.
const maxRuleToken = 200

// IDOf is the id of an alert that Falco wrote as line: the first 16 bytes of
// its SHA-256, in hexadecimal digits. White space around the line does not
// count.
func IDOf(line []byte) string {
	sum := sha256.Sum256(bytes.TrimSpace(line))
	return hex.EncodeToString(sum[:16])
}

// Distrust marks an alert as one that whoever runs a process may have forged,
// as [Alert.Text] says of those that came as text. Raw says so too from then
// on; the id stays that of the line.
func (a *Alert) Distrust() {
	if a.Text {
		return
	}
	a.Text = true
	dec := decoderOf(a.Raw)
	defer release(dec)
	marked := []byte(`{"` + textKey + `":true`)
	if _, err := dec.ReadToken(); err != nil { // the '{'
		return
	}
	for dec.PeekKind() != '}' {
		key, err := dec.ReadValue()
		if err != nil {
			return
		}
		own := keyName(key) == textKey
		if !own {
			marked = append(append(append(marked, ','), key...), ':')
		}
		value, err := dec.ReadValue()
		if err != nil {
			return
		}
		if !own {
			marked = append(marked, value...)
		}
	}
	a.Raw = append(marked, '}')
}
