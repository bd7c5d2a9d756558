package rules

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"gopkg.in/yaml.v3"

	"stoop/param"
)

// When holds a rule back until several alerts that it matches agree on one
// target. What counts them is not here: see the router.
type When struct {
	Count  int           // so many alerts; 0: one of each of Rules
	Rules  []string      // names of Falco's rules, as written; globs
	Within time.Duration // from the first of the alerts to the last
	By     By            // what they have to have in common
	// ID is of the rule's name and of all that says which alerts count and how:
	// what was counted under another one means nothing here.
	ID string

	rules []pattern
}

// By is what alerts have in common that agree.
type By string

// What alerts can have in common.
const (
	ByPod       By = "pod"
	ByContainer By = "container"
	ByNode      By = "node"
	ByNamespace By = "namespace"
	ByUser      By = "user"
)

func allBy() []string {
	return []string{string(ByPod), string(ByContainer), string(ByNode), string(ByNamespace), string(ByUser)}
}

const (
	// MaxCount and MaxTogether bound what is kept for one target.
	MaxCount    = 100
	MaxTogether = 8 // rules that are named
	// maxWhens bounds how many rules of a file may count.
	maxWhens  = 32
	minWithin = time.Second
	maxWithin = 24 * time.Hour
)

// Needed is how many alerts have to agree.
func (w *When) Needed() int {
	if w.Count > 0 {
		return w.Count
	}
	return len(w.rules)
}

// Which is which of the named rules an alert's rule is, a bit for each, and 0 if
// it is none. With a count, every rule is the first.
func (w *When) Which(rule string) uint8 {
	if w.Count > 0 {
		return 1
	}
	var which uint8
	for i := range w.rules {
		if w.rules[i].match(rule) {
			which |= 1 << i
		}
	}
	return which
}

// when reads what a rule waits for; nil if something is wrong with it.
func (p *parser) when(n, key *yaml.Node) *When {
	const such = `such as {count: 3, within: 60s, by: pod} or {rules: [A, B], within: 5m, by: pod}`
	switch v := param.Resolve(n); {
	case param.IsNull(n), v.Kind == yaml.MappingNode && len(v.Content) == 0:
		p.bad(key, "there is nothing in \"when\": write what has to come together, %s", such)
		return nil
	case v.Kind != yaml.MappingNode:
		p.bad(n, "\"when\" is a mapping, %s, not %s", such, param.What(n))
		return nil
	}
	before := len(p.problems)
	w := &When{}
	var together *yaml.Node
	seen := p.keys(n, []string{"count", "rules", "within", "by"}, func(name string, kn, v *yaml.Node) {
		switch name {
		case "count":
			w.Count = p.countOf(v, kn)
		case "rules":
			together = kn
			p.together(w, v, kn)
		case "within":
			w.Within = p.within(v, kn)
		case "by":
			if s, ok := p.scalar(v, kn); ok && !slices.Contains(allBy(), s) {
				p.bad(v, "%s", param.Unknown("by", s, allBy()))
			} else {
				w.By = By(s)
			}
		}
	})
	if len(p.problems) == before {
		switch {
		case seen["count"] && seen["rules"]:
			p.bad(together, "\"count\" and \"rules\" exclude each other: with rules, one alert of each of them is waited for")
		case !seen["count"] && !seen["rules"]:
			p.bad(n, "this when counts nothing: give it count or rules, %s", such)
		}
		if !seen["within"] {
			p.bad(n, "this when has no within: in which time the alerts have to come together, such as within: 60s")
		}
		if !seen["by"] {
			p.bad(n, "this when has no by: what the alerts have in common. There are: %s", strings.Join(allBy(), ", "))
		}
	}
	if len(p.problems) > before {
		return nil
	}
	return w
}

func (p *parser) countOf(n, key *yaml.Node) int {
	s, ok := p.scalar(n, key)
	if !ok {
		return 0
	}
	c, err := strconv.Atoi(s)
	if v := param.Resolve(n); err != nil || v.ShortTag() != "!!int" || c < 2 || c > MaxCount {
		p.bad(n, "\"count\" is a number from 2 to %d, not %s", MaxCount, param.What(n))
		return 0
	}
	return c
}

func (p *parser) together(w *When, n, key *yaml.Node) {
	const such = "such as [Terminal shell in container, Contact K8S API Server From Container]"
	first := map[string]bool{}
	for _, item := range p.list(n, key, "rules", such) {
		p.value(item, "rules", func(n *yaml.Node, s string) {
			switch {
			case strings.TrimSpace(s) == "":
				p.bad(n, "an entry of \"rules\" is empty")
			case first[s]:
				p.bad(n, "%s stands here twice: alerts of one rule are counted by {count: 2}", param.Cut(s))
			}
			first[s] = true
			w.Rules = append(w.Rules, s)
			w.rules = append(w.rules, newPattern(s))
		})
	}
	if l := param.Resolve(n); l.Kind == yaml.SequenceNode && (len(l.Content) == 1 || len(l.Content) > MaxTogether) {
		p.bad(n, "\"rules\" has from 2 to %d entries, not %d", MaxTogether, len(l.Content))
	}
}

