package convert

import (
	"bytes"
	"cmp"
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"gopkg.in/yaml.v3"

	"stoop/alert"
	"stoop/broker"
	"stoop/param"
	"stoop/rules"
)

// Talon makes rules.yaml out of the rules of Falco Talon, whose files override
// each other in their order. The catalog says which responders there are. If
// anything can't be said, the error is [rules.Problems]: all of it.
func Talon(files []File, catalog rules.Catalog) ([]byte, error) {
	t := &talon{catalog: catalog, problems: problems{files: files}}
	for i := range files {
		t.blocks(i)
	}
	out := t.convert()
	if err := t.err(); err != nil {
		return nil, err
	}
	if len(t.rules) == 0 {
		return nil, fmt.Errorf("there is no rule in %s: a rule begins with \"- rule:\"", files[0].Name)
	}
	if err := t.proved(out); err != nil {
		return nil, fmt.Errorf("the converted rules are wrong, which is a mistake of stoop's; please tell its developers:\n%w", err)
	}
	return out, nil
}

// proved reads what was written, and compares each step with what was meant.
func (t *talon) proved(out []byte) error {
	written, err := rules.Parse("rules.yaml", out, t.catalog)
	if err != nil {
		return err
	}
	var steps []broker.Action
	for _, r := range written.Rules {
		steps = append(steps, r.Actions...)
	}
	for i, s := range steps {
		if i >= len(t.meant) || s.Responder != t.meant[i].Responder || !bytes.Equal(s.Params, t.meant[i].Params) {
			return fmt.Errorf("step %d (%s %s) is not what was meant", i+1, s.Responder, s.Params)
		}
	}
	if len(steps) != len(t.meant) {
		return fmt.Errorf("there are %d steps and not %d", len(steps), len(t.meant))
	}
	return nil
}

// talon is one conversion.
type talon struct {
	problems
	catalog rules.Catalog
	actions []*talonAction
	rules   []*talonRule
	meant   []broker.Action // every step that is written
}

// talonAction is a block "- action:", or an entry of a rule's actions.
type talonAction struct {
	node         *yaml.Node
	name         string
	actionner    *yaml.Node
	continues    *yaml.Node
	ignoreErrors *yaml.Node
	output       *yaml.Node
	contexts     *yaml.Node
	params       []entry
}

type entry struct{ key, value *yaml.Node }

// talonRule is a block "- rule:".
type talonRule struct {
	node        *yaml.Node
	name        string
	description string
	continues   *yaml.Node
	dryRun      *yaml.Node
	priority    *yaml.Node
	source      *yaml.Node
	matched     []*yaml.Node
	tags        []*yaml.Node
	fields      []*yaml.Node
	actions     []*talonAction
	notifiers   []*yaml.Node
	notes       []string
}

// blocks reads a file's actions and rules over those of the files before.
func (t *talon) blocks(file int) {
	for _, n := range t.read(file) {
		m := param.Resolve(n)
		if m.Kind != yaml.MappingNode {
			t.refuse(n, "an action or a rule is a mapping, not %s", param.What(n))
			continue
		}
		switch isRule, isAction := has(m, "rule"), has(m, "action"); {
		case isRule && isAction:
			t.refuse(n, "this is an action and a rule at once")
		case isRule:
			t.addRule(t.rule(m))
		case isAction:
			t.addAction(t.action(m))
		default:
			t.refuse(n, "neither an action (\"action:\") nor a rule (\"rule:\")")
		}
	}
}

func has(m *yaml.Node, key string) bool {
	for i := 0; i+1 < len(m.Content); i += 2 {
		if param.Resolve(m.Content[i]).Value == key {
			return true
		}
	}
	return false
}

