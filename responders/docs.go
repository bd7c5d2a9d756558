package responders

import (
	"cmp"
	"fmt"
	"io"
	"strings"

	rbacv1 "k8s.io/api/rbac/v1"

	"stoop/node"
	"stoop/param"
)

//go:generate go test . -run TestDocs -update

// WriteDocs writes what a user looks up about the responders, in Markdown: all
// of it out of the registry, so that it says what the program does.
func WriteDocs(w io.Writer, entries []Entry) error {
	var b strings.Builder
	b.WriteString(`# Responders

<!-- Made from the registry by "go generate ./responders"; change it there. -->

What a rule's actions can be. Each action names one, with its parameters:

` + "```yaml" + `
actions:
  - isolate-pod: {direction: egress, ttl: 1h}
  - slack: {channel: "#security"}
` + "```" + `

They are done in order, but none waits for people to be told
([rules.md](rules.md#actions) says how). A step that fails does not stop the ones after
it, unless it says onFailure: stop. "Harms" means that every guard is asked before it
acts (mode, pause, protected namespaces, cooldown, limits). Evidence and notifications
are never held back by these, but in audit mode they are only told of as well.

| responder | what it does | | undo |
| --- | --- | --- | --- |
`)
	for _, e := range entries {
		fmt.Fprintf(&b, "| [%s](#%[1]s) | %s | %s | %s |\n", e.Name, cell(e.Doc), e.Kind, yesNo(e.undoable()))
	}
	b.WriteString(`
In a cluster stoop needs this before any responder does, to know the pods of its own
node (the request says of which node; RBAC can't):

`)
	writeRBAC(&b, BaseRBAC())
	for _, e := range entries {
		fmt.Fprintf(&b, "\n## %s\n\n%s\n\n", e.Name, e.Doc)
		if e.Params == nil || len(e.Params.Fields) == 0 {
			b.WriteString("It has no parameters.\n")
		} else {
			b.WriteString("| parameter | type | default | |\n| --- | --- | --- | --- |\n")
			writeParams(&b, "", e.Params.Fields)
		}
		fmt.Fprintf(&b, "\n%s\n\n", strings.TrimSpace(e.Notes))
		fmt.Fprintf(&b, "One try may take %s.", param.Duration(e.Deadline))
		if e.Instead != "" {
			fmt.Fprintf(&b, " When the owner's limit holds it back, [%s](#%[1]s) is done instead.", e.Instead)
		}
		if e.Approve != nil {
			if e.Approve(nil) {
				b.WriteString(" It waits until a person approves it, unless its rule says approve: false.")
			} else {
				b.WriteString(" With some parameters it waits until a person approves it, unless its rule says approve: false.")
			}
		}
		b.WriteString("\n")
		if e.local() && (e.Kind == Harm || len(e.Needs) > 0) {
			says := "It acts on the node itself and asks no API server."
			if e.Object == NoObject {
				says = "It asks no API server."
			}
			if e.Kind == Harm {
				says += " It counts in guard.localLimits."
			}
			if len(e.Needs) > 0 {
				says += " The node has to grant: " + needs(e.Needs) + " ([containment.md](containment.md#privileges) says why)."
			}
			fmt.Fprintf(&b, "\n%s\n", fill(says))
		}
		if len(e.RBAC) > 0 {
			b.WriteString("\nPermissions:\n\n")
			writeRBAC(&b, e.RBAC)
		}
		if e.Grants != nil {
			says := "What permissions it needs hangs on its parameters"
			if len(e.RBAC) > 0 {
				says = "Which of these it needs hangs on its parameters"
			}
			fmt.Fprintf(&b, "\n%s\n", fill(says+": `stoop rbac` prints them for your rules ([rbac.md](rbac.md))."))
		}
	}
	_, err := io.WriteString(w, b.String())
	return err
}

func writeParams(b *strings.Builder, under string, fields []param.Field) {
	for _, f := range fields {
		def := f.Default
		switch {
		case f.Required:
			def = "required"
		case def != "":
			def = "`" + def + "`"
		}
		doc := f.Doc
		if len(f.OneOf) > 0 {
			doc += " One of `" + strings.Join(f.OneOf, "`, `") + "`."
		}
		switch {
		case f.Min != "" && f.Max != "":
			doc += fmt.Sprintf(" From %s to %s.", f.Min, f.Max)
		case f.Min != "":
			doc += fmt.Sprintf(" At least %s.", f.Min)
		case f.Max != "":
			doc += fmt.Sprintf(" At most %s.", f.Max)
		}
		fmt.Fprintf(b, "| `%s%s` | %s | %s | %s |\n", under, f.Name, f.Type, cell(def), cell(doc))
		writeParams(b, under+f.Name+".", f.Fields)
	}
}

func writeRBAC(b *strings.Builder, rules []rbacv1.PolicyRule) {
	b.WriteString("| API group | resources | verbs |\n| --- | --- | --- |\n")
	for _, r := range rules {
		what := strings.Join(r.Resources, ", ")
		if len(r.ResourceNames) > 0 {
			what += " (only " + strings.Join(r.ResourceNames, ", ") + ")"
		}
		fmt.Fprintf(b, "| %s | %s | %s |\n", cmp.Or(strings.Join(r.APIGroups, ", "), "core"), what, strings.Join(r.Verbs, ", "))
	}
}

func needs(all []node.Need) string {
	out := make([]string, len(all))
	for i, n := range all {
		out[i] = string(n)
	}
	return strings.Join(out, ", ")
}

// fill breaks a paragraph into lines of at most 88 characters.
func fill(text string) string {
	var b strings.Builder
	n := 0
	for word := range strings.FieldsSeq(text) {
		switch {
		case n == 0:
		case n+1+len(word) > 88:
			b.WriteByte('\n')
			n = 0
		default:
			b.WriteByte(' ')
			n++
		}
		b.WriteString(word)
		n += len(word)
	}
	return b.String()
}

// undoable reports whether steps of a responder can be taken back.
func (e *Entry) undoable() bool {
	_, ok := e.New(Env{}).(Undoer)
	return ok
}

// String is the kind in words of the documentation.
func (k Kind) String() string {
	switch k {
	case Harm:
		return "harms"
	case Evidence:
		return "keeps evidence"
	case Notification:
		return "tells"
	}
	return "unknown"
}

func yesNo(b bool) string {
	if b {
		return "yes"
	}
	return "no"
}

// cell is text for a table.
func cell(s string) string {
	return strings.ReplaceAll(strings.Join(strings.Fields(s), " "), "|", `\|`)
}
