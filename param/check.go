package param

import (
	"encoding"
	"fmt"
	"reflect"
	"slices"
	"strconv"
	"strings"

	"gopkg.in/yaml.v3"
)

// checker collects every problem on its way through the nodes. How deep it goes
// is bounded by the types, whatever the YAML holds.
type checker struct{ problems []Problem }

func (c *checker) problem(n *yaml.Node, format string, args ...any) {
	c.problems = append(c.problems, Problem{Node: n, Message: fmt.Sprintf(format, args...)})
}

// Resolve is the node that an alias stands for, and n itself if it is none.
func Resolve(n *yaml.Node) *yaml.Node {
	if n != nil && n.Kind == yaml.AliasNode {
		return n.Alias
	}
	return n
}

// IsNull reports whether nothing, or null, was written.
func IsNull(n *yaml.Node) bool {
	n = Resolve(n)
	return n == nil || n.Kind == 0 || n.Kind == yaml.ScalarNode && n.ShortTag() == "!!null"
}

// What says what stands at a node, for "… is expected here, not …".
func What(n *yaml.Node) string {
	n = Resolve(n)
	switch {
	case IsNull(n):
		return "nothing"
	case n.Kind == yaml.MappingNode:
		return "a mapping"
	case n.Kind == yaml.SequenceNode:
		return "a list"
	}
	switch n.ShortTag() {
	case "!!str":
		return "the text " + Cut(n.Value)
	case "!!bool":
		return "the boolean " + n.Value
	case "!!int", "!!float":
		return "the number " + Cut(n.Value)
	}
	return Cut(n.Value)
}

// Keys calls f for each key of a mapping, in order, with its value, and returns
// what is wrong with the keys themselves: such a key is left out.
func Keys(n *yaml.Node, f func(key, value *yaml.Node)) []Problem {
	var c checker
	n = Resolve(n)
	first := map[string]int{}
	for i := 0; i+1 < len(n.Content); i += 2 {
		key := n.Content[i]
		k := Resolve(key)
		switch {
		case k.ShortTag() == "!!merge":
			c.problem(key, `"<<" is not supported here: write the keys out, or use an alias for a whole value`)
		case k.Kind != yaml.ScalarNode:
			c.problem(key, "a key must be plain text, not %s", What(k))
		case first[k.Value] != 0:
			c.problem(key, "%s stands here twice: first in line %d", Cut(k.Value), first[k.Value])
		default:
			first[k.Value] = key.Line
			f(key, n.Content[i+1])
		}
	}
	return c.problems
}

// mapping reads the fields that are set at n.
func (c *checker) mapping(fields []Field, n *yaml.Node) map[string]any {
	set := map[string]any{}
	have := map[string]bool{}
	names := make([]string, len(fields))
	for i, f := range fields {
		names[i] = f.Name
	}
	if !IsNull(n) {
		if Resolve(n).Kind != yaml.MappingNode {
			c.problem(n, "a mapping of parameters is expected here, not %s%s", What(n), hint(names))
			return set
		}
		wrong := Keys(n, func(key, value *yaml.Node) {
			name := Resolve(key).Value
			i := slices.Index(names, name)
			if i < 0 {
				near := slices.Index(names, Nearest(name, names))
				if near >= 0 {
					have[names[near]] = true // nobody needs to be told that it is missing
				}
				c.problems = append(c.problems, Problem{
					Node:    key,
					Message: Unknown("parameter", name, names),
					// What was meant for a secret's name may stand before one.
					Secret: near >= 0 && fields[near].typ == reflect.TypeFor[Secret](),
				})
				return
			}
			have[name] = true
			if v, ok := c.field(&fields[i], key, value); ok {
				set[name] = v
			}
		})
		c.problems = append(c.problems, wrong...)
	}
	for _, f := range fields {
		if f.Required && !have[f.Name] {
			c.problem(n, "the parameter %q (%s) is missing: it has no default", f.Name, f.Type)
		}
	}
	return set
}

func hint(names []string) string {
	if len(names) == 0 {
		return ": there are no parameters"
	}
	return fmt.Sprintf(", such as {%s: …}", names[0])
}

// field reads the value of one parameter, and reports whether it is right.
func (c *checker) field(f *Field, key, n *yaml.Node) (any, bool) {
	if IsNull(n) {
		// An empty mapping may be written as nothing.
		if isMapping(f.typ) {
			return c.mapping(f.Fields, n), true
		}
		switch {
		case f.Required || f.Default == "":
			c.problem(key, "%q has no value: a %s is expected", f.Name, f.Type)
		default:
			c.problem(key, "%q has no value: leave the key out for the default, %s", f.Name, f.Default)
		}
		return nil, false
	}
	before := len(c.problems)
	v := c.value(f, f.typ, n)
	if len(c.problems) == before && f.Required && reflect.ValueOf(v).Kind() != reflect.Bool && empty(v) {
		c.problem(n, "%q may not be empty", f.Name)
	}
	return v, len(c.problems) == before
}

func empty(v any) bool {
	switch v := v.(type) {
	case string:
		return v == ""
	case []any:
		return len(v) == 0
	case map[string]string:
		return len(v) == 0
	}
	return false
}

