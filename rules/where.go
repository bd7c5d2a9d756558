package rules

import (
	"encoding/json"
	"errors"
	"fmt"
	"reflect"
	"regexp"
	"strconv"
	"strings"

	"cel.dev/cel-go/cel"
	"cel.dev/cel-go/common/ast"
	"cel.dev/cel-go/common/types"
	"cel.dev/cel-go/common/types/ref"
	"cel.dev/cel-go/common/types/traits"
	"cel.dev/cel-go/ext"

	"stoop/alert"
	"stoop/param"
)

// What an expression may cost. The units are CEL's: about one for each
// operation, and one for ten bytes that are searched through, so that an
// alert of 1 MiB can still be searched several times.
const (
	maxCost       = 1_000_000
	maxExpression = 10_000 // characters
)

// variables are what a where expression sees.
func variables() []string {
	return []string{"rule", "priority", "source", "tags", "hostname", "output", "fields"}
}

func newEnv() (*cel.Env, error) {
	return cel.NewEnv(
		cel.Variable("rule", cel.StringType),
		cel.Variable("priority", cel.StringType),
		cel.Variable("source", cel.StringType),
		cel.Variable("tags", cel.ListType(cel.StringType)),
		cel.Variable("hostname", cel.StringType),
		cel.Variable("output", cel.StringType),
		cel.Variable("fields", cel.MapType(cel.StringType, cel.DynType)),
		cel.CrossTypeNumericComparisons(true),
		cel.ParserExpressionSizeLimit(maxExpression),
		ext.Strings(),
	)
}

// expression is a where, compiled.
type expression struct {
	program cel.Program
	root    ast.Expr
	info    *ast.SourceInfo
}

// fault is a mistake in an expression; line is from 1, column from 0.
type fault struct {
	line, column int
	message      string
}

func compile(env *cel.Env, text string) (*expression, []fault) {
	checked, issues := env.Compile(text)
	if issues != nil && issues.Err() != nil {
		var faults []fault
		for _, e := range issues.Errors() {
			line, column := e.Location.Line(), e.Location.Column()
			faults = append(faults, fault{line, column, explain(e.Message, from(text, line, column))})
		}
		return nil, faults
	}
	if t := checked.OutputType(); !t.IsExactType(cel.BoolType) {
		message := fmt.Sprintf("where must be true or false, not of type %s", t)
		if t.IsExactType(cel.DynType) {
			message = `where must be true or false: compare the field with something, such as … == "x"`
		}
		return nil, []fault{{1, 0, message}}
	}
	program, err := env.Program(checked, cel.EvalOptions(cel.OptOptimize), cel.CostLimit(maxCost))
	if err != nil {
		return nil, []fault{{1, 0, "where: " + err.Error()}}
	}
	rep := checked.NativeRep()
	return &expression{program: program, root: rep.Expr(), info: rep.SourceInfo()}, nil
}

// from is the text behind a place in it.
func from(text string, line, column int) string {
	for ; line > 1; line-- {
		_, text, _ = strings.Cut(text, "\n")
	}
	for i := range text {
		if column--; column < 0 {
			return text[i:]
		}
	}
	return ""
}

// functions are those that people most often look for.
func functions() []string {
	return []string{
		"contains", "startsWith", "endsWith", "matches", "size", "exists", "all", "filter", "map", "lowerAscii",
		"upperAscii", "split", "join", "replace", "trim", "substring", "indexOf", "int", "double", "string",
	}
}

// explain turns CEL's words into ones that help. rest is the expression from
// where the mistake is.
func explain(message, rest string) string {
	undeclared := regexp.MustCompile(`^undeclared reference to '([^']*)'`)
	if m := undeclared.FindStringSubmatch(message); m != nil {
		dotted := regexp.MustCompile(`^[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z_][A-Za-z0-9_]*)+`).FindString(rest)
		switch {
		case strings.HasPrefix(rest, "("):
			return "where: " + param.Unknown("function", m[1], functions())
		case dotted != "":
			return fmt.Sprintf("where: unknown name %s: the fields of an alert are written as fields[%q]", param.Cut(m[1]), dotted)
		}
		return "where: " + param.Unknown("name", m[1], variables())
	}
	switch {
	case strings.Contains(message, "invalid argument to has() macro"):
		return `where: has() takes no brackets: write "name" in fields`
	case strings.Contains(message, "'<EOF>'"):
		return "where: the expression ends too early"
	case strings.HasPrefix(message, "Syntax error: token recognition error at: '= "):
		return "where: write == to compare"
	}
	if i := strings.Index(message, " expecting {"); i >= 0 {
		message = message[:i] // a list of all that CEL knows
	}
	operators := strings.NewReplacer(
		"'_==_'", "==", "'_!=_'", "!=", "'_&&_'", "&&", "'_||_'", "||", "'!_'", "!", "'_+_'", "+", "'_-_'", "-",
		"'_<_'", "<", "'_<=_'", "<=", "'_>_'", ">", "'_>=_'", ">=", "'@in'", "in", "'_[_]'", "[ ]", "'_?_:_'", "? :",
		"Syntax error:", "syntax error:", "found no matching overload for", "these types don't go together with",
		" applied to ", ": ")
	return "where: " + operators.Replace(message)
}