// keys reads a mapping, each key into what belongs to it.
func (t *talon) keys(m *yaml.Node, into map[string]func(v *yaml.Node)) {
	known := make([]string, 0, len(into))
	for k := range into {
		known = append(known, k)
	}
	slices.Sort(known)
	_ = param.Keys(m, func(k, v *yaml.Node) { // what is wrong with the keys was said when they were read
		name := param.Resolve(k).Value
		if f := into[name]; f != nil {
			f(v)
			return
		}
		t.refuse(k, "%s. Talon passes over it: take it away, or write what is meant", param.Unknown("key", name, known))
	})
}

func (t *talon) text(into *string) func(*yaml.Node) {
	return func(v *yaml.Node) {
		n := param.Resolve(v)
		if n.Kind != yaml.ScalarNode || param.IsNull(n) {
			t.refuse(v, "a text is expected here, not %s", param.What(v))
			return
		}
		*into = n.Value
	}
}

func (t *talon) node(kind yaml.Kind, what string, into **yaml.Node) func(*yaml.Node) {
	return func(v *yaml.Node) {
		if n := param.Resolve(v); param.IsNull(n) {
			return
		} else if n.Kind != kind {
			t.refuse(v, "%s is expected here, not %s", what, param.What(v))
			return
		}
		*into = place(&[]yaml.Node{*param.Resolve(v)}[0], v)
	}
}

func (t *talon) flag(into **yaml.Node) func(*yaml.Node) {
	return func(v *yaml.Node) {
		n := param.Resolve(v)
		if n.Kind != yaml.ScalarNode || n.Value != "true" && n.Value != "false" {
			t.refuse(v, "true or false is expected here, not %s", param.What(v))
			return
		}
		*into = n
	}
}

// items are the texts of a list.
func (t *talon) items(into *[]*yaml.Node) func(*yaml.Node) {
	return func(v *yaml.Node) {
		if param.IsNull(v) {
			return
		}
		n := param.Resolve(v)
		if n.Kind != yaml.SequenceNode {
			t.refuse(v, "a list is expected here, not %s", param.What(v))
			return
		}
		for _, item := range n.Content {
			if i := param.Resolve(item); i.Kind != yaml.ScalarNode || param.IsNull(i) || strings.TrimSpace(i.Value) == "" {
				t.refuse(item, "a text is expected here, not %s", param.What(item))
			} else {
				*into = append(*into, i)
			}
		}
	}
}

func (t *talon) action(m *yaml.Node) *talonAction {
	a := &talonAction{node: m}
	var params *yaml.Node
	var description string
	t.keys(m, map[string]func(*yaml.Node){
		"action":              t.text(&a.name),
		"description":         t.text(&description),
		"actionner":           t.node(yaml.ScalarNode, "the name of an actionner", &a.actionner),
		"continue":            t.flag(&a.continues),
		"ignore_errors":       t.flag(&a.ignoreErrors),
		"parameters":          t.node(yaml.MappingNode, "a mapping of parameters", &params),
		"output":              t.node(yaml.MappingNode, "a mapping with target and parameters", &a.output),
		"additional_contexts": t.node(yaml.SequenceNode, "a list of contexts", &a.contexts),
	})
	if params != nil {
		_ = param.Keys(params, func(k, v *yaml.Node) {
			if !param.IsNull(v) {
				a.params = append(a.params, entry{k, v})
			}
		})
	}
	return a
}