func (p *parser) within(n, key *yaml.Node) time.Duration {
	s, ok := p.scalar(n, key)
	if !ok {
		return 0
	}
	var d param.Duration
	if err := d.UnmarshalText([]byte(s)); err != nil {
		p.bad(n, "\"within\": %v", err)
		return 0
	}
	if t := time.Duration(d); t < minWithin || t > maxWithin {
		p.bad(n, "\"within\" is from %s to %s, not %s", param.Duration(minWithin), param.Duration(maxWithin), param.Cut(s))
	}
	return time.Duration(d)
}

// whenDoubts warns of a when that nothing can fulfil.
func (p *parser) whenDoubts(r *Rule, at *yaml.Node) {
	entry := func(i int) *yaml.Node {
		found := at
		param.Keys(at, func(key, value *yaml.Node) {
			if param.Resolve(key).Value == "rules" {
				found = param.Resolve(value).Content[i]
			}
		})
		return found
	}
	for i, named := range r.When.rules {
		switch {
		case !reaches(named, r.match.rule):
			p.warn(entry(i), "match lets no alert of this rule through, so nothing ever follows: its rule is %s", r.match.rule)
		case spares(r.except, named):
			p.warn(entry(i), "except spares every alert of this rule, so nothing ever follows")
		}
	}
	for _, f := range r.match.fields {
		onlyHost := f.name == "container.id" && !slices.ContainsFunc(f.values.all, func(v string) bool { return v != "host" })
		if onlyHost && (r.When.By == ByPod || r.When.By == ByContainer || r.When.By == ByNamespace) {
			p.warn(at, "an alert of the host names no %s, so nothing ever follows: write by: node, or by: user", r.When.By)
		}
	}
	if s := r.match.source; s != nil && r.When.By == ByContainer && !slices.ContainsFunc(s.all, func(v string) bool { return v != "k8s_audit" }) {
		p.warn(at, "an audit event names no container, so nothing ever follows: write by: pod, or by: user")
	}
}

// reaches reports whether an alert of a named rule may be one of those that match
// asks for, as far as that can be told of globs.
func reaches(named pattern, asked *patterns) bool {
	if asked == nil {
		return true
	}
	if !named.glob() {
		return asked.match(named.text)
	}
	return slices.ContainsFunc(asked.all, func(v string) bool {
		p := newPattern(v)
		return p.glob() || named.match(v)
	})
}

// spares reports whether except leaves alone all alerts of a named rule.
func spares(except *conditions, named pattern) bool {
	return except != nil && except.rule != nil && !named.glob() && except.rule.match(named.text) &&
		except.priorities == 0 && except.source == nil && except.hostname == nil && except.tags == nil && len(except.fields) == 0
}

// meaning is a hash of what some keys of a rule say. Comments, the order of keys
// and of values of which one is enough, and how something is written in YAML do
// not count.
func meaning(n *yaml.Node, keys ...string) string {
	said := map[string]any{}
	param.Keys(n, func(key, value *yaml.Node) {
		if name := param.Resolve(key).Value; slices.Contains(keys, name) {
			said[name] = plainly(value, name != "actions")
		}
	})
	data, err := json.Marshal(said)
	if err != nil { // there is nothing in it that JSON can't hold
		panic(fmt.Sprintf("the meaning of a rule: %v", err))
	}
	sum := sha256.Sum256(data)
	return hex.EncodeToString(sum[:8])
}

// plainly is a YAML value without all that is only writing. anyOrder: the order
// of a list does not count, and one value is a list of it.
func plainly(n *yaml.Node, anyOrder bool) any {
	switch v := param.Resolve(n); v.Kind {
	case yaml.MappingNode:
		m := map[string]any{}
		param.Keys(v, func(key, value *yaml.Node) { m[param.Resolve(key).Value] = plainly(value, anyOrder) })
		return m
	case yaml.SequenceNode:
		list := make([]any, 0, len(v.Content))
		for _, item := range v.Content {
			list = append(list, plainly(item, anyOrder))
		}
		if anyOrder {
			slices.SortFunc(list, func(a, b any) int { return strings.Compare(fmt.Sprint(a), fmt.Sprint(b)) })
			list = slices.CompactFunc(list, func(a, b any) bool { return fmt.Sprint(a) == fmt.Sprint(b) })
			if len(list) == 1 {
				return list[0]
			}
		}
		return list
	default:
		if param.IsNull(v) {
			return nil
		}
		return strings.TrimSpace(v.Value)
	}
}
