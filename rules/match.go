package rules

import (
	"encoding/json"
	"fmt"
	"strings"
	"unicode"

	"stoop/alert"
)

// conditions are what match and except hold: every key that is there must
// hold, by any of its values.
type conditions struct {
	priorities uint8 // a bit for each; 0: the key is not there
	source     *patterns
	rule       *patterns
	hostname   *patterns
	tags       *patterns
	fields     []fieldCondition

	priorityWords []string // as written
}

type fieldCondition struct {
	name   string
	values *patterns
}

// The keys of match and except.
const (
	keyRule     = "rule"
	keyPriority = "priority"
	keySource   = "source"
	keyTags     = "tags"
	keyHostname = "hostname"
	keyFields   = "fields"
)

// quantifier says what of a field that holds a list must match: in match any
// entry, in except every one, so that nobody is spared for one good image out
// of two.
type quantifier bool

const (
	anyEntry   quantifier = false
	everyEntry quantifier = true
)

// fails is the key that does not hold, or "" if all do. For fields it is
// "fields" and the index says which. The cheap ones are asked first, and the
// alert's fields, which have to be decoded, last.
func (c *conditions) fails(a *alert.Alert, q quantifier) (key string, field int) {
	switch {
	case c.priorities != 0 && c.priorities&(1<<a.Priority) == 0:
		return keyPriority, 0
	case c.source != nil && !c.source.match(a.Source):
		return keySource, 0
	case c.rule != nil && !c.rule.match(a.Rule):
		return keyRule, 0
	case c.hostname != nil && !c.hostname.match(a.Hostname):
		return keyHostname, 0
	case c.tags != nil && !matchTags(c.tags, a.Tags):
		return keyTags, 0
	}
	for i := range c.fields {
		f := &c.fields[i]
		if !matchField(a, f.name, f.values, q) {
			return keyFields, i
		}
	}
	return "", 0
}

func matchTags(ps *patterns, tags []string) bool {
	for _, t := range tags {
		if ps.match(t) {
			return true
		}
	}
	return false
}

func matchField(a *alert.Alert, name string, ps *patterns, q quantifier) bool {
	if s, ok := a.Field(name); ok {
		return ps.match(s)
	}
	list, ok := a.Value(name).([]any)
	if !ok || len(list) == 0 {
		return false
	}
	for _, v := range list {
		s, ok := entry(v)
		if matched := ok && ps.match(s); matched != bool(q) {
			return matched
		}
	}
	return bool(q)
}

// entry is an entry of a list as text, as [alert.Alert.Field] gives a value.
func entry(v any) (string, bool) {
	switch v := v.(type) {
	case string:
		return v, v != "" && v != "<NA>"
	case json.Number:
		return v.String(), true
	case bool:
		return fmt.Sprint(v), true
	}
	return "", false
}

// index finds the rules that may match an alert without asking all of them: by
// the rule's name where a rule of ours lists names, else by priority.
type index struct {
	named map[string][]*Rule // rules that list Falco's rules by name, without globs
	open  [8][]*Rule         // all others, by the alert's priority
}

func newIndex(rules []*Rule) index {
	x := index{named: map[string][]*Rule{}}
	for _, r := range rules {
		if names := r.match.rule; names != nil && names.literal() {
			for _, name := range names.all {
				if list := x.named[name]; len(list) == 0 || list[len(list)-1] != r {
					x.named[name] = append(list, r)
				}
			}
			continue
		}
		for p := range x.open {
			if r.match.priorities == 0 || r.match.priorities&(1<<p) != 0 {
				x.open[p] = append(x.open[p], r)
			}
		}
	}
	return x
}

// Match is the rules that match the alert, in the order of the file; nil if
// none does.
func (s *Set) Match(a *alert.Alert) []*Rule {
	if int(a.Priority) >= len(s.index.open) {
		return nil
	}
	named, open := s.index.named[a.Rule], s.index.open[a.Priority]
	var matched []*Rule
	for len(named) > 0 || len(open) > 0 {
		var r *Rule
		if len(open) == 0 || len(named) > 0 && named[0].position < open[0].position {
			r, named = named[0], named[1:]
		} else {
			r, open = open[0], open[1:]
		}
		if r.matches(a) {
			matched = append(matched, r)
		}
	}
	return matched
}