func (t *talon) rule(m *yaml.Node) *talonRule {
	r := &talonRule{node: m}
	match := func(v *yaml.Node) {
		if param.IsNull(v) {
			return
		}
		if param.Resolve(v).Kind != yaml.MappingNode {
			t.refuse(v, "a mapping is expected here, not %s", param.What(v))
			return
		}
		t.keys(param.Resolve(v), map[string]func(*yaml.Node){
			"rules":         t.items(&r.matched),
			"priority":      t.node(yaml.ScalarNode, "a priority", &r.priority),
			"source":        t.node(yaml.ScalarNode, "a source", &r.source),
			"tags":          t.items(&r.tags),
			"output_fields": t.items(&r.fields),
		})
	}
	actions := func(v *yaml.Node) {
		if param.IsNull(v) {
			return
		}
		if param.Resolve(v).Kind != yaml.SequenceNode {
			t.refuse(v, "a list of actions is expected here, not %s", param.What(v))
			return
		}
		for _, n := range param.Resolve(v).Content {
			am := param.Resolve(n)
			if am.Kind != yaml.MappingNode || !has(am, "action") {
				t.refuse(n, "an action begins with its name (\"action:\")")
				continue
			}
			r.actions = append(r.actions, t.action(am))
		}
	}
	t.keys(m, map[string]func(*yaml.Node){
		"rule":        t.text(&r.name),
		"description": t.text(&r.description),
		"continue":    t.flag(&r.continues),
		"dry_run":     t.flag(&r.dryRun),
		"notifiers":   t.items(&r.notifiers),
		"match":       match,
		"actions":     actions,
	})
	return r
}

// addAction adds an action, or changes the one of its name as Talon does.
func (t *talon) addAction(a *talonAction) {
	i := slices.IndexFunc(t.actions, func(b *talonAction) bool { return b.name == a.name })
	if i < 0 {
		t.actions = append(t.actions, a)
		return
	}
	b := t.actions[i]
	b.actionner = cmp.Or(a.actionner, b.actionner)
	b.continues = cmp.Or(a.continues, b.continues)
	b.ignoreErrors = cmp.Or(a.ignoreErrors, b.ignoreErrors)
	b.output = cmp.Or(a.output, b.output)
	b.contexts = cmp.Or(a.contexts, b.contexts)
	b.params = t.over(b.params, a.params)
}

// addRule adds a rule, or changes the one of its name as Talon does.
func (t *talon) addRule(r *talonRule) {
	i := slices.IndexFunc(t.rules, func(b *talonRule) bool { return b.name == r.name })
	if i < 0 {
		t.rules = append(t.rules, r)
		return
	}
	b := t.rules[i]
	if r.priority == nil && b.priority != nil {
		b.notes = append(b.notes, "A later block of this rule names no priority: the one of the first is kept. Talon has versions that forget it.")
	}
	b.description = cmp.Or(r.description, b.description)
	b.continues = cmp.Or(r.continues, b.continues)
	b.dryRun = cmp.Or(r.dryRun, b.dryRun)
	b.priority = cmp.Or(r.priority, b.priority)
	b.source = cmp.Or(r.source, b.source)
	b.matched = append(b.matched, r.matched...)
	b.tags = append(b.tags, r.tags...)
	b.fields = append(b.fields, r.fields...)
	b.actions = append(b.actions, r.actions...)
	b.notifiers = append(b.notifiers, r.notifiers...)
}

// over is parameters with those that come over them: lists are appended, maps
// joined, all else is replaced.
func (t *talon) over(under, above []entry) []entry {
	out := slices.Clone(under)
	for _, e := range above {
		i := slices.IndexFunc(out, func(o entry) bool { return param.Resolve(o.key).Value == param.Resolve(e.key).Value })
		if i < 0 {
			out = append(out, e)
			continue
		}
		was, now := param.Resolve(out[i].value), param.Resolve(e.value)
		if was.Kind != now.Kind {
			t.refuse(e.value, "%s is %s elsewhere and %s here: Talon passes over one of them", param.Cut(param.Resolve(e.key).Value), param.What(was), param.What(now))
			continue
		}
		joined := *now
		switch now.Kind {
		case yaml.SequenceNode:
			joined.Content = append(slices.Clone(was.Content), now.Content...)
		case yaml.MappingNode:
			joined.Content = nil
			for j := 0; j+1 < len(was.Content); j += 2 {
				if !has(now, param.Resolve(was.Content[j]).Value) {
					joined.Content = append(joined.Content, was.Content[j], was.Content[j+1])
				}
			}
			joined.Content = append(joined.Content, now.Content...)
		}
		out[i] = entry{e.key, &joined}
	}
	return out
}

