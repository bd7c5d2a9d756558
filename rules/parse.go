package rules

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"regexp"
	"slices"
	"strings"
	"unicode/utf8"

	"cel.dev/cel-go/cel"
	"gopkg.in/yaml.v3"

	"stoop/alert"
	"stoop/broker"
	"stoop/param"
)

// Parse reads rules. file is how messages call the source. If anything is
// wrong the error is [Problems]: all of it.
func Parse(file string, src []byte, c Catalog) (*Set, error) {
	p := &parser{file: file, catalog: c}
	set := &Set{File: file, Mode: broker.Audit, Hash: hashOf(src)}
	if root := p.document(src); root != nil {
		p.set(set, root)
	}
	if len(p.problems) > 0 {
		return nil, Problems(tidy(p.problems))
	}
	set.Warnings = tidy(p.warnings)
	set.index = newIndex(set.Rules)
	return set, nil
}

func hashOf(src []byte) string {
	sum := sha256.Sum256(src)
	return hex.EncodeToString(sum[:])[:12]
}

type parser struct {
	file     string
	catalog  Catalog
	lines    []string
	env      *cel.Env // made for the first where
	problems []Problem
	warnings []Problem
}

func (p *parser) problem(line, column int, message string) Problem {
	pr := Problem{File: p.file, Line: line, Column: column, Message: message}
	if line >= 1 && line <= len(p.lines) {
		pr.source = p.lines[line-1]
	}
	return pr
}

func (p *parser) badAt(line, column int, format string, args ...any) {
	p.problems = append(p.problems, p.problem(line, column, fmt.Sprintf(format, args...)))
}

func (p *parser) bad(n *yaml.Node, format string, args ...any) {
	p.badAt(n.Line, n.Column, format, args...)
}

func (p *parser) warn(n *yaml.Node, format string, args ...any) {
	p.warnings = append(p.warnings, p.problem(n.Line, n.Column, fmt.Sprintf(format, args...)))
}

// params takes over what param found wrong below n. who goes before each
// message.
func (p *parser) params(n *yaml.Node, who string, found []param.Problem) {
	for _, f := range found {
		at := f.Node
		if at == nil || at.Line == 0 {
			at = n
		}
		pr := p.problem(at.Line, at.Column, who+f.Message)
		pr.secret = f.Secret
		p.problems = append(p.problems, pr)
	}
}

// document is the mapping that the source holds, nil if there is none or
// it is no YAML at all.
func (p *parser) document(src []byte) *yaml.Node {
	p.lines = strings.Split(string(bytes.ToValidUTF8(src[:min(len(src), maxFile)], []byte("\uFFFD"))), "\n")
	if len(src) > maxFile {
		p.badAt(1, 1, "the file is larger than %d KiB", maxFile>>10)
		return nil
	}
	if !utf8.Valid(src) {
		p.notUTF8(src)
		return nil
	}
	src = bytes.TrimPrefix(src, []byte("\uFEFF"))
	p.lines[0] = strings.TrimPrefix(p.lines[0], "\uFEFF")
	root, next, err := decode(src)
	switch {
	case err != nil:
		p.problems = append(p.problems, p.syntax(src, err))
		return nil
	case root == nil || param.IsNull(root):
		p.badAt(1, 1, "there is nothing in this file: it needs at least one rule under \"rules:\"")
		return nil
	case next != nil:
		p.badAt(next.Line, next.Column, "a second document begins here: put all rules into the first, and take away the \"---\"")
		return nil
	}
	if n, ok := size(root, map[*yaml.Node]int{}, maxNodes); !ok {
		p.bad(n, "the aliases below this, each written out, make more than %d values", maxNodes)
		return nil
	}
	return root
}

func (p *parser) notUTF8(src []byte) {
	valid := 0
	for valid < len(src) {
		r, n := utf8.DecodeRune(src[valid:])
		if r == utf8.RuneError && n == 1 {
			break
		}
		valid += n
	}
	line := bytes.Count(src[:valid], []byte("\n"))
	start := bytes.LastIndexByte(src[:valid], '\n') + 1
	p.badAt(line+1, utf8.RuneCount(src[start:valid])+1, "the byte 0x%02x here is not UTF-8: save the file as UTF-8", src[valid])
}