var errNotBool = errors.New("is neither true nor false")

// holds asks the expression of an alert. An error means no.
func (e *expression) holds(a *alert.Alert) (bool, error) {
	out, _, err := e.program.Eval(&activation{a})
	if err != nil {
		return false, err
	}
	b, ok := out.(types.Bool)
	if !ok {
		return false, errNotBool
	}
	return bool(b), nil
}

// activation shows an alert to the expressions.
type activation struct{ alert *alert.Alert }

// ResolveName is one of [variables].
func (act *activation) ResolveName(name string) (any, bool) {
	a := act.alert
	switch name {
	case "rule":
		return types.String(a.Rule), true
	case "priority":
		return types.String(a.Priority.String()), true
	case "source":
		return types.String(a.Source), true
	case "tags":
		return types.NewStringList(types.DefaultTypeAdapter, a.Tags), true
	case "hostname":
		return types.String(a.Hostname), true
	case "output":
		return types.String(a.Output), true
	case "fields":
		return &fieldMap{alert: a}, true
	}
	return nil, false
}

// Parent is none.
func (act *activation) Parent() cel.Activation { return nil }

// fieldMap is the alert's fields for CEL. Mostly one or two of twenty are looked
// up, so each is made ready when it is; the rare expression that wants them all
// gets a copy.
type fieldMap struct {
	alert *alert.Alert
	copy  traits.Mapper
}

var _ traits.Mapper = (*fieldMap)(nil)

// Find is a field. What counts as absent is not there.
func (m *fieldMap) Find(key ref.Val) (ref.Val, bool) {
	name, ok := key.(types.String)
	if !ok {
		return types.MaybeNoSuchOverloadErr(key), false
	}
	v := m.alert.Value(string(name))
	if v == nil || v == "" || v == "<NA>" {
		return nil, false
	}
	return types.DefaultTypeAdapter.NativeToValue(celValue(v)), true
}

// Get is Find with an error for what is not there.
func (m *fieldMap) Get(key ref.Val) ref.Val {
	v, ok := m.Find(key)
	switch {
	case ok:
		return v
	case v != nil:
		return v
	}
	return types.ValOrErr(key, "no such key: %v", key)
}

// Contains is "name" in fields.
func (m *fieldMap) Contains(key ref.Val) ref.Val {
	v, ok := m.Find(key)
	if v != nil && types.IsError(v) {
		return v
	}
	return types.Bool(ok)
}

func (m *fieldMap) all() traits.Mapper {
	if m.copy == nil {
		raw := m.alert.Fields()
		out := make(map[string]any, len(raw))
		for name, v := range raw {
			if v != nil && v != "" && v != "<NA>" {
				out[name] = celValue(v)
			}
		}
		m.copy = types.NewStringInterfaceMap(types.DefaultTypeAdapter, out)
	}
	return m.copy
}

// Size is the number of fields that are there.
func (m *fieldMap) Size() ref.Val { return m.all().Size() }

// Iterator goes over the names of the fields that are there.
func (m *fieldMap) Iterator() traits.Iterator { return m.all().Iterator() }

// Equal compares all the fields that are there.
func (m *fieldMap) Equal(other ref.Val) ref.Val { return m.all().Equal(other) }

// ConvertToNative turns all the fields that are there into a Go value.
func (m *fieldMap) ConvertToNative(t reflect.Type) (any, error) { return m.all().ConvertToNative(t) }

// ConvertToType is for CEL's type().
func (m *fieldMap) ConvertToType(t ref.Type) ref.Val { return m.all().ConvertToType(t) }

// Type is CEL's map.
func (m *fieldMap) Type() ref.Type { return types.MapType }

// Value is all the fields that are there.
func (m *fieldMap) Value() any { return m.all().Value() }

// celValue turns numbers into int where they are whole and fit, else into
// double.
func celValue(v any) any {
	switch v := v.(type) {
	case json.Number:
		if i, err := strconv.ParseInt(v.String(), 10, 64); err == nil {
			return i
		}
		f, _ := v.Float64() // infinite where it is too large
		return f
	case []any:
		out := make([]any, len(v))
		for i := range v {
			out[i] = celValue(v[i])
		}
		return out
	case map[string]any:
		out := make(map[string]any, len(v))
		for k := range v {
			out[k] = celValue(v[k])
		}
		return out
	}
	return v
}