// convert is the file that comes of it.
func (t *talon) convert() []byte {
	names := map[string]bool{}
	all := list(nil)
	all.Style = 0
	for i, r := range t.rules {
		t.onlyOne(r, t.rules[i+1:])
		all.Content = append(all.Content, t.converted(r, names))
	}
	root := mapping(nil)
	set(root, "mode", bare(nil, "audit"))
	root.HeadComment = comment("Made of Falco Talon's rules. Comments say where stoop does otherwise.", "",
		"Talon acts on every rule without dry_run. stoop begins to once this says enforce, and the program's mode does too (stoop.yaml, --mode).")
	set(root, "rules", all)
	var b bytes.Buffer
	e := yaml.NewEncoder(&b)
	e.SetIndent(2)
	if err := e.Encode(root); err != nil {
		return nil // there is nothing in it that can't be encoded
	}
	return spaced(b.Bytes())
}

// spaced has an empty line before each rule.
func spaced(src []byte) []byte {
	var b bytes.Buffer
	within := true // right behind a comment, or the list's key
	for line := range bytes.Lines(src) {
		isComment := bytes.HasPrefix(line, []byte("  #"))
		if (isComment || bytes.HasPrefix(line, []byte("  - name:"))) && !within {
			b.WriteByte('\n')
		}
		within = isComment || bytes.HasPrefix(line, []byte("rules:"))
		b.Write(line)
	}
	return b.Bytes()
}

// onlyOne refuses a rule after which Talon asks no other, where another may match
// the same alert: stoop follows both.
func (t *talon) onlyOne(r *talonRule, later []*talonRule) {
	if r.continues == nil || r.continues.Value != "false" {
		return
	}
	for _, l := range later {
		if len(r.matched) > 0 && len(l.matched) > 0 && !slices.ContainsFunc(l.matched, func(n *yaml.Node) bool {
			return slices.ContainsFunc(r.matched, func(o *yaml.Node) bool { return o.Value == n.Value })
		}) {
			continue
		}
		t.refuse(r.continues, "after this rule Talon asks no other, stoop follows every rule that matches, and %s (line %d) may match the same alert: "+
			"keep the two apart by their lists of rules, or take this away", param.Cut(l.name), line(l.node))
		return
	}
}

var notName = regexp.MustCompile(`[^A-Za-z0-9._-]+`)

// nameOf is a name that a rule of stoop's may have.
func nameOf(name string, taken map[string]bool) string {
	const most = 60
	s := strings.Trim(notName.ReplaceAllString(name, "-"), "-._")
	if len(s) > most {
		s = strings.Trim(s[:most], "-._")
	}
	s = cmp.Or(s, "rule")
	for n := 1; ; n++ {
		try := s
		if n > 1 {
			try = s + "-" + strconv.Itoa(n)
		}
		if !taken[try] {
			taken[try] = true
			return try
		}
	}
}

func (t *talon) converted(r *talonRule, names map[string]bool) *yaml.Node {
	m := mapping(r.node)
	name := nameOf(r.name, names)
	set(m, "name", scalar(r.node, name))
	switch {
	case r.description != "":
		set(m, "description", scalar(r.node, r.description))
	case name != r.name:
		set(m, "description", scalar(r.node, r.name))
	}
	if r.dryRun != nil && r.dryRun.Value == "true" {
		set(m, "mode", bare(r.dryRun, "audit"))
	}
	t.match(r, m)
	actions := list(r.node)
	actions.Style = 0
	for i, a := range r.actions {
		full := t.defined(a)
		if n := t.step(full); n != nil {
			actions.Content = append(actions.Content, n)
		}
		if rest := r.actions[i+1:]; len(rest) > 0 && full.ends() {
			left := make([]string, len(rest))
			for j, l := range rest {
				left[j] = l.name
			}
			r.notes = append(r.notes, fmt.Sprintf("Left out: %s. Talon never gets there, since after %s (%s) it goes no further unless continue is true.",
				strings.Join(left, ", "), a.name, full.actionner.Value))
			break
		}
	}
	t.tell(r, actions)
	if len(r.actions) == 0 {
		t.refuse(r.node, "the rule has no actions")
	}
	if len(actions.Content) > 0 {
		set(m, "actions", actions)
	}
	var head []string
	if r.node.HeadComment != "" {
		head = append(head, r.node.HeadComment)
	}
	if len(r.notes) > 0 {
		head = append(head, comment(r.notes...))
	}
	m.HeadComment = strings.Join(head, "\n")
	return m
}

