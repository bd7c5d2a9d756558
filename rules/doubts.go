package rules

import (
	"fmt"
	"slices"
	"strings"

	"cel.dev/cel-go/common/ast"
	"cel.dev/cel-go/common/operators"
	"cel.dev/cel-go/common/types"
	"gopkg.in/yaml.v3"

	"stoop/alert"
	"stoop/param"
)

// doubts warns of what a rule may say and hardly means.
func (p *parser) doubts(r *Rule, except *yaml.Node) {
	if r.except == nil || except == nil {
		return
	}
	if covers(r.except, &r.match) {
		p.warn(except, "this spares everything that match asks for: the rule never matches")
	}
	namespaced := slices.ContainsFunc(r.except.fields, func(f fieldCondition) bool { return f.name == "k8s.ns.name" })
	for _, f := range r.except.fields {
		if why := chosen(f.name, namespaced); why != "" {
			p.warn(fieldNode(except, f.name), "%s: an attacker who knows this is spared", why)
		}
	}
}

// fieldNode is where a field stands in an except.
func fieldNode(except *yaml.Node, name string) *yaml.Node {
	at := except
	param.Keys(except, func(key, value *yaml.Node) {
		if param.Resolve(key).Value != keyFields {
			return
		}
		param.Keys(value, func(key, _ *yaml.Node) {
			if param.Resolve(key).Value == name {
				at = key
			}
		})
	})
	return at
}

// covers reports whether except spares all that match asks for. It looks no
// further than at the values as they are written.
func covers(except, match *conditions) bool {
	inside := func(e, m *patterns) bool {
		if e == nil {
			return true
		}
		if m == nil {
			return false
		}
		for _, v := range m.all {
			p := newPattern(v)
			if p.glob() && !slices.Contains(e.all, v) || !p.glob() && !e.match(v) {
				return false
			}
		}
		return len(m.all) > 0
	}
	asked := match.priorities
	if asked == 0 {
		asked = 0xff
	}
	if except.priorities != 0 && asked&^except.priorities != 0 ||
		!inside(except.rule, match.rule) || !inside(except.source, match.source) ||
		!inside(except.hostname, match.hostname) || except.tags != nil {
		return false
	}
	for _, e := range except.fields {
		i := slices.IndexFunc(match.fields, func(m fieldCondition) bool { return m.name == e.name })
		if i < 0 || !inside(e.values, match.fields[i].values) {
			return false
		}
	}
	return true
}

// chosen says who chooses the value of a field, "" if nobody does who could be
// an attacker. namespaced: the pod's namespace is asked for as well.
func chosen(field string, namespaced bool) string {
	is := func(prefixes ...string) bool {
		return slices.ContainsFunc(prefixes, func(p string) bool {
			return field == p || strings.HasPrefix(field, p) && strings.ContainsAny(p[len(p)-1:], ".[") ||
				strings.HasPrefix(field, p+"[")
		})
	}
	switch {
	case is("proc.name", "proc.pname", "proc.aname", "proc.sname", "proc.cmdline", "proc.pcmdline", "proc.acmdline",
		"proc.args", "proc.exe", "proc.pexe", "proc.aexe", "proc.exeline", "proc.cmdnargs", "proc.cmdlenargs",
		"proc.exepath", "proc.pexepath", "proc.aexepath", "proc.cwd", "proc.env", "proc.aenv", "proc.penv",
		"proc.tty", "proc.vpgid.name", "proc.vpgid.exe", "proc.vpgid.exepath", "proc.pgid.name", "proc.pgid.exe",
		"proc.pgid.exepath", "proc.sid.exe", "proc.sid.exepath", "thread.name"):
		return fmt.Sprintf("%q is chosen by whoever runs the process", field)
	case is("fd.name", "fd.nameraw", "fd.directory", "fd.filename", "fd.containername", "fd.containerdirectory", "fs.path."):
		return fmt.Sprintf("%q is chosen by whoever opens the file or the connection", field)
	case is("fd.rip.name", "fd.lip.name", "fd.cip.name", "fd.sip.name"):
		return fmt.Sprintf("%q is chosen by whoever runs the name server", field)
	case is("evt.args", "evt.arg", "evt.arg.", "evt.rawarg", "evt.rawarg.", "evt.buffer", "evt.info", "evt.plugininfo"):
		return fmt.Sprintf("%q is chosen by whoever makes the system call", field)
	case is("user.name", "user.loginname", "user.homedir", "user.shell", "group.name"):
		return fmt.Sprintf("%q is a name that a container can give itself; user.uid is not", field)
	case is("container.name", "container.label", "container.label.", "container.labels", "container.env", "container.env."),
		is("k8s.pod.label", "k8s.pod.label.", "k8s.pod.labels"),
		is("k8s.pod.name") && !namespaced:
		return fmt.Sprintf("%q is chosen by whoever makes the pod; k8s.ns.name is not", field)
	case is("ka.useragent", "ka.uri", "ka.uri.", "ka.req.", "ka.target.name", "ka.resp.name"):
		return fmt.Sprintf("%q is chosen by whoever makes the request; ka.user.name is not", field)
	case is("jevt.value", "jevt.rawtime", "jevt.obj", "json.value", "json.obj", "http."):
		return fmt.Sprintf("%q is chosen by whoever caused the event", field)
	}
	return ""
}