// size counts the nodes below n as if each alias were written out, and reports
// the node at which there are too many, or which stands within itself.
func size(n *yaml.Node, known map[*yaml.Node]int, most int) (*yaml.Node, bool) {
	const counting = -1
	if n.Kind == yaml.AliasNode {
		if known[n.Alias] == counting {
			return n, false
		}
		at, ok := size(n.Alias, known, most)
		if !ok && at == n.Alias {
			at = n
		}
		known[n] = known[n.Alias]
		return at, ok
	}
	if known[n] > 0 {
		return nil, true
	}
	known[n] = counting
	total := 1
	for _, child := range n.Content {
		if at, ok := size(child, known, most); !ok {
			return at, false
		}
		if total += known[child]; total > most {
			return n, false
		}
	}
	known[n] = total
	return nil, true
}

func (p *parser) set(set *Set, root *yaml.Node) {
	if param.Resolve(root).Kind != yaml.MappingNode {
		p.bad(root, "a mapping with the key \"rules\" is expected here, not %s", param.What(root))
		return
	}
	found := false
	p.keys(root, []string{"mode", "rules"}, func(key string, kn, v *yaml.Node) {
		switch key {
		case "mode":
			set.Mode = p.mode(v, kn)
		case "rules":
			found = true
			for _, n := range p.list(v, kn, "rules", "a rule begins with \"- name:\"") {
				if len(set.Rules) == maxRules {
					p.bad(n, "there are more than %d rules", maxRules)
					break
				}
				r := p.rule(n)
				r.position = len(set.Rules)
				set.Rules = append(set.Rules, r)
			}
		}
	})
	if !found {
		p.bad(root, "the key \"rules\" is missing: it holds the list of rules")
	}
	p.finish(set)
}

// finish does what needs all of the file: the modes and the names.
func (p *parser) finish(set *Set) {
	lines := map[string]int{}
	whens := 0
	for _, r := range set.Rules {
		if n := r.nameNode; n != nil {
			if first := lines[r.Name]; first != 0 {
				p.bad(n, "there is already a rule with the name %q, in line %d", r.Name, first)
			} else {
				lines[r.Name] = n.Line
			}
		}
		if r.Mode == "" {
			r.Mode = set.Mode
		}
		r.nameNode = nil
		if r.When != nil {
			if whens++; whens > maxWhens {
				p.bad(r.whenNode, "there are more than %d rules with a when", maxWhens)
			}
			r.whenNode = nil
		}
	}
}

// rule reads one rule. What is wrong with it is reported and left out, so that
// the rest of it is checked as well.
func (p *parser) rule(n *yaml.Node) *Rule {
	r := &Rule{}
	if param.Resolve(n).Kind != yaml.MappingNode {
		p.bad(n, "a rule is a mapping with the keys name, match and actions, not %s", param.What(n))
		return r
	}
	var except *yaml.Node
	onFailure := broker.Continue
	var actions []*yaml.Node
	known := []string{"name", "description", "mode", "match", "except", "where", "when", "onFailure", "actions"}
	seen := p.keys(n, known, func(key string, kn, v *yaml.Node) {
		switch key {
		case "name":
			r.Name = p.name(v, kn)
			if r.Name != "" {
				r.nameNode = v
			}
		case "description":
			r.Description = p.text(v, kn)
		case "mode":
			r.Mode = p.mode(v, kn)
		case "match":
			p.conditions(&r.match, key, v, kn)
		case "except":
			except = v
			r.except = &conditions{}
			p.conditions(r.except, key, v, kn)
		case "where":
			r.where = p.where(v, kn)
		case "when":
			r.When, r.whenNode = p.when(v, kn), v
		case "onFailure":
			onFailure = p.onFailure(v, kn)
		case "actions":
			actions = p.list(v, kn, key, "such as [delete-pod]")
		}
	})
	if !seen["name"] {
		p.bad(n, "this rule has no name: outcomes, metrics and cooldowns go by it")
	}
	if !seen["match"] {
		p.bad(n, "this rule has no match: write what it is about, or {priority: debug} for every alert")
	}
	if !seen["actions"] {
		p.bad(n, "this rule has no actions")
	}
	for _, a := range actions {
		if action, ok := p.action(a); ok {
			if action.OnFailure == "" {
				action.OnFailure = onFailure
			}
			r.Actions = append(r.Actions, action)
		}
	}
	p.doubts(r, except)
	if r.When != nil {
		p.whenDoubts(r, r.whenNode)
		r.When.ID = meaning(n, "name", "match", "except", "where", "when")
	}
	r.Hash = meaning(n, "match", "except", "where", "when", "onFailure", "actions")
	return r
}