// match writes which alerts a rule is about.
func (t *talon) match(r *talonRule, m *yaml.Node) {
	match, except := mapping(r.node), mapping(r.node)
	var where []string
	if names := values(r.matched); len(names) > 0 {
		if slices.ContainsFunc(names, isGlob) {
			where = append(where, "rule in ["+strings.Join(quoted(names), ", ")+"]")
			r.notes = append(r.notes, "Talon knows no globs, so names with * and ? are compared by where.")
		} else {
			set(match, "rule", texts(r.matched[0], names))
		}
	}
	t.priority(r, match)
	if r.source != nil && r.source.Value != "" {
		set(match, "source", scalar(r.source, r.source.Value))
	}
	if w := t.tagged(r, match); w != "" {
		where = append(where, w)
	}
	if w := t.fielded(r, match, except); w != "" {
		where = append(where, w)
	}
	if len(match.Content) == 0 {
		set(match, "priority", scalar(r.node, "debug"))
	}
	set(m, "match", match)
	if len(except.Content) > 0 {
		set(m, "except", except)
	}
	if len(where) == 1 {
		set(m, "where", scalar(r.node, where[0]))
	} else if len(where) > 1 {
		set(m, "where", scalar(r.node, "("+strings.Join(where, ") && (")+")"))
	}
}

func values(nodes []*yaml.Node) []string {
	out := make([]string, 0, len(nodes))
	for _, n := range nodes {
		if !slices.Contains(out, n.Value) {
			out = append(out, n.Value)
		}
	}
	return out
}

func quoted(values []string) []string {
	out := make([]string, len(values))
	for i, v := range values {
		out[i] = strconv.Quote(v)
	}
	return out
}

func isGlob(s string) bool { return strings.ContainsAny(s, "*?") }

var priorityForm = regexp.MustCompile(`^(<|>)?(=)?([A-Za-z]+)$`)

func (t *talon) priority(r *talonRule, match *yaml.Node) {
	if r.priority == nil || r.priority.Value == "" {
		return
	}
	form := priorityForm.FindStringSubmatch(r.priority.Value)
	if form == nil {
		t.refuse(r.priority, "a priority is expected here, such as \">=Critical\", not %s", param.Cut(r.priority.Value))
		return
	}
	var words []string // the most urgent first
	for _, p := range alert.Priorities() {
		words = append(words, p.String())
	}
	word := strings.ToLower(form[3])
	i := slices.Index(words, word)
	if i < 0 {
		t.refuse(r.priority, "%s", param.Unknown("priority", form[3], words))
		return
	}
	exactly := func(words []string) {
		if len(words) == 0 {
			t.refuse(r.priority, "no alert is of this priority: the rule never matches")
			return
		}
		for j := range words {
			words[j] = "=" + words[j]
		}
		set(match, "priority", texts(r.priority, words))
	}
	orEqual := form[2] != ""
	switch form[1] {
	case "":
		exactly([]string{word})
	case ">":
		if !orEqual {
			i--
		}
		if i < 0 {
			exactly(nil)
			return
		}
		set(match, "priority", scalar(r.priority, words[i]))
	case "<":
		if !orEqual {
			i++
		}
		exactly(slices.Clone(words[i:]))
	}
}