// doubts are the parts of an expression that spare somebody for what he may
// write himself, and those that are always the same.
func (e *expression) doubts() []fault {
	d := &doubter{info: e.info, seen: map[string]bool{}}
	ast.PostOrderVisit(e.root, ast.NewExprVisitor(func(x ast.Expr) {
		if name, ok := fieldOf(x); ok && name == "k8s.ns.name" {
			d.namespaced = true
		}
	}))
	if e.root.Kind() == ast.LiteralKind {
		d.add(e.root, fmt.Sprintf("where is always %v", e.root.AsLiteral().Value()))
		return d.faults
	}
	d.walk(e.root, false, true)
	return d.faults
}

type doubter struct {
	info       *ast.SourceInfo
	faults     []fault
	seen       map[string]bool
	namespaced bool // the pod's namespace is asked for as well
}

func (d *doubter) add(at ast.Expr, message string) {
	if d.seen[message] {
		return
	}
	d.seen[message] = true
	l := d.info.GetStartLocation(at.ID())
	d.faults = append(d.faults, fault{l.Line(), l.Column(), message})
}

// walk goes through an expression. spares: it stands under a "not", so that
// being true spares somebody. Where it can't tell, both may be so.
func (d *doubter) walk(e ast.Expr, spares, demands bool) {
	switch e.Kind() {
	case ast.CallKind:
		d.call(e, spares, demands)
	case ast.SelectKind:
		d.trusts(e, spares)
		d.walk(e.AsSelect().Operand(), spares, demands)
	case ast.IdentKind:
		if e.AsIdent() == "output" && spares {
			d.add(e, `"output" holds what an attacker wrote: one who knows this is spared`)
		}
	case ast.ListKind:
		for _, x := range e.AsList().Elements() {
			d.walk(x, spares, demands)
		}
	case ast.ComprehensionKind:
		c := e.AsComprehension()
		d.walk(c.IterRange(), spares, demands)
		d.walk(c.LoopStep(), spares, demands)
	}
}

func (d *doubter) call(e ast.Expr, spares, demands bool) {
	c := e.AsCall()
	args := c.Args()
	switch c.FunctionName() {
	case operators.Index:
		d.trusts(e, spares)
	case operators.LogicalNot:
		spares, demands = demands, spares
	case operators.NotEquals:
		d.priority(args[0], args[1])
		spares, demands = demands, spares
	case operators.Equals:
		d.priority(args[0], args[1])
		if isBool(args[0]) || isBool(args[1]) {
			spares, demands = true, true
		}
	case operators.In:
		if args[1].Kind() == ast.ListKind {
			for _, x := range args[1].AsList().Elements() {
				d.priority(args[0], x)
			}
		}
	case operators.Conditional:
		d.walk(args[0], true, true)
		args = args[1:]
	}
	if c.IsMemberFunction() {
		d.walk(c.Target(), spares, demands)
	}
	for _, a := range args {
		d.walk(a, spares, demands)
	}
}

func (d *doubter) trusts(e ast.Expr, spares bool) {
	name, ok := fieldOf(e)
	if !ok || !spares {
		return
	}
	if why := chosen(name, d.namespaced); why != "" {
		d.add(e, why+": an attacker who knows this is spared")
	}
}

// fieldOf is the name in fields["name"] and fields.name.
func fieldOf(e ast.Expr) (string, bool) {
	switch e.Kind() {
	case ast.SelectKind:
		s := e.AsSelect()
		return s.FieldName(), isFields(s.Operand())
	case ast.CallKind:
		if c := e.AsCall(); c.FunctionName() == operators.Index && isFields(c.Args()[0]) {
			return text(c.Args()[1])
		}
	}
	return "", false
}

// priority finds comparisons with a word that no priority is.
func (d *doubter) priority(a, b ast.Expr) {
	if a.Kind() != ast.IdentKind {
		a, b = b, a
	}
	word, ok := text(b)
	if !ok || a.Kind() != ast.IdentKind || a.AsIdent() != "priority" {
		return
	}
	var words []string
	for _, p := range alert.Priorities() {
		if words = append(words, p.String()); word == p.String() {
			return
		}
	}
	d.add(b, param.Unknown("priority", word, words))
}

func isFields(e ast.Expr) bool { return e.Kind() == ast.IdentKind && e.AsIdent() == "fields" }

func isBool(e ast.Expr) bool {
	if e.Kind() != ast.LiteralKind {
		return false
	}
	_, ok := e.AsLiteral().(types.Bool)
	return ok
}

func text(e ast.Expr) (string, bool) {
	if e.Kind() != ast.LiteralKind {
		return "", false
	}
	s, ok := e.AsLiteral().(types.String)
	return string(s), ok
}