func (r *Rule) matches(a *alert.Alert) bool {
	if key, _ := r.match.fails(a, anyEntry); key != "" {
		return false
	}
	if r.except != nil {
		if key, _ := r.except.fails(a, everyEntry); key == "" {
			return false
		}
	}
	if r.where != nil {
		ok, err := r.where.holds(a)
		return ok && err == nil
	}
	return true
}

// Why says in a few words why the rule does not match the alert, and "" if it
// does.
func (r *Rule) Why(a *alert.Alert) string {
	why, _ := r.why(a)
	return why
}

// why also tells how near the rule came: the higher, the nearer.
func (r *Rule) why(a *alert.Alert) (why string, near int) {
	key, i := r.match.fails(a, anyEntry)
	switch key {
	case "":
	case keyPriority:
		if r.match.rule != nil && r.match.rule.match(a.Rule) {
			near = 2
		}
		return fmt.Sprintf("priority is %s, not %s", a.Priority, priorityWords(r.match.priorityWords)), near
	case keySource:
		return fmt.Sprintf("source is %s, not %s", shown(a.Source), r.match.source), 0
	case keyRule:
		return fmt.Sprintf("rule is %s, not %s", shown(a.Rule), r.match.rule), 0
	case keyHostname:
		return fmt.Sprintf("hostname is %s, not %s", shown(a.Hostname), r.match.hostname), 3
	case keyTags:
		return fmt.Sprintf("tags are %s, not %s", shown(strings.Join(a.Tags, ", ")), r.match.tags), 2
	case keyFields:
		f := r.match.fields[i]
		v, _ := a.Field(f.name)
		return fmt.Sprintf("field %s is %s, not %s", f.name, shown(v), f.values), 4
	}
	if r.except != nil {
		if key, _ := r.except.fails(a, everyEntry); key == "" {
			return "spared by except", 5
		}
	}
	if r.where != nil {
		switch ok, err := r.where.holds(a); {
		case err != nil:
			return "where: " + printable(err.Error()), 5
		case !ok:
			return "where is false", 5
		}
	}
	return "", 6
}

// Explain is the rules that match the alert or, if none does, why not, in a few
// words: what kept the rule away that came nearest.
func (s *Set) Explain(a *alert.Alert) (matched []*Rule, why string) {
	if matched = s.Match(a); len(matched) > 0 {
		return matched, ""
	}
	nearest, most := "", -1
	for _, r := range s.Rules {
		if w, near := r.why(a); near > most {
			nearest, most = r.Name+": "+w, near
		}
	}
	switch {
	case a.Source == alert.SourceInternal:
		return nil, "no rule matched: Falco speaks of itself here"
	case most <= 0:
		return nil, fmt.Sprintf("no rule matched: none is about %s of priority %s", shown(a.Rule), a.Priority)
	}
	return nil, "no rule matched; nearest " + nearest
}

// shown is a value of an alert in a sentence: quoted, so that nothing in it
// reaches a terminal, and cut.
func shown(s string) string {
	const most = 60
	switch r := []rune(s); {
	case s == "":
		return "not there"
	case len(r) > most:
		s = string(r[:most]) + "…"
	}
	return fmt.Sprintf("%q", s)
}

// printable is a message of CEL's, which may repeat what an alert holds, fit for
// a terminal.
func printable(s string) string {
	const most = 120
	r := []rune(s)
	if len(r) > most {
		r = append(r[:most], '…')
	}
	for i, c := range r {
		if !unicode.IsPrint(c) {
			r[i] = '?'
		}
	}
	return string(r)
}

// oneOf lists values in a sentence.
func oneOf(values []string) string {
	const most = 3
	quoted := make([]string, 0, most)
	for _, v := range values[:min(most, len(values))] {
		quoted = append(quoted, fmt.Sprintf("%q", v))
	}
	if more := len(values) - most; more > 0 {
		return fmt.Sprintf("%s or %d more", strings.Join(quoted, ", "), more)
	}
	if n := len(quoted) - 1; n > 0 {
		return strings.Join(quoted[:n], ", ") + " or " + quoted[n]
	}
	return strings.Join(quoted, "")
}

func priorityWords(words []string) string {
	var out []string
	for _, w := range words {
		if exact, ok := strings.CutPrefix(w, "="); ok {
			out = append(out, strings.ToLower(strings.TrimSpace(exact))+" exactly")
		} else {
			out = append(out, strings.ToLower(w)+" or above")
		}
	}
	return strings.Join(out, " or ")
}