// tagged writes the tags into match, or returns what where has to say: any of the
// entries, each of which asks for all of its tags.
func (t *talon) tagged(r *talonRule, match *yaml.Node) string {
	var any []string
	var single []string
	simple := true
	for _, n := range r.tags {
		tags := strings.Split(strings.ReplaceAll(n.Value, " ", ""), ",")
		if slices.Contains(tags, "") {
			t.refuse(n, "there is an empty tag in %s", param.Cut(n.Value))
			continue
		}
		simple = simple && len(tags) == 1 && !isGlob(tags[0])
		single = append(single, tags[0])
		all := quoted(tags)
		for i := range all {
			all[i] += " in tags"
		}
		any = append(any, strings.Join(all, " && "))
	}
	switch {
	case len(any) == 0:
	case simple:
		set(match, "tags", texts(r.tags[0], single))
	default:
		return or(any)
	}
	return ""
}

func or(any []string) string {
	if len(any) == 1 {
		return any[0]
	}
	return "(" + strings.Join(any, ") || (") + ")"
}

// condition is one of a Talon output_fields' entry.
type condition struct {
	field, value string
	not          bool
}

// where is the condition in CEL: as Talon does, values are compared as text, and a
// field that is not there is not equal to anything.
func (c condition) where() string {
	s := fmt.Sprintf("%q in fields && string(fields[%[1]q]) == %q", c.field, c.value)
	if c.not {
		return "!(" + s + ")"
	}
	return s
}

// exponent is a number of more than a million as Talon writes it.
var exponent = regexp.MustCompile(`^[0-9.]+e\+[0-9]{2}$`)

var fieldForm = regexp.MustCompile(`^[A-Za-z0-9_.\[\]-]+$`)

// fielded writes the fields into match and except, or returns what where has to
// say: any of the entries, each of which asks for all of its conditions.
func (t *talon) fielded(r *talonRule, match, except *yaml.Node) string {
	var entries [][]condition
	for _, n := range r.fields {
		var all []condition
		for part := range strings.SplitSeq(strings.ReplaceAll(n.Value, ", ", ","), ",") {
			if c, ok := t.condition(r, n, part); ok {
				all = append(all, c)
			}
		}
		entries = append(entries, all)
	}
	if len(entries) == 0 {
		return ""
	}
	if len(entries) == 1 && plain(entries[0]) {
		yes, no := mapping(r.fields[0]), mapping(r.fields[0])
		var excluded []string
		for _, c := range entries[0] {
			if c.not {
				excluded = append(excluded, c.value)
				continue
			}
			set(yes, c.field, scalar(r.fields[0], c.value))
		}
		if len(yes.Content) > 0 {
			set(match, "fields", yes)
		}
		if len(excluded) > 0 {
			i := slices.IndexFunc(entries[0], func(c condition) bool { return c.not })
			set(no, entries[0][i].field, texts(r.fields[0], excluded))
			set(except, "fields", no)
		}
		return ""
	}
	if field, values, ok := oneOf(entries); ok {
		m := mapping(r.fields[0])
		set(m, field, texts(r.fields[0], values))
		set(match, "fields", m)
		return ""
	}
	any := make([]string, len(entries))
	for i, all := range entries {
		parts := make([]string, len(all))
		for j, c := range all {
			parts[j] = c.where()
		}
		any[i] = strings.Join(parts, " && ")
	}
	return or(any)
}

// plain reports whether match and except can say the conditions: no field is asked
// for twice, and what is excluded is of one field.
func plain(all []condition) bool {
	not := ""
	seen := map[string]bool{}
	for _, c := range all {
		switch {
		case isGlob(c.value), !c.not && seen[c.field], c.not && not != "" && not != c.field:
			return false
		case c.not:
			not = c.field
		default:
			seen[c.field] = true
		}
	}
	return true
}