// list is the entries of a list that may not be empty.
func (p *parser) list(n, key *yaml.Node, name, such string) []*yaml.Node {
	switch l := param.Resolve(n); {
	case param.IsNull(n), l.Kind == yaml.SequenceNode && len(l.Content) == 0:
		p.bad(key, "there is nothing in %q: it is a list with at least one entry; %s", name, such)
	case l.Kind != yaml.SequenceNode:
		p.bad(n, "%q is a list, not %s; %s", name, param.What(n), such)
	default:
		return l.Content
	}
	return nil
}

// scalar is the text of a single value, and whether there is one.
func (p *parser) scalar(n, key *yaml.Node) (string, bool) {
	v := param.Resolve(n)
	switch {
	case param.IsNull(n):
		p.bad(key, "%q has no value", param.Resolve(key).Value)
	case v.Kind != yaml.ScalarNode:
		p.bad(n, "%q takes a single value, not %s", param.Resolve(key).Value, param.What(n))
	case !p.tag(n):
	default:
		return v.Value, true
	}
	return "", false
}

// tag refuses the tags that people did not mean to write: an expression that
// begins with ! is one for YAML.
func (p *parser) tag(n *yaml.Node) bool {
	v := param.Resolve(n)
	switch v.ShortTag() {
	case "!!str", "!!int", "!!float", "!!bool", "!!timestamp", "!!null":
		return true
	}
	p.bad(n, "YAML takes %s for a tag: write the whole value in single quotes", param.Cut(v.Tag))
	return false
}

func (p *parser) text(n, key *yaml.Node) string {
	s, ok := p.scalar(n, key)
	if ok && strings.TrimSpace(s) == "" {
		p.bad(n, "%q is empty", param.Resolve(key).Value)
	}
	return s
}

const maxName = 63

func (p *parser) name(n, key *yaml.Node) string {
	s := p.text(n, key)
	form := regexp.MustCompile(`^[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?$`)
	switch {
	case strings.TrimSpace(s) == "":
		return ""
	case len(s) > maxName:
		p.bad(n, "the name of a rule has at most %d characters, not %d", maxName, utf8.RuneCountInString(s))
	case !form.MatchString(s):
		other := regexp.MustCompile(`[^A-Za-z0-9._-]+`).ReplaceAllString(s, "-")
		such := ""
		if other = strings.Trim(other, "-._"); other != "" {
			such = ", such as " + other
		}
		p.bad(n, "the name of a rule is made of letters, digits, \"-\", \"_\" and \".\"%s", such)
	}
	return s
}

func (p *parser) mode(n, key *yaml.Node) broker.Mode {
	modes := []string{string(broker.Audit), string(broker.Enforce)}
	s, ok := p.scalar(n, key)
	if ok && !slices.Contains(modes, s) {
		p.bad(n, "%s", param.Unknown("mode", s, modes))
	}
	if s == string(broker.Enforce) {
		return broker.Enforce
	}
	return broker.Audit
}

func (p *parser) onFailure(n, key *yaml.Node) broker.OnFailure {
	words := []string{string(broker.Continue), string(broker.Stop)}
	s, ok := p.scalar(n, key)
	if ok && !slices.Contains(words, s) {
		p.bad(n, "%s", param.Unknown("onFailure", s, words))
	}
	return broker.OnFailure(s)
}

