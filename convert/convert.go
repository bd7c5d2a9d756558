// Package convert makes rules.yaml out of the rules of other engines. It stands
// beside an alert's way, before any alert comes: what it writes is read by package
// rules as if a person had written it.
//
// What means the same is said the same way; where the meaning differs a comment
// says how; and what can't be said is refused, with its place, so that nobody
// takes a rule for converted that does less, or more, than it did.
package convert

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
	"strings"
	"unicode"

	"gopkg.in/yaml.v3"

	"stoop/param"
	"stoop/rules"
)

// File is a source and its name for messages.
type File struct {
	Name string
	Src  []byte
}

// problems collects what is refused, over all files.
type problems struct {
	files []File
	all   rules.Problems
}

// fileLines is more lines than a file may have. The line of a node is counted on
// over the files, so that it also says which one it is of, for whatever is made of
// it too.
const fileLines = 1 << 24

func (p *problems) refuse(n *yaml.Node, format string, args ...any) {
	f := p.files[n.Line/fileLines]
	p.all = append(p.all, rules.At(f.Name, f.Src, max(line(n), 1), max(n.Column, 1), fmt.Sprintf(format, args...)))
}

func line(n *yaml.Node) int { return n.Line % fileLines }

// err is all of them, in the order of the files.
func (p *problems) err() error {
	if len(p.all) == 0 {
		return nil
	}
	var sorted rules.Problems
	for _, f := range p.files {
		var of rules.Problems
		for _, pr := range p.all {
			if pr.File == f.Name {
				of = append(of, pr)
			}
		}
		slices.SortStableFunc(of, func(a, b rules.Problem) int {
			return cmp.Or(cmp.Compare(a.Line, b.Line), cmp.Compare(a.Column, b.Column))
		})
		sorted = append(sorted, slices.Compact(of)...)
	}
	return sorted
}

// read is the list that the file of this number holds.
func (p *problems) read(i int) []*yaml.Node {
	f := p.files[i]
	root, err := rules.Document(f.Name, f.Src)
	var ps rules.Problems
	switch {
	case errors.As(err, &ps):
		p.all = append(p.all, ps...)
	case err != nil:
		p.all = append(p.all, rules.Problem{File: f.Name, Line: 1, Column: 1, Message: err.Error()})
	case root == nil:
		p.all = append(p.all, rules.At(f.Name, f.Src, 1, 1, "there is nothing in this file"))
	default:
		p.number(root, i, map[*yaml.Node]bool{})
		if param.Resolve(root).Kind == yaml.SequenceNode {
			return param.Resolve(root).Content
		}
		p.refuse(root, "a list of actions and rules is expected here, not %s", param.What(root))
	}
	return nil
}

// number counts the lines on, and refuses keys that stand twice.
func (p *problems) number(n *yaml.Node, file int, seen map[*yaml.Node]bool) {
	if seen[n] {
		return
	}
	seen[n] = true
	if n.Kind == yaml.AliasNode {
		p.number(n.Alias, file, seen)
	}
	var wrong []param.Problem
	if n.Kind == yaml.MappingNode {
		wrong = param.Keys(n, func(*yaml.Node, *yaml.Node) {})
	}
	for _, child := range n.Content {
		p.number(child, file, seen)
	}
	n.Line += file * fileLines
	for _, w := range wrong {
		p.refuse(w.Node, "%s", w.Message)
	}
}

// The nodes of what is written. They have the place of what they were made of, so
// that what is wrong with them is shown there.

func scalar(from *yaml.Node, value string) *yaml.Node {
	n := &yaml.Node{Kind: yaml.ScalarNode, Tag: "!!str", Value: value}
	switch strings.ToLower(value) {
	case "yes", "no", "on", "off", "y", "n": // which YAML once took for true and false
		n.Style = yaml.DoubleQuotedStyle
	}
	// A text of several lines is easier to read as one, where YAML can hold it so.
	if strings.Contains(value, "\n") && value == strings.TrimLeft(value, " \t\n") && !strings.ContainsFunc(value, notPlain) {
		n.Style = yaml.LiteralStyle
	}
	return place(n, from)
}

// notPlain is what YAML escapes.
func notPlain(r rune) bool { return r != '\n' && !unicode.IsPrint(r) }

// bare is a number, true or false.
func bare(from *yaml.Node, value string) *yaml.Node {
	return place(&yaml.Node{Kind: yaml.ScalarNode, Value: value}, from)
}

func list(from *yaml.Node, items ...*yaml.Node) *yaml.Node {
	n := &yaml.Node{Kind: yaml.SequenceNode, Content: items}
	if len(items) < 8 && !slices.ContainsFunc(items, func(i *yaml.Node) bool {
		return i.Kind != yaml.ScalarNode || len(i.Value) > 60 || i.Style == yaml.LiteralStyle
	}) {
		n.Style = yaml.FlowStyle
	}
	return place(n, from)
}

func texts(from *yaml.Node, values []string) *yaml.Node {
	var items []*yaml.Node
	for _, v := range values {
		items = append(items, scalar(from, v))
	}
	if len(items) == 1 {
		return items[0]
	}
	return list(from, items...)
}

func place(n, from *yaml.Node) *yaml.Node {
	if from != nil {
		n.Line, n.Column = from.Line, from.Column
	}
	return n
}

func mapping(from *yaml.Node) *yaml.Node {
	return place(&yaml.Node{Kind: yaml.MappingNode, Tag: "!!map"}, from)
}

func set(m *yaml.Node, key string, value *yaml.Node) {
	m.Content = append(m.Content, scalar(value, key), value)
}

// comment is a paragraph as YAML has it, in lines of at most 88 characters.
func comment(paragraphs ...string) string {
	var b strings.Builder
	for _, p := range paragraphs {
		line := "#"
		for word := range strings.FieldsSeq(p) {
			if len(line)+1+len(word) > 88 && line != "#" {
				b.WriteString(line + "\n")
				line = "#"
			}
			line += " " + word
		}
		b.WriteString(line + "\n")
	}
	return strings.TrimSuffix(b.String(), "\n")
}
