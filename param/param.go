// Package param describes the parameters of a responder once. It stands beside
// an alert's way, not on it: when the rules are read it checks what they say,
// when a step is done it gives the responder what was said, and the
// documentation is written from the same description, so that the three never
// disagree.
//
// The description is read off the struct that the responder works with, filled
// with its defaults:
//
//	type params struct {
//		GracePeriod param.Duration `param:"gracePeriod" doc:"How long the pod has to end." max:"5m"`
//	}
//	d := param.Describe(params{GracePeriod: param.Duration(time.Second)})
package param

import (
	"encoding"
	"encoding/json"
	"fmt"
	"reflect"
	"strconv"
	"strings"
	"unicode"

	"gopkg.in/yaml.v3"
)

// Description is the parameters of a responder, or any other mapping that
// people write in YAML.
type Description struct {
	Fields []Field
	typ    reflect.Type
	def    reflect.Value
}

// Field is one parameter.
type Field struct {
	Name     string
	Type     string   // for people: "duration", "list of CIDR"
	Default  string   // as it would be written; "" is nothing
	Doc      string   // one or more sentences
	Required bool     // has no default
	OneOf    []string // the only words allowed; nil: any
	Min, Max string   // as it would be written; "" is no bound
	Fields   []Field  // of a mapping with keys of its own, or of each in a list of such

	index    []int
	typ      reflect.Type
	min, max *int64
}

// Problem is a mistake in what somebody wrote, and where it stands.
type Problem struct {
	Node    *yaml.Node // nil only where Check was given a nil node
	Message string     // names neither place nor responder
	// Secret says that the line may hold a secret, which nobody should print.
	Secret bool
}

// Validator is what a struct of parameters implements when there is more to
// check than one parameter at a time. It is asked only when each of them is
// right by itself.
type Validator interface{ Validate() error }

// Describe reads the description off a struct, or a pointer to one, that holds
// the defaults. Each of its exported fields needs the tags param (the name that
// people write) and doc, and may have
//
//	required:"true"            it has no default
//	oneof:"ingress egress"     the only words allowed
//	min:"0s" max:"5m"          for numbers, [Duration] and [Size]
//
// A field may be a string, bool, integer, [Duration], [Size], [CIDR], [URL],
// [Portion], [Secret], anything that unmarshals itself from text, a slice of these, a
// map[string]string, or a struct of such fields; an embedded struct lends its
// fields. Anything else is the author's mistake, and panics.
func Describe(defaults any) *Description {
	v := reflect.Indirect(reflect.ValueOf(defaults))
	if v.Kind() != reflect.Struct {
		panic(fmt.Sprintf("param: %T is no struct", defaults))
	}
	return &Description{Fields: describe(v), typ: v.Type(), def: v}
}

func describe(v reflect.Value) []Field {
	var fields []Field
	for i := range v.NumField() {
		sf := v.Type().Field(i)
		switch {
		case sf.Anonymous && sf.Type.Kind() == reflect.Struct && sf.Tag.Get("param") == "":
			for _, f := range describe(v.Field(i)) {
				f.index = append([]int{i}, f.index...)
				fields = append(fields, f)
			}
			continue
		case !sf.IsExported(), sf.Tag.Get("param") == "-":
			continue
		}
		f := Field{
			Name:     sf.Tag.Get("param"),
			Type:     typeName(sf.Type),
			Default:  show(v.Field(i)),
			Doc:      sf.Tag.Get("doc"),
			Required: sf.Tag.Get("required") == "true",
			OneOf:    strings.Fields(sf.Tag.Get("oneof")),
			Min:      sf.Tag.Get("min"),
			Max:      sf.Tag.Get("max"),
			index:    []int{i},
			typ:      sf.Type,
		}
		if f.Name == "" || f.Type == "" {
			panic(fmt.Sprintf("param: field %s of %s has no name for people, or a type that is none of ours", sf.Name, v.Type()))
		}
		if len(f.OneOf) == 0 {
			f.OneOf = nil
		}
		if f.Required {
			f.Default = ""
		}
		f.min, f.max = bound(sf.Type, f.Min), bound(sf.Type, f.Max)
		switch {
		case isMapping(sf.Type):
			f.Fields = describe(v.Field(i))
		case sf.Type.Kind() == reflect.Slice && isMapping(sf.Type.Elem()):
			f.Fields = describe(reflect.New(sf.Type.Elem()).Elem())
		}
		fields = append(fields, f)
	}
	return fields
}

// isMapping reports whether t is a struct whose fields are parameters.
func isMapping(t reflect.Type) bool {
	return t.Kind() == reflect.Struct && t != reflect.TypeFor[Secret]() && !isText(t)
}

func isText(t reflect.Type) bool {
	return reflect.PointerTo(t).Implements(reflect.TypeFor[encoding.TextUnmarshaler]())
}

func isInt(t reflect.Type) bool {
	return t.Kind() >= reflect.Int && t.Kind() <= reflect.Int64
}

// typeName is how people call a type, "" if it can't be a parameter.
func typeName(t reflect.Type) string {
	switch t {
	case reflect.TypeFor[Duration](), reflect.TypeFor[Size](), reflect.TypeFor[Secret]():
		return strings.ToLower(t.Name())
	case reflect.TypeFor[CIDR](), reflect.TypeFor[URL]():
		return t.Name()
	case reflect.TypeFor[Portion]():
		return "number or percentage"
	case reflect.TypeFor[map[string]string]():
		return "map of string"
	}
	switch {
	case isText(t):
		return strings.ToLower(t.Name())
	case t.Kind() == reflect.String:
		return "string"
	case t.Kind() == reflect.Bool:
		return "bool"
	case isInt(t):
		return "integer"
	case t.Kind() == reflect.Slice:
		if of := typeName(t.Elem()); of != "" && t.Elem().Kind() != reflect.Slice {
			return "list of " + of
		}
	case t.Kind() == reflect.Struct:
		return "mapping"
	}
	return ""
}