func (p *parser) approve(n, key *yaml.Node) *bool {
	s, ok := p.scalar(n, key)
	if !ok {
		return nil
	}
	if v := param.Resolve(n); v.ShortTag() != "!!bool" {
		p.bad(n, "%s", param.Unknown("approve", s, []string{"true", "false"}))
		return nil
	}
	return new(s == "true" || s == "True" || s == "TRUE")
}

// action reads one entry of actions: the name of a responder, or a mapping of
// it to its parameters with, at most, onFailure and approve beside it.
func (p *parser) action(n *yaml.Node) (broker.Action, bool) {
	v := param.Resolve(n)
	switch {
	case param.IsNull(n):
		p.bad(n, "this entry of actions is empty: write the name of a responder")
		return broker.Action{}, false
	case v.Kind == yaml.ScalarNode:
		return p.respond(n, n, nil)
	case v.Kind != yaml.MappingNode:
		p.bad(n, "an action is the name of a responder, or a mapping of it to its parameters, not %s", param.What(n))
		return broker.Action{}, false
	}
	type entry struct{ key, value *yaml.Node }
	var responders []entry
	var onFailure broker.OnFailure
	var approve *bool
	wrong := param.Keys(n, func(kn, value *yaml.Node) {
		switch param.Resolve(kn).Value {
		case "onFailure":
			onFailure = p.onFailure(value, kn)
			return
		case "approve":
			approve = p.approve(value, kn)
			return
		}
		responders = append(responders, entry{kn, value})
	})
	p.params(n, "", wrong)
	if len(responders) == 0 {
		if len(wrong) == 0 {
			p.bad(n, "this action names no responder. There are: %s", strings.Join(p.catalog.names(), ", "))
		}
		return broker.Action{}, false
	}
	first := responders[0]
	for _, e := range responders[1:] {
		p.second(param.Resolve(first.key).Value, e.key)
	}
	a, ok := p.respond(n, first.key, first.value)
	a.OnFailure, a.Approve = onFailure, approve
	return a, ok
}

// second reports a further key beside a responder's.
func (p *parser) second(responder string, key *yaml.Node) {
	name := param.Resolve(key).Value
	if d := p.catalog[responder]; d != nil {
		for _, f := range d.Fields {
			if f.Name == name {
				p.bad(key, "%q is a parameter of %s: indent it further, or write - %s: {%s: …}", name, responder, responder, name)
				return
			}
		}
	}
	if _, ok := p.catalog[name]; ok {
		p.bad(key, "each action is an entry of its own: begin this one with \"- %s\"", name)
		return
	}
	p.bad(key, "unknown key %s beside %s: only onFailure and approve may stand here", param.Cut(name), responder)
}

func (p *parser) respond(n, key, params *yaml.Node) (broker.Action, bool) {
	name := param.Resolve(key).Value
	d, ok := p.catalog[name]
	if !ok {
		p.bad(key, "%s", param.Unknown("responder", name, p.catalog.names()))
		return broker.Action{}, false
	}
	raw, wrong := d.Check(params)
	at := key
	if params == nil {
		at = n
	}
	p.params(at, name+": ", wrong)
	return broker.Action{Responder: name, Params: raw}, len(wrong) == 0
}

// conditions reads match or except.
func (p *parser) conditions(c *conditions, what string, n, key *yaml.Node) {
	v := param.Resolve(n)
	keys := []string{keyRule, keyPriority, keySource, keyTags, keyHostname, keyFields}
	if param.IsNull(n) || v.Kind == yaml.MappingNode && len(v.Content) == 0 {
		if what == "except" {
			p.bad(key, "an except with nothing in it would spare everything: take it away, or use some of %s", strings.Join(keys, ", "))
		} else {
			p.bad(key, "a match with nothing in it: use some of %s; {priority: debug} is every alert", strings.Join(keys, ", "))
		}
		return
	}
	if v.Kind != yaml.MappingNode {
		p.bad(n, "%q is a mapping with some of the keys %s, not %s", what, strings.Join(keys, ", "), param.What(n))
		return
	}
	p.keys(n, keys, func(name string, kn, value *yaml.Node) {
		switch name {
		case keyRule:
			c.rule = p.patterns(value, kn, name)
		case keySource:
			c.source = p.patterns(value, kn, name)
		case keyTags:
			c.tags = p.patterns(value, kn, name)
		case keyHostname:
			c.hostname = p.patterns(value, kn, name)
		case keyPriority:
			p.priorities(c, value, kn)
		case keyFields:
			p.fields(c, value, kn)
		}
	})
}