// oneOf reports whether the entries ask for one field with any of several values.
func oneOf(entries [][]condition) (field string, values []string, ok bool) {
	for _, all := range entries {
		if len(all) != 1 || all[0].not || isGlob(all[0].value) || field != "" && all[0].field != field {
			return "", nil, false
		}
		field = all[0].field
		values = append(values, all[0].value)
	}
	return field, values, true
}

func (t *talon) condition(r *talonRule, n *yaml.Node, part string) (condition, bool) {
	field, value, ok := strings.Cut(part, "!=")
	not := ok
	if i := strings.Index(part, "="); !ok || i < len(field) {
		field, value, ok = strings.Cut(part, "=")
		not = false
	}
	value = strings.ReplaceAll(value, `"`, "")
	if f, err := strconv.ParseFloat(value, 64); err == nil && exponent.MatchString(value) {
		// Talon writes large numbers so; Falco, and stoop, write their digits.
		value = strconv.FormatFloat(f, 'f', -1, 64)
	}
	switch {
	case !ok || !fieldForm.MatchString(field):
		t.refuse(n, "%s is no condition such as k8s.ns.name=shop or k8s.ns.name!=shop (a comma begins the next one)", param.Cut(part))
	case value == "", value == "<NA>", value == "<nil>", value == "null":
		t.refuse(n, "%s compares with nothing, which in stoop is the same as a field that is not there: write a where, such as \"%s\" in fields, by hand", param.Cut(part), field)
	default:
		if strings.Contains(value, "=") {
			r.notes = append(r.notes, fmt.Sprintf("Talon has versions that pass over %s, for the second = in it.", param.Cut(part)))
		}
		return condition{field, value, not}, true
	}
	return condition{}, false
}

// defined is an action with what the block of its name says.
func (t *talon) defined(a *talonAction) *talonAction {
	full := *a
	i := slices.IndexFunc(t.actions, func(b *talonAction) bool { return b.name == a.name })
	if i < 0 {
		return &full
	}
	b := t.actions[i]
	full.actionner = cmp.Or(a.actionner, b.actionner)
	full.continues = cmp.Or(a.continues, b.continues)
	full.ignoreErrors = cmp.Or(a.ignoreErrors, b.ignoreErrors)
	full.output = cmp.Or(a.output, b.output)
	full.contexts = cmp.Or(a.contexts, b.contexts)
	full.params = t.over(b.params, a.params)
	return &full
}

// ends reports whether Talon goes no further in the rule after this action.
func (a *talonAction) ends() bool {
	if a.continues != nil {
		return a.continues.Value == "false"
	}
	if a.actionner == nil {
		return false
	}
	i := slices.IndexFunc(actionners(), func(k actionner) bool { return k.is(a.actionner.Value) })
	return i >= 0 && actionners()[i].ends
}

// tell appends what tells people.
func (t *talon) tell(r *talonRule, actions *yaml.Node) {
	for _, name := range values(r.notifiers) {
		i := slices.IndexFunc(r.notifiers, func(n *yaml.Node) bool { return n.Value == name })
		at := r.notifiers[i]
		responder := map[string]string{"slack": "slack", "k8sevents": "event"}[name]
		if responder == "" || t.catalog[responder] == nil {
			what := "stoop has none such"
			if name == "webhook" {
				what = "add - webhook: {url: …} to the actions"
			}
			r.notes = append(r.notes, fmt.Sprintf("Talon tells of each action by its notifier %s: %s.", name, what))
			continue
		}
		t.meant = append(t.meant, broker.Action{Responder: responder})
		n := scalar(at, responder)
		if responder == "slack" {
			n.HeadComment = comment("Talon's notifier tells of each action, this once of all of them. The webhook's address is read from SLACK_WEBHOOK_URL.")
		}
		actions.Content = append(actions.Content, n)
	}
}