// value reads what stands at n as a t.
func (c *checker) value(f *Field, t reflect.Type, at *yaml.Node) any {
	n := Resolve(at)
	switch {
	case t == reflect.TypeFor[Secret]():
		return c.secret(f, at)
	case t == reflect.TypeFor[map[string]string]():
		return c.texts(f, at)
	case isMapping(t):
		return c.mapping(f.Fields, at)
	case t.Kind() == reflect.Slice && !isText(t):
		return c.list(f, t, at)
	case n.Kind != yaml.ScalarNode:
		c.problem(at, "%q is a %s, not %s", f.Name, typeName(t), What(n))
		return nil
	case isText(t):
		return c.text(f, t, at)
	case t.Kind() == reflect.String:
		return c.str(f, at)
	case t.Kind() == reflect.Bool:
		if n.ShortTag() != "!!bool" {
			c.problem(at, "%q is true or false, not %s", f.Name, What(n))
			return nil
		}
		return strings.EqualFold(n.Value, "true")
	}
	i, err := strconv.ParseInt(strings.ReplaceAll(n.Value, "_", ""), 0, t.Bits())
	if err != nil || n.ShortTag() != "!!int" {
		c.problem(at, "%q is an integer, not %s", f.Name, What(n))
		return nil
	}
	c.bounds(f, i, n.Value, at)
	return i
}

// str reads a string. Other scalars are refused rather than guessed at: true,
// 0x10 and 1_000 would not arrive as they were written.
func (c *checker) str(f *Field, at *yaml.Node) any {
	n := Resolve(at)
	if n.Kind != yaml.ScalarNode {
		c.problem(at, "%q takes text here, not %s", f.Name, What(n))
		return nil
	}
	switch tag := n.ShortTag(); tag {
	case "!!str", "!!timestamp":
	case "!!null":
		c.problem(at, "%q takes text here, not nothing", f.Name)
		return nil
	case "!!bool", "!!int", "!!float":
		c.problem(at, "%q takes text here, not %s: write it in quotes, %q", f.Name, What(n), n.Value)
		return nil
	default:
		c.problem(at, "%q takes text here, nothing with the tag %s", f.Name, Cut(tag))
		return nil
	}
	if len(f.OneOf) > 0 && !slices.Contains(f.OneOf, n.Value) {
		c.problem(at, "%s", Unknown(f.Name, n.Value, f.OneOf))
		return nil
	}
	return n.Value
}

// text reads what unmarshals itself from text.
func (c *checker) text(f *Field, t reflect.Type, at *yaml.Node) any {
	n := Resolve(at)
	v := reflect.New(t)
	if err := v.Interface().(encoding.TextUnmarshaler).UnmarshalText([]byte(n.Value)); err != nil {
		c.problems = append(c.problems, Problem{
			Node:    at,
			Message: fmt.Sprintf("%q: %v", f.Name, err),
			Secret:  t == reflect.TypeFor[URL](),
		})
		return nil
	}
	if len(f.OneOf) > 0 && !slices.Contains(f.OneOf, n.Value) {
		c.problem(at, "%s", Unknown(f.Name, n.Value, f.OneOf))
		return nil
	}
	if isInt(t) {
		c.bounds(f, v.Elem().Int(), n.Value, at)
	}
	if m, ok := v.Interface().(encoding.TextMarshaler); ok {
		if b, err := m.MarshalText(); err == nil {
			return string(b)
		}
	}
	return n.Value
}

func (c *checker) bounds(f *Field, v int64, written string, at *yaml.Node) {
	switch {
	case f.min != nil && v < *f.min:
		c.problem(at, "%q is at least %s, not %s", f.Name, f.Min, written)
	case f.max != nil && v > *f.max:
		c.problem(at, "%q is at most %s, not %s", f.Name, f.Max, written)
	}
}

func (c *checker) list(f *Field, t reflect.Type, at *yaml.Node) any {
	n := Resolve(at)
	if n.Kind != yaml.SequenceNode {
		c.problem(at, "%q is a %s, not %s: write [%s]", f.Name, typeName(t), What(n), exampleOf(n))
		return nil
	}
	list := []any{}
	for _, item := range n.Content {
		if IsNull(item) {
			c.problem(item, "%q has an empty entry here", f.Name)
			continue
		}
		list = append(list, c.value(f, t.Elem(), item))
	}
	return list
}

func exampleOf(n *yaml.Node) string {
	if n.Kind == yaml.ScalarNode && len(n.Value) < 40 {
		return n.Value
	}
	return "…"
}

func (c *checker) texts(f *Field, at *yaml.Node) any {
	n := Resolve(at)
	if n.Kind != yaml.MappingNode {
		c.problem(at, "%q is a mapping of text to text, not %s: write {key: value}", f.Name, What(n))
		return nil
	}
	m := map[string]string{}
	wrong := Keys(n, func(key, value *yaml.Node) {
		if s, ok := c.str(&Field{Name: f.Name, OneOf: f.OneOf}, value).(string); ok {
			m[Resolve(key).Value] = s
		}
	})
	c.problems = append(c.problems, wrong...)
	return m
}

func (c *checker) secret(f *Field, at *yaml.Node) any {
	n := Resolve(at)
	const how = "write {file: PATH} or {env: NAME}"
	if n.Kind != yaml.MappingNode {
		c.problems = append(c.problems, Problem{
			Node:    at,
			Message: fmt.Sprintf("%q is a secret, which is never written here itself: %s", f.Name, how),
			Secret:  true,
		})
		return nil
	}
	m := map[string]string{}
	wrong := Keys(n, func(key, value *yaml.Node) {
		name := Resolve(key).Value
		if name != "file" && name != "env" {
			c.problems = append(c.problems, Problem{
				Node:    key,
				Message: fmt.Sprintf("%q is a secret: %s", f.Name, how),
				Secret:  true,
			})
			return
		}
		if s, ok := c.str(&Field{Name: f.Name + "." + name}, value).(string); ok {
			if s == "" {
				c.problem(value, "%q is a secret: its %s may not be empty", f.Name, name)
			}
			m[name] = s
		}
	})
	c.problems = append(c.problems, wrong...)
	if len(wrong) == 0 && len(n.Content) != 2 {
		c.problem(at, "%q is a secret with exactly one place that it is read from: %s", f.Name, how)
	}
	return m
}