// values calls f for a value, or for each of a list of values.
func (p *parser) values(n, key *yaml.Node, name string, f func(n *yaml.Node, s string)) {
	v := param.Resolve(n)
	switch {
	case param.IsNull(n), v.Kind == yaml.SequenceNode && len(v.Content) == 0:
		p.bad(key, "%s has no value", param.Cut(name))
		return
	case v.Kind == yaml.MappingNode:
		p.bad(n, "%s takes a value or a list of values, not a mapping", param.Cut(name))
		return
	case v.Kind == yaml.ScalarNode:
		p.value(n, name, f)
		return
	}
	for _, item := range v.Content {
		p.value(item, name, f)
	}
}

func (p *parser) value(n *yaml.Node, name string, f func(n *yaml.Node, s string)) {
	v := param.Resolve(n)
	plain := regexp.MustCompile(`^-?[0-9]+(\.[0-9]+)?$`)
	switch tag := v.ShortTag(); {
	case param.IsNull(n):
		p.bad(n, "an entry of %s is empty", param.Cut(name))
	case v.Kind != yaml.ScalarNode:
		p.bad(n, "an entry of %s is a single value, not %s", param.Cut(name), param.What(n))
	case !p.tag(n):
	case (tag == "!!int" || tag == "!!float") && !plain.MatchString(v.Value):
		p.bad(n, "the number %s may not look the same in an alert: write it in quotes, as Falco writes it", param.Cut(v.Value))
	default:
		f(n, v.Value)
	}
}

func (p *parser) patterns(n, key *yaml.Node, name string) *patterns {
	const most = 1000 // characters; no name or path needs more
	var values []string
	p.values(n, key, name, func(n *yaml.Node, s string) {
		switch {
		case s == "" || s == "<NA>" || s == "null":
			p.warn(n, "this value never matches: %q is how Falco says that there is none", s)
		case utf8.RuneCountInString(s) > most:
			p.bad(n, "a value has at most %d characters", most)
		case strings.TrimSpace(s) != s:
			p.warn(n, "this value begins or ends with white space, as hardly any in an alert does")
		}
		values = append(values, s)
	})
	return newPatterns(values)
}

func (p *parser) priorities(c *conditions, n, key *yaml.Node) {
	var words []string
	for _, q := range alert.Priorities() {
		words = append(words, q.String())
	}
	lowest := alert.Emergency
	var lowestWord string
	var given []*yaml.Node
	p.values(n, key, keyPriority, func(n *yaml.Node, s string) {
		word, exact := strings.CutPrefix(s, "=")
		word = strings.TrimSpace(word)
		q, err := alert.ParsePriority(word)
		switch {
		case err != nil && strings.ContainsAny(word, "<>"):
			p.bad(n, "%s: a priority by itself means at least that, and =critical exactly that", param.Cut(s))
			return
		case err != nil:
			p.bad(n, "%s", param.Unknown("priority", word, words))
			return
		}
		c.priorityWords = append(c.priorityWords, s)
		given = append(given, n)
		for _, each := range alert.Priorities() {
			if each == q || !exact && each.AtLeast(q) {
				c.priorities |= 1 << each
			}
		}
		if !exact && !q.AtLeast(lowest) {
			lowest, lowestWord = q, s
		}
	})
	for i, w := range c.priorityWords {
		q, err := alert.ParsePriority(strings.TrimSpace(strings.TrimPrefix(w, "=")))
		if err == nil && lowestWord != "" && w != lowestWord && q.AtLeast(lowest) {
			p.warn(given[i], "%q is covered by %q, which means at least that: write =%s if you mean exactly that",
				w, lowestWord, strings.ToLower(lowestWord))
		}
	}
}