// bound reads a tag min or max.
func bound(t reflect.Type, s string) *int64 {
	if s == "" {
		return nil
	}
	if !isInt(t) {
		panic(fmt.Sprintf("param: min and max mean nothing for %s", t))
	}
	v := reflect.New(t)
	var err error
	if u, ok := v.Interface().(encoding.TextUnmarshaler); ok {
		err = u.UnmarshalText([]byte(s))
	} else {
		var n int64
		n, err = strconv.ParseInt(s, 10, 64)
		v.Elem().SetInt(n)
	}
	if err != nil {
		panic(fmt.Sprintf("param: min or max %q: %v", s, err))
	}
	n := v.Elem().Int()
	return &n
}

// show is a value as it would be written in YAML.
func show(v reflect.Value) string {
	switch x := v.Interface().(type) {
	case fmt.Stringer:
		return x.String()
	case map[string]string:
		if len(x) == 0 {
			return ""
		}
	case encoding.TextMarshaler:
		b, err := x.MarshalText()
		if err != nil {
			return ""
		}
		return string(b)
	}
	switch v.Kind() {
	case reflect.Slice:
		if v.Len() == 0 {
			return ""
		}
		var parts []string
		for i := range v.Len() {
			parts = append(parts, show(v.Index(i)))
		}
		return "[" + strings.Join(parts, ", ") + "]"
	case reflect.Map:
		b, err := json.Marshal(v.Interface())
		if err != nil {
			return ""
		}
		return string(b)
	case reflect.Struct:
		return ""
	}
	return fmt.Sprint(v.Interface())
}

// Check reads a YAML mapping of parameters; nil, empty and null mean that all
// have their defaults. It returns every mistake, each with the node where it
// stands, or, if there is none, the parameters that were written as JSON for
// [Decode] (nil: none was).
func (d *Description) Check(n *yaml.Node) (json.RawMessage, []Problem) {
	var c checker
	set := c.mapping(d.Fields, n)
	if len(c.problems) > 0 {
		return nil, c.problems
	}
	var raw json.RawMessage
	if len(set) > 0 {
		b, err := json.Marshal(set)
		if err != nil {
			return nil, []Problem{{Node: n, Message: err.Error()}}
		}
		raw = b
	}
	v := reflect.New(d.typ)
	v.Elem().Set(d.def)
	if err := Decode(raw, v.Interface()); err != nil {
		return nil, []Problem{{Node: n, Message: err.Error()}}
	}
	if val, ok := v.Interface().(Validator); ok {
		if err := val.Validate(); err != nil {
			return nil, []Problem{{Node: n, Message: err.Error()}}
		}
	}
	return raw, nil
}

// Decode sets the parameters that [Description.Check] returned in the struct
// that into points to; what they leave out keeps its value there. Its error
// says which of them this struct does not take.
func Decode(raw json.RawMessage, into any) error {
	v := reflect.ValueOf(into)
	if v.Kind() != reflect.Pointer || v.Elem().Kind() != reflect.Struct {
		return fmt.Errorf("parameters can't be read into %T: it is no pointer to a struct", into)
	}
	if len(raw) == 0 {
		return nil
	}
	return decode(raw, v.Elem())
}

func decode(raw json.RawMessage, v reflect.Value) error {
	var set map[string]json.RawMessage
	if err := json.Unmarshal(raw, &set); err != nil {
		return fmt.Errorf("reading the parameters: %w", err)
	}
	for _, f := range describe(v) {
		value, ok := set[f.Name]
		if !ok {
			continue
		}
		delete(set, f.Name)
		var err error
		if isMapping(f.typ) {
			err = decode(value, v.FieldByIndex(f.index))
		} else {
			// A fresh value: a list or map that was written stands in the
			// place of the default, it is not merged into it.
			fresh := reflect.New(f.typ)
			if err = unmarshal(value, fresh.Elem()); err == nil {
				v.FieldByIndex(f.index).Set(fresh.Elem())
			}
		}
		if err != nil {
			return fmt.Errorf("reading the parameter %s: %w", f.Name, err)
		}
	}
	for name := range set {
		return fmt.Errorf("there is no parameter %q here: was it written by another version?", name)
	}
	return nil
}

func unmarshal(raw json.RawMessage, v reflect.Value) error {
	if v.Kind() == reflect.Slice && isMapping(v.Type().Elem()) {
		var items []json.RawMessage
		if err := json.Unmarshal(raw, &items); err != nil {
			return err
		}
		v.Set(reflect.MakeSlice(v.Type(), len(items), len(items)))
		for i, item := range items {
			if err := decode(item, v.Index(i)); err != nil {
				return err
			}
		}
		return nil
	}
	return json.Unmarshal(raw, v.Addr().Interface())
}

// Cut shortens s for a message, and quotes it.
func Cut(s string) string {
	const most = 60
	r := []rune(s)
	if len(r) > most {
		return strconv.Quote(string(r[:most])) + "…"
	}
	for _, c := range r {
		if c == '"' || c == '\\' || !unicode.IsPrint(c) {
			return strconv.Quote(s)
		}
	}
	return `"` + s + `"`
}