func (p *parser) fields(c *conditions, n, key *yaml.Node) {
	v := param.Resolve(n)
	switch {
	case param.IsNull(n), v.Kind == yaml.MappingNode && len(v.Content) == 0:
		p.bad(key, "\"fields\" has nothing in it: write {field: value}, such as {container.id: host}")
		return
	case v.Kind != yaml.MappingNode:
		p.bad(n, "\"fields\" is a mapping of fields to values, such as {container.id: host}, not %s", param.What(n))
		return
	}
	p.params(n, "", param.Keys(n, func(kn, value *yaml.Node) {
		name := param.Resolve(kn).Value
		if name == "" || strings.TrimSpace(name) != name {
			p.bad(kn, "a field has a name, such as container.id, without white space around it")
			return
		}
		c.fields = append(c.fields, fieldCondition{name, p.patterns(value, kn, name)})
	}))
}

// where compiles an expression, and places what is wrong with it in the file.
func (p *parser) where(n, key *yaml.Node) *expression {
	v := param.Resolve(n)
	switch {
	case param.IsNull(n), v.Kind == yaml.ScalarNode && strings.TrimSpace(v.Value) == "":
		p.bad(key, "\"where\" has no expression in it")
		return nil
	case v.Kind != yaml.ScalarNode:
		p.bad(n, "\"where\" is one expression in CEL, not %s: write it in quotes, or on the lines after \"where: |\"", param.What(n))
		return nil
	case !p.tag(n):
		return nil
	}
	if p.env == nil {
		env, err := newEnv()
		if err != nil {
			p.bad(n, "where: %v", err)
			return nil
		}
		p.env = env
	}
	e, faults := compile(p.env, v.Value)
	ps := places(p.lines, v)
	for _, f := range faults {
		line, column := placeOf(ps, v, f.line, f.column)
		p.badAt(line, column, "%s", f.message)
	}
	if e == nil {
		return nil
	}
	for _, d := range e.doubts() {
		line, column := placeOf(ps, v, d.line, d.column)
		p.warnings = append(p.warnings, p.problem(line, column, d.message))
	}
	return e
}

// placeOf is where the character at a line and column of the expression stands
// in the file.
func placeOf(ps []place, n *yaml.Node, line, column int) (int, int) {
	i := 0
	for _, r := range n.Value {
		if line <= 1 {
			break
		}
		if r == '\n' {
			line--
		}
		i++
	}
	if i += column; i >= 0 && i < len(ps) {
		return ps[i].line, ps[i].column
	}
	return n.Line, n.Column
}

// keys calls f for each known key of a mapping, and reports the others. It
// returns the keys that are there, and those that were probably meant: nobody
// needs to be told that they are missing.
func (p *parser) keys(n *yaml.Node, known []string, f func(key string, kn, v *yaml.Node)) map[string]bool {
	seen := map[string]bool{}
	wrong := param.Keys(n, func(kn, v *yaml.Node) {
		key := param.Resolve(kn).Value
		if slices.Contains(known, key) {
			seen[key] = true
			f(key, kn, v)
			return
		}
		seen[param.Nearest(key, known)] = true
		if field := asField(key); field != "" && slices.Contains(known, keyFields) {
			p.bad(kn, "unknown key %s: fields of an alert stand below \"fields\", such as fields: {%s: …}", param.Cut(key), field)
			return
		}
		p.bad(kn, "%s", param.Unknown("key", key, known))
	})
	p.params(n, "", wrong)
	for _, key := range known {
		seen[key] = seen[key] || len(wrong) > 0
	}
	return seen
}

// asField is the field of an alert that somebody meant by a key, "" if none.
func asField(key string) string {
	switch key {
	case "namespace", "ns":
		return "k8s.ns.name"
	case "pod":
		return "k8s.pod.name"
	case "container":
		return "container.id"
	case "image":
		return "container.image.repository"
	case "user":
		return "user.name"
	case "process":
		return "proc.name"
	}
	if strings.Contains(strings.Trim(key, "."), ".") {
		return key
	}
	return ""
}
